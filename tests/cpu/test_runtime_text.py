"""Text and tokens: whole characters, stop strings across pieces, special tokens, chat templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer as Cutter
from tokenizers import models, processors

from lowbit.errors import CheckpointError, LowbitError
from lowbit.runtime.text import StopStrings, TextPieces, Tokenizer
from lowbit_assets.tiny import write_byte_tokenizer


def bytes_as_text(tokens: list[int]) -> str:
    return bytes(tokens).decode(errors="replace")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return folder


def tokenizer(folder: Path, **changes: object) -> Tokenizer:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    return Tokenizer.from_json((folder / "tokenizer.json").read_text(), config | changes)


def test_pieces_are_whole_characters_and_add_up() -> None:
    text = "naïve — 雪 🙂 end"
    pieces = TextPieces(bytes_as_text)
    came = [pieces.add(byte) for byte in text.encode()]
    assert "".join(came) + pieces.rest() == text
    assert "\ufffd" not in "".join(came)
    assert "🙂" in came


def test_bytes_that_are_no_character_come_out_at_last() -> None:
    pieces = TextPieces(bytes_as_text)
    came = [pieces.add(0xFF) for _ in range(9)]
    assert came[:3] == ["", "", ""]
    assert "".join(came) + pieces.rest() == "\ufffd" * 9
    assert len(pieces.tokens) - pieces.read < 4


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("stops", [("END",), ("ENDE", "D"), ("zz", "N"), ("abcE", "x")], ids=str)
def test_stop_strings_cut_the_same_place_however_text_is_cut(stops: tuple[str, ...], size: int) -> None:
    text = "abc EEN abcENDE more"
    expected = min((text.find(stop) for stop in stops if stop in text), default=len(text))
    watch, shown = StopStrings(stops), ""
    for begin in range(0, len(text), size):
        shown += watch.add(text[begin : begin + size])
        if watch.found:
            break
    shown += watch.rest()
    # A longer piece may hold a later stop whole before the earlier one began; cut one by one it is the first to end.
    ends = min((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text)
    assert shown in (text[:expected], text[: ends[1]])
    assert watch.found in stops


def test_what_is_no_stop_string_after_all_is_shown() -> None:
    watch = StopStrings(("stop!",))
    assert [watch.add("a sto"), watch.add("p and s"), watch.rest()] == ["a ", "stop and ", "s"]
    assert watch.found is None


def test_ends_follow_the_config(folder: Path) -> None:
    assert tokenizer(folder).encode("a") == [tokenizer(folder).encode("a")[-1]]
    assert tokenizer(folder, add_bos_token=True).encode("a")[0] == 1
    assert tokenizer(folder, add_eos_token=True).encode("a")[-1] == 2
    assert tokenizer(folder, add_bos_token=True).encode("a", special=False)[0] != 1
    cutter = Cutter(models.WordLevel({"a": 0, "<s>": 1}, unk_token="a"))
    cutter.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    config = {"bos_token": {"content": "<s>"}}
    assert Tokenizer(cutter, config).encode("a") == [1, 0]
    assert Tokenizer(cutter, config | {"add_bos_token": False}).encode("a") == [0]
    # The first token of a text that spells it is not one that was added.
    plain = tokenizer(folder, add_bos_token=False)
    spelt = f"{plain.cutter.id_to_token(1)}a"
    assert plain.encode(spelt) == plain.encode(spelt, special=False) and plain.encode(spelt)[0] == 1


TEMPLATES = {
    "trims": "{% for m in messages %}\n  {{ m.role }}:{{ m['content'] | trim }}\n{% endfor %}\n",
    "loops": "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ eos_token }}",
    "variables": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    "{{ bos_token }}{% if tools is none %}no tools{% endif %}{% if enable_thinking is defined %}thinks{% endif %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name: str, folder: Path) -> None:
    messages = [{"role": "user", "content": " Grüße <b> "}, {"role": "assistant", "content": "ok"}]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(
        messages, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True
    )
    ours = tokenizer(folder, chat_template=TEMPLATES[name])
    assert ours.render(messages) == expected
    named = tokenizer(
        folder, chat_template=[{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATES[name]}]
    )
    assert named.render(messages) == expected


def test_templates_run_in_a_sandbox_and_refuse_in_a_sentence(folder: Path) -> None:
    message = [{"role": "user", "content": "x"}]
    for template in (
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('roles must alternate') }}",
    ):
        with pytest.raises(LowbitError, match="the model's chat template refuses this conversation"):
            tokenizer(folder, chat_template=template).render(message)
    with pytest.raises(CheckpointError, match="no valid Jinja \\(line 1"):
        tokenizer(folder, chat_template="{% if %}").render(message)


def test_without_a_template_a_conversation_is_plain_text(folder: Path) -> None:
    plain = tokenizer(folder, chat_template=None)
    assert plain.render([{"role": "user", "content": "Hi"}]) == "user: Hi\nassistant:"
