"""Finished runs with the files that a promotion reads."""

from pathlib import Path

from tests.report.test_compare import make_run
from trainer.storage.path import StoragePath, storage_path


def finished_run(folder: Path, accuracy: float, content: str = "graph", n: int = 300) -> Path:
    """A finished run with that accuracy on the same n test examples, whose export has that content."""
    make_run(folder, accuracy, n)
    export = folder / "export" / "saved_model" / "1"
    for name in ("saved_model.pb", "variables/variables.index", "assets/labels.txt"):
        (export / name).parent.mkdir(parents=True, exist_ok=True)
        (export / name).write_text(f"{content} {name}")
    (folder / "DONE").touch()
    return folder


def contents(versions: StoragePath | Path) -> dict[str, str]:
    """The content of saved_model.pb of each visible version, by number."""
    folder = storage_path(versions)
    files = {child.name: (child / "saved_model.pb").fetch() for child in folder.folders()}
    return {name: fetched[0].decode("latin-1").split()[0] for name, fetched in files.items() if fetched}
