"""`python -m trainer.promote`: versions, the comparison with the served one, the way back, and readers."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.verbs import exit_code_of
from tests.errors import raises
from tests.promote.runs import read_graphs, write_finished_run
from tests.storage.emulator import BUCKET, Emulator, running
from trainer import promote as verb
from trainer.errors import DONE, NOT_PROMOTED, WRONG_INPUT, DataError, NotPromoted
from trainer.evaluation.drift import read_reference
from trainer.promote.promotion import choose_previous_version, promote, read_manifest, restore_previous_version
from trainer.report.compare import read_scored_run
from trainer.storage import versions as storage_versions
from trainer.storage.local import LocalPath
from trainer.storage.path import StoragePath, storage_path
from trainer.storage.versions import list_versions

Call = Callable[..., tuple[int, str, str]]  # exit code, stdout and stderr


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    with running(tmp_path_factory.mktemp("buckets")) as server:
        yield server


@pytest.fixture(params=["local", "bucket"])
def models(request: pytest.FixtureRequest, tmp_path: Path) -> StoragePath:
    """An empty folder for versions, once on disk and once in a bucket."""
    if request.param == "local":
        return storage_path(tmp_path / "models")
    request.getfixturevalue("emulator")
    return storage_path(f"gs://{BUCKET}/{request.node.name.partition('[')[0]}")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Call:
    return lambda *arguments: (exit_code_of(verb.main, *arguments), *capsys.readouterr())


def test_better_and_equal_runs_are_promoted_and_a_worse_one_is_rejected(
    models: StoragePath, tmp_path: Path, command: Call
) -> None:
    runs = {name: write_finished_run(tmp_path / name, accuracy, name)
            for name, accuracy in (("a", 0.7), ("b", 0.9), ("c", 0.7), ("d", 0.9))}  # fmt: skip
    assert command(f"run={runs['a']}", f"to={models}")[0] == DONE
    code, out, _ = command(f"run={runs['b']}", f"to={models}")
    assert (code, "better than version 1 on 300 held-out examples: +0.2" in out) == (DONE, True)
    code, _, err = command(f"run={runs['c']}", f"to={models}")
    assert (code, "refused: run=" in err, "is worse than version 2" in err) == (NOT_PROMOTED, True, True)
    assert read_graphs(models) == {"1": "a", "2": "b"}
    code, out, _ = command(f"run={runs['d']}", f"to={models}")
    assert (code, "no significant difference from version 2" in out) == (DONE, True)
    code, out, _ = command(f"run={runs['c']}", f"to={models}", "allow_worse=true")
    assert (code, "worse than version 3" in out) == (DONE, True)
    assert read_graphs(models) == {"1": "a", "2": "b", "3": "d", "4": "c"}
    manifest = read_manifest(models / "2")
    assert (manifest["run"], manifest["origin"], manifest["comparison"]["version"]) == (str(runs["b"]), None, 1)
    assert read_scored_run(str(models / "2"), "2").predictions == read_scored_run(str(runs["b"]), "b").predictions


def test_the_newest_version_is_not_promoted_again(models: StoragePath, tmp_path: Path) -> None:
    run = write_finished_run(tmp_path / "a", 0.7)
    assert promote(str(run), models, 5) == (1, "there is no version to compare with")
    assert promote(str(run), models, 5)[0] == 1  # as after a kill between the promotion and its record
    assert read_graphs(models) == {"1": "graph"}


def test_only_the_newest_versions_are_retained_and_no_number_is_used_twice(models: StoragePath, tmp_path: Path) -> None:
    for index in range(4):
        promote(str(write_finished_run(tmp_path / str(index), 0.7, f"m{index}")), models, 2)
    assert read_graphs(models) == {"3": "m2", "4": "m3"}
    assert {folder.name for folder in models.folders()} == {"3", "4"}


def test_going_back_copies_the_version_before_and_can_be_repeated(
    models: StoragePath, tmp_path: Path, command: Call
) -> None:
    runs = [str(write_finished_run(tmp_path / name, 0.7, name)) for name in "abc"]
    for run in runs:
        promote(run, models, 9)
    code, out, _ = command("back=true", f"to={models}")
    assert (code, "version 4 of" in out, "a copy of version 2, instead of version 3" in out) == (DONE, True, True)
    assert restore_previous_version(models, 9) == 5
    assert read_graphs(models) == {"1": "a", "2": "b", "3": "c", "4": "b", "5": "a"}
    with raises(DataError, key="to", value=str(models), problem="no version before"):
        restore_previous_version(models, 9)
    assert promote(runs[2], models, 9)[0] == 6  # not promoted already: the newest version is another model
    assert (read_manifest(models / "5")["origin"], read_manifest(models / "5")["run"]) == (1, runs[0])


@pytest.mark.parametrize(
    ("origins", "chosen"),
    [({1: None}, None), ({1: None, 2: None}, 1), ({1: None, 2: None, 3: 1}, None), ({2: None, 3: None, 4: 2}, None),
     ({1: None, 2: None, 3: None, 4: 2}, 1), ({1: None, 2: None, 3: 1, 4: None}, 3), ({4: 2, 5: None}, 4)],
)  # fmt: skip
def test_a_copy_counts_as_its_origin(origins: dict[int, int | None], chosen: int | None) -> None:
    assert choose_previous_version({number: {"origin": origin} for number, origin in origins.items()}) == chosen


def test_a_reader_never_sees_a_part_of_a_version(
    models: StoragePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader lists versions after every write and deletion of a promotion that replaces one of two versions."""
    for index in range(2):
        promote(str(write_finished_run(tmp_path / str(index), 0.7, f"m{index}")), models, 2)
    complete = {str(i.path).removeprefix(f"{models}/1/") for i in (models / "1").list()}
    seen: list[set[str]] = []

    def check(path: object) -> None:
        if str(path).startswith(str(models)):
            visible = [info.path.parent for info in list_versions(models)]
            seen.append({version.name for version in visible})
            for version in visible:
                assert {str(i.path).removeprefix(f"{version}/") for i in version.list()} == complete

    for kind in (type(models), LocalPath):
        for method in ("upload", "delete", "delete_tree"):
            original = getattr(kind, method)

            def observed(self: StoragePath, *arguments: object, original: Callable[..., object] = original) -> object:
                result = original(self, *arguments)
                check(self)
                return result

            monkeypatch.setattr(kind, method, observed)
    promote(str(write_finished_run(tmp_path / "2", 0.7, "m2")), models, 2)
    assert seen
    assert all(names in ({"1", "2"}, {"1", "2", "3"}, {"2", "3"}) for names in seen)
    assert seen[-1] == {"2", "3"}


def test_a_version_that_a_killed_process_left_incomplete_is_skipped_and_deleted(
    models: StoragePath, tmp_path: Path
) -> None:
    promote(str(write_finished_run(tmp_path / "a", 0.7, "a")), models, 5)
    (models / "2" / "variables" / "variables.index").write("part")
    assert [info.path.parent.name for info in list_versions(models)] == ["1"]
    assert promote(str(write_finished_run(tmp_path / "b", 0.7, "b")), models, 5)[0] == 3
    assert read_graphs(models) == {"1": "a", "3": "b"}
    assert {folder.name for folder in models.folders()} == {"1", "3"}


def test_two_promotions_at_the_same_time_write_two_versions(tmp_path: Path) -> None:
    models = storage_path(tmp_path / "models")
    runs = [str(write_finished_run(tmp_path / name, 0.7, name)) for name in "ab"]
    threads = [threading.Thread(target=promote, args=(run, models, 5)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read_graphs(models)) == ["1", "2"]
    assert sorted(read_graphs(models).values()) == ["a", "b"]


def test_a_version_without_predictions_is_replaced_only_on_request(tmp_path: Path) -> None:
    models, run = storage_path(tmp_path / "models"), str(write_finished_run(tmp_path / "a", 0.7, "a"))
    (models / "7" / "saved_model.pb").write("foreign")
    with raises(DataError, key="run", value=run, fix="allow_worse=true", problem="version 7: .* has no report"):
        promote(run, models, 5)
    assert promote(run, models, 5, allow_worse=True)[0] == 8
    (models / "8" / storage_versions.MANIFEST).write("{")
    with raises(DataError, problem="is corrupt"):
        promote(str(write_finished_run(tmp_path / "b", 0.7, "b")), models, 5)
    assert promote(str(tmp_path / "b"), models, 5, allow_worse=True)[0] == 9


def test_a_corrupt_version_is_not_made_the_newest_again(tmp_path: Path) -> None:
    models = storage_path(tmp_path / "models")
    for name in "ab":
        promote(str(write_finished_run(tmp_path / name, 0.7, name)), models, 5)
    (models / "1" / "variables" / "variables.index").write("other")
    with raises(DataError, key="to", problem="variables.index is corrupt"):
        restore_previous_version(models, 5)
    assert sorted(read_graphs(models)) == ["1", "2"]


def test_the_reference_of_a_served_model_is_that_of_its_newest_version(tmp_path: Path) -> None:
    models = storage_path(tmp_path / "models")
    for number in (9, 10):
        reference = {
            "n": number,
            "classes": ["a"],
            "class_frequencies": [1.0],
            "confidence_histogram": {"counts": [1] * 20},
        }
        (models / str(number) / "assets" / "reference.json").write(json.dumps(reference))
        (models / str(number) / "saved_model.pb").write("graph")
    assert read_reference(str(models))["n"] == 10


@pytest.mark.parametrize(
    ("missing", "problem"),
    [("DONE", "not a finished run"), ("export/saved_model/1/saved_model.pb", "no export/saved_model"),
     ("report/predictions.csv", "no report/predictions.csv")],
)  # fmt: skip
def test_what_is_no_finished_run_with_an_export_is_an_error(tmp_path: Path, missing: str, problem: str) -> None:
    run = write_finished_run(tmp_path / "a", 0.7)
    (run / missing).unlink()
    with raises(DataError, key="run", value=str(run), problem=problem):
        promote(str(run), storage_path(tmp_path / "models"), 5)
    assert read_graphs(tmp_path / "models") == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run=a",), "error: to: is required"),
        (("to=b",), "error: run: is required"),
        (("run=a", "to=b", "back=true"), "error: run: cannot be used with back=true"),
        (("run=a", "to=b", "keep=0"), "error: keep=0: "),
        (("run=a", "to=b", "allow_worse=yes"), "error: allow_worse=yes: "),
        (("run=a", "to=abfss://b"), "error: to=abfss://b: "),
    ],
)
def test_a_wrong_argument_exits_with_2(arguments: tuple[str, ...], message: str, command: Call) -> None:
    code, _, err = command(*arguments)
    assert (code, message in err) == (WRONG_INPUT, True), err


def test_a_rejection_names_the_run_and_the_way_to_promote_it(tmp_path: Path) -> None:
    models = storage_path(tmp_path / "models")
    promote(str(write_finished_run(tmp_path / "a", 0.9, "a")), models, 5)
    worse = str(write_finished_run(tmp_path / "b", 0.6, "b"))
    with raises(NotPromoted, key="run", value=worse, fix="allow_worse=true", problem="worse than version 1"):
        promote(worse, models, 5)
