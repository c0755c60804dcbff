"""`python -m trainer.serve model=OUTPUT_DIR` (of a run, or its export): serve an exported model over HTTP.

Example: python -m trainer.serve model=outputs/flowers port=8501

The arguments are listed below with their defaults; docs/serving.md describes them and the routes.
Exit codes: 0 stopped by a signal after a response to every accepted request; 2 a setting, the export or the port cannot
be used; 75 stopped before the model was loaded or with unfinished requests, or the bucket does not respond.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.cluster.signals import exit_on_sigterm

if __name__ == "__main__":
    exit_on_sigterm()  # SIGTERM and SIGINT end the process during the imports below, which take seconds

from trainer.cli.arguments import MATCH_ALL, parse_arguments
from trainer.cli.process import exit_with_code, suppress_import_noise
from trainer.errors import ConfigError
from trainer.monitoring.log import log
from trainer.serving.export_files import Export, find_export
from trainer.serving.settings import Settings, parse_settings

if TYPE_CHECKING:
    from trainer.serving.model import ServedModel


def _load_model(export: Export) -> ServedModel:
    """Import TensorFlow and load the export. The server calls this in a thread while it already listens."""
    with suppress_import_noise():
        from trainer.serving.model import ServedModel
    return ServedModel(export)


def main() -> None:
    """Run `python -m trainer.serve`, and exit with a code of `trainer.errors`."""
    with exit_with_code():
        fields = Settings.model_fields
        width = max(map(len, fields)) + 2
        values = {key: "..." if field.is_required() else f"{field.default}" for key, field in fields.items()}
        rows = [f"    {f'{key}={values[key]}':{width + 20}}{field.description or ''}" for key, field in fields.items()]
        keys = dict.fromkeys(fields, "") | {"model": "is required"}
        # All keys are accepted here, because `parse_settings` reports unknown keys together with all other errors.
        arguments, _ = parse_arguments(sys.argv[1:], "\n".join([f"{__doc__}", *rows]), keys, other_keys=MATCH_ALL)
        settings = parse_settings(arguments, os.environ.get("KUBETUNE_CACHE"))
        try:
            from trainer.serving.server import serve
        except ModuleNotFoundError as error:
            package = str(error.name).partition(".")[0]
            raise ConfigError(f"{package} is not installed", fix="run pip install 'kubetune[serve]'") from None
        export = find_export(settings.model, Path(settings.cache_dir).expanduser(), log.info)
        if export.reference is None:
            problem = f"{export.folder} has no reference.json, so drift is not measured"
            log.warning(f"{problem}; export the model again to measure it")
        serve(settings, export, _load_model)


if __name__ == "__main__":
    main()
