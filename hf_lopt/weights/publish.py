"""Saves meta-weights to a folder and to the Hugging Face hub, together with where they come from."""

from __future__ import annotations

import json
import math
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub  # its names are loaded when they are used: those for uploads are slow to import
import torch
from huggingface_hub import constants
from huggingface_hub.utils import validate_repo_id

from hf_lopt import notices
from hf_lopt.weights import formats, hub, records
from hf_lopt.weights.formats import PROVENANCE, SAFETENSORS, THETA_STATE, Theta, flax, safetensors_file
from hf_lopt.weights.formats.theta import BANK


FORMATS = ("theta_state", "safetensors", "published")
README = "README.md"

# Settings of a run, which do not go with the weights.
_OF_A_RUN = (
    *("lr", "weights", "weight_decay", "num_training_steps", "max_training_steps", "max_nonfinite_steps"),
    "stochastic_rounding",
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class _Set:
    """What is to be written."""

    theta: Theta
    rule: str | None
    source: str
    origin: str
    settings: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)  # of the constructor, where not the default

    @property
    def sha256(self) -> str:
        return formats.content_sha256(self.theta)


def save(
    source: Any,
    folder: str | os.PathLike,
    *,
    format: str = "theta_state",
    rule: str | None = None,
    settings: Mapping[str, Any] | None = None,
    license: str | None = None,
) -> list[Path]:
    """Write meta-weights to ``folder``, for ``weights=folder`` and for the software that made the format.

    Beside the weights a small ``hf_lopt.json`` says which rule they are of, where they come from, their content hash
    and the settings that belong to them. Each file is replaced as a whole. Call it on one rank.

    Args:
        source: an optimizer of this package, `Weights`, or a mapping from theta path to array.
        folder: made if it is not there.
        format: "theta_state" (flax msgpack, as the JAX repositories publish), "safetensors" (the same tree in one
            safetensors file) or "published" (``config.json`` and ``model.safetensors`` of the PyTorch packages; VeLO
            is split in the subfolders ``rnn`` and ``mlp``, small_fc has no room for its decay offsets, which are in
            ``hf_lopt.json`` only).
        rule: name of the rule; an optimizer knows its own.
        settings: figures that go with the weights, such as {"bank_scale": 1.0}; an optimizer knows its own.
        license: identifier such as "apache-2.0"; None: not stated, unless the weights are those of this package.

    Returns:
        the files written.

    Raises:
        ValueError: for a source, format or architecture that cannot be written, values that are not finite, and a
            folder that holds other weights, which a reader could take instead.
    """
    what = _collect(source, rule, settings)
    files = _files(what, format, license)
    try:
        folder = Path(folder).expanduser()
    except RuntimeError as error:
        raise ValueError(f"cannot save to the folder {str(folder)!r}: {error}") from error
    _refuse_others((p.relative_to(folder).as_posix() for p in _weight_files(folder)), files, f"the folder {folder}")
    return _write(folder, files)


def push_to_hub(
    source: Any,
    repo_id: str,
    *,
    format: str = "theta_state",
    rule: str | None = None,
    settings: Mapping[str, Any] | None = None,
    license: str | None = None,
    metrics: Mapping[str, float | int | str] | None = None,
    description: str = "",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> dict[str, str]:
    """Upload meta-weights and a generated model card to the hub, for ``weights=repo_id``. Call it on one rank.

    The repository is made if it is not there; weights and ``README.md`` of an earlier upload are replaced. VeLO in
    ``format="published"`` goes to two repositories, ``repo_id + "_RNN"`` and ``repo_id + "_MLP"``. Machines that have
    an earlier upload in their cache go on using it.

    ``source``, ``format``, ``rule``, ``settings`` and ``license`` are as in :func:`save`; ``private``, ``token``,
    ``revision`` and ``commit_message`` as in ``huggingface_hub.HfApi.create_repo`` and ``create_commit``.

    Args:
        repo_id: the repository, with or without the user's name.
        metrics: name -> number or text, for the table of results in the card.
        description: a paragraph for the card.

    Returns:
        repository -> URL of the commit.

    Raises:
        ValueError: as :func:`save`; for a bad repository name or metric.
        huggingface_hub.errors.HfHubHTTPError: if the hub refuses.
    """
    what = _collect(source, rule, settings)
    results = _table(metrics or {})
    license = license or _own_license(what)
    api = huggingface_hub.HfApi(endpoint=constants.ENDPOINT, token=token, library_name="hf_lopt")
    parts = _repositories(repo_id, _files(what, format, license))
    for name in parts:
        validate_repo_id(name)
    commits = {}
    for name, files in parts.items():
        # The full name, with the user's where it was left out.
        name = api.create_repo(name, private=private, exist_ok=True).repo_id
        there = (file for file in api.list_repo_files(name, revision=revision) if _is_weights(PurePosixPath(file)))
        _refuse_others(there, files, f"the repository {name}")
        card = _model_card(what, name, files, license=license, results=results, description=description)
        files = files | {README: card.encode()}
        commit = api.create_commit(
            name,
            [huggingface_hub.CommitOperationAdd(path, content) for path, content in files.items()],
            commit_message=commit_message or f"Upload {what.rule or 'learned optimizer'} weights",
            revision=revision,
        )
        hub.forget(name)
        commits[name] = str(commit.commit_url)
    return commits


# --- what is written


def _collect(source: Any, rule: str | None, settings: Mapping[str, Any] | None) -> _Set:
    # AcceleratedOptimizer and its like hold the optimizer they wrap.
    while not isinstance(source, Mapping) and not hasattr(source, "weights") and hasattr(source, "optimizer"):
        source = source.optimizer
    stored: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    if hasattr(source, "weights") and hasattr(source, "rule"):
        kept = source.rule.defaults.keys() - {*_OF_A_RUN, *source.rule.per_group}
        group = source.param_groups[0]
        stored = {key: group[key] for key in source.rule.defaults if key in kept}
        arguments = {key: value for key, value in stored.items() if value != source.rule.defaults[key]}
        if rule not in (None, source.rule.name):
            raise ValueError(f"rule={rule!r}, but the optimizer is {source.rule.name!r}: leave rule out")
        rule, source = source.rule.name, source.weights
    if isinstance(source, Mapping):
        theta, origin, name = formats.flatten(source), "user", "mapping"
    elif hasattr(source, "theta"):
        theta, origin, name = formats.flatten(source.theta), source.origin, source.source
        stored = {**source.settings, **stored}
    else:
        raise ValueError(
            f"cannot save {type(source).__name__}: pass an optimizer of hf_lopt, its weights, or a mapping from theta "
            "path to array"
        )
    if not theta:
        raise ValueError("there is nothing to save: the mapping is empty")
    for leaf, value in theta.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"leaf {leaf!r} has values that are NaN or infinite; such weights cannot be loaded again")
    settings = {key: _plain(key, value) for key, value in {**stored, **(settings or {})}.items()}
    arguments |= {key: value for key, value in settings.items() if key not in theta and key not in stored}
    return _Set(theta, rule, _public(name), origin, settings, arguments)


def _plain(key: str, value: Any) -> Any:
    """A setting as JSON holds it."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(key, item) for item in value]
    if isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(f"setting {key!r} must be finite numbers, text or lists of them, got {value!r}")


def _public(source: str) -> str:
    """``source`` without the folders of this machine."""

    def shorten(part: str) -> str:
        return part if _HUB_ID.fullmatch(part) and not Path(part).exists() else Path(part).name

    return " + ".join(map(shorten, source.split(" + ")))


def _own_license(what: _Set) -> str | None:
    return "apache-2.0" if what.origin == "bundled" else None


def _files(what: _Set, format: str, license: str | None) -> dict[str, bytes]:
    """Relative path -> content."""
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    absent: tuple[str, ...] = ()
    if format == "theta_state":
        files = {THETA_STATE: flax.write(what.theta)}
    elif format == "safetensors":
        if not any("/" in leaf for leaf in what.theta):
            raise ValueError(f"format='safetensors' needs theta paths such as 'nn/~/w0', got {', '.join(what.theta)}")
        files = {SAFETENSORS: safetensors_file.write(what.theta)}
    else:
        bank_scale = float(what.settings.get("bank_scale", 100.0))
        files, absent = formats.write_published(what.theta, bank_scale=bank_scale)
    absent = tuple(leaf for leaf in absent if leaf in what.theta)
    beside = {leaf: what.theta[leaf].tolist() for leaf in absent}
    lost = [leaf for leaf in absent if what.theta[leaf].any()]
    if lost:
        notices.warn(
            f"this folder format has no room for {', '.join(lost)}: they are in {PROVENANCE}, where hf_lopt finds "
            "them; other software has to be given them",
        )
    record = {
        "rule": what.rule,
        "sha256": what.sha256,
        "files": {name: records.digest(content) for name, content in files.items()},
        "source": what.source,
        "origin": what.origin,
        "licence": license or _own_license(what),
        "settings": what.settings | beside,
        "sizes": sizes(what.theta),
    }
    return files | {PROVENANCE: _json(record)}


def _json(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=2) + "\n").encode()


def sizes(theta: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Numbers of leaves and values, and, where theta has them, LSTM units and networks in the bank."""
    found = {"leaves": len(theta), "values": sum(leaf.numel() for leaf in theta.values())}
    if "lstm_init_state/hidden" in theta:
        found["lstm_units"] = theta["lstm_init_state/hidden"].shape[-1]
    bank = theta.get(f"{BANK}b0")
    if bank is not None and bank.ndim == 2:
        found["bank"] = bank.shape[0]
    return found


# --- folders


def _is_weights(path: PurePosixPath) -> bool:
    """Whether a reader could take the file ``path`` of a folder or repository for its weights."""
    return path.as_posix() == THETA_STATE or (
        path.suffix == ".safetensors" and (len(path.parts) == 1 or (len(path.parts) == 2 and path.name == SAFETENSORS))
    )


def _weight_files(folder: Path) -> list[Path]:
    found = sorted(file for pattern in ("*", "*/*") for file in folder.glob(pattern) if file.is_file())
    return [file for file in found if _is_weights(PurePosixPath(file.relative_to(folder).as_posix()))]


def _refuse_others(there: Iterable[str], files: Mapping[str, bytes], where: str) -> None:
    others = sorted(set(there) - files.keys())
    if others:
        raise ValueError(
            f"{where} holds other weights ({', '.join(others)}), which would be read instead of or together with the "
            "new ones. Use another one, or delete them first."
        )


def _write(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    temporary: dict[Path, Path] = {}
    try:
        for name, content in files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary[target] = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
            temporary[target].write_bytes(content)
        for target, file in temporary.items():
            os.replace(file, target)
    finally:
        for file in temporary.values():
            file.unlink(missing_ok=True)
    return list(temporary)


# --- the hub


def _repositories(repo_id: str, files: Mapping[str, bytes]) -> dict[str, dict[str, bytes]]:
    """Repository -> its files: one, or one for each half of a split network."""
    halves = sorted({path.split("/")[0] for path in files if "/" in path}, reverse=True)
    if not halves:
        return {repo_id: dict(files)}
    common = {path: content for path, content in files.items() if "/" not in path}
    record = json.loads(common[PROVENANCE])
    parts = {}
    for half in halves:
        prefix = f"{half}/"
        own = {path.removeprefix(prefix): content for path, content in files.items() if path.startswith(prefix)}
        names = {name: records.digest(content) for name, content in own.items()}
        parts[f"{repo_id}_{half.upper()}"] = common | {PROVENANCE: _json(record | {"files": names})} | own
    return parts


def _table(metrics: Mapping[str, Any]) -> str:
    """Rows of a Markdown table."""
    rows = []
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError(f"metric {name!r} must be a number or text, got {value!r}")
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        rows.append("| " + " | ".join(" ".join(cell.split()).replace("|", r"\|") for cell in (name, text)) + " |")
    return "\n".join(rows)


def _model_card(
    what: _Set, repo_id: str, files: Iterable[str], *, license: str | None, results: str, description: str
) -> str:
    """The README.md of a repository: rule, sizes, origin, licence, how to load it, and results given by the user."""
    tags = ["learned-optimizer", "optimizer", *([what.rule] if what.rule else [])]
    header = huggingface_hub.ModelCardData(license=license, library_name="hf_lopt", tags=tags).to_yaml()
    rule = what.rule or "RULE"
    # One half of a split network is enough: the other is found by its name.
    extra = "".join(f", {key}={value!r}" for key, value in what.arguments.items())
    option = "".join(f",{key}={value}" for key, value in what.arguments.items() if not isinstance(value, list))
    count = sizes(what.theta)
    facts = {
        "rule": f"`{what.rule}`" if what.rule else "not stated",
        "values": f"{count.pop('values'):,} in {count.pop('leaves')} arrays, float32",
        **{key.replace("_", " "): str(value) for key, value in count.items()},
        "origin": f"{what.origin}, from {what.source}",
        "licence": license or "not stated by the uploader",
        "files": ", ".join(f"`{file}`" for file in files),
        "sha256 of the content": f"`{what.sha256}`",
    }
    facts |= {key: f"`{value}`" for key, value in what.settings.items()}
    parts = [
        f"---\n{header.strip()}\n---",
        f"# {repo_id.split('/')[-1]}",
        f"Weights of the learned optimizer `{rule}`, for the package `hf_lopt`."
        if what.rule
        else "Weights of a learned optimizer.",
        description.strip(),
        "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        f'```python\nimport hf_lopt\n\noptimizer = hf_lopt.LearnedOptimizer(model.parameters(), "{rule}", '
        f'weights="{repo_id}"{extra})\n```',
        f'With the Trainer of transformers: `optim="{rule}"`, `optim_args="weights={repo_id}{option}"`.',
        f"## Results\n\n| metric | value |\n|---|---|\n{results}" if results else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
