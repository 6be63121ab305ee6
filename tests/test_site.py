"""`make docs`: the site builds without a warning, its links lead somewhere, and the API has every public argument."""

from __future__ import annotations

import html
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_lopt


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-3000:]
    return folder


def text(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", " ", page.read_text(encoding="utf-8")))


def test_every_page_is_in_the_site(site):
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / ("index.html" if page.stem == "index" else f"{page.stem}/index.html")).is_file(), page.name


def test_the_api_has_every_public_class_with_its_arguments(site):
    page = (site / "api" / "index.html").read_text(encoding="utf-8")
    shown = text(site / "api" / "index.html")
    for name in hf_lopt.__all__:
        value = getattr(hf_lopt, name)
        assert re.search(rf'id="hf_lopt[\w.]*\.{name}"', page), name
        for argument in inspect.signature(value).parameters:
            assert re.search(rf"\b{argument}\b", shown), (name, argument)
    assert not re.search(r":(func|class|mod|meth):", shown)


def test_links_and_pictures_lead_somewhere(site):
    """Those inside the site; a link out of docs/ leads to a file of the repository, which the build has looked for."""
    for page in site.rglob("index.html"):
        for target in re.findall(r'(?:href|src)="(?![a-z]+:|#|/)([^"#?]+)', page.read_text(encoding="utf-8")):
            place = (page.parent / html.unescape(target)).resolve()
            assert place.is_file() or (place / "index.html").is_file(), f"{page.parent.name}: {target}"
