"""TensorBoard, TensorFlow Serving and `trainer.serve` accept the arguments and files of their manifests."""

import re
from pathlib import Path

from tensorboard import program

from tests.k8s.rendered import list_pods, render_objects
from trainer.relay.settings import parse_settings as parse_relay_settings
from trainer.serving import prediction_log
from trainer.serving.settings import parse_settings

ROOT = Path(__file__).parents[2]


def test_the_locked_tensorboard_accepts_its_arguments_and_reads_buckets() -> None:
    (pods,) = list_pods("overlays/tensorboard")
    board = program.TensorBoard()
    board.configure(["tensorboard", *pods.arguments()])
    (port,) = [port["containerPort"] for port in pods.container["ports"]]
    assert (board.flags.port, board.flags.bind_all, board.flags.load_fast) == (port, True, "false")
    assert board.flags.logdir.startswith("gs://")


def test_the_image_of_tensorboard_is_small_and_reads_buckets() -> None:
    """The locked TensorBoard with gcsfs, without TensorFlow, which is ten times as large."""
    versions = {
        lock: dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / lock).read_text(), re.M))
        for lock in ("requirements-tensorboard.lock", "requirements.lock")
    }
    own, tested = versions.values()
    assert own["tensorboard"] == tested["tensorboard"]
    assert {"gcsfs", "fsspec"} <= own.keys()
    assert not own.keys() & {"tensorflow", "keras", "matplotlib"}
    assert len(own) < 60
    (pods,) = list_pods("overlays/tensorboard")
    assert pods.container["command"] == ["/opt/venv/bin/python", "-m", "tensorboard.main"]  # the stage sets no PATH
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= pods.container.keys()


def test_serving_has_the_version_of_the_tensorflow_that_exports() -> None:
    (pods,) = list_pods("overlays/serving")
    version = re.search(r"^tensorflow==(\d+\.\d+)", (ROOT / "requirements.lock").read_text(), re.M)
    assert version
    assert pods.container["image"].startswith(f"tensorflow/serving:{version[1]}.")
    arguments = {key: value for key, _, value in (a.removeprefix("--").partition("=") for a in pods.arguments())}
    numbers = {port["name"]: str(port["containerPort"]) for port in pods.container["ports"]}
    assert (arguments["port"], arguments["rest_api_port"]) == (numbers["grpc"], numbers["http"])
    assert arguments["model_base_path"] == promoted_to()
    for probe in ("startupProbe", "readinessProbe"):
        assert pods.container[probe]["httpGet"]["path"] == f"/v1/models/{arguments['model_name']}"


def promoted_to() -> str:
    """The folder of versions that the nightly CronJob writes to."""
    (pods,) = list_pods("overlays/nightly")
    return next(text.removeprefix("to=") for text in pods.arguments() if text.startswith("to="))


def test_the_server_reads_what_the_nightly_run_promotes_and_logs_what_it_reads() -> None:
    (pods,) = list_pods("overlays/serve")
    assert pods.container["command"] == ["python", "-m", "trainer.serve"]
    settings = parse_settings(dict(text.split("=", 1) for text in pods.arguments()))
    (nightly,) = list_pods("overlays/nightly")
    assert (settings.model, f"log={settings.log}") == (promoted_to(), nightly.arguments()[1])
    assert settings.poll > 0
    assert settings.host == "0.0.0.0"  # the kubelet and the Service connect to the address of the pod
    (port,) = pods.container["ports"]
    assert port["containerPort"] == settings.port
    grace = pods.spec["terminationGracePeriodSeconds"]
    assert grace > settings.linger + settings.drain + prediction_log.CLOSE_SECONDS
    assert settings.linger >= 10  # endpoints are removed in the meantime
    mounts = {mount["mountPath"] for mount in pods.container["volumeMounts"]}
    assert settings.cache_dir in mounts
    paths = {
        probe: pods.container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    assert paths == {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/healthz"}
    startup = pods.container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 300  # importing TensorFlow, copying and loading


def test_the_relay_reads_the_versions_of_its_server_and_logs_what_the_nightly_run_reads() -> None:
    (pods,) = list_pods("overlays/serving-log")
    (relay,) = pods.spec["initContainers"]
    assert (relay["command"], relay["restartPolicy"]) == (["python", "-m", "trainer.relay"], "Always")
    settings = parse_relay_settings(dict(text.split("=", 1) for text in relay["args"]))
    assert f"--model_base_path={settings.model}" in pods.container["args"]
    assert f"--model_name={settings.name}" in pods.container["args"]
    assert f"--rest_api_port={settings.upstream.rpartition(':')[2]}" in pods.container["args"]
    (nightly,) = list_pods("overlays/nightly")
    assert (settings.model, f"log={settings.log}") == (promoted_to(), nightly.arguments()[1])
    (service,) = render_objects("overlays/serving-log", "Service")
    ports = {port["name"]: port["targetPort"] for port in service["spec"]["ports"]}
    assert ports == {"grpc": "grpc", "http": "relay"}
    assert relay["ports"] == [{"name": "relay", "containerPort": settings.port}]
    assert settings.host == "0.0.0.0"
    # The sidecar ends after the server, whose preStop sleeps.
    sleep = pods.container["lifecycle"]["preStop"]["sleep"]["seconds"]
    ending = settings.linger + settings.drain + 2 * prediction_log.CLOSE_SECONDS
    assert pods.spec["terminationGracePeriodSeconds"] > sleep + ending


def test_serving_batches_as_configured() -> None:
    (pods,) = list_pods("overlays/serving")
    assert "--enable_batching" in pods.arguments()
    (path,) = [a.partition("=")[2] for a in pods.arguments() if a.startswith("--batching_parameters_file=")]
    (mount,) = [m for m in pods.container["volumeMounts"] if path.startswith(f"{m['mountPath']}/")]
    (volume,) = [v for v in pods.spec["volumes"] if v["name"] == mount["name"]]
    (content,) = [
        o["data"] for o in render_objects("overlays/serving", "ConfigMap")
        if o["metadata"]["name"] == volume["configMap"]["name"]
    ]  # fmt: skip
    text = content[path.removeprefix(f"{mount['mountPath']}/")]
    assert re.fullmatch(r"((#.*|\w+ \{ value: \d+ \}( #.*)?)\n)*", text)  # text format of protocol buffers
    # Fields of BatchingParameters in tensorflow_serving/servables/tensorflow/session_bundle_config.proto of 2.21.
    values = {name: int(value) for name, value in re.findall(r"(?m)^(\w+) \{ value: (\d+) \}", text)}
    assert values.keys() == {"max_batch_size", "batch_timeout_micros", "max_enqueued_batches", "num_batch_threads"}
    assert values["max_batch_size"] == 32
    assert 0 < values["batch_timeout_micros"] < 10_000
    assert values["num_batch_threads"] == int(pods.container["resources"]["requests"]["cpu"])
