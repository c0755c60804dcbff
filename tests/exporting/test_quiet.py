"""What libraries say of every model is left out, and nothing else."""

import os

import pytest

from trainer.exporting.tflite import quiet


def test_only_what_is_said_every_time_is_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    def talk() -> None:
        with quiet():
            os.write(2, b"fully_quantize: 0, inference_type: 6\nERROR: the model is empty\n")
            os.write(2, b"INFO: Created TensorFlow Lite XNNPACK delegate for CPU.\n")
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        talk()
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "ERROR: the model is empty\nafter\n"
