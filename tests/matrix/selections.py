"""What is run in an environment, and what came of it."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from tests.matrix.environments import ROOT, Environment

__all__ = ["SELECTIONS", "Outcome", "run", "table"]

# The marks, and what they mean, are in pyproject.toml.
SELECTIONS = {
    "quick": "not slow and not exhaustive",
    "laws": "not exhaustive and (not slow or versions)",
    "all": "not exhaustive",
    "exhaustive": "exhaustive",
}


@dataclass
class Outcome:
    """A row of the closing table.

    Attributes:
        torch: The version, with the name of its build.
        python: The version of Python.
        status: The exit status of pytest.
        passed, failed: Counts of tests; errors outside tests count as failed.
        others: The tests skipped or expected to fail.
        seconds: How long the tests took.
        made_in: How many seconds it took to make the environment; 0 for one that was there.
        gigabytes: The size of the environment.
        notes: What else there is to say, such as which newer version could not be installed.
        ran: Whether there was an environment to run them in.
    """

    torch: str
    python: str
    status: int = 0
    passed: int = 0
    failed: int = 0
    others: int = 0
    seconds: float = 0.0
    made_in: float = 0.0
    gigabytes: float = 0.0
    notes: list[str] = field(default_factory=list)
    ran: bool = True


def run(environment: Environment, selection: str, more: Sequence[str]) -> Outcome:
    """Runs a selection in an environment that is ready.

    Args:
        environment: Where.
        selection: A key of `SELECTIONS`.
        more: Further arguments for pytest.
    """
    outcome = Outcome(environment.torch_version(), environment.python_version)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            *(str(environment.python), "-m", "pytest", "-q", "-n", "2"),
            *("-p", "no:cacheprovider", f"--junit-xml={report}", "-m", SELECTIONS[selection]),
            *more,
        ]
        # Test processes share the cores already; a thread pool in each would make them fight.
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        start = time.perf_counter()
        result = subprocess.run(command, cwd=ROOT, env={**threads, **os.environ}, check=False)
        outcome.seconds = time.perf_counter() - start
        outcome.status = result.returncode
        if report.exists():
            _count(report, outcome)
    outcome.gigabytes = environment.gigabytes()
    return outcome


def _count(report: Path, outcome: Outcome) -> None:
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        tests, failures, errors, skipped = (
            int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")
        )
        outcome.failed += failures + errors
        outcome.others += skipped
        outcome.passed += tests - failures - errors - skipped


def table(outcomes: Sequence[Outcome]) -> str:
    """The closing table, in Markdown."""
    heads = ("torch", "Python", "passed", "failed", "skipped", "seconds", "made in", "GB")
    rows = [heads, ("---", "---", *["---:"] * 6)]
    for o in outcomes:
        counts = (o.passed, o.failed, o.others, f"{o.seconds:.0f}", f"{o.made_in:.0f}")
        cells = [*map(str, counts), f"{o.gigabytes:.1f}"]
        rows.append((o.torch, o.python, *(cells if o.ran else ["-"] * len(cells))))
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join([*lines, "", *(note for o in outcomes for note in o.notes)]).rstrip()
