"""Derivatives of factorisations and solves; determinants, QR and SVD borrow PyTorch's.

Every formula uses results that are themselves differentiable (the solution, the inverse, the
factor), never the LU pivots, so derivatives of every order come out right.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.autodiff.declare import decomposition, jvp_rule, unbroadcast, vjp_rule
from lamina.autodiff.rules.matmul import adjoint
from lamina_core.overloads import aten

# -- cholesky --------------------------------------------------------------------------------------


def _half(x: Any) -> Any:
    """The lower triangle, with half of the diagonal."""
    return x.tril() - 0.5 * torch.diag_embed(x.diagonal(dim1=-2, dim2=-1))


@vjp_rule(aten.cholesky.default)
def deprecated_cholesky_rule(needs: Any, x: Any, upper: bool = False) -> Any:
    """[*B, n, n] -> [*B, n, n]."""
    out = aten.cholesky.default(x, upper)
    return out, (out, upper), _cholesky_pullback


@jvp_rule(aten.cholesky.default)
def deprecated_cholesky_jvp(tangents: Any, x: Any, upper: bool = False) -> Any:
    """[*B, n, n] -> [*B, n, n]."""
    out = aten.cholesky.default(x, upper)
    return out, _cholesky_t(out, upper, tangents[0])


@vjp_rule(aten.linalg_cholesky_ex.default)
def cholesky_rule(needs: Any, x: Any, *, upper: bool = False, check_errors: bool = False) -> Any:
    """[*B, n, n] -> factor [*B, n, n], info [*B]."""
    outs = aten.linalg_cholesky_ex.default(x, upper=upper, check_errors=check_errors)
    return outs, (outs[0], upper), _cholesky_pullback


def _cholesky_pullback(residuals: Any, needs: Any, ct: Any, info_ct: Any = None) -> Any:
    """`L^-H half(L^H ct) L^-1`, made Hermitian."""
    factor, upper = residuals
    if ct is None:
        return (None,)
    if upper:
        factor, ct = adjoint(factor), adjoint(ct)
    dual = adjoint(factor)
    inner = _half(dual.matmul(ct))
    left = torch.linalg.solve_triangular(dual, inner, upper=True)
    found = torch.linalg.solve_triangular(factor, left, upper=False, left=False)
    return (0.5 * (found + adjoint(found)),)


@jvp_rule(aten.linalg_cholesky_ex.default)
def cholesky_jvp(tangents: Any, x: Any, *, upper: bool = False, check_errors: bool = False) -> Any:
    """[*B, n, n] -> factor [*B, n, n], info [*B]; `L_t = L half(L^-1 x_t L^-H)`."""
    outs = aten.linalg_cholesky_ex.default(x, upper=upper, check_errors=check_errors)
    return outs, (_cholesky_t(outs[0], upper, tangents[0]), None)


def _cholesky_t(factor: Any, upper: bool, x_t: Any) -> Any:
    factor = adjoint(factor) if upper else factor
    x_t = 0.5 * (x_t + adjoint(x_t))
    left = torch.linalg.solve_triangular(factor, x_t, upper=False)
    inner = torch.linalg.solve_triangular(adjoint(factor), left, upper=True, left=False)
    factor_t = factor.matmul(_half(inner))
    return adjoint(factor_t) if upper else factor_t


@vjp_rule(aten.cholesky_inverse.default)
def cholesky_inverse_rule(needs: Any, x: Any, upper: bool = False) -> Any:
    """[*B, n, n] -> [*B, n, n]; PyTorch's formula reads the triangle that the op does not."""
    out = aten.cholesky_inverse.default(x, upper)
    return out, (out, x, upper), _cholesky_inverse_pullback


def _cholesky_inverse_pullback(residuals: Any, needs: Any, ct: Any) -> Any:
    out, x, upper = residuals
    inner = out.matmul(ct + adjoint(ct)).matmul(out)
    return (-inner.matmul(x.tril()).tril() if not upper else -x.triu().matmul(inner).triu(),)


@jvp_rule(aten.cholesky_inverse.default)
def cholesky_inverse_jvp(tangents: Any, x: Any, upper: bool = False) -> Any:
    """[*B, n, n] -> [*B, n, n]"""
    out = aten.cholesky_inverse.default(x, upper)
    (x_t,) = tangents
    term = adjoint(x_t.triu()).matmul(x.triu()) if upper else x_t.tril().matmul(adjoint(x.tril()))
    return out, -out.matmul(term + adjoint(term)).matmul(out)


# -- inverse ---------------------------------------------------------------------------------------


@vjp_rule(aten.linalg_inv_ex.default)
def inv_rule(needs: Any, x: Any, *, check_errors: bool = False) -> Any:
    """[*B, n, n] -> inverse [*B, n, n], info [*B]."""
    outs = aten.linalg_inv_ex.default(x, check_errors=check_errors)
    return outs, (outs[0],), _inv_pullback


def _inv_pullback(residuals: Any, needs: Any, ct: Any, info_ct: Any) -> Any:
    if ct is None:
        return (None,)
    dual = adjoint(residuals[0])
    return (-dual.matmul(ct).matmul(dual),)


@jvp_rule(aten.linalg_inv_ex.default)
def inv_jvp(tangents: Any, x: Any, *, check_errors: bool = False) -> Any:
    """[*B, n, n] -> inverse [*B, n, n], info [*B]."""
    outs = aten.linalg_inv_ex.default(x, check_errors=check_errors)
    inverse = outs[0]
    return outs, (-inverse.matmul(tangents[0]).matmul(inverse), None)


# -- eigenvalues of a Hermitian matrix -------------------------------------------------------------


def _gaps(values: Any) -> Any:
    """[*B, n] -> [*B, n, n]: 1 / (value_j - value_i), 0 on the diagonal, safe to differentiate."""
    gaps = values.unsqueeze(-2) - values.unsqueeze(-1)
    same = torch.ones_like(gaps, dtype=torch.bool).tril().triu()
    return gaps.masked_fill(same, 1).reciprocal().masked_fill(same, 0)


@vjp_rule(aten._linalg_eigh.default)
def eigh_rule(needs: Any, a: Any, UPLO: str = "L", compute_v: bool = True) -> Any:
    """[*B, n, n] -> eigenvalues [*B, n], eigenvectors [*B, n, n]; the latter are always needed."""
    outs = aten._linalg_eigh.default(a, UPLO, True)
    return outs, (outs[0], outs[1]), _eigh_pullback


def _eigh_pullback(residuals: Any, needs: Any, values_ct: Any, vectors_ct: Any) -> Any:
    values, vectors = residuals
    dual = adjoint(vectors)
    if vectors_ct is None:
        if values_ct is None:
            return (None,)
        return ((vectors * values_ct.unsqueeze(-2)).matmul(dual),)
    inner = dual.matmul(vectors_ct) * _gaps(values)
    if values_ct is not None:
        inner = inner + torch.diag_embed(values_ct)
    return (vectors.matmul(inner).matmul(dual),)


@jvp_rule(aten._linalg_eigh.default)
def eigh_jvp(tangents: Any, a: Any, UPLO: str = "L", compute_v: bool = True) -> Any:
    """[*B, n, n] -> eigenvalues [*B, n], eigenvectors [*B, n, n]."""
    values, vectors = aten._linalg_eigh.default(a, UPLO, True)
    inner = adjoint(vectors).matmul(tangents[0]).matmul(vectors)
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    values_t = diagonal.real if diagonal.is_complex() else diagonal
    return (values, vectors), (values_t, vectors.matmul(inner * _gaps(values)))


@jvp_rule(aten.linalg_eig.default)
def eig_jvp(tangents: Any, a: Any) -> Any:
    """[*B, n, n] -> complex eigenvalues [*B, n], eigenvectors [*B, n, n] of length 1.

    Reverse mode borrows PyTorch's formula; the forward one divides by 0 at second order.
    """
    values, vectors = aten.linalg_eig.default(a)
    inner = torch.linalg.solve(vectors, tangents[0].to(vectors.dtype).matmul(vectors))
    vectors_t = vectors.matmul(inner * _gaps(values))
    stretch = (vectors.conj() * vectors_t).sum(-2, keepdim=True).real
    values_t = inner.diagonal(dim1=-2, dim2=-1)
    return (values, vectors), (values_t, vectors_t - vectors * stretch)


# -- solves ----------------------------------------------------------------------------------------


def _is_vector(a: Any, b: Any) -> bool:
    return b.dim() == 1 or (a.dim() - 1 == b.dim() and b.shape == a.shape[:-1])


@vjp_rule(aten._linalg_solve_ex.default)
def solve_rule(needs: Any, a: Any, b: Any, *, left: bool = True, check_errors: bool = False) -> Any:
    """A [*B, n, n], b [*B, n] or [*B, n, k] -> solution like b, LU, pivots, info."""
    outs = aten._linalg_solve_ex.default(a, b, left=left, check_errors=check_errors)
    residuals = (a, outs[0] if needs[0] else None, _is_vector(a, b), b.shape, left)
    return outs, residuals, _solve_pullback


def _solve_pullback(residuals: Any, needs: Any, ct: Any, *others: Any) -> Any:
    a, x, vector, b_shape, left = residuals
    if ct is None:
        return None, None
    b_ct = torch.linalg.solve(adjoint(a), ct, left=left)
    a_ct = None
    if needs[0]:
        one, other = (b_ct.unsqueeze(-1), x.unsqueeze(-1)) if vector else (b_ct, x)
        term = one.matmul(adjoint(other)) if left else adjoint(other).matmul(one)
        a_ct = unbroadcast(-term, a.shape)
    return a_ct, unbroadcast(b_ct, b_shape) if needs[1] else None


@jvp_rule(aten._linalg_solve_ex.default)
def solve_jvp(
    tangents: Any, a: Any, b: Any, *, left: bool = True, check_errors: bool = False
) -> Any:
    """A [*B, n, n], b [*B, n] or [*B, n, k] -> solution like b, LU, pivots, info."""
    a_t, b_t = tangents
    outs = aten._linalg_solve_ex.default(a, b, left=left, check_errors=check_errors)
    x = outs[0]
    right = b_t
    if a_t is not None:
        if _is_vector(a, b):
            term = a_t.matmul(x.unsqueeze(-1)).squeeze(-1)
        else:
            term = a_t.matmul(x) if left else x.matmul(a_t)
        right = -term if right is None else right - term
    return outs, (torch.linalg.solve(a, right, left=left), None, None, None)


def _triangle(x: Any, upper: bool, unit: bool) -> Any:
    """The part of x that a triangular solve reads."""
    return x.triu(int(unit)) if upper else x.tril(-int(unit))


@vjp_rule(aten.linalg_solve_triangular.default)
def solve_triangular_rule(
    needs: Any, a: Any, b: Any, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Any:
    """A [*B, n, n], b [*B, n, k] -> [*B, n, k]."""
    out = aten.linalg_solve_triangular.default(
        a, b, upper=upper, left=left, unitriangular=unitriangular
    )
    residuals = (a, out if needs[0] else None, b.shape, upper, left, unitriangular)
    return out, residuals, _solve_triangular_pullback


def _solve_triangular_pullback(residuals: Any, needs: Any, ct: Any) -> Any:
    a, x, b_shape, upper, left, unit = residuals
    b_ct = torch.linalg.solve_triangular(
        adjoint(a), ct, upper=not upper, left=left, unitriangular=unit
    )
    a_ct = None
    if needs[0]:
        term = b_ct.matmul(adjoint(x)) if left else adjoint(x).matmul(b_ct)
        a_ct = unbroadcast(-_triangle(term, upper, unit), a.shape)
    return a_ct, unbroadcast(b_ct, b_shape) if needs[1] else None


@jvp_rule(aten.linalg_solve_triangular.default)
def solve_triangular_jvp(
    tangents: Any, a: Any, b: Any, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Any:
    """A [*B, n, n], b [*B, n, k] -> [*B, n, k]."""
    a_t, b_t = tangents
    options = {"upper": upper, "left": left, "unitriangular": unitriangular}
    x = aten.linalg_solve_triangular.default(a, b, **options)
    right = b_t
    if a_t is not None:
        a_t = _triangle(a_t, upper, unitriangular)
        term = a_t.matmul(x) if left else x.matmul(a_t)
        right = -term if right is None else right - term
    return x, torch.linalg.solve_triangular(a, right.expand(x.shape), **options)


@decomposition(aten.triangular_solve.default)
def triangular_solve(
    self: Any, A: Any, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> Any:
    """B [*B, n, k], A [*B, n, n] -> solution like B, A over the batch dims of both."""
    batch = torch.broadcast_shapes(self.shape[:-2], A.shape[:-2])
    copy = A.expand(*batch, *A.shape[-2:]).clone()
    factor, lower = (A.transpose(-2, -1), upper) if transpose else (A, not upper)
    solution = torch.linalg.solve_triangular(
        factor, self, upper=not lower, unitriangular=unitriangular
    )
    return solution, copy
