"""Stop and go on elsewhere: on more processes, and with tensors that came from another device; growing horizons."""

from __future__ import annotations

import json
import math
import pickle

import pytest
import torch

from hf_lopt.meta import search, tasks, theta
from hf_lopt.meta.runs import Objective, RunSettings, TaskRuns
from hf_lopt.meta.train import CHECKPOINT, Trainer
from ranks import run_on_ranks
from test_meta_train import SMALL, close, settings


def test_one_process_goes_on_in_two_and_back(tmp_path):
    """Steps 1 and 2 in this process, 3 and 4 in two, 5 and 6 here again: the numbers of one process throughout."""
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    alone = Trainer(settings(), tmp_path / "alone")
    alone.run()
    Trainer(settings(), tmp_path / "moved").run(until=2)
    run_on_ranks(2, "meta_training.py", tmp_path / "small.json", tmp_path / "moved", 4)
    moved = Trainer(settings(), tmp_path / "moved")
    assert moved.steps == 4
    moved.run()
    assert close(moved.search.theta(), alone.search.theta()) and close(moved.theta(), alone.theta())
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").open() if "meta_loss" in line]
        for name in ("alone", "moved")
    ]
    assert [entry["step"] for entry in logs[1]] == [1, 2, 3, 4, 5, 6]
    for ours, theirs in zip(*logs, strict=True):
        assert ours["meta_loss"] == pytest.approx(theirs["meta_loss"], abs=1e-5)


class Elsewhere(torch.Tensor):
    """Stands for a tensor on an accelerator: only ``cpu`` makes an ordinary tensor of it."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def leaves(state):
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [x for part in parts for x in leaves(part)]


@pytest.mark.parametrize("rule", ["celo2", "celo"])
def test_a_checkpoint_holds_tensors_of_the_host_only(rule, tmp_path):
    """Those of particles that are on a device are brought from there before they are written or sent."""
    trainer = Trainer(settings(rule=rule, tasks={"functions_mlp": 1}), tmp_path)
    trainer.run(until=1)
    before = trainer.search.state_dict()
    for estimator in trainer.search.estimators.values():
        particles = estimator.runs.particles
        for own in (particles.params, particles.run, *particles.state.values()):
            for key in own:
                own[key] = own[key].as_subclass(Elsewhere)
        particles.steps, particles.failed = (x.as_subclass(Elsewhere) for x in (particles.steps, particles.failed))
    assert any(type(x) is Elsewhere for x in leaves(particles.state_dict()))
    after = trainer.search.state_dict()
    assert all(type(x) is torch.Tensor for x in leaves(after))
    for a, b in zip(leaves(before), leaves(after), strict=True):
        assert torch.equal(a, b)
    trainer.best = {"theta": {"w": torch.ones(2).as_subclass(Elsewhere)}, "score": 0.0, "step": 1}
    trainer.save()
    places = set()
    torch.load(tmp_path / CHECKPOINT, weights_only=True, map_location=lambda x, place: places.add(place) or x)
    assert places == {"cpu"}


def test_a_checkpoint_from_another_device_is_read_here(monkeypatch, tmp_path):
    """Tensors that were saved as those of a GPU, which this machine need not have."""
    Trainer(settings(), tmp_path).run(until=2)
    saved = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
        torch.save(saved, tmp_path / CHECKPOINT)
    if torch.cuda.device_count() < 8:
        with pytest.raises((RuntimeError, pickle.UnpicklingError), match="(?i)cuda"):
            torch.load(tmp_path / CHECKPOINT, weights_only=True)
    resumed = Trainer(settings(), tmp_path)
    assert resumed.steps == 2 and {x.device.type for x in leaves(resumed.search.state_dict())} == {"cpu"}
    resumed.run()
    whole = Trainer(settings(), tmp_path / "whole")
    whole.run()
    assert all(torch.equal(x, whole.search.theta()[name]) for name, x in resumed.search.theta().items())


def test_nested_states_keep_their_form():
    state = {"a": [torch.ones(1).as_subclass(Elsewhere), 3], "b": (None, {"c": torch.zeros(2)}), "d": "word"}
    moved = search.on_host(state)
    assert type(moved["a"][0]) is torch.Tensor and moved["a"][1] == 3 and moved["d"] == "word"
    assert moved["b"][0] is None and torch.equal(moved["b"][1]["c"], torch.zeros(2)) and type(moved["b"]) is tuple


def runs_of(**changes) -> TaskRuns:
    vector = theta.Vector("celo2", theta.starting_weights("celo2", "constructed"))
    made = RunSettings(**{"truncation": 5, "shortest": 10, "longest": 110, "growth": 4} | changes)
    task = tasks.named("functions_mlp")
    return TaskRuns(task, vector, "celo2", 40, made, Objective(every=5), torch.Generator().manual_seed(0))


def test_horizons_grow_by_hand():
    """From 10 to 110 in four truncations: a quarter of the way with each, then no further."""
    runs = runs_of()
    limits = []
    for runs.truncations in (0, 1, 2, 3, 4, 5, 100):
        limits.append(runs._longest())
    assert limits == [10.0, 35.0, 60.0, 85.0, 110.0, 110.0, 110.0]
    assert runs_of(growth=0)._longest() == 110.0  # at once
    assert runs_of(shortest=110)._longest() == 110.0


def test_runs_are_as_long_as_they_may_be_when_they_begin():
    """Lengths are multiples of the truncation between the shortest and what is allowed then; later ones are longer."""
    runs = runs_of()
    point = runs.vector.start().expand(80, -1)
    seen: dict[int, set[int]] = {}
    for t in range(8):
        begun = runs.ended()
        runs.unroll(point)
        seen[t] = set(runs.draws.horizons[begun].tolist())
    assert seen[0] == {10} and seen[1] and seen[2]
    for t, horizons in seen.items():
        most = min(10 + 25 * t, 110)
        assert all(h % 5 == 0 and 10 <= h <= 5 * math.floor(most / 5 + 0.5) for h in horizons), (t, horizons)
    assert max(h for t in range(4, 8) for h in seen[t]) > 60 > max(seen[1])
