"""`python -m trainer.serve model=OUTPUT_DIR`, of a run, or its export: answer over HTTP with the model exported there.

Arguments are `key=value` of `trainer.serving.settings.Settings`; docs/serving.md has them with the routes. Exit code 0:
told to stop, and everything that was taken is answered.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.cluster.signals import end_at_once

if __name__ == "__main__":
    end_at_once()  # what is imported below takes seconds

from trainer.cli.arguments import ALL, read_arguments
from trainer.cli.process import exit_with_code, quiet_start
from trainer.errors import ConfigError
from trainer.monitoring.log import log
from trainer.serving.export_files import Export, find_export
from trainer.serving.settings import Settings, read_settings

if TYPE_CHECKING:
    from trainer.serving.model import ServedModel

EXTRA = ("python_multipart", "starlette", "uvicorn", "h11")


def _load(export: Export) -> ServedModel:
    with quiet_start():
        from trainer.serving.model import ServedModel
    return ServedModel(export)


def main() -> None:
    """Entry point of `python -m trainer.serve`; exits with a documented code (`trainer.errors`)."""
    with exit_with_code():
        fields = Settings.model_fields
        lines = [f"  {key}" if field.is_required() else f"  {key}={field.default}" for key, field in fields.items()]
        keys = dict.fromkeys(fields, "") | {"model": "say what to serve"}
        # `read_settings` refuses unknown keys, beside everything else that is wrong.
        given, _ = read_arguments(sys.argv[1:], "\n".join([f"{__doc__}", *lines]), keys, more=ALL)
        settings = read_settings(given, os.environ.get("KUBETUNE_CACHE"))
        for package in EXTRA:
            if find_spec(package) is None:
                raise ConfigError(f"serving needs {package}, which is not installed: pip install 'kubetune[serve]'")
        export = find_export(settings.model, Path(settings.cache_dir).expanduser(), log.info)
        if export.reference is None:
            log.warning(f"{export.folder} has no reference.json: drift is not measured; export again to have it")
        from trainer.serving.server import serve

        serve(settings, export, _load)


if __name__ == "__main__":
    main()
