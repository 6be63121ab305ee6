"""Losses of whole runs with accumulators and parameters in fewer bits, beside float32: benchmarks/results/state_loss.*

    python -m benchmarks.state_loss recipes                    # held-out losses of four recipes, three seeds
    python -m benchmarks.state_loss recipes --rules celo2 --recipes causal_lm
    python -m benchmarks.state_loss recipes --mixed half       # weights that use all momenta
    python -m benchmarks.state_loss long                       # 20,000 steps of a small language model
    python -m benchmarks.state_loss parameters                 # bfloat16 parameters beside float32 master weights
    python -m benchmarks.state_loss page                       # the tables again

All formats start from the same weights and see the same batches. "float32, moved" starts from weights times 1 + 1e-6:
how far two float32 runs end from each other when something, anything, differs in the last digits. The bounds were
written down before measuring. What is in the file is not run again.

The embedded weights step along the momentum with decay 0.9 and leave the slower ones and, most of them, the second
moment unread. Published weights read everything. ``--mixed`` stands in for them: the embedded weights with a direction
that is a mix of six features: all three momenta over the factored and over the full second moment.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.metadata
import json
import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hf_lopt
from benchmarks.storing import rounded, whole_runs, without_usual, write_record
from hf_lopt import features, rules
from hf_lopt.meta.table import machine
from hf_lopt.meta.theta import starting_weights
from hf_lopt.weights import save


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FILE, PAGE = RESULTS / "state_loss.json", RESULTS / "state_loss.md"
KINDS = ("float32", "bfloat16", "int8")
MOVED, LR = "float32, moved", ", lr "
# Of the direction of the embedded weights: the share of the feature that is theirs, and of each of five others.
MIXES = {"equal": (", all momenta", 1.0 / 3.0, 1.0 / 3.0), "half": (", half slower momenta", 0.5, 0.1)}
VERSIONS = {name: importlib.metadata.version(name) for name in ("transformers",)}
# Of the mean held-out loss, in percent of that of float32; or within the spread of float32 over seeds.
BOUNDS = {"bfloat16": 0.5, "int8": 1.5}
# Small enough for many runs, large enough that nearly all matrices have 4,096 elements and rows of 64.
SETTINGS = {
    "causal_lm": "--layers 2 --width 64 --heads 4 --vocab_size 512 --block_size 64 --max_steps 300 --eval_steps 300",
    "text_classification": "--model runs/encoder --train_size 1024 --eval_size 300 --per_device_train_batch_size 16 "
    "--max_length 32 --max_steps 200 --eval_steps 200",
    "image_classification": "--max_steps 300 --eval_steps 300",
    # Before the loss is so small that runs part.
    "image_classification early": "--max_steps 100 --eval_steps 100",
    "seq2seq": "--max_steps 300 --eval_steps 300",
}
# What the page says below its tables.
NOTES = {
    "recipes": [
        "Images: three seeds and losses of 0.1 to 0.25 show nothing to 1 %. VeLO in float32 from weights moved by a "
        "millionth is as far off as int8. Celo2 moved so is not, so rounding does change its runs; five of its six "
        "runs in fewer bits end lower.",
        "The momentum with decay 0.999, whose errors are the largest, is read by the mixes only. Half of the step "
        "from slower momenta trains 1 % worse than the embedded weights, and the same in all formats. Equal "
        "parts train badly in float32, too. Published weights have not been run.",
        "So int8 keeps no momentum finer: 16 bits for the slowest would take 5.1 bytes per parameter in place of 4.1.",
    ],
    "long": [
        "With slower momenta in the direction the loss rises after some thousand steps, in float32 as well: such "
        "steps are too large for so slow a direction. In equal parts at the default step size float32 ends in "
        "non-finite losses. These rows say nothing about formats.",
    ],
}
LONG_EVERY = 1000
PARAMETERS = ("float32", "float32 master weights", "bfloat16, to nearest", "bfloat16, stochastic_rounding")


def cut_down_encoder(folder: Path) -> Path:
    """The pretrained encoder of the recipe with its first two layers and the word pieces of its data."""
    sys.path.insert(0, str(ROOT / "recipes"))
    from transformers import AutoModel, AutoTokenizer, BertTokenizerFast

    import assets

    tokenizer, model = (cls.from_pretrained(assets.minilm_dir()) for cls in (AutoTokenizer, AutoModel))
    texts = [snippet.text for snippet in assets.rotten_tomatoes_snippets()]
    used = {i for ids in tokenizer(texts)["input_ids"] for i in ids}
    kept = sorted(used | set(tokenizer.all_special_ids))
    (folder / "vocab.txt").write_text("\n".join(tokenizer.convert_ids_to_tokens(kept)) + "\n", encoding="utf-8")
    embeddings = model.embeddings.word_embeddings
    embeddings.weight = torch.nn.Parameter(embeddings.weight.detach()[kept].clone())
    model.encoder.layer = model.encoder.layer[:2]
    model.config.num_hidden_layers, model.config.vocab_size = 2, len(kept)
    model.save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=True).save_pretrained(folder)
    return folder


def recipe_run(setting: str, label: str, kind: str, seed: int) -> float:
    """Held-out loss after one run through Trainer. ``setting``: of `SETTINGS`, a recipe and what follows."""
    recipe = setting.partition(" ")[0]
    sys.path[:0] = [str(ROOT / "recipes")] * (str(ROOT / "recipes") not in sys.path)
    import compare as comparing
    from arguments import Contender

    if "runs/encoder" in SETTINGS[setting] and not (ROOT / "runs/encoder/config.json").is_file():
        (ROOT / "runs/encoder").mkdir(parents=True, exist_ok=True)
        cut_down_encoder(ROOT / "runs/encoder")
    module = importlib.import_module(recipe)
    args = comparing.recipe_arguments(module, SETTINGS[setting].split())
    args = dataclasses.replace(args, output_dir="runs/state_loss")
    task = module.make_task(args)
    if kind == MOVED:
        task = dataclasses.replace(task, build_model=lambda build=task.build_model: moved(build()))
    rule, weights, lr = read_label(label)
    options = f"weights={weights},state_dtype={kind.partition(',')[0]}"
    run = comparing.one_run(task, args, Contender(rule, rule, lr, options), seed)
    loss: float = run["final"]["eval_loss"]
    return loss


@functools.cache
def mixed_weights(rule: str, mix: str) -> str:
    """A folder with the embedded weights of ``rule`` whose direction is a mix of all momenta."""
    _, own, others = MIXES[mix]
    spec = {"velo": features.VELO, "celo2": features.CELO2, "small_fc_lopt": features.SMALL_FC}[rule]
    used = ("m_rsqrt_v", 0) if rule == "celo2" else ("fac_m", 0)
    weights = {name: leaf.clone() for name, leaf in starting_weights(rule, "constructed").items()}

    def first_layer(group: str, column: int) -> Tensor:
        if rule == "small_fc_lopt":
            return weights["nn/~/w0"][spec.column(group) + column]
        return weights[f"ff_mod_stack/~/w0__{spec.names.index(group)}"][..., column, :]

    whole = first_layer(*used).clone()
    for group in ("fac_m", "m_rsqrt_v"):
        for column in range(3):
            first_layer(group, column).copy_(whole * others)
    first_layer(*used).copy_(whole * own)
    folder = ROOT / "runs" / "state_loss_weights" / f"{rule}_{mix}"
    shutil.rmtree(folder, ignore_errors=True)
    save(weights, folder, rule=rule)
    return str(folder)


def read_label(label: str) -> tuple[str, str, float | None]:
    """Rule, ``weights=`` and ``lr`` (None: its default) of a rule's name that a mix and ", lr 0.1" may follow."""
    label, _, lr = label.partition(LR)
    rule, comma, words = label.partition(",")
    weights = next((mixed_weights(rule, mix) for mix, row in MIXES.items() if row[0] == comma + words), "bundled")
    return rule, weights, float(lr) if lr else None


@torch.no_grad()
def moved(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        p.mul_(1.0 + 1e-6)
    return model


class Model(nn.Module):
    """A small language model: a context of eight symbols, one hidden layer."""

    def __init__(self, width: int = 32, hidden: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 64)
        self.narrow, self.hidden = nn.Linear(64, width), nn.Linear(8 * width, hidden)
        self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, 64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(torch.tanh(self.hidden(self.narrow(self.embedding(x)).flatten(1)))))
        return out


def text(count: int, generator: torch.Generator) -> Tensor:
    """Symbols of a random grammar in which the last two speak for the next one, the same for all seeds of a run."""
    first, second = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(5)).mul_(1.5)
    table = (first.unsqueeze(1) + second.unsqueeze(0)).softmax(-1)
    states, out = torch.randint(0, 64, (2, 512), generator=generator), []
    for _ in range(count // 512):
        drawn = torch.multinomial(table[states[0], states[1]], 1, generator=generator).squeeze(1)
        states = torch.stack([states[1], drawn])
        out.append(drawn)
    return torch.stack(out, 1)


def windows(data: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Eight symbols (count, 8) and the one after them (count,)."""
    rows = torch.randint(0, len(data), (count,), generator=generator)
    starts = torch.randint(0, data.shape[1] - 9, (count,), generator=generator)
    found = data[rows.unsqueeze(1), starts.unsqueeze(1) + torch.arange(9)]
    return found[:, :8], found[:, 8]


def settings_of(rule: str, weights: str, lr: float | None, steps: int) -> dict[str, Any]:
    found: dict[str, Any] = {"weights": weights}
    if rules.get(rule).needs_horizon:
        found["num_training_steps"] = steps
    return found | ({} if lr is None else {"lr": lr})


def small_run(label: str, kind: str, seed: int, steps: int, every: int = LONG_EVERY, batch: int = 64) -> list[float]:
    """Held-out losses of a small language model after each ``every`` steps. ``kind``: one of `KINDS`, `MOVED`, or of
    `PARAMETERS`, where master weights are float32 parameters whose gradients come from a bfloat16 model."""
    torch.manual_seed(seed)
    model = Model() if every == LONG_EVERY else Model(64, 256)
    model = moved(model) if kind == MOVED else model
    low = kind.startswith("bfloat16,")
    if low:
        model.bfloat16()
    train, test = (text(1 << 19, torch.Generator().manual_seed(s)) for s in (1, 2))
    rule, weights, lr = read_label(label)
    settings = settings_of(rule, weights, lr, steps) | {"stochastic_rounding": kind.endswith("stochastic_rounding")}
    settings["state_dtype"] = kind if kind in KINDS else "float32"
    optimizer = hf_lopt.LearnedOptimizer(hf_lopt.param_groups(model, rule), rule, **settings)
    used = model
    if kind == "float32 master weights":
        used = Model(64, 256).bfloat16()
    held_out, generator = windows(test, 16384, torch.Generator().manual_seed(99)), torch.Generator().manual_seed(seed)
    pairs, found = list(zip(model.parameters(), used.parameters(), strict=True)), []

    def copy_down() -> None:
        with torch.no_grad():
            for p, q in pairs if used is not model else ():
                q.copy_(p)

    copy_down()
    for step in range(1, steps + 1):
        x, y = windows(train, batch, generator)
        used.zero_grad()
        loss = nn.functional.cross_entropy(used(x).float(), y)
        loss.backward()
        for p, q in pairs:
            p.grad = q.grad if q.grad is None or q is p else q.grad.to(p.dtype)
        optimizer.step(loss)
        copy_down()
        if step % every == 0 or step == steps:
            with torch.no_grad():
                found.append(nn.functional.cross_entropy(used(held_out[0]).float(), held_out[1]).item())
    return found


class Record:
    """The results file, written after each run."""

    def __init__(self) -> None:
        stored = whole_runs(json.loads(FILE.read_text())) if FILE.is_file() else {}
        self.runs: dict[str, dict[str, Any]] = {key: named(key) | run for key, run in stored.items()}

    def add(self, run: Mapping[str, Any], result: Any) -> None:
        """``result()``, under the values of ``run``; not again if it is there."""
        key = " | ".join(map(str, run.values()))
        if key in self.runs:
            return
        begin = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = result()
        spent = time.process_time() - begin
        self.runs[key] = rounded(dict(run) | {"loss": loss} | machine() | VERSIONS, 6)
        shown = loss[-1] if isinstance(loss, list) else loss
        print(f"{key}: {shown:.4f}, {spent:.0f} s", flush=True)
        self.write()
        PAGE.write_text(page(list(self.runs.values())), encoding="utf-8")

    def write(self) -> None:
        """Each run without what its key says."""
        rest = {key: {x: run[x] for x in run if x not in named(key)} for key, run in self.runs.items()}
        write_record(FILE, without_usual(rest))


def named(key: str) -> dict[str, Any]:
    """What the key of a run says about it."""
    names = ("part", "task", "rule", "kind", "seed", "steps")
    values = key.split(" | ")
    return {name: int(x) if name in names[4:] else x for name, x in zip(names, values, strict=False)}


def table(title: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [title, ["---"] * len(title), *rows]] + [""]


def notes(part: str) -> list[str]:
    return [*(f"- {note}" for note in NOTES[part]), ""]


def last(run: Mapping[str, Any]) -> float:
    loss = run["loss"]
    return loss[-1] if isinstance(loss, list) else loss


def compared(runs: Sequence[Mapping[str, Any]], group: Sequence[str], base: str = "float32") -> list[list[str]]:
    """A row for each format: losses by seed, their mean relative to that of ``base``, and whether it is in bounds."""
    found = []
    for head in dict.fromkeys(tuple(str(run[key]) for key in group) for run in runs):
        mine = [run for run in runs if tuple(str(run[key]) for key in group) == head]
        plain = {run["seed"]: last(run) for run in mine if run["kind"] == base}
        for kind in dict.fromkeys(run["kind"] for run in mine):
            own = {run["seed"]: last(run) for run in mine if run["kind"] == kind and run["seed"] in plain}
            if not own:
                continue
            mean = statistics.fmean(plain[seed] for seed in own)
            off = statistics.fmean(own.values()) - mean
            spread = statistics.stdev(plain.values()) if len(plain) > 1 else 0.0
            bound = BOUNDS.get(kind)
            verdict = ""
            if bound is not None and len(own) > 1:
                near = abs(off) <= bound / 100 * mean
                verdict = "yes" if near else ("within the spread" if abs(off) <= spread else "no")
                verdict += ", lower" if verdict == "no" and off < 0 else ""
            losses = ", ".join(f"{own[seed]:.4f}" for seed in sorted(own))
            change = f"{100 * off / mean:+.2f} %" if kind != base else f"(spread {100 * spread / mean:.2f} %)"
            found.append([*head, kind, losses, change, verdict])
    return found


def page(runs: Sequence[Mapping[str, Any]]) -> str:
    """All tables."""
    names = ("torch", "transformers")
    places = dict.fromkeys(
        f"{run['cpu']}, {run['threads']} of {run['cores']} threads, "
        f"{', '.join(f'{name} {run[name]}' for name in names)}, {run['date']}"
        for run in runs
    )
    text = ["# Losses of runs in fewer bits", "", "`python -m benchmarks.state_loss`; " + "; ".join(places) + ".", ""]
    text += [
        "Embedded weights, which read the momentum with decay 0.9 only. *All momenta* is the same with a direction of "
        "six features in equal parts, all three momenta over the factored and over the full second moment; of *half "
        "slower momenta*, half is that of the embedded weights and the rest the other five. Every format starts from "
        "the same weights and sees the same batches. *float32, moved* is float32 from weights times 1 + 1e-6: what "
        "any difference in the last digits becomes. *Spread*: standard deviation of float32 over seeds, in percent of "
        "its mean.",
        "",
    ]
    parts = {part: [run for run in runs if run["part"] == part] for part in ("recipes", "long", "parameters")}
    if parts["recipes"]:
        text += ["## Held-out loss of recipes", ""]
        text += [f"- {name}: `{SETTINGS[name]}`" for name in SETTINGS if any(r["task"] == name for r in runs)]
        text += ["", "Cut down so that all fit into an hour on one thread."]
        text += ["", f"Bounds: {BOUNDS['bfloat16']} % (bfloat16), {BOUNDS['int8']} % (int8), or the spread.", ""]
        head = ["recipe", "optim", "state_dtype", "held-out loss by seed", "mean, to float32", "within bounds"]
        text += [*table(head, compared(parts["recipes"], ("task", "rule"))), *notes("recipes")]
    if parts["long"]:
        text += ["## A long run", ""]
        text += [f"Small language model of a fixed grammar, batch 64, held-out loss after each {LONG_EVERY:,} steps."]
        text += ["", *long_table(parts["long"]), *notes("long")]
    if parts["parameters"]:
        text += ["## Parameters in bfloat16", "", "Small language model, float32 state, batch 64; a bfloat16 model in"]
        text[-1] += (
            " all rows but the first. *Master weights*: float32 parameters, copied to the model after each step."
        )
        head = ["optim", "steps", "parameters", "held-out loss by seed", "mean, to master weights", ""]
        rows = compared(parts["parameters"], ("rule", "steps"), "float32 master weights")
        text += ["", *table(head[:-1], [row[:-1] for row in rows])]
    return "\n".join(text)


def long_table(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    shown = [1, 2, 5, 10, 15, 20]
    rows = []
    for run in runs:
        curve = run["loss"]
        rows.append(
            [run["rule"], run["kind"], *(f"{curve[k - 1]:.4f}" if k <= len(curve) else "" for k in shown)]
            + [f"{min(curve):.4f}"]
        )
    return table(["optim", "state_dtype", *(f"{k * LONG_EVERY:,}" for k in shown), "lowest"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("recipes", "long", "parameters", "page"))
    parser.add_argument("--recipes", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--rules", nargs="+", default=["velo"], choices=rules.names())
    parser.add_argument(
        "--mixed", choices=list(MIXES), help="weights that use all momenta: velo, celo2, small_fc_lopt"
    )
    parser.add_argument("--lr", type=float, help="instead of the rule's own")
    parser.add_argument("--kinds", nargs="+", help="default: all of the part")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of long (default: 20,000) and parameters (2,000)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    os.chdir(ROOT)
    lr = "" if args.lr is None else f"{LR}{args.lr:g}"
    mix = MIXES[args.mixed][0] if args.mixed else ""
    record, names = Record(), [rule + mix + lr for rule in args.rules]
    if args.part == "page":
        PAGE.write_text(page(list(record.runs.values())), encoding="utf-8")
        return
    if args.part == "recipes":
        for recipe in args.recipes:
            for rule in names:
                for seed in args.seeds:
                    for kind in args.kinds or (*KINDS, MOVED):
                        run = {"part": "recipes", "task": recipe, "rule": rule, "kind": kind, "seed": seed}
                        record.add(run, lambda a=(recipe, rule, kind, seed): recipe_run(*a))
        return
    long = args.part == "long"
    steps = args.steps or (20_000 if long else 2_000)
    for rule in names:
        for seed in args.seeds[:1] if long else args.seeds:
            for kind in args.kinds or (KINDS if long else PARAMETERS):
                run = {"part": args.part, "task": "grammar", "rule": rule, "kind": kind, "seed": seed, "steps": steps}
                every = LONG_EVERY if long else steps
                record.add(run, lambda a=(rule, kind, seed, steps, every): small_run(*a))


if __name__ == "__main__":
    main()
