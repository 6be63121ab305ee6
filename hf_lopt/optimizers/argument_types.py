"""Types of arguments that the optimizers share."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from hf_lopt.weights import Weights


_Path = str | os.PathLike[str]

WeightsSource = _Path | Sequence[_Path] | Mapping[str, Any] | Weights
AxisOrder = Literal["torch", "jax", "torch_transposed", "torch_stacked", "torch_merged", "jax_merged"]
Branch = Literal["auto", "network", "adam"]
StateDtype = Literal["float32", "bfloat16", "int8"]
NewtonSchulzDtype = Literal["float32", "tf32", "bfloat16", "auto"]
Precision = Literal["exact", "tf32"]
