"""Caches of decoded images, and images that cannot be read."""

import json
import os
import re
import resource
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests.data.images import serialize_record
from tests.data.products import make_combinations
from tests.data.splits_on_disk import COUNT, SIDE, encode_jpeg, open_pixels, write_file_split, write_shard_split
from tests.errors import raises
from trainer.config.schema import GIGABYTE, Augmentation, validate_config
from trainer.data.decoding import decode_image
from trainer.data.host import count_usable_cpus, get_default_memory_budget, get_memory_limit_bytes
from trainer.data.images import Pixels, convert_data_errors, plan_image_caches
from trainer.data.order import Order
from trainer.data.pipeline import build_evaluation_batches, build_training_batches
from trainer.errors import DataError, StopRequested
from trainer.types import Dataset, Split

NEEDED = (COUNT + 1) * SIDE * SIDE * 3


@cache
def decode_expected() -> np.ndarray:
    images = np.stack([decode_image(tf.constant(encode_jpeg(i)), SIDE, "stretch") for i in range(COUNT)])
    images.flags.writeable = False
    return images


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Split]:
    """Both splits, for tests that change no image."""
    folder = tmp_path_factory.mktemp("splits")
    return {"files": write_file_split(folder / "files"), "shards": write_shard_split(folder / "shards")}


@pytest.fixture(scope="module")
def filled_once(splits: dict[str, Split], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the disk cache of the files."""
    folder = tmp_path_factory.mktemp("filled")
    open_pixels(splits["files"], "disk", folder)
    return folder


@pytest.fixture
def filled(splits: dict[str, Split], filled_once: Path, tmp_path: Path) -> Split:
    """The files, whose disk cache an earlier start has written to the test's folder."""
    shutil.copytree(filled_once / "cache", tmp_path / "cache")
    notes: list[str] = []
    open_pixels(splits["files"], "disk", tmp_path, notes)
    assert "written by an earlier start" in notes[0]  # it is used, unless a test damages it
    return splits["files"]


MAKERS = {"files": write_file_split, "shards": write_shard_split}


# Quick: each cache and each kind of split. The cache is filled by the same batches.
@pytest.mark.parametrize(
    ("kind", "cache"),
    make_combinations(lambda *case: case in {("shards", "memory"), ("files", "disk")}, MAKERS, ["memory", "disk"]),
)
def test_the_cache_holds_every_image_in_index_order(
    splits: dict[str, Split], kind: str, cache: str, tmp_path: Path
) -> None:
    pixels = open_pixels(splits[kind], cache, tmp_path)
    np.testing.assert_array_equal(pixels.array[:COUNT], decode_expected())
    assert not pixels.array[COUNT].any()
    assert (pixels.cached_in, pixels.array.nbytes) == (cache, NEEDED)
    np.testing.assert_array_equal(pixels.tensor(), pixels.array)


# Quick: live images of both kinds of split, and a cache, whose rows do not depend on the split.
@pytest.mark.parametrize(
    ("kind", "cache"),
    make_combinations(lambda *case: case != ("shards", "memory"), MAKERS, ["memory", "none"]),
)
def test_rows_are_the_requested_images(splits: dict[str, Split], kind: str, cache: str, tmp_path: Path) -> None:
    pixels = open_pixels(splits[kind], cache, tmp_path)
    indices = np.array([30, 2, 30, 11])
    np.testing.assert_array_equal(pixels.read_images(indices), decode_expected()[indices])
    assert pixels.read_images(np.zeros(0, np.int64)).shape == (0, SIDE, SIDE, 3)


def test_the_tensor_is_over_the_memory_of_the_array(splits: dict[str, Split], tmp_path: Path) -> None:
    pixels = open_pixels(splits["files"], "memory", tmp_path)
    tensor = pixels.tensor()
    pixels.array[5, 0, 0, 0] ^= 1
    assert int(tensor[5, 0, 0, 0]) == int(pixels.array[5, 0, 0, 0])


@pytest.mark.parametrize(
    ("memory", "disk", "cache", "note"),
    [
        (NEEDED, NEEDED, "memory", "cached in memory (memory budget 11.4 kB, disk budget 11.4 kB)"),
        (NEEDED - 1, NEEDED, "disk", "cached in "),
        (NEEDED - 1, NEEDED - 1, "none", "not cached, decoded each time they are read (they fit neither memory budget"),
    ],
)
def test_auto_caches_what_fits_and_logs_why(
    splits: dict[str, Split], memory: int, disk: int, cache: str, note: str, tmp_path: Path
) -> None:
    notes: list[str] = []
    pixels = open_pixels(splits["files"], "auto", tmp_path, notes, memory_budget=memory, disk_budget=disk)
    assert (pixels.cached_in, len(notes)) == (cache, 1)
    assert notes[0].startswith(f"decoded train images (37 at 10 px, 11.4 kB): {note}")


def test_the_disk_cache_serves_later_runs(tmp_path: Path) -> None:
    split, notes = write_file_split(tmp_path), []
    first = open_pixels(split, "disk", tmp_path, notes)
    for file in split.files:
        os.unlink(file)
    second = open_pixels(split, "disk", tmp_path, notes)
    np.testing.assert_array_equal(first.array, second.array)
    assert "written by an earlier start" in notes[1]


@pytest.mark.parametrize("change", [{"size": 11}, {"resize": "crop"}, {"fingerprint": "other"}])
def test_other_pixels_have_another_cache(filled: Split, change: dict[str, object], tmp_path: Path) -> None:
    notes: list[str] = []
    open_pixels(filled, "disk", tmp_path, notes, **change)
    assert not any("earlier start" in note for note in notes)


def test_a_fill_that_was_killed_is_done_again(filled: Split, tmp_path: Path) -> None:
    notes: list[str] = []
    (about,) = (tmp_path / "cache").glob("*.json")
    about.unlink()  # as after a kill between the two renames
    (data,) = (tmp_path / "cache").glob("*.u8")
    data.write_bytes(b"\7" * 100)
    pixels = open_pixels(filled, "disk", tmp_path, notes)
    np.testing.assert_array_equal(pixels.array[:COUNT], decode_expected())
    assert not any("earlier start" in note for note in notes)


@pytest.mark.parametrize("position", [pytest.param(0, marks=pytest.mark.slow), 1234, NEEDED - 1])
def test_a_damaged_byte_of_the_disk_cache_is_noticed(filled: Split, position: int, tmp_path: Path) -> None:
    notes: list[str] = []
    (data,) = (tmp_path / "cache").glob("*.u8")
    content = bytearray(data.read_bytes())
    content[position] ^= 1
    data.write_bytes(content)
    pixels = open_pixels(filled, "disk", tmp_path, notes)
    np.testing.assert_array_equal(pixels.array[:COUNT], decode_expected())
    assert notes[0] == f"{data} is corrupt (checksum mismatch); decoding the images again"
    open_pixels(filled, "disk", tmp_path, notes)
    assert "written by an earlier start" in notes[-1]


# Quick: one of each error of Python: a ValueError, TypeError, KeyError and AttributeError.
@pytest.mark.parametrize(
    "about",
    [
        *(pytest.param(about, marks=pytest.mark.slow) for about in ("", "7")),
        "[]",
        '{"bad": {}}',
        '{"bad": 5, "crc32c": 1}',
        "\xff",
    ],
)
def test_a_damaged_description_of_the_disk_cache_means_decoding_again(
    filled: Split, about: str, tmp_path: Path
) -> None:
    notes: list[str] = []
    (file,) = (tmp_path / "cache").glob("*.json")
    file.write_bytes(about.encode("latin-1"))
    pixels = open_pixels(filled, "disk", tmp_path, notes)
    np.testing.assert_array_equal(pixels.array[:COUNT], decode_expected())
    assert not any("earlier start" in note for note in notes)


# Quick: an index on each side, and another checksum. The slow ones are a ValueError and an AttributeError, as above.
@pytest.mark.parametrize(
    "bad",
    [
        {"999999": ""}, {"-1": ""}, {"0": "another"},
        *(pytest.param(bad, marks=pytest.mark.slow) for bad in ({"x": ""}, ["x"])),
    ],
)  # fmt: skip
def test_a_bad_example_that_was_not_recorded_means_decoding_again(filled: Split, bad: object, tmp_path: Path) -> None:
    notes: list[str] = []
    (file,) = (tmp_path / "cache").glob("*.json")
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"bad": bad}))
    pixels = open_pixels(filled, "disk", tmp_path, notes, on_error="skip")
    assert not pixels.known_unreadable
    assert not any("earlier start" in note for note in notes)


def test_a_stop_request_ends_the_verification_of_the_disk_cache(filled: Split, tmp_path: Path) -> None:
    def stop() -> None:
        raise StopRequested("stop")

    with pytest.raises(StopRequested):
        open_pixels(filled, "disk", tmp_path, check_stop=stop)


def test_a_disk_that_takes_no_more_means_live_decoding(splits: dict[str, Split], tmp_path: Path) -> None:
    notes: list[str] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        pixels = open_pixels(splits["files"], "disk", tmp_path, notes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert pixels.cached_in == "none"
    assert re.search(r"cannot be cached in .*File too large", notes[-1])
    assert list((tmp_path / "cache").iterdir()) == []
    np.testing.assert_array_equal(pixels.read_images(np.arange(COUNT)), decode_expected())


def test_a_cache_folder_that_cannot_be_made_means_live_decoding(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    notes: list[str] = []
    assert open_pixels(write_file_split(tmp_path), "disk", tmp_path, notes).cached_in == "none"
    assert "cannot be cached in" in notes[-1]


def damage_image(split: Split, index: int) -> None:
    """Truncate an image file, or the image in a record."""
    if split.files:
        Path(split.files[index]).write_bytes(encode_jpeg(index)[:300])
        return
    path, _, number = split.name_of(index).rpartition("#")
    records = [r.numpy() for r in tf.data.TFRecordDataset(path)]
    records[int(number)] = serialize_record(image=encode_jpeg(index)[:300])
    with tf.io.TFRecordWriter(path) as writer:
        for content in records:
            writer.write(content)


# Quick: each cache and each kind of split. The cache is filled by the same batches.
@pytest.mark.parametrize(
    ("kind", "cache"),
    make_combinations(lambda *case: case in {("shards", "memory"), ("files", "disk")}, MAKERS, ["memory", "disk"]),
)
def test_a_damaged_image_is_named_while_the_cache_fills(kind: str, cache: str, tmp_path: Path) -> None:
    split = MAKERS[kind](tmp_path / "data")
    damage_image(split, 12)
    problem = re.escape(f"cannot decode {split.name_of(12)}: Invalid JPEG data, size 300")
    with raises(DataError, fix=r"remove it, or set data\.on_error=skip", problem=f"^{problem}$") as caught:
        open_pixels(split, cache, tmp_path)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("kind", "training"),
    # A truncated shard, below, is named in training.
    [("files", True), ("shards", False), pytest.param("shards", True, marks=pytest.mark.slow)],
)
def test_a_damaged_image_is_named_when_decoded_live(kind: str, training: bool, tmp_path: Path) -> None:
    split = MAKERS[kind](tmp_path / "data")
    damage_image(split, 12)
    pixels = open_pixels(split, "none", tmp_path)
    with raises(DataError, problem=r"cannot decode .*: Invalid JPEG data"), convert_data_errors(pixels):
        for _ in (
            iterate_first_epoch(pixels)
            if training
            else build_evaluation_batches(pixels, batch_size=8, num_replicas=1).dataset
        ):
            pass


def iterate_first_epoch(pixels: Pixels) -> tf.data.Dataset:
    batches = build_training_batches(pixels, Order(8, seed=1, window=10), num_replicas=2, augmentation=Augmentation())
    return batches.dataset.take(2 * 5)


@pytest.mark.parametrize(
    ("kind", "cache"),
    # Quick: cached and live. Bad images of the disk cache are in the next test.
    [
        ("files", "memory"),
        pytest.param("shards", "disk", marks=pytest.mark.slow),
        pytest.param("files", "none", marks=pytest.mark.slow),
        ("shards", "none"),
    ],
)
def test_a_skipped_image_has_no_weight_and_is_black(kind: str, cache: str, tmp_path: Path) -> None:
    split, notes = MAKERS[kind](tmp_path / "data"), []
    damage_image(split, 12)
    damage_image(split, 33)
    pixels = open_pixels(split, cache, tmp_path, notes, on_error="skip")
    batches = list(iterate_first_epoch(pixels))
    weight, index, image = (np.concatenate([b[name] for b in batches]) for name in ("weight", "index", "image"))
    assert sorted(index[weight > 0]) == [i for i in range(COUNT) if i not in (12, 33)]
    assert not image[weight == 0].any()
    np.testing.assert_array_equal(image[weight > 0], decode_expected()[index[weight > 0]])
    reason = "Invalid JPEG data, size 300"
    assert pixels.unreadable == {12: reason, 33: reason}
    assert [n for n in notes if n.startswith("skipped")].count(f"skipped {split.name_of(12)}: {reason}") == 1


def test_what_was_skipped_is_remembered_with_the_disk_cache(tmp_path: Path) -> None:
    split = write_file_split(tmp_path)
    damage_image(split, 12)
    first = open_pixels(split, "disk", tmp_path, on_error="skip")
    assert open_pixels(split, "disk", tmp_path, on_error="skip").unreadable == first.unreadable
    with raises(DataError, problem=r"12\.jpg"):
        open_pixels(split, "disk", tmp_path)


HOW = ["cached", "live", "skipped"]


@pytest.mark.parametrize(
    ("stop", "lost", "reason", "how"),
    # Quick: what is skipped of both, and of one each that it is named from a cache and live.
    [
        *make_combinations(lambda *case: case[-1] != "cached", [-30], [[36]], ["truncated record at .*"], HOW),
        *make_combinations(lambda *case: case[-1] != "live", [0], [[*range(20, 37)]], ["the shard ends before this record"], HOW),
    ],
)  # fmt: skip
def test_a_truncated_shard_is_named(stop: int, lost: list[int], reason: str, how: str, tmp_path: Path) -> None:
    split = write_shard_split(tmp_path)
    path = Path(split.shards[3].path)
    path.write_bytes(path.read_bytes()[:stop])
    if how == "cached":
        with raises(DataError, problem=rf"cannot decode .*3\.tfrec#{lost[0] - 20}: {reason}$"):
            open_pixels(split, "memory", tmp_path)
    elif how == "live":
        pixels = open_pixels(split, "none", tmp_path)
        with raises(DataError, problem=r"3\.tfrec#"), convert_data_errors(pixels):
            list(iterate_first_epoch(pixels))
    else:
        skipping = open_pixels(split, "memory", tmp_path, on_error="skip")
        assert list(skipping.unreadable) == lost
        assert all(re.fullmatch(reason, why) for why in skipping.unreadable.values())


def test_iteration_ends_if_no_image_is_readable(tmp_path: Path) -> None:
    split, notes = write_file_split(tmp_path), []
    for file in split.files:
        os.unlink(file)
    with raises(DataError, problem=r"cannot decode .*\.jpg: .*No such file"):
        open_pixels(split, "memory", tmp_path)
    pixels = open_pixels(split, "none", tmp_path, notes, on_error="skip")
    batches = list(iterate_first_epoch(pixels))
    assert not np.concatenate([b["weight"] for b in batches]).any()
    assert sorted(np.concatenate([b["index"] for b in batches])[:COUNT]) == list(range(COUNT))
    assert sorted(pixels.unreadable) == list(range(COUNT))
    assert len([n for n in notes if n.startswith("skipped")]) == 20
    assert notes[-1] == "further skipped images are only counted"


def test_a_damaged_image_is_named_through_a_compiled_distributed_loop(tmp_path: Path) -> None:
    split, notes = write_file_split(tmp_path), []
    damage_image(split, 30)
    pixels = open_pixels(split, "none", tmp_path, notes)
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    batches = iter(strategy.distribute_datasets_from_function(lambda _: iterate_first_epoch(pixels)))

    @tf.function
    def several() -> tf.Tensor:
        total = tf.zeros([])
        for _ in tf.range(10):
            total += tf.reduce_sum(strategy.experimental_local_results(next(batches)["weight"])[0])
        return total

    with raises(DataError, problem=r"cannot decode .*30\.jpg: Invalid JPEG data"), convert_data_errors(pixels):
        several()  # a call runs a whole epoch
    assert notes[-1] == "an image of train cannot be read; searching for it"


def test_errors_outside_the_pipeline_are_not_converted(splits: dict[str, Split], tmp_path: Path) -> None:
    pixels = open_pixels(splits["files"], "none", tmp_path)
    with pytest.raises(tf.errors.InvalidArgumentError), convert_data_errors(pixels):
        tf.ensure_shape(tf.zeros([2]), [3])


def test_limits_of_a_container_count(tmp_path: Path) -> None:
    machine = get_memory_limit_bytes(tmp_path)
    assert get_default_memory_budget(tmp_path) == machine // 4
    (tmp_path / "memory.max").write_text("max\n")
    assert get_memory_limit_bytes(tmp_path) == machine
    (tmp_path / "memory.max").write_text("400000000\n")
    assert get_default_memory_budget(tmp_path) == 100_000_000
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("40000000\n")
    assert get_default_memory_budget(tmp_path) == 10_000_000


def test_processor_quota_of_a_container_counts(tmp_path: Path) -> None:
    all_of_them = count_usable_cpus(tmp_path)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert count_usable_cpus(tmp_path) == all_of_them
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert count_usable_cpus(tmp_path) == 1


def test_the_caches_of_all_splits_are_under_one_memory_budget() -> None:
    labels = np.zeros(9, np.int32)
    dataset = Dataset("x", ("a", "b"), {name: Split(name, labels) for name in ("train", "validation", "test")}, "")
    each = 10 * 4 * 4 * 3
    config = validate_config({
        "data": {"source": "digits"}, "model": {"backbone": "MobileNetV2"},
        "phases": {"head": {"thaw": "none", "epochs": 1}},
        "runtime": {"memory_budget_gb": 2.5 * each / GIGABYTE, "disk_budget_gb": each / GIGABYTE},
    })  # fmt: skip
    plans = plan_image_caches(config, dataset, 4, train_images_read_once=False)
    assert [(name, plan.where, plan.bytes) for name, plan in plans.items()] == [
        ("train", "memory", each), ("validation", "memory", each), ("test", "disk", each)
    ]  # fmt: skip
    once = plan_image_caches(config, dataset, 4, train_images_read_once=True)
    assert [plan.where for plan in once.values()] == ["none", "memory", "memory"]
    assert once["train"].reason == "training reads them once, for features"
