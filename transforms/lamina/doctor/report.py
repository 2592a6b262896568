"""What the doctor finds, put together: versions, devices, hooks, ops and checks, and what to do."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

import torch

from lamina.doctor.checks import Check, Result, run
from lamina_core import schema_record
from lamina_core.torch_hooks.doors import prove
from lamina_core.versions import TESTED, is_tested

__all__ = ["Problem", "Report", "devices", "examine", "tested_range", "versions"]


@dataclass(frozen=True)
class Problem:
    """Something that is wrong.

    Attributes:
        kind: "hook", "check", or "op" for an op that is not the one that its rule is for.
        name: What it is about.
        detail: What was found.
        advice: What to do.
        fatal: Whether answers may be wrong: the exit status is then 1.
    """

    kind: str
    name: str
    detail: str
    advice: str
    fatal: bool


@dataclass
class Report:
    """All that was found.

    Attributes:
        versions: Of Python and of the packages, by name.
        tested: Whether the version of torch is one that the tests have run on.
        devices: A line for each.
        hooks: The proofs: `name`, `reason`, `ok`, `detail`.
        ops: The ops of the running torch beside those recorded: `new`, `gone` and `changed`.
        checks: The results of the self-test.
        problems: What is wrong.
    """

    versions: dict[str, str]
    tested: bool
    devices: list[str]
    hooks: list[dict[str, Any]] = field(default_factory=list)
    ops: dict[str, Any] = field(default_factory=dict)
    checks: list[Result] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no answer has to be feared wrong."""
        return not any(problem.fatal for problem in self.problems)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {"ok": self.ok, **asdict(self)}


def tested_range() -> str:
    """The versions of torch that the tests have run on, as text."""
    return " to ".join(".".join(map(str, version)) for version in TESTED)


def versions() -> dict[str, str]:
    """Of Python, the packages and the system."""
    found = {"lamina": _version("lamina"), "torch": torch.__version__}
    found |= {name: _version(name) for name in ("optree", "numpy")}
    found |= {"python": platform.python_version(), "platform": platform.platform()}
    settings = {key: value for key, value in os.environ.items() if key.startswith("LAMINA_")}
    return found | settings


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed: run from its sources"


def devices() -> list[str]:
    """A line for the CPU and for each accelerator."""
    capability = torch.backends.cpu.get_cpu_capability()
    lines = [f"cpu: {platform.machine()}, {capability}, {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            memory = facts.total_memory / 2**30
            lines.append(
                f"cuda:{index}: {facts.name}, {memory:.0f} GiB, "
                f"capability {facts.major}.{facts.minor}, CUDA {torch.version.cuda}"
            )
    elif torch.version.cuda is not None:
        lines.append(f"cuda: none found; torch was built for CUDA {torch.version.cuda}")
    if torch.backends.mps.is_available():
        lines.append("mps: available")
    return lines


def examine(
    checks: Sequence[Check],
    on: Sequence[str] = ("cpu",),
    tell: Callable[[Result], None] | None = None,
) -> Report:
    """Look at everything.

    Args:
        checks: The self-test.
        on: The devices to run it on.
        tell: Called with each result of the self-test when it is there.
    """
    report = Report(versions(), is_tested(), devices())
    report.hooks = [proof._asdict() for proof in prove()]
    report.ops = schema_record.report()._asdict()
    for device in on:
        report.checks += run(checks, device, tell)
    report.problems = _problems(report)
    return report


def _problems(report: Report) -> list[Problem]:
    found = [
        Problem("hook", hook["name"], hook["detail"], _hook_advice(hook["reason"]), True)
        for hook in report.hooks
        if not hook["ok"]
    ]
    advice = _check_advice()
    found += [
        Problem("check", f"{result.name}, on {result.device}", _detail(result), advice, True)
        for result in report.checks
        if not result.ok
    ]
    found += [Problem("op", name, how, _OP, False) for name, how in report.ops["changed"].items()]
    return found


def _detail(result: Result) -> str:
    return f"{result.detail} ({result.where})" if result.where else result.detail


_OP = (
    "its rules are left out, and it is decomposed, looped over or given PyTorch's own derivative: "
    "nothing is to be done unless that is too slow"
)


def _hook_advice(reason: str) -> str:
    return f"it is needed for: {reason}; {_other_torch()}"


def _check_advice() -> str:
    if is_tested():
        return (
            "reinstall Lamina and torch; where that does not help, report it with the output of "
            "`LAMINA_DEBUG=1 python -m lamina.doctor --json`"
        )
    return _other_torch()


def _other_torch() -> str:
    (low, high), (_, newest) = TESTED
    return (
        f"install a torch that Lamina has been tested with: "
        f"pip install 'torch>={low}.{high},<{low}.{newest + 1}'"
    )
