"""`python -m trainer.look [ARGUMENTS OF A RUN] [output=FOLDER] [images=4000]`:
show the data of a run before it is trained, on one page, with suggestions.

    ARGUMENTS OF A RUN  those of `python -m trainer`: groups (data=digits), keys (seed=7), --cfg job
    output=FOLDER       folder of index.html, look.json and the figures, local or gs:// (default: outputs/look)
    images=4000         maximum number of images of all splits together that are read and compared; counts are of all

Example: python -m trainer.look experiment=photos data.root=photos

The page has examples of each class as training decodes them, some of them next to their augmented views, counts per
class and split, sizes and formats, duplicates, files that cannot be read, and suggestions with their reasons as
arguments for the command line. Files that cannot be read are listed even with data.on_error=fail. The same arguments
and data give the same page. Nothing is trained, and output_dir is not used.

Exit codes: 0 the page is written; 2 the configuration or the data is wrong, as for a run; 75 stopped, or a bucket or
the server of the dataset does not respond.
"""

import sys

from trainer.cli.arguments import MATCH_ALL, parse_arguments
from trainer.cli.compose import compose, load_and_require_read, requests_sweep
from trainer.cli.process import choose_and_log_source, configure_log, exit_with_code, suppress_import_noise
from trainer.config.schema import apply_overfit
from trainer.errors import ConfigError
from trainer.monitoring.health import health

# Argument -> problem that is reported if it is missing, or "" if it is optional.
ARGUMENTS = {"output": "", "images": ""}
DEFAULT_OUTPUT = "outputs/look"  # default of the argument output
DEFAULT_IMAGES = 4000  # default of the argument images
MAX_IMAGES = 100_000  # largest value of the argument images; a report compares at most as many to detect duplicates


def parse_images(arguments: dict[str, str]) -> int:
    """Parse the argument `images`; raise a ConfigError if it is not an integer from 1 to `MAX_IMAGES`."""
    text = arguments.get("images", str(DEFAULT_IMAGES))
    if not (text.isascii() and text.isdecimal() and 0 < int(text[:9]) <= MAX_IMAGES):
        problem = f"is not a whole number from 1 to {MAX_IMAGES}"
        raise ConfigError(problem, key="images", value=text, fix=f"write images={DEFAULT_IMAGES}")
    return int(text)


def main() -> None:
    """Run `python -m trainer.look`, and exit with a code of `trainer.errors`."""
    with exit_with_code():
        options, arguments = parse_arguments(sys.argv[1:], __doc__, ARGUMENTS, other_arguments=MATCH_ALL)
        max_images = parse_images(options)
        if requests_sweep(arguments):
            raise ConfigError("a sweep has no page, only a single run has one", fix="remove --multirun and sweep=...")
        arguments = choose_and_log_source(arguments)
        composed = compose(arguments)
        if composed is None:  # --cfg
            return
        config = apply_overfit(load_and_require_read(composed, arguments))
        configure_log(config.runtime)
        health.enter_phase("look")
        with suppress_import_noise(with_keras=False):
            from trainer.look.show import show  # here, because it imports TensorFlow
        show(config, options.get("output", DEFAULT_OUTPUT), max_images)
