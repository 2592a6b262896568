"""Batches as large as a dim of an example: see `tests/coincidences.py`."""

from __future__ import annotations

import pytest
import torch

from lamina import grad, vjp, vmap
from tests.coincidences import LAWS, hold, operators

double = torch.float64

# Operators that tell by sizes or ranks what an operand is, and some that fold the batch away.
TELLING = """
    baddbmm bmm cdist cholesky_solve cross expand_as gather index_add kron linalg.cross
    linalg.lstsq linalg.lu_solve linalg.pinv linalg.slogdet linalg.solve linalg.solve_ex
    linalg.solve_triangular linalg.tensorsolve matmul nn.functional.batch_norm
    nn.functional.bilinear nn.functional.conv1d nn.functional.cosine_embedding_loss
    nn.functional.cross_entropy nn.functional.embedding nn.functional.group_norm
    nn.functional.layer_norm nn.functional.linear nn.functional.max_pool1d nn.functional.nll_loss
    nn.functional.prelu nn.functional.scaled_dot_product_attention squeeze take_along_dim
    tensordot where
""".split()


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", TELLING)
def test_telling(name, law):
    hold(name, law, count=2)


def pytest_generate_tests(metafunc):
    """Reads the whole table only for the tests that ask for it, and only if they are to run."""
    if "other" in metafunc.fixturenames:
        wanted = "not exhaustive" not in metafunc.config.option.markexpr
        pairs = [(name, law) for law in LAWS for name in operators(law)] if wanted else []
        metafunc.parametrize(("other", "law"), pairs or [("left out by -m", "")])


@pytest.mark.exhaustive
def test_all(other, law):
    hold(other, law)


# -- equations: ATen takes the right-hand side for vectors or a matrix by its shape ----------------


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=double, generator=torch.Generator().manual_seed(seed))


def matrices(*shape, seed=0):
    """Matrices that are far from singular."""
    return draw(*shape, seed=seed) + 4 * torch.eye(shape[-1], dtype=double)


def solve(a, b):
    return torch.linalg.solve(a, b)


def solve_from_the_right(a, b):
    return torch.linalg.solve(a, b, left=False)


def solve_ex(a, b):
    return torch.linalg.solve_ex(a, b).result


def lstsq(a, b):
    return torch.linalg.lstsq(a, b).solution


def by_factors(a, b):
    return torch.linalg.lu_solve(*torch.linalg.lu_factor(a), b)


def by_factors_adjoint(a, b):
    return torch.linalg.lu_solve(*torch.linalg.lu_factor(a), b, adjoint=True)


def by_factors_from_the_right(a, b):
    return torch.linalg.lu_solve(*torch.linalg.lu_factor(a), b, left=False)


def by_cholesky(a, b):
    return torch.cholesky_solve(b, torch.linalg.cholesky(a @ a.mT))


def by_triangle(a, b):
    return torch.linalg.solve_triangular(a, b, upper=True)


def by_ldl(a, b):
    factors, pivots = torch.linalg.ldl_factor(a + a.mT)
    return torch.linalg.ldl_solve(factors, pivots, b)


ANY = [solve, solve_ex]
MATRICES = [
    solve_from_the_right,
    lstsq,
    by_factors,
    by_factors_adjoint,
    by_factors_from_the_right,
    by_cholesky,
    by_triangle,
    by_ldl,
]
# Matrices and right-hand sides of one example, all sizes of which the batch may coincide with.
SHAPES = [((2, 2), (2, 2)), ((2, 2, 2), (2, 2, 2)), ((3, 2, 2), (2, 2)), ((2, 2), (3, 2, 2))]
VECTORS = [((2, 2), (2,)), ((2, 2, 2), (2, 2)), ((3, 2, 2), (3, 2))]
SYSTEMS = [(f, *shapes) for f in ANY for shapes in VECTORS]
SYSTEMS += [(f, *shapes) for f in (*ANY, *MATRICES) for shapes in SHAPES]


@pytest.mark.parametrize("mapped", [(0, 0), (0, None), (None, 0)])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("f", "left", "right"), SYSTEMS)
def test_equations(f, left, right, size, mapped):
    if f in (lstsq, by_ldl) and len(left) != len(right):
        return  # they do not broadcast
    a = matrices(*([size] * (mapped[0] == 0)), *left)
    b = draw(*([size] * (mapped[1] == 0)), *right, seed=1)

    def example(tensor, dim, i):
        return tensor if dim is None else tensor[i]

    rows = [(example(a, mapped[0], i), example(b, mapped[1], i)) for i in range(size)]
    torch.testing.assert_close(vmap(f, mapped)(a, b), torch.stack([f(*row) for row in rows]))
    if f is by_ldl:
        return  # which PyTorch gives no derivative
    cotangents = draw(size, *f(*rows[0]).shape, seed=2)

    def pulled_back(ct, a, b):
        return vjp(f, a, b)[1](ct)

    found = vmap(pulled_back, (0, *mapped))(cotangents, a, b)
    leaves = [[t.clone().requires_grad_() for t in row] for row in rows]
    expected = [
        torch.autograd.grad(f(*row), row, ct)
        for row, ct in zip(leaves, cotangents.unbind(), strict=True)
    ]
    for mine, theirs in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(mine, torch.stack(theirs))


def test_a_matrix_is_not_taken_for_vectors():
    a = torch.tensor([[[2.0, 0.0], [0.0, 2.0]], [[1.0, 2.0], [0.0, 1.0]]])
    b = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    expected = torch.stack([torch.linalg.solve(each, b) for each in a])
    torch.testing.assert_close(vmap(lambda a: torch.linalg.solve(a, b))(a), expected)


def test_both_sides_of_an_equation_from_the_right():
    a = torch.tensor([[[2.0, 1.0], [0.0, 2.0]], [[3.0, 0.0], [1.0, 1.0]]])
    b = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = vmap(lambda a: torch.linalg.solve(a, b, left=False))(a)
    torch.testing.assert_close(
        found, torch.stack([torch.linalg.solve(each, b, left=False) for each in a])
    )

    def total(a):
        return torch.linalg.solve(a, a.mT).sum()

    torch.testing.assert_close(vmap(grad(total))(a), torch.stack([grad(total)(each) for each in a]))
