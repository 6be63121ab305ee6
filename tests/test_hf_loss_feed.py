"""Raw Accelerate loops: the optimizer's step sees the mean loss of its window, and nothing else.

The oracle is the mean that the loop itself can form; what the optimizer used is read back from its state.
"""

import contextlib
import copy
import types

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.utils.data import DataLoader

import hf_cases as cases
import hf_lopt
from hf_lopt.hf import loss_feed


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def approx(value):
    return pytest.approx(value, abs=2e-5)


class Regression(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1))

    def forward(self, x):
        # Within 5 % of 5: the rule clips jumps of the loss, early ones most, which would hide what it was given.
        return 5.0 + 0.003 * (self.layers(x) - x.sum(-1, keepdim=True)).square().mean()


def prepared(batches=7, scaler=None, **accelerator_arguments):
    """An accelerator, a model, a VeLO and a loader of ``batches`` batches, all prepared."""
    accelerator = Accelerator(cpu=True, **accelerator_arguments)
    accelerator.scaler = scaler
    model = Regression()
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(torch.randn(2 * batches, 4, generator=generator) + 1.0, batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, cases.velo(model.parameters()), loader)
    return accelerator, model, optimizer, loader


def mean(values):
    return sum(values) / len(values)


@pytest.mark.parametrize("calls", [1, 2], ids=["one_backward", "two_backwards"])
@pytest.mark.parametrize("steps", [1, 4])
def test_accumulate_loops(steps, calls):
    """Seven micro-batches: with four to a window, the last window has three. A micro-batch may call backward twice."""
    accelerator, model, optimizer, loader = prepared(gradient_accumulation_steps=steps)
    probe, seen, expected, window = cases.LossProbe(optimizer), [], [], []
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(batch)
                window.append(loss.item())
                for part in range(calls):
                    accelerator.backward(loss / calls, retain_graph=part + 1 < calls)
                optimizer.step()
                if accelerator.sync_gradients:
                    expected.append(mean(window))
                    seen.append(probe.read())
                    window = []
                optimizer.zero_grad()
    assert len(seen) == 2 * -(-7 // steps)
    assert seen == approx(expected)


def test_losses_of_a_trainer_add_up():
    """transformers 5.2 to 5.5 give Accelerate the accumulation steps and pass parts of the loss that are divided
    already.
    """
    accelerator, model, optimizer, loader = prepared(batches=4, gradient_accumulation_steps=4)
    loss_feed.set_trainer(loss_feed.unwrap(optimizer), True)
    probe, losses = cases.LossProbe(optimizer), [model(batch) for batch in loader]
    for loss in losses:
        accelerator.backward(loss / 4)
    optimizer.step()
    assert probe.read() == approx(mean([loss.item() for loss in losses]))


def test_last_window_of_one_micro_batch():
    """Nine micro-batches by four leave one, which Accelerate numbers 0; its two backward calls are one micro-batch."""
    accelerator, model, optimizer, loader = prepared(batches=9, gradient_accumulation_steps=4)
    probe = cases.LossProbe(optimizer)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(batch)
            accelerator.backward(loss / 2, retain_graph=True)
            accelerator.backward(loss / 2)
            optimizer.step()
            optimizer.zero_grad()
            seen = probe.read()
    assert seen == approx(loss.item())


def test_loop_that_accumulates_by_itself():
    """Without accumulate() every call to backward counts as one micro-batch."""
    accelerator, model, optimizer, loader = prepared(batches=4, gradient_accumulation_steps=4)
    probe = cases.LossProbe(optimizer)
    losses = [model(batch) for batch in loader]
    for i, loss in enumerate(losses):
        with accelerator.no_sync(model) if i < 3 else contextlib.nullcontext():
            accelerator.backward(loss)
    accelerator.gradient_state._set_sync_gradients(True)
    optimizer.step()
    assert probe.read() == approx(mean([loss.item() for loss in losses]))


def test_a_step_that_the_scaler_skips_leaves_no_loss_behind():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    accelerator, model, optimizer, loader = prepared(batches=5, scaler=scaler)
    probe, seen, expected = cases.LossProbe(optimizer), [], []
    for i, batch in enumerate(loader):
        loss = model(batch)
        accelerator.backward(loss)
        if i in (1, 2):
            next(model.parameters()).grad.fill_(float("inf"))
        optimizer.step()
        assert optimizer.step_was_skipped == (i in (1, 2))
        optimizer.optimizer.zero_grad()
        seen.append(probe.read())
        expected.append(None if i in (1, 2) else loss.item())
    assert [value is None for value in seen] == [value is None for value in expected]
    assert [v for v in seen if v is not None] == approx([v for v in expected if v is not None])


def test_a_failed_backward_counts_for_nothing(monkeypatch):
    accelerator, model, optimizer, loader = prepared(batches=2)
    probe, (first, second) = cases.LossProbe(optimizer), list(loader)
    loss = model(first)
    with pytest.raises(RuntimeError, match="out of memory"), monkeypatch.context() as patch:
        patch.setattr(
            torch.Tensor, "backward", lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("out of memory"))
        )
        accelerator.backward(loss)
    assert not loss_feed.unwrap(optimizer).has_observed_loss
    loss = model(second)
    accelerator.backward(loss)
    optimizer.step()
    assert probe.read() == approx(loss.item())


def test_zero_grad_forgets_the_loss_with_the_gradients():
    """A loop that drops a window after its backward, by the norm of the gradients for example."""
    accelerator, model, optimizer, loader = prepared(batches=2)
    probe, (first, second) = cases.LossProbe(optimizer), list(loader)
    accelerator.backward(model(first))
    optimizer.zero_grad()
    loss = model(second)
    accelerator.backward(loss)
    optimizer.step()
    assert probe.read() == approx(loss.item())


def test_two_learned_optimizers():
    """Alternating losses: each optimizer sees those whose backward changed its gradients, without any zero_grad."""
    accelerator = Accelerator(cpu=True)
    models = [Regression(), Regression()]
    optimizers = [accelerator.prepare(cases.velo(model.parameters())) for model in models]
    probes = [cases.LossProbe(optimizer) for optimizer in optimizers]
    for scale in (1.0, 1.5):
        losses = [model(torch.full((2, 4), scale + i)) for i, model in enumerate(models)]
        for loss in losses:
            accelerator.backward(loss)
        for optimizer, probe, loss in zip(optimizers, probes, losses, strict=True):
            optimizer.step()
            assert probe.read() == approx(loss.item())


def test_a_loss_passed_to_step_replaces_the_fed_one():
    accelerator, model, optimizer, loader = prepared(batches=1)
    probe = cases.LossProbe(optimizer)
    for batch in loader:
        accelerator.backward(model(batch))
        optimizer.step(torch.tensor(3.0))
    assert probe.read() == approx(3.0)


def test_without_backward_of_accelerate_the_step_says_what_to_call():
    _, model, optimizer, loader = prepared(batches=1)
    for batch in loader:
        model(batch).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="observe_loss"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_accumulation_equals_one_large_batch():
    """Four micro-batches of two, or one batch of eight: the same parameters to rounding, loss features included."""
    data = torch.randn(48, 4, generator=torch.Generator().manual_seed(3))
    results = []
    for size, steps in ((8, 1), (2, 4)):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
        model = Regression()
        optimizer = cases.velo(model.parameters())
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=size))
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch))
                optimizer.step()
                optimizer.zero_grad()
        assert loss_feed.unwrap(optimizer).steps_done == 6
        results.append(list(model.parameters()))
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_other_optimizers_pass_through():
    accelerator = Accelerator(cpu=True)
    model = Regression()
    reference = copy.deepcopy(model)
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(model(torch.ones(2, 4)))
    optimizer.step()
    optimizer.zero_grad()
    reference(torch.ones(2, 4)).backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.1 * q.grad)
        assert p.grad is None


def test_the_wrappers_keep_names_and_signatures():
    for cls, method in (
        (Accelerator, "backward"),
        (Accelerator, "accumulate"),
        (AcceleratedOptimizer, "step"),
        (AcceleratedOptimizer, "zero_grad"),
    ):
        wrapped = getattr(cls, method)
        assert wrapped.__name__ == method
        assert not hasattr(wrapped._hf_lopt_original, "_hf_lopt_original")


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({"distributed_type": "DEEPSPEED"}, "DeepSpeed"),
        ({"distributed_type": "MEGATRON_LM"}, "Megatron"),
        ({"distributed_type": "FSDP", "fsdp_plugin": types.SimpleNamespace(fsdp_version=1)}, "FSDP1"),
    ],
)
def test_sharding_accelerators_are_refused(state, match, monkeypatch):
    accelerator, model, _, _ = prepared(batches=1)
    monkeypatch.setattr(accelerator, "state", types.SimpleNamespace(**state))
    with pytest.raises(ValueError, match=match + r".*DistributedDataParallel"):
        accelerator.backward(model(torch.ones(2, 4)))


def test_plain_loops_need_no_accelerate():
    model = Regression()
    optimizer = hf_lopt.VeLO(model.parameters(), num_training_steps=5, weights="bundled")
    probe = cases.LossProbe(optimizer)
    loss = model(torch.ones(2, 4))
    loss.backward()
    optimizer.observe_loss(loss)
    optimizer.step()
    assert probe.read() == approx(loss.item())
    assert not PartialState._shared_state
