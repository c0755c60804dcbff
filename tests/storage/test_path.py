"""Storage paths: the same behaviour on disk and in a bucket."""

import os
import pickle
import resource
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import google_crc32c
import pytest

from tests.errors import raises
from tests.storage.emulator import BUCKET
from trainer.errors import ConfigError, DataError
from trainer.storage import bucket, gcs
from trainer.storage.base import ANY, Version, request_deadline
from trainer.storage.bucket import MAX_CONCURRENT_REQUESTS, BucketPath, ReplacedError
from trainer.storage.path import ConflictError, ObjectInfo, StoragePath, storage_path


def names(files: Iterable[ObjectInfo]) -> list[str]:
    return [info.path.name for info in files]


@pytest.mark.parametrize("text", ["gs://b", "gs://b/a", "gs://b/a/b.c", "s3://b", "s3://b/a/b.c", "/tmp/a", "a/b", "."])
def test_a_path_is_a_value_that_prints_as_it_was_written(text: str) -> None:
    path = storage_path(text)
    assert str(path) == text
    assert len({path, storage_path(text), storage_path(path), pickle.loads(pickle.dumps(path))}) == 1
    assert path.is_local is not text.startswith(("gs://", "s3://"))


@pytest.mark.parametrize("bucket", ["gs://b", "s3://b"])
def test_joining_and_parents(bucket: str) -> None:
    runs = storage_path(f"{bucket}/runs/")
    assert str(runs / "7" / "a/b") == f"{bucket}/runs/7/a/b"
    assert (runs / "7" / "LATEST").name == "LATEST"
    assert (runs / "7").parent == runs
    assert runs.parent == storage_path(bucket)
    assert storage_path(bucket).parent == storage_path(bucket)
    assert storage_path(bucket).name == "b"
    assert storage_path("a") / "b" / "c" == storage_path("a/b/c")
    assert storage_path("a/b").parent == storage_path("a")


@pytest.mark.parametrize(
    ("text", "problem", "fix"),
    [
        ("abfss://b/a", "^abfss://b/a: has an unsupported scheme", "gs://bucket/... or s3://bucket/"),
        ("s3:/b/a", "^s3:/b/a: has an unsupported scheme", "s3://bucket/"),
        ("s3:///a", "^s3:///a: names no bucket", "s3://bucket/folder"),
        (Path("s3://b/a"), "^s3:/b/a: is a pathlib.Path", "pass a string"),
        ("gs:/b/a", "^gs:/b/a: has an unsupported scheme", "gs://bucket/"),
        ("gs:///a", "^gs:///a: names no bucket", "gs://bucket/folder"),
        (Path("gs://b/a"), "^gs:/b/a: is a pathlib.Path", "pass a string"),
    ],
)
def test_invalid_paths(text: str | Path, problem: str, fix: str) -> None:
    with raises(ConfigError, problem=problem, fix=fix):
        storage_path(text)


@pytest.mark.parametrize("bucket", ["gs://b", "s3://b"])
def test_a_bucket_has_no_parent_notation(bucket: str) -> None:
    with raises(ConfigError, problem=rf"^{bucket}/a/\.\./c: ", fix="give the address without"):
        storage_path(f"{bucket}/a") / "../c"


def test_writing_and_reading(home: StoragePath) -> None:
    file = home / "a" / "b.txt"
    assert (file.exists(), file.version(), file.stat(), file.fetch()) == (False, None, None, None)
    version = file.write("grüße")
    assert file.fetch() == (file.read(), file.version()) == ("grüße".encode(), version)
    assert file.read_text() == "grüße"
    assert (file.exists(), file.is_folder(), file.size()) == (True, False, 7)
    assert ((home / "a").exists(), (home / "a").is_folder()) == (False, True)
    assert file.write(b"") != version
    assert (file.read(), file.size()) == (b"", 0)
    below = file / "c"
    assert (below.exists(), below.version(), below.stat(), below.fetch()) == (False, None, None, None)


@pytest.mark.usefixtures("small_parts")
def test_ranges(home: StoragePath) -> None:
    for size in (100, 200_000):
        content = os.urandom(size)
        (home / "file").write(content)
        for start, length in [(0, 1), (7, 50), (size - 3, 3), (size - 3, 9), (size, 1), (size + 9, 9), (4, 0)]:
            assert (home / "file").read_range(start, length) == content[start : start + length]


def test_conditional_writes(home: StoragePath) -> None:
    file = home / "LATEST"
    first = file.write("1", only_if=None)
    with raises(ConflictError, problem=f"{file}: changed since it was read"):
        file.write("2", only_if=None)
    second = file.write("2", only_if=first)
    with pytest.raises(ConflictError):
        file.write("3", only_if=first)
    assert file.read() == b"2"
    assert file.version() == second
    file.delete()
    with pytest.raises(ConflictError):
        file.write("3", only_if=second)
    assert not file.exists()


def test_versions_do_not_repeat(home: StoragePath) -> None:
    versions = [(home / "marker").write(f"{number}") for number in range(20)]
    assert len(set(versions)) == 20


def test_a_rewrite_has_a_new_version_except_in_s3(home: StoragePath) -> None:
    """Why the lease writes the time into its content."""
    versions = {(home / "marker").write("same") for _ in range(20)}
    assert len(versions) == (1 if str(home).startswith("s3://") else 20)


def test_one_of_many_conditional_writers_wins(home: StoragePath) -> None:
    file = home / "marker"
    for attempt in range(2 if str(home).startswith("s3://") else 5):  # SeaweedFS lets them wait, each a second longer
        version, won = file.version(), []
        start = threading.Barrier(6)

        def write(number: int, version: Version | None = version, start: threading.Barrier = start) -> None:
            start.wait()
            try:
                file.write(f"{attempt} {number}", only_if=version)  # noqa: B023
            except ConflictError:
                return
            won.append(number)  # noqa: B023 - the threads are joined below

        threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert len(won) == 1
        assert file.read_text() == f"{attempt} {won[0]}"


def test_listing(home: StoragePath) -> None:
    for name in ("a/b/2", "a/b/10", "a/b/c/d", "a/bc", "a/b.x", "z"):
        (home / name).write(name)
    assert [str(info.path) for info in (home / "a/b").list()] == [f"{home}/a/b/{name}" for name in ("10", "2", "c/d")]
    assert names((home / "a/b").list(recursive=False)) == ["10", "2"]
    assert names((home / "a").list()) == ["b.x", "10", "2", "d", "bc"]
    assert names(home.list(recursive=False)) == ["z"]
    assert (home / "a").folders() == [home / "a/b"]
    assert (home / "a/b/c").folders() == []
    assert (home / "nothing").list() == []
    assert (home / "nothing").folders() == []
    assert (home / "z").list() == []
    info = (home / "a").list(recursive=False)[1]
    assert info == (home / "a/bc").stat()
    assert info.size == 4
    assert info.crc32c == (google_crc32c.value(b"a/bc") if str(home).startswith("gs://") else None)
    assert (home / "a/bc").require_info().crc32c == (None if home.is_local else google_crc32c.value(b"a/bc"))


def test_listing_takes_many_pages(in_bucket: StoragePath, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(23):
        (in_bucket / f"{number:02d}").write("")
    page = BucketPath._list_page
    monkeypatch.setattr(BucketPath, "_list_page", lambda path, token, delimiter: page(path, token, delimiter, 5))
    assert names(in_bucket.list()) == [f"{number:02d}" for number in range(23)]


def test_deleting(home: StoragePath) -> None:
    for name in ("a/b/1", "a/b/2", "a/bc"):
        (home / name).write(name)
    (home / "a/bc").delete()
    (home / "a/bc").delete()
    assert names(home.list()) == ["1", "2"]
    (home / "a/b").delete_tree()
    (home / "a/b").delete_tree()
    assert home.list() == []
    assert not (home / "a/b").is_folder()


@pytest.mark.parametrize("size", [0, 1, 1 << 16, (1 << 16) + 1, 1_000_003])
@pytest.mark.usefixtures("small_parts")
def test_upload_and_download(home: StoragePath, tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    source, target = tmp_path / "source", tmp_path / "new" / "target"
    source.write_bytes(content)
    version = (home / "file").upload(source)
    info = (home / "file").download(target)
    assert target.read_bytes() == content
    assert info == (home / "file").stat() == home.list()[0]
    assert (info.size, info.version) == (size, version)
    assert (home / "file").download(target, home.list()[0]) == info
    assert os.listdir(tmp_path / "new") == ["target"]
    assert names(home.list()) == ["file"]
    assert home.folders() == []


@pytest.mark.usefixtures("small_parts")
def test_large_content(home: StoragePath) -> None:
    content = os.urandom(4_000_000)  # more than 32 parts of 64 KiB
    version = (home / "file").write(content)
    assert (home / "file").fetch() == (content, version)


@pytest.mark.parametrize("emulator", ["gs"], indirect=True)
def test_composed_parts_are_composed(in_bucket: BucketPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "PART_BYTES", 10_000)
    monkeypatch.setattr(gcs, "MAX_PART_BYTES", 10_000)
    monkeypatch.setattr(gcs, "MAX_COMPOSED_PARTS", 4)
    content = os.urandom(171_000)  # 18 parts, composed to 5, 2 and 1
    version = (in_bucket / "file").write(content)
    assert (in_bucket / "file").fetch() == (content, version)
    assert names(info for page, _ in in_bucket._list_pages("") for info in page) == ["file"]


@pytest.mark.parametrize("gigabytes", [1, 9, 20])
def test_the_parts_of_an_upload_take_at_most_256_mb(gigabytes: int) -> None:
    lengths = []

    def read_range(_start: int, length: int) -> bytes:
        lengths.append(length)
        raise DataError("enough")

    with raises(DataError, problem="enough"), request_deadline(0.1):
        gcs.GcsPath("b", "x")._upload(gigabytes << 30, read_range, ANY)
    assert max(lengths) * MAX_CONCURRENT_REQUESTS <= 256 << 20


@pytest.mark.parametrize("changed", [0, 8 << 20, 16 << 20], ids=["first", "second", "last"])
def test_a_source_that_changes_during_its_upload_does_not_become_visible(in_bucket: BucketPath, changed: int) -> None:
    """It has three parts, each of which is read twice."""
    content, reads = os.urandom(20_000_000), Counter[int]()

    def read_range(start: int, length: int) -> bytes:
        reads[start] += 1
        data = content[start : start + length]
        return data[::-1] if start == changed and reads[start] == 2 else data

    (in_bucket / "file").write("before")
    with raises(DataError, problem=r"file: the source changed while it was uploaded", fix="same command again"):
        (in_bucket / "file")._upload(len(content), read_range, ANY)
    assert (in_bucket / "file").read() == b"before"
    assert [info.path for page, _ in in_bucket._list_pages("") for info in page] == [in_bucket / "file"]


def test_parts_of_a_killed_upload_are_not_listed_and_are_deleted(in_bucket: StoragePath) -> None:
    (in_bucket / f"file.parts-{'0' * 32}" / "00").write("unfinished")
    (in_bucket / "file").write("whole")
    assert names(in_bucket.list()) == ["file"]
    assert in_bucket.folders() == []
    in_bucket.delete_tree()
    assert not in_bucket.is_folder()


def test_a_download_of_a_replaced_file_fails_and_leaves_nothing(home: StoragePath, tmp_path: Path) -> None:
    (home / "file").write("1")
    info = home.list()[0]
    (home / "file").write("22")
    with raises(DataError if home.is_local else ReplacedError, problem="was replaced", fix="same command again"):
        (home / "file").download(tmp_path / "new" / "file", info)
    assert list(tmp_path.glob("new/*")) == []


def test_absent_files(home: StoragePath, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")
    for act in (lambda f: f.read(), lambda f: f.size(), lambda f: f.download(tmp_path / "file")):
        with raises(DataError, problem=f"^{home}/absent: there is no such (file|object)$", fix="check the"):
            act(home / "absent")
    assert (tmp_path / "file").read_text() == "before"
    assert sorted(os.listdir(tmp_path)) in (["file"], ["file", "home"])


def test_absent_buckets(in_bucket: StoragePath, tmp_path: Path) -> None:
    address = f"{str(in_bucket)[:5]}nobody-has-this/a"
    file = storage_path(address)
    (tmp_path / "x").write_text("x")
    acts: list[Callable[[StoragePath], object]] = [lambda f: f.read(), lambda f: f.list(), lambda f: f.is_folder()]
    acts += [lambda f: f.folders(), lambda f: f.write("x"), lambda f: f.upload(tmp_path / "x")]
    for act in acts:
        with raises(DataError, problem=f"^{address}: there is no such bucket", fix="check the address"):
            act(file)


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_local_file_that_cannot_be_read(tmp_path: Path, scheme: str) -> None:
    (tmp_path / "folder").mkdir()
    with raises(DataError, problem=r"folder: cannot be read \(Is a directory\)", fix="permissions"):
        storage_path(tmp_path / "folder").read()
    with raises(DataError, problem="nowhere: there is no such file", fix="check the path"):
        storage_path(f"{scheme}://{BUCKET}/x").upload(tmp_path / "nowhere")


def test_a_full_disk_is_an_os_error(tmp_path: Path) -> None:
    file = storage_path(tmp_path / "file")
    file.write("before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            file.write(b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read() == b"before"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.usefixtures("small_parts")
def test_a_conditional_write_is_for_small_content(in_bucket: StoragePath) -> None:
    with pytest.raises(ValueError, match="a conditional write is limited"):
        in_bucket.write(b"x" * 100_000, only_if=None)


def test_text_may_begin_with_a_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a").write_text("mine")
    assert storage_path("~/a").read_text() == "mine"
    assert str(storage_path("~/a")) == str(tmp_path / "a")
