"""Configure where XLA and the CUDA driver store compiled GPU programs, so that a restart does not compile them again.

TensorFlow and XLA read the environment variables when they start. Without a GPU none is set.
"""

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from trainer.monitoring.log import log

# TensorFlow's flags for programs that XLA has compiled: the folder, and the device types whose programs are stored
PROGRAMS_FLAG, DEVICES_FLAG = "--tf_xla_persistent_cache_directory", "--tf_xla_persistent_cache_device_types"
AUTOTUNING_FLAG = "--xla_gpu_per_fusion_autotune_cache_dir"
# Subfolders of the run's folder or of `cache_folder`. XLA and TensorFlow create them when they first compile a program.
PROGRAMS, AUTOTUNING = "compiled", "autotuning"


def list_gpus() -> tuple[str, ...]:
    """Query nvidia-smi for "NAME, COMPUTE CAPABILITY, DRIVER VERSION" of each GPU; () if it does not list any."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(filter(None, map(str.strip, output.splitlines())))


def choose_programs_folder(
    gpus: tuple[str, ...], folder: Path, deterministic: bool, environment: Mapping[str, str]
) -> Path | None:
    """Choose the folder below `folder` for the programs that XLA compiles.

    TensorFlow identifies a stored program by its code before compilation. The GPU, the driver, the version of
    TensorFlow, determinism and XLA's flags also affect the compiled program: each combination has its own folder.

    Returns:
        The folder; None if programs are not stored, because the user has configured another folder, or because the
        machine does not have exactly one GPU. (With several GPUs all replicas would load the program of one of them,
        which is untested.)
    """
    if len(gpus) != 1 or PROGRAMS_FLAG in environment.get("TF_XLA_FLAGS", ""):
        return None
    cache_key = [gpus[0], version("tensorflow"), deterministic, environment.get("XLA_FLAGS", "")]
    return folder / PROGRAMS / hashlib.sha256(json.dumps(cache_key).encode()).hexdigest()[:16]


def choose_variables(
    gpus: tuple[str, ...], programs: Path | None, autotuning: Path | None, cache_folder: Path,
    environment: Mapping[str, str],
) -> dict[str, str]:  # fmt: skip
    """Choose environment variables that let XLA and the CUDA driver store compiled programs and autotuning results.

    Flags are appended to those of the user, and folders that the user has set remain. Flags with a path that contains
    white space are omitted, because white space ends the value of a flag.

    Args:
        gpus: the GPUs of this machine, from `list_gpus`.
        programs: folder of XLA's compiled programs; None stores none.
        autotuning: folder of the results of autotuning; None stores none.
        cache_folder: parent of the folder `cuda` for the kernels that the CUDA driver compiles.
        environment: the current environment variables.

    Returns:
        New values by variable name; {} without GPUs.
    """
    if not gpus:
        return {}
    variables, flags = dict[str, str](), {"TF_XLA_FLAGS": list[str](), "XLA_FLAGS": list[str]()}
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


def is_complete(content: bytes) -> bool:
    """Return whether a stored program, an encoded protocol buffer, ends exactly at the end of its last field.

    A full disk or a crash of the machine can truncate the file, and TensorFlow fails in a training step when it reads a
    truncated program. Empty content is not complete.
    """

    def read_varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = content[at]
            value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
            if byte < 0x80:
                return value, at

    offset = 0
    try:
        while offset < len(content):
            tag, offset = read_varint(offset)
            value, after = read_varint(offset)  # of a length-delimited field, the length
            if tag >> 3 == 0 or tag & 7 not in (0, 2):  # the messages here have only numbers, strings and messages
                return False
            offset = after if tag & 7 == 0 else after + value
    except IndexError:
        return False
    return 0 < len(content) == offset


def set_compilation_cache(cache_folder: Path, run_folder: Path | None, deterministic: bool) -> None:
    """Set the environment variables of the compilation caches, and delete incomplete stored programs.

    Must be called before TensorFlow starts. The CUDA driver stores its kernels in `cache_folder`. If `cache_folder`
    cannot be written to, this logs a warning and sets nothing.

    Args:
        cache_folder: folder of this machine for caches.
        run_folder: local folder of the run, for programs and autotuning results: it is published to the bucket of the
            run, if there is one, so that a resumed run loads the same programs in another pod. None on workers other
            than the chief, which store them in `cache_folder`.
        deterministic: the run is deterministic, and XLA does no autotuning.
    """
    gpus, folder = list_gpus(), (run_folder or cache_folder).absolute()
    programs = choose_programs_folder(gpus, folder, deterministic, os.environ)
    autotuning = None if deterministic else folder / AUTOTUNING
    variables = choose_variables(gpus, programs, autotuning, cache_folder, os.environ)
    if not variables:
        return
    try:
        (cache_folder / "cuda").mkdir(parents=True, exist_ok=True)
        for file in programs.glob("*.pb") if programs else ():
            if not is_complete(file.read_bytes()):
                file.unlink()
        os.environ |= variables
    except OSError as error:
        log.warning(f"warning: compiled programs are not stored in {cache_folder}: {error}")
        return
    if programs and "TF_XLA_FLAGS" in variables:
        log.info(f"compiled programs: {len(list(programs.glob('*.pb')))} stored in {programs}")
