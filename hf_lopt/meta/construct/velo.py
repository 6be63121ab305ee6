"""VeLO, its small variant, Celo and Celo-Adam: a relative step of Adafactor, or Adam, under a fitted schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_lopt import features
from hf_lopt.features import SHARED_INPUTS
from hf_lopt.kernels.reference.scheduler import CELO_LR_MULT
from hf_lopt.meta.construct import schedules
from hf_lopt.meta.construct.files import Construction
from hf_lopt.meta.construct.networks import direction_record, pulled_pair
from hf_lopt.step import networks as meta_networks


# Direction of the step: coefficients of normalised features, (group, column) -> weight. Column 0 is the decay .9.
DIRECTION = {("fac_m", 0): 1.0, ("fac_g", 0): 0.3, ("p", 0): 0.1}
PULL = ("p", 0)  # the part that is never larger than the rest, so that what gets no gradient stays as it is
# Largest lr_mult; relative step = lr_mult / 1000. "vector": at most one axis longer than 1.
PEAK = {"matrix": 12.0, "vector": 24.0}
CELO_PEAK = 12.0  # one lr_mult for all tensors: that of the matrices
CELO_ADAM_PEAK = 3.0  # learning rate = lr_mult / 1000

OPEN = 30.0  # a gate or unit with this bias is saturated: 1 - sigmoid(30) < 1e-13
# Output of the input gate for vectors; for matrices less by the ratio of the peaks. Small, so that the tanh after the
# cell is linear.
GATE = 2.0**-8
TOLERANCE = 0.02  # largest error of lr_mult, relative to the wanted value or to 1 % of the peak, whichever is larger
CELO_TOLERANCE = 0.04  # the same where lr_mult is an exponential: relative to the wanted value everywhere

# Scheduler inputs of VeLO: 9 time features, 9 of the loss, 1, then the rank one-hot, 6 more. Celo has the first 18.
INPUTS, LOSS_INPUT, RANK_INPUT = 30, 9, 19
# The guard by the loss. Its first features compare means over ten steps to about a twentieth of the run, above their
# minimum; their sum is near -4 while the loss falls, up to 2 where it jumps. VeLO's steps are
# sigmoid(gain (threshold - sum)) as long, Celo's exp(-depth sigmoid(gain (sum - threshold))).
GUARD_FEATURES, GUARD_THRESHOLD = 4, 1.5
GUARD_GAIN, CELO_GUARD_GAIN, CELO_GUARD_DEPTH = 2.0, 3.0, 1.5
VECTOR_RANKS = (0, 1)
SCHEDULE_TEXT = (
    f"min(1, (x + {schedules.WARMUP_START:g}) / {schedules.WARMUP:g}) (1 + cos(pi x)) / 2 at the fraction x, 0 past 1"
)
PULL_TEXT = "p[0] counts as much as the rest at most"
GUARD_TEXT = f"sum of the first {GUARD_FEATURES} loss features"
CHOSEN_ON = (
    "Small validation tasks: about 250 settings were compared there, with the schedule computed directly "
    "instead of by an LSTM; separate test tasks were evaluated once, after the choice. The recipes of this "
    "package took no part."
)
CHECKED = torch.arange(20001, dtype=torch.float64) / 20000  # fractions of the run at which a fit is checked
PAST = torch.cat([1.0 + CHECKED[1:] * 2.0, torch.tensor([1e2, 1e6], dtype=torch.float64)])


def direction_network(direction: Mapping[tuple[str, int], float]) -> dict[str, Tensor]:
    """The leaves of a bank of one network for a direction whose pull is at most as large as the rest."""
    rest = {key: x for key, x in direction.items() if key != PULL}
    return pulled_pair(features.VELO, rest, {key: x for key, x in direction.items() if key == PULL}, limit=1.0)


def gate_bias(gate: float) -> float:
    return round(math.log(gate / (1.0 - gate)) / schedules.GRID) * schedules.GRID


def scheduler(
    units: schedules.Units, head: Sequence[float], bias: float, inputs: int, ranks: Mapping[int, float] | None = None
) -> dict[str, Tensor]:
    """LSTM and heads that output Σ head_j unit_j(x) + bias, whatever else the inputs are, but for the guard.

    The last unit is the constant 1. The mixing layer passes on the time features and, with ``ranks``, the entries of
    the rank one-hot named there, and the sum of the first loss features. Nothing is remembered: forget gate shut, no
    recurrent weights, so unit j is sigmoid(i) tanh(g_j), where the input gate i depends on the rank, g_j on the time.

    Args:
        units: the units but the last, at most as many as there are inputs to pass on.
        head: coefficients of the units.
        bias: of the head.
        inputs: number of scheduler inputs.
        ranks: input -> factor on the input gate where that input is 1 and not 0; without one the gate is ``GATE``,
            with it ``GATE`` is the gate of the largest factor. An empty one-hot (more than four axes) has factor 1.
            With ranks the guard is the output gate of all units, without them a unit of its own, before the last.
    """
    times = features.TIME_FRACTIONS
    if not ranks:
        head, bias = [*head[:-1], -0.5 * CELO_GUARD_DEPTH, head[-1]], bias - 0.5 * CELO_GUARD_DEPTH
    hidden = len(head)
    sources = [*range(len(times)), *(ranks or {})]
    guard = len(sources)
    mixing = torch.zeros(inputs, hidden, dtype=torch.float32)
    mixing[sources, range(guard)] = 1.0
    mixing[LOSS_INPUT : LOSS_INPUT + GUARD_FEATURES, guard] = 1.0

    largest = max((ranks or {}).values(), default=1.0)
    kernel, offsets = (
        torch.zeros(2 * hidden, 4, hidden, dtype=torch.float32),
        torch.zeros(4, hidden, dtype=torch.float32),
    )
    plain = gate_bias(GATE / largest)
    # Gates: input, candidate, forget (the rule adds 1), output.
    offsets[0], offsets[2], offsets[3] = plain, -OPEN - 1.0, OPEN
    for i, factor in enumerate((ranks or {}).values(), start=len(times)):
        kernel[i, 0] = gate_bias(GATE * factor / largest) - plain
    for j, (tau, gain, offset) in enumerate(units):
        kernel[times.index(tau), 1, j], offsets[1, j] = gain, offset
    offsets[1, -1] = OPEN
    if ranks:
        kernel[guard, 3], offsets[3] = -GUARD_GAIN, GUARD_GAIN * GUARD_THRESHOLD
    else:
        kernel[guard, 1, -2], offsets[1, -2] = 0.5 * CELO_GUARD_GAIN, -0.5 * CELO_GUARD_GAIN * GUARD_THRESHOLD

    weights = torch.tensor(head, dtype=torch.float64) / GATE
    return {
        "lstm_init_state/cell": torch.zeros(1, hidden, dtype=torch.float32),
        "lstm_init_state/hidden": torch.zeros(1, hidden, dtype=torch.float32),
        **{
            f"rnn_params/{name}/w": torch.zeros(inputs, hidden, dtype=torch.float32) for name in ("linear", "linear_1")
        },
        **{
            f"rnn_params/{name}/b": torch.zeros(hidden, dtype=torch.float32)
            for name in ("linear", "linear_1", "linear_2")
        },
        "rnn_params/linear_2/w": mixing,
        "rnn_params/rnn/linear/w": kernel.flatten(1),
        "rnn_params/rnn/linear/b": offsets.flatten(),
        "rnn_params/step_size/w": weights.unsqueeze(1).float(),
        "rnn_params/step_size/b": torch.tensor([bias], dtype=torch.float32),
    }


def velo_scheduler(coefficients: Sequence[float]) -> dict[str, Tensor]:
    """The scheduler whose lr_mult is peak(rank) times the schedule. An empty one-hot counts as a matrix."""
    ratio = PEAK["vector"] / PEAK["matrix"]
    head = [c * PEAK["vector"] for c in coefficients]
    return scheduler(schedules.UNITS, head, 0.0, INPUTS, {RANK_INPUT + rank: ratio for rank in VECTOR_RANKS})


def celo_scheduler(peak: float) -> dict[str, Tensor]:
    """The scheduler whose lr_mult = 0.1 exp(output) is ``peak`` times the floored schedule, for all tensors."""
    return scheduler(schedules.LOG_UNITS, schedules.log_coefficients(), math.log(peak / CELO_LR_MULT), SHARED_INPUTS)


# ---- What they produce ----------------------------------------------------------------------------------------------


def output(
    theta: Mapping[str, Tensor], x: Tensor, rank: int | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The head (N,) at the fractions ``x`` (N,) while the loss falls; VeLO's for a tensor with ``rank`` axes."""
    theta = {name: leaf.to(dtype) for name, leaf in theta.items()}
    inputs = torch.zeros(len(x), len(theta["rnn_params/linear_2/w"]), dtype=dtype)
    taus = torch.tensor(features.TIME_FRACTIONS, dtype=dtype)
    inputs[:, : len(taus)] = torch.tanh(10.0 * (x.to(dtype).unsqueeze(1) - taus))
    inputs[:, LOSS_INPUT : features.SHARED_INPUTS] = -1.0
    if rank is not None:
        inputs[:, RANK_INPUT + rank] = 1.0
    state = (theta[f"lstm_init_state/{name}"].expand(len(x), -1) for name in ("hidden", "cell"))
    hidden, _ = meta_networks.lstm(meta_networks.mix(inputs, theta), *state, theta)
    return meta_networks.linear(hidden, theta, "rnn_params/step_size").squeeze(1)


def velo_lr_mult(theta: Mapping[str, Tensor], x: Tensor, kind: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """The lr_mult (N,) that ``theta`` gives at the fractions ``x`` (N,) to a "matrix" or a "vector"."""
    return output(theta, x, 2 if kind == "matrix" else 1, dtype)


def celo_lr_mult(theta: Mapping[str, Tensor], x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The lr_mult (N,) that ``theta`` gives to all tensors at the fractions ``x`` (N,)."""
    return CELO_LR_MULT * torch.exp(output(theta, x, dtype=dtype))


def velo_fit_errors(theta: Mapping[str, Tensor], dtype: torch.dtype = torch.float64) -> dict[str, float]:
    """Largest errors of lr_mult by part of the run, over both ranks, on a grid of 1/20000 of the run.

    Relative to the wanted value where that is at least 1 % of the peak, to 1 % of the peak elsewhere; past the end,
    where 0 is wanted, the lowest and highest value as fractions of the peak.
    """
    wanted = torch.tensor([schedules.schedule(t) for t in CHECKED.tolist()], dtype=torch.float64)
    floor, warmup = schedules.FLOOR, schedules.WARMUP
    parts = {
        "warm-up": CHECKED <= warmup,
        "decay": (CHECKED > warmup) & (wanted >= floor),
        "tail": (CHECKED > warmup) & (wanted < floor),
    }
    errors = dict.fromkeys(parts, 0.0) | {"past_lowest": math.inf, "past_highest": -math.inf}
    for kind, peak in PEAK.items():
        produced = velo_lr_mult(theta, CHECKED, kind, dtype).double() / peak
        error = (produced - wanted).abs() / wanted.clamp_min(floor)
        for name, part in parts.items():
            errors[name] = max(errors[name], error[part].max().item())
        rest = velo_lr_mult(theta, PAST, kind, dtype).double() / peak
        errors["past_lowest"] = min(errors["past_lowest"], rest.min().item())
        errors["past_highest"] = max(errors["past_highest"], rest.max().item())
    return errors


def celo_fit_errors(theta: Mapping[str, Tensor], peak: float, dtype: torch.dtype = torch.float64) -> dict[str, float]:
    """Largest errors of lr_mult by part of the run, relative to the wanted value."""
    x = torch.cat([CHECKED, PAST])
    wanted = torch.tensor([schedules.floored_schedule(t) for t in x.tolist()], dtype=torch.float64)
    error = (celo_lr_mult(theta, x, dtype).double() / peak / wanted - 1.0).abs()
    parts = {"warm-up": x <= schedules.WARMUP, "decay": (x > schedules.WARMUP) & (x <= 1.0), "past the end": x > 1.0}
    return {name: error[part].max().item() for name, part in parts.items()}


def velo_table(theta: Mapping[str, Tensor]) -> str:
    """Markdown: wanted and produced lr_mult per rank and fraction of the run, and the largest errors."""
    x = [0.0, 0.005, 0.01, 0.025, 0.04, 0.049, 0.06, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93]
    x += [0.95, 0.97, 0.99, 1.0, 1.1, 1.5, 10.0]
    produced = {kind: velo_lr_mult(theta, torch.tensor(x, dtype=torch.float64), kind).tolist() for kind in PEAK}
    lines = [
        "| fraction done | matrix: wanted | produced | vector: wanted | produced | error |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for i, t in enumerate(x):
        wanted = {kind: peak * schedules.schedule(t) for kind, peak in PEAK.items()}
        error = max(
            abs(produced[kind][i] - wanted[kind]) / max(wanted[kind], schedules.FLOOR * peak)
            for kind, peak in PEAK.items()
        )
        cells = [cell for kind in PEAK for cell in (f"{wanted[kind]:.4f}", f"{produced[kind][i]:.4f}")]
        lines.append(f"| {t:g} | {' | '.join(cells)} | {100 * error:.2f} % |")
    errors = velo_fit_errors(theta)
    lines += [
        "",
        "| part of the run, every 1/20,000 of it | largest error |",
        "| :--- | ---: |",
        f"| warm-up (up to {schedules.WARMUP:g}) | {100 * errors['warm-up']:.2f} % of the wanted value |",
        f"| decay, down to 1 % of the peak | {100 * errors['decay']:.2f} % of the wanted value |",
        f"| the rest, up to 1 | {100 * errors['tail']:.2f} % of 1 % of the peak |",
        f"| past the end, to 3 runs and at 100 and 10⁶ (0 is wanted) | {100 * errors['past_lowest']:.4f} % to "
        f"{100 * errors['past_highest']:.4f} % of the peak |",
    ]
    return "\n".join(lines)


def celo_table(theta: Mapping[str, Tensor], peak: float) -> str:
    """Markdown: wanted and produced lr_mult by fraction of the run, and the largest errors."""
    x = [0.0, 0.0025, 0.01, 0.025, 0.049, 0.06, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 1.0, 1.5, 10.0]
    produced = celo_lr_mult(theta, torch.tensor(x, dtype=torch.float64)).tolist()
    lines = ["| fraction done | wanted | produced | error |", "| ---: | ---: | ---: | ---: |"]
    for t, value in zip(x, produced, strict=True):
        wanted = peak * schedules.floored_schedule(t)
        lines.append(f"| {t:g} | {wanted:.4f} | {value:.4f} | {100 * abs(value / wanted - 1):.2f} % |")
    lines += ["", "| part of the run, every 1/20,000 of it | largest error |", "| :--- | ---: |"]
    lines += [f"| {part} | {100 * e:.2f} % |" for part, e in celo_fit_errors(theta, peak).items()]
    return "\n".join(lines)


# ---- Builders -------------------------------------------------------------------------------------------------------


def build_velo(bank_scale: float = 100.0) -> Construction:
    """VeLO with an LSTM of 24 units and a bank of one network; ``bank_scale`` is the factor it is made for.

    Raises:
        RuntimeError: the schedule misses ``TOLERANCE``.
    """
    coefficients = schedules.coefficients()
    theta = velo_scheduler(coefficients)
    network = direction_network(DIRECTION)
    theta |= {f"ff_mod_stack/~/{name}": leaf for name, leaf in network.items()}
    # The rule multiplies by the bank factor and by the control; together they give 1.
    theta["rnn_params/rnn_to_controls/w"] = torch.zeros(len(coefficients), 1, dtype=torch.float32)
    theta["rnn_params/rnn_to_controls/b"] = torch.tensor([1.0 / bank_scale], dtype=torch.float32)

    for dtype in (torch.float64, torch.float32):
        errors = velo_fit_errors(theta, dtype)
        _check(max(errors["warm-up"], errors["decay"], errors["tail"]), TOLERANCE, dtype)
    errors = velo_fit_errors(theta)
    provenance = {
        "origin": {
            "ff_mod_stack": "constructed: the network computes a hand rule exactly",
            "rnn_params, lstm_init_state": "distilled: hand-set units, output layer fitted to a schedule",
        },
        "settings": {"bank_scale": bank_scale},
        "sizes": {"lstm_units": len(coefficients), "bank": 1},
        "numbers": {
            "direction": direction_record(DIRECTION),
            "limit": PULL_TEXT,
            "peak_lr_mult": PEAK,
            "schedule": SCHEDULE_TEXT,
            "guard": f"sigmoid({GUARD_GAIN:g} ({GUARD_THRESHOLD:g} - {GUARD_TEXT})) times as long",
        },
        "chosen_on": CHOSEN_ON,
        "fit_largest_error": {name: float(f"{value:.2g}") for name, value in errors.items()},
    }
    return Construction(theta, provenance, velo_table(theta))


def build_velo_s() -> Construction:
    """The same for ``bank_scale=1``, the default of velo_s."""
    built = build_velo(bank_scale=1.0)
    return Construction(built.theta, built.provenance)


def build_celo() -> Construction:
    """Celo: VeLO's direction, with one relative step for all tensors."""
    theta = celo_scheduler(CELO_PEAK)
    network = direction_network(DIRECTION)
    theta |= {f"ff_mod_stack/~/{name}": leaf for name, leaf in network.items()}
    # The softmax over one network is 1 whatever the controls are.
    theta["rnn_params/rnn_to_controls/w"] = torch.zeros(len(theta["rnn_params/step_size/w"]), 1, dtype=torch.float32)
    theta["rnn_params/rnn_to_controls/b"] = torch.zeros(1, dtype=torch.float32)
    provenance = _celo_provenance(theta, CELO_PEAK, direction_record(DIRECTION))
    provenance["origin"] = {
        "ff_mod_stack": "constructed: the network computes a hand rule exactly",
        **provenance["origin"],
    }
    provenance["chosen_on"] = (
        f"Direction and peak are those of the velo file, for matrices. For that file: {CHOSEN_ON}"
    )
    return Construction(theta, provenance, celo_table(theta, CELO_PEAK))


def build_celo_adam() -> Construction:
    """Celo-Adam: Adam with a learning rate that follows the schedule."""
    theta = celo_scheduler(CELO_ADAM_PEAK)
    provenance = _celo_provenance(theta, CELO_ADAM_PEAK, None)
    provenance["chosen_on"] = (
        "Peaks of 2, 3 and 5 were compared on two small validation tasks (digits autoencoder, a tiny transformer on a "
        "synthetic Markov source), one seed. The largest did best there; 3 was taken, since larger models stand less. "
        "The schedule is that of the velo file. The recipes of this package took no part."
    )
    return Construction(theta, provenance)


def _celo_provenance(
    theta: Mapping[str, Tensor], peak: float, direction: dict[str, float] | None
) -> dict[str, object]:
    for dtype in (torch.float64, torch.float32):
        _check(max(celo_fit_errors(theta, peak, dtype).values()), CELO_TOLERANCE, dtype)
    errors = celo_fit_errors(theta, peak)
    return {
        "origin": {"rnn_params, lstm_init_state": "distilled: hand-set units, output layer fitted to a log schedule"},
        "settings": {},
        "sizes": {"lstm_units": len(theta["rnn_params/step_size/w"])},
        "numbers": {
            **({} if direction is None else {"direction": direction, "limit": PULL_TEXT}),
            "peak_lr_mult": peak,
            "schedule": f"(s + {schedules.LOG_FLOOR:g}) / {1 + schedules.LOG_FLOOR:g} with s = {SCHEDULE_TEXT}",
            "guard": f"exp(-{CELO_GUARD_DEPTH:g} sigmoid({CELO_GUARD_GAIN:g} ({GUARD_TEXT} - {GUARD_THRESHOLD:g}))) "
            "times as long",
        },
        "fit_largest_error": {name: float(f"{value:.2g}") for name, value in errors.items()},
    }


def _check(error: float, allowed: float, dtype: torch.dtype) -> None:
    if error > allowed:
        raise RuntimeError(f"the fitted schedule is off by {error:.2%} in {dtype}, allowed is {allowed:.0%}")
