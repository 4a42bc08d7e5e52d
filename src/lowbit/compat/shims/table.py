"""The table of shims, and how it is applied and taken back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

from lowbit import hook
from lowbit.compat.replacing import Replacements
from lowbit.compat.shims import caches, generating, gone, loading, pipelines, tokenizers, trainer
from lowbit.compat.shims.shim import Shim

_TESTS = "tests/unit/test_compat_shims.py::"


def _row(old: str, reason: str, module: str, changes: Callable[..., object], test: str) -> Shim:
    return Shim(old, reason, module, changes, _TESTS + test)  # type: ignore[arg-type]


SHIMS = (
    _row(
        "TrainingArguments(...), of old",
        "arguments were renamed and taken away",
        "transformers.training_args",
        trainer.training_arguments,
        "test_training_arguments",
    ),
    _row(
        "HfArgumentParser on a command line of old",
        "arguments were renamed and taken away",
        "transformers.hf_argparser",
        trainer.argument_parser,
        "test_arguments_on_a_command_line",
    ),
    _row(
        "Trainer(tokenizer=), trainer.tokenizer, compute_loss(self, model, inputs, return_outputs)",
        "the tokenizer is processing_class today, and compute_loss is given one argument more",
        "transformers.trainer",
        trainer.trainer,
        "test_trainer_with_a_tokenizer",
    ),
    _row(
        "LlamaTokenizer.from_pretrained",
        "today it splits any vocabulary as Llama 2's, and loses the spaces of others",
        "transformers.models.llama.tokenization_llama",
        tokenizers.llama_tokenizer,
        "test_llama_tokenizer_on_another_tokenizer",
    ),
    _row(
        "apply_chat_template(...)",
        "returns a dictionary today where it returned tokens",
        "transformers.tokenization_utils_base",
        tokenizers.chat_template,
        "test_chat_template_gives_tokens",
    ),
    _row(
        "from_pretrained(load_in_4bit=, load_in_8bit=, BitsAndBytesConfig, use_auth_token=, torchscript=, ...)",
        "keywords were taken away; lowbit packs what bitsandbytes would have, where that is not installed",
        "transformers.modeling_utils",
        loading.from_pretrained,
        "test_keywords_of_loading",
    ),
    _row(
        "past_key_values[...], to_legacy_cache, from_legacy_cache, get_usable_length, key_cache, value_cache",
        "a cache is an object today where it was a tuple of pairs",
        "transformers.cache_utils",
        caches.old_caches,
        "test_caches_as_tuples",
    ),
    _row(
        "model(past_key_values=(...))",
        "a cache is an object today where it was a tuple of pairs",
        "transformers.modeling_utils",
        caches.tuples_to_models,
        "test_caches_as_tuples",
    ),
    _row(
        "model.generate(past_key_values=(...))",
        "a cache is an object today where it was a tuple of pairs",
        "transformers.generation.utils",
        caches.tuples_to_generate,
        "test_caches_as_tuples",
    ),
    _row(
        "model.generate(forced_decoder_ids=)",
        "an answer is begun with decoder_input_ids today",
        "transformers.generation.utils",
        generating.forced_tokens,
        "test_tokens_that_are_forced",
    ),
    _row(
        "generate(forced_decoder_ids=) of Whisper",
        "it is read from a generation configuration today",
        "transformers.models.whisper.generation_whisper",
        generating.forced_tokens_of_whisper,
        "test_tokens_that_are_forced_on_whisper",
    ),
    _row(
        "pipeline(text2text-generation | summarization | translation | question-answering)",
        "these tasks were taken away",
        "transformers.pipelines",
        pipelines.removed_tasks,
        "test_pipelines_that_are_gone",
    ),
    _row(
        "tokenizer.encode_plus, batch_encode_plus, as_target_tokenizer, additional_special_tokens",
        "a tokenizer is called today, and its special tokens have another name",
        "transformers.tokenization_utils_base",
        tokenizers.words_of_old,
        "test_words_of_tokenizers_that_are_gone",
    ),
    _row(
        "transformers.AdamW, AutoModelForVision2Seq, AutoModelWithLMHead, CLIPFeatureExtractor (and its like), ...",
        "are elsewhere today",
        "transformers.utils.import_utils",
        gone.lazy_names,
        "test_names_that_are_elsewhere",
    ),
    _row(
        "transformers.optimization.AdamW",
        "is torch's today",
        "transformers.optimization",
        gone.added_names,
        "test_names_that_are_elsewhere",
    ),
    _row(
        "transformers.models.llama.modeling_llama.LlamaSdpaAttention, LlamaFlashAttention2",
        "there is one class of attention today",
        "transformers.models.llama.modeling_llama",
        gone.added_names,
        "test_names_that_are_elsewhere",
    ),
    _row(
        "transformers.generation.utils.GreedySearchDecoderOnlyOutput, and its like",
        "there is one class for each kind of answer today",
        "transformers.generation.utils",
        gone.added_names,
        "test_names_that_are_elsewhere",
    ),
    _row(
        "transformers.generation.logits_process.LogitsWarper",
        "is LogitsProcessor today",
        "transformers.generation.logits_process",
        gone.added_names,
        "test_names_that_are_elsewhere",
    ),
    _row(
        "transformers.utils.send_example_telemetry, get_full_repo_name, is_ipex_available, is_tf_available, ...",
        "were taken away",
        "transformers.utils",
        gone.added_names,
        "test_names_that_are_elsewhere",
    ),
    _row(
        "transformers.modeling_utils.no_init_weights",
        "is elsewhere today",
        "transformers.modeling_utils",
        gone.added_names,
        "test_names_that_are_elsewhere",
    ),
    _row(
        "peft.prepare_model_for_int8_training",
        "is prepare_model_for_kbit_training today",
        "peft",
        gone.peft_names,
        "test_names_of_peft",
    ),
    _row(
        "peft's search for neural_compressor's layers",
        "lowbit answers that package's name and has none of these layers",
        "peft.import_utils",
        gone.no_neural_compressor,
        "test_names_of_peft",
    ),
)


class Applied:
    """The rows of the table, waiting or applied."""

    def __init__(self, done: Replacements) -> None:
        self.done = done
        self.finder = gone.MovedFinder()
        self.waiting: list[tuple[str, Callable[[ModuleType], None]]] = []

    def begin(self) -> None:
        # Last of all finders: a transformers that still has the module answers first.
        sys.meta_path.append(self.finder)
        for shim in SHIMS:
            action = self._action(shim)
            self.waiting.append((shim.module, action))
            hook.when_imported(shim.module, action)

    def _action(self, shim: Shim) -> Callable[[ModuleType], None]:
        return lambda module: self.done.make(shim.changes(module))

    def stop_waiting(self) -> None:
        sys.meta_path.remove(self.finder)
        for module, action in self.waiting:
            hook.no_longer_when_imported(module, action)
        for old, held in list(sys.modules.items()):
            now = gone.moved_module(old)
            if now is not None and held is not None and held is sys.modules.get(now):
                del sys.modules[old]
