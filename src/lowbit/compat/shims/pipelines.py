"""Pipelines that transformers took away: text to text (also summaries and translations), and answers found in a text."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from lowbit.compat.replacing import Replacement
from lowbit.compat.shims.shim import say

TRANSLATION = "translation"
# What each task calls its result.
RESULTS = {"text2text-generation": "generated_text", "summarization": "summary_text", TRANSLATION: "translation_text"}
ANSWERS = "question-answering"
LONGEST_ANSWER = 15


def removed_tasks(module: ModuleType) -> Iterator[Replacement]:
    """The tasks stand in the registry again; what transformers has itself stays."""
    registry = module.PIPELINE_REGISTRY
    missing = [task for task in (*RESULTS, ANSWERS) if task not in registry.supported_tasks]
    if not missing:
        return
    check = registry.check_task

    @functools.wraps(check)
    def check_task(task: str) -> Any:
        name = TRANSLATION if task.startswith(f"{TRANSLATION}_") else task
        if name in missing:
            say(f"pipeline({task!r})", "is gone; lowbit makes one that answers as it did")
            _enter(registry, name)
        return check(name)

    removed = getattr(module, "REMOVED_TASKS", {})
    yield Replacement(module, "REMOVED_TASKS", {task: why for task, why in removed.items() if task not in missing})
    yield Replacement(registry, "supported_tasks", dict(registry.supported_tasks))
    yield Replacement(registry, "check_task", check_task)


def _enter(registry: Any, task: str) -> None:
    """Their classes are made when one is asked for: the base class imports half of transformers."""
    if task in registry.supported_tasks:
        return
    from transformers import AutoModelForQuestionAnswering, AutoModelForSeq2SeqLM

    answers = task == ANSWERS
    registry.supported_tasks[task] = {
        "impl": answering_class() if answers else text_to_text_class(RESULTS[task]),
        "pt": (AutoModelForQuestionAnswering if answers else AutoModelForSeq2SeqLM,),
        "default": {},
        "type": "text",
    }


def text_to_text_class(result: str) -> type:
    """A pipeline that writes a text for each text; `result` names it in the answer."""
    from transformers import Pipeline

    class TextToTextPipeline(Pipeline):  # type: ignore[misc]
        _load_tokenizer = True
        _load_processor = _load_image_processor = _load_feature_extractor = False

        def _sanitize_parameters(self, truncation: Any = None, **generating: Any) -> Any:
            return {} if truncation is None else {"truncation": truncation}, generating, {}

        def preprocess(self, text: str, **options: Any) -> Any:
            prefix = getattr(self.model.config, "prefix", None) or ""
            return self.tokenizer(prefix + text, return_tensors="pt", **options)

        def _forward(self, inputs: Any, **generating: Any) -> Any:
            wanted = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
            return self.model.generate(**wanted, **generating)

        def postprocess(self, ids: Any) -> list[dict[str, str]]:
            return [{result: self.tokenizer.decode(row, skip_special_tokens=True)} for row in ids]

        def __call__(self, *texts: Any, **options: Any) -> Any:
            found = super().__call__(*texts, **options)
            return [row for (row,) in found] if found and isinstance(found[0], list) else found

    return TextToTextPipeline


def answering_class() -> type:
    """A pipeline that finds the answer to a question in a text."""
    from transformers import Pipeline

    class AnsweringPipeline(Pipeline):  # type: ignore[misc]
        _load_tokenizer = True
        _load_processor = _load_image_processor = _load_feature_extractor = False

        def _sanitize_parameters(self, max_answer_len: int = LONGEST_ANSWER, **_: Any) -> Any:
            return {}, {}, {"longest": max_answer_len}

        def preprocess(self, asked: dict[str, str]) -> Any:
            encoded = self.tokenizer(
                asked["question"],
                asked["context"],
                truncation="only_second",
                return_tensors="pt",
                return_offsets_mapping=True,
            )
            places = encoded.pop("offset_mapping")[0]
            of_text = [part == 1 for part in encoded.sequence_ids(0)]
            return {"inputs": dict(encoded), "places": places, "of_text": of_text, "context": asked["context"]}

        def _forward(self, asked: dict[str, Any]) -> Any:
            found = self.model(**asked["inputs"])
            return asked | {"start": found.start_logits[0], "end": found.end_logits[0]}

        def postprocess(self, found: dict[str, Any], longest: int = LONGEST_ANSWER) -> dict[str, Any]:
            import torch

            outside = ~torch.tensor(found["of_text"])
            start, end = (found[side].masked_fill(outside, -torch.inf).float().softmax(0) for side in ("start", "end"))
            # Of all pairs of a first and a last token, in their order and not too far apart, the likeliest.
            likely = torch.triu(start[:, None] * end[None, :]).tril(longest - 1)
            first, last = divmod(int(likely.argmax()), len(end))
            begins, ends = int(found["places"][first][0]), int(found["places"][last][1])
            text = found["context"][begins:ends]
            return {"score": float(likely.max()), "start": begins, "end": ends, "answer": text}

        def __call__(self, *asked: Any, question: Any = None, context: Any = None, **options: Any) -> Any:
            if question is None:
                return super().__call__(*asked, **options)
            if isinstance(question, str):
                return super().__call__({"question": question, "context": context}, **options)
            texts = [context] * len(question) if isinstance(context, str) else context
            pairs = [{"question": one, "context": text} for one, text in zip(question, texts, strict=True)]
            return super().__call__(pairs, **options)

    return AnsweringPipeline
