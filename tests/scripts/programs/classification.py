"""A raw Accelerate loop of the shape of transformers' ``run_glue_no_trainer.py``: fine-tunes a tiny checkpoint.

It has its optimizer's name from ``from torch.optim import AdamW``, saves its state after an epoch, can resume from it,
and evaluates. It knows nothing of hf_lopt.
"""

import argparse
import json
import math

import torch
from accelerate import Accelerator
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, default_data_collator, get_scheduler


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--num_train_epochs", type=int, default=2)
    parser.add_argument("--with_clipping", action="store_true")
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


def rows(count, seed):
    ids = torch.randint(2, 32, (count, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": int(row[0] > 16)} for row in ids]


def main():
    args = parse()
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertForSequenceClassification(config).save_pretrained(f"{args.folder}/checkpoint")
    model = BertForSequenceClassification.from_pretrained(f"{args.folder}/checkpoint")
    loader = DataLoader(rows(64, 0), shuffle=True, collate_fn=default_data_collator, batch_size=8)
    test = DataLoader(rows(32, 1), collate_fn=default_data_collator, batch_size=8)
    no_decay = ["bias", "LayerNorm.weight"]
    groups = [
        {"params": [p for n, p in model.named_parameters() if not any(x in n for x in no_decay)], "weight_decay": 0.0},
        {"params": [p for n, p in model.named_parameters() if any(x in n for x in no_decay)], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=args.learning_rate)
    steps = args.num_train_epochs * math.ceil(len(loader))
    scheduler = get_scheduler("linear", optimizer=optimizer, num_warmup_steps=2, num_training_steps=steps)
    model, optimizer, loader, test, scheduler = accelerator.prepare(model, optimizer, loader, test, scheduler)

    first = 0
    if args.resume:
        accelerator.load_state(f"{args.folder}/epoch_0")
        first = 1
    losses = []
    for epoch in range(first, args.num_train_epochs):
        model.train()
        for batch in loader:
            loss = model(**batch).loss
            losses.append(loss.item())
            accelerator.backward(loss)
            if args.with_clipping:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        model.eval()
        right = 0
        for batch in test:
            with torch.no_grad():
                right += (model(**batch).logits.argmax(-1) == batch["labels"]).sum().item()
        accelerator.save_state(f"{args.folder}/epoch_{epoch}")

    inner = optimizer.optimizer
    with open(f"{args.folder}/result.json", "w") as file:
        json.dump(
            {
                "optimizer": type(inner).__name__,
                "lr": [group["lr"] for group in inner.param_groups],
                "horizon": getattr(inner, "num_training_steps", None),
                "steps_done": getattr(inner, "steps_done", None),
                "losses": losses,
                "right": right,
            },
            file,
        )


if __name__ == "__main__":
    main()
