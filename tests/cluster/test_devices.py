"""TensorFlow's thread pools respect the quota of a container."""

from pathlib import Path

import pytest

from tests.errors import raises
from tests.processes import run_python
from trainer.cluster.devices import check_batch_size
from trainer.config.schema import validate_config
from trainer.errors import ConfigError

CHILD = """
import sys, time
from pathlib import Path
import tensorflow as tf
from trainer.cluster.devices import set_thread_pools
from trainer.data.host import count_usable_cpus

set_thread_pools(count_usable_cpus(Path(sys.argv[1])))
numbers = tf.random.stateless_normal([1000, 1000], [1, 2])
for _ in range(2):
    began, used = time.perf_counter(), time.process_time()
    for _ in range(10):
        numbers = tf.linalg.l2_normalize(numbers @ numbers)
    numbers.numpy()
print((time.process_time() - used) / (time.perf_counter() - began))
"""


@pytest.mark.slow
def test_a_quota_of_one_processor_keeps_one_busy(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert float(run_python(CHILD, tmp_path).stdout) < 1.2


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "mixup", "replicas", "advice"),
    [
        (9, 3, 0.2, 1, ("6", "12")), (8, 3, 0.2, 1, ("6", "12")), (7, 1, 0.2, 1, ("6", "8")), (1, 1, 0.2, 1, ("2",)),
        (6, 1, 0.2, 2, ("4", "8")), (10, 4, 0.0, 1, ("8", "12")), (3, 2, 0.0, 2, ("4",)),
    ],
)  # fmt: skip
def test_the_batch_that_is_advised_is_accepted(
    batch_size: int, accumulate: int, mixup: float, replicas: int, advice: tuple[str, ...]
) -> None:
    def check(size: int) -> None:
        check_batch_size(
            validate_config({
                "data": {"source": "digits"}, "model": {"backbone": "MobileNetV2"}, "phases": {"head": {"thaw": "none", "epochs": 1}},
                "training": {"batch_size": size, "accumulate": accumulate}, "augmentation": {"mixup": mixup},
            }), replicas,
        )  # fmt: skip

    with raises(ConfigError, "training.batch_size", batch_size, fix=f"^use {' or '.join(advice)}(, or set|$)"):
        check(batch_size)
    for size in advice:
        check(int(size))
