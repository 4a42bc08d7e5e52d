"""The hook into transformers: two tables gain an entry once transformers is there, and nothing is imported before.

transformers finds the reader of a quantised folder in two dictionaries of `transformers.quantizers.auto`, by the `quant_method`
that the folder's config.json names. lowbit adds its own method, and stands in front of "compressed-tensors": folders of packed
integer weights, which is how lowbit saves, get lowbit's layers and kernels, and every other folder goes on to the original entry.

`import lowbit` must cost milliseconds, so a finder waits in front of the import path for `transformers.quantizers.auto` and adds
the entries right after that module has run. The entries themselves import lowbit's quantiser only when a folder asks for it.
Whoever else has something to do right after a module of somebody else's has run says so with `when_imported`.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.abc import Loader, MetaPathFinder
else:  # names alone: importing their home takes 8 ms
    Loader = MetaPathFinder = object

from lowbit.methods import COMPRESSED_METHOD, OWN_METHOD

TABLES_MODULE = "transformers.quantizers.auto"


class ConfigEntry:
    """Stands in the table of configurations: builds lowbit's, or passes the fields on to the entry that was there."""

    def __init__(self, original: Any = None) -> None:
        self.original = original

    def from_dict(self, config_dict: dict[str, Any], **options: Any) -> Any:
        from lowbit.checkpoint import hf

        if self.original is not None and not hf.reads(config_dict):
            return self.original.from_dict(config_dict, **options)
        return hf.LowBitConfig.from_dict(config_dict, **options)


class QuantizerEntry:
    """Stands in the table of quantisers: opens lowbit's for lowbit's configuration, else the one that was there."""

    def __init__(self, original: Any = None) -> None:
        self.original = original

    def __call__(self, quantization_config: Any, **options: Any) -> Any:
        from lowbit.checkpoint import hf

        if self.original is not None and not isinstance(quantization_config, hf.LowBitConfig):
            return self.original(quantization_config, **options)
        return hf.LowBitQuantizer(quantization_config, **options)


def add_entries(tables: ModuleType) -> None:
    """Enter lowbit into transformers' tables, once."""
    configs, quantizers = tables.AUTO_QUANTIZATION_CONFIG_MAPPING, tables.AUTO_QUANTIZER_MAPPING
    if OWN_METHOD in quantizers:
        return
    configs[OWN_METHOD], quantizers[OWN_METHOD] = ConfigEntry(), QuantizerEntry()
    configs[COMPRESSED_METHOD] = ConfigEntry(configs.get(COMPRESSED_METHOD))
    quantizers[COMPRESSED_METHOD] = QuantizerEntry(quantizers.get(COMPRESSED_METHOD))


# What waits for which module; the first action is the first to run.
_WAITING: dict[str, list[Callable[[ModuleType], None]]] = {}


class _Loader(Loader):
    """Runs the module as its own loader does, then what waited for it."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module is what it would have been without us, its loader included.
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        # A module may put another object in its place while it runs, as transformers does.
        module = sys.modules.get(module.__name__, module)
        for action in list(_WAITING.get(module.__name__, ())):
            action(module)


class _Finder(MetaPathFinder):
    """Waits for a few modules by name and steps aside for all others."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _WAITING:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def when_imported(name: str, action: Callable[[ModuleType], None]) -> None:
    """Call `action` with the module of that name: now if it is imported already, else right after it has run."""
    module = sys.modules.get(name)
    if module is not None:
        action(module)
        return
    _WAITING.setdefault(name, []).append(action)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def no_longer_when_imported(name: str, action: Callable[[ModuleType], None]) -> None:
    """The other half of `when_imported`: the action waits no more."""
    if action in _WAITING.get(name, ()):
        _WAITING[name].remove(action)


def install() -> None:
    """Add the entries now if transformers has its tables already, else when it makes them."""
    if add_entries not in _WAITING.get(TABLES_MODULE, ()):
        when_imported(TABLES_MODULE, add_entries)
