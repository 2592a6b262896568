"""Checks of the transforms, against loops, `torch.autograd.grad` and closed forms."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lamina.autodiff.api import grad, grad_and_value, jvp, vjp
from lamina.autodiff.linear_transpose import linear_transpose
from lamina.autodiff.linearize import linearize
from lamina.batching.api import vmap
from lamina.doctor.checks import Kit, check
from lamina.functional import functional_call, stack_module_state
from lamina.jacobians.api import hessian, jacfwd, jacrev
from lamina.jacobians.products import hvp, vhp
from lamina_core.errors import (
    BatchSizeError,
    DataDependentError,
    EscapedTensorError,
    NonScalarLossError,
)

__all__: list[str] = []

Tensor = torch.Tensor
Function = Callable[..., Any]


def _loop(function: Function, *batches: Tensor) -> Tensor:
    """What `vmap` is: a stacked loop."""
    return torch.stack([function(*examples) for examples in zip(*batches, strict=True)])


def _gradient(function: Function, *inputs: Tensor) -> tuple[Tensor, ...]:
    """PyTorch's own gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves)


def _jacobian(function: Function, x: Tensor) -> Tensor:
    """PyTorch's own jacobian, row by row."""
    leaf = x.detach().clone().requires_grad_()
    out = function(leaf)
    rows = [torch.autograd.grad(y, leaf, retain_graph=True)[0] for y in out.flatten()]
    return torch.stack(rows).reshape(*out.shape, *x.shape)


def _network(params: Any, x: Tensor) -> Tensor:
    for weight, bias in params[:-1]:
        x = torch.tanh(F.linear(x, weight, bias))
    return F.linear(x, *params[-1]).sum()


def _params(kit: Kit) -> list[tuple[Tensor, Tensor]]:
    return [(kit.numbers(5, 3), kit.numbers(5)), (kit.numbers(2, 5), kit.numbers(2))]


def _vector(x: Tensor) -> Tensor:
    """[3] -> [2], neither linear nor elementwise."""
    return torch.stack([x.prod() + x[0].sin(), (x * x.exp()).sum()])


# -- vmap ------------------------------------------------------------------------------------------


@check("vmap", quick=True)
def _vmap(kit: Kit) -> None:
    params, xs = _params(kit), kit.numbers(4, 3)
    mapped = vmap(_network, in_dims=(None, 0))(params, xs)
    kit.close(mapped, _loop(lambda x: _network(params, x), xs), "vmap of a network")


@check("vmap, options")
def _vmap_options(kit: Kit) -> None:
    x, y = kit.numbers(3, 4), kit.numbers(2, 3)
    expected = torch.stack([torch.outer(x[:, i], y[1]) for i in range(4)], 2)
    call = vmap(torch.outer, in_dims=(1, None), out_dims=2)
    kit.close(call(x, y[1]), expected, "vmap with in_dims and out_dims")
    chunked = vmap(torch.outer, in_dims=(1, None), out_dims=2, chunk_size=3)
    kit.close(chunked(x, y[1]), expected, "vmap with chunk_size")
    tree = vmap(lambda a, *, scale: {"sum": a["x"].sum() * scale, "n": 3})
    out = tree({"x": x}, scale=2.0)
    kit.close(out["sum"], x.sum(1) * 2, "vmap of pytrees with keyword arguments")
    kit.close(vmap(lambda x: x.sin())(x[:0]), x[:0].sin(), "vmap of an empty batch")


@check("vmap, nested")
def _vmap_nested(kit: Kit) -> None:
    x, y = kit.numbers(3, 4), kit.numbers(2, 4)
    table = vmap(vmap(torch.dot, (None, 0)), (0, None))(x, y)
    kit.close(table, x @ y.T, "vmap(vmap(dot))")


# -- first derivatives -----------------------------------------------------------------------------


@check("grad", quick=True)
def _grad(kit: Kit) -> None:
    params, x = _params(kit), kit.numbers(4, 3)
    found = grad(_network)(params, x)
    flat = [p for pair in params for p in pair]

    def of_flat(*flat: Tensor) -> Tensor:
        return _network(list(zip(flat[::2], flat[1::2], strict=True)), x)

    right = _gradient(of_flat, *flat)
    kit.close([g for pair in found for g in pair], right, "grad of a network")
    (gradient, aux), value = grad_and_value(lambda x: ((x**3).sum(), x), has_aux=True)(x), None
    kit.close(gradient, 3 * x**2, "grad_and_value of a cube")
    value, (kept) = aux
    kit.close(value, (x**3).sum(), "the value of grad_and_value")
    kit.close(kept, x, "the aux of grad_and_value")


@check("per-example gradients", quick=True)
def _per_example(kit: Kit) -> None:
    params, xs = _params(kit), kit.numbers(4, 3)
    found = vmap(grad(_network, argnums=1), (None, 0))(params, xs)
    right = torch.stack([_gradient(lambda x: _network(params, x), x)[0] for x in xs])
    kit.close(found, right, "vmap(grad) of a network")
    weight = vmap(grad(lambda w, x: torch.tanh(w @ x).sum()), (None, 0))(params[0][0], xs)
    slopes = 1 - torch.tanh(xs @ params[0][0].T) ** 2  # [4, 5]
    kit.close(weight, slopes[:, :, None] * xs[:, None, :], "vmap(grad) for shared weights")


@check("vjp")
def _vjp(kit: Kit) -> None:
    x, ct = kit.numbers(3), kit.numbers(2)
    out, pullback = vjp(_vector, x)
    kit.close(out, _vector(x), "the value of vjp")
    kit.close(pullback(ct)[0], ct @ _jacobian(_vector, x), "a pullback")


@check("jvp", quick=True)
def _jvp(kit: Kit) -> None:
    x, tangent = kit.numbers(3), kit.numbers(3, seed=1)
    out, out_t = jvp(_vector, (x,), (tangent,))
    kit.close(out, _vector(x), "the value of jvp")
    kit.close(out_t, _jacobian(_vector, x) @ tangent, "a pushforward")


@check("jacrev")
def _jacrev(kit: Kit) -> None:
    x = kit.numbers(3)
    kit.close(jacrev(_vector)(x), _jacobian(_vector, x), "jacrev")
    kit.close(jacrev(_vector, chunk_size=1)(x), _jacobian(_vector, x), "jacrev in chunks")


@check("jacfwd")
def _jacfwd(kit: Kit) -> None:
    x = kit.numbers(3)
    kit.close(jacfwd(_vector)(x), _jacobian(_vector, x), "jacfwd")
    kit.close(jacfwd(_vector, chunk_size=2)(x), _jacobian(_vector, x), "jacfwd in chunks")


@check("linearize")
def _linearize(kit: Kit) -> None:
    x, tangents = kit.numbers(3), kit.numbers(4, 3, seed=1)
    out, pushforward = linearize(_vector, x)
    kit.close(out, _vector(x), "the value of linearize")
    expected = tangents @ _jacobian(_vector, x).T
    kit.close(torch.stack([pushforward(t) for t in tangents]), expected, "linearize")
    kit.close(vmap(pushforward)(tangents), expected, "vmap of a linearized function")


@check("linear_transpose")
def _transpose(kit: Kit) -> None:
    weight, ct = kit.numbers(2, 3), kit.numbers(2)
    (found,) = linear_transpose(lambda x: (weight @ x.flip(0)) * 2, kit.numbers(3))(ct)
    kit.close(found, (ct @ weight).flip(0) * 2, "linear_transpose")


# -- second and higher derivatives -----------------------------------------------------------------


@check("hessian")
def _hessian(kit: Kit) -> None:
    x = kit.numbers(3)
    matrix = kit.numbers(3, 3)

    def f(x: Tensor) -> Tensor:
        return (x**3).sum() + x @ matrix @ x

    right = torch.diag(6 * x) + matrix + matrix.T
    kit.close(hessian(f)(x), right, "hessian")
    kit.close(jacrev(grad(f))(x), right, "jacrev(grad)")
    kit.close(jacfwd(jacrev(f))(x), right, "jacfwd(jacrev)")
    v = kit.numbers(3, seed=1)
    kit.close(hvp(f, (x,), (v,))[1][0], right @ v, "hvp")
    kit.close(vhp(f, (x,), (v,))[1][0], right @ v, "vhp")


@check("nested derivatives", quick=True)
def _nested(kit: Kit) -> None:
    x = kit.numbers()

    def d(f: Function) -> Function:
        return grad(f)

    def push(f: Function) -> Function:
        return lambda x: jvp(f, (x,), (torch.ones_like(x),))[1]

    orders = [x.sin(), x.cos(), -x.sin(), -x.cos(), x.sin()]
    for stack in ((d, d), (d, push), (push, d), (push, push), (d, push, d), (push, d, d, push)):
        f: Function = torch.sin
        for transform in stack:
            f = transform(f)
        name = " of ".join("grad" if transform is d else "jvp" for transform in stack)
        kit.close(f(x), orders[len(stack)], f"{name} of sin")


@check("derivatives and vmap, nested")
def _nested_with_vmap(kit: Kit) -> None:
    xs, v = kit.numbers(4, 3), kit.numbers(3, seed=1)
    right = torch.stack([torch.diag(6 * x) for x in xs])
    kit.close(vmap(hessian(lambda x: (x**3).sum()))(xs), right, "vmap(hessian)")
    gradient = grad(lambda xs: (vmap(lambda x: (x @ v).sin())(xs) ** 2).sum())(xs)
    kit.close(gradient, torch.outer((2 * (xs @ v)).sin(), v), "grad(vmap)")
    pushed = vmap(lambda x: jvp(grad(lambda x: (x**3).sum()), (x,), (v,))[1])(xs)
    kit.close(pushed, 6 * xs * v, "vmap(jvp(grad))")
    outer = grad(lambda xs: vmap(grad(lambda x: (x**4).sum()))(xs).sum())(xs)
    kit.close(outer, 12 * xs**2, "grad(vmap(grad))")


# -- models ----------------------------------------------------------------------------------------


@check("modules as functions")
def _modules(kit: Kit) -> None:
    models = []
    for i in range(3):
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2))
        model = model.to(kit.device, kit.dtype)
        with torch.no_grad():
            for j, parameter in enumerate(model.parameters()):
                parameter.copy_(kit.numbers(*parameter.shape, seed=i + 3 * j))
        models.append(model)
    x = kit.numbers(5, 3)
    params, buffers = stack_module_state(models)
    out = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(params, buffers)
    kit.close(out, torch.stack([model(x).detach() for model in models]), "an ensemble")
    one = {name: p.detach() for name, p in models[1].named_parameters()}
    found = grad(lambda p: functional_call(models[1], p, (x,)).square().sum())(one)
    loss = models[1](x).square().sum()
    right = torch.autograd.grad(loss, list(models[1].parameters()))
    kit.close(list(found.values()), list(right), "grad for the parameters of a module")


@check("threads")
def _threads(kit: Kit) -> None:
    xs = kit.numbers(4, 3)
    found: dict[int, Any] = {}

    def work(i: int) -> None:
        try:
            for _ in range(5):
                found[i] = vmap(grad(lambda x: (x ** (i + 2)).sum()))(xs)
        except Exception as error:
            found[i] = error

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i, answer in found.items():
        if isinstance(answer, Exception):
            raise answer
        kit.close(answer, (i + 2) * xs ** (i + 1), f"vmap(grad) in thread {i} of 4")


@check("errors instead of wrong answers")
def _errors(kit: Kit) -> None:
    x = kit.numbers(4, 3)
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    vmap(keep)(x)
    kit.raises(EscapedTensorError, lambda: kept[0] + 1, "a batched tensor that escaped")
    kit.raises(DataDependentError, lambda: vmap(lambda x: x.sum().item())(x), ".item() under vmap")
    kit.raises(BatchSizeError, lambda: vmap(torch.dot)(x, x[:2]), "unequal batches")
    kit.raises(NonScalarLossError, lambda: grad(torch.sin)(x), "grad of a vector")
