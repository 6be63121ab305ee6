"""Examples from the user's own files: named columns of CSV, TSV, JSON and JSON Lines."""

import csv
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from arguments import InputError


Example = TypeVar("Example")


def read_columns(path: str, skip_empty: bool = False, **columns: str) -> list[tuple[str, ...]]:
    """Some columns of a CSV, TSV, JSON or JSON Lines file, as texts; the ending of its name tells which it is.

    Args:
        path: the file.
        skip_empty: leave records out whose text in one of the columns is empty, and say how many.
        columns: argument of the recipe that names the column -> name of the column, in the order of the results.

    Raises:
        InputError: no such file, an unknown ending, a damaged file, a missing column, an empty value, a row of a CSV
            with more fields than the header names.
    """
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".json": _read_json, ".jsonl": _read_json}
    examples, skipped = [], 0
    for number, row in _records(path, readers, columns):
        empty = False
        for column in columns.values():
            if row[column] is None or not str(row[column]).strip():
                empty = True
                if not skip_empty:
                    raise InputError(
                        f"{path}, record {number}: the column {column!r} is empty; --skip_empty leaves it out"
                    )
        if empty:
            skipped += 1
        else:
            examples.append(tuple(str(row[column]) for column in columns.values()))
    if not examples:
        raise InputError(f"{path} holds no records" + (f" but {skipped} with empty columns" if skipped else ""))
    if skipped:
        print(f"{path}: left out {skipped} of {skipped + len(examples)} records, which have empty columns")
    return examples


def read_lists(path: str, **columns: str) -> list[tuple[list[str], ...]]:
    """Some columns of a JSON or JSON Lines file, each a list of texts or numbers, which are read as texts.

    Args:
        path: the file.
        columns: argument of the recipe that names the column -> name of the column, in the order of the results.

    Raises:
        InputError: no such file, an unknown ending, a damaged file, a missing column, a value that is no list or an
            empty one.
    """
    found = []
    for number, row in _records(path, {".json": _read_json, ".jsonl": _read_json}, columns):
        for column in columns.values():
            if not isinstance(row[column], list) or not row[column]:
                raise InputError(
                    f"{path}, record {number}: the column {column!r} must be a list of one word or more, "
                    f"it is {row[column]!r:.60}"
                )
        found.append(tuple([str(value) for value in row[column]] for column in columns.values()))
    if not found:
        raise InputError(f"{path} holds no records")
    return found


def _records(
    path: str, readers: Mapping[str, Callable[[Path], list[Any]]], columns: Mapping[str, str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of a file by number, counted from 1, all with the ``columns``; ``readers``: ending -> reader.

    Raises:
        InputError: no such file, an unknown ending, a damaged file, a missing column.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"there is no file {path}")
    if file.suffix.lower() not in readers:
        raise InputError(f"{path}: the name must end in one of {', '.join(readers)}")
    try:
        rows = readers[file.suffix.lower()](file)
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}){_other_encoding(file)}") from error
    except (csv.Error, ValueError) as error:  # among them JSONDecodeError
        raise InputError(f"{path} cannot be read as {file.suffix.lower()[1:]}: {error}") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(f"{path}, record {number}: expected an object with named fields, got {row!r:.60}")
        for option, column in columns.items():
            if column not in row:
                raise InputError(
                    f"{path}, record {number}: no column {column!r}, only {', '.join(map(repr, row))}; "
                    f"name the right one with --{option}"
                )
        yield number, row


def _other_encoding(file: Path) -> str:
    """What to do about a file in another encoding: the one that it most likely has, and how to convert it."""
    data = file.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        name = words = "utf-16"
    elif any(0x80 <= byte < 0xA0 for byte in data):  # control characters in latin-1, which no text has
        name, words = "cp1252", "cp1252, Windows' form of latin-1"
    else:
        name = words = "latin-1"
    return f"; it looks like {words}: iconv -f {name} -t utf-8 {file} > {file.stem}-utf8{file.suffix} makes it UTF-8"


def _read_csv(file: Path) -> list[dict[str, str]]:
    # One field may be a whole document; the module's own limit is 128 KiB.
    csv.field_size_limit(1 << 30)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.DictReader(stream, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
        found = []
        for row in rows:
            if None in row:  # a separator in a text without quotes: all that follows would be in the wrong column
                names = rows.fieldnames or []
                raise InputError(
                    f"{file}, line {rows.line_num}: {len(names) + len(row[None])} fields, but the header names "
                    f"{len(names)} ({', '.join(names)}); a text that holds the separator needs quotes around it"
                )
            found.append(row)
        return found


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
