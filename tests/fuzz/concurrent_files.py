"""A weight file that another thread rewrites in place while it is read."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from random import Random

from hf_lopt import rules, weights

from .outcomes import DAMAGED, REFUSED, SAME, Result, refusal
from .weight_files import RECORD, SETS, digests, originals, weight_files_in


def run(random: Random, folder: Path) -> Result:
    """Load one set a few times while a thread shortens and rewrites one of its files with the same content."""
    rule, form = random.choice(SETS)
    target = folder / "set"
    shutil.copytree(originals() / f"{rule}-{form}", target)
    file = random.choice(weight_files_in(target))
    (target / RECORD).unlink()
    data, stop = file.read_bytes(), threading.Event()
    cut, pause = random.choice((0, len(data) // 2, len(data) - 1)), random.random() * 1e-3

    def rewrite() -> None:
        descriptor = os.open(file, os.O_RDWR)
        while not stop.is_set():
            os.ftruncate(descriptor, cut)
            os.pwrite(descriptor, data[: len(data) // 2], 0)
            os.pwrite(descriptor, data[len(data) // 2 :], len(data) // 2)
            time.sleep(pause)
        os.close(descriptor)

    thread = threading.Thread(target=rewrite)
    thread.start()
    what = f"rewritten, {file.suffix[1:]}"
    outcome = Result(REFUSED, what)
    try:
        for _ in range(20):
            try:
                found = weights.load(rule, target, rules.get(rule).shapes).sha256
            except Exception as error:  # judged by its kind and its text
                judged = refusal(error, what, folder)
                if judged.outcome != REFUSED:
                    return judged
                continue
            # The offsets that only the record holds are gone with it.
            if found != digests()[rule, form] and (rule, form) != ("small_fc_lopt", "published"):
                return Result(DAMAGED, what, f"{rule} {form}")
            outcome = Result(SAME, what)
    finally:
        stop.set()
        thread.join()
    return outcome
