"""`python -m trainer.relay model=FOLDER log=FOLDER`: forward requests to TensorFlow Serving, and log its predictions.

TensorFlow Serving has no prediction log. This process runs in its pod, forwards its REST requests to it, and writes the
log that `trainer.drift` and `trainer.nightly` read, in the format of `trainer.serve`.

Example: python -m trainer.relay model=gs://BUCKET/models/flowers log=gs://BUCKET/predictions

The arguments are listed below with their values; docs/serving.md describes them.
Exit codes: 0 stopped by a signal after a response to every accepted request; 2 a setting, the log or the port cannot be
used; 75 stopped with unfinished requests.
"""

import sys

from trainer.cli.arguments import MATCH_ALL, parse_arguments
from trainer.cli.process import exit_with_code
from trainer.errors import ConfigError
from trainer.relay.settings import RelaySettings, parse_settings


def main() -> None:
    """Run `python -m trainer.relay`, and exit with a code of `trainer.errors`."""
    with exit_with_code():
        fields = RelaySettings.model_fields
        width = max(map(len, fields)) + 2
        values = {key: "..." if field.is_required() else f"{field.default}" for key, field in fields.items()}
        rows = [f"    {f'{key}={values[key]}':{width + 24}}{field.description or ''}" for key, field in fields.items()]
        required = {key: "is required" for key, field in fields.items() if field.is_required()}
        arguments, _ = parse_arguments(
            sys.argv[1:], "\n".join([f"{__doc__}", *rows]), dict.fromkeys(fields, "") | required, other_keys=MATCH_ALL
        )
        settings = parse_settings(arguments)
        try:
            from trainer.relay.forwarding import Relay
            from trainer.serving.server import listen, run_service
        except ModuleNotFoundError as error:
            package = str(error.name).partition(".")[0]
            raise ConfigError(f"{package} is not installed", fix="run pip install 'kubetune[serve]'") from None
        with listen(settings.host, settings.port) as listener:
            run_service(lambda: Relay(settings), listener, lambda relay: relay.follow_upstream())
