"""Small models from random weights with data of their own, most of them transformers', for benchmarks of defaults.

Validation tasks: :data:`TASKS`, of which six have tensors that start at zero, and :data:`TEXTS`, language models on
bytes of source code and models that sort the letters of words. All start as their library lets them, or with other
starting values, which are named.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.finetune_multiplier import BLOCK, help_texts, source_code
from benchmarks.small_runs import train


BATCH, HELD_OUT = 32, 256

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A model from random weights, batches (count, generator), and the loss of a batch."""

    model: Callable[[], nn.Module]
    batch: Callable[[int, torch.Generator], Batch]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    held_out: Callable[[int, torch.Generator], Batch] | None = None  # None: ``batch``, which draws fresh samples


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


def source_bytes(part: int, count: int, draw: torch.Generator) -> Batch:
    """Blocks (count, BLOCK) of source code; numbers 1 to 256 a byte, as 0 is not to be a token of padding.

    ``part``: 0 to learn from, 1 held out.
    """
    x = _drawn(source_code()[part], count, draw) + 1
    return x, x


def _drawn(data: Tensor, count: int, draw: torch.Generator) -> Tensor:
    return data[torch.randint(len(data), (count,), generator=draw)]


LETTERS, WORD = 26, 10  # 0 is padding


@functools.cache
def words() -> tuple[Tensor, Tensor]:
    """Words of help texts as letters 1 to 26, padded to (N, WORD), to learn from, and held-out ones."""
    found = sorted(set(re.findall(r"(?<![a-z])[a-z]{4,10}(?![a-z])", help_texts())))
    data = torch.tensor([[ord(letter) - ord("a") + 1 for letter in word.ljust(WORD, "`")] for word in found])
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return data[order[256:]], data[order[:256]]


def sorted_words(part: int, count: int, draw: torch.Generator) -> Batch:
    """Words (count, WORD) and their letters in order, where -100 ends them. ``part``: see :func:`source_bytes`."""
    x = _drawn(words()[part], count, draw)
    y = x.masked_fill(x == 0, LETTERS + 1).sort(1).values
    return x, y.masked_fill(y > LETTERS, -100)


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


BYTES = {"vocab_size": 257, "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
GATED = BYTES | {"intermediate_size": 128, "num_key_value_heads": 2, "max_position_embeddings": BLOCK}


def llama_on_bytes(width: int = 64, **more: Any) -> nn.Module:
    sizes = GATED | {"hidden_size": width, "intermediate_size": 2 * width}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | more)))


def qwen3_on_bytes() -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(head_dim=16, **GATED))


def gemma2_on_bytes() -> nn.Module:
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(head_dim=16, **GATED))


def gpt2_on_bytes() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=BLOCK, **BYTES))


SORTING = {"vocab_size": LETTERS + 1, "d_model": 64, "decoder_start_token_id": 0}


def t5(**more: Any) -> nn.Module:
    sizes = {"d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**(SORTING | sizes | more)))


def bart(**more: Any) -> nn.Module:
    of_both = {"layers": 2, "attention_heads": 4, "ffn_dim": 128}
    sizes = {f"{part}_{key}": x for part in ("encoder", "decoder") for key, x in of_both.items()}
    sizes |= {"dropout": 0.0, "max_position_embeddings": 32}
    sizes |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "forced_eos_token_id": None}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**(SORTING | sizes | more)))


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


def _on_texts(samples: Callable[..., Batch], model: Callable[[], nn.Module]) -> Task:
    learned, held_out = (functools.partial(samples, part) for part in (0, 1))
    return Task(model, learned, of_language, held_out)


_of_bytes, _of_words = (functools.partial(_on_texts, samples) for samples in (source_bytes, sorted_words))
TEXTS = {
    "Llama on bytes": _of_bytes(llama_on_bytes),
    "Qwen3 on bytes": _of_bytes(qwen3_on_bytes),
    "Gemma 2 on bytes": _of_bytes(gemma2_on_bytes),
    "GPT-2 on bytes": _of_bytes(gpt2_on_bytes),
    "T5 that sorts letters": _of_words(t5),
    "T5 that sorts letters, starts x 0.2": _of_words(functools.partial(t5, initializer_factor=0.2)),
    "T5 of 4 layers that sorts letters": _of_words(functools.partial(t5, num_layers=4)),
    "BART that sorts letters": _of_words(bart),
    "BART that sorts letters, sd 0.125": _of_words(functools.partial(bart, init_std=0.125)),
    "Llama of 8 layers on bytes": _of_bytes(functools.partial(llama_on_bytes, num_hidden_layers=8)),
    "Llama of width 256 on bytes": _of_bytes(functools.partial(llama_on_bytes, 256)),
    "Llama of width 512 on bytes": _of_bytes(functools.partial(llama_on_bytes, 512)),
}


def final_loss(task: Task, seed: int, steps: int, rule: str, lr: float, weights: str = "bundled") -> float:
    """Held-out loss after so many steps."""
    torch.manual_seed(seed)
    model, draw = task.model(), torch.Generator().manual_seed(100 + seed)
    batches = (task.batch(BATCH, draw) for _ in range(steps))
    train(model, batches, lambda batch: task.loss(model, *batch), steps, rule, lr, weights)
    model.eval()
    with torch.no_grad():
        return task.loss(model, *(task.held_out or task.batch)(HELD_OUT, draw)).item()
