"""Tensors that start at or near zero: a floor for each kind, on validation tasks that need such tensors.

    python -m benchmarks.zero_init sweep [--celo FILE]     # -> benchmarks/results/zero_init.json
    python -m benchmarks.zero_init plain [--celo FILE]     # models that need no floor, into the same file

Numbers are held-out losses after the last step, means over seeds, for values of one floor (hf_lopt/least_sizes.py),
the others as they are. ``--celo`` names a file of published Celo weights. One thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.small_runs import mean, train
from benchmarks.storing import rounded, write_record
from hf_lopt import least_sizes
from hf_lopt.meta.table import machine


RESULTS = Path(__file__).parent / "results"
STEPS, BATCH, HELD_OUT = 150, 32, 256
ADAMW = (1e-3, 1e-2)

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A model from random weights, batches (count, generator), and the loss of a batch."""

    model: Callable[[], nn.Module]
    batch: Callable[[int, torch.Generator], Batch]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]


# ---- data -----------------------------------------------------------------------------------------------------------


def copied(count: int, draw: torch.Generator) -> Batch:
    """Sequences (count, 24) in which every second token is the one before."""
    x = torch.randint(3, 64, (count, 24), generator=draw)
    x[:, 1::2] = x[:, ::2]
    return x, x


def quarters(count: int, draw: torch.Generator) -> Batch:
    """Images (count, 3, 16, 16) with a little noise; the class is the bright quarter."""
    y = torch.randint(4, (count,), generator=draw)
    x = 0.1 * torch.randn(count, 3, 16, 16, generator=draw)
    for i, q in enumerate(y.tolist()):
        row, column = 8 * (q // 2), 8 * (q % 2)
        x[i, :, row : row + 8, column : column + 8] += 1
    return x, y


def textures(count: int, draw: torch.Generator) -> Batch:
    """Noisy images (count, 3, 16, 16) with stripes; the class is their direction and width."""
    y = torch.randint(4, (count,), generator=draw)
    at = torch.arange(16.0)
    waves = torch.stack([torch.sin(at * f).expand(16, 16) for f in (0.8, 1.6)])
    waves = torch.cat([waves, waves.mT])
    return waves[y].unsqueeze(1) + 2 * torch.randn(count, 3, 16, 16, generator=draw), y


def mixtures(count: int, draw: torch.Generator) -> Batch:
    """Vectors (count, 16); the class is the number of pairs of neighbours with the same sign, up to 8."""
    x = torch.randn(count, 16, generator=draw)
    return x, (x[:, ::2] * x[:, 1::2] > 0).sum(1)


def retrieved(count: int, draw: torch.Generator) -> Batch:
    """(count, 8, 2) int64: a sequence, and beside it a source that holds the answer at the same place."""
    x = torch.randint(16, (count, 8, 2), generator=draw)
    return x, x[:, :, 1]


# ---- models ---------------------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """A transformer that reads a second sequence through attention behind a gate tanh(0), as Mllama and Idefics do."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.source = nn.Embedding(16, 32), nn.Embedding(16, 32)
        self.positions = nn.Parameter(0.5 * torch.randn(8, 32))
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.norm = nn.LayerNorm(32)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        own, other = self.tokens(x[..., 0]) + self.positions, self.source(x[..., 1]) + self.positions
        own = own + torch.tanh(self.attention_gate) * self.attention(own, other, other)[0]
        return self.head(own + self.mlp(self.norm(own)))


class Residual(nn.Module):
    """Residual blocks whose last layer starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(16, 48), nn.Linear(48, 9)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48)) for _ in range(3)
        )
        for block in self.blocks:
            nn.init.zeros_(block[3].weight)
            nn.init.zeros_(block[3].bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class ZeroGamma(nn.Module):
    """A small ResNet whose last norm of each block starts at zero, as with ``zero_init_residual``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.Linear(12, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(12, 12, 3, padding=1, bias=False),
                nn.BatchNorm2d(12),
                nn.ReLU(),
                nn.Conv2d(12, 12, 3, padding=1, bias=False),
                nn.BatchNorm2d(12),
            )
            for _ in range(2)
        )
        for block in self.blocks:
            nn.init.zeros_(block[4].weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x.mean((2, 3)))


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def gemma() -> nn.Module:
    config = transformers.GemmaConfig(vocab_size=64, num_key_value_heads=2, head_dim=8, **SMALL)
    return transformers.GemmaForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=24)
    return transformers.GPT2LMHeadModel(config)


def beit() -> nn.Module:
    config = transformers.BeitConfig(
        image_size=16,
        patch_size=4,
        use_absolute_position_embeddings=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        drop_path_rate=0.0,
        num_labels=4,
        **SMALL,
    )
    return transformers.BeitForImageClassification(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(image_size=16, patch_size=4, num_labels=4, **SMALL)
    return transformers.ViTForImageClassification(config)


def convnext() -> nn.Module:
    config = transformers.ConvNextConfig(
        hidden_sizes=[12, 24], depths=[2, 2], num_stages=2, patch_size=2, image_size=16, num_labels=4
    )
    return transformers.ConvNextForImageClassification(config)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 9))


def of_logits(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = model(x)
    return functional.cross_entropy(getattr(out, "logits", out).flatten(0, -2), y.flatten())


def of_language(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(input_ids=x, labels=y).loss


TASKS = {
    "Gemma": Task(gemma, copied, of_language),
    "BEiT": Task(beit, quarters, of_logits),
    "ConvNeXt": Task(convnext, textures, of_logits),
    "gated attention": Task(Gated, retrieved, of_logits),
    "zero last layers": Task(Residual, mixtures, of_logits),
    "zero last norms": Task(ZeroGamma, textures, of_logits),
    "GPT-2": Task(gpt2, copied, of_language),
    "ViT": Task(vit, textures, of_logits),
    "MLP": Task(mlp, mixtures, of_logits),
}
# Kind (a constant of hf_lopt.least_sizes) -> the task that needs it, and floors.
SWEEP: Mapping[str, tuple[str, Sequence[float]]] = {
    "ONE_PLUS": ("Gemma", (0.0, 0.1, 0.3, 1.0)),
    "TABLE": ("BEiT", (0.0, 0.02, 0.05, 0.1)),
    "SCALE": ("ConvNeXt", (0.0, 0.01, 0.1, 0.3)),
    "GATE": ("gated attention", (0.0, 0.1, 0.3, 1.0)),
    "PROJECTION": ("zero last layers", (0.0, 0.005, 0.02, 0.1)),
    "NORM": ("zero last norms", (0.0, 0.1, 0.3, 1.0)),
}
# Biases of models in which nothing else starts at zero.
BIASES, PLAIN = (0.0, 0.01, 0.1), ("GPT-2", "ViT", "MLP")


def final_loss(task: Task, seed: int, rule: str, lr: float = 1.0, weights: str = "bundled") -> float:
    """Held-out loss after :data:`STEPS` steps."""
    torch.manual_seed(seed)
    model, draw = task.model(), torch.Generator().manual_seed(100 + seed)
    batches = (task.batch(BATCH, draw) for _ in range(STEPS))
    train(model, batches, lambda batch: task.loss(model, *batch), STEPS, rule, lr, weights)
    model.eval()
    with torch.no_grad():
        return task.loss(model, *task.batch(HELD_OUT, draw)).item()


def floors(kind: str, name: str, values: Sequence[float], seeds: int, contenders: Mapping[str, Any]) -> dict[str, Any]:
    """The losses of one task by the floor of one kind."""
    task, before = TASKS[name], getattr(least_sizes, kind)
    found: dict[str, Any] = {"task": name}
    rates = {
        lr: mean(f"{name}: adamw {lr:g}", [final_loss(task, s, "adamw", lr) for s in range(seeds)]) for lr in ADAMW
    }
    best = min(rates, key=lambda lr: rates[lr]["loss"])
    found["adamw"] = {"lr": best, **rates[best]}
    for contender, (rule, weights) in contenders.items():
        found[contender] = {}
        for floor in values:
            setattr(least_sizes, kind, dataclasses.replace(before, floor=floor))
            losses = [final_loss(task, seed, rule, weights=weights) for seed in range(seeds)]
            found[contender][f"{floor:g}"] = mean(f"{name}: {contender}, {before.name} {floor:g}", losses)
    setattr(least_sizes, kind, before)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sweep", "plain"))
    parser.add_argument("--kinds", nargs="+", default=list(SWEEP))
    parser.add_argument("--celo", help="a file of published Celo weights")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    contenders = {"velo": ("velo", "bundled")}
    if options.celo:
        contenders["celo, published weights"] = ("celo", options.celo)
    file = RESULTS / "zero_init.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    record |= {
        "machine": machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "command": "python -m benchmarks.zero_init {sweep,plain} --celo FILE",
        "setting": f"{STEPS} steps of batches of {BATCH}, {options.seeds} seeds, held-out loss by floor",
    }
    if options.what == "sweep":
        todo = [("kinds", getattr(least_sizes, kind).name, kind, *SWEEP[kind]) for kind in options.kinds]
    else:
        todo = [("biases", name, "BIAS", name, BIASES) for name in PLAIN]
    for part, key, *what in todo:
        record.setdefault(part, {})[key] = floors(*what, options.seeds, contenders)
        write_record(file, rounded(record, 4))


if __name__ == "__main__":
    main()
