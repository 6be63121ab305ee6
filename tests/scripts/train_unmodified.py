"""An ordinary script: it does not know hf_lopt, imports a module beside it, takes --optim from the command line."""

import json
import sys
from pathlib import Path

import neighbour  # beside this script
import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments


if __name__ == "__main__":
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None
    )
    ids = torch.randint(0, 256, (8, 8))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(GPT2LMHeadModel(config), args, train_dataset=rows)
    trainer.train()
    result = {
        "optimizer": type(trainer.optimizer.optimizer).__name__,
        "steps": trainer.state.global_step,
        "logged": sorted(key for row in trainer.state.log_history for key in row if key.startswith("lopt/")),
        "argv": sys.argv[0],
        "neighbour": neighbour.VALUE,
        "main": sys.modules["__main__"].__file__,
    }
    Path(args.output_dir, "result.json").write_text(json.dumps(result))
