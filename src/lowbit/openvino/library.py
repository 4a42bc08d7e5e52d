"""The one door to the package openvino: everything else in this room imports `ov` and `ops` from here.

    ov           the package: ov.Model, ov.Type, ov.Core, ov.save_model
    ops          its set of operations, opset 15
    states       opset 6, whose read_value and assign name the variables of a stateful model
    core()       one Core for the process: plugins are loaded once
    follow(...)  the graph of a torch module, by following one call of it
    save(...)    a graph's two files; `writing` is around whatever else the package writes
    device(...)  a device that is here, or a sentence with those that are

Importing any module of this room without the package raises `MissingPackageError` with the line that installs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError, LowbitError, MissingPackageError, one_line

try:
    import openvino as ov
    from openvino import opset6 as states
    from openvino import opset15 as ops
    from openvino._offline_transformations import (
        apply_fused_names_cleanup,
        apply_moc_transformations,
        compress_model_transformation,
    )
    from openvino.frontend import (
        FrontEndManager,
        GeneralFailure,
        InitializationFailure,
        NotImplementedFailure,
        OpConversionFailure,
        OpValidationFailure,
    )
    from openvino.utils.node_factory import NodeFactory
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "openvino":
        raise
    raise MissingPackageError("openvino", "OpenVINO's form of a model", "openvino") from error

Node = Any  # a node of a graph: the package has no types that mypy reads

__all__ = [
    "CONVERSION_FAILURES", "Node", "core", "device", "devices", "factory", "follow", "halved", "ops", "ov", "release", "save",
    "states", "writing",
]  # fmt: skip

# What the package raises while it converts a model, nothing narrower than Exception above them.
CONVERSION_FAILURES = (
    GeneralFailure,
    InitializationFailure,
    NotImplementedFailure,
    OpConversionFailure,
    OpValidationFailure,
)
# These choose among the devices that are here, and are no devices themselves.
_CHOOSERS = ("AUTO", "MULTI", "HETERO", "BATCH")


def factory(operation: str, inputs: list[Any], attributes: dict[str, Any]) -> Any:
    """A node of opset 13 by the name of its operation, for inputs that the functions of `ops` do not take."""
    return NodeFactory("opset13").create(operation, inputs, attributes)


@cache
def core() -> Any:
    """The process's `ov.Core`."""
    return ov.Core()


def follow(module: Any, examples: tuple[Any, ...], shapes: list[Any]) -> Any:
    """The graph of a torch module, whose inputs have these shapes.

    The package's own `convert_model` goes this way too, and on it starts a process for each of some thirty messages that it sends
    home: three quarters of the time that a pipeline of pictures takes, and nothing that was asked for.
    """
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder  # imports torch

    frontend = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(module, example_input=examples)  # the frontend asks it, and does not keep it
    read = frontend.load(decoder)
    for number, shape in enumerate(shapes):
        read.set_partial_shape(read.get_place_by_input_index(number), shape)
    graph = frontend.convert(read)
    apply_moc_transformations(graph, cf=False, smart_reshape=True)
    apply_fused_names_cleanup(graph)
    return graph


def halved(model: Any) -> Any:
    """A copy of a graph with its plain weights in 16 bits, as the package itself writes them."""
    made = model.clone()
    compress_model_transformation(made)
    return made


def save(model: Any, path: Path, halves: bool = False) -> None:
    """Write a graph and its weights; every constant has the type already that it is to have, but for `halves`."""
    with writing(path):
        ov.save_model(model, path, compress_to_fp16=halves)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what the package writes: of a full disk it says "iostream error" and no more."""
    try:
        yield
    except RuntimeError as error:
        raise CheckpointError(
            f"OpenVINO could not write {path.name} ({one_line(str(error))}): see whether the disk is full and the folder yours"
        ) from error


def release() -> str:
    """The release of the installed package, "2026.4.1" without its build."""
    return str(ov.__version__).partition("-")[0]


def devices() -> list[str]:
    """The devices of this machine: CPU, GPU (or GPU.0, GPU.1), NPU."""
    return list(core().available_devices)


def device(name: str) -> str:
    """The device of this name in OpenVINO's spelling; "cpu" and "gpu:0" are understood."""
    spelled = name.upper().replace("GPU:", "GPU.").replace("NPU:", "NPU.")
    here = devices()
    known = {*here, *(found.partition(".")[0] for found in here)}
    chooser, _, among = spelled.partition(":")
    # "AUTO:GPU,CPU" names those to choose among, "-CPU" one to leave out, "CPU(4)" one with a number of its own.
    wanted = [word.strip().partition("(")[0] for word in among.split(",") if among and not word.startswith("-")]
    if chooser not in _CHOOSERS:
        wanted = [spelled]
    absent = [word for word in wanted if word not in known]
    if absent:
        said = repr(name) if absent == [spelled] else f"{absent[0]!r}, which {name!r} names,"
        raise LowbitError(f"there is no device {said} here: OpenVINO {release()} sees {', '.join(here) or 'none'}")
    return spelled
