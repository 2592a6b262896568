"""`vjp`, `grad`, `grad_and_value`, `value_and_grad` and `jvp`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lamina.autodiff.checks import (
    choose,
    is_differentiable,
    match,
    named_leaves,
    need_differentiable,
    scalar_loss,
    split_aux,
)
from lamina.autodiff.forward import ForwardInterpreter
from lamina.autodiff.reverse import ReverseInterpreter
from lamina.autodiff.tape import Node, backward, move_residuals
from lamina_core import pytree
from lamina_core.alias import refresh_all
from lamina_core.errors import StructureError, TangentError, message
from lamina_core.interpreter import mode_off
from lamina_core.wrapper import LevelTensor

__all__ = ["grad", "grad_and_value", "jvp", "value_and_grad", "vjp"]

_CLASSES = LevelTensor.classes
Tensor = torch.Tensor


# -- reverse mode ----------------------------------------------------------------------------------


class _Pass:
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
            filled.append(ct)
        trees, start = [], 0
        for spec in self.specs:
            stop = start + spec.num_leaves
            trees.append(pytree.unflatten(spec, filled[start:stop]))
            start = stop
        return trees

    def write_back(self, *, keep: bool) -> None:
        """Let the caller see what was written to the arguments (NOTE [Writes]).

        With `keep`, residuals in the memory about to be overwritten are moved out of it first.
        """
        for original, value in self.written:
            if keep:
                move_residuals(self.positions, original)
            original.copy_(value)


def _run(
    name: str,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    chosen: Sequence[int],
    kwargs: dict[str, Any],
    has_aux: bool,
) -> _Pass:
    """Run `func` on a fresh tape.

    Args:
        name: The transform, for messages.
        func: The function.
        args: Its positional arguments.
        chosen: Positions of those to differentiate with respect to.
        kwargs: Its keyword arguments.
        has_aux: Whether it returns `(output, aux)`.
    """
    run = _Pass()
    flat = [pytree.flatten(arg) for arg in args]
    run.leaves = [leaf for at in chosen for leaf in flat[at][0]]
    run.specs = [flat[at][1] for at in chosen]
    need_differentiable(run.leaves, args, chosen, name)
    run.interpreter = interpreter = ReverseInterpreter(name)
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
        run.aux = None
        if has_aux:
            out, run.aux = split_aux(out, interpreter)
            run.aux = pytree.tree_map(functools.partial(_lowered, interpreter), run.aux)
        outs, run.out_spec = pytree.flatten(out)
        if interpreter.mutated:
            refresh_all(interpreter, outs, {})
        run.positions = [
            (o.node, o.index) if interpreter.is_own(o) and o.node is not None else None
            for o in outs
        ]
        run.values = [_lowered(interpreter, o) for o in outs]
    run.written = _written(interpreter, wrappers)
    return run


def _written(interpreter: Any, wrappers: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """The arguments that were written to, each with the value it has now."""
    written = {id(wrapper) for wrapper in interpreter.written}
    return [(leaf, wrapper.value) for leaf, wrapper in wrappers if id(wrapper) in written]


def _lowered(interpreter: Any, value: Any) -> Any:
    """What a value of this level stands for one level below."""
    if not interpreter.is_own(value):
        return value
    if interpreter.mutated:
        refresh_all(interpreter, (value,), {})
    return value.value


def vjp(func: Callable[..., Any], *primals: Any, has_aux: bool = False, **kwargs: Any) -> Any:
    """Run a function, and return its output with a function that pulls cotangents back.

    Args:
        func: Takes `*primals` and `**kwargs`, returns a pytree of tensors.
        *primals: Pytrees. Their floating-point and complex tensors are differentiated; other
            leaves are constants, and get None in the result.
        has_aux: Whether `func` returns `(output, aux)`; aux is handed back as it is.
        **kwargs: Reach `func` and are not differentiated.

    Returns:
        `(output, vjp_fn)`, or `(output, vjp_fn, aux)`. `vjp_fn(cotangents)` takes cotangents like
        the output and returns a tuple of cotangents like `primals`: J^H ct for each. It may be
        called any number of times, also under later transforms.

    Raises:
        NotDifferentiableError: If no leaf of `primals` is a floating-point or complex tensor.
        TangentError: By `vjp_fn`, if the cotangents do not match the output.

    Example:
        >>> import torch
        >>> from lamina import vjp
        >>> out, vjp_fn = vjp(torch.sin, torch.zeros(2))
        >>> vjp_fn(torch.tensor([1.0, 2.0]))
        (tensor([1., 2.]),)
    """
    run = _run("vjp", func, primals, range(len(primals)), kwargs, has_aux)
    run.write_back(keep=True)
    out = pytree.unflatten(run.out_spec, run.values)

    def vjp_fn(cotangents: Any) -> Any:
        """Pull cotangents of the output back to the primals."""
        cts = match(cotangents, run.values, run.out_spec, "cotangents", "output")
        return tuple(run.pull(cts, release=False))

    return (out, vjp_fn, run.aux) if has_aux else (out, vjp_fn)


def grad(
    func: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """Turn a function that returns a scalar loss into the function that returns its gradient.

    Args:
        func: Returns a tensor of shape (), or `(loss, aux)` with `has_aux=True`.
        argnums: Which positional arguments to differentiate; an int, or several. Each may be a
            pytree: leaves that are not floating-point or complex tensors get None.
        has_aux: Whether `func` returns `(loss, aux)`.

    Returns:
        A function of the same arguments that returns the gradient, in the structure of the argument
        (a tuple of them for several argnums), or `(gradient, aux)`.

    Raises:
        NonScalarLossError: If the loss is not a tensor of shape ().
        NotDifferentiableError: If no leaf of the arguments chosen is differentiable.
        StructureError: If `argnums` does not fit the arguments.

    Example:
        >>> import torch
        >>> from lamina import grad
        >>> grad(lambda x: (x**3).sum())(torch.tensor([1.0, 2.0]))
        tensor([ 3., 12.])

        The gradient for each example, by mapping `grad`.

        >>> from lamina import vmap
        >>> def loss(weight, example, target):
        ...     return (example @ weight - target) ** 2
        >>> examples, targets = torch.eye(2), torch.tensor([1.0, 3.0])
        >>> vmap(grad(loss), in_dims=(None, 0, 0))(torch.zeros(2), examples, targets)
        tensor([[-2., -0.],
                [-0., -6.]])
    """
    both = grad_and_value(func, argnums, has_aux)

    @functools.wraps(func)
    def gradient(*args: Any, **kwargs: Any) -> Any:
        found, value = both(*args, **kwargs)
        return (found, value[1]) if has_aux else found

    return gradient


def grad_and_value(
    func: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """Like `grad`, and return the loss as well: `(gradient, loss)`, or `(gradient, (loss, aux))`.

    Example:
        >>> import torch
        >>> from lamina import grad_and_value
        >>> grad_and_value(lambda x: x.square())(torch.tensor(3.0))
        (tensor(6.), tensor(9.))
    """

    @functools.wraps(func)
    def both(*args: Any, **kwargs: Any) -> Any:
        run = _run("grad", func, args, choose(args, argnums, "grad"), kwargs, has_aux)
        loss = scalar_loss(run.interpreter, run.values, run.out_spec)
        with mode_off():  # one seed serves every example and every level
            seed = torch.ones((), dtype=loss.dtype, device=loss.device)
        grads = run.pull([seed], release=True)
        run.write_back(keep=False)
        found = grads[0] if isinstance(argnums, int) else tuple(grads)
        return found, ((loss, run.aux) if has_aux else loss)

    return both


def value_and_grad(
    func: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """`grad_and_value` in the order of JAX: `(loss, gradient)`, or `((loss, aux), gradient)`.

    Example:
        >>> import torch
        >>> from lamina import value_and_grad
        >>> value_and_grad(lambda x: x.square())(torch.tensor(3.0))
        (tensor(9.), tensor(6.))
    """
    both = grad_and_value(func, argnums, has_aux)

    @functools.wraps(func)
    def swapped(*args: Any, **kwargs: Any) -> Any:
        found, value = both(*args, **kwargs)
        return value, found

    return swapped


# -- forward mode ----------------------------------------------------------------------------------


def jvp(
    func: Callable[..., Any],
    primals: Any,
    tangents: Any,
    *,
    strict: bool = False,
    has_aux: bool = False,
    **kwargs: Any,
) -> Any:
    """Run a function and push tangents through it.

    Args:
        func: Takes `*primals` and `**kwargs`, returns a pytree of tensors.
        primals: A tuple or list of positional arguments, each a pytree.
        tangents: Tangents like `primals`; None stands for a zero tangent.
        strict: Whether an output that does not depend on the primals is an error.
        has_aux: Whether `func` returns `(output, aux)`.
        **kwargs: Reach `func` and have no tangent.

    Returns:
        `(output, output_tangent)`, or `(output, output_tangent, aux)`: the tangent is J t.

    Raises:
        TangentError: If tangents do not match primals, or `strict` finds an independent output.

    Example:
        >>> import torch
        >>> from lamina import jvp
        >>> jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))
        (tensor(0.), tensor(1.))
    """
    if not isinstance(primals, (tuple, list)) or not isinstance(tangents, (tuple, list)):
        raise StructureError(
            message(
                f"jvp got primals of type {type(primals).__name__} and tangents of type "
                f"{type(tangents).__name__}",
                "to fix: pass a tuple of arguments and a tuple of their tangents",
            )
        )
    primals, tangents = tuple(primals), tuple(tangents)
    leaves, spec = pytree.flatten(primals)
    need_differentiable(leaves, primals, range(len(primals)), "jvp")
    pushed = match(tangents, leaves, spec, "tangents", "primals")
    with ForwardInterpreter() as interpreter, torch.enable_grad():
        lifted = [
            interpreter.lift(leaf, t) if isinstance(leaf, Tensor) else leaf
            for leaf, t in zip(leaves, pushed, strict=True)
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
        aux = None
        if has_aux:
            out, aux = split_aux(out, interpreter)
            aux = pytree.tree_map(functools.partial(_lowered, interpreter), aux)
        outs, out_spec = pytree.flatten(out)
        if interpreter.mutated:
            refresh_all(interpreter, outs, {})
        values = [_lowered(interpreter, o) for o in outs]
        out_ts = [o.tangent if interpreter.is_own(o) else None for o in outs]
        if strict and any(t is None for t in out_ts):
            named = zip(named_leaves("output", out), out_ts, strict=True)
            apart = ", ".join(name for (name, _), t in named if t is None)
            raise interpreter.error(
                TangentError,
                f"strict=True, but this does not depend on the primals: {apart}",
                "to fix: pass strict=False to get a zero tangent",
            )
    for original, value in _written(interpreter, wrappers):
        original.copy_(value)
    out_ts = [
        torch.zeros_like(v) if t is None and is_differentiable(v) else t
        for t, v in zip(out_ts, values, strict=True)
    ]
    out, out_t = pytree.unflatten(out_spec, values), pytree.unflatten(out_spec, out_ts)
    return (out, out_t, aux) if has_aux else (out, out_t)
