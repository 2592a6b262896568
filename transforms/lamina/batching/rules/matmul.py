"""Batching rules of matrix products.

Where one operand is not batched, the batch dim of the other becomes part of its rows or columns:
one large product in place of a bmm of copies.
"""

from __future__ import annotations

from string import ascii_letters
from typing import Any

import torch

from lamina.batching.dims import (
    batch_first,
    ensure_batched,
    from_end,
    logical_rank,
    move_batch,
    pad_rank,
    shifted,
)
from lamina.batching.table import batching_rule, decomposition
from lamina_core.overloads import aten

_OWN_COLUMNS = 16


def _product(info: Any, x: Any, x_bdim: Any, y: Any, y_bdim: Any) -> Any:
    """`torch.matmul` of operands of any logical ranks >= 1.

    These ops see lazy conjugates, which others do not: they are made plain here.
    """
    if x.is_complex():
        x, y = x.resolve_conj(), y.resolve_conj()
    x_rank, y_rank = logical_rank(x, x_bdim), logical_rank(y, y_bdim)
    if x_bdim is not None and y_bdim is not None:
        return _product_of_batches(batch_first(x, x_bdim), batch_first(y, y_bdim), x_rank, y_rank)
    if y_bdim is None:
        return _product_rows(x, x_bdim, y, x_rank, y_rank)
    return _product_columns(x, y, y_bdim, y_rank)


def _product_of_batches(x: Any, y: Any, x_rank: int, y_rank: int) -> Any:
    """[B, *, n, k] @ [B, *, k, m] -> [B, *, n, m]. Vectors get a row or column and lose it."""
    row, column = x_rank == 1, y_rank == 1
    x = x.unsqueeze(-2) if row else x
    y = y.unsqueeze(-1) if column else y
    rank = max(x.dim(), y.dim())
    out = torch.matmul(shifted(x, rank), shifted(y, rank))
    out = out.squeeze(-1) if column else out
    if row:
        out = out.squeeze(-1 if column else -2)
    return out, 0


def _product_rows(x: Any, x_bdim: int, y: Any, x_rank: int, y_rank: int) -> Any:
    """[*, n, k] with a batch dim @ [*, k, m] -> the batch dim as rows."""
    if x_rank == 1:  # [B, k] @ [*, k, m] -> [*, B, m]
        out = torch.matmul(batch_first(x, x_bdim), y)
        return out, from_end(out, 1 if y_rank == 1 else 2)
    if x_rank == 2 and y_rank <= 2 and x_bdim < 2:  # the batch dim stays where it is
        rows = torch.matmul(x.flatten(0, 1), y)
        return rows.unflatten(0, x.shape[:2]), x_bdim
    x = x.movedim(x_bdim, -3)
    shape = x.shape[-3:-1]
    rows = torch.matmul(x.flatten(-3, -2), y)
    out = rows.unflatten(-1 if y_rank == 1 else -2, shape)
    return out, from_end(out, 2 if y_rank == 1 else 3)


def _product_columns(x: Any, y: Any, y_bdim: int, y_rank: int) -> Any:
    """[*, n, k] @ [*, k, m] with a batch dim -> the batch dim as columns.

    That takes a copy of y. A CPU does without: it multiplies as fast by one y after the other, if
    these have columns enough (measured from 1 to 128 of them, the two are level at 16).
    """
    if y_rank == 1:  # [*, n, k] @ [k, B] -> [*, n, B]
        out = torch.matmul(x, move_batch(y, y_bdim, 1))
        return out, from_end(out, 1)
    if y_rank == 2 and x.dim() <= 2 and y.device.type == "cpu":
        y, y_bdim = batch_first(y, y_bdim), 0
        if y.shape[2] >= _OWN_COLUMNS:
            return torch.matmul(x, y), 0
    y = y.movedim(y_bdim, -2)
    columns = torch.matmul(x, y.flatten(-2))
    out = columns.unflatten(-1, y.shape[-2:])
    return out, from_end(out, 2)


def _plus(info: Any, x: Any, x_bdim: Any, product: Any, p_bdim: Any, beta: Any, alpha: Any) -> Any:
    """The sum `beta * x + alpha * product`, for which beta = 0 ignores even nan in x."""
    if not (product.is_floating_point() or product.is_complex()):
        beta, alpha = int(beta), int(alpha)  # as ATen does, which promotes nothing here
    rank = logical_rank(product, p_bdim)
    product = pad_rank(product, p_bdim, rank)
    if p_bdim is None:
        product = product.unsqueeze(0)
    if beta == 0:
        product = product * alpha if alpha != 1 else product
        return (
            product if p_bdim is not None else product.expand(info.batch_size, *product.shape[1:])
        ), 0
    x = pad_rank(x, x_bdim, rank)
    return torch.add(x if beta == 1 else x * beta, product, alpha=alpha), 0


@batching_rule(aten._cdist_backward.default)
def _cdist_backward(info: Any, in_dims: Any, ct: Any, x: Any, y: Any, p: float, cdist: Any) -> Any:
    """[B, *, P, R], [B, *, P, M], [B, *, R, M], [B, *, P, R] -> [B, *, P, M]

    x and y may have fewer dims, and broadcast. As in the op the answer is not summed over that, and
    is like x where there is no distance at all.
    """
    dims = (*in_dims[:3], in_dims[4])
    ct, x, y, cdist = (
        ensure_batched(v, d, info.batch_size) for v, d in zip((ct, x, y, cdist), dims, strict=True)
    )
    stack = torch.broadcast_shapes(x.shape[1:-2], y.shape[1:-2])
    nothing = 0 in (*x.shape[1:], *y.shape[1:])
    shape = x.shape if nothing else (info.batch_size, *stack, *x.shape[-2:])
    x, y = shifted(x, cdist.dim()).contiguous(), shifted(y, cdist.dim()).contiguous()
    return aten._cdist_backward(ct, x, y, p, cdist).reshape(shape), 0


@batching_rule(aten.cdist.default)
def cdist(info: Any, in_dims: Any, x: Any, y: Any, p: float = 2.0, compute_mode: Any = None) -> Any:
    """[B, *, P, M], [B, *, R, M] -> [B, *, P, R]"""
    if min(logical_rank(x, in_dims[0]), logical_rank(y, in_dims[1])) < 2:
        return NotImplemented
    x, y = _broadcastable(x, in_dims[0], y, in_dims[1])
    return aten.cdist(x, y, p, compute_mode), 0


@batching_rule(aten._cdist_forward.default)
def _cdist_forward(info: Any, in_dims: Any, x: Any, y: Any, p: float, compute_mode: Any) -> Any:
    """[B, *, P, M], [B, *, R, M] -> [B, *, P, R]"""
    x, y = _broadcastable(x, in_dims[0], y, in_dims[1])
    return aten._cdist_forward(x, y, p, compute_mode), 0


@batching_rule(aten._euclidean_dist.default)
def _euclidean_dist(info: Any, in_dims: Any, x: Any, y: Any) -> Any:
    """[B, *, P, M], [B, *, R, M] -> [B, *, P, R]"""
    x, y = _broadcastable(x, in_dims[0], y, in_dims[1])
    return torch.cdist(x, y, 2.0, "use_mm_for_euclid_dist"), 0


def _broadcastable(x: Any, x_bdim: Any, y: Any, y_bdim: Any) -> Any:
    rank = max(logical_rank(x, x_bdim), logical_rank(y, y_bdim))
    return pad_rank(x, x_bdim, rank), pad_rank(y, y_bdim, rank)


@batching_rule(aten._pdist_backward.default)
def _pdist_backward(info: Any, in_dims: Any, ct: Any, x: Any, p: float, pdist: Any) -> Any:
    """[B, n(n-1)/2], [B, n, m] -> [B, n, m]. ATen takes no batch: by pairs."""
    ct, x, pdist = (
        ensure_batched(v, d, info.batch_size)
        for v, d in zip((ct, x, pdist), (in_dims[0], in_dims[1], in_dims[3]), strict=True)
    )
    first, second = _pairs(x)
    difference = x.index_select(1, first) - x.index_select(1, second)
    ct, pdist = ct.unsqueeze(-1), pdist.unsqueeze(-1)
    if p == 0:
        return torch.zeros_like(x), 0
    if p == 1:
        slope = ct * difference.sign()
    elif p == float("inf"):
        slope = ct * difference.sign() * (difference.abs() == pdist)
    else:
        size = difference if p == 2 else difference.sign() * difference.abs().pow(p - 1)
        scaled = ct * size / pdist.pow(p - 1)
        slope = torch.where(pdist == 0, torch.zeros_like(scaled), scaled)
    zeros = torch.zeros_like(x)
    return zeros.index_add(1, first, slope).index_add(1, second, -slope), 0


@batching_rule(aten._pdist_forward.default)
def _pdist_forward(info: Any, in_dims: Any, x: Any, p: float = 2.0) -> Any:
    """[B, n, m] -> [B, n(n-1)/2]. ATen takes no batch: the norm of the difference of each pair."""
    x = batch_first(x, in_dims[0])
    first, second = _pairs(x)
    difference = x.index_select(1, first) - x.index_select(1, second)
    return torch.linalg.vector_norm(difference, p, -1), 0


def _pairs(x: Any) -> Any:
    n = x.shape[1]
    return torch.triu_indices(n, n, 1, device=x.device).unbind(0)


@batching_rule(aten._trilinear.default)
def _trilinear(
    info: Any,
    in_dims: Any,
    x: Any,
    y: Any,
    z: Any,
    expand_x: Any,
    expand_y: Any,
    expand_z: Any,
    sumdim: Any,
    unroll_dim: int = 1,
) -> Any:
    """The op inserts dims and multiplies; the batch dim is one more in front, or one to insert."""
    values, expands = [], []
    for v, bdim, expand in zip((x, y, z), in_dims[:3], (expand_x, expand_y, expand_z), strict=True):
        values.append(batch_first(v, bdim))
        expands.append(_behind(expand) if bdim is not None else [0, *_behind(expand)])
    return aten._trilinear(*values, *expands, _behind(sumdim), *_behind([unroll_dim])), 0


def _behind(dims: Any) -> list[int]:
    return [dim + 1 for dim in dims]


@batching_rule(aten.addbmm.default)
def addbmm(
    info: Any, in_dims: Any, x: Any, y: Any, z: Any, *, beta: Any = 1, alpha: Any = 1
) -> Any:
    """[B, n, m], [B, N, n, k], [B, N, k, m] -> [B, n, m]: N is summed like k."""
    y_bdim, z_bdim = in_dims[1:3]
    y = batch_first(y, y_bdim).transpose(-3, -2).flatten(-2)
    z = batch_first(z, z_bdim).flatten(-3, -2)
    if y_bdim is None and z_bdim is None:
        return _plus(info, x, in_dims[0], y @ z, None, beta, alpha)
    y_bdim, z_bdim = (None if d is None else 0 for d in (y_bdim, z_bdim))
    return _plus(info, x, in_dims[0], *_product(info, y, y_bdim, z, z_bdim), beta, alpha)


@batching_rule(aten.addmm.default)
def addmm(info: Any, in_dims: Any, x: Any, y: Any, z: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """[B, n, m], [B, n, k], [B, k, m] -> [B, n, m]"""
    x_bdim, y_bdim, z_bdim = in_dims
    if y_bdim is None and z_bdim is None:
        return _plus(info, x, x_bdim, y @ z, None, beta, alpha)
    if y_bdim is not None and z_bdim is not None:
        x = pad_rank(x, x_bdim, 2)
        y, z = batch_first(y, y_bdim), batch_first(z, z_bdim)
        return torch.baddbmm(x, y, z, beta=beta, alpha=alpha), 0
    if x_bdim is None and z_bdim is None and y_bdim < 2 and (x.dim() < 2 or x.shape[0] == 1):
        rows = torch.addmm(x, y.flatten(0, 1), z, beta=beta, alpha=alpha)
        return rows.unflatten(0, y.shape[:2]), y_bdim
    return _plus(info, x, x_bdim, *_product(info, y, y_bdim, z, z_bdim), beta, alpha)


@batching_rule(aten.addmv.default)
def addmv(info: Any, in_dims: Any, x: Any, y: Any, z: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """[B, n], [B, n, k], [B, k] -> [B, n]"""
    x_bdim, y_bdim, z_bdim = in_dims
    if y_bdim is None and z_bdim is None:
        return _plus(info, x, x_bdim, y @ z, None, beta, alpha)
    return _plus(info, x, x_bdim, *_product(info, y, y_bdim, z, z_bdim), beta, alpha)


@batching_rule(aten.addr.default)
def addr(info: Any, in_dims: Any, x: Any, y: Any, z: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """[B, n, m], [B, n], [B, m] -> [B, n, m]: an elementwise product, which no bmm beats."""
    x_bdim, y_bdim, z_bdim = in_dims
    product = batch_first(y, y_bdim).unsqueeze(-1) * batch_first(z, z_bdim).unsqueeze(-2)
    unbatched = y_bdim is None and z_bdim is None
    if x.dtype == torch.bool:
        product = product & bool(alpha)
        return pad_rank(x, x_bdim, 2) & bool(beta) | product, 0
    return _plus(info, x, x_bdim, product, None if unbatched else 0, beta, alpha)


@batching_rule(aten.baddbmm.default)
def baddbmm(
    info: Any, in_dims: Any, x: Any, y: Any, z: Any, *, beta: Any = 1, alpha: Any = 1
) -> Any:
    """[B, N, n, m], [B, N, n, k], [B, N, k, m] -> [B, N, n, m]"""
    x_bdim, y_bdim, z_bdim = in_dims
    if y_bdim is None and z_bdim is None:
        return _plus(info, x, x_bdim, torch.bmm(y, z), None, beta, alpha)
    return _plus(info, x, x_bdim, *_product(info, y, y_bdim, z, z_bdim), beta, alpha)


@batching_rule(
    aten.bmm.default, aten.mm.default, aten.mv.default, aten.matmul.default, aten.dot.default
)
def matmul(info: Any, in_dims: Any, x: Any, y: Any) -> Any:
    """[B, *, n, k], [B, *, k, m] -> [B, *, n, m]"""
    return _product(info, x, in_dims[0], y, in_dims[1])


@batching_rule(aten.bmm.dtype, aten.mm.dtype)
def matmul_dtype(info: Any, in_dims: Any, x: Any, y: Any, out_dtype: Any) -> Any:
    """[B, *, n, k], [B, *, k, m] -> [B, *, n, m], summed in a wider dtype."""
    x, y = (ensure_batched(v, d, info.batch_size) for v, d in zip((x, y), in_dims[:2], strict=True))
    out = aten.bmm.dtype(x.flatten(0, -3), y.flatten(0, -3), out_dtype)
    return out.reshape(*x.shape[:-1], y.shape[-1]), 0


@batching_rule(aten.einsum.default)
def einsum(info: Any, in_dims: Any, equation: str, tensors: Any, *, path: Any = None) -> Any:
    """Operands [B, *S] -> [B, *S]: a letter more in the terms of what is batched."""
    spare = set(ascii_letters) - set(equation)
    if not spare:
        return NotImplemented
    letter = min(spare)
    left, arrow, right = equation.replace(" ", "").partition("->")
    if not arrow:  # what is there once, in alphabetical order
        right = "..." * ("..." in left)
        right += "".join(sorted(c for c in set(left) if c in ascii_letters and left.count(c) == 1))
    terms = [
        term if bdim is None else letter + term
        for term, bdim in zip(left.split(","), in_dims[1], strict=True)
    ]
    values = [batch_first(x, bdim) for x, bdim in zip(tensors, in_dims[1], strict=True)]
    return aten.einsum(f"{','.join(terms)}->{letter}{right}", values, path=path), 0


@batching_rule(aten.linear.default)
def linear(info: Any, in_dims: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    """[B, *, i], [B, o, i], [B, o] -> [B, *, o]"""
    x_bdim, w_bdim = in_dims[:2]
    b_bdim = in_dims[2] if bias is not None else None
    if w_bdim is None and b_bdim is None:
        if x_bdim == logical_rank(x, x_bdim):  # the last dim is the one that is contracted
            x, x_bdim = batch_first(x, x_bdim), 0
        return torch.nn.functional.linear(x, weight, bias), x_bdim
    w_rank = logical_rank(weight, w_bdim)
    if w_bdim is None:
        product = torch.nn.functional.linear(batch_first(x, x_bdim), weight)
        out_bdim: Any = None if x_bdim is None else 0
    elif x_bdim is not None and w_rank == 2 and logical_rank(x, x_bdim) > 1:
        return _linear_of_batches(x, x_bdim, weight, w_bdim, bias, b_bdim)
    elif x_bdim is None and w_rank == 2 and w_bdim < 2 and (bias is None or b_bdim is not None):
        rows = weight.flatten(0, 1)
        if bias is not None:
            bias = move_batch(bias, b_bdim, w_bdim).flatten()
        out = torch.nn.functional.linear(x, rows, bias).unflatten(-1, weight.shape[:2])
        return out, from_end(out, 1 if w_bdim else 2)
    else:
        weight = batch_first(weight, w_bdim)
        weight = weight.mT if w_rank == 2 else weight
        product, out_bdim = _product(info, x, x_bdim, weight, 0)
    if bias is None:
        return product, out_bdim
    return _plus(info, bias, b_bdim, product, out_bdim, 1, 1)


def _linear_of_batches(
    x: Any, x_bdim: int, weight: Any, w_bdim: int, bias: Any, b_bdim: Any
) -> Any:
    """[B, *, i], [B, o, i] -> [B, *, o] as one bmm, with the bias added inside."""
    x, weight = batch_first(x, x_bdim), batch_first(weight, w_bdim).mT
    rows = x.flatten(1, -2) if x.dim() > 3 else x
    if bias is None:
        out = torch.bmm(rows, weight)
    else:
        out = torch.baddbmm(pad_rank(bias, b_bdim, 2), rows, weight)
    return (out.unflatten(1, x.shape[1:-1]) if x.dim() > 3 else out), 0


@decomposition(aten.linear_backward.default)
def linear_backward(x: Any, ct: Any, weight: Any, output_mask: Any) -> Any:
    """Cotangents of x, weight and bias."""
    rows, cts = x.reshape(-1, x.shape[-1]), ct.reshape(-1, ct.shape[-1])
    return (
        ct @ weight if output_mask[0] else None,
        cts.t() @ rows if output_mask[1] else None,
        cts.sum(0) if output_mask[2] else None,
    )


@batching_rule(aten.outer.default, aten.ger.default)
def outer(info: Any, in_dims: Any, x: Any, y: Any) -> Any:
    """[B, n], [B, m] -> [B, n, m]"""
    return batch_first(x, in_dims[0]).unsqueeze(-1) * batch_first(y, in_dims[1]).unsqueeze(-2), 0


@batching_rule(aten.vdot.default)
def vdot(info: Any, in_dims: Any, x: Any, y: Any) -> Any:
    """[B, k], [B, k] -> [B]"""
    return _product(info, x.conj_physical(), in_dims[0], y, in_dims[1])
