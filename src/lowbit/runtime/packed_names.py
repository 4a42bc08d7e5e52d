"""The saved forms of packed weights, read with numpy: compressed-tensors' two, and lowbit's own.

    pack-quantized       x.weight_packed  x.weight_scale  x.weight_zero_point  x.weight_shape
    int-quantized        x.weight (int8)  x.weight_scale
    lowbit               x.packed_weight.codes  .scales  .zeros  ...      (experts: x.codes  .scales  ...)

All hold the same bits (`checkpoint.compressed` has the differences). What a weight is called when it is dense,
`x.weight`, is how the spec looks for it, so a `PackedIndex` lists those names and gives the packed weight behind one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit.core import calls
from lowbit.errors import CheckpointError
from lowbit.formats import Format, format_from_name
from lowbit.methods import COMPRESSED_METHOD, OWN_METHOD
from lowbit.packing import BUFFERS, PackedTensor, code_shape, scale_shape
from lowbit.runtime.mapped import Tensor
from lowbit.schemes import ACTIVATIONS, format_of, rounded_format, scheme_of

_COMPRESSED_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_INTEGER_PARTS = ("weight", "weight_scale", "input_scale", "input_zero_point")
# int8 is what is above the middle of codes of 8 bits.
_SIGN = np.uint8(128)
_OWN_CODES, _CODES, _PACKED = ".packed_weight.codes", ".codes", ".weight_packed"
_SCALE = ".weight_scale"
_NO_FORMAT = "config.json says no format for {path}, whose weight is packed: the two do not belong together"
_SCALE_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


class PackedIndex:
    """The packed weights among the tensors of a folder, by the name of the dense weight."""

    def __init__(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None, spellings: Callable[[str], Iterable[str]]
    ) -> None:
        self.tensors, self.config = tensors, dict(config or {})
        self.method = self.config.get("quant_method")
        if config and self.method not in (OWN_METHOD, COMPRESSED_METHOD):
            raise CheckpointError(
                f"the folder is quantised with {self.method}, which the engine does not read "
                f"(it reads {OWN_METHOD} and {COMPRESSED_METHOD}): load it through "
                "lowbit.AutoModelForCausalLM and save it with save_low_bit first"
            )
        layers = self.config.get("layers") or {}
        # The configuration has the model's names, the files may have older ones.
        self.format_of = {
            spelling.removesuffix(".weight"): name
            for name, paths in layers.items()
            for path in paths
            for spelling in spellings(f"{path}.weight")
        }
        self.paths = dict(filter(None, map(self._dense_name, tensors)))
        own = self.config if self.method == OWN_METHOD else self.config.get(OWN_METHOD) or {}
        # Places whose weight is another's, by the names of the dense weights.
        self.tied = {f"{place}.weight": f"{owner}.weight" for place, owner in (own.get("tied") or {}).items()}
        # compressed-tensors stores a tied embedding in full beside the packed head; the packed one stands for both.
        self.paths |= {owner: self.paths[place] for place, owner in self.tied.items() if place in self.paths}

    def _dense_name(self, name: str) -> tuple[str, str] | None:
        """(dense name, path) of a tensor that is a packed weight's codes."""
        if name.endswith(_OWN_CODES):
            path = name.removesuffix(_OWN_CODES)
            return f"{path}.weight", path
        if name.endswith(_PACKED):
            path = name.removesuffix(_PACKED)
            return f"{path}.weight", path
        if self.method == COMPRESSED_METHOD and name.endswith(_SCALE):
            path = name.removesuffix(_SCALE)
            whole = self.tensors.get(f"{path}.weight")
            return (f"{path}.weight", path) if whole is not None and whole.dtype == "I8" else None
        if name.endswith(_CODES):
            path = name.removesuffix(_CODES)
            return path, path
        return None

    @property
    def names(self) -> set[str]:
        """Every weight of the folder by its dense name: what packed ones are stored as is left out."""
        words = (*_COMPRESSED_PARTS, *_INTEGER_PARTS[1:]) if self.method == COMPRESSED_METHOD else BUFFERS
        stems = {stem for path in self.paths.values() for stem in (path, f"{path}.packed_weight")}
        return {*self.tensors, *self.paths} - {f"{stem}.{word}" for stem in stems for word in words}

    def parts(self, name: str) -> dict[str, Tensor]:
        """The tensors of one packed weight, under the last word of their names."""
        path = self.paths[name]
        if self.method == COMPRESSED_METHOD:
            words = _COMPRESSED_PARTS if path + _PACKED in self.tensors else _INTEGER_PARTS
            return {word: self.tensors[f"{path}.{word}"] for word in words if f"{path}.{word}" in self.tensors}
        prefix = path if path + _CODES in self.tensors else f"{path}.packed_weight"
        return {word: self.tensors[f"{prefix}.{word}"] for word in BUFFERS if f"{prefix}.{word}" in self.tensors}

    def read(self, name: str, columns: int, is_embedding: bool = False) -> PackedTensor:
        """A packed weight with `columns` inputs, as views of the file."""
        parts, path = self.parts(name), self.paths[name]
        if self.method == COMPRESSED_METHOD:
            return self._read_compressed(path, parts, is_embedding and name == f"{path}.weight")
        if path not in self.format_of:
            raise CheckpointError(_NO_FORMAT.format(path=path))
        format = format_from_name(self.format_of[path])
        codes = parts["codes"].view()
        shape = (*codes.shape[:-1], columns)
        return PackedTensor(format, shape, **{word: tensor.view() for word, tensor in parts.items()})

    @property
    def formats(self) -> set[Format]:
        """The formats that the configuration names, and those of groups that round activations."""
        groups = [group for group in (self.config.get("config_groups") or {}).values() if isinstance(group, Mapping)]
        rounded = {rounded_format(group[ACTIVATIONS]) for group in groups if group.get(ACTIVATIONS)}
        return rounded | {format_from_name(name) for name in self.format_of.values()}

    def _read_integers(self, path: str, parts: dict[str, Tensor]) -> PackedTensor:
        """Weights of 8 bits that lie there as int8. Ranges of activations are left: the engine refuses their format."""
        scheme = scheme_of(path, ("Linear",), self.config)
        if scheme is None or "weight_scale" not in parts:
            raise CheckpointError(_NO_FORMAT.format(path=path))
        whole, scales = parts["weight"].view(), parts["weight_scale"]
        format = format_of(path, scheme, _SCALE_NAMES[scales.dtype])
        codes = np.ascontiguousarray(whole.view(np.uint8) ^ _SIGN)
        dense = np.empty(code_shape(format, whole.shape), np.int32)
        calls.pack(format.bits, len(whole), whole.shape[1], codes.ctypes.data, dense.ctypes.data)
        return PackedTensor(format, whole.shape, dense, scales.view())

    def _read_compressed(self, path: str, parts: dict[str, Tensor], is_embedding: bool) -> PackedTensor:
        if "weight" in parts:
            return self._read_integers(path, parts)
        for word in ("weight_packed", "weight_scale", "weight_shape"):
            if word not in parts:
                raise CheckpointError(f"{path}: the checkpoint lacks its {word}; is a shard of it missing?")
        if "weight_g_idx" in parts:
            raise CheckpointError(f"{path}: its inputs are reordered (actorder), which the engine does not read")
        scales = parts["weight_scale"]
        shape = tuple(int(n) for n in parts["weight_shape"].view())
        scheme = scheme_of(path, ("Embedding" if is_embedding else "Linear",), self.config)
        if scheme is None:
            raise CheckpointError(_NO_FORMAT.format(path=path))
        format = format_of(path, scheme, _SCALE_NAMES[scales.dtype])
        if scales.shape != scale_shape(format, shape):
            raise CheckpointError(
                f"{path}: scales of shape {list(scales.shape)} do not fit a {format} weight {list(shape)}; config.json disagrees"
            )
        zeros = None
        if not format.symmetric:
            if "weight_zero_point" not in parts:
                raise CheckpointError(f"{path}: the checkpoint lacks its weight_zero_point")
            zeros = _unpack_rows(parts["weight_zero_point"].view().T, format.bits, shape[0]).T.copy()
        codes = _dense_codes(path, parts["weight_packed"].view(), format, shape)
        return PackedTensor(format, shape, codes, scales.view(), zeros)


def _unpack_rows(words: NDArray[np.int32], bits: int, count: int) -> NDArray[np.uint8]:
    """uint8 [rows, count] from dense streams [rows, words]."""
    words = np.ascontiguousarray(words)
    values = np.empty((len(words), count), np.uint8)
    calls.unpack(bits, len(words), count, words.ctypes.data, values.ctypes.data)
    return values


def _dense_codes(path: str, codes: NDArray[np.int32], format: Format, shape: tuple[int, ...]) -> NDArray[np.int32]:
    """Codes as one dense stream: before mid 2026 compressed-tensors left the bits over at the end of each word unused."""
    expected = code_shape(format, shape)
    if codes.shape == expected:
        return codes
    per_word = 32 // format.bits
    if codes.shape != (expected[0], -(-shape[-1] // per_word)):
        raise CheckpointError(
            f"{path}: codes of shape {list(codes.shape)} do not fit a {format} weight {list(shape)}; config.json disagrees"
        )
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(format.bits)
    loose = (codes.view(np.uint32)[..., None] >> shifts) & np.uint32(format.max_code)
    values = np.ascontiguousarray(loose.reshape(len(codes), -1)[:, : shape[-1]].astype(np.uint8))
    dense = np.empty(expected, np.int32)
    calls.pack(format.bits, len(values), shape[-1], values.ctypes.data, dense.ctypes.data)
    return dense
