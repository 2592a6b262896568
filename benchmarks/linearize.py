"""What does it cost to linearize a function, and to use the result?

`linearize` runs a function once and gives its derivative as a function of tangents. Both parts are
timed next to torch.func.linearize, and the second next to one jvp, which runs the function again:
after how many directions does linearizing pay?

The second table asks what `jacobian` pays for choosing the mode itself, on functions with a tall
and with a wide jacobian, next to the two modes.

    python benchmarks/linearize.py [--quick] [--json FILE] [--markdown FILE]
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import harness
import lamina

Function = Callable[[Tensor], Tensor]


def chain(x: Tensor) -> Tensor:
    """50 pointwise ops: all the cost is that of interpretation."""
    y = x
    for _ in range(25):
        y = y.sin() * x
    return y


def network(widths: tuple[int, ...]) -> Function:
    """Layers of tanh, of the given widths."""
    weights = [torch.randn(n, m) / n**0.5 for n, m in pairwise(widths)]

    def run(x: Tensor) -> Tensor:
        for weight in weights:
            x = torch.tanh(x @ weight)
        return x

    return run


def measure_linearize(rounds: int, min_seconds: float) -> harness.Table:
    """The table of build and call, one row a function."""
    table = harness.Table(
        "linearize: to build it, and to call what it returns",
        [
            "function",
            "build us",
            "torch.func build us",
            "ratio",
            "call us",
            "torch.func call us",
            "ratio ",
            "jvp us",
        ],
    )
    subjects: dict[str, tuple[Function, Tensor]] = {
        "chain of 50 ops, 4 elements": (chain, 1 + torch.rand(4)),
        "MLP 64-256-256-10, batch 64": (network((64, 256, 256, 10)), torch.randn(64, 64)),
    }
    for name, (f, x) in subjects.items():
        t = torch.randn_like(x)
        ours, theirs = lamina.linearize(f, x)[1], torch.func.linearize(f, x)[1]
        result = harness.race(
            {
                "build": {
                    "lamina": lambda f=f, x=x: lamina.linearize(f, x)[0],
                    "torch.func": lambda f=f, x=x: torch.func.linearize(f, x)[0],
                },
                "call": {
                    "lamina": partial(ours, t),
                    "torch.func": partial(theirs, t),
                    "jvp": lambda f=f, x=x, t=t: lamina.jvp(f, (x,), (t,))[1],
                },
            },
            rounds=rounds,
            min_seconds=min_seconds,
        )
        cells: list[float] = []
        for case in ("build", "call"):
            seconds = result.seconds[case]
            cells += [harness.median(seconds[who]) * 1e6 for who in ("lamina", "torch.func")]
            cells.append(harness.median(seconds["lamina"] / seconds["torch.func"]))
        table.add(name, *cells, harness.median(result.seconds["call"]["jvp"]) * 1e6)
        table.note_failures(result.failures)
    return table


def measure_jacobian(rounds: int, min_seconds: float) -> harness.Table:
    """The table of modes, one row a shape."""
    columns = ["auto", "forward", "reverse"]
    table = harness.Table(
        "jacobian of an MLP, one example, by mode", ["widths", *[f"{c} us" for c in columns]]
    )
    for widths in ((8, 128, 128, 512), (512, 128, 128, 8)):
        f, x = network(widths), torch.randn(widths[0])
        row = "-".join(map(str, widths))
        thunks: dict[str, Callable[[], Any]] = {
            mode: partial(lamina.jacobian(f, mode=mode), x) for mode in columns
        }
        result = harness.race({row: thunks}, rounds=rounds, min_seconds=min_seconds)
        table.add(row, *(harness.median(result.seconds[row][mode]) * 1e6 for mode in columns))
        table.note_failures(result.failures)
    return table


def main(arguments: list[str] | None = None) -> harness.Report:
    """Runs both measurements; returns what it printed."""
    report = harness.start("What linearize costs, next to torch.func.", arguments)
    rounds, min_seconds = (3, 0.001) if report.settings.quick else (15, 0.02)
    with warnings.catch_warnings():
        # torch.func.linearize folds constants with torch.fx, which warns about its own doings.
        warnings.filterwarnings("ignore", message="Attempted to insert a get_attr Node")
        report.add(measure_linearize(rounds, min_seconds))
    report.add(measure_jacobian(rounds, min_seconds))
    report.save()
    return report


if __name__ == "__main__":
    main()
