"""One step of every update rule in float64, written from the papers in their order: no kernels, lists or shards.

Arrays are NumPy float64 in the references' axis order, (*kernel, in, out). A step takes parameters, gradients, the
state, which it changes in place and which starts as ``{}``, and the weights ``theta``; it returns new parameters. Keys
of a state are those of ``optimizer.state``, ``optimizer.param_groups`` and ``optimizer.report``. Accumulators have
their decays first, (D, *s); row and column accumulators keep the axis that is averaged, with size 1.

`celo`, `celo_adam`, `small_fc` (also for μLO and ELO) and `celo2` (also for ELO-Celo2) take one tensor. `velo` and
`rnn_mlp` take all tensors of the run by name, because a step of one depends on the others; their states are dicts by
name, and ``state["run"]`` belongs to the run. In `celo` and `celo_adam` every tensor has a copy of the run's state.

D decays, s the tensor's shape, F feature columns, H units of an LSTM, K networks in a bank, T tensors.
"""

from __future__ import annotations

import numpy as np
from numpy import abs, clip, exp, log, maximum, minimum, sign, sin, sqrt, tanh


DECAYS = (0.9, 0.99, 0.999)
STEP_SCALES = np.array([1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000], dtype=np.float64)
TIME_FRACTIONS = np.array([0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1])
VELO_FEATURES = ("g", "clip_g", "p", "m", "v", "m_rsqrt_v", "rsqrt_v", "fac_g", "g_rsqrt_v")
VELO_FEATURES += ("row", "col", "rsqrt_row", "rsqrt_col", "fac_m")
SMALL_FC_FEATURES = (
    "g",
    "p",
    "m",
    "v",
    "m_rsqrt_v",
    "rsqrt_v",
    "fac_g",
    "row",
    "col",
    "rsqrt_row",
    "rsqrt_col",
    "fac_m",
)
RNN_MLP_FEATURES = ("g", "p", "log_abs_p", "m", "v", "m_rsqrt_v", "rsqrt_v")


# ---- accumulators, features, network --------------------------------------------------------------------------------


def ema(old: np.ndarray | float, new: np.ndarray, decays) -> np.ndarray:
    """Moving averages (D, *s). Decays are rounded to float32 first, as in the references: it shows in 1 - 0.999."""
    b = np.float64(np.float32(decays)).reshape(-1, *[1] * new.ndim)
    return b * old + (1 - b) * new


def factored_axes(shape: tuple[int, ...]) -> tuple[int, int]:
    """A, the largest axis, and B, the second largest; of equals the later one is the larger."""
    ascending = np.argsort(shape, kind="stable")
    return int(ascending[-1]), int(ascending[-2])


def accumulate(state: dict, g: np.ndarray, momentum=DECAYS, second_moment=(0.999,), factored=DECAYS) -> None:
    """Momenta, second moments, and the factored ones: rows without A and columns without B, or a diagonal."""
    averages = {"momentum": (g, momentum), "second_moment": (g**2, second_moment)}
    if len(factored) and g.ndim < 2:
        averages["factored_diag"] = (g**2 + 1e-30, factored)
    elif len(factored):
        a, b = factored_axes(g.shape)
        averages["factored_row"] = ((g**2 + 1e-30).mean(a, keepdims=True), factored)
        averages["factored_col"] = ((g**2 + 1e-30).mean(b, keepdims=True), factored)
    for key, (new, decays) in averages.items():
        state[key] = ema(state.get(key, 0.0), new, decays)


def features(p: np.ndarray, g: np.ndarray, state: dict, second_eps: float = 1e-6, diagonal_eps: float = 0.0) -> dict:
    """All features by name, (columns, *s) up to broadcasting, from accumulators that are updated already."""
    m, v = state["momentum"], state["second_moment"]
    root = 1 / sqrt(v + second_eps)
    found = {"g": g[None], "clip_g": clip(g, -0.1, 0.1)[None], "p": p[None], "log_abs_p": log(abs(p) + 1e-8)[None]}
    found |= {"m": m, "v": v, "m_rsqrt_v": m * root, "rsqrt_v": root, "g_rsqrt_v": g * root}
    if "factored_diag" in state:
        row = col = state["factored_diag"]
        found["fac_g"] = g / sqrt(maximum(row + 1e-9, 1e-9))
        found["fac_m"] = m / sqrt(row + diagonal_eps)
    elif "factored_row" in state:
        row, col, b = state["factored_row"], state["factored_col"], factored_axes(g.shape)[1]
        row_factor = 1 / sqrt(maximum(row / (row.mean(b + 1, keepdims=True) + 1e-9), 1e-9))
        factor = row_factor / sqrt(maximum(col, 1e-9))
        found["fac_g"], found["fac_m"] = g * factor, m * factor
    else:
        return found
    return found | {"row": row, "col": col, "rsqrt_row": 1 / sqrt(row + 1e-8), "rsqrt_col": 1 / sqrt(col + 1e-8)}


def normalised(x: np.ndarray, eps: float, axes: tuple[int, ...] | None = None) -> np.ndarray:
    """Each column (columns, *s) brought to a mean square of about 1 over ``axes``; None: over the whole tensor."""
    axes = tuple(range(1, x.ndim)) if axes is None else axes
    return x / sqrt(eps + (x**2).mean(axes, keepdims=True))


def network(columns: list[np.ndarray], shape: tuple[int, ...], weights: list, biases: list) -> np.ndarray:
    """ReLU network of every element: columns (n, *s) up to broadcasting -> outputs (outputs, *s)."""
    z = np.moveaxis(np.concatenate([np.broadcast_to(x, (len(x), *shape)) for x in columns]), 0, -1)
    for layer, (w, b) in enumerate(zip(weights, biases, strict=True)):
        z = (maximum(z, 0) if layer else z) @ w + b
    return np.moveaxis(z, -1, 0)


def constants(values: np.ndarray, rank: int) -> np.ndarray:
    """Columns (n, 1, ..., 1) of inputs that are constant over a tensor."""
    return np.reshape(values, (-1, *[1] * rank))


# ---- schedulers of VeLO, Celo and Celo-Adam -------------------------------------------------------------------------


def linear(x: np.ndarray, theta: dict, name: str) -> np.ndarray:
    return x @ theta[f"{name}/w"] + theta[f"{name}/b"]


def lstm(x: np.ndarray, state: dict, theta: dict) -> None:
    """The LSTM of one tensor: input x, state (H,)."""
    hidden = state.get("lstm_hidden", theta["lstm_init_state/hidden"][0])
    cell = state.get("lstm_cell", theta["lstm_init_state/cell"][0])
    i, g, f, o = np.split(linear(np.concatenate([x, hidden]), theta, "rnn_params/rnn/linear"), 4)
    cell = cell / (1 + exp(-f - 1)) + tanh(g) / (1 + exp(-i))
    state |= {"lstm_hidden": tanh(cell) / (1 + exp(-o)), "lstm_cell": cell}


def mix(rows: np.ndarray, theta: dict) -> np.ndarray:
    """Mixing layer (T, I) -> (T, H), in which the maximum over tensors couples them."""
    largest = maximum(linear(rows, theta, "rnn_params/linear_1"), 0).max(0)
    return linear(rows, theta, "rnn_params/linear_2") + largest


def time_and_loss(run: dict, loss: float, horizon: int) -> np.ndarray:
    """Inputs (18,) that all tensors share; counts the step and updates the averages of the loss."""
    i = run.get("step", 0)
    decay = exp(-1 / np.logspace(1, np.log10(horizon), 10))
    means, low = run.get("loss_means", np.zeros(10)), run.get("loss_min", np.full(10, 999999999999.0))
    largest = (means / (1 - decay ** (i + 1))).max() if i else loss
    means = decay * means + (1 - decay) * minimum(loss, 2 * abs(largest))
    corrected = means / (1 - decay ** (i + 1))
    low = minimum(low, corrected)
    slopes = (corrected - low)[:9] / maximum(corrected[1:] - low[:9], 1e-8) - 1
    slopes = clip(slopes, -1, 1) if i >= 2 else np.zeros(9)
    run |= {"step": i + 1, "loss_means": means, "loss_min": low}
    return np.concatenate([tanh(10 * (i / horizon - TIME_FRACTIONS)), slopes])


def relative_step(p, g, state: dict, weights: list, biases: list, min_param_scale: float) -> np.ndarray:
    """The network's step of VeLO and Celo, relative to the size of the tensor; updates the accumulators."""
    g = clip(g, -1000, 1000)
    accumulate(state, g)
    found = features(p, g, state)
    o = network([normalised(found[name], 1e-5) for name in VELO_FEATURES], p.shape, weights, biases)
    size = maximum(sqrt((p**2).mean() + 1e-9), min_param_scale)
    return 0.001 * size * o[0] * exp(0.001 * o[1])


def from_bank(theta: dict, controls: np.ndarray) -> tuple[list, list]:
    """Weights and biases of the sum over the bank of controls (K,) times networks."""
    bank = "ff_mod_stack/~/"
    first = np.concatenate([theta[f"{bank}w0__{k}"] for k in range(len(VELO_FEATURES))], 1)
    weights = [first, theta[f"{bank}w1"], theta[f"{bank}w2"]]
    biases = [theta[f"{bank}b{layer}"] for layer in range(3)]
    return tuple([np.tensordot(controls, x, 1) for x in xs] for xs in (weights, biases))


# ---- rules ----------------------------------------------------------------------------------------------------------


def velo(
    params: dict, grads: dict, state: dict, theta: dict, loss: float, *, horizon: int, bank_scale: float,
    lr: float = 1.0, weight_decay: float = 0.0, min_param_scale: float = 0.0,
) -> dict:  # fmt: skip
    """Metz et al. 2022, arXiv:2211.09760. A network of each tensor is a mixture of a bank of them."""
    run, rows = state.setdefault("run", {}), []
    shared = time_and_loss(run, loss, horizon)
    for name, p in params.items():  # accumulators as they are before this step
        of_tensor = state.setdefault(name, {})
        m = of_tensor.get("momentum", np.zeros((3, *p.shape))).reshape(3, -1)
        v = of_tensor.get("second_moment", np.zeros((1, *p.shape))).reshape(1, -1)
        unit = 1 / sqrt(maximum((p**2).mean(), 1e-9))
        mean_m = m.mean(1, keepdims=True)
        sizes = [unit * v.mean(1), unit**2 * ((m - mean_m) ** 2).mean(1), unit**2 * ((v - mean_m) ** 2).mean(1)]
        sizes = [0.5 * clip(log(1e-8 + abs(10 * x)), -5, 5) for x in sizes]
        rank = np.arange(5) == np.sum(np.array(p.shape) > 1)
        rows.append(np.concatenate([shared, sizes[0], rank, *sizes[1:]]))
    run["scheduler_inputs"] = np.array(rows)
    new, run["lr_mult"] = {}, []
    for (name, p), mixed in zip(params.items(), mix(run["scheduler_inputs"], theta), strict=True):
        lstm(mixed, state[name], theta)
        controls = linear(state[name]["lstm_hidden"], theta, "rnn_params/rnn_to_controls")
        lr_mult = linear(state[name]["lstm_hidden"], theta, "rnn_params/step_size")[0]
        weights, biases = from_bank(theta, bank_scale * controls / len(controls))
        step = lr_mult * relative_step(p, grads[name], state[name], weights, biases, min_param_scale)
        new[name] = p - lr * (step + weight_decay * p)
        run["lr_mult"].append(lr_mult)
    return new


def celo_schedule(state: dict, theta: dict, loss: float, horizon: int) -> float:
    """Celo's multiplier of the step size. All tensors have the same inputs, so one is enough for the mixing layer."""
    state["scheduler_inputs"] = time_and_loss(state, loss, horizon)
    lstm(mix(state["scheduler_inputs"][None], theta)[0], state, theta)
    state["lr_mult"] = 0.1 * exp(linear(state["lstm_hidden"], theta, "rnn_params/step_size")[0])
    return state["lr_mult"]


def celo(
    p: np.ndarray, g: np.ndarray, state: dict, theta: dict, loss: float, *, horizon: int,
    lr: float = 1.0, weight_decay: float = 0.0, min_param_scale: float = 0.0,
) -> np.ndarray:  # fmt: skip
    """Moudgil et al. 2025, arXiv:2501.12670."""
    lr_mult = celo_schedule(state, theta, loss, horizon)
    controls = exp(linear(state["lstm_hidden"], theta, "rnn_params/rnn_to_controls"))
    weights, biases = from_bank(theta, controls / controls.sum())
    return p - lr * (lr_mult * relative_step(p, g, state, weights, biases, min_param_scale) + weight_decay * p)


def adam(g: np.ndarray, state: dict, second_decay: float, corrected: bool) -> tuple[np.ndarray, np.ndarray]:
    """Adam's moments after this gradient, with or without bias correction; ``state["step"]`` counts this step."""
    accumulate(state, g, (0.9,), (second_decay,), ())
    (m,), (v,), n = state["momentum"], state["second_moment"], state["step"]
    return (m / (1 - 0.9**n), v / (1 - second_decay**n)) if corrected else (m, v)


def celo_adam(
    p: np.ndarray, g: np.ndarray, state: dict, theta: dict, loss: float, *, horizon: int,
    lr: float = 1.0, weight_decay: float = 0.0,
) -> np.ndarray:  # fmt: skip
    """Celo's schedule over Adam; Moudgil et al. 2025, arXiv:2501.12670."""
    lr_mult = celo_schedule(state, theta, loss, horizon)
    m, v = adam(clip(g, -1000, 1000), state, 0.999, corrected=True)
    return p - lr * (0.001 * lr_mult * m / (sqrt(v + 1e-10) + 1e-8) + weight_decay * p)


def small_fc(
    p: np.ndarray, g: np.ndarray, state: dict, theta: dict, *, lr: float = 1.0, weight_decay: float = 0.0,
    step_scale: float = 1.0, step_mult: float = 0.001, exp_mult: float = 0.001,
) -> np.ndarray:  # fmt: skip
    """Metz et al. 2022, arXiv:2203.11860. ``step_scale`` is μLO's width multiplier of the tensor, arXiv:2406.00153."""
    i = state.get("step", 0)
    leaves = (("momentum_decays", DECAYS), ("rms_decays", (0.999,)), ("adafactor_decays", DECAYS))
    momentum, second, factored = (1 - (1 - np.float32(b)) * exp(10 * theta[leaf]) for leaf, b in leaves)
    accumulate(state, g, momentum, clip(second, 0, 1), clip(factored, 0, 1))
    found = features(p, g, state, diagonal_eps=1e-6)
    columns = [normalised(found[name], 1e-5) for name in SMALL_FC_FEATURES]
    columns.append(constants(tanh(i / STEP_SCALES - 1), p.ndim))
    weights, biases = ([theta[f"nn/~/{kind}{layer}"] for layer in range(3)] for kind in "wb")
    o = network(columns, p.shape, weights, biases)
    state["step"] = i + 1
    return p - lr * (step_scale * step_mult * o[0] * exp(exp_mult * o[1]) + weight_decay * p)


def newton_schulz(x: np.ndarray) -> np.ndarray:
    """Matrices (..., R, C) with singular values near 1: five steps of a quintic iteration."""
    x = x / (np.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8)
    for _ in range(5):
        a = x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x
        polynomial = -4.775 * a + 2.0315 * a @ a
        x = 3.4445 * x + (polynomial @ x if x.shape[-2] <= x.shape[-1] else x @ polynomial)
    return x


def celo2(
    p: np.ndarray, g: np.ndarray, state: dict, theta: dict, *, lr: float, weight_decay: float = 0.0,
    branch: str = "network", orthogonalize: bool = True, adam_lr_mult: float = 20.0,
    adam_bias_correction: bool = False,
) -> np.ndarray:  # fmt: skip
    """Moudgil et al. 2026, arXiv:2602.19142. Vectors and embeddings may go to the Adam branch."""
    state["step"] = state.get("step", 0) + 1
    if branch == "adam":
        m, v = adam(g, state, 0.95, adam_bias_correction)
        step = m / (sqrt(v) + 1e-8) if adam_bias_correction else m / sqrt(v + 1e-8)
        return p - adam_lr_mult * lr * (step + weight_decay * p)
    g = clip(g, -1000, 1000)
    accumulate(state, g, second_moment=(0.95,))
    found = features(p, g, state, second_eps=1e-8)
    # Each matrix of a stack is normalised by itself; a vector has no row and column features.
    axes, names = tuple(range(1, p.ndim + 1))[-2:], VELO_FEATURES[: 14 if p.ndim >= 2 else 9]
    bank = "ff_mod_stack/~/"
    first = np.concatenate([theta[f"{bank}w0__{k}"] for k in range(len(names))])
    weights, biases = [first, theta[f"{bank}w1"], theta[f"{bank}w2"]], [theta[f"{bank}b{n}"] for n in range(3)]
    o = network([normalised(found[name], 1e-9, axes) for name in names], p.shape, weights, biases)
    step = newton_schulz(o[:1]) if orthogonalize and p.ndim >= 2 else o[:1]
    return p - lr * (normalised(step, 1e-9, axes)[0] + weight_decay * p)


def clip_global_norm(grads: dict, largest: float = 1.0) -> dict:
    """ELO-Celo2's gradients: all of them scaled where the norm of all is above ``largest``."""
    norm = sqrt(sum((g**2).sum() for g in grads.values()))
    return {name: g * minimum(1, largest / (norm + 1e-6)) for name, g in grads.items()}


def rnn_mlp(
    params: dict, grads: dict, state: dict, theta: dict, loss: float, *, lr: float = 1.0, weight_decay: float = 0.0
) -> dict:
    """Metz et al. 2020, arXiv:2009.11243: an LSTM for each tensor and a network send messages to each other."""
    run = state.setdefault("run", {})
    i, clip_value = run.get("step", 0), run.get("clip_value", 0.01)
    from_lstm = run.get("from_lstm", theta["initial_from_lstm"])
    bound = 10 * clip_value / (1 - 0.99 ** (i + 1))
    grads = {name: clip(grads[name], -bound, bound) for name in params}
    mean_square = np.mean([(g**2).mean() for g in grads.values()])
    mean = 0.9 * run.get("loss_mean", 0.0) + 0.1 * loss
    var = 0.9 * run.get("loss_var", 0.0) + 0.1 * (mean - loss) ** 2
    k = 1 - 0.9 ** (i + 1) + 1e-7
    losses = clip((np.array([loss, 0.0]) - mean / k) / sqrt(var / k + 1e-8), -5, 5)

    def size(x: np.ndarray) -> np.ndarray:
        return clip(log(1e-8 + abs(x)), -5, 5)

    new, run["scheduler_inputs"] = {}, []
    decays = (0.5, 0.9, 0.99, 0.999, 0.9999)
    for name, p in params.items():
        g, of_tensor = grads[name], state.setdefault(name, {})
        accumulate(of_tensor, g, decays, decays, ())
        means = [x.mean() for x in (of_tensor["momentum"], of_tensor["second_moment"], p)]
        variances = [x.var() for x in (of_tensor["momentum"], of_tensor["second_moment"], p)]
        shape = [log(n) - 1 for n in (*p.shape, *[1] * (4 - p.ndim))]
        inputs = [from_lstm, of_tensor.get("from_mlp", theta["initial_from_mlp"]), [size(sqrt((g**2).sum()))]]
        inputs += [[1.0 if p.ndim == 0 else -1.0], *([size(x), sign(x)] for x in means)]
        inputs += [[size(sqrt((p**2).sum()))], shape, losses, [size(x) for x in variances]]
        lstm(np.concatenate(inputs), of_tensor, theta)
        run["scheduler_inputs"].append(np.concatenate(inputs))

        found = features(p, g, of_tensor)
        to_mlp = linear(of_tensor["lstm_hidden"], theta, "rnn_to_ff_params/rnn_to_ff")
        of_run = [*sin(i / (STEP_SCALES * np.pi)), log(len(params)) - 1, log(sqrt((p**2).sum()) + 1e-8), log(p.size)]
        columns = [normalised(found[feature], 1e-5) for feature in RNN_MLP_FEATURES]
        columns.append(constants(np.array([*of_run, *to_mlp]), p.ndim))
        layers = [[theta[f"ffmod_params/mlp/~/linear_{layer}/{kind}"] for layer in range(3)] for kind in "wb"]
        o = network(columns, p.shape, *layers)
        of_tensor["from_mlp"] = o[2:].reshape(16, -1).mean(1)
        new[name] = p - lr * (0.001 * o[0] * exp(0.001 * o[1]) + weight_decay * p)
    messages = [linear(state[name]["lstm_hidden"], theta, "rnn_to_in_params/rnn_to_in") for name in params]
    run |= {"step": i + 1, "from_lstm": np.mean(messages, 0), "loss_mean": mean, "loss_var": var}
    run["clip_value"] = 0.99 * clip_value + 0.01 * sqrt(1e-8 + mean_square)
    return new
