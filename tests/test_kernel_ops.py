"""The operators themselves: schemas, registration, what goes to which kernel."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from hf_lopt import _load, _ops
from kernel_cases import FAMILIES, case, strided


pytestmark = pytest.mark.skipif(not _load.loaded(), reason="the kernels are not compiled here")


@pytest.mark.parametrize("name", _ops.SCHEMAS)
def test_the_library_registers_kernels_for_the_cpu(name):
    # Those that are a few calls of PyTorch on the CPU have compiled kernels for CUDA only.
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"hf_lopt::{name}", "CPU") == (name not in _load.ONLY_CUDA)


@pytest.mark.parametrize("family", FAMILIES)
def test_opcheck(family):
    x = case([(7,), (5, 9), (3, 4, 5)], family)
    a, b = zip(*x.axes, strict=True)
    sums = (x.params, x.grads, x.momenta, x.second_moments, a, b, x.features.clip, True)
    torch.library.opcheck(torch.ops.hf_lopt.sums.default, sums)
    row_sums, col_sums, _ = _ops.sums(*sums)
    whole = [torch.empty(0)] * 3
    factored = (x.rows, x.cols, row_sums, col_sums, whole, [1, 9, 5], [1, 5, 4], a, b, [0.9, 0.99, 0.999])
    torch.library.opcheck(torch.ops.hf_lopt.update_factored.default, factored)
    f = x.factors()
    torch.library.opcheck(torch.ops.hf_lopt.feature_sums.default, x.common(f))
    weights, biases = x.network(_ops.feature_sums(*x.common(f)))
    one, no = torch.ones(3), torch.tensor(False)
    apply = (*x.common(f), weights, biases, one * 1e-3, one * 0, 1e-3, no)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.hf_lopt.apply_network.default, (*apply, []), test_utils=tests)
    out = [torch.empty(p.shape) for p in x.params]
    torch.library.opcheck(torch.ops.hf_lopt.apply_network.default, (*apply, out), test_utils=tests)
    moments = [m[:1].clone() for m in x.momenta]
    adam = (x.params, x.grads, moments, x.second_moments, 0.9, 0.95, 1000.0, one, one, one[0], one[0], 1e-8, 0.0, no)
    torch.library.opcheck(torch.ops.hf_lopt.adam_step.default, adam, test_utils=tests)
    numbers = torch.ones(3, dtype=torch.float64)
    descend = (x.params, out, one, one, numbers, numbers, 1e-9, [], no)
    torch.library.opcheck(torch.ops.hf_lopt.descend.default, descend, test_utils=tests)


def test_version_counters_are_bumped():
    x = case([(7,), (5, 9)])
    f = x.factors()
    weights, biases = x.network(_ops.feature_sums(*x.common(f)))
    one = torch.ones(2)
    changed = [*x.params, *x.momenta, *x.second_moments, x.diagonals[0]]
    before = [y._version for y in changed]
    _ops.apply_network(*x.common(f), weights, biases, one, one, 1e-3, torch.tensor(False), ())
    assert all(y._version > v for y, v in zip(changed, before, strict=True))


def test_uncovered_calls_take_the_plain_path():
    x = case([(5, 9), (7,)])
    x.params, x.grads = ([y.double() for y in ys] for ys in (x.params, x.grads))
    assert all(r.dtype == torch.float32 for r in x.first_pass(True)[0])
    x = case([(5, 9)])
    f = x.factors()
    names, *rest = x.common(f)
    got = _ops.feature_sums((*names, "log_abs_p"), *rest)
    assert torch.allclose(got[0, :30], _ops.feature_sums(names, *rest)[0], rtol=1e-5)
    with pytest.raises(RuntimeError, match="no fused kernel for the feature log_abs_p"):
        torch.ops.hf_lopt.feature_sums(("log_abs_p",), *rest)


def test_errors_name_what_does_not_fit():
    x = case([(5, 9), (3, 4)])
    f = x.factors()
    weights, biases = x.network(_ops.feature_sums(*x.common(f)))
    one, no = torch.ones(2), torch.tensor(False)

    def apply(weights, biases, scale=one, skip=no):
        return _ops.apply_network(*x.common(f), weights, biases, scale, one, 1e-3, skip, ())

    with pytest.raises(RuntimeError, match="the first layer has 29 inputs, the features have 30 columns"):
        apply([weights[0][:, :29], *weights[1:]], biases)
    with pytest.raises(RuntimeError, match="the network is for 3 tensors, there are 2"):
        apply(weights, biases, scale=torch.ones(3))
    with pytest.raises(RuntimeError, match="skip must be a bool tensor"):
        apply(weights, biases, skip=one[0])
    x.momenta[1] = x.momenta[1][:, :2]
    with pytest.raises(RuntimeError, match="another shape than its parameter"):
        apply(weights, biases)


def test_non_contiguous_accumulators_are_updated_in_place():
    x, y = case([(33, 70)]), case([(33, 70)])
    y.momenta = [strided(m, "every second") for m in y.momenta]
    y.second_moments = [strided(v, "transposed") for v in y.second_moments]
    for z in (x, y):
        f = z.factors()
        z.generator.manual_seed(2)
        weights, biases = z.network(_ops.feature_sums(*z.common(f)))
        one = torch.ones(1)
        _ops.apply_network(*z.common(f), weights, biases, one, one, 1e-3, torch.tensor(False), ())
    for name in ("params", "momenta", "second_moments"):
        assert torch.equal(getattr(x, name)[0], getattr(y, name)[0])


def test_unknown_kernels_are_an_error():
    with pytest.raises(RuntimeError, match="choose avx512, avx2 or portable"):
        torch.ops.hf_lopt.cpu_kernels("sse")


@pytest.mark.parametrize("choice, message", [("torch", ""), ("fast", "must be unset or 'torch'")])
def test_environment_switch(choice, message):
    code = "from hf_lopt import _load, _ops; assert not _load.loaded()"
    environment = {**os.environ, "HF_LOPT_KERNELS": choice}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (message in done.stderr and done.returncode) if message else not done.returncode, done.stderr
