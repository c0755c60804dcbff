"""What a run does on a GPU, on a CPU: stop requests checked once per call, batches copied ahead to another device."""

from pathlib import Path

import numpy as np
import pytest

from tests.e2e.running import SMALL, train, variables_of
from tests.processes import run_python

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# `open_phase` takes the second logical device of the CPU for a GPU.
ON_A_GPU = """
import sys
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from trainer import context
from trainer.__main__ import main
from trainer.data.pipeline import prefetch_to_device
from trainer.types import Device
copied = []
def copy_ahead(dataset, device):
    copied.append(device)
    return prefetch_to_device(dataset, "CPU:1")
context.detect_device = lambda: Device("GPU", "a GPU", (9, 0))
context.prefetch_to_device = copy_ahead
try:
    main()
finally:
    print("copied to", copied)
"""


def test_a_run_with_the_calls_and_copies_of_a_gpu_has_the_same_bits(tmp_path: Path) -> None:
    settings = [o for o in SMALL if "formats" not in o] + ["export.formats=[]"]
    train(*settings, f"output_dir={tmp_path / 'cpu'}")
    done = run_python(ON_A_GPU, *settings, f"output_dir={tmp_path / 'gpu'}", timeout=900)
    assert "copied to ['GPU:0', 'GPU:0']" in done.stdout
    ours, other = (variables_of(tmp_path / name, "LATEST") for name in ("gpu", "cpu"))
    assert ours.keys() == other.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)
