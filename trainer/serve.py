"""`python -m trainer.serve model=OUTPUT_DIR`, of a run, or its export: answer over HTTP with the model exported there.

Arguments are `key=value` of `trainer.serving.settings.Settings`; docs/serving.md has them with the routes. Exit code 0:
told to stop, and everything that was taken is answered.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.cluster.signals import end_at_once

if __name__ == "__main__":
    end_at_once()  # what is imported below takes seconds

from trainer.cli.arguments import ALL, read_arguments
from trainer.cli.process import exit_with_code, quiet_start
from trainer.errors import ConfigError
from trainer.monitoring.log import say
from trainer.serving.export_files import Export, find_export
from trainer.serving.settings import Settings, read_settings

if TYPE_CHECKING:
    from trainer.serving.model import ServedModel

EXTRA = ("starlette", "uvicorn", "python_multipart", "h11")


def _load(export: Export) -> ServedModel:
    with quiet_start():
        from trainer.serving.model import ServedModel
    return ServedModel(export)


def _run(arguments: list[str]) -> None:
    fields = Settings.model_fields
    doc = "\n".join([f"{__doc__}", *(f"  {k}" if f.is_required() else f"  {k}={f.default}" for k, f in fields.items())])
    keys = dict.fromkeys(fields, "") | {"model": "say what to serve"}
    told, _ = read_arguments(arguments, doc, keys, more=ALL)  # what is unknown is told beside what else is wrong
    settings = read_settings(told, os.environ.get("KUBETUNE_CACHE"))
    try:
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        raise ConfigError(
            f"serving needs {error.name}, which is not installed: pip install 'kubetune[serve]'"
        ) from None
    export = find_export(settings.model, Path(settings.cache_dir).expanduser(), say)
    if export.reference is None:
        say(f"{export.folder} has no reference.json: drift is not measured; export again to have it", "WARNING")
    from trainer.serving.server import serve

    serve(settings, export, _load)


def main() -> None:
    """Entry point of `python -m trainer.serve`; exits with a documented code (`trainer.errors`)."""
    with exit_with_code():
        _run(sys.argv[1:])


if __name__ == "__main__":
    main()
