"""Configure where XLA and the CUDA driver store compiled GPU programs, so that a restart does not compile them again.

TensorFlow and XLA read these environment variables when they start. On a machine without GPUs, no variable is set.
"""

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from trainer.monitoring.log import log

# TensorFlow's flags for the programs that XLA compiles: their folder, and the device types whose programs are stored
PROGRAMS_FLAG, DEVICES_FLAG = "--tf_xla_persistent_cache_directory", "--tf_xla_persistent_cache_device_types"
AUTOTUNING_FLAG = "--xla_gpu_per_fusion_autotune_cache_dir"  # XLA's flag for the folder of autotuning results
# Subfolders of the run's folder, or of the cache folder on workers other than the chief. XLA and TensorFlow create them
# when they first compile a program.
PROGRAMS_FOLDER, AUTOTUNING_FOLDER = "compiled", "autotuning"


def list_gpus() -> tuple[str, ...]:
    """Return "NAME, COMPUTE CAPABILITY, DRIVER VERSION" for each GPU; () if nvidia-smi lists no GPU or fails."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(filter(None, map(str.strip, output.splitlines())))


def choose_programs_folder(
    gpus: tuple[str, ...], folder: Path, deterministic: bool, environment: Mapping[str, str]
) -> Path | None:
    """Choose the subfolder of `folder` in which the programs that XLA compiles are stored.

    TensorFlow identifies a stored program only by its code before compilation. The GPU, the driver, TensorFlow's
    version, determinism and XLA's flags also affect the compiled program, so each combination has its own subfolder.

    Returns:
        The subfolder. None if programs are not stored there, because the user has configured another folder in
        TF_XLA_FLAGS, or because the machine does not have exactly one GPU. (With several GPUs, all replicas would load
        a program that was compiled for one of them, which is untested.)
    """
    if len(gpus) != 1 or PROGRAMS_FLAG in environment.get("TF_XLA_FLAGS", ""):
        return None
    cache_key = [gpus[0], version("tensorflow"), deterministic, environment.get("XLA_FLAGS", "")]
    return folder / PROGRAMS_FOLDER / hashlib.sha256(json.dumps(cache_key).encode()).hexdigest()[:16]


def choose_cache_variables(
    gpus: tuple[str, ...], programs: Path | None, autotuning: Path | None, cache_folder: Path,
    environment: Mapping[str, str],
) -> dict[str, str]:  # fmt: skip
    """Choose environment variables that let XLA and the CUDA driver store compiled programs and autotuning results.

    Flags are appended to the user's flags, and folders that the user has set are not changed. The new flags of a
    variable are omitted if one of them has a path with white space, because white space ends a flag's value.

    Args:
        gpus: the GPUs on this machine, from `list_gpus`.
        programs: folder for the programs that XLA compiles; if None, they are not stored.
        autotuning: folder for autotuning results; if None, they are not stored.
        cache_folder: parent of the folder `cuda`, which stores the kernels that the CUDA driver compiles.
        environment: the current environment variables.

    Returns:
        New values by variable name; {} if there are no GPUs.
    """
    if not gpus:
        return {}
    variables = dict[str, str]()
    flags = {"TF_XLA_FLAGS": list[str](), "XLA_FLAGS": list[str]()}
    if programs:
        # Programs for the CPU are not stored: they depend on its kind, and the folder may move to another machine.
        flags["TF_XLA_FLAGS"] += [f"{PROGRAMS_FLAG}={programs}", f"{DEVICES_FLAG}=GPU"]
    if autotuning and AUTOTUNING_FLAG not in environment.get("XLA_FLAGS", ""):
        flags["XLA_FLAGS"].append(f"{AUTOTUNING_FLAG}={autotuning}")
    for name, new_flags in flags.items():
        if new_flags and not any(len(flag.split()) > 1 for flag in new_flags):
            variables[name] = " ".join(filter(None, [environment.get(name, ""), *new_flags]))
    if "CUDA_CACHE_PATH" not in environment:
        variables["CUDA_CACHE_PATH"] = str(cache_folder / "cuda")
    return variables


def is_complete_program(content: bytes) -> bool:
    """Return whether a stored program is a complete protocol buffer: its last field ends where the content ends.

    A full disk or a crash of the machine can truncate the file, and TensorFlow fails in a training step when it reads a
    truncated program. Empty content is not complete.
    """

    def read_varint(position: int) -> tuple[int, int]:  # returns the integer at an offset, and the offset after it
        value = shift = 0
        while True:
            byte = content[position]
            value, shift, position = value | (byte & 0x7F) << shift, shift + 7, position + 1
            if byte < 0x80:
                return value, position

    offset = 0
    try:
        while offset < len(content):
            tag, offset = read_varint(offset)
            value, next_offset = read_varint(offset)  # `value` is the length if the field is length-delimited
            # Field number 0 is invalid. Stored programs have only integers (wire type 0), strings and messages (2).
            if tag >> 3 == 0 or tag & 7 not in (0, 2):
                return False
            offset = next_offset if tag & 7 == 0 else next_offset + value
    except IndexError:
        return False
    return 0 < len(content) == offset


def set_compilation_cache(cache_folder: Path, run_folder: Path | None, deterministic: bool) -> None:
    """Set the environment variables of the compilation caches, and delete truncated stored programs.

    Must be called before TensorFlow starts. If a folder cannot be read or written, a warning is logged and no variable
    is set.

    Args:
        cache_folder: folder for caches on this machine; the CUDA driver stores its kernels in its subfolder `cuda`.
        run_folder: the run's local folder, which stores XLA's programs and autotuning results. It is published to the
            run's bucket, if there is one, so that a resumed run loads the same programs in another pod. None on workers
            other than the chief; they store programs and results in `cache_folder`.
        deterministic: whether the run is deterministic; XLA's autotuning is then off, and its results are not stored.
    """
    gpus = list_gpus()
    folder = (run_folder or cache_folder).absolute()
    programs = choose_programs_folder(gpus, folder, deterministic, os.environ)
    autotuning = None if deterministic else folder / AUTOTUNING_FOLDER
    variables = choose_cache_variables(gpus, programs, autotuning, cache_folder, os.environ)
    if not variables:
        return
    try:
        (cache_folder / "cuda").mkdir(parents=True, exist_ok=True)
        for file in programs.glob("*.pb") if programs else ():
            if not is_complete_program(file.read_bytes()):
                file.unlink()
        os.environ |= variables
    except OSError as error:
        log.warning(f"warning: compiled programs are not stored in {cache_folder}: {error}")
        return
    if programs and "TF_XLA_FLAGS" in variables:
        log.info(f"compiled programs: {len(list(programs.glob('*.pb')))} stored in {programs}")
