"""Accumulators and parameters in fewer bits: the formats, the random rounding, checkpoints.

The random numbers and codes are compared with ones that are worked out here, number by number.
"""

from __future__ import annotations

import copy
import io
import math
import struct
import warnings

import pytest
import torch
from torch import nn

import hf_lopt
from hf_lopt.kernels.reference import formats
from hf_lopt.step import accumulators
from test_rules import make


# Codes; rows that are too short for them; a kernel of a convolution; a vector and a matrix that stay float32.
SHAPES = [(40, 300), (128, 40), (64, 8, 3, 3), (300,), (16, 16), (2, 9, 260)]
FORMATS = ["int8", "bfloat16", "bfloat16", "float32", "float32", "bfloat16"]
LOW = ["bfloat16", "int8"]


def hashed(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
    return x ^ (x >> 16)


def random_number(tensor: int, row: int, column: int, slot: int, step: int) -> int:
    key = hashed((hashed(1) + (tensor + 1) * 0x9E3779B9) % 2**32)
    x = (hashed(key ^ hashed(row)) + column) * 0x85EBCA6B % 2**32
    x = x ^ (x >> 16)
    for _ in range(slot // 2 + 1):
        x = x * 0xC2B2AE35 % 2**32
        x = x ^ (x >> 15)
    turned = (x + step * 0x9E37 % 2**16 * 0x10001) % 2**32
    return turned >> 16 if slot % 2 else turned % 2**16


def place(number: int, shape: tuple[int, ...], starts: tuple[int, ...] | None = None) -> formats.Place:
    axis = accumulators.row_axis(shape, "torch")
    return formats.Place(formats.tensor_key(number), axis, starts or (0,) * len(shape), shape)


def step_number(n: int) -> torch.Tensor:
    return torch.tensor(n, dtype=torch.int64)


def params_of(shapes=SHAPES, dtype=torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((torch.randn(shape, generator=generator) * 0.1).to(dtype)) for shape in shapes]


def train(optimizer: hf_lopt.LearnedOptimizer, steps: range) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for t in steps:
        generator = torch.Generator().manual_seed(100 + t)
        for p in params:
            p.grad = (torch.randn(p.shape, generator=generator) * 0.1).to(p.dtype)
        optimizer.step(2.0 + 1.0 / (t + 1))


def test_random_numbers_are_those_of_the_hash():
    shape, starts = (4, 5, 6), (7, 2, 30)
    noise = formats.Noise(place(3, (20, 9, 50), starts), (), shape, step_number(11))
    assert accumulators.row_axis((20, 9, 50), "torch") == 2
    for slot in (0, 1, 5):
        got = noise(slot).expand(shape)
        for i, j, k in [(0, 0, 0), (3, 4, 5), (1, 2, 3)]:
            row, column = (starts[0] + i) * 9 + starts[1] + j, starts[2] + k
            assert got[i, j, k] == random_number(3, row, column, slot, 11)


def test_bfloat16_is_one_of_two_neighbours_and_right_on_average():
    x = torch.tensor([1.0, -1.003, 3.14159, 1e-20, -7e30, 0.0])
    draws = torch.arange(65536).unsqueeze(1)
    got = formats.round_to_bfloat16(x.expand(65536, -1), draws.expand(-1, 6)).double()
    unit = torch.tensor([2.0 ** (math.floor(math.log2(abs(v))) - 7) if v else 0.0 for v in x.tolist()]).double()
    assert ((got - x.double()).abs() <= unit).all()
    assert torch.allclose(got.mean(0), x.double(), rtol=2.0**-23, atol=0.0)
    special = torch.tensor([math.inf, -math.inf, math.nan, -math.nan])
    rounded = formats.round_to_bfloat16(special, torch.full((4,), 65535)).float()
    assert torch.equal(rounded[:2], special[:2]) and rounded[2:].isnan().all()


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_neighbours_and_right_on_average(signed):
    """Of a block with numbers of many sizes, by the grid of the codes; and the largest number is kept."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 256, generator=generator) * torch.logspace(-4, 0, 256)
    x = x if signed else x.square()
    codes, scale = formats.encode(x, 1, signed, [torch.full((1, 256), 30000)])
    unit = scale.item()
    grid = torch.arange(128 if signed else 256).double()
    grid = grid.square() * unit if signed else (grid.square() * unit).square()
    draws = torch.arange(0, 65536, 16).view(-1, 1, 1)
    many = [formats.encode(x.expand(1, 4096, 256), 1, signed, [draws[:, :, 0].expand(4096, 256)])]
    values = formats.decode(*many[0], 1)[0].double()
    magnitude = x[0, 0].double().abs()
    below = torch.bucketize(magnitude * (1 + 1e-6), grid, right=True) - 1
    above = (below + 1).clamp(max=len(grid) - 1)
    assert (values.abs() >= grid[below] * (1 - 1e-5)).all() and (values.abs() <= grid[above] * (1 + 1e-5)).all()
    assert (values * x[0].double().sign() >= 0).all()
    far = below > 0  # below the first code a second moment is never 0
    error = (values.mean(0) - x[0, 0].double()).abs()
    assert (error[far] <= 1e-3 * (grid[above] - grid[below])[far] + 1e-6 * magnitude[far]).all()
    assert values.abs().amax(0)[magnitude.argmax()].item() == pytest.approx(magnitude.max().item(), rel=1e-6)
    assert signed or (codes[x > 0] > 0).all()


def test_blocks_of_zeros_and_tiny_numbers_are_zero():
    x = torch.zeros(2, 3, 512)
    x[0, 1, :256], x[1, 2, 300] = 1e-37, 5.0
    codes, scale = formats.encode(x, 1, True, [torch.zeros(3, 512, dtype=torch.int64)] * 2)
    values = formats.decode(codes, scale, 1)
    assert scale.count_nonzero() == 1 and values.count_nonzero() == 1
    assert values[1, 2, 300].item() == pytest.approx(5.0)


def test_slow_averages_do_not_stall():
    """1,000 steps towards a gradient, with a decay of 0.999: within 1 %, where rounding to nearest is off by more
    than half. Random numbers that did not go on from step to step would miss 1 % (3 % for bfloat16)."""
    shape = (16, 256)
    gradient = 1.0 + torch.rand(shape, generator=torch.Generator().manual_seed(0))
    exact, nearest = torch.zeros(1, *shape), torch.zeros(1, *shape)
    stored = formats.Accumulator(torch.zeros(1, *shape, dtype=torch.bfloat16))
    for t in range(1, 1001):
        noise = formats.Noise(place(0, shape), (), shape, step_number(t))
        stored.put((), stored.load() * 0.999 + 0.001 * gradient, torch.Tensor.copy_, noise, 0)
        exact = exact * 0.999 + 0.001 * gradient
        nearest = (nearest * 0.999 + 0.001 * gradient).to(torch.bfloat16).float()
    error = ((stored.load() - exact).norm() / exact.norm()).item()
    assert error < 0.01
    assert ((nearest - exact).norm() / exact.norm()).item() > 0.3


@pytest.mark.parametrize("name", ["velo_s", "celo2", "rnn_mlp"])
def test_formats_by_shape(name):
    for kind in LOW:
        params = params_of()
        optimizer = make(name, params, state_dtype=kind, **({"branch": "network"} if name == "celo2" else {}))
        train(optimizer, range(1))
        for p, wanted in zip(params, FORMATS, strict=True):
            state = optimizer.state[p]
            wanted = kind if wanted == "int8" else wanted
            if wanted == "int8":
                assert "momentum" not in state and state["momentum_codes"].dtype == torch.int8
                blocks = -(-p.shape[-1] // 256)
                assert state["second_moment_scales"].shape[1:] == (*p.shape[:-1], blocks)
            else:
                assert state["momentum"].dtype == state["second_moment"].dtype == getattr(torch, wanted)
            others = {k: x for k, x in state.items() if not k.startswith(("momentum", "second"))}
            assert all(x.dtype == torch.float32 for x in others.values())


def test_matrices_of_celo2_have_whole_rows():
    """Those of a convolution along whose kernel rows lie would each write the scales of the others."""
    momenta = []
    for kind in ("float32", "int8"):
        params = params_of([(8, 4, 300)])
        optimizer = make("celo2", params, state_dtype=kind)
        train(optimizer, range(3))
        momenta.append(optimizer.state[params[0]]["momentum"].float())
    assert (momenta[0] - momenta[1]).norm() < 0.02 * momenta[0].norm()


@pytest.mark.parametrize("name", hf_lopt.available())
@pytest.mark.parametrize("kind", LOW)
def test_resume_is_bitwise_and_steps_are_close(name, kind):
    shapes = [(40, 300), (128, 40), (300,)]
    params, exact = params_of(shapes), params_of(shapes)
    optimizer, reference = make(name, params, state_dtype=kind), make(name, exact)
    train(reference, range(6))
    train(optimizer, range(3))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    resumed = [nn.Parameter(p.detach().clone()) for p in params]
    other = make(name, resumed, state_dtype=kind)
    buffer.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(torch.load(buffer, weights_only=True))
    train(optimizer, range(3, 6))
    train(other, range(3, 6))
    for p, q, start, right in zip(params, resumed, params_of(shapes), exact, strict=True):
        assert torch.equal(p, q)
        moved = (right - start).norm()
        assert moved > 0 and (p - right).norm() <= 0.05 * moved
    for p, q in zip(params, resumed, strict=True):
        assert all(torch.equal(x, other.state[q][key]) for key, x in optimizer.state[p].items())


@pytest.mark.parametrize("source", ["float32", *LOW])
@pytest.mark.parametrize("target", ["float32", *LOW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints_go_into_other_formats(source, target, dtype):
    params = params_of(dtype=dtype)
    optimizer = make("velo_s", params, state_dtype=source)
    train(optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    other = make("velo_s", params_of(dtype=dtype), state_dtype=target)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other.load_state_dict(saved)
    said = [str(w.message) for w in caught]
    assert len(said) == (source != target)
    assert all(f"state in {source}" in text and f"state_dtype='{target}'" in text for text in said)
    assert other.param_groups[0]["state_dtype"] == target
    fresh = make("velo_s", params_of(dtype=dtype), state_dtype=target)
    train(fresh, range(1))
    pairs = zip(optimizer.state.values(), other.state.values(), fresh.state.values(), strict=True)
    for old, new, wanted in pairs:
        assert {k: (x.dtype, x.shape) for k, x in new.items()} == {k: (x.dtype, x.shape) for k, x in wanted.items()}
        for name in ("momentum", "second_moment"):
            x, y = (
                formats.Accumulator(state.get(name, state.get(f"{name}_codes")), state.get(f"{name}_scales")).load()
                for state in (old, new)
            )
            assert (x - y).norm() <= {"float32": 1e-6, "bfloat16": 4e-3, "int8": 0.03}[target] * x.norm()
    train(other, range(2, 3))


def test_a_damaged_or_foreign_state_is_refused():
    optimizer = make("velo_s", params_of(), state_dtype="int8")
    train(optimizer, range(1))
    saved = optimizer.state_dict()
    for change, words in (
        (lambda state: state.pop("momentum_scales"), "lacks momentum_scales"),
        (lambda state: state.update(momentum_codes=state["momentum_codes"].float()), "momentum_codes: got float32"),
        (lambda state: state["second_moment_scales"].fill_(math.nan), "NaN"),
        (lambda state: state["second_moment_scales"].fill_(-1.0), "cannot be negative"),
    ):
        damaged = copy.deepcopy(saved)
        change(damaged["state"][0])
        with pytest.raises(ValueError, match=words):
            optimizer.load_state_dict(damaged)
    optimizer.param_groups[0]["state_dtype"] = "float32"
    with pytest.raises(RuntimeError, match="Nothing was changed"):
        train(optimizer, range(1))


def test_settings_are_checked():
    with pytest.raises(ValueError, match="state_dtype must be one of float32, bfloat16, int8, got 'int4'"):
        make("velo_s", params_of(), state_dtype="int4")
    with pytest.raises(ValueError, match="stochastic_rounding must be True or False, got 1"):
        make("velo_s", params_of(), stochastic_rounding=1)
    groups = [{"params": params_of()[:1]}, {"params": params_of()[1:], "state_dtype": "bfloat16"}]
    optimizer = make("velo_s", groups, state_dtype="int8")
    train(optimizer, range(1))
    assert {x["momentum"].dtype for x in optimizer.state.values() if "momentum" in x} == {
        torch.bfloat16,
        torch.float32,
    }


def test_bfloat16_parameters_take_small_steps():
    """Norm weights of 1: a step of a tenth of a unit is lost to nearest; at random every tenth element takes it."""
    for stochastic in (False, True):
        p = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = make("small_fc_lopt", [p], lr=1.0, stochastic_rounding=stochastic)
        exact = nn.Parameter(torch.ones(4096))
        reference = make("small_fc_lopt", [exact], lr=1.0)
        for _ in range(10):
            p.grad, exact.grad = torch.full_like(p, 0.01), torch.full_like(exact, 0.01)
            optimizer.step()
            reference.step()
        moved, wanted = (1.0 - p.detach().float()).mean(), (1.0 - exact.detach()).mean()
        assert 0 < abs(wanted) < 2.0**-8
        assert (abs(moved - wanted) < 0.1 * abs(wanted)) if stochastic else moved == 0


def test_the_rounding_of_shards_is_that_of_the_whole():
    """Any box of a tensor has the random numbers, codes and scales of that part of the whole."""
    shape, step = (9, 8, 700), step_number(5)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    whole = formats.Accumulator(torch.zeros(2, *shape, dtype=torch.int8), torch.zeros(2, 9, 8, 3))
    whole.put((), x, torch.Tensor.copy_, formats.Noise(place(4, shape), (), shape, step), 1)
    box = (slice(2, 5), slice(3, 8), slice(256, 700))
    starts, size = tuple(s.start for s in box), (3, 5, 444)
    part = formats.Accumulator(torch.zeros(2, *size, dtype=torch.int8), torch.zeros(2, 3, 5, 2))
    noise = formats.Noise(place(4, shape, starts), (), size, step)
    part.put((), x[(slice(None), *box)], torch.Tensor.copy_, noise, 1)
    assert torch.equal(part.values, whole.values[(slice(None), *box)])
    assert torch.equal(part.scale, whole.scale[:, 2:5, 3:8, 1:])


def test_unpacked_struct_agrees():
    """The bits of bfloat16 are the upper half of those of float32."""
    x = formats.round_to_bfloat16(torch.tensor([1.0 + 2.0**-9]), torch.tensor([40000]))
    bits = (struct.unpack("<I", struct.pack("<f", 1.0 + 2.0**-9))[0] + 40000) >> 16
    assert x.view(torch.int16).item() == bits


def test_memory_of_a_configuration(tmp_path, capsys):
    """The bytes that the command prints are those that a step allocates."""
    transformers = pytest.importorskip("transformers")
    from hf_lopt import __main__ as command

    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=128, vocab_size=500, architectures=["GPT2LMHeadModel"]
    )
    config.save_pretrained(tmp_path)
    command.main(["--memory", str(tmp_path), "--optim", "velo_s"])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("velo_s")]
    model = transformers.GPT2LMHeadModel(config)
    for kind, shown in zip(("float32", *LOW), row.replace("(", "").replace(")", "").split()[2::2], strict=True):
        groups = hf_lopt.param_groups(model, "velo_s", state_dtype=kind)
        optimizer = hf_lopt.LearnedOptimizer(groups, "velo_s", num_training_steps=9, weights="bundled")
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step(1.0)
        kept = sum(
            x.nbytes for state in optimizer.state.values() for key, x in state.items() if key != "min_param_scale"
        )
        assert abs(kept / sum(p.numel() for p in model.parameters()) - float(shown)) <= 0.02
    with pytest.raises(SystemExit):
        command.main(["--memory", str(tmp_path / "nothing")])
