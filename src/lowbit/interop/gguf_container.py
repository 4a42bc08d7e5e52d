"""The GGUF container: metadata, the list of tensors, and their bytes, memory mapped.

    file  = magic "GGUF" | version u32 | tensor count u64 | pair count u64 | pairs | tensor infos | padding | data
    pair  = key string | type u32 | value;    string = length u64 | bytes
    info  = name string | rank u32 | sizes u64 x rank, innermost first | type u32 | offset u64 into data

A tensor is rows of whole blocks: `block_elements` numbers stored in `block_bytes` bytes, so a row of n numbers
takes n / block_elements * block_bytes bytes and rows can be reordered without unpacking them. Shapes are in numpy's
order.

The header is parsed by hand: the `gguf` package wraps every token of the vocabulary in several numpy arrays and
needs 2.5 s for the 49152 tokens of SmolLM2, this reader 0.1 s. The package is imported here alone, and only once
quantised blocks become numbers. Neither torch nor transformers is imported.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lowbit.core.maps import GuardedMap
from lowbit.errors import CheckpointError, MissingPackageError

Bytes = npt.NDArray[np.uint8]
DTypeName = Literal["float32", "float16", "bfloat16"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # version 1 (August 2023, ten weeks long) had 32-bit lengths
DEFAULT_ALIGNMENT = 32
STRING, ARRAY = 8, 9
SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}

# Numbers decoded at a time. The temporaries of a chunk stay in the second-level cache: SmolLM2 takes 0.4 s, where the
# package's own groups of 16 rows take 1.2 s.
CHUNK_ELEMENTS = 131072

# numpy's type of the numbers `read` returns; bfloat16 comes as its 16 bits, since numpy has no such type.
STORAGE: dict[str, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


@dataclass(frozen=True, slots=True)
class BlockType:
    """One storage type of GGML: its number in the file, its name, and the shape of a block."""

    code: int
    name: str
    block_elements: int
    block_bytes: int


BLOCK_TYPES = {
    code: BlockType(code, name, elements, size)
    for code, name, elements, size in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (9, "Q8_1", 32, 40),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (15, "Q8_K", 256, 292),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (24, "I8", 1, 1),
        (25, "I16", 1, 2),
        (26, "I32", 1, 4),
        (27, "I64", 1, 8),
        (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
        (40, "NVFP4", 64, 36),
        (41, "Q1_0", 128, 18),
    )
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored tensor: numpy-order shape, storage type, and its bytes as a view of the mapped file."""

    name: str
    shape: tuple[int, ...]
    type: BlockType
    data: Bytes

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.type.block_elements * self.type.block_bytes


@dataclass(frozen=True, slots=True)
class Container:
    """What a GGUF file, or a series of split files, holds: metadata by key and tensors by GGUF name."""

    path: Path
    metadata: dict[str, Any]
    entries: dict[str, Entry]
    maps: tuple[GuardedMap, ...]

    def check(self) -> None:
        """Raise if one of the files was cut off since it was opened."""
        for opened in self.maps:
            opened.check()

    def require(self, key: str) -> Any:
        """The metadata under `key`, or the sentence that says it is missing."""
        if key not in self.metadata:
            raise CheckpointError(f"{self.path} lacks the metadata '{key}', without which its model cannot be rebuilt")
        return self.metadata[key]


class _Cursor:
    """Reads the header front to back and says so when the file ends in the middle of it."""

    def __init__(self, path: Path, data: Bytes) -> None:
        self.path = path
        self.data = data.data  # a memoryview: its slices are far cheaper than numpy's
        self.position = 0

    def take(self, count: int) -> memoryview:
        end = self.position + count
        if end > len(self.data):
            raise CheckpointError(
                f"{self.path} is truncated: its header reaches to byte {end} of {len(self.data)}; fetch it again"
            )
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def integer(self, layout: Literal["<I", "<Q"]) -> int:
        return int(struct.unpack(layout, self.take(struct.calcsize(layout)))[0])

    def string(self) -> str:
        return bytes(self.take(self.integer("<Q"))).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            item, count = self.integer("<I"), self.integer("<Q")
            return [self.string() for _ in range(count)] if item == STRING else self.numbers(item, count)
        return self.numbers(kind, 1)[0]

    def numbers(self, kind: int, count: int) -> list[Any]:
        if kind not in SCALARS:
            raise CheckpointError(
                f"{self.path} has a damaged header: there is no metadata type {kind} (at byte {self.position})"
            )
        dtype = np.dtype(SCALARS[kind])
        values = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        # The shortest decimal of a single-precision number: 1e-05 as it was written, not 9.999999747378752e-06.
        return [float(str(v)) for v in values] if kind == 6 and count == 1 else values.tolist()


def read_container(path: str | Path) -> Container:
    """Map a GGUF file (or all files of a split series, given the first) and read its header."""
    path = Path(path)
    first = _read_file(path)
    count = int(first.metadata.get("split.count", 1))
    if count <= 1:
        return first
    entries, maps = dict(first.entries), first.maps
    for number in range(2, count + 1):
        part = _read_file(_split_path(path, number, count))
        entries.update(part.entries)
        maps += part.maps
    expected = first.metadata.get("split.tensors.count", len(entries))
    if len(entries) != expected:
        raise CheckpointError(
            f"{path} and its other parts hold {len(entries)} tensors instead of {expected}; fetch them again"
        )
    return Container(path, first.metadata, entries, maps)


def _split_path(path: Path, number: int, count: int) -> Path:
    ending = f"-00001-of-{count:05d}.gguf"
    if not path.name.endswith(ending):
        raise CheckpointError(f"{path} is one of {count} parts: open the first, whose name ends in '{ending}'")
    return path.with_name(f"{path.name.removesuffix(ending)}-{number:05d}-of-{count:05d}.gguf")


def _read_file(path: Path) -> Container:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist or is no file")
    if path.stat().st_size < len(MAGIC):
        raise CheckpointError(f"{path} is no GGUF file: it has {path.stat().st_size} bytes")
    opened = GuardedMap.open(path)
    data: Bytes = np.frombuffer(opened, np.uint8)
    cursor = _Cursor(path, data)
    magic = bytes(cursor.take(len(MAGIC)))
    if magic != MAGIC:
        raise CheckpointError(f"{path} is no GGUF file: it begins with {magic!r} instead of {MAGIC!r}")
    version = cursor.integer("<I")
    if version not in VERSIONS:
        raise CheckpointError(
            f"{path} is GGUF of version {version}, or big-endian; little-endian files of versions 2 and 3 can be read"
        )
    tensor_count, pair_count = cursor.integer("<Q"), cursor.integer("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.integer("<I"))
    infos = [_read_info(cursor) for _ in range(tensor_count)]
    alignment = int(metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    start = -(-cursor.position // alignment) * alignment
    entries = {
        name: _map_tensor(path, data, start + offset, (name, shape, code)) for name, shape, code, offset in infos
    }
    return Container(path, metadata, entries, (opened,))


def _read_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    sizes = [cursor.integer("<Q") for _ in range(cursor.integer("<I"))]
    return name, tuple(reversed(sizes)), cursor.integer("<I"), cursor.integer("<Q")


def _map_tensor(path: Path, data: Bytes, start: int, info: tuple[str, tuple[int, ...], int]) -> Entry:
    name, shape, code = info
    if code not in BLOCK_TYPES:
        raise CheckpointError(
            f"{path}: the tensor '{name}' has the storage type {code}, which this version of lowbit does not know"
        )
    kind = BLOCK_TYPES[code]
    if not shape or shape[-1] % kind.block_elements:
        raise CheckpointError(
            f"{path}: the rows of '{name}' {list(shape)} are not whole blocks of {kind.block_elements} ({kind.name})"
        )
    size = math.prod(shape) // kind.block_elements * kind.block_bytes
    if start + size > data.size:
        raise CheckpointError(
            f"{path} is truncated: '{name}' reaches to byte {start + size} but the file has {data.size}; fetch it again"
        )
    return Entry(name, shape, kind, data[start : start + size])


def decode_blocks(packed: Bytes, kind: BlockType, dtype: str) -> npt.NDArray[Any]:
    """The numbers of a run of blocks, flat, in `dtype` (bfloat16 as its bits), a chunk at a time."""
    packed = packed.reshape(-1)
    blocks = packed.size // kind.block_bytes
    step = max(1, CHUNK_ELEMENTS // kind.block_elements)
    numbers = np.empty(blocks * kind.block_elements, STORAGE[dtype])
    for begin in range(0, blocks, step):
        end = min(blocks, begin + step)
        chunk = _decode_chunk(packed[begin * kind.block_bytes : end * kind.block_bytes], kind)
        numbers[begin * kind.block_elements : end * kind.block_elements] = round_to(chunk, dtype)
    return numbers


def _decode_chunk(packed: Bytes, kind: BlockType) -> npt.NDArray[np.float32]:
    match kind.name:
        case "F32":
            return packed.view(np.float32)
        case "F16":
            return packed.view(np.float16).astype(np.float32)
        case "BF16":
            return (packed.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        case "F64":
            return packed.view(np.float64).astype(np.float32)
    try:
        import gguf
    except ModuleNotFoundError as missing:
        raise MissingPackageError("gguf", f"reading GGUF weights of type {kind.name}", "gguf") from missing
    try:
        # One wide row: the package walks rows in groups of 16, and the chunk is the better group.
        decoded = gguf.quants.dequantize(packed.reshape(1, -1), gguf.GGMLQuantizationType(kind.code))
    except NotImplementedError as unknown:
        raise CheckpointError(
            f"GGUF weights of type {kind.name} cannot be read: the gguf package does not de-quantise them"
        ) from unknown
    values: npt.NDArray[np.float32] = decoded.reshape(-1)
    return values


def round_to(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """fp32 numbers in `dtype`, rounded to nearest, ties to even; bfloat16 as its bits in uint16."""
    if dtype == "float32":
        return values
    if dtype == "float16":
        with np.errstate(over="ignore"):  # the caller sees the infinity, as with any cast to fp16
            return values.astype(np.float16)
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    # Rounding up could turn a NaN into infinity or zero; NaN keeps its upper bits and becomes a quiet one.
    not_numbers = np.isnan(values)
    if not_numbers.any():
        rounded[not_numbers] = (bits[not_numbers] >> 16) | 0x40
    return rounded.astype(np.uint16)


def normalise_dtype(dtype: object) -> str:
    """`float32`, "torch.bfloat16", np.float16 and the like as one of the three names, or a refusal."""
    name = dtype.__name__ if isinstance(dtype, type) else str(dtype)
    name = re.sub(r"^(torch|numpy)\.", "", name)
    if name not in STORAGE:
        raise CheckpointError(f"GGUF weights can be read as {', '.join(STORAGE)}, not as '{name}'")
    return name
