"""Threads: who decides their number, and what may happen to them while an engine works: changes, forks, company."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import lowbit
from lowbit.core import calls, threads
from lowbit.errors import KernelError, RecipeError
from lowbit.models.families import spec_from_config
from lowbit.runtime.engine import Engine
from lowbit.runtime.weights import engine_weights
from lowbit_assets import tiny_model as tiny_model_folder
from unit.family_cases import CASES, arrays, tiny_model

CORES = sorted(os.sched_getaffinity(0))


def engine_of() -> Engine:
    model_type, fields = CASES["llama"]
    model = tiny_model(model_type, fields)
    spec = spec_from_config(model.config.to_dict())
    return Engine(spec, engine_weights(spec, arrays(model)), 256, cache="fp32", compute="fp32")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    threads.set_threads(0)


def in_a_child(code: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


ONE_CORE = f"import os; os.sched_setaffinity(0, {{{CORES[0]}}})\n"
SHOW = "from lowbit.core import calls, threads\nimport lowbit\n"


@pytest.mark.parametrize(
    ("code", "environment", "expected"),
    [
        (SHOW + "print(calls.threads())", {"OMP_NUM_THREADS": "3"}, "3"),
        (SHOW + "print(calls.threads())", {"OMP_NUM_THREADS": "5,2"}, "5"),
        (ONE_CORE + SHOW + "print(calls.threads())", {}, "1"),
        (ONE_CORE + SHOW + "print(calls.threads())", {"OMP_NUM_THREADS": "none"}, "1"),
        (ONE_CORE + SHOW + "print(calls.threads())", {"OMP_NUM_THREADS": "2"}, "2"),
        (SHOW + "threads.follow(4); print(calls.threads())", {"OMP_NUM_THREADS": "3"}, "4"),
        (ONE_CORE + SHOW + "threads.follow(1); print(calls.threads())", {}, "1"),
        (SHOW + "lowbit.set_threads(6); threads.follow(4); print(calls.threads())", {"OMP_NUM_THREADS": "3"}, "6"),
        (SHOW + "threads.follow(4); lowbit.set_threads(6); print(calls.threads())", {"OMP_NUM_THREADS": "3"}, "6"),
        (SHOW + "lowbit.set_threads(6); lowbit.set_threads(0); print(calls.threads())", {"OMP_NUM_THREADS": "3"}, "3"),
    ],
)
def test_who_decides(code: str, environment: dict[str, str], expected: str) -> None:
    assert in_a_child(code, **environment) == expected


def test_layers_follow_torch() -> None:
    layer = lowbit.optimize_model(torch.nn.Sequential(torch.nn.Linear(64, 64)), low_bit="int4")
    before, found = torch.get_num_threads(), []
    try:
        for number in (3, 1, 5):
            torch.set_num_threads(number)
            layer(torch.ones(1, 64))
            found.append(calls.threads())
        lowbit.set_threads(2)
        layer(torch.ones(1, 64))
        assert [*found, calls.threads()] == [3, 1, 5, 2]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("text", "cores"),
    [("max 100000", 0), ("150000 100000", 2), ("50000 100000", 1), ("400000 100000", 4), ("", 0), ("x", 0)],
)
def test_quotas_of_a_container(text: str, cores: int, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert calls.quota(tmp_path / "cpu.max") == cores
    assert calls.quota(tmp_path / "absent") == 0


LIMITED = {
    "version 2": {"cpu.max": "50000 100000", "memory.max": "90000000", "memory.current": "30000000"},
    "version 1": {
        "cpu/cpu.cfs_quota_us": "50000",
        "cpu/cpu.cfs_period_us": "100000",
        "memory/memory.limit_in_bytes": "90000000",
        "memory/memory.usage_in_bytes": "30000000",
    },
}
TOO_LARGE = (
    "from lowbit.runtime import load\n"
    "import sys\n"
    "try: load(sys.argv[1], context=128, slots=1200, cache='fp32')\n"
    "except Exception as error: print(error)\n"
)


@pytest.mark.parametrize("version", LIMITED)
def test_the_limits_of_a_container_hold(version: str, tmp_path: Path) -> None:
    """In a mount namespace of its own, where the files of a container lie at the place of this machine's."""
    apart = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    mount = f"mount --bind {tmp_path} /sys/fs/cgroup"
    if subprocess.run([*apart, "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("this system gives no mount namespace")
    for name, text in LIMITED[version].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    folder = tiny_model_folder("llama", tmp_path / "model")
    for code, environment, said in (
        (SHOW + "print(calls.threads())", {}, "1"),
        (SHOW + "print(calls.threads())", {"OMP_NUM_THREADS": "3"}, "3"),
        (TOO_LARGE, {}, "MB and 57 MB are free; "),
    ):
        clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        program = [*apart, "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", code, str(folder)]
        done = subprocess.run(
            program, env=clean | environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0 and said in done.stdout, done.stderr


def test_numbers_that_make_no_sense() -> None:
    with pytest.raises(RecipeError, match="-1 threads asked for"):
        threads.set_threads(-1)


def test_the_number_may_change_while_another_thread_works() -> None:
    prompt = list(range(5, 45))
    with engine_of() as engine:
        expected = engine.prefill(prompt)
        wrong: list[bool] = []
        number = 0

        def work() -> None:
            while len(wrong) < 60 or number < 20:  # on a busy machine many rounds may fit between two changes
                engine.reset()
                wrong.append(bool(np.abs(engine.prefill(prompt) - expected).max() > 1e-4))

        worker = threading.Thread(target=work)
        worker.start()
        while worker.is_alive():
            number += 1
            calls.set_threads(1 + number % 4)
            worker.join(0.0005)
        assert number >= 20 and not any(wrong)


def test_two_threads_with_an_engine_each() -> None:
    prompts = [list(range(5, 30)), list(range(60, 90))]
    with engine_of() as first, engine_of() as second:
        engines = [first, second]
        expected = [engine.generate(prompt, 40) for engine, prompt in zip(engines, prompts, strict=True)]
        found: dict[int, list[int]] = {}

        def work(index: int) -> None:
            engines[index].reset()
            found[index] = engines[index].generate(prompts[index], 40)

        workers = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert [found[0], found[1]] == expected


def test_a_fork_goes_on_with_threads_of_its_own(tmp_path: Path) -> None:
    """In a process of its own, because this one has threads of torch."""
    code = (
        "import os\n"
        "from lowbit.core import calls\n"
        "from lowbit.runtime import load\n"
        "calls.set_threads(3)\n"
        f"engine = load({str(tiny_model_folder('llama', tmp_path))!r}).engine\n"
        "prompt = list(range(5, 45))\n"
        "expected = engine.generate(prompt, 20)\n"
        "child = os.fork()\n"
        "engine.reset()\n"
        "same = engine.generate(prompt, 20) == expected\n"
        "if child == 0: os._exit(0 if same else 1)\n"
        "print(same, os.waitpid(child, 0)[1])"
    )
    assert in_a_child(code) == "True 0"


def test_the_pool_sleeps_when_it_has_nothing_to_do() -> None:
    """Workers that spin on would use three cores' time, however busy the machine; they spin for 60 microseconds and sleep."""
    code = (
        "import resource, sys, time\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from cpu.test_core import multiply, prepared, quantized\n"
        "from lowbit.core import calls\n"
        "calls.set_threads(4)\n"
        "buffer, x = prepared(quantized('int4', 512, 512)[0]), np.ones((64, 512), np.float32)\n"
        "def used():\n"
        "    seconds = resource.getrusage(resource.RUSAGE_SELF)\n"
        "    return seconds.ru_utime + seconds.ru_stime\n"
        "def product(): multiply(buffer, x, 512, 'int8')\n"
        "product()\n"
        "time.sleep(0.2)\n"
        "begin = used()\n"
        "time.sleep(1)\n"
        "idle = used() - begin\n"
        "product()\n"
        "print(idle < 0.05, len(list(Path('/proc/self/task').iterdir())) >= 4)"
    )
    assert in_a_child(code, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1") == "True True"


def test_a_processor_without_avx2_says_so_once() -> None:
    calls.say_if_slow.cache_clear()
    try:
        calls.set_instruction_set("portable")
        with pytest.warns(RuntimeWarning, match="this processor has no AVX2"):
            first = engine_of()
        expected = first.prefill([5, 6, 7])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            engine_of().close()
        first.close()
    finally:
        calls.set_instruction_set(None)
        calls.say_if_slow.cache_clear()
    with engine_of() as engine:
        assert np.abs(engine.prefill([5, 6, 7]) - expected).max() < 1e-4
    with pytest.raises(KernelError, match="has no instruction set 'avx9000'"):
        calls.set_instruction_set("avx9000")


BESIDE = """
import os, sys, time
import numpy as np
from lowbit.core import threads
from lowbit.runtime import load
threads.set_threads(2)
engine = load(sys.argv[1], context=128).engine
for _ in range(6):
    time.sleep(0.01)  # workers sleep, and are woken by who works
    engine.reset()
    engine.prefill(range(3, 67))
    engine.continue_greedy(5, 8)
print([sorted(os.sched_getaffinity(int(name))) for name in os.listdir("/proc/self/task")])
"""


@pytest.mark.parametrize("allowed", [CORES, CORES[:1]], ids=["all cores", "one core"])
def test_threads_keep_the_processors_they_were_given(allowed: list[int], tmp_path: Path) -> None:
    """While a step runs its threads keep off each other's processors; before and after they have what the user gave them."""
    folder = tiny_model_folder("llama", tmp_path / "model")
    given = f"import os; os.sched_setaffinity(0, {set(allowed)})\n" + BESIDE
    done = subprocess.run(
        [sys.executable, "-c", given, str(folder)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) >= 2
    assert all(cores == allowed for cores in found)
