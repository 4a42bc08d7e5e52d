"""From a folder to a compiled model: the graph's two files, a device, and what OpenVINO says when it refuses.

    model = read_model(folder)                                # openvino_model.xml and .bin, mapped, not read
    compiled = compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

OpenVINO computes in bf16 and rounds activations to 8 bits where the processor gains by it. `EXACT` switches all of that off: the
results are then those of float32, which is what a comparison needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lowbit.contents import missing
from lowbit.errors import CheckpointError, LowbitError, one_line
from lowbit.openvino.library import core, device

MODEL = "openvino_model.xml"
# Threads that are pinned to a core wait for whatever else runs there: beside other work SmolLM2 in 8 bits made 59 tokens a second
# pinned, 82 like this, and 83 in openvino_genai (2 cores).
_FREE_THREADS = {"ENABLE_CPU_PINNING": "NO"}
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}


def has_graph(folder: str | Path, name: str = MODEL) -> bool:
    """Whether a folder holds a model in OpenVINO's form."""
    return (Path(folder).expanduser() / name).is_file()


def read_model(folder: str | Path, name: str = MODEL) -> Any:
    """The `openvino.Model` of a folder; its weights stay in the file, which has to stay as it is."""
    graph = Path(folder).expanduser() / name
    if not graph.parent.is_dir():
        raise CheckpointError(missing(graph.parent))
    if not graph.is_file():
        raise CheckpointError(
            f"{graph.parent} has no {name}: `lowbit export openvino --model MODEL {graph.parent}` writes a model there"
        )
    weights = graph.with_suffix(".bin")
    if not weights.is_file():
        raise CheckpointError(
            f"{graph.parent} has {name} without its weights {weights.name}: copy that file too, or export again"
        )
    try:
        return core().read_model(graph, weights)
    except RuntimeError as error:
        raise CheckpointError(f"{graph} cannot be read ({_reason(str(error))}); export the model again") from None


def compile_model(model: Any, name: str = "CPU", ov_config: Mapping[str, Any] | None = None) -> Any:
    """A graph made ready on a device."""
    chosen = device(name)
    usual = _FREE_THREADS if chosen == "CPU" else {}
    properties = usual | {key: str(value) for key, value in (ov_config or {}).items()}
    try:
        return core().compile_model(model, chosen, properties)
    except RuntimeError as error:
        raise LowbitError(f"OpenVINO refuses the model on {chosen}: {_reason(str(error))}") from None


def infer(run: Callable[..., Any], given: Mapping[str, Any], **options: Any) -> Any:
    """What a compiled model, or a request's `infer`, answers to inputs by name; a refusal names their shapes."""
    try:
        return run(given, **options)
    except (RuntimeError, ValueError) as error:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in given.items())
        raise LowbitError(f"OpenVINO refuses {shapes}: {_reason(str(error))}") from None


def _reason(said: str) -> str:
    """What an exception of the package says, without the places of its code that it went through."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith("Exception from src")]
    return one_line(" ".join(told or lines))
