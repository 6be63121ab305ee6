"""Scripts that do not know hf_lopt, run by ``-m hf_lopt.launch``.

The programs in ``scripts/programs`` are raw loops of the shape of well-known examples, which construct their optimizer
themselves; ``--replace`` is for those.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.optim import lr_scheduler

import hf_lopt
from hf_lopt.hf import launch
from hf_lopt.hf.replace import Options, Replacer


SCRIPTS = Path(__file__).parent / "scripts"
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """launch.main changes the process for the script, which normally is all that the process does."""
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_script(capsys):
    launch.main([str(SCRIPTS / "show_main.py"), "--optim", "velo"])
    assert json.loads(capsys.readouterr().out) == {
        "name": "__main__",
        "argv": [str(SCRIPTS / "show_main.py"), "--optim", "velo"],
        "path": str(SCRIPTS),
        "registered": True,
    }


def test_module(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    launch.main(["-m", "show_main", "--optim", "velo"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["name"] == "__main__" and shown["argv"] == [str(SCRIPTS / "show_main.py"), "--optim", "velo"]


def test_exit_status_passes_through():
    with pytest.raises(SystemExit) as raised:
        launch.main([str(SCRIPTS / "show_main.py"), "--fail"])
    assert raised.value.code == 3


@pytest.mark.parametrize("arguments", [[], ["-m"]])
def test_without_a_script_it_says_how(arguments):
    with pytest.raises(SystemExit, match="accelerate launch"):
        launch.main(arguments)


def test_a_missing_script_is_named():
    with pytest.raises(SystemExit, match="no_such.py"):
        launch.main(["no_such.py"])


def test_help(capsys):
    launch.main(["--help"])
    assert "python -m hf_lopt.launch script.py" in capsys.readouterr().out


def test_missing_transformers_is_said(monkeypatch):
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install transformers"):
        launch.main(["script.py"])


@pytest.mark.slow
def test_accelerate_launch_trains_an_unmodified_script(tmp_path):
    script = SCRIPTS / "train_unmodified.py"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes=1"]
    command += ["-m", "hf_lopt.launch", str(script), f"--output_dir={tmp_path}", "--optim=velo"]
    command += ["--optim_args=weights=bundled", "--max_steps=2", "--logging_steps=1", "--report_to=none"]
    command += ["--save_strategy=no", "--use_cpu=true"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["ACCELERATE_CONFIG_FILE"] = str(tmp_path / "none.yaml")  # not the configuration of whoever runs this
    (tmp_path / "none.yaml").write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nuse_cpu: true\n")
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    numbers = ["lopt/lr_mult_max", "lopt/lr_mult_mean", "lopt/lr_mult_min", "lopt/update_rms"]
    assert found == {
        "optimizer": "VeLO",
        "steps": 2,
        "logged": sorted([*numbers, *numbers, "lopt/weights", "lopt/length_multiplier"]),
        "argv": str(script),
        "neighbour": 42,
        "main": str(script),
    }


# ---- --replace: programs --------------------------------------------------------------------------------------------


@pytest.fixture
def fresh():
    """Accelerate keeps its state in classes; a program has a process of its own."""
    from accelerate.state import AcceleratorState, GradientState

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield reset
    reset()


def program(name, result, *options, replace="AdamW=velo", own=(), argument="--result"):
    launch.main(
        ["--replace", replace, "--optim_args=weights=bundled", *options, str(SCRIPTS / "programs" / name)]
        + [f"{argument}={result}", *own]
    )
    return json.loads((result / "result.json" if result.is_dir() else result).read_text())


def test_language_model_program(tmp_path, capsys, fresh):
    found = program("language_model.py", tmp_path / "r.json", own=["--weight_decay=0.01"])
    assert found["optimizer"] == "VeLO" and found["done"] == found["horizon"] == 40
    assert set(found["lr"]) == {1.0} and found["last_lr"] == found["lr"]
    assert sorted(set(found["weight_decay"])) == [0.0, 0.01]
    assert sum(found["losses"][-5:]) < sum(found["losses"][:5])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf_lopt.launch")]
    assert len(said) == 2
    assert "AdamW is VeLO, lr 1 (VeLO's own) in place of 5e-05" in said[0] and "weight_decay 0.01" in said[0]
    assert "40 steps" in said[1] and "accumulates" not in said[1]


def test_accumulation_and_steps_that_the_program_is_given(tmp_path, fresh, capsys):
    """Short last windows; the number of steps comes from the scheduler in optimizer steps."""
    own = ["--gradient_accumulation_steps=3", "--max_train_steps=9"]
    found = program("language_model.py", tmp_path / "r.json", own=own)
    assert found["done"] == found["horizon"] == 9
    said = capsys.readouterr().err
    assert "(it accumulates 3 batches: if it counted those, --steps 3)" in said and "took" not in said


def test_steps_of_the_command_line_win(tmp_path, fresh, capsys):
    found = program("language_model.py", tmp_path / "r.json", "--steps=100", own=["--max_train_steps=6"])
    assert (found["done"], found["horizon"]) == (6, 100)
    assert "took 6 steps of a run of 100" in capsys.readouterr().err


def test_get_scheduler_is_told_the_steps_for_a_constant_schedule_too(tmp_path, fresh):
    own = ["--max_train_steps=4", "--lr_scheduler_type=constant"]
    assert program("language_model.py", tmp_path / "r.json", own=own)["horizon"] == 4


def test_classification_program_resumes(tmp_path, fresh, capsys):
    whole = program("classification.py", tmp_path, argument="--folder", own=["--with_clipping"])
    assert whole["optimizer"] == "VeLO" and whole["steps_done"] == whole["horizon"] == 16
    assert set(whole["lr"]) == {0.05}  # a checkpoint, and embedded weights
    assert "wreck pretrained parameters" in capsys.readouterr().err
    fresh()
    rest = program("classification.py", tmp_path, argument="--folder", own=["--with_clipping", "--resume"])
    assert rest["steps_done"] == rest["horizon"] == 16 and len(rest["losses"]) == 8


def test_diffusion_program(tmp_path, fresh, capsys):
    found = program("diffusion.py", tmp_path / "r.json")
    assert found["optimizer"] == "VeLO" and found["horizon"] == 18 == len(found["logged"])
    assert {row["lr"] for row in found["logged"]} == {1.0}
    assert set(found["weight_decay"]) == {1e-6}
    assert "ignored: betas, eps" in capsys.readouterr().err


def test_a_rule_without_a_schedule_keeps_the_programs(tmp_path, fresh):
    """Warm-up over 4 of 18 steps, then linearly to 0; celo2's lr is 1e-3, AdamW's was 1e-4."""
    logged = program("diffusion.py", tmp_path / "r.json", replace="AdamW=celo2")["logged"]
    expected = [1e-3 * min(k / 4, (18 - k) / 18) for k in range(1, 19)]
    assert [row["lr"] for row in logged] == pytest.approx(expected)


@pytest.mark.slow
def test_accelerate_launch_replaces(tmp_path):
    """With the launcher's own command, as a module."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes=1"]
    command += ["-m", "hf_lopt.launch", "--replace", "AdamW=velo", "--optim_args", "weights=bundled"]
    command += ["-m", "language_model", "--max_train_steps=4", f"--result={tmp_path / 'r.json'}"]
    path = os.pathsep.join([str(ROOT), str(SCRIPTS / "programs")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment["ACCELERATE_CONFIG_FILE"] = str(tmp_path / "none.yaml")
    (tmp_path / "none.yaml").write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nuse_cpu: true\n")
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "r.json").read_text())["optimizer"] == "VeLO"


@pytest.mark.slow
def test_two_processes_share_the_steps(tmp_path):
    """The scheduler is told the steps of a single process and moves twice in each of two: 40 become 20."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command += ["hf_lopt.launch", "--replace=AdamW=velo", "--optim_args=weights=bundled"]
    command += [str(SCRIPTS / "programs" / "language_model.py"), f"--result={tmp_path / 'r.json'}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["done"] == found["horizon"] == 20
    assert result.stderr.count("trains for 20 steps") == 1


# ---- --replace: scripts of a few lines ------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Run a few lines as a script; gives its variables and what was said on the error stream."""

    def run(body, *options, replace=("AdamW=velo",)):
        script = tmp_path / "script.py"
        kept = {}
        monkeypatch.setattr("builtins.keep", kept.update, raising=False)
        preamble = "import torch\nmodel = torch.nn.Linear(3, 2)\n"
        preamble += "def train(optimizer, steps, after=lambda: None):\n"
        preamble += "    for _ in range(steps):\n        loss = model(torch.ones(4, 3)).square().mean()\n"
        preamble += "        loss.backward()\n        getattr(optimizer, 'observe_loss', id)(loss)\n"
        preamble += "        optimizer.step()\n        optimizer.zero_grad()\n        after()\n"
        script.write_text(preamble + body + "\nkeep(globals())\n")
        names = [word for pair in replace for word in ("--replace", pair)]
        launch.main([*names, "--optim_args=weights=bundled", *options, str(script)])
        return kept, capsys.readouterr().err

    return run


NAMES = {
    "module": "optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)",
    "submodule": "import torch.optim.adamw as m\noptimizer = m.AdamW(model.parameters(), 1e-3)",
    "from": "from torch.optim import AdamW\noptimizer = AdamW(params=model.parameters(), lr=1e-3)",
    "by name": "optimizer = getattr(torch.optim, 'AdamW')(model.named_parameters(), lr=1e-3)",
    "8 bit": "class AdamW8bit(torch.optim.Optimizer):\n"
    "    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-2, percentile_clipping=100):\n"
    "        raise NotImplementedError\n"
    "optimizer = AdamW8bit(model.parameters(), lr=1e-3, percentile_clipping=5)",
}


@pytest.mark.parametrize("name", NAMES)
def test_every_way_to_name_the_class(name, run):
    space, _ = run(NAMES[name] + "\ntrain(optimizer, 2)", "--steps=2")
    assert type(space["optimizer"]) is hf_lopt.VeLO and space["optimizer"].steps_done == 2


def test_a_class_imported_before(run, monkeypatch):
    monkeypatch.setattr("builtins.Early", torch.optim.AdamW, raising=False)
    space, _ = run("optimizer = Early(model.parameters())", "--steps=2")
    assert type(space["optimizer"]) is hf_lopt.VeLO


def test_afterwards_all_is_as_before(run):
    run("optimizer = torch.optim.AdamW(model.parameters())\ntrain(optimizer, 1)", "--steps=1")
    plain = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    assert type(plain) is torch.optim.AdamW
    schedule = lr_scheduler.CosineAnnealingLR(plain, T_max=4, eta_min=0.05)
    assert type(schedule) is lr_scheduler.CosineAnnealingLR and schedule.eta_min == 0.05


def test_others_stay(run):
    body = "other = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)\n"
    body += (
        "s = torch.optim.lr_scheduler.OneCycleLR(other, 0.1, total_steps=5)\nimport copy\ncopied = copy.deepcopy(s)"
    )
    space, said = run(body)
    assert type(space["other"]) is torch.optim.SGD and space["copied"].total_steps == 5
    assert "constructed no AdamW" in said and "It constructed SGD" in said


def test_several_classes(run):
    body = "a = torch.optim.Adam(model.parameters())\nb = torch.optim.AdamW(model.parameters())\n"
    body += "c = torch.optim.SGD(model.parameters(), lr=1.0)"
    space, _ = run(body, replace=("AdamW=velo", "Adam=celo2"))
    assert [type(space[x]).__name__ for x in "abc"] == ["Celo2", "VeLO", "SGD"]


def test_groups_keep_their_relation(run):
    body = "w, b = model.parameters()\n"
    body += "optimizer = torch.optim.AdamW([{'params': [w], 'weight_decay': 0.1, 'lr': 1e-2, 'betas': (0.5, 0.9)}, "
    body += "{'params': b}], lr=1e-3, weight_decay=0.3, fused=False)"
    space, said = run(body, "--steps=3")
    groups = space["optimizer"].param_groups
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(10.0, 0.1), (1.0, 0.3)]
    assert "ignored: fused, betas" in said
    assert "in each step 0.3 of a parameter; of AdamW's it was 0.0003" in said


def test_weight_decay_that_the_script_does_not_give_is_the_rules(run):
    space, _ = run("optimizer = torch.optim.AdamW(model.parameters())", "--steps=3")
    assert space["optimizer"].param_groups[0]["weight_decay"] == 0.0  # AdamW's would be 0.01


def test_what_the_model_tells_of_its_parameters(run):
    body = "import torch.nn as nn\nnet = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4))\n"
    body += "optimizer = torch.optim.AdamW(net.parameters())"
    space, _ = run(body, replace=("AdamW=celo2",))
    branches = {tuple(p.shape): g["branch"] for g in space["optimizer"].param_groups for p in g["params"]}
    assert branches == {(7, 4): "adam", (4, 4): "network", (4,): "adam"}


def test_lr_of_the_command_line(run):
    body = "optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)"
    for replace in ("AdamW=velo", "AdamW=celo2"):
        space, _ = run(body, "--steps=3", "--lr=0.25", replace=(replace,))
        assert space["optimizer"].param_groups[0]["lr"] == 0.25


SCHEDULES = {
    "CosineAnnealingLR(optimizer, T_max=12)": 12,
    "CosineAnnealingLR(optimizer, 12, 1e-5)": 12,
    "OneCycleLR(optimizer, 1e-3, total_steps=12)": 12,
    "OneCycleLR(optimizer, max_lr=1e-3, epochs=3, steps_per_epoch=4)": 12,
    "LinearLR(optimizer, 1.0, 0.0, 12)": 12,
    "PolynomialLR(optimizer, 12)": 12,
    "SequentialLR(optimizer, [S.LinearLR(optimizer, 0.1, 1.0, 2), S.CosineAnnealingLR(optimizer, 10)], [2])": 12,
    "ChainedScheduler([S.LinearLR(optimizer, 0.1, 1.0, 2), S.CosineAnnealingLR(optimizer, 12)])": 12,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_horizon_is_what_the_scheduler_is_told(schedule, run):
    body = "optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)\nS = torch.optim.lr_scheduler\n"
    body += f"schedule = S.{schedule}\ntrain(optimizer, 4, schedule.step)\nshown = schedule.get_last_lr()"
    space, said = run(body)
    assert space["optimizer"].num_training_steps == SCHEDULES[schedule]
    assert space["optimizer"].param_groups[0]["lr"] == 1.0 and space["shown"] == [1.0]
    assert "took 4 steps of a run of 12" in said


@pytest.mark.parametrize(
    "schedule",
    [
        "LinearLR(optimizer, 0.1, 1.0, 2)",
        "StepLR(optimizer, 5)",
        "ReduceLROnPlateau(optimizer)",
        "LambdaLR(optimizer, id)",
    ],
)
def test_without_a_length_it_refuses(schedule, run):
    body = (
        f"optimizer = torch.optim.AdamW(model.parameters())\ntorch.optim.lr_scheduler.{schedule}\ntrain(optimizer, 1)"
    )
    with pytest.raises(RuntimeError, match="--steps N before the script's name"):
        run(body)


def test_rules_without_a_length_need_none(run):
    body = "optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)\n"
    body += "schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)\n"
    body += "train(optimizer, 3, lambda: schedule.step(1.0))"
    space, _ = run(body, replace=("AdamW=small_fc_lopt",))
    assert space["optimizer"].steps_done == 3 and space["optimizer"].param_groups[0]["lr"] == 1.0


def test_a_scheduler_of_epochs_is_refused(run):
    body = "optimizer = torch.optim.AdamW(model.parameters())\n"
    body += "schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)\ntrain(optimizer, 3)"
    with pytest.raises(RuntimeError, match="seems to count epochs"):
        run(body)


def test_a_scheduler_that_moves_with_every_micro_batch(run):
    body = "optimizer = torch.optim.AdamW(model.parameters())\n"
    body += "schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)\n"
    body += "train(optimizer, 6, lambda: (schedule.step(), schedule.step()))"
    space, said = run(body)
    assert space["optimizer"].num_training_steps == 6
    assert "6 steps, as the script told its scheduler, which moves 2 times in each" in said and "took" not in said


def test_a_rate_that_the_script_writes_itself_is_not_taken(run):
    body = "optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4)\n"
    body += "def write():\n    optimizer.param_groups[0]['lr'] = 3e-4\ntrain(optimizer, 3, write)\ntrain(optimizer, 1)"
    space, said = run(body, "--steps=4")
    assert space["optimizer"].param_groups[0]["lr"] == 1.0
    assert said.count("sets lr to 0.0003 by itself") == 1


def test_keep_multiplies_by_the_scripts_schedule(run):
    body = "optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)\n"
    body += "schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (k + 1))\n"
    body += "train(optimizer, 1, schedule.step)"
    space, _ = run(body, "--steps=1", "--optim_args=weights=bundled,schedule=keep")
    assert space["optimizer"].param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    "schedule, lr",
    [
        (
            "OneCycleLR(optimizer, max_lr=2e-3, total_steps=10, pct_start=0.5, div_factor=4)",
            5e-4,
        ),
        ("CosineAnnealingLR(optimizer, 10, eta_min=1e-3)", 1e-3),
    ],
)
def test_rates_in_schedulers_are_in_units_of_the_scripts(schedule, lr, run):
    """celo2's 1e-3 stands for the script's 1e-3; with lr 1e-2 all of it is ten times smaller."""
    for script_lr in (1e-3, 1e-2):
        scaled = schedule.replace("e-3", f"e{-3 if script_lr == 1e-3 else -2}")
        body = f"optimizer = torch.optim.AdamW(model.parameters(), lr={script_lr})\n"
        space, _ = run(body + f"s = torch.optim.lr_scheduler.{scaled}", replace=("AdamW=celo2",))
        assert space["optimizer"].param_groups[0]["lr"] == pytest.approx(lr)


@pytest.mark.parametrize(("lr", "loaded", "multiplier"), [(None, False, 5.0), (0.5, False, 1.0), (None, True, 2.0)])
def test_a_script_that_leaves_the_optimizer_to_trainer_gets_what_optim_gives(tmp_path, lr, loaded, multiplier, fresh):
    """Trainer makes an AdamW of its own, unless another is named; ``loaded``: a pretrained model."""
    from transformers import Trainer

    import hf_cases as cases

    options, found = Options(optim_args="weights=bundled", lr=lr), []
    options.add("AdamW=velo")
    text = "weights=bundled" if lr is None else f"weights=bundled,lr={lr}"
    for optim, context in (("velo", contextlib.nullcontext()), ("adamw_torch", Replacer(options))):
        args = cases.arguments(tmp_path, max_steps=3, optim=optim, optim_args=text if optim == "velo" else None)
        model = cases.tiny_llama()
        if loaded:
            model.save_pretrained(tmp_path / "model")
            model = type(model).from_pretrained(tmp_path / "model")
        trainer = Trainer(model, args, train_dataset=cases.byte_rows(8))
        with context:
            trainer.train()
        found.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        assert trainer.optimizer.optimizer.length_multiplier == multiplier
    assert found[0] == found[1]


def test_optimizers_are_not_kept_alive():
    import gc
    import weakref

    options = Options(optim_args="weights=bundled", steps=3)
    options.add("AdamW=velo")
    with Replacer(options) as replacer:
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
        schedule = lr_scheduler.CosineAnnealingLR(optimizer, 5)
        alive = weakref.ref(optimizer)
        assert len(replacer.runs) == 1
        del optimizer, schedule
        gc.collect()
        assert alive() is None


@pytest.mark.parametrize(
    "options, message",
    [
        (["--replace", "AdamW=veloo"], "no optimizer 'veloo'; there are celo, celo2"),
        (["--replace", "AdamX=velo"], "torch.optim has no AdamX. It has ASGD, Adadelta"),
        (["--replace", "AdamW"], "such as AdamW=velo"),
        (["--replace", "torch.optim.Tensor=velo"], "torch.optim has no optimizer class Tensor"),
        (["--replace", "no_such_package.Lion=velo"], "no_such_package"),
        (["--replace", "AdamW=velo", "--steps=0"], "--steps is a positive whole number; got '0'"),
        (["--replace", "AdamW=velo", "--lr=fast"], "--lr is a positive number; got 'fast'"),
        (["--replace", "AdamW=velo", "--optim_args=momentum=1"], "velo takes no momentum"),
        (["--steps=3"], "belong to --replace"),
        (["--learning_rate=1"], "no option --learning_rate; options of the script come after its name"),
    ],
)
def test_options_that_are_wrong(options, message):
    with pytest.raises(SystemExit, match=message):
        launch.main([*options, str(SCRIPTS / "show_main.py")])


def test_an_option_at_the_end_is_said():
    with pytest.raises(SystemExit, match="--replace wants a value"):
        launch.main(["--replace"])


def test_replacing_works_without_transformers(monkeypatch, run):
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    space, _ = run("optimizer = torch.optim.AdamW(model.parameters())", "--steps=1")
    assert type(space["optimizer"]) is hf_lopt.VeLO


@pytest.mark.skipif(not hasattr(hf_lopt, "feed_loss"), reason="needs hf_lopt.feed_loss")
def test_without_accelerate_the_loss_comes_from_backward(run):
    body = "optimizer = torch.optim.AdamW(model.parameters())\n"
    body += "for _ in range(3):\n    model(torch.ones(4, 3)).square().mean().backward()\n"
    body += "    seen = optimizer.has_observed_loss\n    optimizer.step()\n    optimizer.zero_grad()"
    space, _ = run(body, "--steps=3")
    assert space["seen"] and space["optimizer"].steps_done == 3
