"""A raw Accelerate loop of the shape of diffusers' unconditional image generation, on 4 x 4 images of noise.

A model of plain PyTorch that predicts noise, an averaged copy of it, AdamW with all its arguments, a scheduler that a
function of its own builds with a warm-up in micro-batches, clipping when gradients are complete. It knows nothing of
hf_lopt.
"""

import argparse
import copy
import json

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset


def get_scheduler(name, optimizer, num_warmup_steps=None, num_training_steps=None):
    if name == "constant":
        return LambdaLR(optimizer, lambda step: 1.0)
    return LambdaLR(
        optimizer,
        lambda step: min(step / max(1, num_warmup_steps), (num_training_steps - step) / num_training_steps),
    )


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.time = nn.Embedding(10, 8)
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, images, times):
        return self.last(F.silu(self.norm(self.first(images) + self.time(times)[:, :, None, None])))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr_scheduler", default="cosine")
    parser.add_argument("--num_epochs", type=int, default=3)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--result", required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=args.gradient_accumulation_steps)
    model = Denoiser()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    loader = DataLoader(TensorDataset(torch.randn(48, 3, 4, 4)), batch_size=8, shuffle=True)
    scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=4 * args.gradient_accumulation_steps,
        num_training_steps=len(loader) * args.num_epochs,
    )
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    logged = []
    for _ in range(args.num_epochs):
        model.train()
        for (clean,) in loader:
            noise, times = torch.randn_like(clean), torch.randint(0, 10, (len(clean),))
            share = (times / 10.0)[:, None, None, None]
            with accelerator.accumulate(model):
                loss = F.mse_loss(model((1 - share) * clean + share * noise, times).float(), noise.float())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                with torch.no_grad():
                    for kept, p in zip(average.parameters(), model.parameters(), strict=True):
                        kept.lerp_(p, 0.1)
            logged.append({"loss": loss.detach().item(), "lr": scheduler.get_last_lr()[0]})

    inner = optimizer.optimizer
    with open(args.result, "w") as file:
        json.dump(
            {
                "optimizer": type(inner).__name__,
                "horizon": getattr(inner, "num_training_steps", None),
                "weight_decay": [group["weight_decay"] for group in inner.param_groups],
                "logged": logged,
            },
            file,
        )


if __name__ == "__main__":
    main()
