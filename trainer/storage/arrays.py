"""Serialize named NumPy arrays without loss, for files (checkpoints, labels) and for messages between workers."""

import io

import numpy as np


def pack(arrays: dict[str, np.ndarray]) -> bytes:
    """Serialize named arrays to the bytes of an uncompressed .npz file."""
    out = io.BytesIO()
    np.savez(out, **arrays)  # type: ignore[arg-type]
    return out.getvalue()


def unpack(npz: bytes) -> dict[str, np.ndarray]:
    """Deserialize arrays by name. Raises ValueError if this is not an .npz file or a checksum does not match."""
    try:
        with np.load(io.BytesIO(npz), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # corrupt bytes raise many exception types, such as BadZipFile and EOFError
        raise ValueError(f"no arrays: {error}") from error
