"""Run an unmodified script or module with the learned optimizers registered."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence

from hf_lopt import rules
from hf_lopt.hf.register import register


_USAGE = """usage: python -m hf_lopt.launch script.py [arguments of the script]
       python -m hf_lopt.launch -m module [arguments of the module]

Runs a script that does not know hf_lopt with its optimizers registered, so that --optim {name} works in it.
Under a launcher: accelerate launch [options] -m hf_lopt.launch script.py ...
                  torchrun [options] -m hf_lopt.launch script.py ..."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script that ``argv`` (default: the command line) names as ``__main__``, with the rest as its arguments.

    Raises:
        SystemExit: without a script, for a script that does not exist, and without transformers.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    usage = _USAGE.format(name=rules.names()[0])
    if arguments and arguments[0] in ("-h", "--help"):
        sys.stdout.write(usage + "\n")
        return
    as_module = arguments[:1] == ["-m"]
    target = arguments[as_module] if len(arguments) > as_module else None
    if target is None:
        raise SystemExit(usage)
    if importlib.util.find_spec("transformers") is None:
        raise SystemExit("hf_lopt.launch needs transformers: pip install transformers")
    register()
    sys.argv = arguments[as_module:]
    if as_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
        return
    if not os.path.isfile(target):
        raise SystemExit(f"hf_lopt.launch: there is no script {target!r}\n{usage}")
    # As `python script.py` does, in place of the entry that `python -m` made: imports beside the script have to work.
    sys.path[0] = os.path.dirname(os.path.abspath(target))
    runpy.run_path(target, run_name="__main__")
