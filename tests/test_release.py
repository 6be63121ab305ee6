"""What a release consists of: made by `make wheel`, and what it says where there are no kernels."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import util
from pathlib import Path

import pytest

import hf_lopt
from hf_lopt.kernels import remedy


ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("build", "auditwheel", "twine", "abi3audit")
SOURCES = (
    "csrc",
    "hf_lopt",
    "release",
    "hf_lopt_autoload.py",
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
    "NOTICE",
)


def objects() -> str:
    """Compiled files that what is built here shares: those of `make setup`, where it has left any."""
    return str(ROOT / "build" / "objects")


def run(*command, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_LOPT_CUDA_ARCHS": "", "HF_LOPT_OBJECTS": objects()} | options.pop("env", {})
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, **options)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The sources that a wheel is made from, without anything compiled."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(path, folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(any(util.find_spec(tool) is None for tool in TOOLS), reason="no release tools: make setup")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="manylinux is of Linux")
@pytest.mark.skipif(
    os.environ.get("HF_LOPT_BUILD") == "0" or not shutil.which("c++"), reason="nothing is compiled here"
)
def test_make_wheel(tmp_path):
    """For the CPU, with the dependencies of this environment: the rest is what `make wheel` does for a release."""
    arguments = f"--share --out {tmp_path} --objects {objects()}"
    command = ("make", "-o", "setup", "wheel", f"VENV={sys.prefix}", f"WHEEL_ARGS={arguments}")
    done = run(*command, cwd=ROOT, env={"PYTHONPATH": ""})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "ten Trainer steps with fused kernels" in done.stdout and re.search(r"[1-9]\d* passed", done.stdout)
    wheel, sdist = next(tmp_path.glob("*.whl")), next(tmp_path.glob("*.tar.gz"))
    assert re.fullmatch(r"hf_lopt-[\d.]+-cp310-abi3-manylinux_2_\d+_\w+\.whl", wheel.name), wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    # Nothing of torch's, nothing of the tests, and the licence with its notice.
    assert [name for name in names if ".so" in name] == ["hf_lopt/_C.abi3.so"]
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"hf_lopt", "hf_lopt_autoload.py"}
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in names}
    # A package index shows the page alone.
    links = re.findall(r"\]\(([^)]+)\)", metadata)
    assert links and all(link.startswith(("https://", "#")) for link in links)
    assert "Project-URL: Repository, https://" in metadata and sdist.stat().st_size < 20e6


def build(checkout: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """A wheel as pip makes it without isolation, by the backend."""
    code = f"import hf_lopt_backend; print(hf_lopt_backend.build_wheel({str(folder)!r}))"
    path = str(checkout / "release")
    return run(sys.executable, "-c", code, cwd=checkout, env={"PYTHONPATH": path} | environment)


def test_without_kernels_there_is_an_error_or_a_tag_that_says_so(checkout, tmp_path):
    # Not the compiled files of others: this compiler fails.
    failed = build(checkout, tmp_path, CXX="/bin/false", CC="/bin/false", HF_LOPT_OBJECTS=str(tmp_path / "objects"))
    assert failed.returncode != 0 and not list(tmp_path.glob("*.whl"))
    (said,) = [line for line in failed.stderr.splitlines() if line.startswith("error: hf_lopt's")]
    assert "Install a C++17 compiler" in said and "HF_LOPT_BUILD=0" in said
    asked = build(checkout, tmp_path, HF_LOPT_BUILD="0")
    assert asked.returncode == 0 and "without compiled kernels" in asked.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not any(".so" in name for name in archive.namelist())


def requirements(checkout: Path, find: str = "b.find_torch()", **environment: str) -> list[str]:
    """What the backend asks for beside setuptools' own, where looking for torch finds ``find``."""
    code = f"import json, hf_lopt_backend as b; x = {find}; b.find_torch = lambda: x; print(json.dumps(b._torch()))"
    done = run(sys.executable, "-c", code, env={"PYTHONPATH": str(checkout / "release")} | environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_isolated_build_gets_torch_only_where_there_is_none(checkout):
    assert requirements(checkout) == []
    assert requirements(checkout, find="None") == ["torch>=2.10"]
    assert requirements(checkout, find="None", HF_LOPT_BUILD="0") == []


def test_an_old_or_missing_setuptools_is_named(checkout, tmp_path):
    (tmp_path / "setuptools.py").write_text("__version__ = '65.5.0'")
    path = os.pathsep.join([str(tmp_path), str(checkout / "release")])
    done = run(sys.executable, "-S", "-c", "import hf_lopt_backend", env={"PYTHONPATH": path})
    assert done.returncode != 0 and "setuptools >= 77" in done.stderr and "65.5.0" in done.stderr
    (tmp_path / "setuptools.py").write_text("raise ImportError")
    done = run(sys.executable, "-S", "-c", "import hf_lopt_backend", env={"PYTHONPATH": path})
    assert "it is not installed" in done.stderr and "pip install 'setuptools>=77'" in done.stderr


def test_kernels_compile_with_the_oldest_headers():
    """A macro of torch 2.13 that has come back twice; what 2.10 compiles is tried by `make test-oldest`."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert len(sources) > 20
    assert not [x.name for x in sources if "STABLE_TORCH_ERROR_CODE_CHECK" in x.read_text(encoding="utf-8")]


def test_the_repository_is_named_once_and_the_version_everywhere():
    """``[project.urls]`` has the address, from which setup.py takes it; CITATION.cff repeats it, and nothing else."""
    project, citation = ((ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "CITATION.cff"))
    (address,) = re.findall(r'^Repository = "(.+)"$', project, re.M)
    assert re.findall(r'^repository-code: "(.+)"$', citation, re.M) == [address]
    assert re.findall(r"^version: (.+)$", citation, re.M) == [hf_lopt.__version__]
    urls = project.split("[project.urls]\n")[1].split("\n\n")[0]
    assert all(re.search(rf' = "{re.escape(address)}[/"]', line) for line in urls.splitlines())
    places = [ROOT / "NOTICE", *ROOT.glob("*.md"), *ROOT.glob("*.py")]
    places += [path for name in ("hf_lopt", "docs", "recipes", "release") for path in (ROOT / name).rglob("*.*[yd]")]
    assert not [path for path in places if path.is_file() and address in path.read_text(encoding="utf-8")]


# ---- the command that brings kernels ------------------------------------------------------------------------------


# Without .pth files: an editable installation would find its own compiled files for the sources here.
PACKAGES = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
REPORT = f"import sys; sys.path += {PACKAGES}; import hf_lopt.__main__ as m; m.main()"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="no compiler on this machine")
def test_the_command_that_is_printed_brings_kernels(checkout):
    """Of a checkout on the path, run as it is printed. Compiled files of `make setup` serve where equal."""
    before = run(sys.executable, "-S", "-c", REPORT, cwd=checkout, env={"PYTHONPATH": ""})
    (line,) = [x for x in before.stdout.splitlines() if x.strip().startswith("hf_lopt._C ")]
    command = line.split(", then: ")[1]
    assert str(checkout) in command
    done = run("sh", "-c", command, env={"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    after = run(sys.executable, "-S", "-c", REPORT, cwd=checkout, env={"PYTHONPATH": ""})
    assert "hf_lopt._C " not in after.stdout and "fused: " in after.stdout
    next((checkout / "hf_lopt").glob("_C*.so")).unlink()


@pytest.mark.parametrize(
    ("direct_url", "wanted"),
    [
        (None, "--no-binary hf_lopt hf_lopt==7.0"),
        (
            {"url": "file:///nowhere/hf_lopt-7.0-py3-none-any.whl", "archive_info": {}},
            "--no-binary hf_lopt hf_lopt==7.0",
        ),
        ({"url": "https://x.org/hf_lopt-7.0.tar.gz", "archive_info": {}}, "https://x.org/hf_lopt-7.0.tar.gz"),
        (
            {"url": "https://x.org/r.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "git+https://x.org/r.git@abc",
        ),
        ({"url": "file:///", "dir_info": {}}, "/"),
    ],
)
def test_the_command_installs_from_where_it_was_installed(monkeypatch, tmp_path, direct_url, wanted):
    """pip keeps the slow wheel that it has built, so the command names the package and leaves the cache out."""
    info = tmp_path / "hf_lopt-7.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hf_lopt\nVersion: 7.0\n")
    if direct_url is not None:
        (info / "direct_url.json").write_text(json.dumps(direct_url))
    monkeypatch.setattr(remedy, "_FOLDER", tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    start = f"{sys.executable} -m pip install --no-deps --no-cache-dir --force-reinstall "
    assert remedy.command() == start + wanted


def test_the_command_of_an_editable_installation_and_of_bare_files(monkeypatch, tmp_path):
    info = tmp_path / "site" / "hf_lopt-7.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hf_lopt\nVersion: 7.0\n")
    url = {"url": (tmp_path / "sources").as_uri(), "dir_info": {"editable": True}}
    (info / "direct_url.json").write_text(json.dumps(url))
    monkeypatch.setattr(remedy, "_FOLDER", tmp_path / "sources")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    assert remedy.command() == f"{sys.executable} -m pip install --no-deps -e {tmp_path / 'sources'}"
    monkeypatch.setattr(sys, "path", [])
    assert remedy.command() == f"{sys.executable} -m pip install --no-cache-dir hf_lopt"
