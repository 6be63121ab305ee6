"""The CUDA library where there is an nvcc, without a GPU: what it contains, exports and registers, and how many
instructions and registers its kernels take."""

from __future__ import annotations

import collections
import itertools
import os
import re
import shutil
import site
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "hf_lopt" / "_C_cuda.abi3.so"
SHIPPED = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100"}
# Limits of a kernel on sm_90, which are what nvcc 13.0 reaches: registers, and bytes of its stack, where arrays lie
# that are indexed, and what did not fit into registers. 128 registers leave room for 16 warps on a multiprocessor, 80
# for 24.
LIMITS = {
    "sums_kernel": (64, 112),
    "update_factored_kernel": (64, 0),
    "feature_sums_kernel": (128, 56),
    "apply_4_kernel": (128, 304),
    "apply_8_kernel": (128, 480),
    "apply_32_kernel": (128, 544),
    "apply_32_tf32_kernel": (128, 496),
    "adam_kernel": (80, 0),
    "descend_kernel": (64, 0),
    "assign_kernel": (48, 0),
    "zero_nan_kernel": (48, 0),
    "probe_kernel": (16, 0),
    "advance_kernel": (64, 80),
    "pool_kernel": (32, 0),
    "lstm_kernel": (48, 0),
    "specialize_kernel": (64, 0),
    # Over accumulators in any format: those above are only for float32.
    "moments_stored_kernel": (128, 16),
    "feature_sums_stored_kernel": (128, 64),
    "scales_kernel": (80, 64),
    "apply_4_stored_kernel": (128, 304),
    "apply_8_stored_kernel": (128, 416),
    "apply_32_stored_kernel": (128, 480),
    "adam_stored_kernel": (128, 40),
    "descend_stored_kernel": (128, 24),
}
SLACK = 16  # bytes, of another release of the compiler
# Kernel, rows that an iteration of its loop for full tiles takes, copies into shared memory: of 16 bytes, of 8. The
# limits are instructions of a warp for 128 elements where no rare branch is taken, and accesses to the stack among
# them.
HOT_LOOPS = {
    ("sums_kernel", 2, 2, 0): (55, 2),
    ("sums_kernel", 4, 0, 4): (52, 2),
    ("feature_sums_kernel", 1, 6, 0): (245, 0),
    ("feature_sums_kernel", 1, 4, 2): (256, 0),
    ("apply_4_kernel", 1, 6, 0): (700, 0),
    ("apply_4_kernel", 1, 4, 2): (715, 0),
    ("apply_8_kernel", 1, 6, 0): (1300, 24),
    ("apply_8_kernel", 1, 4, 2): (1315, 28),
}
# Likewise for accumulators in another format than float32, with parameters and gradients in float32: kernel, what its
# copies, loads and stores of accumulators and the conversions of their codes look like, how many, and the limits.
STORED = {
    ("feature_sums_stored_kernel", r"LDGSTS\.E\.64|LDS\.64", 8): (355, 0),
    ("feature_sums_stored_kernel", r"LDGSTS\.E|I2F\S*", 20): (418, 0),
    ("apply_4_stored_kernel", r"LDGSTS\.E\.64|STG\.E\.64|LDS\.64", 12): (965, 0),
    ("apply_4_stored_kernel", r"LDGSTS\.E|STG\.E|I2F\S*", 40): (1265, 0),
}
COPY = r"LDGSTS\S*"


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit, or of the packages from which it can be installed without one."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home) / "bin" for home in homes if home]
    folders += [Path(p) / "nvidia" / "cu13" / "bin" for p in site.getsitepackages()]
    found = [shutil.which(name), *(shutil.which(name, path=str(folder)) for folder in folders)]
    return next((path for path in found if path), None)


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
        assert set(re.findall(r"sm_\d+", output(tool("cuobjdump"), "--list-ptx", str(LIBRARY)))) == {"sm_80", "sm_100"}


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


# ---- instructions --------------------


@dataclass
class Kernel:
    """The instructions of a kernel, with the functions that it calls, and where each may go on."""

    registers: int
    stack: int
    code: list[str] = field(repr=False)
    next: list[list[int]] = field(repr=False)


@pytest.fixture(scope="module")
def kernels() -> dict[str, Kernel]:
    """Those for sm_90 in the library."""
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    if not LIBRARY.exists() or cuobjdump is None or nvdisasm is None:
        pytest.skip("no CUDA library, or no cuobjdump and nvdisasm")
    environment = os.environ | {"PATH": f"{Path(nvdisasm).parent}{os.pathsep}{os.environ['PATH']}"}

    def dump(what: str) -> str:
        command = [cuobjdump, what, "-arch", "sm_90", str(LIBRARY)]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout

    resources = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", dump("-res-usage"))
    if not resources:
        pytest.skip("the library has no code for sm_90")
    names = {name: max((k for k in LIMITS if k in name), key=len) for name, _, _ in resources}
    found = {names[name]: Kernel(int(registers), int(stack), [], []) for name, registers, stack in resources}
    for text in dump("-sass").split("Function : ")[1:]:
        kernel = found[names[text.split()[0]]]
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?) *;", text)
        places = {int(address, 16): i for i, (address, _) in enumerate(lines)}
        kernel.code = [instruction for _, instruction in lines]
        kernel.next = [_goes_on(i, instruction, places) for i, instruction in enumerate(kernel.code)]
    return found


def _goes_on(i: int, instruction: str, places: dict[int, int]) -> list[int]:
    """The instructions that may follow."""
    condition, name, rest = re.fullmatch(r"(@\S+ +)?(\S+)(.*)", instruction).groups()
    target = re.search(r"\b0x([0-9a-f]+)$", rest)
    if name.startswith("BRA"):
        # A branch may also depend on a register that follows its name.
        always = not condition and "DIV" not in name and re.match(r" *(0x|`)", rest)
        return [places[int(target[1], 16)], *([] if always else [i + 1])]
    ends = name.startswith(("EXIT", "RET")) and not condition
    return [] if ends or i + 1 == len(places) else [i + 1]


def loops(kernel: Kernel, through: str = "") -> list[list[str]]:
    """The shortest way through each loop: no branch for rare numbers is taken, and nothing is called. ``through``: it
    passes all instructions of this name that lie in one run between the ends of the loop, as a copy does that is left
    out in the last turns only."""
    found = []
    for end, targets in enumerate(kernel.next):
        for start in (t for t in targets if t < end):
            between = [i for i in range(start, end) if through and re.match(rf"(@\S+ +)?{through}\b", kernel.code[i])]
            if through and not between:
                continue
            way = _shortest(kernel, [start, *between, end])
            if way:
                found.append([kernel.code[i] for i in way])
    return found


def _shortest(kernel: Kernel, places: list[int]) -> list[int]:
    """The shortest way from the first to the last by all the others, in this order; none if there is none."""
    way = places[:1]
    for start, end in itertools.pairwise(places):
        before, front = {start: start}, collections.deque([start])
        while front and end not in before:
            i = front.popleft()
            for j in kernel.next[i]:
                if j not in before and "CALL" not in kernel.code[j]:
                    before[j] = i
                    front.append(j)
        if end not in before:
            return []
        part = [end]
        while part[-1] != start:
            part.append(before[part[-1]])
        way += part[-2::-1]
    return way


def count(pattern: str, way: list[str]) -> int:
    return sum(bool(re.match(rf"(@\S+ +)?({pattern})\b", instruction)) for instruction in way)


def test_registers_and_stacks(kernels):
    assert set(kernels) == set(LIMITS)
    for name, kernel in kernels.items():
        registers, stack = LIMITS[name]
        assert kernel.registers <= registers and kernel.stack <= stack + SLACK, (name, kernel.registers, kernel.stack)


@pytest.mark.parametrize("name, rows, wide, half", HOT_LOOPS)
def test_instructions_of_a_full_tile(kernels, name, rows, wide, half):
    """Numbers of float32 are copied 16 bytes at a time, of bfloat16 8; and what comes later is asked for early."""
    most, most_on_stack = HOT_LOOPS[name, rows, wide, half]
    ways = [
        way
        for way in loops(kernels[name], COPY)
        if (count(r"LDGSTS\.E\.BYPASS\.128", way), count(r"LDGSTS\.E\.64", way)) == (wide, half)
        and count("FFMA", way) > 7 * rows
    ]
    assert ways, "there is no such loop"
    way = min(ways, key=len)
    assert len(way) <= most * rows, len(way) / rows
    assert count(r"LDL\S*|STL\S*", way) <= most_on_stack
    copies = [i for i, x in enumerate(way) if re.search(r"\bLDGSTS\b", x)]
    assert count("FFMA|FMUL|FMNMX|FADD", way[copies[0] : copies[-1]]) <= 4  # of the row that is worked on
    if name.startswith("apply"):
        # Three momenta, a second moment, and the parameter or the step, which is float32.
        assert count(r"STG\.E\.(128|64)", way) == 5
        # Shared memory is read four numbers at a time, by neighbouring lanes or all the same: no two lanes of a
        # quarter of a warp, which is served at once, want one bank. What remains is one number for all lanes.
        assert count(r"LDS\S*", way) - count(r"LDS\.128", way) <= 13


@pytest.mark.parametrize("name, pattern, places", STORED)
def test_instructions_of_a_full_tile_in_other_formats(kernels, name, pattern, places):
    most, most_on_stack = STORED[name, pattern, places]
    kernel, ways = kernels[name], []
    for end, targets in enumerate(kernel.next):
        for start in (t for t in targets if t < end):
            if count(r"LDGSTS\.E\.BYPASS\.128", kernel.code[start:end]) != 6:
                continue
            passed = [i for i in range(start, end) if re.match(rf"(@\S+ +)?({pattern}) ", kernel.code[i])]
            if len(passed) == places and (way := _shortest(kernel, [start, *passed, end])):
                ways.append([kernel.code[i] for i in way])
    assert ways, "there is no such loop"
    way = min(ways, key=len)
    assert len(way) <= most and count(r"LDL\S*|STL\S*", way) <= most_on_stack, len(way)


@pytest.mark.parametrize(
    "name, product, products, most",
    [
        ("apply_32_kernel", r"HMMA\.16816\.F32\.BF16", 72, 690),
        ("apply_32_tf32_kernel", r"HMMA\.1688\.F32\.TF32", 56, 460),
        ("apply_32_stored_kernel", r"HMMA\.16816\.F32\.BF16", 72, 760),
        ("apply_32_stored_kernel", r"HMMA\.1688\.F32\.TF32", 56, 530),
    ],
)
def test_matrices_go_to_their_units(kernels, name, product, products, most):
    """Products of a warp for 32 elements, and instructions where no rare branch is taken: in full tiles of float32 and
    of bfloat16, and in others."""
    assert count(product, kernels[name].code) == 3 * products
    way = min((way for way in loops(kernels[name]) if count(product, way) == products), key=len)
    assert len(way) <= most


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine: not run")
def test_the_kernels_are_used_on_a_gpu():
    from hf_lopt.kernels import dispatch

    assert dispatch.loaded("cuda")
