"""Texts for ``optim_args``, and optimizers from what they say."""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch

from hf_lopt import LearnedOptimizer, rules
from hf_lopt.hf import arguments

from .outcomes import SAME, Result, refusal


_KEYS = ("lr", "weights", "weight_decay", "num_training_steps", "schedule", "base_width", "log_layers", "", "LR", "ß")
_NUMBERS = ("0", "1", "-1", "0.5", "1e-3", "1e400", "-1e400", "nan", "inf", "0x10", "1_0", "٣", "1e", "--1")
_NUMBERS += ("9" * 300, "9" * 5000)
_TEXTS = ("true", "False", "auto", "keep", "bundled", "published", "", " ", "=", "a=b", "\0", "\ud800", "None")
_TEXTS += ("x" * 5000,)
_PATHS = ("~nosuchuser/x", "~", "~/", ".", "/", "..", "/dev/null", "/dev/zero", "a/b", "a\0b", "C:\\x", "x" * 300)


def run(random: Random, folder: Path) -> Result:
    """Read one text, and make an optimizer as it says."""
    rule = rules.get(random.choice(sorted(rules.names())))
    items = [_item(random, [*rule.defaults, *_KEYS]) for _ in range(random.choice((0, 1, 1, 1, 2, 3)))]
    text = ",".join(items)
    if random.random() < 0.1:
        text = "".join(random.choice("=, lr1.e-\n\t\0ß") for _ in range(random.randrange(30)))
    try:
        given, _ = arguments.read_optim_args(rule, text)
        arguments.wants_layers(text)
    except Exception as error:  # judged by its kind
        return refusal(error, "text", "optim_args")
    base = {"weights": "bundled"} | ({"num_training_steps": 10} if rule.needs_horizon else {})
    given.pop(arguments.BASE_WIDTH, None)
    try:
        LearnedOptimizer([torch.nn.Parameter(torch.ones(2, 3))], rule.name, **(base | given))
    except Exception as error:  # judged by its kind
        return refusal(error, "optimizer")
    return Result(SAME, "optimizer")


def _item(random: Random, keys: list[str]) -> str:
    key = random.choice(keys)
    paths = _PATHS if key == "weights" else ()
    value = random.choice((*_NUMBERS, *_TEXTS, *paths, *paths))
    equals = random.choice(("=", "=", "=", "=", " = ", "", "=="))
    return f"{key}{equals}{value}"
