"""What every command that runs a model stands on: text in pieces, streaming, sampling, a conversation, timings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from lowbit.bench import Timings, measure, percentile
from lowbit.cli.bench import prompt_of
from lowbit.cli.chat import Chat
from lowbit.cli.options import LoadOptions, Sampling
from lowbit.cli.session import Session, TextPieces
from lowbit.errors import LowbitError
from lowbit_assets import tiny_model

GREEDY = Sampling(12, temperature=0, ignore_end=True)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tiny_model("llama", tmp_path_factory.mktemp("tiny"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return Session(model.eval(), transformers.AutoTokenizer.from_pretrained(folder))


def test_pieces_are_whole_characters_and_add_up() -> None:
    text = "naïve — 雪 🙂 end"
    pieces = TextPieces(lambda tokens: bytes(tokens).decode(errors="replace"))
    came = [pieces.add(byte) for byte in text.encode()]
    assert "".join(came) + pieces.rest() == text
    assert "\ufffd" not in "".join(came)
    assert "🙂" in came


def test_pieces_held_back_come_at_the_end() -> None:
    pieces = TextPieces(lambda tokens: bytes(tokens).decode(errors="replace"))
    assert [pieces.add(byte) for byte in "🙂".encode()[:3]] == ["", "", ""]
    assert pieces.rest() == "\ufffd"


def test_a_stream_is_the_answer(session: Session) -> None:
    pieces: list[str] = []
    answer = session.generate(session.encode("Hello", raw=True), GREEDY, pieces.append)
    assert "".join(pieces) == answer.text
    assert (answer.prompt_tokens, answer.new_tokens) == (5, 12)
    assert list(answer.token_seconds) == sorted(answer.token_seconds)


def test_greedy_is_what_transformers_generates(session: Session) -> None:
    prompt = session.encode("Hello", raw=True)
    ids = session.model.dummy_inputs["input_ids"].new_tensor([prompt])
    expected = session.model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)[0, len(prompt) :]
    text = session.tokenizer.decode(expected, skip_special_tokens=True)
    assert session.generate(prompt, GREEDY).text == text


def test_seed_decides_what_is_drawn(session: Session) -> None:
    prompt = session.encode("Hello", raw=True)

    def draw(seed: int) -> str:
        return session.generate(prompt, Sampling(24, temperature=2.0, top_k=200, top_p=0.99, seed=seed)).text

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_prompts_go_through_the_chat_template(session: Session) -> None:
    tokens = session.encode("Hi", system="Be brief.")
    spoken = session.tokenizer.decode(tokens)
    assert spoken == "<bos>system: Be brief.<eos><bos>user: Hi<eos><bos>assistant: "
    assert session.encode("Hi", raw=True) == session.tokenizer("Hi")["input_ids"]


def test_a_prompt_without_room_is_refused(session: Session) -> None:
    with pytest.raises(LowbitError, match="the text has 128 tokens, and the model was made for 128"):
        session.generate([5] * 128, GREEDY)
    with pytest.raises(LowbitError, match="the prompt is empty"):
        session.generate([], GREEDY)


# --- chat ------------------------------------------------------------------------------------------------------------


def test_history_grows_and_resets(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    chat = Chat(session, Sampling(4, temperature=0), system="Brief.")
    assert chat.take("Hello") and chat.take("") and chat.take("More")
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert chat.take("/reset")
    assert chat.messages == [{"role": "system", "content": "Brief."}]
    assert not chat.take("/exit")
    capsys.readouterr()
    chat.take("/rest")
    assert "there is no /rest: did you mean /reset" in capsys.readouterr().err
    chat.take("/help")
    assert "/save FILE" in capsys.readouterr().err


def test_conversation_is_saved_as_json(session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = Chat(session, Sampling(4, temperature=0))
    chat.take("Grüße")
    chat.take(f"/save {tmp_path / 'chat.json'}")
    assert json.loads((tmp_path / "chat.json").read_text(encoding="utf-8")) == chat.messages
    chat.take(f"/save {tmp_path / 'absent' / 'chat.json'}")
    assert "was not written: No such file or directory" in capsys.readouterr().err
    chat.take("/save")
    assert "needs the name of a file" in capsys.readouterr().err


class InterruptedSession(Session):
    """A session whose user presses Ctrl-C once some text has come."""

    def generate(self, prompt, sampling, emit=None):  # type: ignore[no-untyped-def]
        def stop(piece: str) -> None:
            emit(piece)
            raise KeyboardInterrupt

        return super().generate(prompt, sampling, stop)


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(InterruptedSession(session.model, session.tokenizer), GREEDY)
    assert chat.take("Hello")
    captured = capsys.readouterr()
    assert "[stopped]" in captured.err
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]
    assert chat.messages[1]["content"] == captured.out.strip()
    assert chat.take("Again") and len(chat.messages) == 4


def test_a_message_without_room_is_said_and_forgotten(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    chat = Chat(session, Sampling(4, temperature=0))
    assert chat.take("long " * 40)
    assert "(/reset forgets what was said)" in capsys.readouterr().err
    assert chat.messages == []


# --- timings ---------------------------------------------------------------------------------------------------------


def test_timings_of_known_rounds() -> None:
    rounds = iter([[9.0, 99.0, 199.0], [1.0, 1.5, 2.5], [3.0, 3.25, 3.75], [2.0, 2.5, 3.5]])  # the first warms up
    seen: list[str] = []
    found = measure(lambda new_tokens: next(rounds), 10, 3, rounds=3, after_round=seen.append)
    assert seen == ["warm", "round 1 of 3", "round 2 of 3", "round 3 of 3"]
    assert (found.first_token, found.prompt_tokens_per_second) == (2.0, 5.0)
    gaps = [0.5, 1.0, 0.25, 0.5, 0.5, 1.0]
    assert found.later_mean == pytest.approx(sum(gaps) / 6)
    assert found.later_p90 == pytest.approx(1.0)
    assert found.tokens_per_second == pytest.approx(6 / sum(gaps))
    assert set(Timings.__dataclass_fields__) < set(found.to_dict())


def test_one_token_cannot_be_timed() -> None:
    with pytest.raises(ValueError, match="at least 2 tokens"):
        measure(lambda new_tokens: [1.0], 1, 1)


def test_percentiles_lie_between_their_neighbours() -> None:
    values = [4.0, 1.0, 3.0, 2.0, 5.0]
    assert [percentile(values, share) for share in (0, 0.5, 0.9, 1)] == pytest.approx([1, 3, 4.6, 5])


def test_peak_memory_remembers_what_was_let_go() -> None:
    program = (
        "from lowbit.bench import peak_memory\n"
        "before = peak_memory()\n"
        "block = b'x' * 64_000_000\n"
        "del block\n"
        "print(peak_memory() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert 60e6 < int(done.stdout) < 80e6


def test_a_prompt_of_any_length_is_made_from_some_tokens() -> None:
    assert prompt_of([1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]
    assert prompt_of([1, 2, 3], 2) == [1, 2]


def test_options_compare_by_value() -> None:
    assert LoadOptions() == LoadOptions(None, "auto", None, False, False)
