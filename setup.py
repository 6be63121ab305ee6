"""Build script. The metadata is in pyproject.toml; the compiled extension is declared here.

``hf_lopt._C`` holds the fused CPU kernels. It needs a C++17 compiler and the headers of the installed torch; without
one of them the package is installed as pure Python and says so when it is first imported. Environment:

* ``HF_LOPT_BUILD=0``  do not build the extension; ``1``: fail when it cannot be built.
* ``CXX``              the compiler.
"""

import importlib.util
import os
import platform
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


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
    """Compiles each file with its own flags, and goes on without the extension if it cannot be built."""

    def build_extension(self, ext: Extension) -> None:
        compile_one = self.compiler._compile

        def compile_with_flags(obj, src, suffix, cc_args, extra_postargs, pp_opts):
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


def extensions() -> list[Extension]:
    torch = find_torch()
    if REQUEST == "0" or sys.platform == "win32":
        return []
    if torch is None:
        message = (
            "torch was not found, so the fused CPU kernels are not built and the slower PyTorch path is used. "
            "Install torch first, then build with `pip install --no-build-isolation`."
        )
        if REQUEST == "1":
            raise SystemExit(message)
        print(f"warning: {message}", file=sys.stderr)
        return []
    sources = sorted(str(p) for p in Path("csrc").rglob("*.cpp"))
    if not X86:
        sources = [s for s in sources if "avx" not in s]
    return [
        Extension(
            "hf_lopt._C",
            sources=sources,
            depends=sorted(str(p) for p in Path("csrc").rglob("*.h")),
            include_dirs=[str(torch / "include")],
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu", "c10"],
            define_macros=[
                ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
                ("Py_LIMITED_API", PYTHON_TARGET_VERSION),
            ],
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"],
            language="c++",
            py_limited_api=True,
            # Without a working compiler the package is installed without the extension.
            optional=REQUEST != "1",
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel})
