"""Names and modules that scripts import and that are elsewhere today, or nowhere."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lowbit.compat.aliases import AliasLoader
from lowbit.compat.missing import UnknownModuleError
from lowbit.compat.replacing import Replacement
from lowbit.compat.shims.answers import REASONS
from lowbit.compat.shims.shim import say

if TYPE_CHECKING:
    from importlib.abc import MetaPathFinder
else:  # a name alone: importing its home takes 8 ms
    MetaPathFinder = object

_ANSWERS, _UTILS, _GENERATION = "lowbit.compat.shims.answers", "transformers.utils", "transformers.generation"
_ADAMW = ("lowbit.compat.shims.adamw", "AdamW")
_LLAMA = "transformers.models.llama.modeling_llama"
# What `generate` returns had a name for each way of searching.
_OUTPUTS = {
    **dict.fromkeys(("GreedySearch", "Sample", "ContrastiveSearch"), "Generate"),
    **dict.fromkeys(("BeamSearch", "BeamSample"), "GenerateBeam"),
}
_ENDS = ("DecoderOnlyOutput", "EncoderDecoderOutput")
# Where names are now, by the module and name that a script asks for.
MOVED_NAMES = {
    ("transformers", "AutoModelForVision2Seq"): ("transformers", "AutoModelForImageTextToText"),
    ("transformers", "AutoModelWithLMHead"): ("transformers", "AutoModelForCausalLM"),
    ("transformers", "is_torch_tpu_available"): (_UTILS, "is_torch_xla_available"),
    ("transformers", "AdamW"): _ADAMW,
    ("transformers.optimization", "AdamW"): _ADAMW,
    (_LLAMA, "LlamaSdpaAttention"): (_LLAMA, "LlamaAttention"),
    (_LLAMA, "LlamaFlashAttention2"): (_LLAMA, "LlamaAttention"),
    ("transformers.modeling_utils", "no_init_weights"): (_ANSWERS, "no_init_weights"),
    **{
        (place, f"{old}{end}"): (place, f"{now}{end}")
        for place in (_GENERATION, f"{_GENERATION}.utils")
        for old, now in _OUTPUTS.items()
        for end in _ENDS
    },
    **{
        (place, "LogitsWarper"): (place, "LogitsProcessor")
        for place in ("transformers", _GENERATION, f"{_GENERATION}.logits_process")
    },
    **{
        (place, name): (_ANSWERS, name)
        for place in ("transformers", _UTILS)
        for name in REASONS
        if name not in ("AdamW", "no_init_weights")
    },
}
# Those that made pictures into tensors are called otherwise.
_EXTRACTOR, _PROCESSOR = "FeatureExtractor", "ImageProcessor"
# The tokenizers in Rust had a file of their own.
FAST_MODULES = ("transformers.models.NAME.tokenization_NAME_fast", "transformers.models.NAME.tokenization_NAME")
_FAST = re.compile(r"(transformers\.models\.\w+\.tokenization_\w+)_fast")
# What takes the place of a module that is nowhere.
GONE_MODULES = {
    "transformers.onnx": "torch.onnx.export, or the package optimum-onnx",
    "transformers.utils.fx": "torch.export.export(model, arguments), or torch.compile(model)",
}
MOVED_MODULES = {
    "transformers.deepspeed": "transformers.integrations.deepspeed",
    "transformers.generation_utils": "transformers.generation.utils",
    "transformers.tokenization_utils": "transformers.tokenization_utils_sentencepiece",
    "transformers.tokenization_utils_fast": "transformers.tokenization_utils_tokenizers",
}


class MovedLoader(AliasLoader):
    """Enters a module of today under its old name, and says so."""

    def exec_module(self, module: ModuleType) -> None:
        say(f"import {module.__name__}", f"is {self.home} today")
        super().exec_module(module)


class MovedFinder(MetaPathFinder):
    """Finds the modules of transformers that are elsewhere today, and refuses those that are nowhere.

    Python asks it last: a transformers that still has the module answers before it.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in GONE_MODULES:
            raise UnknownModuleError(f"transformers has no {fullname} today: use {GONE_MODULES[fullname]}")
        now = moved_module(fullname)
        return None if now is None else ModuleSpec(fullname, MovedLoader(now), is_package=False)


def moved_module(name: str) -> str | None:
    """Where a module is today; None for one that nobody moved."""
    fast = _FAST.fullmatch(name)
    return MOVED_MODULES.get(name) or (fast[1] if fast else None)


def lazy_names(module: ModuleType) -> Iterator[Replacement]:
    """transformers looks up its names when they are first used; what it does not find is looked for here."""
    cls = module._LazyModule
    original = cls.__getattr__

    @functools.wraps(original)
    def find(self: ModuleType, name: str) -> Any:
        try:
            return original(self, name)
        except AttributeError:
            place = MOVED_NAMES.get((self.__name__, name)) or _of_pictures(self, name)
            if place is None:
                raise
        return moved(self.__name__, name, *place)

    def _of_pictures(module: ModuleType, name: str) -> tuple[str, str] | None:
        if not name.endswith(_EXTRACTOR):
            return None
        now = name.removesuffix(_EXTRACTOR) + _PROCESSOR
        try:
            original(module, now)
        except AttributeError:
            return None
        return module.__name__, now

    yield Replacement(cls, "__getattr__", find)


def added_names(module: ModuleType) -> Iterator[Replacement]:
    """Names that a module has no longer, each found in its home and named when a script first asks for it."""
    homes = {name: place for (home, name), place in MOVED_NAMES.items() if home == module.__name__}
    missing = {name: home for name, home in homes.items() if not hasattr(module, name)}
    if not missing:
        return
    before = vars(module).get("__getattr__")

    def find(name: str) -> Any:
        if name in missing:
            return moved(module.__name__, name, *missing[name])
        if before is not None:
            return before(name)
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

    yield Replacement(module, "__getattr__", find)


def moved(module: str, name: str, home: str, now: str) -> Any:
    """The thing that a script asks for by its old name."""
    say(f"{module}.{name}", REASONS[name] if home.startswith("lowbit") else f"is {home}.{now} today")
    return getattr(importlib.import_module(home), now)


def peft_names(module: ModuleType) -> Iterator[Replacement]:
    """`peft.prepare_model_for_int8_training`."""
    if hasattr(module, "prepare_model_for_int8_training"):
        return
    now = module.prepare_model_for_kbit_training

    @functools.wraps(now)
    def prepare(*args: Any, **kwargs: Any) -> Any:
        say("peft.prepare_model_for_int8_training", "is prepare_model_for_kbit_training today")
        return now(*args, **kwargs)

    yield Replacement(module, "prepare_model_for_int8_training", prepare)


def no_neural_compressor(module: ModuleType) -> Iterator[Replacement]:
    """peft asks whether the package is installed, to look for layers of its own; lowbit answers its name, and has none of these."""
    yield Replacement(module, "is_inc_available", lambda: False)
