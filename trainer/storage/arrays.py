"""Serialize named NumPy arrays without loss, for files (checkpoints, labels) and for messages between workers."""

import io

import numpy as np


def pack(arrays: dict[str, np.ndarray]) -> bytes:
    """Serialize arrays by name to the bytes of an uncompressed .npz file."""
    out = io.BytesIO()
    np.savez(out, **arrays)  # type: ignore[arg-type]
    return out.getvalue()


def unpack(npz: bytes) -> dict[str, np.ndarray]:
    """Read the arrays by name; raise a ValueError if this is not an .npz file, or a checksum in it does not match."""
    try:
        with np.load(io.BytesIO(npz), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # damaged bytes raise errors of many classes, BadZipFile and EOFError among them
        raise ValueError(f"no arrays: {error}") from error
