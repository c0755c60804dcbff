"""Decide whether to train the teacher first, as a separate run in OUTPUT_DIR/teacher (`distillation.teacher=train`).

The teacher's run is stopped and resumed like any other run. When it is finished, the process replaces itself with a new
one with the same command, which starts the student's run, because TensorFlow cannot be set up twice in one process.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from trainer.cluster.control import ControlChannel
from trainer.config.distillation import TRAIN_TEACHER, get_teacher_address, prefix_teacher_key
from trainer.config.schema import RequestedConfig, derive_teacher_config
from trainer.errors import ConfigError, TrainerError
from trainer.monitoring.log import log
from trainer.runs.folder import create_output_folder, inspect_folder, is_finished
from trainer.runs.publisher import DONE
from trainer.storage.path import storage_path


def choose_teacher_or_student(
    config: RequestedConfig, control: ControlChannel
) -> tuple[RequestedConfig, RequestedConfig | None]:
    """Decide whether this start (this process) trains the teacher or the student.

    All workers must call this; only the chief reads the folders. The student's output_dir is also checked, so that its
    errors are raised before the teacher is trained.

    Returns:
        The configuration of the student's run; and the configuration of the teacher's run if this start must train it,
        otherwise None. If output_dir is not set and a teacher must be trained, a new folder is created for both runs.

    Raises:
        ConfigError: output_dir contains another run or other files, or `resume` forbids this start.
    """
    teacher = derive_teacher_config(config)
    if teacher is None:
        return config, None
    if config.output_dir is None:
        config = config.model_copy(update={"output_dir": str(create_output_folder(config.experiment_name))})
        teacher = derive_teacher_config(config)
        assert teacher is not None
    elif (
        control.is_chief and config.resume == "must" and not (storage_path(config.output_dir) / "config.yaml").exists()
    ):
        config = config.model_copy(update={"resume": "auto"})  # resume=must applies only to the teacher's run
    if not control.broadcast("teacher to train", lambda: must_train(config, teacher)):
        return config, None
    log.info(f"teacher: trained first, as a run of its own: {teacher.output_dir}")
    return config, teacher


def must_train(config: RequestedConfig, teacher: RequestedConfig) -> bool:
    """Return whether a run's teacher still has to be trained. Write nothing.

    Once the student has a checkpoint, a finished teacher is not trained further, even if its phases were extended.

    Args:
        config: configuration of the student's run.
        teacher: configuration of the teacher's run, from `derive_teacher_config`.

    Raises:
        ConfigError: the student's run cannot use its output_dir, or the config.yaml of the teacher's run is invalid.
    """
    resumed_config, _ = inspect_folder(config)
    if resumed_config is not None and (storage_path(str(teacher.output_dir)) / DONE).exists():
        return False
    return not is_finished(teacher)


def locate_teacher(address: str, output_dir: str) -> str:
    """Return the teacher's storage path: `address`, or OUTPUT_DIR/teacher if `address` is "train".

    Args:
        address: value of `distillation.teacher`.
        output_dir: output_dir of the student's run.
    """
    return get_teacher_address(output_dir) if address == TRAIN_TEACHER else address


@contextmanager
def rename_teacher_keys() -> Iterator[None]:
    """Prefix the keys in TrainerErrors that are raised in this context: `phases.x` becomes `distillation.phases.x`.

    A teacher's run has the configuration keys of any run, but users set them with the prefix `distillation`.
    """
    try:
        yield
    except TrainerError as error:
        for reported_error in (error, *(error.errors if isinstance(error, ConfigError) else ())):
            prefix_teacher_key(reported_error)
        raise
