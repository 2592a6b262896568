"""Batching rules of linear algebra: ATen batches these ops itself, over leading dims.

The batch dim goes to the front; operands that broadcast over leading dims get 1s behind it.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.batching.dims import (
    EmptyBatchError,
    batch_first,
    behind_batch,
    ensure_batched,
    logical_rank,
    logical_shape,
    pad_rank,
    shifted,
)
from lamina.batching.table import batching_rule
from lamina_core.overloads import aten
from lamina_core.schema import facts

# One op a line: all outputs are batched, and no operand broadcasts.
_OWN_BATCH = [
    aten._cholesky_solve_helper.default,
    aten._linalg_det.default,
    aten._linalg_eigh.default,
    aten._linalg_eigvals.default,
    aten._linalg_slogdet.default,
    aten._linalg_svd.default,
    aten.cholesky.default,
    aten.cholesky_inverse.default,
    aten.det.default,
    aten.geqrf.default,
    aten.inverse.default,
    aten.linalg_cholesky.default,
    aten.linalg_cholesky_ex.default,
    aten.linalg_det.default,
    aten.linalg_eig.default,
    aten.linalg_eigh.default,
    aten.linalg_eigvals.default,  # these two and svdvals compute no vectors, which
    aten.linalg_eigvalsh.default,  # PyTorch's decomposition asks for where it meets a subclass
    aten.linalg_householder_product.default,  # tau has a dim less
    aten.linalg_inv.default,
    aten.linalg_inv_ex.default,
    aten.linalg_ldl_factor_ex.default,
    aten.linalg_lu.default,
    aten.linalg_lu_factor_ex.default,
    aten.linalg_matrix_sqrth.default,
    aten.linalg_polar.default,
    aten.linalg_qr.default,
    aten.linalg_slogdet.default,
    aten.linalg_svd.default,
    aten.linalg_svdvals.default,
    aten.ormqr.default,  # tau has a dim less
    aten.slogdet.default,
]
# Two matrices whose leading dims broadcast; one output.
_BROADCASTING = [
    aten.cholesky_solve.default,
    aten.linalg_solve_triangular.default,
]


def _register_own_batch(op: Any) -> None:
    tensor_args = facts(op).tensor_args

    @batching_rule(op, state="family")
    def own_batch(info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> Any:
        """[B, *, n, m] -> [B, *, ...]"""
        values = list(args)
        for at in tensor_args:
            values[at] = ensure_batched(args[at], in_dims[at], info.batch_size)
        out = op(*values, **kwargs)
        if isinstance(out, torch.Tensor):
            return out, 0
        # What the op was asked not to compute is empty, and the same for all.
        size = info.batch_size
        if not size:
            raise EmptyBatchError
        dims = [0 if o.dim() and o.shape[0] == size else None for o in out]
        return tuple(out), dims


def _register_broadcasting(op: Any) -> None:
    @batching_rule(op, state="family")
    def broadcasting(info: Any, in_dims: Any, a: Any, b: Any, *rest: Any, **kwargs: Any) -> Any:
        """[B, *, n, n], [B, *, n, m] -> [B, *, n, m]"""
        a, b, _ = _pair(a, in_dims[0], b, in_dims[1])
        return op(a, b, *rest, **kwargs), 0


def _pair(a: Any, a_bdim: Any, b: Any, b_bdim: Any) -> Any:
    rank = max(logical_rank(a, a_bdim), logical_rank(b, b_bdim))
    return pad_rank(a, a_bdim, rank), pad_rank(b, b_bdim, rank), rank


for _op in _OWN_BATCH:
    _register_own_batch(_op)
for _op in _BROADCASTING:
    _register_broadcasting(_op)


@batching_rule(aten._linalg_check_errors.default)
def _linalg_check_errors(
    info: Any, in_dims: Any, errors: Any, api_name: str, *, is_matrix: bool
) -> Any:
    """[B, *] -> nothing: one example that failed is enough to raise."""
    aten._linalg_check_errors(errors, api_name, is_matrix=False)
    return None, None


@batching_rule(aten._linalg_solve_ex.default)
def _linalg_solve_ex(
    info: Any, in_dims: Any, a: Any, b: Any, *, left: bool = True, check_errors: bool = False
) -> Any:
    """[B, *, n, n], [B, *, n, m] -> [B, *, n, m], and LU [B, *, n, n], pivots, info of a alone."""
    a_bdim = in_dims[0]
    shape = logical_shape(a, a_bdim)
    a, b, vector = _equations(a, b, in_dims)
    out, *factors = aten._linalg_solve_ex(a, b, left=left, check_errors=check_errors)
    if a_bdim is not None:  # without the 1s that were put in
        ends = (shape, shape[:-1], shape[:-2])
        factors = [f.reshape(info.batch_size, *end) for f, end in zip(factors, ends, strict=True)]
    to = None if a_bdim is None else 0
    return (out.squeeze(-1) if vector else out, *factors), (0, to, to, to)


@batching_rule(aten.linalg_solve.default)
def linalg_solve(info: Any, in_dims: Any, a: Any, b: Any, *, left: bool = True) -> Any:
    """[B, *, n, n], [B, *, n, m] -> [B, *, n, m]"""
    a, b, vector = _equations(a, b, in_dims)
    out = torch.linalg.solve(a, b, left=left)
    return (out.squeeze(-1) if vector else out), 0


def _equations(a: Any, b: Any, in_dims: Any) -> Any:
    """Both sides with the batch dim first, vectors as columns; and whether they were vectors.

    An unbatched matrix gets the dims of the other side: else ATen may take it for vectors, where
    the batch is as large as the matrix.
    """
    a_bdim, b_bdim = in_dims[:2]
    vector = _is_vector(logical_shape(a, a_bdim), logical_shape(b, b_bdim))
    if vector:
        b = batch_first(b, b_bdim).unsqueeze(-1)
        b_bdim = None if b_bdim is None else 0
    a, b, _ = _pair(a, a_bdim, b, b_bdim)
    return a, shifted(b.unsqueeze(0), a.dim()) if b_bdim is None else b, vector


def _is_vector(a_shape: Any, b_shape: Any) -> bool:
    """Whether ATen reads the right-hand side as (a batch of) vectors."""
    return len(b_shape) == 1 or tuple(a_shape[:-1]) == tuple(b_shape)


@batching_rule(aten.linalg_cross.default)
def linalg_cross(info: Any, in_dims: Any, x: Any, y: Any, *, dim: int = -1) -> Any:
    """[B, *S], [B, *S] -> [B, *S]"""
    x, y, rank = _pair(x, in_dims[0], y, in_dims[1])
    # The op wants operands of one rank.
    x, y = (v.unsqueeze(0) if d is None else v for v, d in zip((x, y), in_dims[:2], strict=True))
    return torch.linalg.cross(x, y, dim=behind_batch(dim, rank)), 0


@batching_rule(aten.linalg_ldl_solve.default)
def linalg_ldl_solve(
    info: Any, in_dims: Any, factors: Any, pivots: Any, b: Any, *, hermitian: bool = False
) -> Any:
    """[B, *, n, n], [B, *, n], [B, *, n, m] -> [B, *, n, m]"""
    factors, pivots, b = _with_pivots(factors, pivots, b, in_dims)
    return torch.linalg.ldl_solve(factors, pivots, b, hermitian=hermitian), 0


@batching_rule(aten.linalg_lstsq.default)
def linalg_lstsq(
    info: Any, in_dims: Any, a: Any, b: Any, rcond: Any = None, *, driver: Any = None
) -> Any:
    """[B, *, n, k], [B, *, n, m] -> [B, *, k, m], and what the driver computes besides."""
    a_bdim, b_bdim = in_dims[:2]
    vector = _is_vector(logical_shape(a, a_bdim), logical_shape(b, b_bdim))
    size = info.batch_size
    a, b = ensure_batched(a, a_bdim, size), ensure_batched(b, b_bdim, size)
    b = b.unsqueeze(-1) if vector else b
    a, b, rank = _pair(a, 0, b, 0)
    out, *others = aten.linalg_lstsq(a, b, rcond, driver=driver)
    dims: list[int | None] = [0 if o.dim() >= rank else None for o in others]
    if driver != "gels" and (driver is not None or a.device.type == "cpu"):
        dims[1] = 0  # the rank of each matrix; an output that is not computed has shape [0]
    return (out.squeeze(-1) if vector else out, *others), (0, *dims)


@batching_rule(aten.linalg_lu_solve.default)
def linalg_lu_solve(
    info: Any,
    in_dims: Any,
    factors: Any,
    pivots: Any,
    b: Any,
    *,
    left: bool = True,
    adjoint: bool = False,
) -> Any:
    """[B, *, n, n], [B, *, n], [B, *, n, m] -> [B, *, n, m]"""
    factors, pivots, b = _with_pivots(factors, pivots, b, in_dims)
    return torch.linalg.lu_solve(factors, pivots, b, left=left, adjoint=adjoint), 0


def _with_pivots(factors: Any, pivots: Any, b: Any, in_dims: Any) -> Any:
    """The operands with all leading dims: the kernels read pivots past their end to broadcast."""
    f_bdim, p_bdim, b_bdim = in_dims[:3]
    if f_bdim is None and p_bdim is not None:
        size = pivots.shape[p_bdim]
        factors, f_bdim = factors.expand(size, *factors.shape), 0
    elif p_bdim is None and f_bdim is not None:
        size = factors.shape[f_bdim]
        pivots, p_bdim = pivots.expand(size, *pivots.shape), 0
    factors, b, rank = _pair(factors, f_bdim, b, b_bdim)
    pivots = pad_rank(pivots, p_bdim, rank - 1)
    batch = torch.broadcast_shapes(factors.shape[:-2], pivots.shape[:-1], b.shape[:-2])
    pivots = pivots.expand(*batch, pivots.shape[-1]).contiguous()
    factors = factors.expand(*batch, *factors.shape[-2:]).contiguous()
    return factors, pivots, b.expand(*batch, *b.shape[-2:])


@batching_rule(aten.linalg_matrix_exp.default)
def linalg_matrix_exp(info: Any, in_dims: Any, x: Any) -> Any:
    """[B, *, n, n] -> [B, *, n, n]. The kernel flattens the leading dims by a view."""
    return aten.linalg_matrix_exp(batch_first(x, in_dims[0]).contiguous()), 0


@batching_rule(aten.linalg_pinv.atol_rtol_tensor)
def linalg_pinv(
    info: Any,
    in_dims: Any,
    x: Any,
    *,
    atol: Any = None,
    rtol: Any = None,
    hermitian: bool = False,
) -> Any:
    """[B, *, n, m] -> [B, *, m, n], with tolerances [B, *]"""
    x_bdim = in_dims[0]
    rank = logical_rank(x, x_bdim) - 2
    atol, rtol = (
        None if tolerance is None else pad_rank(tolerance, info.kwarg_dims.get(name), rank)
        for name, tolerance in (("atol", atol), ("rtol", rtol))
    )
    x = ensure_batched(x, x_bdim, info.batch_size)
    return torch.linalg.pinv(x, atol=atol, rtol=rtol, hermitian=hermitian), 0


@batching_rule(aten.lu_unpack.default)
def lu_unpack(info: Any, in_dims: Any, factors: Any, pivots: Any, *wanted: bool) -> Any:
    """[B, *, n, m], [B, *, k] -> [B, *, n, n], [B, *, n, k], [B, *, k, m], or [0] if not wanted."""
    size = info.batch_size
    operands = zip((factors, pivots), in_dims[:2], strict=True)
    outs = aten.lu_unpack(*(ensure_batched(v, d, size) for v, d in operands), *wanted)
    return tuple(outs), [0 if out.dim() > 1 else None for out in outs]


@batching_rule(aten.triangular_solve.default)
def triangular_solve(info: Any, in_dims: Any, b: Any, a: Any, *rest: Any) -> Any:
    """[B, *, n, m], [B, *, n, n] -> [B, *, n, m], [B, *, n, n]"""
    b, a = (ensure_batched(v, d, info.batch_size) for v, d in zip((b, a), in_dims[:2], strict=True))
    b, a, _ = _pair(b, 0, a, 0)
    return tuple(aten.triangular_solve(b, a, *rest)), (0, 0)
