"""`ipex_llm.transformers.xgrammar`: answers in JSON, or in JSON of a schema, by a logits processor of the package xgrammar.

processor = create_json_logits_processor(tokenizer, model.config.vocab_size, schema)
model.generate(ids, logits_processor=[processor])
reset_json_logits_processor(processor)                  before the next answer
"""

from __future__ import annotations

import importlib
import json
from typing import Any

from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import WORKS, Name
from lowbit.errors import LowbitError

__all__ = ["create_json_logits_processor", "reset_json_logits_processor"]


def create_json_logits_processor(tokenizer: Any, vocab_size: int, schema: Any = None) -> Any:
    """A processor that leaves only tokens with which the answer is JSON; `schema` is a JSON schema, as text or as a dictionary."""
    grammars = _library("xgrammar")
    info = grammars.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
    compiler = grammars.GrammarCompiler(info)
    if schema is None:
        grammar = compiler.compile_builtin_json_grammar()
    else:
        grammar = compiler.compile_json_schema(json.dumps(schema) if isinstance(schema, dict) else schema)
    return _library("xgrammar.contrib.hf").LogitsProcessor(grammar)


def reset_json_logits_processor(processor: Any) -> None:
    """Ready for another answer: a processor follows the one that it began with."""
    for matcher in processor.matchers:
        matcher.reset()
    processor.prefilled = False


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("xgrammar"):
            raise
        raise LowbitError("answers in JSON need the package xgrammar: pip install xgrammar") from None


__getattr__ = refuse_unknown(__name__, {})

_PLACE = "ipex_llm.transformers.xgrammar"
_TEST = "tests/unit/test_compat_bigdl_stages.py::test_answers_in_json"
NAMES = tuple(Name(f"{_PLACE}.{name}", "", WORKS, _TEST, "with the package xgrammar") for name in __all__)
