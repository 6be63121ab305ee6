"""The package's imports follow its data flow and never turn back; and it imports with little around it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_lopt"
# What each module may import from the package. A package name stands for its modules.
LEAVES = {"distributed", "formats", "hub", "weights", "embedded"}
ALLOWED = {
    "_load": set(),
    "_plain": set(),
    "_plain_scheduler": {"_plain"},
    "_plain_steps": {"_plain"},
    "_ops": {"_load", "_plain", "_plain_scheduler", "_plain_steps"},
    "distributed": set(),
    "embedded": set(),
    "formats": set(),
    "hub": set(),
    "writers": {"formats"},
    "publish": {"formats", "hub", "writers"},
    "weights": {"formats", "hub", "publish", "distributed", "embedded"},
    "accumulators": {"_ops", "_plain", "distributed"},
    "features": {"_ops", "_plain_scheduler", "accumulators", "distributed"},
    "networks": {"_plain_scheduler"},
    "rules": {"_ops", "_plain_scheduler", "accumulators", "features", "networks", "rules", *LEAVES},
    "param_groups": {"accumulators", "rules"},
    "settings": {"accumulators", "rules", "distributed"},
    "run_state": {"settings", "rules", "distributed", "weights"},
    "optimizer": {"run_state", "settings", "_ops", "rules", *LEAVES},
    "optimizers": {"optimizer", "optimizers", "weights"},
    "hf": {"optimizers", "optimizer", "rules", "param_groups", "hf", *LEAVES},
    "launch": {"hf"},
    "plot": set(),
    "meta": {"rules", "networks", "features", "accumulators", "_ops", "publish", "meta", *LEAVES},
    "__init__": {"optimizers", "optimizer", "param_groups", "hf"},
    "__main__": {"__init__", "_load", "_ops", "optimizer", "rules", "hf", *LEAVES},
}


def unit(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


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
                first = rest.split(".")[0]
                exists = (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").exists()
                found.add(first if first and exists else "__init__")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downstream(path):
    allowed = ALLOWED[unit(path)]
    assert imported(path) <= allowed, f"{path.name} imports {sorted(imported(path) - allowed)}"


def test_recipes_use_public_names_only():
    for path in (ROOT / "recipes").glob("*.py"):
        assert imported(path) <= {"__init__"}, path.name


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
