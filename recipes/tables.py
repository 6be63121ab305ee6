"""Examples from the user's own files: named columns of CSV, TSV, JSON and JSON Lines."""

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from arguments import InputError


Example = TypeVar("Example")


def read_columns(path: str, **columns: str) -> list[tuple[str, ...]]:
    """Some columns of a CSV, TSV, JSON or JSON Lines file, as texts; the ending of its name tells which it is.

    Args:
        path: the file.
        columns: argument of the recipe that names the column -> name of the column, in the order of the results.

    Raises:
        InputError: no such file, an unknown ending, a damaged file, a missing column, an empty value.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"there is no file {path}")
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".json": _read_json, ".jsonl": _read_json}
    if file.suffix.lower() not in readers:
        raise InputError(f"{path}: the name must end in one of {', '.join(readers)}")
    try:
        rows = readers[file.suffix.lower()](file)
    except (csv.Error, ValueError) as error:  # among them JSONDecodeError and UnicodeDecodeError
        raise InputError(f"{path} cannot be read as {file.suffix.lower()[1:]}: {error}") from error
    examples = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(f"{path}, record {number}: expected an object with named fields, got {row!r:.60}")
        for option, column in columns.items():
            if column not in row:
                raise InputError(
                    f"{path}, record {number}: no column {column!r}, only {', '.join(map(repr, row))}; "
                    f"name the right one with --{option}"
                )
            if row[column] is None or not str(row[column]).strip():
                raise InputError(f"{path}, record {number}: the column {column!r} is empty")
        examples.append(tuple(str(row[column]) for column in columns.values()))
    if not examples:
        raise InputError(f"{path} holds no records")
    return examples


def _read_csv(file: Path) -> list[dict[str, str]]:
    # One field may be a whole document; the module's own limit is 128 KiB.
    csv.field_size_limit(1 << 30)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True))


def _read_json(file: Path) -> list[Any]:
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix.lower() == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    rows = json.loads(text)
    if not isinstance(rows, list):
        raise ValueError("expected a list of objects; one object per line goes into a .jsonl file")
    return rows


def hold_out(examples: Sequence[Example], at_most: int | None = None) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples: a random fifth is held out, `at_most` so many; the same ones every time."""
    shuffled = list(examples)
    random.Random(0).shuffle(shuffled)
    count = len(shuffled) // 5
    count = count if at_most is None else min(count, at_most)
    return shuffled[count:], shuffled[:count]
