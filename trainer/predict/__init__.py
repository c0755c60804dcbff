"""`python -m trainer.predict run=RUN images=FOLDER [output=FOLDER] [tta=flip] [--json]`:
predict unlabelled images with a run or an export, and show them on a page.

    run=...                     output_dir of a run, local or gs://
    export=...                  instead of `run`: a SavedModel, an `export` folder, or a .keras, .onnx or .tflite file
    images=...                  a folder, a pattern such as 'photos/*.jpg', a file, or a .csv list with a column `file`,
                                of paths relative to the list; local or gs://
    output=FOLDER               local or gs:// (default: predictions/<name of the images> in the run, or here)
    checkpoint=best|last|STEP   weights of the run (default: those that it exports at its end)
    tta=none|flip               flip: mean of the probabilities of an image and of its mirror image
    top=3                       most probable classes per image
    --json                      print a JSON line per image, and the summary as the last one, instead of the log

Example: python -m trainer.predict run=outputs/flowers images=new_photos

`data.KEY=...` and `runtime.KEY=...` replace values of the run's configuration, such as `data.root` if its data was
moved, on which tta=flip is measured. A command that was killed continues after its last 512 images.
Exit codes: 0 all images are predicted; 6 some cannot be read (column `error`), the others are predicted; 2 none can be
read, or an argument, the run or the export is wrong; 75 stopped, or the bucket does not respond.
docs/predict.md describes the files.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.cli.arguments import format_usage, parse_arguments
from trainer.cli.overrides import parse_value
from trainer.cli.process import exit_with_code, suppress_import_noise
from trainer.cluster.signals import StopFlag
from trainer.errors import ConfigError
from trainer.monitoring.health import health
from trainer.monitoring.log import log
from trainer.names import make_file_stem
from trainer.predict.images import list_images
from trainer.runs.stored_run import StoredRun, find_run
from trainer.storage.path import StoragePath, storage_path

if TYPE_CHECKING:
    from trainer.predict.model import Model

# Argument -> problem that is reported if it is missing, or "" if it is optional.
ARGUMENTS = {"run": "", "export": "", "images": "is required"} | dict.fromkeys(
    ("output", "checkpoint", "tta", "top"), ""
)
DEFAULT_TOP = 3  # default number of most probable classes per image
DEFAULT_CACHE = "~/.cache/kubetune"  # folder for local copies of exports in a bucket; $KUBETUNE_CACHE replaces it
PREDICTION_ACTIVITY = (
    "during the prediction"  # completes the message of a StopRequested: "SIGTERM during the prediction"
)


def parse_top(text: str) -> int:
    """Parse the argument `top`; raise a ConfigError if it is not an integer from 1 to 999,999."""
    with suppress(ValueError):
        if text.isascii() and 0 < int(text) < 10**6:
            return int(text)
    raise ConfigError("is not a positive integer", key="top", value=text, fix=f"write top={DEFAULT_TOP}")


def parse_tta(text: str) -> bool:
    """Return True if the argument `tta` is "flip", False if it is "none"; raise a ConfigError if it is neither."""
    if text not in ("none", "flip"):
        raise ConfigError("is not a test-time augmentation", key="tta", value=text, fix="write tta=none or tta=flip")
    return text == "flip"


def choose_model(arguments: dict[str, str]) -> tuple[str, str, bool]:
    """Determine which model the arguments refer to.

    Returns:
        The argument that refers to the model ("run" or "export"), its address, and whether the address is a run. The
        argument `run` can also refer to an export: a folder without a config.yaml.

    Raises:
        ConfigError: neither or both of `run` and `export` are set, or an export is given with an argument that only
            applies to a run (`checkpoint`, `data.KEY` or `runtime.KEY`).
    """
    if ("run" in arguments) == ("export" in arguments):
        problem = "cannot be used with run" if "export" in arguments else "is required, unless there is export"
        key = "export" if "export" in arguments else "run"
        raise ConfigError(problem, key=key, fix=f"write {format_usage(__doc__)}")
    key = "run" if "run" in arguments else "export"
    address = arguments[key]
    is_run = key == "run" and (storage_path(address) / "config.yaml").exists()
    if not is_run:
        for option in (name for name in arguments if name == "checkpoint" or "." in name):
            fix = f"leave {option} out, or give run=RUN with a config.yaml"
            raise ConfigError("belongs to a run, and this is an export", key=option, value=arguments[option], fix=fix)
    return key, address, is_run


def choose_output(arguments: dict[str, str], home: StoragePath | None) -> StoragePath:
    """Return the argument `output` as a path. It defaults to predictions/NAME in `home`, or in the working directory.

    NAME is the last component of the argument `images`. `home`: the run's output_dir; None for an export.
    """
    if output := arguments.get("output"):
        return storage_path(output)
    base = os.path.basename(arguments["images"].rstrip("/"))
    name = make_file_stem(base.removesuffix(".csv")).strip(".-") or "images"
    return (home or storage_path("")) / "predictions" / name


def _open_run(run: StoredRun, arguments: dict[str, str], flip: bool, stop: StopFlag) -> tuple[Model, dict[str, Any]]:
    """Open a run's checkpoint. Return the model, and with `flip` the measured effect of mirror images, otherwise {}."""
    with suppress_import_noise():
        from trainer.predict.command import configure_reproducible_predictions
        from trainer.predict.model import open_run_model
        from trainer.predict.tta import measure_flip
    configure_reproducible_predictions(run.config.runtime.deterministic)
    model, predict = open_run_model(run, arguments.get("checkpoint"))
    stop.install()
    if not flip:
        return model, {}
    log.info("measuring tta=flip on the held-out examples of the run")
    assert model.image_size, "a model of pixels"
    return model, measure_flip(run, predict, model.image_size, partial(stop.check, PREDICTION_ACTIVITY))


def _open_export(address: str, key: str, flip: bool, stop: StopFlag) -> tuple[Model, dict[str, Any]]:
    """Open an export. Return the model, and with `flip` why mirror images were not measured, otherwise {}."""
    with suppress_import_noise():
        from trainer.predict.command import configure_reproducible_predictions
        from trainer.predict.model import open_export_model
    configure_reproducible_predictions(deterministic=True)
    cache = Path(os.environ.get("KUBETUNE_CACHE") or DEFAULT_CACHE).expanduser()
    model = open_export_model(address, key, cache, flip, log.info)
    stop.install()
    return model, {"problem": "an export has no data; give the run"} if flip else {}


def main() -> None:
    """Run `python -m trainer.predict`, and exit with a code of `trainer.errors`."""
    with exit_with_code():
        arguments, flags = parse_arguments(
            sys.argv[1:] or ["--help"], __doc__, ARGUMENTS, other_keys=r"(data|runtime)\..+", other_arguments="--json"
        )
        flip, top = parse_tta(arguments.get("tta", "none")), parse_top(arguments.get("top", str(DEFAULT_TOP)))
        key, address, is_run = choose_model(arguments)
        if flags:
            log.setLevel(logging.WARNING)
        images = list_images(arguments["images"])
        run = find_run(address, _parse_changes(arguments)) if is_run else None
        output = choose_output(arguments, run.folder if run else None)
        health.enter_phase("predict")
        stop = StopFlag()
        model, tta = _open_run(run, arguments, flip, stop) if run else _open_export(address, key, flip, stop)
        from trainer.predict.command import Options, predict_into

        for note in model.notes:
            log.warning(f"warning: {note}")
        log.info(f"model: {model.name}\npredicting {len(images):,} images of {arguments['images']}")
        command = shlex.join(["python", "-m", "trainer.predict", *sys.argv[1:]])
        top = min(top, len(model.class_names))
        options = Options(arguments["images"], top, flip, tta, command, print if flags else None)
        predict_into(model, images, output, options, partial(stop.check, PREDICTION_ACTIVITY))


def _parse_changes(arguments: dict[str, str]) -> dict[str, Any]:
    """Return the changes to the run's configuration, such as {"data.root": "/elsewhere"}."""
    return {key: parse_value(f"{key}={text}") for key, text in arguments.items() if "." in key}
