"""The guides: their code runs, their commands are ones that the scripts take, their links and pictures are there."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml


pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))

import arguments  # noqa: E402


GUIDES = (
    "memory",
    "getting_started",
    "trainer",
    "accelerate",
    "recipes",
    "weights",
    "troubleshooting",
    "from_adamw",
    "from_pylo",
)
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in GUIDES)]


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    """An empty folder, and the weights inside the package whatever a hub would say."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")])
def test_code_runs(page, somewhere):
    """All blocks of a page, one after the other in one namespace."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    space: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        exec(compile(block, page.name, "exec"), space)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_the_first_screen_is_one():
    """Up to the second heading: what it is, code that runs by itself, a picture with its numbers."""
    first = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## ")[0]
    assert len(first.splitlines()) <= 45 and first.count("```python") == 1
    assert "docs/images/held_out_loss.png" in first and "benchmarks/results/comparison.md" in first


def test_the_guides_stay_short():
    """Together, as CONTRIBUTING.md says: what is longer is a table of results, a docstring, or left out."""
    words = {page.name: len(page.read_text(encoding="utf-8").split()) for page in (ROOT / "docs").glob("*.md")}
    assert sum(words.values()) < 13_000, sorted(words.items(), key=lambda item: -item[1])[:5]


def commands():
    """Every command line of ours on the pages: in code blocks, in tables and in running text."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = re.findall(r"^(?:    )?((?:accelerate|python|torchrun|\.venv/bin/python) .*)$", text, re.MULTILINE)
        lines += re.findall(r"`((?:accelerate|python|torchrun) [^`]*)`", text)
        found += [pytest.param(line, id=f"{page.stem}-{line[:50]}") for line in lines if "recipes/" in line]
    return found


@pytest.mark.parametrize("line", commands())
def test_commands_are_ones_that_the_scripts_take(line):
    words = shlex.split(line)
    (place,) = [i for i, word in enumerate(words) if re.fullmatch(r"recipes/\w+\.py", word)]
    assert (ROOT / words[place]).is_file()
    module = importlib.import_module(Path(words[place]).stem)
    options = words[place + 1 :]
    if module.__name__ == "compare":
        args, rest = arguments.parse_known(module.Arguments, "", options, "")
        importlib.import_module(args.recipe)
        module.recipe_arguments(importlib.import_module(args.recipe), rest)
    else:
        arguments.parse(module.Arguments, "", options)
    if "--config_file" in words:
        config = yaml.safe_load((ROOT / words[words.index("--config_file") + 1]).read_text(encoding="utf-8"))
        assert config["compute_environment"] == "LOCAL_MACHINE" and config["num_processes"] >= 1


def test_links_and_pictures_are_there():
    """Of every page, those that are not guides too."""
    for page in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "benchmarks" / "results").glob("*.md"),
    ):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
