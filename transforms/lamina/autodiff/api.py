"""`vjp`, `grad`, `grad_and_value`, `value_and_grad` and `jvp`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from lamina.autodiff.checks import (
    ABSENT,
    as_pair,
    choose,
    likes,
    match,
    named_leaves,
    need_complex,
    need_differentiable,
    scalar_loss,
    seeded,
)
from lamina.autodiff.forward import ForwardInterpreter
from lamina.autodiff.reverse import ReverseInterpreter
from lamina.autodiff.runs import run_forward, run_reverse, unshared
from lamina_core import pytree
from lamina_core.errors import TangentError
from lamina_core.mode import mode_off, thread_mode

__all__ = ["grad", "grad_and_value", "jvp", "value_and_grad", "vjp"]


# -- reverse mode ----------------------------------------------------------------------------------


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
        the output and returns a tuple of cotangents like `primals`: J^H ct for each. None stands
        for 1 where the output has one element and is real, as in `backward()`, and for zero
        elsewhere. It may be called any number of times, also under later transforms.

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
    interpreter = ReverseInterpreter("vjp")
    run = run_reverse(interpreter, func, primals, range(len(primals)), kwargs, has_aux)
    run.write_back(keep=True)
    out, aux, wanted = pytree.unflatten(run.out_spec, run.values), run.aux, likes(run.values)
    devices = [getattr(value, "device", None) for value in run.values]
    run.let_go()

    def vjp_fn(cotangents: Any) -> Any:
        """Pull cotangents of the output back to the primals."""
        cts = match(cotangents, wanted, run.out_spec, "cotangents", "output", absent=ABSENT)
        cts = seeded(cts, wanted, devices, run.out_spec)
        return tuple(run.pull(cts, release=False))

    return (out, vjp_fn, aux) if has_aux else (out, vjp_fn)


def grad(
    func: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    holomorphic: bool = False,
) -> Callable[..., Any]:
    """Turn a function that returns a scalar loss into the function that returns its gradient.

    Args:
        func: Returns a tensor of shape (), or `(loss, aux)` with `has_aux=True`.
        argnums: Which positional arguments to differentiate; an int, or several. Each may be a
            pytree: leaves that are not floating-point or complex tensors get None.
        has_aux: Whether `func` returns `(loss, aux)`.
        holomorphic: Whether `func` is a holomorphic function of complex arguments, with a complex
            value. The result is then its complex derivative dL/dz. Not checked: of a function that
            is not holomorphic it says nothing. Without it, the gradient of a real loss in
            z = x + iy is PyTorch's, dL/dx + i dL/dy, in which steepest descent steps.

    Returns:
        A function of the same arguments that returns the gradient, in the structure of the argument
        (a tuple of them for several argnums), or `(gradient, aux)`.

    Raises:
        NonScalarLossError: If the loss is not a tensor of shape (), real unless `holomorphic`.
        NotDifferentiableError: If no leaf of the arguments chosen is differentiable, or one is not
            complex although `holomorphic`.
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

        The derivative of a holomorphic function: 2 z.

        >>> grad(lambda z: z * z, holomorphic=True)(torch.tensor(1 + 2j))
        tensor(2.+4.j)
    """
    both = grad_and_value(func, argnums, has_aux, holomorphic=holomorphic)

    @functools.wraps(func)
    def gradient(*args: Any, **kwargs: Any) -> Any:
        found, value = both(*args, **kwargs)
        return (found, value[1]) if has_aux else found

    return gradient


def grad_and_value(
    func: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    holomorphic: bool = False,
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
        chosen = choose(args, argnums, "grad")
        if holomorphic:
            for at in chosen:
                need_complex(f"args[{at}]", args[at], "grad")
        interpreter = ReverseInterpreter("grad")
        run = run_reverse(interpreter, func, args, chosen, kwargs, has_aux)
        loss = scalar_loss(interpreter, run.values, run.out_spec, holomorphic=holomorphic)
        # One seed serves every example and every level, unless the caller has to see it made.
        outer = thread_mode().outer
        with nullcontext() if outer is not None and outer.sees_all else mode_off():
            seed = torch.ones((), dtype=loss.dtype, device=loss.device)
        grads = run.pull([seed], release=True)
        run.write_back(keep=False)
        if holomorphic:
            grads = pytree.tree_map(_conjugate, grads)
        found = grads[0] if isinstance(argnums, int) else tuple(grads)
        return found, ((loss, run.aux) if has_aux else loss)

    return both


def _conjugate(ct: Any) -> Any:
    """J^T 1 of a holomorphic function, from the J^H 1 that the pullback gives."""
    return ct if ct is None else torch.conj_physical(ct)


def value_and_grad(
    func: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    holomorphic: bool = False,
) -> Callable[..., Any]:
    """`grad_and_value` in the order of JAX: `(loss, gradient)`, or `((loss, aux), gradient)`.

    Example:
        >>> import torch
        >>> from lamina import value_and_grad
        >>> value_and_grad(lambda x: x.square())(torch.tensor(3.0))
        (tensor(9.), tensor(6.))
    """
    both = grad_and_value(func, argnums, has_aux, holomorphic=holomorphic)

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
    primals, tangents = as_pair("jvp", primals, tangents)
    leaves, spec = pytree.flatten(primals)
    need_differentiable(leaves, primals, range(len(primals)), "jvp")
    pushed = match(tangents, likes(leaves), spec, "tangents", "primals")
    interpreter = ForwardInterpreter()
    run = run_forward(interpreter, func, leaves, spec, pushed, kwargs, has_aux)
    out = pytree.unflatten(run.out_spec, run.values)
    if strict and any(t is None for t in run.tangents):
        named = zip(named_leaves("output", out), run.tangents, strict=True)
        apart = ", ".join(name for (name, _), t in named if t is None)
        raise interpreter.error(
            TangentError,
            f"strict=True, but this does not depend on the primals: {apart}",
            "to fix: pass strict=False to get a zero tangent",
        )
    run.write_back()
    out_t = run.filled(unshared(run.tangents, pushed))
    return (out, out_t, run.aux) if has_aux else (out, out_t)
