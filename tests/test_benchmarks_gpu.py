"""The command for a GPU machine, without one: a rehearsal on the CPU, and which tests it would run."""

from __future__ import annotations

import json

import pytest

import test_cuda
from benchmarks import gpu


def test_a_rehearsal_measures_steps_and_keeps_what_was_found(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SIZES", {"355M": gpu.TINY})
    for rule in ("velo", "celo2"):
        arguments = ["--device", "cpu", "--out", str(tmp_path), "--seconds", "0.01", "--only", "speed"]
        gpu.main([*arguments, "--rules", rule])
    found = json.loads((tmp_path / "cuda.json").read_text())
    measured = [(row["rule"], row["dtype"]) for row in found["rows"] if row.get("step_ms", 0) > 0]
    assert sorted(measured) == sorted((rule, dtype) for rule in ("velo", "celo2") for dtype in ("fp32", "bf16"))
    assert (tmp_path / "cuda.png").exists() and not list(tmp_path.glob("*.part"))


def test_a_rehearsal_does_not_overwrite_results():
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu"])


def test_the_selections_of_tests_are_a_partition():
    """No test of the file for GPUs is left out by the parts of the command, and none runs twice."""
    names = [name for name in vars(test_cuda) if name.startswith("test_")]
    graph, launches = gpu.GRAPH.split(" or "), gpu.LAUNCHES.split(" or ")
    parts = [[name for name in names if any(word in name for word in words)] for words in (graph, launches)]
    assert all(parts) and not set(parts[0]) & set(parts[1]) and set(names) - set(parts[0]) - set(parts[1])
    # "properties" is what is in neither.
    assert gpu.CHECKS["properties"]["properties"][-1] == f"cuda and not ({gpu.GRAPH} or {gpu.LAUNCHES})"
