"""What a model folder holds, read from its JSON and the headers of its safetensors; neither torch nor numpy is needed.

    .safetensors = length of the header, u64 | header, JSON {name: {dtype, shape, data_offsets}} | the tensors' bytes
    index        = JSON {weight_map: {name: file}}, where there are several files

Every reader of folders stands on this file, so damage is found in one place and said in one sentence: a download that
was cut short, a header that contradicts itself, a shard that is not there, a config whose numbers are none. Nothing
behind it sees a header that is not whole.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError

CONFIG = "config.json"
OWN_CONFIG = "lowbit.json"
GENERATION_CONFIG = "generation_config.json"
REPORT = "lowbit_report.json"
ACTIVATIONS = "lowbit_activations.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
# Bits of an element by safetensors' name of its type. A type that is not here is not measured.
ITEM_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
# Fields of a config.json that count something wherever they stand; a list counts per layer.
_COUNTS = (
    "hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "n_embd", "n_layer", "n_head", "d_model", "n_layers", "n_heads",
)  # fmt: skip
# Fields of a generation_config.json that name tokens, one or a list, and fields that are numbers.
_TOKENS = ("eos_token_id", "bos_token_id", "pad_token_id")
_NUMBERS = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty", "diversity_penalty",
    "num_beams", "num_beam_groups", "num_return_sequences", "max_length", "max_new_tokens", "min_length", "min_new_tokens",
)  # fmt: skip
_LENGTH = struct.Struct("<Q")
# A header is JSON of names and offsets; one of more than this is a file of another kind (the safetensors library's limit).
_LONGEST_HEADER = 100_000_000
# A file of a split GGUF series that is not its first.
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", "pytorch_model.bin.index.json")
# `name` or `owner/name`, as the hub spells them.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# How much of a name must be the same, of 1, for it to be offered in the place of one that does not exist.
_SIMILAR = 0.7


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its name, type and shape as stored, and where its bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int = 0

    def read(self) -> bytes:
        """The bytes of a (small) tensor."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.nbytes)


def read_text(path: Path) -> str:
    """A text of a model folder."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is not a model folder: it has no {path.name}") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder, and a file is expected: get the model again") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path} is no text in UTF-8 ({error.reason}); the file is damaged, get it again"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); the file is damaged, get it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; the file is damaged, get it again")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model, of which at least the numbers are numbers."""
    config = read_json(folder / CONFIG)
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise CheckpointError(f"{folder / CONFIG} names no model_type, so it does not describe a model")
    _check_counts(folder / CONFIG, config)
    _check_tokens(folder / CONFIG, config)
    if isinstance(config.get("text_config"), dict):
        _check_counts(folder / CONFIG, config["text_config"])
    return config


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The generation_config.json of a model, of which numbers and tokens are what they should be; empty without one."""
    path = folder / GENERATION_CONFIG
    fields = read_json(path) if path.exists() else {}
    _check_tokens(path, fields)
    for name in _NUMBERS:
        if type(value := fields.get(name)) not in (int, float, type(None)):
            raise CheckpointError(f"{path} says {name} = {value!r}, which is no number; get the file again")
    words = fields.get("bad_words_ids") or []
    if not isinstance(words, list) or not all(isinstance(word, list) and word and _are_tokens(word) for word in words):
        raise CheckpointError(
            f"{path} says bad_words_ids = {words!r}, which are no lists of tokens; get the file again"
        )
    return fields


def _check_tokens(path: Path, fields: Mapping[str, Any]) -> None:
    for name in _TOKENS:
        value = fields.get(name)
        if value is not None and not _are_tokens(value if isinstance(value, list) else [value]):
            raise CheckpointError(f"{path} says {name} = {value!r}, which is no token; get the file again")


def _are_tokens(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


def _check_counts(path: Path, fields: Mapping[str, Any]) -> None:
    for name in _COUNTS:
        value = fields.get(name)
        counts = value if isinstance(value, list) and value else [value]
        if value is not None and not all(type(count) is int and 0 < count < 1 << 31 for count in counts):
            raise CheckpointError(f"{path} says {name} = {value!r}, which is no number from 1 up; get the file again")


def quantization_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a config.json says about how the weights are quantised, or None when they are not."""
    text = config.get("text_config")
    found = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if found is None or isinstance(found, dict):
        return found or None
    raise CheckpointError(f"{CONFIG} holds a quantization_config that is no JSON object; the file is damaged")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder; those that its index names are all there."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder" if folder.exists() else missing(folder))
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    names = sorted(set(_weight_map(folder).values())) or sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise CheckpointError(no_weights(folder, file_names(folder)))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{folder} lacks {len(absent)} of its {len(names)} files of weights ({absent[0]} ...): get them again"
        )
    return [folder / name for name in names]


def _weight_map(folder: Path) -> dict[str, str]:
    """Which file each tensor is in, by the index; empty for a folder without one, or whose one file is whole."""
    path = folder / INDEX
    if not path.exists() or (folder / WEIGHTS).exists():
        return {}
    found = read_json(path).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) and file for file in found.values()):
        raise CheckpointError(f"{path} is no index: its weight_map does not say which file each tensor is in")
    return found


def read_tensors(folder: Path) -> list[StoredTensor]:
    """Every tensor of a model folder, over all of its files."""
    tensors = [tensor for file in weight_files(folder) for tensor in read_header(file)]
    lost = set(_weight_map(folder)) - {tensor.name for tensor in tensors}
    if lost:
        raise CheckpointError(f"{folder}: its index names {len(lost)} tensors that no file holds, for one {min(lost)}")
    return tensors


def file_names(folder: Path) -> list[str]:
    """What lies in a folder."""
    return [entry.name for entry in folder.iterdir()]


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF's, by its name."""
    return path.suffix.lower() == ".gguf"


def gguf_in(folder: Path) -> Path | None:
    """The GGUF file that a folder without a config.json stands for, of a split series the first; None where it has none."""
    if (folder / CONFIG).is_file():
        return None
    names = sorted(name for name in file_names(folder) if is_gguf(Path(name)) and not _LATER_PART.search(name))
    if len(names) > 1:
        some = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        raise CheckpointError(f"the folder {folder} holds {len(names)} GGUF files: name one of them ({some})")
    return folder / names[0] if names else None


def pickles_alone(names: Iterable[str]) -> list[str]:
    """The pickles among a model's files, if there are no safetensors beside them."""
    names = sorted(names)
    if any(name.endswith((".safetensors", INDEX)) for name in names):
        return []
    graphs = {f"{name.removesuffix('.xml')}.bin" for name in names if name.endswith(".xml")}  # OpenVINO's weights
    return [name for name in names if name.endswith(_PICKLES) and name not in graphs]


def no_weights(model: str | Path, names: Iterable[str]) -> str:
    """The sentence for a model whose files hold no safetensors."""
    pickles = pickles_alone(names := list(names))
    if pickles:
        return (
            f"the weights in {model} are pickles ({pickles[0]}), which can run code when they are loaded; "
            "convert them to safetensors, or pass allow_pickle=True (--allow-pickle) if you trust their source"
        )
    if any(name.startswith("openvino_") for name in names):
        return (
            f"{model} holds a graph of OpenVINO's, which lowbit.openvino.OVModelForCausalLM and lowbit.openvino.native open: "
            "give the model that it was made of here"
        )
    return f"{model} holds no weights: there is neither {WEIGHTS} nor {INDEX}"


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, from its header, if the file is whole."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = _header_length(path, file.read(_LENGTH.size), size)
            entries = json.loads(file.read(length))
            start = _LENGTH.size + length
            tensors = [_tensor(path, start, name, entry) for name, entry in entries.items() if name != "__metadata__"]
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder, and a file of weights is expected: get the model again") from None
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} is damaged: its header cannot be read; get it again") from None
    end = max((tensor.offset + tensor.nbytes for tensor in tensors), default=start)
    if size != end:
        raise CheckpointError(
            f"{path} is {'truncated' if size < end else 'damaged'}: it has {size} bytes, and by its header {end}; "
            "get it again"
        )
    return tensors


def _header_length(path: Path, prefix: bytes, size: int) -> int:
    if len(prefix) < _LENGTH.size:
        raise CheckpointError(f"{path} is truncated or no safetensors file: it has {size} bytes; get it again")
    length: int = _LENGTH.unpack(prefix)[0]
    if not 0 < length <= _LONGEST_HEADER:
        raise CheckpointError(f"{path} is no safetensors file: its first 8 bytes are no length of a header")
    if length > size - _LENGTH.size:
        raise CheckpointError(f"{path} is truncated: it ends inside its header; get it again")
    return length


def _tensor(path: Path, start: int, name: str, entry: Any) -> StoredTensor:
    """One entry of a header. Whatever is odd about it, the file is not what its writer wrote."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, place = fields.get("dtype"), _counts(fields.get("shape")), _counts(fields.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or place is None or len(place) != 2:
        raise CheckpointError(f"{path} is damaged: its header does not say what {name} is and where; get it again")
    begin, end = place
    bits = ITEM_BITS.get(dtype)
    if begin > end or (bits is not None and (math.prod(shape) * bits + 7) // 8 != end - begin):
        raise CheckpointError(
            f"{path} is damaged: {name} has {end - begin} bytes, which is not {list(shape)} {dtype}; get it again"
        )
    return StoredTensor(name, dtype, shape, end - begin, path, start + begin)


def _counts(value: Any) -> tuple[int, ...] | None:
    whole = isinstance(value, list) and all(type(count) is int and count >= 0 for count in value)
    return tuple(value) if whole else None


def is_hub_name(text: str) -> bool:
    """Whether a word could be the name of a model on the hub."""
    return _HUB_NAME.fullmatch(text) is not None and not is_gguf(Path(text)) and Path(text).suffix != ".safetensors"


def missing(path: Path) -> str:
    """The sentence for a path that does not exist."""
    if path.is_symlink():
        return f"{path} is a link to {path.readlink()}, and nothing is there"
    first_absent = next((p for p in (*reversed(path.parents), path) if not p.exists()), path)
    close = _similar_neighbours(first_absent)
    if close:
        return f"there is no file or folder {path} (did you mean {' or '.join(map(str, close))}?)"
    parent = next((p for p in path.parents if p.exists()), Path())
    return f"there is no file or folder {path} (the path is right up to {parent.resolve()})"


def _similar_neighbours(path: Path) -> list[Path]:
    """What exists beside the path and is called nearly like it, the nearest first."""
    if not path.parent.is_dir():
        return []
    import difflib  # only who errs needs it

    names = {entry.name.lower(): entry for entry in path.parent.iterdir()}
    return [names[name] for name in difflib.get_close_matches(path.name.lower(), names, cutoff=_SIMILAR)]
