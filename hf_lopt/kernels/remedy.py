"""The command that installs this package again, with compiled kernels."""

from __future__ import annotations

import json
import shlex
import sys
from importlib import metadata
from pathlib import Path


_FOLDER = Path(__file__).resolve().parents[2]


def _installed() -> metadata.Distribution | None:
    """The installation that this very package is of; None for sources that are merely on Python's path."""
    for found in metadata.distributions(name="hf_lopt"):
        location = _editable_folder(found) or Path(str(found.locate_file("")))
        if location.resolve() == _FOLDER:
            return found
    return None


def _direct_url(found: metadata.Distribution) -> dict[str, object]:
    text = found.read_text("direct_url.json")
    return dict(json.loads(text)) if text else {}


def _editable_folder(found: metadata.Distribution) -> Path | None:
    url = _direct_url(found)
    info = url.get("dir_info")
    return _path(str(url["url"])) if isinstance(info, dict) and info.get("editable") else None


def _path(url: str) -> Path:
    from urllib.parse import urlparse
    from urllib.request import url2pathname

    return Path(url2pathname(urlparse(url).path))


def _source(found: metadata.Distribution) -> list[str]:
    """What pip is to install, from where it was installed before. From an index: the sources of the same version."""
    url = _direct_url(found)
    address, repository = str(url.get("url", "")), url.get("vcs_info")
    if isinstance(repository, dict):
        return [f"{repository['vcs']}+{address}@{repository['commit_id']}"]
    if address.startswith("file:"):
        path = _path(address)
        if path.exists() and path.suffix != ".whl":
            return [str(path)]
    elif address and not address.endswith(".whl"):
        return [address]
    return ["--no-binary", "hf_lopt", f"hf_lopt=={found.version}"]


def command() -> str:
    """A line for the shell. pip keeps wheels that it has built; ``--no-cache-dir`` has it build anew."""
    found, pip = _installed(), [sys.executable, "-m", "pip", "install"]
    if found is not None and (folder := _editable_folder(found)):
        return shlex.join([*pip, "--no-deps", "-e", str(folder)])
    if (_FOLDER / "setup.py").is_file():  # sources on Python's path, perhaps with metadata that a build left
        return f"cd {shlex.quote(str(_FOLDER))} && {shlex.quote(sys.executable)} setup.py build_ext --inplace"
    if found is None:  # copied by hand: nothing to compile
        return shlex.join([*pip, "--no-cache-dir", "hf_lopt"])
    return shlex.join([*pip, "--no-deps", "--no-cache-dir", "--force-reinstall", *_source(found)])
