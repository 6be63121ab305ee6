"""The example of docs/meta_training.md runs, and its commands are ones that the programs take."""

import re
from pathlib import Path

import pytest
import torch

from hf_lopt.meta import cli, config, tasks


ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "meta_training.md"
RESULTS = ROOT / "benchmarks" / "results" / "meta_budgets.md"


def test_the_example_trains(tmp_path, monkeypatch, capsys):
    text = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- example: run by tests/test_meta_docs.py -->\n\n```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 36
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    names: dict = {}
    exec(compile(code, str(PAGE), "exec"), names)
    assert (tmp_path / "spirals_weights").is_dir() and len(capsys.readouterr().out.splitlines()) == 11
    theta = names["optimizer"].weights.theta
    assert all(torch.equal(theta[key], leaf) for key, leaf in names["found"].theta().items())
    with pytest.raises(ValueError, match="spirals_train"):
        tasks.add(tasks.named("spirals_train"))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "meta").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_valid(path):
    pytest.importorskip("yaml")
    assert config.read(path).outer.steps > 0


def test_commands_parse():
    text = (PAGE.read_text(encoding="utf-8") + RESULTS.read_text(encoding="utf-8")).replace("\\\n", " ")
    lines = re.findall(r"^ *python -m hf_lopt\.meta (.*?)(?: +#.*)?$", text, re.MULTILINE)
    lines += re.findall(r"`python -m hf_lopt\.meta ([^`]*)`", text)
    assert lines
    for line in lines:
        args = cli._parser().parse_args(line.split())
        assert not hasattr(args, "config") or (ROOT / args.config).is_file(), line


def test_modules_of_benchmarks_exist():
    for name in re.findall(r"python -m benchmarks\.(\w+)", RESULTS.read_text(encoding="utf-8")):
        assert (ROOT / "benchmarks" / f"{name}.py").is_file(), name
