"""Serialization of named NumPy arrays, for files (checkpoints, labels) and for messages between workers."""

import io

import numpy as np


def pack(arrays: dict[str, np.ndarray]) -> bytes:
    """Serialize named arrays to the bytes of an uncompressed .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def unpack(npz: bytes) -> dict[str, np.ndarray]:
    """Return the arrays in the bytes of an .npz file, by name.

    Raises:
        ValueError: `npz` is not an .npz file, contains pickled objects, or has a wrong checksum.
    """
    try:
        with np.load(io.BytesIO(npz), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # corrupt bytes raise many exception types, such as BadZipFile and EOFError
        raise ValueError(f"no arrays: {error}") from error
