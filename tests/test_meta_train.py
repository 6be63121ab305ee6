"""Meta-training as a whole: it learns, stops and goes on, splits over processes, and says what is wrong."""

import json
import math
import os
import signal

import pytest
import torch
from torch import nn

from hf_lopt import LearnedOptimizer, weights
from hf_lopt.meta import cli, config, evaluate, export, mixtures, search, tasks, theta
from hf_lopt.meta.runs import Objective, RunSettings, TaskRuns
from hf_lopt.meta.train import CHECKPOINT, Trainer
from ranks import run_on_ranks


SMALL = {
    "rule": "celo2",
    "tasks": {"functions_mlp": 3, "regions_mlp": 2},
    "runs": {"truncation": 5, "shortest": 10, "longest": 20, "loss_scale": [0.1, 10.0], "parameter_scale": [0.5, 2.0]},
    "outer": {"steps": 6, "lr": 1e-3},
    "selection": {"every": 3, "tasks": ["functions_wide"], "seeds": 2, "steps": 10, "lr": [3e-3]},
    "checkpoint_every": 2,
}


def settings(**changes):
    return config.from_dict(SMALL | changes)


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a | b)


def close(a, b):
    """Equal but for what another process may round differently."""
    return all(torch.allclose(a[name], b[name], rtol=0, atol=1e-5) for name in a | b)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rule": "celo", "tasks": {"functions_mlp": 1}},
        {"perturbation": {"method": "cma_es", "std": 0.2}, "mixture": {"m[0]": 1.0, "g[0]": 0.5}, "population": 4},
        {"rule": "small_fc_lopt", "units": 8, "runs": SMALL["runs"] | {"lr": [1.0, 1.0]}},
    ],
    ids=["pes", "pes of a rule with a scheduler", "cma_es", "pes of a smaller network"],
)
def test_resumed_is_the_same_bit_by_bit(changes, tmp_path):
    whole = Trainer(settings(**changes), tmp_path / "whole")
    whole.run()
    Trainer(settings(**changes), tmp_path / "parts").run(until=3)
    parts = Trainer(settings(**changes), tmp_path / "parts")
    assert parts.steps == 3
    parts.run()
    assert parts.steps == whole.steps == 6
    assert same(parts.search.theta(), whole.search.theta()) and same(parts.theta(), whole.theta())
    logs = [
        [{k: v for k, v in json.loads(line).items() if "per_second" not in k} for line in path.open()]
        for path in (tmp_path / "whole/log.jsonl", tmp_path / "parts/log.jsonl")
    ]
    assert logs[0] == logs[1] and [entry["step"] for entry in logs[0] if "meta_loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert not same(whole.search.theta(), theta.starting_weights(whole.config.rule, "constructed"))


def test_two_processes_are_one(tmp_path):
    """Each takes one of the two tasks; the checkpoint goes on in one process, to the same weights."""
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    run_on_ranks(2, "meta_training.py", tmp_path / "small.json", tmp_path / "ranks", 4)
    alone = Trainer(settings(), tmp_path / "alone")
    alone.run(until=4)
    joined = Trainer(settings(), tmp_path / "ranks")
    assert joined.steps == 4 and close(joined.search.theta(), alone.search.theta())
    assert (
        joined.search.theta()["ff_mod_stack/~/w1"] - alone.search.vector.theta["ff_mod_stack/~/w1"]
    ).abs().max() > 1e-3
    for trainer in (joined, alone):
        trainer.run()
    assert close(joined.search.theta(), alone.search.theta()) and close(joined.theta(), alone.theta())


def test_a_signal_stops_after_the_step(tmp_path):
    trainer = Trainer(settings(), tmp_path)
    trainer.run(report=lambda metrics: os.kill(os.getpid(), signal.SIGTERM) if trainer.steps == 2 else None)
    assert trainer.steps == 2 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert Trainer(settings(), tmp_path).steps == 2


def test_command_line_and_export(tmp_path, capsys):
    """train, export, and an optimizer that takes the folder; the provenance names configuration and start."""
    yaml = pytest.importorskip("yaml")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    arguments = ["train", "--config", str(tmp_path / "small.yaml"), "--output", str(tmp_path / "run")]
    assert cli.main([*arguments, "--until", "2"]) == 0
    assert "4 outer steps are left" in capsys.readouterr().out
    assert cli.main(arguments) == 0
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "weights")]) == 0
    record = json.loads((tmp_path / "weights" / export.PROVENANCE).read_text())
    trainer = Trainer(settings(), tmp_path / "run")
    assert record["origin"] == "meta-trained" and record["sha256"] == weights.content_sha256(trainer.theta())
    assert config.from_dict(record["config"]) == trainer.config and record["outer_step"] == trainer.best["step"]
    assert record["start_sha256"] == weights.content_sha256(theta.starting_weights("celo2", "constructed"))

    model = nn.Linear(4, 3)
    optimizer = LearnedOptimizer(model.parameters(), "celo2", weights=str(tmp_path / "weights"))
    assert same(optimizer.weights.theta, trainer.theta())
    before = model.weight.detach().clone()
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)

    assert cli.main(["export", str(tmp_path), str(tmp_path / "other")]) == 2
    assert "output folder" in capsys.readouterr().err


def test_evaluate_prints_and_writes_a_table(tmp_path, capsys):
    arguments = ["evaluate", "celo2", "--tasks", "functions_wide", "--steps", "10", "--seeds", "2"]
    assert cli.main([*arguments, "--output", str(tmp_path / "table")]) == 0
    record = json.loads((tmp_path / "table.json").read_text())
    assert set(record["results"]) == {"functions_wide"} and record["machine"]["torch"] == torch.__version__
    assert (tmp_path / "table.md").read_text() == capsys.readouterr().out
    for wrong, message in (
        ("celo3", "celo2"),
        ("velo:min_param_scale=x", "number"),
        ("velo:floor=1", "min_param_scale"),
    ):
        assert cli.main(["evaluate", wrong, "--tasks", "functions_wide", "--steps", "1", "--seeds", "2"]) == 2
        assert message in capsys.readouterr().err


def test_a_bad_start_gets_better(tmp_path):
    """From weights that follow the parameter rather than the gradient, a short training lowers the loss elsewhere."""
    start = theta.starting_weights("celo2", "constructed")
    bad = mixtures.mixture_leaves("celo2", start, {"p[0]": 1.0, "m_rsqrt_v[0]": 0.15})
    weights.save(bad, tmp_path, rule="celo2")
    trained = search.GradientSearch(
        config.from_dict(
            {
                "rule": "celo2",
                "start": str(tmp_path),
                "tasks": {"functions_mlp": 24, "regions_mlp": 24},
                "runs": {"truncation": 20, "shortest": 20, "longest": 60, "lr": [3e-3, 1e-2]},
                "objective": {"every": 4},
                "perturbation": {"std": 0.03},
                "outer": {"steps": 40, "lr": 1e-2, "average": 0.8},
            }
        )
    )
    for _ in range(trained.config.outer.steps):
        trained.step()
    for name in ("functions_wide", "regions_deep"):
        after, before = (
            evaluate.learned(tasks.named(name), "celo2", weights, 60, 6, 3e-3).final
            for weights in (trained.theta(), bad)
        )
        assert evaluate.paired(after, before).interval()[1] < 1.0, name


def test_cma_es_improves_a_mixture():
    """From a mixture that mostly follows the second moment, to one that follows the gradient."""
    made = config.from_dict(
        {
            "rule": "celo2_base",
            "tasks": {"functions_mlp": 2},
            "runs": {"truncation": 40, "shortest": 40, "longest": 40, "lr": [1e-2, 1e-2]},
            "objective": {"kind": "last", "batch": 4},
            "perturbation": {"method": "cma_es", "std": 0.5},
            "mixture": {"rsqrt_v[0]": 1.0, "m_rsqrt_v[0]": 0.1},
            "population": 8,
            "outer": {"steps": 8},
        }
    )
    found = search.MixtureSearch(made)
    values = [found.step()["meta_loss"] for _ in range(8)]
    assert values[-1] < values[0] - 0.2
    task = tasks.named("functions_wide")
    before, after = (
        evaluate.learned(task, "celo2_base", weights, 40, 4, 1e-2).final
        for weights in (mixtures.mixture_leaves("celo2_base", found.start, made.mixture), found.theta())
    )
    assert evaluate.paired(after, before).interval()[1] < 0.9


def test_mixtures_name_what_there_is_not():
    start = theta.starting_weights("celo2", "constructed")
    with pytest.raises(ValueError, match="celo2.*power"):
        mixtures.mixture_leaves("celo2", start, {"m[0]": 1.0, "power": 0.5})
    with pytest.raises(ValueError, match=r"'feature\[column\]'"):
        mixtures.mixture_leaves("celo2", start, {"m": 1.0})
    moved = theta.starting_weights("small_fc_lopt", "constructed")
    moved["nn/~/w2"][4, 1] *= 1.5
    with pytest.raises(ValueError, match="constructed"):
        mixtures.mixture_leaves("small_fc_lopt", moved, {"m[0]": 1.0, "power": 0.5})


def test_mixture_leaves_add_features_up():
    leaves = mixtures.mixture_leaves(
        "celo2", theta.starting_weights("celo2", "constructed"), {"g[0]": 2.0, "m[1]": -0.5}
    )
    x = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    h = x
    for layer in range(3):
        w = (
            torch.cat([leaves[f"ff_mod_stack/~/w0__{k}"] for k in range(14)])
            if not layer
            else leaves[f"ff_mod_stack/~/w{layer}"]
        )
        h = h @ w + leaves[f"ff_mod_stack/~/b{layer}"]
        h = h.relu() if layer < 2 else h
    torch.testing.assert_close(h[:, 0], 2.0 * x[:, 0] - 0.5 * x[:, 4])


CONSTRUCTED = {"fac_m[0]": 1.0, "fac_g[0]": 0.3}


def network(leaves, x):
    """Outputs of small_fc's network, in float64."""
    for layer in range(3):
        x = x @ leaves[f"nn/~/w{layer}"].double() + leaves[f"nn/~/b{layer}"].double()
        x = x.relu() if layer < 2 else x
    return x


def inputs(steps):
    """Features of small_fc: random ones, and the functions of the step count."""
    x = torch.randn(len(steps), 28, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tau = torch.tensor([1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5], dtype=torch.float64)
    return torch.cat([x, torch.tanh(steps.unsqueeze(1) / tau - 1.0)], 1)


def test_a_mixture_starts_from_the_constructed_weights():
    """The numbers of the constructed weights give them back, but for the grid that their fit is rounded to."""
    for rule in ("small_fc_lopt", "mulo"):
        start = theta.starting_weights(rule, "constructed")
        leaves = mixtures.mixture_leaves(rule, start, CONSTRUCTED | mixtures.SCHEDULE)
        for name, leaf in start.items():
            torch.testing.assert_close(leaves[name], leaf, rtol=0.0, atol=2.0**-16)
        # Without numbers for it the schedule is not touched.
        assert same(mixtures.mixture_leaves(rule, start, CONSTRUCTED), start)


def test_a_mixture_has_the_schedule_that_it_names():
    """Against the formula, at steps that the fit has not seen; the scale multiplies the direction."""
    start = theta.starting_weights("small_fc_lopt", "constructed")
    numbers = {"log_scale": 0.4, "log_warmup": -0.7, "log_decay": -0.5, "power": 0.8}
    leaves = mixtures.mixture_leaves("small_fc_lopt", start, {"m[1]": 0.5, "p[0]": -0.2, **numbers})
    steps = torch.tensor([25.0, 70.0, 111.0, 222.0, 444.0, 888.0, 5555.0], dtype=torch.float64)
    x = inputs(steps)
    out = network(leaves, x)
    mixed, newest = 0.5 * x[:, 3] - 0.2 * x[:, 1], 1.3 * x[:, 10]
    agreed = torch.where(mixed * newest > 0, torch.minimum(mixed.abs(), newest.abs()), 0.0) * mixed.sign()
    assert 0 < agreed.count_nonzero() < len(steps)
    torch.testing.assert_close(out[:, 0], 4.0 * math.exp(0.4) * agreed, rtol=1e-5, atol=1e-6)
    wanted = (1.0 + steps / (300.0 * math.exp(-0.5))) ** -0.8
    torch.testing.assert_close(torch.exp(0.001 * out[:, 1]), wanted, rtol=0.06, atol=0.0)
    slow = mixtures.mixture_leaves("small_fc_lopt", start, {**CONSTRUCTED, "power": 0.1})
    assert (torch.exp(0.001 * network(slow, x)[:, 1]) > 0.7).all()


@pytest.mark.parametrize(("rule", "lr"), [("small_fc_lopt", 1.0), ("celo2", 3e-3)])
def test_networks_of_other_widths_are_the_same_functions(rule, lr):
    """One short run with each. Units in use are never cut; spare ones have a gradient."""
    start, prefix = theta.starting_weights(rule, "constructed"), mixtures.MIXTURES[rule][1]
    few, many = (8, 32) if rule == "small_fc_lopt" else (4, 8)
    narrow = mixtures.narrowed(rule, start)
    wide = mixtures.with_spare_units(rule, start, many, torch.Generator().manual_seed(0))
    for leaves, units in ((narrow, few), (wide, many)):
        shapes = [leaves[f"{prefix}{name}"].shape for name in ("b0", "w1", "b1")]
        assert shapes == [(units,), (units, units), (units,)] and len(leaves[f"{prefix}w2"]) == units
    run = [
        evaluate.learned(tasks.named("functions_mlp"), rule, leaves, 20, 2, lr).final
        for leaves in (start, narrow, wide)
    ]
    torch.testing.assert_close(run[0], run[1], rtol=1e-4, atol=0.0)
    torch.testing.assert_close(run[0], run[2], rtol=1e-4, atol=0.0)
    assert not wide[f"{prefix}w1"][few:, :2].any() and not wide[f"{prefix}w2"][few:].any()
    assert wide[f"{prefix}w1"][:, few:].all()
    used = {name: leaf.clone() for name, leaf in start.items()}
    used[f"{prefix}b0"][-1] = 1.0
    used[f"{prefix}w1"][-1, 0] = 0.1
    assert same(mixtures.narrowed(rule, used), used)
    if rule == "small_fc_lopt":
        with pytest.raises(ValueError, match="8.*32"):
            mixtures.with_spare_units(rule, used, 8, torch.Generator())


def test_lengths_of_a_generation_are_spread():
    """Each task has the place in a stratum of its own, anew in every generation; resumed searches draw the same."""
    made = {
        "rule": "small_fc_lopt",
        "tasks": {"functions_mlp": 2, "digits_mlp": 1, "regions_mlp": 1, "autoencoder": 1},
        "runs": {"truncation": 10, "shortest": 10, "longest": 160, "lr": [1.0, 1.0]},
        "perturbation": {"method": "cma_es", "std": 0.1},
        "mixture": CONSTRUCTED | {"log_scale": 0.0},
        "population": 4,
    }
    found = search.MixtureSearch(config.from_dict(made))
    seen = []
    for found.steps in range(40):
        seen.append(found._lengths())
        # Rounding may bring a length onto the border between two.
        assert all(10 * 2**k <= x <= 20 * 2**k for k, x in enumerate(sorted(seen[-1]))), seen[-1]
    assert all(len({row[i] for row in seen}) > 20 for i in range(4))
    found.steps = 0
    assert found.steps_per_call == 4 * 5 * 160
    found.step()
    assert found.steps_per_call == 4 * (2 * seen[0][0] + sum(seen[0][1:]))


def test_vector_is_the_part_that_the_rule_uses():
    start = theta.starting_weights("celo2", "constructed")
    vector = theta.Vector("celo2", start)
    assert len(vector.start()) == 329 and same(vector.leaves(vector.start()), start)
    assert len(theta.Vector("small_fc_lopt", theta.starting_weights("small_fc_lopt", "bundled")).start()) == 2402
    moved = vector.leaves(torch.stack([vector.start(), vector.start() + 1.0]))
    last = moved["ff_mod_stack/~/w2"]
    assert torch.equal(last[0], start["ff_mod_stack/~/w2"]) and torch.equal(last[1, :, 1:], last[0, :, 1:])
    assert torch.equal(last[1, :, 0], last[0, :, 0] + 1.0)
    assert len(theta.Vector("celo2", start, ["*/b?"]).start()) == 8 + 8 + 1
    with pytest.raises(ValueError, match="celo2.*nn"):
        theta.Vector("celo2", start, ["nn/*"])


def test_starts_are_staggered_and_copies_alike():
    vector = theta.Vector("celo2", theta.starting_weights("celo2", "constructed"))
    runs = TaskRuns(
        tasks.named("functions_mlp"), vector, "celo2", 20, RunSettings(truncation=2, shortest=10, longest=40),
        Objective(every=1), torch.Generator().manual_seed(0),
    )  # fmt: skip
    point = vector.start().expand(40, -1)
    losses = runs.unroll(point)
    assert torch.equal(losses[:20], losses[20:]) and (runs.draws.horizons % 2 == 0).all()
    assert runs.draws.horizons.min() >= 10 and runs.draws.horizons.max() <= 40 and (losses < 0.3).all()
    assert len(set(runs.draws.ends.tolist())) > 5 and (runs.draws.ends <= runs.draws.horizons).all()
    for _ in range(20):
        runs.unroll(point)
    assert (runs.draws.ends == runs.draws.horizons).all()
    assert len(set(runs.particles.steps.tolist())) > 5
    assert torch.equal(runs.particles.steps[:20], runs.particles.steps[20:])


def test_the_objective_is_the_log_of_the_relative_loss():
    """By hand: one run of two steps whose losses are known from the model itself."""
    vector = theta.Vector("celo2", theta.starting_weights("celo2", "constructed"))
    task, found = tasks.named("functions_mlp"), {}
    for kind in ("mean", "last"):
        runs = TaskRuns(
            task, vector, "celo2", 1, RunSettings(truncation=2, shortest=2, longest=2),
            Objective(kind, every=1), torch.Generator().manual_seed(0),
        )  # fmt: skip
        seen = []
        fresh = runs._fresh_losses
        runs._fresh_losses = lambda fresh=fresh, seen=seen: seen.append(fresh()) or seen[-1]
        found[kind] = runs.unroll(vector.start().expand(2, -1))[0].item(), [x[0].item() for x in seen]
    value, (first, *later) = found["mean"]
    assert value == pytest.approx(sum(math.log(x / first) for x in later) / 2, abs=1e-6)
    value, (first, last) = found["last"]
    assert value == pytest.approx(math.log(last / first), abs=1e-6)


def test_paired_comparisons():
    ours, theirs = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2.0, 2.0, 8.0])
    comparison = evaluate.paired(ours, theirs)
    assert comparison.mean == pytest.approx(-2 * math.log(2) / 3)
    assert comparison.error == pytest.approx(math.log(2) / math.sqrt(3) / math.sqrt(3))
    assert evaluate.paired(torch.tensor([math.inf, 1.0]), torch.ones(2)).mean == pytest.approx(math.log(1e3) / 2)
    assert evaluate.over_tasks([comparison] * 3).error == pytest.approx(0.0)


def test_adamw_of_all_seeds_is_adamw_of_each():
    task = tasks.named("functions_wide")
    curves = evaluate.adamw(task, 5, 2, 1e-2, looks=5)
    assert curves.steps.tolist() == [1, 2, 3, 4, 5] and curves.losses.shape == (2, 5)
    generator = search.seeded("evaluation", task.name)
    start, samples = task.start(2, generator), task.samples()
    fresh = [samples.batch(2, task.batch, generator, fresh=True) for _ in range(evaluate.FRESH_BATCHES)]
    batches = [samples.batch(2, task.batch, generator) for _ in range(5)]
    params = {name: nn.Parameter(p[1:].clone()) for name, p in start.items()}
    optimizer = torch.optim.AdamW(params.values())
    for t, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (t + 1) / 0.25) * 0.5 * (1 + math.cos(math.pi * t / 5))
        optimizer.zero_grad()
        task.losses(params, tuple(x[1:] for x in batch)).sum().backward()
        optimizer.step()
    losses = [task.losses(params, tuple(x[1:] for x in batch)) for batch in fresh]
    torch.testing.assert_close(torch.stack(losses).mean(), curves.final[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "adam"}, "'adam'"),
        ({"runs": {"lr": [1.0]}}, "runs.lr"),
        ({"start": "nowhere"}, "start must be"),
        ({"trained": ["nn/*"]}, "no leaf"),
        ({"units": 16}, "16.*2.*4, 8, 32"),
    ],
)
def test_mistakes_beyond_the_configuration_are_named(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Trainer(settings(**changes), tmp_path)


def test_a_folder_belongs_to_one_configuration(tmp_path):
    Trainer(settings(), tmp_path).run(until=1)
    with pytest.raises(ValueError, match="outer"):
        Trainer(settings(outer={"steps": 7}), tmp_path)
    assert (tmp_path / CHECKPOINT).is_file() and not list(tmp_path.glob(".*"))
    saved = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    del saved["config"]["units"]  # as before there was this setting
    torch.save(saved, tmp_path / CHECKPOINT)
    assert Trainer(settings(), tmp_path).steps == 1


def test_yaml_without_a_point_is_a_number(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "c.yaml"
    path.write_text("rule: celo2\ntasks: {digits_mlp: 2}\nouter: {lr: 3e-4}\nperturbation: {clip: inf}\n")
    made = config.read(path)
    assert made.outer.lr == 3e-4 and made.perturbation.clip == math.inf
    path.write_text("rule: [celo2\n")
    with pytest.raises(ValueError, match=r"c\.yaml"):
        config.read(path)
    with pytest.raises(ValueError, match=r"none\.yaml"):
        config.read(tmp_path / "none.yaml")
