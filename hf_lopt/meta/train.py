"""The loop around a search: checkpoints, selection, logs, and stopping when asked to."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_lopt import rules
from hf_lopt.meta import atomic, evaluate, tasks
from hf_lopt.meta.config import Config, from_dict, to_dict
from hf_lopt.meta.search import on_host, processes, search


CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
FORMAT = 1


def selection_score(config: Config, theta: Mapping[str, Tensor]) -> dict[str, float]:
    """log of the final loss on fresh samples, by task and on average; each task at its best learning rate."""
    chosen = config.selection
    names = chosen.tasks or tuple(task.name for task in tasks.of_part("validation"))
    rates = chosen.lr if not rules.get(config.rule).own_schedule else (1.0,)
    out = {}
    for name in names:
        finals = [
            evaluate.learned(
                tasks.named(name), config.rule, theta, chosen.steps, chosen.seeds, rate, config.settings, looks=1
            ).final
            for rate in rates
        ]
        out[name] = min(torch.log(final).clamp(max=10.0).mean().item() for final in finals)
    return out | {"mean": sum(out.values()) / len(out)}


class Trainer:
    """Meta-training in a folder, which holds the checkpoint and the log.

    Args:
        config: what is to be done.
        folder: created if it is not there. A checkpoint in it is continued, on any device and number of processes.
        device: of the particles.
        graphs: replay the steps from CUDA graphs, on a CUDA device.

    Raises:
        ValueError: the folder holds the checkpoint of another configuration.
    """

    def __init__(
        self, config: Config, folder: str | os.PathLike, device: torch.device | str = "cpu", graphs: bool = True
    ):
        self.config, self.folder, self.device = config, Path(folder), torch.device(device)
        self.search = search(config, device, graphs)
        self.best: dict[str, Any] = {}
        self.seconds = 0.0
        self.stopped = False
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / CHECKPOINT).is_file():
            self._load()
        elif processes()[0] == 0:
            atomic.replace(
                self.folder / "config.json", lambda p: p.write_text(json.dumps(to_dict(config), indent=2) + "\n")
            )

    @property
    def steps(self) -> int:
        """Outer steps done."""
        return self.search.steps

    def _load(self) -> None:
        path = self.folder / CHECKPOINT
        saved = torch.load(path, map_location="cpu", weights_only=True)
        # Settings that are newer than the checkpoint had their defaults.
        ours, theirs = (to_dict(config) for config in (self.config, from_dict(saved["config"])))
        differing = [key for key in ours if theirs[key] != ours[key]]
        if saved["format"] != FORMAT or differing:
            raise ValueError(
                f"{path} was written by another configuration (it differs in {', '.join(differing) or 'its format'}): "
                "continue with that one, or choose another folder"
            )
        self.search.load_state_dict(saved["search"])
        self.best, self.seconds = saved["best"], saved["seconds"]

    def save(self) -> None:
        """Write the checkpoint; on every process, of which the first writes."""
        state = self.search.state_dict()
        if processes()[0] == 0:
            saved = {"format": FORMAT, "config": json.loads(json.dumps(to_dict(self.config))), "search": state}
            saved = on_host(saved | {"best": self.best, "seconds": self.seconds})
            atomic.replace(self.folder / CHECKPOINT, lambda path: torch.save(saved, path))
        if processes()[1] > 1:
            dist.barrier()

    def theta(self) -> dict[str, Tensor]:
        """The weights chosen on the validation tasks, or the last ones if there was no selection."""
        return dict(self.best["theta"]) if self.best else self.search.theta()

    def run(self, until: int | None = None, report: Callable[[dict[str, float]], None] | None = None) -> None:
        """Go on to the outer step ``until``, by default to the end, or until a signal asks to stop.

        ``report`` gets the numbers of every step.
        """
        end = min(self.config.outer.steps, until if until is not None else self.config.outer.steps)
        with self._log() as log, _signals(self):
            if not self.steps:
                self._select(log)
            while self.steps < end and not self._agreed_to_stop():
                start = time.perf_counter()
                metrics = self.search.step()
                took = time.perf_counter() - start
                self.seconds += took
                metrics |= {"particle_steps_per_second": self.search.steps_per_call / took}
                log({"step": self.steps, **metrics})
                if report is not None:
                    report(metrics)
                every = self.config.selection.every
                if every and (self.steps % every == 0 or self.steps == self.config.outer.steps):
                    self._select(log)
                if self.steps % self.config.checkpoint_every == 0:
                    self.save()
            self.save()

    def _select(self, log: Callable[[dict[str, Any]], None]) -> None:
        if not self.config.selection.every:
            return
        theta = self.search.theta()
        scores = selection_score(self.config, theta) if processes()[0] == 0 else {}
        log({"step": self.steps, **{f"selection/{name}": score for name, score in scores.items()}})
        if scores and (not self.best or scores["mean"] < self.best["score"]):
            self.best = {"score": scores["mean"], "step": self.steps, "theta": theta}

    def _agreed_to_stop(self) -> bool:
        if processes()[1] == 1:
            return self.stopped
        flag = torch.tensor(float(self.stopped), device=self.device, dtype=torch.float32)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    @contextlib.contextmanager
    def _log(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        """A function that appends to the log and to TensorBoard; entries after the checkpoint are dropped first."""
        if processes()[0] > 0:
            yield lambda entry: None
            return
        path = self.folder / LOG
        if path.is_file():
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= self.steps]
            kept = kept if self.steps else []
            atomic.replace(path, lambda target: target.write_text("".join(f"{line}\n" for line in kept)))
        board = _board(self.folder, self.steps)
        with path.open("a") as file:

            def log(entry: dict[str, Any]) -> None:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                for name, value in entry.items() if board else ():
                    board.add_scalar(name, value, entry["step"])

            yield log
        if board:
            board.close()


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        warnings.warn("no TensorBoard: the numbers are in log.jsonl only. pip install 'hf_lopt[meta]'", stacklevel=2)
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


@contextlib.contextmanager
def _signals(trainer: Trainer) -> Iterator[None]:
    """SIGINT and SIGTERM end the loop after the step that is being computed; a second one has its usual effect."""
    before = {}

    def stop(number: int, frame: Any) -> None:
        trainer.stopped = True
        signal.signal(number, before[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop)
    except ValueError:  # not in the main thread: then who runs it decides when it stops
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
