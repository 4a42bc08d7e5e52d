"""lowbit: make any Hugging Face or PyTorch model low-bit with one line, and run, save and load it on the hardware at hand.

    import lowbit
    model = lowbit.AutoModelForCausalLM.from_pretrained(folder, load_in_4bit=True)
    model = lowbit.optimize_model(any_torch_module, low_bit="int4")

The public names are imported when first used, so that `import lowbit` itself costs milliseconds and needs no torch.
Importing it lets transformers read and write low-bit folders: the hook waits until transformers is imported and then
adds one quantiser.
"""

from __future__ import annotations

import importlib
from typing import Any

from lowbit import hook

__version__ = "0.1.0"

_HOMES = {
    "errors": (
        "CheckpointError",
        "FormatError",
        "KernelError",
        "LowbitError",
        "MissingPackageError",
        "RecipeError",
        "WeightError",
    ),
    "core.threads": ("set_threads",),
    "formats": ("FORMATS", "Format", "format_from_name"),
    "recipe": ("RECIPES", "Recipe"),
    "report": ("Report",),
    "configs.classes": ("AutoRoundConfig", "AwqConfig", "GPTQConfig", "RtnConfig", "TeqConfig"),
    "optimize": ("explain", "optimize_model"),
    "checkpoint.load": ("load_low_bit", "low_memory_init"),
    "checkpoint.save": ("save_low_bit",),
    "checkpoint.auto": (
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForMaskedLM",
        "AutoModelForMultipleChoice",
        "AutoModelForNextSentencePrediction",
        "AutoModelForQuestionAnswering",
        "AutoModelForSeq2SeqLM",
        "AutoModelForSequenceClassification",
        "AutoModelForSpeechSeq2Seq",
        "AutoModelForTokenClassification",
    ),
    "evaluate": ("perplexity",),
}  # fmt: skip
# Rooms that users reach by attribute: `lowbit.demo.model_path()`.
_ROOMS = ("demo", "runtime")
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [*sorted(_HOME_OF), "__version__"]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"lowbit.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lowbit.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


hook.install()
