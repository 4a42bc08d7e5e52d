"""The C++ face: a saved folder read and answered without Python, token for token what the runtime says.

The C functions are called through ctypes here; the example that is written over them in C++ is built and run as its first
lines tell the reader to.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Cutter

import lowbit
from lowbit.cli import main
from lowbit.core.library import last_error, library, library_path
from lowbit.demo import model_path
from lowbit.errors import LowbitError
from lowbit.runtime import load, splitting
from lowbit.runtime.abi import CACHE_TYPES, engine_library
from lowbit.runtime.engine import Engine
from lowbit.runtime.engine_file import ENGINE_FILE, conversation_form, write_engine_file
from lowbit.runtime.text import Tokenizer
from unit.family_cases import CASES, tiny_model

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src/lowbit/csrc"
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "",
    "a",
    " a",
    "Hello, world!",
    "it's we'll I'D they'Re x'y",
    "  two  spaces \n\n and\tlines\r\n ",
    "1234567 89 3.14",
    "naïve café Ünïcode ß ſ'ſ",
    "日本語のテキスト、漢字",
    "Привет мир",
    "🙂 emoji 👩\u200d👩\u200d👧 x",
    "<|im_start|>user\nhi<|im_end|>",
    "a<|im_start|><|im_end|>b",
    "½ ² ٣ Ⅷ",
    "x = {'a': [1, 2]} # comment\n\n\n",
    "é combined",
    "\u3000wide\xa0spaces\u2003",
    "end with space ",
    "'",
    "''s",
    "\x00\x7f",
]
PROMPT = "Name three fruits and their colours."
P, L = ctypes.c_void_p, ctypes.c_int64
PIECE = ctypes.CFUNCTYPE(ctypes.c_int, P, ctypes.c_int32, P, L)


class Message(ctypes.Structure):
    _fields_ = [("role", ctypes.c_char_p), ("content", ctypes.c_char_p)]


class Folder:
    """`lowbit_folder` of folder_api.h."""

    def __init__(self, path: Path) -> None:
        self.core = library()
        self.core.lowbit_folder_open.restype = P
        for name in ("encode", "decode", "conversation"):
            getattr(self.core, f"lowbit_folder_{name}").restype = L
        self.handle = P(self.core.lowbit_folder_open(str(path).encode(), None))
        if not self.handle:
            raise LowbitError(last_error())

    def _tokens(self, name: str, *arguments: Any) -> list[int]:
        function = getattr(self.core, f"lowbit_folder_{name}")
        count = function(self.handle, *arguments, None, L(0))
        if count < 0:
            raise LowbitError(last_error())
        room = (ctypes.c_int32 * count)()
        assert function(self.handle, *arguments, room, L(count)) == count
        return list(room)

    def encode(self, text: str, around: bool = False) -> list[int]:
        data = text.encode()
        return self._tokens("encode", data, L(len(data)), int(around))

    def decode(self, tokens: list[int], special: bool = False) -> str:
        given = (ctypes.c_int32 * len(tokens))(*tokens)
        count = self.core.lowbit_folder_decode(self.handle, given, L(len(tokens)), int(special), None, L(0))
        room = ctypes.create_string_buffer(count)
        self.core.lowbit_folder_decode(self.handle, given, L(len(tokens)), int(special), room, L(count))
        return room.raw[:count].decode()

    def conversation(self, messages: list[dict[str, str]]) -> list[int]:
        faces = (Message * len(messages))(*((m["role"].encode(), m["content"].encode()) for m in messages))
        return self._tokens("conversation", faces, L(len(messages)))

    def answer(self, prompt: list[int], most: int, stop_after: int | None = None) -> tuple[list[int], str]:
        """The tokens and the text of an answer in the folder's own way."""
        made: list[int] = []
        text = bytearray()

        def piece(_: int, token: int, data: int, size: int) -> int:
            made.append(token)
            text.extend(ctypes.string_at(data, size))
            return int(len(made) == stop_after)

        given = (ctypes.c_int32 * len(prompt))(*prompt)
        status = self.core.lowbit_folder_answer(
            self.handle, given, L(len(prompt)), L(most), None, ctypes.c_uint64(1), PIECE(piece), None, None
        )
        if status:
            raise LowbitError(last_error())
        return made, text.decode()

    def close(self) -> None:
        self.core.lowbit_folder_close(self.handle)


def byte_level(style: str) -> Cutter:
    """A small tokenizer of bytes, trained on the texts of this file."""
    split, step = pre_tokenizers.Split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cutters = {
        "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        "llama3": pre_tokenizers.Sequence([split(Regex(splitting.LLAMA3), "isolated"), step]),
        "qwen": pre_tokenizers.Sequence([split(Regex(splitting.QWEN), "isolated"), step]),
    }
    cutter = Cutter(models.BPE())
    cutter.pre_tokenizer, cutter.decoder = cutters[style], decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    cutter.train_from_iterator([*TEXTS, PROMPT, (ROOT / "README.md").read_text(encoding="utf-8")], trainer)
    return cutter


def save_tokenizer(cutter: Cutter, folder: Path, template: str | None = CHATML) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    cutter.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def save_model(folder: Path, low_bit: str, tied: bool = True, style: str = "smollm", **save: Any) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, max_position_embeddings=256, tie_word_embeddings=tied, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    source = folder / "source"
    save_tokenizer(byte_level(style), source)
    transformers.LlamaForCausalLM(config).save_pretrained(source)
    model = lowbit.AutoModelForCausalLM.from_pretrained(source, load_in_low_bit=low_bit)
    return Path(model.save_low_bit(folder / "saved", **save))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("face"), "int4")


@pytest.fixture
def folder(saved: Path) -> Iterator[Folder]:
    opened = Folder(saved)
    yield opened
    opened.close()


def assert_same_answer(path: Path, most: int = 40) -> None:
    model, face = load(path), Folder(path)
    prompt = model.chat_prompt([{"role": "user", "content": PROMPT}])
    assert face.conversation([{"role": "user", "content": PROMPT}]) == list(prompt)
    expected = model.generate(prompt, max_new_tokens=most)
    assert face.answer(list(prompt), most) == (list(expected.tokens), expected.text)
    face.close()


@pytest.mark.parametrize(
    "low_bit", ["int4", "int4_asym_g32", "int4_fine_g32", "nf4", "mxfp4", "nvfp4", "int8_channel", "nf4_dq", "q4_k"]
)
def test_the_greedy_answer_is_the_runtimes(low_bit: str, tmp_path: Path) -> None:
    assert_same_answer(save_model(tmp_path, low_bit))


@pytest.mark.parametrize("low_bit", ["int4", "bf16"])
def test_the_cache_is_of_the_runtimes_type(low_bit: str, tmp_path: Path) -> None:
    path = save_model(tmp_path, "int4")
    if low_bit == "bf16":  # nothing of the original is low-bit, and nothing rounds
        path = tmp_path / "source"
        write_engine_file(path)
    engine, face = load(path).engine, Folder(path)
    assert isinstance(engine, Engine)
    core = engine_library()
    core.lowbit_folder_engine.restype, core.lowbit_folder_engine.argtypes = P, [P]
    taken = CACHE_TYPES[core.lowbit_engine_cache_type(core.lowbit_folder_engine(face.handle))]
    assert taken == engine.cache == {"int4": "int8", "bf16": "fp16"}[low_bit]
    face.close()


@pytest.mark.parametrize("tied,compact", [(True, True), (False, False)])
def test_heads_and_compact_folders(tied: bool, compact: bool, tmp_path: Path) -> None:
    assert_same_answer(save_model(tmp_path, "int4", tied=tied, compact=compact))


@pytest.mark.parametrize("style", ["gpt2", "smollm", "llama3", "qwen"])
def test_tokens_are_those_of_tokenizers(style: str, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "folder"
    shutil.copytree(saved, path)
    cutter = byte_level(style)
    save_tokenizer(cutter, path)
    write_engine_file(path)
    face = Folder(path)
    for text in [*TEXTS, *(text * 3 for text in TEXTS), " ".join(TEXTS)]:
        tokens = cutter.encode(text, add_special_tokens=False).ids
        assert face.encode(text) == tokens, text
        assert face.decode(tokens) == cutter.decode(tokens), text
        assert face.decode(tokens[1:], special=True) == cutter.decode(tokens[1:], skip_special_tokens=False), text
    face.close()


def test_conversations_are_written_as_the_template_does(saved: Path, folder: Folder) -> None:
    tokenizer = load(saved).tokenizer
    for contents in (["Hello"], ["Hello", "Hi.", " and\nmore "], ["a", "b", "c", "d", "e"]):
        turns = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(contents)]
        for messages in (turns, [{"role": "system", "content": "Be brief."}, *turns]):
            assert folder.conversation(messages) == tokenizer.encode_chat(messages)
    with pytest.raises(LowbitError, match="ends with a message of the user"):
        folder.conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    with pytest.raises(LowbitError, match="come in turn"):
        folder.conversation([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])


def test_a_second_question_reads_only_what_is_new(folder: Folder) -> None:
    first = folder.conversation([{"role": "user", "content": "Hello"}])
    made, text = folder.answer(first, 12)
    again = folder.conversation(
        [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": text},
            {"role": "user", "content": PROMPT},
        ]
    )
    continued = folder.answer(again, 12)
    folder.answer([3, 4, 5], 2)
    assert folder.answer(again, 12) == continued and len(made) == 12
    assert folder.answer(first, 12, stop_after=5)[0] == made[:5]


def test_a_text_that_grows_past_the_trained_length_is_read_anew(tmp_path: Path) -> None:
    save_tokenizer(byte_level("smollm"), tmp_path)
    tiny_model(*CASES["phi3, longrope long"]).save_pretrained(tmp_path)
    write_engine_file(tmp_path)
    model, face = load(tmp_path), Folder(tmp_path)
    prompt = list(range(3, 10))  # 12 is that length
    first = model.generate(prompt, max_new_tokens=12)
    for question in (prompt, [*prompt, *first.tokens, 4, 4], prompt, list(range(3, 21)), list(range(3, 13))):
        expected = model.generate(question, max_new_tokens=12)
        assert face.answer(question, 12) == (list(expected.tokens), expected.text)
    face.close()


def test_templates_that_do_more_than_write_are_refused(saved: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_level("gpt2"), {}, "{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    with pytest.raises(LowbitError, match="changes, repeats or leaves out"):
        conversation_form(tokenizer)
    counting = "{% for m in messages %}{{ m.content }}{{ loop.index if loop.index > 3 else '' }}{% endfor %}"
    with pytest.raises(LowbitError, match="more than write text around"):
        conversation_form(Tokenizer(byte_level("gpt2"), {}, counting))
    path = tmp_path / "folder"
    shutil.copytree(saved, path)
    save_tokenizer(byte_level("gpt2"), path, counting)
    (path / "chat_template.jinja").unlink(missing_ok=True)
    write_engine_file(path)
    face = Folder(path)
    assert face.answer([3, 4, 5], 2)[0]
    with pytest.raises(LowbitError, match="more than write text around"):
        face.conversation([{"role": "user", "content": "a"}])
    face.close()


def test_tokenizers_of_other_kinds_are_refused_by_what_is_different() -> None:
    words = Cutter(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(LowbitError, match="WordLevel"):
        splitting.splitting(json.loads(words.to_str()))
    spaced = byte_level("gpt2")
    spaced.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(LowbitError, match="cuts text by ByteLevel"):
        splitting.splitting(json.loads(spaced.to_str()))


def damage(path: Path, change: str) -> None:
    file = path / ENGINE_FILE
    description = json.loads(file.read_text())
    if change == "missing":
        file.unlink()
    elif change == "cut":
        file.write_text(file.read_text()[:-20])
    elif change == "weights cut":
        weights = path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    else:
        target: Any = description
        *keys, last = change.split("/")
        for key in keys:
            target = target[int(key) if key.isdigit() else key]
        target[last] = 7 if isinstance(target[last], int | float) else []
        file.write_text(json.dumps(description))


@pytest.mark.parametrize(
    "change,sentence",
    [
        ("missing", "write it with"),
        ("cut", "no valid JSON"),
        ("weights cut", "truncated"),
        ("mlp/size", "the model's sizes ask for"),
        ("model/norm_kind", "no kind of norm"),
        ("model/layer_count", "lacks layers"),
        ("ropes/0/frequencies", "too short"),
        ("formats/0/bits", "have not the sizes"),
        ("weights/0/pieces", "contradicts itself"),
        ("version", "another version"),
        ("files", "lack the tensor"),
    ],
)
def test_damaged_folders_are_refused_in_a_sentence(change: str, sentence: str, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "folder"
    shutil.copytree(saved, path)
    damage(path, change)
    with pytest.raises(LowbitError, match=sentence):
        Folder(path)


def test_arguments_out_of_range_are_refused(folder: Folder) -> None:
    for prompt, most, sentence in (
        ([], 4, "prompt is empty"),
        ([1], 0, "no tokens"),
        ([1] * 256, 4, "leaves no room"),
        ([9999], 4, "outside"),
    ):
        with pytest.raises(LowbitError, match=sentence):
            folder.answer(prompt, most)
    with pytest.raises(LowbitError, match="no valid UTF-8"):
        folder._tokens("encode", b"a\xff", L(2), 0)


def compiled(source: Path, target: Path) -> Path:
    """A program of a user, built as the example's first lines say."""
    library_folder = Path(str(library_path())).parent
    flags = [
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{SOURCES}",
        f"-L{library_folder}",
        f"-Wl,-rpath,{library_folder}",
    ]
    subprocess.run(["g++", *flags, str(source), "-o", str(target), "-llowbit"], check=True)
    return target


def chat(program: Path, *arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *arguments], input=typed, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_example_chats(saved: Path, tmp_path: Path) -> None:
    program = compiled(ROOT / "examples/cpp/chat.cpp", tmp_path / "chat")
    model = load(saved)
    one = chat(program, str(saved), "--prompt", PROMPT, "--greedy", "--max-new-tokens", "24")
    assert one.stdout == model.chat(PROMPT, max_new_tokens=24, temperature=0.0).text + "\n" and one.returncode == 0
    talk = chat(
        program, str(saved), "--system", "Be brief.", "--greedy", "--max-new-tokens", "8", typed="Hello\nAnd now?\n\n"
    )
    messages = [{"role": "system", "content": "Be brief."}]
    for line in ("Hello", "And now?"):
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": model.chat(messages, max_new_tokens=8, temperature=0.0).text})
    assert talk.stdout == "> {}\n> {}\n> ".format(*(m["content"] for m in messages if m["role"] == "assistant"))
    assert "usage: chat" in chat(program).stderr and chat(program, "/nowhere").returncode == 1
    lines = (ROOT / "examples/cpp/chat.cpp").read_text().count("\n")
    assert lines < 150


@pytest.mark.slow
def test_a_real_model_answers_the_same(tmp_path: Path) -> None:
    path = tmp_path / "smol"
    assert main(["quantize", str(model_path()), str(path)]) == 0
    cutter, face = load(path).tokenizer, Folder(path)
    for text in [*TEXTS, (ROOT / "README.md").read_text(encoding="utf-8")]:
        assert face.encode(text, around=True) == cutter.encode(text), text
    face.close()
    assert_same_answer(path, 60)
