"""The .keras file: to go on with in Keras, whatever its backend; the preprocessing is inside, and no code of ours."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from trainer.exporting.subject import Subject, plain


def export_keras(subject: Subject, path: Path) -> None:
    """Write `path` whole or not at all: float32 [n, S, S, 3] RGB in 0..255 -> probabilities, in float32.

    `keras.saving.load_model(path)` reads it in its safe mode, without a line of this package.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".keras-", dir=path.parent) as beside, plain(subject.model):
        subject.model.save(f"{beside}/{path.name}")
        os.replace(f"{beside}/{path.name}", path)
