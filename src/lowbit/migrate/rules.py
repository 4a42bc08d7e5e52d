"""What an old name is in lowbit's own words, and what becomes of its arguments.

A rule stands for a class or a function. Names of BigDL-LLM are those of ipex-llm. A keyword that changes nothing any more is
dropped, one that has another name is renamed; one that asks for what only `lowbit.compat` does leaves the whole call as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import lowbit
import lowbit.openvino
from lowbit.compat.missing import refusal_of
from lowbit.compat.names import REFUSED, Name, collect
from lowbit.compat.shims.generating import FORCED
from lowbit.compat.shims.gone import GONE_MODULES, MOVED_MODULES, MOVED_NAMES
from lowbit.compat.shims.loading import KEYWORDS as LOADING_KEYWORDS
from lowbit.compat.shims.pipelines import ANSWERS, RESULTS
from lowbit.compat.shims.shim import Keyword
from lowbit.compat.shims.tokenizers import LLAMA_CLASSES
from lowbit.compat.shims.trainer import ARGUMENTS, VALUES
from lowbit.formats import CASTS, IQ_TYPES
from lowbit.migrate.rule import LOADING, Called, Decision, Guess, Rule

IPEX, IPEX_LLM, NEURAL_COMPRESSOR = "intel_extension_for_pytorch", "ipex_llm", "neural_compressor"
XPU = "xpu"
OPTIMUM, NNCF = ("optimum.intel", "optimum.exporters.openvino"), "nncf"
OLD_PLACES = (IPEX, IPEX_LLM, NEURAL_COMPRESSOR, "bigdl", NNCF, *OPTIMUM)
# What BigDL-LLM called ipex-llm.
OLDER = "bigdl.llm"


# Formats with which that library packed the embedding too.
BRINGING = ("q2_k", "gguf_q4k_s", "gguf_q4k_m", *IQ_TYPES)
# Every attribute of a class means the same.
ANY = ("*",)
# The value of a keyword that is no literal.
UNKNOWN = object()
_ONE_ENGINE = "there is one engine, and it runs what is low-bit"
_BLOCKS = "one block is in memory at a time in any case"
_KERNELS = "kernels are chosen per layer in any case"
COMPAT = "lowbit.compat does it"
NO_NAME = "lowbit has no name of its own for it, and lowbit.compat answers it"
_MAPPED = "weights stay mapped from their files until they are used"
_OPTIMIZE_DROP = {
    "lightweight_bmm": "attention is left to the model",
    "disable_optimize_pre": "there is no separate first pass to leave out",
}
_IPEX_LLM_DROP = _OPTIMIZE_DROP | {
    "optimize_model": _KERNELS,
    "disk_embedding": _MAPPED,
    "offload_folder": _MAPPED,
    "offload_state_dict": _MAPPED,
}
_IPEX_LLM_STAY = {
    "speculative": "a draft beside the model: " + COMPAT,
    "replace_embedding": "an older name of cpu_embedding",
    "model_hub": COMPAT,
    "pipeline_parallel_stages": COMPAT,
    "allow_pickle": "the old library's own files: " + COMPAT,
    "quantization_config": "that of bitsandbytes also says the type of the rest: " + COMPAT,
}
# What the models of ipex-llm know: words of `generate`, its figures, the methods; and what changes all that are loaded.
FIGURES = ("first_token_time", "n_token_generated", "n_drafted", "n_matched", "e2e_time_without_first")
DRAFTING = (
    "max_step_draft", "th_stop_draft", "auto_th_stop_draft", "auto_parameters", "min_step_draft", "hf_adjust", "th_batch_num",
)  # fmt: skip
_LOOKING = ("lookahead", "lookup_generate", "max_matching_ngram_size", "IPEX_LLM_PERFORMANCE_MODE")
GUESSES = (*FIGURES, *DRAFTING, *_LOOKING, "speculative_generate", "bigdl_transformers_low_bit", "llm_patch")
# What those of IPEX know.
TIMES = ("token_latency", "trace_graph")
# What older transformers and peft had, and only the runner's shims answer: keywords of any call, attributes of caches, names.
OLDER_KEYWORDS = frozenset((*LOADING_KEYWORDS, FORCED))
OLDER_ATTRIBUTES = frozenset((
    "to_legacy_cache", "from_legacy_cache", "get_usable_length", "key_cache", "value_cache",
    "encode_plus", "batch_encode_plus", "as_target_tokenizer", "additional_special_tokens", "additional_special_tokens_ids",
))  # fmt: skip
OLDER_NAMES = (
    "peft.prepare_model_for_int8_training",
    *(f"{home}.{name}" for (home, name), (now, _) in MOVED_NAMES.items() if now.startswith("lowbit.")),
)
OLDER_TASKS = (*RESULTS, ANSWERS)
OLDER_MODULES = (*MOVED_MODULES, *GONE_MODULES)
PIPELINE = "transformers.pipeline"
OF_OLD = "older transformers had it, and lowbit.compat answers it"
SEVERAL = "the script has this name from more than one place: " + "lowbit.compat does it"
WORDS = frozenset((*GUESSES, *TIMES))
# How much that library looked up where nothing was said.
_TOKENS, _LONGEST, _NEW_TOKENS = 10, 2, 10
AUTO_CLASSES = tuple(name for name in lowbit.__all__ if name.startswith("AutoModel"))
_CONFIGS = ("AutoRoundConfig", "AwqConfig", "GPTQConfig", "RtnConfig", "TeqConfig")


def _type(value: Any) -> Mapping[str, Any]:
    return {} if value == "auto" else {"torch_dtype": value}


def _format(value: Any) -> Mapping[str, Any]:
    """A format that brings nothing with it; what is computed by the script may be any."""
    if value is not None and (not isinstance(value, str) or value in (*CASTS, *BRINGING)):
        raise ValueError(value)
    return {"load_in_low_bit": value}


_OPTIMIZE = Rule(
    "lowbit.optimize_model",
    drop=_OPTIMIZE_DROP | {"optimize_llm": _KERNELS},
    stay={"replace_embedding": "an older name of cpu_embedding"},
    table={"torch_dtype": Keyword("torch_dtype", "the type is the model's own", _type)},
    words=GUESSES,
)


def _neural_compressor() -> dict[str, Rule]:
    place = f"{NEURAL_COMPRESSOR}.transformers"
    drop = {
        "use_llm_runtime": _ONE_ENGINE,
        "use_neural_speed": _ONE_ENGINE,
        "for_inference": "a model that was made low-bit runs",
        "use_layer_wise": _BLOCKS,
        "is_vlm": "what can be packed is found in the model itself",
    }
    found = {f"{home}.{name}": Rule(f"lowbit.{name}", members=("from_dict", "from_json_file"), drop={"use_layer_wise": _BLOCKS})
             for name in _CONFIGS for home in (place, f"{place}.utils", f"{place}.utils.quantization_config")}  # fmt: skip
    for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
        found[f"{place}.{name}"] = Rule(f"lowbit.{name}", members=LOADING, drop=drop, device="device_map")
    return found


def _ipex_llm() -> dict[str, Rule]:
    found = {f"{IPEX_LLM}.optimize_model": _OPTIMIZE, f"{IPEX_LLM}.optimize.optimize_model": _OPTIMIZE}
    for name in ("low_memory_init", "load_low_bit"):
        found[f"{IPEX_LLM}.optimize.{name}"] = Rule(f"lowbit.{name}", words=GUESSES if name == "load_low_bit" else ())
    low_bit = Keyword("load_in_low_bit", "", _format)
    for name in AUTO_CLASSES:
        found[f"{IPEX_LLM}.transformers.{name}"] = Rule(
            f"lowbit.{name}",
            members=LOADING,
            drop=_IPEX_LLM_DROP,
            stay=_IPEX_LLM_STAY,
            table={"load_in_low_bit": low_bit},
            words=GUESSES,
        )
    # prepare_model_for_kbit_training stays: it also has products made without rounding activations, and peft's own does not.
    found[f"{IPEX_LLM}.transformers.qlora.get_peft_model"] = Rule("peft.get_peft_model")
    found[f"{IPEX_LLM}.transformers.qlora.LoraConfig"] = Rule(
        "peft.LoraConfig", stay={"training_mode": "peft's own has no such word"}
    )
    return found


def _ipex() -> dict[str, Rule]:
    """A model in a type. What is quantised by that library's own configurations keeps its names."""
    traced, there = "nothing is traced", "the model changes in its place"
    dense = Rule(
        "lowbit.optimize_model",
        rename={"dtype": "torch_dtype"},
        drop={
            "inplace": there,
            "sample_inputs": traced,
            "deployment_mode": traced,
            "device": "the model is where it is",
        },
        add={"low_bit": "None"},
        default={"torch_dtype": '"float32"'},
        only=("model",),
        copies=True,
        evaluates=True,
        words=TIMES,
    )
    return {f"{IPEX}.{name}": dense for name in ("llm.optimize", "optimize_transformers")}


def _openvino() -> dict[str, Rule]:
    """The same names in lowbit's own room."""
    found: dict[str, Rule] = {}
    for name in lowbit.openvino.__all__:
        homes = (
            (f"{OPTIMUM[0]}.", f"{OPTIMUM[0]}.openvino.")
            if name.startswith("OV")
            else (f"{NNCF}.", f"{NNCF}.parameters.")
        )
        found |= {f"{home}{name}": Rule(f"lowbit.openvino.{name}", members=ANY) for home in homes}
    return found


def _with_values(name: str, values: Mapping[Any, Any]) -> Keyword:
    """An argument of which some values are called otherwise today."""

    def translate(value: Any) -> Mapping[str, Any]:
        return {name: values.get(value, value) if isinstance(value, str | None) else value}

    return Keyword(name, "has other values today", translate)


def _transformers() -> dict[str, Rule]:
    """What the runner's shims do for a call of transformers 4, where it can be read off the call."""
    arguments = ARGUMENTS | {name: _with_values(name, values) for name, values in VALUES.items()}
    found = {
        "transformers.TrainingArguments": Rule("transformers.TrainingArguments", members=ANY, table=arguments),
        "transformers.Trainer": Rule("transformers.Trainer", members=ANY, rename={"tokenizer": "processing_class"}),
    }
    for name in LLAMA_CLASSES:
        found[f"transformers.{name}"] = Rule("transformers.AutoTokenizer", members=("from_pretrained",))
    for (home, name), (place, now) in MOVED_NAMES.items():
        if not place.startswith("lowbit."):
            found[f"{home}.{name}"] = Rule(f"{place}.{now}", members=ANY)
    return found


RULES: dict[str, Rule] = _neural_compressor() | _ipex_llm() | _ipex() | _openvino() | _transformers()
NO_DEVICE = 'the model went to an Intel GPU where there is one: device_map="xpu" says so'
# What only set a process up.
IDLE_CALLS = (f"{IPEX}.set_logging_level",)
TORCH_XPU = f"torch.{XPU}."
# Calls of a whole statement that do nothing where "xpu" becomes the CPU.
DONE_ON_CPU = tuple(TORCH_XPU + name for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"))
# What Intel Extension for PyTorch put there.
ADDED_NAMES = tuple(TORCH_XPU + name for name in ("optimize", "amp"))
ADDED = (
    "Intel Extension for PyTorch added it: LOWBIT_XPU=cpu (or cuda) in front of the command has lowbit.compat answer it"
)
ASKS = "it asks about an Intel GPU: LOWBIT_XPU=cpu in front of the command has lowbit.compat answer it"
SAYS_XPU = (
    "it says xpu in a way that is not exchanged: LOWBIT_XPU=cpu (or cuda) in front of the command lets it mean another"
)
GRAD_SCALERS = ("torch.amp.GradScaler", "torch.amp.grad_scaler.GradScaler")


def is_of_older(name: str, called: Called | None) -> bool:
    """Whether a name of today's libraries is one that only the shims answer, or is called for what only they do."""
    if name in OLDER_NAMES or any(name == module or name.startswith(f"{module}.") for module in OLDER_MODULES):
        return True
    return name == PIPELINE and called is not None and called.first in OLDER_TASKS


def canonical(name: str) -> str:
    """An old name as the rules write it."""
    return IPEX_LLM + name[len(OLDER) :] if name == OLDER or name.startswith(OLDER + ".") else name


def is_old(name: str) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in OLD_PLACES)


def rule_for(name: str) -> tuple[Rule, str] | None:
    """The rule whose name stands in front of a canonical name, and what follows."""
    head, rest = name, ""
    while head:
        if head in RULES:
            return RULES[head], rest
        head, _, last = head.rpartition(".")
        rest = f"{last}.{rest}" if rest else last
    return None


def decide(name: str, called: Called | None) -> Decision:
    """What becomes of a canonical name, and of its call if it is called."""
    if name in IDLE_CALLS:
        return Decision(Rule(""))
    found = rule_for(name)
    if found is None:
        return Decision(None, reason=reason_without_rule(name))
    rule, rest = found
    return Decision(rule, rest, _refusal(rule, rest, called) or "")


def reason_without_rule(name: str) -> str:
    """Why a name without a rule stays: what compat's table of old names, or the face itself, says of it or what it is part of."""
    head = name
    while head and head not in _table():
        head = head.rpartition(".")[0]
    row = _table().get(head)
    if row is not None and row.status == REFUSED:
        return "lowbit refuses it: " + (row.remark or f"use {row.ours}")
    return (refusal_of(name) if _table() else None) or NO_NAME


@cache
def _table() -> dict[str, Name]:
    """Read when a name is left, since it imports every face, and they torch; without torch there is nothing to run either."""
    try:
        return {row.old: row for rows in collect().values() for row in rows}
    except ImportError:
        return {}


def _refusal(rule: Rule, rest: str, called: Called | None) -> str | None:
    """Why a use of a name keeps the old one, or None."""
    if rest and rule.members != ANY and rest not in rule.members:
        return f"{rule.ours} has no {rest} that is the same: {COMPAT}"
    if called is None:
        return f"it is handed on, and not called here: {COMPAT}" if rule.reads_calls else None
    if called.unread and rule.reads_calls:
        return f"it is called with keywords that only the running script knows: {COMPAT}"
    if rule.only is not None and called.positional > 1:
        return f"its arguments have no names: {COMPAT}"
    for keyword, value in called.keywords.items():
        if keyword in rule.stay:
            return f"{keyword}=: {rule.stay[keyword]}"
        if today(rule, keyword, value) is None:
            return f"{keyword}=: {COMPAT}"
    if rule.copies and not called.rebinds and called.keywords.get("inplace") is not True:
        return f"{rule.ours} changes the model itself, and this call gives another one: {COMPAT}"
    return None


def today(rule: Rule, keyword: str, value: Any) -> Mapping[str, Any] | None:
    """The keywords that stand for one of old, empty for one that is dropped; None where only the running script can tell."""
    if keyword in rule.drop:
        return {}
    if keyword in rule.table:
        try:
            now = rule.table[keyword].translate(value)
        except (TypeError, ValueError):
            return None
        said = (
            value is not UNKNOWN
            or any(new is UNKNOWN for new in now.values())
            or rule.table[keyword].reason.startswith("has no")
        )
        return now if said else None
    if rule.only is not None and keyword not in (*rule.only, *rule.rename):
        return None
    return {rule.rename.get(keyword, keyword): value}


def guess(method: str, called: Called) -> Guess | None:
    """What stands for a `generate` that looks ahead, where all of it can be read off the call."""
    given, count = called.keywords, "lookahead" if method == "generate" else "num_output_tokens"
    if method == "generate" and count not in given:
        return None
    tokens, longest = given.get(count, _TOKENS), given.get("max_matching_ngram_size") or _LONGEST
    has_ids = called.positional == 1 or called.unread or "input_ids" in given or "inputs" in given
    readable = type(tokens) is int and tokens > 0 and type(longest) is int
    if not readable or not has_ids or called.positional > 1 or given.get("num_beams", 1) != 1:
        return None
    now = {"prompt_lookup_num_tokens": tokens, "max_matching_ngram_size": longest}
    if method != "generate" and "max_new_tokens" not in given:
        now = {"max_new_tokens": _NEW_TOKENS, **now}
    name = f"generate({count}=)" if method == "generate" else method
    return Guess(name, (count, "max_matching_ngram_size"), now)
