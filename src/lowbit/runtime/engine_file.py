"""lowbit_engine.json: what the C++ face of the core needs to know of a saved folder, beside its weights and tokenizer.json.

    python -m lowbit.runtime.engine_file FOLDER      # for folders saved before this file existed, or by others

Families, spellings of names and templates are Python's business. Here they are resolved once, when a model is saved:

    model, ropes, layers   the numbers of engine_api.h by name
    weights                for each role of each layer the tensors it is made of: pieces[index][part], [file, tensor]
    text                   how text is cut into words (`splitting`), and the text around the messages of a conversation

A chat template is a program, but most write the same text around every message. `conversation_form` finds that text by
rendering conversations with marks in them, and then proves it on others; a template that does more is refused by name.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lowbit.core import calls
from lowbit.core.library import c_format
from lowbit.errors import CheckpointError, LowbitError
from lowbit.formats import Format
from lowbit.models.spec import DecoderSpec, Located
from lowbit.packing import PackedTensor
from lowbit.runtime import abi
from lowbit.runtime.describe import Description
from lowbit.runtime.files import FolderFiles, read_spec
from lowbit.runtime.mapped import Tensor
from lowbit.runtime.settings import settings_from
from lowbit.runtime.splitting import splitting
from lowbit.runtime.text import Message, Tokenizer
from lowbit.runtime.weights import EngineWeights

ENGINE_FILE = "lowbit_engine.json"
VERSION = 1
_SELECTION = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
# Marks that no template and no tokenizer knows, and messages to prove a form with.
_MARKS = ("\ue001first\ue001", "\ue002second\ue002", "\ue003third\ue003", "\ue004system\ue004")
_TRIALS = ("Hello.", "  two words ", "line\nbreak\n", "日本語 and émigré", "{{ braces }} <b>")


def write_engine_file(folder: str | Path) -> Path:
    """Describe a folder to the C++ face; returns the file written."""
    path = Path(folder) / ENGINE_FILE
    path.write_text(json.dumps(engine_description(FolderFiles(Path(folder))), ensure_ascii=False), encoding="utf-8")
    return path


def engine_description(files: FolderFiles) -> dict[str, Any]:
    """What is written, as plain dicts and lists."""
    refusals = [refusal for format in files.formats if (refusal := calls.refuses(format, (1, 1)))]
    if refusals:
        raise CheckpointError(f"the engine does not run this model: {refusals[0]}")
    spec = read_spec(files)
    settings = settings_from(files.generation_config, spec.tokens.eos)
    return {
        "version": VERSION,
        **_numbers(spec),
        **_Weights(files, spec).described(),
        "tied": spec.head.tied,
        "norm_offset": spec.norm.offset,
        "context": spec.max_positions,
        "ends": list(settings.stop_tokens),
        "selection": {name: getattr(settings.selection, name) for name in _SELECTION},
        "text": text_description(files.tokenizer()),
    }


def _numbers(spec: DecoderSpec) -> dict[str, Any]:
    """The struct of the engine by names, as `Description` fills it."""
    description = Description(spec, EngineWeights())
    model, attention = description.model, spec.attention
    names = [name for name in _field_names(model) if name != "alibi" and isinstance(getattr(model, name), int | float)]
    positions = spec.weight("positions")
    return {
        "model": _named(model, names) | {"position_rows": positions.shape[0] if positions else 0},
        **{name: _named(getattr(model, name)) for name in ("mlp", "expert", "shared")},
        "alibi": list(attention.alibi) if attention.alibi else None,
        "ropes": [_rope(model.ropes[i]) for i in range(model.rope_count)],
        "layers": [_named(model.layers[i], ("rope", "window", "sparse")) for i in range(model.layer_count)],
    }


def _named(struct: Any, names: Sequence[str] | None = None) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in names or _field_names(struct)}


def _field_names(struct: ctypes.Structure) -> list[str]:
    return [field[0] for field in struct._fields_]


def _rope(rope: abi.CRope) -> dict[str, Any]:
    described = _named(rope)
    for name in ("frequencies", "long_frequencies"):
        described[name] = list((ctypes.c_float * (rope.rotary_dim // 2)).from_address(described[name]))
    return described


class _Weights:
    """Where every weight lies; formats and files are listed once and named by number."""

    def __init__(self, files: FolderFiles, spec: DecoderSpec) -> None:
        self.files, self.spec = files, spec
        self.formats: list[Format] = []
        self.paths: list[str] = []

    def described(self) -> dict[str, Any]:
        weights = [self._weight(*item) for item in self.spec.locate(self.files.names).items()]
        return {"weights": weights, "files": self.paths, "formats": [_format(f) for f in self.formats]}

    def _weight(self, key: tuple[str, int | None], located: Located) -> dict[str, Any]:
        weight = located.weight
        pieces = [[self._piece(name, located) for name in names] for names in located.names]
        return {
            "role": key[0],
            "layer": key[1],
            "shape": list(weight.shape),
            "transposed": weight.transposed and "tensor" in pieces[0][0],
            "apart": located.in_pieces and len(weight.shape) > 2,
            "pieces": pieces,
            "bias": None if located.bias is None else [[self._piece(located.bias, located)]],
        }

    def _piece(self, name: str, located: Located) -> dict[str, Any]:
        if name not in self.files.packed.paths:
            return {"tensor": self._place(self.files.tensors[name])}
        columns = located.weight.shape[-1]
        packed = self.files.read(name, columns, located.weight.role == "embedding")
        if not isinstance(packed, PackedTensor):
            raise CheckpointError(f"{name} is listed as packed and is not")
        parts = self.files.packed.parts(name)
        codes = parts.get("codes", parts.get("weight_packed"))
        if "weight" in parts:
            raise CheckpointError(
                f"{name} lies there as int8, which this face does not read: save it with compact=True"
            )
        if codes is None or codes.shape != packed.codes.shape:
            raise CheckpointError(
                f"{name} is packed in an older way: load the model and save it again with save_low_bit"
            )
        if packed.format not in self.formats:
            self.formats.append(packed.format)
        buffers = {
            "codes": codes,
            "scales": parts.get("scales", parts.get("weight_scale")),
            "zeros": parts.get("zeros", parts.get("weight_zero_point")),
            "unit": parts.get("scale_scales"),
            "offset": parts.get("scale_offset"),
        }
        places = {word: self._place(tensor) for word, tensor in buffers.items() if tensor is not None}
        return {
            "format": self.formats.index(packed.format),
            "zeros_packed": "weight_zero_point" in parts,
            **places,
        }

    def _place(self, tensor: Tensor) -> list[int | str]:
        path = tensor.file.path.relative_to(self.files.path).as_posix()
        if path not in self.paths:
            self.paths.append(path)
        name = next(name for name, other in tensor.file.tensors.items() if other == tensor)
        return [self.paths.index(path), name]


def _format(format: Format) -> dict[str, Any]:
    struct = c_format(format)
    levels = [None if level != level else level for level in format.levels]
    return _named(struct, [name for name in _field_names(struct) if name != "levels"]) | {"levels": levels}


def text_description(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """How the tokenizer cuts and the template writes; where C++ cannot do the same, the sentence that says so."""
    if tokenizer is None:
        return {
            "refusal": "the folder has no tokenizer.json: give token numbers, or copy the original's beside the weights"
        }
    try:
        split = splitting(json.loads(tokenizer.cutter.to_str()))
    except LowbitError as error:
        return {"refusal": str(error)}
    try:
        chat: dict[str, Any] = conversation_form(tokenizer)
    except LowbitError as error:
        chat = {"refusal": str(error)}
    bare, whole = tokenizer.encode("a", special=False), tokenizer.encode("a")
    at = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return {"split": split, "before": whole[:at], "after": whole[at + len(bare) :], "chat": chat}


def conversation_form(tokenizer: Tokenizer) -> dict[str, Any]:
    """The text around the messages of a conversation."""
    first, second, third, system = _MARKS
    spoken = _turns((first, second, third))
    start, reply, following, answer = _around(tokenizer.render(spoken), (first, second, third))
    form: dict[str, Any] = {"start": start, "reply": reply, "next": following, "answer": answer}
    try:
        opened = _around(
            tokenizer.render([{"role": "system", "content": system}, *spoken]), (system, first, second, third)
        )
        form |= {"system": opened[0], "after_system": opened[1]}
    except LowbitError:
        form |= {"system": None, "after_system": None}
    form["around"] = tokenizer.template is None
    for trim in (False, True):
        if all(tokenizer.render(trial) == _written(form, trial, trim) for trial in _trials(form["system"] is not None)):
            return form | {"trim": trim}
    raise LowbitError(
        "the model's chat template does more than write text around messages, which the C++ face cannot follow: "
        "render the conversation in Python and give the tokens"
    )


def _turns(contents: Sequence[str]) -> list[Message]:
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(contents)]


def _trials(with_system: bool) -> Iterator[list[Message]]:
    for count in (1, 3, 5):
        yield _turns(_TRIALS[:count])
        if with_system:
            yield [{"role": "system", "content": _TRIALS[-2]}, *_turns(_TRIALS[5 - count :])]


def _around(text: str, marks: Sequence[str]) -> list[str]:
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise LowbitError(
                "the model's chat template changes, repeats or leaves out messages, which the C++ face cannot follow"
            )
        pieces.append(before)
    return [*pieces, text]


def _written(form: dict[str, Any], messages: Sequence[Message], trim: bool) -> str:
    """The conversation as the C++ face writes it (`render` in csrc/face/folder.cpp)."""
    out, before = "", form["start"]
    for message in messages:
        if message["role"] == "system":
            out, before = form["system"], form["after_system"]
        else:
            out += before
            before = form["reply" if message["role"] == "user" else "next"]
        out += message["content"].strip() if trim else message["content"]
    return str(out + form["answer"])


if __name__ == "__main__":
    for name in sys.argv[1:]:
        sys.stdout.write(f"{write_engine_file(name)}\n")
