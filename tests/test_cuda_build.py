"""The CUDA library where there is an nvcc, without a GPU: what it contains, exports and registers, and what the
compiler says about registers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "hf_lopt" / "_C_cuda.abi3.so"
SHIPPED = {"sm_80", "sm_90", "sm_100"}
# Limits of a kernel on sm_90, which are what nvcc 13.0 reaches: registers, and bytes that it spills. 128 registers
# leave room for 16 warps on a multiprocessor, 80 for 24.
LIMITS = {
    "sums_kernel": (80, 16),
    "update_factored_kernel": (64, 0),
    "feature_sums_kernel": (128, 20),
    "apply_4_kernel": (128, 24),
    "apply_8_kernel": (128, 120),
    "apply_32_kernel": (128, 216),
    "adam_kernel": (80, 0),
    "descend_kernel": (64, 0),
    "assign_kernel": (48, 0),
    "zero_nan_kernel": (48, 0),
    "advance_kernel": (64, 0),
    "pool_kernel": (32, 0),
    "lstm_kernel": (48, 0),
    "specialize_kernel": (64, 0),
}
# Bytes that functions out of line spill at most, by file: those for vectors, convolutions and slices.
OUT_OF_LINE = {"apply_4": 148, "apply_8": 356, "apply_32": 60, "feature_sums": 16, "sums": 0}
SLACK = 16  # of another release of the compiler


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = [shutil.which(name, path=str(Path(home) / "bin")) for home in homes if home]
    return next((path for path in [*found, shutil.which(name)] if path), None)


needs_nvcc = pytest.mark.skipif(tool("nvcc") is None, reason="no nvcc on this machine")
needs_library = pytest.mark.skipif(
    not LIBRARY.exists() and (tool("nvcc") is None or os.environ.get("HF_LOPT_BUILD") == "0"),
    reason="the CUDA kernels are not built: no nvcc, or HF_LOPT_BUILD=0",
)


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@needs_library
def test_it_is_built_where_there_is_a_compiler():
    assert LIBRARY.exists(), "nvcc is there, but `make setup` did not build hf_lopt._C_cuda; see its output"


@needs_library
@pytest.mark.skipif("HF_LOPT_CUDA_ARCHS" in os.environ, reason="HF_LOPT_CUDA_ARCHS is set")
def test_it_has_code_for_every_architecture():
    assert {x.decode() for x in re.findall(rb"\bsm_\d+\b", LIBRARY.read_bytes())} == SHIPPED
    if tool("cuobjdump"):
        assert set(re.findall(r"sm_\d+", output(tool("cuobjdump"), "--list-ptx", str(LIBRARY)))) == {"sm_100"}


@needs_library
def test_it_exports_its_init_function_only():
    symbols = [line.split() for line in output("nm", "-D", "--defined-only", str(LIBRARY)).splitlines()]
    # Others are templates of the C++ library, and edges that the linker marks.
    assert [name for _, kind, name in symbols if kind == "T"] == ["PyInit__C_cuda"]
    needed = output("readelf", "-d", str(LIBRARY))
    libraries = re.findall(r"NEEDED.*\[(lib\w+)", needed)
    assert "libcudart" not in libraries and "libtorch_cuda" not in libraries, "it loads without either"


@needs_library
@pytest.mark.skipif(bool(os.environ.get("HF_LOPT_KERNELS")), reason="kernels are switched off")
def test_it_registers_a_kernel_for_every_operator():
    code = (
        "import torch\n"
        "from hf_lopt.kernels import ops\n"
        "import hf_lopt._C_cuda\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "without = {x.name for x in ops.OPERATORS if not has(f'hf_lopt::{x.name}', 'CUDA')}\n"
        "assert without == {'orthogonalize'}, without\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT, timeout=600)


@pytest.mark.slow
@needs_nvcc
def test_registers_and_spills(tmp_path):
    nvcc = tool("nvcc")

    def compile_one(source: Path) -> str:
        command = [nvcc, "-std=c++17", "-O3", "-arch=sm_90", "-Xptxas", "-v", "-cubin", str(source)]
        command += ["-o", str(tmp_path / source.stem)]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=1800).stderr

    with ThreadPoolExecutor(2) as pool:
        reports = "\n".join(pool.map(compile_one, sorted((ROOT / "csrc" / "cuda").glob("*.cu"))))
    found, functions = {}, dict.fromkeys(OUT_OF_LINE, 0)
    spills = r"Function properties for (\S+)\s+\d+ bytes stack frame, (\d+) bytes spill stores.*\n"
    pattern = spills + r"(?:.*Used (\d+) registers)?"
    for name, spilled, registers in re.findall(pattern, reports):
        kernel = max((k for k in LIMITS if k in name), key=len, default=None)
        if kernel and registers:
            found[kernel] = int(registers), int(spilled)
        elif "hf_lopt" in name:
            # The mangled name has that of the file.
            source = max((f for f in OUT_OF_LINE if f"_{f}_cu_" in name), key=len)
            functions[source] = max(functions[source], int(spilled))
    assert set(found) == set(LIMITS) and functions["apply_32"] + functions["apply_8"] > 0
    for kernel, (registers, spilled) in found.items():
        most_registers, most_spilled = LIMITS[kernel]
        assert registers <= most_registers and spilled <= most_spilled + SLACK, (kernel, registers, spilled)
    for source, spilled in functions.items():
        assert spilled <= OUT_OF_LINE[source] + SLACK, (source, spilled)


@needs_nvcc
def test_memory_is_read_and_written_16_bytes_at_once_and_matrices_go_to_their_units(tmp_path):
    """A struct of four numbers is not stored as one by itself."""
    for name, products in (("apply_4", 0), ("apply_8", 0), ("apply_32", 72)):
        target = tmp_path / f"{name}.ptx"
        source = ROOT / "csrc" / "cuda" / f"{name}.cu"
        command = [tool("nvcc"), "-std=c++17", "-O3", "-arch=compute_80", "-ptx", str(source), "-o", str(target)]
        subprocess.run(command, check=True, timeout=1800)
        text = target.read_text()
        # A gradient, a parameter, three momenta and a second moment; half as many for a lane of the matrix units.
        streams = 4 if products else 6
        assert len(re.findall(r"ld\.global\.v4\.[fub]32", text)) >= streams
        assert len(re.findall(r"st\.global\.v4\.f32", text)) >= streams
        assert text.count("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") == products


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine: not run")
def test_the_kernels_are_used_on_a_gpu():
    from hf_lopt.kernels import dispatch

    assert dispatch.loaded("cuda")
