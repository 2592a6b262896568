"""Matrix functions, three orders along a line in both modes, against mpmath; and equal values."""

from __future__ import annotations

import itertools

import mpmath as mp
import pytest
import torch

from lamina import grad, jacfwd, jacrev, vjp, vmap
from tests.autodiff.edges.oracle import MODES
from tests.autodiff.edges.test_functions import Case, hold_case

linalg = torch.linalg
double = torch.float64


def square(v):
    """A matrix of the numbers of a vector; the same for mpmath below."""
    return v.reshape(int(len(v) ** 0.5), -1)


def matrix(v):
    size = int(len(v) ** 0.5)
    return mp.matrix([v[i : i + size] for i in range(0, len(v), size)])


def symmetric(v):
    return square(v) + square(v).mT


def positive(v):
    return square(v) @ square(v).mT


def _symmetric(v):
    return matrix(v) + matrix(v).T


def _positive(v):
    return matrix(v) * matrix(v).T


def _adjugate(m):
    """By cofactors, which divide by nothing."""
    rows = range(m.rows)
    found = mp.matrix(m.rows)
    for i, j in itertools.product(rows, rows):
        minor = mp.matrix([[m[r, c] for c in rows if c != j] for r in rows if r != i])
        found[j, i] = (-1) ** (i + j) * _det(minor)
    return found


def _det(m):
    """By permutations, so that a singular matrix has derivatives."""
    total = mp.mpf(0)
    for order in itertools.permutations(range(m.rows)):
        sign = (-1) ** sum(a > b for a, b in itertools.combinations(order, 2))
        total += sign * mp.fprod(m[i, j] for i, j in enumerate(order))
    return total


def _inverse(m):
    return _adjugate(m) / _det(m)


def _exponential(m):
    """By the series, exact to the digits of the context for small matrices."""
    total = term = mp.eye(m.rows)
    for k in range(1, 200):
        term = term * m / k
        total = total + term
    return total


def _cholesky(m):
    factor = mp.matrix(m.rows)
    for i in range(m.rows):
        for j in range(i + 1):
            rest = m[i, j] - sum(factor[i, k] * factor[j, k] for k in range(j))
            factor[i, j] = mp.sqrt(rest) if i == j else rest / factor[j, j]
    return factor


def _singular_values(m):
    """Of a 2 x 2 matrix, from its squares and its determinant."""
    squares, det = sum(x * x for x in m), mp.fabs(m[0, 0] * m[1, 1] - m[0, 1] * m[1, 0])
    sum_, difference = mp.sqrt(squares + 2 * det), mp.sqrt(squares - 2 * det)
    return (sum_ + difference) / 2, (sum_ - difference) / 2


def _eigenvalues(m):
    """Of a symmetric 2 x 2 matrix."""
    half, det = (m[0, 0] + m[1, 1]) / 2, m[0, 0] * m[1, 1] - m[0, 1] * m[1, 0]
    root = mp.sqrt(half * half - det)
    return half - root, half + root


REGULAR = (2.0, -0.3, 0.5, 0.7, 1.5, -1.1, 0.2, 0.4, 1.3)
RANK_2 = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)
RANK_1 = (1.0, 2.0, 3.0, 2.0, 4.0, 6.0, 3.0, 6.0, 9.0)
ZERO = (0.0,) * 9
OF_2 = (2.0, -0.3, 0.5, 0.7)
B = torch.tensor([[0.3, 1.0], [-2.0, 0.5], [0.7, 0.1]], dtype=double)
_B = mp.matrix(B.tolist())

CASES = {
    "cholesky": Case(
        lambda v: linalg.cholesky(positive(v))[2, 1],
        lambda v: _cholesky(_positive(v))[2, 1],
        [REGULAR],
    ),
    "cholesky_inverse": Case(
        lambda v: torch.cholesky_inverse(square(v).tril())[1, 0],
        lambda v: _inverse(_lower(v) * _lower(v).T)[1, 0],
        [REGULAR],
    ),
    "cholesky_solve": Case(
        lambda v: torch.cholesky_solve(B, square(v))[1, 0],
        lambda v: (_inverse(_lower(v) * _lower(v).T) * _B)[1, 0],
        [REGULAR],
    ),
    "cholesky_solve.upper": Case(
        lambda v: torch.cholesky_solve(B, square(v), upper=True)[1, 0],
        lambda v: (_inverse(_upper(v).T * _upper(v)) * _B)[1, 0],
        [REGULAR],
    ),
    "det": Case(
        lambda v: linalg.det(square(v)), lambda v: _det(matrix(v)), [REGULAR, RANK_2, RANK_1, ZERO]
    ),
    "eigvalsh": Case(
        lambda v: linalg.eigvalsh(symmetric(v))[0], lambda v: _eigenvalues(_symmetric(v))[0], [OF_2]
    ),
    "eigh": Case(
        lambda v: linalg.eigh(symmetric(v)).eigenvectors[0, 0] ** 2,
        lambda v: _first_square(_symmetric(v)),
        [OF_2],
    ),
    "inv": Case(
        lambda v: linalg.inv(square(v))[0, 1], lambda v: _inverse(matrix(v))[0, 1], [REGULAR]
    ),
    "lu_solve": Case(
        lambda v: linalg.lu_solve(*linalg.lu_factor(square(v)), B)[0, 1],
        lambda v: (_inverse(matrix(v)) * _B)[0, 1],
        [REGULAR],
    ),
    "lstsq": Case(
        lambda v: linalg.lstsq(square(v)[:, :2], B).solution[0, 1],
        lambda v: _least_squares(matrix(v)[:, :2])[0, 1],
        [REGULAR],
    ),
    "matrix_exp": Case(
        lambda v: linalg.matrix_exp(square(v))[0, 1],
        lambda v: _exponential(matrix(v))[0, 1],
        [OF_2, (0.0,) * 4, (0.0, 1.0, 0.0, 0.0)],
    ),
    "matrix_norm.fro": Case(
        lambda v: linalg.matrix_norm(square(v)), lambda v: mp.sqrt(sum(x * x for x in v)), [REGULAR]
    ),
    "matrix_norm.nuc": Case(
        lambda v: linalg.matrix_norm(square(v), "nuc"),
        lambda v: sum(_singular_values(matrix(v))),
        [OF_2],
    ),
    "matrix_norm.2": Case(
        lambda v: linalg.matrix_norm(square(v), 2), lambda v: _singular_values(matrix(v))[0], [OF_2]
    ),
    "matrix_power": Case(
        lambda v: linalg.matrix_power(square(v), 3)[0, 1],
        lambda v: (matrix(v) ** 3)[0, 1],
        [REGULAR, ZERO],
    ),
    "pinv": Case(
        lambda v: linalg.pinv(square(v)[:, :2])[0, 1],
        lambda v: _pseudo_inverse(matrix(v)[:, :2])[0, 1],
        [REGULAR],
    ),
    "qr": Case(
        lambda v: linalg.qr(square(v)).R[0, 1].abs(),
        lambda v: (
            mp.fabs(sum(a * b for a, b in zip(v[::3], v[1::3], strict=True)))
            / mp.sqrt(sum(a * a for a in v[::3]))
        ),
        [REGULAR],
    ),
    "slogdet": Case(
        lambda v: linalg.slogdet(square(v)).logabsdet,
        lambda v: mp.log(mp.fabs(_det(matrix(v)))),
        [REGULAR, tuple(-x for x in REGULAR)],
    ),
    "solve": Case(
        lambda v: linalg.solve(square(v), B)[0, 1],
        lambda v: (_inverse(matrix(v)) * _B)[0, 1],
        [REGULAR],
    ),
    "solve_triangular": Case(
        lambda v: linalg.solve_triangular(square(v), B, upper=True)[0, 1],
        lambda v: (_inverse(_upper(v)) * _B)[0, 1],
        [REGULAR],
    ),
    "svd": Case(
        lambda v: (lambda u, s, vh: ((u * s.cos()) @ vh)[0, 0])(*linalg.svd(square(v))),
        lambda v: _of_singular_values(matrix(v), mp.cos),
        [OF_2],
    ),
}


def _lower(v):
    m = matrix(v)
    return mp.matrix([[m[i, j] if j <= i else 0 for j in range(m.cols)] for i in range(m.rows)])


def _upper(v):
    m = matrix(v)
    return mp.matrix([[m[i, j] if j >= i else 0 for j in range(m.cols)] for i in range(m.rows)])


def _pseudo_inverse(m):
    return _inverse(m.T * m) * m.T


def _least_squares(m):
    return _pseudo_inverse(m) * _B


def _first_square(m):
    """Of a symmetric 2 x 2 matrix: the first entry of the first eigenvector, squared."""
    low, high = _eigenvalues(m)
    return (m[0, 0] - high) / (low - high)


def _of_singular_values(m, f):
    """U f(S) V^T at [0, 0] of a 2 x 2 matrix with a positive determinant."""
    first, second = _singular_values(m)
    # m = U S V^T, and the transposed adjugate is U S' V^T with the values exchanged.
    a = (f(first) * first - f(second) * second) / (first**2 - second**2)
    b = (f(second) * first - f(first) * second) / (first**2 - second**2)
    return a * m[0, 0] + b * m[1, 1]


@pytest.mark.parametrize("order", MODES)
@pytest.mark.parametrize("name", CASES)
def test_derivatives(name, order):
    hold_case(CASES[name], order)


# ---------------------------------------------------------------------------------------------
# Equal values: NOTE [Equal values]
# ---------------------------------------------------------------------------------------------

ROTATION = linalg.qr(torch.randn(3, 3, dtype=double, generator=torch.Generator().manual_seed(0))).Q
TWICE = torch.diag(torch.tensor([1.0, 1.0, 2.0], dtype=double))
OUTER = torch.outer(torch.tensor([1.0, 2.0, 3.0, 0.5]), torch.tensor([0.3, -1.0, 2.0])).double()
EQUAL = {
    "diagonal": TWICE,
    "rotated": ROTATION @ TWICE @ ROTATION.mT,
    "unit": torch.eye(3, dtype=double),
    "rotation": ROTATION,
    "of rank 1": OUTER,
}


def rebuilt(a):
    u, s, vh = linalg.svd(a, full_matrices=False)
    return (u * s) @ vh


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", EQUAL)
def test_a_loss_that_does_not_change_with_the_vectors_of_equal_singular_values(name):
    a = EQUAL[name]
    near(grad(lambda a: linalg.norm(rebuilt(a)))(a), a / a.norm())
    near(vmap(grad(lambda a: linalg.norm(rebuilt(a))))(a.expand(2, *a.shape))[1], a / a.norm())


@pytest.mark.parametrize("name", ["diagonal", "rotated", "unit"])
def test_a_loss_that_does_not_change_with_the_vectors_of_equal_eigenvalues(name):
    a = EQUAL[name]

    def loss(a):
        values, vectors = linalg.eigh(a)
        return linalg.norm((vectors * values) @ vectors.mT)

    near(grad(loss)(a), a / a.norm())


def test_the_projection_on_a_space_of_equal_eigenvalues():
    """It does not depend on the values: what turns within the space contributes nothing."""

    def f(a):
        vectors = linalg.eigh((a + a.mT) / 2).eigenvectors
        return (vectors[:, :2] @ vectors[:, :2].mT)[0, 2]

    def apart(a):
        vectors = linalg.eigh((a + a.mT) / 2).eigenvectors
        return -(vectors[:, 2] * vectors[0, 2])[2]

    near(grad(f)(TWICE), grad(apart)(TWICE))


def test_what_equal_values_do_not_tell_is_no_number():
    """A function of the matrix with another derivative for each pair, and vectors themselves."""
    weight = torch.arange(9, dtype=double).reshape(3, 3)
    assert not grad(lambda a: (rebuilt(a) * weight).sum())(EQUAL["unit"]).isfinite().all()
    u = lambda a: linalg.svd(a)[0][0, 1]
    assert not grad(u)(EQUAL["unit"]).isfinite().all()


def test_the_columns_without_a_singular_value_turn_too():
    a = torch.randn(4, 2, dtype=double, generator=torch.Generator().manual_seed(1))
    rest = lambda a: (lambda u: u[:, 2:] @ u[:, 2:].mT)(linalg.svd(a)[0])
    own = lambda a: (lambda u: torch.eye(4).double() - u @ u.mT)(linalg.svd(a, False)[0])
    for jacobian in (jacrev, jacfwd):
        near(jacobian(rest)(a), jacobian(own)(a))


# ---------------------------------------------------------------------------------------------
# Shapes
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upper", [False, True])
def test_cholesky_solve_of_many_factors_and_one_matrix(upper):
    b = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=double)
    factors = torch.tensor([[[2.0, 0], [1, 3]], [[3, 0], [2, 2]]], dtype=double)
    factors = factors.mT if upper else factors
    f = lambda b, factors: torch.cholesky_solve(b, factors, upper)
    near(jacfwd(f, argnums=(0, 1))(b, factors), jacrev(f, argnums=(0, 1))(b, factors))
    step = 1e-6
    slope = (f(b, factors * (1 + step)) - f(b, factors * (1 - step))) / (2 * step)
    found = (jacfwd(f, argnums=1)(b, factors) * factors).sum((-3, -2, -1))
    torch.testing.assert_close(found, slope, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("rank", range(5))
def test_det_of_a_graded_matrix_and_of_every_rank(rank):
    """The first derivative is the adjugate: 0 from two zeros on, and exact however small."""
    generator = torch.Generator().manual_seed(rank)
    left, right = (torch.randn(4, 4, dtype=double, generator=generator) for _ in range(2))
    a = left[:, :rank] @ right[:rank]
    values = linalg.svdvals(a)
    found = linalg.matrix_norm(grad(linalg.det)(a), 2)
    torch.testing.assert_close(found, values[:3].prod(), rtol=1e-9, atol=1e-12)
    graded = torch.diag(torch.tensor([1.0, 1e-20, 1e5], dtype=double))
    expected = torch.diag(torch.tensor([1e-15, 1e5, 1e-20], dtype=double))
    torch.testing.assert_close(grad(linalg.det)(graded), expected, rtol=1e-12, atol=0)
    assert vjp(linalg.det, graded)[0] == linalg.det(graded)
