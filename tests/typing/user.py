"""A user's file: every optimizer with its arguments. A type checker has to find nothing to say about it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hf_lopt
from hf_lopt import ELO, RNNMLP, Celo, Celo2, CeloAdam, ELOCelo2, LearnedOptimizer, MuLO, SmallFC, VeLO, param_groups


model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))


def every_optimizer() -> list[LearnedOptimizer]:
    velo = VeLO(model.parameters(), num_training_steps=100, weights="bundled", min_param_scale=0.01, bank_scale=100.0)
    celo = Celo(model.parameters(), 1.0, 100, "auto", 0.1, "torch", 0.01, 10, 150_000)
    celo_adam = CeloAdam(model.named_parameters(), num_training_steps=100, max_training_steps=2_000)
    small_fc = SmallFC(model.parameters(), lr=torch.tensor(0.5), step_mult=0.001, step_scale=0.5, precision="tf32")
    mulo = MuLO(param_groups(model, "mulo", base_width=256), max_grad_norm=1.0, weights=Path("theta.state"))
    adam: dict[str, Any] = {"params": model[0].parameters(), "branch": "adam", "lr": 3e-4}
    celo2 = Celo2(
        [adam, {"params": model[1].parameters()}],
        lr=1e-3,
        weight_decay=0.1,
        orthogonalize=False,
        ns_dtype="bfloat16",
        branch="network",
        adam_lr_mult=1.0,
        adam_bias_correction=True,
    )
    rnn_mlp = RNNMLP(model.parameters(), max_nonfinite_steps=3, axis_order="jax", weights={"leaf": torch.ones(3)})
    elo = ELO(model.parameters(), lr=5e-5, weights=["networks/rnn", Path("networks/mlp")])
    elo_celo2 = ELOCelo2(params=model.parameters(), weights=velo.weights)
    by_name = LearnedOptimizer(model.parameters(), "velo_s", num_training_steps=100)
    return [velo, celo, celo_adam, small_fc, mulo, celo2, rnn_mlp, elo, elo_celo2, by_name]


def a_run(optimizer: VeLO, batches: list[Tensor]) -> dict[str, float]:
    optimizer.num_training_steps = len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for x in batches:
        optimizer.zero_grad()
        loss: Tensor = model(x).square().mean()
        torch.autograd.backward(loss)  # Tensor.backward has no annotations
        optimizer.observe_loss(loss)
        nothing: None = optimizer.step()
        assert nothing is None
        schedule.step()
    if optimizer.has_observed_loss:
        optimizer.scale_observed_loss(0.5)
        optimizer.discard_loss()
    steps: int = optimizer.steps_done
    report: dict[str, Tensor] = optimizer.report
    print(steps, report.keys(), optimizer.rule.name, optimizer.weights.sha256)
    return optimizer.metrics()


def losses(optimizer: LearnedOptimizer, closure: Callable[[], float], tensor_closure: Callable[[], Tensor]) -> float:
    loss: Tensor = optimizer.step(torch.tensor(1.0))
    number: float = optimizer.step(1.0)
    returned: float = optimizer.step(closure)
    tensor: Tensor = optimizer.step(tensor_closure)
    return number + returned + loss.item() + tensor.item()


def a_checkpoint(optimizer: LearnedOptimizer) -> torch.optim.Optimizer:
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "weight_decay": 0.0})
    twin = copy.deepcopy(optimizer)
    twin.load_state_dict(optimizer.state_dict())
    twin.reset_state()
    return twin


names: tuple[str, ...] = hf_lopt.available()
version: str = hf_lopt.__version__
