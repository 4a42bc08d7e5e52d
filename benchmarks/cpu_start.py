"""How soon does a cold process answer, in how much memory, what does `generate` of transformers add, how soon does Ctrl-C end it?

A start is a process from its first instruction to its first token, files in the page cache: llama.cpp's is a whole
llama-bench that reads the prompt once, ours and OpenVINO's a Python process until the token is there.
What a start of ours does with every weight has rows of its own: laying it out for the products, by all threads.

    make bench-peers                            the peers and their models, once
    python benchmarks/cpu_start.py              all rows; goes on where it was cut short
"""

from __future__ import annotations

from peers import bench
from peers.rounds import OURS, Row
from peers.tasks import Task

LARGE, SMALL = "random-1.1b", "smollm2"
START, MEMORY = Task("start", 32), Task("memory", 32, 32)
THROUGH, SMALL_THROUGH = Task("generate", 32, 48), Task("generate", 32, 128)
PROMPT_INTERRUPT, TOKEN_INTERRUPT = Task("interrupt", 2048), Task("interrupt", 32, 96)
MATRIX, HEAD = Task("repack", 5632), Task("repack", 49152)
FASTEST = ("llama.cpp", "ik_llama.cpp", "OpenVINO", "onnxruntime-genai")

ROWS = (
    Row("first token of a cold process, 1.1 B", LARGE, 4, START, ratio=1.0, most=0.9, only=FASTEST),
    Row("first token of a cold process, SmolLM2", SMALL, 4, START, only=FASTEST),
    Row("peak memory, 1.1 B", LARGE, 4, MEMORY, ratio=1.0, only=FASTEST, against="ik_llama.cpp Q4_0"),
    Row("peak memory, SmolLM2", SMALL, 4, MEMORY, ratio=1.0, only=FASTEST, against="ik_llama.cpp Q4_0"),
    Row("model.generate, 1.1 B", LARGE, 4, THROUGH, ratio=0.93, against="lowbit"),
    Row("model.generate, SmolLM2", SMALL, 4, SMALL_THROUGH, ratio=0.93, against="lowbit"),
    Row("Ctrl-C in a prompt, 1.1 B", LARGE, 4, PROMPT_INTERRUPT, most=0.3, only=OURS, files=("int4",)),
    Row("Ctrl-C in a token, 1.1 B", LARGE, 4, TOKEN_INTERRUPT, most=0.3, only=OURS, files=("int4",)),
    Row("laying out int4, [5632, 2048] of the 1.1 B", LARGE, 4, MATRIX, least=3.0, only=OURS, files=("int4",)),
    Row("laying out int5_g32, the head of the 1.1 B", LARGE, 4, HEAD, least=3.0, only=OURS, files=("int4",)),
)

if __name__ == "__main__":
    bench.run(
        "cpu_start",
        "Start, memory and model.generate on a CPU, beside the peers",
        ROWS,
        bench.options(__doc__.splitlines()[0]).parse_args(),
    )
