"""Save the checkpoints of a run, and read them for all workers."""

from typing import Any

import numpy as np

from trainer.cluster.control import ControlChannel
from trainer.config.typed import argument
from trainer.errors import DataError
from trainer.monitoring.log import log
from trainer.runs.checkpoints import CheckpointFolder, inference_weights
from trainer.runs.folder import RunFolder
from trainer.runs.restarts import ATTEMPTS, RestartHistory
from trainer.training import variables


class Saver:
    """Saves and reads the checkpoints of one run, and holds its restart history.

    Only the chief accesses the disk. `newest` and `read_weights` broadcast what it reads, so all workers call them;
    `save` only records the step on other workers. `saved_step` is that of the newest checkpoint, 0 if there is none.
    """

    def __init__(self, folder: RunFolder, control: ControlChannel, keep: int) -> None:
        """`keep`: number of newest checkpoints that are retained (`runtime.keep_checkpoints`)."""
        self.path, self.address, self.publisher = folder.path, folder.address, folder.publisher
        self.control, self.saved_step = control, 0
        self.checkpoints = CheckpointFolder(folder.path / "checkpoints", keep, log.info)
        self.restarts = RestartHistory(folder.path / ATTEMPTS if control.is_chief else None, folder.is_new)

    def newest(self, resuming: bool) -> tuple[dict[str, Any] | None, dict[str, np.ndarray]]:
        """Broadcast state and variables of the newest intact checkpoint; None and {} if there is none.

        Without `resuming` (a new run) nothing is read.
        """
        newest = self.checkpoints.newest() if resuming and self.control.is_chief else None
        state = self.control.broadcast("state", lambda: newest[0] if newest else None)
        if state is None:
            return None, {}
        self.saved_step = state["step"]
        return state, self.control.broadcast_arrays("checkpoint", newest[1] if newest else {})

    def save(self, state: dict[str, Any], current: dict[str, Any], best_step: int | None) -> None:
        """Commit a checkpoint of the current variables (by name) on the local disk; publish it in the background.

        First wait until the previous checkpoint is published. `best_step` is the step of the best checkpoint so far.
        Raises the errors of `Publisher.wait` and `CheckpointFolder.save`.
        """
        self.saved_step = state["step"]
        if self.control.is_chief:
            self.publisher.wait()
            with self.control.committing():
                self.checkpoints.save(state, variables.copy_values(current), best_step)
            self.publisher.publish_checkpoints()

    def read_weights(self, step: int, last_step: int, names: list[str]) -> tuple[int, dict[str, np.ndarray]]:
        """Broadcast the model's variables `names` of a checkpoint, with averages (EMA) if any, and its step.

        If the checkpoint of `step` is damaged, that of `last_step` is read instead.
        """
        weights: dict[str, np.ndarray] = {}
        if self.control.is_chief:
            try:
                weights = inference_weights(self.checkpoints.read(step)[1])
            except DataError as error:
                if step == last_step:
                    raise
                log.info(f"{error.problem}; using the last checkpoint instead")
                step, weights = last_step, inference_weights(self.checkpoints.read(last_step)[1])
            weights = {name: weights[name] for name in names}
        step = self.control.broadcast("chosen", lambda: step)
        return step, self.control.broadcast_arrays("weights", weights)

    @property
    def resume_hint(self) -> str:
        """What the user can do after an interruption, for the `fix` of an error."""
        return f"Start the same command again with {argument('output_dir', self.address)} to resume"
