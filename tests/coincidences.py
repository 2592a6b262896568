"""The law of coincidences: a batch as large as a dim of an example is a batch like any other.

Some ops tell by sizes what an operand is (`torch.linalg.solve` takes its right-hand side for a
batch of vectors where the sizes allow it). A batch dim of the same size must not be taken for what
it is not. So the law draws what other laws avoid: the batch size is each size of the sample in
turn, and each operand is left unmapped in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

import lamina
from tests.laws import (
    close,
    differentiated,
    examples,
    expected_tangents,
    kept_outputs,
    noise,
    of_reference,
    restricted,
    stackable,
    stacked,
    try_on_all,
)
from tests.samples import BATCH, LEFT_OUT, NOT_UNDER, SAMPLES, Case, cases, database

Tensors = tuple[torch.Tensor, ...]
LARGEST = 12  # larger sizes coincide with a batch size no less, but take longer


@dataclass(frozen=True)
class Coincidence:
    """A case with a batch size that is one of its sizes, and the operands that are mapped."""

    case: Case
    size: int
    mapped: tuple[int, ...]

    @property
    def text(self) -> str:
        """What to print about it."""
        return f"{self.case.text}, batch size {self.size}, mapped: {self.mapped}"

    def row(self, i: int) -> Tensors:
        """The arguments of example `i`; after BATCH of them the examples repeat."""
        return examples(self.case, self.mapped, i % BATCH)

    def rows(self) -> list[Tensors]:
        """The arguments of the examples that differ."""
        return [self.row(i) for i in range(min(self.size, BATCH))]

    def repeated(self, results: Sequence) -> list:
        """Results of the examples that differ, as those of all."""
        return [results[i % len(results)] for i in range(self.size)]

    def batch(self, place: str) -> tuple[Tensors, tuple]:
        """The arguments of `vmap`, and their in_dims."""
        args: list[torch.Tensor] = list(self.row(0))
        in_dims: list[int | None] = [None] * len(args)
        for k in self.mapped:
            dim = in_dims[k] = 0 if place == "first" else args[k].dim()
            args[k] = torch.stack([self.row(i)[k] for i in range(self.size)], dim)
        return tuple(args), tuple(in_dims)


def coincidences(name: str, law: str, count: int) -> Iterator[Coincidence]:
    """Those of an operator: every size of every sample, and every choice of mapped operands."""
    for case in cases(name, "vmap" if law == "values" else "vjp", count):
        if case.random:
            continue
        operands = range(len(case.generations[0]))
        sizes = {size for tensor in case.generations[0] for size in tensor.shape}
        for size in sorted(size for size in sizes if 0 < size <= LARGEST):
            for mapped in _choices(operands):
                yield Coincidence(case, size, mapped)


def _choices(operands: Sequence[int]) -> list[tuple[int, ...]]:
    """All operands mapped; all but one, each in turn; one alone, each in turn."""
    most = [tuple(k for k in operands if k != left) for left in operands]
    choices = [tuple(operands), *most, *((k,) for k in operands)]
    return [choice for choice in dict.fromkeys(choices) if choice]


def values(at: Coincidence) -> bool:
    """`vmap(f)` is the stacked loop."""
    case = at.case
    rows = [case.function(*row) for row in at.rows()]
    if case.python or not stackable(case, rows):
        return True  # the law of `vmap` has a word on those
    expected = stacked(at.repeated(rows))
    for place in ("first", "last"):
        args, in_dims = at.batch(place)
        close(lamina.vmap(case.function, in_dims)(*args), expected, f"in_dims={in_dims}")
    return True


def pullbacks(at: Coincidence) -> bool:
    """`vmap(vjp(f))` is a loop of `torch.autograd.grad`."""
    case = at.case
    kept = kept_outputs(case, case.generations[0])
    if not kept:
        return False
    plain = [differentiated(case, row, kept, seed=i) for i, row in enumerate(at.rows())]
    expected = stacked(at.repeated([grads for _, grads, _ in plain]))
    cotangents = stacked(at.repeated([cts for _, _, cts in plain]))

    def pulled_back(cts: Tensors, *tensors: torch.Tensor) -> Tensors:
        f, primals = restricted(case, tensors, kept)
        return lamina.vjp(f, *primals)[1](cts)

    args, in_dims = at.batch("first")
    actual = lamina.vmap(pulled_back, (0, *in_dims))(cotangents, *args)
    close(actual, expected, f"cotangents, in_dims={in_dims}", case.loose)
    return True


def pushforwards(at: Coincidence) -> bool:
    """`vmap(jvp(f))` is a loop of pushforwards."""
    case = at.case
    kept = kept_outputs(case, case.generations[0])
    if not kept:
        return False
    rows, tangents, loose = [], [], case.loose
    for i, row in enumerate(at.rows()):
        f, primals = restricted(of_reference(case), row, kept)
        tangents.append(tuple(noise(p, 100 * i + k) for k, p in enumerate(primals)))
        pushed, rough = expected_tangents(f, primals, tangents[-1])
        rows.append(pushed)
        loose = loose or rough

    def pushed_forward(ts: Tensors, *tensors: torch.Tensor) -> Tensors:
        f, primals = restricted(case, tensors, kept)
        return lamina.jvp(f, primals, ts)[1]

    args, in_dims = at.batch("first")
    actual = lamina.vmap(pushed_forward, (0, *in_dims))(stacked(at.repeated(tangents)), *args)
    close(actual, stacked(at.repeated(rows)), f"tangents, in_dims={in_dims}", loose)
    return True


LAWS: dict[str, Callable[[Coincidence], bool]] = {
    "values": values,
    "pullbacks": pullbacks,
    "pushforwards": pushforwards,
}
_COUNTERPARTS = {"values": "vmap", "pullbacks": "vmap_vjp", "pushforwards": "jvp"}


def operators(law: str) -> list[str]:
    """The operators that a law speaks of: those with a sample of a shape."""
    excluded = {**LEFT_OUT, **NOT_UNDER["vmap"], **NOT_UNDER[_COUNTERPARTS[law]]}
    return [
        name
        for name, op in database().items()
        if name not in excluded and (law == "values" or op.supports_autograd)
    ]


def hold(name: str, law: str, count: int = SAMPLES) -> None:
    """Fails unless the law holds at every coincidence of the operator (or is expected not to)."""
    subjects = list(coincidences(name, law, count))
    if subjects:  # an operator of numbers alone has no sizes
        try_on_all(name, f"coincidences_{law}", subjects, LAWS[law])
