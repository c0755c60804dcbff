"""The page in a real browser, on a laptop and on a phone: an image in, its classes and heatmap out."""

import base64
from pathlib import Path

import pytest

from tests.evaluation.browser import Tab
from tests.serving.images import photo
from tests.serving.running import Exported, Served

pytestmark = pytest.mark.browser

SCREENS = {"laptop": (1280, 800, False), "phone": (390, 844, True)}


def open_page(tab: Tab, served: Served, screen: str) -> None:
    width, height, phone = SCREENS[screen]
    tab.errors.clear()
    tab.requests.clear()
    tab.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
    tab.call("Page.navigate", url=f"{served.url}/")
    tab.until("document.readyState === 'complete' && document.getElementById('model').textContent !== ''")


def choose(tab: Tab, file: Path) -> None:
    node = tab.call("Runtime.evaluate", expression="document.getElementById('file')")["result"]["objectId"]
    tab.call("DOM.setFileInputFiles", files=[str(file)], objectId=node)


@pytest.mark.parametrize("screen", SCREENS)
def test_an_image_is_classified(tab: Tab, served: Served, exported: Exported, tmp_path: Path, screen: str) -> None:
    (file := tmp_path / "rose.png").write_bytes(photo(3, "PNG", 600, 400))
    open_page(tab, served, screen)
    choose(tab, file)
    tab.until("!document.getElementById('result').hidden")
    expected = exported.probabilities([file.read_bytes()])[0]
    assert tab.run("document.getElementById('best').textContent") == exported.names[expected.argmax()]
    rows = tab.run("[...document.querySelectorAll('#classes li')].map((row) => row.innerText.split('\\n').join(' '))")
    assert rows[0] == f"{exported.names[expected.argmax()]} {100 * expected.max():.1f} %"
    bars = tab.run("[...document.querySelectorAll('#classes i')].map((bar) => bar.getBoundingClientRect().width)")
    assert bars == sorted(bars, reverse=True)
    assert bars[0] > 10
    with_heat = tab.run("document.getElementById('canvas').toDataURL()")
    tab.run("document.getElementById('strength').value = 0")
    tab.run("document.getElementById('strength').dispatchEvent(new Event('input'))")
    assert tab.run("document.getElementById('canvas').toDataURL()") != with_heat
    assert tab.run("document.documentElement.scrollWidth <= innerWidth")
    assert tab.errors == []
    sent = {request.split("?")[0] for request in tab.requests if not request.startswith(("data:", "blob:"))}
    assert sent == {f"{served.url}/", f"{served.url}/predict"}


def test_an_error_is_shown_until_the_next_image(tab: Tab, served: Served, tmp_path: Path) -> None:
    (tmp_path / "no.jpg").write_bytes(b"hello")
    (tmp_path / "yes.jpg").write_bytes(photo())
    open_page(tab, served, "laptop")
    choose(tab, tmp_path / "no.jpg")
    tab.until("!document.getElementById('error').hidden")
    assert tab.run("document.getElementById('error').textContent").startswith("no.jpg is not an image")
    choose(tab, tmp_path / "yes.jpg")
    tab.until("!document.getElementById('result').hidden")
    assert tab.run("document.getElementById('error').hidden")


def test_an_image_may_be_dropped_anywhere(tab: Tab, served: Served) -> None:
    open_page(tab, served, "laptop")
    tab.run(f"""(() => {{
      const bytes = Uint8Array.from(atob("{base64.b64encode(photo()).decode()}"), (c) => c.charCodeAt(0));
      const carried = new DataTransfer();
      carried.items.add(new File([bytes], "dropped.jpg", {{type: "image/jpeg"}}));
      document.body.dispatchEvent(new DragEvent("drop", {{dataTransfer: carried, bubbles: true, cancelable: true}}));
    }})()""")
    tab.until("document.getElementById('note').textContent.startsWith('dropped.jpg, response in')")
