"""The arguments of the operators: one dataclass for each, whose fields are the only order that arguments have.
Schemas are made from the fields, calls pass them by name, plain kernels receive the object. To add one, add a field
here, read it in the plain kernel, and add it in the same place to the C++ function (``csrc/boxed.h``).

Everything is local: tensors are never DTensors but the shards of them that this process has.

Axes: T tensors, D decays of a kind of accumulator, F feature columns, S statistics of a tensor, U units, P weights of
a network, H hidden units of a scheduler, K networks in its bank, I inputs of a scheduler. State of a parameter of
shape ``s``: momenta and second moments (D, *s), float32, bfloat16 or 8-bit codes; for rank >= 2 row accumulators
(D, *s without axis A) and column accumulators (D, *s without axis B), where A and B are the largest and the second
largest axis; for rank < 2 diagonal accumulators (D, *s) instead. Lists have an empty tensor, or an axis of -1, where a
parameter has no such thing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_lopt.kernels.run_arguments import Advance as Advance
from hf_lopt.kernels.run_arguments import Assign as Assign
from hf_lopt.kernels.run_arguments import LstmStep as LstmStep
from hf_lopt.kernels.run_arguments import Pool as Pool
from hf_lopt.kernels.run_arguments import SpecializeNetworks as SpecializeNetworks
from hf_lopt.kernels.run_arguments import ZeroNan as ZeroNan
from hf_lopt.kernels.schema import (
    Arguments,
    Flag,
    Integer,
    Integers,
    MaybeNumber,
    MaybeTensor,
    Names,
    Number,
    Numbers,
    OneTensor,
    ScalarType,
    Tensors,
    WrittenTensors,
)


@dataclass(frozen=True)
class Sums(Arguments):
    """Pass 0: row and column sums of g², and the statistics of each tensor.

    Attributes:
        params, grads: float32, bfloat16 or float16.
        momenta, second_moments: read only where ``moments`` asks for their statistics.
        row_axes, col_axes: axes A and B of each tensor.
        clip: bound on the gradient (inf: none).
        moments: whether the statistics of parameters and accumulators are wanted too.
        momentum_scales, second_scales: see :class:`FeatureSums`.
    """

    OPERATOR: ClassVar[str] = "sums"
    RETURNS: ClassVar[str] = "(Tensor[], Tensor[], Tensor)"
    DEVICE_OF: ClassVar[str] = "params"
    HOLDS: ClassVar[bool] = True

    params: Tensors
    grads: Tensors
    momenta: Tensors
    second_moments: Tensors
    row_axes: Integers
    col_axes: Integers
    clip: Number
    moments: Flag
    momentum_scales: Tensors
    second_scales: Tensors


@dataclass(frozen=True)
class UpdateFactored(Arguments):
    """Between pass 0 and pass 1: the new row and column accumulators and their factors.

    Attributes:
        rows, cols: the accumulators before the step.
        row_sums, col_sums: sums of g² over the whole tensor, as pass 0 gives them for a tensor that is not sharded.
        row_means: mean over axis B of the new row accumulators, with B of size 1, where a rank does not hold all of
            B; empty elsewhere.
        row_sizes, col_sizes: lengths of the axes A and B of the whole tensors.
        row_axes, col_axes: the axes A and B.
        decays: of the factored accumulators.
    """

    OPERATOR: ClassVar[str] = "update_factored"
    RETURNS: ClassVar[str] = "(Tensor[], Tensor[], Tensor[], Tensor[])"
    DEVICE_OF: ClassVar[str] = "row_sums"
    HOLDS: ClassVar[bool] = True

    rows: Tensors
    cols: Tensors
    row_sums: Tensors
    col_sums: Tensors
    row_means: Tensors
    row_sizes: Integers
    col_sizes: Integers
    row_axes: Integers
    col_axes: Integers
    decays: Numbers


@dataclass(frozen=True)
class FeatureSums(Arguments):
    """Pass 1: the sum of squares of every feature column. Reads everything, changes nothing.

    Attributes:
        features: names of the features in trained order, keys of :data:`hf_lopt.features.FEATURES`.
        params, grads, momenta, second_moments, diagonals: as they are before the step.
        rows, cols, row_factors, col_factors: as they are after ``update_factored``.
        row_axes, col_axes: axes A and B of each tensor.
        slice_axes: none, or two axes of each tensor: every matrix over them counts as a tensor of its own. The same
            axis twice: every vector along it.
        momentum_decays, second_decays, factored_decays: of the accumulators.
        clip, second_eps, diagonal_eps: see :class:`hf_lopt.features.ElementFeatures`.
        momentum_scales, second_scales: scales of the accumulators that are 8-bit codes, empty for others
            (:mod:`hf_lopt.kernels.reference.formats`); no entries at all where none is.
    """

    OPERATOR: ClassVar[str] = "feature_sums"
    RETURNS: ClassVar[str] = "Tensor"
    DEVICE_OF: ClassVar[str] = "params"
    HOLDS: ClassVar[bool] = True

    features: Names
    params: Tensors
    grads: Tensors
    momenta: Tensors
    second_moments: Tensors
    diagonals: Tensors
    rows: Tensors
    cols: Tensors
    row_factors: Tensors
    col_factors: Tensors
    row_axes: Integers
    col_axes: Integers
    slice_axes: Integers
    momentum_decays: Numbers
    second_decays: Numbers
    factored_decays: Numbers
    clip: Number
    second_eps: Number
    diagonal_eps: Number
    momentum_scales: Tensors
    second_scales: Tensors


@dataclass(frozen=True)
class ApplyNetwork(FeatureSums):
    """Pass 2: the network, the new accumulators and the new parameters, in place.

    Attributes:
        weights: matrices of the layers, (T or 1, in, out) float32, the first with the feature scales in it.
        biases: (T or 1, out) float32.
        scale: what the first output is multiplied with, (T,) float32.
        decay: the share of the parameter that is taken off, (T,) float32.
        exp_mult: what the second output is multiplied with under the exponential.
        skip: bool, 0-d; where it is true nothing is changed.
        out: empty, or a float32 tensor for each parameter that receives the step instead of the parameter.
        step: number of the step, 0-d int64, which the random rounding depends on; None where nothing is so rounded.
        places: where each parameter lies in the whole one, see ``read_places`` of that module; empty likewise.
        round_params: whether bfloat16 parameters are rounded at random.
        tf32: products of networks of 32 units may be in TF32 on a GPU; elsewhere all are float32.

    The others are those of :class:`FeatureSums`.
    """

    OPERATOR: ClassVar[str] = "apply_network"
    RETURNS: ClassVar[str] = "(Tensor, Tensor)"

    params: WrittenTensors
    momenta: WrittenTensors
    second_moments: WrittenTensors
    diagonals: WrittenTensors
    momentum_scales: WrittenTensors
    second_scales: WrittenTensors
    weights: Tensors
    biases: Tensors
    scale: OneTensor
    decay: OneTensor
    exp_mult: Number
    skip: OneTensor
    out: WrittenTensors
    step: MaybeTensor
    places: Integers
    round_params: Flag
    tf32: Flag = False


@dataclass(frozen=True)
class AdamStep(Arguments):
    """A whole step of Adam, in place.

    Attributes:
        momentum_decay, second_decay: of the two accumulators, each with one decay.
        clip: bound on the gradient (inf: none).
        scale: size of the step of each tensor, (T,) float32, or a number for each of the equal slices of a tensor
            along its first axis.
        decay: the share of the parameter that is taken off, likewise.
        momentum_correction, second_correction: bias corrections 1 / (1 - d^n), 0-d float32.
        inner_eps, outer_eps: added under the root and to it.
        skip: bool, 0-d; where it is true nothing is changed.
        momentum_scales, second_scales: see :class:`FeatureSums`.
        step, places, round_params: see :class:`ApplyNetwork`.
    """

    OPERATOR: ClassVar[str] = "adam_step"
    RETURNS: ClassVar[str] = "Tensor"
    DEVICE_OF: ClassVar[str] = "params"
    HOLDS: ClassVar[bool] = True

    params: WrittenTensors
    grads: Tensors
    momenta: WrittenTensors
    second_moments: WrittenTensors
    momentum_decay: Number
    second_decay: Number
    clip: Number
    scale: OneTensor
    decay: OneTensor
    momentum_correction: OneTensor
    second_correction: OneTensor
    inner_eps: Number
    outer_eps: Number
    skip: OneTensor
    momentum_scales: WrittenTensors
    second_scales: WrittenTensors
    step: MaybeTensor
    places: Integers
    round_params: Flag


@dataclass(frozen=True)
class Descend(Arguments):
    """Applies steps that were computed before: p <- p - lr (step / rms + weight_decay p).

    Attributes:
        steps: float32, shaped like the parameters.
        lr, weight_decay: (T,) float32, or a number for each slice.
        squares, numel: sum of squares of each whole step or slice and its size, float64; None: rms is 1.
        norm_eps: added to the mean square.
        slice_axes: as in :class:`FeatureSums`.
        skip: bool, 0-d; where it is true nothing is changed.
        step, places, round_params: see :class:`ApplyNetwork`.
    """

    OPERATOR: ClassVar[str] = "descend"
    RETURNS: ClassVar[str] = "()"
    DEVICE_OF: ClassVar[str] = "params"
    HOLDS: ClassVar[bool] = True

    params: WrittenTensors
    steps: Tensors
    lr: OneTensor
    weight_decay: OneTensor
    squares: MaybeTensor
    numel: MaybeTensor
    norm_eps: Number
    slice_axes: Integers
    skip: OneTensor
    step: MaybeTensor
    places: Integers
    round_params: Flag


@dataclass(frozen=True)
class Orthogonalize(Arguments):
    """Newton-Schulz iteration: matrices with their singular values moved to about 1.

    Attributes:
        x: (..., R, C).
        dtype: what the iteration runs in.
        coefficients: the three of the quintic polynomial.
        steps: number of iterations.
        eps: added to the norm that the matrices are divided by first.
        norm_eps: None, or each matrix is brought to a mean square of 1 at the end; added to what it was.
    """

    OPERATOR: ClassVar[str] = "orthogonalize"
    RETURNS: ClassVar[str] = "(Tensor, Tensor)"
    DEVICE_OF: ClassVar[str] = "x"

    x: OneTensor
    dtype: ScalarType
    coefficients: Numbers
    steps: Integer
    eps: Number
    norm_eps: MaybeNumber
