"""Write finished runs, with the files that a promotion reads."""

from pathlib import Path

from tests.report.test_compare import make_run
from trainer.storage.path import StoragePath, storage_path


def write_finished_run(folder: Path, accuracy: float, content: str = "graph", n: int = 300) -> Path:
    """Write a finished run with this accuracy on the same `n` test examples. Its exported files contain `content`."""
    make_run(folder, accuracy, n)
    export = folder / "export" / "saved_model" / "1"
    for name in ("saved_model.pb", "variables/variables.index", "assets/labels.txt"):
        (export / name).parent.mkdir(parents=True, exist_ok=True)
        (export / name).write_text(f"{content} {name}")
    (folder / "DONE").touch()
    return folder


def read_graphs(versions: StoragePath | Path) -> dict[str, str]:
    """Read the first word of each visible version's saved_model.pb, by version number."""
    folder = storage_path(versions)
    files = {child.name: (child / "saved_model.pb").fetch() for child in folder.folders()}
    return {name: fetched[0].decode("latin-1").split()[0] for name, fetched in files.items() if fetched}
