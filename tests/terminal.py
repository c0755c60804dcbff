"""Run a program on a pseudo-terminal, and emulate what the terminal then shows."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path

ROOT = Path(__file__).parents[1]


def screen(output: str, width: int) -> list[str]:
    """Return the lines that a terminal of `width` columns shows after `output`.

    Interprets carriage return, line feed, cursor up and erase line, and wraps long lines.
    """
    lines, row, column = [""], 0, 0
    for code, arguments, command, character in re.findall(r"(\x1b\[)([\d;?]*)([A-Za-z])|([\s\S])", output):
        if code:
            count = int(arguments or 1) if arguments.isdigit() or not arguments else 0
            if command == "A":
                row = max(row - count, 0)
            elif command == "K":
                lines[row] = ""
            continue
        if character == "\r":
            column = 0
        elif character == "\n":
            row, column = row + 1, 0
            lines += [""] * (row >= len(lines))
        else:
            if column == width:
                row, column = row + 1, 0
                lines += [""] * (row >= len(lines))
            lines[row] = lines[row].ljust(column)[:column] + character + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def on_terminal(command: list[str], width: int, cwd: Path = ROOT, code: int = 0) -> str:
    """Run a command on a terminal of this width, check its exit code, and return its output."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment |= {"PYTHONPATH": str(ROOT), "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    child = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment, cwd=cwd)
    os.close(slave)
    output = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # the terminal is closed
            break
        if not chunk:
            break
        output += chunk
    assert child.wait() == code, output.decode()
    return output.decode()
