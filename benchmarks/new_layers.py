"""How much larger the step of new layers should be where a pretrained model is fine-tuned: validation tasks.

    python -m benchmarks.new_layers [--celo FILE]    # -> benchmarks/results/new_layers.json
    python -m benchmarks.new_layers --poolers [--celo FILE]    # minutes a run, more numbers in the same file
    python -m benchmarks.new_layers --lengths [--celo FILE]    # the same
    python -m benchmarks.new_layers --longer    # the same
    python -m benchmarks.new_layers --heads [--celo FILE]    # the same

Three small models of transformers learn one task, are saved, and are loaded with a head for another: a Llama that
predicts bytes of help texts tells what a piece of text is from; a BERT that fills in missing bytes
tells for each byte what kind of token it is in; a vision transformer that knows the digits 0 to 4 tells 5 to 9 apart.
Numbers are held-out losses, means over seeds. Every rule has its ``lr`` for fine-tuning; the head has that times each
of the multipliers, of which the last is the rule's ``lr`` from scratch. ``--celo`` names a file of published weights.
With ``--poolers`` the MiniLM of the recipes, whose checkpoint has a pooler that its own training did not use, tells
docstrings of five libraries apart, and the new head alone or with the pooler has a larger ``lr``. With ``--lengths``
all four tasks are trained for 50 to 300 steps with all of the ``lr``, that of the new head too, up to 2.8 times as
large; with ``--longer`` the small models take 1,000 steps, with smaller ones. With ``--heads`` short runs multiply
the ``lr`` of the new head as that of all others, or by more. One thread.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import importlib.util
import io
import itertools
import json
import keyword
import math
import sys
import sysconfig
import tempfile
import tokenize
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.finetune_multiplier import BLOCK, RESULTS, SOURCES, blocks, help_texts
from benchmarks.finetune_multiplier import pretrained as byte_model
from benchmarks.small_runs import mean, train
from benchmarks.storing import rounded, write_record
from hf_lopt import rules
from hf_lopt.meta.table import machine
from hf_lopt.pretrained import OF_POOLER
from hf_lopt.rules.base import FINE_TUNING, NEW_LAYERS


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from assets import minilm_dir  # noqa: E402


FILE = RESULTS / "new_layers.json"
STEPS, BATCH, HELD_OUT = 150, 16, 256
MULTIPLIERS = (1.0, 3.0, 10.0)  # and the one that leads to the lr from scratch
ADAMW = (1e-4, 3e-4, 1e-3, 3e-3)
RULES = ("velo", "celo", "small_fc_lopt", "celo2")
KINDS = (tokenize.COMMENT, tokenize.STRING, tokenize.NUMBER, tokenize.OP, tokenize.NAME)  # 0 is none of them
CLASSES_OF_TOKENS = len(KINDS) + 2  # none of them, and keywords


@dataclass(frozen=True)
class Task:
    """What a model is loaded for. ``load`` gives the model, ``data`` keyword arguments of it, with N in front."""

    load: Callable[[str], nn.Module]
    folder: Callable[[], str]
    data: Callable[[], dict[str, Tensor]]
    steps: int = STEPS


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp())


@functools.cache
def saved_bytes() -> str:
    byte_model().save_pretrained(_folder() / "bytes")
    return str(_folder() / "bytes")


def source(name: str) -> str:
    return (Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text(encoding="utf-8")


@functools.cache
def origins() -> dict[str, Tensor]:
    """Blocks of bytes, and where each is from: code, help texts, tables of encodings, or one of HTML entities."""
    texts = [
        "\n".join(map(source, SOURCES)),
        help_texts(),
        "\n".join(source(f"encodings/cp{number}") for number in (437, 850, 866, 1250, 1251, 1252)),
        source("html/entities"),
    ]
    found = [blocks(text) for text in texts]
    few = min(map(len, found))
    return {
        "input_ids": torch.cat([x[torch.linspace(0, len(x) - 1, few).long()] for x in found]),
        "labels": torch.arange(len(found)).repeat_interleave(few),
    }


def with_kinds(name: str) -> tuple[str, Tensor]:
    """Source code in ASCII, and the kind of token of each character, (N,) int64; keywords are a kind."""
    text = source(name).encode("ascii", "replace").decode()
    starts = [0, *(i + 1 for i, x in enumerate(text) if x == "\n")]
    of = torch.zeros(len(text), dtype=torch.int64)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in KINDS:
            (a, b), (c, d) = token.start, token.end
            kind = len(KINDS) + 1 if keyword.iskeyword(token.string) else KINDS.index(token.type) + 1
            of[starts[a - 1] + b : starts[c - 1] + d] = kind
    return text, of


@functools.cache
def kinds() -> dict[str, Tensor]:
    """Blocks of bytes, and for each byte the kind of token that it belongs to."""
    ids, labels = [], []
    for name in SOURCES:
        text, of = with_kinds(name)
        ids.append(blocks(text))
        labels.append(of[: len(of) // BLOCK * BLOCK].view(-1, BLOCK))
    return {"input_ids": torch.cat(ids), "labels": torch.cat(labels)}


@functools.cache
def saved_bert() -> str:
    """A BERT that has learned to fill in bytes of help texts."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=257,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=BLOCK,
    )
    model, data = transformers.BertForMaskedLM(config), blocks(help_texts())

    def masked(x: Tensor) -> dict[str, Tensor]:
        hidden = torch.rand(x.shape) < 0.15
        return {"input_ids": x.masked_fill(hidden, 256), "labels": x.masked_fill(~hidden, -100)}

    _pretrain(model, (masked(data[torch.randint(len(data), (BATCH,))]) for _ in range(1000)))
    model.save_pretrained(_folder() / "bert")
    return str(_folder() / "bert")


def _digits(low: bool) -> dict[str, Tensor]:
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    y = torch.tensor(classes)
    chosen = y < 5 if low else y >= 5
    return {"pixel_values": x[chosen], "labels": y[chosen] % 5}


@functools.cache
def saved_vit() -> str:
    """A vision transformer that has learned the digits 0 to 4."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        num_labels=5,
    )
    model, data = transformers.ViTForImageClassification(config), _digits(low=True)
    count = len(data["labels"])
    _pretrain(model, (pick(data, torch.randint(count, (BATCH,))) for _ in range(600)))
    model.vit.save_pretrained(_folder() / "vit")
    return str(_folder() / "vit")


def _pretrain(model: nn.Module, batches: Any) -> None:
    batches = list(batches)
    train(model, batches, lambda x: model(**x).loss, len(batches), "adamw", 3e-3)


def pick(data: dict[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
    return {key: x[chosen] for key, x in data.items()}


TASKS = {
    "origin of a piece of text": Task(
        lambda path: transformers.LlamaForSequenceClassification.from_pretrained(path, num_labels=4, pad_token_id=0),
        saved_bytes,
        origins,
    ),
    "kind of token of each byte": Task(
        lambda path: transformers.BertForTokenClassification.from_pretrained(path, num_labels=CLASSES_OF_TOKENS),
        saved_bert,
        kinds,
    ),
    "other digits": Task(
        lambda path: transformers.ViTForImageClassification.from_pretrained(path, num_labels=5),
        saved_vit,
        lambda: _digits(low=False),
    ),
}


def final_loss(
    task: Task, seed: int, rule: str, lr: float, weights: str, new_layers: float, poolers: float = 0.5
) -> float:
    """Held-out loss after the steps of the task."""
    path, data = task.folder(), task.data()
    torch.manual_seed(seed)
    model, draw = task.load(path), torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data["labels"]), generator=torch.Generator().manual_seed(0))
    known, held_out = order[HELD_OUT:], order[:HELD_OUT]
    batches = [pick(data, known[torch.randint(len(known), (BATCH,), generator=draw)]) for _ in range(task.steps)]
    model.train()
    settings = {} if rule == "adamw" else dict(rules.get(rule).finetune_settings)
    train(model, batches, lambda x: model(**x).loss, task.steps, rule, lr, weights, new_layers, poolers, **settings)
    model.eval()
    with torch.no_grad():
        return model(**pick(data, held_out)).loss.item()


def mean_loss(what: str, task: Task, seeds: int, *how: Any) -> dict[str, float]:
    """:func:`final_loss` of so many seeds; ``how``: its further arguments."""
    return mean(what, [final_loss(task, seed, *how) for seed in range(seeds)])


def row(task: str, seeds: int, rule: str, lr: float, weights: str = "bundled", new_layers: float = 1.0) -> dict:
    what = f"{task}: {rule} {Path(weights).name} lr {lr:g}, head x{new_layers:g}"
    return mean_loss(what, TASKS[task], seeds, rule, lr, weights, new_layers)


def contenders(names: Sequence[str], celo: str | None) -> list[tuple[str, str]]:
    """Rules and weights: these with embedded ones, and Celo with published ones, where there is a file of them."""
    return [*((rule, "bundled") for rule in names), *([("celo", celo)] if celo else [])]


def labelled(rule: str, weights: str) -> str:
    """What runs of a rule are called in the record."""
    return f"{rule}, {'embedded' if weights == 'bundled' else 'published'} weights"


# ---- poolers --------------------------------------------------------------------------------------------------------

LIBRARIES = ("numpy", "sklearn", "matplotlib", "torch", "transformers")
PER_LIBRARY, LENGTH, DOC_STEPS = 600, 48, 100
SHARES = {"head": 0.0, "head, pooler half": OF_POOLER, "head and pooler": 1.0}  # how far the pooler counts as new


def docstrings_of(library: str) -> Iterator[str]:
    """Of functions and classes, in the order of their files, without the library's name; nothing is imported."""
    base = Path(importlib.util.find_spec(library).submodule_search_locations[0])
    for file in sorted(base.rglob("*.py")):
        if any(part in str(file.relative_to(base)) for part in ("test", "models/", "generate", "setup")):
            continue
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            named = isinstance(node, ast.FunctionDef | ast.ClassDef)
            text = (ast.get_docstring(node) or "") if named else ""
            if len(text) > 60:
                yield text[:300].replace(library, "it")


def tokenized(rows: Sequence[tuple[str, int]], length: int) -> dict[str, Tensor]:
    """The first ``length`` tokens of texts, as MiniLM takes them, and the classes of the texts."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_dir())
    options = {"truncation": True, "max_length": length, "padding": "max_length", "return_tensors": "pt"}
    tokens = tokenizer([text for text, _ in rows], **options)
    return dict(tokens) | {"labels": torch.tensor([label for _, label in rows])}


@functools.cache
def docstrings(length: int = LENGTH) -> dict[str, Tensor]:
    """The first ``length`` tokens of docstrings, and the library of each."""
    found = [
        (text, i)
        for i, library in enumerate(LIBRARIES)
        for text in itertools.islice(docstrings_of(library), PER_LIBRARY)
    ]
    return tokenized(found, length)


def with_five_classes(path: str) -> nn.Module:
    return transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(LIBRARIES))


DOCSTRINGS = Task(with_five_classes, lambda: str(minilm_dir()), docstrings, DOC_STEPS)


def compare_poolers(celo: str | None, seeds: int) -> dict[str, Any]:
    """Rule -> held-out loss, with nothing but the ``lr`` for fine-tuning, or more for the head and the pooler."""

    def losses(rule: str, *how: Any) -> dict[str, float]:
        return mean_loss(f"docstrings: {rule}, {how}", DOCSTRINGS, seeds, rule, *how)

    found: dict[str, Any] = {"adamw": {f"{lr:g}": losses("adamw", lr, "", 1.0) for lr in (1e-4, 3e-4)}}
    for rule, weights in contenders(["velo"], celo):
        lr, new_layers = rules.get(rule).finetune_lr, rules.get(rule).lr_of_new_layers
        found[labelled(rule, weights)] = {
            "nothing": losses(rule, lr, weights, 1.0),
            **{words: losses(rule, lr, weights, new_layers / lr, share) for words, share in SHARES.items()},
        }
    return found


# ---- lengths --------------------------------------------------------------------------------------------------------

Multipliers = Mapping[int, Sequence[float]]  # steps of a run -> what the lr is multiplied with

TIMES: Multipliers = {50: (1.0, 1.4, 2.0, 2.8), 100: (1.0, 1.4, 2.0), 300: (1.0, 1.4, 2.0)}
# Of docstrings, whose runs take minutes: longer ones where it is less clear what is best.
DOC_TIMES: Mapping[str, Multipliers] = {
    "velo": {50: TIMES[50], 100: TIMES[100], 200: TIMES[100]},
    "celo": {50: TIMES[50], 100: TIMES[100]},
    "celo_adam": {50: (1.0, 2.0, 2.8), 100: TIMES[100]},
}
ALL_TASKS = TASKS | {"docstrings": DOCSTRINGS}
HEAD_STEPS = (50, 100)
SHARES_OF_LR: Multipliers = {1000: (0.3, 1.0)}


def sweep(name: str, task: Task, rule: str, weights: str, multipliers: Multipliers, seeds: int) -> dict[str, Any]:
    """Steps -> multiplier of the ``lr`` for fine-tuning, that of the new head too -> held-out loss."""
    known = rules.get(rule)
    rows: dict[str, Any] = {}
    for steps, all_times in multipliers.items():
        of_length = dataclasses.replace(task, steps=steps)
        for times in all_times:
            lr, new_layers = times * known.finetune_lr, known.lr_of_new_layers / known.finetune_lr
            what = f"{name}: {labelled(rule, weights)}, {steps} steps, x{times:g}"
            loss = mean_loss(what, of_length, seeds, rule, lr, weights, new_layers)
            rows.setdefault(str(steps), {})[f"{times:g}"] = loss
    return rows


def compare_lengths(celo: str | None, seeds: int) -> dict[str, Any]:
    """Task -> rule -> steps -> multiplier -> held-out loss."""
    found: dict[str, Any] = {}
    for (name, task), (rule, weights) in itertools.product(ALL_TASKS.items(), contenders(["velo", "celo_adam"], celo)):
        multipliers = DOC_TIMES[rule] if task is DOCSTRINGS else TIMES
        rows = sweep(name, task, rule, weights, multipliers, seeds)
        found.setdefault(name, {})[labelled(rule, weights)] = rows
    return found


def compare_longer(celo: str | None, seeds: int) -> dict[str, Any]:
    """The same for the small models in many epochs, with velo alone."""
    return {
        name: {labelled("velo", "bundled"): sweep(name, task, "velo", "bundled", SHARES_OF_LR, seeds)}
        for name, task in TASKS.items()
    }


def compare_heads(celo: str | None, seeds: int) -> dict[str, Any]:
    """Task -> rule -> steps -> what multiplies the ``lr`` of the new head -> held-out loss."""
    compared = contenders(["velo", "celo_adam"], celo)
    found: dict[str, Any] = {}
    for (name, task), (rule, weights), steps in itertools.product(ALL_TASKS.items(), compared, HEAD_STEPS):
        known, loaded = rules.get(rule), rules.get(rule).load_weights(weights)
        of_loaded, of_new = (known.length_multiplier(loaded, what, steps) for what in (FINE_TUNING, NEW_LAYERS))
        lr, losses = known.finetune_lr * of_loaded, {}
        for times in (of_loaded, of_new):
            new_layers, of_length = times * known.lr_of_new_layers / lr, dataclasses.replace(task, steps=steps)
            what = f"{name}: {labelled(rule, weights)}, {steps} steps, head x{times:.3g}"
            losses[f"{times:.3g}"] = mean_loss(what, of_length, seeds, rule, lr, weights, new_layers)
        found.setdefault(name, {}).setdefault(labelled(rule, weights), {})[str(steps)] = losses
    return found


# What is made on its own, since its runs take minutes: how, with how many seeds, and the words for it.
PARTS_OF_RECORD = {
    "poolers": (compare_poolers, 1, "the runs with and without poolers"),
    "lengths": (compare_lengths, 2, "the runs of several lengths"),
    "longer": (compare_longer, 1, "those of more steps"),
    "heads": (compare_heads, 2, "short runs with two lrs of the head"),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--celo", help="a file of published Celo weights")
    parser.add_argument("--seeds", type=int, default=4)
    for name, (_, seeds, words) in PARTS_OF_RECORD.items():
        parser.add_argument(f"--{name}", action="store_true", help=f"only {words}; seeds: {seeds}")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name, (compare, seeds, _) in PARTS_OF_RECORD.items():
        if getattr(options, name):
            more = compare(options.celo, seeds)
            write_record(FILE, json.loads(FILE.read_text(encoding="utf-8")) | {name: rounded(more, 4)})
            return
    found: dict[str, Any] = {}
    for task in TASKS:
        rows = found[task] = {"adamw": {f"{lr:g}": row(task, options.seeds, "adamw", lr) for lr in ADAMW}}
        for rule, weights in contenders(RULES, options.celo):
            known = rules.get(rule)
            whole = known.defaults["lr"] / known.finetune_lr
            multipliers = sorted({*(m for m in MULTIPLIERS if m <= whole), whole})
            name = labelled(rule, weights)
            rows[name] = {
                f"{m:.3g}": row(task, options.seeds, rule, known.finetune_lr, weights, m) for m in multipliers
            }
    record = {
        "machine": machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "command": "python -m benchmarks.new_layers --celo FILE",
        "setting": f"{STEPS} steps of {BATCH} samples, {options.seeds} seeds; multiplier of the head's step",
        "loss_of_chance": {"origin": math.log(4), "digits": math.log(5)},
        "held_out_loss": found,
    }
    write_record(FILE, rounded(record, 4))


if __name__ == "__main__":
    main()
