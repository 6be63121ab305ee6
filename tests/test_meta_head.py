"""The head on VeLO's scheduler: what it does to a step, its bound, and the searches for its numbers."""

import math

import numpy as np
import pytest
import torch

from hf_lopt.meta import config, evaluate, head, search, tasks, theta
from test_embedded import lr_mult, scheduler_inputs


NAMES = ["time[1]", "time[8]", "loss[0]", "loss[8]", "small[0]", "small[2]", "steady[2]", "matrix", "vector"]
GATED = ["small_matrix[0]", "small_vector[1]"]
SETTINGS = {
    "rule": "velo",
    "tasks": {"functions_mlp": 2},
    "runs": {"truncation": 5, "shortest": 10, "longest": 20, "lr": [1.0, 1.0]},
    "mixture": {"matrix": 0.0, "small[0]": 1.0, "p[0]": 0.0},
    "outer": {"steps": 2, "lr": 0.1},
    "population": 4,
}


@pytest.fixture(scope="module")
def start():
    return theta.starting_weights("velo", "constructed")


def of(leaves, inputs):
    """lr_mult (N,) by the scheduler that is written out in NumPy."""
    return lr_mult({name: leaf.numpy() for name, leaf in leaves.items()}, inputs)[0]


def random_inputs(rank, seed=0):
    """Inputs within their limits, from the middle of a run: loss features up to 1, statistics up to 2.5."""
    rng = np.random.default_rng(seed)
    inputs = scheduler_inputs(rng.uniform(0.05, 0.9, 500), rank, rng)
    inputs[:, 9:18] = rng.uniform(-1.0, 1.0, (500, 9))
    return inputs


def test_zeros_are_the_constructed_weights(start):
    """In a run, with every kind of number, to float32 rounding; bit by bit where only the direction has numbers."""
    zeros = dict.fromkeys([*NAMES, *GATED, "fac_g[0]", "p[0]", "fac_m[0]"], 0.0)
    leaves = head.head_leaves(start, zeros)
    fewer = head.head_leaves(start, {"fac_g[0]": 0.0, "p[0]": 0.0})
    task = tasks.named("functions_mlp")
    plain, same, close = (evaluate.learned(task, "velo", w, 30, 2).losses for w in (start, fewer, leaves))
    assert torch.equal(same, plain)
    torch.testing.assert_close(close, plain, rtol=1e-4, atol=0)
    for rank in (1, 2):
        x = random_inputs(rank)
        np.testing.assert_array_equal(of(fewer, x), of(start, x))
        np.testing.assert_allclose(of(leaves, x), of(start, x), rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("rank", [0, 1, 2, 4, 5])
def test_numbers_are_logarithms_of_factors(start, rank):
    """The factor by hand, from the input gate: sigmoid(i + s) / sigmoid(i), where that of i is 2^-16 or half of it."""
    numbers = {"time[1]": -0.2, "loss[3]": 0.3, "small[1]": 0.6, "steady[2]": -0.5, "vector": 0.25, "matrix": -0.4}
    x = random_inputs(rank)
    s = -0.2 * (x[:, 1] + 1) / 2 + 0.3 * (x[:, 12] + 1) / 2 + (0.25 if rank < 2 else -0.4)
    s = s + (0.6 * (x[:, 25] - x[:, 18]) - 0.5 * (x[:, 26] - x[:, 24])) / 5
    gate = 2.0**-16 if rank < 2 else 2.0**-17
    factor = np.exp(s) / (1 + gate * (np.exp(s) - 1))
    ratio = of(head.head_leaves(start, numbers), x) / of(start, x)
    # Two roundings are in the way: that of the gate's bias, and the tanh after the cell.
    np.testing.assert_allclose(ratio, factor, rtol=2e-3)
    low, high = head.bounds(numbers)
    assert (np.log(ratio) > low - 2e-3).all() and (np.log(ratio) < high + 2e-3).all()


@pytest.mark.parametrize("number", [2.0, 4.0, 6.0])
def test_the_end_of_a_run_stays_quiet(start, number):
    """However large the factor is: what is left of a step past the end is as small a part of the peak as it was."""
    leaves = head.head_leaves(start, {"vector": number, "matrix": number})
    x = np.concatenate([np.linspace(0.99, 1.0, 50), [1.1, 1.5, 2.0, 10.0, 1e3]])
    for rank, peak in ((1, 24.0), (2, 12.0)):
        inputs = scheduler_inputs(x, rank)
        error = of(leaves, inputs) / math.exp(number) - of(start, inputs)
        assert np.abs(error).max() < 1e-3 * peak * 0.5


@pytest.mark.parametrize("rank", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("kind", ["matrix", "vector"])
def test_numbers_for_one_kind_of_tensor(start, kind, rank):
    """They take effect a step later, on tensors of their kind; the rest of the scheduler does not notice."""
    leaves = {
        name: leaf.numpy() for name, leaf in head.head_leaves(start, {f"small_{kind}[1]": 2.0, "vector": 0.5}).items()
    }
    first, second = random_inputs(rank), random_inputs(rank, seed=1)
    produced, state = lr_mult(leaves, first)
    plain = math.exp(0.5) if rank < 2 else 1.0
    np.testing.assert_allclose(produced / of(start, first), plain, rtol=5e-3)
    z = (first[:, 25] - first[:, 18]) / 5
    s = 2.0 * np.tanh(np.tanh(z)) / np.tanh(np.tanh(1)) * (kind == ("vector" if rank < 2 else "matrix"))
    gate = 2.0**-16 if rank < 2 else 2.0**-17
    factor = plain * np.exp(s) / (1 + gate * (plain * np.exp(s) - 1))
    ratio = lr_mult(leaves, second, state)[0] / of(start, second)
    np.testing.assert_allclose(ratio, factor, rtol=5e-3)
    assert (kind == "vector") != (rank < 2) or ratio.max() / ratio.min() > 4.0


def test_numbers_of_the_direction(start):
    """The network's first output, per column: constructed coefficients 1, 0.3, 0.1 times the factor."""
    leaves = head.head_leaves(start, {"fac_g[0]": math.log(2.0), "p[0]": -math.log(4.0)})
    first = torch.cat([leaves[f"ff_mod_stack/~/w0__{k}"] for k in range(14)], 1)[0]
    columns = {name: column for column, name in zip((2, 11, 27), ("p", "fac_g", "fac_m"), strict=True)}
    for name, wanted in (("p", 0.025), ("fac_g", 0.6), ("fac_m", 1.0)):
        assert first[columns[name], 2 * (name == "p")].item() == pytest.approx(wanted), name
    assert first.count_nonzero() == 6


def test_the_factor_is_bounded_whatever_the_numbers(start):
    """Extreme inputs and numbers far too large: between 1/512 and 512, and never a step uphill."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        numbers = dict(zip(NAMES, (20.0 * torch.randn(len(NAMES), generator=generator)).tolist(), strict=True))
        leaves = head.head_leaves(start, numbers)
        for rank in (1, 2):
            x = random_inputs(rank, seed)
            x[:, 9:18] = np.sign(x[:, 9:18])
            x[:, [18, *range(24, 30)]] = 2.5 * np.sign(x[:, [18, *range(24, 30)]])
            ratio = of(leaves, x) / of(start, x)
            assert ratio.min() > 1 / 512.1 and ratio.max() < 512.1
            assert ratio.max() / ratio.min() > 2.0  # the numbers still do something


@pytest.mark.parametrize("name", ["loss[9]", "small", "small[3]", "steady[0]", "rank", "m[0]", "p[1]"])
def test_unknown_numbers(start, name):
    with pytest.raises(ValueError, match="fac_g"):
        head.head_leaves(start, {name: 1.0})


def test_weights_without_a_free_channel(start):
    full = start | {"rnn_params/linear_2/b": torch.ones_like(start["rnn_params/linear_2/b"])}
    with pytest.raises(ValueError, match="constructed"):
        head.head_leaves(full, {"matrix": 1.0})


@pytest.mark.parametrize("method", ["pes", "cma_es"])
def test_searches_move_the_numbers(method):
    """Both searches train the numbers alone; the weights that come out are those of the head."""
    found = search.search(config.from_dict(SETTINGS | {"perturbation": {"method": method, "std": 0.1}}))
    for _ in range(2):
        metrics = found.step()
    assert math.isfinite(metrics["meta_loss"])
    leaves = found.theta()
    start = theta.starting_weights("velo", "constructed")
    changed = {name for name, leaf in leaves.items() if not torch.equal(leaf, start[name])}
    own = ("linear_2/w", "linear_2/b", "rnn/linear/w", "rnn/linear/b", "step_size/w")
    assert changed <= {f"rnn_params/{name}" for name in own} | {"ff_mod_stack/~/w0__2"}
    number = (found.average if method == "pes" else found._mean())[1].item()
    assert number != 1.0 and leaves["rnn_params/linear_2/w"][24].sum().item() == pytest.approx(number / 5, rel=1e-5)


def test_balance_counts_every_task_alike():
    """A task whose losses spread a hundred times as much must not decide alone."""
    settings = SETTINGS | {"tasks": {"functions_mlp": 1, "digits_mlp": 1}, "balance": 1e-9}
    found = search.search(config.from_dict(settings | {"perturbation": {"method": "cma_es", "std": 0.5}}))
    found.step()
    told = found.history[0]["values"]
    # The mean of two series with mean 0 and variance 1.
    assert told.mean().item() == pytest.approx(0.0, abs=1e-9) and 0.0 < told.var().item() <= 1.0 + 1e-9


def test_adapters_can_be_trained_on():
    """The model under them is trained when its parameters are first needed, which may be where no gradients are."""
    runs = {"truncation": 2, "shortest": 2, "longest": 2, "lr": [1.0, 1.0]}
    settings = SETTINGS | {"tasks": {"adapters": 1}, "runs": runs, "perturbation": {"method": "cma_es", "std": 0.1}}
    assert math.isfinite(search.search(config.from_dict(settings)).step()["meta_loss"])
