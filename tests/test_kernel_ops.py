"""The operators themselves: schemas, registration, fake kernels, features, what goes to which kernel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from hf_lopt.features import FEATURES
from hf_lopt.kernels import dispatch, ops
from kernel_cases import case
from kernel_comparisons import OPERATORS, outcome
from kernel_samples import samples


CSRC = Path(__file__).parents[1] / "csrc"
compiled = pytest.mark.skipif(not dispatch.loaded(), reason="the kernels are not compiled here")
SAMPLES = samples()


def values(arguments) -> tuple:
    """In the order of the fields, which is that of the schema."""
    return tuple(vars(arguments).values())


# What the operators change in place.
STATE = {"params", "momenta", "second_moments"}
SCALES = {"momentum_scales", "second_scales"}
CHANGED = {
    "apply_network": {*STATE, *SCALES, "diagonals", "out"},
    "adam_step": {*STATE, *SCALES},
    "descend": {"params"},
    "advance": {"counters", "loss_buffer"},
    "lstm_step": {"hidden", "cell"},
    "assign": {"targets"},
    "zero_nan": {"tensors"},
}


def written_by(name: str) -> set[str]:
    schema = getattr(torch.ops.hf_lopt, name).default._schema
    return {x.name for x in schema.arguments if x.alias_info is not None and x.alias_info.is_write}


def versions(arguments) -> dict[str, list[int]]:
    """Version counters of the tensors of each argument."""
    return {
        field: [x._version for x in tree_leaves(value) if isinstance(x, torch.Tensor)]
        for field, value in vars(arguments).items()
    }


def test_there_is_a_sample_of_every_operator():
    assert set(SAMPLES) == set(OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_schema_has_the_fields_of_the_arguments(name):
    schema = getattr(torch.ops.hf_lopt, name).default._schema
    held = ["like", "held"] if OPERATORS[name].arguments.HOLDS else []
    assert [x.name for x in schema.arguments] == [*vars(SAMPLES[name]), *held]
    assert written_by(name) == CHANGED.get(name, set())


@compiled
@pytest.mark.parametrize("name", OPERATORS)
def test_which_operators_have_a_kernel_for_the_cpu(name):
    """One that is a call of PyTorch has a compiled kernel for CUDA only."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key(f"hf_lopt::{name}", "CPU")
    assert has == dispatch.supports(SAMPLES[name], "cpu")


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    operator = getattr(torch.ops.hf_lopt, name).default
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for arguments in (SAMPLES[name], *([replace(SAMPLES[name], out=[])] if name == "apply_network" else [])):
        torch.library.opcheck(operator, values(arguments), test_utils=tests)


@pytest.mark.parametrize("name", ["sums", "feature_sums", "apply_network", "adam_step", "descend", "assign"])
def test_fake_kernels_refuse_other_shapes(name):
    mode = FakeTensorMode()
    with mode:
        fields = {
            field: torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, value)
            for field, value in vars(SAMPLES[name]).items()
        }
        field = {"descend": "steps", "assign": "values"}.get(name, "grads")
        fields[field] = [x[..., :-1] for x in fields[field]]
        with pytest.raises(RuntimeError):
            getattr(torch.ops.hf_lopt, name)(**fields)


@compiled
@pytest.mark.parametrize("name", [name for name in OPERATORS if dispatch.supports(SAMPLES[name], "cpu")])
def test_version_counters_of_what_is_changed_are_bumped(name):
    before = versions(SAMPLES[name])
    OPERATORS[name](SAMPLES[name])
    for field, after in versions(SAMPLES[name]).items():
        changed = field in CHANGED.get(name, ()) and bool(after)
        assert all(x > y for x, y in zip(after, before[field], strict=True)) if changed else after == before[field]


@compiled
def test_unsupported_calls_take_the_plain_path():
    x = case([(5, 9), (7,)])
    x.params, x.grads = ([y.double() for y in ys] for ys in (x.params, x.grads))
    assert not dispatch.supports(x.sums(), "cpu")
    assert all(r.dtype == torch.float32 for r in ops.sums(x.sums())[0])
    arguments = case([(5, 9)]).feature_sums()
    more = replace(arguments, features=(*arguments.features, "log_abs_p"))
    assert not dispatch.supports(more, "cpu") and not dispatch.supports(more, "cuda")
    torch.testing.assert_close(ops.feature_sums(more)[0, :-1], ops.feature_sums(arguments)[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="log_abs_p"):
        torch.ops.hf_lopt.feature_sums(**vars(more))


@compiled
def test_plain_kernels_can_be_asked_for():
    x = case([(33, 70)])
    with ops.plain():
        assert not dispatch.enabled()
        plain = outcome(x.sums()).results[2]
        with ops.plain():
            pass
        assert not dispatch.enabled(), "contexts may be nested"
    assert dispatch.enabled()
    torch.testing.assert_close(ops.sums(x.sums())[2], plain, rtol=1e-5, atol=1e-5)


def test_the_compiled_kernels_have_the_same_features():
    """Names and numbers of columns in csrc are those of the Python table, but for what has no compiled kernel."""
    text = "".join((CSRC / name).read_text() for name in ("features.h", "names.h") if (CSRC / name).exists())
    rows = dict(re.findall(r'^\s*\{"(\w+)",[^}]*\b(\w+)\},$', text, flags=re.MULTILINE))
    kinds = {"kMomenta": "momentum", "kSecondMoments": "second_moment", "kFactored": "factored"}
    widths = {"1": 1, "kMomenta": 3, "kSecondMoments": 1, "kFactored": 3}
    assert {name: widths[width] for name, width in rows.items()} == {
        name: feature.columns() for name, feature in FEATURES.items() if name != "log_abs_p"
    }
    for name, width in rows.items():
        assert width == "1" or kinds[width] == FEATURES[name].decays, name


@compiled
def test_unknown_kernels_are_an_error():
    with pytest.raises(RuntimeError, match="avx512.*avx2.*portable"):
        torch.ops.hf_lopt.cpu_kernels("sse")


@pytest.mark.parametrize("choice, works", [("torch", True), ("fast", False)])
def test_environment_switch(choice, works):
    code = "from hf_lopt.kernels import dispatch, ops; assert not dispatch.loaded()"
    environment = {**os.environ, "HF_LOPT_KERNELS": choice}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == works and ("HF_LOPT_KERNELS" in done.stderr) != works, done.stderr
