"""Two ranks of DistributedDataParallel over gloo: the loss is that of both, and resuming is bitwise.

The ranks run scripts/ddp_training.py once, under torchrun and hf_lopt.launch; the tests look at what it found.
Expected losses are recomputed there from the batches of both ranks with the parameters before each step.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_cases as cases


SCRIPT = Path(__file__).parent / "scripts" / "ddp_training.py"
ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "hf_lopt.launch", str(SCRIPT), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-6000:]
    return [json.loads((folder / f"rank{i}.json").read_text()) for i in range(2)]


@pytest.mark.parametrize("case", ["token_mean", "local_token_mean", "mean_of_means", "raw_loop"])
def test_the_loss_is_that_of_both_ranks(ranks, case):
    """In the state (float32, read out with ten times its rounding), the recomputation, and Trainer's log."""
    for rank in ranks:
        found = rank[case]
        assert len(found["seen"]) == (3 if case == "raw_loop" else 6)
        assert found["seen"] == pytest.approx(found["recomputed"], abs=2e-5)
        if "logged" in found:
            assert found["seen"] == pytest.approx(found["logged"], abs=cases.LOG_TOLERANCE)
    assert ranks[0][case]["seen"] == ranks[1][case]["seen"]


def test_the_cases_differ(ranks):
    """The three ways to average give different numbers, so that the test above can tell them apart."""
    series = [ranks[0][case]["recomputed"] for case in ("token_mean", "local_token_mean", "mean_of_means")]
    for i, a in enumerate(series):
        for b in series[:i]:
            assert max(abs(x - y) for x, y in zip(a, b, strict=True)) > 1e-3


@pytest.mark.skipif(
    cases.NO_RESUMING_ON_CPU_RANKS, reason="this Trainer loads no optimizer's state on several CPU ranks: cpu:0"
)
def test_resuming_is_bitwise_and_the_ranks_agree(ranks):
    digests = {rank["resuming"][key] for rank in ranks for key in ("whole", "resumed")}
    assert len(digests) == 1
    assert ranks[0]["resuming"]["steps"] == [6, 6]


def test_one_rank_speaks(ranks):
    assert [rank["warned"] for rank in ranks] == [1.0, 1.0]


def test_the_ranks_count_the_same_epochs(ranks):
    """12 updates of 2 and of 3 an epoch are 6 and 4 epochs."""
    assert [rank["epochs"] for rank in ranks] == [{"told": 4.0, "uneven": 5.0}] * 2
    # 45 steps of 4.5 an epoch.
    assert [rank["epochs_of_raw_loop"] for rank in ranks] == [{"batches": n, "epochs": 10.0} for n in (5, 4)]


def test_fsdp1_is_refused(ranks):
    for rank in ranks:
        assert "FSDP1 (TrainingArguments" in rank["refusal"] and "DistributedDataParallel" in rank["refusal"]
