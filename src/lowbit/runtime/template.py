"""A model's chat template: the Jinja program that writes a conversation as the text that the model was trained on.

Templates come with models from anywhere, so they run in Jinja's sandbox, with the tag, the filter and the functions that
transformers gives them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lowbit.errors import CheckpointError, LowbitError


def render(template: str, values: Mapping[str, Any]) -> str:
    """The text that a template makes of `messages` and its other values."""
    try:
        return _compiled(template).render(values)
    except (jinja2.TemplateError, TypeError) as error:
        raise LowbitError(f"the model's chat template refuses this conversation: {error}") from None


class _Generation(Extension):
    """The tag `{% generation %}`, with which templates mark the model's own words for training: here its inside stands as
    it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(
            f"the model's chat template is no valid Jinja (line {error.lineno}: {error.message})"
        ) from None


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes for HTML, which models were not trained on."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(reason: str) -> None:
    raise jinja2.TemplateError(reason)
