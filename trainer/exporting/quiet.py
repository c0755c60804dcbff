"""LiteRT without what it says of every model."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager

from trainer.watching.chatter import without

# Of its converter and its interpreter.
_CHATTER = re.compile(r"^fully_quantize: \d|^INFO: Created TensorFlow Lite XNNPACK delegate")


def quiet() -> AbstractContextManager[None]:
    """Around a conversion or the making of an interpreter; every other line still reaches stderr."""
    return without(_CHATTER)
