"""What "xpu" means where there is no Intel GPU: under LOWBIT_XPU=cuda or cpu, that device.

PyTorch knows the word "xpu" in every build, as a name; only its build for Intel GPUs can make a tensor there. With the variable
set, the functions through which a device enters torch take "xpu" (or "xpu:0", or `torch.device("xpu")`) for the other device, and
`torch.xpu` answers for it: the same unmodified script runs. Nothing pretends further: `tensor.device` says where the data really
is, and `torch.device("xpu")` stays what it is.

    meaning.py   the variable, and what it makes of a device
    places.py    where a device enters torch: factories, tensors, autocast, saved files, generators
    on_cpu.py    torch.xpu and torch.accelerator when "xpu" is the CPU
    on_cuda.py   torch.xpu when "xpu" is an NVIDIA GPU
    ipex_names.py what Intel Extension for PyTorch added to torch.xpu
    absent.py    what to say beside torch's error where there is neither an Intel GPU nor the variable
    libraries.py the two doors of transformers through which a device goes past torch

Without the variable nothing is touched, and on a machine where torch sees an Intel GPU nothing is either: then "xpu" is that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

from lowbit import hook
from lowbit.compat.replacing import Replacements
from lowbit.compat.xpu.meaning import VARIABLE, chosen_kind

__all__ = ["VARIABLE", "Redirection", "chosen_kind"]


class Redirection:
    """ "xpu" means another device from `begin` on, in the modules imported by then and in those still to come."""

    def __init__(self, kind: str, done: Replacements) -> None:
        self.kind, self.done = kind, done
        self.redirected = False  # asked once: from then on torch.xpu says that it is available
        self.waiting: dict[str, Callable[[ModuleType], None]] = {
            "torch": self.change_torch,
            "transformers.modeling_utils": self.change_models,
        }

    def begin(self) -> None:
        for name, action in self.waiting.items():
            hook.when_imported(name, action)

    def stop_waiting(self) -> None:
        for name, action in self.waiting.items():
            hook.no_longer_when_imported(name, action)

    def change_torch(self, torch: ModuleType) -> None:
        from lowbit.compat.xpu import ipex_names, on_cpu, on_cuda, places
        from lowbit.compat.xpu.meaning import Meaning, an_intel_gpu_is_there

        self.redirected = not an_intel_gpu_is_there()
        if not self.redirected:
            return
        meaning = Meaning(self.kind)
        module = on_cpu if self.kind == "cpu" else on_cuda
        # A refusal comes before the first replacement.
        self.done.make([*module.replacements(meaning), *places.replacements(meaning), *ipex_names.replacements()])
        forget_answers()
        self.done.when_undone(forget_answers)

    def change_models(self, module: ModuleType) -> None:
        if self.redirected:  # torch is imported before it
            from lowbit.compat.xpu import libraries
            from lowbit.compat.xpu.meaning import Meaning

            self.done.make(libraries.replacements(Meaning(self.kind)))


def forget_answers() -> None:
    """Libraries remember whether there is an "xpu"; they shall ask again."""
    for name in ("transformers.utils.import_utils", "accelerate.utils.imports"):
        for value in list(vars(sys.modules.get(name, object)).values()):
            if hasattr(value, "cache_clear"):
                value.cache_clear()
