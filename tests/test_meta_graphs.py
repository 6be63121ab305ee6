"""Steps from CUDA graphs, without a GPU: what a step reads and writes, replays of a record, the calls of a capture."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_lopt.kernels import ops
from hf_lopt.kernels.arguments import Assign
from hf_lopt.kernels.reference import scheduler
from hf_lopt.meta import data, graphs, tasks, theta
from hf_lopt.meta.particles import TOGETHER
from hf_lopt.meta.runs import WORST, Objective, RunSettings, TaskRuns, schedule
from test_launches import WAITS


PAIRS, K = 3, 5
SETTINGS = RunSettings(
    truncation=K, shortest=5, longest=20, lr=(1e-3, 1e-2), parameter_scale=(0.5, 2.0), loss_scale=(0.1, 10.0)
)


def task_runs(rule: str, name: str = "regions_mlp", **more) -> TaskRuns:
    vector = theta.Vector(rule, theta.starting_weights(rule, "constructed"))
    generator = torch.Generator().manual_seed(0)
    return TaskRuns(tasks.named(name), vector, rule, PAIRS, SETTINGS, Objective(every=2), generator, **more)


def points(runs: TaskRuns, seed: int) -> torch.Tensor:
    """Weights that differ between particles and truncations."""
    start = runs.vector.start()
    noise = torch.randn(runs.count, len(start), generator=torch.Generator().manual_seed(seed))
    return start + 1e-3 * noise


def storage(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """Records calls as a CUDA graph does: they take effect when they are replayed, on the memory of the recording."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for argument, x in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before += [(y, y.clone()) for y in tree_leaves(x)]
        result = function(*args, **kwargs)
        inputs = {storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        own = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        # Views of what is there already need no copy.
        self.calls.append((function, args, kwargs, own, [storage(x) not in inputs for x in own]))
        return result

    def undo(self) -> None:
        for x, value in reversed(self.before):
            x.copy_(value)
        self.before.clear()

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, own, fresh in self.calls:
            results = [x for x in tree_leaves(function(*args, **kwargs)) if isinstance(x, torch.Tensor)]
            for old, new, is_fresh in zip(own, results, fresh, strict=True):
                if is_fresh:
                    old.copy_(new)


class OnTape(graphs.Replayed):
    def __init__(self, runs: TaskRuns):
        super().__init__(runs._step_of_inputs, torch.device("cpu"))
        self.enabled, self.replays = True, 0

    def _aside(self):
        return self.function()

    def _capture(self):
        tape = Tape()
        with tape:
            self._result = self.function()
        with torch.no_grad():
            tape.undo()

        def replay():
            self.replays += 1
            tape.replay()

        self._replay = replay


@pytest.mark.parametrize("name", ["regions_mlp", "characters"])
@pytest.mark.parametrize("rule", ["celo2", "celo2_base", "small_fc_lopt"])
def test_replays_are_the_steps(rule, name):
    """Bit by bit, over new weights, runs that begin anew, other learning rates, and a particle that fails."""
    ends = []
    for taped in (False, True):
        runs = task_runs(rule, name)
        if taped:
            runs._inner_step = OnTape(runs)
            runs.particles._waits = False  # as on a GPU
        losses, broken = [], None
        for t in range(6):
            running = set(range(PAIRS)) - set(runs.ended())
            if t > 1 and broken is None and running:
                broken = t, min(running)
                next(iter(runs.particles.params.values()))[broken[1]] = float("inf")
            losses.append(runs.unroll(points(runs, t)))
        assert (losses[broken[0]] == WORST).nonzero().flatten().tolist() == [broken[1]]
        ends.append((torch.stack(losses), runs))
    assert ends[1][1]._inner_step.replays == 6 * K - graphs.WARMUP
    assert torch.equal(ends[0][0], ends[1][0]) and len(set(ends[0][0].flatten().tolist())) > 2 * PAIRS
    states = [runs.particles.state_dict() for _, runs in ends]
    for a, b in zip(*map(tree_leaves, states), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", ["celo2", "velo"])
def test_the_step_of_inputs_is_the_step(rule):
    """A loop written down from the definitions, with all numbers from the draws, gives the same bits."""
    ours, theirs = task_runs(rule), task_runs(rule)
    for t in range(3):
        loss = ours.unroll(points(ours, t))
        theirs.particles.set_weights(theirs.vector.leaves(points(theirs, t)))
        theirs._restart(theirs.ended())
        draws, task, particles = theirs.draws, theirs.task, theirs.particles
        lr, horizons, factors = (x.repeat(2) for x in (draws.lr, draws.horizons, draws.loss_scale))
        total = torch.zeros(2 * PAIRS)
        for k in range(K):
            leaves = {name: p.clone().requires_grad_() for name, p in particles.params.items()}
            scaled = {
                name: leaf * draws.parameter_scale[:, i].repeat(2).view(-1, *[1] * (leaf.dim() - 1))
                for i, (name, leaf) in enumerate(leaves.items())
            }
            losses = task.losses(scaled, theirs.samples.batch(PAIRS, task.batch, theirs.generator)) * factors
            grads = torch.autograd.grad(losses.sum(), list(leaves.values()))
            rates = lr if particles.rule.own_schedule else lr * schedule(particles.steps, horizons)
            particles.update(dict(zip(leaves, grads, strict=True)), losses.detach(), rates, horizons)
            if k % 2:
                total += torch.log(theirs._fresh_losses() / draws.first_loss).clamp(max=1.0)
        theirs.truncations += 1
        assert torch.equal(loss, total / 2)
        for name, p in particles.params.items():
            assert torch.equal(ours.particles.params[name], p)


class NothingFromTheHost(TorchDispatchMode):
    """Refuses calls that wait for a device, and tensors made of numbers of the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in (*WAITS, "lift_fresh", "lift_fresh_copy"), name
        return function(*args, **(kwargs or {}))


def assign_as_on_a_gpu(x: Assign):
    pairs = zip(x.targets, x.values, strict=True)
    torch._foreach_copy_(list(x.targets), [torch.where(x.skip, old, new) for old, new in pairs])


@pytest.mark.parametrize("rule", TOGETHER)
@pytest.mark.parametrize("name", ["regions_mlp", "characters", "autoencoder"])
def test_a_step_takes_nothing_from_the_host(monkeypatch, rule, name):
    """Where the CPU and a GPU go different ways, that of a GPU: neither reads nor copies, which a capture refuses."""
    monkeypatch.setattr(ops, "assign", assign_as_on_a_gpu)
    monkeypatch.setattr(scheduler, "_constant", scheduler._filled)
    runs = task_runs(rule, name)
    runs.particles._waits = False
    runs.unroll(points(runs, 0))
    where = {key: storage(x) for key, x in enumerate(tree_leaves(runs.particles.state_dict()))}
    before = runs.particles.steps.clone()
    with NothingFromTheHost():
        losses = runs._step_of_inputs()
    assert losses.shape == (2 * PAIRS,) and torch.equal(runs.particles.steps, before + 1)
    assert where == {key: storage(x) for key, x in enumerate(tree_leaves(runs.particles.state_dict()))}


class Driver:
    """In the place of ``torch.cuda``: writes down what is asked of it."""

    def __init__(self, refuses: bool = False):
        self.log, self.refuses, self.streams = [], refuses, 0
        self.CUDAGraph = lambda: self

    def current_stream(self, device):
        return Stream(self, "here")

    def Stream(self, device):  # noqa: N802
        self.streams += 1
        return Stream(self, "aside")

    def stream(self, stream):
        return Context(self, f"on {stream.name}")

    def device(self, device):
        return Context(self, f"device {device.index}")

    def graph(self, graph, capture_error_mode):
        assert graph is self
        return Context(self, f"capture {capture_error_mode}", self.refuses)

    def replay(self):
        self.log.append("replay")


class Stream:
    def __init__(self, driver, name):
        self.driver, self.name = driver, name

    def wait_stream(self, other):
        self.driver.log.append(f"{self.name} waits for {other.name}")


class Context:
    def __init__(self, driver, name, refuses=False):
        self.driver, self.name, self.refuses = driver, name, refuses

    def __enter__(self):
        self.driver.log.append(self.name)

    def __exit__(self, *error):
        self.driver.log.append(f"end of {self.name}")
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")


class Result:
    def __init__(self, driver):
        self.driver = driver

    def record_stream(self, stream):
        self.driver.log.append(f"kept for {stream.name}")


def replayed(monkeypatch, **driver):
    driver = Driver(**driver)
    monkeypatch.setattr(graphs.torch, "cuda", driver)

    def step():
        driver.log.append("step")
        return Result(driver)

    return driver, graphs.Replayed(step, torch.device("cuda", 1))


def test_the_calls_of_capture(monkeypatch):
    """Warm-up on a stream of its own, one capture, then replays that leave their result in one place."""
    driver, step = replayed(monkeypatch)
    results = [step() for _ in range(graphs.WARMUP + 3)]
    aside = ["aside waits for here", "on aside", "step", "end of on aside", "here waits for aside", "kept for here"]
    capture = ["device 1", "capture thread_local", "step", "end of capture thread_local", "end of device 1"]
    assert driver.streams == 1
    assert driver.log == aside * graphs.WARMUP + capture + ["replay"] * 3
    assert results[-1] is results[-2] is results[-3] and results[0] is not results[1]


def test_without_a_graph_it_goes_on_as_it_is(monkeypatch):
    driver, step = replayed(monkeypatch, refuses=True)
    for _ in range(graphs.WARMUP):
        step()
    with pytest.warns(UserWarning, match="operation not permitted"):
        step()
    driver.log.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()
        step()
    assert driver.log == ["step", "step"]


def test_what_is_captured():
    """Only on CUDA, only where asked for, and only rules whose steps depend on tensors alone."""
    for device, enabled, want in (("cpu", True, False), ("cuda", True, True), ("cuda", False, False)):
        assert graphs.Replayed(lambda: torch.ones(1), torch.device(device), enabled).enabled is want


@pytest.mark.parametrize("rule", ["celo2", "velo"])
def test_rules_with_numbers_of_the_host_have_no_graphs(monkeypatch, rule):
    monkeypatch.setattr(data.Data, "to", lambda self, device: self)
    vector = theta.Vector(rule, theta.starting_weights(rule, "constructed"))
    arguments = (tasks.named("regions_mlp"), vector, rule, 2, SETTINGS, Objective(), torch.Generator())
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert TaskRuns(*arguments, device="cuda")._inner_step.enabled is (rule == "celo2")
        assert not TaskRuns(*arguments, device="cuda", graphs=False)._inner_step.enabled
    messages = [str(w.message) for w in caught if "graphs" in str(w.message)]
    assert messages == ([] if rule == "celo2" else ["the steps of velo depend on numbers of the host: no CUDA graphs"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine: not run")
@pytest.mark.parametrize("rule", ["celo2", "celo2_base", "small_fc_lopt"])
@pytest.mark.parametrize("name", ["regions_mlp", "characters"])
def test_graphs_on_a_gpu(rule, name):
    """With a graph, without one, and on the CPU: the same meta-losses but for rounding."""
    found = []
    for device, graph in (("cpu", False), ("cuda", False), ("cuda", True)):
        runs = task_runs(rule, name, device=device, graphs=graph)
        found.append(torch.stack([runs.unroll(points(runs, t)).cpu() for t in range(4)]))
        assert (runs._inner_step._replay is not None) is graph
    torch.testing.assert_close(found[2], found[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-2)
