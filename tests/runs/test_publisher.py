"""The first object of a run in a bucket marks its folder as that of a run."""

from pathlib import Path
from types import SimpleNamespace

from trainer.runs.publisher import Publisher
from trainer.storage.path import storage_path


def publish(folder: Path, *names: str) -> list[str]:
    """Publish files of these names; return those that were written, in the order of their times."""
    local, remote = folder / "local", folder / "remote"
    for name in names:
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_text(name)
    publisher = Publisher(local, None)
    publisher.lease = SimpleNamespace(folder=storage_path(remote), check=lambda: None)  # type: ignore[assignment]
    publisher._publish_files()
    files = sorted((path for path in remote.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns)
    return [path.relative_to(remote).as_posix() for path in files]


def test_the_configuration_is_published_first(tmp_path: Path) -> None:
    written = publish(tmp_path, "checkpoints/attempts.json", "config.yaml", "run.json", ".hidden", "logs/a")
    assert written == ["config.yaml", "checkpoints/attempts.json", "logs/a", "run.json"]


def test_compiled_programs_are_published_once_they_are_complete(tmp_path: Path) -> None:
    names = ("compiled/1/a.pb", "compiled/1/b.pbXYZ.tmp", "autotuning/a.textproto", "autotuning/tmp/b.textproto")
    written = set(publish(tmp_path, *names))
    assert written == {"compiled/1/a.pb", "autotuning/a.textproto"}
