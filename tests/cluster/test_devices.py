"""TensorFlow's thread pools respect the quota of a container."""

from pathlib import Path

import pytest

from tests.processes import run_python

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
