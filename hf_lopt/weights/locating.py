"""From what a user writes as `weights=` to files: paths, folders and hub ids."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

from hf_lopt.weights import hub
from hf_lopt.weights.formats import PROVENANCE, SAFETENSORS, THETA_STATE


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_SUFFIXES = (".safetensors", ".state", ".msgpack", ".npz", ".pt", ".bin")
WAYS_OUT = (
    "weights= takes 'auto', 'published', 'bundled', a hub id ('owner/name'), a path to a theta.state or .safetensors "
    "file, a folder with one, a pair of folders or hub ids (VeLO's RNN and MLP halves), or a mapping from theta path "
    "to array"
)


def items_of(spec: Any) -> tuple[str | Path, ...]:
    """The one or two paths or hub ids of a spec; ValueError for anything else."""
    items = tuple(spec) if isinstance(spec, (list, tuple)) else (spec,)
    for item in items:
        if not isinstance(item, (str, os.PathLike)) or not isinstance(os.fspath(item), str) or not os.fspath(item):
            raise ValueError(f"weights={spec!r} ({type(item).__name__}) is not understood: {WAYS_OUT}.")
    if len(items) not in (1, 2):
        raise ValueError(f"weights={spec!r} has {len(items)} parts; a split network has 2. {WAYS_OUT}.")
    return tuple(item if isinstance(item, str) else Path(item) for item in items)


def is_hub_id(item: str) -> bool:
    """Whether a name is spelled as a hub id."""
    return _HUB_ID.fullmatch(item) is not None and not item.endswith(_FILE_SUFFIXES)


def path_of(item: str | Path) -> Path:
    """A path as the user wrote it, with "~" replaced."""
    try:
        return Path(item).expanduser()
    except RuntimeError as error:
        raise ValueError(f"weights={str(item)!r}: no such file or folder: {error} {WAYS_OUT}.") from error


def files_of(item: str | Path, deadline: float) -> list[Path]:
    """The files that one path or hub id stands for: one, or two for a folder with both halves of a split network."""
    path = path_of(item)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _files_in(path)
    if isinstance(item, str) and is_hub_id(item):
        names = (THETA_STATE, SAFETENSORS)
        is_new = not any(hub.cached(item, name) for name in names)
        file = hub.fetch(item, names, deadline)
        if is_new:
            # A record comes into the cache with the weights, and is compared from then on without the network.
            with contextlib.suppress(hub.NotAvailable):
                hub.fetch(item, (PROVENANCE,), deadline)
        return [file]
    raise ValueError(f"weights={str(item)!r}: no such file or folder. {WAYS_OUT}.")


def _files_in(folder: Path) -> list[Path]:
    for name in (THETA_STATE, SAFETENSORS):
        # A link that leads nowhere counts: the weights that were meant are not those beside it.
        if os.path.lexists(folder / name) and not (folder / name).is_dir():
            return [folder / name]
    singles = sorted(folder.glob("*.safetensors"))
    if len(singles) == 1:
        return singles
    halves = sorted(folder.glob(f"*/{SAFETENSORS}"))
    if len(halves) == 2:
        return halves
    raise ValueError(
        f"weights={str(folder)!r}: the folder has no {THETA_STATE}, no {SAFETENSORS} and no two subfolders with one. "
        "Name the file itself."
    )
