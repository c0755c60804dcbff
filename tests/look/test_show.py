"""`python -m trainer.look`: the page, look.json and the summary, of every source."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.cli.verbs import exit_code_of
from tests.data.images import fill_folder, serialize_record
from tests.evaluation.browser import Tab
from tests.look.photos import HOSTILE, encode_image, make_smooth_image, write_photos
from tests.processes import ROOT, run_python
from tests.storage.emulator import BUCKET, running
from trainer import __version__
from trainer.cli.compose import compose
from trainer.config.schema import validate_config
from trainer.data import prepare as preparing
from trainer.data.images import Pixels
from trainer.data.pipeline import EpochAugmentation, build_indexed_batches
from trainer.look import main, sample
from trainer.look import page as page_module
from trainer.look.show import examine, open_data
from trainer.storage.path import storage_path

SMALL = ("model=mobilenet_v2", "model.image_size=32")


def show(*arguments: str, code: int = 0) -> str:
    """Run the command in this process; return its stdout."""
    out = StringIO()
    with redirect_stdout(out):
        assert exit_code_of(main, *arguments) == code, out.getvalue()
    return out.getvalue()


def read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "look.json").read_text()))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("data") / "my photos")


@pytest.fixture(scope="module")
def page(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of the page of the photos, and the summary."""
    folder = tmp_path_factory.mktemp("page") / "out"
    return folder, show(f"data.root={photos}", "augmentation=standard", *SMALL, f"output={folder}")


def test_the_facts_about_photos_of_all_kinds(page: tuple[Path, str]) -> None:
    facts = read(page[0])
    assert facts["class_names"] == [HOSTILE, "dog"]
    assert facts["counts"] == {"train": [9, 6], "validation": [1, 2], "test": [1, 2]}
    assert facts["examined"] == {"train": 15, "validation": 3, "test": 3}
    assert facts["formats"] == {"JPEG": 15, "PNG": 2, "BMP": 2, "WEBP": 1, "GIF": 1}
    assert facts["modes"] == {"RGB": 17, "16-bit RGB": 1, "CMYK": 1, "RGB with alpha": 1, "palette": 1}
    assert facts["orientations"] == {"1": 20, "6": 1}
    assert facts["aspects"]["1:2 to 3:4"] == 3  # two portraits, and a landscape that is turned upright
    assert [120, 80, 16] in facts["frequent_sizes"]
    assert facts["shorter_side"]["min"] == 30
    assert [line.rpartition("/")[2].split(":")[0] for line in facts["skipped"]] == ["text.jpg"]
    assert [line.rpartition("/")[2].split(":")[0] for line in facts["undecodable"]] == ["half.jpg"]
    assert any("1 .txt" in note for note in facts["notes"])
    assert not any("skipped" in note for note in facts["notes"])


def test_copies_across_splits_and_with_two_labels_are_listed_with_their_files(page: tuple[Path, str]) -> None:
    facts = read(page[0])
    assert facts["copies"] == {"images": 4, "groups": 2, "across_splits": 1, "different_labels": 1}
    assert facts["duplicates"]["across_splits"] == 2
    assert facts["duplicates"]["different_labels"] == 1
    groups = {
        tuple(sorted(m["file"].rpartition("/")[2] for m in group["members"])): group["exact"]
        for group in facts["duplicates"]["groups"]
    }
    assert groups == {
        ("0.jpg", "copy of 0.jpg"): True, ("1.jpg", "same as 1.jpg"): True, ("2.jpg", "small 2.jpg"): False,
    }  # fmt: skip


def test_the_summary_fits_80_columns_and_suggests_what_can_be_pasted(page: tuple[Path, str]) -> None:
    folder, summary = page
    suggestions = read(folder)["suggestions"]
    arguments = [s["arguments"] for s in suggestions if s["arguments"]]
    assert arguments == ["data.on_error=skip", "model.image_size=96"] or arguments[0] == "data.on_error=skip"
    for line in arguments:
        assert f"      {line}\n" in summary
    paths = [line for line in summary.splitlines() if str(folder) in line or "my photos" in line]
    assert [line for line in summary.splitlines() if len(line) > 80 and line not in paths] == []
    assert re.search(r"^ +train +validation +test$", summary, re.M)
    assert re.search(r"^  in total +15 +3 +3$", summary, re.M)
    assert summary.endswith(f"page {folder}/index.html\n")
    assert "\n".join(summary.splitlines()).isprintable() is False  # several lines, nothing else
    assert all(line.isprintable() for line in summary.splitlines())


def test_the_page_is_one_file_in_which_every_name_is_escaped(page: tuple[Path, str]) -> None:
    folder, _ = page
    assert sorted(p.name for p in folder.iterdir()) == [
        "augmentation.png", "counts.png", "examples.png", "index.html", "look.json",
    ]  # fmt: skip
    text = (folder / "index.html").read_text()
    assert "<script>alert" not in text
    assert text.count("<script>") == 1
    assert re.findall(r'(?:src|href)="(?!data:|#)', text) == []
    for section in ("suggestions", "counts", "examples", "augmentation", "sizes-and-formats", "duplicates"):
        assert f'<section id="{section}">' in text
    assert "data.on_error=skip" in text
    with Image.open(folder / "augmentation.png") as image:
        assert image.width > 500


def test_the_same_arguments_give_the_same_bytes_and_leave_no_other_file(
    page: tuple[Path, str], photos: Path, tmp_path: Path
) -> None:
    show(f"data.root={photos}", "augmentation=standard", *SMALL, f"output={tmp_path}/again")
    for file in page[0].iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_images_are_those_of_training(photos: Path) -> None:
    """Examples, also turned ones, and augmented views have the bits of the input pipeline."""
    given = ["data=image_folder", f"data.root={photos}", "augmentation=standard", "seed=5", *SMALL]
    resolved, content = examine(validate_config(compose(given) or {}), 100)
    _, data = open_data(validate_config(compose(given) or {}))
    train = data.dataset.splits["train"]
    pixels = Pixels(train, 32, "stretch", "skip")
    names = [train.name_of(i) for i in range(train.count)]
    shown = {e.file: e.pixels for members in content.images.examples.values() for e in members}
    assert len(shown) == 11  # 6 and the readable 5
    order = np.array([names.index(file) for file in shown])
    np.testing.assert_array_equal(np.stack(list(shown.values())), pixels.read_images(order))
    indices = np.array(sorted(each.index for each in content.images.augmented))
    assert [train.labels[i] for i in indices] in ([0, 1], [1, 0])
    view = EpochAugmentation(resolved.augmentation, 5, 3)
    batch = next(iter(build_indexed_batches(pixels, indices, rows_per_batch=2, num_replicas=1, view=view).dataset))
    for row, index in enumerate(indices):
        (views,) = (each.views for each in content.images.augmented if each.index == index)
        np.testing.assert_array_equal(batch["image"][row], views[3])


@pytest.mark.parametrize("orientation", ["exif", "ignore"])
def test_marked_photos_are_shown_as_training_uses_them(tmp_path: Path, orientation: str) -> None:
    photos = {f"{label}/{k}.jpg": make_smooth_image(k, 120, 60) for k, label in enumerate(("cat", "cat", "dog", "dog"))}
    for name, image in photos.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encode_image(image, orientation=6))
    given = [f"data.root={tmp_path}", "data=image_folder", f"data.orientation={orientation}", *SMALL]
    content = examine(validate_config(compose(given) or {}), 100)[1]
    assert content.facts.orientations == {6: 4}
    assert content.facts.aspects["1:2 to 3:4" if orientation == "exif" else "16:9 to 2:1"] == 4
    assert ("data.orientation=exif" in [s.arguments for s in content.suggestions]) == (orientation == "ignore")
    for example in (e for members in content.images.examples.values() for e in members):
        stored = photos[os.path.relpath(example.file, tmp_path)]
        turned = stored.transpose(Image.Transpose.ROTATE_270) if orientation == "exif" else stored
        expected = np.asarray(turned.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(example.pixels - expected).mean() < 12


def test_a_sample_of_a_large_dataset_counts_all_and_examines_some(tmp_path: Path) -> None:
    root = fill_folder(tmp_path / "photos", {"cat": 40, "dog": 20})
    (tmp_path / "out").mkdir()
    for name in ("augmentation.png", "index.html", "look.json"):
        (tmp_path / "out" / name).write_text("of an earlier page")
    summary = show(f"data.root={root}", *SMALL, "images=12", f"output={tmp_path}/out")
    facts = read(tmp_path / "out")
    assert sum(map(sum, facts["counts"].values())) == 60
    assert sum(facts["examined"].values()) == 12
    assert "60 images of 2 classes, 12 examined" in summary
    assert "data.test_fraction=0.15" in summary
    assert not (tmp_path / "out" / "augmentation.png").exists()
    assert "augmentation=none" in (tmp_path / "out" / "index.html").read_text()


def test_a_page_of_many_classes_is_bounded_and_states_what_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "MAX_SHOWN", 3)
    monkeypatch.setattr(page_module, "MAX_ROWS", 4)
    counts = {"ant": 12, "bee": 4, "cat": 10, "dog": 5, "eel": 6}
    root = fill_folder(tmp_path / "photos", counts)
    show(f"data.root={root}", *SMALL, f"output={tmp_path}/out")
    text = (tmp_path / "out" / "index.html").read_text()
    (shown,) = re.findall(r'<section id="examples">(.*?)</section>', text, re.S)
    assert re.findall(r"<h3>(\w+)</h3>", shown) == ["bee", "dog", "eel"]
    assert shown.count("<img") == 3
    assert "Of the 3 rarest classes. Not shown: 2 classes with more training examples." in shown
    (table,) = re.findall(r'<section id="counts">(.*?)</section>', text, re.S)
    assert re.findall(r"<tr><td>(\w+)</td>", table) == ["bee", "cat", "dog", "eel"]
    assert "Not listed: 1 class with more training examples. look.json has all counts." in table
    assert len(read(tmp_path / "out")["counts"]["train"]) == 5


@pytest.mark.slow
def test_record_shards_in_a_bucket_and_a_page_in_one(tmp_path: Path) -> None:
    root = fill_folder(tmp_path / "photos", {"cat": 20, "dog": 20})
    with running(tmp_path / "buckets"):
        address = f"gs://{BUCKET}/photos"
        config = validate_config(compose(["data=image_folder", f"data.root={root}", "data.shards=4", *SMALL]) or {})
        preparing.prepare(config, address)
        cache = f"runtime.cache_dir={tmp_path}/cache"
        summary = show("data=tfds", f"data.root={address}", *SMALL, cache, "images=16", f"output=gs://{BUCKET}/out")
        assert f"page gs://{BUCKET}/out/index.html" in summary
        facts = json.loads(storage_path(f"gs://{BUCKET}/out/look.json").read())
    assert facts["counts"] == {"train": [16, 16], "validation": [4, 4]}
    assert sum(facts["examined"].values()) == 16
    assert facts["formats"] == {"JPEG": 16}
    fetched = {path.name for path in (tmp_path / "cache" / "shards").rglob("*.tfrecord*")}
    assert fetched == {name for name in fetched if "validation" in name} | {
        sorted(fetched)[0]
    }  # one of four for training


def test_tfrecords_with_a_field_of_groups(tmp_path: Path) -> None:
    import tensorflow as tf

    for shard in range(3):
        with tf.io.TFRecordWriter(str(tmp_path / f"{shard}.tfrec")) as writer:
            for k in range(20):
                camera = b"phone" if k % 4 else b"camera"
                writer.write(
                    serialize_record(
                        image=encode_image(make_smooth_image(20 * shard + k, 30, 20)),
                        label=k % 2,
                        camera=camera,
                        id=100 * shard + k,
                    )
                )
    given = (
        f"data.pattern={tmp_path}/*.tfrec",
        "data.label_field=label",
        "data.image_field=image",
        "data.class_names=[cat, dog]",
        *SMALL,
    )
    summary = show(*given, f"output={tmp_path}/out")
    assert read(tmp_path / "out")["group_fields"] == {"camera": 2}
    assert "data.group_field=camera\n" in summary


@pytest.mark.slow
def test_the_digits_are_the_default_as_for_a_run(tmp_path: Path) -> None:
    summary = show(f"output={tmp_path}/out", "images=60")
    assert "digits: 1,797 images of 10 classes, 60 examined" in summary
    assert "no suggestions" in summary


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("images=0",), "images=0: is not a whole number"),
        (("images=many",), "images=many: is not a whole number"),
        (("output=",), "output: is empty|output=: is empty"),
        (("data.root=gone",), "data.root=gone: "),
        (("seed=-1",), "seed=-1"),
        (("data.rooot=x",), "data.rooot"),
        (("-m", "seed=1,2"), "a sweep has no page"),
        (("data=digits", "data.name=x"), "data.name"),
    ],
)
def test_bad_arguments_end_with_2(
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_code_of(main, *arguments) == 2
    assert re.search(rf"^error: .*({message})", capsys.readouterr().err, re.M | re.S)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_another_page_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "index.html").write_text("a report")
    assert exit_code_of(main, "data=digits", f"output={tmp_path}") == 2
    assert "index.html that trainer.look did not write; choose another folder" in capsys.readouterr().err
    assert (tmp_path / "index.html").read_text() == "a report"


def test_a_class_without_a_readable_image_ends_as_a_run_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = fill_folder(tmp_path / "photos", {"cat": 5, "dog": 1})
    (root / "dog" / "00.jpg").write_bytes(b"no image")
    assert exit_code_of(main, f"data.root={root}", *SMALL, f"output={tmp_path}/out") == 2
    assert "no training example of dog" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(main, "--help") == 0
    text = capsys.readouterr().out
    assert len(re.findall(r"^Example: python -m trainer.look .*\S$", text, re.M)) == 1
    assert exit_code_of(main, "--version") == 0
    assert capsys.readouterr().out == f"kubetune {__version__}\n"


SCREENS = {"laptop": (1280, 900, False), "tablet": (768, 1024, False), "phone": (375, 812, True)}


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("screen", SCREENS)
def test_the_page_fits_every_screen_and_sends_no_request(
    tab: Tab, page: tuple[Path, str], screen: str, dark: bool
) -> None:
    width, height, phone = SCREENS[screen]
    file = page[0] / "index.html"
    tab.errors.clear()
    tab.requests.clear()
    tab.open(file, width, height, phone, dark)
    assert tab.run("document.documentElement.scrollWidth") == width
    assert tab.errors == []
    assert [address for address in tab.requests if not address.startswith("data:")] == [file.as_uri()]
    small = "[...document.querySelectorAll('main *')].filter(e => e.getClientRects().length && e.textContent.trim())"
    assert tab.run(f"Math.min(...{small}.map(e => parseFloat(getComputedStyle(e).fontSize)))") >= 11
    tab.until("[...document.images].filter(i => i.offsetParent).every(i => i.complete && i.naturalWidth > 0)")
    squares = "[...document.querySelectorAll('.strip img')].map(i => i.getBoundingClientRect())"
    assert tab.run(f"{squares}.every(r => Math.abs(r.width - r.height) < 1 && r.width >= 70)")
    assert tab.run("document.querySelector('#examples h3').textContent").startswith("<script>")
    cut = "[...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert tab.run(cut) == 0


@pytest.mark.browser
def test_the_counts_are_sorted_by_a_click(tab: Tab, page: tuple[Path, str]) -> None:
    tab.open(page[0] / "index.html")
    cells = "[...document.querySelectorAll('#counts tbody tr')].map(r => +r.cells[1].dataset.value)"
    tab.click("#counts th:nth-child(2) button")
    assert tab.run(cells) == [6, 9]
    tab.click("#counts th:nth-child(2) button")
    assert tab.run(cells) == [9, 6]


@pytest.mark.slow
def test_a_killed_start_leaves_the_page_before_and_the_next_one_replaces_it(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "trainer.look", f"data.root={photos}", *SMALL, f"output={out}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    pages = {path.name: path.read_bytes() for path in out.iterdir()}
    for k, number in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL)):
        child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(1 + 3 * k)
        child.send_signal(number)
        code = child.wait()
        assert code in (0, -number, 75, -signal.SIGTERM)
        for name, content in pages.items():
            assert (out / name).read_bytes() == content  # whole at any time
    shutil.rmtree(out)
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while child.poll() is None and not (out / "look.json").exists():
        time.sleep(0.01)
    child.kill()
    child.wait()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == pages


def test_the_command_does_without_keras() -> None:
    program = """
import sys
from trainer.cli.process import suppress_import_noise
with suppress_import_noise(with_keras=False):
    import trainer.look.show
print(sorted({"keras", "sklearn"} & set(sys.modules)))
"""
    assert run_python(program).stdout == "[]\n"
