"""The straight-line program of a linear map: steps, and how they are run.

`lamina.autodiff.record` writes it down. To run it is to call torch: user code like any other, at
whatever level and under whatever transform.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lamina_core.errors import MutationError, message
from lamina_core.outer import autocast_off
from lamina_core.tensors import map_tensors, tensors_in
from lamina_core.views import stamp
from lamina_core.wrapper import LevelTensor, shares_memory

__all__ = ["Program", "Slot", "Step"]

_CLASSES = LevelTensor.classes


class Slot:
    """Stands for a value in the arguments of a step."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


class Step:
    """One op of a program.

    Attributes:
        name: The op, for messages.
        call: What is called.
        args: Its positional arguments, with a `Slot` for each value of the program.
        kwargs: Its keyword arguments likewise.
        reads: The slots of all values that it is given.
        nested: Whether some are in lists or among the keyword arguments.
        holes: `(position, slot)` for each of the others.
        outs: The slots of its outputs, None for what is no tensor.
        single: Whether it has one output, which is not in a list.
        last: The slots of values that no later step needs.
    """

    __slots__ = (
        "args",
        "call",
        "holes",
        "kwargs",
        "last",
        "name",
        "nested",
        "outs",
        "reads",
        "single",
    )

    def __init__(
        self, name: str, call: Any, args: list[Any], kwargs: dict[str, Any], reads: list[int]
    ) -> None:
        self.name = name
        self.call = call
        self.args = args
        self.kwargs = kwargs
        self.reads = reads
        self.holes = [(i, arg.index) for i, arg in enumerate(self.args) if type(arg) is Slot]
        self.nested = len(self.reads) > len(self.holes)
        self.outs: list[int | None] = []
        self.single = True
        self.last: list[int] = []

    def constants(self) -> list[Any]:
        """The tensors among its arguments that the program does not compute."""
        return tensors_in(self.args, self.kwargs)


def _filled(tree: Any, values: list[Any]) -> Any:
    """Arguments with the values that their slots stand for."""
    if type(tree) is Slot:
        return values[tree.index]
    if isinstance(tree, (list, tuple)):
        return type(tree)([_filled(item, values) for item in tree])
    return tree


class Program:
    """The steps that lead from inputs, in the first slots, to outputs.

    Args:
        name: The transform, for messages.
        size: How many slots there are.
        steps: All that was written down; those without influence on the outputs are left out.
        outputs: A `Slot` for each value that is wanted; all else is handed out as it is.
    """

    def __init__(self, name: str, size: int, steps: Sequence[Step], outputs: list[Any]) -> None:
        self.name = name
        self.size = size
        self.outputs = outputs
        self.steps = _needed(steps, outputs)
        self.stamps: list[tuple[Any, str, Any]] = []

    def move(self, target: Any) -> None:
        """Clone the constants that share memory with `target`, which is about to be overwritten."""

        def moved(tensor: Any) -> Any:
            return tensor.clone() if shares_memory(tensor, target) else tensor

        for step in self.steps:
            step.args = [map_tensors(moved, arg) for arg in step.args]
            step.kwargs = {key: map_tensors(moved, arg) for key, arg in step.kwargs.items()}

    def seal(self) -> None:
        """Remember the versions of all constants, so that a write to one is noticed."""
        for step in self.steps:
            self.stamps += [(t, step.name, stamp(t)) for t in step.constants()]

    def __call__(self, values: Sequence[Any]) -> list[Any]:
        """Run the program: one tensor per input, to one entry per output.

        Autocast leaves its ops alone, which are those of rules.
        """
        for tensor, name, sealed in self.stamps:
            if stamp(tensor) != sealed:
                raise self._written_over(tensor, name)
        with autocast_off():
            return self._run([*values, *[None] * (self.size - len(values))])

    def _run(self, slots: list[Any]) -> list[Any]:
        for step in self.steps:
            args = step.args.copy()
            for position, slot in step.holes:
                args[position] = slots[slot]
            kwargs = step.kwargs
            if step.nested:
                args = [_filled(arg, slots) for arg in args]
                kwargs = {key: _filled(arg, slots) for key, arg in kwargs.items()}
            out = step.call(*args, **kwargs)
            args.clear()
            for slot in step.last:
                slots[slot] = None
            if step.single:
                slots[step.outs[0]] = out  # type: ignore[index]
            else:
                for place, item in zip(step.outs, out, strict=True):
                    if place is not None:
                        slots[place] = item
            out = None
        return [_filled(out, slots) for out in self.outputs]

    def _written_over(self, tensor: Any, name: str) -> MutationError:
        return MutationError(
            message(
                f"a tensor that {self.name} has kept for {name} was written to in place",
                f"it has the shape {list(tensor.shape)}",
                "to fix: write to a clone of it",
            )
        )


def _needed(steps: Sequence[Step], outputs: Sequence[Any]) -> list[Step]:
    """The steps that outputs depend on, each told which values it is the last to read."""
    live = {out.index for out in outputs if type(out) is Slot}
    kept = []
    for step in reversed(steps):
        if live.isdisjoint(step.outs):
            continue
        if not step.single:
            step.outs = [slot if slot in live else None for slot in step.outs]
        kept.append(step)
        for slot in step.reads:
            if slot not in live:
                step.last.append(slot)
                live.add(slot)
    return kept[::-1]
