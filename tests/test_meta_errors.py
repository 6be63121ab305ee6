"""Every mistake in a configuration, a task or the arguments of meta-training is named; nothing is computed before."""

from __future__ import annotations

import sys

import pytest
import torch

from hf_lopt.meta import cli, config, data, search, tasks, theta
from hf_lopt.meta.particles import Particles
from hf_lopt.meta.runs import Objective, RunSettings, TaskRuns
from test_meta_train import SMALL


CMA = {"perturbation": {"method": "cma_es"}, "mixture": {"m[0]": 1.0}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"perturbation": {"method": "sgd"}},
            "method.*pes, truncated_es, cma_es.*'sgd'",
        ),
        ({"perturbation": {"std": 0.0}}, "perturbation.std.*0.0"),
        ({"perturbation": {"clip": -1.0}}, "clip.*-1.0"),
        ({"outer": {"steps": 0}}, "outer.*steps.*0, 0.0003"),
        ({"outer": {"lr": 0.0}}, "outer.*lr > 0"),
        ({"outer": {"clip": 0.0}}, "outer.*clip > 0"),
        ({"outer": {"average": 1.0}}, "average.*1.0"),
        ({"outer": {"weight_decay": -0.1}}, "weight_decay.*-0.1"),
        ({"selection": {"tasks": ["char_lm"]}}, "selection.tasks.*char_lm"),
        ({"selection": {"tasks": ["nothing"]}}, "'nothing'.*digits_mlp"),
        ({"rule": "elo_celo2"}, "train celo2"),
        ({"tasks": {}}, "tasks.*digits_mlp"),
        ({"tasks": {"mnist": 4}}, "'mnist'"),
        ({"tasks": {"char_lm": 4}}, "char_lm.*test"),
        ({"tasks": {"digits_mlp": 0}}, "tasks.digits_mlp.*0"),
        ({"tasks": {"digits_mlp": 1.5}}, "tasks.digits_mlp.*int.*1.5"),
        ({"perturbation": {"method": "cma_es"}}, "cma_es.*mixture"),
        ({"mixture": {"m[0]": 1.0}}, "mixture.*velo.*cma_es"),
        (CMA | {"trained": ["*w0"]}, "trained"),
        (CMA | {"units": 8}, "units.*celo2"),
        ({"units": 8, "rule": "velo"}, "units.*celo2"),
        (CMA | {"population": 3}, "population.*3, 2 and 0.0"),
        ({"checkpoint_every": 0}, "checkpoint_every.*12, 0 and 0.0"),
        (CMA | {"balance": -1.0}, "balance.*-1.0"),
        ({"seed": "one"}, "seed.*int.*'one'"),
        ({"seed": True}, "seed.*int.*True"),
        ({"rule": 3}, "rule.*str.*3"),
        ({"outer": {"lr": "3e-4x"}}, "outer.lr.*float.*'3e-4x'"),
        ({"outer": {"betas": 0.9}}, "outer.betas.*tuple.*0.9"),
        ({"outer": [1, 2]}, r"outer.*\[1, 2\]"),
        ({"runs": {"lr": [1e-3, "fast"]}}, "runs.lr.*float.*'fast'"),
        ({"settings": 3}, "settings.*3"),
        ({"outer": {"learning_rate": 1}}, "outer.learning_rate.*steps, lr"),
        ({"task": {}}, "task.*rule, tasks"),
        ({"objective": {"kind": "best"}}, "objective.kind.*mean, last.*'best'"),
        ({"objective": {"samples": "test"}}, "objective.samples.*fresh, train.*'test'"),
        ({"objective": {"every": 0}}, "objective.every.*0, 2"),
        ({"objective": {"batch": 0}}, "objective.batch.*5, 0"),
        ({"runs": {"truncation": 0}}, "truncation 0, shortest 100"),
        ({"runs": {"shortest": 30, "longest": 20, "truncation": 5}}, "shortest 30, longest 20"),
        ({"runs": {"loss_scale": [2.0, 1.0]}}, "runs.loss_scale"),
        ({"runs": {"parameter_scale": [0.0, 1.0]}}, "runs.parameter_scale"),
    ],
)
def test_a_configuration(changes, message):
    with pytest.raises(ValueError, match=message):
        config.from_dict(SMALL | changes)


def test_what_a_configuration_lacks():
    with pytest.raises(ValueError, match="rule, tasks"):
        config.from_dict({"seed": 1})
    with pytest.raises(ValueError, match="mapping.*'celo2'"):
        config.from_dict("celo2")


def test_files(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "c.yaml"
    with pytest.raises(ValueError, match=r"c\.yaml.*No such file"):
        config.read(path)
    for text, message in (
        ("rule: [celo2\n", "line 1"),
        ("rule: celo2\n", "tasks"),
        ("", "mapping"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"(?s)c\.yaml: .*{message}"):
            config.read(path)


def test_the_command_line(tmp_path, capsys):
    """2 and a message for each; a run that is refused leaves nothing behind."""
    yaml = pytest.importorskip("yaml")
    path, output = tmp_path / "c.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(SMALL | {"rule": "adam"}))
    for arguments, message in (
        (["train", "--config", str(path), "--output", str(output)], "'adam'"),
        (["train", "--config", str(tmp_path / "none.yaml"), "--output", str(output)], "cannot be read"),
        (["export", str(tmp_path), str(output)], "output folder"),
        (["evaluate", "celo2", "--steps", "0"], "got 0 and 3"),
        (["evaluate", "celo2", "--seeds", "1"], "got 300 and 1"),
        (["evaluate", "celo2", "--tasks", "mnist"], "'mnist'"),
        (["evaluate", "velo:floor=1"], "'floor'"),
        (["evaluate", "velo:min_param_scale=x"], "got 'x'"),
    ):
        assert cli.main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error
    assert not output.exists()
    with pytest.raises(SystemExit):
        cli.main(["train"])
    assert "--config" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "want"), [([], True), (["--graphs"], True), (["--no-graphs"], False)])
def test_graphs_are_a_switch(monkeypatch, tmp_path, given, want):
    """On unless switched off; what takes effect on a GPU only. It is no setting: a run may go on without."""
    yaml = pytest.importorskip("yaml")
    path, seen = tmp_path / "c.yaml", []
    path.write_text(yaml.safe_dump(SMALL))

    class Stop(ValueError):
        pass

    def refuse(settings, output, device, graphs):
        seen.append(graphs)
        raise Stop("enough")

    monkeypatch.setattr(cli, "Trainer", refuse)
    assert cli.main(["train", "--config", str(path), "--output", str(tmp_path / "run"), *given]) == 2
    assert seen == [want]


@pytest.mark.parametrize("package", ["tqdm", "yaml", "cmaes", "sklearn.datasets"])
def test_what_is_not_installed_is_named(monkeypatch, tmp_path, package, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    message = "pip install 'hf_lopt\\[meta\\]'"
    if package == "yaml":
        with pytest.raises(ImportError, match=message):
            config.read(tmp_path / "c.yaml")
    elif package == "tqdm":
        with pytest.raises(ImportError, match=message):
            cli._bar(10, 0)
    elif package == "cmaes":
        with pytest.raises(ImportError, match=message):
            search.search(config.from_dict(SMALL | CMA | {"start": "bundled"}))
    else:
        data._digits.cache_clear()
        with pytest.raises(ImportError, match=message):
            data.digits("train")


def test_tasks():
    with pytest.raises(ValueError, match="'digits_mlp'"):
        tasks.add(tasks.named("digits_mlp"))
    with pytest.raises(ValueError, match="'mnist'.*digits_mlp"):
        tasks.named("mnist")
    with pytest.raises(ValueError, match="train, validation, test.*'all'"):
        data.split_dataset(torch.zeros(4, 1), None, "all")
    vector = theta.Vector("celo2", theta.starting_weights("celo2", "constructed"))
    with pytest.raises(ValueError, match="digits_mlp.*0"):
        arguments = (tasks.named("digits_mlp"), vector, "celo2", 0, RunSettings(), Objective())
        TaskRuns(*arguments, torch.Generator())


def test_weights_to_start_from(tmp_path):
    start = theta.starting_weights("celo2", "bundled")
    with pytest.raises(ValueError, match=r"nn/\*, w7.*ff_mod_stack/~/b0"):
        theta.Vector("celo2", start, ["nn/*", "*/b0", "w7"])
    missing = tmp_path / "weights"
    with pytest.raises(ValueError, match=f"start.*{missing}"):
        theta.starting_weights("celo2", str(missing))
    with pytest.raises(ValueError, match="elo_celo2"):
        theta.starting_weights("elo_celo2", "bundled")
    with pytest.raises(ValueError, match="'adam'"):
        theta.starting_weights("adam", "bundled")


def test_what_cannot_change_on_the_way():
    """Learned decays are numbers of the step's call; a captured step would keep the old ones."""
    particles = Particles("small_fc_lopt", {"w": (3, 2)}, 2)
    start = theta.starting_weights("small_fc_lopt", "bundled")
    weights = {name: leaf.expand(2, *leaf.shape) for name, leaf in start.items()}
    particles.set_weights(weights)
    with pytest.raises(ValueError, match="features"):
        particles.set_weights({name: leaf + 0.1 * ("decays" in name) for name, leaf in weights.items()})
