"""`python -m trainer.serve model=OUTPUT_DIR` (of a run, or its export): serve an exported model over HTTP.

Arguments are `key=value` of `trainer.serving.settings.Settings`; docs/serving.md describes them and the routes. Exit
code 0: stopped by a signal after every accepted request was answered.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.cluster.signals import exit_on_sigterm

if __name__ == "__main__":
    exit_on_sigterm()  # before the imports below, which take seconds

from trainer.cli.arguments import ALL, read_arguments
from trainer.cli.process import exit_with_code, quiet_start
from trainer.errors import ConfigError
from trainer.monitoring.log import log
from trainer.serving.export_files import Export, find_export
from trainer.serving.settings import Settings, read_settings

if TYPE_CHECKING:
    from trainer.serving.model import ServedModel


def _load(export: Export) -> ServedModel:
    with quiet_start():
        from trainer.serving.model import ServedModel
    return ServedModel(export)


def main() -> None:
    """Entry point of `python -m trainer.serve`; exits with a documented code (`trainer.errors`)."""
    with exit_with_code():
        fields = Settings.model_fields
        lines = [f"  {key}" if field.is_required() else f"  {key}={field.default}" for key, field in fields.items()]
        keys = dict.fromkeys(fields, "") | {"model": "give model=..."}
        # `read_settings` reports unknown keys together with all other faults.
        arguments, _ = read_arguments(sys.argv[1:], "\n".join([f"{__doc__}", *lines]), keys, more=ALL)
        settings = read_settings(arguments, os.environ.get("KUBETUNE_CACHE"))
        try:
            from trainer.serving.server import serve
        except ModuleNotFoundError as error:
            package = str(error.name).partition(".")[0]
            raise ConfigError(f"{package} is not installed", fix="run pip install 'kubetune[serve]'") from None
        export = find_export(settings.model, Path(settings.cache_dir).expanduser(), log.info)
        if export.reference is None:
            log.warning(f"{export.folder} has no reference.json: drift is not measured; export again to measure it")
        serve(settings, export, _load)


if __name__ == "__main__":
    main()
