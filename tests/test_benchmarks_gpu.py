"""The command for a GPU machine, without one: a rehearsal on the CPU, and which tests it would run."""

from __future__ import annotations

import json
import sys

import pytest

import cases
import golden
import test_cuda
import test_golden
from benchmarks import gpu, gpu_measure


@pytest.fixture
def rehearse(tmp_path, monkeypatch):
    """Runs the command with the checks pretended; returns its results and the commands of the checks."""

    def run(*arguments: str, check=lambda command, limit, rehearsal: ({"result": "passed"}, "text")):
        commands = []

        def pretended(command, limit, rehearsal):
            commands.append((command, limit))
            return check(command, limit, rehearsal)

        monkeypatch.setattr(gpu, "check", pretended)
        common = ["--device", "cpu", "--out", str(tmp_path), "--seconds", "0.01"]
        gpu.main([*common, *arguments])
        return json.loads((tmp_path / "cuda.json").read_text()), commands

    return run


def results(found: dict) -> list[str]:
    rows = [row for table in ("kernels", "rows", "training", "launches") for row in found[table]]
    return [x.get("result", "passed" if "date" in x else "not run") for x in (*found["checks"].values(), *rows)]


def test_a_quick_rehearsal_within_its_budget(rehearse, tmp_path):
    found, commands = rehearse("--quick", "--budget", "600")
    assert all(row.get("step_ms", 0) > 0 for row in found["rows"] if row["size"] == "355M" and "date" in row)
    measured = {(row["rule"], row["dtype"]) for row in found["rows"] if "step_ms" in row}
    assert measured == {(r, d) for r in gpu.QUICK["rules"] for d in ("fp32", "bf16")}
    assert [x["optimizer"] for x in found["training"] if x.get("tokens_per_s", 0) > 0] == ["adamw", "velo"]
    assert found["copy_gb_per_s"] > 0 and set(results(found)) == {"passed", "not run"}
    assert all(limit <= 150 for _, limit in commands) and len(found["about"]["_C"]) == 12
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"cuda.json", "cuda.md", "cuda.png", "cuda.log"}


def test_parts_come_in_the_order_of_their_value_and_end_with_the_budget(rehearse, monkeypatch):
    """A clock on which every check takes a hundred seconds, all of them more than there are."""
    now = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])

    def check(command, limit, rehearsal):
        assert limit <= 250 - now[0]
        now[0] += min(limit, 100.0)
        return {"result": "passed"}, ""

    parts = ("sanitizer", "properties", "graph", "golden", "launches")
    found, commands = rehearse("--budget", "250", "--only", *parts, check=check)
    names = ("golden", "graph", "launches", "properties", "memcheck", "racecheck")
    assert [found["checks"][name]["result"] for name in names] == ["passed"] * 3 + ["not run: time"] * 3
    assert [limit for _, limit in commands] == [250, 150, 50]
    assert {row["result"] for row in found["launches"]} == {"not run: time"}


def test_nothing_is_measured_of_kernels_that_are_wrong(rehearse):
    found, commands = rehearse("--quick", check=lambda *_: ({"result": "failed (1)"}, ""))
    assert len(commands) == 1 and set(results(found)) == {"passed", "failed (1)", "not run"}


def test_checks_are_commands_that_run(monkeypatch, capsys):
    """The reference trajectories also without pytest; the others as pytest finds their tests."""
    found, text = gpu.check([sys.executable, "-c", "print('said')"], 60, False)
    assert found["result"] == "passed" and "said" in text
    found, text = gpu.check([sys.executable, "-c", "import time; print('said', flush=True); time.sleep(60)"], 2, False)
    assert found["result"] == "stopped after 2 s" and "said" in found["output"]
    for module in (cases, golden, test_golden, pytest):
        monkeypatch.delitem(sys.modules, module.__name__)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    gpu.golden("cpu")
    assert "2 trajectories follow" in capsys.readouterr().out
    assert gpu.rehearsal_of(gpu.CHECKS["sanitizer"]["memcheck"].command)[1:] == [
        *gpu.OURS[1:], "--small-steps", "--device", "cpu",
    ]  # fmt: skip


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
    command = gpu.CHECKS["properties"]["properties"].command
    assert command[-1] == f"cuda and not ({gpu.GRAPH} or {gpu.LAUNCHES})"


def test_kernels_are_known_by_their_names():
    assert gpu_measure.is_ours("void hf_lopt::(anonymous namespace)::sums_kernel(hf_lopt::SumsArgs)")
    assert not gpu_measure.is_ours("void at::native::vectorized_elementwise_kernel<4>(int)")
