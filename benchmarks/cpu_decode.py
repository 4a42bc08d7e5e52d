"""How fast are tokens made, one after another or eight sequences at once, beside every other program on this machine?

make bench-peers                                            the peers and their models, once
python benchmarks/cpu_decode.py                             all rows; goes on where it was cut short
python benchmarks/cpu_decode.py --only "decode 32, 1.1 B, 4 bit" --rounds 7
"""

from __future__ import annotations

from peers import bench
from peers.rounds import Row
from peers.tasks import Task

LARGE, SMALL = "random-1.1b", "smollm2"
SHORT, LONG = Task("decode", 32, 64), Task("decode", 1024, 48)
SMALL_SHORT, SMALL_LONG = Task("decode", 32, 192), Task("decode", 1024, 128)
EIGHT, SMALL_EIGHT = Task("batch", 32, 32, 8), Task("batch", 32, 96, 8)
FASTEST = ("llama.cpp", "ik_llama.cpp", "OpenVINO", "onnxruntime-genai")
BATCHED = ("llama.cpp", "ik_llama.cpp", "onnxruntime-genai")

FIRST = "decode 32, 1.1 B, 4 bit"

ROWS = (
    Row(FIRST, LARGE, 4, SHORT, ratio=1.10, bandwidth=0.85),
    Row("decode 1024, 1.1 B, 4 bit", LARGE, 4, LONG, ratio=1.15, only=FASTEST),
    Row("decode 32, SmolLM2, 4 bit", SMALL, 4, SMALL_SHORT, ratio=1.40),
    Row("decode 1024, SmolLM2, 4 bit", SMALL, 4, SMALL_LONG, only=FASTEST),
    Row("decode 32, 1.1 B, 8 bit", LARGE, 8, SHORT, ratio=1.10),
    Row("decode 32, SmolLM2, 8 bit", SMALL, 8, SMALL_SHORT),
    Row("decode 32, 1.1 B, bf16", LARGE, 16, Task("decode", 32, 24), ratio=2.2, bandwidth=0.85),
    Row("8 sequences, 1.1 B, 4 bit", LARGE, 4, EIGHT, ratio=1.20, only=BATCHED, times=(4, FIRST)),
    Row("8 sequences, SmolLM2, 4 bit", SMALL, 4, SMALL_EIGHT, only=BATCHED),
)

if __name__ == "__main__":
    bench.run(
        "cpu_decode", "Decoding on a CPU, beside its peers", ROWS, bench.options(__doc__.splitlines()[0]).parse_args()
    )
