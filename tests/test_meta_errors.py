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
            "method must be one of pes, truncated_es, cma_es, got 'sgd'",
        ),
        ({"perturbation": {"std": 0.0}}, "perturbation.std and clip must be positive, got 0.0 and inf"),
        ({"perturbation": {"clip": -1.0}}, "perturbation.std and clip must be positive, got 0.01 and -1.0"),
        ({"outer": {"steps": 0}}, r"outer needs steps >= 1.*got 0, 0.0003"),
        ({"outer": {"lr": 0.0}}, r"outer needs .* lr > 0"),
        ({"outer": {"clip": 0.0}}, r"outer needs .* clip > 0"),
        ({"outer": {"average": 1.0}}, r"average in \[0, 1\), got .* 1.0"),
        ({"outer": {"weight_decay": -0.1}}, r"weight_decay >= 0 .*-0.1"),
        ({"selection": {"tasks": ["char_lm"]}}, "selection.tasks names char_lm, a test task"),
        ({"selection": {"tasks": ["nothing"]}}, "no task is called 'nothing'; the tasks are digits_mlp"),
        ({"rule": "elo_celo2"}, "clips the gradients of a whole model.* train celo2"),
        ({"tasks": {}}, "tasks must name at least one task and its pairs; there are digits_mlp"),
        ({"tasks": {"char_lm": 4}}, "char_lm is a test task: train on others"),
        ({"tasks": {"digits_mlp": 0}}, "tasks.digits_mlp must be a positive number of pairs, got 0"),
        ({"tasks": {"digits_mlp": 1.5}}, "tasks.digits_mlp must be of type int, got 1.5"),
        ({"perturbation": {"method": "cma_es"}}, "perturbation.method cma_es needs a mixture"),
        ({"mixture": {"m[0]": 1.0}}, "a mixture by gradients is for .*velo.*use perturbation.method cma_es"),
        (CMA | {"trained": ["*w0"]}, "trained names leaves and mixture numbers to train instead"),
        (CMA | {"units": 8}, "units are for the gradients of celo2"),
        ({"units": 8, "rule": "velo"}, "units are for the gradients of celo2"),
        (CMA | {"population": 3}, "population must be at least 4.*got 3, 2 and 0.0"),
        ({"checkpoint_every": 0}, "checkpoint_every at least 1.*got 12, 0 and 0.0"),
        (CMA | {"balance": -1.0}, "balance not negative, got 12, 2 and -1.0"),
        ({"seed": "one"}, "seed must be of type int, got 'one'"),
        ({"seed": True}, "seed must be of type int, got True"),
        ({"rule": 3}, "rule must be of type str, got 3"),
        ({"outer": {"lr": "3e-4x"}}, "outer.lr must be of type float, got '3e-4x'"),
        ({"outer": {"betas": 0.9}}, "outer.betas must be of type .*tuple.*, got 0.9"),
        ({"outer": [1, 2]}, r"outer must be a mapping of settings, got \[1, 2\]"),
        ({"runs": {"lr": [1e-3, "fast"]}}, r"runs.lr.* must be of type float, got 'fast'"),
        ({"settings": 3}, "settings must be .*got 3"),
        ({"outer": {"learning_rate": 1}}, "no setting outer.learning_rate; there are steps, lr"),
        ({"task": {}}, "no setting task; there are rule, tasks"),
        ({"objective": {"kind": "best"}}, "objective.kind must be one of mean, last, got 'best'"),
        ({"objective": {"samples": "test"}}, "objective.samples must be one of fresh, train, got 'test'"),
        ({"objective": {"every": 0}}, "objective.every and objective.batch must be positive, got 0, 2"),
        ({"objective": {"batch": 0}}, "objective.every and objective.batch must be positive, got 5, 0"),
        ({"runs": {"truncation": 0}}, "runs need 0 < truncation <= longest .* got truncation 0, shortest 100"),
        ({"runs": {"shortest": 30, "longest": 20, "truncation": 5}}, "shortest 30, longest 20"),
        ({"runs": {"loss_scale": [2.0, 1.0]}}, r"runs.loss_scale must be two positive numbers, the smaller first"),
        ({"runs": {"parameter_scale": [0.0, 1.0]}}, "runs.parameter_scale must be two positive numbers"),
    ],
)
def test_a_configuration(changes, message):
    with pytest.raises(ValueError, match=message):
        config.from_dict(SMALL | changes)


def test_what_a_configuration_lacks():
    with pytest.raises(ValueError, match="the configuration lacks rule, tasks"):
        config.from_dict({"seed": 1})
    with pytest.raises(ValueError, match="the configuration must be a mapping of settings, got 'celo2'"):
        config.from_dict("celo2")


def test_files(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "c.yaml"
    with pytest.raises(ValueError, match=r"c\.yaml cannot be read: No such file"):
        config.read(path)
    for text, message in (
        ("rule: [celo2\n", "expected ',' or ']'"),
        ("rule: celo2\n", "lacks tasks"),
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
        (["train", "--config", str(path), "--output", str(output)], "no update rule is called 'adam'"),
        (["train", "--config", str(tmp_path / "none.yaml"), "--output", str(output)], "cannot be read"),
        (["export", str(tmp_path), str(output)], "give the output folder of"),
        (["evaluate", "celo2", "--steps", "0"], "at least one step and two seeds, got 0 and 3"),
        (["evaluate", "celo2", "--seeds", "1"], "at least one step and two seeds, got 300 and 1"),
        (["evaluate", "celo2", "--tasks", "mnist"], "no task is called 'mnist'"),
        (["evaluate", "velo:floor=1"], "velo takes no setting 'floor'"),
        (["evaluate", "velo:min_param_scale=x"], "min_param_scale must be a number, got 'x'"),
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
    with pytest.raises(ValueError, match="there is a task called 'digits_mlp' already"):
        tasks.add(tasks.named("digits_mlp"))
    with pytest.raises(ValueError, match="no task is called 'mnist'; the tasks are digits_mlp"):
        tasks.named("mnist")
    with pytest.raises(ValueError, match="part must be one of train, validation, test, got 'all'"):
        data.cut(torch.zeros(4, 1), None, "all")
    vector = theta.Vector("celo2", theta.starting_weights("celo2", "constructed"))
    with pytest.raises(ValueError, match="digits_mlp needs at least one run, got 0"):
        arguments = (tasks.named("digits_mlp"), vector, "celo2", 0, RunSettings(), Objective())
        TaskRuns(*arguments, torch.Generator())


def test_weights_to_start_from(tmp_path):
    start = theta.starting_weights("celo2", "bundled")
    with pytest.raises(ValueError, match=r"no leaf of celo2 fits nn/\*, w7; the leaves are ff_mod_stack/~/b0"):
        theta.Vector("celo2", start, ["nn/*", "*/b0", "w7"])
    missing = tmp_path / "weights"
    with pytest.raises(ValueError, match=f"start must be constructed, bundled or a path that exists, got '{missing}'"):
        theta.starting_weights("celo2", str(missing))
    with pytest.raises(ValueError, match="clips the gradients of a whole model"):
        theta.starting_weights("elo_celo2", "bundled")
    with pytest.raises(ValueError, match="no update rule is called 'adam'"):
        theta.starting_weights("adam", "bundled")


def test_what_cannot_change_on_the_way():
    """Learned decays are numbers of the step's call; a captured step would keep the old ones."""
    particles = Particles("small_fc_lopt", {"w": (3, 2)}, 2)
    start = theta.starting_weights("small_fc_lopt", "bundled")
    weights = {name: leaf.expand(2, *leaf.shape) for name, leaf in start.items()}
    particles.set_weights(weights)
    with pytest.raises(ValueError, match="features of the weights cannot change between truncations"):
        particles.set_weights({name: leaf + 0.1 * ("decays" in name) for name, leaf in weights.items()})
