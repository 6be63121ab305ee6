"""What stands beside saved weights, and whether they still are what it says.

`save` writes a record with the sha256 of the content and of each file. Records of meta-training and of the embedded
weights hold the first of them only.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_lopt.weights import formats
from hf_lopt.weights.formats import PROVENANCE
from hf_lopt.weights.reading import read_json


META_TRAINING = "meta_training.json"
_SETTING_ERRORS = (ValueError, TypeError, OverflowError)

# Path of a record -> what it says.
Records = Mapping[Path, Mapping[str, Any]]


def digest(content: bytes) -> str:
    """Hex sha256 of the bytes of a file."""
    return hashlib.sha256(content).hexdigest()


def beside(files: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """The records in the folders of some weight files, and in the folder above two halves of a split network.

    Raises:
        ValueError: a record is damaged.
        OSError: a record cannot be read.
    """
    folders = dict.fromkeys(file.parent for file in files)
    if len(folders) == 2 and len({folder.parent for folder in folders}) == 1:
        folders[files[0].parent.parent] = None
    places = [folder / name for folder in folders for name in (PROVENANCE, META_TRAINING)]
    found = {}
    for place in places:
        if os.path.lexists(place):
            record = read_json(place)
            if any(_lists(place, record, file) for file in files):
                found[place] = record
    return found


def _lists(place: Path, record: Mapping[str, Any], file: Path) -> bool:
    """Whether a record is about a file: it names it, or names none."""
    names = record.get("files")
    if names is None:
        return True
    if not isinstance(names, Mapping):
        raise ValueError(f"{place}: damaged: 'files' is {type(names).__name__}. Copy it again, or delete it.")
    return _name(place, file) in names


def _name(place: Path, file: Path) -> str:
    return file.relative_to(place.parent).as_posix() if file.is_relative_to(place.parent) else str(file)


def check_files(contents: Mapping[Path, bytes], records: Records) -> None:
    """Compare the bytes of files with the digests that records have of them.

    Raises:
        ValueError: naming the file, both digests and the way out.
    """
    for place, record in records.items():
        for file, content in contents.items():
            wanted = (record.get("files") or {}).get(_name(place, file))
            if wanted is not None and wanted != (found := digest(content)):
                raise ValueError(_mismatch(str(file), "file", found, wanted, place))


def check_content(contents: Mapping[Path, bytes], records: Records) -> None:
    """Compare the content of weights with the digest that records have of it.

    The records are those of `beside`. A bank that was stored with a factor other than the format's own is not what it
    was to the last bit, and is left to `check_files`.

    Raises:
        ValueError: naming the files, both digests and the way out.
    """
    where = " + ".join(map(str, contents))
    for place, record in records.items():
        wanted = record.get("sha256")
        if wanted is None:
            continue
        theta, format_ = formats.read(contents, bank_scale=formats.STORED_BANK_SCALE)
        if format_ is not None and format_.scales and settings_of(record).get("bank_scale", 100.0) != 100.0:
            continue
        absent = format_.absent if format_ is not None else ()
        if place.name != PROVENANCE and absent:
            continue
        theta |= {leaf: torch.tensor(xs, dtype=torch.float32) for leaf, xs in leaves(place, record, absent).items()}
        check_theta(theta, wanted, where, place)


def check_theta(theta: formats.Theta, wanted: Any, where: str, place: Path) -> None:
    """Compare the content of weights with the digest ``wanted`` of the record ``place``.

    Raises:
        ValueError: naming ``where``, both digests and the way out.
    """
    found = formats.content_sha256(theta)
    if found != wanted:
        raise ValueError(_mismatch(where, "content", found, wanted, place))


def _mismatch(where: str, what: str, found: str, wanted: Any, place: Path) -> str:
    return (
        f"{where}: damaged: the sha256 of the {what} is {found}, but {place} records {str(wanted)[:80]}. Copy or "
        f"download the whole folder again; if the weights were replaced on purpose, delete {place.name}."
    )


def settings_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings in a record of saved, embedded or meta-trained weights; {} without any."""
    config = record.get("config")
    settings = record.get("settings", config.get("settings") if isinstance(config, Mapping) else None)
    return settings if isinstance(settings, Mapping) else {}


def leaves(place: Path, record: Mapping[str, Any], absent: Iterable[str]) -> dict[str, tuple[float, ...]]:
    """Leaves of theta that a format has no room for and that a record holds as lists of numbers.

    Raises:
        ValueError: the record is damaged.
    """
    settings = record.get("settings", {})
    if not isinstance(settings, Mapping):
        raise ValueError(f"{place}: damaged: 'settings' is {type(settings).__name__}. Copy it again, or delete it.")
    try:
        return {leaf: tuple(float(x) for x in settings[leaf]) for leaf in absent if leaf in settings}
    except _SETTING_ERRORS as error:
        raise ValueError(f"{place}: damaged: {error!r}. Copy it again, or delete it.") from error
