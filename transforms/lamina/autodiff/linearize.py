"""`linearize`: a function once, its derivative as often as wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lamina.autodiff.checks import is_differentiable, likes, match, need_differentiable
from lamina.autodiff.forward import ForwardInterpreter
from lamina.autodiff.record import RecordInterpreter
from lamina.autodiff.runs import run_forward, unshared
from lamina_core import pytree
from lamina_core.wrapper import strip_dead

__all__ = ["linearize"]


def linearize(func: Callable[..., Any], *primals: Any, has_aux: bool = False, **kwargs: Any) -> Any:
    """Run a function, and return its output with its derivative there as a function of tangents.

    `func` runs once. What forward mode does to tangents on the way is written down, and `jvp_fn`
    is that list of linear ops: many directions cost one run of `func` and the derivative for each,
    where `jvp` runs `func` each time. In exchange it keeps what these ops need in memory.

    Args:
        func: Takes `*primals` and `**kwargs`, returns a pytree of tensors.
        *primals: Pytrees. Their floating-point and complex tensors have tangents; other leaves are
            constants.
        has_aux: Whether `func` returns `(output, aux)`; aux is handed back as it is.
        **kwargs: Reach `func` and have no tangent.

    Returns:
        `(output, jvp_fn)`, or `(output, jvp_fn, aux)`. `jvp_fn(*tangents)` takes a tangent like
        each primal (None for zero) and returns J t like the output. It may be called any number of
        times, also under later transforms.

    Raises:
        NotDifferentiableError: If no leaf of `primals` is a floating-point or complex tensor.
        TangentError: By `jvp_fn`, if the tangents do not match the primals.
        MutationError: By `jvp_fn`, if a tensor it needs has been written to.

    Example:
        >>> import torch
        >>> from lamina import linearize
        >>> out, jvp_fn = linearize(lambda x: x**2, torch.tensor([1.0, 2.0]))
        >>> out
        tensor([1., 4.])
        >>> jvp_fn(torch.tensor([1.0, 0.0])), jvp_fn(torch.tensor([0.0, 1.0]))
        (tensor([2., 0.]), tensor([0., 4.]))

        Conjugate gradients need one product with the hessian per step: linearize the gradient.

        >>> from lamina import grad
        >>> gradient, hvp_fn = linearize(grad(lambda x: (x**3).sum()), torch.tensor([1.0, 2.0]))
        >>> hvp_fn(torch.ones(2))
        tensor([ 6., 12.])
    """
    leaves, spec = pytree.flatten(primals)
    need_differentiable(leaves, primals, range(len(primals)), "linearize")
    inputs = [leaf for leaf in leaves if is_differentiable(leaf)]
    zeros = [torch.zeros_like(leaf) for leaf in inputs]
    with RecordInterpreter("linearize", "tangents") as recorder:
        given = iter([recorder.input(zero) for zero in zeros])
        tangents = [next(given) if is_differentiable(leaf) else None for leaf in leaves]
        level = ForwardInterpreter("linearize")
        run = run_forward(level, func, leaves, spec, tangents, kwargs, has_aux)
        program = recorder.program(run.tangents)
    # What the user's autograd follows beside tangents is lifted to the level that has just ended.
    run.values = [strip_dead(value) for value in run.values]
    run.aux = pytree.tree_map(strip_dead, run.aux)
    run.written = [(original, strip_dead(value)) for original, value in run.written]
    for original, _ in run.written:
        program.move(original)
    run.write_back()
    program.seal()
    finish, wanted = run.filled, likes(leaves)

    def jvp_fn(*tangents: Any) -> Any:
        """Push tangents of the primals forward to the output."""
        pushed = match(tangents, wanted, spec, "tangents", "primals")
        values = [
            torch.zeros_like(leaf) if t is None else t
            for t, leaf in zip(pushed, leaves, strict=True)
            if is_differentiable(leaf)
        ]
        return finish(unshared(program(values), values))

    out = pytree.unflatten(run.out_spec, run.values)
    return (out, jvp_fn, run.aux) if has_aux else (out, jvp_fn)
