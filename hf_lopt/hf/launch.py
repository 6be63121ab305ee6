"""Run an unmodified script or module with the learned optimizers registered, or in place of the one it constructs."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence

from hf_lopt import rules
from hf_lopt.hf.register import register
from hf_lopt.hf.replace import Options, Replacer


_USAGE = """usage: python -m hf_lopt.launch script.py [arguments of the script]
       python -m hf_lopt.launch -m module [arguments of the module]
       python -m hf_lopt.launch --replace CLASS=OPTIMIZER [options] script.py or -m module [arguments]

Runs a script that does not know hf_lopt with its optimizers registered, so that --optim {name} works in it.
Under a launcher: accelerate launch [options] -m hf_lopt.launch script.py ...
                  torchrun [options] -m hf_lopt.launch script.py ...

For a script that constructs its optimizer itself:
  --replace CLASS=OPTIMIZER  construct OPTIMIZER ({names})
                             wherever the script constructs CLASS, such as AdamW={name}; may be repeated
  --steps N                  length of the run in optimizer steps (default: what the script tells its scheduler)
  --lr X                     learning rate or multiplier (default: the optimizer's own)
  --optim_args A=B,...       other arguments; schedule=keep lets the script's scheduler act"""


def _number(option: str, text: str, kind: type) -> float | int:
    try:
        number = kind(text)
    except ValueError:
        number = -1
    if not (number > 0 or kind is float and number == 0):
        raise ValueError(f"{option} is a positive {'whole ' if kind is int else ''}number; got {text!r}")
    return number


def read_options(arguments: list[str]) -> tuple[Options, list[str]]:
    """Our options, and what follows them.

    Raises:
        ValueError: for an unknown option, or a value that it does not take.
    """
    options, rest = Options(), list(arguments)
    while rest and rest[0].startswith("--"):
        option, equals, value = rest.pop(0).partition("=")
        if option not in ("--replace", "--steps", "--lr", "--optim_args"):
            raise ValueError(f"there is no option {option}; options of the script come after its name")
        if not equals:
            if not rest:
                raise ValueError(f"{option} wants a value")
            value = rest.pop(0)
        if option == "--replace":
            options.add(value)
        elif option == "--steps":
            options.steps = int(_number(option, value, int))
        elif option == "--lr":
            options.lr = float(_number(option, value, float))
        else:
            options.optim_args = value
    if not options.replacements and (options.steps, options.lr, options.optim_args) != (None, None, None):
        raise ValueError("--steps, --lr and --optim_args belong to --replace CLASS=OPTIMIZER")
    options.check()
    return options, rest


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script that ``argv`` (default: the command line) names as ``__main__``, with the rest as its arguments.

    Raises:
        SystemExit: without a script, for a script that does not exist, for options that are wrong, and without
            transformers, unless an optimizer is replaced.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    usage = _USAGE.format(name=rules.names()[0], names=", ".join(rules.names()))
    if arguments and arguments[0] in ("-h", "--help"):
        sys.stdout.write(usage + "\n")
        return
    try:
        options, arguments = read_options(arguments)
    except ValueError as error:
        raise SystemExit(f"hf_lopt.launch: {error}") from None
    as_module = arguments[:1] == ["-m"]
    target = arguments[as_module] if len(arguments) > as_module else None
    if target is None:
        raise SystemExit(usage)
    if not options.replacements and importlib.util.find_spec("transformers") is None:
        raise SystemExit("hf_lopt.launch needs transformers: pip install transformers")
    if not as_module and not os.path.isfile(target):
        raise SystemExit(f"hf_lopt.launch: there is no script {target!r}\n{usage}")
    register()
    with Replacer(options) if options.replacements else contextlib.nullcontext():
        _run(target, arguments, as_module)


def _run(target: str, arguments: list[str], as_module: bool) -> None:
    sys.argv = arguments[as_module:]
    if as_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
        return
    # As `python script.py` does, in place of the entry that `python -m` made: imports beside the script have to work.
    sys.path[0] = os.path.dirname(os.path.abspath(target))
    runpy.run_path(target, run_name="__main__")
