"""`python -m trainer.backbones among=[NAME,...] [output=FOLDER] [folds=K] [ARGUMENTS OF A RUN]`:
compare pretrained backbones on a dataset by cross-validation of a head, before a run is trained.

    among=[...]         networks of keras.applications, each perhaps with a width multiplier and weights of its own:
                        [mobilenet_v2,mobilenet_v2:0.35,vgg16@none]
    output=FOLDER       folder of the results, local or gs:// (default: outputs/backbones)
    folds=K             number of folds; 1: train on the train split and score the validation split (default: by the
                        number of examples, docs/choose.md)
    ARGUMENTS OF A RUN  those of `python -m trainer`: data, model.weights, model.image_size, phases.head, ...

Example: python -m trainer.backbones data=image_folder data.root=photos among=[mobilenet_v2,efficientnet_b0]

Each network computes the features of the train and validation examples once, and a head is trained on them per fold, as
the first phase of a run with thaw=none is. Test examples are not read. Prints a table, and writes index.html and
backbones.json. The same command continues after an interruption; what is finished is not computed again. Exit codes: 0
done; 2 an argument, the data or the weights are wrong; 75 interrupted, the same command continues.
"""

import sys

from trainer.backbones.candidates import configure_comparison, parse_candidates, parse_folds
from trainer.cli.arguments import parse_arguments
from trainer.cli.compose import compose, load_and_require_read, requests_sweep
from trainer.cli.overrides import list_argument_keys, map_argument_values
from trainer.cli.process import choose_and_log_source, exit_with_code, start_monitoring, suppress_import_noise
from trainer.errors import ConfigError
from trainer.monitoring.health import health

# Argument -> problem that is reported if it is missing, or "" if it is optional.
ARGUMENTS = {"among": "is required", "output": "", "folds": ""}
DEFAULT_OUTPUT = "outputs/backbones"  # default of the argument output


def main() -> None:
    """Run `python -m trainer.backbones`, and exit with a code of `trainer.errors`."""
    with exit_with_code():
        arguments, overrides = parse_arguments(
            sys.argv[1:] or ["--help"], __doc__, ARGUMENTS, other_arguments=r"[^-](?s:.*)"
        )
        candidates = parse_candidates(arguments["among"])
        num_folds = parse_folds(arguments.get("folds"))
        if requests_sweep(overrides):
            raise ConfigError("a sweep is of runs", fix="remove sweep=..., among=[...] lists the networks")
        overrides = choose_and_log_source(overrides)
        composed = compose(overrides)
        assert composed is not None, "no argument is one of Hydra's flags"
        config = load_and_require_read(composed, overrides)
        explicit_keys = list_argument_keys(overrides) | map_argument_values(overrides).keys()
        comparison_config = configure_comparison(config, candidates, explicit_keys)
        start_monitoring(config, worker_index=0, num_workers=1)
        health.enter_phase("backbones")
        with suppress_import_noise():
            from trainer.backbones.comparison import compare_backbones  # here, because it imports TensorFlow
        compare_backbones(comparison_config, arguments.get("output", DEFAULT_OUTPUT), num_folds)
