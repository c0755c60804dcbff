"""TensorBoard and TensorFlow Serving accept the arguments and files of their manifests."""

import re
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format, wrappers_pb2
from tensorboard import program

from tests.k8s.rendered import objects, pods_of

ROOT = Path(__file__).parents[2]


def test_the_locked_tensorboard_accepts_its_arguments_and_reads_buckets() -> None:
    (pods,) = pods_of("overlays/tensorboard")
    board = program.TensorBoard()
    board.configure(["tensorboard", *pods.arguments()])
    (port,) = [port["containerPort"] for port in pods.container["ports"]]
    assert (board.flags.port, board.flags.bind_all, board.flags.load_fast) == (port, True, "false")
    assert board.flags.logdir.split("://")[0] in tf.io.gfile.get_registered_schemes()


def test_serving_has_the_version_of_the_tensorflow_that_exports() -> None:
    (pods,) = pods_of("overlays/serving")
    version = re.search(r"^tensorflow==(\d+\.\d+)", (ROOT / "requirements.lock").read_text(), re.M)
    assert version
    assert pods.container["image"].startswith(f"tensorflow/serving:{version[1]}.")
    arguments = {key: value for key, _, value in (a.removeprefix("--").partition("=") for a in pods.arguments())}
    numbers = {port["name"]: str(port["containerPort"]) for port in pods.container["ports"]}
    assert (arguments["port"], arguments["rest_api_port"]) == (numbers["grpc"], numbers["http"])
    assert arguments["model_base_path"].endswith("/export/saved_model")
    for probe in ("startupProbe", "readinessProbe"):
        assert pods.container[probe]["httpGet"]["path"] == f"/v1/models/{arguments['model_name']}"


def batching_parameters() -> Any:
    """The message of tensorflow_serving/servables/tensorflow/session_bundle_config.proto, 2.21, which is in no package."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="batching.proto", syntax="proto3", dependency=["google/protobuf/wrappers.proto"]
    )
    message = file.message_type.add(name="BatchingParameters")
    names = ["max_batch_size", "batch_timeout_micros", "max_enqueued_batches", "num_batch_threads"]
    for number, name in enumerate(names, start=1):
        message.field.add(name=name, number=number, label=kinds.LABEL_OPTIONAL, type=kinds.TYPE_MESSAGE,
                          type_name=".google.protobuf.Int64Value")  # fmt: skip
    message.field.add(name="allowed_batch_sizes", number=6, label=kinds.LABEL_REPEATED, type=kinds.TYPE_INT64)
    pool = descriptor_pool.DescriptorPool()
    for known in (wrappers_pb2.DESCRIPTOR.serialized_pb, file.SerializeToString()):
        pool.AddSerializedFile(known)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("BatchingParameters"))()


def test_serving_batches_as_configured() -> None:
    (pods,) = pods_of("overlays/serving")
    assert "--enable_batching" in pods.arguments()
    (path,) = [a.partition("=")[2] for a in pods.arguments() if a.startswith("--batching_parameters_file=")]
    (mount,) = [m for m in pods.container["volumeMounts"] if path.startswith(f"{m['mountPath']}/")]
    (volume,) = [v for v in pods.spec["volumes"] if v["name"] == mount["name"]]
    (content,) = [
        o["data"] for o in objects("overlays/serving", "ConfigMap")
        if o["metadata"]["name"] == volume["configMap"]["name"]
    ]  # fmt: skip
    read = text_format.Parse(content[path.removeprefix(f"{mount['mountPath']}/")], batching_parameters())
    assert read.max_batch_size.value == 32
    assert 0 < read.batch_timeout_micros.value < 10_000
    assert read.num_batch_threads.value == int(pods.container["resources"]["requests"]["cpu"])
    with pytest.raises(text_format.ParseError):
        text_format.Parse("max_batch_sise { value: 1 }", batching_parameters())
