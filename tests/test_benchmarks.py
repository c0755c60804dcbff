"""Benchmarks: measurements, folders of photos, the page, and a run of each row."""

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from benchmarks import gpu, growth, page, plain_keras, whole_recipe
from benchmarks.__main__ import ROWS
from benchmarks.input_pipeline import ROWS as PIPELINES
from benchmarks.photos import count_photos, link_fold, link_repeatedly, list_photos, write_photos
from benchmarks.processes import FinishedProcess, FinishedRun, interleave, run_python
from benchmarks.results import (
    Comparison,
    Result,
    Table,
    format_median,
    format_median_and_range,
    read_results,
    save_result,
)
from trainer.config.schema import Model
from trainer.models.classifier import build_classifier, count_parameters
from trainer.models.freezing import set_trainable_layers

ROOT = Path(__file__).parents[1]
PEER = "best plain Keras"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), 20)


@pytest.mark.parametrize(("unit", "ratios"), [("s", [2.0, 0.5]), ("MB", [2.0, 0.5]), ("images/s", [0.5, 2.0])])
def test_a_ratio_above_one_is_better_in_every_unit(unit: str, ratios: list[float]) -> None:
    comparison = Comparison("whole", "other", unit, ours=[1.0, 8.0], other=[2.0, 4.0])  # type: ignore[arg-type]
    assert comparison.ratios == ratios


def test_medians_with_their_range() -> None:
    assert format_median_and_range([3.0, 1.0, 2.0]) == "2.00 (1.00 to 3.00)"
    assert format_median_and_range([1.234]) == "1.23"
    assert [format_median([v], "s") for v in (1234.5, 12.34, 1.234, 0.1234)] == [
        "1,234 s",
        "12.3 s",
        "1.23 s",
        "0.123 s",
    ]


def test_the_page_has_the_saved_results(tmp_path: Path) -> None:
    loop = Comparison("head: loop", "bare step", "images/s", [90.0, 99.0, 110.0], [100.0, 100.0, 100.0])
    table = Table("Time", ["category", "seconds"], [["start", "4.1"]])
    command = "python -m benchmarks --only step"
    step = Result("step-alpha-0.35", "Training step", "In turns.", command, [loop], [table], "2 cores", "2026-11-22")
    first = Result("recipe-alpha-0.35", "Whole recipe", "", "", [Comparison("all", "plain", "s", [1.0], [3.0])])
    for result in (step, first):
        save_result(result, tmp_path / "out")
    (tmp_path / "README.md").write_text("# A\n")
    assert {r.name: r for r in read_results(tmp_path / "out")} == {r.name: r for r in (step, first)}
    (tmp_path / "README.md").write_text("# A\n")
    page.write_pages(tmp_path / "out", tmp_path)
    text = (tmp_path / "docs" / "performance.md").read_text()
    assert text.index("## Whole recipe") < text.index("## Training step")
    assert "| head: loop | 99.0 images/s | bare step | 100 images/s | **0.99** | 0.90 to 1.10 | 3 |" in text
    assert "| all | 1.00 s | plain | 3.00 s | **3.00** | 3.00 to 3.00 | 1 |" in text
    assert "| start | 4.1 |" in text
    assert "In turns. 2 cores; 2026-11-22. `python -m benchmarks --only step`" in text
    with Image.open(tmp_path / "docs" / "images" / "performance.png") as chart:
        assert chart.width > 800
    assert (tmp_path / "README.md").read_text() == "# A\n"  # one seed is no table


def recipe_of(alpha: float, seconds: float, seeds: int) -> Result:
    """A result of the whole recipe, in which ours takes `seconds` and the peers 2, 3 and 4 times as long."""
    peers = {name: factor for factor, name in enumerate(whole_recipe.PEERS, 2)}
    sides = [(label, side) for label in whole_recipe.AUGMENTATIONS for side in whole_recipe.OURS[label]]
    totals = [
        Comparison(f"{label}, {side}: {whole_recipe.WHOLE}", peer, "s", [seconds] * seeds, [seconds * factor] * seeds)
        for label, side in sides
        for peer, factor in peers.items()
    ]
    rows = [
        [label, side, after, "0.8", "0.7 to 0.9", "360", "0.8"]
        for label, side in [*sides, *((label, peer) for label in whole_recipe.AUGMENTATIONS for peer in peers)]
        for after in whole_recipe.PHASES.values()
    ]
    accuracy = Table("Validation accuracy", ["", "", "", "", "", "", ""], rows)
    return Result(
        f"recipe-alpha-{alpha:g}", f"Width {alpha:g}", "", "run it", totals, [accuracy], "2 cores", "2026-11-28"
    )


def test_the_table_of_the_readme_has_the_three_peers_of_the_widest_network_with_all_seeds() -> None:
    text = (ROOT / "README.md").read_text()
    results = [recipe_of(0.35, 1.0, 3), recipe_of(1.0, 10.0, 3), recipe_of(1.4, 20.0, 1)]
    made = page.update_readme(text, results)
    before, after = text.partition(page.BEGIN)[0], text.partition(page.END)[2]
    assert made.startswith(before + page.BEGIN)
    assert made.endswith(page.END + after)
    rows = [line for line in made.removeprefix(before).removesuffix(after).splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 2 * 3
    assert rows[2] == (
        "| no augmentation | Keras as in the notebook | 20.0 s | 10.0 s | 2.0 (2.0 to 2.0) | 0.8 (0.7 to 0.9) "
        "| 0.8 (0.7 to 0.9) |"
    )
    assert [row.split(" | ")[1] for row in rows[5:]] == list(whole_recipe.PEERS)
    assert "Width 1; medians of 3 interleaved seeds. 2 cores; 2026-11-28. `run it`" in made
    assert page.update_readme(text, results[2:]) == text


def test_a_recipe_is_compared_seed_by_seed() -> None:
    def outcome(seconds: float, accuracy: float, **breakdown: float) -> whole_recipe.Outcome:
        epochs = {"head": [0.1, 0.2, 0.3], "fine_tune": [seconds / 10] * 4}
        last = {"head": 0.5, "fine_tune": accuracy}
        return whole_recipe.Outcome(
            seconds,
            epochs,
            last,
            breakdown,
            FinishedProcess(0.0, "", 100 * seconds, anonymous_mb=1.0, seconds=2 * seconds),
        )

    outcomes = {
        ("none", PEER): [outcome(30, 0.75), outcome(60, 0.875)],
        ("none", "ours"): [
            outcome(10, 0.875, train=8, start=2, lost=0),
            outcome(15, 1.0, train=12, start=3, lost=0),
        ],
    }
    whole, training, head, tune = whole_recipe.compare_with_peer(outcomes, "none", "ours", PEER)
    assert whole.ours == [20.0, 30.0]
    assert (whole.ratios, training.ratios, head.ratios, tune.ratios) == ([3.0, 4.0], [3.0, 4.0], [1.0, 1.0], [3.0, 4.0])
    assert whole_recipe.list_peak_mb(outcomes["none", "ours"]) == [1000.0, 1500.0]
    rows = whole_recipe.tabulate_accuracies(outcomes, [40, 80]).rows  # 35 + 80 of 120
    assert rows[-1] == ["none", "ours", "from layer 100", "0.958", "0.906 to 0.982", "120", "0.875, 1.000"]
    (spent,) = whole_recipe.tabulate_time_breakdowns(outcomes).rows
    assert spent == ["none", "ours", "train 10.0 (8.0 to 12.0), start 2.5 (2.0 to 3.0)"]


def test_growth_is_relative_to_the_smallest_size_with_the_same_cache() -> None:
    def run_of(seconds: float, peak: float) -> FinishedRun:
        lines = [{"message": "run: here", "at": 4.0}, {"message": "evaluating 4", "at": 4.0 + seconds}]
        return FinishedRun(FinishedProcess(0.0, "", peak, peak / 2, seconds), lines, {})

    sizes = {1: (2.0, 100.0), 4: (4.0, 200.0), 16: (32.0, 100.0)}
    outcomes = {f"data.cache={cache}, {n}x": [run_of(*of)] for cache in ("none", "disk") for n, of in sizes.items()}
    comparisons, table = growth.compare_sizes(outcomes, {n: 10 * n for n in sizes})
    assert [c.ratio for c in comparisons] == [2.0, 0.5, 0.5, 1.0, 1.0, 1.0] * 2
    assert table.rows[2] == ["data.cache=none, 16x", "160", "32.0", "100", "50"]


def test_no_page_without_results(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no results; run python -m benchmarks --out"):
        page.write_pages(tmp_path, tmp_path)


def test_folds_are_disjoint_and_contain_all_photos(photos: Path, tmp_path: Path) -> None:
    validated: list[str] = []
    for fold in range(5):
        split = link_fold(photos, tmp_path / str(fold), fold)
        run_trainer, validation = (list_photos(split / name) for name in ("train", "validation"))
        assert count_photos(split / "train") == 16
        assert not {p.name for of in run_trainer.values() for p in of} & {
            p.name for of in validation.values() for p in of
        }
        assert [len(of) for of in validation.values()] == [2, 2]
        validated += [p.name for of in validation.values() for p in of]
    assert sorted(validated) == sorted(p.name for of in list_photos(photos).values() for p in of)


def test_a_folder_of_links_has_every_photo_equally_often(photos: Path, tmp_path: Path) -> None:
    several = link_repeatedly(photos, tmp_path / "several", 3)
    assert count_photos(several) == 60
    assert {name: len(of) for name, of in list_photos(several).items()} == {"class_0": 30, "class_1": 30}


def test_every_round_has_every_side_once_and_begins_with_a_different_one() -> None:
    order = interleave(["a", "b", "c"], 3)
    assert [name for turn, name in order if turn == 1] == ["b", "c", "a"]
    assert sorted(order) == [(turn, name) for turn in range(3) for name in "abc"]


def test_the_memory_and_exit_code_of_a_process_are_measured() -> None:
    completed = run_python("-c", "import time; held = b'x' * 300_000_000; time.sleep(0.5); print('done')")
    assert completed.output == "done\n"
    assert completed.seconds >= 0.5
    assert completed.peak_mb > 280
    assert completed.anonymous_mb > 280
    with pytest.raises(SystemExit, match=r"(?s)ended with 3:.*failure"):
        run_python("-c", "import sys; print('failure', flush=True); sys.exit(3)")


@pytest.mark.slow
@pytest.mark.parametrize("side", sorted({side for _, mine, others in PIPELINES for side in (mine, *others)}))
def test_every_side_of_the_input_reads_the_folder(side: str, photos: Path) -> None:
    seconds = json.loads(
        run_python("-m", "benchmarks.input_pipeline", "--side", side, str(photos)).output.splitlines()[-1]
    )
    assert 0 < seconds["later"] < seconds["cold"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[np.ndarray]]:
    """Write a file of weights, and return its path and the weights."""
    file = str(tmp_path_factory.mktemp("weights") / "published.weights.h5")
    network = keras.applications.MobileNetV2(input_shape=(160, 160, 3), include_top=False, weights=None, alpha=0.35)
    network.save_weights(file)
    return file, network.get_weights()


@pytest.mark.parametrize("frozen", [False, True])
def test_peers_begin_with_the_weights_of_a_file(frozen: bool, published: tuple[str, list[np.ndarray]]) -> None:
    file, weights = published
    _, backbone = plain_keras.build_model(2, file, 0.35, augment=False, frozen_statistics=frozen)
    for mine, theirs in zip(backbone.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("peer", plain_keras.PEERS)
def test_plain_keras_trains_normalization_unless_it_is_corrected(peer: str, photos: Path, tmp_path: Path) -> None:
    split = link_fold(photos, tmp_path / "split", 0)
    arguments = ("--peer", peer, "--alpha", "0.35", "--augment")
    result = json.loads(run_python("-m", "benchmarks.plain_keras", str(split), *arguments).output.splitlines()[-1])
    assert result["averages_changed"] == (peer == "notebook")
    assert [len(values) for values in result["val_accuracy"].values()] == [plain_keras.EPOCHS] * 2
    model = Model(backbone="MobileNetV2", alpha=0.35, weights="none", image_size=32)
    trained = set_trainable_layers(
        build_classifier(model, 2, 1), f"from_layer:{plain_keras.FROM_LAYER}", "affine"
    ).trainable
    assert result["trainable"] == count_parameters(trained.values())


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("row", sorted(set(ROWS) - {"input"}))
def test_every_row_runs_on_a_few_photos(row: str, photos: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--only", row, "--rounds", "1", "--data", str(photos), "--out"]
    subprocess.run([*command, str(tmp_path / "out")], cwd=ROOT, check=True)
    for result in read_results(tmp_path / "out"):
        assert str(photos) not in page.format_section(result)
        for comparison in result.comparisons:
            assert comparison.ratio > 0
    (tmp_path / "README.md").write_text("# A\n")
    page.write_pages(tmp_path / "out", tmp_path)


def test_what_has_no_time_left_is_written_as_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--small", "--budget", "0", "--only", "ResNet50", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", *arguments])  # in this process; the next test starts one
    gpu.main()
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["result"] for row in results["steps"]] == [{"not_measured": "no time left"}] * 4
    text = (tmp_path / "gpu.md").read_text()
    assert "| ResNet50, 96 px, batch 4 | all | ours | not measured: no time left | | | | |" in text
    assert "| ResNet50, 96 px, batch 4 | none | keras | not measured: no time left | | | | |" in text


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_benchmark_of_gpus_runs_on_a_cpu(tmp_path: Path) -> None:
    """The CPU twin of a measurement on a GPU: all parts, of one network."""
    options = ("--small", "--budget", "1200", "--only", "MobileNetV2", "resume", "--out", str(tmp_path))
    run_python("-m", "benchmarks.gpu", *options)
    results = json.loads((tmp_path / "gpu.json").read_text())
    for row in results["steps"]:
        result = row["result"]
        assert "not_measured" not in result, result
        assert result["images_per_second"] > 0
        assert (result["xla"], result["precision"], result["peak_memory"]) == (False, "float32", None)
    assert [row["settings"]["implementation"] for row in results["steps"]] == ["ours", "keras"] * 2
    assert set(results["steps"][0]["result"]["fed"]) == {"decoded in memory", "decoded anew", "augmented"}
    assert results["resume"]["bit_equal"] is True
    assert results["resume"]["first_step_restarted"] > 0
    text = (tmp_path / "gpu.md").read_text()
    assert "| bit equal | True |" in text
    assert text.count("| ours |") == 2
