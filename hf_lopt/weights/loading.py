"""What `weights=` names, and loading it.

Published weights come from the Hugging Face hub (its cache first, then the network with a bounded wait), embedded ones
from the package. Under torch.distributed rank 0 decides for all.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hf_lopt import notices
from hf_lopt.weights import formats, hub, locating, reading, records
from hf_lopt.weights.checks import Shapes, check, largest_file
from hf_lopt.weights.formats import PROVENANCE, Theta, content_sha256, velo_split
from hf_lopt.weights.published import PUBLISHED, Published


EMBEDDED = Path(__file__).parents[1] / "embedded"

_warned: set[str] = set()


@dataclass(frozen=True, eq=False)
class Weights:
    """Meta-trained weights, checked, with their origin.

    Attributes:
        theta: tree path of the JAX reference -> float32 CPU tensor, oriented (in, out).
        source: "bundled:velo", a hub id, a path, or "mapping".
        sha256: hex digest of the content (`content_sha256`), the same whatever file format it came from.
        origin: "published", "bundled" or "user".
        settings: hyperparameters that go with the weights and are not part of theta.
        finetune_lr: the lr for a pretrained model, where steps made for training from scratch are too large: a
            multiplier, or the lr itself where the schedule is the caller's. None: the rule's.
        finetune_settings: further settings that belong to `finetune_lr`.
    """

    theta: Theta = field(repr=False)
    source: str
    sha256: str
    origin: str
    settings: dict[str, Any] = field(default_factory=dict)
    finetune_lr: float | None = None
    finetune_settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Request:
    rule: str
    shapes: Shapes | None
    bank_scale: float
    settings: Mapping[str, Any]
    deadline: float

    @property
    def max_bytes(self) -> int:
        return reading.MAX_BYTES if self.shapes is None else min(reading.MAX_BYTES, largest_file(self.shapes))


def load(
    rule_name: str,
    spec: Any = "auto",
    shapes: Shapes | None = None,
    *,
    bank_scale: float = 100.0,
    settings: Mapping[str, Any] | None = None,
) -> Weights:
    """Load the meta-weights of a rule.

    Args:
        rule_name: the rule ("velo"); selects the published and the embedded sets.
        spec: "auto" (published when cached or the hub answers, else the embedded ones with one warning per process and
            rule), "published", "bundled", a hub id, a path to a file or folder in a published format, a pair of those
            for a network split in two (one is enough when the other is named alike), a mapping from theta path to
            array, or `Weights`.
        shapes: leaf -> shape. A dimension is a size, a symbol ("H") or a multiple of one ("4H"); a symbol has one size
            throughout. None skips the check.
        bank_scale: the optimizer's factor on the mean over its bank; see `formats.read`.
        settings: values that replace leaves of theta or go with it, such as {"momentum_decays": (a, b, c)}.

    Under torch.distributed with several ranks, "auto", "published" and hub ids are collective: every rank must call,
    rank 0 looks for the weights, and all get its result or its error.

    Raises:
        ValueError: `spec` names nothing that can be loaded, a file is damaged or is not what its record says, or
            leaves, shapes or values are wrong.
        OSError: a file cannot be read.
    """
    if not (math.isfinite(bank_scale) and bank_scale > 0):
        raise ValueError(f"bank_scale must be a positive number, got {bank_scale}")
    request = _Request(rule_name, shapes, float(bank_scale), dict(settings or {}), time.monotonic() + hub.TOTAL_S)
    if isinstance(spec, Weights):
        check(spec.theta, request.shapes, request.rule, spec.source)
        return spec
    if isinstance(spec, Mapping):
        try:
            theta = formats.flatten(spec)
        except ValueError as error:
            raise ValueError(f"weights=<mapping>: {error}. {locating.WAYS_OUT}.") from error
        return _finish(theta, request, "mapping", "user")
    items = locating.items_of(spec)
    if items == ("bundled",):
        return _bundled(request)
    if items == ("published",):
        return _decided_by_rank_0(lambda: _published_or_error(request))
    if items == ("auto",):
        return _decided_by_rank_0(lambda: _auto(request))
    # By its spelling alone: a path may exist for some ranks only, and then not all would take part in the broadcast.
    if any(isinstance(item, str) and locating.is_hub_id(item) for item in items):
        return _decided_by_rank_0(lambda: _named(items, request))
    return _named(items, request)


def find(rule_name: str) -> list[Weights]:
    """The sets for a rule that are on this machine: the embedded one and published ones in the hub's cache.

    Never uses the network. A set that cannot be read is left out with a warning.
    """
    request = _Request(rule_name, None, 100.0, {}, deadline=0.0)
    found = []
    loaders: list[Callable[[], Weights | None]] = []
    loaders += [lambda: _bundled(request)] if _embedded_file(rule_name).is_file() else []
    loaders += [lambda entry=entry: _cached(entry, request) for entry in PUBLISHED.get(rule_name, ())]
    for loader in loaders:
        try:
            weights = loader()
        except (ValueError, OSError, hub.NotAvailable) as error:
            notices.warn(f"hf_lopt: {error}")
        else:
            found += [weights] if weights is not None else []
    return found


# --- what a spec names


def _named(items: Sequence[str | Path], request: _Request) -> Weights:
    """Paths and hub ids, one or the two halves of one network."""
    for entry in PUBLISHED.get(request.rule, ()):
        if set(map(str, items)) <= set(entry.ids) and not any(locating.path_of(item).exists() for item in items):
            try:
                return _read(_fetch_set(entry, request.deadline), request, entry)
            except hub.NotAvailable as error:
                raise ValueError(_not_available(items, error)) from error
    try:
        files = [file for item in items for file in locating.files_of(item, request.deadline)]
        contents = _contents(files, request)
        if len(files) == 1 and formats.lacks_other_half(files[0], contents[files[0]]):
            other = _other_half(items[0])
            contents |= _contents(locating.files_of(other, request.deadline), request)
            items = (items[0], other)
    except hub.NotAvailable as error:
        raise ValueError(_not_available(items, error)) from error
    theta, absent, settings = _verified(contents, request, items)
    return _finish(theta, request, " + ".join(map(str, items)), "user", absent, settings)


def _other_half(item: str | Path) -> str | Path:
    other = velo_split.other_half(str(item))
    if other is None:
        raise ValueError(
            f"weights={str(item)!r} holds one half of a network that is split in an RNN and an MLP. "
            "Pass both: weights=(rnn, mlp)."
        )
    return other if isinstance(item, str) else Path(other)


def _contents(files: Sequence[Path], request: _Request) -> dict[Path, bytes]:
    """The files' contents, each read once: what is compared with its record is what is used."""
    contents: dict[Path, bytes] = {}
    for file in files:
        if file in contents:
            raise ValueError(f"{file} is named twice; a split network has two files.")
        contents[file] = reading.read_bytes(file, request.max_bytes)
        reading.check_blob(file, contents[file])
    # Before anything is made of them: that a file is not what was saved says more than what then does not fit.
    records.check_files(contents, records.beside(files))
    return contents


def _verified(
    contents: Mapping[Path, bytes], request: _Request, items: Sequence[str | Path] = ()
) -> tuple[Theta, tuple[str, ...], dict[str, Any]]:
    """Theta, the leaves that its format has no room for, and those of them that a record holds; compared with it."""
    files = list(contents)
    found = records.beside(files)
    records.check_files(contents, found)
    theta, format_ = formats.read(contents, bank_scale=request.bank_scale)
    absent = format_.absent if format_ is not None else ()
    fetched: dict[Path, dict[str, Any]] = {}
    if absent and not found and (fetched := _record_on_hub(items, request.deadline)):
        found = records.beside(files)  # the record came to lie there, if it is of the same revision
        records.check_files(contents, found)
    records.check_content(contents, found)
    settings: dict[str, Any] = {}
    for place, record in (found or fetched).items():
        if place.name == PROVENANCE:
            settings |= records.leaves(place, record, absent)
    return theta, absent, settings


def _record_on_hub(items: Sequence[str | Path], deadline: float) -> dict[Path, dict[str, Any]]:
    """The record of weights that were loaded by their hub id; {} without any."""
    if not (items and isinstance(items[0], str) and locating.is_hub_id(items[0])) or Path(items[0]).exists():
        return {}
    try:
        place = hub.fetch(items[0], (PROVENANCE,), deadline)
    except hub.NotAvailable:  # published by other software
        return {}
    return {place: reading.read_json(place)}


def _not_available(items: Sequence[str | Path], error: Exception) -> str:
    names = " + ".join(map(str, items))
    return (
        f"weights={names!r}: no file or folder of that name is here, and as a hub id it cannot be had: {error}. Check "
        "the name, log in to the hub if the repository is private, or use weights='bundled'."
    )


def _embedded_file(rule_name: str) -> Path:
    return EMBEDDED / f"{rule_name}.safetensors"


def _bundled(request: _Request) -> Weights:
    file = _embedded_file(request.rule)
    if not file.is_file():
        names = ", ".join(sorted(f.stem for f in EMBEDDED.glob("*.safetensors"))) or "none"
        raise ValueError(
            f"no weights are embedded for the rule {request.rule!r} (embedded: {names}). {locating.WAYS_OUT}."
        )
    place = file.with_suffix(".json")
    try:
        record = reading.read_json(place) if place.is_file() else {}
        theta, _ = formats.read(_contents([file], request), bank_scale=request.bank_scale)
        if "sha256" in record:
            records.check_theta(theta, record["sha256"], str(file), place)
    except ValueError as error:
        raise ValueError(f"embedded weights are not as they were shipped; install hf_lopt again: {error}") from error
    weights = _finish(theta, request, f"bundled:{request.rule}", "bundled", (), records.settings_of(record))
    finetune = {key: record[key] for key in ("finetune_lr", "finetune_settings") if key in record}
    return replace(weights, **finetune)


def _published(request: _Request) -> Weights:
    """The first published set that can be had and read; cached ones before any network access."""
    reasons = []
    for entry in PUBLISHED.get(request.rule, ()):
        try:
            weights = _cached(entry, request)
        except (ValueError, OSError, hub.NotAvailable) as error:
            reasons.append(str(error))
        else:
            if weights is not None:
                return weights
    for entry in PUBLISHED.get(request.rule, ()):
        try:
            return _read(_fetch_set(entry, request.deadline), request, entry)
        except hub.NotAvailable as error:
            reasons.append(f"{' + '.join(entry.ids)}: {error}")
            if error.scope == "hub":
                break
        except (ValueError, OSError) as error:
            reasons.append(str(error))
    raise hub.NotAvailable("; ".join(dict.fromkeys(reasons)) or "no published weights are known for this rule")


def _published_or_error(request: _Request) -> Weights:
    try:
        return _published(request)
    except hub.NotAvailable as error:
        raise ValueError(_no_published(request, error)) from error


def _no_published(request: _Request, error: Exception) -> str:
    ids = ", ".join(" + ".join(entry.ids) for entry in PUBLISHED.get(request.rule, ())) or "none known"
    return (
        f"the published weights of {request.rule!r} (hub ids: {ids}) cannot be had: {error}. Download them where "
        "there is a network (hf download ID) and pass the folder, or use weights='bundled'."
    )


def _auto(request: _Request) -> Weights:
    try:
        return _published(request)
    except hub.NotAvailable as error:
        if not _embedded_file(request.rule).is_file():
            raise ValueError(_no_published(request, error)) from error
        reason = str(error)
    weights = _bundled(request)
    if request.rule in PUBLISHED and request.rule not in _warned:
        _warned.add(request.rule)
        told = (
            f"hf_lopt: {request.rule} runs on the weights embedded in the package ({weights.source}, sha256 "
            f"{weights.sha256[:12]}), which are NOT the published ones. Those were not used because: {reason}. "
            "weights='bundled' silences this warning; weights='published' makes it an error."
        )
        if notices.is_collecting():
            notices.note(f"{request.rule} has embedded, not published weights", told)
        else:
            notices.warn(told)
    return weights


def _read(files: Sequence[Path], request: _Request, entry: Published) -> Weights:
    """A published set from the hub's cache.

    Raises:
        ValueError, OSError: naming the file, and that deleting it helps.
    """
    try:
        theta, absent, settings = _verified(_contents(files, request), request)
        return _finish(theta, request, " + ".join(entry.ids), "published", absent, {**settings, **entry.settings})
    except (ValueError, OSError) as error:
        # The library would link a blob again instead of downloading it, so it is the blob that has to go.
        blobs = " and ".join(os.path.realpath(file) for file in files)
        raise ValueError(f"{error} Delete {blobs} in the hub's cache, and it is downloaded again.") from error


# --- what is returned


def _finish(
    theta: Theta,
    request: _Request,
    source: str,
    origin: str,
    absent: Sequence[str] = (),
    published_settings: Mapping[str, Any] | None = None,
) -> Weights:
    settings = {**(published_settings or {}), **request.settings}
    for leaf, shape in (request.shapes or {}).items():
        if leaf in request.settings or (leaf in absent and leaf in settings):
            theta[leaf] = _leaf(leaf, settings[leaf])
        elif leaf in absent:
            theta[leaf] = torch.zeros(shape, dtype=torch.float32)
    check(theta, request.shapes, request.rule, source)
    return Weights(theta, source, content_sha256(theta), origin, settings)


def _leaf(name: str, value: Any) -> torch.Tensor:
    """A leaf that is given as a setting."""
    try:
        return torch.as_tensor(value, dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"the setting {name!r} must be numbers, got {str(value)[:80]}: {error}") from error


# --- the hub


def _cached(entry: Published, request: _Request) -> Weights | None:
    """A published set from the hub's cache alone; None if it is not there."""
    files = [hub.cached(repo, entry.file) for repo in entry.ids]
    there = [file for file in files if file is not None]
    return _read(there, request, entry) if len(there) == len(files) else None


def _fetch_set(entry: Published, deadline: float) -> list[Path]:
    return [hub.fetch(repo, (entry.file,), deadline) for repo in entry.ids]


# --- several ranks


def _decided_by_rank_0(make: Callable[[], Weights]) -> Weights:
    """`make()` on rank 0, its result or its error on every rank."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return make()
    outcome: list[Any] = [None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = make()
        except Exception as error:  # of any kind: the other ranks wait for the broadcast; raised again below
            failure = error
            outcome[0] = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if isinstance(outcome[0], str):
        raise ValueError(f"rank 0: {outcome[0]}")
    return outcome[0]
