"""Build script. The metadata is in pyproject.toml; the compiled extensions are declared here.

``hf_lopt._C`` holds the fused CPU kernels. It needs a C++17 compiler and the headers of the installed torch; without
one of them the package is installed as pure Python and says so when it is first imported. ``hf_lopt._C_cuda`` holds
the kernels for NVIDIA GPUs and is built where there is an nvcc, with any torch. Environment:

* ``HF_LOPT_BUILD=0``  do not build the extensions; ``1``: fail when one cannot be built.
* ``HF_LOPT_CUDA_ARCHS``  compute capabilities to compile for, such as ``90`` or ``80 90``; empty: no CUDA kernels.
* ``CXX``, ``CUDA_HOME``  the compiler; the folder of the CUDA toolkit, otherwise the one of the nvcc on the path.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError


try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

# The oldest torch and the oldest Python that the built file runs with.
TORCH_TARGET_VERSION = "0x020a000000000000"
PYTHON_TARGET_VERSION = "0x030A0000"

REQUEST = os.environ.get("HF_LOPT_BUILD", "")
# Each file of kernels is compiled for its own instruction set; which one runs is decided at run time.
X86 = platform.machine().lower() in ("x86_64", "amd64")
ARITHMETIC = [
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-Wno-psabi",
    "-Wno-ignored-attributes",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]
FILE_FLAGS = {
    "kernels_portable": ARITHMETIC,
    "kernels_avx2": [*ARITHMETIC, "-mavx2", "-mfma", "-mf16c"],
    "kernels_avx512": [*ARITHMETIC, *(f"-mavx512{x}" for x in ("f", "bw", "dq", "vl")), "-mavx2", "-mfma", "-mf16c"],
}
# Ampere, Ada, Hopper, Blackwell. Newer ones translate the PTX of the last; others in between that of the first.
CUDA_ARCHS = os.environ.get("HF_LOPT_CUDA_ARCHS", "80 86 89 90 100").replace(",", " ").replace(";", " ").split()


def find_nvcc() -> Path | None:
    """The CUDA compiler, with the headers and libraries of its toolkit beside it."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    found = [Path(home) / "bin" / "nvcc" for home in homes if home]
    if on_path := shutil.which("nvcc"):
        found.append(Path(on_path).resolve())
    found.append(Path("/usr/local/cuda/bin/nvcc"))
    headers = ((path, path.parent.parent / "include" / "cuda_runtime_api.h") for path in found)
    return next((path for path, header in headers if path.is_file() and header.is_file()), None)


def cuda_code(nvcc: Path) -> list[str]:
    """What is compiled: ``sm_90`` for an architecture, ``compute_90`` for PTX; what nvcc does not know is left out."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    archs = sorted({int(arch) for arch in CUDA_ARCHS if f"sm_{arch}" in listed.split()})
    if not archs:
        raise SystemExit(f"nvcc knows none of the architectures {' '.join(CUDA_ARCHS)} of HF_LOPT_CUDA_ARCHS")
    return [*(f"sm_{arch}" for arch in archs), *(f"compute_{arch}" for arch in sorted({archs[0], archs[-1]}))]


def cuda_flags(nvcc: Path) -> list[str]:
    """Flags of nvcc for the device code."""
    flags = ["-std=c++17", "-O3", "--threads", "0", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    for code in cuda_code(nvcc):
        flags += ["-gencode", f"arch=compute_{code.split('_')[1]},code={code}"]
    return flags


def warn_of_other_cuda(torch: Path, nvcc: Path) -> None:
    """The toolkit should be of torch's own major version, which the driver is known to serve."""
    found = re.search(r"^cuda.*=\s*['\"](\d+)", (torch / "version.py").read_text(), re.MULTILINE)
    release = re.search(r"release (\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if found and release and found[1] != release[1]:
        print(
            f"warning: {nvcc} is of CUDA {release[1]}, torch is for CUDA {found[1]}: the kernels need a driver for "
            f"CUDA {release[1]}. Set CUDA_HOME to a toolkit of CUDA {found[1]} to build for that one.",
            file=sys.stderr,
        )


def find_torch() -> Path | None:
    """The folder of the installed torch; also outside of an isolated build environment, where Python is installed."""
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        return Path(spec.origin).parent
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    # pip puts the environment's own folders out of sight, but not its prefix.
    folders += [
        str(Path(sys.prefix) / Path(p).relative_to(sys.base_prefix)) for p in folders if _below(p, sys.base_prefix)
    ]
    for folder in dict.fromkeys(folders):
        if (Path(folder) / "torch" / "include").is_dir():
            return Path(folder) / "torch"
    return None


def _below(path: str, parent: str) -> bool:
    return Path(path).is_relative_to(parent)


class BuildExtension(build_ext):
    """Compiles each file with its own flags, and goes on without an extension that cannot be built."""

    def build_extension(self, ext: Extension) -> None:
        compile_one = self.compiler._compile
        if ".cu" not in self.compiler.src_extensions:
            self.compiler.src_extensions.append(".cu")
        nvcc = find_nvcc()
        device_flags = cuda_flags(nvcc) if any(s.endswith(".cu") for s in ext.sources) else []

        def compile_with_flags(obj, src, suffix, cc_args, extra_postargs, pp_opts):
            if suffix == ".cu":
                try:
                    subprocess.run([nvcc, *device_flags, "-c", src, "-o", obj], check=True)
                except subprocess.CalledProcessError as error:
                    raise CompileError(str(error)) from error
                return
            flags = [*extra_postargs, *FILE_FLAGS.get(Path(src).stem, ())]
            compile_one(obj, src, suffix, cc_args, flags, pp_opts)

        self.compiler._compile = compile_with_flags
        try:
            super().build_extension(ext)
        finally:
            self.compiler._compile = compile_one


class Wheel(bdist_wheel):
    """Tags the wheel for every Python that the extension runs with."""

    def finalize_options(self) -> None:
        if self.distribution.ext_modules:
            self.py_limited_api = "cp310"
        super().finalize_options()


def extension(name: str, torch: Path, sources: list[Path], macros: tuple = (), **options: list[str]) -> Extension:
    """An extension on torch's stable interface, for every Python and torch from the oldest ones on."""
    options["include_dirs"] = [str(torch / "include"), *options.get("include_dirs", [])]
    options["library_dirs"] = [str(torch / "lib"), *options.get("library_dirs", [])]
    options["libraries"] = ["torch_cpu", "c10", *options.get("libraries", [])]
    return Extension(
        name,
        sources=sorted(map(str, sources)),
        depends=sorted(str(p) for p in Path("csrc").rglob("*.*h")),
        define_macros=[
            ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
            ("Py_LIMITED_API", PYTHON_TARGET_VERSION),
            *macros,
        ],
        extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"],
        language="c++",
        py_limited_api=True,
        # Without a working compiler the package is installed without the extension.
        optional=REQUEST != "1",
        **options,
    )


def extensions() -> list[Extension]:
    torch, nvcc = find_torch(), find_nvcc()
    if REQUEST == "0" or sys.platform == "win32":
        return []
    if torch is None:
        message = (
            "torch was not found, so the fused kernels are not built and the slower PyTorch path is used. "
            "Install torch first, then build with `pip install --no-build-isolation`."
        )
        if REQUEST == "1":
            raise SystemExit(message)
        print(f"warning: {message}", file=sys.stderr)
        return []
    shared = sorted(Path("csrc").glob("*.cpp"))
    sources = [*shared, *Path("csrc/cpu").glob("*.cpp")]
    found = [extension("hf_lopt._C", torch, [s for s in sources if X86 or "avx" not in s.name])]
    if nvcc and CUDA_ARCHS and sys.platform == "linux":
        warn_of_other_cuda(torch, nvcc)
        home = nvcc.parent.parent
        found.append(
            extension(
                "hf_lopt._C_cuda",
                torch,
                [*shared, *(p for p in Path("csrc/cuda").glob("*.c*") if p.suffix in (".cpp", ".cu"))],
                macros=(("HF_LOPT_CUDA_CODE", f'"{" ".join(cuda_code(nvcc))}"'),),
                include_dirs=[str(home / "include")],
                library_dirs=[str(home / "lib64"), str(home / "lib")],
                libraries=["cudart_static", "dl", "rt", "pthread"],
                extra_link_args=["-Wl,--exclude-libs,ALL"],  # keeps the symbols of the static library to itself
            )
        )
    return found


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel})
