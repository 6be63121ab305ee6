"""What a user is told, and where: at the user's own line, in one short warning, with the rest in the log."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import hf_lopt
from hf_lopt import notices, rules
from said import said


ROOT = Path(__file__).resolve().parents[1]


def model() -> torch.nn.Module:
    return torch.nn.Linear(3, 4)


def train(optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = sum(p.square().sum() for group in optimizer.param_groups for p in group["params"])
        loss.backward()
        optimizer.step(loss=loss)  # the line of the user
    return loss


# ---- warnings -------------------------------------------------------------------------------------------------------


def test_one_short_warning_at_the_users_line_says_what_is_good_to_know(monkeypatch):
    monkeypatch.setattr("hf_lopt.weights.loading._warned", set())
    notices.discard()
    notices.note("no compiled kernels: about 10 times slower")
    with said() as texts, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = hf_lopt.VeLO(model().parameters(), num_training_steps=4)  # the line of the user
        train(optimizer, 3)
    (warning,) = caught
    text = str(warning.message)
    assert len(text) <= notices.LIMIT == 200 and "python -m hf_lopt" in text
    assert "embedded, not published weights" in text and "no compiled" in text
    source = Path(warning.filename).read_text().splitlines()[warning.lineno - 1]
    assert warning.filename == __file__ and "the line of the user" in source
    # In full: where the weights are from and why.
    assert any("NOT the published ones" in x and "sha256" in x for x in texts)


@pytest.mark.parametrize("source", ["auto", "weights"])
def test_a_habit_of_adam_is_warned_about_once_at_the_users_line(monkeypatch, source):
    """By the first step, beside what else there is to tell: until then an integration may set the lr."""
    monkeypatch.setattr("hf_lopt.weights.loading._warned", set())
    weights = "auto" if source == "auto" else rules.get("velo").load_weights("bundled")
    with said() as texts, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settings = {"num_training_steps": 4, "lr": 1e-3, "weights": weights}
        optimizer = hf_lopt.VeLO(model().parameters(), **settings)
        assert not caught
        train(optimizer, 3)
    (warning,) = caught
    assert "lr=0.001 multiplies" in str(warning.message) and len(str(warning.message)) <= notices.LIMIT
    source = Path(warning.filename).read_text().splitlines()[warning.lineno - 1]
    assert warning.filename == __file__ and "the line of the user" in source
    assert any("a pretrained model takes 0.05" in x for x in texts)


def test_what_the_first_step_finds_after_the_constructors_warning_is_only_logged(monkeypatch):
    """Here that some tensors start at zero and get a least size."""
    monkeypatch.setattr("hf_lopt.weights.loading._warned", set())
    with said() as texts, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = torch.nn.Embedding.from_pretrained(torch.zeros(8, 4), freeze=False)
        train(hf_lopt.VeLO(table.parameters(), num_training_steps=4), 3)
    (warning,) = caught
    assert "embedded" in str(warning.message)
    assert any("min_param_scale" in x for x in texts)


@pytest.mark.parametrize("length", [1, 50, 120, 400])
def test_a_telling_is_never_long(length):
    notices.discard()
    for i in range(4):
        notices.note(f"{i}" + "x" * length)
    with pytest.warns(UserWarning) as caught:
        notices.tell("first of all")
    (text,) = [str(w.message) for w in caught]
    assert len(text) <= notices.LIMIT and text.startswith("hf_lopt: first of all")
    notices.tell()  # nothing waits any more
    assert len(caught) == 1


# ---- keywords -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"wieght_decay": 0.1},
            "^VeLO takes no argument wieght_decay; did you mean weight_decay.*takes weight_decay, lr,",
        ),
        ({"maximize": False}, "^VeLO takes no argument maximize .*negate the loss.*it takes lr,"),
        ({"foreach": True}, "^VeLO takes no argument foreach .*all tensors at once"),
        ({"betas": (0.9, 0.99)}, "^VeLO takes no argument betas .*learned"),
    ],
)
def test_keywords_that_are_not_taken_are_named_with_those_that_are(keywords, message):
    for error in (TypeError, ValueError):
        with pytest.raises(error, match=message):
            hf_lopt.VeLO(model().parameters(), **keywords)
        with pytest.raises(error, match=message):
            hf_lopt.LearnedOptimizer(model().parameters(), "velo", **keywords)


def test_settings_of_other_optimizers_in_a_group_are_refused_or_told():
    """A group that was to be maximised would be minimised without a word; what cannot be seen is dropped with one."""
    with pytest.raises(ValueError, match="VeLO takes no maximize in a parameter group.*negate the loss"):
        hf_lopt.VeLO([{"params": model().parameters(), "maximize": True}], weights="bundled")
    adam = torch.optim.AdamW(model().parameters(), lr=0.5).param_groups
    with pytest.warns(UserWarning) as caught:
        hf_lopt.VeLO(adam, weights="bundled")
    assert [str(w.message) for w in caught] == ["betas, eps of a parameter group: dropped, VeLO takes no such setting"]
    assert caught[0].filename == __file__


@pytest.mark.parametrize("way", [["script.py"], ["-m", "script"], ["-m", "hf_lopt.launch", "script.py"]])
def test_the_line_of_a_script_is_named_at_its_top_level_too(tmp_path, way):
    """Where nothing calls the user's line: in a file, as a module, and under a program of this package."""
    (tmp_path / "script.py").write_text(
        "import torch, hf_lopt\np = torch.nn.Parameter(torch.ones(3))\nhf_lopt.VeLO([p], 0.5, weights='bundled')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *way], cwd=tmp_path, env=environment, capture_output=True, text=True)
    (first, line) = done.stderr.splitlines()
    assert re.match(r".*script\.py:3: UserWarning: hf_lopt: VeLO\(params, 0\.5\)", first), done.stderr
    assert line.strip() == "hf_lopt.VeLO([p], 0.5, weights='bundled')"


@pytest.mark.parametrize(
    ("cls", "lr", "meaning"),
    [
        (hf_lopt.VeLO, 0.5, "multiplies VeLO's own step, the default is lr=1.0"),
        (hf_lopt.VeLO, 1e-3, "multiplies VeLO's own step, the default is lr=1.0"),
        (hf_lopt.SmallFC, 5e-5, "multiplies SmallFC's own step, the default is lr=1.0"),
        (hf_lopt.Celo2, 1e-3, "by position"),
    ],
)
def test_lr_by_position_is_warned_about_once_and_by_name_is_not(monkeypatch, cls, lr, meaning):
    monkeypatch.setattr("hf_lopt.weights.loading._warned", set())
    notices.discard()
    with pytest.warns(UserWarning) as caught:
        optimizer = cls(model().parameters(), lr)  # with the news about embedded weights
        (warning,) = caught
        if optimizer.rule.needs_horizon:
            optimizer.num_training_steps = 9
        train(optimizer, 2)
    assert len(caught) == 1 and warning.filename == __file__ and optimizer.param_groups[0]["lr"] == lr
    text = str(warning.message)
    assert f"{cls.__name__}(params, {lr}): lr={lr} {meaning}; write lr=..." in text and len(text) <= notices.LIMIT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_lopt.VeLO(model().parameters(), lr=0.5, weights="bundled")


# ---- step(loss=...) -------------------------------------------------------------------------------------------------


def test_a_loss_by_name_is_a_loss():
    optimizers = [
        hf_lopt.VeLO(copy.parameters(), num_training_steps=9, weights="bundled") for copy in (model(), model())
    ]
    with torch.no_grad():
        for p, q in zip(*(o.param_groups[0]["params"] for o in optimizers), strict=True):
            q.copy_(p)
    for t in range(3):
        for optimizer, by_name in zip(optimizers, (True, False), strict=True):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.full_like(p, 0.1 * (t + 1))
            loss = torch.tensor(2.0 / (t + 1))
            # A function is called, and its loss gives way.
            result = optimizer.step(lambda: 5.0, loss=loss) if by_name else optimizer.step(loss)
            assert result is loss
    for p, q in zip(*(o.param_groups[0]["params"] for o in optimizers), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(ValueError, match="two losses"):
        optimizers[0].step(1.0, loss=1.0)


def test_accelerate_and_gradient_scalers_pass_a_loss_by_name_on():
    accelerate = pytest.importorskip("accelerate")
    optimizer = hf_lopt.VeLO(model().parameters(), num_training_steps=9, weights="bundled")
    prepared = accelerate.Accelerator(cpu=True).prepare(optimizer)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    prepared.step(loss=torch.tensor(2.0))
    assert optimizer.steps_done == 1
    plain = accelerate.Accelerator(cpu=True).prepare(torch.optim.SGD(model().parameters(), lr=0.1))
    with pytest.raises(TypeError, match="loss"):
        plain.step(loss=1.0)


# ---- repr and schedulers --------------------------------------------------------------------------------------------


def test_repr_shows_what_was_set_and_the_run_in_one_line():
    layer = model()
    groups = [{"params": [layer.weight], "weight_decay": 0.1}, {"params": [layer.bias]}]
    optimizer = hf_lopt.VeLO(groups, lr=0.5, num_training_steps=7, weights="bundled")
    train(optimizer, 2)
    short = optimizer.weights.sha256[:12]
    assert repr(optimizer).splitlines() == [
        "VeLO(weights='bundled:velo', lr=0.5, num_training_steps=7)",
        "  group 0: 1 tensor, 12 parameters, lr=0.5, weight_decay=0.1",
        "  group 1: 1 tensor, 4 parameters, lr=0.5",
        f"  run: step 2 of 7, 0 skipped, weights bundled:velo@{short}",
    ]
    assert optimizer.weights.sha256 not in repr(optimizer) and "tensor([" not in repr(optimizer.weights)


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_a_scheduler_that_cycles_momenta_is_told_which_argument_to_pass(name):
    optimizer = hf_lopt.VeLO(model().parameters(), num_training_steps=7, weights="bundled")
    arguments = {"OneCycleLR": {"max_lr": 1.0, "total_steps": 7}, "CyclicLR": {"base_lr": 0.1, "max_lr": 1.0}}[name]
    scheduler = getattr(torch.optim.lr_scheduler, name)
    with pytest.raises(ValueError, match=f"VeLO has no momentum.*cycle_momentum=False to {name}"):
        scheduler(optimizer, **arguments)
    scheduler(optimizer, **arguments, cycle_momentum=False)
    with pytest.raises(ValueError, match="momentum") as error:  # other optimizers keep torch's words
        scheduler(torch.optim.Adagrad(model().parameters()), **arguments)
    assert "hf_lopt" not in str(error.value) and "VeLO" not in str(error.value)


# ---- kernels that are missing ---------------------------------------------------------------------------------------


def test_missing_kernels_are_told_with_the_first_step_and_python_m_hf_lopt_has_the_command():
    code = """
import sys, warnings
sys.modules["hf_lopt._C"] = None
import torch, hf_lopt
from hf_lopt.__main__ import main
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    hf_lopt.Celo2([p], weights="bundled").step()
print(*[f"{len(str(w.message))} {w.message}" for w in caught], sep=chr(10))
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    first = done.stdout.splitlines()[0]
    assert "about 10 times slower" in first and "python -m hf_lopt" in first and int(first.split()[0]) <= 200
    assert not done.stderr
    (line,) = [x for x in done.stdout.splitlines() if x.strip().startswith("hf_lopt._C ")]
    assert "Install a C++17 compiler, then: " in line
