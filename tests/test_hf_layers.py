"""Numbers of every tensor in the logs, by ``optim_args="log_layers=true"``, and the picture of them."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import Trainer, TrainerCallback

import hf_cases as cases
from hf_lopt import plot
from hf_lopt.hf import loss_feed
from hf_lopt.hf.layers import LayerLog
from ranks import run_on_ranks


LAYERS = "weights=bundled,log_layers=true"


class Watch(TrainerCallback):
    """Copies of all parameters before and after every step, and the learned step sizes."""

    def __init__(self):
        self.before, self.after, self.learned = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.before.append({name: p.detach().clone() for name, p in model.named_parameters()})

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.after.append({name: p.detach().clone() for name, p in model.named_parameters()})
        self.learned.append(loss_feed.unwrap(optimizer).report.get("lr_mult"))


def trained(folder, callbacks=(), rows=22, **changes):
    args = cases.arguments(folder, **({"optim_args": LAYERS, "max_steps": 6, "logging_steps": 2} | changes))
    trainer = Trainer(cases.tiny_llama(), args, train_dataset=cases.byte_rows(rows), callbacks=list(callbacks))
    trainer.train()
    return trainer


def layers_of(row, kind):
    return {key.rpartition("/")[2]: row[key] for key in row if key.startswith(f"lopt/{kind}/")}


def test_rows_say_what_each_step_did(tmp_path):
    watch = Watch()
    trainer = trained(tmp_path, [watch])
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6]
    names = [name for name, _ in trainer.model.named_parameters()]
    for row in rows:
        before, after = watch.before[row["step"] - 1], watch.after[row["step"] - 1]
        ratios = layers_of(row, "update_ratio")
        assert sorted(ratios) == sorted(names)
        for name in names:
            moved = (after[name] - before[name]).double()
            want = (moved.square().mean() / before[name].double().square().mean()).sqrt().item()
            assert ratios[name] == pytest.approx(want, rel=1e-4)
        learned = layers_of(row, "lr_mult")
        assert sorted(learned) == sorted(names)
        assert sorted(learned.values()) == pytest.approx(sorted(watch.learned[row["step"] - 1].tolist()))
        assert min(learned.values()) == row["lopt/lr_mult_min"] and max(learned.values()) == row["lopt/lr_mult_max"]


def test_learned_step_sizes_carry_the_right_names(tmp_path):
    """Each tensor's own LSTM state gives its step size again, through the head of the scheduler."""
    trainer = trained(tmp_path)
    optimizer = loss_feed.unwrap(trainer.optimizer)
    theta = optimizer.weights.theta
    row = [row for row in trainer.state.log_history if "loss" in row][-1]
    for name, value in layers_of(row, "lr_mult").items():
        state = optimizer.state[trainer.model.get_parameter(name)]
        head = state["lstm_hidden"] @ theta["rnn_params/step_size/w"] + theta["rnn_params/step_size/b"]
        assert value == pytest.approx(head.item(), rel=1e-5)


def test_rules_without_step_sizes_log_the_ratio_only(tmp_path):
    trainer = trained(tmp_path, optim="small_fc_lopt", max_steps=2)
    (row,) = [row for row in trainer.state.log_history if "loss" in row]
    assert layers_of(row, "update_ratio") and not layers_of(row, "lr_mult")


def test_off_unless_asked_and_then_only_for_steps_that_are_logged(tmp_path, monkeypatch):
    kept = []
    before = LayerLog.before
    monkeypatch.setattr(LayerLog, "before", lambda self, optimizer: kept.append(1) or before(self, optimizer))
    trainer = trained(tmp_path, optim_args="weights=bundled")
    assert not kept
    assert not any("/update_ratio/" in key for row in trainer.state.log_history for key in row)
    trained(tmp_path, max_steps=7, logging_steps=3, logging_first_step=True)
    assert len(kept) == 3  # steps 1, 3 and 6
    kept.clear()
    trainer = trained(tmp_path, logging_strategy="epoch", max_steps=-1, num_train_epochs=1, rows=8)
    assert len(kept) == 4 and any("/update_ratio/" in key for row in trainer.state.log_history for key in row)


def test_a_bad_value_is_named(tmp_path):
    with pytest.raises(ValueError, match="log_layers.*maybe"):
        trained(tmp_path, optim_args="log_layers=maybe")


def test_a_tensor_without_gradient_is_left_out(tmp_path):
    p, idle = torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(2, 2))
    model = torch.nn.Module()
    model.moving, model.idle = p, idle
    optimizer = cases.velo(model.parameters())
    log = LayerLog(model)
    p.grad = torch.ones(3, 4)
    log.before(optimizer)
    optimizer.step(1.0)
    log.after(optimizer)
    found = log.read()
    assert set(found) == {"update_ratio/moving", "lr_mult/moving"} and log.read() == {}
    assert found["update_ratio/moving"] == pytest.approx((p - 1).square().mean().sqrt().item(), rel=1e-4)


def test_sharded_tensors_give_the_numbers_of_whole_ones():
    """Two ranks, uneven and empty shards; the script compares."""
    run_on_ranks(2, "sharded_layers.py")


def test_tensorboard_gets_the_layers(tmp_path, monkeypatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    trainer = trained(tmp_path, max_steps=2, logging_steps=1, report_to=["tensorboard"])
    (folder,) = {str(path.parent) for path in tmp_path.rglob("events.out.tfevents.*")}
    events = event_accumulator.EventAccumulator(folder)
    events.Reload()
    name = "lopt/update_ratio/model.embed_tokens.weight"
    written = [event.value for event in events.Scalars(f"train/{name}")]
    assert written == pytest.approx([row[name] for row in trainer.state.log_history if "loss" in row])


# ---- the picture


def size_of_png(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_plot_draws_a_checkpoint(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    trainer = trained(tmp_path, save_strategy="steps", save_steps=3)
    capsys.readouterr()
    plot.main([str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "lopt.png")
    with_maps = size_of_png(tmp_path / "lopt.png")
    # The latest checkpoint, with the values of the log.
    history = plot.find_histories(tmp_path)["checkpoint-6"]
    steps, names, values = plot.layer_table(history, "lr_mult")
    assert steps == [2, 4, 6] and sorted(names) == sorted(n for n, _ in trainer.model.named_parameters())
    assert values[0][-1] == trainer.state.log_history[-2][f"lopt/lr_mult/{names[0]}"]
    plain = [{key: row[key] for key in row if key.count("/") < 2} for row in history]
    (tmp_path / "plain.json").write_text(json.dumps({"log_history": plain}))
    plot.main([str(tmp_path / "plain.json"), "-o", str(tmp_path / "deep" / "plain.png")])
    assert "log_layers=true" in capsys.readouterr().out
    assert size_of_png(tmp_path / "deep" / "plain.png")[1] < with_maps[1]


def test_layers_are_sorted_by_number():
    row = {"step": 1} | {f"lopt/lr_mult/h.{i}.w": float(i) for i in (10, 2, 1)}
    assert plot.layer_table([row], "lr_mult") == ([1], ["h.1.w", "h.2.w", "h.10.w"], [[1.0], [2.0], [10.0]])


def test_plot_draws_all_learned_runs_of_a_recipe(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"step": 1, "loss": 2.0, "lopt/update_rms": 0.1, "lopt/update_ratio/a": 0.5}
    runs = {"celo2": {"history": [row, {"step": 2}]}, "adamw": {"history": [{"step": 1, "loss": 1.0}]}}
    (tmp_path / "metrics.json").write_text(json.dumps({"runs": runs}))
    assert list(plot.find_histories(tmp_path)) == ["celo2"]
    plot.main([str(tmp_path)])
    assert size_of_png(tmp_path / "lopt.png")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "metrics.json.*trainer_state.json"),
        ("{", "trainer_state.json"),
        ('{"other": 1}', "trainer_state.json"),
        ('{"log_history": [{"step": 1, "loss": 2.0}]}', "learned optimizer"),
    ],
)
def test_plot_names_what_it_cannot_read(tmp_path, content, message):
    if content is not None:
        (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(SystemExit, match=message):
        plot.main([str(tmp_path)])


def test_plot_without_matplotlib_says_what_to_install(tmp_path):
    rows = [{"step": 1, "loss": 2.0, "lopt/update_rms": 0.1}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    code = f"import sys; sys.modules['matplotlib'] = None; from hf_lopt import plot; plot.main([{str(tmp_path)!r}])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 1 and "hf_lopt.plot needs matplotlib: pip install matplotlib" in result.stderr


def test_maps_name_the_matrices_when_there_is_not_room_for_all():
    """Of twelve layers with a matrix, a bias and a norm each: the matrices, without what all names share."""
    kinds = ("attn.weight", "attn.bias", "ln_1.weight", "ln_1.bias")
    names = [f"model.h.{layer}.{kind}" for layer in range(12) for kind in kinds]
    assert plot.tensor_labels(names) == [(4 * layer, f"{layer}.attn") for layer in range(12)]
    assert plot.tensor_labels(names[:4]) == [(0, "attn"), (1, "attn.bias"), (2, "ln_1"), (3, "ln_1.bias")]
    only_biases = [f"h.{layer}.bias" for layer in range(61)]
    assert [row for row, _ in plot.tensor_labels(only_biases)] == list(range(0, 61, 3))


@pytest.mark.parametrize("low, high", [(0.66, 0.7), (2.29, 2.34), (3.5, 6.1), (0.04, 2.4), (1e-6, 1e3), (1.0, 1.0)])
def test_ticks_of_a_log_scale_differ(low, high):
    """Where the fixed digits of a formatter would say "2.3" three times."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axes = pyplot.subplots()
    axes.plot([0, 1], [low, high])
    plot.log_ticks(axes.yaxis)
    figure.canvas.draw()
    view = sorted(axes.get_ylim())
    labels = [tick.get_text() for tick in axes.get_yticklabels() if view[0] <= tick.get_position()[1] <= view[1]]
    assert len(set(labels)) == len(labels) >= 3 and axes.get_yscale() == "log"
    assert [float(label) for label in labels] == sorted(map(float, labels))
    pyplot.close(figure)
