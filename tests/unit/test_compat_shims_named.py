"""Each row of the table of shims is named once, at the line of the script that uses it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lowbit.compat import ignored
from lowbit.compat.shims import SHIMS
from lowbit.compat.shims.gone import added_names
from lowbit_assets import reference_model
from unit import test_compat_shims
from unit.checkpoint_cases import IDS
from unit.test_compat_shims import FEATURES, folder, old_world, t5, whisper

__all__ = ["folder", "old_world"]  # fixtures
pytestmark = test_compat_shims.pytestmark


@dataclass(frozen=True)
class Old:
    """What an old call of a row may use."""

    folder: Path
    tmp: Path

    def model(self, kind: Any = transformers.AutoModelForCausalLM) -> Any:
        return kind.from_pretrained(self.folder, dtype=torch.float32)

    def pairs(self) -> Any:
        past = self.model()(IDS[:, :4], use_cache=True).past_key_values
        return tuple((layer.keys, layer.values) for layer in past.layers)

    def arguments(self, **given: Any) -> Any:
        return transformers.TrainingArguments(output_dir=str(self.tmp), use_cpu=True, report_to="none", **given)

    def parsed(self) -> Any:
        flags = ["--output_dir", str(self.tmp), "--save_safetensors", "True", "--use_cpu"]
        return transformers.HfArgumentParser(transformers.TrainingArguments).parse_args_into_dataclasses(flags)

    def tokenizer(self) -> Any:
        return transformers.AutoTokenizer.from_pretrained(self.folder)

    def trainer(self) -> Any:
        return transformers.Trainer(model=self.model(), args=self.arguments(), tokenizer=self.tokenizer())

    def answers(self) -> Any:
        found = transformers.LlamaForQuestionAnswering.from_pretrained(self.folder)
        return transformers.pipeline("question-answering", model=found, tokenizer=self.tokenizer())

    def in8bit(self) -> Any:
        import peft

        loaded = transformers.AutoModelForCausalLM.from_pretrained(self.folder, load_in_8bit=True)
        return peft.prepare_model_for_int8_training(loaded)


# The old call of each row, and the word by which it is named; a row without a word answers a library and not the script.
# Rows are called as what they replace is, and as their modules where names are all that is added.
SAID: dict[str, tuple[str, Callable[[Old], object]]] = {
    "training_arguments": ("save_safetensors", lambda old: old.arguments(save_safetensors=True)),
    "argument_parser": ("--save_safetensors", Old.parsed),
    "trainer": ("Trainer(tokenizer=)", Old.trainer),
    "llama_tokenizer": (
        "LlamaTokenizer.from_pretrained",
        lambda old: transformers.LlamaTokenizer.from_pretrained(reference_model("plain")),
    ),
    "chat_template": (
        "apply_chat_template",
        lambda old: old.tokenizer().apply_chat_template([{"role": "user", "content": "a"}]),
    ),
    "from_pretrained": (
        "resume_download",
        lambda old: transformers.AutoModelForCausalLM.from_pretrained(old.folder, resume_download=True),
    ),
    "old_caches": ("from_legacy_cache", lambda old: transformers.DynamicCache.from_legacy_cache(old.pairs())),
    "tuples_to_models": ("past_key_values=(...)", lambda old: old.model()(IDS[:, 4:5], past_key_values=old.pairs())),
    "tuples_to_generate": (
        "past_key_values=(...)",
        lambda old: old.model().generate(IDS[:, :5], past_key_values=old.pairs(), max_new_tokens=1),
    ),
    "forced_tokens": (
        "forced_decoder_ids",
        lambda old: t5(20).generate(IDS[:, :5], forced_decoder_ids=[(1, 7)], max_new_tokens=1),
    ),
    "forced_tokens_of_whisper": (
        "forced_decoder_ids",
        lambda old: whisper().generate(FEATURES, forced_decoder_ids=[(1, 7)], max_new_tokens=1),
    ),
    "removed_tasks": ("pipeline('question-answering')", Old.answers),
    "lazy_names": ("AutoModelForVision2Seq", lambda old: transformers.AutoModelForVision2Seq),
    "transformers.optimization": (
        "optimization.AdamW",
        lambda old: importlib.import_module("transformers.optimization").AdamW,
    ),
    "transformers.models.llama.modeling_llama": (
        "LlamaSdpaAttention",
        lambda old: importlib.import_module("transformers.models.llama.modeling_llama").LlamaSdpaAttention,
    ),
    "words_of_old": ("encode_plus", lambda old: old.tokenizer().encode_plus("a")),
    "transformers.generation.utils": (
        "SampleDecoderOnlyOutput",
        lambda old: importlib.import_module("transformers.generation.utils").SampleDecoderOnlyOutput,
    ),
    "transformers.generation.logits_process": (
        "LogitsWarper",
        lambda old: importlib.import_module("transformers.generation.logits_process").LogitsWarper,
    ),
    "transformers.utils": ("send_example_telemetry", lambda old: transformers.utils.send_example_telemetry),
    "transformers.modeling_utils": ("no_init_weights", lambda old: transformers.modeling_utils.no_init_weights),
    "peft_names": ("prepare_model_for_int8_training", Old.in8bit),
    "no_neural_compressor": ("", lambda old: importlib.import_module("peft.import_utils").is_inc_available()),
}


@pytest.mark.parametrize("row", SAID)
def test_each_row_is_named_once_when_it_is_used(row: str, folder: Path, tmp_path: Path) -> None:
    word, call = SAID[row]
    if row in ("peft_names", "no_neural_compressor"):
        pytest.importorskip("peft")
    assert not ignored._SAID
    call(Old(folder, tmp_path))
    said = set(ignored._SAID)
    assert [word in text for text in said].count(True) == (1 if word else 0)
    call(Old(folder, tmp_path))
    assert said == ignored._SAID


def test_each_row_has_its_reason_and_its_test() -> None:
    tests = vars(test_compat_shims)
    here = {f"tests/unit/test_compat_shims.py::{name}" for name in tests if name.startswith("test_")}
    for shim in SHIMS:
        assert shim.reason and shim.test in here, shim.old
    assert len({shim.old for shim in SHIMS}) == len(SHIMS)
    assert {shim.module if shim.changes is added_names else shim.changes.__name__ for shim in SHIMS} == set(SAID)


def test_undo_gives_todays_libraries_back() -> None:
    script = """
import importlib, lowbit.compat, transformers
from transformers.models.llama import modeling_llama
owners = [transformers.Trainer, transformers.DynamicCache, transformers.PreTrainedModel, transformers.GenerationMixin,
    transformers.TrainingArguments, transformers.PreTrainedTokenizerBase, modeling_llama,
    importlib.import_module("transformers.optimization"), importlib.import_module("transformers.pipelines")]
one = transformers.TrainingArguments.__new__
def state():
    return [{name: value for name, value in vars(owner).items() if name != "__new__"} for owner in owners]
before = state()
installed = lowbit.compat.install(children=False)
changed = [now != then for now, then in zip(state(), before)]
transformers.AutoModelForVision2Seq, modeling_llama.LlamaSdpaAttention, importlib.import_module("transformers.deepspeed")
installed.undo()
print(changed.count(True), [now == then for now, then in zip(state(), before)].count(False))
for module, name in ((transformers, "AutoModelForVision2Seq"), (modeling_llama, "LlamaSdpaAttention")):
    print(hasattr(module, name))
try:
    importlib.import_module("transformers.deepspeed")
except ModuleNotFoundError:
    print("gone")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["8", "0", "False", "False", "gone"], done.stdout + done.stderr[-2000:]
