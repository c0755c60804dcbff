"""The source that is chosen where the arguments give only the address of the data."""

import fnmatch
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.verbs import exit_code_of
from tests.errors import raises
from tests.storage.emulator import BUCKET, running
from trainer import plan
from trainer.cli.compose import compose
from trainer.cli.source import choose_source, detect_source
from trainer.errors import ConfigError, DataError
from trainer.storage.path import storage_path


def photos(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def test_class_folders_are_an_image_folder(tmp_path: Path) -> None:
    root = photos(tmp_path / "my photos (1)", "cat/1.jpg", "dog/2.jpg")
    arguments, note = choose_source([f"data.root={root}", "seed=1"])
    assert arguments == ["data=image_folder", f"data.root={root}", "seed=1"]
    assert "class folders, so data=image_folder" in note
    tree = compose(arguments)
    assert tree
    assert (tree["data"]["source"], tree["data"]["root"]) == ("image_folder", str(root))
    assert tree["experiment_name"] is None  # not the quickstart


@pytest.mark.parametrize("below", ["", "beans/1.0.0/"])
def test_a_prepared_dataset_is_one_of_tfds(tmp_path: Path, below: str) -> None:
    root = photos(tmp_path, f"{below}dataset_info.json", f"{below}beans-train.tfrecord-00000-of-00001")
    arguments, note = choose_source([f"data.root={root}"])
    assert arguments[0] == "data=tfds"
    assert compose(arguments)["data"]["root"] == str(root / below.rstrip("/"))  # type: ignore[index]
    assert "data=tfds" in note


def test_record_files_become_a_pattern(tmp_path: Path) -> None:
    root = photos(tmp_path / "r [1]", "a-0.tfrec", "a-1.tfrec")
    arguments, note = choose_source([f"data.root={root}", "data.class_names=[a,b]"])
    data = compose(arguments)["data"]  # type: ignore[index]
    assert (data["source"], data["pattern"]) == ("tfrecords", f"{tmp_path}/r [[]1]/*.tfrec*")
    assert "2 record files" in note


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["x-train.tfrecord-00000-of-00002", "x-train.tfrecord-00001-of-00002"], "*.tfrecord*"),
        (["a.TFRecords"], "*.TFRecords*"),
        (["a.tfrecord_00", "a.tfrecord_01"], "*.tfrecord*"),  # `_` is no word boundary
        (["a.tfrecord.gz"], "*.tfrecord*"),
        (["a.tfrecord", "a.tfrecord.idx", "b.tfrecord"], "*.tfrecord"),
        (["x.tfrecord-00000-of-00001", "x.tfrecord-00000-of-00001.md5"], f"*.tfrecord-{5 * '[0-9]'}-of-{5 * '[0-9]'}"),
    ],
)
def test_names_of_record_files(tmp_path: Path, names: list[str], pattern: str) -> None:
    replacement = detect_source(str(photos(tmp_path, *names))).replacement
    assert replacement
    assert replacement.partition("=")[2].strip("'") == f"{tmp_path}/{pattern}"
    assert all(fnmatch.fnmatch(name, pattern) != name.endswith((".idx", ".md5")) for name in names)


@pytest.mark.parametrize("name", ["a.tfrecord.idx", "a.tfrecord.txt", "a.tfrecordings"])
def test_other_files_are_no_record_files(tmp_path: Path, name: str) -> None:
    photos(tmp_path, name)
    with raises(DataError, key="data.root", value=str(tmp_path), problem="has 1 file and no folders"):
        detect_source(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (("notes.tfrecord", "cat/1.jpg", "dog/2.PNG"), "image_folder"),
        (("notes.tfrecord", "train/cat/1.jpg", "train/dog/2.jpg"), "image_folder"),
        (("a.tfrecord", "b.tfrecord", "logs/1.txt", "@eaDir/thumb.jpg"), "tfrecords"),
        (("lost+found/x", "cat/1.jpg"), "image_folder"),
    ],
)
def test_folders_of_images_precede_stray_records(tmp_path: Path, names: tuple[str, ...], group: str) -> None:
    assert detect_source(str(photos(tmp_path, *names))).source == group


@pytest.mark.parametrize("names", [(), ("1.jpg", "2.jpg"), ("lost+found/x", "@eaDir/1.jpg", ".git/x")])
def test_nothing_that_can_be_read_is_rejected(tmp_path: Path, names: tuple[str, ...]) -> None:
    root = photos(tmp_path, *names)
    with raises(DataError, key="data.root", value=str(root), fix="one folder per class"):
        detect_source(str(root))


@pytest.mark.parametrize(
    ("names", "root", "problem", "fix"),
    [
        (["one.tfrecord"], "one.tfrecord", "is a file", "data=tfrecords data.pattern=.*/one.tfrecord"),
        (["photos.zip"], "photos.zip", "is a file", "one folder per class"),
        (["photos"], "photo", "does not exist", "one folder per class"),
        (["beans/0.1.0/dataset_info.json", "beans/0.2.0/dataset_info.json"], "beans", "2 prepared", "beans/0.2.0"),
        (["tf/a/1.0.0/dataset_info.json", "tf/b/1.0.0/dataset_info.json"], "tf", "2 prepared", "tf/b/1.0.0"),
    ],
)
def test_what_is_at_the_root_is_named(names: list[str], root: str, problem: str, fix: str, tmp_path: Path) -> None:
    photos(tmp_path, *names)
    with raises(DataError, key="data.root", value=str(tmp_path / root), problem=problem, fix=fix):
        detect_source(str(tmp_path / root))


def test_a_bucket_of_many_classes_is_inspected_with_few_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = storage_path(photos(tmp_path, *(f"{k}/1.jpg" for k in range(100))))
    requests: list[str] = []
    monkeypatch.setattr(type(root), "is_local", False)
    monkeypatch.setattr(type(root), "stat", lambda self: requests.append(str(self)))
    assert detect_source(str(tmp_path)).source == "image_folder"
    assert len(requests) < 10


@pytest.fixture(scope="module")
def bucket_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(tmp_path_factory.mktemp("buckets")):
        yield f"gs://{BUCKET}"


@pytest.mark.parametrize("in_bucket", [False, True])
@pytest.mark.parametrize(
    ("name", "names", "source", "dataset"),
    [
        ("third", ("logs/x", "notes/x", "prepared/dataset_info.json"), "tfds", "prepared"),
        ("below", ("logs/x", "notes/x", "prepared/1.0.0/dataset_info.json"), "tfds", "prepared/1.0.0"),
        ("twelfth", (*(f"notes/{k}/x" for k in range(9)), *(f"{k:02d}/x" for k in range(11)),
                     "z/1.0.0/dataset_info.json"), "tfds", "z/1.0.0"),
        ("mixed", ("cat/1.jpg", "dog/2.jpg", "prepared/dataset_info.json"), "tfds", "prepared"),
        ("classes", ("cat/1.jpg", "dog/2.jpg", "empty/x"), "image_folder", None),
        ("records", ("a.tfrecord", *(f"{k:02d}/x" for k in range(11)), "z/cat/1.jpg"), "image_folder", None),
    ],
)  # fmt: skip
def test_a_dataset_is_detected_in_any_folder(
    bucket_address: str, tmp_path: Path, name: str, names: tuple[str, ...], source: str, dataset: str | None,
    in_bucket: bool,
) -> None:  # fmt: skip
    root = storage_path(bucket_address if in_bucket else tmp_path) / name
    for file in names:
        (root / file).write("x")
    replacement = f"data.root={root / dataset}" if dataset else None
    assert detect_source(str(root))[::2] == (source, replacement)


def test_several_datasets_in_a_bucket_are_rejected(bucket_address: str) -> None:
    root = storage_path(bucket_address) / "several"
    for name in ("logs/x", "notes/x", "a/dataset_info.json", "b/1.0.0/dataset_info.json"):
        (root / name).write("x")
    with raises(DataError, key="data.root", value=str(root), problem="2 prepared datasets", fix="several/b/1.0.0"):
        detect_source(str(root))


def test_other_keys_name_their_source() -> None:
    assert choose_source(["data.name=beans"])[0] == ["data=tfds", "data.name=beans"]
    assert choose_source(["data.pattern=x/*.tfrec"])[0][0] == "data=tfrecords"
    for unchanged in (["data=tfds", "data.root=x"], ["experiment=quickstart", "data.root=x"], ["seed=1"], []):
        assert choose_source(unchanged) == (unchanged, "")
    with raises(ConfigError, key="data.root", value="abfss://b/x", fix="gs://"):
        choose_source(["data.root=abfss://b/x"])


def test_the_choice_is_logged_and_the_quickstart_not_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = photos(tmp_path, "cat/1.jpg", "dog/2.jpg")
    assert exit_code_of(plan.main, f"data.root={root}", "seed=-1") == 2
    assert f"data.root={root}: class folders, so data=image_folder" in capsys.readouterr().out
    assert exit_code_of(plan.main, f"data.root={root}", "--cfg", "job") == 0
    assert capsys.readouterr().out.startswith("data:\n  source: image_folder\n")


@pytest.mark.parametrize("text", ["{0}/a,{0}/b c", "choice({0}/a, {0}/b c)", "{0}/a,'{0}/b c'", "{0}/a"])
def test_a_sweep_over_folders_has_the_source_of_all_of_them(tmp_path: Path, text: str) -> None:
    photos(tmp_path, "a/cat/1.jpg", "b c/dog/2.jpg")
    chosen, note = choose_source(["-m", f"data.root={text.format(tmp_path)}", "seed=1"])
    assert chosen == ["data=image_folder", "-m", f"data.root={text.format(tmp_path)}", "seed=1"]
    roots: list[str] = []
    compose(chosen, lambda tree, _overrides, _settings: roots.append(tree.data.root))  # type: ignore[arg-type]
    assert roots == [f"{tmp_path}/a", f"{tmp_path}/b c"][: 1 + ("b c" in text)]
    assert "class folders, so data=image_folder" in note


def test_a_sweep_over_record_folders_is_one_over_patterns(tmp_path: Path) -> None:
    photos(tmp_path, "a,1/x.tfrec", "b/y.tfrec")
    chosen, _ = choose_source(["-m", f"data.root='{tmp_path}/a,1',{tmp_path}/b", "data.class_names=[a,b]"])
    patterns: list[str] = []
    compose(chosen, lambda tree, _overrides, _settings: patterns.append(tree.data.pattern))  # type: ignore[arg-type]
    assert patterns == [f"{tmp_path}/a,1/*.tfrec*", f"{tmp_path}/b/*.tfrec*"]


def test_a_sweep_over_several_sources_is_rejected(tmp_path: Path) -> None:
    photos(tmp_path, "a/cat/1.jpg", "b/dataset_info.json")
    text = f"{tmp_path}/a,{tmp_path}/b"
    with raises(ConfigError, key="data.root", value=text, problem="several sources", fix="one source"):
        choose_source(["-m", f"data.root={text}"])


def test_a_root_from_the_environment_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHOTOS", str(photos(tmp_path, "cat/1.jpg")))
    assert choose_source(["data.root=${oc.env:PHOTOS}"])[0] == ["data=image_folder", "data.root=${oc.env:PHOTOS}"]


@pytest.mark.parametrize("arguments", [["data.root=${output_dir}"], ["-m", "data.root=glob(*)"]])
def test_a_root_that_is_not_known_yet_needs_a_source(arguments: list[str]) -> None:
    with raises(
        ConfigError, key="data.root", value=arguments[-1][10:], problem="only when a run begins", fix="add data="
    ):
        choose_source(arguments)
