"""`python -m trainer.promote run=RUN to=FOLDER [keep=5] [allow_worse=true]`, or `back=true` instead of `run`:
make the model of a finished run the next version of a served model.

    run=...           output_dir of a finished run with export/saved_model, local or in a bucket
    to=...            folder of the versions 1, 2, ..., which TensorFlow Serving or `trainer.serve` reads; local or in a
                      bucket
    keep=5            number of versions to retain, the newest ones
    allow_worse=true  promote the run even if it is worse than the served version, or cannot be compared with it
    back=true         make the version before the served one the newest again, as a copy with a new number

Example: python -m trainer.promote run=outputs/flowers to=models/flowers

The run is compared with the newest version on the held-out examples that both have scored: a run is worse if it is less
accurate and McNemar's exact test is significant at 5 %, as in `trainer.compare`. docs/serving.md describes a version.
Exit codes: 0 promoted, or already the newest version; 5 not promoted, as it is worse; 2 an argument or the run is
wrong, or the two cannot be compared; 75 stopped, another process writes to the folder, or the bucket does not respond.
"""

import sys

from trainer.cli.arguments import format_usage, parse_arguments
from trainer.cli.process import exit_with_code
from trainer.errors import ConfigError
from trainer.storage.path import storage_path

# Argument -> problem that is reported if it is missing, or "" if it is optional.
ARGUMENTS = {"run": "", "to": "is required", "keep": "", "allow_worse": "", "back": ""}
DEFAULT_KEEP = 5  # default number of versions to retain


def parse_keep(arguments: dict[str, str]) -> int:
    """Return the number of versions to retain; raise a ConfigError if it is not a positive integer."""
    text = arguments.get("keep", str(DEFAULT_KEEP))
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise ConfigError(
            "is not a positive integer", key="keep", value=text, fix=f"give a number, such as {DEFAULT_KEEP}"
        )
    return int(text)


def _parse_flag(arguments: dict[str, str], key: str) -> bool:
    """Return the value of an argument that is true or false (the default); raise a ConfigError for any other text."""
    text = arguments.get(key, "false")
    if text not in ("true", "false"):
        raise ConfigError("is neither true nor false", key=key, value=text, fix=f"write {key}=true")
    return text == "true"


def main() -> None:
    """Run `python -m trainer.promote`, and exit with a code of `trainer.errors`."""
    with exit_with_code():
        arguments, _ = parse_arguments(sys.argv[1:] or ["--help"], __doc__, ARGUMENTS)
        keep, back = parse_keep(arguments), _parse_flag(arguments, "back")
        allow_worse = _parse_flag(arguments, "allow_worse")
        if back == ("run" in arguments):
            problem = "cannot be used with back=true" if back else "is required, unless back=true"
            raise ConfigError(problem, key="run", fix=f"write {format_usage(__doc__)}")
        from trainer.promote.promotion import promote, restore_previous_version  # here, because it imports matplotlib

        folder = storage_path(arguments["to"])
        if back:
            restore_previous_version(folder, keep)
        else:
            promote(arguments["run"], folder, keep, allow_worse)
