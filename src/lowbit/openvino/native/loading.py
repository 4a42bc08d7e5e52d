"""A folder of OpenVINO's files as a model that answers.

openvino_model.xml .bin      the graph and its weights         config.json               what the model is
tokenizer.json               how text is cut                   tokenizer_config.json, chat_template.jinja
generation_config.json       how it answers unless told otherwise
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit.contents import CONFIG, read_config, read_generation_config
from lowbit.errors import RecipeError, understood
from lowbit.models.families import FAMILIES, TEXT_PARTS, spec_from_config
from lowbit.models.spec import AttentionSpec, DecoderSpec, EmbeddingSpec, HeadSpec, NormSpec, TokenIds
from lowbit.openvino.native.adapters import Adapters, read_adapter
from lowbit.openvino.native.engine import IrEngine, check_vocabulary
from lowbit.openvino.native.graph import ask_for_logits
from lowbit.openvino.native.model import AdaptedModel
from lowbit.openvino.native.rows import LOGITS, Decoder, check_graph
from lowbit.openvino.opening import MODEL, compile_model, read_model
from lowbit.runtime.files import read_tokenizer
from lowbit.runtime.loading import LONGEST_DEFAULT_CONTEXT
from lowbit.runtime.settings import settings_from


def load(
    folder: str | Path,
    device: str = "CPU",
    *,
    ov_config: Mapping[str, Any] | None = None,
    adapters: str | Path | Mapping[str, str | Path] | None = None,
    context: int | None = None,
    slots: int = 1,
) -> AdaptedModel:
    """A model from a folder in OpenVINO's form, which its graph's file names as well.

    `ov_config` are OpenVINO's properties, `adapters` a folder of peft's or several by name, `context` the most tokens that a prompt
    and its answer have together, `slots` how many sequences (or beams) are kept at once.
    """
    folder = Path(folder).expanduser()
    folder = folder.parent if folder.name == MODEL else folder
    graph = read_model(folder)
    check_graph(graph)
    spec = read_spec(folder)
    check_vocabulary(spec, graph.output(LOGITS).get_partial_shape())
    ask_for_logits(graph)
    named = {Path(adapters).name: adapters} if isinstance(adapters, str | Path) else dict(adapters or {})
    put = Adapters(graph, {name: read_adapter(path) for name, path in named.items()})
    engine = IrEngine(Decoder.of(graph, compile_model(graph, device, ov_config)), spec, _context(spec, context), slots)
    settings = settings_from(read_generation_config(folder), spec.tokens.eos)
    return AdaptedModel(engine, put, read_tokenizer(folder), settings)


def read_spec(folder: Path) -> DecoderSpec:
    """What the model of a folder is; of one that lowbit knows nothing more of, what is needed to run its graph."""
    config = read_config(folder)
    config.pop("quantization_config", None)
    with understood(f"{folder}: its {CONFIG} cannot be understood"):
        known = config["model_type"] in (*FAMILIES, *TEXT_PARTS)
        return spec_from_config(config) if known else _bare_spec(config)


def _bare_spec(config: Mapping[str, Any]) -> DecoderSpec:
    text = {**config, **(config.get("text_config") or {})}
    end = text.get("eos_token_id")
    ends = () if end is None else tuple(end) if isinstance(end, list) else (end,)
    width = int(text.get("hidden_size") or 1)
    return DecoderSpec(
        text["model_type"], width, int(text["vocab_size"]), int(text.get("max_position_embeddings") or LONGEST_DEFAULT_CONTEXT),
        (), EmbeddingSpec(width), NormSpec("rms", 0.0), AttentionSpec(1, 1, width, 1.0), None, HeadSpec(tied=False), (),
        tokens=TokenIds(text.get("bos_token_id"), ends, text.get("pad_token_id")),
    )  # fmt: skip


def _context(spec: DecoderSpec, asked: int | None) -> int:
    if asked is None:
        return min(spec.max_positions, LONGEST_DEFAULT_CONTEXT)
    if not 1 <= asked <= spec.max_positions:
        raise RecipeError(f"context={asked} is out of range; this model was made for 1 to {spec.max_positions} tokens")
    return asked
