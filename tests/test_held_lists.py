"""Lists that the compiled library holds: calls are those with the lists themselves, and nothing is kept for longer."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import hf_lopt
from hf_lopt import rules
from hf_lopt.kernels import dispatch, ops
from hf_lopt.kernels import held as held_lists
from hf_lopt.kernels.arguments import Assign
from hf_lopt.kernels.held import HeldList, HeldResults, Joined
from kernel_comparisons import OPERATORS, equal
from kernel_samples import samples


pytestmark = pytest.mark.skipif(not dispatch.loaded(), reason="the kernels are not compiled here")
SAMPLES = samples()


@pytest.fixture(autouse=True)
def short_lists_too(monkeypatch):
    monkeypatch.setattr(held_lists, "FEW", 1)


HOLDS = [name for name, x in SAMPLES.items() if type(x).HOLDS and dispatch.supports(x, "cpu")]


def lists_of(arguments) -> list[str]:
    values = vars(arguments).items()
    return [name for name, x in values if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor)]


def tensors(result) -> list[Tensor]:
    """All tensors of a result, those of lists too."""
    parts = result if isinstance(result, tuple) else (result,)
    return [x for part in parts for x in ([part] if isinstance(part, Tensor) else part or ())]


@pytest.mark.parametrize("name", HOLDS)
def test_a_call_with_held_lists_is_the_same_call(name):
    """All lists held, and each of them alone; what is written in place, too."""
    sample = SAMPLES[name]
    for held in (lists_of(sample), *([field] for field in lists_of(sample))):
        given, wanted = copy.deepcopy(sample), copy.deepcopy(sample)
        changed = replace(given, **{field: HeldList(getattr(given, field)) for field in held})
        got, want = OPERATORS[name](changed), OPERATORS[name](wanted)
        assert equal(tensors(got), tensors(want))
        for field in lists_of(sample):
            assert equal(list(getattr(given, field)), list(getattr(wanted, field))), (held, field)


def test_results_go_from_call_to_call_without_python_objects():
    rows, cols, _ = ops.sums(SAMPLES["sums"])
    assert isinstance(rows, HeldResults) and "_tensors" not in vars(rows)
    arguments = replace(SAMPLES["update_factored"], row_sums=rows, col_sums=cols)
    got = ops.update_factored(arguments)
    assert "_tensors" not in vars(rows)
    with ops.plain():
        want = ops.update_factored(arguments)
    for a, b in zip(tensors(got), tensors(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert len(rows) == len(list(rows)) and rows[0] is rows[0]


def test_results_are_written_over_once_nobody_needs_them():
    """Neither those that are still there, nor those that somebody has looked at; and only where they fit."""
    sample = SAMPLES["sums"]
    first = replace(sample, params=HeldList(sample.params))
    alive, looked_at, gone = (ops.sums(first)[0] for _ in range(3))
    tensors_then = [*looked_at]
    before = [x.clone() for x in tensors_then]
    number, others = gone.numbers, (alive.numbers, looked_at.numbers)
    del looked_at, gone

    other = replace(first, grads=[2 * g for g in sample.grads])
    again, more = ops.sums(other), ops.sums(other)
    assert again[0].numbers == number and more[0].numbers not in others
    wanted = ops.sums(replace(other, params=sample.params))
    assert equal(tensors(again), tensors(wanted)) and equal(tensors(more), tensors(wanted))
    assert equal(tensors_then, before) and equal(list(alive), before)

    axes = [(c, r) for r, c in zip(first.row_axes, first.col_axes, strict=True)]  # results of other shapes
    turned = replace(other, row_axes=[a for a, _ in axes], col_axes=[b for _, b in axes])
    del again, more
    assert equal(tensors(ops.sums(turned)), tensors(ops.sums(replace(turned, params=sample.params))))


def test_joined_lists_keep_their_order():
    """Whatever part of them can be held: pairs belong together."""

    class Other(Tensor):
        pass

    ones = [torch.full((2,), float(i)) for i in range(6)]
    kinds = [HeldList(ones[:2]), ones[2:3], HeldList([ones[3].as_subclass(Other), ones[4]]), ones[5:]]
    for parts in (kinds, kinds[::-1], kinds[:1], kinds[1:2]):
        values = [float(x[0]) for part in parts for x in part]
        targets = [torch.zeros(2) for _ in values]
        ops.assign(Assign(HeldList(targets), Joined(*parts), torch.tensor(False)))
        assert [float(x[0]) for x in targets] == values == [float(x[0]) for x in Joined(*parts)]


@pytest.mark.parametrize("rule", hf_lopt.available())
def test_steps_with_held_lists_are_the_same_steps(rule, monkeypatch):
    """Of every rule, with tensors of several ranks; a step that is skipped among them."""

    def run(few):
        monkeypatch.setattr(held_lists, "FEW", few)
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in ((6, 5), (7,), (4, 3, 2, 2), ())]
        settings = {"num_training_steps": 20} if rules.get(rule).needs_horizon else {}
        optimizer = hf_lopt.LearnedOptimizer(params, rule, weights="bundled", **settings)
        for t in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            with pytest.warns() if t == 2 else contextlib.nullcontext():
                optimizer.step(math.inf if t == 2 else 1.0)
        return [*params, *(x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor))]

    assert equal(run(1), run(10**9))


def test_a_held_list_sees_the_data_that_a_tensor_has_by_then():
    x, out = torch.ones(3), torch.zeros(3)
    held = HeldList([x])
    for value in (1.0, 2.0):
        x.data = torch.full((3,), value)
        ops.assign(Assign([out], held, torch.tensor(False)))
        assert out.tolist() == [value] * 3


def test_kinds():
    x = torch.ones(3, 4)
    held = HeldList([torch.ones(2), x])
    kinds = held_lists.Kinds(x.device)
    assert ops.holds(held) and kinds.same([held]) and kinds.same([held])
    for other in (torch.ones(4, 3), torch.ones(12), torch.ones(3, 4, dtype=torch.float64), torch.ones(3, 4, 1)):
        before, x.data = x.data, other
        assert not kinds.same([held])
        x.data = before
        assert kinds.same([held])
    assert not kinds.same([held, held]) and not kinds.same([]) and not kinds.same([], [held])
    assert not ops.holds(HeldList()) and not ops.holds(HeldList([torch.ones(2), torch.ones(2, device="meta")]))


def test_kinds_with_strides():
    """Of a list of gradients: also its layout, where a sparse tensor has no strides."""
    x, kinds = torch.ones(4, 4), held_lists.Kinds(torch.device("cpu"))
    assert kinds.same([], [HeldList([x])]) and kinds.same([], [HeldList([x.clone()])])
    for other in (torch.ones(4, 4).T, torch.ones(1, 4).expand(4, 4), torch.ones(4, 4).to_sparse(), torch.ones(16)):
        assert not kinds.same([], [HeldList([other])])
    assert kinds.same([], [HeldList([torch.zeros(4, 4)])])


def test_lists_go_with_their_owners():
    """Memory of an optimizer and of its results; a copy of a list is a list of its own."""
    x = torch.ones(3)
    held = HeldList([x])
    assert held.numbers and copy.copy(held).numbers != held.numbers == held.numbers
    alive = weakref.ref(x)
    del x, held
    assert alive() is None

    p = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = hf_lopt.Celo([p], num_training_steps=10, weights="bundled")
    for _ in range(2):
        p.grad = torch.ones(4, 3)
        optimizer.step(1.0)
    gradient, state = weakref.ref(p.grad), weakref.ref(optimizer.state[p]["momentum"])
    p.grad = None
    assert gradient() is None
    del optimizer
    gc.collect()
    assert state() is None


def test_unknown_numbers_are_refused():
    like = torch.empty(0)
    with pytest.raises(RuntimeError, match="no list of tensors is held under the number 987654321"):
        torch.ops.hf_lopt.fetch(like, 987654321)
    with pytest.raises(RuntimeError, match="too few numbers"):
        torch.ops.hf_lopt.assign([], [], torch.tensor(False), like, [0])
    torch.ops.hf_lopt.release(like, 987654321)
