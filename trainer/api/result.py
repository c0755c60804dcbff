"""The results of a run: its report, curves and figures, and predictions with its model."""

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
from trainer.predict.images import ImageFile, list_images, list_paths, read_image
from trainer.runs.stored_run import StoredRun, find_run
from trainer.storage.path import StoragePath, storage_path
from trainer.storage.small_files import parse_json, require_json_object

if TYPE_CHECKING:
    from trainer.predict.model import Model

SHOWN_FIGURES = ("curves", "confusion")  # in a notebook
SHOWN_IMAGES = 20


@dataclass(frozen=True)
class Report(Mapping[str, Any]):
    """A report: a mapping with the content of report.json, and its files."""

    folder: str  # local or gs://
    content: dict[str, Any] = field(repr=False)  # docs/report.schema.json

    def __getitem__(self, key: str) -> Any:
        return self.content[key]

    def __iter__(self) -> Any:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)

    @property
    def path(self) -> str:
        """The page, index.html."""
        return f"{self.folder}/index.html"

    @property
    def probabilities(self) -> np.ndarray:
        """The probabilities of the scored examples, float32 [n, classes], in the order of predictions.csv."""
        return np.asarray(np.load(io.BytesIO((storage_path(self.folder) / "probabilities.npy").read())))

    def _repr_html_(self) -> str:
        test = self.content["test"]
        low, high = test["interval"]
        text = Markup(
            "<p><strong>{}</strong>: {} accuracy <strong>{:.4f}</strong> (95 % interval {:.4f} to {:.4f}, n = {:,}); "
            "macro F1 {:.4f}<br><code>{}</code></p>"
        ).format(
            escape_unprintable(self.content["title"]), test["split"], test["accuracy"], low, high, test["n"],
            test["macro_f1"], escape_unprintable(self.path),
        )  # fmt: skip
        for name in SHOWN_FIGURES:
            if file := self.content["figures"].get(name):
                fetched = (storage_path(self.folder) / file).fetch()
                data = base64.b64encode(fetched[0]).decode() if fetched else ""
                text += Markup('<img alt="{}" style="max-width:100%" src="data:image/png;base64,{}">').format(
                    name, data
                )
        return str(text)


def read_report(folder: StoragePath) -> Report | None:
    """Read a report from its folder; None if there is none. Raises DataError if it is corrupt."""
    content = (folder / "report.json").fetch()
    if content is None:
        return None
    values = parse_json(content[0], require_json_object, folder / "report.json", "evaluate the run again")
    return Report(str(folder), values)


@dataclass(frozen=True)
class Predictions:
    """Predictions for images, in the order in which they were given."""

    files: tuple[str, ...]  # as in the column `file` of `trainer.predict`
    class_names: tuple[str, ...]
    probabilities: np.ndarray = field(repr=False)  # float32 [n, classes]; NaN for an unreadable image
    distances: np.ndarray = field(repr=False)  # float64 [n]; NaN if there is none (docs/predict.md)
    errors: dict[int, str]  # index -> why the image cannot be read
    decode: Callable[[int], np.ndarray | None] = field(repr=False, compare=False)  # reads an image again, as the input

    def __len__(self) -> int:
        return len(self.files)

    @property
    def labels(self) -> list[str | None]:
        """The most probable class of each image; None for an unreadable one."""
        return [
            None if i in self.errors else self.class_names[int(row.argmax())]
            for i, row in enumerate(self.probabilities)
        ]

    @property
    def confidences(self) -> np.ndarray:
        """The largest probability of each image, float32 [n]; NaN for an unreadable one."""
        return self.probabilities.max(axis=1)

    def _repr_html_(self) -> str:
        from trainer.report.page import LIST_SIDE, embed_thumbnail

        rows = Markup("")
        for i, (file, label) in enumerate(zip(self.files[:SHOWN_IMAGES], self.labels, strict=False)):
            pixels = self.decode(i) if label is not None else None
            image = "" if pixels is None else embed_thumbnail(pixels, LIST_SIDE, str(label))
            outcome = self.errors[i] if label is None else label
            confidence = "" if label is None else f"{self.confidences[i]:.3f}"
            row = "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>"
            rows += Markup(row).format(image, escape_unprintable(str(outcome)), confidence, file)
        more = len(self) - SHOWN_IMAGES
        note = Markup("<p>and {:,} more</p>").format(more) if more > 0 else ""
        head = "<tr><th></th><th>prediction</th><th>confidence</th><th>file</th></tr>"
        return f"<table>{head}{rows}</table>{note}"


@dataclass(frozen=True)
class Result:
    """A run, finished or not, in its output_dir, local or in a bucket."""

    address: str
    run: StoredRun = field(repr=False)
    _models: dict[str | None, Model] = field(default_factory=dict, repr=False, compare=False)

    @property
    def config(self) -> RunConfig:
        """The configuration of the run."""
        return self.run.config

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of the probabilities."""
        return self.run.class_names

    @property
    def report(self) -> Report:
        """The report of the run. Raises DataError if the run is not finished, or report.json is corrupt."""
        report = read_report(self.run.home / "report")
        if report is None:
            problem = "has no report yet"
            raise DataError(problem, key="run", value=self.address, fix="wait for its end, or call evaluate()")
        return report

    @property
    def curves(self) -> dict[str, list[Any]]:
        """The epochs of the run so far, as columns: phase, epoch, step, loss, val_accuracy, ...; None if missing."""
        content = (self.run.home / "metrics.jsonl").fetch()
        lines = content[0].decode("utf-8", "replace").splitlines() if content else []
        rows = []
        for line in lines:
            try:
                row = require_json_object(json.loads(line))
            except ValueError:  # the run may be writing it
                continue
            if row.pop("kind", None) == "epoch":
                rows.append(row)
        return {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}

    def evaluate(self, *changes: str, show_log: bool = False, **options: str) -> Report:
        """Score a checkpoint as `python -m trainer.evaluate` does, in a process of its own; return its report.

        Args:
            changes: as `data.root=new_photos`.
            options: `checkpoint`, `split` and `output`; the report is in a folder of the run without `output`.

        Raises:
            CommandFailed: the evaluation ended with another exit code than 0.
        """
        arguments = [
            f"run={self.address}",
            "runtime.log_format=text",
            *(f"{key}={value}" for key, value in options.items()),
            *changes,
        ]
        lines = run_command("trainer.evaluate", arguments, show_log)
        pages = [line for line in lines if line.startswith("  report   ") and line.endswith("/index.html")]
        folder = pages[-1].removeprefix("  report   ").removesuffix("/index.html")
        report = read_report(storage_path(folder))
        assert report is not None, "written by the evaluation"
        return report

    def predict(
        self, images: str | os.PathLike[str] | Iterable[str | Path], *, checkpoint: str | None = None, tta: str = "none"
    ) -> Predictions:
        """Predict images in this process as `python -m trainer.predict` does, and write nothing.

        The model is loaded by the first call, and remains in memory.

        Args:
            images: a folder, a pattern, a file or a .csv list, local or gs://; or paths, each of one image.
            checkpoint: best, last or a step; None for the one that the run exports.
            tta: "none", or "flip" for the mean of the probabilities of an image and of its mirror image.

        Raises:
            ConfigError, DataError: there is no image, or no such checkpoint. Unreadable images are in `errors` instead.
        """
        flip = parse_tta(tta)
        address = os.fspath(images) if isinstance(images, str | os.PathLike) else None
        listed = list_paths(images) if address is None else list_images(address)  # type: ignore[arg-type]
        from trainer.predict.parts import predict_images

        model = self._open(checkpoint)
        done = predict_images(model, listed, flip)
        errors = {i: error for i, error in enumerate(done.errors) if error}
        files = tuple(image.name for image in listed)
        return Predictions(
            files, self.class_names, done.probabilities, done.distances, errors, lambda i: _decode(model, listed[i])
        )

    def _open(self, checkpoint: str | None) -> Model:
        """Load a model once. Keras' global precision policy is left as it is."""
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
        report = read_report(self.run.home / "report")
        if report is not None:
            return report._repr_html_()
        epochs = len(self.curves.get("epoch", []))
        return str(Markup("<p><code>{}</code>: {} epochs, not finished</p>").format(self.address, epochs))


def _decode(model: Model, image: ImageFile) -> np.ndarray | None:
    content = read_image(image)
    if isinstance(content, str) or model.decode is None:
        return None
    pixels = model.decode(content)
    return None if isinstance(pixels, str) else pixels


def open_run(address: str | os.PathLike[str]) -> Result:
    """Open a run in its output_dir, local or gs://. Raises DataError or ConfigError if there is none."""
    text = os.fspath(address)
    return Result(text, find_run(text))
