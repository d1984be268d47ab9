"""Standard output and error that may stop taking text: a log on a full disk, a pipe whose reader has gone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from io import TextIOWrapper
from typing import TextIO


def tell(text: str, stream: TextIO | None = None) -> None:
    """Prints a line at once, on `stream` or standard output. Where it is not taken, only the line is lost."""
    with suppress(OSError):
        print(text, file=stream or sys.stdout, flush=True)


def with_output(program: Callable[[], int]) -> int:
    """Runs `program` and returns its exit status; 1 after a line on standard error where standard output cannot be
    written. A reader that wants no more of it, as `head`, is no error."""
    _prepare_output()
    try:
        status = program()
    except SystemExit as leaving:  # of argparse
        sys.exit(_flushed(int(leaving.code or 0)))
    except OSError as error:
        if not _output_refuses():
            raise
        return _closed(error)
    return _flushed(status)


def _prepare_output() -> None:
    """Takes the place of streams that were closed before the program began, which no file shall take, and lets standard
    output show any name of a file, as standard error does."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _output_refuses() -> bool:
    try:
        print(flush=True)
    except OSError:
        return True
    return False


def _flushed(status: int) -> int:
    try:
        sys.stdout.flush()
    except OSError as error:
        return status or _closed(error)
    return status


def _closed(error: OSError) -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter, which flushes once more
    if isinstance(error, BrokenPipeError):
        return 0
    tell(f"rpg-fast: error: cannot write the output: {error.strerror}", sys.stderr)
    return 1
