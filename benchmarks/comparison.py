"""Learned optimizers against AdamW on six recipes, three seeds each: `python -m benchmarks.comparison`.

Runs recipes/compare.py on small settings of six recipes and writes benchmarks/results/comparison/RECIPE.json,
comparison.md, comparison.png and the picture of README.md; with `--draw` only the page and the pictures, from the
files. `--lengths` compares shorter and longer runs, and keeps the final numbers only
(comparison/lengths.json). `--celo` names a file of published Celo weights. Results are the final numbers of every run,
and the evaluations of those in the picture, under its arguments and the SHA-256 of its weights: what is there is not
done again, so that new weights of one optimizer cost only its own runs. Schedule-free AdamW wants
`pip install schedulefree`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))

import compare as comparing  # noqa: E402
from benchmarks import muon, storing  # noqa: E402
from hf_lopt.plot import log_ticks  # noqa: E402
from report import comparison_cells, draw_comparisons, draw_mean, plus_minus, write_json  # noqa: E402


RESULTS = ROOT / "benchmarks" / "results" / "comparison"
PAGE = RESULTS.parent / "comparison.md"
PICTURE = RESULTS.parent / "comparison.png"
FRONT = ROOT / "docs" / "images" / "held_out_loss.png"
# What the picture of README.md shows: recipe -> heading, and optimizer -> colour and words.
PANELS = {
    "causal_lm": "GPT-2, text",
    "image_classification": "vision transformer, digits",
    "seq2seq": "T5, vowels put back",
}
CURVES = {
    "celo2": ("C1", "Celo2, lr 1e-3"),
    "velo": ("C0", "VeLO, nothing tuned"),
    "adamw_torch best": ("black", "AdamW, best of\n1e-3, 3e-3, 1e-2"),
    "adamw_torch": ("0.6", "AdamW, Trainer's\n5e-5"),
}
LEARNED = ["velo", "celo", "celo2", "small_fc_lopt"]
FINE_TUNING = ("text_classification", "token_classification", "lora")
PUBLISHED = "celo, published weights"
EVALUATED = ("step", "eval_loss", "step_cpu_seconds")
# Recipe -> the grid of AdamW, and arguments under which a run takes some 10 to 40 seconds on one core, fine-tuning 80.
SETTINGS = {
    "causal_lm": (
        "1e-3,3e-3,1e-2",
        "--layers 2 --width 64 --heads 4 --vocab_size 512 --block_size 64 --max_steps 300 --eval_steps 100",
    ),
    "text_classification": (
        "1e-4,2e-4,4e-4",
        "--train_size 2048 --eval_size 500 --per_device_train_batch_size 16 --max_length 48 --max_steps 128 "
        "--eval_steps 64",
    ),
    "token_classification": (
        "1e-4,3e-4,1e-3",
        "--train_size 2048 --eval_size 500 --per_device_train_batch_size 16 --max_length 48 --max_steps 128 "
        "--eval_steps 64",
    ),
    "lora": ("1e-3,3e-3,1e-2", "--max_steps 30 --eval_steps 15"),
    "image_classification": ("1e-3,3e-3,1e-2", "--max_steps 200 --eval_steps 50"),
    "seq2seq": ("1e-3,3e-3,1e-2", "--max_steps 300 --eval_steps 100"),
}
LOWER = "velo=0.03"  # one lr for all layers, also new ones, as the README recommends for several epochs on few labels
# Other lengths of the runs, without a picture, and the learned optimizers that are compared at them: in two epochs of
# fine-tuning Celo2 and small_fc take five minutes a run.
LENGTHS = {
    "causal_lm": {50: LEARNED, 1000: LEARNED},
    "text_classification": {50: LEARNED, 256: ["velo", LOWER]},
    "token_classification": {50: LEARNED},
    "image_classification": {50: LEARNED, 1000: LEARNED},
    "seq2seq": {50: LEARNED, 1000: LEARNED},
}
LENGTHS_FILE = RESULTS / "lengths.json"
# Beside AdamW where models are trained from scratch, each with a rate from the same grid.
OTHERS = (muon.NAME, "schedule_free_adamw")
NOTES = {
    "text_classification": "The pretrained MiniLM of the recipe, all of it; learned optimizers use their multiplier "
    "for fine-tuning, and that from scratch for the new head. The larger class has a share of 0.556. With published "
    "weights: `--celo FILE`.",
    "lora": "SmolLM2-135M with adapters of rank 8. Adapters count as trained from scratch.",
}
"""What the page says about a recipe beyond its arguments."""


def final_numbers(run: Mapping[str, Any], metric: str, drawn: bool = True) -> dict[str, Any]:
    """What is kept of a run: its facts and final numbers; of one that is drawn all evaluations."""
    # The last entry stays the last: compare.py reads the time of a run from it.
    evaluations = [
        {key: x for key, x in entry.items() if key in EVALUATED} for entry in run["history"] if "eval_loss" in entry
    ]
    history = storing.rounded(evaluations if drawn else evaluations[-1:])
    final = {key: run["final"][key] for key in ("train_loss", "eval_loss", metric)}
    kept = {key: x for key, x in run.items() if key != "seconds"}  # of a machine that others use, too
    return kept | {"final": storing.rounded(final, 8), "history": history}


def others_of(recipe: str) -> list[str]:
    """The optimizers beside the learned ones, which have a grid."""
    return ["adamw_torch", *([] if recipe in FINE_TUNING else OTHERS)]


def published_celo(results: dict, seeds: list[int], file: str | None) -> dict[str, dict]:
    """The runs of Celo with published weights: from the ``file``, or without one those in store."""
    recipe = results["recipe"]
    if file is None:
        before = stored(recipe)
        same = before["recipe_arguments"] == results["recipe_arguments"]
        return {key: run for key, run in before["runs"].items() if same and run["label"] == PUBLISHED}
    folder = ROOT / "runs" / "comparison" / f"{recipe}_celo"
    argv = ["--recipe", recipe, "--optims", "celo", "--seeds", *map(str, seeds), "--output_dir", str(folder)]
    own = comparing.main([*argv, "--optim_args", f"weights={file}", *SETTINGS[recipe][1].split()])
    found = {}
    for key in own["compared"]:
        run = own["runs"][key]
        # The place of the file is that of this machine.
        named = run | {"label": PUBLISHED, "weights": run["weights"] | {"source": Path(file).name}}
        found[key] = final_numbers(named, results["metric"])
    return found


def rows_of(runs: Mapping[str, dict], metric: str) -> list[dict[str, Any]]:
    """The rows of the table: those of compare.py, with Celo's published weights behind its embedded ones."""
    by_weights = {published: [] for published in (False, True)}
    for run in runs.values():
        by_weights[run["label"] == PUBLISHED].append(run)
    rows, published = (comparing.summarise(mine, metric) for mine in by_weights.values())
    place = LEARNED.index("celo") + 1
    return [*rows[:place], *published, *rows[place:]]


def run(recipe: str, seeds: list[int], celo: str | None) -> dict:
    """Do what is missing of one recipe's comparison; what is stored of it."""
    rates, options = SETTINGS[recipe]
    folder = ROOT / "runs" / "comparison" / recipe
    kept_in = RESULTS / f"{recipe}.json"
    if kept_in.is_file() and not (folder / "results.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "results.json", stored(recipe))
    argv = ["--recipe", recipe, "--optims", *LEARNED, "adamw_torch"]
    argv += [f"{name}={rates}" for name in others_of(recipe)]
    argv += ["--seeds", *map(str, seeds), "--optim_args", "weights=bundled", "--output_dir", str(folder)]
    results = comparing.main([*argv, *options.split()])
    results["recipe_arguments"].pop("output_dir", None)
    # Only what is compared: earlier weights belong to earlier pages.
    drawn = {row["label"] for row in results["rows"] if row.get("best") or "=" not in row["label"]}
    mine = {key: results["runs"][key] for key in results["compared"]}
    kept = {key: final_numbers(run, results["metric"], run["label"] in drawn) for key, run in mine.items()}
    kept |= published_celo(results, seeds, celo)
    results |= {"rows": rows_of(kept, results["metric"]), "compared": list(kept)}
    storing.write_record(kept_in, packed(results | {"runs": kept}))
    return results | {"runs": kept}


def rows_of_length(recipe: str, steps: int, seeds: list[int], celo: str | None, known: list[str]) -> list[dict]:
    """Train for ``steps`` what is not among the labels ``known``; a row each."""
    rates, options = SETTINGS[recipe]
    words = options.split()
    for name in ("--max_steps", "--eval_steps"):
        place = words.index(name)
        words[place + 1] = str(steps)
    # Trainer's own rate of AdamW is in the race where a model is fine-tuned.
    grids = [f"{name}={rate}" for name in others_of(recipe) for rate in rates.split(",")]
    grids += ["adamw_torch"] if recipe in FINE_TUNING else []
    wanted = {"bundled": [label for label in [*LENGTHS[recipe][steps], *grids] if label not in known]}
    if celo is not None and PUBLISHED not in known:
        wanted[celo] = ["celo"]
    rows = []
    for weights, labels in wanted.items():
        if not labels:
            continue
        published = weights == celo
        folder = ROOT / "runs" / "comparison" / f"{recipe}_{steps}{'_celo' if published else ''}"
        argv = ["--recipe", recipe, "--optims", *labels, "--seeds", *map(str, seeds), "--output_dir", str(folder)]
        results = comparing.main([*argv, "--optim_args", f"weights={weights}", *words])
        names = {"celo": PUBLISHED} if published else {}
        rows += [{"label": names.get(row["label"], row["label"])} | row["eval_loss"] for row in results["rows"]]
    return storing.rounded(rows, 4)


def lengths_found() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Recipe -> steps -> rows, as they are stored."""
    return json.loads(LENGTHS_FILE.read_text(encoding="utf-8")) if LENGTHS_FILE.is_file() else {}


def compare_lengths(recipes: list[str], seeds: list[int], celo: str | None) -> None:
    """Do what is missing of :data:`LENGTHS`, and keep the rows. A row that is there is not made again: delete it."""
    for recipe, steps in ((name, steps) for name in recipes for steps in LENGTHS.get(name, {})):
        found = lengths_found()
        known = found.get(recipe, {}).get(str(steps), [])
        new = rows_of_length(recipe, steps, seeds, celo, [row["label"] for row in known])
        found = lengths_found()  # again: another recipe's may have been written meanwhile
        found.setdefault(recipe, {})[str(steps)] = [*known, *new]
        storing.write_record(LENGTHS_FILE, found)


def without_rate(label: str) -> str:
    """The row of the table in which a label is; all rates of a grid are in one."""
    return label if label == LOWER else label.partition("=")[0]


def table_of_lengths() -> list[str]:
    """Held-out loss of every optimizer at each length; of those with a grid the best rate."""
    found = lengths_found()
    columns = [(recipe, steps) for recipe in SETTINGS for steps in found.get(recipe, {})]
    labels = list(LEARNED)
    labels.insert(labels.index("celo") + 1, PUBLISHED)
    labels.insert(labels.index("velo") + 1, LOWER)
    labels += ["adamw_torch", *OTHERS]
    lines = [
        "## Shorter and longer runs",
        "",
        "Held-out loss after so many steps, three seeds, everything else as above (`--lengths`); of those with a grid "
        "the best rate, in brackets.",
        "",
        "| optimizer | " + " | ".join(f"{recipe}, {steps}" for recipe, steps in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for label in labels:
        cells = []
        for recipe, steps in columns:
            mine = [row for row in found[recipe][steps] if without_rate(row["label"]) == label]
            row = min(mine, key=lambda row: row["mean"], default=None)
            rate = row["label"].removeprefix(label).removeprefix("=") if row else ""
            cells.append((plus_minus(row) if row else "") + (f" ({rate})" if rate else ""))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return [*lines, ""]


def packed(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results as they are stored; see :func:`stored`. What all runs under one label share stands once."""
    runs = {name: run | {"history": storing.as_columns(run["history"])} for name, run in results["runs"].items()}
    short = storing.without_usual(runs)
    of_labels, runs = storing.shared_by(short["runs"], "label")
    rest = {key: x for key, x in results.items() if key != "rows"}
    return rest | {"usual": short["usual"], "of_labels": of_labels, "runs": runs}


def stored(recipe: str) -> dict:
    """What is stored of one recipe's comparison."""
    results = json.loads((RESULTS / f"{recipe}.json").read_text(encoding="utf-8"))
    of_labels = results.pop("of_labels")
    short = {key: of_labels[run["label"]] | run for key, run in results["runs"].items()}
    whole = storing.whole_runs(results | {"runs": short})
    runs = {key: run | {"history": storing.as_entries(run["history"])} for key, run in whole.items()}
    return results | {"runs": runs, "rows": rows_of(runs, results["metric"])}


def draw_front(found: list[dict]) -> None:
    """The picture of README.md: held-out loss by step on three recipes, readable at 800 pixels."""
    from matplotlib import pyplot

    by_recipe = {results["recipe"]: results for results in found}
    figure, row = pyplot.subplots(1, len(PANELS), figsize=(10, 2.9), layout="constrained")
    for axes, (recipe, heading) in zip(row, PANELS.items(), strict=True):
        results = by_recipe[recipe]
        best = {each["label"] for each in results["rows"] if each.get("best")}
        for name, (colour, words) in CURVES.items():
            optim, _, tuned = name.partition(" ")
            labels = best if tuned else {optim}
            runs = [results["runs"][key] for key in results["compared"]]
            mine = [run for run in runs if run["optim"] == optim and run["label"] in labels]
            style = {"linestyle": "--" if optim == "adamw_torch" else "-", "marker": "o", "markersize": 3}
            draw_mean(axes, mine, "eval_loss", "step", color=colour, label=words, **style)
        log_ticks(axes.yaxis)
        axes.set(title=heading, xlabel="optimizer step")
        axes.grid(alpha=0.3)
    row[0].set_ylabel("held-out loss (log scale)")
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside center right", frameon=False)
    figure.savefig(FRONT, dpi=130)
    pyplot.close(figure)
    storing.use_palette(FRONT)


def render(found: list[dict]) -> str:
    """The page of all tables."""
    text = [
        "# Learned optimizers against AdamW",
        "",
        "Embedded weights, but where published ones are named. Made by `python -m benchmarks.comparison` with "
        "`OMP_NUM_THREADS=1`. Every optimizer starts from the same weights and sees the same batches; mean ± standard "
        "deviation over the seeds. AdamW has Trainer's default rate, and a grid of which the best by held-out loss is "
        "named: it was chosen by the same numbers that the table shows, which favours it. Learned optimizers are at "
        "their own default. muon: torch's for matrices, AdamW for the rest (benchmarks/muon.py). s: processor seconds "
        "within the optimizer steps of one run.",
        "",
        "![Held-out losses over steps](comparison.png)",
        "",
    ]
    for results in found:
        first = results["runs"][results["compared"][0]]
        dates = sorted({results["runs"][key]["date"] for key in results["compared"]})
        versions = ", ".join(f"{key} {value}" for key, value in first["versions"].items())
        place = first["machine"]
        names, *rows = comparison_cells(results)
        learned = (row for row in results["rows"] if row.get("weights") is not None)
        weights = (f"{row['label']} {row['weights']['sha256'][:12]}" for row in learned)
        setting = f"`{SETTINGS[results['recipe']][1]}`, the rest at its defaults."
        text += [
            f"## {results['recipe']}",
            "",
            f"{setting} {NOTES.get(results['recipe'], '')}".strip(),
            "",
            f"{place['name']}, {place['threads']} of {place['cores']} threads; {versions}; {', '.join(dates)}. "
            f"Weights (sha256): {', '.join(weights)}.",
            "",
            f"| {' | '.join(names)} |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
        ]
    return "\n".join(text + (table_of_lengths() if LENGTHS_FILE.is_file() else []))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--celo", help="a file of published Celo weights")
    parser.add_argument("--lengths", action="store_true", help="the runs of other lengths only")
    parser.add_argument("--draw", action="store_true", help="only write the page and the pictures again")
    options = parser.parse_args()
    muon.register()
    os.chdir(ROOT)  # the arguments of the runs name no machine's folders
    if options.lengths:
        compare_lengths(options.recipes, options.seeds, options.celo)
        return
    found = [
        stored(recipe) if options.draw else run(recipe, options.seeds, options.celo) for recipe in options.recipes
    ]
    if len(found) == len(SETTINGS):
        draw_comparisons(PICTURE, found, dpi=58, columns=["held-out"])
        storing.use_palette(PICTURE, 48)
        draw_front(found)
        PAGE.write_text(render(found), encoding="utf-8")


if __name__ == "__main__":
    main()
