"""Layers that a checkpoint lacks take the steps of training from scratch beside pretrained ones that do not."""

import copy
import dataclasses
import logging
import math

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import hf_cases as cases
import hf_lopt
from hf_lopt import pretrained, rules
from hf_lopt.hf.loss_feed import unwrap
from hf_lopt.hf.replace import Options, Replacer
from said import said


pytestmark = pytest.mark.skipif(
    cases.older("transformers", "5.0"), reason="transformers 4 does not mark what it has loaded"
)
STEPS = 5
HEAD = "score.weight"
# VeLO's lr counts 2 times in a short run of fine-tuning, and 5 times for what is trained from scratch.
OF_SHORT, NEW_IN_SHORT = 2.0, 5.0
SHORT = 20.0 * NEW_IN_SHORT / OF_SHORT


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    cases.tiny_llama().save_pretrained(folder)
    return folder


def classifier(folder, seed=0):
    torch.manual_seed(seed)
    return LlamaForSequenceClassification.from_pretrained(folder, num_labels=3)


def rows(n=STEPS * 2, seed=0):
    found = cases.byte_rows(n, seed=seed)
    return [{"input_ids": row["input_ids"], "labels": i % 3} for i, row in enumerate(found)]


def trainer(folder, model, cls=Trainer, **changes):
    settings = {"max_steps": STEPS, "max_grad_norm": 0.0} | changes
    return cls(model, cases.arguments(folder, **settings), train_dataset=rows())


def steps_of(model, optimizer, steps=2):
    for i in range(0, 2 * steps, 2):
        batch = rows()[i : i + 2]
        ids, labels = torch.stack([x["input_ids"] for x in batch]), torch.tensor([x["labels"] for x in batch])
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss)


def scales(model, optimizer):
    """Name -> number of every parameter that has one other than 1."""
    names = {id(p): name for name, p in model.named_parameters()}
    pairs = [
        pair for group in optimizer.param_groups for pair in zip(group["params"], group["lr_scales"], strict=True)
    ]
    return {names[id(p)]: x for p, x in pairs if x != 1}


# ---- which tensors are new -----------------------------------------------------------------------------------------


def names_of(model):
    return {found.name for found in pretrained.new_tensors(model).values()}


def test_the_head_of_a_base_model_is_new(saved):
    assert names_of(classifier(saved)) == {HEAD}


def test_a_whole_checkpoint_has_nothing_new(saved, tmp_path):
    assert names_of(LlamaForCausalLM.from_pretrained(saved)) == set()
    classifier(saved).save_pretrained(tmp_path)
    assert names_of(LlamaForSequenceClassification.from_pretrained(tmp_path)) == set()


def test_a_model_from_scratch_has_nothing_new():
    assert names_of(cases.tiny_llama()) == set()


def test_a_head_of_another_size_is_new(tmp_path):
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    model = ViTForImageClassification.from_pretrained(tmp_path, num_labels=3)
    assert names_of(model) == {"classifier.weight", "classifier.bias"}
    model.save_pretrained(tmp_path / "three")
    options = {"num_labels": 5, "ignore_mismatched_sizes": True}
    again = ViTForImageClassification.from_pretrained(tmp_path / "three", **options)
    assert names_of(again) == {"classifier.weight", "classifier.bias"}


def test_a_pooler_goes_with_a_new_head_only(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=16, **sizes)).save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    pooler = {f"bert.pooler.dense.{name}" for name in ("weight", "bias")}
    assert names_of(model) == pooler | {"classifier.weight", "classifier.bias"}
    group = {"params": list(model.parameters())}
    pretrained.set_scales([group], pretrained.new_tensors(model), 20.0)
    shares = dict(zip((name for name, _ in model.named_parameters()), group["lr_scales"], strict=True))
    assert {name for name, x in shares.items() if x == 20.0} == {"classifier.weight", "classifier.bias"}
    assert {name for name, x in shares.items() if x == 20.0**0.5} == pooler
    assert sum(x == 1.0 for x in shares.values()) == len(shares) - 4
    lacking = BertModel(BertConfig(vocab_size=16, **sizes), add_pooling_layer=False)
    lacking.save_pretrained(tmp_path / "lacking")
    found = pretrained.new_tensors(BertForSequenceClassification.from_pretrained(tmp_path / "lacking"))
    assert {x.name for x in found.values() if x.share == 1.0} == pooler | {"classifier.weight", "classifier.bias"}
    model.save_pretrained(tmp_path / "whole")
    assert names_of(BertForSequenceClassification.from_pretrained(tmp_path / "whole")) == set()
    assert names_of(BertModel.from_pretrained(tmp_path / "base")) == set()


def test_resized_embeddings_are_not_new(saved):
    model = LlamaForCausalLM.from_pretrained(saved)
    model.resize_token_embeddings(300)
    assert names_of(model) == set()
    # As a library does that puts a table of its own in their place.
    model.set_input_embeddings(torch.nn.Embedding(310, 16))
    assert names_of(model) == set()


def test_a_layer_that_the_user_puts_in_is_new(saved):
    model = classifier(saved)
    model.score = torch.nn.Linear(16, 3)
    assert names_of(model) == {"score.weight", "score.bias"}


def test_layers_that_were_exchanged_throughout_are_not_new(saved):
    model = classifier(saved)
    for layer in [x for x in model.modules() if isinstance(x, torch.nn.Linear)]:
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    model.model.embed_tokens.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    assert names_of(model) == set()


def test_frozen_models_are_looked_at_too(saved):
    model = classifier(saved).requires_grad_(False)
    assert names_of(model) == set()
    model.score.requires_grad_(True)
    assert names_of(model) == {HEAD}


# ---- the steps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["velo", "celo", "small_fc_lopt", "celo2", "celo_adam"])
def test_the_same_as_groups_of_their_own(rule, saved):
    """``lr_scales`` against the same lr written into two groups."""
    found = {}
    for kind in ("groups", "numbers"):
        model = classifier(saved)
        body, head = [p for n, p in model.named_parameters() if n != HEAD], [model.score.weight]
        if kind == "groups":
            groups = [{"params": body, "lr": 0.05}, {"params": head, "lr": 0.75}]
        else:
            groups = [{"params": body + head, "lr": 0.05, "lr_scales": [1.0] * len(body) + [15.0]}]
        own = {"num_training_steps": STEPS} if rule in ("velo", "celo", "celo_adam") else {}
        optimizer = hf_lopt.LearnedOptimizer(groups, rule, weights="bundled", **own)
        steps_of(model, optimizer, STEPS)
        found[kind] = dict(model.named_parameters())
    start = dict(classifier(saved).named_parameters())
    for name, p in found["groups"].items():
        assert torch.allclose(found["numbers"][name], p, rtol=1e-6, atol=1e-8), name
    assert not torch.equal(found["numbers"][HEAD], start[HEAD])


@pytest.mark.parametrize(
    ("rule", "lr", "scale"), [("velo", 0.05, SHORT), ("celo2", 1e-4, 10.0), ("mulo", 0.03, 10 / 3)]
)
def test_trainer_gives_the_head_the_rate_from_scratch(rule, lr, scale, saved, tmp_path):
    model = classifier(saved)
    run = trainer(tmp_path, model, optim=rule)
    run.train()
    optimizer = unwrap(run.optimizer)
    assert {group["initial_lr"] for group in optimizer.param_groups} == {lr}
    assert scales(model, optimizer) == {HEAD: pytest.approx(scale)}


def test_the_run_is_that_of_two_groups(saved, tmp_path):
    """Trainer's own run against one whose optimizer was made by hand."""
    by_trainer, by_hand = classifier(saved), classifier(saved)
    trainer(tmp_path, by_trainer).train()
    body = [p for n, p in by_hand.named_parameters() if n != HEAD]
    groups = [{"params": body, "lr": 0.05}, {"params": [by_hand.score.weight], "lr": 0.05 * SHORT}]
    optimizer = hf_lopt.VeLO(groups, weights="bundled", num_training_steps=STEPS)
    args = cases.arguments(tmp_path, max_steps=STEPS, max_grad_norm=0.0, lr_scheduler_type="constant")
    Trainer(by_hand, args, train_dataset=rows(), optimizers=(optimizer, None)).train()
    for (name, a), b in zip(by_trainer.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8), name


def test_it_is_told(saved, tmp_path, caplog):
    caplog.set_level(logging.INFO, "hf_lopt")
    run = trainer(tmp_path, classifier(saved))
    with said() as texts:
        run.train()
    assert any("lr=0.05, new layers 2.5, length_multiplier=2, constant" in text for text in texts)
    assert (
        "new layers and their poolers, 1 tensor (score.weight), take up to 2.5, because they start from random"
        in caplog.text
    )
    assert unwrap(run.optimizer).run_policy.summary()["new_layers"] == SHORT
    assert "new_layers=50" in hf_lopt.hf.provenance.line(unwrap(run.optimizer))


# ---- where it is not for us to decide ------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"learning_rate": 0.05}, {"optim_args": "weights=bundled,lr=0.05"}])
def test_an_lr_that_was_chosen_is_for_all(changes, saved, tmp_path):
    run = trainer(tmp_path, classifier(saved), **changes)
    run.train()
    assert all("lr_scales" not in group for group in unwrap(run.optimizer).param_groups)


def test_from_scratch_and_adapters_have_one_rate(saved, tmp_path):
    peft = pytest.importorskip("peft", reason="needs: pip install 'hf_lopt[test]'")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="SEQ_CLS")
    random = LlamaForSequenceClassification(classifier(saved).config)
    random.config._name_or_path = ""
    for model in (random, peft.get_peft_model(classifier(saved), config)):
        run = trainer(tmp_path, model)
        run.train()
        assert all("lr_scales" not in group for group in unwrap(run.optimizer).param_groups)


class HeadFaster(Trainer):
    """Gives the head a rate of its own, as one does with AdamW."""

    def create_optimizer(self, model=None):
        cls, keywords = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        keywords.pop("params", None)
        lr = keywords.pop("lr")
        body = [p for n, p in self.model.named_parameters() if n != HEAD]
        groups = [{"params": body, "lr": lr}, {"params": [self.model.score.weight], "lr": 3 * lr}]
        self.optimizer = cls(groups, lr=lr, **keywords)
        return self.optimizer


def test_groups_in_a_ratio_stay(saved, tmp_path):
    run = trainer(tmp_path, classifier(saved), HeadFaster)
    run.train()
    groups = unwrap(run.optimizer).param_groups
    assert {round(group["lr"], 6) for group in groups} == {0.05, 0.15}
    assert all("lr_scales" not in group for group in groups)


# ---- other doors ---------------------------------------------------------------------------------------------------


def test_an_optimizer_that_is_passed_in(saved, tmp_path):
    model = classifier(saved)
    optimizer = hf_lopt.VeLO(model.parameters(), weights="bundled")
    args = cases.arguments(tmp_path, max_steps=STEPS, optim="adamw_torch", optim_args=None)
    Trainer(model, args, train_dataset=rows(), optimizers=(optimizer, None)).train()
    assert scales(model, optimizer) == {HEAD: SHORT}


def test_model_init(saved, tmp_path):
    args = cases.arguments(tmp_path, max_steps=STEPS)
    run = Trainer(args=args, model_init=lambda: classifier(saved), train_dataset=rows())
    run.train()
    assert scales(run.model, unwrap(run.optimizer)) == {HEAD: SHORT}


def test_new_tensors_are_found_after_fsdp_has_replaced_them(saved):
    model = classifier(saved)
    pretrained.note(model)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(p.detach().clone()))
    assert names_of(model) == {HEAD}


@pytest.mark.parametrize(("lr", "expected"), [(None, {HEAD: 20.0}), (0.05, None)])
def test_replace(lr, expected, saved, capsys):
    model, options = classifier(saved), Options(optim_args="weights=bundled", steps=STEPS, lr=lr)
    options.add("AdamW=velo")
    with Replacer(options):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if expected is None:
        assert all("lr_scales" not in group for group in optimizer.param_groups)
    else:
        assert scales(model, optimizer) == expected
        assert "new layers and their poolers, 1 tensor (score.weight)" in capsys.readouterr().err


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["base", "checkpoint"])
def test_a_resumed_run_ends_where_the_whole_one_does(source, saved, tmp_path):
    """Whether the script loads the base model again, or the checkpoint, which has the head."""
    whole = classifier(saved)
    trainer(tmp_path / "whole", whole, save_steps=2, save_strategy="steps").train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    model = classifier(saved if source == "base" else checkpoint, seed=7)
    run = trainer(tmp_path / "again", model)
    run.train(resume_from_checkpoint=str(checkpoint))
    assert scales(model, unwrap(run.optimizer)) == {HEAD: SHORT}
    assert unwrap(run.optimizer).run_policy.summary()["new_layers"] == SHORT
    for (name, a), b in zip(whole.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8), name


def test_a_checkpoint_from_before_goes_on_as_it_was(saved):
    """Without numbers for single parameters, all had the same lr."""
    model = classifier(saved)
    old = hf_lopt.VeLO(model.parameters(), lr=0.05, num_training_steps=9, weights="bundled")
    state = copy.deepcopy(old.state_dict())
    params = list(model.parameters())
    new = hf_lopt.VeLO(
        [{"params": params, "lr_scales": [2.0] * len(params)}], lr=0.05, num_training_steps=9, weights="bundled"
    )
    new.load_state_dict(state)
    assert "lr_scales" not in new.param_groups[0]


# ---- bad input -----------------------------------------------------------------------------------------------------

BAD = [[1.0], [1.0, -1.0], [1.0, float("nan")], [1.0, "2"], [True, 1.0], 3.0, "ab"]


def two():
    return [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(3))]


@pytest.mark.parametrize("numbers", BAD, ids=str)
def test_numbers_that_are_none(numbers):
    text = "lr_scales"
    with pytest.raises(ValueError, match=text):
        hf_lopt.VeLO([{"params": two(), "lr_scales": numbers}], num_training_steps=5, weights="bundled")
    optimizer = hf_lopt.VeLO(two(), num_training_steps=5, weights="bundled")
    with pytest.raises(ValueError, match=text):
        optimizer.add_param_group({"params": two(), "lr_scales": numbers})
    assert len(optimizer.param_groups) == 1
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr_scales"] = numbers
    with pytest.raises(ValueError, match=text):
        optimizer.load_state_dict(state)
    assert "lr_scales" not in optimizer.param_groups[0]


def test_a_tensor_too_many_is_an_error_that_says_what_to_do():
    params = two()
    optimizer = hf_lopt.VeLO(
        [{"params": params[:1], "lr_scales": [2.0]}], lr=0.5, num_training_steps=5, weights="bundled"
    )
    optimizer.param_groups[0]["params"].append(params[1])
    before = [p.detach().clone() for p in params]

    def step():
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step(1.0)

    with pytest.raises(RuntimeError, match=r"1 lr_scales for a group of 2 parameters.*delete group\['lr_scales'\]"):
        step()
    assert all(torch.equal(p, x) for p, x in zip(params, before, strict=True))
    del optimizer.param_groups[0]["lr_scales"]
    step()
    assert not any(torch.equal(p, x) for p, x in zip(params, before, strict=True))


def test_other_numbers_count_from_the_next_step_on():
    """As after one step with 1 and one with 0: the tensor stays where the first one has brought it."""
    p = torch.nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3))
    optimizer = hf_lopt.Celo2([{"params": [p], "lr_scales": [1.0]}], weights="bundled")
    for scale in (1.0, 0.0):
        before = p.detach().clone()
        optimizer.param_groups[0]["lr_scales"] = [scale]
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert torch.equal(p, before) == (scale == 0.0)


# ---- loops of one's own ---------------------------------------------------------------------------------------------


def numbers(optimizer):
    return [group.get("lr_scales") for group in optimizer.param_groups]


@pytest.mark.parametrize(
    ("rule", "of_loaded", "of_new"),
    [("velo", 0.05, 1.0), ("small_fc_lopt", 0.03, 0.1), ("celo2", 0.1, 1.0), ("elo_celo2", 1e-4 / 3.16e-4, 1.0)],
)
def test_a_pretrained_model_in_a_loop_is_fine_tuned(rule, of_loaded, of_new, saved):
    """At 1, and 5 times that in a short run, it would be wrecked without a word."""
    by_default, by_hand = classifier(saved), classifier(saved)
    own = {"num_training_steps": 100} if rule == "velo" else {}
    with said() as texts:
        ours = hf_lopt.LearnedOptimizer(by_default.parameters(), rule, weights="bundled", **own)
        steps_of(by_default, ours)
    assert any(f"a pretrained model: lr counts {of_loaded:g} times" in text for text in texts)
    assert ours.length_multiplier == pytest.approx(1.5**0.9 if rule == "velo" else 1.0)  # 100 steps
    lr = hf_lopt.LearnedOptimizer([torch.nn.Parameter(torch.ones(1))], rule, weights="bundled").defaults["lr"]
    lr *= ours.length_multiplier
    of_new *= 3**0.9 / ours.length_multiplier if rule == "velo" else 1.0
    body = [p for n, p in by_hand.named_parameters() if n != HEAD]
    groups = [{"params": body, "lr": of_loaded * lr}, {"params": [by_hand.score.weight], "lr": of_new * lr}]
    more = {"adam_lr_mult": 1.0} if "celo2" in rule else {}
    theirs = hf_lopt.LearnedOptimizer(groups, rule, weights="bundled", **own, **more)
    steps_of(by_hand, theirs)
    for (name, a), b in zip(by_default.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-8), name


@pytest.mark.parametrize("how", ["constructor", "group", "position", "written", "arrays", "numbers"])
def test_what_was_chosen_in_a_loop_stays(how, saved):
    model = classifier(saved)
    params, own = list(model.parameters()), {"num_training_steps": 100, "weights": "bundled"}
    if how == "constructor":
        optimizer = hf_lopt.VeLO(params, lr=1.0, **own)
    elif how == "group":
        optimizer = hf_lopt.VeLO([{"params": params[:3], "lr": 1.0}, {"params": params[3:]}], **own)
    elif how == "position":
        optimizer = hf_lopt.VeLO(params, 1.0, **own)
    elif how == "arrays":
        optimizer = hf_lopt.VeLO(params, **own | {"weights": dict(hf_lopt.VeLO(params, **own).weights.theta)})
    elif how == "numbers":
        optimizer = hf_lopt.VeLO([{"params": params, "lr_scales": [1.0] * len(params)}], **own)
    else:
        optimizer = hf_lopt.VeLO(params, **own)
        for group in optimizer.param_groups:
            group["lr"] = 0.5
    steps_of(model, optimizer)
    assert all(x is None or set(x) == {1.0} for x in numbers(optimizer))
    assert optimizer.length_multiplier == 1.0


def test_a_scheduler_chooses_nothing(saved):
    model = classifier(saved)
    optimizer = hf_lopt.VeLO(model.parameters(), num_training_steps=9, weights="bundled")
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    steps_of(model, optimizer)
    assert set(numbers(optimizer)[0]) == {0.05, 2.5}


def test_only_the_head_is_trained(saved):
    model = classifier(saved)
    optimizer = hf_lopt.VeLO([model.score.weight], num_training_steps=9, weights="bundled")
    assert numbers(optimizer) == [None]


def test_a_group_that_is_added_later(saved):
    model = classifier(saved)
    params = list(model.parameters())
    optimizer = hf_lopt.VeLO(params[:4], num_training_steps=9, weights="bundled")
    optimizer.add_param_group({"params": params[4:]})
    assert numbers(optimizer) == [(0.05,) * 4, (*(0.05,) * (len(params) - 5), 1.0)]
    assert "lr_scales 0.05, 1" in repr(optimizer)


def test_a_group_that_is_added_after_the_first_step(saved):
    model = classifier(saved)
    params = list(model.parameters())
    optimizer = hf_lopt.VeLO(params[:4], num_training_steps=9, weights="bundled")
    steps_of(model, optimizer)
    optimizer.add_param_group({"params": params[4:]})
    assert numbers(optimizer) == [(0.05,) * 4, (*(0.05,) * (len(params) - 5), 2.5)]


# ---- the length of the run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [9, 60, 100, 150, 200, 299, 300, 1000])
def test_new_layers_follow_the_length_as_a_model_from_scratch_does(steps, saved, caplog):
    caplog.set_level(logging.INFO, "hf_lopt")
    model = classifier(saved)
    optimizer = hf_lopt.VeLO(model.parameters(), num_training_steps=steps, weights="bundled")
    steps_of(model, optimizer, 1)
    of_new, of_loaded = min(max(300 / steps, 1.0) ** 0.9, 5.0), min(max(150 / steps, 1.0) ** 0.9, 2.0)
    assert optimizer.length_multiplier == pytest.approx(of_loaded)
    *body, head = numbers(optimizer)[0]
    assert set(body) == {0.05} and head * optimizer.length_multiplier == pytest.approx(of_new)
    assert (f"lr counts {of_loaded:.3g} times, {of_new:.3g} times for new layers" in caplog.text) == (steps < 300)


def test_published_weights_have_lengths_of_their_own(saved):
    """Any that are not embedded: (200 / N)^0.9 from scratch, (100 / N)^0.9 in fine-tuning."""
    model = classifier(saved)
    weights = dataclasses.replace(rules.get("celo").load_weights("bundled"), source="a file", origin="published")
    optimizer = hf_lopt.Celo(model.parameters(), num_training_steps=80, weights=weights)
    steps_of(model, optimizer, 1)
    assert numbers(optimizer)[0][-1] == pytest.approx(2**0.9)


def test_they_follow_a_length_that_changes(saved):
    model = classifier(saved)
    optimizer = hf_lopt.VeLO(model.parameters(), num_training_steps=100, weights="bundled")
    found = {}
    for steps in (100, 1000, 50, 100):
        optimizer.num_training_steps = steps
        steps_of(model, optimizer, 1)
        *body, head = numbers(optimizer)[0]
        assert set(body) == {0.05}
        found.setdefault(steps, []).append(head)
    assert found[1000] == [pytest.approx(1.0)] and found[50] == [pytest.approx(2.5)]
    assert found[100] == [pytest.approx(2**0.9)] * 2


def test_a_checkpoint_whose_new_layers_did_not_follow_it(saved):
    """Of an earlier version: it goes on as it was, unless the length changes."""
    model = classifier(saved)
    optimizer = hf_lopt.VeLO(model.parameters(), num_training_steps=100, weights="bundled")
    steps_of(model, optimizer, 1)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr_scales"] = (*numbers(optimizer)[0][:-1], 1.0)
    optimizer.load_state_dict(state)
    steps_of(model, optimizer, 1)
    assert numbers(optimizer)[0][-1] == 1.0
    optimizer.num_training_steps = 50
    assert numbers(optimizer)[0][-1] == pytest.approx(2.5)


def test_numbers_that_somebody_writes_stay(saved):
    model = classifier(saved)
    optimizer = hf_lopt.VeLO(model.parameters(), num_training_steps=9, weights="bundled")
    *body, head = numbers(optimizer)[0]
    own = [0.02, *body[1:], 0.7]
    optimizer.param_groups[0]["lr_scales"] = own
    steps_of(model, optimizer)
    assert numbers(optimizer)[0] == own


def test_poolers_stay_half_way():
    """In the geometric sense, between what was loaded and what is new."""
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    group = {"params": params, "lr": 0.05, "initial_lr": 0.1}
    new = {id(params[0]): pretrained.New("head", 1.0), id(params[1]): pretrained.New("pooler", 0.5)}
    pretrained.set_scales([group], new, 10.0)
    assert pretrained.stretch([group], 0.1, (1.0, 1.0), 4.0)
    assert group["lr_scales"] == pytest.approx((40.0, 40.0**0.5, 1.0))
    assert not pretrained.stretch([group], 0.1, (1.0, 4.0), 4.0)


# ---- epochs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def far(tmp_path_factory):
    """A folder with a model whose matrices reach five times as far as counts as far, and its reach."""
    folder, model = tmp_path_factory.mktemp("far") / "model", cases.far_reaching_llama()
    model.save_pretrained(folder)
    return folder, cases.reach_by_hand(model)


def of_epochs(steps, epochs, reach, new):
    """What lr counts, by the constants in the documentation."""
    often, least = min(4 / epochs, 1.0), (20 / reach) ** 1.5
    short = max((300 if new else 150) / steps, 1.0) ** 0.9
    return min(max(short * max(often**2 if new else often, least), 0.1), 5.0 if new else 2.0)


def head_and_body(optimizer):
    """What lr counts for new layers, and the common number of the others."""
    *body, head = numbers(optimizer)[0]
    assert len(set(body)) == 1
    return head * optimizer.length_multiplier, body[0]


@pytest.mark.parametrize("steps", [50, 200, 300, 1000])
@pytest.mark.parametrize("epochs", [1, 4, 5, 7.5, 16, 1000])
def test_new_layers_fall_faster_in_many_epochs(steps, epochs, far, caplog):
    caplog.set_level(logging.INFO, "hf_lopt")
    folder, reach = far
    model = classifier(folder)
    optimizer = hf_lopt.VeLO(model.parameters(), num_training_steps=steps, weights="bundled")
    optimizer.num_epochs = epochs
    steps_of(model, optimizer, 1)
    loaded, new = (of_epochs(steps, epochs, reach, of_new) for of_new in (False, True))
    assert optimizer.length_multiplier == pytest.approx(loaded, rel=1e-5)
    assert head_and_body(optimizer) == (pytest.approx(new, rel=1e-5), 0.05)
    assert (f"lr counts {loaded:.3g} times, {new:.3g} times for new layers" in caplog.text) == (new != loaded)


@pytest.mark.parametrize("kept", [True, False])
def test_a_resumed_run_of_other_length_and_epochs(kept, far, tmp_path):
    """Its new layers have the lr of one that was so from the start. Earlier versions kept no number of theirs: there
    it is found where the epochs are still the same."""
    folder, reach = far
    model = classifier(folder)
    optimizer = hf_lopt.VeLO(model.parameters(), num_training_steps=200, weights="bundled")
    optimizer.num_epochs = 6
    steps_of(model, optimizer)
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    again = LlamaForSequenceClassification.from_pretrained(tmp_path)  # nothing of it is new
    resumed = hf_lopt.VeLO(again.parameters(), num_training_steps=200, weights="bundled")
    if not kept:
        del state["param_groups"][0]["more_for_new_layers"]
        del state["param_groups"][0]["num_epochs"]
        resumed.num_epochs = 6
    resumed.load_state_dict(state)
    resumed.num_training_steps = 400
    epochs = 12 if kept else 6
    steps_of(again, resumed)
    # The reach is that of the matrices as they are now, a few steps on.
    loaded, new = (of_epochs(400, epochs, reach, of_new) for of_new in (False, True))
    assert resumed.length_multiplier == pytest.approx(loaded, rel=1e-2)
    assert head_and_body(resumed) == (pytest.approx(new, rel=1e-2), 0.05)


@pytest.mark.parametrize("first", [4, -1])
def test_a_group_that_is_added_in_many_epochs(first, far):
    """A head alone, too, which nothing marks as a part of a pretrained model."""
    folder, _ = far
    model = classifier(folder)
    params = list(model.parameters())
    reach = hf_lopt.reach.reach_of([(p, {}) for p in params[:first]])
    assert reach > 100 if first < 0 else reach > 20
    optimizer = hf_lopt.VeLO(params[:first], num_training_steps=300, weights="bundled")
    optimizer.num_epochs = 8
    steps_of(model, optimizer, 1)
    optimizer.add_param_group({"params": params[first:]})
    *body, head = numbers(optimizer)[1]
    assert set(body) <= {0.05}
    assert head * optimizer.length_multiplier == pytest.approx(of_epochs(300, 8, reach, new=True), rel=1e-5)


def test_a_group_of_something_else_that_is_added(saved):
    model, other = classifier(saved), torch.nn.Linear(3, 3)
    optimizer = hf_lopt.VeLO(model.parameters(), num_training_steps=9, weights="bundled")
    optimizer.add_param_group({"params": other.parameters()})
    assert optimizer.param_groups[1].get("lr_scales") is None


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "2"])
def test_a_checkpoint_whose_number_of_new_layers_is_none(value, saved):
    model = classifier(saved)
    optimizer = hf_lopt.VeLO(model.parameters(), num_training_steps=9, weights="bundled")
    steps_of(model, optimizer, 1)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["more_for_new_layers"] = value
    with pytest.raises(ValueError, match="more_for_new_layers must be a finite number >= 0"):
        optimizer.load_state_dict(state)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_loop_that_is_resumed(saved, tmp_path):
    whole = classifier(saved)
    optimizer = hf_lopt.VeLO(whole.parameters(), num_training_steps=9, weights="bundled")
    steps_of(whole, optimizer)
    whole.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    again = LlamaForSequenceClassification.from_pretrained(tmp_path)  # nothing of it is new
    other = hf_lopt.VeLO(again.parameters(), num_training_steps=9, weights="bundled")
    other.load_state_dict(state)
    assert numbers(other) == numbers(optimizer) and set(numbers(other)[0]) == {0.05, 2.5}
    for model, mine in ((whole, optimizer), (again, other)):
        steps_of(model, mine)
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_trainer_keeps_its_own_lr_and_a_scheduler_that_is_passed_in_stays(saved, tmp_path):
    model = classifier(saved)
    optimizer = hf_lopt.VeLO(model.parameters(), weights="bundled")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    args = cases.arguments(tmp_path, max_steps=STEPS, optim="adamw_torch", optim_args=None)
    with said() as texts:
        Trainer(model, args, train_dataset=rows(), optimizers=(optimizer, scheduler)).train()
    assert optimizer.param_groups[0]["lr"] == 1.0 and set(numbers(optimizer)[0]) == {0.05, 2.5}
    assert not any("should be about" in text for text in texts)
