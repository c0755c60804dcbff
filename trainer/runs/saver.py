"""Save a run: checkpoints on the local disk, their publication in the background, and the restart history."""

from typing import Any

import numpy as np

from trainer.cluster.control import ControlChannel
from trainer.errors import DataError
from trainer.monitoring.log import log
from trainer.runs.checkpoints import CheckpointFolder, weights_of
from trainer.runs.folder import RunFolder
from trainer.runs.restarts import RestartHistory
from trainer.training import variables


class Saver:
    """Saves one run; only the chief writes, on the other workers every method returns at once.

    `saved_step` is the step of the newest checkpoint; `path` and `address` are those of the `RunFolder`.
    """

    def __init__(self, folder: RunFolder, control: ControlChannel, keep: int) -> None:
        """`keep`: number of newest checkpoints that are retained (`runtime.keep_checkpoints`)."""
        self.path, self.address, self.publisher = folder.path, folder.address, folder.publisher
        self.control, self.saved_step = control, 0
        self.checkpoints = CheckpointFolder(folder.path / "checkpoints", keep, log.info)
        self.restarts = RestartHistory(folder.path / "checkpoints" / "attempts.json" if control.is_chief else None)

    def newest(self, resuming: bool) -> tuple[dict[str, Any] | None, dict[str, np.ndarray]]:
        """State and variables of the newest checkpoint, or None and {}, on every worker; the chief reads them."""
        newest = self.checkpoints.newest() if resuming and self.control.is_chief else None
        state = self.control.broadcast("state", lambda: newest[0] if newest else None)
        if state is None:
            return None, {}
        self.saved_step = state["step"]
        return state, self.control.broadcast_arrays("checkpoint", newest[1] if newest else {})

    def save(self, state: dict[str, Any], live: dict[str, Any], best_step: int | None) -> None:
        """Commit a checkpoint of the `live` variables, by name, and publish it in the background."""
        self.saved_step = state["step"]
        if self.control.is_chief:
            self.publisher.wait()  # at most one checkpoint is unpublished
            with self.control.committing():
                self.checkpoints.save(state, variables.read(live), best_step)
            self.publisher.checkpoint()

    def read_weights(self, step: int, last_step: int, names: list[str]) -> tuple[int, dict[str, np.ndarray]]:
        """The step and the model's variables `names` of a checkpoint, averaged with EMA, on every worker.

        If the checkpoint is damaged, the one of `last_step` is used.
        """
        weights: dict[str, np.ndarray] = {}
        if self.control.is_chief:
            try:
                weights = weights_of(self.checkpoints.read(step)[1])
            except DataError as error:
                if step == last_step:
                    raise
                log.info(f"{error.problem}; using the last checkpoint instead")
                step, weights = last_step, weights_of(self.checkpoints.read(last_step)[1])
            weights = {name: weights[name] for name in names}
        step = self.control.broadcast("chosen", lambda: step)
        return step, self.control.broadcast_arrays("weights", weights)

    @property
    def resume_hint(self) -> str:
        return f"Start the same command again with output_dir={self.address} to resume"
