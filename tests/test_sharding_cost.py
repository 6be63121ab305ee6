"""What a step sends: a fixed number of collectives whatever the number of tensors, and only small ones where the rule
is element-wise. Counted from the operators of torch.distributed that really ran, on four gloo ranks."""

from __future__ import annotations

import json
import sys

import pytest

from hf_lopt import rules
from hf_lopt.features import VELO
from ranks import ROOT, SCRIPTS, run_on_ranks


sys.path += [str(ROOT), str(SCRIPTS)]

import sharded_collectives as collectives  # noqa: E402

from benchmarks import sharding  # noqa: E402


pytestmark = pytest.mark.slow

# Two all-reduces: row and column sums, then the statistics with the loss. rnn_mlp has no row and column sums, but its
# messages; celo2_base adds the mean squares of its steps, its relatives two all-to-alls, elo_celo2 a norm as well.
COLLECTIVES = {"celo_adam": 1, "rnn_mlp": 3, "celo2_base": 3, "celo2": 4, "elo_celo2": 5}
MATRIX = 24 * 40 * 4
every_rule = pytest.mark.parametrize("name", rules.names())
every_mesh = pytest.mark.parametrize("mesh", list(collectives.RULES))
every_case = pytest.mark.parametrize(
    ("mesh", "name"), [(mesh, name) for mesh, names in collectives.RULES.items() for name in names]
)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("collectives") / "calls.json"
    run_on_ranks(4, "sharded_collectives.py", path)
    return json.loads(path.read_text())


@every_rule
def test_collectives_on_one_mesh_dimension(recorded, name):
    for count in ("4", "16"):
        assert len(recorded["line"][count][name]["calls"][0]) == COLLECTIVES.get(name, 2)


@every_case
def test_collectives_do_not_grow_with_the_number_of_tensors(recorded, mesh, name):
    few, many = ([[op for op, _ in calls] for calls in recorded[mesh][count][name]["calls"]] for count in ("4", "16"))
    assert few == many
    # Two groups on a mesh of two dimensions; all-to-alls go over all of it at once.
    assert len(few[0]) <= 2 * COLLECTIVES.get(name, 2)


@every_case
def test_an_all_reduce_is_small(recorded, mesh, name):
    """Under a kilobyte per matrix and reduction: no gradient, parameter or accumulator is ever in one."""
    for count in ("4", "16"):
        for calls in recorded[mesh][count][name]["calls"]:
            assert all(op in ("allreduce_", "alltoall_base_") for op, _ in calls)
            assert all(size < 512 * (int(count) + 1) for op, size in calls if op == "allreduce_")


def test_bytes_of_velo(recorded):
    """By hand. Reduction 1, float32: of a matrix cut along its largest axis the sums of the other, 24 numbers; of one
    cut along the other axis its 40 sums and four more for the mean of the row accumulator. Reduction 2, float64: five
    shared numbers, and 11 statistics and 30 feature columns for each tensor, the vector included."""
    for matrices in (4, 16):
        (_, first), (_, second) = recorded["line"][str(matrices)]["velo"]["calls"][0]
        assert first == 4 * (matrices // 2) * (24 + 40 + 4)
        assert second == 8 * (5 + (matrices + 1) * (11 + sum(VELO.widths())))


@pytest.mark.parametrize("name", ["celo2", "elo_celo2"])
@every_mesh
def test_each_rank_orthogonalises_its_share(recorded, mesh, name):
    """16 matrices of one size on 4 ranks: four each. Every element travels to one owner and back to its holders."""
    found = recorded[mesh]["16"][name]
    assert found["orthogonalised"] == [4, 4, 4, 4]
    sent = [[size for op, size in calls if op == "alltoall_base_"] for calls in found["calls"]]
    holders = 2 if mesh == "hsdp" else 1
    assert [sum(sizes) for sizes in zip(*sent, strict=True)] == [16 * MATRIX, holders * 16 * MATRIX]


def test_the_model_of_the_cost_counts_the_same_bytes(recorded):
    shapes = collectives.shapes(16)
    calls = recorded["line"]["16"]["velo"]["calls"][0]
    assert tuple(size for _, size in calls) == sharding.reduction_bytes(shapes)


def test_the_page_shows_the_model():
    page = ROOT / "benchmarks" / "results" / "sharding_model.md"
    assert sharding.model_tables() in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp2", "hsdp"])
def test_accelerate_reads_the_recipes(name):
    config = pytest.importorskip("accelerate.commands.config.config_args")
    found = config.load_config_from_file(str(ROOT / "recipes" / "accelerate" / f"{name}.yaml"))
    kind = {"single": "NO", "ddp": "MULTI_GPU"}.get(name, "FSDP")
    assert found.distributed_type.value == kind
    if kind == "FSDP":
        assert found.fsdp_config["fsdp_version"] == 2
    if name == "hsdp":
        sizes = found.parallelism_config
        replicas, shards = (sizes[f"parallelism_config_dp_{kind}_size"] for kind in ("replicate", "shard"))
        assert replicas * shards == found.num_processes
