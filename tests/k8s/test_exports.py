"""Exports on a cluster: the Job that builds a TensorRT engine."""

import os
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from scripts.manifests import K8S
from tests.e2e.running import program, train
from tests.k8s.controller import TerminatedPod, choose_action
from tests.k8s.rendered import Object, list_containers, load_documents
from tests.k8s.test_pods import breaches
from tests.storage.emulator import running
from tests.waiting import PATIENCE
from trainer import export as export_verb
from trainer.cli.arguments import parse_arguments
from trainer.exporting.formats import FORMATS
from trainer.storage.path import storage_path

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tensorrt() -> Object:
    (job,) = load_documents(K8S / "tensorrt.yaml")
    return job


def test_each_container_of_the_tensorrt_job_reads_the_file_of_the_previous_one(tensorrt: Object) -> None:
    pod = tensorrt["spec"]["template"]["spec"]
    export, build, upload = list_containers(pod)
    assert export["command"] == ["python", "-m", "trainer.export"]
    settings, _ = parse_arguments(export["args"], export_verb.__doc__, export_verb.ARGUMENTS)
    assert export_verb._parse_changes(settings) == {"export.formats": ["onnx"]}
    file, _ = FORMATS["onnx"]
    assert f"--onnx={settings['output']}/{file}" in build["args"]
    assert f"--saveEngine={upload['args'][0]}" in build["args"]
    assert upload["args"][1].startswith(f"{settings['run']}/export/")
    assert "nvidia.com/gpu" in build["resources"]["limits"]
    assert breaches(pod, {}) == []
    for container in (export, build, upload):
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_the_image_has_what_the_tensorrt_job_exports_with() -> None:
    lock = (ROOT / "requirements-image.lock").read_text()
    assert all(re.search(rf"^{name}==", lock, re.M) for name in ("onnx", "onnxruntime", "tf2onnx"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tensorrt_job_exports_a_run_of_a_bucket_for_trtexec(tensorrt: Object, tmp_path: Path) -> None:
    """The arguments of the manifest on a small run; trtexec sets the shape of the input by its name."""
    export, build, _ = list_containers(tensorrt["spec"]["template"]["spec"])
    run, output = "gs://bucket/runs/RUN", tmp_path / "export"
    edits = {"run=gs://BUCKET/runs/RUN": f"run={run}", "output=/scratch/export": f"output={output}"}
    with running(tmp_path / "objects"):
        train("debug=fast", "phases=head_only", "export.formats=[]", f"output_dir={run}")
        program("export", *(edits.get(argument, argument) for argument in export["args"]))
    model = onnx.load(output / FORMATS["onnx"][0])
    (entry,) = model.graph.input
    batch, *sides = entry.type.tensor_type.shape.dim
    assert batch.dim_param  # of any size
    assert len({side.dim_value for side in sides[:2]}) == 1
    shapes = [argument for argument in build["args"] if "Shapes=" in argument]
    assert [re.fullmatch(r"--(\w+)Shapes=(\w+):\d+x224x224x3", shape).groups() for shape in shapes] == [  # type: ignore[union-attr]
        (kind, entry.name) for kind in ("min", "opt", "max")
    ]


def test_the_tensorrt_job_uploads_the_engine(tensorrt: Object, tmp_path: Path) -> None:
    """The command of the manifest, against the emulator."""
    (upload,) = tensorrt["spec"]["template"]["spec"]["containers"]
    _, option, program = upload["command"]
    plan, address = tmp_path / "model.plan", upload["args"][1].replace("gs://BUCKET", "gs://bucket")
    plan.write_bytes(b"engine")
    with running(tmp_path / "objects"):
        environment = {**os.environ, "GOOGLE_CLOUD_PROJECT": "test"}
        command = [sys.executable, option, program, str(plan), address]
        subprocess.run(command, env=environment, check=True, timeout=PATIENCE)
        assert storage_path(address).read() == b"engine"


@pytest.mark.parametrize(
    ("codes", "disrupted", "action_taken"),
    [
        ({"export": 2}, False, "FailJob"),
        ({"export": 75}, False, "Ignore"),
        ({"export": 137}, True, "Ignore"),
        ({"export": 1}, False, "Count"),
        ({"export": 0, "build": 1}, False, "FailJob"),  # an operation that TensorRT does not have
        ({"export": 0, "build": 143}, True, "Ignore"),
        ({"export": 0, "build": 137}, False, "Count"),  # out of memory
        ({"export": 0, "build": 0, "upload": 1}, False, "Count"),  # the bucket did not respond
    ],
)
def test_the_tensorrt_job_retries_what_may_succeed(
    tensorrt: Object, codes: dict[str, int], disrupted: bool, action_taken: str
) -> None:
    conditions = frozenset({"DisruptionTarget"}) if disrupted else frozenset()
    assert choose_action(tensorrt["spec"], TerminatedPod("a", 0, codes, conditions))[0] == action_taken
    assert tensorrt["spec"]["activeDeadlineSeconds"]  # limits failures that are ignored
