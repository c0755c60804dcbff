"""Exports on a cluster: the Job that builds a TensorRT engine."""

from pathlib import Path

import pytest
import yaml

from tests.k8s.test_schemas import VERSIONS, faults

ROOT = Path(__file__).parents[2]


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
