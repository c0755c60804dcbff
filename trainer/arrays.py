"""Lossless serialization of named NumPy arrays, for checkpoints and for messages between workers."""

import io

import numpy as np


def pack(arrays: dict[str, np.ndarray]) -> bytes:
    """Serialize arrays by name as an uncompressed .npz."""
    out = io.BytesIO()
    np.savez(out, **arrays)  # type: ignore[arg-type]
    return out.getvalue()


def unpack(content: bytes) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz by name; pickled objects are refused (ValueError)."""
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
