"""Runs a script of tests/scripts on several gloo ranks, and ends it."""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import os
import runpy
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path


SCRIPTS = Path(__file__).parent / "scripts"
ROOT = Path(__file__).parents[1]
TIMEOUT = 600  # seconds

# Importing torch and transformers is most of what a rank does. One process imports them, and ranks are its copies.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch.distributed.tensor.parallel", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict"]
    + ["hf_lopt.hf", "accelerate", "transformers.trainer", "pytest"]
)


def run_on_ranks(world: int, script: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run ``script`` on ``world`` ranks of this machine, one thread each, as torchrun does: the first rank that fails
    ends them all. An error shows their last output."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=TIMEOUT), wait_for_workers=False)
    shared = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(store.port), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    # The store above is that of the ranks.
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "tests"}
    command = [str(SCRIPTS / script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"rank{i}.txt") for i in range(world)]
        ranks = [
            SERVER.Process(
                target=_be_rank,
                args=(command, {**os.environ, **shared, "RANK": str(i), "LOCAL_RANK": str(i)}, str(log)),
            )
            for i, log in enumerate(logs)
        ]
        for rank in ranks:
            rank.start()
        end = time.monotonic() + TIMEOUT
        # Each is asked once a round: a wait for none, after the last one ended in between, would take all of the time.
        while running := [rank for rank in ranks if rank.exitcode is None]:
            if any(rank.exitcode for rank in ranks) or time.monotonic() > end:
                break
            multiprocessing.connection.wait([rank.sentinel for rank in running], end - time.monotonic())
        failed = any(rank.exitcode != 0 for rank in ranks)
        for rank in ranks:
            rank.kill()
            rank.join()
        output = "".join(f"---- rank {i}\n{log.read_text()[-6000:]}" for i, log in enumerate(logs) if log.exists())
    assert not (check and failed), output
    return subprocess.CompletedProcess(command, int(failed), output, "")


def _be_rank(command: list[str], environment: dict[str, str], log: str) -> None:
    gc.freeze()  # Collections would go through all that was imported, and so copy its pages.
    os.environ.clear()
    os.environ.update(environment)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


def leave() -> None:
    """End this rank when all are done. Without the teardown of gloo, in which now and then one rank aborts because
    another has closed its connections."""
    import torch.distributed as dist

    dist.barrier()
    sys.stdout.flush()
    os._exit(0)
