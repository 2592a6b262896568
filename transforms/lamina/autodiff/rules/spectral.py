"""Derivatives of eigenvalues, singular values and their vectors.

# NOTE [Equal values]
A rotation among the vectors of equal values is as good as none, so only what does not change under
it has a derivative, and the formulas then give 0 / 0. Of a pair of equal values the cotangents tell
what the derivative is, or that they cannot:

* The loss changes under the rotation: there is no derivative; a number is divided by 0.
* It does not, and does not depend on the values either: the pair contributes 0.
* It depends on the values, on these two alike, and not on the two vectors beyond the rotation: 0.
  This holds of symmetric functions of the values, such as norms of the matrix.
* Otherwise the derivative may exist, as that of the square root of a matrix does, but it is no
  function of these cotangents: 0 / 0 is NaN, as in PyTorch.

A function that vanishes at the equal values, as the logarithm of the unit matrix, cannot be told
from one that ignores them. Values are equal here if LAPACK would not tell them apart.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.autodiff.declare import jvp_rule, vjp_rule
from lamina.autodiff.rules.matmul import adjoint
from lamina_core.overloads import aten

where = torch.where

# In units of eps: what LAPACK loses in a value of size 1, and what a loss that does not change may
# leave of a cotangent of norm 1.
_LOST, _LEFT = 16, 1024


# -- equal values ----------------------------------------------------------------------------------


def _diagonal(values: Any) -> Any:
    """[*B, n] -> [*B, n, n]: whether on the diagonal."""
    return torch.diag_embed(torch.ones_like(values, dtype=torch.bool))


def _gaps(values: Any) -> Any:
    """[*B, n] -> [*B, n, n]: value_j - value_i."""
    return values.unsqueeze(-2) - values.unsqueeze(-1)


def _rounding(values: Any) -> Any:
    """[*B, n] -> [*B, 1, 1]: a size that says nothing in a difference of the values, or in one."""
    if values.shape[-1] == 0:
        return values.abs().sum(-1, keepdim=True).unsqueeze(-1)
    largest = values.abs().amax(-1, keepdim=True).unsqueeze(-1)
    return largest * (_LOST * torch.finfo(largest.dtype).eps)


def _residue(*terms: Any) -> Any:
    """[*B, m, n] or None each -> [*B, 1, 1]: a size that says nothing in a product with them."""
    total: Any = 0.0
    for term in terms:
        if term is not None:
            size = term.abs().square().sum((-2, -1), keepdim=True).sqrt()
            total = total + size * (_LEFT * torch.finfo(size.dtype).eps)
    return total


def _over(numerator: Any, divisor: Any, skipped: Any) -> Any:
    """The quotient, and 0 with derivative 0 where skipped."""
    return where(skipped, 0.0, numerator) / where(skipped, 1.0, divisor)


def _says_nothing(skew: Any, parts: Any, values_ct: Any, residue: Any) -> Any:
    """[*B, n, n]: where a pair of equal values contributes 0; see NOTE [Equal values].

    Args:
        skew: How the loss changes under rotations of the pair.
        parts: The products of vectors and cotangents of vectors.
        values_ct: The cotangent of the values, or None.
        residue: What is taken for 0.
    """
    nothing = skew.abs() <= residue
    if values_ct is not None:
        nothing = nothing & (_gaps(values_ct).abs() <= _rounding(values_ct))
        for part in parts:
            nothing = nothing & (part.abs() <= residue) & (adjoint(part).abs() <= residue)
    return nothing


# -- eigenvalues of a Hermitian matrix -------------------------------------------------------------


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
    part, gaps = dual.matmul(vectors_ct), _gaps(values)
    nothing = _says_nothing(part - adjoint(part), [part], values_ct, _residue(vectors_ct))
    skipped = _diagonal(values) | (nothing & (gaps.abs() <= _rounding(values)))
    inner = _hermitian(_over(part, gaps, skipped))
    if values_ct is not None:
        inner = inner + torch.diag_embed(values_ct)
    return (vectors.matmul(inner).matmul(dual),)


def _hermitian(x: Any) -> Any:
    """What a Hermitian matrix sees of a direction; PyTorch's cotangents are of this kind too."""
    return (x + adjoint(x)) * 0.5


@jvp_rule(aten._linalg_eigh.default)
def eigh_jvp(tangents: Any, a: Any, UPLO: str = "L", compute_v: bool = True) -> Any:
    """[*B, n, n] -> eigenvalues [*B, n], eigenvectors [*B, n, n]."""
    values, vectors = aten._linalg_eigh.default(a, UPLO, True)
    inner = adjoint(vectors).matmul(_hermitian(tangents[0])).matmul(vectors)
    gaps = _gaps(values)
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    values_t = diagonal.real if diagonal.is_complex() else diagonal
    equal = (gaps.abs() <= _rounding(values)) & (inner.abs() <= _residue(tangents[0]))
    return (values, vectors), (
        values_t,
        vectors.matmul(_over(inner, gaps, _diagonal(values) | equal)),
    )


# -- eigenvalues of any matrix ---------------------------------------------------------------------


@jvp_rule(aten.linalg_eig.default)
def eig_jvp(tangents: Any, a: Any) -> Any:
    """[*B, n, n] -> complex eigenvalues [*B, n], eigenvectors [*B, n, n] of length 1.

    Reverse mode borrows PyTorch's formula; the forward one divides by 0 at second order.
    """
    values, vectors = aten.linalg_eig.default(a)
    inner = torch.linalg.solve(vectors, tangents[0].to(vectors.dtype).matmul(vectors))
    vectors_t = vectors.matmul(_over(inner, _gaps(values), _diagonal(values)))
    stretch = (vectors.conj() * vectors_t).sum(-2, keepdim=True).real
    values_t = inner.diagonal(dim1=-2, dim2=-1)
    return (values, vectors), (values_t, vectors_t - vectors * stretch)


# -- singular values -------------------------------------------------------------------------------


def _skew(x: Any) -> Any:
    return (x - adjoint(x)) * 0.5


def _parted(u: Any, s: Any, vh: Any) -> Any:
    """U and V, each in the columns that belong to a singular value and the others, which may be 0.

    [*B, m, k or m], [*B, k], [*B, k or n, n] -> [*B, m, k], [*B, m, *], [*B, n, k], [*B, n, *]
    """
    count = s.shape[-1]
    return [part for x in (u, adjoint(vh)) for part in x.tensor_split((count,), -1)]


def _by_values(columns: Any, s: Any, residue: Any) -> Any:
    """[*B, m, k] -> [*B, m, k]: columns / s; a column of 0 may belong to a value of 0."""
    size = s.unsqueeze(-2)
    return _over(columns, size, (size <= _rounding(s)) & (columns.abs() <= residue))


def _by_sums(skew: Any, s: Any, residue: Any) -> Any:
    """[*B, k, k] -> [*B, k, k]: skew[i, j] / (s[i] + s[j]), which may both be 0."""
    sums = s.unsqueeze(-2) + s.unsqueeze(-1)
    return _over(skew, sums, (sums <= _rounding(s)) & (skew.abs() <= residue))


@vjp_rule(aten._linalg_svd.default)
def svd_rule(
    needs: Any, a: Any, full_matrices: bool = False, compute_uv: bool = True, *, driver: Any = None
) -> Any:
    """[*B, m, n] -> U [*B, m, k or m], S [*B, k], Vh [*B, k or n, n]; vectors are always needed."""
    outs = aten._linalg_svd.default(a, full_matrices, True, driver=driver)
    return outs, tuple(outs), _svd_pullback


def _svd_pullback(residuals: Any, needs: Any, u_ct: Any, s_ct: Any, vh_ct: Any) -> Any:
    """With the skew parts P of U^H u_ct and Q of V^H v_ct, between U and Vh,

    (P + Q)[i, j] / (s[j] - s[i]) + (P - Q)[i, j] / (s[j] + s[i]) + diag(s_ct)

    which is how PyTorch's formula reads without the differences of squares.
    """
    s = residuals[1]
    u, u_rest, v, v_rest = _parted(*residuals)
    if u_ct is None and vh_ct is None:
        return (None if s_ct is None else (u * s_ct.unsqueeze(-2)).matmul(adjoint(v)),)
    v_ct = None if vh_ct is None else adjoint(vh_ct)
    residue, gaps = _residue(u_ct, v_ct), _gaps(s)
    u_part, u_outside = _pulled(u, u_rest, s, u_ct, residue)
    v_part, v_outside = _pulled(v, v_rest, s, v_ct, residue)
    p, q = _skew(u_part), _skew(v_part)
    nothing = _says_nothing(p + q, (u_part, v_part), s_ct, residue)
    inner = _over(p + q, gaps, _diagonal(s) | (nothing & (gaps.abs() <= _rounding(s))))
    inner = inner + _by_sums(p - q, s, residue)
    if s_ct is not None:
        inner = inner + torch.diag_embed(s_ct)
    left = u.matmul(inner)
    if u_outside is not None:
        left = left + u_outside
    a_ct = left.matmul(adjoint(v))
    if v_outside is not None:
        a_ct = a_ct + u.matmul(adjoint(v_outside))
    return (a_ct,)


def _pulled(vectors: Any, rest: Any, s: Any, ct: Any, residue: Any) -> tuple[Any, Any]:
    """The part of a cotangent along the singular vectors, and the one across, divided by s.

    [*B, m, k], [*B, m, *], [*B, k], [*B, m, k or m] -> [*B, k, k], [*B, m, k] or None. The columns
    that have no singular value turn as the others do, the other way.
    """
    count = s.shape[-1]
    if ct is None:
        return torch.zeros_like(vectors.narrow(-2, 0, count)), None
    own = ct.narrow(-1, 0, count)
    part = adjoint(vectors).matmul(own)
    if vectors.shape[-2] == count:
        return part, None
    across = own - vectors.matmul(part)
    if rest.shape[-1]:
        others = ct.narrow(-1, count, rest.shape[-1])
        across = across - rest.matmul(adjoint(others)).matmul(vectors)
    return part, _by_values(across, s, residue)


@jvp_rule(aten._linalg_svd.default)
def svd_jvp(
    tangents: Any,
    a: Any,
    full_matrices: bool = False,
    compute_uv: bool = True,
    *,
    driver: Any = None,
) -> Any:
    """[*B, m, n] -> U [*B, m, k or m], S [*B, k], Vh [*B, k or n, n]."""
    outs = aten._linalg_svd.default(a, full_matrices, True, driver=driver)
    s, (a_t,) = outs[1], tangents
    u, u_rest, v, v_rest = _parted(*outs)
    inner, residue = adjoint(u).matmul(a_t).matmul(v), _residue(a_t)
    s_t = inner.diagonal(dim1=-2, dim2=-1)
    gaps, skew = _gaps(s), _skew(inner)
    even = inner - skew
    equal = (gaps.abs() <= _rounding(s)) & (even.abs() <= residue)
    turn = _over(even, gaps, _diagonal(s) | equal)
    twist = _by_sums(skew, s, residue)
    u_t = _pushed(u, u_rest, s, turn + twist, a_t.matmul(v) - u.matmul(inner), residue)
    across = adjoint(a_t).matmul(u) - v.matmul(adjoint(inner))
    v_t = _pushed(v, v_rest, s, turn - twist, across, residue)
    return outs, (u_t, s_t.real if s_t.is_complex() else s_t, adjoint(v_t))


def _pushed(vectors: Any, rest: Any, s: Any, inner: Any, across: Any, residue: Any) -> Any:
    """The tangents of singular vectors, with that of the columns that have no singular value."""
    total = vectors.matmul(inner)
    if vectors.shape[-2] == s.shape[-1]:
        return total
    outside = _by_values(across, s, residue)
    total = total + outside
    if not rest.shape[-1]:
        return total
    return torch.cat([total, -vectors.matmul(adjoint(outside)).matmul(rest)], -1)
