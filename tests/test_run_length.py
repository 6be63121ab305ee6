"""How the step size follows the length of the run: the multiplier, who gets it, checkpoints, other lengths."""

from __future__ import annotations

import copy
import logging
import math
import pickle

import pytest
import torch
from torch import nn

import hf_cases as cases
import hf_lopt
from hf_lopt import rules
from hf_lopt.hf.replace import Options, Replacer


transformers_5 = pytest.mark.skipif(
    cases.older("transformers", "5.0"), reason="transformers 4 does not mark what it has loaded"
)
FOLLOWING = ("celo", "celo_adam", "velo", "velo_s")


def make(rule="velo", steps=100, seed=0, groups=None, **settings):
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 4), (6,))]
    settings |= {} if steps is None else {"num_training_steps": steps}
    given = params if groups is None else [{"params": [p], **group} for p, group in zip(params, groups, strict=True)]
    return hf_lopt.LearnedOptimizer(given, rule, **{"weights": "bundled"} | settings), params


def train(optimizer, params, steps=3):
    for t in range(steps):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * t + i))
        optimizer.step(3.0 / (t + 1))
    return [p.detach().clone() for p in params]


def by_hand(steps, rule="velo", published=False):
    """Of the constants in the documentation."""
    found = (200 / steps) ** 0.9 if rule == "celo_adam" else math.sqrt((300 if published else 1000) / steps)
    return min(max(found, 1.0), 5.0)


def weights_of(rule, published, folder):
    """Embedded ones, or the same as a file, which does not say so."""
    if not published:
        return "bundled"
    hf_lopt.weights.save(hf_lopt.weights.load(rule, "bundled"), folder / "other.safetensors")
    return str(folder / "other.safetensors")


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("rule", FOLLOWING)
@pytest.mark.parametrize("steps", [1, 30, 100, 200, 300, 1000, 20_000])
def test_an_lr_that_nobody_chose_counts_so_many_times(rule, steps):
    ours, params = make(rule, steps, weight_decay=0.1)
    train_ours = train(ours, params)
    assert ours.length_multiplier == pytest.approx(by_hand(steps, rule), rel=1e-12)
    assert {group["lr"] for group in ours.param_groups} == {1.0}
    reference, params = make(rule, steps, weight_decay=0.1, lr=ours.length_multiplier)
    assert equal(train_ours, train(reference, params)) and reference.length_multiplier == 1.0


@pytest.mark.parametrize("rule", FOLLOWING)
@pytest.mark.parametrize("steps", [5, 20, 50, 100, 200, 300, 1000])
def test_with_other_weights_it_ends_earlier(rule, steps, tmp_path):
    optimizer, params = make(rule, steps, weights=weights_of(rule, True, tmp_path))
    train(optimizer, params, 1)
    assert optimizer.length_multiplier == pytest.approx(by_hand(steps, rule, published=True))


def test_rules_that_know_no_length_have_none():
    known = {name for name in hf_lopt.available() if rules.get(name).run_lengths}
    assert known == set(FOLLOWING) == {name for name in hf_lopt.available() if rules.get(name).needs_horizon}
    optimizer, params = make("celo2", None)
    train(optimizer, params)
    assert optimizer.length_multiplier == 1.0 and "length_multiplier" not in optimizer.param_groups[0]


def set_before_training(optimizer):
    for group in optimizer.param_groups:
        group["lr"] = 0.5


def one_cycle(optimizer):
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=100, cycle_momentum=False)


@pytest.mark.parametrize(
    ("settings", "action"),
    [
        ({"lr": 1.0}, None),
        ({"lr": torch.tensor(1.0)}, None),
        ({"weights": dict(hf_lopt.VeLO([nn.Parameter(torch.ones(1))], weights="bundled").weights.theta)}, None),
        ({"groups": [{"lr": 1.0}, {}]}, None),
        ({}, set_before_training),
        ({}, one_cycle),
    ],
)
def test_an_lr_that_somebody_chose_stays(settings, action):
    optimizer, params = make(**settings)
    if action:
        action(optimizer)
    train(optimizer, params, 1)
    assert optimizer.length_multiplier == 1.0
    copied = copy.deepcopy(optimizer)
    copied.num_training_steps = 30
    assert copied.length_multiplier == 1.0


def test_a_scheduler_on_top_multiplies(caplog):
    optimizer, params = make(steps=None)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5)  # before the length is known
    optimizer.num_training_steps = 100
    with caplog.at_level(logging.INFO, "hf_lopt"):
        ours = train(optimizer, params)
    assert scheduler.base_lrs == [1.0] and optimizer.param_groups[0]["lr"] == 0.5
    (record,) = caplog.records
    assert "in a run of 100 steps lr counts 3.16 times" in record.getMessage()
    assert optimizer.metrics()["length_multiplier"] == optimizer.length_multiplier
    assert "of 100, length_multiplier=3.16," in repr(optimizer)
    reference, params = make(lr=0.5 * by_hand(100))
    torch.testing.assert_close(ours, train(reference, params), rtol=1e-6, atol=1e-7)


def test_a_checkpoint_keeps_it_and_another_length_decides_again():
    optimizer, params = make(steps=100)
    train(optimizer, params)
    saved = copy.deepcopy(optimizer.state_dict())
    changed = copy.deepcopy(saved)
    for group in changed["param_groups"]:
        group["length_multiplier"] = 2.0  # of a version with other constants
    for state, steps, wanted in ((saved, 100, by_hand(100)), (changed, 100, 2.0), (saved, 500, by_hand(500))):
        resumed, own = make(steps=None)
        resumed.load_state_dict(copy.deepcopy(state))
        resumed.num_training_steps = steps  # as Trainer does
        train(resumed, own, 1)
        assert resumed.length_multiplier == pytest.approx(wanted)
    with pytest.warns(UserWarning, match="goes on as one of 500 steps"):
        resumed, _ = make(steps=500)
        resumed.load_state_dict(copy.deepcopy(saved))
    assert resumed.length_multiplier == pytest.approx(by_hand(500))


def test_checkpoints_without_one_go_on_as_they_were():
    optimizer, params = make(steps=100, lr=1.0)
    train(optimizer, params)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        del group["length_multiplier"]
    resumed, own = make(steps=100)
    resumed.load_state_dict(old)
    for p, q in zip(own, params, strict=True):
        p.data.copy_(q)
    assert equal(train(resumed, own), train(optimizer, params))
    resumed.num_training_steps = 30
    resumed.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert resumed.length_multiplier == 1.0


@pytest.mark.parametrize("value", [float("nan"), -1.0, "2"])
def test_a_damaged_one_is_refused(value):
    optimizer, params = make()
    train(optimizer, params, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["length_multiplier"] = value
    with pytest.raises(ValueError, match="length_multiplier must be a finite number"):
        optimizer.load_state_dict(saved)


def test_updates_count_where_several_steps_are_one():
    optimizer, params = make(steps=100, max_training_steps=50)
    train(optimizer, params)
    assert optimizer.length_multiplier == pytest.approx(by_hand(50))


# ---- fine-tuning ----------------------------------------------------------------------------------------------------


def fine_tuned_by_hand(steps, published=False):
    """Of the constants in the documentation."""
    return min(max(((100 if published else 150) / steps) ** 0.9, 1.0), 2.0)


@pytest.fixture
def loaded(tmp_path):
    cases.tiny_llama().save_pretrained(tmp_path / "model")
    return lambda: type(cases.tiny_llama()).from_pretrained(tmp_path / "model")


def one_step(model, optimizer):
    batch = torch.stack([row["input_ids"] for row in cases.byte_rows(2)])
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step(loss)
    optimizer.zero_grad()


@transformers_5
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("rule", FOLLOWING)
@pytest.mark.parametrize("steps", [50, 80, 120, 150, 1000])
def test_fine_tuning_follows_the_length_less(rule, steps, published, loaded, tmp_path):
    model = loaded()
    spec = weights_of(rule, published, tmp_path)
    optimizer = hf_lopt.LearnedOptimizer(model.parameters(), rule, num_training_steps=steps, weights=spec)
    one_step(model, optimizer)
    assert optimizer.length_multiplier == pytest.approx(fine_tuned_by_hand(steps, published), rel=1e-12)


@transformers_5
def test_fine_tuning_as_if_the_lr_had_been_set(loaded):
    ours, by_hand = loaded(), loaded()
    one_step(ours, hf_lopt.VeLO(ours.parameters(), num_training_steps=120, weights="bundled"))
    lr = 0.05 * fine_tuned_by_hand(120)
    one_step(by_hand, hf_lopt.VeLO(by_hand.parameters(), lr=lr, num_training_steps=120, weights="bundled"))
    assert any(not torch.equal(a, b) for a, b in zip(ours.parameters(), loaded().parameters(), strict=True))
    for a, b in zip(ours.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@transformers_5
def test_fine_tuning_is_one_at_all_doors(loaded, tmp_path):
    """Trainer with ``optim=``, ``--replace``, a copy, a resumed run that becomes longer, and one from before."""
    args = cases.arguments(tmp_path, max_steps=3)
    trainer = cases.Trainer(loaded(), args, train_dataset=cases.byte_rows(8))
    trainer.train()
    assert trainer.optimizer.optimizer.length_multiplier == 2.0
    chosen = cases.arguments(tmp_path, max_steps=3, learning_rate=0.05)
    trainer = cases.Trainer(loaded(), chosen, train_dataset=cases.byte_rows(8))
    trainer.train()
    assert trainer.optimizer.optimizer.length_multiplier == 1.0

    for lr, wanted in ((None, fine_tuned_by_hand(100)), (0.05, 1.0)):
        options, model = Options(optim_args="weights=bundled", lr=lr, steps=100), loaded()
        options.add("AdamW=velo")
        with Replacer(options):
            replaced = torch.optim.AdamW(model.parameters())
            one_step(model, replaced)
        assert replaced.param_groups[0]["lr"] == 0.05
        assert replaced.length_multiplier == pytest.approx(wanted)
    copied = copy.deepcopy(replaced)
    copied.num_training_steps = 120
    assert copied.length_multiplier == 1.0  # its lr was chosen

    model = loaded()
    ours = hf_lopt.VeLO(model.parameters(), num_training_steps=100, weights="bundled")
    one_step(model, ours)
    copied, saved = copy.deepcopy(ours), copy.deepcopy(ours.state_dict())
    copied.num_training_steps = 120
    assert copied.length_multiplier == pytest.approx(fine_tuned_by_hand(120))
    before = copy.deepcopy(saved)
    for group in before["param_groups"]:
        group["length_multiplier"] = 1.0  # of a version in which fine-tuning had none
    now, longer = fine_tuned_by_hand(100), fine_tuned_by_hand(120)
    for state, steps, wanted in ((saved, 100, now), (saved, 120, longer), (before, 100, 1.0)):
        again = loaded()
        resumed = hf_lopt.VeLO(again.parameters(), weights="bundled")
        resumed.load_state_dict(copy.deepcopy(state))
        resumed.num_training_steps = steps
        assert resumed.length_multiplier == pytest.approx(wanted)


# ---- epochs ---------------------------------------------------------------------------------------------------------


def far_reaching(folder):
    """A pretrained model that reaches far."""
    model = cases.far_reaching_llama()
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def by_hand_of_epochs(steps, epochs, model, published=False):
    """Of the constants in the documentation; the matrices of the model are its linear layers."""
    reach = cases.reach_by_hand(model)
    assert reach > 100
    often = max(min(4 / epochs, 1.0), (20 / reach) ** 1.5) if epochs else 1.0
    return min(max(max(((100 if published else 150) / steps) ** 0.9, 1.0) * often, 0.1), 2.0)


@transformers_5
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("rule", FOLLOWING)
@pytest.mark.parametrize("epochs", [0, 1, 4, 5, 8.5, 1000])
def test_fine_tuning_in_many_epochs(rule, epochs, published, tmp_path):
    model = far_reaching(tmp_path / "model")
    spec = weights_of(rule, published, tmp_path)
    wanted = pytest.approx(by_hand_of_epochs(300, epochs, model), rel=1e-6)
    optimizer = hf_lopt.LearnedOptimizer(model.parameters(), rule, num_training_steps=300, weights=spec)
    optimizer.num_epochs = epochs
    assert optimizer.length_multiplier == wanted
    one_step(model, optimizer)
    again = hf_lopt.LearnedOptimizer(model.parameters(), rule, num_training_steps=300, weights=spec)
    again.load_state_dict(optimizer.state_dict())
    assert again.length_multiplier == wanted


@pytest.mark.parametrize("how", ["in the run", "resumed", "said before loading", "said after loading", "pickled"])
def test_the_epochs_of_a_run_that_becomes_longer(how, tmp_path):
    """Those of a checkpoint grow with the length; those that somebody has said stay."""
    model = with_adapters()
    optimizer = hf_lopt.VeLO(model.parameters(), num_training_steps=300, weights="bundled")
    optimizer.num_epochs = 8
    if how == "pickled":
        optimizer = pickle.loads(pickle.dumps(optimizer))
        assert optimizer.num_epochs == 8
        for group in optimizer.param_groups:  # no longer the model's own
            group["params"] = [p for p in model.parameters() if p.requires_grad]
    one_step(model, optimizer)
    assert optimizer.length_multiplier == pytest.approx(by_hand_of_adapters(300, 8))
    if how == "in the run":
        optimizer.num_epochs = 20
        assert optimizer.length_multiplier == pytest.approx(by_hand_of_adapters(300, 20))
    elif how != "pickled":
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = hf_lopt.VeLO(model.parameters(), num_training_steps=600, weights="bundled")
        if how == "said before loading":
            optimizer.num_epochs = 12
        with pytest.warns(UserWarning, match="num_training_steps=300"):
            optimizer.load_state_dict(saved)
        if how == "said after loading":
            optimizer.num_epochs = 12
    optimizer.num_training_steps = 600
    epochs = {"in the run": 20, "resumed": 16, "pickled": 8}.get(how, 12)
    assert optimizer.num_epochs == epochs
    assert optimizer.length_multiplier == pytest.approx(by_hand_of_adapters(600, epochs))
    one_step(model, optimizer)
    assert optimizer.length_multiplier == pytest.approx(by_hand_of_adapters(600, epochs))


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("epochs", [20, 40])
def test_a_trainer_that_resumes_for_longer(kept, epochs, tmp_path):
    """Nine samples are three updates. A checkpoint from before, which knows no epochs, keeps its multiplier, too,
    unless the length changes."""

    def trainer(epochs):
        options = {"max_steps": -1, "num_train_epochs": epochs, "per_device_train_batch_size": 3}
        options |= {"save_strategy": "steps", "save_steps": 30}
        args = cases.arguments(tmp_path, **options, optim_args="weights=bundled")
        return cases.Trainer(with_adapters(), args, train_dataset=cases.byte_rows(9))

    first = trainer(20)
    first.train()
    folder = tmp_path / "checkpoint-30"
    whole = by_hand_of_adapters(60, 20)
    if not kept:
        state = torch.load(folder / "optimizer.pt", weights_only=True)
        for group in state["param_groups"]:
            del group["num_epochs"]
            group["length_multiplier"] = by_hand(60)
        torch.save(state, folder / "optimizer.pt")
        whole = by_hand(60)
    resumed = trainer(epochs)
    resumed.train(resume_from_checkpoint=str(folder))
    found = resumed.optimizer.optimizer.length_multiplier
    if epochs == 20:
        assert found == whole  # to the bit
    else:
        assert found == pytest.approx(by_hand_of_adapters(120, 40), rel=1e-6)


@transformers_5
def test_epochs_count_neither_from_scratch_nor_in_small_models_nor_beside_an_lr(loaded, tmp_path):
    scratch = cases.tiny_llama()
    for model, lr in ((scratch, {}), (loaded(), {}), (far_reaching(tmp_path / "far"), {"lr": 0.05})):
        optimizer = hf_lopt.VeLO(model.parameters(), num_training_steps=1000, weights="bundled", **lr)
        optimizer.num_epochs = 50
        one_step(model, optimizer)
        assert optimizer.length_multiplier == 1.0


@transformers_5
@pytest.mark.parametrize("arguments", [{"num_train_epochs": 50}, {"max_steps": 120}])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_trainer_knows_the_epochs(arguments, accumulated, tmp_path, caplog):
    """Nine samples are three batches, three updates or two."""
    caplog.set_level(logging.INFO, "hf_lopt")
    model = far_reaching(tmp_path / "model")
    options = {"max_steps": -1, "per_device_train_batch_size": 3, "gradient_accumulation_steps": accumulated}
    args = cases.arguments(tmp_path / "run", **options | arguments, optim_args="weights=bundled")
    in_epoch = (3, 2)[accumulated - 1]
    steps = arguments.get("max_steps", 50 * in_epoch)
    epochs = steps / in_epoch
    wanted = by_hand_of_epochs(steps, epochs, model)
    assert wanted < 1.0
    trainer = cases.Trainer(model, args, train_dataset=cases.byte_rows(9))
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert optimizer.num_epochs == pytest.approx(epochs)
    assert optimizer.length_multiplier == pytest.approx(wanted, rel=1e-6)
    assert f"{epochs:.3g} epochs" in caplog.text


@transformers_5
def test_trainer_with_samples_that_nobody_has_counted(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(cases.byte_rows(9))

    args = cases.arguments(tmp_path / "run", max_steps=20, optim_args="weights=bundled")
    trainer = cases.Trainer(far_reaching(tmp_path / "model"), args, train_dataset=Stream())
    trainer.train()
    assert trainer.optimizer.optimizer.num_epochs == 0.0
    assert trainer.optimizer.optimizer.length_multiplier == 2.0


@pytest.mark.parametrize("value", [-1, math.inf, math.nan, True, "3", None, 1e39])
def test_epochs_that_are_no_number(value):
    optimizer, _ = make("velo", 100)
    with pytest.raises(ValueError, match=r"num_epochs must be a number >= 0, and 0 where it is not known, got"):
        optimizer.num_epochs = value
    assert optimizer.num_epochs == 0.0


def with_adapters():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(cases.tiny_llama(), peft.LoraConfig(target_modules=["q_proj"], r=2))


def by_hand_of_adapters(steps, epochs, published=False):
    """That from scratch, and 4 / epochs of it, a tenth at the least."""
    return by_hand(steps, "velo", published) * (min(max(4 / epochs, 0.1), 1.0) if epochs else 1.0)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("steps", [30, 300, 2000])
@pytest.mark.parametrize("epochs", [0, 1, 4, 5, 8.5, 1000])
def test_adapters_in_many_epochs(epochs, steps, published, tmp_path, caplog):
    caplog.set_level(logging.INFO, "hf_lopt")
    model, spec = with_adapters(), weights_of("velo", published, tmp_path)
    wanted = pytest.approx(by_hand_of_adapters(steps, epochs, published), rel=1e-6)
    optimizer = hf_lopt.VeLO(model.parameters(), num_training_steps=steps, weights=spec)
    optimizer.num_epochs = epochs
    assert optimizer.length_multiplier == wanted  # before it is decided, too
    one_step(model, optimizer)
    assert optimizer.length_multiplier == wanted
    assert (f"{epochs:.3g} epochs, lr counts" in caplog.text) == (epochs > 4)
    again = hf_lopt.VeLO(model.parameters(), num_training_steps=steps, weights=spec)
    again.load_state_dict(optimizer.state_dict())
    assert again.length_multiplier == wanted


def test_trainer_counts_the_epochs_of_adapters(tmp_path, caplog):
    """Nine samples are three updates."""
    caplog.set_level(logging.INFO, "hf_lopt")
    for settings, wanted in (({}, by_hand_of_adapters(60, 20)), ({"learning_rate": 1.0}, 1.0)):
        options = {"max_steps": -1, "num_train_epochs": 20, "per_device_train_batch_size": 3}
        args = cases.arguments(tmp_path, **options | settings, optim_args="weights=bundled")
        trainer = cases.Trainer(with_adapters(), args, train_dataset=cases.byte_rows(9))
        trainer.train()
        assert trainer.optimizer.optimizer.length_multiplier == pytest.approx(wanted, rel=1e-6)
    assert "in a run of 60 steps, 20 epochs, lr counts 0.816 times" in caplog.text
