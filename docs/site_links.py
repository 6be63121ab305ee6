"""A hook of mkdocs: what pages link outside of docs/ is in the repository, and pictures of benchmarks/ come along.

On GitHub the same relative links work as they stand. Here a link to ../benchmarks/results/cpu.md becomes one to the
repository, and a picture there is copied into the site. A target that does not exist is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files


ROOT = Path(__file__).resolve().parents[1]
# Roles of other tools in docstrings, such as :func:`name`.
ROLE = re.compile(r":(?:attr|class|func|meth|mod):(?=<code>)")
OUTSIDE = re.compile(r"(!?\[[^\]]*\]\()\.\./([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures that pages show from outside of docs/."""
    for page in sorted((ROOT / "docs").glob("*.md")):
        for start, target in OUTSIDE.findall(page.read_text(encoding="utf-8")):
            if start.startswith("!") and files.get_file_from_path(target) is None:
                files.append(File(target, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links that leave docs/ to the repository."""

    def moved(match: re.Match) -> str:
        start, target = match.groups()
        path = ROOT / target
        if not path.exists():
            raise PluginError(f"{page.file.src_path}: no {target} in the repository")
        if start.startswith("!"):
            return start + target
        return f"{start}{config.repo_url}/{'tree' if path.is_dir() else 'blob'}/main/{target}"

    return OUTSIDE.sub(moved, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Leave the roles of names in docstrings out."""
    return ROLE.sub("", html)
