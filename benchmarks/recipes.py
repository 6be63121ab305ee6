"""Every optimizer on two recipes from embedded weights, AdamW beside it: `python -m benchmarks.recipes`.

Runs recipes/causal_lm.py and recipes/text_classification.py with every name of hf_lopt.available(), all arguments at
their defaults, and writes benchmarks/results/recipes.json (first and final numbers of the runs) and recipes.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import hf_lopt
from benchmarks.storing import rounded, write_record


ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
# AdamW at Trainer's default rate, and at the rate that is usual for the task.
ADAMW = {"causal_lm": "adamw_torch=1e-3", "text_classification": "adamw_torch=1e-4"}
# Smaller than the recipe's own setting: a dozen optimizers have to get through.
EXTRA = {
    "causal_lm": [],
    "text_classification": ["--per_device_train_batch_size", "16", "--max_length", "32", "--eval_size", "500"],
}
ENCODER = "encoder: MiniLM cut to 2 of its 6 layers and to the tokens that occur"
METRIC = {"causal_lm": "perplexity", "text_classification": "accuracy"}


def cut_down_encoder(folder: Path) -> Path:
    """The pretrained encoder of the recipe with its first two layers and the word pieces of its data."""
    sys.path.insert(0, str(ROOT / "recipes"))
    from transformers import AutoModel, AutoTokenizer, BertTokenizerFast

    import assets

    tokenizer, model = (cls.from_pretrained(assets.minilm_dir()) for cls in (AutoTokenizer, AutoModel))
    texts = [snippet.text for snippet in assets.rotten_tomatoes_snippets()]
    used = {i for ids in tokenizer(texts)["input_ids"] for i in ids}
    kept = sorted(used | set(tokenizer.all_special_ids))
    (folder / "vocab.txt").write_text("\n".join(tokenizer.convert_ids_to_tokens(kept)) + "\n", encoding="utf-8")
    embeddings = model.embeddings.word_embeddings
    embeddings.weight = torch.nn.Parameter(embeddings.weight.detach()[kept].clone())
    model.encoder.layer = model.encoder.layer[:2]
    model.config.num_hidden_layers, model.config.vocab_size = 2, len(kept)
    model.save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=True).save_pretrained(folder)
    return folder


def run(recipe: str, names: list[str], steps: int, folder: Path) -> dict:
    first, *others = names
    command = [sys.executable, str(ROOT / "recipes" / f"{recipe}.py"), "--optim", first, "--compare", *others]
    command += ["adamw_torch", ADAMW[recipe], "--max_steps", str(steps), "--no_checkpoints"]
    command += ["--output_dir", str(folder / recipe), *EXTRA[recipe]]
    if recipe == "text_classification":
        (folder / "encoder").mkdir()
        command += ["--model", str(cut_down_encoder(folder / "encoder"))]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return json.loads((folder / recipe / "metrics.json").read_text(encoding="utf-8"))


def first_and_final(run: dict, metric: str) -> dict:
    """A run of metrics.json without its curves: the first and the final numbers of each kind."""
    train = [row["loss"] for row in run["history"] if "loss" in row]
    held_out = [row["eval_loss"] for row in run["history"] if "eval_loss" in row]
    kept = {key: x for key, x in run.items() if key != "history"}
    kept["first"] = {"train_loss": train[0], "eval_loss": held_out[0]}
    kept["final"] = {"train_loss": train[-1]} | {
        f"eval_{key}": run["final"][f"eval_{key}"] for key in ("loss", metric)
    }
    kept["finite"] = all(x is not None and math.isfinite(x) for x in train)
    return rounded(kept, 6)


def rows(metrics: dict, metric: str) -> list[str]:
    out = []
    for name, result in metrics["runs"].items():
        first, final = result["first"], result["final"]
        schedule = f"{result['learning_rate']:g}, {result['lr_scheduler_type']}"
        out.append(
            f"| {name} | {schedule} | {first['train_loss']:.3f} → {final['train_loss']:.3f} | "
            f"{first['eval_loss']:.3f} → {final['eval_loss']:.3f} | {final['eval_' + metric]:.3f} | "
            f"{result['seconds']:.0f} |{'' if result['finite'] else ' not finite |'}"
        )
    return out


def render(found: dict) -> str:
    """The page of all tables."""
    text = ["# All optimizers on two recipes", ""]
    for recipe, metrics in found.items():
        versions = ", ".join(f"{key} {value}" for key, value in metrics["versions"].items())
        text += [
            f"## {recipe}",
            "",
            f"{metrics['arguments']['max_steps']} steps, seed {metrics['arguments']['seed']}, one run each, embedded "
            f"weights, {' '.join(EXTRA[recipe]) or 'no other arguments'}, the rest at its defaults; "
            f"{ENCODER + '; ' if recipe == 'text_classification' else ''}CPU, "
            f"{metrics['machine']['threads']} threads, {versions}, {metrics['date']}. Seconds include evaluation."
            f"{' ' + metrics['note'] if metrics.get('note') else ''}",
            "",
            f"| optimizer | lr, schedule | training loss, first → last | held-out loss | {METRIC[recipe]} | s |",
            "| --- | --- | --- | --- | ---: | ---: |",
            *rows(metrics, METRIC[recipe]),
            "",
        ]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of every run (default: 300)")
    parser.add_argument("--recipes", nargs="+", default=list(METRIC), choices=list(METRIC))
    parser.add_argument("--names", nargs="+", default=list(hf_lopt.available()))
    parser.add_argument("--note", help="what a reader should know about these runs, such as what else was running")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "recipes.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for recipe in options.recipes:
            metrics = run(recipe, options.names, options.steps, Path(folder))
            for key in ("output_dir", "model"):  # folders of this machine
                metrics["arguments"].pop(key)
            metrics["task"].pop("model", None)
            metrics["runs"] = {name: first_and_final(run, METRIC[recipe]) for name, run in metrics["runs"].items()}
            metrics["note"] = options.note
            metrics["date"] = datetime.date.today().isoformat()
            metrics["machine"]["processor"] = platform.machine()
            found[recipe] = metrics
    write_record(file, found)
    (RESULTS / "recipes.md").write_text(render(found), encoding="utf-8")


if __name__ == "__main__":
    main()
