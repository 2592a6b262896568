"""Which ATen ops each transform covers, and how: `python -m lamina.coverage`.

Every overload that takes a tensor and is no `out=` variant is in one of the five states of
`lamina_core.rules.STATES`, once for each transform. Beside it stands what torch.func has for the
same overload, read off PyTorch's dispatcher.

    python -m lamina.coverage                           # the counts
    python -m lamina.coverage --save docs/coverage.md   # and the whole table
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lamina.autodiff.declare import FORWARD, REVERSE
from lamina.autodiff.forward import state_of as jvp_state
from lamina.autodiff.reverse import state_of as vjp_state
from lamina.batching.table import RULES
from lamina.batching.user_ops import state_of as vmap_state
from lamina_core.rules import STATES
from lamina_core.schema import facts
from lamina_core.torch_hooks.registry import all_op_names, has_kernel_for

__all__ = ["Row", "absent", "report", "rows"]

_INTRODUCTION = """\
What a function calls reaches a transform as ops of ATen, PyTorch's library of kernels. An op has
overloads, one for each form of its arguments: `x.sum()` is `sum.default`, `x.sum(0)` is
`sum.dim_IntList`. Here is every overload that takes a tensor and is no `out=` variant, and which
way it goes under `vmap`, in reverse mode (`vjp`: grad, jacrev) and in forward mode (`jvp`: jacfwd).

To look one up, unfold the first letter of its name, or ask `lamina.debug.explain("aten.sum")`.
"""

_LEGEND = """\
## The words

A state says which way an op goes, not that it runs: many of these are for sparse or quantized
tensors, or for devices of their own.

* **rule**: written by hand. **family**: made from the schema, as for all elementwise ops, or from
  one declaration of a derivative.
* **decomposed**: run as the ops it is made of, which are in the table themselves.
* **loop** (vmap): example by example, with a warning. **borrowed** (vjp, jvp): PyTorch's own
  formula, or its error where it has none.
* **missing**: an error says so. Under vmap these are ops whose result is a Python value or of a
  shape that depends on values, and writes without an out-of-place form.
* torch.func, vmap: **kernel** or **decomposed** if the dispatcher has one under the key
  FuncTorchBatched, FuncTorchVmapMode or FuncTorchBatchedDecomposition; a few kernels do nothing but
  raise an error. All others go to its loop, which takes no ops that write or view.
* torch.func, derivatives: **formula** if there is a kernel under an Autograd key (again, some only
  raise an error), **decomposed** if the op is composite.
"""

_HOME = "docs/coverage.md"
_BATCHED = ("FuncTorchBatched", "FuncTorchVmapMode")
_AUTOGRAD = ("Autograd", "AutogradCPU", "AutogradCUDA")


@dataclass(frozen=True)
class Row:
    """One overload.

    Attributes:
        name: As `torch.ops` has it, without the namespace: `sum.dim_IntList`.
        vmap: Its state under vmap.
        vjp: Its state in reverse mode.
        jvp: Its state in forward mode.
        func_vmap: What torch.func has for vmap: "kernel", "decomposed" or "loop".
        func_derivative: What it has for derivatives: "formula", "decomposed" or "none".
    """

    name: str
    vmap: str
    vjp: str
    jvp: str
    func_vmap: str
    func_derivative: str

    @property
    def states(self) -> tuple[str, ...]:
        """All but the name."""
        return (self.vmap, self.vjp, self.jvp, self.func_vmap, self.func_derivative)


def rows() -> list[Row]:
    """A row for every ATen overload that takes a tensor and is no `out=` variant, by name.

    Example:
        >>> from lamina.coverage import rows
        >>> {row.name: row for row in rows()}["median.default"].vmap
        'rule'
    """
    return [_row(op) for op in _overloads()]


def absent() -> dict[str, list[str]]:
    """The ops with rules that the running torch does not have, and the transforms of these."""
    found: dict[str, list[str]] = {}
    for transform, table in (("vmap", RULES), ("vjp", REVERSE), ("jvp", FORWARD)):
        for rule in table.absent:
            found.setdefault(str(rule.op).removeprefix("aten."), []).append(transform)
    return dict(sorted(found.items()))


def _overloads() -> Iterator[Any]:
    for full in sorted(all_op_names()):
        namespace, _, name = full.partition("::")
        if namespace != "aten":
            continue
        base, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, base), overload or "default")
        known = facts(op)
        takes_tensors = known.tensor_args or known.list_args or known.tensor_kwargs
        writes_to_keyword = any(isinstance(written, str) for written in known.mutated)
        if takes_tensors and not writes_to_keyword:
            yield op


def _row(op: Any) -> Row:
    vmap = _called(vmap_state(op), "loop")
    vjp, jvp = _called(vjp_state(op), "borrowed"), _called(jvp_state(op), "borrowed")
    if _has(op, _BATCHED):
        func_vmap = "kernel"
    else:
        func_vmap = "decomposed" if _has(op, ("FuncTorchBatchedDecomposition",)) else "loop"
    otherwise = "decomposed" if _has(op, ("CompositeImplicitAutograd",)) else "none"
    func_derivative = "formula" if _has(op, _AUTOGRAD) else otherwise
    return Row(str(op).removeprefix("aten."), vmap, vjp, jvp, func_vmap, func_derivative)


def _called(state: str, generic: str) -> str:
    """A state, with the generic one by its name."""
    return generic if state == "generic" else state


def _has(op: Any, keys: Iterable[str]) -> bool:
    return any(has_kernel_for(op.name(), key) for key in keys)


# -- the report ------------------------------------------------------------------------------------


def summary(table: list[Row]) -> str:
    """The counts: by state, and where the two differ for vmap."""
    states = [*STATES[:3], "loop", "borrowed", "missing"]
    counts = [Counter(row.states[column] for row in table) for column in range(3)]
    lines = ["| state | vmap | vjp | jvp |", "|---|---:|---:|---:|"]
    lines += [f"| {state} | {' | '.join(str(c[state]) for c in counts)} |" for state in states]
    func_vmap = Counter(row.func_vmap for row in table)
    func_derivative = Counter(row.func_derivative for row in table)
    lines += [
        "",
        "| torch.func | vmap | derivatives |",
        "|---|---:|---:|",
        f"| kernel or formula | {func_vmap['kernel']} | {func_derivative['formula']} |",
        f"| decomposed | {func_vmap['decomposed']} | {func_derivative['decomposed']} |",
        f"| loop, or none | {func_vmap['loop']} | {func_derivative['none']} |",
        "",
    ]
    batched = [row.vmap not in ("loop", "missing") for row in table]
    peer = [row.func_vmap != "loop" for row in table]
    both = Counter(zip(batched, peer, strict=True))
    lines += [
        f"Of {len(table)} overloads, {sum(batched)} are batched here, {sum(peer)} in torch.func:",
        f"{both[True, True]} in both, {both[True, False]} here alone, "
        f"{both[False, True]} there alone, {both[False, False]} in neither.",
    ]
    gone = [f"{name} ({', '.join(transforms)})" for name, transforms in absent().items()]
    if gone:
        lines += ["", f"Ops of other versions of torch that have rules: {', '.join(gone)}."]
    return "\n".join(lines) + "\n"


def report() -> str:
    """The whole table as Markdown, the counts first."""
    table = rows()
    parts = [
        "# Coverage\n",
        _INTRODUCTION,
        f"Made with torch {torch.__version__} by `python -m lamina.coverage --save {_HOME}`.\n",
        _LEGEND,
        "## The counts\n",
        summary(table),
        "## All overloads\n",
        "Overloads of an op that agree in everything share a line.\n",
    ]
    groups = itertools.groupby(table, key=lambda row: row.name[0])
    parts += [_section(letter, list(group)) for letter, group in groups]
    return "\n".join(parts)


def _section(letter: str, table: list[Row]) -> str:
    """The rows of the ops that start with a letter, folded up."""
    merged: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for row in table:
        base, _, overload = row.name.partition(".")
        merged.setdefault((base, row.states), []).append(overload)
    lines = [
        f"<details><summary><code>{letter}</code>: {len(table)} overloads</summary>\n",
        "| op | overloads | vmap | vjp | jvp | torch.func vmap | derivatives |",
        "|---|---|---|---|---|---|---|",
        *[
            f"| {base} | {', '.join(overloads)} | {' | '.join(states)} |"
            for (base, states), overloads in merged.items()
        ],
        "\n</details>\n",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print the counts, and save the whole table if asked to."""
    parser = argparse.ArgumentParser(prog="python -m lamina.coverage", description=__doc__)
    parser.add_argument("--save", type=Path, help="a Markdown file for the whole table")
    options = parser.parse_args(arguments)
    sys.stdout.write(summary(rows()))
    if options.save is not None:
        options.save.write_text(report())


if __name__ == "__main__":
    main()
