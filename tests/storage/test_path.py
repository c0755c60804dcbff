"""Places: the same promises on disk and in a bucket."""

import os
import pickle
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import pytest

from tests.storage.emulator import BUCKET
from trainer.errors import ConfigError, DataError
from trainer.storage import gcs as bucket
from trainer.storage.path import Conflict, ObjectInfo, StoragePath, storage_path


def names(entries: list[ObjectInfo]) -> list[str]:
    return [entry.path.name for entry in entries]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects of more than 64 KiB count as large."""
    monkeypatch.setattr(bucket, "LARGE", 1 << 16)
    monkeypatch.setattr(bucket, "CHUNK", 1 << 16)
    monkeypatch.setattr(bucket, "PART", 1 << 16)


@pytest.mark.parametrize("text", ["gs://b", "gs://b/a", "gs://b/a/b.c", "/tmp/a", "a/b", "."])
def test_a_place_is_a_value_that_reads_as_it_was_written(text: str) -> None:
    here = storage_path(text)
    assert str(here) == text
    assert here == storage_path(text)
    assert len({here, storage_path(text), storage_path(here)}) == 1
    assert pickle.loads(pickle.dumps(here)) == here
    assert here.is_local is not text.startswith("gs://")


def test_joining_and_parents() -> None:
    here = storage_path("gs://b/runs/")
    assert str(here / "7" / "a/b") == "gs://b/runs/7/a/b"
    assert (here / "7" / "LATEST").name == "LATEST"
    assert (here / "7").parent == here
    assert here.parent == storage_path("gs://b")
    assert storage_path("gs://b").parent == storage_path("gs://b")
    assert storage_path("gs://b").name == "b"
    assert storage_path("a") / "b" / "c" == storage_path("a/b/c")
    assert storage_path("a/b").parent == storage_path("a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3://b/a", "s3://b/a: only local paths and gs://bucket/... can be read and written"),
        ("gs:/b/a", "gs:/b/a: only local paths and gs://bucket/... can be read and written"),
        ("gs:///a", "gs:///a: names no bucket; write it as gs://bucket/folder"),
        (Path("gs://b/a"), "gs:/b/a: an address in a bucket must be given as text, pathlib drops one of its slashes"),
    ],
)
def test_what_is_no_place(text: str | Path, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        storage_path(text)
    assert str(error.value) == message


def test_dots_mean_nothing_in_a_bucket() -> None:
    with pytest.raises(ConfigError, match=r"gs://b/a/\.\./c: '\.\.' means nothing in a bucket"):
        storage_path("gs://b/a") / "../c"


def test_writing_and_reading(home: StoragePath) -> None:
    file = home / "a" / "b.txt"
    assert (file.exists(), file.version(), file.stat(), file.fetch()) == (False, None, None, None)
    version = file.write("grüße")
    assert file.read() == "grüße".encode()
    assert file.read_text() == "grüße"
    assert file.version() == version
    assert file.fetch() == ("grüße".encode(), version)
    assert file.exists()
    assert file.size() == 7
    assert not (home / "a").exists()
    assert (home / "a").is_folder()
    assert not file.is_folder()
    assert file.write(b"") != version
    assert file.read() == b""
    assert file.size() == 0


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
    with pytest.raises(Conflict) as error:
        file.write("2", only_if=None)
    assert str(error.value) == f"{file}: changed since it was read"
    second = file.write("2", only_if=first)
    with pytest.raises(Conflict):
        file.write("3", only_if=first)
    assert file.read() == b"2"
    assert file.version() == second
    file.delete()
    with pytest.raises(Conflict):
        file.write("3", only_if=second)
    assert not file.exists()


def test_versions_never_come_back(home: StoragePath) -> None:
    versions = [(home / "marker").write("same") for _ in range(20)]
    assert len(set(versions)) == 20


def test_one_of_many_conditional_writers_wins(home: StoragePath) -> None:
    file = home / "marker"
    for _ in range(5):
        version, won = file.version(), []
        start = threading.Barrier(6)

        def write(number: int, version: int | None = version, start: threading.Barrier = start) -> None:
            start.wait()
            try:
                file.write(str(number), only_if=version)
            except Conflict:
                return
            won.append(number)  # noqa: B023 - the threads are joined below

        threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert len(won) == 1
        assert file.read_text() == str(won[0])


def test_listing(home: StoragePath) -> None:
    for name in ("a/b/2", "a/b/10", "a/b/c/d", "a/bc", "a/b.x", "z"):
        (home / name).write(name)
    assert [str(entry.path) for entry in (home / "a/b").list()] == [f"{home}/a/b/{name}" for name in ("10", "2", "c/d")]
    assert names((home / "a/b").list(recursive=False)) == ["10", "2"]
    assert names((home / "a").list()) == ["b.x", "10", "2", "d", "bc"]
    assert names(home.list(recursive=False)) == ["z"]
    assert (home / "a").folders() == [home / "a/b"]
    assert (home / "a/b/c").folders() == []
    assert (home / "nothing").list() == []
    assert (home / "nothing").folders() == []
    assert (home / "z").list() == []
    entry = (home / "a").list(recursive=False)[1]
    assert entry == (home / "a/bc").stat()
    assert entry.size == 4
    assert entry.crc32c == (None if home.is_local else google_crc32c.value(b"a/bc"))


def test_listing_takes_many_pages(in_bucket: StoragePath, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(23):
        (in_bucket / f"{number:02d}").write("")
    one_page = bucket.GcsPath._page
    monkeypatch.setattr(bucket.GcsPath, "_page", lambda here, token, delimiter: one_page(here, token, delimiter, 5))
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
    entry = (home / "file").download(target)
    assert target.read_bytes() == content
    assert entry == (home / "file").stat() == home.list()[0]
    assert (entry.size, entry.version) == (size, version)
    assert (home / "file").download(target, home.list()[0]) == entry
    assert os.listdir(tmp_path / "new") == ["target"]
    assert names(home.list()) == ["file"]
    assert home.folders() == []


@pytest.mark.usefixtures("small_parts")
def test_large_content_is_written_as_well(home: StoragePath) -> None:
    content = os.urandom(4_000_000)  # more than 32 parts of 64 KiB
    version = (home / "file").write(content)
    assert (home / "file").fetch() == (content, version)


def test_parts_of_a_killed_upload_do_not_show_and_are_deleted(in_bucket: StoragePath) -> None:
    (in_bucket / f"file.parts-{'0' * 32}" / "00").write("left behind")
    (in_bucket / "file").write("whole")
    assert names(in_bucket.list()) == ["file"]
    assert in_bucket.folders() == []
    in_bucket.delete_tree()
    assert not in_bucket.is_folder()


def test_a_download_of_what_was_replaced_says_so_and_leaves_nothing(home: StoragePath, tmp_path: Path) -> None:
    (home / "file").write("1")
    entry = home.list()[0]
    (home / "file").write("22")
    with pytest.raises(DataError, match="was replaced"):
        (home / "file").download(tmp_path / "new" / "file", entry)
    assert list(tmp_path.glob("new/*")) == []


def test_a_failed_download_leaves_the_file_that_was_there(home: StoragePath, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")
    with pytest.raises(DataError, match="there is no such"):
        (home / "absent").download(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "before"
    assert sorted(os.listdir(tmp_path)) in (["file"], ["file", "home"])


def test_what_is_absent_says_so(home: StoragePath) -> None:
    kind = "file" if home.is_local else "object"
    for act in (lambda f: f.read(), lambda f: f.size(), lambda f: f.download(Path("never"))):
        with pytest.raises(DataError) as error:
            act(home / "absent")
        assert str(error.value) == f"{home}/absent: there is no such {kind}"


def test_no_such_bucket_says_so(in_bucket: StoragePath, tmp_path: Path) -> None:  # noqa: ARG001
    file = storage_path("gs://nobody-has-this/a")
    (tmp_path / "x").write_text("x")
    acts: list[Callable[[StoragePath], object]] = [lambda f: f.read(), lambda f: f.list(), lambda f: f.is_folder()]
    acts += [lambda f: f.folders(), lambda f: f.write("x"), lambda f: f.upload(tmp_path / "x")]
    for act in acts:
        with pytest.raises(DataError) as error:
            act(file)
        assert str(error.value) == "gs://nobody-has-this/a: there is no such bucket, or it is not yours to see"


def test_a_local_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"folder: cannot be read \(Is a directory\)"):
        storage_path(tmp_path / "folder").read()
    with pytest.raises(DataError, match="nowhere: there is no such file"):
        storage_path(f"gs://{BUCKET}/x").upload(tmp_path / "nowhere")


def test_a_disk_that_takes_no_more_is_an_os_error(tmp_path: Path) -> None:
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
    with pytest.raises(ValueError, match="a conditional write is for markers"):
        in_bucket.write(b"x" * 100_000, only_if=None)


def test_text_may_begin_with_the_home_of_its_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a").write_text("mine")
    assert storage_path("~/a").read_text() == "mine"
    assert str(storage_path("~/a")) == str(tmp_path / "a")
