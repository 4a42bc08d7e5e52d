"""`lowbit bench --woq --benchmark --model MODEL`: whole answers timed, with the options of Neural Compressor's own script.

That script quantises a model, saves it if told where, and times answers of a batch, with beams if asked for. Its options
keep their names and meaning here, but for the device, which is the CPU unless one is named. Its figures are mended: the
latency is the mean of the iterations that count, the latency per token is that over the new tokens of one sequence, and
the throughput counts the new tokens of all of them. An answer is not stopped at its end, so that iterations are alike.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowbit.bench import AnswerTimings, measure_answers, prompt_of
from lowbit.cli.options import BITS, COUNT, loading_from, number, path
from lowbit.cli.output import Output
from lowbit.cli.source import find_source
from lowbit.errors import LowbitError, RecipeError

if TYPE_CHECKING:
    from lowbit.cli.session import Session
    from lowbit.configs.base import WeightOnlyConfig

# What those scripts save to where they are told nothing else.
SAVED = "./saved_results"
_YES, _NO = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")
# Where --num_warmup and --benchmark_iters stand in that script.
_WARMUP, _ITERATIONS, _NEW_TOKENS = 3, 10, 32


def truth(text: str) -> bool:
    """A type for argparse: a word for yes or no."""
    if text.lower() not in (*_YES, *_NO):
        raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no")
    return text.lower() in _YES


@dataclass(frozen=True)
class Row:
    """One option: what argparse makes of it, and the field of the configurations that it sets, if any."""

    name: str
    help: str
    type: Any = None
    default: Any = None
    field: str = ""
    choices: tuple[str, ...] = ()


_FROM_ZERO = number(int, 0, 1 << 31, "a number from 0 up")
_RATE = number(float, 0, 1, "a number from 0 to 1")
ALGORITHMS = ("Rtn", "Awq", "Teq", "GPTQ", "AutoRound")
ROWS = (
    Row("benchmark", "time whole answers"),
    Row("benchmark_batch_size", "prompts answered at once (default: 1)", COUNT, 1),
    Row("benchmark_iters", f"answers that count (default: {_ITERATIONS})", COUNT, _ITERATIONS),
    Row("num_warmup", f"answers before those (default: {_WARMUP})", _FROM_ZERO, _WARMUP),
    Row("num_beams", "beams (default: 1)", COUNT, 1),
    Row("max-new-tokens", f"tokens of an answer (default: {_NEW_TOKENS})", COUNT, _NEW_TOKENS),
    Row("profile_token_latency", "tell the first token from the later ones"),
    Row("woq", "quantise the weights first; a model that is low-bit already is taken as it is"),
    Row("woq_algo", "the algorithm (default: Rtn)", None, "Rtn", choices=ALGORITHMS),
    Row("bits", "bits of a weight (default: 4)", BITS, None, "bits"),
    Row("weight_dtype", "int4, int4_fullrange, int8, nf4, ... in place of --bits", str, None, "weight_dtype"),
    Row("group_size", "weights that share a scale (default: 128)", int, 128, "group_size"),
    Row("scheme", "sym or asym (default: sym)", None, "sym", choices=("sym", "asym")),
    Row("compute_dtype", "what products are computed in: fp32, bf16, fp16, int8", str, None, "compute_dtype"),
    Row("scale_dtype", "the type of scales: fp32, bf16, fp16", str, None, "scale_dtype"),
    Row("quant_lm_head", "quantise the head too", field="quant_lm_head"),
    Row("dataset", "the text to calibrate on, a file", str, None, "dataset"),
    Row("n_samples", "windows of it", COUNT, None, "n_samples"),
    Row("seq_len", "tokens of a window", COUNT, None, "seq_len"),
    Row("batch_size", "changes nothing", COUNT, None, "batch_size"),
    Row("use_layer_wise", "changes nothing", truth, None, "use_layer_wise"),
    Row("for_inference", "changes nothing"),
    Row("desc_act", "GPTQ: columns by activation", field="desc_act"),
    Row("damp_percent", "GPTQ: damping (default: 0.1)", _RATE, None, "damp_percent"),
    Row("blocksize", "GPTQ: columns of a block (default: 128)", COUNT, None, "blocksize"),
    Row("static_groups", "GPTQ: scales before columns", field="static_groups"),
    Row("true_sequential", "GPTQ: one linear after another", field="true_sequential"),
    Row("use_mse_search", "changes nothing", field="use_mse_search"),
    Row("lr", "AutoRound: rate", _RATE, None, "lr"),
    Row("minmax_lr", "AutoRound: rate of the ranges", _RATE, None, "minmax_lr"),
    Row("autoround_iters", "AutoRound: steps (default: 200)", COUNT, None, "iters"),
    Row("disable_quanted_input", "AutoRound: see the inputs of the original", field="disable_quanted_input"),
    Row("load_in_4bit", "int4 without a configuration", truth, False),
    Row("load_in_8bit", "int8 without a configuration", truth, False),
    Row("output_dir", f"save the quantised model there (without a name: {SAVED})", path, None),
    Row("revision", "the revision of a model of the hub", str, None),
    Row("trust_remote_code", "the same as --trust-remote-code"),
    Row("do_profiling", "see `lowbit bench --profile`"),
    Row("accuracy", "see `lowbit evaluate`"),
    Row("tasks", "of --accuracy", str, None),
    Row("eval_batch_size", "of --accuracy", COUNT, None),
    Row("add_bos_token", "of --accuracy"),
    Row("save_accuracy_path", "of --accuracy", str, None),
)
_SHOWN = {"--max-new-tokens": "N", "--bits": "B"}
_WITHOUT_VALUE = ("load_in_4bit", "load_in_8bit", "use_layer_wise")
# What makes `lowbit bench` time whole answers.
_TRIGGERS = ("woq", "benchmark", "accuracy", "load_in_4bit", "load_in_8bit")
_IDLE = {
    "do_profiling": "lowbit bench --profile shows where the time of a token goes",
    "for_inference": "a model that was made low-bit runs",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "whole answers, with the options of Neural Compressor's script (--woq --benchmark --model MODEL)"
    )
    for row in ROWS:
        name = f"--{row.name}"
        if row.type is None and not row.choices:
            group.add_argument(name, dest=_dest(row), action="store_true", help=row.help)
            continue
        more: dict[str, Any] = {"choices": row.choices} if row.choices else {"metavar": _SHOWN.get(name, "X")}
        if row.name in _WITHOUT_VALUE:
            more |= {"nargs": "?", "const": True}
        if row.name == "output_dir":
            more |= {"nargs": "?", "const": path(SAVED)}
        group.add_argument(name, dest=_dest(row), type=row.type, default=row.default, help=row.help, **more)


def _dest(row: Row) -> str:
    """`--trust_remote_code` sets what `--trust-remote-code` sets."""
    return row.name.replace("-", "_")


def is_asked(options: argparse.Namespace) -> bool:
    return any(getattr(options, name) for name in _TRIGGERS)


def run(options: argparse.Namespace, text: str) -> int:
    """Quantise, save and time as the options say; `text` is what prompts are cut from."""
    if options.accuracy:
        raise LowbitError(
            "--accuracy needs the tasks of lm-eval, which lowbit does not bring: leave it out, and measure perplexity "
            "with lowbit evaluate MODEL --text FILE"
        )
    for name, reason in _IDLE.items():
        if getattr(options, name):
            warnings.warn(f"--{name} changes nothing: {reason}", stacklevel=2)
    if not options.benchmark and options.output_dir is None:
        raise LowbitError("nothing is timed and nothing saved: add --benchmark, or --output_dir")
    config = config_from(options) if options.woq else None
    source, load = find_source(options.model), loading_from(options)
    from lowbit.cli.engines import start_torch

    start_torch(options.threads)
    from lowbit.cli.session import Session

    session = Session.load(source, load, **_keywords(options, config))
    output = Output(options.json)
    if options.output_dir is not None and _is_new(session.model, config, options):
        session.model.save_pretrained(options.output_dir)
        session.tokenizer.save_pretrained(options.output_dir)
        output.say(f"saved: {options.output_dir}")
    if options.benchmark:
        timings = _time(session, options, text, output)
        _print(timings, output)
        output.result({"model": options.model, "load_seconds": session.load_seconds} | timings.to_dict())
    return 0


def config_from(options: argparse.Namespace) -> WeightOnlyConfig:
    """The configuration that the options describe; what the algorithm does not take, it says itself."""
    from lowbit.configs.classes import CONFIGS

    kind = CONFIGS[options.woq_algo.lower()]
    fields = {row.field: getattr(options, _dest(row)) for row in ROWS if row.field}
    given = {name: value for name, value in fields.items() if value is not None and value is not False}
    if "bits" in given:
        if given["bits"] != int(given["bits"]):
            raise RecipeError(f"--bits {given['bits']} of --woq is a whole number: name 4 or 8")
        given["bits"] = int(given["bits"])
    symmetric = options.scheme == "sym"
    given |= {"zero_point": not symmetric} if options.woq_algo == "Awq" else {"sym": symmetric}
    return kind(**given)


def _keywords(options: argparse.Namespace, config: WeightOnlyConfig | None) -> dict[str, Any]:
    given = {"quantization_config": config, "revision": options.revision}
    keywords = {name: value for name, value in given.items() if value is not None}
    flags = ("load_in_4bit", "load_in_8bit") if config is None else ()
    return keywords | {name: True for name in flags if getattr(options, name)}


def _is_new(model: Any, config: WeightOnlyConfig | None, options: argparse.Namespace) -> bool:
    """Whether this call made the model low-bit: one that was so already has its folder."""
    if config is not None:
        return getattr(model, "quantization_config", None) is config
    return bool(options.load_in_4bit or options.load_in_8bit)


def _time(session: Session, options: argparse.Namespace, text: str, output: Output) -> AnswerTimings:
    import torch

    from lowbit.bridge import timed_generate

    length, new_tokens, batch = options.prompt_tokens, options.max_new_tokens, options.benchmark_batch_size
    prompt = prompt_of(session.encode(text, raw=True), length)
    ids = torch.tensor([prompt] * batch, device=session.model.device)
    mask = torch.ones_like(ids)
    asked = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": options.num_beams}
    output.say(f"---- Prompt size: {length}")
    number = 0

    def answer(count: int) -> tuple[float | None, float]:
        nonlocal number
        start = time.perf_counter()
        with torch.inference_mode():
            made, steps = timed_generate(
                session.model, ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, **asked
            )
        seconds = time.perf_counter() - start
        output.say(f"{session.tokenizer.batch_decode(made, skip_special_tokens=True)} {[count] * batch}")
        output.say(f"Iteration: {number}, Time: {seconds:.6f} sec")
        number += 1
        return (steps[0] if options.profile_token_latency else None), seconds

    planned = AnswerTimings(batch, length, new_tokens, ())
    return measure_answers(answer, planned, options.benchmark_iters, options.num_warmup)


def _print(timings: AnswerTimings, output: Output) -> None:
    """The summary, in the words that scripts look for."""
    output.say("\n ---------- Summary: ----------")
    output.say(f"Inference latency: {timings.latency:.5f} sec.")
    output.say(f"Latency per token: {timings.latency_per_token:.5f} sec.")
    speed = f"{timings.answers_per_second:.3f} samples/sec, {timings.tokens_per_second:.2f} tokens/sec"
    output.say(f"Average throughput: {speed}")
    if timings.first_token is not None:
        output.say(f"First token average latency: {timings.first_token:.5f} sec.")
    if timings.later_token is not None:
        output.say(f"Average 2... latency: {timings.later_token:.5f} sec.")
