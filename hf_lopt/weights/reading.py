"""Reads whole files into memory, up to a limit of size, and JSON; every error names the file.

Files are read and not mapped: a mapped file that another process shortens kills the reader with a signal.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any, NoReturn


# What is read at most where the architecture, and with it a smaller limit, is not known.
MAX_BYTES = 1 << 30
MAX_JSON_BYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


def read_bytes(file: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a regular file.

    Raises:
        ValueError: not a regular file, larger than `max_bytes`, or changed while it was read.
        OSError: the file cannot be read.
    """
    try:
        # Without waiting: the other end of a pipe may never come.
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as opened:
            before = os.fstat(descriptor)
            if not stat.S_ISREG(before.st_mode):
                kind = "a folder" if stat.S_ISDIR(before.st_mode) else "not a regular file"
                raise ValueError(f"{file}: this is {kind}; a file is needed. Name the file itself.")
            if before.st_size > max_bytes:
                raise ValueError(
                    f"{file}: {before.st_size} bytes, but such a file has at most {max_bytes}. It is something else: "
                    "name the file of the weights."
                )
            content = opened.read(before.st_size + 1)  # one more than there should be, in case it grows
            after = os.fstat(descriptor)
    except OSError as error:
        if os.path.isdir(file):  # some systems do not open folders at all
            raise ValueError(f"{file}: this is a folder; a file is needed. Name the file itself.") from error
        raise type(error)(error.errno, error.strerror or str(error), str(file)) from error
    if len(content) != before.st_size or (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise ValueError(f"{file}: it changed while it was read. Try again when nothing writes to it.")
    return content


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: the file holds anything else.
        OSError: the file cannot be read.
    """
    content = read_bytes(file, MAX_JSON_BYTES)
    try:
        value = parse_json(content)
    except ValueError as error:
        raise ValueError(f"{file}: damaged: {error}. Copy it again, or delete it.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: damaged: {type(value).__name__} instead of an object. Copy it again, or delete it.")
    return value


def parse_json(content: bytes) -> Any:
    """A JSON value from UTF-8 text; ValueError also for names given twice, NaN and text that is nested too deep."""
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


def check_blob(file: Path, content: bytes) -> None:
    """Compare a file in the hub's cache with its name there, which is the sha256 of what the hub had.

    Raises:
        ValueError: they differ.
    """
    blob = Path(os.path.realpath(file))
    if blob.parent.name != "blobs" or not _SHA256.fullmatch(blob.name):
        return
    found = hashlib.sha256(content).hexdigest()
    if found != blob.name:
        raise ValueError(
            f"{file}: damaged: the sha256 of the file is {found}, but {blob.name} was downloaded. Delete {blob}, and "
            "it is downloaded again."
        )
