"""What torch.set_default_dtype says changes nothing: every tensor of the package names its dtype."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import golden
import hf_lopt
from cases import Case, rows
from hf_lopt.kernels import ops
from test_golden import build, check_params, check_report


PACKAGE = Path(hf_lopt.__file__).parent
# Functions of torch whose result has the default dtype, or a dtype made from the values, unless they are told one.
FACTORIES = frozenset(
    ("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal")
) | frozenset(("ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "zeros"))
STEPS = 4


@pytest.fixture
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def without_dtype(tree: ast.AST) -> Iterator[ast.Attribute]:
    """Uses of torch's factories that leave the dtype to the default, those under another name included."""
    named = {
        node.func for node in ast.walk(tree) if isinstance(node, ast.Call) for k in node.keywords if k.arg == "dtype"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in FACTORIES and node not in named:
            if isinstance(node.value, ast.Name) and node.value.id == "torch":
                yield node


def test_every_factory_call_names_its_dtype():
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in without_dtype(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found, "\n".join(found)


def test_the_search_for_factory_calls_finds_them():
    source = "torch.zeros(3); torch.ones(2, dtype=torch.float32); x.new_zeros(3); f = torch.rand"
    assert {node.attr for node in without_dtype(ast.parse(source))} == {"zeros", "rand"}


@pytest.mark.parametrize("plain", [False, True], ids=["dispatched", "plain"])
@pytest.mark.parametrize("default_dtype", [torch.float32, torch.float64, torch.bfloat16], indirect=True, ids=str)
@pytest.mark.parametrize("case", rows())
def test_the_reference_is_followed_under_any_default(case: Case, default_dtype: torch.dtype, plain: bool):
    """The optimizer is built, stepped and restored from its own checkpoint under the default dtype."""
    reference = golden.read(case.file)
    params = golden.parameters(reference, "torch")
    optimizer = build(case, reference, params, "torch")
    steps = min(STEPS, reference.steps)
    for t in range(1, steps + 1):
        golden.set_gradients(reference, t, params, "torch")
        if plain:
            with ops.plain():
                optimizer.step(float(reference.loss[t - 1]))
        else:
            optimizer.step(float(reference.loss[t - 1]))
        if t < reference.steps:
            check_params(case, reference, params, t, "torch")
        check_report(optimizer, reference, t)
        if t == steps // 2:
            saved = optimizer.state_dict()
            optimizer = build(case, reference, params, "torch")
            optimizer.load_state_dict(saved)
    kept = [x for state in optimizer.state.values() for x in state.values()]
    kept += [x for x in optimizer.param_groups[0].values() if isinstance(x, torch.Tensor)]
    assert all(x.dtype in (torch.float32, torch.int64) and x.isfinite().all() for x in kept)
