"""Every door of Trainer leads to the same run: what nobody set is set, what conflicts is named, arguments stay.

The doors are those of real programs: an optimizer that is passed in, a class that is passed in, subclasses that make
their own groups with or without Trainer's keywords, arguments that serve several runs, runs that end early or resume.
"""

import copy
import dataclasses
import warnings

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import hf_cases as cases
import hf_lopt
from hf_lopt.hf.arguments import OptimizerKeywords
from hf_lopt.hf.loss_feed import unwrap
from said import said


STEPS = 4


def run(trainer, **train_arguments):
    """Train; the learned optimizer (None for another) and what was said."""
    with said() as texts:
        trainer.train(**train_arguments)
    return unwrap(trainer.optimizer), texts


def make(folder, model, trainer=Trainer, arguments=None, **changes):
    args = cases.arguments(folder, **({"max_steps": STEPS} | changes))
    return trainer(model, args, train_dataset=cases.byte_rows(22), **(arguments or {}))


def rates(trainer):
    return [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]


def pretrained(folder):
    cases.tiny_llama().save_pretrained(folder / "model")
    return LlamaForCausalLM.from_pretrained(folder / "model")


def adapters(folder):
    peft = pytest.importorskip("peft", reason="needs: pip install 'hf_lopt[test]'")
    return peft.get_peft_model(cases.tiny_llama(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))


def scratch(folder):
    return cases.tiny_llama()


# ---- subclasses that make their own groups --------------------------------------------------------------------------


class OwnGroups(Trainer):
    """Asks for class and keywords, and calls the class with groups of its own."""

    with_model = False

    def groups(self):
        return [{"params": [p for p in self.model.parameters() if p.requires_grad]}]

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            groups = self.groups()
            asked = (self.args, self.model) if self.with_model else (self.args,)
            cls, keywords = Trainer.get_optimizer_cls_and_kwargs(*asked)
            self.optimizer = cls(groups, **keywords)
        return self.optimizer


class WithModel(OwnGroups):
    with_model = True


class LearningRateFirst(OwnGroups):
    def groups(self):
        return [group | {"lr": self.args.learning_rate, "weight_decay": 0.0} for group in super().groups()]


class OfTheirOwn(Trainer):
    """Does not ask for a class at all."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            groups = [{"params": list(self.model.parameters()), "lr": self.args.learning_rate}]
            self.optimizer = hf_lopt.VeLO(groups, weights="bundled")
        return self.optimizer


@pytest.mark.parametrize(
    ("model", "lr", "multiplier", "floor"),
    [(scratch, 1, 5, 0), (pretrained, 0.05, 2, 0), (adapters, 1, 5, 0.05)],
)
@pytest.mark.parametrize("subclass", [OwnGroups, WithModel, LearningRateFirst, OfTheirOwn])
def test_own_groups_get_what_trainers_groups_get(tmp_path, subclass, model, lr, multiplier, floor):
    changes = {"optim": "adamw_torch", "optim_args": None} if subclass is OfTheirOwn else {}
    trainer = make(tmp_path, model(tmp_path), subclass, **changes)
    optimizer, said = run(trainer)
    assert {(g["lr"], g["min_param_scale"]) for g in optimizer.param_groups} == {(lr, None)}
    # Of adapters that of B, which starts at zero; A has its own size.
    params = {id(p): name for name, p in trainer.model.named_parameters()}
    for p, state in optimizer.state.items():
        wanted = floor if ".lora_A." not in params[id(p)] else 0.0
        assert state["min_param_scale"].item() == pytest.approx(wanted)
    assert rates(trainer) == [lr] * STEPS
    assert optimizer.run_policy.lr.value == lr and optimizer.run_policy.schedule.value == "constant"
    assert sum("optim='velo'" in text for text in said) == 1

    plain, _ = run(make(tmp_path, model(tmp_path)))
    assert optimizer.length_multiplier == plain.length_multiplier == multiplier
    layout = [
        {id_: g["axis_order"] for g in o.param_groups for id_ in (tuple(p.shape) for p in g["params"])}
        for o in (optimizer, plain)
    ]
    assert {shape: order for shape, order in layout[0].items() if shape in layout[1]} == layout[1]


@pytest.mark.parametrize("subclass", [OwnGroups, LearningRateFirst])
def test_branches_and_decay_of_own_groups(tmp_path, subclass):
    for optim, decay in (("celo2", {0.0}), ("elo_celo2", {0.0, 0.1})):
        model = cases.tiny_llama()
        trainer = make(tmp_path, model, subclass, optim=optim)
        optimizer, _ = run(trainer)
        branch = {id(p): group["branch"] for group in optimizer.param_groups for p in group["params"]}
        named = dict(model.named_parameters())
        assert branch[id(named["model.embed_tokens.weight"])] == "adam" and "network" in branch.values()
        found = {group["weight_decay"] for group in optimizer.param_groups}
        assert found == decay or (subclass is OwnGroups and found == {max(decay)})
        assert trainer.args.lr_scheduler_type == "linear" and rates(trainer)[-1] < rates(trainer)[0]


class Layered(OwnGroups):
    """A tenth of the lr for the body, as in layer-wise decay; ``base`` is where the lr comes from."""

    base = "keywords"

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            asked = (self.args, self.model) if self.with_model else (self.args,)
            cls, keywords = self.get_optimizer_cls_and_kwargs(*asked)
            lr = self.args.learning_rate if self.base == "arguments" else keywords.pop("lr")
            keywords.pop("lr", None)
            head = [p for n, p in self.model.named_parameters() if "lm_head" in n]
            body = [p for n, p in self.model.named_parameters() if "lm_head" not in n]
            self.optimizer = cls([{"params": body, "lr": lr * 0.1}, {"params": head, "lr": lr}], lr=lr, **keywords)
        return self.optimizer


class LayeredWithModel(Layered):
    with_model = True


class LayeredByArguments(Layered):
    base = "arguments"


@pytest.mark.parametrize("subclass", [Layered, LayeredWithModel, LayeredByArguments])
@pytest.mark.parametrize(("model", "lr"), [(scratch, 1.0), (pretrained, 0.05)])
def test_ratios_between_groups_stay(tmp_path, subclass, model, lr):
    optimizer, said = run(make(tmp_path, model(tmp_path), subclass))
    found = sorted({group["lr"] for group in optimizer.param_groups})
    assert found == pytest.approx([lr * 0.1, lr]) and found[-1] == lr
    assert any("keep their ratios" in text for text in said)


def test_an_lr_of_a_group_that_conflicts_is_named(tmp_path):
    class Fixed(OwnGroups):
        def groups(self):
            return [group | {"lr": 1e-3} for group in super().groups()]

    optimizer, said = run(make(tmp_path, cases.tiny_llama(), Fixed))
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}
    (text,) = [text for text in said if "group 0 has lr=0.001" in text]
    assert "about 1 here" in text and not any("learning_rate was not set" in text for text in said)


def test_keywords_hold_the_groups_and_unpack_without_them():
    groups = [{"params": []}]
    keywords = OptimizerKeywords({"lr": 1.0}, groups)
    assert "params" in keywords and keywords["params"] is keywords.get("params") is groups
    assert dict(**keywords) == {"lr": 1.0} == {**keywords}
    assert keywords.pop("params") is groups and "params" not in keywords and keywords.get("params", 3) == 3
    assert keywords.pop("params", None) is None and keywords.pop("lr") == 1.0 and not keywords
    for missing in (lambda: keywords["params"], lambda: keywords.pop("params"), lambda: keywords["lr"]):
        with pytest.raises(KeyError):
            missing()


# ---- loops of its own -----------------------------------------------------------------------------------------------


class TwoLosses(Trainer):
    """Propagates two losses back for every batch, as adversarial training does; none of the second window.

    ``windows`` holds per optimizer step the sum of what reached ``Tensor.backward``.
    """

    def __init__(self, *args, **kwargs):
        self.windows = [0.0]
        super().__init__(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step == 1:
            return torch.tensor(0.0)
        inputs = self._prepare_inputs(inputs)
        for share in (1.0, 0.5):
            loss = share * self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss)
        return loss.detach()


@pytest.mark.parametrize("window", [1, 2])
def test_a_training_step_of_its_own(tmp_path, monkeypatch, window):
    """Accumulation with a short last window, a step without gradients; Trainer's loops divide losses themselves."""
    args = cases.arguments(tmp_path, num_train_epochs=1, gradient_accumulation_steps=window)
    trainer = TwoLosses(cases.tiny_llama(), args, train_dataset=cases.byte_rows(10))
    seen, backward = cases.SeenLosses(), torch.Tensor.backward

    class NextWindow(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.windows.append(0.0)

    def record(self, *args, **kwargs):
        trainer.windows[-1] += self.item()
        return backward(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", record)
    for callback in (seen, NextWindow):
        trainer.add_callback(callback)
    run(trainer)
    expected = [loss or None for loss in trainer.windows[:-1]]
    assert len(seen.values) == len(expected) == -(-5 // window) and seen.values[1] is expected[1] is None
    assert [x for x in seen.values if x] == pytest.approx([x for x in expected if x], abs=2e-5)


# ---- optimizers and classes that are passed in ----------------------------------------------------------------------


def passed_in(folder, model, how, changes=None, **settings):
    settings = {"weights": "bundled"} | settings
    if how == "class":
        arguments = {"optimizer_cls_and_kwargs": (hf_lopt.VeLO, settings)}
    else:
        arguments = {"optimizers": (hf_lopt.VeLO(model.parameters(), **settings), None)}
    return make(folder, model, arguments=arguments, **({"optim": "adamw_torch", "optim_args": None} | (changes or {})))


@pytest.mark.parametrize("how", ["instance", "class"])
def test_no_decay_on_top_of_an_own_schedule(tmp_path, how):
    trainer = passed_in(tmp_path, cases.tiny_llama(), how)
    _, said = run(trainer)
    assert rates(trainer) == [1.0] * STEPS and sum("scheduler is constant" in text for text in said) == 1
    trainer = passed_in(tmp_path, cases.tiny_llama(), how, {"lr_scheduler_type": "cosine"})
    _, said = run(trainer)
    assert rates(trainer)[-1] < 0.5 and sum("cosine scheduler comes on top" in text for text in said) == 1
    trainer = passed_in(tmp_path, cases.tiny_llama(), how, {"warmup_steps": 2})
    run(trainer)
    assert rates(trainer) == [0.0, 0.5, 1.0, 1.0]


def test_a_scheduler_that_is_passed_in_stays(tmp_path):
    model = cases.tiny_llama()
    optimizer = cases.velo(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    trainer = make(tmp_path, model, arguments={"optimizers": (optimizer, scheduler)})
    _, said = run(trainer)
    assert trainer.lr_scheduler is scheduler and rates(trainer)[-1] < 0.2
    assert len(optimizer.param_groups) == 1  # the scheduler counts them
    assert sum("CosineAnnealingLR comes on top" in text for text in said) == 1
    assert any("group 0 has axis_order=torch" in text for text in said)


@pytest.mark.parametrize("how", ["instance", "class"])
def test_an_lr_that_was_given_stays_and_one_that_was_not_is_set(tmp_path, how):
    optimizer, said = run(passed_in(tmp_path, pretrained(tmp_path), how))
    assert {group["lr"] for group in optimizer.param_groups} == {0.05}
    assert any("lr was not set (1): it is 0.05" in text for text in said)
    assert optimizer.length_multiplier == 2.0 and any("lr counts 2 times" in text for text in said)
    optimizer, said = run(passed_in(tmp_path, pretrained(tmp_path), how, lr=1.0))
    assert {group["lr"] for group in optimizer.param_groups} == {1.0}
    assert any("group 0 has lr=1" in text and "about 0.05" in text for text in said)
    assert optimizer.length_multiplier == 1.0
    optimizer, said = run(passed_in(tmp_path, cases.tiny_llama(), how, axis_order="jax", min_param_scale=0.2))
    assert {(g["axis_order"], g["min_param_scale"]) for g in optimizer.param_groups} == {("jax", 0.2)}


# ---- the arguments --------------------------------------------------------------------------------------------------


def test_arguments_come_out_as_they_went_in(tmp_path):
    args = cases.arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    before, as_dict = copy.deepcopy(args), args.to_dict()

    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    for callbacks in ([], [Stops()]):
        trainer = Trainer(cases.tiny_llama(), args, train_dataset=cases.byte_rows(8), callbacks=callbacks)
        if callbacks:
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        else:
            trainer.train()
        assert args == before and args.to_dict() == as_dict and vars(args).keys() == vars(before).keys()
    saved = torch.load(tmp_path / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert (saved.learning_rate, saved.lr_scheduler_type) == (5e-5, "linear")

    args.optim, args.optim_args = "adamw_torch", None
    for each in (args, dataclasses.replace(before, optim="adamw_torch", optim_args=None)):
        trainer = Trainer(cases.tiny_llama(), each, train_dataset=cases.byte_rows(8))
        trainer.train()
        assert rates(trainer) == pytest.approx([5e-5, 2.5e-5])
    celo2 = dataclasses.replace(before, optim="celo2")
    trainer = Trainer(cases.tiny_llama(), celo2, train_dataset=cases.byte_rows(8))
    trainer.train()
    assert rates(trainer)[0] == 1e-3


def test_what_was_chosen_is_kept(tmp_path):
    optimizer, _ = run(make(tmp_path, adapters(tmp_path)))
    assert optimizer.run_policy.summary() == {
        "lr": 1.0,
        "length_multiplier": optimizer.length_multiplier,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "num_training_steps": STEPS,
    }


# ---- the length -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["velo", "celo2", "small_fc_lopt"])
def test_runs_without_steps(tmp_path, name):
    trainer = make(tmp_path, cases.tiny_llama(), optim=name, max_steps=-1, num_train_epochs=0)
    _, said = run(trainer)
    assert trainer.state.global_step == 0 and not any("training ended" in text for text in said)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize(("stop", "told"), [(3, True), (9, False), (10, False)])
def test_a_run_that_ends_early_is_told_so(tmp_path, stop, told):
    trainer = make(tmp_path, cases.tiny_llama(), max_steps=10, arguments={"callbacks": [StopAt(stop)]})
    _, said = run(trainer)
    texts = [text for text in said if "training ended" in text]
    assert len(texts) == told and all("after 3 steps" in text and "for 10" in text for text in texts)


def test_a_stream_that_ends(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        left = iter(cases.byte_rows(8))

        def __iter__(self):
            yield from self.left

    args = cases.arguments(tmp_path, max_steps=1000, accelerator_config={"dispatch_batches": False})
    _, said = run(Trainer(cases.tiny_llama(), args, train_dataset=Stream()))
    assert sum("after 4 steps" in text and "for 1000" in text for text in said) == 1


def test_a_callback_that_shortens_the_run(tmp_path):
    class Shorter(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            state.max_steps = 3

    trainer = make(tmp_path, cases.tiny_llama(), max_steps=10, arguments={"callbacks": [Shorter()]})
    optimizer, said = run(trainer)
    assert optimizer.num_training_steps == 3 == optimizer.run_policy.horizon.value
    assert not any("num_training_steps" in text for text in said)

    text = "weights=bundled,num_training_steps=3"  # a length that is right, of a run that a callback ends
    trainer = make(tmp_path, cases.tiny_llama(), max_steps=10, optim_args=text, arguments={"callbacks": [StopAt(3)]})
    _, said = run(trainer)
    assert not any("num_training_steps" in text for text in said)


# ---- resuming -------------------------------------------------------------------------------------------------------


def same_parameters(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))


class Overflow(Trainer):
    """The first two steps are skipped."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("inf") if self.state.global_step < 2 else loss


@pytest.mark.parametrize(
    ("trainer", "changes"),
    [
        (Overflow, {"max_grad_norm": 0.0}),
        (Trainer, {"optim_args": "weights=bundled,max_training_steps=2"}),  # three calls are one update
        (LearningRateFirst, {"optim": "celo2"}),
        (LayeredByArguments, {}),
    ],
    ids=["skipped", "accumulated", "celo2_own_groups", "layered"],
)
def test_resuming_equals_going_on(tmp_path, trainer, changes):
    changes = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2} | changes
    whole = make(tmp_path, cases.tiny_llama(), trainer, **changes)
    optimizer, _ = run(whole)
    again = make(tmp_path / "again", cases.tiny_llama(), trainer, **changes)
    resumed, said = run(again, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not any("no optimizer state" in text for text in said)
    assert same_parameters(whole, again) and resumed.steps_done == optimizer.steps_done
    settings = ("lr", "axis_order", "branch")
    assert [[g.get(k) for k in settings] for g in resumed.param_groups] == [
        [g.get(k) for k in settings] for g in optimizer.param_groups
    ]


def test_resuming_without_state_sees_the_loss(tmp_path):
    changes = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "save_only_model": True}
    run(make(tmp_path, cases.tiny_llama(), **changes))
    trainer = make(tmp_path, cases.tiny_llama(), **changes)
    first = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            first.append(unwrap(optimizer).param_groups[0]["loss_means"].double())

    trainer.add_callback(Watch)
    optimizer, said = run(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert sum("state is of step 0" in text for text in said) == 1 and optimizer.steps_done == 8
    decays = torch.exp(-1 / torch.logspace(1, torch.tensor(8.0).log10().item(), 10, dtype=torch.float64))
    loss = [row["loss"] for row in trainer.state.log_history if "loss" in row][-4]
    corrected = first[0] / (1 - decays**5)
    torch.testing.assert_close(corrected, torch.full_like(corrected, loss), rtol=0, atol=1e-3)


def test_a_first_loss_of_zero_leaves_the_history_to_the_next():
    p = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = cases.velo([p])
    optimizer.steps_done = 10
    for loss in (0.0, float("nan"), 2.0):
        p.grad = torch.ones_like(p)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step(loss)
        found = optimizer.param_groups[0]["loss_means"]
        assert torch.equal(found, torch.zeros(10)) or loss == 2.0
    assert (found > 0.5).all()


# ---- the habit of a small lr ----------------------------------------------------------------------------------------


def plain_loop(steps=2, scheduler=None, **settings):
    p = torch.nn.Parameter(torch.ones(4, 3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = settings.pop("cls", hf_lopt.VeLO)([p], *settings.pop("positional", ()), **settings)
        if optimizer.rule.needs_horizon:
            optimizer.num_training_steps = 10
        schedule = scheduler(optimizer) if scheduler else None
        for _ in range(steps):
            p.grad = torch.ones_like(p)
            optimizer.step(1.0)
            if schedule is not None:
                schedule.step()
    return [str(w.message) for w in caught if "multiplies" in str(w.message)]


@pytest.mark.parametrize("lr", [5e-5, 1e-3, 0.01, 0.019])
def test_a_usual_learning_rate_is_told_once(lr):
    for settings in ({"lr": lr}, {"positional": (lr,)}, {"lr": lr, "cls": hf_lopt.SmallFC}):
        (text,) = plain_loop(weights="bundled", **settings)
        assert f"lr={lr:g} multiplies" in text and "lr=1.0" in text


def warmup(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: n / 100)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lr": 0.05},
        {"lr": 0.0},
        {"scheduler": warmup},
        {"lr": torch.tensor(1.0)},
        {"cls": hf_lopt.Celo2, "lr": 1e-3},
    ],
    ids=["default", "fine_tuning", "zero", "warmup", "tensor", "a_learning_rate"],
)
def test_other_lrs_are_silent(settings):
    assert plain_loop(weights="bundled", **settings) == []


def test_a_pretrained_model_in_a_plain_loop_takes_smaller_ones(tmp_path):
    model = pretrained(tmp_path)
    for lr, told in ((0.01, 0), (5e-5, 1)):
        optimizer = hf_lopt.VeLO(model.parameters(), lr=lr, num_training_steps=3, weights="bundled")
        with said() as texts:
            for row in cases.byte_rows(2):
                loss = model(**{key: value[None] for key, value in row.items()}).loss
                loss.backward()
                optimizer.step(loss)
                optimizer.zero_grad()
        assert sum("multiplies VeLO's own step, the default" in text for text in texts) == told


def test_a_run_that_goes_on_with_a_small_one_is_told_so():
    first, again = (cases.velo([torch.nn.Parameter(torch.ones(3))], lr=1e-3) for _ in range(2))
    for optimizer in (first, again):
        with said() as texts:
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            optimizer.step(1.0)
        assert sum("multiplies VeLO's own step, the default" in text for text in texts) == 1
        again.load_state_dict(first.state_dict())


@pytest.mark.parametrize(("model", "told"), [(scratch, 1), (pretrained, 0)])
def test_a_small_one_of_an_optimizer_that_is_passed_in_is_told_once(tmp_path, model, told):
    model = model(tmp_path)
    with said() as texts:
        optimizer = cases.velo(model.parameters(), lr=0.01, num_training_steps=None)
        make(tmp_path, model, arguments={"optimizers": (optimizer, None)}).train()
    assert sum("multiplies" in text for text in texts) == told


def test_a_small_learning_rate_of_the_arguments_is_told_once(tmp_path):
    args = {"learning_rate": 0.01}
    _, said = run(make(tmp_path, cases.tiny_llama(), **args))
    assert sum("multiplies" in text for text in said) == 1
    _, said = run(make(tmp_path, pretrained(tmp_path), **args))
    assert not any("multiplies" in text for text in said)


def test_told_once_per_trainer(tmp_path):
    trainer = make(tmp_path, cases.tiny_llama())
    assert sum("learning_rate was not set" in text for text in run(trainer)[1]) == 1
    assert not any("learning_rate was not set" in text for text in run(trainer)[1])
    assert isinstance(trainer.args, TrainingArguments)
