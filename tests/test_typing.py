"""What a type checker, and so an editor, knows about the optimizers."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import get_args

import pytest

import hf_lopt
from hf_lopt import LearnedOptimizer, rules, settings
from hf_lopt.optimizers import OPTIMIZERS, argument_types
from hf_lopt.rules import celo2
from hf_lopt.step.accumulators import AXIS_ORDERS, STATE_DTYPES


ROOT = Path(__file__).resolve().parents[1]
FILES = ("user.py", "misspelt.py")
every_rule = pytest.mark.parametrize("name", rules.names())


def test_every_rule_has_a_class():
    assert tuple(sorted(OPTIMIZERS)) == rules.names() == hf_lopt.available()
    public = {cls.__name__ for cls in OPTIMIZERS.values() if hasattr(hf_lopt, cls.__name__)}
    assert public == {rules.get(name).class_name for name in rules.names()}
    assert set(hf_lopt.__all__) == public | {"LearnedOptimizer", "available", "feed_loss", "param_groups"}


@every_rule
def test_signatures_have_the_defaults_of_the_rules(name):
    parameters = list(inspect.signature(OPTIMIZERS[name]).parameters.values())
    assert parameters[0].name == "params" and parameters[0].default is inspect.Parameter.empty
    assert [(p.name, p.default) for p in parameters[1:]] == list(rules.get(name).defaults.items())
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters)
    assert all(p.annotation is not inspect.Parameter.empty for p in parameters)


@every_rule
def test_docstrings_have_every_argument_and_its_default(name):
    rule = rules.get(name)
    arguments = inspect.getdoc(OPTIMIZERS[name]).split("Args:\n")[1].split("\n\n")[0]
    documented = dict(re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", arguments, re.M))
    assert list(documented) == ["params", *rule.defaults]
    for argument, default in rule.defaults.items():
        text = documented[argument]
        (found,) = re.findall(r'Default "?([^",\s]+?)"?[.,](?:\s|$)|"?([^"\s]+?)"? \(default\)', text)
        number = isinstance(default, (int, float)) and not isinstance(default, bool)
        assert (float if number else str)("".join(found)) == (default if number else str(default)), text
        assert ("per group" in text) == (argument in ("lr", "weight_decay", *rule.per_group)), text


@every_rule
def test_constructors_pass_every_argument_on(name, monkeypatch):
    passed = {}

    def record(self, params, rule, **hyperparameters):
        passed.update(hyperparameters, params=params, rule=rule)

    monkeypatch.setattr(LearnedOptimizer, "__init__", record)
    given = {argument: object() for argument in ("params", *rules.get(name).defaults)}
    OPTIMIZERS[name](**given)
    assert passed == given | {"rule": name}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lr by position
        OPTIMIZERS[name](*given.values())
    assert passed == given | {"rule": name}


def test_literals_are_what_the_checks_accept():
    assert get_args(argument_types.AxisOrder) == AXIS_ORDERS
    assert get_args(argument_types.Branch) == celo2.BRANCHES
    assert get_args(argument_types.NewtonSchulzDtype) == settings.NS_DTYPES
    assert get_args(argument_types.StateDtype) == STATE_DTYPES


@pytest.mark.slow  # half a minute, most of it for torch, until mypy has it in its cache
def test_mypy_reads_a_users_files(tmp_path):
    """``user.py`` and the code of README.md have no error, ``misspelt.py`` those that its comments name."""
    pytest.importorskip("mypy")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    readme = tmp_path / "readme.py"
    readme.write_text("\n".join(blocks), encoding="utf-8")
    assert "hf_lopt.VeLO(" in readme.read_text(encoding="utf-8")
    paths = [*(f"tests/typing/{name}" for name in FILES), str(readme)]
    command = [sys.executable, "-m", "mypy", "--config-file", "tests/typing/mypy.ini", "--strict"]
    command += ["--follow-imports=silent", "--no-error-summary", *paths]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    output = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert output.returncode < 2 and not output.stderr, output.stdout + output.stderr
    found = re.findall(r"^(.+?):(\d+): error: .*\[([\w-]+)\]$", output.stdout, re.M)
    expected = [
        (path, str(i), match[1])
        for path in paths
        for i, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1)
        if (match := re.search(r"# error: ([\w-]+)$", line))
    ]
    assert expected and sorted(found) == sorted(expected), output.stdout
