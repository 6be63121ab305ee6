"""The newest checkpoint of a Trainer that is complete.

``resume_from_checkpoint=True`` takes the folder with the highest number, also where a kill or a full disk left it half
written. Such a folder fails late, or loads in part.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

from hf_lopt import notices


_FOLDER = re.compile(r"checkpoint-(\d+)")
# Trainer writes it last.
_TRAINER_STATE = "trainer_state.json"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin", "*.index.json")
_INDEX = ".metadata"  # of a folder of torch.distributed.checkpoint


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint in the ``output_dir`` of a Trainer, for ``resume_from_checkpoint``.

    Complete means: the state of the Trainer, which is written last; weights; and all that the indices of the folder
    name, each file as long as its own header says. Numbers are not read. A warning names each newer folder that was
    passed over, and what it lacks. None if there is no complete one.
    """
    folder = Path(output_dir)
    found = [(int(match[1]), path) for path in _entries(folder) if (match := _FOLDER.fullmatch(path.name))]
    for _, path in sorted(found, reverse=True):
        problem = why_incomplete(path)
        if problem is None:
            return str(path)
        notices.warn(f"{path} is not a complete checkpoint and was passed over: {problem}")
    return None


def why_incomplete(checkpoint: str | Path) -> str | None:
    """What a checkpoint folder of a Trainer lacks, the first thing found; None for a complete one."""
    folder = Path(checkpoint)
    try:
        return next(_problems(folder), None)
    except OSError as error:
        return f"{error.filename or folder.name} cannot be read: {error.strerror or error}"


def _entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _problems(folder: Path) -> Iterator[str]:
    if not (folder / _TRAINER_STATE).is_file():
        yield f"it has no {_TRAINER_STATE}, which is written last"
    distributed = [path for path in _entries(folder) if path.name.startswith(("pytorch_model_fsdp", "optimizer_"))]
    if not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS) and not distributed:
        yield "it has no weights"
    for path in sorted(folder.glob("*.json")):
        yield from _problems_of_json(path)
    for path in sorted(folder.glob("*.safetensors")):
        yield from _problems_of_safetensors(path)
    for pattern in ("*.pt", "*.pth", "*.bin"):
        for path in sorted(folder.glob(pattern)):
            # torch.save writes the table of contents of its archive last.
            if not zipfile.is_zipfile(path):
                yield f"{path.name} is cut off or damaged"
    for path in sorted(distributed):
        yield from _problems_of_shards(path)


def _problems_of_json(path: Path) -> Iterator[str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        yield f"{path.name} is cut off or damaged"
        return
    if path.name == _TRAINER_STATE and not (isinstance(content, dict) and isinstance(content.get("global_step"), int)):
        yield f"{path.name} does not say how many steps were taken"
    if path.name.endswith(".index.json"):
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(shards, dict) or not shards:
            yield f"{path.name} names no files"
            return
        for name in sorted({str(shard) for shard in shards.values()}):
            if not (path.parent / name).is_file():
                yield f"{name} is missing, which {path.name} names"


def _problems_of_safetensors(path: Path) -> Iterator[str]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= size - 8 else None
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        whole = size == 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, struct.error):
        whole = False
    if not whole:
        yield f"{path.name} is cut off or damaged"


def _problems_of_shards(folder: Path) -> Iterator[str]:
    """Of a folder of torch.distributed.checkpoint, whose index is written after all shards."""
    from torch.distributed.checkpoint import FileSystemReader

    if not (folder / _INDEX).is_file():
        yield f"{folder.name} has no {_INDEX}, which is written last"
        return
    try:
        places = list(FileSystemReader(folder).read_metadata().storage_data.values())
        ends = [(str(place.relative_path), place.offset + place.length) for place in places]
    except Exception as error:  # an unpickler raises anything
        yield f"{folder.name}/{_INDEX} is cut off or damaged: {type(error).__name__}"
        return
    for name in sorted({name for name, _ in ends}):
        end = max(stop for other, stop in ends if other == name)
        if not (folder / name).is_file():
            yield f"{folder.name}/{name} is missing, which {_INDEX} names"
        elif (folder / name).stat().st_size < end:
            yield f"{folder.name}/{name} is cut off"
