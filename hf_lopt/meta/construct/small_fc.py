"""small_fc_lopt, μLO and ELO: Adafactor with momentum, for the first two with a schedule over the step count."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_lopt.features import SMALL_FC, STEP_SCALES
from hf_lopt.meta.construct import networks, schedules
from hf_lopt.meta.construct.files import Construction


HIDDEN = (32, 32)
# Direction of the step: coefficients of normalised features, (group, column) -> weight. Column 0 is the decay .9.
DIRECTION = {("fac_m", 0): 1.0, ("fac_g", 0): 0.3}
# The direction counts as far as the newest gradient, times this, agrees with it. Features are normalised, so that no
# network can see how wide a layer is; but where steps are too long for it, gradients turn against their own momentum.
AGREES = {("fac_g", 0): 1.3}
PEAK = 0.004  # step size at lr 1 and with step_mult as below: the step is this much times the direction
WARMUP, DECAY = 20.0, 300.0  # steps
STEP_MULT = {"small_fc_lopt": 0.001, "mulo": 0.01, "elo": 1.0}  # the rules' defaults, which the files are made for
EXP_MULT = 0.001
EXPONENT = (4, 5)  # the units that carry the exponent, after those of the direction
TOLERANCE = 0.16  # largest error of the step size, relative to the wanted one

CHOSEN_ON = (
    "Direction and schedule: four small validation tasks of 300 or 400 steps (digits classifier, digits autoencoder, "
    "a regression, a tiny transformer on a synthetic Markov source), one seed, eight settings. The agreement and its "
    "peak: eleven validation tasks of 300 steps (benchmarks/small_fc_width.py), four of them perceptrons of width 256 "
    "or 512, three or four seeds, a dozen settings. The recipes of this package took no part."
)
ELO_CHOSEN_ON = (
    "The direction is that of the small_fc_lopt file. Its scale is such that the rule's default lr of 0.001 is a step "
    "of about 0.001; three times that was compared on the same tasks and did as well."
)


def direction_units(direction: networks.Direction) -> tuple[list[networks.Unit], Tensor]:
    """The part of a direction that the newest gradient agrees with, see :func:`networks.agreeing`."""
    return networks.agreeing(*(networks.columns(SMALL_FC, form) for form in (direction, AGREES)))


def network_leaves(scale: float, timed: bool) -> dict[str, Tensor]:
    """The leaves of a rule with output 0 ``scale`` times the direction, or, if ``timed``, what the gradient agrees
    with of it; and as output 1 the exponent, 0 if not ``timed``. The decay offsets are zero."""
    inputs = sum(SMALL_FC.widths()) + len(STEP_SCALES)
    outputs = [networks.Output({0: scale, 1: -scale}), networks.Output()]
    if timed:
        first = sum(SMALL_FC.widths())
        *coefficients, constant = schedules.step_coefficients(WARMUP, DECAY)
        units, second = direction_units(DIRECTION)
        units += networks.pair({first + k: c for k, c in enumerate(coefficients)}, constant)
        outputs[1] = networks.Output(dict(zip(EXPONENT, (1.0 / EXP_MULT, -1.0 / EXP_MULT), strict=True)))
        layers = networks.relu_network(inputs, HIDDEN, units, outputs)
        layers[1][0][:4, :4] = torch.nn.functional.pad(second, (0, 2))
    else:
        units = networks.pair(networks.columns(SMALL_FC, DIRECTION))
        layers = networks.relu_network(inputs, HIDDEN, units, outputs)
    leaves = {
        f"nn/~/{kind}{k}": leaf for k, layer in enumerate(layers) for kind, leaf in zip("wb", layer, strict=True)
    }
    decays = SMALL_FC.decays
    sizes = {
        "momentum_decays": decays.momentum,
        "rms_decays": decays.second_moment,
        "adafactor_decays": decays.factored,
    }
    return leaves | {name: torch.zeros(len(kind), dtype=torch.float32) for name, kind in sizes.items()}


def multipliers(theta: dict[str, Tensor], steps: list[float], dtype: torch.dtype = torch.float64) -> list[float]:
    """exp(0.001 o1) of the network at the given step counts, all normalised features zero."""
    times = torch.tensor(schedules.step_outputs(steps)[:-1], dtype=dtype).T
    x = torch.cat([torch.zeros(len(steps), sum(SMALL_FC.widths()), dtype=dtype), times], 1)
    for k in range(3):
        x = x @ theta[f"nn/~/w{k}"].to(dtype) + theta[f"nn/~/b{k}"].to(dtype)
        x = x.relu() if k < 2 else x
    return torch.exp(EXP_MULT * x[:, 1]).tolist()


def largest_error(theta: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> float:
    """Largest error of the multiplier relative to the wanted one, from the first step to the millionth."""
    steps = schedules.step_points()
    wanted = [math.exp(schedules.step_log_multiplier(min(i, STEP_SCALES[-1]), WARMUP, DECAY)) for i in steps]
    return max(abs(m / w - 1.0) for m, w in zip(multipliers(theta, steps, dtype), wanted, strict=True))


def table(theta: dict[str, Tensor]) -> str:
    """Markdown: wanted and produced step size by step count, and the largest error."""
    steps = [0, 1, 2, 5, 10, 19, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000, 1_000_000]
    lines = ["| steps done | wanted | produced | error |", "| ---: | ---: | ---: | ---: |"]
    for step, value in zip(steps, multipliers(theta, list(map(float, steps))), strict=True):
        wanted = math.exp(schedules.step_log_multiplier(min(step, STEP_SCALES[-1]), WARMUP, DECAY))
        lines.append(
            f"| {step:,} | {PEAK * wanted:.6f} | {PEAK * value:.6f} | {100 * abs(value / wanted - 1):.1f} % |"
        )
    lines += ["", f"Largest error up to the millionth step: {100 * largest_error(theta):.1f} % of the wanted value."]
    return "\n".join(lines)


def _build(rule: str) -> Construction:
    theta = network_leaves(PEAK / STEP_MULT[rule], timed=True)
    for dtype in (torch.float64, torch.float32):
        if (error := largest_error(theta, dtype)) > TOLERANCE:
            raise RuntimeError(f"the fitted step size is off by {error:.2%} in {dtype}, allowed is {TOLERANCE:.0%}")
    provenance = {
        "origin": {
            "nn, output 0": "constructed: the network computes a hand rule exactly",
            "nn, output 1": "distilled: a linear form of the features of the step count, fitted to a log schedule",
            "momentum_decays, rms_decays, adafactor_decays": "constructed: zero, the rule's initial decays",
        },
        "settings": {"step_mult": STEP_MULT[rule]},
        "sizes": {"hidden": HIDDEN},
        "numbers": {
            "direction": networks.direction_record(DIRECTION),
            "agrees_with": networks.direction_record(AGREES),
            "agreement": "the one of the two nearer to zero where they have the same sign, else 0",
            "peak_step": PEAK,
            "schedule": f"min(1, (i + 1) / {WARMUP:g}) / sqrt(1 + i / {DECAY:g}) after i steps, constant from 100000",
        },
        "chosen_on": CHOSEN_ON,
        "fit_largest_error": float(f"{largest_error(theta):.2g}"),
    }
    return Construction(theta, provenance, table(theta) if rule == "small_fc_lopt" else None)


def build_small_fc() -> Construction:
    """small_fc_lopt. RuntimeError if the step size misses ``TOLERANCE``."""
    return _build("small_fc_lopt")


def build_mulo() -> Construction:
    """The same steps for μLO's larger step_mult."""
    return _build("mulo")


def build_elo() -> Construction:
    """ELO: the direction alone; lr and its schedule are the caller's."""
    provenance = {
        "origin": {
            "nn": "constructed: the network computes a linear hand rule exactly",
            "momentum_decays, rms_decays, adafactor_decays": "constructed: zero, the rule's initial decays",
        },
        "settings": {"lr": 0.001},
        "sizes": {"hidden": HIDDEN},
        "numbers": {"direction": networks.direction_record(DIRECTION)},
        "chosen_on": ELO_CHOSEN_ON,
    }
    return Construction(network_leaves(1.0, timed=False), provenance)
