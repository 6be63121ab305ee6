"""What transformers' Trainer offers, with a learned optimizer: searches, stops, memory savers, precisions, cards."""

import math

import pytest
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import client_cases as clients
import hf_cases as cases
from client_cases import STEPS


def make_trainer(folder, model=None, callbacks=None, **changes):
    args = TrainingArguments(str(folder), **(clients.SETTINGS | changes))
    rows = clients.rising_rows()
    held_out = clients.rising_rows(8)
    model = cases.tiny_llama() if model is None else model
    return Trainer(model, args, train_dataset=rows, eval_dataset=held_out, callbacks=callbacks)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"gradient_checkpointing": True}, id="gradient_checkpointing"),
        pytest.param({"bf16": True}, id="bf16"),
        pytest.param({"neftune_noise_alpha": 0.1}, id="neftune"),
        pytest.param({"gradient_accumulation_steps": 2}, id="accumulation"),
        pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, id="torch_compile"),
        pytest.param({"label_smoothing_factor": 0.1}, id="label_smoothing"),
        pytest.param({"train_sampling_strategy": "group_by_length"}, id="group_by_length"),
        pytest.param({"dataloader_num_workers": 2}, id="loader_workers"),
    ],
)
def test_it_trains_and_resumes(tmp_path, changes):
    if not set(changes) <= set(TrainingArguments.__dataclass_fields__):
        pytest.skip("this version of transformers has no such argument")
    clients.train_and_resume(lambda folder: make_trainer(folder, **changes), tmp_path)


@pytest.mark.parametrize("optim", ["celo2", "small_fc_lopt", "celo_adam"])
def test_other_rules_train_and_resume(tmp_path, optim):
    def make(folder):
        args = TrainingArguments(str(folder), **(clients.SETTINGS | {"optim": optim}))
        return Trainer(cases.tiny_llama(), args, train_dataset=clients.rising_rows())

    trainer = make(tmp_path)
    trainer.train()
    clients.assert_falls(clients.losses(trainer), by=0.005)
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{clients.MIDDLE}"))
    whole, ends = clients.trainable(trainer.model), clients.trainable(resumed.model)
    assert all(torch.equal(ends[name], whole[name]) for name in whole)


def test_gradient_checkpointing_gives_the_same_losses(tmp_path):
    runs = [make_trainer(tmp_path, max_steps=4, gradient_checkpointing=saved) for saved in (False, True)]
    for trainer in runs:
        trainer.train()
    assert clients.losses(runs[1]) == pytest.approx(clients.losses(runs[0]), abs=1e-5)


def test_seq2seq_trainer(tmp_path):
    torch.manual_seed(0)
    tokenizer = clients.byte_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    start = T5ForConditionalGeneration(config).state_dict()
    rows = [
        {key: tokenizer(text)["input_ids"] for key, text in (("input_ids", f"up {i}"), ("labels", f"down {i}"))}
        for i in range(40)
    ]

    def make(folder):
        model = T5ForConditionalGeneration(config)
        model.load_state_dict(start)
        args = Seq2SeqTrainingArguments(
            str(folder), predict_with_generate=True, generation_max_length=8, **clients.SETTINGS
        )
        return Seq2SeqTrainer(
            model,
            args,
            train_dataset=rows,
            eval_dataset=rows[:4],
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        )

    trainer = clients.train_and_resume(make, tmp_path, by=0.01)
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert trainer.predict(rows[:2]).predictions.shape[0] == 2


def test_the_best_model_comes_back(tmp_path):
    """A held-out loss of our own making is lowest in the middle: that model has to be loaded at the end."""
    found = {}

    class Judged(Trainer):
        def evaluate(self, *args, **kwargs):
            step = self.state.global_step
            found[step] = clients.trainable(self.model)
            metrics = {"eval_loss": abs(step - 8) + 1.0}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    args = TrainingArguments(
        str(tmp_path),
        **clients.SETTINGS | {"save_steps": 4, "eval_strategy": "steps", "eval_steps": 4},
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        save_total_limit=2,
    )
    rows = clients.rising_rows()
    trainer = Judged(cases.tiny_llama(), args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-8") and trainer.state.global_step == STEPS
    best = clients.trainable(trainer.model)
    assert all(torch.equal(best[name], found[8][name]) for name in best)
    assert not all(torch.equal(best[name], found[16][name]) for name in best)
    # Training on from the best model starts a schedule of its own.
    with pytest.warns(UserWarning, match="16 steps"):
        trainer.train()
    assert clients.learned(trainer).steps_done == STEPS


def test_early_stopping(tmp_path):
    """The patience ends at the third evaluation; what was trained so far can be gone on with."""

    class Worse(Trainer):
        def evaluate(self, *args, **kwargs):
            metrics = {"eval_loss": float(self.state.global_step)}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    settings = clients.SETTINGS | {"save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    args = TrainingArguments(str(tmp_path), **settings, load_best_model_at_end=True, metric_for_best_model="eval_loss")
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    rows = clients.rising_rows()
    trainer = Worse(cases.tiny_llama(), args, train_dataset=rows, eval_dataset=rows, callbacks=[stopping])
    trainer.train()
    optimizer = clients.learned(trainer)
    assert trainer.state.global_step == optimizer.steps_done == 12
    assert optimizer.num_training_steps == STEPS  # the schedule was for the whole run


def test_auto_find_batch_size(tmp_path):
    """Out of memory at the third step with eight rows: Trainer starts over with fewer, and so does the optimizer."""
    sizes = []

    class Hungry(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            rows = len(inputs["input_ids"])
            sizes.append(rows)
            if rows == 8 and self.state.global_step == 2:
                # Backward was never reached for this batch, but the optimizer has taken two steps.
                raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return super().training_step(model, inputs, *args, **kwargs)

    settings = clients.SETTINGS | {"per_device_train_batch_size": 8, "save_strategy": "no"}
    args = TrainingArguments(str(tmp_path), auto_find_batch_size=True, **settings)
    trainer = Hungry(cases.tiny_llama(), args, train_dataset=clients.rising_rows())
    seen = cases.SeenLosses()
    trainer.add_callback(seen)
    trainer.train()
    assert sizes[:3] == [8, 8, 8] and max(sizes[3:]) < 8
    optimizer = clients.learned(trainer)
    assert optimizer.steps_done == optimizer.num_training_steps == trainer.state.global_step == STEPS
    steps = len(clients.losses(trainer))
    assert seen.values[-STEPS:] == pytest.approx(clients.losses(trainer)[-STEPS:], abs=1e-3) and steps >= STEPS


def test_hyperparameter_search(tmp_path):
    """optuna chooses the multiplier and the length; each trial has an optimizer of its own that knows both."""
    pytest.importorskip("optuna", reason="needs: pip install 'hf_lopt[test]'")
    trials = []

    class Noted(Trainer):
        def evaluate(self, *args, **kwargs):
            optimizer = clients.learned(self)
            lr = {group["lr"] for group in optimizer.param_groups}
            trials.append((lr, optimizer.num_training_steps, optimizer.steps_done, id(optimizer)))
            return super().evaluate(*args, **kwargs)

    settings = clients.SETTINGS | {"save_strategy": "no", "eval_strategy": "epoch", "max_steps": -1}
    args = TrainingArguments(str(tmp_path), **settings)
    rows = clients.rising_rows(16)
    trainer = Noted(None, args, model_init=lambda: cases.tiny_llama(), train_dataset=rows, eval_dataset=rows)
    chosen = iter([(0.5, 1), (2.0, 2)])

    def space(trial):
        rate, epochs = next(chosen)
        return {
            "learning_rate": trial.suggest_float("learning_rate", rate, rate),
            "num_train_epochs": trial.suggest_int("num_train_epochs", epochs, epochs),
        }

    best = trainer.hyperparameter_search(hp_space=space, n_trials=2, direction="minimize", backend="optuna")
    by_trial = {entry[3]: entry[:3] for entry in trials}
    assert list(by_trial.values()) == [({0.5}, 4, 4), ({2.0}, 8, 8)]
    assert best.run_id in ("0", "1") and math.isfinite(best.objective)


def test_hyperparameter_search_over_something_else_keeps_the_multiplier(tmp_path):
    """What was chosen for one trial is not taken for the user's choice in the next."""
    pytest.importorskip("optuna", reason="needs: pip install 'hf_lopt[test]'")
    rates = []

    class Noted(Trainer):
        def evaluate(self, *args, **kwargs):
            rates.append(clients.learned(self).param_groups[0]["lr"])
            return super().evaluate(*args, **kwargs)

    settings = clients.SETTINGS | {"save_strategy": "no", "eval_strategy": "epoch", "max_steps": -1}
    args = TrainingArguments(str(tmp_path), num_train_epochs=1, **settings)
    rows = clients.rising_rows(16)
    trainer = Noted(None, args, model_init=lambda: cases.tiny_llama(), train_dataset=rows, eval_dataset=rows)
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"seed": trial.suggest_int("seed", 1, 5)},
        n_trials=2,
        direction="minimize",
        backend="optuna",
    )
    assert rates == [1.0, 1.0] and trainer.args.learning_rate == 5e-5


def test_the_model_card_names_the_optimizer(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="no", push_to_hub=False)
    trainer.train()
    trainer.create_model_card(model_name="small", dataset="numbers")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    line = text[text.index("- optimizer:") :].split("- lr_scheduler_type")[0]
    assert "velo" in line.lower() and "bundled weights bundled:velo@" in line
    assert "- learning_rate: 5e-05" in text and "- lr_scheduler_type: linear" in text  # the arguments as they were set
