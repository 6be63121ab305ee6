"""What trained a model is named in its card, in trainer_state.json and, where they take a text, in trackers."""

from __future__ import annotations

import json

import pytest
from transformers import Trainer, TrainerCallback

import hf_cases as cases
import hf_lopt
from hf_lopt import rules
from hf_lopt.hf.arguments import read_optim_args
from hf_lopt.hf.callback import LearnedOptimizerCallback
from hf_lopt.hf.provenance import trackers_take_text


class Tracker(TrainerCallback):
    """Sees the rows that trackers see."""

    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append(dict(logs))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A Trainer after one step with a multiplier of its own, its folder and what its trackers saw."""
    folder = tmp_path_factory.mktemp("provenance")
    args = cases.arguments(
        folder, max_steps=1, logging_steps=1, save_strategy="steps", save_steps=1, learning_rate=0.5
    )
    tracker = Tracker()
    trainer = Trainer(cases.tiny_llama(), args, train_dataset=cases.byte_rows(4), callbacks=[tracker])
    trainer.train()
    trainer.create_model_card()
    return trainer, folder, tracker


def test_card_and_state_name_optimizer_version_weights_and_multiplier(trained):
    trainer, folder, _ = trained
    weights = trainer.optimizer.optimizer.weights
    name = f"{weights.source}@{weights.sha256[:12]}"
    card = (folder / "README.md").read_text()
    words = f"VeLO of hf_lopt {hf_lopt.__version__} with bundled weights {name} and lr_multiplier=0.5"
    assert f"- optimizer: {words}" in card
    state = json.loads((folder / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["LearnedOptimizerCallback"]["attributes"]["trained_with"] == {
        "optimizer": "VeLO",
        "hf_lopt": hf_lopt.__version__,
        "weights": name,
        "weights_origin": "bundled",
        "lr_multiplier": 0.5,
    }


@pytest.mark.parametrize(("steps", "multiplier"), [(1, 5.0), (100, (1000 / 100) ** 0.5), (1000, None)])
def test_what_the_length_of_the_run_multiplies_is_said_beside_the_lr(tmp_path, steps, multiplier):
    """Also where another callback changes the length when training begins; ``steps`` are not taken."""

    class Shorter(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            state.max_steps = steps

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    args = cases.arguments(tmp_path, max_steps=2000)
    trainer = Trainer(cases.tiny_llama(), args, train_dataset=cases.byte_rows(4), callbacks=[Shorter])
    trainer.train()
    trainer.create_model_card()
    more = "" if multiplier is None else f", length_multiplier={multiplier:.4g}"
    assert f" and lr_multiplier=1{more}\n" in (tmp_path / "README.md").read_text()
    found = next(x for x in trainer.callback_handler.callbacks if isinstance(x, LearnedOptimizerCallback))
    trained_with = found.state()["attributes"]["trained_with"]
    assert trained_with["lr_multiplier"] == 1.0
    assert trained_with.get("length_multiplier") == (None if multiplier is None else pytest.approx(multiplier))


def test_the_text_goes_to_those_that_keep_it_and_always_into_the_history(trained):
    trainer, _, tracker = trained
    assert "lopt/weights" in trainer.state.log_history[0] and "lopt/weights" in tracker.rows[0]
    for report_to, takes in (([], True), (["none"], True), (["tensorboard", "wandb"], True), (["mlflow"], False)):
        assert trackers_take_text(report_to) == takes
    assert not any(trackers_take_text(["wandb", name]) for name in ("clearml", "dvclive", "comet_ml", "neptune"))


def test_a_tracker_that_takes_numbers_gets_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_lopt.hf.callback.trackers_take_text", lambda report_to: False)
    args = cases.arguments(tmp_path, max_steps=1, logging_steps=1, save_strategy="no")
    tracker = Tracker()
    trainer = Trainer(cases.tiny_llama(), args, train_dataset=cases.byte_rows(4), callbacks=[tracker])
    trainer.train()
    assert all(isinstance(value, (int, float)) for row in tracker.rows for value in row.values())
    assert "lopt/weights" in trainer.state.log_history[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weights=bundled lr=0.5", "comma is missing in 'weights=bundled lr=0.5'"),
        ("lr:0.5", "key=value,key=value; got 'lr:0.5'"),
        ("lr=0.5,,weights=bundled", "key=value,key=value; got ''"),
        ("weights=/runs/velo lr=0.5", "comma is missing in 'weights=/runs/velo lr=0.5'"),
        ("lr==0.5", "comma is missing"),
        ("bundled", "key=value,key=value; got 'bundled'"),
    ],
)
def test_what_cannot_be_read_of_optim_args_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        Trainer.get_optimizer_cls_and_kwargs(cases.arguments(tmp_path, optim_args=text), None)


def test_a_path_may_hold_equals_signs():
    text = "lr=0.5, weights=/my runs/lr=3,steps=5/velo"
    with pytest.raises(ValueError, match="velo takes no steps"):  # but no comma, which ends an item
        read_optim_args(rules.get("velo"), text)
    keywords, _ = read_optim_args(rules.get("velo"), text.replace(",steps", "-steps"))
    assert keywords == {"lr": 0.5, "weights": "/my runs/lr=3-steps=5/velo"}
