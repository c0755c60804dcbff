"""Libraries in C++ talk on stderr past every logger of Python."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(chatter: re.Pattern[str]) -> Iterator[None]:
    """Leave out the lines in which `chatter` is found; all others reach stderr afterwards, also where it fails."""
    with tempfile.TemporaryFile() as heard:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(heard.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            heard.seek(0)
            for line in heard.read().decode(errors="replace").splitlines():
                if not chatter.search(line):
                    print(line, file=sys.stderr)
