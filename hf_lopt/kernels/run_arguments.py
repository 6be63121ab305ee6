"""The arguments of the operators that lie between the passes; see :mod:`hf_lopt.kernels.arguments`.

Axes: T tensors, S statistics of a tensor, F feature columns, P weights of a network, H hidden units of a scheduler,
K networks in its bank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_lopt.kernels.schema import (
    Arguments,
    Flag,
    Integer,
    Integers,
    MaybeTensor,
    Number,
    Numbers,
    OneTensor,
    Tensors,
    WrittenTensor,
    WrittenTensors,
)


@dataclass(frozen=True)
class Advance(Arguments):
    """Decides about a step, counts it, and forms the features of the run and the inputs of the scheduler.

    Attributes:
        stats: statistics of pass 0, (T, S) float64, whose gradients have to be finite.
        sums: sums of pass 1, (T, F) float64, which have to be finite.
        nonfinite: None, or a bool, 0-d, that says the same of all shards.
        loss: the mean over ranks, 0-d float32; None where the rule has none.
        counters: (3,) int64, steps taken, steps skipped, steps skipped in a row.
        loss_buffer: none, or the averages of the loss and their running minimum, (10,) float32 each.
        horizon: length of the run in steps, 0 where the rule has none.
        correction_decays: decays whose bias corrections are wanted.
        tensor_inputs: none, or what VeLO's features of a tensor are made from: statistics with moments (T, S), sums
            of squares (T, F), sizes (T,), all float64, and one-hot ranks (T, 5) float32.
        p_column: the column of Σp² among the sums of squares.
        rows: number of tensors that the scheduler has an input for.
    """

    OPERATOR: ClassVar[str] = "advance"
    RETURNS: ClassVar[str] = "(Tensor, Tensor, Tensor)"
    DEVICE_OF: ClassVar[str] = "counters"

    stats: Tensors
    sums: Tensors
    nonfinite: MaybeTensor
    loss: MaybeTensor
    counters: WrittenTensor
    loss_buffer: WrittenTensors
    horizon: Number
    correction_decays: Numbers
    tensor_inputs: Tensors
    p_column: Integer
    rows: Integer


@dataclass(frozen=True)
class Pool(Arguments):
    """The scheduler's mixing layer: a maximum over all tensors, added to the row of each.

    Attributes:
        mixed: both linear maps of the inputs side by side, (T, 2H) float32.
        hidden: T hidden states (H,) float32.
    """

    OPERATOR: ClassVar[str] = "pool"
    RETURNS: ClassVar[str] = "Tensor"
    DEVICE_OF: ClassVar[str] = "mixed"
    HOLDS: ClassVar[bool] = True

    mixed: OneTensor
    hidden: Tensors


@dataclass(frozen=True)
class LstmStep(Arguments):
    """The scheduler's LSTM and its heads.

    Attributes:
        gates: (T, 4H) float32.
        hidden, cell: T states (H,) float32 each.
        heads: weights of the heads (H, K + 1), the last column for the multiplier of the step size.
        heads_bias: (K + 1,).
        bank: the bank of networks (K, P).
        softmax: whether controls pass a softmax and the multiplier an exponential, as in Celo.
        skip: bool, 0-d; where it is true the states stay.
    """

    OPERATOR: ClassVar[str] = "lstm_step"
    RETURNS: ClassVar[str] = "(Tensor, Tensor, Tensor)"
    DEVICE_OF: ClassVar[str] = "gates"
    HOLDS: ClassVar[bool] = True

    gates: OneTensor
    hidden: WrittenTensors
    cell: WrittenTensors
    heads: OneTensor
    heads_bias: OneTensor
    bank: OneTensor
    softmax: Flag
    skip: OneTensor


@dataclass(frozen=True)
class SpecializeNetworks(Arguments):
    """The network of each tensor for features that are not normalised, the size of its step and its decay.

    Attributes:
        networks: flat weights (T or 1, P), layer by layer the matrix and then the bias.
        sizes: widths of the layers; none: there is no network.
        outputs: how many outputs are kept.
        constants: values of the last inputs, which are constant over a tensor, (C,) or (T, C); None without any.
        sums: sums of squares of the features, (T, F) float64, or empty.
        numel: over how many elements they were taken, (T,) float64.
        norm_eps: added to the mean squares.
        lr, weight_decay: (T,) float32.
        factors: more factors of the step size, (T,) float32 each.
        floor: None, or the least size of a parameter that the step is relative to, (T,) float32.
        step_mult: a factor of all step sizes.
        p_column: the column of Σp² in ``sums``, -1 for none.
    """

    OPERATOR: ClassVar[str] = "specialize_networks"
    RETURNS: ClassVar[str] = "(Tensor, Tensor, Tensor)"
    DEVICE_OF: ClassVar[str] = "lr"
    HOLDS: ClassVar[bool] = True

    networks: OneTensor
    sizes: Integers
    outputs: Integer
    constants: MaybeTensor
    sums: OneTensor
    numel: OneTensor
    norm_eps: Number
    lr: OneTensor
    weight_decay: OneTensor
    factors: Tensors
    floor: MaybeTensor
    step_mult: Number
    p_column: Integer


@dataclass(frozen=True)
class Assign(Arguments):
    """Writes values into targets unless the step is skipped.

    Attributes:
        targets, values: pairs of one shape.
        skip: bool, 0-d.
    """

    OPERATOR: ClassVar[str] = "assign"
    RETURNS: ClassVar[str] = "()"
    DEVICE_OF: ClassVar[str] = "skip"
    HOLDS: ClassVar[bool] = True

    targets: WrittenTensors
    values: Tensors
    skip: OneTensor


@dataclass(frozen=True)
class ZeroNan(Arguments):
    """Writes 0 where there is NaN."""

    OPERATOR: ClassVar[str] = "zero_nan"
    RETURNS: ClassVar[str] = "()"
    DEVICE_OF: ClassVar[str] = "tensors"

    tensors: WrittenTensors
