"""How weights get into the engine: as addresses, so that nothing is copied and torch layers can share them.

A `Matrix` is a linear weight [out, in] in one of three forms: plain rows of numbers, the buffer that `core.calls.prepare` lays out
from packed codes, or bf16 in 12 bits (tight.py). The experts of a layer lie one after another in one Matrix with `count` > 1.
`EngineWeights` has a Matrix for every linear role of a spec and two fp32 arrays (weight, bias) for every norm, by (role, layer).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit.core import calls
from lowbit.core.arena import ALIGNMENT, weight_memory
from lowbit.errors import WeightError
from lowbit.models.spec import DecoderSpec, Located
from lowbit.packing import PackedTensor
from lowbit.runtime.abi import LAYER_MATRICES, OUTER_MATRICES, PLAIN, PREPARED, TIGHT
from lowbit.runtime.mapped import mapped_bytes
from lowbit.runtime.stored import addresses

Floats = NDArray[np.float32]
Key = tuple[str, int | None]
Sample = bytes  # by another name than the field of a Matrix
MATRIX_ROLES = frozenset((*LAYER_MATRICES, *OUTER_MATRICES))
_SAMPLE = 256  # bytes of a weight at each of three places: another model differs in some of them
_AT_ONCE = 256 << 20  # bytes that one call lays out, in 0.2 s or less: Ctrl-C is heard between two calls
_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Matrix:
    """A linear weight in memory. `owner` is whatever must stay alive for the address to stay valid."""

    address: int
    rows: int
    cols: int
    kind: int = PLAIN
    dtype: str = "float32"
    count: int = 1
    bytes: int = 0
    bias: Floats | None = None
    owner: Any = None
    sample: Sample = b""  # tight: what `sample_of` took of the plain weight

    def with_bias(self, bias: Floats | None) -> Matrix:
        return replace(self, bias=bias)


@dataclass
class EngineWeights:
    """Everything that a spec names, by (role, layer); layer is None outside the layers."""

    matrices: dict[Key, Matrix] = field(default_factory=dict)
    vectors: dict[Key, tuple[Floats | None, Floats | None]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the linear weights, each counted once."""
        seen = {m.address: m for m in self.matrices.values()}
        return sum(bytes_at(matrix).size for matrix in seen.values())


def plain(array: NDArray[Any], dtype: str | None = None, bias: Floats | None = None) -> Matrix:
    """A dense weight [out, in] or [experts, out, in] where it lies; bf16 comes as uint16 with dtype="bfloat16"."""
    name = dtype or str(array.dtype)
    if name not in _DTYPES or array.itemsize != _DTYPES[name]:
        raise WeightError(f"the engine reads {', '.join(_DTYPES)}, not {name}; convert the weight first")
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    rows, cols = array.shape[-2:]
    count = array.shape[0] if array.ndim == 3 else 1
    return Matrix(array.ctypes.data, rows, cols, PLAIN, name, count, 0, bias, array)


def prepared(packed: PackedTensor, bias: Floats | None = None) -> Matrix:
    """A packed weight over numpy arrays, laid out for the products; the experts of a layer one after another."""
    matrix, jobs, _arrays = _reserve(packed)
    calls.prepare_all(jobs)
    return matrix.with_bias(bias)


class Preparation:
    """Weights of a file that are laid out together, many in one call of the core, which takes no interpreter meanwhile.

    `add` gives a Matrix whose memory is filled by the time of `finish`. Weights that were copied or made on the way are laid out at
    once, so that no more than one of them is held. `before` is called before each piece of work.
    """

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        self._before = before
        self._jobs: list[calls.Preparing] = []
        self._arrays: list[Any] = []

    def add(self, packed: PackedTensor) -> Matrix:
        matrix, jobs, arrays = _reserve(packed)
        self._jobs += jobs
        self._arrays += arrays
        if not all(job.mapped_codes for job in jobs) or sum(job.size for job in self._jobs) > _AT_ONCE:
            self.finish()
        return matrix

    def finish(self) -> None:
        if self._jobs:
            self._before()
            calls.prepare_all(self._jobs)
        self._jobs, self._arrays = [], []


def _reserve(packed: PackedTensor) -> tuple[Matrix, list[calls.Preparing], list[Any]]:
    """Memory for a weight, what the core has to do to fill it, and the arrays that must live until then."""
    refusal = calls.refuses(packed.format, packed.shape) if packed.format.fixed_range else None
    if refusal:
        raise WeightError(f"the engine cannot run this model: {refusal}; load it through lowbit.AutoModelForCausalLM")
    experts = [packed.expert(i) for i in range(packed.shape[0])] if len(packed.shape) == 3 else [packed]
    rows, cols = packed.shape[-2:]
    # Every buffer begins on a boundary of its own.
    size = calls.prepared_bytes(packed.format, rows, cols)
    if size % ALIGNMENT and len(experts) > 1:
        raise WeightError(f"prepared experts of {size} bytes do not lie on {ALIGNMENT}-byte boundaries")
    buffer = weight_memory(size * len(experts))
    jobs, kept = [], []
    for index, expert in enumerate(experts):
        arrays = {name: np.ascontiguousarray(array) for name, array in expert.tensors().items()}
        mapped = [mapped_bytes(arrays[name]) if name in arrays else 0 for name in ("codes", "scales")]
        place = int(buffer.ctypes.data) + index * size
        jobs.append(calls.Preparing(packed.format, rows, cols, addresses(arrays), place, size, *mapped))
        kept.append(arrays)
    return (
        Matrix(int(buffer.ctypes.data), rows, cols, PREPARED, "float32", len(experts), size, None, buffer),
        jobs,
        kept,
    )


def bytes_at(matrix: Matrix) -> NDArray[np.uint8]:
    """A weight's memory as it lies there."""
    size = matrix.count * matrix.bytes or plain_size(matrix)
    view: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(matrix.address))
    return view


def plain_size(matrix: Matrix) -> int:
    """Bytes of a weight as plain numbers of its type."""
    return matrix.count * matrix.rows * matrix.cols * _DTYPES[matrix.dtype]


def sample_of(data: NDArray[np.uint8]) -> Sample:
    """A few bytes of a weight: its beginning, middle and end."""
    starts = (0, data.size // 2, max(data.size - _SAMPLE, 0))
    return b"".join(data[start : start + _SAMPLE].tobytes() for start in starts)


def fingerprint(spec: DecoderSpec, weights: EngineWeights) -> str:
    """A hash of what a model is: its spec, its vectors, and a sample of every matrix."""
    import hashlib  # only prompts that are kept in files need it

    digest = hashlib.sha256(repr(spec).encode())
    for key, matrix in sorted(weights.matrices.items(), key=lambda item: str(item[0])):
        # A tight weight counts as the plain one: whether it is tight depends on the memory that was there.
        is_tight = matrix.kind == TIGHT
        kind = PLAIN if is_tight else matrix.kind
        size = plain_size(matrix) if is_tight else bytes_at(matrix).size
        digest.update(f"{key} {matrix.rows} {matrix.cols} {kind} {matrix.dtype} {size}".encode())
        digest.update(matrix.sample if is_tight else sample_of(bytes_at(matrix)))
    for key, pair in sorted(weights.vectors.items(), key=lambda item: str(item[0])):
        digest.update(str(key).encode())
        for vector in pair:
            digest.update(b"" if vector is None else vector.tobytes())
    return digest.hexdigest()


def engine_weights(spec: DecoderSpec, tensors: Mapping[str, NDArray[Any] | PackedTensor]) -> EngineWeights:
    """The weights of a model from arrays (or packed weights) under any names that the spec knows."""
    weights = EngineWeights()
    for (role, layer), located in spec.locate(tensors).items():
        bias = None if located.bias is None else _vector(tensors[located.bias])
        if role in MATRIX_ROLES:
            weights.matrices[role, layer] = _matrix(located, tensors).with_bias(bias)
        else:
            pieces = [_vector(tensors[name]) for row in located.names for name in row]
            weights.vectors[role, layer] = (np.concatenate(pieces), bias)
    return weights


def _vector(array: Any) -> Floats:
    return np.ascontiguousarray(np.asarray(array, np.float32).ravel())


def _matrix(located: Located, tensors: Mapping[str, Any]) -> Matrix:
    first = tensors[located.names[0][0]]
    if isinstance(first, PackedTensor):
        if located.in_pieces or located.weight.transposed:
            raise WeightError(
                f"{located.names[0][0]} is packed as a file stores it; pack the weight [.., out, in] that the model names"
            )
        return prepared(first)
    rows = [np.concatenate([tensors[name] for name in row]) for row in located.names]
    weight = np.stack(rows) if located.in_pieces else rows[0] if len(located.names[0]) > 1 else first
    if located.weight.transposed:
        weight = weight.swapaxes(-1, -2)
    if tuple(weight.shape) != located.weight.shape:
        raise WeightError(
            f"{located.names[0][0]} has shape {list(weight.shape)}, the {located.weight.role} weight of this model is "
            f"{list(located.weight.shape)}"
        )
    return plain(weight)
