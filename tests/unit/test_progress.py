"""Bars: none for quick work, one for long work, and one only, lowbit's, while transformers loads."""

import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.progress import Progress, TaskID
from transformers.utils import logging as transformers_logging

import lowbit
from lowbit.blockwise import Where
from lowbit.calibration import Calibration
from lowbit.checkpoint.loading_bar import weights_bar
from lowbit.cli import OK, main
from lowbit.models.walk import find_targets
from lowbit.options import AutoRoundOptions
from lowbit.progress import PATIENCE_SECONDS, Pace, _Bar, clock_text, counted, progress
from lowbit.quantize import quantize_
from lowbit.recipe import recipe_named
from lowbit_assets import tiny_model_in_memory
from unit.checkpoint_cases import EVEN, make


@pytest.fixture(autouse=True)
def bars_are_wanted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A terminal that can draw, whatever this run has, and transformers' bars on, which commands of other tests switch off."""
    monkeypatch.setenv("TERM", "xterm")
    wanted = transformers_logging.is_progress_bar_enabled()
    transformers_logging.enable_progress_bar()
    yield
    if not wanted:
        transformers_logging.disable_progress_bar()


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def terminal() -> Iterator[Terminal]:
    with contextlib.redirect_stderr(Terminal()) as stream:
        yield stream


def wait_for(text: str, stream: Terminal) -> None:
    """Until a text is drawn; a bar that never comes ends the test."""
    end = time.monotonic() + 60
    while text not in stream.getvalue():
        assert time.monotonic() < end, f"{text} is not in {stream.getvalue()[-200:]!r}"
        time.sleep(0.01)


def test_quick_work_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PATIENCE_SECONDS >= 1
    monkeypatch.setattr("lowbit.progress.PATIENCE_SECONDS", 3600)  # on a busy machine anything may take two seconds
    with terminal() as stream, progress("packing", 3) as advance:
        for name in "abc":
            advance(name)
    assert stream.getvalue() == ""


def test_bar_appears_by_itself_in_the_middle_of_the_first_step() -> None:
    with terminal() as stream, progress("packing", 3, patience=0.01) as advance:
        wait_for("0/3", stream)
        advance("first")
        wait_for("1/3", stream)
        wait_for("first", stream)
        assert "packing" in stream.getvalue()


def test_the_time_left_of_steps_that_take_minutes() -> None:
    """From all steps so far, however long each of them takes, and without those that were there at the start."""
    pace = Pace(10, now=1000.0)
    assert pace.left(1100.0) is None and clock_text(None) == "-:--:--"
    for place in range(4):
        pace.step(1100.0 + place / 1000, ready=True)
    assert pace.left(1101.0) is None
    start = pace.last
    pace.step(start + 300)
    assert pace.left(start + 300) == pytest.approx(5 * 300)
    assert pace.left(start + 400) == pytest.approx(5 * 300 - 100)
    pace.step(start + 900)
    assert pace.left(start + 900) == pytest.approx(4 * 450) and clock_text(1800.4) == "0:30:00"
    assert pace.left(start + 10**6) == 0 and clock_text(5 * 3600 + 61) == "5:01:01"
    assert Pace(None, 0.0).left(1.0) is None


def test_the_time_left_of_steps_that_end_together() -> None:
    """A block of seven weights whose tuning takes minutes: half of it says how long all of them will take."""
    pace = Pace(14, now=0.0)
    pace.work(0.0, 5.0)
    assert pace.left(5.0) is None
    pace.work(3.5, 60.0)
    assert pace.left(60.0) == pytest.approx(180)
    pace.work(7.0, 120.0)
    left = []
    for _ in range(7):
        pace.step(120.0)
        left.append(pace.left(120.0))
    assert left == pytest.approx([120.0] * 7) and (pace.done, pace.part) == (7, 0)


@pytest.mark.parametrize(
    ("family", "words", "shown"),
    [
        ("llama", ["--algorithm", "autoround", "--algorithm-option", "iterations=3"], ["layers.0: autoround 2 of 3"]),
        ("llama", ["--scaler", "teq", "--scaler-option", "steps=3"], ["layers.1: teq 3 of 3"]),
        (
            "llama",
            ["--scaler", "awq", "--algorithm", "gptq"],
            ["layers.1: awq, group 3 of 4", "o_proj without a scale"],
        ),
        ("qwen3_moe", ["--algorithm", "gptq"], ["layers.1: mlp.experts, 8 of 8"]),
    ],
)
def test_long_work_inside_a_block_shows_how_far_it_is(
    family: str, words: list[str], shown: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(family, tmp_path / "dense", **(EVEN if family == "llama" else {}))
    monkeypatch.setattr("lowbit.progress.PATIENCE_SECONDS", 0)
    monkeypatch.setenv("COLUMNS", "160")
    seen: list[str] = []
    draw = Progress.update

    def noting(self: Progress, task: TaskID, **fields: Any) -> None:
        seen.append(fields["what"])
        draw(self, task, **fields)

    monkeypatch.setattr(Progress, "update", noting)
    given = ["--calibration", "sqlite_valid", "--samples", "2", "--length", "16"]
    with terminal() as stream:
        assert main(["quantize", str(tmp_path / "dense"), str(tmp_path / "low"), *words, *given]) == OK
    assert "cutting sqlite_valid into tokens" in stream.getvalue()
    assert [text for text in shown if not any(text in one for one in seen)] == []


def test_the_time_left_is_drawn() -> None:
    with terminal() as stream, progress("packing", 3, patience=0.01) as advance:
        wait_for("-:--:--", stream)
        advance("first")
        wait_for("1/3\x1b[0m \x1b[36m0:00:0", stream)  # its column, in cyan


def test_work_without_steps_shows_that_it_goes_on() -> None:
    with terminal() as stream, progress("starting torch", patience=0.01):
        wait_for("starting torch", stream)
        wait_for("0:00:0", stream)


def test_a_still_bar_moves_with_the_steps_alone() -> None:
    before = set(threading.enumerate())  # the timer of an earlier bar may still be ending
    with terminal() as stream, progress("timing", 3, still=True) as advance:
        assert "0/3" in stream.getvalue()
        advance("warm")
        assert "1/3" in stream.getvalue() and "warm" in stream.getvalue()
        assert set(threading.enumerate()) <= before


def test_a_bar_that_comes_too_late_is_not_drawn() -> None:
    with terminal() as stream:
        bar = _Bar("packing", 3, patience=3600)
        bar.close()
        bar._draw()
        assert stream.getvalue() == "" and bar.stop is None


def test_no_bar_where_nobody_looks_or_wants_one() -> None:
    with contextlib.redirect_stderr(io.StringIO()) as file:
        assert list(counted("abc", "packing", patience=0)) == list("abc")
    with terminal() as stream:
        assert list(counted("abc", "packing", show=False, patience=0)) == list("abc")
    assert file.getvalue() == stream.getvalue() == ""


@pytest.mark.parametrize(
    ("family", "rounder", "scaler", "in_blocks", "most"),
    # Weights of a block that are tuned together end together; the first time of two is half of them.
    [
        ("llama", "gptq", "awq", 14, 3.5),
        ("llama", "autoround", "", 14, 7),
        ("llama", "rtn", "smoothquant", 14, 0),
        ("qwen3_moe", "autoround", "awq", 10, 5),
    ],
)
def test_a_calibrated_run_takes_one_step_for_each_weight(
    family: str,
    rounder: str,
    scaler: str,
    in_blocks: int,
    most: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where a block is rounded twice, or all at once; what an earlier run has finished was ready at the start."""
    steps: list[tuple[str, bool]] = []
    totals: list[int] = []
    parts: list[float] = []

    @contextlib.contextmanager
    def counting(label: str, total: int, show: bool | None = None) -> Iterator[Callable[..., None]]:
        totals.append(total)
        pace = Pace(total, now=0.0)
        with progress(label, total, show) as advance:

            def step(name: str, ready: bool = False, part: float | None = None) -> None:
                before = pace.done + pace.part
                if part is None:
                    steps.append((name, ready))
                    pace.step(0.0, ready)
                else:
                    parts.append(part)
                    pace.work(part, 0.0)
                assert before <= pace.done + pace.part <= total, "what was done is done"
                advance(name, ready, part)

            yield step

    monkeypatch.setattr("lowbit.quantize.progress", counting)
    options = AutoRoundOptions(iterations=2) if rounder == "autoround" else None
    recipe = recipe_named("int4_g32").replace(rounder=rounder, scaler=scaler, head=None)
    recipe = recipe.replace(rounder_options=options) if options else recipe
    tokens = Calibration(torch.randint(3, 280, (2, 16), generator=torch.Generator().manual_seed(0)))
    for before in (0, in_blocks):  # low-bit modules that lie in the folder
        steps.clear()
        model = tiny_model_in_memory(family)
        paths = [target.path for target in find_targets(model)]
        quantize_(model, recipe, calibration=tokens, where=Where(resume=tmp_path / "run"))
        assert sorted(name for name, _ in steps) == sorted(paths) and totals[-1] == len(paths)
        assert sum(ready for _, ready in steps) == before
    assert max(parts) == most


def commands(folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    """For each command that may take long: its arguments, and what it shows while it works."""
    (folder / "text.txt").write_text("Call me Ishmael. " * 20)
    dense, low, text = str(folder / "dense"), str(folder / "low"), str(folder / "text.txt")
    answer = ["--prompt", "Hi", "--max-new-tokens", "2"]
    return {
        "quantize": (["quantize", dense, low], ["starting torch", "packing", "saving"]),
        "generate": (["generate", low, *answer], ["loading", "reading"]),
        "generate, packing": (["generate", dense, "--format", "int4", *answer], ["packing", "reading"]),
        "generate, in torch": (["generate", dense, *answer], ["starting torch", "loading", "reading"]),
        "chat": (["chat", low, "--max-new-tokens", "2"], ["loading", "reading"]),
        "evaluate": (["evaluate", low, "--text", text, "--against", dense], ["starting torch", "loading", "comparing"]),
        "bench": (["bench", low, "--new-tokens", "2", "--rounds", "1", "--profile"], ["timing", "1/2", "profiling"]),
    }


@pytest.mark.transformers
def test_every_long_step_of_a_command_shows_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("llama", tmp_path / "dense", **EVEN)
    monkeypatch.setattr("lowbit.progress.PATIENCE_SECONDS", 0)
    for name, (words, shown) in commands(tmp_path).items():
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
        with terminal() as stream:
            assert main(words) == OK, stream.getvalue()[-400:]
        assert [label for label in shown if label not in stream.getvalue()] == [], name


hooked = pytest.mark.skipif(
    not hasattr(transformers.utils.logging, "set_tqdm_hook"), reason="this transformers lets nobody else make its bars"
)


@hooked
@pytest.mark.transformers
def test_loading_shows_no_bar_of_transformers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A quick load is silent, by lowbit's class and by transformers', packed on the way in or packed already."""
    folder = make("llama", tmp_path / "dense", **EVEN)
    transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert "Loading weights" in capfd.readouterr().err  # what it looks like without lowbit
    model = lowbit.AutoModelForCausalLM.from_pretrained(folder, load_in_4bit=True)
    model.save_low_bit(tmp_path / "low")
    model.save_pretrained(tmp_path / "plain")
    lowbit.AutoModelForCausalLM.load_low_bit(tmp_path / "low")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "low")
    assert capfd.readouterr().err == ""
    transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert "Loading weights" in capfd.readouterr().err  # a load that is not lowbit's is as it was


@hooked
@pytest.mark.transformers
def test_hook_counts_the_weights_and_leaves_other_bars_alone() -> None:
    tqdm = transformers.utils.logging.tqdm
    with terminal() as stream, weights_bar("packing"):
        assert list(tqdm([1, 2], desc="Something else", disable=True)) == [1, 2]
        assert list(tqdm({"a": 1}.items(), desc="Loading weights")) == [("a", 1)]
        assert list(tqdm([1], desc="Loading weights", disable=True)) == [1]  # the hook has gone
    assert stream.getvalue() == ""


@hooked
@pytest.mark.transformers
def test_hook_is_gone_after_a_load_that_failed_and_a_users_own_hook_stays() -> None:
    logging = transformers.utils.logging
    with pytest.raises(KeyError), weights_bar("packing"):
        raise KeyError
    assert logging.set_tqdm_hook(None) is None

    def mine(factory: object, args: tuple, kwargs: dict) -> object:
        return list(args[0])

    logging.set_tqdm_hook(mine)
    with weights_bar("packing"):
        assert logging.tqdm([1, 2], desc="Loading weights") == [1, 2]
    assert logging.set_tqdm_hook(None) is mine
