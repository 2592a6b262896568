"""Checks of the families of ops: `vmap` and derivatives of one or two ops of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lamina.autodiff.api import grad, jvp
from lamina.batching.api import vmap
from lamina.doctor.checks import Kit, check

__all__: list[str] = []

Tensor = torch.Tensor
Function = Callable[[Tensor], Tensor]


def _hold(kit: Kit, what: str, f: Function, xs: Tensor) -> None:
    """Hold `vmap`, per-example gradients and `jvp` of a function against loops and PyTorch."""
    leaves = [x.clone().requires_grad_() for x in xs]
    outs = [f(leaf) for leaf in leaves]
    kit.close(vmap(f)(xs), torch.stack(outs).detach(), f"vmap of {what}")
    weights = kit.numbers(*outs[0].shape, seed=2)
    slopes = [
        torch.autograd.grad(out, leaf, weights)[0] for out, leaf in zip(outs, leaves, strict=True)
    ]
    found = vmap(grad(lambda x: (f(x) * weights).sum()))(xs)
    kit.close(found, torch.stack(slopes), f"vmap(grad) of {what}")
    tangent = kit.numbers(*xs.shape[1:], seed=3)
    pushed = jvp(f, (xs[0],), (tangent,))[1]
    kit.close((pushed * weights).sum(), (slopes[0] * tangent).sum(), f"jvp of {what}")


@check("elementwise ops")
def _pointwise(kit: Kit) -> None:
    def f(x: Tensor) -> Tensor:
        y = torch.where(x > 0.1, x.exp(), x.tanh() / (x * x + 1)) + torch.atan2(x, x.cos() + 2)
        return F.gelu(y) * torch.sigmoid(x) - (x.abs() + 0.2).log().clamp(-1, 0.3)

    _hold(kit, "elementwise ops", f, kit.numbers(4, 6))
    ties = torch.tensor([0.0, 1.0, 2.0], dtype=kit.dtype, device=kit.device)
    for name, g in _AT_TIES.items():
        leaf = ties.clone().requires_grad_()
        (right,) = torch.autograd.grad(g(leaf).sum(), leaf)
        kit.close(grad(lambda x: g(x).sum())(ties), right, f"grad of {name} at ties")  # noqa: B023


_AT_TIES: dict[str, Function] = {
    "abs": torch.abs,
    "clamp": lambda x: x.clamp(0, 1),
    "maximum": lambda x: torch.maximum(x, torch.ones_like(x)),
    "relu": torch.relu,
}


@check("reductions and scans")
def _reductions(kit: Kit) -> None:
    def f(x: Tensor) -> Tensor:
        first = x.sum(0) * x.mean(0, keepdim=True)[0] + x.var(0) + x.amax(0) + x.logsumexp(0)
        return first + x.cumsum(0)[-2] * x.prod(0) + torch.linalg.vector_norm(x, dim=0)

    _hold(kit, "reductions", f, kit.numbers(3, 4, 5))


@check("matrix products and linear algebra")
def _linalg(kit: Kit) -> None:
    w = kit.numbers(4, 3)

    def f(x: Tensor) -> Tensor:
        square = x @ x.T + 2 * torch.eye(3, dtype=x.dtype, device=x.device)
        solved = torch.linalg.solve(square, F.linear(x, w))
        return torch.einsum("ij,kj->ki", solved, w.T)[:2].T + torch.linalg.inv(square) @ x[:, :2]

    _hold(kit, "products and solves", f, kit.numbers(4, 3, 3))


@check("views and indexing")
def _views(kit: Kit) -> None:
    index = kit.integers(5, high=4)

    def f(x: Tensor) -> Tensor:
        y = (
            x.transpose(0, 1).reshape(2, -1)[:, 1:]
            + x.flatten()[None, :-1].expand(2, -1)[:, ::1][:, : x.numel() // 2 - 1]
        )
        gathered = x.index_select(0, index) * x[index].gather(1, index[:, None] % 3)
        moved = torch.zeros_like(x).index_add(0, index, gathered)
        return torch.cat(
            [y.flatten(), moved.flip(0).flatten(), torch.stack([x[1], x[2]]).flatten()]
        )

    _hold(kit, "views and indexing", f, kit.numbers(3, 4, 3))


@check("convolution and pooling")
def _convolution(kit: Kit) -> None:
    weight, bias = kit.numbers(4, 2, 3, 3), kit.numbers(4)

    def f(x: Tensor) -> Tensor:
        return F.max_pool2d(torch.tanh(F.conv2d(x, weight, bias, padding=1)), 2)

    _hold(kit, "a convolution", f, kit.numbers(3, 1, 2, 6, 4))
    x = kit.numbers(3, 1, 2, 6, 4)
    each = vmap(grad(lambda w, x: F.conv2d(x, w).sin().sum()), (None, 0))(weight, x)
    leaf = weight.clone().requires_grad_()
    right = [torch.autograd.grad(F.conv2d(one, leaf).sin().sum(), leaf)[0] for one in x]
    kit.close(each, torch.stack(right), "vmap(grad) for the weight of a convolution")


@check("normalisation")
def _norms(kit: Kit) -> None:
    scale = kit.numbers(6) + 1

    def f(x: Tensor) -> Tensor:
        y = F.layer_norm(x, (6,), scale, scale.sin()) + F.softmax(x, -1)
        z = F.batch_norm(x, None, None, scale, None, training=True)
        return F.group_norm(y, 2, scale) * F.log_softmax(z, 0)

    _hold(kit, "norms", f, kit.numbers(3, 4, 6))


@check("attention")
def _attention(kit: Kit) -> None:
    mask = kit.integers(4, 4, high=3) > 0

    def f(x: Tensor) -> Tensor:
        q, k, v = x.chunk(3, -1)
        causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return causal + F.scaled_dot_product_attention(q, k, v.sin(), mask | mask.T)

    _hold(kit, "attention", f, kit.numbers(2, 1, 2, 4, 9))


@check("losses and embeddings")
def _losses(kit: Kit) -> None:
    target, table = kit.integers(4, high=3), kit.numbers(5, 3)

    def f(x: Tensor) -> Tensor:
        loss = F.cross_entropy(x, target) + F.mse_loss(x, x.detach().sin())
        return loss + F.binary_cross_entropy_with_logits(x, (x > 0).to(x.dtype))

    _hold(kit, "losses", lambda x: f(x)[None], kit.numbers(3, 4, 3))
    tokens = kit.integers(3, 4, high=5)
    each = vmap(grad(lambda t, i: F.embedding(i, t).sin().sum()), (None, 0))(table, tokens)
    leaf = table.clone().requires_grad_()
    right = [torch.autograd.grad(F.embedding(i, leaf).sin().sum(), leaf)[0] for i in tokens]
    kit.close(each, torch.stack(right), "vmap(grad) for an embedding")


@check("sorting and searching")
def _sorting(kit: Kit) -> None:
    def f(x: Tensor) -> Tensor:
        values, order = x.sort(-1, descending=True)
        top = x.topk(2).values
        return torch.cat([values * torch.arange(5, device=x.device), top, x.median(-1, True).values,
                          x[order % 5] * 2])  # fmt: skip

    _hold(kit, "sorting", f, kit.numbers(3, 5))


@check("Fourier transforms")
def _fourier(kit: Kit) -> None:
    if kit.device.type == "mps":
        return
    _hold(kit, "a Fourier transform", lambda x: torch.fft.irfft(torch.fft.rfft(x) ** 2, n=6),
          kit.numbers(3, 6))  # fmt: skip


@check("recurrent networks")
def _recurrent(kit: Kit) -> None:
    cell: Any = nn.LSTM(3, 4).to(kit.device, kit.dtype)
    with torch.no_grad():
        for i, parameter in enumerate(cell.parameters()):
            parameter.copy_(kit.numbers(*parameter.shape, seed=i))
    cell.requires_grad_(False)
    _hold(kit, "an LSTM", lambda x: cell(x)[0], kit.numbers(3, 5, 2, 3))


@check("derivatives borrowed from PyTorch")
def _borrowed(kit: Kit) -> None:
    def f(x: Tensor) -> Tensor:
        return torch.special.i1(x) + torch.linalg.det(torch.outer(x, x.sin()) + torch.diag(x))

    leaf = kit.numbers(3).requires_grad_()
    right = torch.autograd.grad(f(leaf).sum(), leaf, create_graph=True)[0]
    kit.close(grad(lambda x: f(x).sum())(leaf.detach()), right.detach(), "a borrowed gradient")
    second = torch.autograd.grad(right.sum(), leaf)[0]
    twice = grad(lambda x: grad(lambda x: f(x).sum())(x).sum())(leaf.detach())
    kit.close(twice, second, "a borrowed gradient, differentiated again")


@check("optimiser steps")
def _optimisers(kit: Kit) -> None:
    params, rates = kit.numbers(3, 4), kit.numbers(3) * 0.1 + 0.2

    def step(p: Tensor, rate: Tensor) -> Tensor:
        buffer = torch.zeros_like(p)
        gradient = grad(lambda p: (p**4).sum())(p)
        buffer.mul_(0.9).add_(gradient)
        p.sub_(rate * buffer)
        return p

    right = params - rates[:, None] * 4 * params**3
    kit.close(vmap(step)(params.clone(), rates), right, "an ensemble's step of gradient descent")
