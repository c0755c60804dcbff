"""The teacher that a run trains first (`distillation.teacher=train`), as a separate run in OUTPUT_DIR/teacher.

The teacher's run is trained, stopped and resumed like any other. When it is finished, the process replaces itself by a
new one with the same command, which begins the student's run: TensorFlow cannot be set up twice in one process.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from trainer.cluster.control import ControlChannel
from trainer.config.distillation import TRAIN, prefix_teacher_key, teacher_address
from trainer.config.schema import RequestedConfig, configure_teacher
from trainer.errors import ConfigError, TrainerError
from trainer.monitoring.log import log
from trainer.runs.folder import create_output_folder, inspect_folder, is_finished
from trainer.runs.publisher import DONE
from trainer.storage.path import storage_path


def choose_teacher_or_student(
    config: RequestedConfig, control: ControlChannel
) -> tuple[RequestedConfig, RequestedConfig | None]:
    """Decide whether this start trains the teacher or the run itself.

    All workers must call this; only the chief reads the folders. Errors in the student's output_dir are raised here,
    so that they are known before the teacher trains.

    Returns:
        The configuration of the run, and that of its teacher if this start must train it, else None. If the teacher
        trains first and output_dir was not set, a new folder is created, because the next start needs it too.

    Raises:
        ConfigError: output_dir has another run or other files, or `resume` does not allow the run.
    """
    teacher = configure_teacher(config)
    if teacher is None:
        return config, None
    if config.output_dir is None:
        config = config.model_copy(update={"output_dir": str(create_output_folder(config.experiment_name))})
        teacher = configure_teacher(config)
        assert teacher is not None
    elif (
        control.is_chief and config.resume == "must" and not (storage_path(config.output_dir) / "config.yaml").exists()
    ):
        config = config.model_copy(update={"resume": "auto"})  # resume=must then applies to the teacher's run
    if not control.broadcast("teacher to train", lambda: must_train(config, teacher)):
        return config, None
    log.info(f"teacher: trained first, as a run of its own: {teacher.output_dir}")
    return config, teacher


def must_train(config: RequestedConfig, teacher: RequestedConfig) -> bool:
    """Return whether the teacher of a run still has to be trained. Write nothing.

    Once the student has a checkpoint, a finished teacher is not trained further, even if its phases were extended.

    Args:
        config: the configuration of the student's run.
        teacher: that of the teacher's run, from `configure_teacher`.

    Raises:
        ConfigError: the student's run cannot use its output_dir, or the config.yaml of the teacher's run is invalid.
    """
    resumed_config, _ = inspect_folder(config)
    if resumed_config is not None and (storage_path(str(teacher.output_dir)) / DONE).exists():
        return False
    return not is_finished(teacher)


def locate_teacher(address: str, output_dir: str) -> str:
    """Return the address of a teacher: `address`, or OUTPUT_DIR/teacher if `address` is "train".

    Args:
        address: value of `distillation.teacher`.
        output_dir: that of the student's run.
    """
    return teacher_address(output_dir) if address == TRAIN else address


@contextmanager
def rename_teacher_keys() -> Iterator[None]:
    """Within the context, rename the keys in the errors of a teacher's run: `phases.x` -> `distillation.phases.x`.

    The configuration of that run has the keys of any run, but in the command they begin with `distillation`.
    """
    try:
        yield
    except TrainerError as error:
        for fault in (error, *(error.faults if isinstance(error, ConfigError) else ())):
            prefix_teacher_key(fault)
        raise
