"""Which errors of a download end a command with 75."""

import pytest
import requests

from trainer.errors import Interrupted
from trainer.storage.download import translate_download_error


def translated(error: BaseException) -> Interrupted | None:
    return translate_download_error(error, "it failed", key="data.name", value="beans", fix="copy it")


def test_a_closed_port_is_interrupted_also_as_the_cause_of_another_error() -> None:
    with pytest.raises(requests.RequestException) as caught:
        requests.get("http://127.0.0.1:9", timeout=5, proxies={"http": ""})
    assert translated(caught.value) is not None
    outer = RuntimeError("TFDS failed")
    outer.__cause__ = caught.value
    result = translated(outer)
    assert result is not None
    assert (result.key, result.value, result.exit_code) == ("data.name", "beans", 75)
    assert str(result) == ("data.name=beans: it failed (TFDS failed); start the same command again; "
                           "without a network, copy it")  # fmt: skip


@pytest.mark.parametrize("error", [ImportError("no module"), PermissionError(13, "denied"), AssertionError("manual")])
def test_other_errors_are_not(error: Exception) -> None:
    assert translated(error) is None
