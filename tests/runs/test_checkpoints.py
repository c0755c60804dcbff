"""Checkpoints are atomic and verified, and a damaged one does not affect the others."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from tests.errors import raises
from tests.processes import run_python
from trainer.errors import DataError
from trainer.runs.checkpoints import CheckpointFolder, crc32c_hex, read_pointer
from trainer.storage.local import delete_temporary_files
from trainer.storage.path import storage_path
from trainer.training.state import RunState


def variables(step: int) -> dict[str, np.ndarray]:
    return {"a/kernel": np.full((3, 2), step, np.float32), "optimizer/0000/iteration": np.array(step)}


def folder_with(path: Path, *steps: int, keep: int = 2, best: int | None = None) -> tuple[CheckpointFolder, list[str]]:
    lines: list[str] = []
    folder = CheckpointFolder(path, keep, lines.append)
    for step in steps:
        state = RunState(step=step, best={"step": best} if best else None).to_json()
        folder.save(state, variables(step), best)
    return folder, lines


def test_a_checkpoint_is_read_exactly(tmp_path: Path) -> None:
    folder, _ = folder_with(tmp_path)
    state = RunState(phase=1, step=7, sums=[0.1 + 0.2, 1 / 3, 7.0], history=[{"loss": 1e-17}])
    folder.save(state.to_json(), variables(7), None)
    newest = folder.read_newest()
    assert newest is not None
    assert RunState.from_json(newest[0]) == state
    for name, value in variables(7).items():
        np.testing.assert_array_equal(newest[1][name], value, strict=True)
    assert (tmp_path / "LATEST").read_text() == "step-00000007\n"
    manifest = json.loads((folder.path(7) / "manifest.json").read_text())
    sizes = {name: (folder.path(7) / name).stat().st_size for name in ("variables.npz", "state.json")}
    assert {name: facts["bytes"] for name, facts in manifest.items()} == sizes


def test_the_newest_and_the_best_ones_that_they_refer_to_are_retained(tmp_path: Path) -> None:
    folder, _ = folder_with(tmp_path, 1, 2, best=1)
    for step in (3, 4, 5):
        folder.save(RunState(step=step, best={"step": 2}).to_json(), variables(step), 2)
    assert folder.list_steps() == [2, 4, 5]
    assert (tmp_path / "BEST").read_text() == "step-00000002\n"
    folder.save(RunState(step=6, best={"step": 6}).to_json(), variables(6), 6)
    assert folder.list_steps() == [2, 5, 6]  # if 6 is damaged, 5 still has its best one
    folder.save(RunState(step=7, best={"step": 6}).to_json(), variables(7), 6)
    assert folder.list_steps() == [6, 7]


def test_the_weights_with_which_each_phase_ended_are_retained(tmp_path: Path) -> None:
    folder, _ = folder_with(tmp_path, 1, 2, 3, best=2)
    for step in (4, 5, 6, 7):
        finished = {"head": {"kept_step": 2}} | ({"middle": {"kept_step": 4}} if step > 5 else {})
        folder.save(RunState(step=step, best={"step": step}, finished=finished).to_json(), variables(step), step)
    assert folder.list_steps() == [2, 4, 6, 7]


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "manifest", "size"])
def test_a_damaged_newest_falls_back_with_a_message(tmp_path: Path, damage: str) -> None:
    folder, lines = folder_with(tmp_path, 1, 2)
    file = folder.path(2) / ("manifest.json" if damage == "manifest" else "variables.npz")
    if damage == "missing":
        file.unlink()
    elif damage == "size":
        manifest = json.loads((folder.path(2) / "manifest.json").read_text())
        manifest["variables.npz"]["bytes"] += 1
        (folder.path(2) / "manifest.json").write_text(json.dumps(manifest))
    elif damage == "flip":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(bytes(content))
    else:
        file.write_bytes(file.read_bytes()[:20])
    newest = folder.read_newest()
    assert newest is not None
    assert newest[0]["step"] == 1
    (line,) = lines
    assert (tmp_path / "step-00000002").is_dir()  # until the run begins
    folder.mark_corrupt_after(1)
    assert "renamed to damaged-step-00000002" in lines.pop()
    assert ("does not match its size or checksum" in line) == (damage in ("flip", "truncate", "size"))
    assert (tmp_path / "damaged-step-00000002").is_dir()
    assert folder.list_steps() == [1]


def test_a_checkpoint_is_saved_next_to_a_damaged_one(tmp_path: Path) -> None:
    folder, _ = folder_with(tmp_path, 1, 2)
    (folder.path(2) / "state.json").write_text("{")
    folder.save(RunState(step=3).to_json(), variables(3), None)
    assert folder.list_steps() == [2, 3]


def test_an_unfinished_checkpoint_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    folder, lines = folder_with(tmp_path, 1)
    (tmp_path / ".step-00000002.17-000000000004711").mkdir()
    assert folder.read_newest() is not None
    delete_temporary_files(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step-00000001"]
    assert lines == []


def test_without_a_readable_checkpoint_there_is_none(tmp_path: Path) -> None:
    folder, _ = folder_with(tmp_path, 1)
    (folder.path(1) / "state.json").unlink()
    assert folder.read_newest() is None
    with raises(DataError, problem="cannot be read", fix="give another one"):
        folder.read(1)


def test_a_full_disk_does_not_affect_the_old_checkpoint(tmp_path: Path) -> None:
    folder, _ = folder_with(tmp_path, 1)
    program = f"""
import resource, signal, numpy as np
from pathlib import Path
from trainer.runs.checkpoints import CheckpointFolder
from trainer.training.state import RunState
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    CheckpointFolder(Path({str(tmp_path)!r}), 2, print).save(RunState(step=2).to_json(), {{"a": np.ones(100_000)}}, None)
except OSError as error:
    print("refused", error.errno)
"""
    assert run_python(program).stdout.startswith("refused")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step-00000001"]
    assert folder.read_newest() is not None


@pytest.mark.parametrize(
    "name",
    [
        "step-00000060 (copy)", "step-copy", "step-", "step-00000060.bak", "step-٣٣٣٣٣٣٣٣", "step-00000001-2",
        "step-00000001-1a2b3c4d", "step-000000001", "step-00000099-1a2b3c4d", "step-0000000099",
    ],
)  # fmt: skip
def test_a_copy_of_a_checkpoint_is_ignored_and_not_deleted(tmp_path: Path, name: str) -> None:
    folder, lines = folder_with(tmp_path, 1, 2)
    shutil.copytree(folder.path(2), tmp_path / name)
    assert folder.list_steps() == [1, 2]
    for step in (3, 4):
        folder.save(RunState(step=step).to_json(), variables(step), None)
    folder.mark_corrupt_after(4)
    assert (tmp_path / name / "variables.npz").exists()
    assert folder.read_newest()[0]["step"] == 4  # type: ignore[index]
    assert lines == []


def test_checkpoints_copied_from_a_bucket_are_named(tmp_path: Path) -> None:
    folder, lines = folder_with(tmp_path, 1)
    folder.path(1).rename(tmp_path / "step-00000001-1a2b3c4d")
    assert folder.read_newest() is None
    assert lines == [f"{tmp_path}/step-00000001-1a2b3c4d is not read; rename it to step-00000001 if it should"]


@pytest.mark.parametrize("content", [b"null", b"[]", b"3", b'{"variables.npz": 3}', b"\xff", b"", b'{"../../x": {}}'])
def test_a_manifest_of_another_shape_is_a_damaged_checkpoint(tmp_path: Path, content: bytes) -> None:
    folder, lines = folder_with(tmp_path, 1, 2)
    (folder.path(2) / "manifest.json").write_bytes(content)
    with raises(DataError, problem="step-00000002", fix="give another one"):
        folder.read(2)
    newest = folder.read_newest()
    assert newest is not None
    assert newest[0]["step"] == 1
    assert len(lines) == 1


@pytest.mark.parametrize("state", [b"null", b"[]", b"{}", b'{"step": "x"}', b'{"step": 2, "best": 3}', b"\xff"])
def test_a_state_of_another_shape_is_a_damaged_checkpoint(tmp_path: Path, state: bytes) -> None:
    folder, _ = folder_with(tmp_path, 1, 2)
    (folder.path(2) / "state.json").write_bytes(state)
    manifest = json.loads((folder.path(2) / "manifest.json").read_text())
    manifest["state.json"] = {"bytes": len(state), "crc32c": crc32c_hex(state)}
    (folder.path(2) / "manifest.json").write_text(json.dumps(manifest))
    with raises(DataError, problem="step-00000002", fix="give another one"):
        folder.read(2)
    folder.save(RunState(step=3).to_json(), variables(3), None)  # next to it


@pytest.mark.parametrize("content", [b"", b"\xff", b"step-1", b"../../x", b"step-00000001-ab\nstep-copy\n", b"{}"])
def test_a_damaged_pointer_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "LATEST").write_bytes(content)
    with raises(DataError, problem=f"{tmp_path}/LATEST is corrupt", fix="names of its checkpoints"):
        read_pointer(storage_path(tmp_path / "LATEST"))
    assert read_pointer(storage_path(tmp_path / "BEST")) == []


class Killed(BaseException):
    """Ends the process in the middle of a function."""


def test_a_checkpoint_is_replaced_without_a_moment_in_which_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill the process at each rename: the old or the new checkpoint is read before and after the run begins."""
    for kill_at in range(3):
        folder = CheckpointFolder(tmp_path / str(kill_at), 1, print)
        folder.save(RunState(step=7).to_json(), variables(1), None)
        renames = []

        def rename(path: Path, target: Path, kill_at: int = kill_at, renames: list[Path] = renames) -> Path:
            if len(renames) == kill_at:
                monkeypatch.undo()
                raise Killed
            renames.append(path)
            os.rename(path, target)
            return Path(target)

        monkeypatch.setattr(Path, "rename", rename)
        with suppress(Killed):
            folder.save(RunState(step=7, epoch=1).to_json(), variables(2), None)
        monkeypatch.undo()
        expected = 2.0 if kill_at == 2 else 1.0
        for _ in range(2):
            assert folder.list_steps() == [7]
            newest = CheckpointFolder(folder.folder, 1, pytest.fail).read_newest()
            assert newest is not None
            assert newest[1]["a/kernel"][0, 0] == expected
            folder.mark_corrupt_after(7)
        assert sorted(p.name for p in folder.folder.iterdir() if p.is_dir()) == ["step-00000007"]


def test_a_kill_while_saving_leaves_complete_checkpoints(tmp_path: Path) -> None:
    program = f"""
import numpy as np
from pathlib import Path
from trainer.runs.checkpoints import CheckpointFolder
from trainer.training.state import RunState
folder = CheckpointFolder(Path({str(tmp_path)!r}), 2, print)
print("go", flush=True)
for step in range(1, 10_000):
    folder.save(RunState(step=step).to_json(), {{"a": np.full(200_000, step)}}, None)
"""
    rng = np.random.default_rng(3)
    for _ in range(6):
        child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(rng.uniform(0.05, 0.3))
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        lines: list[str] = []
        newest = CheckpointFolder(tmp_path, 2, lines.append).read_newest()
        assert lines == []
        assert newest or not any(tmp_path.glob("LATEST"))
        if newest:
            state, values = newest
            assert (values["a"] == state["step"]).all()
