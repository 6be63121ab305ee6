"""Two ranks (torchrun, gloo): losses, resuming and refusals. Writes one JSON file per rank into the folder given.

Every case of ``main`` is one test in test_hf_ddp.py; they share a process because importing costs more than training.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist


sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from accelerate.utils import DataLoaderConfiguration  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import Trainer  # noqa: E402

import hf_cases as cases  # noqa: E402
from hf_lopt.hf import loss_feed  # noqa: E402
from hf_lopt.hf.callback import epochs_of  # noqa: E402


# 19 rows in batches of two on two ranks: five batches a rank, so that windows of two leave a short one.
ROWS = 19
GLOO = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}


def over_ranks(value):
    """Sum of a number over the ranks."""
    total = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


def global_token_mean(model, window):
    """Over the tokens of all ranks, whose number Trainer hands to each: see ``cases.token_mean``."""
    return over_ranks(cases.token_mean(model, window))


def mean_of_local_means(model, window):
    return over_ranks(cases.token_mean(model, window)) / dist.get_world_size()


def mean_of_all_means(model, window):
    return over_ranks(cases.mean_of_means(model, window)) / dist.get_world_size()


class WithoutLossArguments(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = cases.tiny_llama()

    def forward(self, input_ids, labels=None):
        return self.inner(input_ids=input_ids, labels=labels)


def losses(folder, objective, model=cases.tiny_llama, **changes):
    args = cases.arguments(folder, gradient_accumulation_steps=2, **GLOO, **changes)
    trainer = cases.ReplayTrainer(model(), args, train_dataset=cases.byte_rows(ROWS), objective=objective)
    trainer.train()
    return {"seen": trainer.seen.values, "recomputed": trainer.recomputed, "logged": trainer.logged()}


def raw_loop():
    """An Accelerate loop that accumulates; the same data on one process gives the same numbers."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = cases.tiny_llama()
    loader = DataLoader(cases.byte_rows(20), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, cases.velo(model.parameters()), loader)
    probe, seen, expected, window = cases.LossProbe(optimizer), [], [], []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            window.append(loss.item())
            accelerator.backward(loss)
            optimizer.step()
            if accelerator.sync_gradients:
                seen.append(probe.read())
                expected.append(over_ranks(sum(window) / len(window)) / dist.get_world_size())
                window = []
            optimizer.zero_grad()
    return {"seen": seen, "recomputed": expected}


def epochs_of_raw_loop():
    """What the optimizer knows in an Accelerate loop of 45 steps: one rank has five batches, the other four."""
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False))
    model = cases.tiny_llama()
    learned = cases.velo(model.parameters(), num_training_steps=45)
    loader = DataLoader(cases.byte_rows(18), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, learned, loader)
    for _, batch in zip(range(2), loader, strict=False):
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    return {"batches": len(loader), "epochs": learned.num_epochs}


def fingerprint(trainer):
    """Every number of the parameters and the optimizer's state, as one digest."""
    import hashlib

    digest = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            digest.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                add(key)
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    add(dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters()))
    add(trainer.optimizer.state_dict())
    return digest.hexdigest()


def resuming(folder):
    """Five batches a rank in windows of two: step 2 is within the first epoch, whose last window is short."""

    def make(where):
        args = cases.arguments(where, gradient_accumulation_steps=2, **GLOO, save_strategy="steps", save_steps=2)
        return Trainer(cases.tiny_llama(), args, train_dataset=cases.byte_rows(ROWS))

    whole = make(folder)
    whole.train()
    resumed = make(folder / "again")
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return {
        "whole": fingerprint(whole),
        "resumed": fingerprint(resumed),
        "steps": [loss_feed.unwrap(trainer.optimizer).steps_done for trainer in (whole, resumed)],
    }


def trainer_refusal(folder):
    """FSDP1 through Trainer's arguments, where Accelerate on CPU would fall back to plain DDP without a word."""
    config = {
        "version": 1,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "cpu_ram_efficient_loading": False,
        "sync_module_states": False,
    }
    args = cases.arguments(folder, **GLOO, fsdp=True, fsdp_config=config)
    try:
        Trainer(cases.tiny_llama(), args, train_dataset=cases.byte_rows(4)).train()
    except ValueError as error:
        return str(error)


def warned(folder):
    """How many of the ranks give the warning about defaults."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        args = cases.arguments(folder, max_steps=1, **GLOO)
        Trainer(cases.tiny_llama(), args, train_dataset=cases.byte_rows(4)).train()
    return over_ranks(sum("velo: lr=1" in str(w.message) for w in caught))


def epochs(folder):
    """What the optimizer is told of a run of 12 updates, three an epoch; and where one rank has a batch more."""
    args = cases.arguments(folder, max_steps=12, gradient_accumulation_steps=2, **GLOO)
    trainer = Trainer(cases.tiny_llama(), args, train_dataset=cases.byte_rows(ROWS))
    trainer.train()
    uneven = epochs_of(12, args, range(4 + 2 * dist.get_rank()))
    return {"told": loss_feed.unwrap(trainer.optimizer).num_epochs, "uneven": uneven}


def main(folder):
    results = {
        "token_mean": losses(folder, global_token_mean),
        "local_token_mean": losses(folder, mean_of_local_means, average_tokens_across_devices=False),
        "mean_of_means": losses(folder, mean_of_all_means, model=WithoutLossArguments),
        "resuming": None if cases.NO_RESUMING_ON_CPU_RANKS else resuming(folder),
        "warned": warned(folder),
        "epochs": epochs(folder),
    }
    AcceleratorState._reset_state()
    GradientState._reset_state()
    results["raw_loop"] = raw_loop()
    AcceleratorState._reset_state()
    GradientState._reset_state()
    results["epochs_of_raw_loop"] = epochs_of_raw_loop()
    AcceleratorState._reset_state()
    GradientState._reset_state()
    results["refusal"] = trainer_refusal(folder)
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
