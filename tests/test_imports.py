"""The package's imports follow its data flow and never turn back; and it imports with little around it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_lopt"
# What each module may import from the package. A package name stands for its modules that have no line of their own.
LEAVES = {"distributed", "weights", "embedded"}
LEAVES_FOR_ALL = {"notices"}
KERNELS = {"kernels.arguments", "kernels.held", "kernels.ops", "kernels.reference"}
ALLOWED = {
    "features": set(),
    "notices": set(),
    "arguments_given": set(),
    "description": {"given_settings", "lr_scales", "weights"},
    "kernels.remedy": set(),
    "kernels.schema": {"kernels.held"},
    "kernels.small_matrices": set(),
    "kernels.run_arguments": {"kernels.schema"},
    "kernels.arguments": {"kernels.run_arguments", "kernels.schema"},
    "kernels.cards": set(),
    "kernels.held": set(),
    "kernels.dispatch": {
        *("features", "kernels.arguments", "kernels.cards", "kernels.held", "kernels.reference", "kernels.remedy"),
        *("kernels.schema", "kernels.small_matrices"),
    },
    "kernels.reference": {"features", "kernels.arguments", "kernels.reference", "kernels.small_matrices"},
    "kernels.ops": {"features", "kernels.arguments", "kernels.dispatch", "kernels.held", "kernels.reference"},
    "kernels": set(),
    "distributed": set(),
    "ownership": {"distributed"},
    "embedded": set(),
    "weights.reading": set(),
    "weights.formats": {"weights.formats", "weights.reading"},
    "weights.records": {"weights.formats", "weights.reading"},
    "weights.hub": set(),
    "weights.checks": set(),
    "weights.published": {"weights.formats"},
    "weights.locating": {"weights.formats", "weights.hub"},
    "weights.loading": {
        *("weights.formats", "weights.hub", "weights.checks", "weights.published"),
        *("weights.locating", "weights.reading", "weights.records"),
    },
    "weights.publish": {"weights.formats", "weights.hub", "weights.records", "weights.loading"},
    "weights.once_embedded": {"weights.checks", "weights.loading", "weights.reading"},
    "weights": {
        *("weights.once_embedded", "weights.formats", "weights.published", "weights.loading", "weights.publish"),
    },
    "step": {"features", "lr_scales", "ownership", "step", *KERNELS, *LEAVES},
    "rules": {"features", "step", "rules", *KERNELS, *LEAVES},
    "parameters": {"step"},
    "param_groups": {"parameters", "step", "rules"},
    "live_modules": set(),
    "lr_scales": set(),
    "pretrained": {"live_modules", "lr_scales", "parameters"},
    "tensor_sizes": {"distributed"},
    "least_sizes": {"live_modules", "parameters", "tensor_sizes", "distributed", "notices"},
    "reach": {"live_modules", "parameters", "tensor_sizes", "distributed"},
    "length_multiplier": {"live_modules", "lr_scales", "reach", "rules", "distributed"},
    "settings": {"arguments_given", "lr_scales", "step", "rules", "distributed"},
    "pending": set(),
    "given_settings": {"arguments_given", "live_modules", "lr_scales", "pretrained", "rules", "weights"},
    "state_formats": {"rules", "step", "distributed", "kernels.reference"},
    "saved_state": {"lr_scales", "state_formats", "settings", "rules", "step", "distributed"},
    "step_inputs": {"state_formats", "saved_state", "settings", "rules", "step", "distributed"},
    "rank_agreement": {"settings", "step", "distributed"},
    "accumulation": {"distributed"},
    "run_state": {
        *("accumulation", "length_multiplier", "pending", "reach", "settings", "step", "rules", "distributed"),
        "weights",
    },
    "run_monitor": {"run_state"},
    "optimizer": {
        "description",
        "pending",
        "given_settings",
        "run_monitor",
        "run_state",
        "least_sizes",
        "saved_state",
        "state_formats",
        "step_inputs",
        "rank_agreement",
        "settings",
        "rules",
        "step",
        *KERNELS,
        *LEAVES,
    },
    "optimizers": {"optimizer", "optimizers", "weights"},
    "feed": {"optimizer"},
    "hf": {
        "__init__",  # for the version, when it is asked for
        "description",
        "optimizers",
        "optimizer",
        "feed",
        "live_modules",
        "lr_scales",
        "pretrained",
        "given_settings",
        "pending",
        "run_state",
        "settings",
        "rules",
        "param_groups",
        "parameters",
        "hf",
        *LEAVES,
    },
    "hf.checkpoints": set(),
    "hf.memory": {"hf", "optimizers", "rules", "param_groups", "step"},
    "launch": {"hf"},
    "plot": set(),
    "meta": {"features", "step", "rules", "weights.publish", "meta", *KERNELS, *LEAVES},
    "__init__": {"kernels.ops", "optimizers", "optimizer", "feed", "rules", "param_groups", "hf"},
    "__main__": {
        *("__init__", "kernels.dispatch", "optimizers", "optimizer", "rules", "hf", "hf.memory"),
        *(*KERNELS, *LEAVES),
    },
}


def line_of(name: str) -> str:
    """The line of ``ALLOWED`` for the module, or the name in a module, ``name``: the longest that it begins with."""
    parts = name.split(".")
    lines = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    is_module = (PACKAGE / parts[0]).is_dir() or (PACKAGE / f"{parts[0]}.py").exists()
    return next((line for line in lines if line in ALLOWED), parts[0] if name and is_module else "__init__")


def unit(path: Path) -> str:
    return line_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))


def imported(path: Path) -> set[str]:
    """The units of the package that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "hf_lopt":
                found.add(line_of(rest))
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downstream(path):
    allowed = ALLOWED[unit(path)] | LEAVES_FOR_ALL
    assert imported(path) <= allowed, f"{path.name} imports {sorted(imported(path) - allowed)}"


def test_recipes_use_public_names_only():
    for path in (ROOT / "recipes").glob("*.py"):
        assert imported(path) <= {"__init__", "hf.checkpoints", "plot"}, path.name


def test_imports_without_transformers_and_without_kernels():
    """In a process where transformers and accelerate cannot be imported, the optimizer still trains."""
    code = """
import sys
for name in ("transformers", "accelerate", "hf_lopt._C", "hf_lopt._C_cuda"):
    sys.modules[name] = None
import torch, hf_lopt
p = torch.nn.Parameter(torch.ones(3, 4))
optimizer = hf_lopt.VeLO([p], num_training_steps=10, weights="bundled")
for _ in range(3):
    optimizer.zero_grad()
    loss = p.square().sum()
    loss.backward()
    optimizer.step(loss)
assert loss.item() < 12.0, loss
assert not any(name.startswith("transformers.") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT)
