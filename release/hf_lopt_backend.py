"""The build backend (PEP 517): setuptools', which also asks for torch where there is none to build with.

The kernels are compiled with torch's headers. pip hides the packages of the environment from an isolated build, but
not the environment, and a torch that lies there serves: nothing is downloaded twice. Elsewhere, as under
``python -m build`` in an environment without torch, the isolated build gets one; hf_lopt depends on it anyway.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import sysconfig
from pathlib import Path
from typing import Any


_SETUPTOOLS = 77  # the first that knows licence expressions (PEP 639)
TORCH = (2, 10)  # the oldest that the compiled files run with


def _check_setuptools() -> None:
    """Without build isolation nobody has seen to the build requirements."""
    try:
        import setuptools
    except ImportError:
        found = "it is not installed"
    else:
        if int(setuptools.__version__.split(".")[0]) >= _SETUPTOOLS:
            return
        found = f"this is {setuptools.__version__}"
    raise SystemExit(
        f"error: hf_lopt is built with setuptools >= {_SETUPTOOLS}, and {found}. Leave --no-build-isolation out, or "
        f"first run: {sys.executable} -m pip install 'setuptools>={_SETUPTOOLS}'"
    )


_check_setuptools()

from setuptools import build_meta  # noqa: E402
from setuptools.build_meta import *  # noqa: E402, F403


def wants_kernels() -> bool:
    """Whether kernels are to be compiled: everywhere but on Windows, unless HF_LOPT_BUILD=0 says otherwise."""
    return os.environ.get("HF_LOPT_BUILD") != "0" and sys.platform != "win32"


def find_torch() -> Path | None:
    """The folder of an installed torch that is new enough; also that of the environment around an isolated build."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    purelib, platlib = sysconfig.get_path("purelib"), sysconfig.get_path("platlib")
    roots = [purelib, platlib]
    # pip puts the environment's own folders out of sight, but not its prefix.
    inside = (path for path in roots if Path(path).is_relative_to(sys.base_prefix))
    roots += [str(Path(sys.prefix) / Path(path).relative_to(sys.base_prefix)) for path in inside]
    folders += [Path(root) / "torch" for root in dict.fromkeys(roots)]
    return next((x for x in folders if (x / "include").is_dir() and _version(x) >= TORCH), None)


def torch_version(folder: Path) -> str:
    """The version of the torch in ``folder``; "" where it does not say."""
    file = folder / "version.py"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    return found[1] if found else ""


def _version(folder: Path) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", torch_version(folder))[:2])


def _torch() -> list[str]:
    return [f"torch>={'.'.join(map(str, TORCH))}"] if wants_kernels() and find_torch() is None else []


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What an isolated build of a wheel needs beside pyproject.toml's requirements."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """The same for an editable installation."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch()]
