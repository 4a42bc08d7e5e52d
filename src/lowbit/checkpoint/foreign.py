"""A transformers model from a folder in another system's form: its tensors are read into the form of lowbit's own folders.

A reader is told the folder and the model without numbers, which has the shapes, and gives tensors by the names that they have in a
folder of lowbit's, with what such a folder's configuration would say. Everything after that is the ordinary way.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lowbit.checkpoint.verdict import check_account, one_sentence
from lowbit.methods import OWN_METHOD
from lowbit.packing import PackedTensor

Tensors = dict[str, torch.Tensor]
# Keywords of transformers that are heard here too: whose code may run, what the configuration says, how the model attends.
MODEL_WORDS = ("trust_remote_code", "use_cache", "attn_implementation")
Reader = Callable[[Path, nn.Module], tuple[Tensors, dict[str, Any]]]


def load_foreign(auto_class: Any, folder: Path, read: Reader, dtype: Any = None, **keywords: Any) -> Any:
    """`auto_class` is a class of transformers with `from_config`, or the model's own."""
    code, told, ways = ({name: keywords[name]} if name in keywords else {} for name in MODEL_WORDS)
    with one_sentence(str(folder)):
        config = transformers.AutoConfig.from_pretrained(folder, **code, **told)
        with torch.device("meta"):
            make = getattr(auto_class, "from_config", None)
            skeleton = auto_class(config) if make is None else make(config, **code)
    tensors, fields = read(folder, skeleton)
    config.quantization_config = fields
    if dtype in (None, "auto"):
        dtype = getattr(config, "dtype", None) or torch.float32
    with one_sentence(str(folder)):
        model, account = type(skeleton).from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True, **ways
        )
    check_account(str(folder), model, account, ())
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    model.config._name_or_path = str(folder)
    return model


def as_own(packed: dict[str, PackedTensor]) -> tuple[Tensors, dict[str, Any]]:
    """Packed weights by path as a folder of lowbit's holds them: tensors by name, and what its configuration says."""
    layers: dict[str, list[str]] = {}
    found: Tensors = {}
    for path, weight in packed.items():
        layers.setdefault(weight.format.name, []).append(path)
        found |= {f"{path}.packed_weight.{name}": tensor for name, tensor in weight.tensors().items()}
    return found, {"quant_method": OWN_METHOD, "layers": layers, "recipe": {}}
