"""The default of `runtime.disk_budget_gb` follows from the free disk and from the limit of the pod."""

import shutil
from pathlib import Path

import pytest

from tests.errors import raises
from trainer.errors import ConfigError
from trainer.storage import disk
from trainer.storage.disk import DEFAULT_CACHE_LIMIT_BYTES, choose_disk_budget, plan_disk_budget

GIB = 2**30


@pytest.mark.parametrize(
    ("requested", "available", "limit", "budget", "reason"),
    [
        (7 * GIB, GIB, GIB, 7 * GIB, "as configured"),
        (0, 900 * GIB, None, 0, "as configured"),
        (None, 900 * GIB, None, 50 * GIB, "the default"),
        (None, 44 * GIB, None, 44 * GIB * 2 // 5, "two fifths of the free disk, 47.2 GB"),
        (None, 900 * GIB, 40 * GIB, 16 * GIB, "two fifths of the pod's limit, 42.9 GB"),
        (None, 10 * GIB, 40 * GIB, 4 * GIB, "two fifths of the free disk, 10.7 GB"),
        (None, 0, None, 0, "two fifths of the free disk, 0.0 GB"),
    ],
)
def test_the_plan(requested: int | None, available: int, limit: int | None, budget: int, reason: str) -> None:
    assert plan_disk_budget(requested, available, limit) == (budget, reason)


def test_both_caches_fit_a_default_disk_of_44_gib() -> None:
    budget, _ = plan_disk_budget(None, 44 * GIB, None)
    assert 2 * budget < 44 * GIB


def test_bytes_that_caches_already_use_count_as_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the budget of a resumed run would be lower than that of its first start, which filled the cache."""
    monkeypatch.delenv("EPHEMERAL_STORAGE_BYTES", raising=False)
    free = shutil.disk_usage(tmp_path).free
    monkeypatch.setattr(disk, "get_free_bytes", lambda _: min(free, GIB))
    before, _ = choose_disk_budget(None, tmp_path / "cache")
    (tmp_path / "filled" / "features").mkdir(parents=True)
    (tmp_path / "filled" / "features" / "x").write_bytes(b"x" * 10_000_000)
    after, _ = choose_disk_budget(None, tmp_path / "filled")
    assert after - before == pytest.approx(4_000_000, rel=0.01)
    assert before < after < DEFAULT_CACHE_LIMIT_BYTES


def test_the_limit_of_the_pod_is_read_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPHEMERAL_STORAGE_BYTES", "1000000")
    assert choose_disk_budget(None, tmp_path / "a") == (400_000, "two fifths of the pod's limit, 0.0 GB")
    monkeypatch.setenv("EPHEMERAL_STORAGE_BYTES", "40Gi")
    with raises(ConfigError, key="EPHEMERAL_STORAGE_BYTES", value="40Gi", problem="not a number of bytes", fix="down"):
        choose_disk_budget(None, tmp_path / "b")
