"""Named NumPy arrays as bytes, exact: what checkpoints hold and workers send each other."""

import io

import numpy as np


def pack(arrays: dict[str, np.ndarray]) -> bytes:
    """Arrays by name as an uncompressed .npz."""
    out = io.BytesIO()
    np.savez(out, **arrays)  # type: ignore[arg-type]
    return out.getvalue()


def unpack(content: bytes) -> dict[str, np.ndarray]:
    """The reverse of `pack`; refuses pickled objects."""
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
