"""Saves, loads and goes on at other numbers of ranks; run by test_sharding_checkpoints.py.

torchrun --nproc_per_node 3 sharded_checkpoints.py FOLDER LOAD[,LOAD...] [--save] [--killed]

Loads FOLDER/LOAD.* in both formats, goes on to the end of the run and writes the errors against FOLDER/whole.pt to
FOLDER/errors_WORLD_LOAD.json; with --save trains to the middle and writes FOLDER/WORLD.*. ``--killed`` dies in a save.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import test_rules as single  # noqa: E402
from ranks import leave  # noqa: E402


# velo accumulates two gradients per update: the middle of the run is the middle of an update, too.
RULES = {"velo": {"num_training_steps": 12, "max_training_steps": 6}, "celo2": {}, "rnn_mlp": {}, "small_fc_lopt": {}}
MIDDLE, END = 5, 9
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FULL_LOAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


class Model(nn.Module):
    """Uneven sizes, a shard of one row, tied, unused and frozen parameters."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(13, 6)
        self.hidden = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 6))
        self.norm = nn.RMSNorm(6)  # one that centres makes gradients of mean 0, whose sign is rounding
        self.row = nn.Parameter(torch.ones(1, 6))
        self.unused = nn.Linear(3, 5)
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.embedding.weight
        # Zero at the start of a run, and not where a checkpoint is loaded: its least size is that of the start.
        self.offset = nn.Parameter(0.1 * seed * torch.ones(8, 6))
        self.frozen = nn.Parameter(torch.ones(4, 6), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embedding(x) + self.offset
        h = self.norm(h + self.hidden(h)) * self.row + self.frozen.sum(0) * 0.01
        return self.head(h)


def build(name: str, seed: int = 0) -> tuple[nn.Module, Any]:
    model = Model(seed)
    if dist.is_initialized():
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model.hidden, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in model.parameters())
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": rest}]
    return model, single.make(name, groups, **RULES[name])


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    """All ranks see the same batch, so that their mean gradient is that of one process."""
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        x = torch.randint(0, 13, (4, 8), generator=generator)
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), x.roll(-1, 1).flatten())
        loss.backward()
        if t == 2:  # counted, and part of a checkpoint
            loss = loss * float("nan") if optimizer.rule.needs_loss else loss
        optimizer.step(loss)
        optimizer.zero_grad()


def save(folder: Path, stem: str, model: nn.Module, optimizer: Any) -> None:
    states = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(states, checkpoint_id=folder / f"{stem}.sharded")
    full = {"model": get_model_state_dict(model, options=FULL)}
    full["optimizer"] = get_optimizer_state_dict(model, optimizer, options=FULL)
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(full, folder / f"{stem}.full.pt")


def load(folder: Path, stem: str, form: str, model: nn.Module, optimizer: Any) -> None:
    if form == "sharded":
        states = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(states, checkpoint_id=folder / f"{stem}.sharded")
        set_model_state_dict(model, states["model"])
        set_optimizer_state_dict(model, optimizer, states["optimizer"])
        return
    several = dist.is_initialized() and dist.get_world_size() > 1
    full = {"model": {}, "optimizer": {}}
    if not several or dist.get_rank() == 0:
        full = torch.load(folder / f"{stem}.full.pt", weights_only=True)
    options = FULL_LOAD if several else FULL
    set_model_state_dict(model, full["model"], options=options)
    set_optimizer_state_dict(model, optimizer, full["optimizer"], options=options)


def snapshot(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Everything that a checkpoint has to bring back, whole."""

    def whole(x: Any) -> Any:
        return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()

    params = dict(model.named_parameters())
    names = {p: name for name, p in params.items()}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return {
        "params": {name: whole(p) for name, p in params.items()},
        "state": {
            names[p]: {k: whole(torch.as_tensor(v)) for k, v in own.items()}
            for p, own in optimizer.state.items()
            if own
        },
        "groups": groups,
    }


def error(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Largest errors, in units of the largest element of each tensor; whatever is no tensor has to be equal."""

    def off(x: torch.Tensor, y: torch.Tensor) -> float:
        assert x.shape == y.shape and x.dtype == y.dtype
        return ((x.double() - y.double()).abs().max() / y.double().abs().max().clamp_min(1e-30)).item()

    assert found["state"].keys() == expected["state"].keys()
    errors = {"params": [off(found["params"][name], y) for name, y in expected["params"].items()], "state": [0.0]}
    for name, own in expected["state"].items():
        assert found["state"][name].keys() == own.keys()
        errors["state"] += [off(found["state"][name][key], y) for key, y in own.items()]
    for group, own in zip(found["groups"], expected["groups"], strict=True):
        assert group.keys() == own.keys()
        for key, y in own.items():
            if isinstance(y, torch.Tensor):
                errors["state"].append(off(torch.as_tensor(group[key]), y))
            elif key != "weights_source":
                assert group[key] == y and type(group[key]) is type(y), (key, group[key], y)
    return {key: max(values) for key, values in errors.items()}


def alone(folder: Path) -> None:
    """FOLDER/whole.pt, the run without interruption, and FOLDER/1.*, its middle."""
    whole = {}
    for name in RULES:
        model, optimizer = build(name)
        train(model, optimizer, range(MIDDLE))
        save(folder, f"1.{name}", model, optimizer)
        middle = snapshot(model, optimizer)
        train(model, optimizer, range(MIDDLE, END))
        whole[name] = {"middle": middle, "end": snapshot(model, optimizer)}
    torch.save(whole, folder / "whole.pt")


def go_on(folder: Path, stem: str) -> dict[str, dict[str, float]]:
    """Errors after loading and at the end of the run, of a model that started elsewhere."""
    whole = torch.load(folder / "whole.pt", weights_only=True)
    found = {}
    for name in RULES:
        for form in ("sharded", "full"):
            model, optimizer = build(name, seed=1)
            load(folder, f"{stem}.{name}", form, model, optimizer)
            found[f"{name} {form} middle"] = error(snapshot(model, optimizer), whole[name]["middle"])
            train(model, optimizer, range(MIDDLE, END))
            found[f"{name} {form} end"] = error(snapshot(model, optimizer), whole[name]["end"])
    return found


def be_killed(folder: Path) -> None:
    """Die in the middle of a save, when the shards are written and what names them is not."""
    model, optimizer = build("velo")
    train(model, optimizer, range(MIDDLE))
    states = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.FileSystemWriter.finish = lambda *args, **kwargs: os._exit(9)
    dcp.save(states, checkpoint_id=folder / "killed.sharded")


def main(folder: Path, stems: list[str], *options: str) -> None:
    dist.init_process_group("gloo")
    for stem in stems:
        found = go_on(folder, stem)
        if dist.get_rank() == 0:
            (folder / f"errors_{dist.get_world_size()}_{stem}.json").write_text(json.dumps(found))
    if "--save" in options:
        for name in RULES:
            model, optimizer = build(name)
            train(model, optimizer, range(MIDDLE))
            save(folder, f"{dist.get_world_size()}.{name}", model, optimizer)
    dist.barrier()
    if "--killed" in options:
        be_killed(folder)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), *sys.argv[3:])
