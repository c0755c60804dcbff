"""Where XLA and the CUDA driver store what they compile for a GPU, so that a restarted run does not compile it again.

TensorFlow and XLA read the environment variables of this module when they start. On machines without a GPU none is set.
"""

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from trainer.monitoring.log import log

PROGRAMS_FLAG, DEVICES_FLAG = "--tf_xla_persistent_cache_directory", "--tf_xla_persistent_cache_device_types"
AUTOTUNING_FLAG = "--xla_gpu_per_fusion_autotune_cache_dir"
# Folders in that of a run. XLA and TensorFlow create them at the first compilation, after the run has begun.
PROGRAMS, AUTOTUNING = "compiled", "autotuning"


def list_gpus() -> tuple[str, ...]:
    """Query nvidia-smi for name, compute capability and driver of each GPU; () without GPUs or without nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(filter(None, map(str.strip, listed.splitlines())))


def choose_programs_folder(
    gpus: tuple[str, ...], folder: Path, deterministic: bool, environment: Mapping[str, str]
) -> Path | None:
    """Choose the folder below `folder` of the programs that XLA compiles; None if they are not stored.

    TensorFlow's key of a stored program has the program before compilation, but not the GPU, the driver, the version of
    XLA or its flags: they determine the folder. With several GPUs the replicas would load the program of one GPU, which
    has not been tried.
    """
    if len(gpus) != 1 or PROGRAMS_FLAG in environment.get("TF_XLA_FLAGS", ""):
        return None
    facts = [gpus[0], version("tensorflow"), deterministic, environment.get("XLA_FLAGS", "")]
    return folder / PROGRAMS / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def choose_variables(
    gpus: tuple[str, ...], programs: Path | None, autotuning: Path | None, cache_folder: Path,
    environment: Mapping[str, str],
) -> dict[str, str]:  # fmt: skip
    """Choose environment variables for folders of compiled programs and of results of autotuning; {} without GPUs.

    What the user has set is left as it is. A path with white space is not used: it would end the value of a flag.
    """
    if not gpus:
        return {}
    variables, flags = dict[str, str](), {"TF_XLA_FLAGS": list[str](), "XLA_FLAGS": list[str]()}
    if programs:
        # Programs for the CPU are not stored: they depend on its kind, and the folder may move to another machine.
        flags["TF_XLA_FLAGS"] += [f"{PROGRAMS_FLAG}={programs}", f"{DEVICES_FLAG}=GPU"]
    if autotuning and AUTOTUNING_FLAG not in environment.get("XLA_FLAGS", ""):
        flags["XLA_FLAGS"].append(f"{AUTOTUNING_FLAG}={autotuning}")
    for name, added in flags.items():
        if added and not any(len(flag.split()) > 1 for flag in added):
            variables[name] = " ".join(filter(None, [environment.get(name, ""), *added]))
    if "CUDA_CACHE_PATH" not in environment:
        variables["CUDA_CACHE_PATH"] = str(cache_folder / "cuda")
    return variables


def is_complete(content: bytes) -> bool:
    """Return whether the fields of an encoded protocol buffer end exactly at the end of `content`, which is not empty.

    TensorFlow ends a training step with an error if it reads a stored program that a full disk or the end of a machine
    has cut off.
    """

    def read_varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = content[at]
            value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
            if byte < 0x80:
                return value, at

    at = 0
    try:
        while at < len(content):
            tag, at = read_varint(at)
            length, after = read_varint(at)
            if tag >> 3 == 0 or tag & 7 not in (0, 2):  # the messages here have only numbers, texts and messages
                return False
            at = after if tag & 7 == 0 else after + length
    except IndexError:
        return False
    return 0 < len(content) == at


def set_compilation_cache(cache_folder: Path, run_folder: Path | None, deterministic: bool) -> None:
    """Set the environment variables before TensorFlow starts, and delete stored programs that are not complete.

    `run_folder` is the local folder of a run. Programs and results of autotuning are stored with its checkpoints, also
    in a bucket, so that a resumed run has the same programs in another pod; if it is None, on workers other than the
    chief, they are stored in `cache_folder`. With `deterministic`, XLA does no autotuning. Nothing is stored if
    `cache_folder` cannot be written to.
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
