"""The command line programs of BigDL-LLM, ipex-llm and Optimum Intel, answered by the runner:

    python -m lowbit.compat llm-convert ./model -o converted -x llama -t int4
    python -m lowbit.compat llm-cli -x llama -m converted/bigdl_llm_llama_q4_0.bin -t 4 -n 32 -p "Once upon a time"
    python -m lowbit.compat llm-chat -x llama -m converted/bigdl_llm_llama_q4_0.bin
    python -m lowbit.compat optimum-cli export openvino --model ./model out

llm-convert and llm-cli do what the classes of those names do; llm-chat is `lowbit chat`. `ipex-llm-init` (`bigdl-llm-init`) was
sourced by a shell to choose an allocator and threads: there is nothing to choose, and that is what it says.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from lowbit.compat.becoming import become
from lowbit.errors import LowbitError

_NEW_TOKENS = 128
_TEMPERATURE = 0.8
_FAMILIES = ("llama", "bloom", "gptneox", "starcoder", "chatglm")


def run_program(name: str, arguments: Sequence[str]) -> int:
    """Run one of `PROGRAMS`; its exit status."""
    try:
        return PROGRAMS[name](list(arguments))
    except LowbitError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1


def _convert(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="llm-convert", description="a model folder as a low-bit folder")
    parser.add_argument("model")
    parser.add_argument("-o", "--outfile", required=True)
    parser.add_argument("-x", "--model-family", required=True, choices=_FAMILIES)
    parser.add_argument("-f", "--model-format", default="pth", choices=("pth", "gptq"))
    parser.add_argument("-t", "--outtype", default="int4", choices=("int4", "int8"))
    parser.add_argument("-p", "--tmp-path")
    parser.add_argument("-k", "--tokenizer-path")
    asked = vars(parser.parse_args(arguments))
    from lowbit.compat.faces.ipex_llm.convert_model import llm_convert

    print(f"Succeeded in converting the model to {llm_convert(**asked)}")
    return 0


def _cli(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="llm-cli", description="a text continued by a converted model")
    _add_model(parser)
    parser.add_argument("-p", "--prompt", required=True)
    parser.add_argument("-n", "--n-predict", "--n_predict", type=int, default=_NEW_TOKENS)
    parser.add_argument("--temp", type=float, default=_TEMPERATURE)
    asked, others = parser.parse_known_args(arguments)
    _refuse(others, "llm-cli", "`lowbit generate MODEL --prompt TEXT`, whose --help lists what it takes")
    from lowbit.compat.faces.ipex_llm import models

    model = models.Llama(asked.model, n_threads=asked.threads)  # the engine finds out itself what family it is of
    print(asked.prompt, end="", flush=True)
    for piece in model(asked.prompt, max_tokens=asked.n_predict, temperature=asked.temp, stream=True):
        print(piece["choices"][0]["text"], end="", flush=True)
    print()
    return 0


def _chat(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="llm-chat", description="lowbit chat")
    _add_model(parser)
    asked, others = parser.parse_known_args(arguments)
    _refuse(others, "llm-chat", "`lowbit chat MODEL`, whose --help lists what it takes")
    threads = ["--threads", str(asked.threads)] if asked.threads else []
    return become([sys.executable, "-m", "lowbit", "chat", asked.model, *threads], os.environ)


def _optimum(arguments: list[str]) -> int:
    from lowbit.compat.optimum_export import run

    return run(arguments)


def _init(arguments: list[str]) -> int:
    print(
        "ipex-llm-init has nothing to set here: lowbit chooses threads and memory itself (lowbit doctor shows how); "
        "leave the line out",
        file=sys.stderr,
    )
    return 0


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-x", "--model_family", "--model-family", choices=_FAMILIES)
    parser.add_argument("-t", "--threads", type=int)


def _refuse(others: Sequence[str], program: str, instead: str) -> None:
    if others:
        raise LowbitError(f"{program} takes no {' '.join(others)} here: use {instead}")


PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "llm-convert": _convert,
    "llm-cli": _cli,
    "llm-chat": _chat,
    "optimum-cli": _optimum,
    "ipex-llm-init": _init,
    "bigdl-llm-init": _init,
}
