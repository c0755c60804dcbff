"""The page in a browser: no request, no console error, and its interactions by mouse and touch."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.browser import Tab
from tests.evaluation.examples import HOSTILE, fetch, make_history, make_phases, make_result
from tests.report.test_write import write
from trainer.data.corrections import read_corrections
from trainer.report.page import DuplicateImages, ReportImages

pytestmark = pytest.mark.browser

SCREENS = {"laptop": (1366, 900, False), "tablet": (820, 1180, False), "phone": (390, 844, True)}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole_page(tmp_path_factory.mktemp("page"), 7, 60)


def write_whole_page(folder: Path, classes: int, n: int) -> Path:
    """Write a page with all sections."""
    members = [
        {"split": split, "index": 0, "file": f"{split}/a very long name of a folder {'x' * 90} <i>.jpg", "label": label}
        for split, label in (("train", HOSTILE), ("test", "other"))
    ]
    group = {"count": 2, "across_splits": True, "labels": [HOSTILE, "other"], "members": members}
    facts = {"compared": {"train": 7, "test": n}, "across_splits": 1, "different_labels": 1}
    facts |= {"within_one_split_and_class": 3, "groups": [group]}

    def explain(indices: Sequence[int]) -> np.ndarray:
        return np.stack([np.random.default_rng(i).random((4, 4)).astype(np.float32) for i in indices])

    images = ReportImages(fetch, explain=explain, duplicates=DuplicateImages(facts, [list(fetch([1, 2]))]))
    write(folder, make_result(classes, n), images=images)
    return folder / "index.html"


def column(tab: Tab, number: int, table: str = "#classes table.sorts") -> list[Any]:
    cells = f"[...document.querySelectorAll('{table} tbody tr')].map(r => r.cells[{number}])"
    return list(tab.run(f"{cells}.map(c => c.dataset.value === undefined ? c.textContent : +c.dataset.value)"))


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("screen", SCREENS)
def test_it_fits_every_screen_and_sends_no_request(tab: Tab, page: Path, screen: str, dark: bool) -> None:
    width, height, phone = SCREENS[screen]
    tab.errors.clear()
    tab.requests.clear()
    tab.open(page, width, height, phone, dark)
    assert tab.run("document.documentElement.scrollWidth") == width
    small = "[...document.querySelectorAll('main *')].filter(e => e.getClientRects().length && e.textContent.trim())"
    assert tab.run(f"Math.min(...{small}.map(e => parseFloat(getComputedStyle(e).fontSize)))") >= 11
    assert tab.errors == []
    assert [address for address in tab.requests if not address.startswith("data:")] == [page.as_uri()]
    shot = np.asarray(Image.open(io.BytesIO(tab.screenshot())).convert("L"))
    assert (shot.mean() < 60) if dark else (shot.mean() > 180)
    assert shot.std() > 10


@pytest.mark.parametrize("width", [1366, 820])
def test_no_table_is_cut_off_on_a_laptop_or_a_tablet(tab: Tab, page: Path, width: int) -> None:
    tab.open(page, width, 900)
    cut = "[...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth).map(e => e.innerText)"
    assert tab.run(cut) == []


def test_a_click_sorts_the_classes(tab: Tab, page: Path) -> None:
    tab.open(page)
    assert column(tab, 1) == sorted(column(tab, 1))  # the weakest first
    tab.click("#classes th:nth-child(4) button")
    assert column(tab, 3) == sorted(column(tab, 3))
    assert tab.run("document.querySelector('#classes th[aria-sort]').textContent") == "recall"
    tab.click("#classes th:nth-child(4) button")
    assert column(tab, 3) == sorted(column(tab, 3), reverse=True)
    tab.click("#classes table.sorts th:nth-child(1) button")
    assert column(tab, 0)[-1] == "class 6"
    assert HOSTILE in column(tab, 0)


def test_many_classes_can_be_searched(tab: Tab, tmp_path: Path) -> None:
    tab.open(write_whole_page(tmp_path, 120, 240))
    tab.click("input.filter")
    tab.call("Input.insertText", text="CLASS 11")
    rows = "[...document.querySelectorAll('#classes table.sorts tbody tr')]"
    assert tab.run(f"{rows}.filter(r => !r.hidden).length") == 11  # class 11, class 110 to class 119


def opacity(tab: Tab) -> float:
    tab.run("new Promise(done => setTimeout(done, 300))")  # the overlay fades in
    return float(tab.run("getComputedStyle(document.querySelector('#tab-most_wrong .heat')).opacity"))


def test_the_overlay_shows_under_the_mouse(tab: Tab, page: Path) -> None:
    tab.open(page)
    tab.point_at("h1")
    assert opacity(tab) == 0
    tab.point_at("#tab-most_wrong .image")
    assert opacity(tab) == 1
    tab.point_at("h1")
    assert opacity(tab) == 0


def test_a_tap_toggles_the_overlay(tab: Tab, page: Path) -> None:
    tab.open(page, *SCREENS["phone"])
    assert opacity(tab) == 0
    tab.tap("#tab-most_wrong .image")
    assert opacity(tab) == 1
    tab.tap("#tab-most_wrong .image")
    tab.run("document.activeElement.blur()")
    assert opacity(tab) == 0


def test_tabs_show_one_gallery_at_a_time(tab: Tab, page: Path) -> None:
    tab.open(page)
    shown = "[...document.querySelectorAll('#gallery [id]')].filter(e => !e.hidden).map(e => e.id)"
    assert tab.run(shown) == ["tab-most_wrong"]
    tab.click('[data-shows="tab-least_sure"]')
    assert tab.run(shown) == ["tab-least_sure"]
    assert tab.run("document.querySelectorAll('#tab-least_sure .shot').length") == 24
    tab.until("[...document.images].filter(i => i.offsetParent).every(i => i.complete && i.naturalWidth > 0)")


def choose(tab: Tab, mark: str, value: str) -> None:
    """Choose an option of the control of an example, as a user does with the keyboard."""
    tab.run(
        f"(() => {{ const s = document.querySelector({mark!r} + ' select'); s.value = {value!r}; "
        "s.dispatchEvent(new Event('change')); })()"
    )


def test_corrections_are_chosen_and_saved(tab: Tab, page: Path, tmp_path: Path) -> None:
    tab.open(page)
    tab.errors.clear()
    tab.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    suspects, wrong = "#possible-label-errors .shot", "#tab-most_wrong .shot"
    first, second = (f"{suspects}:nth-of-type({n}) .correct" for n in (1, 2))
    files = [tab.run(f"document.querySelector({m!r}).dataset.file") for m in (first, second)]
    suggestion = tab.run(f"document.querySelector({first!r}).dataset.suggestion")
    assert tab.run("document.getElementById('corrections').hidden")
    choose(tab, first, "suggested")
    choose(tab, second, "exclude")
    # All controls of one example show the same.
    same = f"[...document.querySelectorAll('.correct')].filter(m => m.dataset.file === {files[0]!r})"
    assert tab.run(f"{same}.length") > 1
    assert tab.run(f"{same}.every(m => m.firstChild.value === 'suggested')")
    other = f"{wrong}:last-of-type .correct"
    choose(tab, other, "other")
    tab.run(f"document.querySelector({other!r} + ' input').focus()")
    tab.call("Input.insertText", text="no class")
    tab.run("document.activeElement.blur()")
    assert tab.run(f"!document.querySelector({other!r} + ' input').checkValidity()")
    assert tab.run("document.querySelector('#corrections span').textContent") == "1 excluded, 1 relabelled"
    tab.run(f"document.querySelector({other!r} + ' input').value = ''")
    tab.run(f"document.querySelector({other!r} + ' input').focus()")
    tab.call("Input.insertText", text=HOSTILE)
    tab.run("document.activeElement.blur()")
    choose(tab, "#duplicates .correct", "exclude")
    assert tab.run("document.querySelector('#corrections span').textContent") == "2 excluded, 2 relabelled"
    assert tab.run("document.documentElement.scrollWidth") == 1280
    tab.click("#corrections [data-does=save]")
    saved = tmp_path / "corrections.csv"
    for _ in range(200):
        if saved.exists():
            break
        tab.run("new Promise(done => setTimeout(done, 50))")
    corrections = read_corrections(str(saved))
    copy = f"train/a very long name of a folder {'x' * 90} <i>.jpg"
    third = tab.run(f"document.querySelector({other!r}).dataset.file")
    assert [(c.file, c.class_name) for c in corrections] == [
        (files[0], suggestion), (files[1], None), (third, HOSTILE), (copy, None),
    ]  # fmt: skip
    tab.click("#corrections [data-does=clear]")
    assert tab.run("document.getElementById('corrections').hidden")
    assert tab.errors == []


def test_records_are_corrected_by_the_file_names_that_only_they_store(tab: Tab, tmp_path: Path) -> None:
    result = make_result(3, 6)
    sources = ("=a, b.jpg", "twice.jpg", "twice.jpg", "", "d.jpg", "e.jpg")
    write(tmp_path, replace(result, names=tuple(f"x.tfrec#{k}" for k in range(6)), sources=sources))
    tab.open(tmp_path / "index.html")
    names = tab.run("[...new Set([...document.querySelectorAll('#gallery .correct')].map(m => m.dataset.file))]")
    assert set(names) == {"'=a, b.jpg", "x.tfrec#1", "x.tfrec#2", "x.tfrec#3", "d.jpg", "e.jpg"}


def test_no_script_but_its_own_runs(tab: Tab, page: Path) -> None:
    """The Content-Security-Policy stops what escaping would miss."""
    tab.open(page)
    tab.errors.clear()
    tab.run("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.odd = 1'}))")
    tab.run("new Promise(done => { const i = new Image(); i.onerror = done; i.src = 'http://127.0.0.1:9/x.png'; })")
    assert tab.run("window.odd") is None
    assert len([error for error in tab.errors if "Content Security Policy" in error]) == 2
    tab.errors.clear()


def test_without_the_script_everything_is_there(tab: Tab, page: Path) -> None:
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.call("Page.navigate", url=page.as_uri())
        tab.until("document.readyState === 'complete'")
        assert tab.run("[...document.querySelectorAll('#gallery [id]')].every(e => e.offsetHeight > 0)")
        assert tab.run("document.querySelector('.tabs').offsetHeight") == 0
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)


def test_phases_and_history_are_in_the_charts(tab: Tab, tmp_path: Path) -> None:
    history = make_history(4, 6)
    write(tmp_path, make_result(3, 30), history=history, phases=make_phases(history))
    tab.open(tmp_path / "index.html")
    charts = "[...document.querySelectorAll('#training .chart')]"
    tips = tab.run(f"{charts}.map(c => [...c.querySelectorAll('title')].map(t => t.textContent))")
    marks = ["phase_0 starts", "phase_1 starts"]
    for chart in tips[:2]:
        assert [tip for tip in chart if "starts" in tip] == marks
        assert len([tip for tip in chart if tip.startswith(("training, epoch", "validation, epoch"))]) == 20
        assert [tip for tip in chart if "best" in tip] == [f"best epoch of a phase: {epoch}" for epoch in (4, 10)]
    assert tips[2] == marks + [f"learning rate, epoch {epoch}: 0.001" for epoch in range(1, 11)]
