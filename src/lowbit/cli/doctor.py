"""`lowbit doctor`: is this machine ready, and if not, what mends it."""

from __future__ import annotations

import argparse

from lowbit.cli.options import add_json
from lowbit.cli.output import Output, size_text
from lowbit.doctor import Diagnosis, examine

DESCRIPTION = """\
Say what is installed and what each package is for, which device and instruction set there is, which kernel would run
each format and why others would not, and what is wrong with the line that mends it. Changes nothing.

The exit code is 1 if something that lowbit stands on is missing, too old or broken; what is optional is only noted."""
EXAMPLES = """\
  lowbit doctor
  lowbit doctor --device cuda
  lowbit doctor --json | jq '.problems[].mend'"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="cpu", metavar="D", help="whose kernels are listed: cpu, cuda, xpu (default: cpu)"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    output = Output(options.json)
    diagnosis = examine(options.device)
    print_machine(output, diagnosis)
    print_packages(output, diagnosis)
    print_kernels(output, diagnosis)
    print_problems(output, diagnosis)
    output.result(diagnosis.to_dict())
    return 0 if diagnosis.healthy else 1


def print_machine(output: Output, found: Diagnosis) -> None:
    machine = found.machine
    quota = f", {machine.quota:g} by quota" if machine.quota else ""
    memory = (
        "unknown"
        if machine.memory is None
        else f"{size_text(machine.memory)}, {size_text(machine.available or 0)} free"
    )
    output.facts(
        [
            ("lowbit", f"{found.lowbit} on Python {found.python}"),
            ("system", machine.system),
            ("processor", f"{machine.processor} ({' '.join(machine.flags) or 'no vector extensions known'})"),
            ("compiled core", f"uses {found.instruction_set}" if found.instruction_set else "missing"),
            *([("prefill", found.prefill)] if found.prefill else []),
            *([("keys and values", found.cache)] if found.cache else []),
            *([("bf16 weights", found.plain)] if found.plain else []),
            ("cores", f"{machine.cores}, of which usable {machine.usable_cores}{quota}: {machine.threads} threads"),
            ("memory", memory),
            ("devices", ", ".join(found.devices)),
            *([("OpenVINO", found.openvino)] if found.openvino else []),
        ]
    )


def print_packages(output: Output, found: Diagnosis) -> None:
    rows = [(p.name, p.version or "-", p.purpose, p.state or "good") for p in found.packages]
    output.say()
    output.table(("package", "version", "needed for", "state"), rows)


def print_kernels(output: Output, found: Diagnosis) -> None:
    rows = []
    for service in found.kernels:
        refused = "; ".join(f"{kernel}: {reason}" for kernel, reason in service.refused.items())
        rows.append((service.format, f"{service.bits_per_weight:.2f}", service.kernel or "none", refused or "-"))
    output.say()
    output.table(("format", "bits/weight", f"kernel on {found.device}", "refused by"), rows, right=("bits/weight",))


def print_problems(output: Output, found: Diagnosis) -> None:
    output.say()
    for problem in found.problems:
        output.say(f"{'wrong' if problem.serious else 'note'}: {problem.what}\n   mend: {problem.mend}")
    if found.healthy:
        output.say("all is well" if not found.problems else "nothing is broken")
