"""`hvp` and `vhp`: products of a hessian and a vector, without the hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lamina.autodiff.api import grad_and_value, jvp, vjp
from lamina.autodiff.checks import as_pair, need_differentiable
from lamina_core import pytree

__all__ = ["hvp", "vhp"]


def hvp(
    func: Callable[..., Any],
    primals: Any,
    tangents: Any,
    *,
    has_aux: bool = False,
    **kwargs: Any,
) -> Any:
    """The value of a loss, and the product of its hessian with a vector, H v.

    Forward mode over reverse mode, `jvp` of `grad`: about twice the cost of the gradient, and less
    memory than `vhp`. For many vectors at one point, `linearize(grad(func), *primals)`.

    Args:
        func: Takes `*primals` and `**kwargs`, returns a tensor of shape ().
        primals: A tuple or list of positional arguments, each a pytree.
        tangents: The vector, like `primals`; None stands for zero.
        has_aux: Whether `func` returns `(loss, aux)`.
        **kwargs: Reach `func` and are not differentiated.

    Returns:
        `(loss, product)`, or `(loss, product, aux)`; the product is a tuple like `primals`.

    Raises:
        NonScalarLossError: If the loss is not a tensor of shape ().
        TangentError: If tangents do not match primals.

    Example:
        >>> import torch
        >>> from lamina import hvp
        >>> hvp(lambda x: (x**3).sum(), (torch.tensor([1.0, 2.0]),), (torch.ones(2),))
        (tensor(9.), (tensor([ 6., 12.]),))
    """
    primals, tangents = _vectors("hvp", primals, tangents)
    (_, value), (product, _) = jvp(_gradient(func, primals, has_aux), primals, tangents, **kwargs)
    return (value[0], product, value[1]) if has_aux else (value, product)


def vhp(
    func: Callable[..., Any],
    primals: Any,
    cotangents: Any,
    *,
    has_aux: bool = False,
    **kwargs: Any,
) -> Any:
    """The value of a loss, and the product of a vector with its hessian, v^H H.

    Reverse mode over reverse mode, `vjp` of `grad`. It is what `hvp` is, as a hessian is symmetric,
    and mostly slower; but it needs no formula of forward mode.

    Arguments, result and errors are those of `hvp`, with cotangents for tangents.

    Example:
        >>> import torch
        >>> from lamina import vhp
        >>> vhp(lambda x: (x**3).sum(), (torch.tensor([1.0, 2.0]),), (torch.ones(2),))
        (tensor(9.), (tensor([ 6., 12.]),))
    """
    primals, cotangents = _vectors("vhp", primals, cotangents)
    gradient = _gradient(func, primals, has_aux)
    _, vjp_fn, value = vjp(gradient, *primals, has_aux=True, **kwargs)
    product = vjp_fn(cotangents)
    return (value[0], product, value[1]) if has_aux else (value, product)


def _vectors(name: str, primals: Any, others: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    primals, others = as_pair(name, primals, others)
    need_differentiable(pytree.leaves(primals), primals, range(len(primals)), name)
    return primals, others


def _gradient(func: Callable[..., Any], primals: Any, has_aux: bool) -> Callable[..., Any]:
    return grad_and_value(func, tuple(range(len(primals))), has_aux)
