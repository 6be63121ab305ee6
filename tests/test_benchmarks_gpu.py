"""The command for a GPU machine, rehearsed without one: every part runs, and a failure is a result."""

from __future__ import annotations

import json
import subprocess

import pytest

from benchmarks import gpu


class Done:
    def __init__(self, returncode: int):
        self.returncode, self.stdout = returncode, b"what it printed\n"


@pytest.fixture
def content(tmp_path, monkeypatch):
    """Runs the command and returns what is in its file then."""
    monkeypatch.setattr(gpu, "SIZES", {"355M": gpu.TINY})

    def run(*arguments: str) -> dict:
        gpu.main(["--device", "cpu", "--out", str(tmp_path), "--seconds", "0.01", *arguments])
        return json.loads((tmp_path / "cuda.json").read_text())

    return run


def test_every_part_runs_and_failures_do_not_stop_the_next(content, monkeypatch, tmp_path):
    calls = []

    def run(command, **options):
        calls.append(command)
        if "--small-steps" in command and sum("--small-steps" in c for c in calls) == 1:
            raise subprocess.TimeoutExpired(command, options["timeout"], output=b"as far as it came")
        return Done(1 if "captured" in command else 0)

    def measure(rule, *args):
        if rule == "celo2":
            raise RuntimeError("out of memory")
        return original(rule, *args)

    monkeypatch.setattr(subprocess, "run", run)
    original = gpu.measure
    monkeypatch.setattr(gpu, "measure", measure)
    found = content()
    checks = {name: x["result"] for name, x in found["checks"].items()}
    assert checks.pop("memcheck") == "stopped after 570 s"
    assert checks.pop("graph") == "failed (1)" and set(checks.values()) == {"passed"}
    assert found["checks"]["graph"]["output"] == "what it printed\n"
    assert len(found["rows"]) == len(gpu.RULES) * len(gpu.DTYPES)
    for row in found["rows"]:
        assert ("RuntimeError: out of memory" in row.get("failed", "")) == (row["rule"] == "celo2")
        assert row["rule"] == "celo2" or row["step_ms"] > 0
    assert len(found["launches"]) == 2 * len(gpu.RULES) and all("tensors" in x for x in found["launches"])
    table = (tmp_path / "cuda.md").read_text()
    assert "| celo2 | 355M | fp32 | failed |" in table and "a rehearsal, no measurement" in table
    assert (tmp_path / "cuda.png").exists() and not list(tmp_path.glob("*.part"))


def test_parts_run_alone_and_keep_what_was_found(content, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, **options: Done(0))
    first = content("--only", "golden")
    assert first["checks"]["golden"]["result"] == "passed" and first["checks"]["graph"]["result"] == "not run"
    second = content("--only", "speed", "--rules", "velo")
    assert second["checks"]["golden"]["result"] == "passed"
    measured = [row for row in second["rows"] if "step_ms" in row]
    assert [(row["rule"], row["dtype"]) for row in measured] == [("velo", "fp32"), ("velo", "bf16")]
    assert len(second["rows"]) == len(first["rows"])


def test_a_rehearsal_does_not_overwrite_results():
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu"])


def test_the_selections_of_tests_are_a_partition():
    """No test of the file for GPUs is left out, and none runs twice."""

    def collected(*selection: str) -> set[str]:
        command = [*gpu.PYTEST, "--collect-only", "tests/test_cuda.py", *selection]
        text = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, timeout=600).stdout
        return {line for line in text.splitlines() if "::" in line}

    parts = [collected(*gpu.CHECKS[part][part][-2:]) for part in ("properties", "graph", "launches")]
    assert all(parts) and sum(map(len, parts)) == len(set.union(*parts))
    assert set.union(*parts) == collected()
