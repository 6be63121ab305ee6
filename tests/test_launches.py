"""What a step launches on an accelerator, counted without one: steps on fake tensors of a CUDA device.

Every call of PyTorch counts as a launch unless it only makes a view or memory; an operator of ours counts as one,
which is what its CUDA kernel takes, or as what it calls where it has none. Calls that wait for the device are errors.
"""

from __future__ import annotations

import collections
import contextlib
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import hf_lopt
from benchmarks.step import random_weights
from hf_lopt import least_sizes, reach, rules
from hf_lopt.kernels.dispatch import Operator, supports
from hf_lopt.rules import small_fc
from hf_lopt.step import prepared
from said import said


SHAPES = [(), (7,), (64,), (48, 32), (32, 48), (33, 5), (8, 4, 3, 3)]
# They wait for the device, or need to know how many numbers there are.
WAITS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2")
MEMORY = ("device", "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided")
VIEWS = ("_reshape_alias", "_unsafe_view", "detach", "alias", "view", "lift_fresh")


class Launches(TorchDispatchMode):
    """Counts calls; a copy from the host of pinned memory counts as a copy, not as a launch."""

    def __init__(self):
        super().__init__()
        self.launched: collections.Counter[str] = collections.Counter()
        self.copies = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_device = [x for x in tensors if x.device.type == "cuda"]
        assert not (on_device and name in WAITS), f"{name} waits for the device"
        result = function(*args, **kwargs)
        results = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        to_host = on_device and any(x.device.type == "cpu" for x in results)
        if name in ("_to_copy", "copy_"):
            waits = not kwargs.get("non_blocking", len(args) > 2 and args[2])
            crosses = len({x.device.type for x in (*tensors, *results)}) > 1
            assert not (crosses and waits), "a copy between host and device that waits for it"
            self.copies += crosses
            if crosses:
                return result
        else:
            assert not to_host, f"{name} reads from the device"
        if name in VIEWS or name in MEMORY or function.is_view:
            return result
        if on_device or any(x.device.type == "cuda" for x in results):
            self.launched[name] += 1
        return result


@pytest.fixture(autouse=True)
def host_memory(monkeypatch):
    """Operators without a CUDA kernel are what they call. Pinned memory needs a driver, and learned decays are read
    from the device, once."""
    if not torch.cuda.is_available():
        torch._C._ensureCUDADeviceGuardSet()  # lets fake tensors be indexed as real ones are
    monkeypatch.setattr(small_fc, "learned_decays", lambda decays, offsets, clip: decays)
    # The first step reads the sizes of the tensors, which have no values here.
    for module in (least_sizes, reach):
        monkeypatch.setattr(module, "sizes_of", lambda params: [least_sizes.Size(1.0, False)] * len(params))
    call = Operator.__call__

    def call_on_device(operator, arguments):
        """As on a real device; fake tensors would go to the dispatcher in any case."""
        return call(operator, arguments) if supports(arguments, "cuda") else operator.reference(arguments)

    monkeypatch.setattr(Operator, "__call__", call_on_device)
    monkeypatch.setattr(prepared, "on_host", lambda values, dtype, device: torch.tensor(values, dtype=dtype))


def optimizer_on_device(mode: FakeTensorMode, rule: str, shapes=SHAPES, **settings) -> hf_lopt.LearnedOptimizer:
    if rules.get(rule).needs_horizon:
        settings["num_training_steps"] = 100
    with mode:
        params = [torch.nn.Parameter(torch.empty(s, device="cuda")) for s in shapes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = hf_lopt.LearnedOptimizer(params, rule, weights=random_weights(rules.get(rule)), **settings)
    optimizer._monitor = Monitor()
    return optimizer


class Monitor:
    """Counters go to the host in one copy that nobody waits for; what it says there has no values here."""

    def start(self, skipped_before) -> None:
        pass

    def check(self, counters, limit, horizon) -> None:
        assert counters.shape == (3,) and counters.device.type == "cuda"


def count(optimizer: hf_lopt.LearnedOptimizer, steps: int = 3) -> Launches:
    """The launches of the last of a few steps."""
    for i in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.empty_like(p)
        loss = torch.empty((), device="cuda")
        with Launches() if i == steps - 1 else contextlib.nullcontext() as launches:
            optimizer.step(loss)
    return launches


FEATURES = ["sums", "update_factored", "feature_sums", "advance"]
# What docs/kernels.md says about a step.
EXPECTED = {
    "velo": [*FEATURES, "addmm", "pool", "addmm", "lstm_step"] + ["specialize_networks", "apply_network", "assign"],
    "small_fc_lopt": ["sums", "update_factored", "feature_sums", "mul", "advance", "specialize_networks"]
    + ["apply_network", "assign"],
    "celo_adam": ["sums", "advance", "addmm", "pool", "addmm", "lstm_step", "specialize_networks", "adam_step"],
}
EXPECTED |= {"velo_s": EXPECTED["velo"], "celo": EXPECTED["velo"], "elo": ["zero_nan", *EXPECTED["small_fc_lopt"]]}
EXPECTED |= {
    "mulo": EXPECTED["elo"],
    "celo2_base": [*FEATURES, "specialize_networks", "apply_network", "assign", "descend"],
}
# Beside the matrices there are Adam's tensors, whose settings are picked from those of all.
CELO2 = [*EXPECTED["celo2_base"], "sums", "specialize_networks", "adam_step", *["index_select"] * 4, *["mul"] * 2]
CLIP = [
    "_foreach_norm",
    "stack",
    "linalg_vector_norm",
    "nan_to_num",
    "add",
    "reciprocal",
    "mul",
    "clamp",
    "_foreach_mul_",
]
# Of each shape of matrices: five steps of three products and a sum, the norm before, the mean square after, and a copy
# of what is higher than wide.
NEWTON_SCHULZ = ["linalg_vector_norm", "add", "div", *["bmm", "bmm", "add", "baddbmm"] * 5]
NEWTON_SCHULZ += ["pow", "mean", "add", "rsqrt", "mul", "clone"]


@pytest.mark.parametrize("rule", EXPECTED)
def test_a_step_is_a_few_launches_and_never_waits(rule):
    for shapes in (SHAPES, SHAPES * 50):
        mode = FakeTensorMode(allow_non_fake_inputs=True)  # tensors on a GPU exist in name only
        optimizer = optimizer_on_device(mode, rule, shapes)
        with mode:
            launches = count(optimizer)
        expected = collections.Counter(EXPECTED[rule])
        assert launches.launched == expected
        assert len(EXPECTED[rule]) <= 12
        assert launches.copies == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rule", ["celo2", "elo_celo2"])
def test_orthogonalisation_counts_by_shapes_of_matrices(rule, dtype):
    matrices = [(48, 32), (32, 5), (8, 4, 3, 3)]
    for copies in (1, 20):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        optimizer = optimizer_on_device(mode, rule, [(), (7,), *matrices] * copies, ns_dtype=dtype)
        with mode:
            launches = count(optimizer)
        expected = collections.Counter(CELO2 + (CLIP if rule == "elo_celo2" else []))
        for _ in matrices:
            expected.update(NEWTON_SCHULZ + (["_to_copy"] * 2 if dtype == "bfloat16" else []))
        # Stacks go back to their own order of axes; several tensors of one shape lie together already.
        expected["clone"] += 1 + (copies > 1)
        assert launches.launched == expected and launches.copies == 0


def test_a_setting_that_changes_is_copied_to_where_it_was():
    """So that a captured graph finds it there."""
    params = [torch.nn.Parameter(torch.ones(3, 4))]
    params[0].grad = torch.ones(3, 4)
    optimizer = hf_lopt.SmallFC(params, weights="bundled", lr=1.0)
    places = []
    for lr in (1.0, 1.0, 0.5):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        numbers = optimizer._prepared.setting("lr", optimizer.param_groups)
        places.append(numbers.data_ptr())
        assert numbers.tolist() == [lr]
    assert len(set(places)) == 1


def test_numbers_for_single_parameters_are_one_launch_more():
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    optimizer = optimizer_on_device(mode, "velo")
    for group in optimizer.param_groups:
        group["lr_scales"] = [2.0] * len(group["params"])
    with mode:
        launches = count(optimizer)
    assert launches.launched == collections.Counter([*EXPECTED["velo"], "mul"]) and launches.copies == 0


@pytest.mark.parametrize(
    ("rule", "settings", "said_so"),
    [("celo2", {}, True), ("elo_celo2", {}, True), ("celo2", {"ns_dtype": "float32"}, False), ("velo", {}, False)]
    + [("celo2", {"ns_dtype": "auto"}, False)],
)
def test_who_leaves_the_exact_iteration_on_is_told(rule, settings, said_so):
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    optimizer = optimizer_on_device(mode, rule, **settings)
    with said() as texts, mode:
        count(optimizer)
    assert any("ns_dtype=auto is faster here" in text for text in texts) == said_so


def test_lr_may_be_a_tensor_on_the_device():
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    optimizer = optimizer_on_device(mode, "velo")
    with mode:
        optimizer.param_groups[0]["lr"] = torch.empty((), device="cuda")
        launches = count(optimizer)
    # One more call, for the decision to skip a step whose learning rate is not finite.
    assert launches.launched == collections.Counter([*EXPECTED["velo"], "_to_copy"]) and launches.copies == 0


def test_large_matrices_and_those_of_the_transposed_shape_are_one_batch():
    """Long ones: A twice, five squares, six products for the next A, three for Q, and two with X."""
    found = {}
    for more in ((), ((96, 800),) * 2, ((96, 800), (800, 96))):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        optimizer = optimizer_on_device(mode, "celo2", [(), (7,), (3, 4), *more], ns_dtype="auto")
        with mode:
            found[more] = count(optimizer).launched
    none, alike, both = found.values()
    assert (alike - none)["bmm"] == 18 and (alike - none).total() == 41
    assert both - alike == collections.Counter(["cat", "clone"]) and not alike - both
