"""Save a run's checkpoints, and broadcast them to all workers."""

from typing import Any

import numpy as np

from trainer.cluster.control import ControlChannel
from trainer.config.typed import format_argument
from trainer.errors import DataError
from trainer.monitoring.log import log
from trainer.runs.checkpoints import CheckpointFolder, select_inference_weights
from trainer.runs.folder import RunFolder
from trainer.runs.restarts import ATTEMPTS_FILE, RestartHistory
from trainer.training import variables


class Saver:
    """Saves and reads the checkpoints of one run, and holds its restart history.

    Only the chief accesses the disk. All workers must call `broadcast_newest` and `broadcast_weights`. On workers other
    than the chief, `save` only records the step. `saved_step` is the step of the newest checkpoint; 0 if there is none.
    """

    def __init__(self, folder: RunFolder, control: ControlChannel, keep: int) -> None:
        """Create a saver for the run in `folder`. It retains the `keep` newest checkpoints."""
        self.path, self.address, self.publisher, self.folder = folder.path, folder.address, folder.publisher, folder
        self.control, self.saved_step = control, 0
        self.checkpoints = CheckpointFolder(folder.path / "checkpoints", keep, log.info)
        self.restarts = RestartHistory(folder.path / ATTEMPTS_FILE if control.is_chief else None, folder.is_new)
        self._newest: tuple[dict[str, Any] | None, dict[str, np.ndarray]] = None, {}

    def broadcast_newest(self, resuming: bool) -> bool:
        """Broadcast the newest intact checkpoint to all workers, for `take_newest`; return whether there is one.

        If `resuming` is False on the chief, because the run is new, no checkpoint is read or broadcast.
        """
        checkpoint = self.checkpoints.read_newest() if resuming and self.control.is_chief else None
        state = self.control.broadcast("state", lambda: checkpoint[0] if checkpoint else None)
        if state is None:
            return False
        self.saved_step = state["step"]
        self._newest = state, self.control.broadcast_arrays("checkpoint", checkpoint[1] if checkpoint else {})
        return True

    def take_newest(self) -> tuple[dict[str, Any] | None, dict[str, np.ndarray]]:
        """Return and release the state and the variables that `broadcast_newest` has broadcast; None and {} if none."""
        checkpoint, self._newest = self._newest, (None, {})
        return checkpoint

    def save(self, state: dict[str, Any], current_variables: dict[str, Any], best_step: int | None) -> None:
        """Commit a checkpoint to the local disk, and publish it in the background.

        Before that, waits until the previous checkpoint is published.

        Args:
            state: the run state, JSON-serializable.
            current_variables: the variables to save, by name.
            best_step: step of the best checkpoint so far; None if there is none.

        Raises:
            OSError: the disk is full or fails.
            Interrupted: the bucket does not respond, or the lease was lost.
        """
        self.saved_step = state["step"]
        if self.control.is_chief:
            self.publisher.wait()
            with self.control.committing():
                self.checkpoints.save(state, variables.copy_values(current_variables), best_step)
            self.publisher.publish_checkpoints()

    def broadcast_weights(self, step: int, last_step: int, names: list[str]) -> tuple[int, dict[str, np.ndarray]]:
        """Broadcast the weights of a checkpoint to all workers. Averages (EMA) replace them if the run computes any.

        Args:
            step: step of the checkpoint.
            last_step: step of the newest checkpoint, which is read instead if the one of `step` is missing or corrupt.
            names: names of the model variables to broadcast.

        Returns:
            The step of the checkpoint that was read, and the weights by name.

        Raises:
            DataError: neither of the two checkpoints is intact. Only raised on the chief.
        """
        weights: dict[str, np.ndarray] = {}
        if self.control.is_chief:
            try:
                weights = select_inference_weights(self.checkpoints.read(step)[1])
            except DataError as error:
                if step == last_step:
                    raise
                log.info(f"{error.problem}; using the last checkpoint instead")
                step, weights = last_step, select_inference_weights(self.checkpoints.read(last_step)[1])
            weights = {name: weights[name] for name in names}
        step = self.control.broadcast("chosen", lambda: step)
        return step, self.control.broadcast_arrays("weights", weights)

    @property
    def resume_hint(self) -> str:
        """The end of an interruption's message, which explains how to resume the run."""
        output_dir = self.folder.student_output_dir or self.address
        return f"Start the same command again with {format_argument('output_dir', output_dir)} to resume"
