"""Read a run's results (report, learning curves, figures), evaluate its checkpoints, and predict with its model."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from trainer.api.processes import run_command
from trainer.config.schema import RunConfig
from trainer.errors import DataError
from trainer.names import escape_unprintable
from trainer.predict import parse_tta
from trainer.predict.images import ImageFile, list_images, list_images_of_paths, read_image
from trainer.runs.stored_run import StoredRun, find_run
from trainer.storage.path import StoragePath, storage_path
from trainer.storage.small_files import parse_json, require_json_object

if TYPE_CHECKING:
    from trainer.predict.model import Model

SHOWN_FIGURES = ("curves", "confusion")  # figures of the report that a notebook shows
SHOWN_IMAGES = 20  # predictions that a notebook shows


@dataclass(frozen=True)
class Report(Mapping[str, Any]):
    """The report of a run or evaluation: a mapping with the content of report.json."""

    folder: str  # folder of report.json and the other files, local or gs://
    content: dict[str, Any] = field(repr=False)  # content of report.json; its format is docs/report.schema.json

    def __getitem__(self, key: str) -> Any:
        return self.content[key]

    def __iter__(self) -> Any:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)

    @property
    def path(self) -> str:
        """Path or gs:// address of the report's page, index.html."""
        return f"{self.folder}/index.html"

    @property
    def probabilities(self) -> np.ndarray:
        """Probabilities of the scored examples, float32 [n, classes], in the order of predictions.csv."""
        return np.asarray(np.load(io.BytesIO((storage_path(self.folder) / "probabilities.npy").read())))

    def _repr_html_(self) -> str:
        test = self.content["test"]
        low, high = test["interval"]
        html = Markup(
            "<p><strong>{}</strong>: {} accuracy <strong>{:.4f}</strong> (95 % interval {:.4f} to {:.4f}, n = {:,}); "
            "macro F1 {:.4f}<br><code>{}</code></p>"
        ).format(
            escape_unprintable(self.content["title"]), test["split"], test["accuracy"], low, high, test["n"],
            test["macro_f1"], escape_unprintable(self.path),
        )  # fmt: skip
        for name in SHOWN_FIGURES:
            if file := self.content["figures"].get(name):
                file_content = (storage_path(self.folder) / file).fetch()
                data = base64.b64encode(file_content[0]).decode() if file_content else ""
                html += Markup('<img alt="{}" style="max-width:100%" src="data:image/png;base64,{}">').format(
                    name, data
                )
        return str(html)


def read_report(folder: StoragePath) -> Report | None:
    """Read the report in a folder. Return None if there is no report.json; raise a DataError if it is corrupt."""
    content = (folder / "report.json").fetch()
    if content is None:
        return None
    report_json = parse_json(content[0], require_json_object, folder / "report.json", "evaluate the run again")
    return Report(str(folder), report_json)


@dataclass(frozen=True)
class Predictions:
    """Predictions for n images, in the order of a list of images, or sorted by path for a folder or pattern."""

    files: tuple[str, ...]  # paths or addresses of the images, with unprintable characters escaped
    class_names: tuple[str, ...]
    probabilities: np.ndarray = field(repr=False)  # float32 [n, classes]; NaN for an unreadable image
    distances: np.ndarray = field(repr=False)  # float64 [n]: distance from the training data; NaN if unknown
    errors: dict[int, str]  # index -> reason why the image cannot be read
    # Image index -> the model's input, uint8 [S, S, 3]; None if it is unreadable, or the model decodes images itself.
    decode: Callable[[int], np.ndarray | None] = field(repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def labels(self) -> list[str | None]:
        """The most probable class of each image; None for an unreadable image."""
        return [
            None if i in self.errors else self.class_names[int(row.argmax())]
            for i, row in enumerate(self.probabilities)
        ]

    @property
    def confidences(self) -> np.ndarray:
        """The largest probability of each image, float32 [n]; NaN for an unreadable image."""
        return self.probabilities.max(axis=1)

    def _repr_html_(self) -> str:
        from trainer.report.page import THUMBNAIL_PIXELS, embed_thumbnail

        rows = Markup("")
        for i, (file, label) in enumerate(zip(self.files[:SHOWN_IMAGES], self.labels, strict=False)):
            pixels = self.decode(i) if label is not None else None
            image = "" if pixels is None else embed_thumbnail(pixels, THUMBNAIL_PIXELS, str(label))
            outcome = self.errors[i] if label is None else label
            confidence = "" if label is None else f"{self.confidences[i]:.3f}"
            row = "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>"
            rows += Markup(row).format(image, escape_unprintable(str(outcome)), confidence, file)
        num_hidden = len(self) - SHOWN_IMAGES
        note = Markup("<p>and {:,} more</p>").format(num_hidden) if num_hidden > 0 else ""
        head = "<tr><th></th><th>prediction</th><th>confidence</th><th>file</th></tr>"
        return f"<table>{head}{rows}</table>{note}"


@dataclass(frozen=True)
class Result:
    """A run in its output_dir, local or in a bucket. It may be unfinished."""

    address: str  # path or gs:// address of the output_dir
    run: StoredRun = field(repr=False)
    _models: dict[str | None, Model] = field(default_factory=dict, repr=False, compare=False)  # by checkpoint

    @property
    def config(self) -> RunConfig:
        """The run's configuration, with all `auto` values resolved."""
        return self.run.config

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the probabilities."""
        return self.run.class_names

    @property
    def report(self) -> Report:
        """The run's report. Raises a DataError if there is no report.json yet, or it is corrupt."""
        report = read_report(self.run.folder / "report")
        if report is None:
            problem = "has no report yet"
            raise DataError(problem, key="run", value=self.address, fix="wait for its end, or call evaluate()")
        return report

    @property
    def curves(self) -> dict[str, list[Any]]:
        """The metrics so far: name (phase, epoch, step, loss, val_accuracy, ...) -> list with a value per epoch.

        All lists have the same length. A value is None if the epoch does not have the metric.
        """
        content = (self.run.folder / "metrics.jsonl").fetch()
        lines = content[0].decode("utf-8", "replace").splitlines() if content else []
        rows = []
        for line in lines:
            try:
                row = require_json_object(json.loads(line))
            except ValueError:  # the run may still be writing this line
                continue
            if row.pop("kind", None) == "epoch":
                rows.append(row)
        return {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}

    def evaluate(self, *changes: str, show_log: bool = False, **options: str) -> Report:
        """Evaluate a checkpoint by `python -m trainer.evaluate` in a child process, and return the report.

        Args:
            changes: changes to the configuration, such as "data.root=new_photos".
            show_log: print the evaluation's log to `sys.stdout`.
            options: `checkpoint`, `split` and `output`, as for `trainer.evaluate`. `output` defaults to a folder in
                the run's output_dir.

        Raises:
            CommandFailed: the evaluation's exit code is not 0.
            KeyboardInterrupt: the call was interrupted; the evaluation has stopped.
        """
        arguments = [
            f"run={self.address}",
            "runtime.log_format=text",
            *(f"{key}={value}" for key, value in options.items()),
            *changes,
        ]
        lines = run_command("trainer.evaluate", arguments, show_log)
        report_lines = [line for line in lines if line.startswith("  report   ") and line.endswith("/index.html")]
        folder = report_lines[-1].removeprefix("  report   ").removesuffix("/index.html")
        report = read_report(storage_path(folder))
        assert report is not None, "written by the evaluation"
        return report

    def predict(
        self, images: str | os.PathLike[str] | Iterable[str | Path], *, checkpoint: str | None = None, tta: str = "none"
    ) -> Predictions:
        """Predict images in this process, with the same results as `python -m trainer.predict`. Nothing is written.

        The first call loads the model, which remains in memory.

        Args:
            images: a folder, a glob pattern, an image or a .csv list, local or gs://; or the paths of the images.
            checkpoint: "best", "last" or a step; defaults to the checkpoint that the run exports.
            tta: "none", or "flip" for the mean of the probabilities of an image and of its mirror image.

        Returns:
            The predictions. Images that cannot be read are in `Predictions.errors`.

        Raises:
            ConfigError: `tta` or `checkpoint` is invalid.
            DataError: there is no image, or the checkpoint is missing or corrupt.
            Interrupted: a bucket does not respond.
        """
        flip = parse_tta(tta)
        address = os.fspath(images) if isinstance(images, str | os.PathLike) else None
        image_files = list_images_of_paths(images) if address is None else list_images(address)  # type: ignore[arg-type]
        from trainer.predict.parts import predict_images

        model = self._open(checkpoint)
        predictions = predict_images(model, image_files, flip)
        errors = {i: error for i, error in enumerate(predictions.errors) if error}
        files = tuple(image.name for image in image_files)
        return Predictions(
            files,
            self.class_names,
            predictions.probabilities,
            predictions.distances,
            errors,
            lambda i: _decode(model, image_files[i]),
        )

    def _open(self, checkpoint: str | None) -> Model:
        """Return a checkpoint's model. Loading it, the first time, does not change Keras's global precision policy."""
        if checkpoint not in self._models:
            from trainer.cli.process import suppress_import_noise

            with suppress_import_noise():
                import keras

                from trainer.predict.model import open_run_model
            policy = keras.config.dtype_policy()
            try:
                self._models[checkpoint] = open_run_model(self.run, checkpoint)[0]
            finally:
                keras.config.set_dtype_policy(policy)
        return self._models[checkpoint]

    def _repr_html_(self) -> str:
        report = read_report(self.run.folder / "report")
        if report is not None:
            return report._repr_html_()
        epochs = len(self.curves.get("epoch", []))
        return str(Markup("<p><code>{}</code>: {} epochs, not finished</p>").format(self.address, epochs))


def _decode(model: Model, image: ImageFile) -> np.ndarray | None:
    """Decode an image to the model's input, uint8 [S, S, 3]. Return None as in `Predictions.decode`."""
    content = read_image(image)
    if isinstance(content, str) or model.decode is None:
        return None
    pixels = model.decode(content)
    return None if isinstance(pixels, str) else pixels


def open_run(address: str | os.PathLike[str]) -> Result:
    """Open the run in an output_dir, local or gs://.

    Raises:
        DataError: the folder has no run, or run.json is corrupt.
        ConfigError: config.yaml is corrupt or from an incompatible version.
    """
    path = os.fspath(address)
    return Result(path, find_run(path))
