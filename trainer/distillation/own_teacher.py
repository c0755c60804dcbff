"""The teacher that a run trains itself (`distillation.teacher=train`): a run of its own in OUTPUT_DIR/teacher.

It is trained, stopped and resumed as any run. The start that finishes it replaces its process by one of the same
command, which then begins the student, since TensorFlow cannot be set up twice in one process.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from trainer.cluster.control import ControlChannel
from trainer.config.distillation import TRAIN, name_key_of_teacher, teacher_address
from trainer.config.schema import RequestedConfig, configure_teacher
from trainer.errors import ConfigError, TrainerError
from trainer.monitoring.log import log
from trainer.runs.folder import create_output_folder, inspect_folder, is_finished
from trainer.runs.publisher import DONE
from trainer.storage.path import storage_path


def choose_run(config: RequestedConfig, control: ControlChannel) -> tuple[RequestedConfig, RequestedConfig | None]:
    """Return the configuration of the run, and that of its teacher if this start must train it; else None.

    A run without an output_dir gets a new one, which both starts need. All workers must call this; only the chief
    reads the folders.

    Raises:
        ConfigError: output_dir has another run or other files. It is raised before the teacher trains.
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
        config = config.model_copy(update={"resume": "auto"})  # the run that must exist is that of the teacher
    if not control.broadcast("teacher to train", lambda: must_train(config, teacher)):
        return config, None
    log.info(f"teacher: trained first, as a run of its own: {teacher.output_dir}")
    return config, teacher


def must_train(config: RequestedConfig, teacher: RequestedConfig) -> bool:
    """Return whether the teacher of a run is unfinished. Write nothing.

    Once the student has a checkpoint, a finished teacher is used as it is, even if the run is extended.

    Raises ConfigError if the run cannot use its output_dir.
    """
    begun, _ = inspect_folder(config)
    if begun is not None and (storage_path(str(teacher.output_dir)) / DONE).exists():
        return False
    return not is_finished(teacher)


def locate_teacher(address: str, output_dir: str) -> str:
    """Return the address of the teacher that is configured as `address` for the run in `output_dir`."""
    return teacher_address(output_dir) if address == TRAIN else address


@contextmanager
def keys_of_teacher() -> Iterator[None]:
    """Name the keys in an error of the teacher's run as they are written in the command."""
    try:
        yield
    except TrainerError as error:
        for fault in (error, *(error.faults if isinstance(error, ConfigError) else ())):
            name_key_of_teacher(fault)
        raise
