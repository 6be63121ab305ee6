"""Compare optimizers on one recipe, over seeds and learning rates, from the same weights on the same batches.

Without arguments: VeLO, Celo2 and small_fc against AdamW at Trainer's default rate and at three others, on
causal_lm.py, three seeds each; half an hour or so on two CPU cores. Whatever is not an argument of compare.py is one
of the recipe's (see its own --help):

  python recipes/compare.py --recipe causal_lm --max_steps 100
  python recipes/compare.py --recipe image_classification --optims velo adamw_torch=1e-3,3e-3 --seeds 0 1
  python recipes/compare.py --recipe text_classification --train_file mine.csv

Every finished run is kept in results.json under its arguments and the SHA-256 of its weights. The same command again
does what is missing: after an interruption, with more seeds, more optimizers, or new weights of one of them.
"""

import dataclasses
import datetime
import hashlib
import importlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from tqdm.auto import tqdm

import hf_lopt
from arguments import (
    Contender,
    InputError,
    RecipeArguments,
    check_contenders,
    learned_optimizer,
    parse,
    parse_known,
    read_contender,
    run_script,
)
from common import Task, machine, train, training_arguments, versions
from report import draw_comparisons, print_comparison, write_json


RECIPES = (
    "causal_lm",
    "text_classification",
    "token_classification",
    "image_classification",
    "seq2seq",
    "lora",
)
# What a recipe takes, but a comparison decides.
DECIDED = ("optim", "compare", "learning_rate", "seed", "resume", "no_checkpoints")
# What changes nothing about a run's numbers.
NEUTRAL = ("output_dir", "optim_args", "report_to", *DECIDED)
FILES_WRITTEN = """\
Files written to --output_dir:
  results.json      the table, and every run: arguments, weights, versions, machine, final metrics and history
  comparison.png    loss against steps and against seconds; mean and standard deviation over the seeds"""


@dataclass
class Arguments:
    """Arguments of a comparison."""

    recipe: str = field(default="causal_lm", metadata={"help": "What to train.", "choices": RECIPES})
    output_dir: str = field(
        default="runs/compare", metadata={"help": "Folder for the results; one per recipe and set of its arguments."}
    )
    optims: list[str] = field(
        default_factory=lambda: ["velo", "celo2", "small_fc_lopt", "adamw_torch", "adamw_torch=3e-4,1e-3,3e-3"],
        metadata={
            "help": "Optimizers, each NAME at Trainer's own rule or NAME=LR,LR,... for a grid of learning rates. "
            "Among several rates of one optimizer the best by mean held-out loss is named."
        },
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": "Each fixes new weights, dropout and the order of the data for all optimizers alike."},
    )
    optim_args: str | None = field(
        default=None, metadata={"help": "Further options of the learned optimizers, such as: weights=bundled"}
    )
    fresh: bool = field(default=False, metadata={"help": "Forget the runs in --output_dir and do all of them again."})

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"--seeds are {self.seeds}; give at least one, and each once")
        grid(self)


def grid(args: Arguments) -> list[Contender]:
    """Every optimizer with every learning rate that `args` names.

    Raises:
        InputError: an unknown optimizer, a bad learning rate, or the same entry twice.
    """
    entries = []
    for entry in args.optims:
        name, equals, text = entry.partition("=")
        entries += [f"{name}={rate}" for rate in text.split(",")] if equals else [name]
    if not entries:
        raise InputError("--optims is empty; name at least one optimizer")
    listed = check_contenders([read_contender(entry, "optims") for entry in entries])
    learned = hf_lopt.available()
    return [
        dataclasses.replace(each, optim_args=args.optim_args if each.optim in learned else None) for each in listed
    ]


def weights_sha256(contender: Contender) -> str | None:
    """SHA-256 of the weights that a learned optimizer would load now; None for the others."""
    if contender.optim not in hf_lopt.available():
        return None
    options = (option.partition("=") for option in (contender.optim_args or "").split(","))
    given = {key.strip(): value.strip() for key, _, value in options if key.strip() == "weights"}
    return learned_optimizer(contender.optim, **given).weights.sha256


def run_key(recipe: str, recipe_args: RecipeArguments, contender: Contender, seed: int, sha256: str | None) -> str:
    """The name under which a run is kept: what decides its numbers, but for the versions of the libraries."""
    found = dataclasses.asdict(recipe_args)
    # Without what is not given: a recipe may learn a new option later, and these runs have been without it.
    arguments = {key: value for key, value in found.items() if key not in NEUTRAL and value is not None}
    identity = [recipe, arguments, contender.optim, contender.learning_rate, contender.optim_args, seed, sha256]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def recipe_arguments(module: Any, argv: Sequence[str]) -> RecipeArguments:
    """The recipe's own arguments.

    Raises:
        InputError: one of them is for compare.py to decide.
    """
    found = parse(module.Arguments, module.__doc__, argv)
    plain = module.Arguments()
    for name in DECIDED:
        if getattr(found, name) != getattr(plain, name):
            raise InputError(f"--{name} is decided by compare.py; see its --optims and --seeds")
    return found


def one_run(task: Task, recipe_args: RecipeArguments, contender: Contender, seed: int) -> dict[str, Any]:
    """Train once; what results.json says about it."""
    chosen = dataclasses.replace(recipe_args, seed=seed, no_checkpoints=True)
    settings = training_arguments(chosen, contender, by_length=task.by_length)
    settings.disable_tqdm = True  # one bar over all runs is enough
    run = train(task, contender, settings, save=False)
    kept = ("step", "loss", "eval_loss", task.metric, "step_seconds", "step_cpu_seconds")
    history = [{key: _short(entry[key]) for key in kept if key in entry} for entry in run["history"]]
    facts = {"label": contender.label, "seed": seed, "date": datetime.date.today().isoformat()}
    return facts | run | {"history": history, "versions": versions(), "machine": machine(settings)}


def _short(value: float) -> float:
    """Six digits: what a picture needs, in half the space."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def summarise(runs: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, Any]]:
    """One row per optimizer and learning rate: mean and standard deviation of the final numbers over the seeds.

    A run that did not stay finite makes the mean infinite. `best` marks the learning rate with the lowest mean
    held-out loss where an optimizer has several, `edge` if that rate is the lowest or highest one.
    """
    rows: dict[str, dict[str, Any]] = {}
    for label in dict.fromkeys(run["label"] for run in runs):
        mine = [run for run in runs if run["label"] == label]
        row = {key: mine[0].get(key) for key in ("label", "optim", "learning_rate", "lr_scheduler_type", "weights")}
        row["seeds"] = [run["seed"] for run in mine]
        for key in ("train_loss", "eval_loss", metric):
            values = [run["final"].get(key) for run in mine]
            finite = all(value is not None and math.isfinite(value) for value in values)
            values = values if finite else [math.inf]
            spread = statistics.stdev(values) if len(values) > 1 else None
            row[key] = {"mean": statistics.fmean(values), "spread": spread}
        for key in ("step_seconds", "step_cpu_seconds"):
            row[key] = statistics.fmean(run["history"][-1].get(key, math.nan) for run in mine)
        rows[label] = row
    for optim in dict.fromkeys(row["optim"] for row in rows.values()):
        mine = sorted((row for row in rows.values() if row["optim"] == optim), key=lambda row: row["learning_rate"])
        if len(mine) > 1:
            best = min(mine, key=lambda row: row["eval_loss"]["mean"])
            best["best"], best["edge"] = True, best in (mine[0], mine[-1])
    return list(rows.values())


def _known_runs(path: Path, fresh: bool) -> dict[str, Any]:
    """Finished runs of earlier sessions by their key."""
    if fresh or not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))["runs"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} holds no results of a comparison; remove it, or name another --output_dir"
        ) from error


def compare(args: Arguments, recipe_argv: Sequence[str] = ()) -> dict[str, Any]:
    """Do the runs that are missing, and write the results.

    Returns:
        What results.json holds: `recipe`, `arguments`, `recipe_arguments`, `task`, `metric`, `rows` (see `summarise`),
        `compared` (the keys of the runs that they are about) and `runs` by key, those of other arguments included.

    Raises:
        InputError: arguments that compare.py or the recipe does not take.
    """
    module = importlib.import_module(args.recipe)
    recipe_args = recipe_arguments(module, recipe_argv)
    folder = Path(args.output_dir)
    path = folder / "results.json"
    runs = _known_runs(path, args.fresh)
    # No lines of the recipe's own between those of the progress bar.
    recipe_args = dataclasses.replace(recipe_args, output_dir=str(folder / "work"))
    task = module.make_task(recipe_args)
    chosen = grid(args)
    hashes = {contender.label: weights_sha256(contender) for contender in chosen}
    wanted = {
        run_key(args.recipe, recipe_args, contender, seed, hashes[contender.label]): (contender, seed)
        for seed in args.seeds
        for contender in chosen
    }
    results = {
        "recipe": args.recipe,
        "arguments": {key: value for key, value in dataclasses.asdict(args).items() if key != "output_dir"},
        "recipe_arguments": {k: v for k, v in dataclasses.asdict(recipe_args).items() if k not in NEUTRAL},
        "task": dict(task.facts),
        "metric": task.metric,
        "metric_name": task.metric_name,
        "rows": [],
        "runs": runs,
    }
    transformers.utils.logging.disable_progress_bar()
    todo = [key for key in wanted if key not in runs]
    with tqdm(total=len(wanted), initial=len(wanted) - len(todo), unit="run") as bar:
        for key in todo:
            contender, seed = wanted[key]
            bar.set_description(f"{contender.label}, seed {seed}")
            runs[key] = one_run(task, recipe_args, contender, seed)
            # After every run, so that an interrupted comparison keeps what it has.
            write_json(path, results)
            bar.set_postfix_str(f"held-out loss {runs[key]['final']['eval_loss']:.4g}")
            bar.update()
    results["compared"] = list(wanted)
    results["rows"] = summarise([runs[key] for key in wanted], task.metric)
    write_json(path, results)
    draw_comparisons(folder / "comparison.png", [results])
    print_comparison(results, folder)
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the comparison with the command line `argv`; returns what results.json holds."""
    args, recipe_argv = parse_known(Arguments, __doc__, argv, FILES_WRITTEN)
    return compare(args, recipe_argv)


if __name__ == "__main__":
    run_script(main)
