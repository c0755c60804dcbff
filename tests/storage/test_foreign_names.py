"""Names of objects that cannot be local files, are patterns or folders: left out and named, never written elsewhere."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.data.images import encode_noise
from tests.errors import raises
from tests.nasty import paths
from tests.storage.emulator import Emulator, running
from trainer.config.schema import validate_config
from trainer.data.open import stage_and_open_run_dataset
from trainer.data.tfds_writer import ImageSource, LabeledImages, WriteOptions, write_dataset
from trainer.distillation.teacher_files import describe_teacher
from trainer.errors import DataError
from trainer.planning.checks import download_to_temporary_folder, plan_staging
from trainer.runs.checkpoints import read_pointer
from trainer.runs.publisher import fetch_run
from trainer.storage.base import ObjectInfo
from trainer.storage.gcs import GcsPath
from trainer.storage.local import safe_join
from trainer.storage.path import StoragePath, storage_path
from trainer.storage.shard_cache import ShardCache
from trainer.storage.staging import VERSIONS, make_staging_plan, separate_invalid_objects, stage


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """An emulator whose objects may have any name: they are no files."""
    with running(tmp_path_factory.mktemp("unused"), backend="memory") as server:
        yield server


def put(folder: StoragePath, name: str, content: bytes | str = "x") -> None:
    """Write an object of exactly this name, which `/` would refuse or normalize."""
    assert isinstance(folder, GcsPath)
    replace(folder, key=f"{folder.key}/{name}").write(content)


def staged(address: str, cache: Path) -> tuple[Path, list[str]]:
    notes: list[str] = []
    return Path(stage(address, cache, 10**9, notes.append, lambda: None)), notes


def files(folder: Path) -> set[str]:
    return {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file() and f.name != VERSIONS}


def test_class_names_next_to_records_in_a_bucket_number_the_classes(in_bucket: StoragePath, tmp_path: Path) -> None:
    examples: list[tuple[ImageSource, int]] = [(encode_noise(i), i % 2) for i in range(12)]
    write_dataset(in_bucket, LabeledImages("pets", ("cat", "dog"), {"train": examples}), WriteOptions(shards=3))
    data = {"source": "tfrecords", "pattern": f"{in_bucket}/*.tfrecord*", "class_names": ["dog", "cat"]}
    tree = {"data": data, "model": {"backbone": "MobileNetV2"}, "phases": {"head": {"thaw": "none", "epochs": 1}}}
    config = validate_config(tree | {"runtime": {"cache_dir": str(tmp_path)}})
    for _ in range(2):
        dataset = stage_and_open_run_dataset(config, lambda _: None, lambda _: None).dataset
        assert dataset.splits["validation"].labels.tolist() == [1, 0, 1, 0]


def opened(root: str, cache: Path) -> object:
    data = {"source": "image_folder", "root": root}
    tree = {"data": data, "model": {"backbone": "MobileNetV2"}, "phases": {"head": {"thaw": "none", "epochs": 1}}}
    return stage_and_open_run_dataset(
        validate_config(tree | {"runtime": {"cache_dir": str(cache)}}), lambda _: None, lambda _: None
    )


def test_objects_with_empty_parts_are_left_out_and_named(in_bucket: StoragePath, tmp_path: Path) -> None:
    escaped = Path(f"/kubetune-{os.getpid()}")
    for name in ("cat/1.jpg", "dog/1.jpg", f"{escaped}/x.jpg", "dog//2.jpg"):
        put(in_bucket, name)
    folder, notes = staged(str(in_bucket), tmp_path)
    assert files(folder) == {"cat/1.jpg", "dog/1.jpg"}
    assert not escaped.exists()
    skipped_objects = (
        f"2 objects cannot be files and are left out: {in_bucket}/{escaped}/x.jpg (it begins with a slash), "
        f"{in_bucket}/dog//2.jpg (a component of it is empty)"
    )
    assert notes[0] == f"{in_bucket}: {skipped_objects}"
    assert plan_staging(str(in_bucket), tmp_path / "other", 10**9)[1].endswith(f"; {skipped_objects}")


def test_an_address_with_two_slashes_is_that_with_one(in_bucket: StoragePath, tmp_path: Path) -> None:
    (in_bucket / "p" / "cat" / "1.jpg").write("x")
    folder, _ = staged(f"{in_bucket}//p", tmp_path)
    assert files(folder) == {"cat/1.jpg"}
    assert folder == staged(f"{in_bucket}/p/", tmp_path)[0]


@pytest.mark.parametrize("seed", range(3))
def test_no_object_leaves_the_folder_of_its_copy(tmp_path: Path, seed: int) -> None:
    """`separate_invalid_objects` and `safe_join` agree on every name of a listing."""
    root = GcsPath("bucket", "p")
    names = {name for name in paths(seed, 1000) if name}
    infos = [ObjectInfo(replace(root, key=f"p/{name}"), 1, 1) for name in names]
    entries, skipped_objects = separate_invalid_objects(root, infos)
    assert len(entries) + len(skipped_objects) == len(names)
    assert not any("\n" in line for line in skipped_objects)
    for name in entries:
        path = safe_join(tmp_path, name)
        assert Path(os.path.normpath(path)).is_relative_to(tmp_path)
        assert not any(other.startswith(f"{name}/") for other in entries)


def test_an_object_and_a_folder_of_one_name(in_bucket: StoragePath, tmp_path: Path) -> None:
    for name, content in {"cat/0.jpg": "x", "cat": "object", "dog/0.jpg": "x", "dog": "", "owl/": ""}.items():
        put(in_bucket, name, content)
    folder, notes = staged(str(in_bucket), tmp_path)
    assert files(folder) == {"cat/0.jpg", "dog/0.jpg"}
    assert notes[0] == (
        f"{in_bucket}: 1 object cannot be a file and is left out: {in_bucket}/cat (there is a folder of the same name)"
    )


@pytest.mark.parametrize("content", ["", "not empty"])
@pytest.mark.parametrize("placeholder", ["p", "p/"])
def test_an_object_next_to_its_folder_is_not_the_data(
    in_bucket: StoragePath, tmp_path: Path, placeholder: str, content: str
) -> None:
    put(in_bucket, placeholder, content)
    for i in range(6):
        (in_bucket / "p" / ("cat", "dog")[i % 2] / f"{i}.jpg").write(encode_noise(i))
    for address in (f"{in_bucket}/p", f"{in_bucket}/p/"):
        assert files(staged(address, tmp_path)[0]) == {f"{('cat', 'dog')[i % 2]}/{i}.jpg" for i in range(6)}
    opened(f"{in_bucket}/p", tmp_path)


@pytest.mark.parametrize("name", ["p", "p [1]"])
def test_a_folder_may_begin_with_any_number_of_placeholders(in_bucket: StoragePath, tmp_path: Path, name: str) -> None:
    """The web console makes one for each folder; an object of the same name does not hide the folder."""
    for placeholder in (name, f"{name}/", f"{name}/cat/", f"{name}/cat/a/", f"{name}/cat/b/"):
        put(in_bucket, placeholder, "")
    assert not (in_bucket / name).is_folder()
    put(in_bucket, f"{name}/cat/c.jpg")
    assert (in_bucket / name).is_folder()
    assert files(staged(f"{in_bucket}/{name}", tmp_path)[0]) == {"cat/c.jpg"}


def test_the_first_page_of_a_listing_may_have_only_placeholders(
    in_bucket: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(in_bucket, GcsPath)
    for placeholder in ("p/", "p/cat/", "p/cat/a/"):
        put(in_bucket, placeholder, "")
    put(in_bucket, "p/cat/c.jpg")
    page = GcsPath._list_page
    monkeypatch.setattr(GcsPath, "_list_page", lambda path, token, delimiter: page(path, token, delimiter, 1))
    assert (in_bucket / "p").is_folder()


@pytest.mark.parametrize("key", ["", "p"])
def test_an_empty_part_is_no_folder(emulator: Emulator, key: str) -> None:
    """An object `p//x` has an empty part: `p` is not a folder of itself."""
    emulator.make_bucket(f"empty-{key}-parts")
    folder = GcsPath(f"empty-{key}-parts", key)
    for name in ("/x", "a/x"):
        replace(folder, key=f"{key}/{name}" if key else name).write("x")
    assert [path.name for path in folder.folders()] == ["a"]


def test_errors_name_the_address_and_not_the_copy(in_bucket: StoragePath, tmp_path: Path) -> None:
    address = f"{in_bucket}/p"
    (in_bucket / "p").write("a file")
    with raises(DataError, "data.root", address, problem=f"Not a directory: {address}"):
        opened(address, tmp_path)
    (in_bucket / "q" / "cat" / "1.jpg").write(b"")
    (in_bucket / "q" / "dog" / "1.jpg").write(encode_noise(1))
    with raises(DataError, problem=f"{in_bucket}/q/cat/1.jpg: is empty"):
        opened(f"{in_bucket}/q", tmp_path)
    (in_bucket / "r" / "all" / "cat" / "1.jpg").write(encode_noise(1))
    (in_bucket / "r" / "all" / "dog" / "1.jpg").write(encode_noise(2))
    with raises(DataError, "data.root", f"{in_bucket}/r", f"set data.root={in_bucket}/r/all"):
        opened(f"{in_bucket}/r", tmp_path)


def test_a_folder_that_the_bucket_no_longer_has_is_deleted(in_bucket: StoragePath, tmp_path: Path) -> None:
    for name in ("cat/1.jpg", "owl/1.jpg", "owl/deep/2.jpg"):
        (in_bucket / name).write("x")
    folder, _ = staged(str(in_bucket), tmp_path)
    (in_bucket / "owl").delete_tree()
    (in_bucket / "owl").write("now an object")
    assert files(staged(str(in_bucket), tmp_path)[0]) == {"cat/1.jpg", "owl"}
    (in_bucket / "owl").delete()
    staged(str(in_bucket), tmp_path)
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["cat"]


@pytest.mark.parametrize("name", ["photos [2024]", "a*b", "what?", "[x]"])
def test_an_address_that_exists_is_no_pattern(in_bucket: StoragePath, tmp_path: Path, name: str) -> None:
    put(in_bucket, f"{name}/cat/1.jpg")
    put(in_bucket, f"{name}/cat/[2].jpg")
    put(in_bucket, "photos 2/cat/3.jpg")
    address = f"{in_bucket}/{name}"
    folder, _ = staged(address, tmp_path)
    assert (folder.name, files(folder)) == (name, {"cat/1.jpg", "cat/[2].jpg"})
    assert staged(f"{address}/cat/[2].jpg", tmp_path / "a")[0].read_text() == "x"
    assert set(make_staging_plan(f"{address}/c*/*.jpg", tmp_path, 10**9).infos) == {"cat/1.jpg", "cat/[2].jpg"}
    assert set(make_staging_plan(f"{address}/cat/[0-9].jpg", tmp_path, 10**9).infos) == {"1.jpg"}
    assert "photos 2/cat/3.jpg" in make_staging_plan(f"{in_bucket}/photos*/*/*.jpg", tmp_path, 10**9).infos
    with raises(DataError, problem=r"nothing matches .*/photos \[34\]", fix="gcloud storage ls"):
        make_staging_plan(f"{in_bucket}/photos [34]", tmp_path, 10**9)


def test_our_own_file_is_not_overwritten(in_bucket: StoragePath, tmp_path: Path) -> None:
    put(in_bucket, VERSIONS, "{}")
    put(in_bucket, "a.jpg")
    folder, _ = staged(str(in_bucket), tmp_path)
    assert "a.jpg" in (folder / VERSIONS).read_text()
    assert "already" in staged(str(in_bucket), tmp_path)[1][0]


def test_names_of_250_bytes_are_fetched(in_bucket: StoragePath, tmp_path: Path) -> None:
    name = "\u00e9" * 127
    put(in_bucket, f"cat/{name}")
    put(in_bucket, "cat/" + "x" * 256)
    folder, notes = staged(str(in_bucket), tmp_path)
    assert files(folder) == {f"cat/{name}"}
    assert "is longer than 255 bytes" in notes[0]


def test_a_run_in_a_bucket_writes_only_into_its_folder(in_bucket: StoragePath, tmp_path: Path) -> None:
    escaped = Path(f"/kubetune-run-{os.getpid()}")
    (in_bucket / "config.yaml").write("a: 1")
    (in_bucket / "checkpoints" / "LATEST").write("step-00000010-ab\n")
    for name in (
        "checkpoints/step-00000010-ab/state.json", "checkpoints/step-00000010-ab", "checkpoints/step-00000099",
        f"{escaped}", "checkpoints/step-00000010-ab//x",
    ):  # fmt: skip
        put(in_bucket, name)
    assert fetch_run(in_bucket, tmp_path / "run") == {"step-00000010": "step-00000010-ab"}
    assert files(tmp_path / "run") == {"config.yaml", "checkpoints/step-00000010/state.json", "checkpoints/LATEST"}
    assert not escaped.exists()


@pytest.mark.parametrize("name", ["../../step-1", "step-/../../x", "step-00000010/../../x", "\\xff"])
def test_pointers_name_checkpoints_only(tmp_path: Path, name: str) -> None:
    pointer = tmp_path / "LATEST"
    pointer.write_text("step-00000010\nstep-00000020-ab\n")
    assert read_pointer(storage_path(pointer)) == ["step-00000010", "step-00000020-ab"]
    pointer.write_text(f"step-00000010\n{name}\n")
    with raises(DataError, problem="is corrupt", fix="write the names of its checkpoints there"):
        read_pointer(storage_path(pointer))


def test_a_teacher_has_only_files_that_can_be_written(in_bucket: StoragePath) -> None:
    for name in ("saved_model.pb", "assets/labels.txt", "variables/a", "//etc/x"):
        put(in_bucket, name)
    assert set(describe_teacher(str(in_bucket)).bytes_by_file) == {"saved_model.pb", "assets/labels.txt", "variables/a"}


@pytest.mark.parametrize("end", ["", "/", "/.", "/./", "//"])
def test_the_copy_of_a_folder_has_its_name(in_bucket: StoragePath, tmp_path: Path, end: str) -> None:
    address = f"{in_bucket}{end}"
    one, other = (ShardCache(address, {}, tmp_path, 10**6, lambda _: None, lambda: None, ()) for _ in range(2))
    assert (one.folder.name, other.folder.name) == (in_bucket.name, in_bucket.name)
    assert one.folder != other.folder  # each process has its own
    assert (one.folder.parent / ".lock").exists()
    with download_to_temporary_folder(address, []) as folder:
        assert Path(folder).name == in_bucket.name


def test_a_shard_is_written_below_the_cache(in_bucket: StoragePath, tmp_path: Path) -> None:
    put(in_bucket, "a")
    info = (in_bucket / "a").require_info()
    with raises(DataError, problem="../../b: cannot be the name of a file", fix="rename or remove it"):
        ShardCache(str(in_bucket), {"../../b": info}, tmp_path, 10**6, lambda _: None, lambda: None, ())
