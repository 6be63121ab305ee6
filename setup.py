"""Build script. The metadata is in pyproject.toml; the compiled extensions are declared here.

``hf_lopt._C`` holds the fused CPU kernels. It needs a C++17 compiler and the headers of torch. ``hf_lopt._C_cuda``
holds the kernels for NVIDIA GPUs and is built where there is an nvcc, with any torch. One that cannot be built is an
error: a package that is slow for good must have been asked for. Environment:

* ``HF_LOPT_BUILD=0``  a package without compiled extensions, for any platform (``py3-none-any``).
* ``HF_LOPT_CUDA_ARCHS``  compute capabilities to compile for, such as ``90`` or ``80 90``; empty: no CUDA kernels.
* ``HF_LOPT_OBJECTS``  a folder that keeps compiled files, by default ``build/objects``: what has not changed is taken
  from there.
* ``CXX``, ``CUDA_HOME``  the compiler; the folder of the CUDA toolkit, otherwise the one of the nvcc on the path.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent / "release"))

from hf_lopt_backend import find_torch, torch_version, wants_kernels  # noqa: E402  (first: it looks at setuptools)
from setuptools import Extension, setup  # noqa: E402
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402
from setuptools.errors import BaseError, CCompilerError, CompileError  # noqa: E402


# The oldest torch and the oldest Python that the built file runs with.
TORCH_TARGET_VERSION = "0x020a000000000000"
PYTHON_TARGET_VERSION = "0x030A0000"

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


class BuildExtension(build_ext):
    """Compiles each file with its own flags, and only what has changed; what cannot be built ends the installation."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # A fixed place: pip and editable installations would take a new one each time.
        self.build_temp = os.environ.get("HF_LOPT_OBJECTS") or str(Path("build", "objects"))

    def run(self) -> None:
        try:
            super().run()
        except (BaseError, CCompilerError, OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"error: hf_lopt's compiled kernels were not built: {str(error)[:100]} ... Install a C++17 compiler "
                "(g++ or clang++, or name one in CXX); HF_LOPT_CUDA_ARCHS= (empty) leaves out those for CUDA. "
                "HF_LOPT_BUILD=0 installs without any: the same numbers, about 10 times slower on a CPU."
            ) from error

    def build_extension(self, ext: Extension) -> None:
        compile_one, objects = self.compiler._compile, self.build_temp
        self.build_temp = str(Path(objects, ext.name))  # some sources are in both extensions
        if ".cu" not in self.compiler.src_extensions:
            self.compiler.src_extensions.append(".cu")
        nvcc = find_nvcc()
        device_flags = cuda_flags(nvcc) if any(s.endswith(".cu") for s in ext.sources) else []
        torch = find_torch()
        shared = b"".join(Path(p).read_bytes() for p in ext.depends) + (torch_version(torch) if torch else "").encode()

        def compile_with_flags(obj, src, suffix, cc_args, extra_postargs, pp_opts):
            flags = device_flags if suffix == ".cu" else [*extra_postargs, *FILE_FLAGS.get(Path(src).stem, ())]
            # Not the folders of headers, which are new in each isolated build: torch's version stands for them.
            options = [x for x in (*cc_args, *flags, *pp_opts) if not x.startswith("-I")]
            command = repr((getattr(self.compiler, "compiler_so", ""), str(nvcc), options))
            digest = hashlib.sha256(command.encode() + shared + Path(src).read_bytes()).hexdigest()
            stamp = Path(f"{obj}.sha256")
            if Path(obj).is_file() and stamp.is_file() and stamp.read_text() == digest:
                return
            if suffix == ".cu":
                try:
                    subprocess.run([nvcc, *flags, "-c", src, "-o", obj], check=True)
                except subprocess.CalledProcessError as error:
                    raise CompileError(str(error)) from error
            else:
                compile_one(obj, src, suffix, cc_args, flags, pp_opts)
            stamp.write_text(digest)

        # Files of one extension are compiled at the same time. Extensions are not: they share the compiler's object.
        workers = os.cpu_count() if self.parallel is True else self.parallel or 1
        compile_all, pool = self.compiler.compile, ThreadPoolExecutor(workers)

        def compile_at_once(*args, **options):
            begun = []
            self.compiler._compile = lambda *one: begun.append(pool.submit(compile_with_flags, *one))
            objects = compile_all(*args, **options)
            for one in begun:
                one.result()
            return objects

        self.compiler.compile = compile_at_once
        try:
            super().build_extension(ext)
        finally:
            pool.shutdown(cancel_futures=True)
            self.compiler.compile, self.compiler._compile, self.build_temp = compile_all, compile_one, objects

    def _build_extensions_parallel(self) -> None:  # what `-j` calls
        self._build_extensions_serial()


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
        **options,
    )


def extensions() -> list[Extension]:
    if not wants_kernels():
        print(
            "warning: hf_lopt is built without compiled kernels: the same numbers, about 10 times slower on a CPU.",
            file=sys.stderr,
        )
        return []
    torch, nvcc = find_torch(), find_nvcc()
    if torch is None:
        # Of a source distribution and of metadata alone nothing is compiled; an isolated build gets torch before.
        if not {"build_ext", "bdist_wheel", "editable_wheel", "install", "develop"} & set(sys.argv):
            return []
        raise SystemExit(
            "error: hf_lopt's kernels are compiled with the headers of torch >= 2.10, and none is installed. Install "
            "torch first, or leave --no-build-isolation out; HF_LOPT_BUILD=0 installs without compiled kernels."
        )
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


def long_description() -> str:
    """README.md with absolute links: a package index shows it without the files beside it."""
    root = Path(__file__).resolve().parent
    found = re.search(r'^Repository = "(.+)"$', (root / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None, "pyproject.toml names no Repository"
    readme = (root / "README.md").read_text(encoding="utf-8")
    relative = r"\]\((?![a-z]+:|#)([^)]+)\)"
    readme = re.sub("!" + r"(\[[^\]]*)" + relative, rf"!\1]({found[1]}/raw/main/\2)", readme)
    return re.sub(relative, rf"]({found[1]}/blob/main/\1)", readme)


setup(
    ext_modules=extensions(),
    long_description=long_description(),
    long_description_content_type="text/markdown",
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel},
)
