"""Scripts that say "xpu" without an Intel GPU: under LOWBIT_XPU=cpu it means the CPU, without it nothing is touched."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils import _device

import lowbit.compat
from lowbit.compat.xpu import meaning, on_cuda, places
from unit.checkpoint_cases import EVEN, IDS, logits, make
from unit.xpu_calls import train_with_a_scaler

RUNNER = [sys.executable, "-m", "lowbit.compat"]
FUNCTIONS = [(torch, name) for name in places.FACTORIES] + [
    (getattr(torch, module), name) for module, name in places.FACTORIES_ELSEWHERE
]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if torch.xpu.is_available():
        pytest.skip('"xpu" is an Intel GPU on this machine')
    monkeypatch.setenv(meaning.VARIABLE, "cpu")
    with lowbit.compat.install(children=False):
        yield


@pytest.mark.parametrize("device", ["xpu", "xpu:0", torch.device("xpu"), torch.device("xpu", 0)])
@pytest.mark.usefixtures("on_cpu")
def test_tensors_and_modules_move(device: str | torch.device) -> None:
    x = torch.rand(2, 3)
    for moved in (x.to(device), x.to(device, torch.float32), x.to(device=device, non_blocking=True), x.to(x), x.xpu()):
        assert moved.device.type == "cpu" and torch.equal(moved, x)
    assert x.to(torch.float64).dtype == torch.float64
    assert x.to(0).device.type == x.xpu(0).device.type == "cpu" and x.is_xpu
    model = torch.nn.Linear(3, 4, device=device).to(device).xpu()
    assert model.weight.device.type == "cpu"
    assert model.to(device=device, dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    assert torch.nn.Linear(3, 4, device="meta").to_empty(device=device).weight.device.type == "cpu"
    assert str(torch.device("xpu")) == "xpu" and repr(torch.device("xpu", 0)) == "device(type='xpu', index=0)"


@pytest.mark.usefixtures("on_cpu")
def test_a_tensor_says_where_it_really_is() -> None:
    """As docs/migration.md says."""
    x = torch.ones(2).to("xpu")
    assert x.device.type == "cpu" and x.is_xpu and torch.device("xpu").type == "xpu"
    assert x.device != torch.device("xpu") and x.device == torch.ones(2).device
    page = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
    assert '`x.to("xpu").device.type` is `"cpu"`' in page and "`x.is_xpu`, which is true" in page


@pytest.mark.usefixtures("on_cpu")
def test_tensors_are_made() -> None:
    x = torch.rand(2, 3)
    assert torch.equal(torch.tensor([1, 2], device="xpu"), torch.tensor([1, 2]))
    assert torch.equal(torch.as_tensor([1, 2], device="xpu:0"), torch.tensor([1, 2]))
    made = [
        torch.zeros(2, device="xpu"), torch.arange(3, device=torch.device("xpu")), torch.rand_like(x, device="xpu:0"),
        torch.full((2,), 1.0, device="xpu"), torch.randint(0, 3, (2,), device="xpu"), x.new_zeros(2, device="xpu"),
        x.new_tensor([1.0], device="xpu"), torch.empty(2, device=0), torch.randperm(4, device="xpu"),
        torch.fft.fftfreq(4, device="xpu"), torch.zeros(2).pin_memory(),
    ]  # fmt: skip
    assert {tensor.device.type for tensor in made} == {"cpu"}
    with torch.device("xpu"):
        assert torch.ones(2).device.type == "cpu"
    generator = torch.Generator(device="xpu").manual_seed(7)
    drawn = torch.randn(3, generator=generator, device="xpu")
    assert torch.equal(drawn, torch.randn(3, generator=torch.Generator().manual_seed(7)))
    assert isinstance(generator, torch.Generator) and isinstance(torch.default_generator, torch.Generator)


@pytest.mark.usefixtures("on_cpu")
def test_other_devices_are_what_they_were() -> None:
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.zeros(2).to("meta").device.type == "meta"
    with torch.device("meta"):
        assert torch.zeros(2).device.type == torch.nn.Linear(2, 2).weight.device.type == "meta"
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)):
            torch.zeros(2).to("cuda")


@pytest.mark.usefixtures("on_cpu")
def test_a_second_device_is_not_there() -> None:
    with pytest.raises(RuntimeError, match=r"there is no xpu:1: LOWBIT_XPU=cpu is one device, xpu:0"):
        torch.zeros(2).to("xpu:1")


@pytest.mark.usefixtures("on_cpu")
def test_one_device_for_several_copies() -> None:
    model, x = torch.nn.Linear(3, 4).to("xpu"), torch.rand(2, 3).to("xpu")
    assert torch.equal(torch.nn.DataParallel(model)(x), model(x))
    assert torch.equal(torch.nn.DataParallel(model, device_ids=[0]).to("xpu")(x), model(x))


@pytest.mark.usefixtures("on_cpu")
def test_mixed_precision() -> None:
    a, b = torch.rand(4, 4), torch.rand(4, 4)
    with torch.autocast(device_type="xpu", dtype=torch.bfloat16, enabled=True):
        assert (a @ b).dtype == torch.bfloat16 and torch.is_autocast_enabled("xpu")
        assert torch.get_autocast_dtype("xpu") == torch.bfloat16
    with torch.autocast("xpu"):  # an Intel GPU's own default
        assert (a @ b).dtype == torch.float16
    with torch.amp.autocast("xpu", enabled=False):
        assert (a @ b).dtype == torch.float32
    with torch.xpu.amp.autocast(enabled=True, dtype=torch.bfloat16):  # type: ignore[attr-defined]
        assert (a @ b).dtype == torch.bfloat16

    @torch.autocast(device_type="xpu", dtype=torch.bfloat16)
    def product() -> torch.Tensor:
        return a @ b

    assert product().dtype == torch.bfloat16 and (a @ b).dtype == torch.float32


@pytest.mark.parametrize("arguments", [(), ("xpu",)])
@pytest.mark.usefixtures("on_cpu")
def test_training_with_a_scaler(arguments: tuple[str, ...], tmp_path: Path) -> None:
    model, optimizer = train_with_a_scaler(torch.amp.GradScaler(*arguments, enabled=True), steps=20)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pth")
    saved = torch.load(tmp_path / "checkpoint.pth", map_location="xpu")
    assert torch.equal(saved["model"]["weight"], model.weight)


@pytest.mark.usefixtures("on_cpu")
def test_files_are_loaded() -> None:
    for place in ("xpu", torch.device("xpu"), {"cpu": "xpu:0"}, lambda storage, location: storage):
        file = io.BytesIO()
        torch.save(torch.arange(3), file)
        file.seek(0)
        assert torch.equal(torch.load(file, map_location=place), torch.arange(3))
    storage = torch.arange(3).untyped_storage()
    assert torch.serialization.default_restore_location(storage, "xpu:0") is storage  # as a file from an Intel GPU says


@pytest.mark.usefixtures("on_cpu")
def test_the_questions_of_torch_xpu() -> None:
    assert torch.xpu.is_available() and torch.xpu.device_count() == 1 and torch.xpu.current_device() == 0
    torch.xpu.set_device(0)
    torch.xpu.synchronize()
    torch.xpu.empty_cache()
    torch.xpu.reset_peak_memory_stats()
    assert 0 < torch.xpu.memory_allocated() <= torch.xpu.max_memory_allocated()
    assert torch.xpu.memory_reserved("xpu") > 0 and torch.xpu.memory_stats()["allocated_bytes.all.peak"] > 0
    free, total = torch.xpu.mem_get_info()
    assert 0 < free <= total == torch.xpu.get_device_properties("xpu").total_memory
    assert "CPU" in torch.xpu.get_device_name() and torch.xpu.is_bf16_supported()
    assert torch.get_device_module("xpu") is torch.xpu
    torch.xpu.manual_seed_all(3)
    drawn = torch.rand(2)
    torch.manual_seed(3)  # which seeds every device
    assert torch.equal(drawn, torch.rand(2))
    state = torch.xpu.get_rng_state()
    again = torch.rand(2)
    torch.xpu.set_rng_state(state)
    assert torch.equal(again, torch.rand(2))


@pytest.mark.usefixtures("on_cpu")
def test_streams_and_events() -> None:
    stream, start, end = torch.xpu.Stream(), torch.xpu.Event(enable_timing=True), torch.xpu.Event(enable_timing=True)
    stream.wait_stream(torch.xpu.current_stream())
    start.record()
    with torch.xpu.stream(stream), torch.xpu.device("xpu:0"):
        x = torch.rand(4).to("xpu", non_blocking=True)
        x.record_stream(stream)
    end.record(stream)
    torch.xpu.current_stream().wait_stream(stream)
    end.synchronize()
    assert end.query() and start.elapsed_time(end) >= 0
    with pytest.raises(RuntimeError, match="recorded"):
        start.elapsed_time(torch.xpu.Event())


@pytest.mark.usefixtures("on_cpu")
def test_the_accelerator() -> None:
    assert torch.accelerator.is_available() and torch.accelerator.device_count() == 1
    device = torch.accelerator.current_accelerator()
    assert device is not None and device.type == "xpu"
    torch.accelerator.synchronize()
    loader = torch.utils.data.DataLoader(torch.arange(6), batch_size=3, pin_memory=True)
    assert [batch.to(device).tolist() for batch in loader] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.usefixtures("on_cpu")
def test_a_profile() -> None:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.XPU]
    with torch.profiler.profile(activities=activities) as profile:
        _ = torch.rand(4, 4).to("xpu") @ torch.rand(4, 4).to("xpu")
    assert "aten::mm" in profile.key_averages().table(sort_by="self_xpu_time_total", row_limit=50)


@pytest.mark.usefixtures("on_cpu")
def test_libraries_put_tensors_there(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert torch.equal(safetensors.load_file(tmp_path / "a.safetensors", device="xpu")["a"], torch.ones(2))
    accelerate = pytest.importorskip("accelerate")
    assert accelerate.utils.is_xpu_available()
    moved = accelerate.utils.send_to_device({"a": torch.ones(2)}, torch.device("xpu"))
    assert moved["a"].device.type == "cpu"


@pytest.mark.usefixtures("on_cpu")
def test_other_threads_know_it_too() -> None:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(torch.zeros(2).to("xpu").device.type))
    thread.start()
    thread.join()
    assert found == ["cpu"]


@pytest.mark.usefixtures("on_cpu")
def test_the_names_of_ipex() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()).eval()
    assert torch.equal(torch.xpu.optimize(model)(torch.ones(1, 4)), model(torch.ones(1, 4)))  # type: ignore[attr-defined]
    assert not torch.xpu.is_autocast_xpu_enabled()  # type: ignore[attr-defined]


@pytest.mark.transformers
@pytest.mark.usefixtures("on_cpu")
def test_models_of_transformers(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "dense", **EVEN)
    expected = logits(transformers.AutoModelForCausalLM.from_pretrained(folder))
    for device_map in ("xpu", "xpu:0", {"": "xpu"}, torch.device("xpu"), "auto", {"": 0}):
        for cls in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
            model = cls.from_pretrained(folder, device_map=device_map)
            assert model.device.type == "cpu" and torch.equal(logits(model), expected)
    model = lowbit.AutoModelForCausalLM.from_pretrained(folder, load_in_4bit=True, device_map="xpu").to("xpu")
    assert model.device.type == "cpu"
    ids = model.generate(IDS.to("xpu"), max_new_tokens=3, do_sample=False)
    assert torch.equal(ids.cpu(), model.to("cpu").generate(IDS, max_new_tokens=3, do_sample=False))
    pipe = transformers.pipeline("text-generation", model=str(folder), device="xpu")
    assert len(pipe("hello", max_new_tokens=3)[0]["generated_text"]) >= len("hello")


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu")
def test_a_compiled_model() -> None:
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()).to("xpu"), torch.rand(2, 4).to("xpu")

    @torch.compile
    def forward(x: torch.Tensor) -> torch.Tensor:
        y = model(x).to("xpu") + torch.ones(8, device="xpu")
        with torch.autocast("xpu", dtype=torch.bfloat16):
            return y @ y.T

    with torch.no_grad():
        torch.testing.assert_close(forward(x).float(), (model(x) + 1) @ (model(x) + 1).T, atol=0.1, rtol=0.05)


def test_the_compiler_of_torch_hears_of_no_intel_gpu(tmp_path: Path) -> None:
    """It stops where two kinds of GPU are there, which "xpu" beside the GPU that it means would be."""
    script = (
        "import torch\nfrom torch._inductor.utils import get_gpu_type\nprint(torch.xpu.is_available(), get_gpu_type())"
    )
    if torch.xpu.is_available():
        pytest.skip('"xpu" is an Intel GPU on this machine')
    result = run(script, tmp_path, LOWBIT_XPU="cpu")
    assert result.stdout.splitlines()[-1:] == ["True cuda"], result.stderr
    assert on_cuda.answered("is_available", torch.cuda.is_available, meaning.Meaning("cuda")) is meaning.is_available


@pytest.mark.slow
@pytest.mark.transformers
def test_the_trainer_of_transformers(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "dense", **EVEN)
    script = f"""
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}, torch_dtype=torch.float32).to("xpu")
rows = [{{"input_ids": torch.arange(3, 35), "labels": torch.arange(3, 35)}}] * 8
arguments = transformers.TrainingArguments(output_dir="run", max_steps=4, bf16=True, learning_rate=1e-2, logging_steps=1,
    per_device_train_batch_size=2, evaluation_strategy="no", optim="adamw_hf", report_to="none", disable_tqdm=True)
trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(arguments.device, losses[-1] < losses[0])
"""
    result = run(script, tmp_path, LOWBIT_XPU="cpu")
    assert result.stdout.endswith("xpu:0 True\n"), result.stderr[-2000:]


def test_every_function_of_torch_that_makes_tensors_is_known() -> None:
    known = {id(getattr(owner, name)) for owner, name in FUNCTIONS}
    now = _device._device_constructors.__wrapped__()  # what is remembered may be from inside a load of transformers
    assert not [function for function in now if id(function) not in known]


def test_undo_gives_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.xpu.is_available():
        pytest.skip('"xpu" is an Intel GPU on this machine')
    before = {(owner, name): getattr(owner, name) for owner, name in FUNCTIONS}
    names, methods = dict(vars(torch.xpu)), set(vars(torch.Tensor))
    monkeypatch.setenv(meaning.VARIABLE, "cpu")
    with lowbit.compat.install(children=False):
        assert torch.xpu.is_available() and torch.zeros is not before[torch, "zeros"]
    assert not torch.xpu.is_available() and vars(torch.xpu) == names
    assert all(getattr(owner, name) is value for (owner, name), value in before.items())
    assert set(vars(torch.Tensor)) == methods
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2).to("xpu")


def test_without_the_variable_nothing_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(meaning.VARIABLE, raising=False)
    before = (torch.zeros, torch.Tensor.to, torch.Generator, torch.xpu.is_available, torch.autocast.__init__)
    with lowbit.compat.install(children=False):
        assert (
            torch.zeros,
            torch.Tensor.to,
            torch.Generator,
            torch.xpu.is_available,
            torch.autocast.__init__,
        ) == before


def test_a_machine_with_an_intel_gpu_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(meaning.VARIABLE, "cpu")
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    zeros = torch.zeros
    with lowbit.compat.install(children=False):
        assert torch.zeros is zeros


def test_a_variable_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(meaning.VARIABLE, "gpu")
    with pytest.raises(meaning.DeviceError, match="LOWBIT_XPU=gpu is nothing"):
        lowbit.compat.install(children=False)


def test_cuda_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is an NVIDIA GPU on this machine")
    monkeypatch.setenv(meaning.VARIABLE, "cuda")
    to = torch.Tensor.to
    with pytest.raises(meaning.DeviceError, match="torch sees no NVIDIA GPU here: use LOWBIT_XPU=cpu"):
        lowbit.compat.install(children=False)
    assert torch.Tensor.to is to


def test_an_nvidia_gpu_answers_for_each_name_that_it_has() -> None:
    cuda = meaning.Meaning("cuda")
    assert [cuda.of(device) for device in ("xpu", "xpu:1", torch.device("xpu", 1), "cpu", 1)] == [
        "cuda", "cuda:1", torch.device("cuda", 1), "cpu", 1,
    ]  # fmt: skip
    for name in (
        "synchronize",
        "empty_cache",
        "memory_allocated",
        "device_count",
        "Stream",
        "Event",
        "manual_seed_all",
    ):
        assert callable(on_cuda.answered(name, getattr(torch.cuda, name), cuda)), name
    assert on_cuda.answered("Event", torch.cuda.Event, cuda) is torch.cuda.Event
    stream_class = on_cuda.answered("Stream", torch.cuda.Stream, cuda)
    assert issubclass(stream_class, torch.cuda.Stream)
    in_xpus_words = on_cuda.answered("device", torch.cuda.device, cuda)
    assert in_xpus_words("xpu:1").idx == 1 and in_xpus_words(torch.device("xpu", 2)).idx == 2


def run(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    import os

    (folder / "script.py").write_text(script)
    environment = {name: value for name, value in os.environ.items() if name != meaning.VARIABLE} | variables
    return subprocess.run(
        [*RUNNER, "script.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_wrong_variable_is_one_sentence(tmp_path: Path) -> None:
    result = run("print('ran')", tmp_path, LOWBIT_XPU="gpu")
    assert (result.returncode, result.stdout) == (2, "") and len(result.stderr.splitlines()) == 1
