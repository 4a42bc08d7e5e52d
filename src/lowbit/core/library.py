"""The compiled core behind ctypes: where the library lies, the C face of a `Format`, and errors as exceptions.

The library is one file, `liblowbit.so`, beside the package (or, in an editable install, on another entry of its path).
It is loaded at the first call and not at import, so that `import lowbit` costs nothing. ctypes releases the GIL during
each call. Arguments are plain addresses and sizes: numpy arrays and torch tensors are served alike, and neither is
imported here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import lowbit
from lowbit.errors import KernelError, WeightError, one_line
from lowbit.formats import Format

LIBRARY = "liblowbit.so"
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
SCALE_TYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "e8m0": 3, "e4m3": 4}
_KINDS = {"int": 0, "codebook": 1, "float": 1, "kquant": 3}
_DENSE = 2
# GGUF's blocks with scales inside, numbered as in lowbit.h.
BLOCK_TYPES = {"q2_k": 1, "q3_k": 2, "q4_k": 3, "q5_k": 4, "q6_k": 5, "q4_1": 6, "q5_1": 7}
# The third kind of zero points beside those of asymmetric (0) and symmetric integers (1).
FINE_ZEROS = 2
_OK, _BAD_WEIGHT = 0, 2


class CFormat(ctypes.Structure):
    """`lowbit_format` of lowbit.h."""

    _fields_ = [
        ("bits", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("symmetric", ctypes.c_int32),
        ("group_size", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
        ("level_count", ctypes.c_int32),
        ("levels", ctypes.POINTER(ctypes.c_float)),
        ("scale_block", ctypes.c_int32),
        ("block_type", ctypes.c_int32),
    ]


class CSearch(ctypes.Structure):
    """`lowbit_search` of lowbit.h."""

    _fields_ = [
        ("ratios", ctypes.POINTER(ctypes.c_double)),
        ("ratio_count", ctypes.c_int32),
        ("zero_steps", ctypes.c_int32),
        ("importance", ctypes.c_void_p),
    ]


class CPrepareJob(ctypes.Structure):
    """`lowbit_prepare_job` of lowbit.h."""

    _fields_ = [
        ("format", ctypes.POINTER(CFormat)),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("scale_scales", ctypes.c_void_p),
        ("scale_offset", ctypes.c_void_p),
        ("prepared", ctypes.c_void_p),
        ("prepared_bytes", ctypes.c_int64),
        ("mapped_codes", ctypes.c_int64),
        ("mapped_scales", ctypes.c_int64),
    ]


_I, _L, _P = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_F, _S = ctypes.POINTER(CFormat), ctypes.POINTER(CSearch)
# name -> (result, arguments), as declared in lowbit.h.
_FUNCTIONS: dict[str, tuple[type, list[type]]] = {
    "lowbit_version": (ctypes.c_char_p, []),
    "lowbit_last_error": (ctypes.c_char_p, []),
    "lowbit_isa": (ctypes.c_char_p, []),
    "lowbit_fold_length": (_I, []),
    "lowbit_bf16_tokens": (_I, []),
    "lowbit_set_isa": (_I, [ctypes.c_char_p]),
    "lowbit_quota": (_I, [ctypes.c_char_p]),
    "lowbit_set_threads": (_I, [_I]),
    "lowbit_threads": (_I, []),
    "lowbit_quantize": (_I, [_F, _P, _I, _L, _L, _L, _S, _P, _P, _P, _P]),
    "lowbit_select": (_I, [_P, _L, _P, _P, _L, _P, _P, _P]),
    "lowbit_probabilities": (_I, [_P, _L, _P, _P, _L, _P]),
    "lowbit_adjust": (_I, [_P, _L, _P, _P, _L]),
    "lowbit_pack": (_I, [_I, _L, _L, _P, _P]),
    "lowbit_unpack": (_I, [_I, _L, _L, _P, _P]),
    "lowbit_dequantize": (_I, [_F, _L, _L, _P, _P, _P, _P, _P, _I, _L, _P]),
    "lowbit_distance": (_I, [_F, _L, _L, _P, _P, _P, _P, _P, _I, _L, _P, _P]),
    "lowbit_prepared_bytes": (_L, [_F, _L, _L]),
    "lowbit_prepare": (_I, [_F, _L, _L, _P, _P, _P, _P, _P, _L, _P]),
    "lowbit_prepare_all": (_I, [ctypes.POINTER(CPrepareJob), _L]),
    "lowbit_restore": (_I, [_P, _L, _P, _P, _P, _P, _P]),
    "lowbit_read_rows": (_I, [_P, _L, _P, _L, _P]),
    "lowbit_run": (_I, [_P, _L, _P, _I, _L, _L, _P, _P, _I, _L, _I]),
    "lowbit_run_experts": (_I, [_P, _L, _L, _P, _P, _I, _L, _L, _P, _I, _L, _I]),
    "lowbit_guard_map": (_I, [_P, _L, ctypes.c_char_p]),
    "lowbit_check_map": (_I, [_P]),
    "lowbit_release_map": (_I, [_P]),
}


_REINSTALL = "reinstall lowbit with a C++17 compiler at hand"


def library_path() -> Path | None:
    """Where the compiled core lies, or None when the package was installed without it."""
    return next((Path(entry) / LIBRARY for entry in lowbit.__path__ if (Path(entry) / LIBRARY).is_file()), None)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The loaded core with its functions declared."""
    path = library_path()
    if path is None:
        raise KernelError(
            f"the compiled core {LIBRARY} is not beside the package (looked in {', '.join(map(str, lowbit.__path__))}); "
            f"{_REINSTALL}"
        )
    try:
        core = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(f"the compiled core does not load ({one_line(str(error))}); {_REINSTALL}") from None
    declare(core, _FUNCTIONS)
    return core


def declare(core: ctypes.CDLL, functions: Mapping[str, tuple[type | None, list[type]]]) -> None:
    """Say what functions of the core take and give."""
    for name, (result, arguments) in functions.items():
        try:
            function = getattr(core, name)
        except AttributeError:
            raise KernelError(
                f"the compiled core is of another version of lowbit: it has no {name}; {_REINSTALL}"
            ) from None
        function.restype, function.argtypes = result, arguments


def last_error() -> str:
    """The sentence of this thread's last failure."""
    return bytes(library().lowbit_last_error()).decode()


def check(status: int) -> None:
    """Raise what a status code stands for."""
    if status == _OK:
        return
    raise (WeightError if status == _BAD_WEIGHT else KernelError)(last_error())


@lru_cache(maxsize=256)
def c_format(format: Format) -> CFormat:
    """The C face of a format. The result holds its table of levels alive."""
    levels = (ctypes.c_float * len(format.levels))(*format.levels) if format.levels else None
    pointer = ctypes.cast(levels, ctypes.POINTER(ctypes.c_float)) if levels is not None else None
    return CFormat(
        format.bits,
        _KINDS[format.kind],
        FINE_ZEROS if format.fine_zeros else int(format.symmetric),
        format.group_size,
        SCALE_TYPES[format.scale_dtype],
        len(format.levels),
        pointer,
        format.scale_block,
        BLOCK_TYPES[format.name] if format.kind == "kquant" else 0,
    )


def c_dense(dtype: str) -> CFormat:
    """The C face of a plain weight of an element type."""
    return CFormat(0, _DENSE, 1, -1, DTYPES[dtype], 0, None, 0, 0)


def c_search(ratios: Sequence[float], zero_steps: int, importance: int) -> CSearch:
    """The C face of a search; `importance` is the address of fp32 [in], or 0."""
    values = (ctypes.c_double * max(len(ratios), 1))(*ratios)
    return CSearch(ctypes.cast(values, ctypes.POINTER(ctypes.c_double)), len(ratios), zero_steps, importance or None)
