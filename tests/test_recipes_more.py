"""The recipes for images, text-to-text, adapters and raw Accelerate loops, and the comparison: small runs of each."""

import json
import math

import numpy as np
import pytest
from PIL import Image


transformers = pytest.importorskip("transformers", reason="the recipes need: pip install 'hf_lopt[recipes]'")
pytest.importorskip("matplotlib", reason="the recipes need: pip install 'hf_lopt[recipes]'")

import recipe_cases  # noqa: E402, F401, I001  (first: it makes the recipes importable)

import arguments  # noqa: E402
import assets  # noqa: E402
import causal_lm  # noqa: E402
import compare  # noqa: E402
import image_classification  # noqa: E402
import lora  # noqa: E402
import pretrain_accelerate  # noqa: E402
import report  # noqa: E402
import seq2seq  # noqa: E402


# The weights inside the package, wherever the tests run.
BUNDLED = ["--optim_args", "weights=bundled"]
SMALL_VIT = "--layers 1 --width 16 --heads 2 --per_device_train_batch_size 32 --eval_size 100".split()
SMALL_T5 = "--layers 1 --width 16 --heads 2 --per_device_train_batch_size 8 --eval_size 16 --train_size 200".split()
LOOP = "--layers 1 --width 16 --heads 2 --vocab_size 257 --block_size 32 --batch_size 4 --weights bundled".split()


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"step {i} took {i % 7} and then {i % 5} more." for i in range(400)), encoding="utf-8")
    return path


def evaluations(run, key="eval_loss"):
    return [entry[key] for entry in run["history"] if key in entry]


# ---- images


def test_image_classification_learns_the_digits(tmp_path):
    options = ["--layers", "2", "--eval_size", "100", "--max_steps", "80", "--eval_steps", "40", *BUNDLED]
    results = image_classification.main([*options, "--output_dir", str(tmp_path)])
    assert (results["task"]["train_examples"], results["task"]["eval_examples"]) == (1697, 100)
    run = results["runs"]["velo"]
    losses = evaluations(run)
    # Random weights make an even guess among ten digits.
    assert losses[0] == pytest.approx(math.log(10), abs=0.3) and losses[-1] < losses[0] - 0.5
    assert run["final"]["eval_accuracy"] > 0.4
    config = json.loads((tmp_path / "velo" / "config.json").read_text())
    assert config["id2label"]["7"] == "7" and config["image_size"] == 8
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.fixture
def photos(tmp_path):
    """Two classes of colour images of several sizes and formats: red ones and blue ones, and a file that is none."""
    for name, colour in (("red", (220, 30, 30)), ("blue", (30, 30, 220))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            image = Image.new("RGB", (20 + i, 24), colour)
            image.save(tmp_path / "photos" / name / f"{i}.{'png' if i % 2 else 'jpg'}")
        (tmp_path / "photos" / name / "notes.txt").write_text("not an image")
    return tmp_path / "photos"


def test_image_classification_takes_a_folder_and_goes_on_from_the_result(tmp_path, photos):
    options = ["--data", str(photos), *SMALL_VIT, "--image_size", "16", "--patch_size", "8", "--no_checkpoints"]
    trained = [*options, "--optim", "adamw_torch", "--learning_rate", "0.01", "--max_steps", "20"]
    results = image_classification.main([*trained, "--output_dir", str(tmp_path / "out")])
    assert results["task"]["labels"] == ["blue", "red"]
    assert (results["task"]["train_examples"], results["task"]["eval_examples"]) == (16, 4)
    final = results["runs"]["adamw_torch"]["final"]
    assert final["eval_accuracy"] == 1.0
    # A pretrained model brings a processor, which here has to do what the recipe did.
    saved = tmp_path / "out" / "adamw_torch"
    settings = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    transformers.ViTImageProcessor(**settings).save_pretrained(saved)
    again = [*options, "--optim", "adamw_torch", "--max_steps", "1", "--model", str(saved)]
    results = image_classification.main([*again, "--output_dir", str(tmp_path / "again")])
    first = evaluations(results["runs"]["adamw_torch"])[0]
    assert first == pytest.approx(final["eval_loss"], rel=0.1, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "absent"], "--data absent.*digits and mnist"),
        (["--patch_size", "3"], "--patch_size 3.*--image_size 8"),
    ],
)
def test_bad_image_arguments_are_named(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(arguments.InputError, match=message):
        image_classification.main(options)


def test_bad_image_folders_are_named(tmp_path, photos):
    with pytest.raises(arguments.InputError, match="0 classes"):
        image_classification.load_examples(str(photos / "red"))
    broken = photos / "red" / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(arguments.InputError, match="broken.png"):
        image_classification.open_image(broken, "RGB")


# ---- text to text


def test_seq2seq_learns_and_shows_what_it_writes(tmp_path):
    options = [*SMALL_T5, "--max_steps", "60", "--eval_steps", "30", "--no_checkpoints", *BUNDLED]
    results = seq2seq.main([*options, "--output_dir", str(tmp_path)])
    run = results["runs"]["velo"]
    losses = evaluations(run)
    assert losses[-1] < losses[0] - 0.5
    assert 0.0 <= run["final"]["eval_token_accuracy"] <= 1.0
    assert len(run["samples"]) == seq2seq.SAMPLES
    assert set(run["samples"][0]) == {"source", "target", "written"}


def test_seq2seq_takes_pairs_of_texts(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("english,german\n" + "\n".join(f"{i} cats,{i} Katzen" for i in range(20)) + "\n")
    args = seq2seq.Arguments(train_file=str(path), source_column="english", target_column="german")
    train, evaluation = seq2seq.load_pairs(args)
    assert len(train) == 16 and len(evaluation) == 4
    assert all(target == source.replace("cats", "Katzen") for source, target in [*train, *evaluation])
    with pytest.raises(arguments.InputError, match="'source'.*--source_column"):
        seq2seq.load_pairs(seq2seq.Arguments(train_file=str(path)))


def test_vowel_pairs_are_phrases_without_their_vowels():
    assert seq2seq.without_vowels("assume that a value") == "ssm tht a vl"
    pairs = seq2seq.vowel_pairs(["The next step. The next one!"], 2)
    assert pairs == [("th nxt", "the next"), ("nxt stp", "next step"), ("nxt n", "next one")]
    assert seq2seq.vowel_pairs(["next one more"], 2, known=pairs) == [("n mr", "one more")]
    train, evaluation = seq2seq.load_pairs(seq2seq.Arguments())
    assert len(train) > 5000 and len(evaluation) == 500
    assert not {target for _, target in train} & {target for _, target in evaluation}


def test_every_target_ends_in_the_end_token():
    tokenizer = assets.byte_tokenizer()
    row = seq2seq.encode_pairs([("ab", "abcdef")], tokenizer, max_length=4)[0]
    assert tokenizer.decode(row["labels"]) == "abc<|endoftext|>" and len(row["input_ids"]) == 3


def test_token_accuracy_counts_only_target_tokens():
    prediction = type("P", (), {"predictions": np.array([[1, 2, 9]]), "label_ids": np.array([[1, 3, -100]])})
    assert seq2seq.token_accuracy(prediction) == {"token_accuracy": 0.5}


# ---- adapters


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = assets.byte_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_lora_trains_only_adapters_and_sets_the_least_scale(tmp_path, small_llama, text_file):
    options = ["--model", str(small_llama), "--text_file", str(text_file), "--block_size", "32", "--max_steps", "8"]
    options += ["--eval_steps", "4", "--learning_rate", "1", *BUNDLED, "--compare", "adamw_torch=1e-2"]
    results = lora.main([*options, "--output_dir", str(tmp_path)])
    for run in results["runs"].values():
        assert evaluations(run)[-1] < evaluations(run)[0]
    adapters = tmp_path / "velo" / "adapter_model.safetensors"
    assert adapters.is_file() and not (tmp_path / "velo" / "model.safetensors").exists()
    state = json.loads((tmp_path / "velo" / "adapter_config.json").read_text())
    assert state["r"] == 8 and sorted(state["target_modules"]) == ["q_proj", "v_proj"]


def test_lora_gives_the_least_scale_to_those_that_take_it():
    assert lora.Arguments(model="x").own_optim_args("velo") is None
    args = lora.Arguments(model="x", min_param_scale=0.1)
    assert args.own_optim_args("velo") == args.own_optim_args("celo") == "min_param_scale=0.1"
    assert all(args.own_optim_args(name) is None for name in ("adamw_torch", "celo2", "small_fc_lopt"))
    assert lora.Arguments(model="x", min_param_scale=0).own_optim_args("velo") == "min_param_scale=0"
    assert (
        lora.Arguments(model="x", min_param_scale=0.1, optim_args="min_param_scale=0.2").own_optim_args("velo") is None
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "0"], "--rank.*0"),
        (["--min_param_scale", "-1"], "--min_param_scale.*-1"),
        (["--target_modules", "nowhere"], "--target_modules nowhere"),
    ],
)
def test_bad_lora_arguments_are_named(tmp_path, small_llama, text_file, options, message):
    fixed = ["--model", str(small_llama), "--text_file", str(text_file), "--block_size", "32"]
    with pytest.raises(arguments.InputError, match=message):
        lora.main([*fixed, *options, "--max_steps", "1", "--output_dir", str(tmp_path)])


@pytest.mark.assets
@pytest.mark.slow
def test_smollm2_is_readable_and_trainable(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "cache_dir", lambda: tmp_path)
    try:
        folder = assets.smollm2_dir()
    except assets.MissingPackageError as error:
        pytest.skip(str(error))
    assert assets.smollm2_dir() == folder and [path.name for path in tmp_path.iterdir()] == [folder.name]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert not getattr(model.config, "quantization_config", None)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0])


# ---- raw Accelerate


def numbers(results):
    (run,) = results["runs"].values()
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in run["history"]]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loop_trains_and_resumes_to_the_same_numbers(tmp_path, text_file, monkeypatch, accumulation):
    options = [*LOOP, "--text_file", str(text_file), "--max_steps", "8", "--eval_steps", "4", "--logging_steps", "2"]
    options += ["--gradient_accumulation_steps", str(accumulation)]
    whole = pretrain_accelerate.main([*options, "--output_dir", str(tmp_path / "whole")])
    losses = [entry["eval_loss"] for entry in numbers(whole) if "eval_loss" in entry]
    assert losses[0] == pytest.approx(math.log(257), abs=0.3) and losses[-1] < losses[0]
    assert (tmp_path / "whole" / "model" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "whole" / "metrics.json").read_text())["runs"]["velo"]["steps"] == 8

    def stop_at_six(optimizer, real=pretrain_accelerate.learned_numbers):
        if optimizer.optimizer.steps_done == 6:
            raise KeyboardInterrupt
        return real(optimizer)

    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(pretrain_accelerate, "learned_numbers", stop_at_six)
        pretrain_accelerate.main([*options, "--output_dir", str(tmp_path / "parts")])
    resumed = pretrain_accelerate.main([*options, "--output_dir", str(tmp_path / "parts"), "--resume"])
    assert numbers(resumed) == numbers(whole)


def test_the_loop_takes_adamw_too_and_names_mistakes(tmp_path, text_file):
    options = [*LOOP, "--text_file", str(text_file), "--max_steps", "4", "--output_dir", str(tmp_path)]
    results = pretrain_accelerate.main([*options, "--optim", "adamw"])
    rates = [entry["learning_rate"] for entry in numbers(results) if "learning_rate" in entry]
    assert rates[-1] < rates[0] == pytest.approx(1e-3 * 3 / 4)  # linear decay, logged after the step
    for bad, message in (
        (["--optim", "sgd"], "'sgd'"),
        (["--max_steps", "0"], "--max_steps.*0"),
        (["--learning_rate", "-1"], "--learning_rate.*-1"),
        (["--heads", "3"], "--heads 3"),
        (["--batch_size", "5000"], "batch"),
    ):
        with pytest.raises(arguments.InputError, match=message):
            pretrain_accelerate.main([*options, *bad])
    with pytest.raises(arguments.InputError, match="empty"):
        pretrain_accelerate.main([*options[:-1], str(tmp_path / "empty"), "--resume"])


# ---- the comparison


COMPARE = ["--recipe", "image_classification", "--optim_args", "weights=bundled"]
COMPARE += [*SMALL_VIT, "--max_steps", "6", "--eval_steps", "3", "--logging_steps", "2"]


def test_compare_averages_names_the_best_and_does_only_what_is_missing(tmp_path, monkeypatch):
    trained = []

    def counted(task, contender, settings, checkpoint=None, save=True, real=compare.train):
        trained.append((contender.label, settings.seed))
        return real(task, contender, settings, checkpoint, save)

    monkeypatch.setattr(compare, "train", counted)
    folder = ["--output_dir", str(tmp_path)]
    optims = ["--optims", "velo", "adamw_torch", "adamw_torch=1e-3,1e-2"]
    results = compare.main([*COMPARE, *folder, *optims, "--seeds", "0", "1"])
    labels = ["velo", "adamw_torch", "adamw_torch=1e-3", "adamw_torch=1e-2"]
    assert trained == [(label, seed) for seed in (0, 1) for label in labels]
    rows = {row["label"]: row for row in results["rows"]}
    assert list(rows) == labels and rows["velo"]["seeds"] == [0, 1]
    for label, row in rows.items():
        values = [run["final"]["eval_loss"] for run in results["runs"].values() if run["label"] == label]
        assert row["eval_loss"]["mean"] == pytest.approx(np.mean(values))
        assert row["eval_loss"]["spread"] == pytest.approx(np.std(values, ddof=1))
    best = min(labels[1:], key=lambda label: rows[label]["eval_loss"]["mean"])
    assert [label for label in labels if rows[label].get("best")] == [best]
    assert rows["adamw_torch=1e-2"].get("edge", True) is True
    # One seed: all optimizers start from the same weights and see the same batches; another seed, others.
    start = {}
    for run in results["runs"].values():
        start.setdefault(run["seed"], set()).add(run["history"][0]["eval_loss"])
    assert len(start[0]) == len(start[1]) == 1 and start[0] != start[1]
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["rows"] == json.loads(json.dumps(results["rows"]))

    trained.clear()
    again = compare.main([*COMPARE, *folder, *optims, "--seeds", "0", "1"])
    assert not trained and again["rows"] == stored["rows"]
    compare.main([*COMPARE, *folder, "--optims", "adamw_torch", "celo2", "--seeds", "0", "2"])
    assert sorted(trained) == [("adamw_torch", 2), ("celo2", 0), ("celo2", 2)]
    # New weights of one optimizer: only its runs are done again.
    trained.clear()
    monkeypatch.setattr(compare, "weights_sha256", lambda each: "new" if each.optim == "velo" else None)
    compare.main([*COMPARE, *folder, *optims, "--seeds", "0"])
    assert trained == [("velo", 0)]
    trained.clear()
    compare.main([*COMPARE, *folder, "--optims", "adamw_torch", "--seeds", "0", "--width", "8"])
    assert trained == [("adamw_torch", 0)]


def test_an_interrupted_comparison_keeps_its_runs(tmp_path, monkeypatch):
    def stop_at_the_second(task, contender, settings, checkpoint=None, save=True, real=compare.train):
        if contender.label == "sgd":
            raise KeyboardInterrupt
        return real(task, contender, settings, checkpoint, save)

    options = [*COMPARE, "--output_dir", str(tmp_path), "--optims", "adamw_torch", "sgd", "--seeds", "0"]
    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(compare, "train", stop_at_the_second)
        compare.main(options)
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"].values()
    assert run["label"] == "adamw_torch"
    results = compare.main(options)
    assert [row["label"] for row in results["rows"]] == ["adamw_torch", "sgd"]
    assert run in json.loads((tmp_path / "results.json").read_text())["runs"].values()


def test_a_run_that_is_not_finite_is_never_the_best():
    def run(label, rate, loss):
        history = [{"step_seconds": 1.0, "step_cpu_seconds": 1.0}]
        final = {"train_loss": loss, "eval_loss": loss, "eval_accuracy": 0.5}
        return {"label": label, "optim": "a", "learning_rate": rate, "seed": 0, "final": final, "history": history}

    rows = compare.summarise([run("a=1", 1.0, 2.0), run("a=2", 2.0, math.nan), run("a=3", 3.0, None)], "eval_accuracy")
    assert [row.get("best", False) for row in rows] == [True, False, False] and rows[0]["edge"]
    assert report.plus_minus(rows[1]["eval_loss"]) == "not finite"
    assert report.plus_minus({"mean": 1.23456, "spread": 0.0123}) == "1.235 ± 0.012"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optims", "adamv"], "'adamv'"),
        (["--optims", "adamw_torch=1e-3,fast"], "'fast'"),
        (["--optims", "adamw_torch=1,1"], "adamw_torch=1"),
        (["--seeds", "1", "1"], "--seeds"),
        (["--learning_rate", "1"], "--learning_rate"),
        (["--max_steps", "0"], "--max_steps.*0"),
    ],
)
def test_bad_arguments_of_a_comparison_are_named(tmp_path, options, message):
    with pytest.raises(arguments.InputError, match=message):
        compare.main(["--output_dir", str(tmp_path), *options])


def test_results_of_something_else_are_left_alone(tmp_path):
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(arguments.InputError, match="results.json"):
        compare.main(["--output_dir", str(tmp_path), "--optims", "adamw_torch"])
    assert (tmp_path / "results.json").read_text() == "[]"


@pytest.mark.parametrize("recipe", [image_classification, seq2seq, lora, pretrain_accelerate, compare, causal_lm])
def test_help_can_be_printed(recipe):
    """argparse formats every text with % only now."""
    with pytest.raises(SystemExit) as leave:
        recipe.main(["--help"])
    assert leave.value.code == 0
