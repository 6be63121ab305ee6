"""What benchmarks keep in benchmarks/results/: final numbers in few digits, thin curves, pictures with a palette."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def rounded(value: Any, digits: int = 5) -> Any:
    """The same nested lists and dicts with every finite float rounded to ``digits`` significant digits."""
    if isinstance(value, Mapping):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) and math.isfinite(value) else value


def thinned(entries: Sequence[Any], at_most: int = 20) -> list[Any]:
    """Evenly spaced entries of a curve, the first and the last among them."""
    if len(entries) <= at_most:
        return list(entries)
    return [entries[round(k * (len(entries) - 1) / (at_most - 1))] for k in range(at_most)]


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    """Write :func:`record_text` into a file."""
    file.write_text(record_text(record), encoding="utf-8")


def record_text(record: Mapping[str, Any]) -> str:
    """JSON of six digits with a line for each entry of each part of ``record``: differences can be read."""
    record, parts = rounded(record, 6), []
    for name, part in record.items():
        start, end, entries = "", "", []
        if isinstance(part, Mapping):
            start, end, entries = "{", "}", [f"{json.dumps(key)}:{_compact(item)}" for key, item in part.items()]
        elif isinstance(part, list):
            start, end, entries = "[", "]", [_compact(item) for item in part]
        text = start + "\n" + ",\n".join(entries) + "\n" + end if entries else _compact(part)
        parts.append(f"{json.dumps(name)}:{text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def without_usual(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """``{"usual": ..., "runs": ...}``, where a value that more than half of the runs have stands once.

    Only keys that all runs have are looked at. :func:`whole_runs` gives ``runs`` again.
    """
    usual = {}
    for key in set.intersection(*(set(run) for run in runs.values())) if runs else ():
        text, count = Counter(_compact(run[key]) for run in runs.values()).most_common(1)[0]
        if 2 * count > len(runs):
            usual[key] = json.loads(text)
    usual = dict(sorted(usual.items()))
    rest = {
        name: {key: value for key, value in run.items() if key not in usual or value != usual[key]}
        for name, run in runs.items()
    }
    return {"usual": usual, "runs": rest}


def whole_runs(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The runs of a record, each with all of its values."""
    return {name: record.get("usual", {}) | run for name, run in record["runs"].items()}


def shared_by(runs: Mapping[str, Mapping[str, Any]], key: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """What all runs with one value of ``key`` have in common, by that value, and the runs without it."""
    shared: dict[str, dict[str, Any]] = {}
    for run in runs.values():
        before = shared.get(run[key])
        same = run if before is None else before
        shared[run[key]] = {k: x for k, x in same.items() if k != key and k in run and run[k] == x}
    rest = {name: {k: x for k, x in run.items() if k not in shared[run[key]]} for name, run in runs.items()}
    return shared, rest


def as_columns(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, list[Any]]]:
    """Lists of values by key, one dict for neighbours with the same keys. Undone by :func:`as_entries`."""
    groups = itertools.groupby(entries, key=tuple)
    rows = [(keys, list(of)) for keys, of in groups]
    return [{key: [entry[key] for entry in of] for key in keys} for keys, of in rows]


def as_entries(columns: Sequence[Mapping[str, Sequence[Any]]]) -> list[dict[str, Any]]:
    """The entries that :func:`as_columns` was given."""
    return [dict(zip(group, values, strict=True)) for group in columns for values in zip(*group.values(), strict=True)]


def use_palette(picture: Path, colours: int = 128) -> None:
    """Rewrite a PNG of lines and text with a palette instead of true colours: about a quarter of the bytes.

    128 colours keep the pale bands around the curves apart, and so does k-means; with 64 some change their hue.
    """
    from PIL import Image

    with Image.open(picture) as image:
        flat = image.convert("RGB").quantize(colours, kmeans=3, dither=Image.Dither.NONE)
    flat.save(picture, format="PNG", optimize=True)
