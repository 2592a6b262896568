"""Derivatives of factorisations and solves; log-determinants and QR borrow PyTorch's.

Eigenvalues and singular values are in `spectral`.

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


# -- determinant -----------------------------------------------------------------------------------

# NOTE [Determinants of singular matrices]
# The derivative of det is the adjugate, which is no inverse times a determinant where the matrix is
# singular. Zero pivots of A are filled in: A' = A + W has an inverse, and with N = A'^-1 W, of a
# rank k as large as the number of zeros,
#
#     det A = det A' det(1 - N),   det(1 - N) = 1 - e1 + e2 - e3
#
# in elementary symmetric functions of the eigenvalues of N, if k is 3 or less. This holds for all A
# while W stands still, so it has the derivatives of det, of every order. For a larger k those up to
# the third are 0. Where no pivot is 0 all that is left is det A times the inverse.


def _filled(a: Any, lu: Any, pivots: Any) -> tuple[Any, Any]:
    """[*B, n, n] twice, [*B, n] -> W [*B, n, n], and [*B, 1, 1]: 0 for more than 3 zero pivots.

    A pivot is 0 if it is no more than what rounding leaves of a difference of its terms.
    """
    permutation, lower, upper = torch.lu_unpack(lu, pivots)
    pivot = upper.diagonal(dim1=-2, dim2=-1).abs()
    terms = (lower.abs() * upper.abs().transpose(-2, -1)).sum(-1)
    zero = pivot <= terms * (16 * torch.finfo(terms.dtype).eps)
    size = terms.amax(-1, keepdim=True)
    column = zero * size.masked_fill(size == 0, 1)
    known = (zero.sum(-1) <= 3).unsqueeze(-1).unsqueeze(-1)
    return permutation.matmul(lower * column.unsqueeze(-2)), known.to(a.dtype)


def _trace(a: Any) -> Any:
    return a.diagonal(dim1=-2, dim2=-1).sum(-1).unsqueeze(-1).unsqueeze(-1)


def _adjugate(a: Any, lu: Any, pivots: Any) -> Any:
    """[*B, n, n] -> [*B, n, n]: the derivative of the determinant, transposed; see the NOTE."""
    if a.shape[-1] == 0:
        return a
    fill, known = _filled(a, lu, pivots)
    whole = a + fill
    inverse = torch.linalg.inv(whole)
    n = inverse.matmul(fill)
    n2 = n.matmul(n)
    p1, p2, p3 = _trace(n), _trace(n2), _trace(n2.matmul(n))
    e2 = (p1 * p1 - p2) / 2
    e3 = (p1 * p1 * p1 - 3 * p1 * p2 + 2 * p3) / 6
    rest = (1 - p1 + e2) * inverse + (1 - p1) * n.matmul(inverse) + n2.matmul(inverse)
    det = torch.linalg.det(whole).unsqueeze(-1).unsqueeze(-1)
    return known * det * ((1 - p1 + e2 - e3) * inverse + n.matmul(rest))


@vjp_rule(aten._linalg_det.default)
def det_rule(needs: Any, a: Any) -> Any:
    """[*B, n, n] -> determinant [*B], LU [*B, n, n], pivots [*B, n]."""
    outs = aten._linalg_det.default(a)
    return outs, (a, outs[1], outs[2]), _det_pullback


def _det_pullback(residuals: Any, needs: Any, ct: Any, *others: Any) -> Any:
    if ct is None:
        return (None,)
    return (ct.unsqueeze(-1).unsqueeze(-1) * adjoint(_adjugate(*residuals)),)


@jvp_rule(aten._linalg_det.default)
def det_jvp(tangents: Any, a: Any) -> Any:
    """[*B, n, n] -> determinant [*B], LU [*B, n, n], pivots [*B, n]."""
    outs = aten._linalg_det.default(a)
    slope = _adjugate(a, outs[1], outs[2]).transpose(-2, -1)
    return outs, ((slope * tangents[0]).sum((-2, -1)), None, None)


# -- solves ----------------------------------------------------------------------------------------


def _is_vector(a: Any, b: Any) -> bool:
    return b.dim() == 1 or (a.dim() - 1 == b.dim() and b.shape == a.shape[:-1])


def _solved(a: Any, b: Any, left: bool) -> Any:
    """Without a check: whether a singular matrix is an error was asked in the first solve."""
    return torch.linalg.solve_ex(a, b, left=left)[0]


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
    b_ct = _solved(adjoint(a), ct, left)
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
    return outs, (_solved(a, right, left), None, None, None)


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


@decomposition(aten.cholesky_solve.default)
def cholesky_solve(self: Any, input2: Any, upper: bool = False) -> Any:
    """B [*B, n, k], a factor [*B, n, n] -> [*B, n, k]. PyTorch's formulas broadcast wrongly."""
    lower = adjoint(input2) if upper else input2
    half = torch.linalg.solve_triangular(lower, self, upper=False)
    return torch.linalg.solve_triangular(adjoint(lower), half, upper=True)


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
