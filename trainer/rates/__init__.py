"""`python -m trainer.rates [phase=NAME] [lowest=1e-7] [highest=10] [output=FOLDER] [ARGUMENTS OF A RUN]`:
suggest a learning rate by a range test, before a run is trained.

    phase=NAME          phase to test, from the initial weights or those of warm_start (default: the first one)
    lowest=1e-7         learning rate of the first step
    highest=10          learning rate of the last step, unless the loss diverges before
    output=FOLDER       folder of index.html, the page with the curve, and rates.json, local or in a bucket (default:
                        outputs/rates)
    ARGUMENTS OF A RUN  those of `python -m trainer`; output_dir is not read

Example: python -m trainer.rates data=image_folder data.root=photos model=mobilenet_v2

The learning rate grows exponentially from step to step (Smith 2017), with the batches, the augmentation and the
optimizer of the phase, but without its schedule. Takes an epoch, but at least 100 and at most 400 steps, and
writes nothing but these files and caches. Exit codes: 0 done; 2 an argument or the data is wrong; 75 interrupted.
"""

import sys

from trainer.cli.arguments import parse_arguments
from trainer.cli.compose import compose, load_and_require_read, requests_sweep
from trainer.cli.process import choose_and_log_source, configure_log, exit_with_code, suppress_import_noise
from trainer.config.schema import apply_overfit
from trainer.errors import ConfigError
from trainer.monitoring.health import health
from trainer.rates.curve import DEFAULT_HIGHEST, DEFAULT_LOWEST, parse_bounds

# Key -> problem to report if the argument is missing; "" if it is optional.
ARGUMENTS = {"phase": "", "lowest": "", "highest": "", "output": ""}
DEFAULT_OUTPUT = "outputs/rates"  # default of `output`


def main() -> None:
    """Run `python -m trainer.rates`, and exit with a code of `trainer.errors`."""
    with exit_with_code():
        arguments, overrides = parse_arguments(sys.argv[1:], __doc__, ARGUMENTS, other_arguments=r"[^-](?s:.*)")
        lowest, highest = arguments.get("lowest", str(DEFAULT_LOWEST)), arguments.get("highest", str(DEFAULT_HIGHEST))
        bounds = parse_bounds(lowest, highest)
        if requests_sweep(overrides):
            raise ConfigError("a sweep is of runs", fix="remove sweep=..., this command tests all rates in one pass")
        overrides = choose_and_log_source(overrides)
        composed = compose(overrides)
        assert composed is not None, "no argument is one of Hydra's flags"
        config = apply_overfit(load_and_require_read(composed, overrides))
        configure_log(config.runtime)
        health.enter_phase("rates")
        with suppress_import_noise():
            from trainer.rates.range_test import run_range_test  # here, because it imports TensorFlow
        run_range_test(config, arguments.get("phase"), bounds, arguments.get("output", DEFAULT_OUTPUT))
