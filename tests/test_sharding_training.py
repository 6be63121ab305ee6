"""A tiny Llama under FSDP2, through Trainer, Accelerate and by hand, ends where one process ends.

The ranks run scripts/sharded_training.py; it asserts that parameters and accumulators are DTensors, because Accelerate
drops FSDP on CPU without a word.
"""

from __future__ import annotations

import json
import sys

import pytest

import hf_lopt
from ranks import SCRIPTS, run_on_ranks


sys.path.append(str(SCRIPTS))

import sharded_training as script  # noqa: E402


pytestmark = pytest.mark.slow
RULES = hf_lopt.available()
# torchrun on so many ranks -> what they do, in this order; the second reads the checkpoints of the first.
RUNS = {
    2: ["short", "tensor_parallel", "by_accelerate", *(f"by_trainer:{name}" for name in RULES)]
    + ["by_trainer:velo:FULL_STATE_DICT", "fine_tuned", "fine_tuned:2"],
    3: [f"by_trainer_again:2:{name}" for name in RULES]
    + ["by_trainer_again:2:velo:FULL_STATE_DICT", "by_trainer", "after_killed"],
    4: ["tensor_parallel", "by_trainer:celo2", "by_trainer_again:3"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    script.alone(folder)
    return folder


@pytest.fixture(scope="module")
def errors(folder):
    """What every case found, by (ranks, case)."""
    assert run_on_ranks(2, "sharded_training.py", folder, "killed", check=False).returncode != 0
    for world, names in RUNS.items():
        run_on_ranks(world, "sharded_training.py", folder, *names)
    return {
        (world, name): json.loads((folder / f"{world}_{name.replace(':', '_')}.json").read_text())
        for world, names in RUNS.items()
        for name in names
    }


@pytest.mark.parametrize("name", RULES)
def test_steps_through_trainer(errors, name):
    assert errors[2, f"by_trainer:{name}"]["end"] <= 2e-6


@pytest.mark.parametrize("name", RULES)
def test_resumed_on_another_number_of_ranks(errors, name):
    assert errors[3, f"by_trainer_again:2:{name}"]["end"] <= 2e-6


def test_more_ranks(errors):
    assert errors[3, "by_trainer"]["end"] <= 2e-6
    assert errors[4, "by_trainer:celo2"]["end"] <= 2e-6
    assert errors[4, "by_trainer_again:3"]["end"] <= 2e-6


def test_full_state_dict(errors):
    assert errors[2, "by_trainer:velo:FULL_STATE_DICT"]["end"] <= 2e-6
    assert errors[3, "by_trainer_again:2:velo:FULL_STATE_DICT"]["end"] <= 2e-6


def test_new_layers_of_a_pretrained_model(errors):
    """FSDP2 replaces the tensors that from_pretrained has marked; the resumed model comes with a head.

    As many ranks as before: Trainer multiplies this model's loss by their number, for every optimizer.
    """
    assert errors[2, "fine_tuned"]["end"] <= 2e-6
    assert errors[2, "fine_tuned:2"]["end"] <= 2e-6


def test_killed_while_saving(errors, folder):
    """Killed while the second checkpoint was being saved; the first loads, on another number of ranks too."""
    assert (folder / "killed" / f"checkpoint-{2 * script.SAVED}").is_dir()
    assert not list((folder / "killed" / f"checkpoint-{2 * script.SAVED}").glob("optimizer*/.metadata"))
    assert errors[3, "after_killed"]["end"] <= 2e-6


def test_accelerate(errors):
    """prepare, backward, save_state and load_state."""
    assert max(errors[2, "by_accelerate"].values()) <= 2e-6


@pytest.mark.parametrize(
    "case",
    ["fully_shard", "celo2", "clipped", "halves", "activation checkpoints", "compiled eager", "compiled aot_eager"]
    + ["offloaded", "multiplier"],
)
def test_by_hand(errors, case):
    assert errors[2, "short"][case] <= 2e-6


def test_mixed_precision(errors):
    """Computing in bfloat16 changes the gradients, so the parameters are near, not the same."""
    assert 1e-5 < errors[2, "short"]["bfloat16 compute"] < 5e-2


@pytest.mark.parametrize("world", [2, 4])
def test_tensor_parallel(errors, world):
    """Alone on two ranks; on four with FSDP2 over it."""
    assert max(errors[world, "tensor_parallel"].values()) <= 2e-6
