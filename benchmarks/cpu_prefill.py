"""How fast is a prompt read, beside every other program on this machine?

make bench-peers                            the peers and their models, once
python benchmarks/cpu_prefill.py            all rows; goes on where it was cut short
"""

from __future__ import annotations

from peers import bench
from peers.rounds import Row
from peers.tasks import Task

LARGE, SMALL = "random-1.1b", "smollm2"
PROMPT, LONG_PROMPT = Task("prefill", 512), Task("prefill", 4096)
FASTEST = ("llama.cpp", "ik_llama.cpp", "OpenVINO")

ROWS = (
    Row("prefill 512, 1.1 B, 4 bit", LARGE, 4, PROMPT, ratio=1.15, peak=0.60, amx_ratio=3.0, amx_products=0.40),
    Row("prefill 512, SmolLM2, 4 bit", SMALL, 4, PROMPT, ratio=1.15, peak=0.60, amx_ratio=1.3),
    Row(
        "prefill 4096, 1.1 B, 4 bit",
        LARGE,
        4,
        LONG_PROMPT,
        ratio=1.30,
        only=FASTEST,
        files=("int4", "Q4_0", "int4 g128"),
    ),
    Row("prefill 512, 1.1 B, 8 bit", LARGE, 8, PROMPT, ratio=1.10),
    Row("prefill 512, SmolLM2, 8 bit", SMALL, 8, PROMPT, only=FASTEST),
)

if __name__ == "__main__":
    bench.run(
        "cpu_prefill", "Prefill on a CPU, beside its peers", ROWS, bench.options(__doc__.splitlines()[0]).parse_args()
    )
