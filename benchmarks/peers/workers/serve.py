"""The conversation of a worker with the benchmark: a line of JSON in, a line of JSON out.

A worker loads its model once and answers until its input ends, so that a round of many peers costs their measuring and
not their loading. It runs in the peer's environment and needs the standard library and the peer. On standard output
nothing but the answers may appear, so what a peer prints goes to standard error.

    {"task": {"kind": "decode", "context": 32, "new": 64, "sequences": 1}, "seed": 3}  ->  {"value": 47.1, "peak": 745000000}
"""

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

VOCABULARY = 49152  # of both models
FIRST_PLAIN_TOKEN = 100  # those before it are special


def arguments():
    """The command line of every worker."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--first", type=int, help="make one token after a prompt of that length, say so, and end")
    return parser.parse_args()


def prompt(length, seed):
    """Random tokens: the same for all peers of a round, others in the next, so that no cache of prompts can help."""
    draw = random.Random(f"{seed} {length}")
    return [draw.randrange(FIRST_PLAIN_TOKEN, VOCABULARY) for _ in range(length)]


def peak_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def mark(stage):
    """Note that a stage of this process is over: seconds since its start, megabytes that it holds."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    held = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - started
    stages.append({"stage": stage, "seconds": seconds, "megabytes": held / 1e6})


stages = []


def serve(load, facts=None):
    """`load(arguments)` gives a dictionary of functions by the task's kind: (context, new, sequences, seed) -> value."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    given = arguments()

    def tell(**facts):
        print(json.dumps(facts), file=answers, flush=True)

    start = time.perf_counter()
    measures = load(given)
    if given.first:
        measures["prefill"](given.first, 0, 1, 0)
        mark("prompt")
        tell(ready=True, stages=stages)
        os._exit(0)
    tell(ready=True, load_seconds=time.perf_counter() - start, **(facts(measures) if facts else {}))
    for line in sys.stdin:
        asked = json.loads(line)
        task = asked["task"]
        measure = measures.get(task["kind"])
        if measure is None:
            tell(error=f"this peer has no {task['kind']}")
            continue
        value = measure(task["context"], task["new"], task["sequences"], asked["seed"])
        tell(value=value, peak=peak_bytes())
