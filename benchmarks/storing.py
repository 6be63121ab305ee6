"""What benchmarks keep in benchmarks/results/: final numbers in few digits, thin curves, pictures with a palette."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def rounded(value: Any, digits: int = 5) -> Any:
    """The same nested lists and dicts with every finite float rounded to ``digits`` significant digits."""
    if isinstance(value, Mapping):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) and math.isfinite(value) else value


def thinned(entries: Sequence[Any], at_most: int = 20) -> list[Any]:
    """Evenly spaced entries of a curve, the first and the last among them."""
    if len(entries) <= at_most:
        return list(entries)
    return [entries[round(k * (len(entries) - 1) / (at_most - 1))] for k in range(at_most)]


def use_palette(picture: Path, colours: int = 128) -> None:
    """Rewrite a PNG of lines and text with a palette instead of true colours: about a quarter of the bytes.

    128 colours keep the pale bands around the curves apart, and so does k-means; with 64 some change their hue.
    """
    from PIL import Image

    with Image.open(picture) as image:
        flat = image.convert("RGB").quantize(colours, kmeans=3, dither=Image.Dither.NONE)
    flat.save(picture, format="PNG", optimize=True)
