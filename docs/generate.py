"""Writes what stands between the markers of features.md, optimizers.md and benchmarks/results/costs.md, from the code.

    python docs/generate.py            # writes the pages
    python docs/generate.py --check    # exit status 1 if they are not what would be written

Formulas of the elements are the rows of `hf_lopt.features`, others are in formulas.py beside this file;
`tests/test_docs.py` runs the check.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import formulas
import torch

from hf_lopt import LearnedOptimizer, features, rules
from hf_lopt.features import ElementFeatures
from hf_lopt.rules.base import Rule
from hf_lopt.step.accumulators import AXIS_ORDERS
from hf_lopt.weights import PUBLISHED


FOLDER = Path(__file__).resolve().parent
COSTS = FOLDER.parent / "benchmarks" / "results" / "costs.md"
MARKER = re.compile(r"<!--generate\.py:(?P<name>\w+)-->\n.*?<!--end:(?P=name)-->", re.DOTALL)


@dataclass(frozen=True)
class Section:
    """One feature list of the code, and what docs/features.md says about it."""

    title: str
    features: ElementFeatures
    rules: tuple[str, ...]
    more: formulas.Inputs = ()  # columns that follow, not normalised
    remarks: tuple[str, ...] = field(default=())


SECTIONS = (
    Section(
        "VeLO and Celo",
        features.VELO,
        ("velo", "velo_s", "celo"),
    ),
    Section(
        "small_fc, μLO and ELO",
        features.SMALL_FC,
        ("small_fc_lopt", "mulo", "elo"),
        more=(("time", len(features.STEP_SCALES), "time", "steps done, at eleven scales"),),
        remarks=(
            "**small_fc** learns its decays, as offsets in the weights, which are 0 for `elo`. A decay is "
            f"`{formulas.LEARNED_DECAY}`, kept inside [0, 1] for v, R, C and D.",
        ),
    ),
    Section(
        "Celo2 and ELO-Celo2",
        features.CELO2,
        ("celo2", "celo2_base", "elo_celo2"),
        remarks=(
            f"**Celo2** normalises over the last two axes in the reference's order, each matrix of a stack or kernel "
            f"by itself. A tensor of rank < 2 has the first {len(features.CELO2_VECTOR.names)} features only, one of "
            "the Adam branch none.",
        ),
    ),
    Section(
        "RNN-MLP",
        features.RNN_MLP,
        ("rnn_mlp",),
        more=formulas.RNN_MLP_CONSTANTS,
        remarks=("**RNN-MLP** clips the gradient at a moving bound.",),
    ),
)
# Rules with a schedule of their own, but without features of the elements.
WITHOUT_FEATURES = ("celo_adam",)

# Sizes of the published networks; letters are those of the rules' shapes.
PUBLISHED_SIZES = {
    "velo": {"H": 512, "K": 256},
    "velo_s": {"H": 64, "K": 32},
    "celo": {"H": 64, "K": 1},
    "celo_adam": {"H": 64},
    "celo2": {"U": 8, "V": 8},
    "celo2_base": {"U": 8, "V": 8},
    "elo_celo2": {"U": 8, "V": 8},
    "small_fc_lopt": {"U": 32, "V": 32},
    "mulo": {"U": 32, "V": 32},
    "elo": {"U": 32, "V": 32},
    "rnn_mlp": {"H": 64, "U": 32, "V": 32, "R": 116},
}
SEE = "unknown"
LICENCES = {
    "amoudgl/celo": "MIT",
    "amoudgl/celo-adam": "MIT",
    "amoudgl/celo2": "MIT",
    "amoudgl/celo2-base": "MIT",
    "btherien/mulo": "Apache-2.0",
    "Pauljanson002/VeLO_RNN": "Apache-2.0",
}
AXIS_ORDER_WORDS = {
    "torch": "(out, in, *kernel): `nn.Linear`, `nn.Conv*d`",
    "jax": "(*kernel, in, out), as the reference: transformers' `Conv1D`, embedding tables",
    "torch_transposed": "(in, out, *kernel): `nn.ConvTranspose*d`",
    "torch_stacked": "(*stack, out, in): stacks of experts",
    "torch_merged": "(out, *in): one matrix, its input in several axes",
    "jax_merged": "(in, *out): one matrix, its output in several axes, such as (d_model, heads, d_head)",
}


def number(x: float) -> str:
    """1e-06 as 1e-6, 0.9 as 0.9, inf as none."""
    if math.isinf(x):
        return "none"
    return re.sub(r"e([+-])0?(\d)$", r"e\1\2", f"{x:g}")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows), ""]


def program(steps: formulas.Program) -> list[str]:
    """A fenced block of assignments; comments are aligned."""
    return _commented([(f"{name} = {text}", words) for name, text, words in steps])


def _commented(lines: Sequence[tuple[str, str]]) -> list[str]:
    """A fenced block of formulas with their remarks, aligned."""
    width = max((len(line) for line, _ in lines if len(line) <= 64), default=0)
    return ["```", *(f"{line:<{width}}  # {words}" if words else line for line, words in lines), "```", ""]


def span(start: int, count: int) -> str:
    return str(start) if count == 1 else f"{start}–{start + count - 1}"


@dataclass(frozen=True)
class ElementRow:
    """A feature of one list: its first column, and how many it has."""

    start: int
    count: int
    name: str


def element_rows(section: Section) -> Iterator[ElementRow]:
    """Features of one list in trained order."""
    own = section.features
    start = 0
    for name, width in zip(own.names, own.widths(), strict=True):
        yield ElementRow(start, width, name)
        start += width


def _columns(section: Section, name: str) -> str:
    """The columns of a feature in one list, such as "3–5"; "" where the list does not have it."""
    return next((span(row.start, row.count) for row in element_rows(section) if row.name == name), "")


def _sections() -> list[str]:
    """What the lists differ in, then every feature with its columns in each."""
    names = [section.title for section in SECTIONS]
    own = [section.features for section in SECTIONS]
    decays = [x.decays for x in own]

    def listed(values: Sequence[float]) -> str:
        return ", ".join(map(number, values)) or "none"

    def differing(values: Sequence[str]) -> str:
        """One value, or who has which, the usual one first."""
        usual = max(dict.fromkeys(values), key=list(values).count)
        others = [f"{value} ({name})" for value, name in zip(values, names, strict=True) if value != usual]
        return "; ".join([usual, *others])

    lines = [
        f"- decays of m: {differing([listed(d.momentum) for d in decays])}",
        f"- decays of v: {differing([listed(d.second_moment) for d in decays])}",
        f"- decays of R, C, D: {differing([listed(d.factored) for d in decays])}",
        f"- clip of g: {differing([f'±{number(x.clip)}' if math.isfinite(x.clip) else 'none' for x in own])}",
        f"- eps: {differing([number(x.second_eps) for x in own])}",
        f"- eps_D: {differing([number(x.diagonal_eps) for x in own])}",
        f"- norm_eps: {differing([number(x.norm_eps) for x in own])}",
        "",
    ]
    # Lists with the same features share a column.
    lists: dict[tuple[str, ...], list[Section]] = {}
    for section in SECTIONS:
        lists.setdefault(section.features.names, []).append(section)
    heads = [", ".join(section.title for section in same).replace(" and ", ", ") for same in lists.values()]
    order = list(dict.fromkeys(name for section in SECTIONS for name in section.features.names))
    body = []
    for name in order:
        feature = features.FEATURES[name]
        formula = f"{name} = {_short_eps(feature.text)}" if feature.text != name else name
        vector = f"; rank < 2: {_short_eps(feature.vector_text)}" if feature.vector_text else ""
        cells = [_columns(same[0], name) for same in lists.values()]
        body.append(("".join(f"{cell:<7}" for cell in cells) + formula, formulas.ELEMENT[name] + vector))
    lines += [f"Columns in the list of {'; of '.join(heads)}:", "", *_commented(body)]
    lines += [text + "\n" for section in SECTIONS for text in section.remarks]
    for section in SECTIONS:
        if section.more:
            start = sum(section.features.widths())
            lines += [f"{section.title}, the columns that are not normalised:", "", *_inputs(section.more, start)]
    return lines


def _short_eps(text: str) -> str:
    return text.replace("second_eps", "eps").replace("diagonal_eps", "eps_D")


def _inputs(inputs: formulas.Inputs, start: int = 0) -> list[str]:
    """A fenced block: columns, name, formula, what it is."""
    lines = []
    for name, columns, text, words in inputs:
        formula = f"{name} = {text}" if text != name else name
        lines.append((f"{span(start, columns):<6} {formula}", words))
        start += columns
    return _commented(lines)


def _symbols() -> list[str]:
    return [f"- `{k}`: {v}" for k, v in formulas.SYMBOLS.items()]


def _time() -> list[str]:
    scales = ", ".join(map(number, features.STEP_SCALES))
    fractions = ", ".join(map(number, features.TIME_FRACTIONS))
    return [
        f"- rules with a horizon: `{formulas.TIME_FEATURE}`, tau {fractions}",
        f"- `small_fc_lopt`, `mulo`, `elo`: `{formulas.STEP_FEATURE}`, tau {scales}",
        f"- `rnn_mlp`: `{formulas.SINE_FEATURE}`, the same",
    ]


def _lr_mults() -> dict[str, str]:
    """Formula -> the rules that have it."""
    by_text: dict[str, list[str]] = {}
    for name, text in formulas.LR_MULT.items():
        by_text.setdefault(text, []).append(name)
    return {text: ", ".join(names) for text, names in by_text.items()}


def _velo_definitions() -> list[str]:
    size = ("L(x)", formulas.LOG_SIZE, "a size on a log scale")
    return program((size, ("s", formulas.UNIT, "m and v are taken as if mean(p**2) were 1")))


def _steps() -> list[str]:
    by_program: dict[formulas.Program, list[str]] = {}
    for name, steps in formulas.STEPS.items():
        by_program.setdefault(steps, []).append(name)
    lines = []
    for steps, names in by_program.items():
        lines += [", ".join(f"`{name}`" for name in names) + ":", "", *program(steps)]
    return lines


# ---- tables of docs/optimizers.md


def random_weights(rule: Rule, sizes: Mapping[str, int], scale: float = 0.01) -> dict[str, torch.Tensor]:
    """Weights of a rule with the given network sizes, small normal numbers from a fixed seed."""
    generator = torch.Generator().manual_seed(0)

    def size(dim: int | str) -> int:
        if isinstance(dim, int):
            return dim
        factor, symbol = re.fullmatch(r"(\d*)([A-Za-z]+)", dim).groups()
        return int(factor or 1) * sizes[symbol]

    shapes = {leaf: [size(dim) for dim in shape] for leaf, shape in rule.shapes.items()}
    return {leaf: scale * torch.randn(shape, generator=generator) for leaf, shape in shapes.items()}


def gpt2_shapes(width: int = 768, layers: int = 12, words: int = 50257, positions: int = 1024) -> dict[str, list]:
    """Parameter shapes of GPT-2 (124 million), its tied head counted once: tables, matrices, vectors."""
    matrices = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)] * layers
    vectors = [(3 * width,), (width,), (4 * width,), *[(width,)] * 5] * layers + [(width,)] * 2
    return {"tables": [(words, width), (positions, width)], "matrices": matrices, "vectors": vectors}


def state_bytes(name: str, shapes: Mapping[str, list], device: str) -> float:
    """Bytes per parameter of all tensors in ``optimizer.state`` after a step; "adamw" is torch's.

    On the device "meta" tensors have sizes and no memory, which is enough to count.
    """
    groups = []
    for kind, sizes in shapes.items():
        params = [torch.nn.Parameter(torch.zeros(size, device=device)) for size in sizes]
        groups.append({"params": params, "axis_order": "jax"})
        if "branch" in getattr(_rule(name), "per_group", ()) and kind == "tables":
            groups[-1]["branch"] = "adam" if rules.get(name).defaults["branch"] == "auto" else "network"
    params = [p for group in groups for p in group["params"]]
    if name == "adamw":
        optimizer = torch.optim.AdamW(params, foreach=False)
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    else:
        weights = random_weights(rules.get(name), PUBLISHED_SIZES[name])
        optimizer = LearnedOptimizer(groups, name, weights=weights, lr=0.0)
        optimizer.step()  # lr 0 and no gradients: state is created, nothing else
    total = sum(x.nbytes for s in optimizer.state.values() for x in s.values() if torch.is_tensor(x))
    return total / sum(p.numel() for p in params)


def _rule(name: str) -> Rule | None:
    return rules.get(name) if name in rules.names() else None


def layers(rule: Rule, sizes: Mapping[str, int]) -> list[tuple[int, int]]:
    """(inputs, outputs) of each layer of the per-element network, first to last; [] without one."""
    found: dict[str, tuple[int, int]] = {}
    for leaf, shape in rule.shapes.items():
        match = re.fullmatch(r"(?:ff_mod_stack/~/|nn/~/|ffmod_params/mlp/~/)(?:w(\d)(?:__\d+)?|linear_(\d)/w)", leaf)
        if match:
            n_in, n_out = (sizes.get(dim, dim) for dim in shape[-2:])
            layer = match[1] or match[2]
            found[layer] = (found.get(layer, (0, 0))[0] + n_in, n_out)
    return [found[layer] for layer in sorted(found)]


def scheduler_weights(rule: Rule, sizes: Mapping[str, int]) -> int:
    """Multiply-adds per tensor and step: the matrices of the scheduler, and the mixture of the bank."""
    weights = random_weights(rule, sizes)
    unused = ("rnn_params/linear/w",)
    dense = sum(x.numel() for k, x in weights.items() if k.startswith("rnn_") and k.endswith("/w") and k not in unused)
    bank = sum(x.numel() for k, x in weights.items() if k.startswith("ff_mod_stack/")) if sizes.get("K", 1) > 1 else 0
    return dense + bank


def _costs() -> list[str]:
    matrix = {"matrices": [(1024, 1024)]}
    vector = {"vectors": [(1024,)]}
    rows = []
    for name in (*rules.names(), "adamw"):
        cells = [state_bytes(name, matrix, "cpu"), state_bytes(name, vector, "cpu")]
        cells.append(state_bytes(name, gpt2_shapes(), "meta"))
        rows.append((f"`{name}`" if name != "adamw" else "AdamW", *(f"{x:.2f}" for x in cells), *_arithmetic(name)))
    head = ("optim", "matrix 1024²", "vector of 1024", "GPT-2, 124M", "network", "per element", "per tensor")
    return table(head, rows)


def _arithmetic(name: str) -> tuple[str, str, str]:
    """The sizes of the per-element network, and multiply-adds of it and of the scheduler."""
    if name not in rules.names():
        return "", "", ""
    rule, sizes = rules.get(name), PUBLISHED_SIZES[name]
    found = layers(rule, sizes)
    shape = "-".join(map(str, [found[0][0], *(b for _, b in found)])) if found else ""
    scheduler = scheduler_weights(rule, sizes)
    return shape, str(sum(a * b for a, b in found) or ""), f"{scheduler:,}" if scheduler else ""


def _overview() -> list[str]:
    """One line for the rules that need the same and have the same schedule and rate."""
    alike: dict[str, list[str]] = {}
    for name in rules.names():
        rule = rules.get(name)
        needs = [word for word, needed in (("loss", rule.needs_loss), ("horizon", rule.needs_horizon)) if needed]
        schedule = "own" if rule.own_schedule else "your"
        what = f"{' and '.join(needs) or 'nothing'}, {schedule} schedule, `lr={number(rule.defaults['lr'])}`"
        alike.setdefault(what, []).append(f"`{name}` ({rule.class_name})")
    return [f"- {', '.join(names)}: {what}" for what, names in sorted(alike.items(), key=lambda item: item[1])]


def _weights() -> list[str]:
    lines = []
    for name in rules.names():
        for entry in PUBLISHED.get(name, ()):
            repos = " + ".join(f"`{repo}` ({LICENCES.get(repo, SEE)})" for repo in entry.ids)
            settings = [k if isinstance(v, tuple) else f"{k}={number(v)}" for k, v in entry.settings.items()]
            lines.append("; ".join([f"- `{name}`: {repos}", *([", ".join(settings)] if settings else [])]))
    return lines


def _axis_orders() -> list[str]:
    return [f"- `{k}`: {AXIS_ORDER_WORDS[k]}" for k in AXIS_ORDERS]


# Name of a marker in a page -> what stands between it and its end.
BLOCKS: dict[str, Callable[[], list[str]]] = {
    "symbols": _symbols,
    "elementwise": lambda: program(formulas.ELEMENTWISE),
    "factored": lambda: program(formulas.FACTORED + formulas.DIAGONAL),
    "normalised": lambda: program((("N(x)", formulas.NORMALISED, ""),)),
    "sections": _sections,
    "time": _time,
    "loss": lambda: program(formulas.LOSS),
    "velo_definitions": _velo_definitions,
    "velo_inputs": lambda: _inputs(formulas.VELO_INPUTS),
    "lr_mult": lambda: program(tuple(("lr_mult", text, names) for text, names in _lr_mults().items())),
    "steps": _steps,
    "newton_schulz": lambda: program(formulas.NEWTON_SCHULZ),
    "adam_branch": lambda: program(tuple(("step", text, names) for names, text in formulas.ADAM_BRANCH.items())),
    "overview": _overview,
    "weights": _weights,
    "costs": _costs,
    "axis_orders": _axis_orders,
}


def _marked(match: re.Match) -> str:
    name = match["name"]
    body = "\n".join(BLOCKS[name]()).rstrip()
    return f"<!--generate.py:{name}-->\n\n{body}\n\n<!--end:{name}-->"


def pages() -> dict[Path, str]:
    """Path -> what the page should be: what it is, with new text between its markers."""
    paths = [FOLDER / "features.md", FOLDER / "optimizers.md", COSTS]
    return {path: MARKER.sub(_marked, path.read_text(encoding="utf-8")) for path in paths}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    check = parser.parse_args(arguments).check
    stale = 0
    for path, text in pages().items():
        if path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        print(f"{path.name}: {'out of date; run python docs/generate.py' if check else 'written'}")
        if not check:
            temporary = path.with_suffix(".tmp")
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
