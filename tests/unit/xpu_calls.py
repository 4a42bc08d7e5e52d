"""Each name of torch.xpu and torch.accelerator, called once, in a child Python where "xpu" means another device.

A call is an expression that is true on every device that "xpu" can mean. All of them run in one child, through the runner, and the
child says what became of each: `ok`, or the value or the error that came instead. `without_us` is a child of Python alone, in which
each "xpu" is written "cuda": what torch says of a call itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

OK, ABSENT = "ok", "torch has no such name"

XPU_CALLS = {
    "Event": "Event(enable_timing=True).query()",
    "Stream": "Stream(device='xpu').query()",
    "StreamContext": "entered(StreamContext(torch.xpu.current_stream('xpu')))",
    "can_device_access_peer": "can_device_access_peer('xpu:0', 'xpu:0') in (True, False)",
    "current_device": "current_device() == 0",
    "current_stream": "done(current_stream('xpu'))",
    "default_generators": "[generator.device.type for generator in default_generators] == [held.device.type] * count",
    "device": "entered(device('xpu:0'))",
    "device_count": "device_count() >= 1",
    "device_of": "entered(device_of(held))",
    "empty_cache": "empty_cache() is None",
    "get_arch_list": "isinstance(get_arch_list(), list)",
    "get_device_capability": "'name' in get_device_capability('xpu')",
    "get_device_name": "len(get_device_name('xpu')) > 0",
    "get_device_properties": "get_device_properties('xpu').total_memory > 0",
    "get_gencode_flags": "isinstance(get_gencode_flags(), str)",
    "get_rng_state": "get_rng_state('xpu').dtype == torch.uint8",
    "get_rng_state_all": "len(get_rng_state_all()) == count",
    "init": "init() is None",
    "initial_seed": "isinstance(initial_seed(), int)",
    "is_available": "is_available() is True",
    "is_bf16_supported": "is_bf16_supported() in (True, False)",
    "is_current_stream_capturing": "is_current_stream_capturing() is False",
    "is_initialized": "is_initialized() is True",
    "is_tf32_supported": "is_tf32_supported() in (True, False)",
    "manual_seed": "(manual_seed(7), torch.xpu.initial_seed()) == (None, 7)",
    "manual_seed_all": "(manual_seed_all(8), torch.xpu.initial_seed()) == (None, 8)",
    "max_memory_allocated": "max_memory_allocated('xpu') > 0",
    "max_memory_reserved": "max_memory_reserved('xpu') > 0",
    "mem_get_info": "0 < mem_get_info('xpu')[0] <= mem_get_info('xpu')[1]",
    "memory_allocated": "memory_allocated('xpu') > 0",
    "memory_reserved": "memory_reserved('xpu') > 0",
    "memory_snapshot": "isinstance(memory_snapshot(), list)",
    "memory_stats": "memory_stats('xpu')['allocated_bytes.all.peak'] > 0",
    "memory_stats_as_nested_dict": "memory_stats_as_nested_dict('xpu')['allocated_bytes']['all']['peak'] > 0",
    "reset_accumulated_memory_stats": "reset_accumulated_memory_stats('xpu') is None",
    "reset_peak_memory_stats": "reset_peak_memory_stats('xpu') is None",
    "seed": "seed() is None",
    "seed_all": "seed_all() is None",
    "set_device": "(set_device('xpu:0'), torch.xpu.current_device()) == (None, 0)",
    "set_rng_state": "torch.equal(again(set_rng_state, torch.xpu.get_rng_state()), drawn())",
    "set_rng_state_all": "torch.equal(again(set_rng_state_all, torch.xpu.get_rng_state_all()), drawn())",
    "set_stream": "set_stream(torch.xpu.current_stream()) is None",
    "stream": "entered(stream(torch.xpu.Stream()))",
    "synchronize": "synchronize('xpu') is None",
}
ACCELERATOR_CALLS = {
    "current_accelerator": "torch.ones(2, device=current_accelerator()).device == held.device",
    "current_device_idx": "current_device_idx() == 0",
    "current_device_index": "current_device_index() == 0",
    "current_stream": "done(current_stream('xpu'))",
    "device_count": "device_count() == count",
    "device_index": "entered(device_index(0))",
    "empty_cache": "empty_cache() is None",
    "empty_host_cache": "empty_host_cache() is None",
    "get_device_capability": "torch.float32 in get_device_capability('xpu')['supported_dtypes']",
    "get_memory_info": "0 < get_memory_info('xpu')[0] <= get_memory_info('xpu')[1]",
    "is_available": "is_available() is True",
    "max_memory_allocated": "max_memory_allocated('xpu') > 0",
    "max_memory_reserved": "max_memory_reserved('xpu') > 0",
    "memory_allocated": "memory_allocated('xpu') > 0",
    "memory_reserved": "memory_reserved('xpu') > 0",
    "memory_stats": "memory_stats('xpu')['allocated_bytes.all.peak'] > 0",
    "reset_accumulated_memory_stats": "reset_accumulated_memory_stats('xpu') is None",
    "reset_peak_memory_stats": "reset_peak_memory_stats('xpu') is None",
    "set_device_idx": "(set_device_idx('xpu:0'), torch.xpu.current_device()) == (None, 0)",
    "set_device_index": "(set_device_index('xpu:0'), torch.xpu.current_device()) == (None, 0)",
    "set_stream": "set_stream(torch.accelerator.current_stream()) is None",
    "synchronize": "synchronize('xpu') is None",
}
CALLS = {f"torch.xpu.{name}": call for name, call in XPU_CALLS.items()} | {
    f"torch.accelerator.{name}": call for name, call in ACCELERATOR_CALLS.items()
}
# What only an Intel GPU answers: called in the same way on a CPU, each raises torch's own error.
REFUSED_CALLS = {
    "torch.xpu.MemPool": "MemPool()",
    "torch.xpu.XPUGraph": "XPUGraph()",
    "torch.xpu.XPUPluggableAllocator": "XPUPluggableAllocator('allocator.so', 'allocate', 'free')",
    "torch.xpu.change_current_allocator": "change_current_allocator(None)",
    "torch.xpu.clock_rate": "clock_rate()",
    "torch.xpu.device_memory_used": "device_memory_used()",
    "torch.xpu.get_per_process_memory_fraction": "get_per_process_memory_fraction()",
    "torch.xpu.get_stream_from_external": "get_stream_from_external(0)",
    "torch.xpu.graph": "entered(graph(torch.xpu.XPUGraph()))",
    "torch.xpu.graph_pool_handle": "graph_pool_handle()",
    "torch.xpu.make_graphed_callables": "make_graphed_callables(torch.nn.Linear(2, 2), (torch.ones(1, 2),))",
    "torch.xpu.memory_usage": "memory_usage()",
    "torch.xpu.power_draw": "power_draw()",
    "torch.xpu.set_per_process_memory_fraction": "set_per_process_memory_fraction(0.5)",
    "torch.xpu.temperature": "temperature()",
    "torch.xpu.use_mem_pool": "entered(use_mem_pool(torch.xpu.MemPool()))",
    "torch.xpu.utilization": "utilization()",
}

SCRIPT = """\
import json, sys, torch

held = torch.ones(1000, device="xpu")
count = torch.xpu.device_count()

def entered(context):
    with context:
        return torch.ones(2).to("xpu").device == held.device

def done(stream):
    stream.synchronize()
    return stream.query()

def drawn():
    return torch.rand(3, device="xpu")

def again(set_state, state):
    drawn()
    set_state(state)
    return [drawn(), set_state(state)][0]

said = {}
for dotted, call in json.load(sys.stdin).items():
    module, _, name = dotted.rpartition(".")
    owner = {"torch.xpu": torch.xpu, "torch.accelerator": torch.accelerator}[module]
    if not hasattr(owner, name):
        said[dotted] = "ABSENT"
        continue
    try:
        value = eval(call, {**globals(), name: getattr(owner, name)})
    except Exception as error:
        said[dotted] = f"{type(error).__name__}: {error}"
    else:
        said[dotted] = "ok" if value is True else repr(value)
print(json.dumps(said))
"""


def what_became(calls: dict[str, str], kind: str, folder: Path) -> dict[str, str]:
    """What a child says of each call when "xpu" means `kind`."""
    return _said(SCRIPT, calls, folder, "-m", "lowbit.compat", LOWBIT_XPU=kind)


def without_us(calls: dict[str, str], folder: Path) -> dict[str, str]:
    """What a child of Python alone says of each call of torch.accelerator, on an NVIDIA GPU that is called so."""
    asked = {name: call for name, call in calls.items() if name.startswith("torch.accelerator.")}
    return _said(_as_cuda(SCRIPT), {name: _as_cuda(call) for name, call in asked.items()}, folder)


def _as_cuda(text: str) -> str:
    return text.replace("'xpu", "'cuda").replace('"xpu', '"cuda').replace("torch.xpu", "torch.cuda")


def _said(script: str, calls: dict[str, str], folder: Path, *runner: str, **variables: str) -> dict[str, str]:
    (folder / "calls.py").write_text(script.replace("ABSENT", ABSENT))
    done = subprocess.run(
        [sys.executable, *runner, "calls.py"],
        cwd=folder, env={**os.environ, **variables}, input=json.dumps(calls),
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return said


def train_with_a_scaler(scaler: torch.amp.GradScaler, steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A linear on "xpu" that learns to add up, in float16."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1).to("xpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x = torch.rand(32, 8).to("xpu")
    y, losses = x.sum(1, keepdim=True), []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast(device_type="xpu", dtype=torch.float16):
            loss = torch.nn.functional.mse_loss(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert scaler.is_enabled() and losses[-1] < losses[0] / 4
    return model, optimizer
