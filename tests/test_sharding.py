"""Sharded parameters give what a single process gives, for every rule, mesh and number of ranks.

The ranks run scripts/sharded.py over gloo, once per number of ranks with everything in it, because
starting them costs more than training. The script asserts that parameters and accumulators are DTensors with the exact
global shapes, so that nothing here can pass on plain tensors.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from hf_lopt import rules
from ranks import SCRIPTS, run_on_ranks


sys.path.append(str(SCRIPTS))

import sharded  # noqa: E402


pytestmark = pytest.mark.slow

CASES = [
    (world, layout)
    for world, layouts in {
        2: ("fsdp", "columns", "beside_plain"),
        3: ("fsdp", "beside_plain"),
        4: ("hsdp", "fsdp_tp", "strided", "several_meshes"),
    }.items()
    for layout in layouts
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "alone.pt"
    torch.save(sharded.reference(), path)
    return path


@pytest.fixture(scope="module")
def errors(reference, tmp_path_factory):
    """(world size) -> what the script writes, run when first asked for."""
    found: dict[int, dict] = {}

    def of(world: int) -> dict:
        if world not in found:
            result = tmp_path_factory.mktemp(f"world{world}") / "errors.json"
            run_on_ranks(world, "sharded.py", reference, result)
            found[world] = json.loads(result.read_text())
        return found[world]

    return of


@pytest.mark.parametrize("name", rules.names())
@pytest.mark.parametrize(("world", "layout"), CASES)
def test_twelve_steps_are_those_of_one_process(errors, world, layout, name):
    """Within 2e-6 of the largest element of each parameter, and 2e-5 of each state."""
    parameters, states = errors(world)["errors"][layout][name]
    assert parameters <= 2e-6
    assert states <= 2e-5


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize(("world", "layout"), CASES)
def test_random_rounding_is_that_of_one_process(errors, world, layout, kind):
    """Parameters and state of matrices to the bit, whatever the cut: the random numbers belong to the elements."""
    assert errors(world)["rounding"][layout][kind]


def test_every_layout_was_looked_at(errors):
    assert {world: set(errors(world)["errors"]) for world, _ in CASES} == {
        world: {layout for w, layout in CASES if w == world} for world, _ in CASES
    }


# ---- ranks that do not train the same thing -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def messages(tmp_path_factory):
    path = tmp_path_factory.mktemp("errors") / "messages.json"
    run_on_ranks(3, "sharded_errors.py", path)
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("case", "difference"),
    [
        ("weights", "weights_sha256: [0-9a-f]{64} on rank 0, [0-9a-f]{64} on rank 2"),
        ("horizon", "num_training_steps: 20 on rank 0, 30 on rank 2"),
        ("rule", "rule: velo on rank 0, velo_s on rank 2"),
        ("shape", r"parameter 1: \(2, 5\) float32 with a gradient on rank 0, \(5, 2\) float32 with"),
        ("missing", r"parameter 2: \(6,\) float32 with a gradient on rank 0, none on rank 2"),
        ("gradient", r"parameter 1: .*with a gradient on rank 0, .*without a gradient on rank 2"),
        ("lr", "lr of parameter 0: 1.0 on rank 0, 0.5 on rank 2"),
        ("lr_scales", "lr_scales of group 0: 1 for all on rank 0, 1: 2 on rank 2"),
    ],
)
def test_ranks_that_differ_are_told_at_the_first_step(messages, case, difference):
    """On every rank, by name, instead of a hang."""
    for message in messages[case]:
        assert re.match("the ranks do not train the same thing. " + difference, message)


def test_ranks_that_agree_are_left_alone(messages):
    """Also when a parameter has no gradient in a later step."""
    assert set(messages["nothing"] + messages["later"]) == {""}
