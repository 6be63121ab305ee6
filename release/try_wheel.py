"""Ten steps of Trainer with the installed package, kernels required; run by make_wheel.py in the new environment."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import hf_lopt
from hf_lopt.kernels import dispatch


class Regression(nn.Module):
    """A perceptron with the loss that Trainer asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The mean squared error of a batch (N, 8) with labels (N, 1)."""
        out = self.layers(x)
        return {"loss": nn.functional.mse_loss(out, labels), "logits": out}


def main() -> None:
    """Train, and end with an exit status other than 0 unless kernels ran and the loss fell."""
    assert Path(hf_lopt.__file__).is_relative_to(sys.prefix), hf_lopt.__file__
    assert dispatch.loaded("cpu"), "the compiled kernels do not load"
    assert not (shutil.which("c++") or shutil.which("g++")), "there is a compiler on the path"
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    labels = x.sum(1, keepdim=True)
    model = Regression()
    before = model(x, labels)["loss"].item()
    with tempfile.TemporaryDirectory() as folder:
        options = {"max_steps": 10, "logging_steps": 10, "report_to": [], "disable_tqdm": True, "use_cpu": True}
        args = TrainingArguments(folder, optim="velo", save_strategy="no", **options)
        data = [{"x": a, "labels": b} for a, b in zip(x, labels, strict=True)]
        trainer = Trainer(model, args, train_dataset=data)
        trainer.train()
    after = model(x, labels)["loss"].item()
    assert trainer.state.global_step == 10 and after < before, (trainer.state.global_step, before, after)
    sys.stdout.write(f"ten Trainer steps with fused kernels: loss {before:.2f}, then {after:.2f}\n")


if __name__ == "__main__":
    main()
