"""What `weights=` names, and loading it.

Published weights come from the Hugging Face hub (its cache first, then the network with a bounded wait), embedded ones
from the package. Under torch.distributed rank 0 decides for all.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hf_lopt.weights import formats, hub
from hf_lopt.weights.checks import Shapes, check
from hf_lopt.weights.formats import PROVENANCE, SAFETENSORS, THETA_STATE, Theta, content_sha256, velo_split
from hf_lopt.weights.published import PUBLISHED, Published


EMBEDDED = Path(__file__).parents[1] / "embedded"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_SUFFIXES = (".safetensors", ".state", ".msgpack", ".npz", ".pt", ".bin")
_WAYS_OUT = (
    "weights= takes 'auto', 'published', 'bundled', a hub id ('owner/name'), a path to a theta.state or .safetensors "
    "file, a folder with one, a pair of folders or hub ids (VeLO's RNN and MLP halves), or a mapping from theta path "
    "to array"
)

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
            multiplier, or the lr itself where the schedule is the caller's. None: the same as from scratch.
        finetune_settings: further settings that belong to `finetune_lr`.
    """

    theta: Theta
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
        ValueError: `spec` names nothing that can be loaded, a file is damaged, or leaves, shapes or values are wrong.
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
            raise ValueError(f"weights=<mapping>: {error}. {_WAYS_OUT}.") from error
        return _finish(theta, request, "mapping", "user")
    items = _items(spec)
    if items == ("bundled",):
        return _bundled(request)
    if items == ("published",):
        return _decided_by_rank_0(lambda: _published_or_error(request))
    if items == ("auto",):
        return _decided_by_rank_0(lambda: _auto(request))
    # By its spelling alone: a path may exist for some ranks only, and then not all would take part in the broadcast.
    if any(isinstance(item, str) and _is_hub_id(item) for item in items):
        return _decided_by_rank_0(lambda: _named(items, request))
    return _named(items, request)


def find(rule_name: str) -> list[Weights]:
    """The sets for a rule that are on this machine: the embedded one and published ones in the hub's cache.

    Never uses the network. A set that cannot be read is left out with a warning.
    """
    request = _Request(rule_name, None, 100.0, {}, deadline=0.0)
    found = []
    loaders = [lambda: _bundled(request)] if _embedded_file(rule_name).is_file() else []
    loaders += [lambda e=e, f=f: _read(f, request, e) for e, f in _cached_sets(rule_name)]
    for loader in loaders:
        try:
            found.append(loader())
        except ValueError as error:
            warnings.warn(f"hf_lopt: {error}", stacklevel=2)
    return found


# --- what a spec names


def _items(spec: Any) -> tuple[str | Path, ...]:
    items = tuple(spec) if isinstance(spec, (list, tuple)) else (spec,)
    for item in items:
        if not isinstance(item, (str, os.PathLike)) or not os.fspath(item):
            raise ValueError(f"weights={spec!r} ({type(item).__name__}) is not understood: {_WAYS_OUT}.")
    if len(items) not in (1, 2):
        raise ValueError(f"weights={spec!r} has {len(items)} parts; a split network has 2. {_WAYS_OUT}.")
    return tuple(item if isinstance(item, str) else Path(item) for item in items)


def _is_hub_id(item: str) -> bool:
    return _HUB_ID.fullmatch(item) is not None and not item.endswith(_FILE_SUFFIXES)


def _named(items: Sequence[str | Path], request: _Request) -> Weights:
    """Paths and hub ids, one or the two halves of one network."""
    for entry in PUBLISHED.get(request.rule, ()):
        if set(map(str, items)) <= set(entry.ids) and not any(Path(item).expanduser().exists() for item in items):
            try:
                return _read(_fetch_set(entry, request.deadline), request, entry)
            except hub.NotAvailable as error:
                raise ValueError(_not_available(items, error)) from error
    try:
        files = [file for item in items for file in _locate(item, request.deadline)]
        if len(files) == 1 and velo_split.lacks_other_half(files[0]):
            other = velo_split.other_half(str(items[0]))
            if other is None:
                raise ValueError(
                    f"weights={str(items[0])!r} holds one half of a network that is split in an RNN and an MLP. "
                    "Pass both: weights=(rnn, mlp)."
                )
            files += _locate(other if isinstance(items[0], str) else Path(other), request.deadline)
            items = (items[0], other)
    except hub.NotAvailable as error:
        raise ValueError(_not_available(items, error)) from error
    theta, absent = formats.read(files, bank_scale=request.bank_scale)
    beside = _beside(items, files[0], request.deadline) if absent else {}
    settings = {leaf: beside[leaf] for leaf in absent if leaf in beside}
    return _finish(theta, request, " + ".join(map(str, items)), "user", absent, settings)


def _beside(items: Sequence[str | Path], file: Path, deadline: float) -> dict[str, Any]:
    """The settings that `save` has put next to `file` for what its format has no room for; {} without any."""
    record = file.with_name(PROVENANCE)
    if not record.is_file() and isinstance(items[0], str) and _is_hub_id(items[0]) and not Path(items[0]).exists():
        try:
            record = hub.fetch(items[0], (PROVENANCE,), deadline)
        except hub.NotAvailable:  # published by other software
            return {}
    if not record.is_file():
        return {}
    try:
        settings = json.loads(record.read_text(encoding="utf-8"))["settings"]
        return {leaf: tuple(float(x) for x in xs) for leaf, xs in settings.items() if isinstance(xs, list)}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{record}: damaged: {error!r}. Copy it again, or delete it.") from error


def _not_available(items: Sequence[str | Path], error: Exception) -> str:
    names = " + ".join(map(str, items))
    return (
        f"weights={names!r}: no file or folder of that name is here, and as a hub id it cannot be had: {error}. Check "
        "the name, log in to the hub if the repository is private, or use weights='bundled'."
    )


def _locate(item: str | Path, deadline: float) -> list[Path]:
    """The files that one path or hub id stands for: one, or two for a folder with both halves of a split network."""
    path = Path(item).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _files_in(path)
    if isinstance(item, str) and _is_hub_id(item):
        return [hub.fetch(item, (THETA_STATE, SAFETENSORS), deadline)]
    raise ValueError(f"weights={str(item)!r}: no such file or folder. {_WAYS_OUT}.")


def _files_in(folder: Path) -> list[Path]:
    for name in (THETA_STATE, SAFETENSORS):
        if (folder / name).is_file():
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


def _embedded_file(rule_name: str) -> Path:
    return EMBEDDED / f"{rule_name}.safetensors"


def _bundled(request: _Request) -> Weights:
    file = _embedded_file(request.rule)
    if not file.is_file():
        names = ", ".join(sorted(f.stem for f in EMBEDDED.glob("*.safetensors"))) or "none"
        raise ValueError(f"no weights are embedded for the rule {request.rule!r} (embedded: {names}). {_WAYS_OUT}.")
    card = file.with_suffix(".json")
    record = json.loads(card.read_text(encoding="utf-8")) if card.is_file() else {}
    theta, absent = formats.read([file], bank_scale=request.bank_scale)
    weights = _finish(theta, request, f"bundled:{request.rule}", "bundled", absent, record.get("settings", {}))
    finetune = {key: record[key] for key in ("finetune_lr", "finetune_settings") if key in record}
    return replace(weights, **finetune)


def _published(request: _Request) -> Weights:
    """The first published set that can be had and read; cached ones before any network access."""
    reasons = []
    for entry, files in _cached_sets(request.rule):
        try:
            return _read(files, request, entry)
        except ValueError as error:
            reasons.append(str(error))
    for entry in PUBLISHED.get(request.rule, ()):
        try:
            return _read(_fetch_set(entry, request.deadline), request, entry)
        except hub.NotAvailable as error:
            reasons.append(f"{' + '.join(entry.ids)}: {error}")
            if error.scope == "hub":
                break
        except ValueError as error:
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
        warnings.warn(
            f"hf_lopt: {request.rule} runs on the weights embedded in the package ({weights.source}, sha256 "
            f"{weights.sha256[:12]}), which are NOT the published ones. Those were not used because: {reason}. "
            "weights='bundled' silences this warning; weights='published' makes it an error.",
            stacklevel=3,
        )
    return weights


def _read(files: Sequence[Path], request: _Request, entry: Published) -> Weights:
    theta, absent = formats.read(files, bank_scale=request.bank_scale)
    return _finish(theta, request, " + ".join(entry.ids), "published", absent, entry.settings)


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
            theta[leaf] = torch.tensor(settings[leaf], dtype=torch.float32)
        elif leaf in absent:
            theta[leaf] = torch.zeros(shape, dtype=torch.float32)
    check(theta, request.shapes, request.rule, source)
    return Weights(theta, source, content_sha256(theta), origin, settings)


# --- the hub


def _cached_sets(rule_name: str) -> list[tuple[Published, list[Path]]]:
    sets = ((entry, [hub.cached(repo, entry.file) for repo in entry.ids]) for entry in PUBLISHED.get(rule_name, ()))
    return [(entry, files) for entry, files in sets if None not in files]


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
