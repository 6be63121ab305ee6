"""Whatever loop drives the optimizer, the loss that it sees is the one that was propagated back.

A matrix: doors, by which a loop reaches the optimizer, times what loops do. A window of accumulation counts as the
mean over its micro-batches.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import pickle
import threading
import warnings

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import emulated
import hf_cases as cases
import hf_lopt
from hf_lopt import rules
from hf_lopt.kernels.reference.scheduler import loss_decays, next_loss_buffer
from hf_lopt.step.scheduler import init_loss_buffer
from said import said


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def approx(values):
    return pytest.approx(values, abs=2e-5)


class Regression(torch.nn.Module):
    def __init__(self, level=5.0, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.level, self.layers = level, torch.nn.Linear(4, 2)

    def forward(self, x):
        # Close to one level: the rule clips jumps of the loss, early ones most, which would hide what it was given.
        return self.level + 0.01 * (self.layers(x) - x.sum(-1, keepdim=True)).square().mean()


def batches(count=5):
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(count, 2, 4, generator=generator) + 1.0)


class Loop:
    """A training loop of one door over one or more models, each with a VeLO; the base class is a plain loop.

    ``micro_batch(i, x)`` propagates the loss of model i back, ``take_step(i)`` ends a window. ``run`` returns what the
    optimizers saw, step by step.
    """

    divides = True  # whether the loop divides by the length of a window itself

    def __init__(self, models, window):
        self.window = window
        self.models = models
        self.learned = [cases.velo(model.parameters()) for model in models]
        self.optimizers = self.learned
        self.setup()

    def setup(self):
        pass

    def micro_batch(self, i, x, share):
        loss = self.models[i](x)
        self.optimizers[i].observe_loss(loss * share)
        (loss * share).backward()
        return loss.item()

    def take_step(self, i):
        self.optimizers[i].step()
        self.optimizers[i].zero_grad()

    def drop(self, i):
        self.optimizers[i].zero_grad()

    def run(self, data, dropped=()):
        probes = [cases.LossProbe(optimizer) for optimizer in self.learned]
        seen, expected = [[] for _ in self.models], [[] for _ in self.models]
        starts = range(0, len(data), self.window)
        for number, start in enumerate(starts):
            window = data[start : start + self.window]
            losses = [[] for _ in self.models]
            for x in window:
                for i in range(len(self.models)):  # backward of one, backward of the other, step, step
                    losses[i].append(self.micro_batch(i, x, 1 / len(window) if self.divides else 1.0))
            for i in range(len(self.models)):
                if number in dropped:
                    self.drop(i)
                    assert probes[i].read() is None
                else:
                    self.take_step(i)
                    seen[i].append(probes[i].read())
                    expected[i].append(sum(losses[i]) / len(window))
        return seen, expected


class Scaled(Loop):
    """GradScaler: a dropped window is one that overflows, which the scaler does not step."""

    def setup(self):
        self.scalers = [torch.amp.GradScaler("cpu", init_scale=4.0) for _ in self.models]

    def micro_batch(self, i, x, share):
        loss = self.models[i](x)
        self.optimizers[i].observe_loss(loss * share)
        self.scalers[i].scale(loss * share).backward()
        return loss.item()

    def take_step(self, i):
        self.scalers[i].step(self.optimizers[i])
        self.scalers[i].update()
        self.optimizers[i].zero_grad()

    def drop(self, i):
        self.models[i].layers.weight.grad[0, 0] = math.inf
        self.take_step(i)


class ScaledModel(Scaled):
    """The loop clears the gradients of the model, not those of the optimizer."""

    def take_step(self, i):
        self.scalers[i].step(self.optimizers[i])
        self.scalers[i].update()
        self.models[i].zero_grad()


class ScaledFeed(Scaled):
    """feed_loss takes the scale out again."""

    def setup(self):
        super().setup()
        self.feeds = [hf_lopt.feed_loss(o, scaler=s) for o, s in zip(self.learned, self.scalers, strict=True)]

    def micro_batch(self, i, x, share):
        loss = self.models[i](x)
        self.scalers[i].scale(loss * share).backward()
        return loss.item()


class ScaledUnnamed(ScaledFeed):
    """The scaler is known without being named."""

    def setup(self):
        Scaled.setup(self)
        self.feeds = [hf_lopt.feed_loss(optimizer) for optimizer in self.learned]


class Feed(Loop):
    """A loop that passes no loss at all."""

    def setup(self):
        self.feeds = [hf_lopt.feed_loss(optimizer) for optimizer in self.learned]

    def micro_batch(self, i, x, share):
        loss = self.models[i](x)
        (loss * share).backward()
        return loss.item()


class Accelerated(Loop):
    """accelerate, with losses that the loop divides."""

    def setup(self):
        self.accelerator = Accelerator(cpu=True)
        self.optimizers = [self.accelerator.prepare(optimizer) for optimizer in self.learned]

    def micro_batch(self, i, x, share):
        loss = self.models[i](x)
        self.accelerator.backward(loss * share)
        return loss.item()


class AcceleratedUndivided(Accelerated):
    """gradient_accumulation_steps without accumulate(), as in Accelerate's example for texts of varied length."""

    def setup(self):
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=self.window)
        self.optimizers = [self.accelerator.prepare(optimizer) for optimizer in self.learned]

    def micro_batch(self, i, x, share):
        loss = self.models[i](x)
        self.accelerator.backward(loss * share * self.window)
        return loss.item()


class AcceleratedObserved(Accelerated):
    """The wrapper is given the loss; nothing of Accelerate sees the backward."""

    def micro_batch(self, i, x, share):
        loss = self.models[i](x)
        self.optimizers[i].observe_loss(loss * share)
        (loss * share).backward()
        return loss.item()


class Fabric(Loop):
    def setup(self):
        fabric = pytest.importorskip("lightning.fabric")
        self.fabric = fabric.Fabric(accelerator="cpu", devices=1)
        pairs = [self.fabric.setup(m, o) for m, o in zip(self.models, self.learned, strict=True)]
        self.models, self.optimizers = [list(x) for x in zip(*pairs, strict=True)]

    def micro_batch(self, i, x, share):
        loss = self.models[i](x)
        self.fabric.backward(loss * share)
        return loss.item()


class FabricObserved(Fabric):
    """The loss is given to the wrapper as well."""

    def micro_batch(self, i, x, share):
        loss = self.models[i](x)
        self.optimizers[i].observe_loss(loss.detach() * share)
        self.fabric.backward(loss * share)
        return loss.item()


class FabricUnsynchronised(Fabric):
    def micro_batch(self, i, x, share):
        with self.fabric.no_backward_sync(self.models[i], enabled=share < 1):
            return super().micro_batch(i, x, share)


LOOPS = [Loop, Scaled, ScaledModel, Feed, ScaledFeed, ScaledUnnamed]
LOOPS += [Accelerated, AcceleratedUndivided, AcceleratedObserved, Fabric, FabricObserved, FabricUnsynchronised]


@pytest.mark.parametrize("case", ["plain", "accumulation", "skipped", "two_models"])
@pytest.mark.parametrize("door", LOOPS, ids=lambda door: door.__name__)
def test_the_loss_that_was_propagated_back(door, case):
    models = [Regression()] + ([Regression(6.0, seed=1)] if case == "two_models" else [])
    loop = door(models, window=2 if case == "accumulation" else 1)
    try:
        seen, expected = loop.run(batches(), dropped=(1, 2) if case == "skipped" else ())
    finally:
        for feed in getattr(loop, "feeds", ()):
            feed.remove()
    assert len(seen[0]) == {"accumulation": 3, "skipped": 3}.get(case, 5)
    for mine, theirs in zip(seen, expected, strict=True):
        assert mine == approx(theirs)
    assert torch.autograd.backward.__module__ == "torch.autograd"


# ---- Lightning's Trainer ----


def lightning_run(automatic, window=1, skip=(), two=False):
    """What VeLO saw and the losses of the batches, with ``lightning.pytorch``."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = automatic
            self.first, self.second = Regression(), Regression(6.0, seed=1)
            self.losses, self.seen, self.others = [], [], []

        def configure_optimizers(self):
            learned = cases.velo(self.first.parameters(), num_training_steps=None)
            self.learned, self.probe = learned, cases.LossProbe(learned)
            if not two:
                return learned
            self.other = torch.optim.SGD(self.second.parameters(), lr=0.01)
            if two == "learned":
                self.other = cases.velo(self.second.parameters())
                self.other_probe = cases.LossProbe(self.other)
            return [learned, self.other]

        def on_train_start(self):
            optimizer = self.optimizers()[0] if two else self.optimizers()
            optimizer.num_training_steps = 20
            assert self.learned.num_training_steps == 20

        def training_step(self, batch, index):
            if automatic:
                if index in skip:
                    return None
                loss = self.first(batch)
                self.losses.append(loss.item())
                return loss
            optimizers = self.optimizers() if two else [self.optimizers()]
            loss = self.first(batch)
            self.losses.append(loss.item())
            last = (index + 1) % window == 0 or self.trainer.is_last_batch
            if two:
                self.others.append(self.second(batch))
                self.manual_backward(self.others[-1])
            self.manual_backward(loss / window)
            if index in skip:
                optimizers[0].zero_grad()
                self.losses.pop()
            elif last:
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                if two == "learned":
                    assert self.other_probe.read() == approx(self.others[-1].item())

        def on_train_batch_end(self, *arguments):
            value = self.probe.read()
            if value is not None:
                self.seen.append(value)

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=window if automatic else 1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(torch.cat(batches()), batch_size=2))
    losses = module.losses
    expected = [sum(losses[i : i + window]) / len(losses[i : i + window]) for i in range(0, len(losses), window)]
    return module.seen, expected


@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
@pytest.mark.parametrize("case", [{}, {"window": 2}, {"skip": (1, 2)}, {"two": "other"}, {"two": "learned"}], ids=str)
def test_lightning(automatic, case):
    if automatic and "two" in case:
        pytest.skip("automatic optimization has one optimizer")
    seen, expected = lightning_run(automatic, **case)
    assert len(seen) == (3 if case.get("window") or case.get("skip") else 5)
    assert seen == approx(expected)


# ---- loops of libraries ----


class Level(torch.nn.Module):
    """The criterion of :class:`Regression`."""

    def forward(self, prediction, target):
        return 5.0 + 0.01 * (prediction - target).square().mean()


def ignite_run(window, scaled=False):
    engine = pytest.importorskip("ignite.engine")
    model = torch.nn.Linear(4, 2)
    optimizer, losses, seen = cases.velo(model.parameters()), [], []
    probe, scaler = cases.LossProbe(optimizer), torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None

    def criterion(prediction, target):
        losses.append(Level()(prediction, target))
        return losses[-1]

    settings = {"amp_mode": "amp", "scaler": scaler} if scaled else {}
    trainer = engine.create_supervised_trainer(
        model, optimizer, criterion, gradient_accumulation_steps=window, **settings
    )
    trainer.add_event_handler(engine.Events.ITERATION_COMPLETED, lambda _: seen.append(probe.read()))
    with hf_lopt.feed_loss(optimizer, scaler):
        trainer.run([(x, x[:, :2]) for x in batches()], max_epochs=2)
    return seen, losses


def skorch_run(window):
    """With a window as skorch's documentation has it: ``get_loss`` divides, ``train_step`` counts."""
    skorch = pytest.importorskip("skorch")

    class Net(skorch.NeuralNetRegressor):
        def get_loss(self, *args, **kwargs):
            losses.append(super().get_loss(*args, **kwargs))
            return losses[-1] / window

        def on_batch_end(self, net, batch=None, training=False, **kwargs):
            seen.append(probe.read())

        def train_step(self, batch, **kwargs):
            if window == 1:
                return super().train_step(batch, **kwargs)  # gives the optimizer a closure
            step = self.train_step_single(batch, **kwargs)
            if len(losses) % window == 0:
                self.optimizer_.step()
                self.optimizer_.zero_grad()
            return step

    losses, seen, x = [], [], torch.cat(batches())
    settings = {"optimizer__num_training_steps": 20, "optimizer__weights": "bundled", "lr": 1.0, "batch_size": 2}
    settings |= {"max_epochs": 2, "train_split": None, "verbose": 0, "warm_start": True}
    net = Net(torch.nn.Linear(4, 2), criterion=Level, optimizer=hf_lopt.VeLO, **settings).initialize()
    probe = cases.LossProbe(net.optimizer_)
    with hf_lopt.feed_loss(net.optimizer_) if window > 1 else contextlib.nullcontext():
        net.fit(x.numpy(), x[:, :2].numpy())
    return seen, losses


LIBRARIES = [(ignite_run, 1), (ignite_run, 2), (ignite_run, 2, True), (skorch_run, 1), (skorch_run, 2)]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda case: "-".join([case[0].__name__, *map(str, case[1:])]))
def test_loops_of_libraries(library):
    """Two epochs of five batches; with a window of two, one of them reaches into the second epoch."""
    run, window, *scaled = library
    seen, losses = run(window, *scaled)
    seen = [x for x in seen if x is not None]
    windows = [losses[i : i + window] for i in range(0, 10, window)]
    assert seen == approx([sum(x.item() for x in window) / len(window) for window in windows])


def test_nothing_on_the_way_of_a_loss_waits_for_the_device():
    """Tensors on the device "meta" have no values: whoever asks for one gets an error."""
    model, x = Regression().to("meta"), torch.ones(2, 4, device="meta")
    optimizer = cases.velo(model.parameters())
    accelerator = Accelerator(cpu=True, device_placement=False, gradient_accumulation_steps=2)
    wrapper = accelerator.prepare(optimizer)
    doors = [wrapper.observe_loss, accelerator.backward, optimizer.observe_loss]
    with hf_lopt.feed_loss(optimizer):
        for backward in (*doors, torch.Tensor.backward):
            for divisor in (2, torch.tensor(2.0), torch.tensor(2.0, device="meta")):
                backward(model(x) / divisor)
            assert optimizer._pending.value.device.type == "meta"
            optimizer.scale_observed_loss(0.5)
            optimizer.zero_grad()


# ---- Accelerate ----


def test_only_the_optimizer_that_took_part_sees_a_loss():
    """A GAN whose other optimizer is an ordinary one; and a generator loss that passes through the discriminator."""
    accelerator = Accelerator(cpu=True)
    generator, judge = torch.nn.Linear(4, 4), Regression()
    learned, ordinary = cases.velo(generator.parameters()), torch.optim.SGD(judge.parameters(), lr=0.01)
    optimizer, other = accelerator.prepare(learned, ordinary)
    probe, seen, expected = cases.LossProbe(learned), [], []
    for x in batches():
        accelerator.backward(judge(generator(x).detach()) + 3.0)
        other.step()
        other.zero_grad()
        loss = judge(generator(x))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(probe.read())
        expected.append(loss.item())
    assert seen == approx(expected)


def test_many_folds_on_one_accelerator():
    accelerator = Accelerator(cpu=True)
    for fold in range(3):
        model = Regression(5.0 + fold)
        optimizer = accelerator.prepare(cases.velo(model.parameters()))
        probe = cases.LossProbe(optimizer)
        for x in batches(2):
            loss = model(x)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            assert probe.read() == approx(loss.item())


def test_losses_divided_by_a_fixed_number():
    """Two full windows of 2, then one of 1 that is divided by 2 all the same: its loss is not half as large."""
    accelerator, model = Accelerator(cpu=True), Regression()
    optimizer = accelerator.prepare(cases.velo(model.parameters()))
    probe, seen, losses = cases.LossProbe(optimizer), [], []
    for i, x in enumerate(batches()):
        loss = model(x)
        losses.append(loss.item())
        accelerator.backward(loss / 2)
        if i % 2 == 1 or i == 4:
            optimizer.step()
            optimizer.zero_grad()
            seen.append(probe.read())
    assert seen == approx([sum(losses[:2]) / 2, sum(losses[2:4]) / 2, losses[4]])


def test_a_loss_of_one_backward_that_is_halved_stays_halved():
    """As a discriminator's is: nothing says that this is accumulation."""
    accelerator, model = Accelerator(cpu=True), Regression(10.0)
    optimizer = accelerator.prepare(cases.velo(model.parameters()))
    probe = cases.LossProbe(optimizer)
    for x in batches(3):
        loss = model(x) / 2
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        assert probe.read() == approx(loss.item())


def test_gradients_dropped_by_the_model_take_their_loss_along():
    accelerator, model = Accelerator(cpu=True), Regression()
    optimizer = accelerator.prepare(cases.velo(model.parameters()))
    probe, (first, second) = cases.LossProbe(optimizer), batches(2)
    accelerator.backward(model(first))
    model.zero_grad()
    loss = model(second)
    accelerator.backward(loss)
    optimizer.step()
    assert probe.read() == approx(loss.item())


def test_attributes_of_the_learned_optimizer_reach_through_accelerates_wrapper():
    accelerator, model = Accelerator(cpu=True), Regression()
    optimizer = accelerator.prepare(cases.velo(model.parameters(), num_training_steps=None))
    learned = optimizer.optimizer
    optimizer.num_training_steps = 7
    assert learned.num_training_steps == optimizer.num_training_steps == 7
    probe = cases.LossProbe(optimizer)
    model(batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match=r"observe_loss(.|\n)*feed_loss(.|\n)*celo2 and small_fc_lopt"):
        optimizer.step()
    optimizer.observe_loss(5.0)  # what the message says
    optimizer.step()
    assert probe.read() == approx(5.0) and optimizer.steps_done == 1 and optimizer.rule is learned.rule
    other = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    assert not hasattr(other, "observe_loss") and not hasattr(other, "num_training_steps")
    other.num_training_steps = 3
    assert other.num_training_steps == 3


# ---- the waiting loss ----


def test_zero_grad_drops_the_loss_and_the_error_says_so():
    model = Regression()
    optimizer = cases.velo(model.parameters())
    loss = model(batches(1)[0])
    optimizer.observe_loss(loss)
    optimizer.zero_grad()
    loss.backward()
    with pytest.raises(RuntimeError, match="zero_grad.. has dropped"):
        optimizer.step()
    optimizer.step(loss.detach())
    assert optimizer.steps_done == 1


@pytest.mark.parametrize("rule", ["velo", "celo2"])
def test_a_step_without_any_gradient_does_nothing(rule):
    model = Regression()
    settings = {"num_training_steps": 9} if rules.get(rule).needs_horizon else {}
    optimizer = hf_lopt.LearnedOptimizer(model.parameters(), rule, weights="bundled", **settings)
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    optimizer.observe_loss(3.0)
    optimizer.step()
    assert optimizer.steps_done == 0 and not optimizer.has_observed_loss
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_closure_that_clears_gradients_returns_the_loss_that_counts():
    model = Regression()
    optimizer = cases.velo(model.parameters())
    probe = cases.LossProbe(optimizer)
    optimizer.observe_loss(70.0)

    def closure():
        optimizer.zero_grad()
        loss = model(batches(1)[0])
        loss.backward()
        return loss

    assert probe.read() is None
    loss = optimizer.step(closure)
    assert probe.read() == approx(loss.item())


# ---- feed_loss ----


def test_feed_loss_takes_scalars_of_its_optimizer_only():
    model, other = Regression(), Regression()
    optimizer = cases.velo(model.parameters())
    x = batches(1)[0]
    with hf_lopt.feed_loss(optimizer), hf_lopt.feed_loss(optimizer) as inner:
        other(x).backward()
        assert not optimizer.has_observed_loss
        torch.autograd.backward([model.layers(x)], [torch.ones(2, 2)])  # no scalar
        assert not optimizer.has_observed_loss
        optimizer.zero_grad()
        first, second = model(x), model(x) + 1.0
        torch.autograd.backward([first, second], [None, torch.tensor(0.5)])
        assert float(optimizer._pending) == approx(first.item() + 0.5 * second.item())
        optimizer.zero_grad()
        inner.remove()
        inner.remove()
        loss = model(x)
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).backward()
        assert float(optimizer._pending) == approx(loss.item())
        optimizer.observe_loss(2.0)  # what a loop gives has precedence
        assert float(optimizer._pending) == 2.0
        optimizer.zero_grad()
    model(x).backward()
    assert not optimizer.has_observed_loss
    with pytest.raises(TypeError, match="SGD"):
        hf_lopt.feed_loss(torch.optim.SGD(model.parameters()))


def test_removing_leaves_what_others_put_around_backward(monkeypatch):
    """Some wrap it too, with functools.wraps, which copies attributes."""
    monkeypatch.setattr(torch.autograd, "backward", torch.autograd.backward)  # restored in the end
    model, calls = Regression(), []
    optimizer = cases.velo(model.parameters())
    feed = hf_lopt.feed_loss(optimizer)

    def wrap(inner):
        @functools.wraps(inner)
        def backward(*args, **kwargs):
            calls.append(1)
            return inner(*args, **kwargs)

        return backward

    torch.autograd.backward = wrap(torch.autograd.backward)
    model(batches(1)[0]).backward()
    assert len(calls) == 1 and optimizer.has_observed_loss
    optimizer.zero_grad()
    feed.remove()
    model(batches(1)[0]).backward()
    assert len(calls) == 2 and not optimizer.has_observed_loss
    optimizer.zero_grad()
    with hf_lopt.feed_loss(optimizer):
        loss = model(batches(1)[0])
        loss.backward()
    assert len(calls) == 3 and float(optimizer._pending) == approx(loss.item())


def test_feed_loss_beside_accelerate_counts_once():
    accelerator, model = Accelerator(cpu=True), Regression()
    optimizer = accelerator.prepare(cases.velo(model.parameters()))
    with hf_lopt.feed_loss(optimizer):
        loss = model(batches(1)[0])
        accelerator.backward(loss)
        assert float(optimizer.optimizer._pending) == approx(loss.item())


def test_feed_loss_in_threads():
    """Backward calls that run at the same time change each other's view of the gradients; the graph tells."""
    models = [Regression(5.0 + i, seed=i) for i in range(4)]
    optimizers = [cases.velo(model.parameters()) for model in models]
    barrier, seen, expected = threading.Barrier(4), [[] for _ in models], [[] for _ in models]

    class Meet(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            barrier.wait(timeout=30)
            return gradient

    def work(i):
        for x in batches(3):
            barrier.wait(timeout=30)
            loss = Meet.apply(models[i](x))
            loss.backward()
            seen[i].append(float(optimizers[i]._pending))
            expected[i].append(loss.item())
            barrier.wait(timeout=30)
            optimizers[i].zero_grad()

    feeds = [hf_lopt.feed_loss(optimizer) for optimizer in optimizers]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for feed in feeds:
        feed.remove()
    assert all(len(x) == 3 for x in seen)
    assert seen == [approx(x) for x in expected]


# ---- the loss buffer ----


def buffer_features(losses, first_step=0, horizon=100.0):
    means, minimum = init_loss_buffer().values()
    decay, features = loss_decays(horizon, means), []
    for i, loss in enumerate(losses):
        step = torch.tensor(first_step + i)
        means, minimum, found = next_loss_buffer(means, minimum, torch.tensor(loss), step, decay)
        features.append(found)
    return torch.stack(features), means


def test_losses_of_zero_do_not_blind_the_buffer():
    features, means = buffer_features([0.0, 0.0, 0.0, 1.0, 2.0, 1.5, 1.2, 1.4])
    assert (means > 0).all()
    assert (features[4:] > -1).any(1).all()


def test_a_resume_without_state_goes_on_as_from_a_steady_loss():
    features, means = buffer_features([5.0, 5.0, 4.0, 3.0, 3.5, 2.0], first_step=500, horizon=1000.0)
    decay = loss_decays(1000.0, means)
    corrected = means.double() / (1 - decay**506)
    assert (corrected <= 5.0 + 1e-6).all() and (corrected >= 2.0).all()
    assert torch.equal(corrected, corrected.sort().values)  # the slower, the closer to where it began
    rising, _ = buffer_features([5.0, 4.0, 6.0, 7.0], first_step=500, horizon=1000.0)
    assert (rising[-1] > -1).any()


@pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler, or HF_LOPT_KERNELS=torch")
@pytest.mark.parametrize(("first_step", "losses"), [(0, [0.0, 0.0, 0.0, 1.0, 2.0, 1.5]), (500, [5.0, 4.0, 6.0])])
def test_the_cuda_kernel_keeps_the_same_buffer(first_step, losses):
    buffers = []
    for kernels in (contextlib.nullcontext(), emulated.emulator().everywhere()):
        with kernels:
            p = torch.nn.Parameter(torch.ones(3, 4))
            optimizer = cases.velo([p], num_training_steps=1000)
            optimizer.steps_done = first_step
            for loss in losses:
                p.grad = torch.ones_like(p)
                optimizer.step(loss)
        buffers.append([optimizer.param_groups[0][name] for name in ("loss_means", "loss_min")])
    torch.testing.assert_close(buffers[0], buffers[1], rtol=1e-6, atol=0.0)


# ---- the horizon ----


@pytest.mark.parametrize(("horizon", "told"), [(6, True), (5, False), (4, True)])
def test_the_end_of_training_compares_a_run_of_five_steps_with_its_horizon(horizon, told):
    """Lightning and Accelerate say where it is. Both numbers, once, whichever of them was the larger one."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Regression()

        def training_step(self, batch, index):
            return self.model(batch)

        def configure_optimizers(self):
            return cases.velo(self.parameters(), num_training_steps=horizon)

    data = DataLoader(torch.cat(batches()), batch_size=2)
    quiet = {name: False for name in ("logger", "enable_progress_bar", "enable_model_summary")}
    with said() as texts:
        trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, enable_checkpointing=False, **quiet)
        trainer.fit(Module(), data)
    accelerator, model = Accelerator(cpu=True), Regression()
    optimizer = accelerator.prepare(cases.velo(model.parameters(), num_training_steps=horizon))
    with said() as others:
        for x in batches():
            accelerator.backward(model(x))
            optimizer.step()
            optimizer.zero_grad()
        accelerator.end_training()
    for found in (texts, others):
        found = [text for text in found if "training ended" in text]
        assert len(found) == told and all("after 5 steps" in x and f"made for {horizon} (" in x for x in found)


def trained(steps, **settings):
    model = Regression()
    optimizer = cases.velo(model.parameters(), **settings)
    for x in batches(steps):
        loss = model(x)
        loss.backward()
        optimizer.step(loss)
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("how", ["constructor", "assignment", "pickled"])
def test_a_horizon_that_was_set_beats_the_checkpoints(how):
    saved = trained(3, num_training_steps=20).state_dict()
    optimizer = trained(0, num_training_steps=40 if how != "assignment" else None)
    if how == "assignment":
        optimizer.num_training_steps = 40
    if how == "pickled":
        optimizer = pickle.loads(pickle.dumps(optimizer))
    with pytest.warns(UserWarning, match="num_training_steps=20.*VeLO.*40") as record:
        optimizer.load_state_dict(saved)
    assert len(record) == 1
    assert optimizer.num_training_steps == 40 and optimizer.steps_done == 3


def test_a_horizon_that_was_not_set_is_the_checkpoints():
    saved, longer = (trained(3, num_training_steps=n).state_dict() for n in (20, 30))
    optimizer = trained(0, num_training_steps=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)
        assert optimizer.num_training_steps == 20
        optimizer.load_state_dict(longer)
        assert optimizer.num_training_steps == 30
        optimizer.num_training_steps = 30
        optimizer.load_state_dict(longer)


def test_micro_batches_that_fsdp2_does_not_synchronise(tmp_path):
    """Their gradients are in FSDP2's records, not in the parameters of the optimizer."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from hf_lopt.feed import deliver

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        models = [fully_shard(Regression(5.0 + i, seed=i), mesh=mesh) for i in range(2)]
        optimizers = [cases.velo(model.parameters()) for model in models]
        touched, data = [], batches(3)
        for i, x in enumerate(data):
            for model in models:
                model.set_requires_gradient_sync(i == 2)
                loss = model(x)
                deliver(optimizers, loss.backward, lambda o, afresh: touched.append((o, afresh)), modules=models)
        assert [optimizers.index(o) for o, _ in touched] == [0, 1] * 3
        assert [afresh for _, afresh in touched] == [True] * 2 + [False] * 4
    finally:
        dist.destroy_process_group()
