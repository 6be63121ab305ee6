"""Runs a script of tests/scripts on several gloo ranks, and ends it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


SCRIPTS = Path(__file__).parent / "scripts"
ROOT = Path(__file__).parents[1]


def torchrun(world: int, script: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run ``script`` on ``world`` ranks of this machine, one thread each; an error shows its last output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    command += [str(SCRIPTS / script), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return result


def leave() -> None:
    """End this rank when all are done. Without the teardown of gloo, in which now and then one rank aborts because
    another has closed its connections."""
    import torch.distributed as dist

    dist.barrier()
    sys.stdout.flush()
    os._exit(0)
