"""Who runs a model: lowbit's engine or transformers.

The engine runs what is low-bit, or made low-bit on the way, of every family that it knows, on the CPU and without torch. Everything
else goes through transformers, and the command says once on stderr why. `--engine` decides it by hand.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING

from lowbit.cli.options import LoadOptions
from lowbit.cli.source import Source
from lowbit.core import calls
from lowbit.core.library import library_path
from lowbit.errors import LowbitError, MissingPackageError
from lowbit.progress import progress

if TYPE_CHECKING:
    from lowbit.cli.engine_session import EngineSession
    from lowbit.cli.session import Session
    from lowbit.runtime.files import ModelFiles

    AnySession = Session | EngineSession

AUTO, OWN, TRANSFORMERS = "auto", "lowbit", "transformers"


def open_session(source: Source, options: LoadOptions, threads: int | None = None) -> AnySession:
    """Load a model with whoever runs it."""
    if options.engine == TRANSFORMERS:
        return _through_transformers(source, options, threads)
    try:
        files = _files_for_engine(source, options)
    except LowbitError as refusal:
        if options.engine == OWN:
            raise
        if _missing():
            raise MissingPackageError(_missing()[0], f"running this model ({refusal})", "torch") from None
        return _instead_of_engine(refusal, source, options, threads)
    if files is None:
        return _through_transformers(source, options, threads)
    from lowbit.cli.engine_session import EngineSession

    session = EngineSession.load(files, options, threads)
    for note in session.model.notes:
        print(f"lowbit: {note}", file=sys.stderr)
    return session


def _instead_of_engine(refusal: LowbitError, source: Source, options: LoadOptions, threads: int | None) -> Session:
    """Say why transformers runs it, unless it cannot either, for the same reason: then that is said, once."""
    reason = f"lowbit: {source.name} runs through transformers: {refusal}"
    try:
        session = _through_transformers(source, options, threads)
    except LowbitError as error:
        if str(error) != str(refusal):
            print(reason, file=sys.stderr)
        raise
    print(reason, file=sys.stderr)
    return session


def _files_for_engine(source: Source, options: LoadOptions) -> ModelFiles | None:
    """The files of a model that the engine runs; None where nobody would expect it to; an error that says why not."""
    on_device = options.device not in (None, "cpu")
    is_low_bit = source.kind == "gguf" or options.recipe is not None or "quantization_config" in source.config()
    if options.engine == AUTO and not _missing() and (on_device or not is_low_bit):
        return None
    for refused, reason in (
        (source.kind == "hub", "it comes from the hub"),
        (on_device, f"the engine does not run on {options.device}"),
        (options.dtype != "auto", f"the engine does not cast models to {options.dtype}"),
        (options.trust_remote_code, "it may bring code of its own"),
        (library_path() is None, "the compiled core is not installed"),
    ):
        if refused:
            raise LowbitError(reason)
    from lowbit.runtime.files import open_files, read_spec

    files = open_files(source.path)
    read_spec(files)
    recipe = options.recipe
    formats = files.formats if recipe is None else {f for f in (recipe.linear, recipe.head, recipe.embedding) if f}
    for format in formats:
        refusal = calls.refuses(format, (1, 1)) or (calls.refuses_to_quantize(format) if recipe else None)
        if refusal:
            raise LowbitError(refusal)
    return files


def _missing() -> list[str]:
    """The packages of the path through transformers that are not installed."""
    return [name for name in ("torch", "transformers") if not is_installed(name)]


def is_installed(name: str) -> bool:
    """Whether a package can be imported."""
    if name in sys.modules:
        return sys.modules[name] is not None
    return importlib.util.find_spec(name) is not None


def _through_transformers(source: Source, options: LoadOptions, threads: int | None) -> Session:
    if _missing():
        raise MissingPackageError(_missing()[0], "running a model through transformers", "torch")
    for option, given in (
        ("--check", options.check),
        ("--context", options.context is not None),
        ("--cache", options.cache != "auto"),
        ("--within-window", options.within_window),
        ("--mapped", options.mapped),
    ):
        if given:
            raise LowbitError(
                f"{option} belongs to lowbit's own engine, and this model runs through transformers: add --engine lowbit"
            )
    start_torch(threads)
    from lowbit.cli.session import Session

    return Session.load(source, options)


def start_torch(threads: int | None = None) -> None:
    """Import and set up torch and transformers, which takes seconds, at the first time of a day many."""
    with progress("starting torch"):
        from lowbit.cli.session import prepare_torch

        prepare_torch(threads)
