"""The one way in which every script of this folder measures time and memory.

Time. Contenders race in interleaved rounds (A, B, A, B, ...), so a machine that slows down for a
second slows all of them down. Ratios are taken within a round and the median is taken over the
rounds: the answer to "how much slower than the peer" then survives a noisy machine, which the
microseconds beside it do not. torch runs on one thread, the garbage collector is off while the
clock runs, and in every round a contender runs untimed for as long as it is then timed. Contenders
of one case must also agree on the answer, because the speed of a wrong answer is of no interest.

Memory. See `peak_memory`.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optree
import torch
from torch.profiler import ProfilerActivity, profile

Thunk = Callable[[], Any]


# ---------------------------------------------------------------------------------------- time


@dataclass
class Race:
    """What a race found.

    Attributes:
        seconds: `seconds[case][contender]` holds the seconds per call, one entry per round, so that
            `a - b` and `a / b` of two entries pair up what was measured side by side.
            NaN for a contender that failed.
        failures: `failures[case, contender]` is the error that took a contender out of the race.
    """

    seconds: dict[Hashable, dict[str, np.ndarray]] = field(default_factory=dict)
    failures: dict[tuple[Hashable, str], str] = field(default_factory=dict)


def race(
    cases: Mapping[Hashable, Mapping[str, Thunk]],
    *,
    rounds: int = 15,
    min_seconds: float = 0.02,
    rtol: float = 1e-3,
    atol: float = 1e-4,
) -> Race:
    """Times every contender of every case, all of them once per round.

    Args:
        cases: `cases[case][contender]` is a function of no arguments. Contenders of one case must
            return the same values, up to the tolerances.
        rounds: how many samples to take of each contender.
        min_seconds: a sample repeats the call until it lasts this long.
        rtol: relative tolerance of the comparison of answers.
        atol: absolute tolerance of the comparison of answers.
    """
    result = Race()
    # Every sample starts with a collection; torch's own objects, which are many, need not be in it.
    gc.collect()
    gc.freeze()
    entrants: list[tuple[Hashable, str, Thunk, int]] = []
    for case, contenders in cases.items():
        answers = {}
        result.seconds[case] = {}
        for name, thunk in contenders.items():
            result.seconds[case][name] = np.full(rounds, np.nan)
            try:
                answers[name] = thunk()
            except Exception as error:  # a refusal is a result, which the table reports
                result.failures[case, name] = f"{type(error).__name__}: {_first_line(error)}"
                continue
            entrants.append((case, name, thunk, _repeats(thunk, min_seconds)))
        assert_agree(answers, case, rtol=rtol, atol=atol)

    for i in range(rounds):
        for case, name, thunk, repeats in entrants:
            result.seconds[case][name][i] = _sample(thunk, repeats)
    gc.unfreeze()
    return result


def _sample(thunk: Thunk, repeats: int) -> float:
    """Seconds per call, over `repeats` calls in a row, behind as many that are not timed."""
    gc.collect()
    gc.disable()
    try:
        # Who ran before has left the caches full of other things; that takes dozens of calls to
        # mend where an op makes large results, and says nothing about the one that runs now.
        for _ in range(repeats):
            thunk()
        start = time.perf_counter()
        for _ in range(repeats):
            thunk()
        return (time.perf_counter() - start) / repeats
    finally:
        gc.enable()


def _repeats(thunk: Thunk, min_seconds: float) -> int:
    """How many calls last `min_seconds`; doubles until they do, which also warms `thunk` up."""
    repeats = 1
    while (seconds := _sample(thunk, repeats) * repeats) < min_seconds / 2:
        repeats *= 2
    return max(1, round(repeats * min_seconds / seconds))


def assert_agree(answers: Mapping[str, Any], case: Hashable, *, rtol: float, atol: float) -> None:
    """Raises AssertionError unless all answers (pytrees of tensors) equal the last one's."""
    if not answers:
        return
    *others, peer = answers
    expected = optree.tree_leaves(answers[peer])
    for name in others:
        torch.testing.assert_close(
            optree.tree_leaves(answers[name]),
            expected,
            rtol=rtol,
            atol=atol,
            msg=lambda text, name=name: f"{case}: {name} and {peer} disagree.\n{text}",
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""


def median(samples: np.ndarray) -> float:
    """The median of samples, of their differences or of their ratios."""
    return float(np.median(samples))


# -------------------------------------------------------------------------------------- memory


def peak_memory(thunk: Thunk, *, warmup: bool = True) -> int:
    """The most bytes of tensor memory that `thunk` holds at once, beyond what was held before.

    The profiler logs each allocation and each release that torch's CPU allocator makes; the answer
    is the maximum of the running sum. It is exact and the same in every run. The alternatives are
    neither: resident set size keeps counting pages that the C library holds on to, and depends on
    what the process did before; adding up the storages that Python can see misses the scratch
    buffers of C++ kernels and whatever a C++ graph keeps alive.

    Args:
        thunk: the function to measure. What it returns counts while it is being made.
        warmup: call it once beforehand, so that caches filled on the first call do not count.
    """
    if warmup:
        thunk()
    gc.collect()
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        thunk()
    # The profiler's public tables add up memory per op, which loses the order of events.
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    changes.sort(key=lambda change: change[0])
    return max(0, *np.cumsum([size for _, size in changes]).tolist()) if changes else 0


# -------------------------------------------------------------------------------------- report


@dataclass
class Table:
    """Rows of numbers or text under named columns; prints as GitHub markdown.

    A column that measures something says its unit in its name.
    """

    title: str
    columns: Sequence[str]
    rows: list[list[str | float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: str | float) -> None:
        """Appends a row, one cell per column; NaN stands for "could not be measured"."""
        if len(cells) != len(self.columns):
            raise ValueError(
                f"{len(cells)} cells for {len(self.columns)} columns of {self.title!r}"
            )
        self.rows.append(list(cells))

    def note_failures(self, failures: Mapping[tuple[Hashable, str], str]) -> None:
        """Says below the table why cells are empty."""
        for (case, name), error in failures.items():
            note = f"{name} failed on {case}: {error}"
            if note not in self.notes:
                self.notes.append(note)

    def __str__(self) -> str:
        cells = [list(self.columns), *([_cell(c) for c in row] for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        # The first column is a name and reads from the left; numbers line up on the right.
        lines = [
            f"| {row[0]:<{widths[0]}} |"
            + "".join(f" {c:>{w}} |" for c, w in zip(row[1:], widths[1:], strict=True))
            for row in cells
        ]
        rule = f"| {'-' * widths[0]} |" + "".join(f" {'-' * (w - 1)}: |" for w in widths[1:])
        notes = ["", *(f"* {note}" for note in self.notes)] if self.notes else []
        return "\n".join([f"### {self.title}", "", lines[0], rule, *lines[1:], *notes, ""])


def _cell(value: str | float) -> str:
    """Three significant digits, which is more than a shared machine is worth."""
    if isinstance(value, str):
        return value
    if np.isnan(value):
        return "-"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}"


def environment() -> dict[str, str]:
    """What a reader must know to compare a number with their own."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {_cpu_model()}",
        "threads": str(torch.get_num_threads()),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or "unknown processor"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown processor"


@dataclass
class Report:
    """The tables of one run: printed as they are finished, saved together at the end."""

    settings: argparse.Namespace
    tables: list[Table] = field(default_factory=list)

    def add(self, table: Table) -> None:
        """Prints a finished table and keeps it for `save`."""
        print(table, flush=True)
        self.tables.append(table)

    def save(self) -> None:
        """Writes the files that the command line asked for."""
        if self.settings.json is not None:
            _write(self.settings.json, json.dumps(self.as_dict(), indent=2) + "\n")
        if self.settings.markdown is not None:
            facts = "\n".join(f"* {name}: {value}" for name, value in environment().items())
            _write(self.settings.markdown, "\n".join([facts, "", *map(str, self.tables)]))

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON types; NaN, which JSON lacks, becomes null."""
        return {
            "environment": environment(),
            "tables": [
                {
                    "title": table.title,
                    "notes": table.notes,
                    "rows": [
                        {
                            column: None if isinstance(c, float) and np.isnan(c) else c
                            for column, c in zip(table.columns, row, strict=True)
                        }
                        for row in table.rows
                    ],
                }
                for table in self.tables
            ],
        }


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def start(description: str, arguments: Sequence[str] | None = None) -> Report:
    """Reads the command line that all benchmarks share, and pins torch to one thread."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller tensors: rough")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the tables as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="save them as markdown")
    settings = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report = Report(settings)
    print(", ".join(f"{name} {value}" for name, value in environment().items()), flush=True)
    print()
    return report
