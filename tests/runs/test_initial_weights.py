"""A run that resumes needs neither the file of `model.weights` nor the source of `warm_start`."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.errors import raises
from tests.runs.test_folder import (
    FINGERPRINT,
    SAVED,
    close_folder,
    load_config,
    make_dataset,
    make_run_in_state,
    start_run,
)
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError, DataError
from trainer.runs.checkpoints import CheckpointFolder
from trainer.runs.folder import open_run_folder
from trainer.training.state import RunState


def write_weights(path: Path, content: int) -> None:
    path.write_bytes(b"x" * content)


def write_run(folder: Path, content: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    values = {"w": np.full(3, content, np.float32)}
    CheckpointFolder(folder / "checkpoints", 1, print).save(RunState(step=1).to_json(), values, None)


SOURCES = [("model.weights", write_weights), ("warm_start", write_run)]


@pytest.mark.parametrize(("key", "write"), SOURCES)
def test_initial_weights_are_compared_by_their_content_if_they_moved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str, write: Any
) -> None:
    def of(name: str) -> RunConfig:
        return load_config(tmp_path / "run", tmp_path / "cache", **{key.replace(".", "__"): str(tmp_path / name)})

    def check(config: RunConfig) -> None:
        folder = open_run_folder(config)
        try:
            folder.check_data(make_dataset(FINGERPRINT))
        finally:
            folder.abandon()
            close_folder(folder)

    write(tmp_path / "old.h5", 1)
    make_run_in_state(of("old.h5"), SAVED)
    write(tmp_path / "new.h5", 2)
    with raises(DataError, key, str(tmp_path / "new.h5"), "old.h5, which need not exist", "began with other weights"):
        check(of("new.h5"))
    write(tmp_path / "old.h5", 2)
    check(of("old.h5"))  # it is not read again
    write(tmp_path / "new.h5", 1)
    check(of("new.h5"))
    check(of("gone.h5"))
    logging.getLogger("trainer").propagate = True
    close_folder(start_run(of("gone.h5")))
    assert f"{key}: {tmp_path}/old.h5 -> {tmp_path}/gone.h5: not read, the weights are those of the" in caplog.text
    with raises(DataError, key, str(tmp_path / "new.h5"), problem="began with other weights"):
        write(tmp_path / "new.h5", 2)  # compared with those of the first start
        check(of("new.h5"))


@pytest.mark.parametrize(("key", "values"), [
    ("model.weights", ("/a.h5", "none")), ("model.weights", ("none", "/a.h5")), ("warm_start", ("/a", None)),
])  # fmt: skip
def test_other_kinds_of_initial_weights_are_rejected(tmp_path: Path, key: str, values: tuple[Any, Any]) -> None:
    before, now = (load_config(tmp_path / "run", tmp_path / "cache", **{key.replace(".", "__"): v}) for v in values)
    make_run_in_state(before, SAVED)
    with raises(ConfigError, "output_dir", problem=f"{key}: {values[0]} -> {values[1]}"):
        open_run_folder(now)
