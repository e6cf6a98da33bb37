"""What goes wrong on the emulated device, each with the lines of this repository that it is in."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[2]) + "/"
HERE = str(Path(__file__).parent)

problems = []


def report(problem):
    problems.append(f"{problem}, at {place()}")
    return problems[-1]


def taken():
    """All problems once, which are forgotten."""
    found = list(dict.fromkeys(problems))
    problems.clear()
    return found


def place():
    """The innermost lines of this repository that are at work."""
    lines, frame = [], sys._getframe(1)
    while frame is not None and len(lines) < 4:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and not name.startswith(HERE):
            lines.append(f"{name.removeprefix(ROOT)}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines) or "no line of this repository"
