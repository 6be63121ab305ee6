"""A tiny Llama under FSDP2 by Trainer, by Accelerate, by fully_shard, and under tensor parallelism; run by
test_sharding_training.py.

torchrun --nproc_per_node 2 sharded_training.py FOLDER CASE [CASE ...]

FOLDER/whole.pt holds what one process gives (:func:`alone`). Errors, in units of the largest element of a parameter,
go to FOLDER/WORLD_CASE.json. All ranks see the same rows, so that one process on these rows takes the same steps.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, Trainer  # noqa: E402

import hf_cases as cases  # noqa: E402
import hf_lopt  # noqa: E402
from ranks import leave  # noqa: E402


STEPS, SAVED, BATCH = 24, 10, 4
SHORT = 6
WRAP = "LlamaDecoderLayer"


def llama() -> LlamaForCausalLM:
    """Tied embeddings of an odd number of rows, a frozen layer norm, a parameter that nothing uses, one of one row."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.model.norm.weight.requires_grad_(False)
    model.model.layers[0].unused = nn.Parameter(torch.ones(1, 5))
    return model


class Rows(Dataset):
    """BATCH rows per step for all ranks: each row once for every rank, in the order in which Accelerate deals them."""

    def __init__(self, world: int, steps: int = STEPS, classes: int = 0):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, 97, (steps * BATCH, 12), generator=generator)
        labels = [row[0] % classes for row in ids] if classes else ids
        self.batches = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
        self.world = world

    def __len__(self) -> int:
        return len(self.batches) * self.world

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        step, place = divmod(i, BATCH * self.world)
        return self.batches[step * BATCH + place % BATCH]


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole parameters; names without what wrappers put in front."""

    def whole(p: torch.Tensor) -> torch.Tensor:
        return (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()

    found = {}
    for name, p in model.named_parameters():
        for part in ("_orig_mod.", "_checkpoint_wrapped_module."):
            name = name.replace(part, "")
        found[name] = whole(p)
    return found


def error(model: nn.Module, expected: dict[str, torch.Tensor]) -> float:
    found = parameters(model)
    assert found.keys() == expected.keys()
    return max(((found[k] - y).abs().max() / y.abs().max()).item() for k, y in expected.items())


# ---- Trainer --------------------------------------------------------------------------------------------------------


class InOrder(Trainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(folder: Path, optim: str, model: nn.Module | None = None, classes: int = 0, **changes: Any) -> Trainer:
    """Real FSDP2 where there are ranks: Accelerate takes CPUs for it when told that they are accelerators."""
    settings = {
        "optim": optim,
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 1,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": SAVED,
        "gradient_checkpointing": False,
    } | changes
    if world_size() > 1:
        config = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": [WRAP]}
        config |= {"reshard_after_forward": True, "cpu_ram_efficient_loading": False}
        config["state_dict_type"] = settings.pop("state_dict_type", "SHARDED_STATE_DICT")
        settings |= {"fsdp": True, "fsdp_config": config, "ddp_backend": "gloo"}
    args = cases.arguments(folder, **settings)
    if world_size() > 1:
        from accelerate.state import DistributedType, PartialState

        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return InOrder(model or llama(), args, train_dataset=Rows(world_size(), classes=classes))


def assert_sharded(model: nn.Module, optimizer: Any) -> None:
    if world_size() > 1:
        assert all(isinstance(p, DTensor) for p in model.parameters())
        optimizer = cases.unwrap(optimizer)
        assert all(isinstance(own["momentum"], DTensor) for own in optimizer.state.values() if own)


def by_trainer(folder: Path, whole: dict, optim: str = "velo", form: str = "SHARDED_STATE_DICT") -> dict[str, float]:
    """All steps, saved at 10 and 20."""
    run = trainer(folder / f"{optim}_{form}_{world_size()}", optim, state_dict_type=form)
    run.train()
    assert_sharded(run.model, run.optimizer)
    return {"end": error(run.model, whole[f"trainer {optim}"])}


def by_trainer_again(
    folder: Path, whole: dict, source: int, optim: str = "velo", form: str = "SHARDED_STATE_DICT"
) -> dict[str, float]:
    """The last 14 steps, from what ``source`` ranks saved."""
    run = trainer(folder / "again", optim, state_dict_type=form, save_strategy="no")
    run.train(resume_from_checkpoint=str(folder / f"{optim}_{form}_{source}" / f"checkpoint-{SAVED}"))
    assert_sharded(run.model, run.optimizer)
    optimizer = cases.unwrap(run.optimizer)
    assert optimizer.steps_done == STEPS
    if world_size() > 1:
        of_ranks = [None] * world_size()
        dist.all_gather_object(of_ranks, [sorted(group) for group in optimizer.param_groups])
        assert of_ranks == [of_ranks[0]] * world_size(), of_ranks
    return {"end": error(run.model, whole[f"trainer {optim}"])}


def loaded(folder: Path) -> LlamaForSequenceClassification:
    """A model for three classes from what is in ``folder``; the same random head in all processes if it has none."""
    torch.manual_seed(0)
    model = LlamaForSequenceClassification.from_pretrained(folder, num_labels=3)
    model.model.norm.weight.requires_grad_(False)
    return model


def fine_tuned(folder: Path, whole: dict, source: int = 0) -> dict[str, float]:
    """A pretrained model with a new head; or its last 14 steps, after ``source`` ranks, with a model that has one."""
    model = loaded(folder / ("with_head" if source else "base"))
    run = trainer(folder / f"fine_tuned_{world_size()}", "velo", model, classes=3)
    run.train(resume_from_checkpoint=str(folder / f"fine_tuned_{source}" / f"checkpoint-{SAVED}") if source else None)
    assert_sharded(run.model, run.optimizer)
    numbers = [x for group in cases.unwrap(run.optimizer).param_groups for x in group["lr_scales"]]
    assert sorted(numbers)[-2:] == [1.0, 20.0 * 5.0 / 2.0]  # new layers count 5 times in a short run, the others 2
    return {"end": error(run.model, whole["fine-tuned"])}


def killed(folder: Path, whole: dict) -> dict[str, float]:
    """Dies while the optimizer's state of step 20 is being written."""
    import os

    import torch.distributed.checkpoint as dcp

    run = trainer(folder / "killed", "velo")
    finish = dcp.FileSystemWriter.finish

    def die(self: Any, *args: Any, **kwargs: Any) -> Any:
        if f"checkpoint-{2 * SAVED}" in str(self.path) and "optimizer" in str(self.path):
            os._exit(9)
        return finish(self, *args, **kwargs)

    dcp.FileSystemWriter.finish = die
    run.train()
    return {}


def after_killed(folder: Path, whole: dict) -> dict[str, float]:
    run = trainer(folder / "again", "velo", save_strategy="no")
    run.train(resume_from_checkpoint=str(folder / "killed" / f"checkpoint-{SAVED}"))
    return {"end": error(run.model, whole["trainer velo"])}


# ---- loops ----------------------------------------------------------------------------------------------------------


def optimizer_of(model: nn.Module, optim: str = "velo") -> Any:
    settings = {"num_training_steps": 20} if optim == "velo" else {}
    return hf_lopt.LearnedOptimizer(
        [p for p in model.parameters() if p.requires_grad], optim, weights="bundled", **settings
    )


def loop(model: nn.Module, optimizer: Any, each: Callable[..., None] | None = None, halves: bool = False) -> None:
    """SHORT steps; with ``halves`` each batch comes in two micro-batches, of which the last one is synchronised."""
    rows = Rows(1, SHORT)
    for t in range(SHORT):
        batch = torch.stack([rows[t * BATCH + i]["input_ids"] for i in range(BATCH)])
        parts, total = (batch.chunk(2) if halves else (batch,)), 0.0
        for k, part in enumerate(parts):
            if halves and isinstance(next(model.parameters()), DTensor):
                model.set_requires_gradient_sync(k == len(parts) - 1)
            loss = model(input_ids=part, labels=part).loss / len(parts)
            loss.backward()
            total = total + loss.detach()
        if each:
            each(model)
        optimizer.step(total)
        optimizer.zero_grad()


def sharded(model: nn.Module, **settings: Any) -> nn.Module:
    if world_size() > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = settings.pop("mesh", None) or init_device_mesh("cpu", (world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, **settings)
        fully_shard(model, mesh=mesh, **settings)
    return model


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def with_checkpoints(model: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    layer = type(model.model.layers[0])
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, layer))
    return model


def multiplier_error(shard: Callable[[nn.Module], nn.Module]) -> float:
    """Of the multiplier of a short run, which takes the sizes of whole matrices, where they are large."""
    model = llama()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(20)
    matrices = [m.weight.double() for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    reach = math.sqrt(sum(w.square().mean().item() * w.shape[1] ** 2 for w in matrices))
    wanted = math.sqrt(1000 / 20) * (20 / reach) ** 1.5
    optimizer = optimizer_of(shard(model))
    assert 1.5 < wanted < 4.5 and optimizer.length_multiplier == 5.0  # the largest; the reach is asked for later
    loop(model, optimizer)
    return abs(optimizer.length_multiplier / wanted - 1)


def short(folder: Path, whole: dict) -> dict[str, float]:
    """Ways of training by hand, against one process that trains the plain way."""
    from torch._dynamo import guards
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    # Only tells tracing tools how long guards take, and empties the caches with a quarter of a GB for that.
    guards.profile_guard_manager = lambda *args: 0.0
    found = {}

    def record(name: str, model: nn.Module, optim: str = "velo", against: str = "plain", **how: Any) -> None:
        optimizer = optimizer_of(model, optim)
        loop(model, optimizer, **how)
        assert_sharded(model, optimizer)
        found[name] = error(model, whole[f"short {against}"])

    record("fully_shard", sharded(llama()))
    record("celo2", sharded(llama()), "celo2", "celo2")
    record("clipped", sharded(llama()), against="clipped", each=clip)
    record("halves", sharded(llama()), halves=True)
    record("activation checkpoints", sharded(with_checkpoints(llama())))
    for backend in ("eager", "aot_eager"):
        model = sharded(llama())
        model.compile(backend=backend)
        record(f"compiled {backend}", model)
    record("offloaded", sharded(llama(), offload_policy=CPUOffloadPolicy(pin_memory=False)))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    record("bfloat16 compute", sharded(llama(), mp_policy=half))
    if world_size() > 1:
        found["multiplier"] = multiplier_error(sharded)
    return found


def tensor_parallel(folder: Path, whole: dict) -> dict[str, float]:
    """parallelize_module over two ranks, and FSDP2 over it where there are four."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    plan: dict[str, Any] = {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
    plan["mlp.down_proj"] = RowwiseParallel()

    def shard(model: nn.Module) -> nn.Module:
        for layer in model.model.layers:
            parallelize_module(layer, mesh["tp"], plan)
        return sharded(model, mesh=mesh["dp"]) if world_size() > 2 else model

    model = shard(llama())
    optimizer = optimizer_of(model)
    loop(model, optimizer)
    placements = {p.placements for p in model.parameters() if isinstance(p, DTensor)}
    assert len(placements) >= 2 and any(len(x) == (2 if world_size() > 2 else 1) for x in placements)
    return {"tensor parallel": error(model, whole["short plain"]), "multiplier": multiplier_error(shard)}


def by_accelerate(folder: Path, whole: dict) -> dict[str, float]:
    """accelerator.prepare with an FSDP2 plugin, the loss by accelerator.backward; save_state and load_state."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, DistributedType, PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin

    def prepared() -> tuple[Any, ...]:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[WRAP],
            state_dict_type="SHARDED_STATE_DICT",
            cpu_ram_efficient_loading=False,
        )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        model = llama()
        loader = DataLoader(Rows(world_size(), SHORT), batch_size=BATCH)
        return accelerator, *accelerator.prepare(model, optimizer_of(model), loader)

    def train(accelerator: Any, model: nn.Module, optimizer: Any, loader: Any, steps: range) -> None:
        for t, batch in enumerate(loader):
            if t in steps:
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()

    accelerator, *rest = prepared()
    train(accelerator, *rest, range(3))
    accelerator.save_state(str(folder / "accelerate"))
    train(accelerator, *rest, range(3, SHORT))
    assert_sharded(*rest[:2])
    found = {"accelerate": error(rest[0], whole["short plain"])}
    accelerator, *rest = prepared()
    accelerator.load_state(str(folder / "accelerate"))
    train(accelerator, *rest, range(3, SHORT))
    return found | {"accelerate, loaded": error(rest[0], whole["short plain"])}


def alone(folder: Path) -> None:
    """What one process gives for every case."""
    whole = {}
    for optim in hf_lopt.available():
        run = trainer(folder / "alone", optim, save_strategy="no")
        run.train()
        whole[f"trainer {optim}"] = parameters(run.model)
    llama().save_pretrained(folder / "base")
    run = trainer(folder / "alone", "velo", loaded(folder / "base"), classes=3, save_strategy="no")
    run.train()
    whole["fine-tuned"] = parameters(run.model)
    run.model.save_pretrained(folder / "with_head")
    for name, optim, each in (("plain", "velo", None), ("celo2", "celo2", None), ("clipped", "velo", clip)):
        model = llama()
        loop(model, optimizer_of(model, optim), each)
        whole[f"short {name}"] = parameters(model)
    torch.save(whole, folder / "whole.pt")


def main(folder: Path, *names: str) -> None:
    dist.init_process_group("gloo")
    whole = torch.load(folder / "whole.pt", weights_only=True)
    for name in names:
        function, *arguments = name.split(":")
        typed = [int(x) if x.isdigit() else x for x in arguments]
        found = globals()[function](folder, whole, *typed)
        if dist.get_rank() == 0:
            (folder / f"{world_size()}_{name.replace(':', '_')}.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
