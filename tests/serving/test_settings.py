"""The arguments of `python -m trainer.serve`."""

import pytest

from trainer.errors import ConfigError
from trainer.serving.settings import parse_settings


def test_values_get_the_type_of_their_setting() -> None:
    values = {"model": "outputs/a", "port": "8080", "window_ms": "0.5", "log_sample": "0.01", "name": "1"}
    settings = parse_settings(values, "/c")
    assert (settings.model, settings.port, settings.window_ms, settings.log_sample) == ("outputs/a", 8080, 0.5, 0.01)
    assert (settings.name, settings.cache_dir) == ("1", "/c")
    assert settings.host == "127.0.0.1"  # by default not reachable from other machines


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["batsh=3"], "batsh.*batch"),
        (["port=99999"], "port.*65535"),
        (["batch=many"], "batch=many: is not valid; use a whole number"),
        (["window_ms=nan"], "window_ms.*finite"),
        (["log_sample=2"], "log_sample.*equal to 1"),
        (["name=a/b"], "name.*pattern"),
        (["max_images=65", "queue=64"], "max_images=65: exceeds queue=64"),
        (["queue=0", "batch=0"], "(?s)batch.*queue"),
    ],
)
def test_every_error_is_reported(arguments: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_settings(dict(argument.split("=") for argument in ["model=a", *arguments]))
