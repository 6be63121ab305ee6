"""How tensors of transformers' architectures are routed, and what becomes of them: shapes, overrides, checkpoints."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from hf_lopt import Celo2, LearnedOptimizer, param_groups
from hf_lopt import __main__ as program
from hf_lopt.parameters import describe
from hf_lopt.step.accumulators import matrix_shape, matrix_view
from ranks import run_on_ranks


transformers = pytest.importorskip("transformers")
architectures = pytest.importorskip("architectures")


def read(path) -> tuple[str, list[str]]:
    """The version of transformers and the lines of a table."""
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    return first.rpartition(" ")[2], lines


# Each architecture is a test, so that one that a version of transformers cannot build fails alone.
@pytest.mark.parametrize("kind", architectures.ARCHITECTURES)
def test_routes_are_those_of_the_table(kind):
    """New lines are to be looked at: is each tensor of the branch "network" a matrix, and which axis is its input?"""
    version, table = read(architectures.SOME)
    wanted = [line for line in table if line.startswith(f"{kind} ")]
    cls = getattr(transformers, architectures.ARCHITECTURES[kind], None)
    if transformers.__version__ != version and (cls is None or not wanted):
        pytest.skip(f"{kind} is another one in transformers {transformers.__version__}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = architectures.lines(kind, architectures.build(kind, cls))
    if transformers.__version__ == version:
        assert found == wanted
    else:  # names may be others, routes of the same names may not
        routes = dict(line.split(" ", 2)[1:] for line in wanted)
        assert all(routes.get(name, route) == route for name, route in (line.split(" ", 2)[1:] for line in found))


@pytest.mark.sweep
def test_tensors_of_an_unusual_kind_in_all_architectures():
    version, table = read(architectures.ALL)
    routes = dict(line.split(" ", 1) for line in table)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = architectures.all_lines()
    pairs = [line.split(" ", 1) for line in found]
    others = [(name, route) for name, route in pairs if routes.get(name, route) != route]
    assert not others
    if transformers.__version__ == version:
        assert found == table


# --- matrices in several axes


@pytest.mark.parametrize(
    ("axis_order", "shape", "plain", "plain_shape"),
    [
        ("jax_merged", (12, 2, 4), "jax", (12, 8)),
        ("torch_merged", (12, 2, 4), "torch", (12, 8)),
        ("torch_stacked/3", (12, 6), "torch_stacked", (3, 4, 6)),
        ("jax/3", (12, 6), "jax", (3, 4, 6)),
        ("jax_merged", (12, 8), "jax", (12, 8)),
    ],
)
@pytest.mark.parametrize("rule", ["celo2", "velo", "small_fc_lopt"])
def test_a_tensor_steps_as_the_matrix_that_it_is(rule, axis_order, shape, plain, plain_shape):
    """Three steps, a checkpoint between them, are those of the same numbers in the plain shape, to the bit."""
    generator = torch.Generator().manual_seed(0)
    start, grads = torch.randn(shape, generator=generator), torch.randn(3, *shape, generator=generator)
    ends, horizon = [], {"num_training_steps": 10} if rule == "velo" else {}
    for order, seen in ((axis_order, shape), (plain, plain_shape)):
        p = nn.Parameter(start.clone().view(seen))

        def make(p=p, order=order):
            return LearnedOptimizer([{"params": [p], "axis_order": order}], rule, weights="bundled", **horizon)

        optimizer = make()
        for i, g in enumerate(grads):
            if i == 2:
                saved, optimizer = optimizer.state_dict(), make()
                optimizer.load_state_dict(saved)
            p.grad = g.view(seen).clone()
            optimizer.step(1.0 - 0.1 * i) if rule == "velo" else optimizer.step()
        ends.append(p.detach().reshape(-1))
    assert not torch.equal(ends[0], start.reshape(-1))
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    ("axis_order", "shape", "message"),
    [
        ("torch_stacked/5", (12, 6), r"\(5 n, m\) tensors, got shape \(12, 6\)"),
        ("jax/3", (3, 4, 6), r"\(3 n, m\)"),
        ("jax/0", (12, 6), "axis_order must be one of"),
        ("torch/3", (12, 6), "axis_order must be one of"),
    ],
)
def test_an_axis_order_that_does_not_fit_is_refused_at_once(axis_order, shape, message):
    with pytest.raises(ValueError, match=message):
        Celo2([{"params": [nn.Parameter(torch.ones(shape))], "axis_order": axis_order}], weights="bundled")


def test_memory_that_cannot_be_seen_so_is_refused():
    with pytest.raises(ValueError, match="not contiguous"):
        matrix_view(torch.ones(4, 3, 2).transpose(0, 1), "jax_merged")
    assert matrix_shape((5,), "jax_merged") == (5,)


@pytest.mark.slow
def test_on_two_ranks_they_step_as_on_one():
    run_on_ranks(2, "sharded_views.py")


def test_fused_experts_are_as_wide_as_one():
    kind = "dbrx"
    model = architectures.build(kind, getattr(transformers, architectures.ARCHITECTURES[kind]))
    experts = {p.leaf: p for p in describe(model) if type(p.owner).__name__ == "DbrxExpertGLU"}
    config, glu = model.config, experts["w1"].owner
    assert (experts["w1"].fan_in, experts["w1"].fan_out) == (config.d_model, glu.ffn_hidden_size)
    assert (experts["w2"].fan_in, experts["w2"].fan_out) == (glu.ffn_hidden_size, config.d_model)


# --- adapters


@pytest.mark.parametrize("rank", [4, 16])
def test_the_rank_of_an_adapter_is_no_width(rank):
    """Also where it is as large as the layer's input."""
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 8))
    model = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=["1"]))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups(model, "mulo", base_width=32)
    scales = {names[id(p)].split(".")[-3]: g["step_scale"] for g in groups for p in g["params"]}
    assert scales == {"lora_A": 2.0, "lora_B": 1.0}


# --- overrides


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(6, 4)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"router": nn.Linear(4, 3), "proj": nn.Linear(3, 4)}) for _ in range(2)
        )
        self.memory = nn.Parameter(torch.ones(5, 4))


def branches(**settings) -> dict[str, str]:
    model = Model()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups(model, "celo2", **settings)
    return {names[id(p)]: group["branch"] for group in groups for p in group["params"]}


def test_the_first_override_that_matches_decides():
    before = branches()
    assert before["layers.0.router.weight"] == "network" and before["memory"] == "adam"
    after = branches(
        overrides={r"layers\.1\.router\.weight": "network", r"router\.weight$": "adam", "memory": "network"}
    )
    changed = {name: branch for name, branch in after.items() if branch != before[name]}
    assert changed == {"layers.0.router.weight": "adam", "memory": "network"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"ruoter": "adam"}, "'ruoter' matches no trainable parameter. Near it are router"),
        ({"layers.0.ruoter.weight": "adam"}, r"Near it are layers\.0\.router\.weight"),
        ({"zzz": "adam"}, "There are memory, embed_tokens"),
        ({"router": "muon"}, "branch must be one of auto, network, adam, got 'muon' for 'router'"),
        ({"*router": "adam"}, "no regular expression"),
        ({"router": "adam", r"0\.router": "network"}, "decides about nothing"),
    ],
)
def test_mistaken_overrides(overrides, message):
    with pytest.raises(ValueError, match=message):
        branches(overrides=overrides)
    with pytest.raises(ValueError, match="velo has no branches"):
        param_groups(Model(), "velo", overrides=overrides)


def test_overrides_through_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    arguments = {"output_dir": str(tmp_path), "optim": "celo2", "use_cpu": True, "report_to": []}
    trainer = Trainer(Model(), TrainingArguments(**arguments, optim_args="branch:router=adam,weights=bundled"))
    optimizer = trainer.create_optimizer()
    routed = {id(p): group["branch"] for group in optimizer.param_groups for p in group["params"]}
    model = trainer.model
    assert routed[id(model.layers[0]["router"].weight)] == "adam"
    assert routed[id(model.layers[0]["proj"].weight)] == "network"
    trainer = Trainer(Model(), TrainingArguments(**arguments, optim_args="branch:ruoter=adam,weights=bundled"))
    with pytest.raises(ValueError, match="'ruoter' matches no"):
        trainer.create_optimizer()


# --- checkpoints


def test_a_checkpoint_keeps_its_branch_or_says_what_differs():
    def trained(**settings) -> LearnedOptimizer:
        torch.manual_seed(0)
        model = Model()
        optimizer = Celo2(param_groups(model, "celo2", **settings), weights="bundled")
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        return optimizer

    # As an earlier version did it: the table in the network.
    saved = trained(overrides={"memory": "network"}).state_dict()
    with pytest.raises(ValueError, match=r"(?s)earlier version.*overrides=\{pattern: branch\}.*--groups"):
        trained().load_state_dict(saved)
    again = trained(overrides={"memory": "network"})
    again.load_state_dict(saved)
    again.step()


# --- the table of a model


def test_the_program_prints_every_tensor(tmp_path, capsys):
    config = transformers.MambaConfig(vocab_size=20, hidden_size=8, state_size=4, num_hidden_layers=1)
    config.save_pretrained(tmp_path)
    program.main(["--groups", str(tmp_path), "--optim_args", "branch:x_proj=adam"])
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.startswith("backbone")}
    with torch.device("meta"):
        model = transformers.MambaForCausalLM(config)
    assert rows.keys() == {name for name, _ in model.named_parameters()}
    mixer = "backbone.layers.0.mixer"
    assert rows[f"{mixer}.A_log"] == ["16x4", "table", "0", "adam", "jax", "-", "-"]
    assert rows[f"{mixer}.in_proj.weight"] == ["32x8", "matrix", "0", "network", "torch", "-", "-"]
    assert rows[f"{mixer}.x_proj.weight"][3] == "adam"
    program.main(["--groups", str(tmp_path), "--optim", "mulo", "--optim_args", "base_width=4"])
    assert f"{mixer}.in_proj.weight" in (printed := capsys.readouterr().out)
    assert next(line for line in printed.splitlines() if "in_proj" in line).split()[-1] == "0.5"
    with pytest.raises(SystemExit):
        program.main(["--groups", str(tmp_path / "nothing")])
    assert "no model could be built" in capsys.readouterr().err
