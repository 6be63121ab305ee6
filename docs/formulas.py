"""What docs/features.md says beyond the rows of `hf_lopt.features`: formulas of accumulators, schedulers and steps.

Text for readers; `tests/reference_steps.py` has the same in float64, and the optimizers are compared with it. Names
that a formula may use are in `SYMBOLS`.
"""

from __future__ import annotations


SYMBOLS = {
    "p": "the parameter before the step",
    "g": "its gradient, after the rule's clip",
    "m, v": "momenta and second moments",
    "A, B": "the largest and the second largest axis",
    "R, C": "row and column accumulators, which have lost axis A and axis B",
    "r, c": "row factor and column factor",
    "D": "diagonal accumulator, for rank < 2",
    "b": "a decay; accumulators have a leading axis of them",
    "i": "steps done: 0 in the first step",
    "N": "length of the run, `num_training_steps`",
    "T": "number of tensors",
    "mean(x)": "mean over the tensor; `mean(x, A)` over axis A only",
}


# Per-element features by the names of hf_lopt.features: what each is.
ELEMENT = {
    "g": "gradient",
    "clip_g": "clipped gradient",
    "p": "parameter",
    "log_abs_p": "size of the parameter",
    "m": "momentum",
    "v": "second moment",
    "m_rsqrt_v": "Adam's direction",
    "rsqrt_v": "inverse root of the second moment",
    "g_rsqrt_v": "gradient in units of its size",
    "fac_g": "gradient over the factored root",
    "fac_m": "momentum over the factored root",
    "row": "row accumulator",
    "col": "column accumulator",
    "rsqrt_row": "its inverse root",
    "rsqrt_col": "its inverse root",
}

# (symbol, expression, remark), read from top to bottom; a symbol on both sides is the old value on the right.
Program = tuple[tuple[str, str, str], ...]

ELEMENTWISE: Program = (
    ("m", "b * m + (1 - b) * g", "momentum"),
    ("v", "b * v + (1 - b) * g**2", "second moment"),
)
FACTORED: Program = (
    ("R", "b * R + (1 - b) * mean(g**2 + 1e-30, A)", "rank >= 2"),
    ("C", "b * C + (1 - b) * mean(g**2 + 1e-30, B)", "rank >= 2"),
    ("r", "1 / sqrt(max(R / (mean(R, B) + 1e-9), 1e-9))", "rank >= 2; further axes stay separate"),
    ("c", "1 / sqrt(max(C, 1e-9))", "rank >= 2"),
)
DIAGONAL: Program = (("D", "b * D + (1 - b) * (g**2 + 1e-30)", "rank < 2"),)
LEARNED_DECAY = "1 - (1 - b) * exp(10 * offset)"
NORMALISED = "x / sqrt(norm_eps + mean_n(x**2))"

STEP_FEATURE = "tanh(i / tau - 1)"
TIME_FEATURE = "tanh(10 * (i / N - tau))"
SINE_FEATURE = "sin(i / (tau * pi))"

LOSS: Program = (
    ("h", "logspace(1, log10(N), 10)", "ten horizons"),
    ("d", "exp(-1 / h)", "their decays"),
    ("k", "1 - d**(i + 1)", "bias correction"),
    ("top", "max(u / k) if i > 0 else loss", "u starts at 0"),
    ("loss", "min(loss, 2 * abs(top))", ""),
    ("u", "d * u + (1 - d) * loss", "running means"),
    ("low", "min(low, u / k)", "their minima, which start at 999999999999"),
    (
        "loss_features",
        "clip((u / k - low)[:9] / max((u / k)[1:] - low[:9], 1e-8) - 1, -1, 1) if i >= 2 else zeros(9)",
        "each mean against the next slower one",
    ),
)

LOG_SIZE = "0.5 * clip(log(1e-8 + abs(10 * x)), -5, 5)"
UNIT = "1 / sqrt(max(mean(p**2), 1e-9))"

# (name, columns, expression, words); L is LOG_SIZE, s is UNIT. Those of rnn_mlp's LSTM: tests/reference_steps.py.
Inputs = tuple[tuple[str, int, str, str], ...]

CELO_INPUTS: Inputs = (
    ("time", 9, "time", "fraction of the run that is done"),
    ("loss_features", 9, "loss_features", "trend of the loss"),
)
VELO_INPUTS: Inputs = (
    *CELO_INPUTS,
    ("mean_v", 1, "L(s * mean(v))", "size of the second moment"),
    ("rank", 5, "arange(5) == sum(shape > 1)", "number of axes longer than 1"),
    ("var_m", 3, "L(s**2 * mean((m - mean(m))**2))", "variance of each momentum"),
    ("var_v", 3, "L(s**2 * mean((v - mean(m))**2))", "second moment about the mean of each momentum"),
)

RNN_MLP_CONSTANTS: Inputs = (
    ("time", 11, "time", "steps done, at eleven scales"),
    ("tensors", 1, "log(T) - 1", "number of tensors"),
    ("norm", 1, "log(norm(p) + 1e-8)", "norm of the parameter"),
    ("size", 1, "log(size)", "number of elements"),
    ("to_mlp", 17, "to_mlp", "the LSTM's message to the network of this tensor, of this step"),
)

NEWTON_SCHULZ: Program = (
    ("x", "x / (norm(x) + 1e-8)", "once, with the Frobenius norm; a tall matrix is transposed"),
    ("a", "x @ x.T", "this line and the next five times"),
    ("x", "3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x", ""),
)
# Rule -> expressions that end in `step`; then p <- p - lr weight_decay p - step.
_VELO: Program = (
    ("s", "max(sqrt(mean(p**2) + 1e-9), min_param_scale)", "size of the tensor"),
    ("step", "lr * lr_mult * 0.001 * s * o0 * exp(0.001 * o1)", "o2 is not used"),
)
_SMALL_FC: Program = (("step", "lr * step_scale * step_mult * o0 * exp(exp_mult * o1)", ""),)
_CELO2: Program = (
    ("x", "newton_schulz(o0) if orthogonalize else o0", "rank >= 2, matrix by matrix; o1 and o2 are not used"),
    ("step", "lr * N(x)", "the normaliser of the features, once more"),
)
STEPS: dict[str, Program] = {
    "velo": _VELO,
    "velo_s": _VELO,
    "celo": _VELO,
    "celo_adam": (
        (
            "step",
            "lr * lr_mult * 0.001 * (m / (1 - 0.9**(i + 1))) / (sqrt(v / (1 - 0.999**(i + 1)) + 1e-10) + 1e-8)",
            "g is clipped to ±1000",
        ),
    ),
    "small_fc_lopt": _SMALL_FC,
    "mulo": _SMALL_FC,
    "elo": _SMALL_FC,
    "celo2": _CELO2,
    "celo2_base": _CELO2,
    "elo_celo2": _CELO2,
    "rnn_mlp": (("step", "lr * 0.001 * o0 * exp(0.001 * o1)", "the means of o2…o17 become `from_mlp`"),),
}
LR_MULT = {"velo": "x", "velo_s": "x", "celo": "0.1 * exp(x)", "celo_adam": "0.1 * exp(x)"}
# Rules -> their step.
ADAM_BRANCH = {
    "celo2, celo2_base": "lr * adam_lr_mult * m / sqrt(v + 1e-8)",
    "elo_celo2": "lr * adam_lr_mult * (m / (1 - 0.9**(i + 1))) / (sqrt(v / (1 - 0.95**(i + 1))) + 1e-8)",
}
