"""Folders of compiled programs: chosen by the GPU, set before TensorFlow starts, and repaired."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.processes import run_python
from trainer.cluster.compilation_cache import (
    choose_cache_variables,
    choose_programs_folder,
    is_complete_program,
    list_gpus,
    set_compilation_cache,
)

H200 = "NVIDIA H200, 9.0, 580.65.06"
CACHE = Path("/cache")


def folder_of(gpu: str = H200, deterministic: bool = True, environment: Mapping[str, str] = {}) -> Path | None:
    return choose_programs_folder((gpu,), CACHE, deterministic, environment)


def test_programs_of_another_gpu_driver_or_set_of_flags_are_in_another_folder() -> None:
    others = [
        folder_of("NVIDIA L4, 8.9, 580.65.06"), folder_of("NVIDIA H200, 9.0, 570.1"), folder_of(deterministic=False),
        folder_of(environment={"XLA_FLAGS": "--xla_gpu_autotune_level=0"}),
    ]  # fmt: skip
    assert len({folder_of(), *others}) == 5
    assert all(folder and folder.parent == CACHE / "compiled" for folder in others)


@pytest.mark.parametrize("gpus", [(), (H200, H200)])
def test_programs_are_stored_for_one_gpu_only(gpus: tuple[str, ...]) -> None:
    assert choose_programs_folder(gpus, CACHE, True, {}) is None


def test_the_folder_that_the_user_has_chosen_is_left() -> None:
    own = {"TF_XLA_FLAGS": "--tf_xla_persistent_cache_directory=/own", "CUDA_CACHE_PATH": "/own"}
    assert folder_of(environment=own) is None
    assert choose_cache_variables((H200,), folder_of(environment=own), None, CACHE, own) == {}


def test_the_variables_add_to_those_of_the_user() -> None:
    given = {"XLA_FLAGS": "--xla_gpu_cuda_data_dir=/cuda", "TF_XLA_FLAGS": "--tf_xla_clustering_debug"}
    assert choose_cache_variables((H200,), Path("/cache/xla/1"), Path("/run/autotuning"), CACHE, given) == {
        "TF_XLA_FLAGS": "--tf_xla_clustering_debug --tf_xla_persistent_cache_directory=/cache/xla/1 "
        "--tf_xla_persistent_cache_device_types=GPU",
        "XLA_FLAGS": "--xla_gpu_cuda_data_dir=/cuda --xla_gpu_per_fusion_autotune_cache_dir=/run/autotuning",
        "CUDA_CACHE_PATH": "/cache/cuda",
    }


def test_a_path_with_a_space_is_not_written_into_a_flag() -> None:
    variables = choose_cache_variables((H200,), Path("/my cache/xla"), Path("/my run"), Path("/my cache"), {})
    assert variables == {"CUDA_CACHE_PATH": "/my cache/cuda"}


def test_without_a_gpu_nothing_is_set() -> None:
    assert choose_cache_variables((), CACHE, CACHE, CACHE, {}) == {}


@pytest.mark.parametrize(
    ("content", "complete"),
    [
        (b"\x08\x96\x01\x12\x02ab", True),  # 1: 150, 2: "ab"
        (b"\x08\x96\x01\x12\x02a", False),
        (b"\x08\x96", False),
        (b"\x12", False),
        (b"\0\0\0\0", False),  # blocks that were never written
        (b"", False),
    ],
)
def test_a_message_that_is_cut_off_is_detected(content: bytes, complete: bool) -> None:
    assert is_complete_program(content) is complete


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nvidia-smi of a machine with one GPU, first in PATH, and the variables as they were at the end."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho '{H200}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    for name in ("XLA_FLAGS", "TF_XLA_FLAGS", "CUDA_CACHE_PATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("gpu")
def test_a_start_sets_the_variables_and_deletes_what_is_cut_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list_gpus() == (H200,)
    cache = tmp_path / "cache"
    programs = choose_programs_folder((H200,), tmp_path / "run", True, {})
    assert programs
    programs.mkdir(parents=True)
    (programs / "whole.pb").write_bytes(b"\x08\x01")
    (programs / "cut.pb").write_bytes(b"\x12\x02a")
    set_compilation_cache(cache, tmp_path / "run", deterministic=True)
    assert [file.name for file in programs.iterdir()] == ["whole.pb"]
    assert str(programs) in os.environ["TF_XLA_FLAGS"]
    assert "XLA_FLAGS" not in os.environ  # deterministic: no autotuning
    assert (cache / "cuda").is_dir()
    assert f"compiled programs: 1 stored in {programs}" in capsys.readouterr().out


@pytest.mark.usefixtures("gpu")
def test_a_start_creates_nothing_in_the_folder_of_a_run_that_has_not_begun(tmp_path: Path) -> None:
    set_compilation_cache(tmp_path / "cache", tmp_path / "run", deterministic=False)
    assert f"{tmp_path}/run/compiled/" in os.environ["TF_XLA_FLAGS"]
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("gpu")
def test_other_workers_store_in_their_cache(tmp_path: Path) -> None:
    set_compilation_cache(tmp_path / "cache", None, deterministic=False)
    assert f"{tmp_path}/cache/compiled/" in os.environ["TF_XLA_FLAGS"]
    assert os.environ["XLA_FLAGS"].endswith(f"={tmp_path}/cache/autotuning")


@pytest.mark.usefixtures("gpu")
def test_results_of_autotuning_are_stored_with_the_checkpoints(tmp_path: Path) -> None:
    set_compilation_cache(tmp_path / "cache", tmp_path / "run", deterministic=False)
    assert os.environ["XLA_FLAGS"] == f"--xla_gpu_per_fusion_autotune_cache_dir={tmp_path}/run/autotuning"


@pytest.mark.usefixtures("gpu")
def test_a_cache_that_cannot_be_written_to_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cache").write_text("a file")
    set_compilation_cache(tmp_path / "cache", None, deterministic=True)
    assert "TF_XLA_FLAGS" not in os.environ
    assert "warning: compiled programs are not stored" in capsys.readouterr().err


def test_a_machine_without_a_gpu_has_no_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    before = dict(os.environ)
    set_compilation_cache(tmp_path / "cache", None, deterministic=False)
    assert dict(os.environ) == before
    assert not (tmp_path / "cache").exists()


COMPILE = """
import os, sys
from pathlib import Path
from trainer.cluster.compilation_cache import choose_cache_variables
folder, kind = Path(sys.argv[1]), sys.argv[2]
variables = choose_cache_variables(("a GPU",), folder / "programs", folder / "autotuning", folder, os.environ)
os.environ |= variables | {"TF_XLA_FLAGS": variables["TF_XLA_FLAGS"].replace("=GPU", "=" + kind)}
import tensorflow as tf
@tf.function(jit_compile=True)
def double(x):
    return tf.reduce_sum(tf.matmul(x, x) * 2.0)
print(float(double(tf.ones((4, 4)))))
"""


@pytest.mark.slow
def test_tensorflow_knows_the_flags_and_loads_what_it_stored(tmp_path: Path) -> None:
    """On the CPU, whose programs are stored if its kind is set instead of that of GPUs."""
    programs = tmp_path / "programs"
    first = run_python(COMPILE, tmp_path, "CPU")
    (file,) = programs.glob("*.pb")
    written, content = file.stat().st_mtime_ns, file.read_bytes()
    assert is_complete_program(content)
    again = run_python(COMPILE, tmp_path, "CPU")
    assert (first.stdout, file.stat().st_mtime_ns) == (again.stdout, written)
    file.write_bytes(content[: len(content) // 2])  # shows that it is read, and why it must be complete
    assert not is_complete_program(file.read_bytes())
    assert "Read less bytes than requested" in run_python(COMPILE, tmp_path, "CPU", code=1).stderr


@pytest.mark.slow
def test_programs_for_the_cpu_are_not_stored(tmp_path: Path) -> None:
    assert float(run_python(COMPILE, tmp_path, "GPU").stdout) == 128
    assert not list(tmp_path.rglob("*.pb"))
