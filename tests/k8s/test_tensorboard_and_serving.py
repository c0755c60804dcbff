"""What stands beside the runs takes the arguments that its manifest gives."""

from __future__ import annotations

import re
from pathlib import Path

import tensorflow as tf
from tensorboard import program

from tests.k8s.rendered import pods_of

ROOT = Path(__file__).parents[2]


def test_the_locked_tensorboard_takes_its_arguments_and_reads_buckets() -> None:
    (pods,) = pods_of("overlays/tensorboard")
    board = program.TensorBoard()
    board.configure(["tensorboard", *pods.arguments()])
    (port,) = [port["containerPort"] for port in pods.container["ports"]]
    assert (board.flags.port, board.flags.bind_all, board.flags.load_fast) == (port, True, "false")
    assert board.flags.logdir.split("://")[0] in tf.io.gfile.get_registered_schemes()


def test_serving_is_of_the_tensorflow_that_exports() -> None:
    (pods,) = pods_of("overlays/serving")
    version = re.search(r"^tensorflow==(\d+\.\d+)", (ROOT / "requirements.lock").read_text(), re.M)
    assert version
    assert pods.container["image"].startswith(f"tensorflow/serving:{version[1]}.")
    arguments = dict(argument.removeprefix("--").split("=") for argument in pods.arguments())
    numbers = {port["name"]: str(port["containerPort"]) for port in pods.container["ports"]}
    assert (arguments["port"], arguments["rest_api_port"]) == (numbers["grpc"], numbers["http"])
    assert arguments["model_base_path"].endswith("/export/saved_model")
    for probe in ("startupProbe", "readinessProbe"):
        assert pods.container[probe]["httpGet"]["path"] == f"/v1/models/{arguments['model_name']}"
