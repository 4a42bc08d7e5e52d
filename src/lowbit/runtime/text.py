"""Between text and tokens: the tokenizer, the chat template, and text that comes in pieces.

    text -> Tokenizer.encode -> tokens -> engine -> tokens -> TextPieces -> StopStrings -> text as it comes

A tokenizer.json says how text is cut; tokenizer_config.json names the special tokens and may hold the chat template,
a Jinja program that writes a conversation as one text (template.py).

A token is not a piece of text: a character may take several tokens, and a space belongs to the word behind it.
`TextPieces` hands out whole characters only, and never changes what it handed out. `StopStrings` holds back what may
yet become a stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lowbit.errors import BareErrors, LowbitError, check_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Cutter

Message = Mapping[str, Any]
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What a decoder gives for bytes that are no whole character; a character has at most four bytes, so three can be missing.
_UNFINISHED = "\ufffd"
_MOST_UNFINISHED = 3


class Tokenizer:
    """Text to tokens and back. `special` holds the text of each special token that the model names, such as bos_token."""

    def __init__(self, cutter: Cutter, config: Mapping[str, Any], template: str | None = None) -> None:
        self.cutter = cutter
        self.config = dict(config)
        # A file that was used for training may still say where to cut or pad; here a prompt is taken whole.
        cutter.no_truncation()
        cutter.no_padding()
        self.special = {name: text for name in SPECIAL_NAMES if (text := _content(config.get(name)))}
        self.template = template if template is not None else _default_template(config.get("chat_template"))

    @classmethod
    def from_json(cls, text: str, config: Mapping[str, Any], template: str | None = None) -> Tokenizer:
        """A tokenizer from the text of a tokenizer.json and the fields of a tokenizer_config.json."""
        # Here and not above: it takes 16 ms, and a model is loaded while its tokenizer is read.
        from tokenizers import Tokenizer as Cutter

        with BareErrors("the tokenizer.json is damaged, copy it again from the original"):
            return cls(Cutter.from_str(text), config, template)
        raise AssertionError("unreachable: the block above returns or raises")

    @property
    def size(self) -> int:
        return int(self.cutter.get_vocab_size(with_added_tokens=True))

    def number(self, name: str) -> int | None:
        """The token of a special name such as "eos_token"."""
        text = self.special.get(name)
        return None if text is None else self.cutter.token_to_id(text)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The tokens of a text; `special` adds those that the model expects around it, such as the beginning."""
        try:
            tokens = list(self.cutter.encode(text, add_special_tokens=False).ids)
        except TypeError:  # half a character, as JSON may hold it ("\\ud83d")
            check_text(text, "the prompt")
            raise
        return self._with_ends(text, tokens) if special else tokens

    def decode(self, tokens: Sequence[int], special: bool = False) -> str:
        """The text of tokens; special tokens are left out unless asked for."""
        return str(self.cutter.decode(list(tokens), skip_special_tokens=not special))

    def _with_ends(self, text: str, plain: list[int]) -> list[int]:
        """The tokens with those around them. tokenizer_config.json may overrule tokenizer.json about the first and the last."""
        tokens = list(self.cutter.encode(text, add_special_tokens=True).ids)
        bos, eos = self.number("bos_token"), self.number("eos_token")
        adds_bos, adds_eos = self.config.get("add_bos_token"), self.config.get("add_eos_token")
        if bos is not None and adds_bos and tokens[:1] != [bos]:
            tokens = [bos, *tokens]
        # One that stands in the text itself stays.
        elif tokens[:1] == [bos] and adds_bos is False and tokens[1 : 1 + len(plain)] == plain:
            tokens = tokens[1:]
        if eos is not None and adds_eos and tokens[-1:] != [eos]:
            tokens = [*tokens, eos]
        return tokens

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """A conversation as the text that the model was trained on, up to where the model speaks."""
        if not messages:
            raise LowbitError("the conversation is empty: give at least one message with a role and a content")
        for message in messages:
            if "role" not in message:
                raise LowbitError(f"a message needs a role and a content, and this one has {sorted(message)}")
        if self.template is None:
            return "".join(f"{m['role']}: {m.get('content', '')}\n" for m in messages) + "assistant:"
        # Jinja takes longer to import than a small model to load, and only conversations need it.
        from lowbit.runtime.template import render

        values = {"add_generation_prompt": True, "tools": None, "documents": None, **self.special, **variables}
        return render(self.template, {"messages": list(messages), **values})

    def encode_chat(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """A conversation as tokens. A template writes the special tokens itself; without one they are added."""
        return self.encode(self.render(messages, **variables), special=self.template is None)


def _content(token: Any) -> str:
    """The text of a special token, which is stored as text or as an object with its options."""
    return str(token.get("content", "")) if isinstance(token, Mapping) else str(token or "")


def _default_template(stored: Any) -> str | None:
    """The template of a config: one text, or a list of named ones of which "default" is for chat."""
    if isinstance(stored, list):
        named = {entry.get("name"): entry.get("template") for entry in stored if isinstance(entry, Mapping)}
        return named.get("default") or next(iter(named.values()), None)
    return stored if isinstance(stored, str) else None


class TextPieces:
    """Turns tokens into text as they come: whole characters only, and what was handed out is never changed later.

    A token's text depends on the tokens before it (spaces, characters of several bytes), so a short window is decoded
    with and without the new token; the difference is the piece. `read` tokens have been handed out, those from `kept`
    on give the context.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode = decode
        self.tokens: list[int] = []
        self.kept = self.read = 0

    def add(self, token: int) -> str:
        self.tokens.append(token)
        return self._piece(final=False)

    def rest(self) -> str:
        """What was held back, once no token follows."""
        return self._piece(final=True)

    def _piece(self, final: bool) -> str:
        before = self.decode(self.tokens[self.kept : self.read])
        whole = self.decode(self.tokens[self.kept :])
        if len(whole) <= len(before) or (_is_unfinished(whole) and not final):
            return ""
        self.kept, self.read = self.read, len(self.tokens)
        return whole[len(before) :]


def _is_unfinished(text: str) -> bool:
    """Whether a text may end in the middle of a character. Longer runs are bytes that will never be one."""
    return 0 < len(text) - len(text.rstrip(_UNFINISHED)) <= _MOST_UNFINISHED


class StopStrings:
    """Lets text through until a stop string comes, which may begin in one piece and end in another.

    What could be the beginning of a stop string is held back until the next piece decides. `found` is the stop string
    that came.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self.stops = tuple(stop for stop in stops if stop)
        self.held = ""
        self.found: str | None = None

    def add(self, piece: str) -> str:
        """The text that may be shown now."""
        text = self.held + piece
        places = [(text.find(stop), stop) for stop in self.stops if stop in text]
        if places:
            place, self.found = min(places, key=lambda at: at[0])
            self.held = ""
            return text[:place]
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, once no text follows."""
        held, self.held = self.held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
