"""The C face of the engine: the structs of engine_api.h and its functions, declared once for ctypes.

The numbers of every enumeration follow from the order of these tuples, which is the order in the header.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

from lowbit.core.library import declare, library

LAYER_MATRICES = [
    "q",
    "k",
    "v",
    "qkv",
    "o",
    "gate",
    "up",
    "gate_up",
    "down",
    "router",
    "experts_gate_up",
    "experts_down",
    "shared_gate",
    "shared_up",
    "shared_down",
    "shared_router",
]
LAYER_VECTORS = ["attention_norm", "q_norm", "k_norm", "sinks", "attention_post_norm", "mlp_norm", "mlp_post_norm"]
OUTER_MATRICES = ["embedding", "positions", "embedding_in", "head_in", "head"]
OUTER_VECTORS = ["embedding_norm", "final_norm"]
NORM_KINDS = ("rms", "layer")
PLACEMENTS = ("pre", "post", "sandwich", "after_sum")
RESIDUALS = ("sequential", "parallel", "parallel_shared")
QK_NORMS = ("none", "head", "heads", "width")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
GATES = ("none", "separate", "concatenated", "interleaved")
PAIRINGS = ("halves", "neighbours")
CACHE_TYPES = ("fp32", "fp16", "int8", "auto")
PROFILE_PARTS = [
    "embed",
    "norm",
    "qkv",
    "rope",
    "attention",
    "output",
    "mlp",
    "head",
    "barriers",
    "steps",
    "barrier_count",
]
ABSENT, PREPARED, PLAIN, TIGHT = 0, 1, 2, 3
ROPE_FIXED, ROPE_LONG, ROPE_DYNAMIC = 0, 1, 2
UNSUPPORTED, CANCELLED, NOT_FINITE = 3, 5, 6

_I, _L, _F, _P = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class CMatrix(ctypes.Structure):
    """`lowbit_matrix`."""

    _fields_ = [
        ("data", _P), ("bytes", _L), ("rows", _L), ("cols", _L), ("count", _L), ("bias", _P), ("kind", _I), ("dtype", _I),
    ]  # fmt: skip


class CVector(ctypes.Structure):
    """`lowbit_vector`."""

    _fields_ = [("weight", _P), ("bias", _P)]


class CRope(ctypes.Structure):
    """`lowbit_rope`."""

    _fields_ = [
        ("frequencies", _P), ("long_frequencies", _P), ("rotary_dim", _I), ("pairing", _I), ("change", _I),
        ("trained_positions", _I), ("attention_factor", _F), ("factor", _F), ("theta", ctypes.c_double),
    ]  # fmt: skip


class CLayer(ctypes.Structure):
    """`lowbit_layer`."""

    _fields_ = [
        ("matrices", CMatrix * len(LAYER_MATRICES)), ("vectors", CVector * len(LAYER_VECTORS)),
        ("rope", _I), ("window", _I), ("sparse", _I), ("reserved", _I),
    ]  # fmt: skip


class CMlp(ctypes.Structure):
    """`lowbit_mlp`."""

    _fields_ = [("size", _I), ("activation", _I), ("gate", _I), ("limit", _F), ("sigmoid_scale", _F)]


_INTEGERS = [
    "struct_bytes",
    "hidden_size",
    "vocab_size",
    "layer_count",
    "rope_count",
    "embedding_width",
    "position_offset",
    "position_rows",
    "embedding_norm",
    "final_norm",
    "norm_kind",
    "placement",
    "residual",
    "heads",
    "kv_heads",
    "head_dim",
    "qk_norm",
    "qkv_grouped",
    "expert_count",
    "top_k",
    "normalize_experts",
]
_NUMBERS = [
    "norm_eps",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_scale",
    "attention_soft_cap",
    "clip",
    "head_multiplier",
    "head_soft_cap",
]


class CModel(ctypes.Structure):
    """`lowbit_model`."""

    _fields_ = [
        *((name, _I) for name in _INTEGERS), *((name, _F) for name in _NUMBERS),
        ("mlp", CMlp), ("expert", CMlp), ("shared", CMlp), ("alibi", _P),
        ("ropes", ctypes.POINTER(CRope)), ("layers", ctypes.POINTER(CLayer)),
        ("matrices", CMatrix * len(OUTER_MATRICES)), ("vectors", CVector * len(OUTER_VECTORS)),
    ]  # fmt: skip


class COptions(ctypes.Structure):
    """`lowbit_engine_options`."""

    _fields_ = [("context", _L), ("slots", _I), ("cache_type", _I), ("compute", _I), ("chunk", _I)]


_FUNCTIONS: dict[str, tuple[type | None, list[type]]] = {
    "lowbit_tight_pays": (ctypes.c_int, []),
    "lowbit_tight_bytes": (_L, [_L, _L]),
    "lowbit_tighten": (ctypes.c_int, [_P, _L, _L, _P, _L, ctypes.POINTER(_L)]),
    "lowbit_loosen": (ctypes.c_int, [_P, _L, _P]),
    "lowbit_engine_create": (_P, [ctypes.POINTER(CModel), ctypes.POINTER(COptions)]),
    "lowbit_engine_destroy": (None, [_P]),
    "lowbit_engine_bytes": (_L, [ctypes.POINTER(CModel), ctypes.POINTER(COptions)]),
    "lowbit_engine_cache_type": (ctypes.c_int, [_P]),
    "lowbit_engine_step": (ctypes.c_int, [_P, _P, _P, _P, _L, _P]),
    "lowbit_engine_greedy": (ctypes.c_int, [_P, _I, _I, _L, _P, _L, _P, ctypes.POINTER(_L)]),
    "lowbit_engine_choose": (ctypes.c_int, [_P, _I, _P, _L, _L, _P, _L, _P, _L, _P, ctypes.POINTER(_L)]),
    "lowbit_engine_length": (_L, [_P, _I]),
    "lowbit_engine_truncate": (ctypes.c_int, [_P, _I, _L]),
    "lowbit_engine_shortest": (_L, [_P, _I]),
    "lowbit_engine_copy": (ctypes.c_int, [_P, _I, _I, _L, _L]),
    "lowbit_engine_save": (ctypes.c_int, [_P, _I, _L, _P, ctypes.POINTER(_L)]),
    "lowbit_engine_restore": (ctypes.c_int, [_P, _I, _L, _P, _L]),
    "lowbit_engine_set_check": (None, [_P, ctypes.c_int]),
    "lowbit_engine_expect": (ctypes.c_int, [_P, _I, _L]),
    "lowbit_engine_cancel": (None, [_P]),
    "lowbit_engine_resume": (None, [_P]),
    "lowbit_engine_set_profile": (None, [_P, ctypes.c_int]),
    "lowbit_engine_profile": (None, [_P, _P]),
}


@lru_cache(maxsize=1)
def engine_library() -> ctypes.CDLL:
    """The loaded core with the engine's functions declared."""
    core = library()
    declare(core, _FUNCTIONS)
    return core
