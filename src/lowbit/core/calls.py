"""What the compiled core does, as plain functions over addresses: quantise, pack, prepare, multiply.

    quantize    weight [out, in] -> codes, scales, zeros        the fast row of grid.py's definition
    dequantize  codes, scales, zeros -> weight
    pack        uint8 codes [rows, cols] -> the canonical bit stream, and `unpack` back
    prepare     canonical buffers -> one plain uint8 buffer laid out for wide loads, and `restore`, its exact inverse
    run         y [tokens, out] = x [tokens, in] W^T + bias from the prepared buffer

Every buffer is given by its address (`array.ctypes.data`, `tensor.data_ptr()`), so that the torch layers and the
engine without torch share these functions and one copy of the weights. The caller sizes and owns the buffers; the core
checks what it can.
"""

from __future__ import annotations

import ctypes
import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

from lowbit.core.library import DTYPES, CPrepareJob, c_dense, c_format, c_search, check, last_error, library
from lowbit.errors import KernelError
from lowbit.formats import Format


@dataclass(frozen=True)
class Rows:
    """A matrix of numbers in memory: its address, element type, shape, and the distance of its rows in elements."""

    address: int
    dtype: str
    rows: int
    cols: int
    stride: int = 0

    @property
    def step(self) -> int:
        return self.stride or self.cols


@dataclass(frozen=True)
class Canonical:
    """The addresses of a weight's canonical buffers; 0 where the format has none."""

    codes: int
    scales: int = 0
    zeros: int = 0
    scale_scales: int = 0
    scale_offset: int = 0

    @classmethod
    def of(cls, addresses: Mapping[str, int]) -> Canonical:
        """From the addresses of a weight's arrays by name; others than these are left out."""
        return cls(**{field.name: addresses[field.name] for field in fields(cls) if field.name in addresses})


@dataclass(frozen=True)
class Experts:
    """Prepared weights of one size that lie one after another, and int64 [count + 1]: where each expert's rows begin."""

    address: int
    size: int
    count: int
    begins: int


def set_threads(threads: int) -> None:
    """Threads of the core's pool; 0 takes OMP_NUM_THREADS, or as many as affinity and the container's quota allow."""
    check(library().lowbit_set_threads(threads))


def quota(cpu_max: Path) -> int:
    """Cores that a cgroup's cpu.max file pays for, rounded up; 0 where it sets no limit."""
    return int(library().lowbit_quota(bytes(cpu_max)))


def threads() -> int:
    return int(library().lowbit_threads())


def instruction_set() -> str:
    """The instruction set in use: portable, avx2, avx_vnni, avx512_vnni, avx512, avx512_bf16, amx, neon or neon_i8mm."""
    return bytes(library().lowbit_isa()).decode()


def fold_length() -> int:
    """Inputs whose scales a product of many tokens folds into one under compute="auto"; 0 where every group keeps its own."""
    return int(library().lowbit_fold_length())


def folding() -> str:
    """What compute="auto" means for more tokens than a decode has, as a sentence; empty where every group keeps its own scale."""
    length = fold_length()
    if not length:
        return ""
    return f"with more than 16 tokens, scales are folded into int8 weights per up to {length} inputs; compute='int8' keeps groups"


def rounding() -> str:
    """What compute="auto" means for bf16 weights and many tokens, as a sentence; empty where activations stay in fp32."""
    tokens = int(library().lowbit_bf16_tokens())
    return (
        f"from {tokens} tokens on, bf16 weights meet activations rounded to bf16; compute='fp32' keeps them"
        if tokens
        else ""
    )


@lru_cache(maxsize=1)
def say_if_slow() -> None:
    """Tell the user once where the processor has none of the instruction sets that the core is fast with."""
    if instruction_set() == "portable" and platform.machine() in ("x86_64", "AMD64"):
        warnings.warn(
            "this processor has no AVX2, so lowbit runs its portable code: the results are the same, several times slower",
            RuntimeWarning,
            stacklevel=3,
        )


def set_instruction_set(name: str | None) -> None:
    """Use another instruction set of this processor (tests and benchmarks); None takes the best again."""
    check(library().lowbit_set_isa(None if name is None else name.encode()))


def quantize(
    format: Format,
    weight: Rows,
    into: Canonical,
    ratios: Sequence[float] = (),
    zero_steps: int = 0,
    importance: int = 0,
) -> None:
    """Round a weight onto the grid that grid.py defines; `ratios` are the factors of the plain scale to search, none for plain."""
    search = c_search(ratios, zero_steps, importance)
    status = library().lowbit_quantize(
        c_format(format), weight.address, DTYPES[weight.dtype], weight.rows, weight.cols, weight.step,
        search, into.codes, into.scales, into.zeros or None, into.scale_scales or None,
    )  # fmt: skip
    check(status)


def dequantize(format: Format, packed: Canonical, weight: Rows) -> None:
    """Write the weight that canonical buffers stand for."""
    status = library().lowbit_dequantize(
        c_format(format), weight.rows, weight.cols, packed.codes, packed.scales, packed.zeros or None,
        packed.scale_scales or None, weight.address, DTYPES[weight.dtype], weight.step, packed.scale_offset or None,
    )  # fmt: skip
    check(status)


def distance(format: Format, packed: Canonical, weight: Rows) -> tuple[float, float]:
    """The sums of (w - w^)^2 and of w^2 of a weight and its canonical buffers."""
    sums = (ctypes.c_double * 2)()
    status = library().lowbit_distance(
        c_format(format), weight.rows, weight.cols, packed.codes, packed.scales, packed.zeros or None,
        packed.scale_scales or None, weight.address, DTYPES[weight.dtype], weight.step, ctypes.addressof(sums),
        packed.scale_offset or None,
    )  # fmt: skip
    check(status)
    return sums[0], sums[1]


def pack(bits: int, rows: int, cols: int, values: int, codes: int) -> None:
    """uint8 codes [rows, cols] at `values` to int32 words [rows, ceil(cols * bits / 32)] at `codes`."""
    check(library().lowbit_pack(bits, rows, cols, values, codes))


def unpack(bits: int, rows: int, cols: int, codes: int, values: int) -> None:
    """The inverse of `pack`."""
    check(library().lowbit_unpack(bits, rows, cols, codes, values))


# "auto" leaves the core free to fold the scales of groups where many tokens meet tiles; "int8" keeps every group's own.
COMPUTES = {"auto": 0, "int8": 4, "fp32": 1, "bf16": 2, "fp16": 3}
# Codes of other widths have no table lookup in the kernels.
_TABLE_BITS = (3, 4, 6, 8)


def refuses(format: Format, shape: tuple[int, ...], compute: str = "auto") -> str | None:
    """Why the core cannot multiply by a weight of this format and shape, or None when it can."""
    if format.levels and format.bits not in _TABLE_BITS:
        return f"the compiled core has no table of {format.bits} bits ({format})"
    if format.fixed_range:
        return f"{format} rounds activations to the range of their layer, which only layers of torch do"
    if format.act_bits == 8 and compute not in ("auto", "int8"):
        return f"{format} quantises its activations, so compute={compute!r} contradicts it"
    if len(shape) not in (2, 3):
        return f"the compiled core multiplies matrices and stacks of them, not a weight of shape {list(shape)}"
    if len(shape) == 3 and format.scale_block and shape[1] * format.groups(shape[2]) % format.scale_block:
        return (
            f"the scales of one expert are no whole blocks of {format.scale_block}, so its second level is not its own"
        )
    if compute not in COMPUTES:
        return f"the compiled core computes in {', '.join(COMPUTES)}, not in {compute}"
    return None


def refuses_to_quantize(format: Format) -> str | None:
    """Why the core cannot round weights to a format that it can run, or None."""
    if format.kind == "kquant" or format.scale_block or format.group_size == 0:
        return f"weights become {format} with torch only: lowbit quantize writes a folder that the engine runs"
    return None


def prepared_bytes(format: Format, rows: int, cols: int) -> int:
    """Size of the prepared form of a weight [rows, cols]."""
    size = int(library().lowbit_prepared_bytes(c_format(format), rows, cols))
    if size < 0:
        raise KernelError(last_error())
    return size


def prepare(format: Format, rows: int, cols: int, packed: Canonical, prepared: int, size: int) -> None:
    """Lay a weight out at `prepared` (on a 64-byte boundary) for the products."""
    status = library().lowbit_prepare(
        c_format(format), rows, cols, packed.codes, packed.scales or None, packed.zeros or None, packed.scale_scales or None,
        prepared, size, packed.scale_offset or None,
    )  # fmt: skip
    check(status)


@dataclass(frozen=True)
class Preparing:
    """A weight to be laid out: the arguments of `prepare`, and how many bytes of its codes and scales lie in a mapped file."""

    format: Format
    rows: int
    cols: int
    packed: Canonical
    prepared: int
    size: int
    mapped_codes: int = 0
    mapped_scales: int = 0


def prepare_all(weights: Sequence[Preparing]) -> None:
    """Lay several weights out, shared out among all threads; pages of mapped files go back as they have been read."""
    jobs = (CPrepareJob * len(weights))(
        *(
            CPrepareJob(
                ctypes.pointer(c_format(w.format)), w.rows, w.cols, w.packed.codes, w.packed.scales or None,
                w.packed.zeros or None, w.packed.scale_scales or None, w.packed.scale_offset or None, w.prepared, w.size,
                w.mapped_codes, w.mapped_scales,
            )
            for w in weights
        )
    )  # fmt: skip
    check(library().lowbit_prepare_all(jobs, len(weights)))


def prepare_dense(weight: Rows, prepared: int, size: int) -> None:
    """Lay a plain weight out; its rows must be contiguous."""
    check(
        library().lowbit_prepare(
            c_dense(weight.dtype), weight.rows, weight.cols, weight.address, None, None, None, prepared, size, None
        )
    )


def dense_bytes(dtype: str, rows: int, cols: int) -> int:
    """Size of the prepared form of a plain weight."""
    return int(library().lowbit_prepared_bytes(c_dense(dtype), rows, cols))


def restore(prepared: int, size: int, packed: Canonical) -> None:
    """Write the canonical buffers that `prepare` read, bit for bit."""
    check(
        library().lowbit_restore(
            prepared, size, packed.codes, packed.scales or None, packed.zeros or None, packed.scale_scales or None,
            packed.scale_offset or None,
        )
    )  # fmt: skip


def read_rows(prepared: int, size: int, rows: int, count: int, to: int) -> None:
    """Write rows of a prepared weight, numbered by int64 at `rows`, as fp32 [count, cols] at `to`."""
    check(library().lowbit_read_rows(prepared, size, rows, count, to))


def run(prepared: int, size: int, x: Rows, y: Rows, bias: int = 0, compute: str = "auto") -> None:
    """y = x W^T + bias; `bias` is the address of fp32 [out], or 0. "auto" and "int8" round activations, "fp32" nothing."""
    status = library().lowbit_run(
        prepared, size, x.address, DTYPES[x.dtype], x.rows, x.step, bias or None, y.address, DTYPES[y.dtype], y.step,
        COMPUTES[compute],
    )  # fmt: skip
    check(status)


def run_experts(experts: Experts, x: Rows, y: Rows, compute: str = "auto") -> None:
    """Rows of x sorted by expert, each times its own prepared weight; rows of y that no expert owns are left as they are."""
    status = library().lowbit_run_experts(
        experts.address, experts.size, experts.count, experts.begins, x.address, DTYPES[x.dtype], x.rows, x.step,
        y.address, DTYPES[y.dtype], y.step, COMPUTES[compute],
    )  # fmt: skip
    check(status)
