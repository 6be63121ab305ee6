"""A raw Accelerate loop of the shape of transformers' ``run_clm_no_trainer.py``, on a tiny model and made-up text.

Two parameter groups, a scheduler that is told the steps before the loader is prepared, accumulation, and the number of
steps counted anew afterwards. It knows nothing of hf_lopt.
"""

import argparse
import json
import math

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, SchedulerType, default_data_collator, get_scheduler


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--weight_decay", type=float, default=0.0)
    parser.add_argument("--num_train_epochs", type=int, default=2)
    parser.add_argument("--max_train_steps", type=int, default=None)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--lr_scheduler_type", type=SchedulerType, default="linear")
    parser.add_argument("--num_warmup_steps", type=int, default=0)
    parser.add_argument("--result")
    return parser.parse_args()


def main():
    args = parse()
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=args.gradient_accumulation_steps)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    texts = (torch.arange(16) + torch.arange(80)[:, None]) % 32
    rows = [{"input_ids": text, "labels": text} for text in texts]
    loader = DataLoader(rows, shuffle=True, collate_fn=default_data_collator, batch_size=4)

    no_decay = ["bias", "ln_1.weight", "ln_2.weight", "ln_f.weight"]
    named = list(model.named_parameters())
    groups = [
        {
            "params": [p for n, p in named if not any(end in n for end in no_decay)],
            "weight_decay": args.weight_decay,
        },
        {"params": [p for n, p in named if any(end in n for end in no_decay)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)

    counted_here = args.max_train_steps is None
    updates_per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
    if counted_here:
        args.max_train_steps = args.num_train_epochs * updates_per_epoch
    processes = accelerator.num_processes
    scheduler = get_scheduler(
        name=args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.num_warmup_steps * processes,
        num_training_steps=args.max_train_steps if counted_here else args.max_train_steps * processes,
    )
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    updates_per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
    if counted_here:
        args.max_train_steps = args.num_train_epochs * updates_per_epoch
    args.num_train_epochs = math.ceil(args.max_train_steps / updates_per_epoch)

    done, losses = 0, []
    for _ in range(args.num_train_epochs):
        model.train()
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                losses.append(loss.item())
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                done += 1
            if done >= args.max_train_steps:
                break

    if args.result and accelerator.is_main_process:
        inner = optimizer.optimizer
        with open(args.result, "w") as file:
            json.dump(
                {
                    "optimizer": type(inner).__name__,
                    "done": done,
                    "horizon": getattr(inner, "num_training_steps", None),
                    "lr": [group["lr"] for group in inner.param_groups],
                    "weight_decay": [group["weight_decay"] for group in inner.param_groups],
                    "last_lr": scheduler.get_last_lr(),
                    "losses": losses,
                },
                file,
            )
    accelerator.end_training()  # a group of processes that is left to the interpreter's end may abort there


if __name__ == "__main__":
    main()
