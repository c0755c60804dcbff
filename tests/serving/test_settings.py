"""What `python -m trainer.serve` may be told, and what it says of anything else."""

import pytest

from trainer.errors import ConfigError
from trainer.serving.settings import read_settings


def test_values_are_read_as_what_they_are() -> None:
    told = read_settings(
        {"model": "outputs/a", "port": "8080", "window_ms": "0.5", "log_sample": "0.01", "name": "1"}, "/c"
    )
    assert (told.model, told.port, told.window_ms, told.log_sample) == ("outputs/a", 8080, 0.5, 0.01)
    assert told.name == "1"
    assert told.cache_dir == "/c"
    assert told.host == "127.0.0.1"  # nobody else, unless it is said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=a", "batsh=3"], "batsh: there is no such key; did you mean batch?"),
        (["model=a", "port=99999"], "port=99999: is not valid; use a value less than or equal to 65535"),
        (["model=a", "batch=many"], "batch=many: is not valid; use a valid integer"),
        (["model=a", "window_ms=nan"], "window_ms=nan: is not valid; use a finite number"),
        (["model=a", "log_sample=2"], "log_sample=2: is not valid; use a value less than or equal to 1"),
        (["model=a", "name=a/b"], "name=a/b: is not valid; use pattern"),
        (["model=a", "max_images=65", "queue=64"], "max_images=65: is more than queue=64"),
        (["model=a", "queue=0", "batch=0"], "the configuration has 2 faults"),
    ],
)
def test_every_fault_is_told(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings(dict(argument.split("=") for argument in arguments))
    assert message in str(caught.value)
