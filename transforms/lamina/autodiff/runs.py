"""One run of a function at a level of its own: on a tape, or with tangents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lamina.autodiff.checks import is_differentiable, need_differentiable, split_aux
from lamina.autodiff.forward import ForwardInterpreter
from lamina.autodiff.reverse import ReverseInterpreter
from lamina.autodiff.tape import Node, backward, move_residuals
from lamina_core import pytree
from lamina_core.mode import mode_off
from lamina_core.recipe import root_of
from lamina_core.views import handed_out, refresh_all
from lamina_core.wrapper import LevelTensor, plain_of, strip_dead

__all__ = ["ForwardRun", "ReverseRun", "run_forward", "run_reverse", "unshared"]

_CLASSES = LevelTensor.classes
Tensor = torch.Tensor


class ReverseRun:
    """One run of a function on a tape: what it returned, and where its inputs and outputs lie.

    Attributes:
        interpreter: The level it ran at.
        leaves: The leaves of the arguments chosen for differentiation.
        specs: The spec of each chosen argument.
        in_nodes: The tape node of each leaf, None for one that is not differentiable.
        values: The leaves of the output, one level down.
        out_spec: The structure of the output.
        positions: The place of each output leaf on the tape, None for constants.
        aux: The aux output, one level down.
        written: The arguments that were written to, each with the value it has now.
    """

    interpreter: ReverseInterpreter
    leaves: list[Any]
    specs: list[Any]
    in_nodes: list[Node | None]
    values: list[Any]
    out_spec: Any
    positions: list[tuple[Node, int] | None]
    aux: Any
    written: list[tuple[Any, Any]]

    def pull(self, cts: Sequence[Any], *, release: bool) -> list[Any]:
        """The cotangent of each chosen argument, in its structure.

        Zero where an argument had no influence, None for leaves that are not differentiable.
        """
        inputs = [node for node in self.in_nodes if node is not None]
        if self.interpreter.watch:
            grads = backward(self.positions, cts, inputs, release=release)
        else:
            with mode_off():
                grads = backward(self.positions, cts, inputs, release=release)
        found = iter(grads)
        filled = []
        below = self.interpreter.below
        for node, leaf in zip(self.in_nodes, self.leaves, strict=True):
            ct = None if node is None else next(found)
            if ct is None:
                ct = None if node is None else torch.zeros_like(leaf)
            elif below is not None and type(ct) not in _CLASSES:
                # Made inside the level below, like any result of an op there.
                ct = below.constant(ct)
            elif type(ct) is Tensor and ct.layout is not leaf.layout:
                ct = ct.to_dense()  # of sparse values in between
            filled.append(ct)
        trees, start = [], 0
        for spec in self.specs:
            stop = start + spec.num_leaves
            trees.append(pytree.unflatten(spec, filled[start:stop]))
            start = stop
        return trees

    def let_go(self) -> None:
        """Drop what the function returned: a pass does not read it, and it may be large."""
        self.values, self.aux, self.written = [], None, []

    def write_back(self, *, keep: bool) -> None:
        """Let the caller see what was written to the arguments (NOTE [Writes]).

        With `keep`, residuals in the memory about to be overwritten are moved out of it first.
        """
        for original, value in self.written:
            if keep:
                move_residuals(self.positions, original)
            original.copy_(value)


def run_reverse(
    interpreter: ReverseInterpreter,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    chosen: Sequence[int],
    kwargs: dict[str, Any],
    has_aux: bool,
) -> ReverseRun:
    """Run `func` on a fresh tape.

    Args:
        interpreter: The level to run at, which is entered and left here.
        func: The function.
        args: Its positional arguments.
        chosen: Positions of those to differentiate with respect to.
        kwargs: Its keyword arguments.
        has_aux: Whether it returns `(output, aux)`.
    """
    run = ReverseRun()
    flat = [pytree.flatten(arg) for arg in args]
    run.leaves = [leaf for at in chosen for leaf in flat[at][0]]
    run.specs = [flat[at][1] for at in chosen]
    need_differentiable(run.leaves, args, chosen, str(interpreter))
    run.interpreter = interpreter
    wrappers: list[tuple[Any, Any]] = []

    def given(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        wrapped = interpreter.argument(leaf)
        wrappers.append((leaf, wrapped))
        return wrapped

    with interpreter, torch.enable_grad():
        new_args: list[Any] = [None] * len(args)
        run.in_nodes = []
        for at in chosen:
            leaves, spec = flat[at]
            new = []
            for leaf in leaves:
                if is_differentiable(leaf):
                    wrapped = interpreter.leaf(leaf)
                    wrappers.append((leaf, wrapped))
                    run.in_nodes.append(wrapped.node)
                    new.append(wrapped)
                else:
                    run.in_nodes.append(None)
                    new.append(given(leaf))
            new_args[at] = pytree.unflatten(spec, new)
        for at, (leaves, spec) in enumerate(flat):
            if at not in chosen:
                new_args[at] = pytree.unflatten(spec, [given(leaf) for leaf in leaves])
        if kwargs:
            kwargs = pytree.tree_map(given, kwargs)
        out = func(*new_args, **kwargs)
        new_args = new = wrapped = None  # type: ignore[assignment]
        if has_aux:
            out, aux = split_aux(out, interpreter)
            aux, aux_spec = pytree.flatten(aux)
            lowered = [_lowered(interpreter, a) for a in aux]
        outs, run.out_spec = pytree.flatten(out)
        outs = [strip_dead(o) for o in outs]
        if interpreter.mutated:
            refresh_all(interpreter, outs, {})
        run.positions = [
            (o.node, o.index) if interpreter.is_own(o) and o.node is not None else None
            for o in outs
        ]
        run.values = [_lowered(interpreter, o) for o in outs]
    run.values = [*map(handed_out, outs, run.values)]
    run.aux = None
    if has_aux:
        run.aux = pytree.unflatten(aux_spec, [*map(handed_out, aux, lowered)])
    run.written = _written(interpreter, wrappers)
    return run


class ForwardRun:
    """One run of a function with tangents: what it returned.

    Attributes:
        values: The leaves of the output, one level down.
        tangents: The tangent of each, None for zero.
        out_spec: The structure of the output.
        aux: The aux output, one level down.
        written: The arguments that were written to, each with the value it has now.
    """

    values: list[Any]
    tangents: list[Any]
    out_spec: Any
    aux: Any
    written: list[tuple[Any, Any]]

    def write_back(self) -> None:
        """Let the caller see what was written to the arguments (NOTE [Writes])."""
        for original, value in self.written:
            original.copy_(value)

    def filled(self, tangents: Sequence[Any]) -> Any:
        """Tangents of the output in its structure, zeros in place of None."""
        filled = [
            torch.zeros_like(value) if t is None and is_differentiable(value) else t
            for t, value in zip(tangents, self.values, strict=True)
        ]
        return pytree.unflatten(self.out_spec, filled)


def run_forward(
    interpreter: ForwardInterpreter,
    func: Callable[..., Any],
    leaves: Sequence[Any],
    spec: Any,
    tangents: Sequence[Any],
    kwargs: dict[str, Any],
    has_aux: bool,
) -> ForwardRun:
    """Run `func` on primals with tangents.

    Args:
        interpreter: The level to run at, which is entered and left here.
        func: The function.
        leaves: The leaves of its positional arguments.
        spec: The structure of the tuple of these.
        tangents: One per leaf, None for zero.
        kwargs: Its keyword arguments.
        has_aux: Whether it returns `(output, aux)`.
    """
    run = ForwardRun()
    with interpreter, torch.enable_grad():
        lifted = [
            interpreter.lift(leaf, t) if isinstance(leaf, Tensor) else leaf
            for leaf, t in zip(leaves, tangents, strict=True)
        ]
        wrappers = list(zip(leaves, lifted, strict=True))
        if kwargs:
            kw_leaves, kw_spec = pytree.flatten(kwargs)
            kw_lifted = [
                interpreter.lift(leaf, None) if isinstance(leaf, Tensor) else leaf
                for leaf in kw_leaves
            ]
            wrappers += zip(kw_leaves, kw_lifted, strict=True)
            kwargs = pytree.unflatten(kw_spec, kw_lifted)
        out = func(*pytree.unflatten(spec, lifted), **kwargs)
        if has_aux:
            out, aux = split_aux(out, interpreter)
            aux, aux_spec = pytree.flatten(aux)
            lowered = [_lowered(interpreter, a) for a in aux]
        outs, run.out_spec = pytree.flatten(out)
        outs = [strip_dead(o) for o in outs]
        if interpreter.mutated:
            refresh_all(interpreter, outs, {})
        run.values = [_lowered(interpreter, o) for o in outs]
        run.tangents = [o.tangent if interpreter.is_own(o) else None for o in outs]
    run.values = [*map(handed_out, outs, run.values)]
    run.aux = None
    if has_aux:
        run.aux = pytree.unflatten(aux_spec, [*map(handed_out, aux, lowered)])
    run.written = _written(interpreter, wrappers)
    return run


def unshared(tangents: Sequence[Any], given: Sequence[Any]) -> list[Any]:
    """Tangents of outputs, none of them in the memory of one that the caller gave.

    An identity, a view or a sum with a constant hands a tangent on as it is, and a write to the
    result would reach the caller's.
    """
    taken = {_memory(t) for t in given if isinstance(t, Tensor)}
    return [t.clone() if isinstance(t, Tensor) and _memory(t) in taken else t for t in tangents]


def _memory(tensor: Any) -> int:
    plain = plain_of(tensor)
    try:
        return int(plain.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # as sparse tensors have it
        return id(plain)


def _written(interpreter: Any, wrappers: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """The arguments that were written to, each with the value it has now.

    One whose shape was changed in place is a view of what it was: see `lamina_core.alias`.
    """
    written = {id(wrapper) for wrapper in interpreter.written}
    if not written:
        return []
    roots = [(leaf, root_of(wrapper)) for leaf, wrapper in wrappers]
    return [(leaf, root.value) for leaf, root in roots if id(root) in written]


def _lowered(interpreter: Any, value: Any) -> Any:
    """What a value of this level stands for one level below."""
    if not interpreter.is_own(value):
        return value
    if interpreter.mutated:
        refresh_all(interpreter, (value,), {})
    return value.value
