"""Memory estimates: what is refused, and the advice."""

import pytest

from tests.config.test_schema import tree
from tests.errors import raises
from trainer.config.schema import load_resolved
from trainer.errors import ConfigError
from trainer.planning.estimates import ACTIVATIONS, DECODED, check_device_memory

GB = 10**9


@pytest.mark.parametrize(
    ("decoded", "activations", "cache", "key", "value", "fix"),
    [
        (14 * GB, GB, "memory", "data.cache", "memory", "use auto or disk: decoded images in memory are 14.00 GB"),
        (14 * GB, GB, "auto", "data.cache", "auto", "use disk"),
        (3 * GB, 12 * GB, "auto", "training.batch_size", 32, "use 10 or less"),
        (3 * GB, 12 * GB, "memory", "training.batch_size", 32, "use 10 or less"),
        (0, 12 * GB, "auto", "training.batch_size", 32, "use 18 or less"),
    ],
)
def test_the_advice_is_about_what_does_not_fit(
    decoded: int, activations: int, cache: str, key: str, value: object, fix: str
) -> None:
    config = load_resolved(tree(data={"source": "digits", "cache": cache}))
    uses = [("variables", GB), (ACTIVATIONS, activations), (DECODED, decoded)]
    with raises(ConfigError, key=key, value=value, problem="needs about .* has 8.00 GB", fix=fix):
        check_device_memory(config, uses, 8 * GB, 1)
