"""The oracle: a program under a stack of transforms, by plain PyTorch alone.

Mapping is a Python loop and `torch.stack`; reverse mode is `torch.autograd.grad` with
`create_graph=True`; forward mode is the derivative of the pullback in its cotangent (the pullback
is linear, so that derivative is the transpose of the transpose); a jacobian is a loop over the
entries of the output. Nothing here is shared with the library under test.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.strategies.stacks import Grad, Hessian, Jacobian, Jvp, Stack, Transform, Vjp, Vmap

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def reference(stack: Stack, f: Function) -> Function:
    """The function that the stack makes of `f`, computed without transforms."""
    for transform in stack.transforms:
        f = _apply(transform, f)
    return f


def _apply(transform: Transform, f: Function) -> Function:
    match transform:
        case Vmap(size, in_dims, out_dims):
            return _mapped(f, size, in_dims, out_dims)
        case Grad(argnums):
            return _grad(f, argnums)
        case Vjp(argnums):
            return _vjp(f, argnums)
        case Jvp(argnums):
            return _jvp(f, argnums)
        case Jacobian(_, argnums):
            return _jacobian(f, argnums)
        case Hessian(argnums):
            return _jacobian(_jacobian(f, argnums), argnums)
    raise AssertionError(transform)


def _mapped(f: Function, size: int, in_dims: tuple, out_dims: int) -> Function:
    def mapped(x, y):
        outs = []
        for i in range(size):
            args = [
                arg if dim is None else arg.select(dim, i)
                for arg, dim in zip((x, y), in_dims, strict=True)
            ]
            outs.append(f(*args))
        return torch.stack(outs, out_dims)

    return mapped


def _grad(f: Function, argnums: int) -> Function:
    def gradient(x, y):
        args = [x, y]
        args[argnums] = fresh(args[argnums])
        return derivative(f(*args).sin().sum(), args[argnums])

    return gradient


def _vjp(f: Function, argnums: int) -> Function:
    def pulled_back(x, y):
        args = [x, y]
        args[argnums] = fresh(args[argnums])
        out = f(*args)
        # The cotangent is a function of the arguments from outside, not of the fresh copy.
        return derivative(out, args[argnums], f(x, y).cos())

    return pulled_back


def _jvp(f: Function, argnums: tuple[int, ...]) -> Function:
    def pushed_forward(x, y):
        args = [x, y]
        for i in argnums:
            args[i] = fresh(args[i])
        tangents = [(x, y)[i].sin() for i in argnums]
        return f(x, y) + pushforward(f(*args), [args[i] for i in argnums], tangents)

    return pushed_forward


def _jacobian(f: Function, argnums: int) -> Function:
    def jacobian(x, y):
        args = [x, y]
        args[argnums] = fresh(args[argnums])
        out = f(*args)
        rows = [derivative(entry, args[argnums]) for entry in out.reshape(-1).unbind()]
        return torch.stack(rows).reshape(out.shape + args[argnums].shape)

    return jacobian


def fresh(x: torch.Tensor) -> torch.Tensor:
    """A copy to differentiate in: a leaf, or a node of the graph that `x` already belongs to."""
    return x.clone() if x.requires_grad else x.detach().clone().requires_grad_()


def derivative(
    out: torch.Tensor, x: torch.Tensor, cotangent: torch.Tensor | None = None
) -> torch.Tensor:
    """The pullback of `out` in `x`, itself differentiable; zeros where `out` ignores `x`."""
    if not out.requires_grad:
        return torch.zeros_like(x)
    if cotangent is None:
        cotangent = torch.ones_like(out)
    (x_ct,) = torch.autograd.grad(
        out, x, cotangent, create_graph=True, allow_unused=True, materialize_grads=True
    )
    return x_ct


def pushforward(
    out: torch.Tensor, xs: list[torch.Tensor], tangents: list[torch.Tensor]
) -> torch.Tensor:
    """The pushforward of `out` in `xs` along `tangents`, by differentiating the pullback."""
    if not out.requires_grad:
        return torch.zeros_like(out)
    probe = torch.zeros_like(out, requires_grad=True)
    pulled = torch.autograd.grad(
        out, xs, probe, create_graph=True, allow_unused=True, materialize_grads=True
    )
    total = torch.zeros_like(out)
    for x_ct, tangent in zip(pulled, tangents, strict=True):
        total = total + derivative(x_ct, probe, tangent)
    return total
