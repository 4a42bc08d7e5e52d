"""Two threads that ask one model for text: each gets the text that it would get alone."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers

from cpu.test_bridge import IDS, packed_model
from lowbit.errors import LowbitError

pytestmark = pytest.mark.transformers


class Yielding(transformers.generation.streamers.BaseStreamer):
    """Takes tokens, and lets another thread go on after each."""

    def put(self, value: Any) -> None:
        time.sleep(0.001)

    def end(self) -> None: ...


def test_two_threads_do_not_mix_their_texts() -> None:
    """The longer prompt needs a larger engine, which takes the place of the one that the other thread began with."""
    model = packed_model()
    prompts = [IDS, torch.arange(3, 603).view(1, -1) % 60 + 2]
    alone = [packed_model().generate(ids, max_new_tokens=12, do_sample=False) for ids in prompts]
    together = threading.Barrier(len(prompts))

    def answer(ids: torch.Tensor) -> list[torch.Tensor]:
        together.wait()
        return [model.generate(ids, max_new_tokens=12, do_sample=False, streamer=Yielding()) for _ in range(6)]

    with ThreadPoolExecutor(len(prompts)) as pool:
        found = list(pool.map(answer, prompts))
    assert all(torch.equal(text, alone[i]) for i, texts in enumerate(found) for text in texts)


def test_a_stream_that_nobody_reads_on_leaves_the_model_usable() -> None:
    model = packed_model()
    expected = packed_model().generate(IDS, max_new_tokens=12, do_sample=False)
    begun = threading.Event()

    class Dropped(Yielding):
        def put(self, value: Any) -> None:
            begun.set()
            super().put(value)

    thread = threading.Thread(
        target=model.generate, args=(IDS + 1,), kwargs={"max_new_tokens": 40, "do_sample": False, "streamer": Dropped()}
    )
    thread.start()
    assert begun.wait(60)
    assert torch.equal(model.generate(IDS, max_new_tokens=12, do_sample=False), expected)
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("wrong", [1 << 20, -1])
def test_ids_that_are_no_tokens_are_said(wrong: int) -> None:
    model = packed_model()
    expected = model.generate(IDS, max_new_tokens=4, do_sample=False)
    with pytest.raises(LowbitError, match="vocabulary"):
        model.generate(torch.tensor([[5, wrong]]), max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), expected)
