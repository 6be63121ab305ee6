"""The command line of meta-training."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from hf_lopt.meta import config, export, table
from hf_lopt.meta.search import processes
from hf_lopt.meta.train import Trainer
from hf_lopt.weights.publish import FORMATS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hf_lopt.meta", description="Meta-train learned optimizers.")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="train weights; continues where the output folder stopped")
    train.add_argument("--config", type=Path, required=True, help="YAML file")
    train.add_argument("--output", type=Path, required=True, help="folder of checkpoint, log and TensorBoard files")
    train.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    train.add_argument(
        "--graphs", action=argparse.BooleanOptionalAction, default=True, help="CUDA graphs, on a CUDA device"
    )
    train.add_argument("--until", type=int, help="outer step to stop at; default: the end")

    evaluate = commands.add_parser("evaluate", help="compare weights with AdamW and with each other")
    evaluate.add_argument(
        "candidates", nargs="+", metavar="RULE[:SETTING=NUMBER][@WEIGHTS]", help="WEIGHTS as in weights=..."
    )
    evaluate.add_argument("--tasks", nargs="+", default=["test"], help="names, or train, validation, test")
    evaluate.add_argument("--steps", type=int, default=300)
    evaluate.add_argument("--seeds", type=int, default=3)
    evaluate.add_argument("--output", type=Path, help="path without suffix: writes .json and .md there")

    save = commands.add_parser("export", help="write trained weights to a folder that weights=... takes")
    save.add_argument("run", type=Path, help="output folder of train")
    save.add_argument("folder", type=Path)
    save.add_argument("--format", default="theta_state", choices=FORMATS)
    save.add_argument("--last", action="store_true", help="the last weights, not the selected ones")
    return parser


def _train(args: argparse.Namespace) -> None:
    settings = config.read(args.config)
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    device = torch.device(args.device)
    if distributed:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        trainer = Trainer(settings, args.output, device, args.graphs)
        if processes()[0] > 0:
            trainer.run(args.until)
            return
        with _bar(settings.outer.steps, trainer.steps) as bar:

            def report(metrics: dict[str, float]) -> None:
                speed = f"{metrics['particle_steps_per_second']:.0f} particle-steps/s"
                bar.set_postfix_str(f"meta-loss {metrics['meta_loss']:.3f}, {speed}")
                bar.update()

            trainer.run(args.until, report)
        left = settings.outer.steps - trainer.steps
        end = f"{left} outer steps are left: the same command goes on" if left else "done"
        sys.stdout.write(f"{args.output}: outer step {trainer.steps}, {trainer.seconds:.0f} s; {end}\n")
    finally:
        if distributed:
            dist.destroy_process_group()


def _bar(total: int, done: int):
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("the progress bar is tqdm's: pip install 'hf_lopt[meta]'") from error
    return tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0, or 2 for a mistake in the arguments or the configuration."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "train":
            _train(args)
        elif args.command == "evaluate":
            table.main(args.candidates, args.tasks, args.steps, args.seeds, args.output)
        else:
            for path in export.export(args.run, args.folder, args.format, args.last):
                sys.stdout.write(f"wrote {path}\n")
    except (ValueError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0
