"""Exports on a cluster: the Job that builds a TensorRT engine, and the drift check of the nightly CronJob."""

from pathlib import Path

import pytest
import yaml

from tests.k8s.rendered import only
from tests.k8s.test_schemas import VERSIONS, faults
from trainer import drift as verb
from trainer.cli.arguments import parse_arguments

ROOT = Path(__file__).parents[2]


def test_the_nightly_run_first_checks_for_drift() -> None:
    pod = only("overlays/nightly", "CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (drift,) = pod["initContainers"]
    shell, option, script, name = drift["command"]
    assert (shell, option, name) == ("sh", "-c", "drift")  # the name is $0, so that all arguments are in $@
    assert script.startswith('python -m trainer.drift "$@" ||')  # training follows in any case
    settings, _ = parse_arguments(drift["args"], verb.__doc__, verb.ARGUMENTS)
    assert all(settings[key].startswith("gs://BUCKET/") for key in ("reference", "log", "output"))
    assert drift["image"] == pod["containers"][0]["image"]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_job_is_valid_and_each_container_reads_the_file_of_the_previous_one(version: str) -> None:
    job = yaml.safe_load((ROOT / "k8s" / "tensorrt.yaml").read_text())
    assert faults(job, version) is None
    pod = job["spec"]["template"]["spec"]
    fetch, build, keep = [*pod["initContainers"], *pod["containers"]]
    assert fetch["command"][-2].endswith("/export/model.onnx")
    assert f"--onnx={fetch['command'][-1]}" in build["args"]
    assert f"--saveEngine={keep['command'][-2]}" in build["args"]
    assert "nvidia.com/gpu" in build["resources"]["limits"]
    for container in (fetch, build, keep):
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
