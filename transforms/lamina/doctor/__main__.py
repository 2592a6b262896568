"""`python -m lamina.doctor`: is Lamina right on this machine, and if not, what is to be done.

    python -m lamina.doctor                  # everything, on the CPU and on a GPU if there is one
    python -m lamina.doctor --quick          # the checks that an untested torch has to pass
    python -m lamina.doctor --device cuda    # the self-test on one device
    python -m lamina.doctor --json           # for machines

The exit status is 1 if an answer has to be feared wrong, else 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

import torch

from lamina.doctor import families, interplay, transforms
from lamina.doctor.checks import CHECKS, Check, Result
from lamina.doctor.report import Report, examine, tested_range, versions

__all__ = ["main", "ordered", "text"]


def main(arguments: Sequence[str] | None = None, out: TextIO | None = None) -> int:
    """Examine and report; the exit status.

    Args:
        arguments: Those of the command line.
        out: Where to write, the standard output by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lamina.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="the quick checks alone")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--device", action="append", help="run the self-test there")
    options = parser.parse_args(arguments)
    out = out or sys.stdout
    checks = [check for check in ordered() if check.quick or not options.quick]
    on = options.device or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if options.json:
        report = examine(checks, on)
        out.write(json.dumps(report.as_dict(), indent=2) + "\n")
    else:
        known = versions()
        out.write(f"Lamina {known['lamina']} on torch {known['torch']} ")
        out.write(f"(tested: {tested_range()}), Python {known['python']}\n")
        out.write(f"self-test, {len(checks)} checks on {' and '.join(on)}\n")
        report = examine(checks, on, _teller(out))
        out.write(text(report))
    return 0 if report.ok else 1


def ordered() -> list[Check]:
    """All checks, those of the transforms first."""
    homes = [module.__name__ for module in (transforms, interplay, families)]
    return sorted(CHECKS, key=lambda check: homes.index(check.run.__module__))


def _teller(out: TextIO) -> Callable[[Result], None]:
    def tell(result: Result) -> None:
        state = "ok  " if result.ok else "FAIL"
        out.write(f"  {state} {result.name} ({result.device}, {result.seconds:.2f} s)\n")
        out.flush()

    return tell


def text(report: Report) -> str:
    """The report for people, behind the lines of the self-test."""
    ops = report.ops
    counts = ", ".join(f"{len(ops[kind])} {kind}" for kind in ("new", "gone", "changed"))
    proved = sum(hook["ok"] for hook in report.hooks)
    passed = sum(result.ok for result in report.checks)
    settings = {k: v for k, v in report.versions.items() if k.startswith("LAMINA_")}
    lines = [
        "",
        f"platform:  {report.versions['platform']}",
        f"packages:  optree {report.versions['optree']}, numpy {report.versions['numpy']}",
        *([f"settings:  {', '.join(f'{k}={v}' for k, v in settings.items())}"] if settings else []),
        *(f"device:    {line}" for line in report.devices),
        f"hooks:     {proved} of {len(report.hooks)} into torch's private parts proved",
        f"ops:       {counts}, beside those that rules were checked with",
        f"self-test: {passed} of {len(report.checks)} checks passed",
    ]
    if not report.tested:
        lines.append(f"untested:  torch {report.versions['torch']} (tested: {tested_range()})")
    lines += [f"  {kind}: {name}" for kind in ("new", "gone") for name in ops[kind]]
    for problem in report.problems:
        lines += [
            "",
            f"{'PROBLEM' if problem.fatal else 'note'}: {problem.kind} {problem.name}",
            f"  found:  {problem.detail}",
            f"  to fix: {problem.advice}",
        ]
    lines += ["", "all is well" if report.ok else "something is wrong: see above", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
