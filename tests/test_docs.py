"""The documentation says what the code does.

What stands between the markers of a page is what docs/generate.py writes, every name is there, and the examples run.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from hf_lopt import available, features, rules


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import formulas  # noqa: E402
import generate  # noqa: E402


PAGES = ("features.md", "optimizers.md")


def test_pages_are_up_to_date():
    for path, text in generate.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python docs/generate.py"


def test_every_block_is_on_a_page_and_every_rule_in_a_section():
    text = "".join(page.read_text(encoding="utf-8") for page in generate.pages())
    for name in generate.BLOCKS:
        assert text.count(f"<!--generate.py:{name}-->") == 1, name
    sections = [name for section in generate.SECTIONS for name in section.rules]
    assert sorted([*sections, *generate.WITHOUT_FEATURES]) == sorted(rules.names())
    assert sorted(formulas.STEPS) == sorted(rules.names())


def test_every_rule_has_a_heading_on_the_page_of_optimizers():
    text = (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")
    headings = " ".join(re.findall(r"^### (.*)$", text, re.MULTILINE))
    for name in available():
        assert f"`{name}`" in headings, name


def test_every_feature_is_described_and_none_is_idle():
    lists = [x for x in vars(features).values() if isinstance(x, features.ElementFeatures)]
    names = {name for x in lists for name in x.names}
    assert names == set(features.FEATURES) == set(formulas.ELEMENT)


@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page: str):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})
