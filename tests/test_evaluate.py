"""An evaluation scores the model that was trained."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.errors import raises
from tests.models.efficient_net import IMAGENET, normalize, set_normalization
from trainer.config.schema import RunConfig, validate_config
from trainer.errors import ConfigError, DataError
from trainer.evaluate import apply_changes, choose_other_source
from trainer.models.classifier import build_classifier
from trainer.runs.checkpoints import CheckpointFolder
from trainer.runs.stored_run import StoredRun, find_run, load_checkpoint, map_to_run_classes, open_classifier
from trainer.storage.path import storage_path
from trainer.training import variables
from trainer.training.state import RunState
from trainer.types import Dataset, Split

CLASSES = [str(digit) for digit in range(10)]


def stored_run(folder: Path) -> StoredRun:
    phases = {"head": {"thaw": "none", "epochs": 1}}
    tree = {"data": {"source": "digits"}, "model": {"backbone": "MobileNetV2"}, "phases": phases}
    return StoredRun("runs/1", storage_path(str(folder)), validate_config(tree), ("daisy", "rose", "tulip"), "")


def data_of(classes: tuple[str, ...]) -> Dataset:
    return Dataset("leaves", classes, {"train": Split("train", np.arange(len(classes), dtype=np.int32))}, "")


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (("rust", "spot", "moss", "rot", "mould", "mites"), "'rust', 'spot', 'moss', 'rot', 'mould', and 1 more"),
        (("rose", "daisy", "dahlia"), "'dahlia'"),
    ],
)
def test_data_of_unknown_classes_is_rejected_by_name(classes: tuple[str, ...], names: str, tmp_path: Path) -> None:
    with raises(DataError, key="run", value="runs/1", problem=names, fix="'daisy', 'rose', 'tulip'"):
        map_to_run_classes(stored_run(tmp_path), data_of(classes))


@pytest.mark.parametrize(
    ("classes", "labels", "absent"),
    [(("daisy", "rose", "tulip"), [0, 1, 2], ""), (("tulip", "rose", "daisy"), [2, 1, 0], ""),
     (("tulip", "daisy"), [2, 0], "rose"), (("rose",), [1], "daisy, tulip")],
)  # fmt: skip
def test_labels_are_mapped_by_name_and_absent_classes_are_named(
    classes: tuple[str, ...], labels: list[int], absent: str, tmp_path: Path
) -> None:
    data = map_to_run_classes(stored_run(tmp_path), data_of(classes))
    assert data.class_names == ("daisy", "rose", "tulip")
    assert data.splits["train"].labels.tolist() == labels
    assert [absent in note for note in data.notes] == [True] * bool(absent)


def tree_of_run(**data: object) -> dict[str, Any]:
    data = {"source": "image_folder", "root": "photos", "validation_fraction": 0.25, "test_fraction": 0.1} | data
    phases, debug = {"head": {"thaw": "none", "epochs": 1}}, {"max_examples": 90}
    tree = {"data": data, "model": {"backbone": "MobileNetV2"}, "phases": phases, "debug": debug}
    return validate_config(tree).model_dump(mode="json")


@pytest.mark.parametrize(
    ("changes", "scored", "moved"),
    [
        (["data.root=other"], (0.0, 0.0, None, None), (0.25, 0.1, 5, 90)),
        (["data=image_folder", "data.root=other"], (0.0, 0.0, None, None), (0.25, 0.1, 5, 90)),
        (["data=tfds", "data.name=beans"], (0.0, 0.0, None, None), (0.25, 0.1, 5, 90)),
        (["data.root=other", "data.validation_fraction=0.5"], (0.5, 0.1, None, None), None),
        (["data.root=other", "data.labels_per_class=7"], (0.0, 0.0, 7, None), (0.25, 0.1, 7, 90)),
        (["data.root=other", "debug.max_examples=30"], (0.0, 0.0, None, 30), (0.25, 0.1, 5, 30)),
        (["data.on_error=skip"], (0.25, 0.1, 5, 90), None),
        ([], (0.25, 0.1, 5, 90), None),
    ],
)
def test_other_data_is_scored_as_a_whole_unless_a_fraction_or_limit_is_given(
    changes: list[str], scored: tuple[float | None, ...], moved: tuple[float | None, ...] | None
) -> None:
    def limits(config: RunConfig) -> tuple[float | None, ...]:
        data = config.data
        return data.validation_fraction, data.test_fraction, data.labels_per_class, config.debug.max_examples

    whole, divided = apply_changes(tree_of_run(labels_per_class=5), changes)
    assert limits(whole) == scored
    assert (divided and limits(divided)) == moved


def test_other_data_has_the_shown_names_of_the_run() -> None:
    names = {"n01": "rose", "n02": "tulip"}
    tree = tree_of_run(class_names=names)
    for changes, shown in (
        (["data.root=other"], names),
        (["data=image_folder", "data.root=other"], names),
        (["data=image_folder", "data.root=other", "data.class_names={n01: daisy}"], {"n01": "daisy"}),
        (["data=image_folder", "data.root=other", "data.class_names=null"], None),
    ):
        assert apply_changes(copy.deepcopy(tree), changes)[0].data.class_names == shown


@pytest.mark.parametrize("changes", [["data.name=beans"], ["data.data_dir=y"]])
def test_another_dataset_by_name_is_scored_as_a_whole(changes: list[str]) -> None:
    whole, divided = apply_changes(tree_of_run(source="tfds", root=None, name="cats"), changes)
    assert (whole.data.validation_fraction, divided and divided.data.validation_fraction) == (0.0, 0.25)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [([], "ignore"), (["data=image_folder", "data.root=x"], "ignore"), (["data.root=x"], "ignore"),
     (["data=image_folder", "data.root=x", "data.orientation=exif"], "exif"), (["data.orientation=exif"], "exif")],
)  # fmt: skip
def test_images_are_turned_as_in_the_run_unless_the_key_is_given(changes: list[str], expected: str) -> None:
    assert apply_changes(tree_of_run(orientation="ignore"), changes)[0].data.orientation == expected


@pytest.mark.parametrize(
    ("change", "fix"),
    [("batch_size=8", "training.batch_size"), ("root=x", "data.root"), ("seed=1", "change only data")],
)
def test_what_cannot_be_changed_names_what_is_meant(change: str, fix: str) -> None:
    with raises(ConfigError, key=change.partition("=")[0], problem="cannot be changed", fix=fix):
        apply_changes(tree_of_run(), [change])


@pytest.mark.parametrize("source", ["digits", "tfds", "image_folder"])
def test_the_source_is_chosen_by_what_is_at_the_root(source: str, tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    changes, note = choose_other_source([f"data.root={tmp_path}"], source)
    added = ["data=image_folder"] * (source != "image_folder")
    assert changes == [*added, f"data.root={tmp_path}"]
    assert bool(note) == bool(added)
    run = {
        "digits": {"root": None, "validation_fraction": 0.2, "test_fraction": 0.0},
        "tfds": {"root": None, "name": "b"},
    }
    assert apply_changes(tree_of_run(source=source, **run.get(source, {})), changes)[0].data.root == str(tmp_path)


def test_an_efficient_net_of_imagenet_weights_has_the_same_input_as_in_training(tmp_path: Path) -> None:
    model = {"backbone": "EfficientNetB0", "weights": "none", "image_size": 32}
    tree = {"data": {"source": "digits"}, "model": model, "phases": {"head": {"thaw": "none", "epochs": 1}}}
    source = build_classifier(validate_config(tree).model, len(CLASSES), 1)
    set_normalization(source, *IMAGENET)
    source.backbone.save_weights(tmp_path / "efficient.weights.h5")
    config = validate_config(tree | {"model": model | {"weights": str(tmp_path / "efficient.weights.h5")}})
    trained = build_classifier(config.model, len(CLASSES), 1)

    run, images = tmp_path / "run", np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype("float32")
    values = variables.copy_values(trained.variables)
    CheckpointFolder(run / "checkpoints", 1, print).save(RunState(step=1).to_json(), values, None)
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (run / "run.json").write_text(json.dumps({"classes": CLASSES, "data_fingerprint": ""}))
    stored = find_run(str(run))
    opened = open_classifier(stored, load_checkpoint(stored, "last"))
    expected = normalize(trained, images)
    np.testing.assert_allclose(normalize(opened, images), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 4  # normalised twice, as the published weights require
