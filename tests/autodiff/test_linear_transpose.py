"""`linear_transpose`: the transpose of what is linear, and an error that names what is not."""

from __future__ import annotations

import types

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.autograd import Function

import lamina
from lamina import grad, jacrev, linear_transpose, linearize, vmap
from lamina_core import pytree
from lamina_core.errors import NotDifferentiableError, NotLinearError, TangentError
from tests import laws
from tests.compositions import test_random_programs as random_programs
from tests.errors.saying import said
from tests.expected import BrokenLawError, grids_differentiate_twice
from tests.samples import curated, others

DOUBLE, COMPLEX = torch.float64, torch.complex128
X = torch.tensor([0.3, 0.7, 1.1], dtype=DOUBLE)
A = torch.arange(12.0, dtype=DOUBLE).reshape(4, 3).sin()
INDEX = torch.tensor([0, 2, 2, 1])
POINTS = A[:, :2].reshape(1, 2, 2, 2)


def basis(like):
    return torch.eye(like.numel(), dtype=like.dtype).reshape(-1, *like.shape)


def matrix(f, x):
    """The matrix `[outputs, inputs]` of a linear function, column by column."""
    return torch.stack([f(e).flatten() for e in basis(x)], -1)


def holds(f, x):
    """Whether the matrix of the transpose is the transposed matrix."""
    transposed = linear_transpose(f, x)
    actual = torch.stack([transposed(e)[0].flatten() for e in basis(f(x))], -1)
    torch.testing.assert_close(actual, matrix(f, x).T)


def filled(x):
    out = torch.zeros_like(x)
    out[1:] = x[:-1]
    out[0].add_(x.sum())
    return out


LINEAR = {
    "matmul": lambda x: A @ x,
    "cumsum": lambda x: x.cumsum(0),
    "index": lambda x: x[INDEX],
    "pad": lambda x: nn.functional.pad(x, (1, 2)),
    "reflect": lambda x: nn.functional.pad(x[None], (1, 2), "reflect")[0],
    "conv": lambda x: nn.functional.conv1d(x[None, None], A[None, :1, :2])[0, 0],
    "conv, in the weight": lambda x: nn.functional.conv1d(A[:, None], x[None, None]),
    "conv_transpose": lambda x: nn.functional.conv_transpose1d(x[None, None], A[:1, None, :2]),
    "where": lambda x: torch.where(A[:, 0] > 0, x.sum(), x[1]),
    "solve": lambda x: torch.linalg.solve(A[:3] + torch.eye(3, dtype=DOUBLE), x),
    "rfft": lambda x: torch.view_as_real(torch.fft.rfft(x)),
    "writes": filled,
    "a constant added and taken away": lambda x: (x + 3) * 2 - 6,
    "by its own shape": lambda x: x * torch.ones_like(x) / x.shape[0],
    "vmap": lambda x: vmap(lambda row, b: row * b)(A[:3], x),
    "jvp": lambda t: lamina.jvp(lambda x: x.sin() * x.sum(), (X,), (t,))[1],
    "vjp": lambda ct: lamina.vjp(lambda x: x.sin() * x.sum(), X)[1](ct)[0],
    "zero": lambda x: x * 0,
    "nll_loss": lambda x: nn.functional.nll_loss(x.expand(4, 3), INDEX, A[0] ** 2),
    "grid_sample": lambda x: nn.functional.grid_sample(
        x.expand(1, 1, 2, 3), POINTS, padding_mode="border", align_corners=False
    ),
}


@pytest.mark.parametrize("name", LINEAR)
def test_transpose(name):
    holds(LINEAR[name], X)


COMPLEX_LINEAR = {
    "scaled": (lambda z: z * (1 + 2j), COMPLEX),
    "real": (lambda z: z.real, COMPLEX),
    "imag": (lambda z: z.imag * 2, COMPLEX),
    "from real": (lambda x: x * (1 + 2j), DOUBLE),
    "fft": (lambda z: torch.fft.fft(z, norm="ortho"), COMPLEX),
    "matmul": (lambda z: (A + 1j * A.cos()) @ z, COMPLEX),
}


@pytest.mark.parametrize("name", COMPLEX_LINEAR)
def test_the_transpose_of_a_complex_map_is_not_conjugated(name):
    """<ct, f(z)> = <f^T(ct), z> for the product without conjugation, up to real parts."""
    f, dtype = COMPLEX_LINEAR[name]
    z = torch.complex(X, X.cos()).to(dtype) if dtype.is_complex else X
    out = f(z)
    ct = torch.complex(out.real.sin(), out.real.exp()) if out.is_complex() else out.sin()
    (pulled,) = linear_transpose(f, z)(ct)
    assert pulled.dtype == dtype
    left, right = (ct * out).sum(), (pulled * z).sum()
    if name in ("real", "imag", "from real"):
        left, right = left.real, right.real
    torch.testing.assert_close(left, right)


def test_twice_transposed_is_the_function_itself():
    def f(z):
        return (A + 1j * A.cos()) @ z

    z = torch.complex(X, X.cos())
    twice = linear_transpose(lambda ct: linear_transpose(f, z)(ct)[0], f(z))
    torch.testing.assert_close(twice(z)[0], f(z))


def test_trees_constants_keywords_and_one_run():
    runs = []

    def f(tree, n, *, scale):
        runs.append(1)
        return {"out": tree["a"] * scale + tree["b"][0].sum() * n, "n": torch.tensor(3)}

    tree = {"a": torch.empty(3), "b": [torch.empty(2), None]}
    transposed = linear_transpose(f, tree, 5, scale=2.0)
    for _ in range(2):
        a, n = transposed({"out": torch.tensor([1.0, 2.0, 3.0]), "n": None})
        assert a["a"].tolist() == [2, 4, 6]
        assert a["b"][0].tolist() == [30, 30]
        assert a["b"][1] is None
        assert n is None
    assert len(runs) == 1


def test_no_element_of_the_primals_is_read():
    meta = torch.empty(3, dtype=DOUBLE, device="meta")
    ct = A[:, 0]
    torch.testing.assert_close(linear_transpose(lambda x: A @ x, meta)(ct)[0], A.T @ ct)
    nan = torch.full((3,), torch.nan, dtype=DOUBLE)
    torch.testing.assert_close(linear_transpose(lambda x: A @ x, nan)(ct)[0], A.T @ ct)


def test_an_input_without_influence_gets_zeros():
    a, b = linear_transpose(lambda x, y: x * 2, X, X[:2])(X)
    torch.testing.assert_close(a, 2 * X)
    assert b.tolist() == [0, 0]


def test_under_the_other_transforms():
    rows = torch.stack([X, X.cos()])

    def pulled(w, ct):
        return linear_transpose(lambda x: w * x.cumsum(0), ct)(ct)[0]

    def by_hand(w, ct):
        return (w * ct).flip(-1).cumsum(-1).flip(-1)

    torch.testing.assert_close(vmap(pulled)(rows, rows.sin()), by_hand(rows, rows.sin()))
    torch.testing.assert_close(
        grad(lambda w: pulled(w, X).sin().sum())(X),
        torch.func.grad(lambda w: by_hand(w, X).sin().sum())(X),
    )
    transposed = linear_transpose(lambda x: A @ x, X)
    torch.testing.assert_close(vmap(transposed)(torch.eye(4, dtype=DOUBLE))[0], A)
    torch.testing.assert_close(jacrev(lambda ct: transposed(ct)[0])(A[:, 0]), A.T)


class Double(Function):
    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, ct):
        return 2 * ct


def test_a_function_with_a_backward_of_its_own():
    holds(lambda x: Double.apply(x).flip(0), X)


# -- over every op: the transpose of a linearization is the vjp ------------------------------------


def conjugated(tree):
    return pytree.tree_map(lambda x: x.conj() if isinstance(x, torch.Tensor) else x, tree)


def by_transposing(f, *primals):
    """`vjp`, as the transpose of a linearization."""
    out, jvp_fn = linearize(f, *primals)
    transposed = linear_transpose(jvp_fn, *primals)
    return out, lambda cts: conjugated(transposed(conjugated(cts)))


# Its derivative is a block of the exponential of a larger matrix that the tangent is a block of.
NOT_SEEN = frozenset(["matrix_exp"])
DRAWN_TWICE = frozenset(["normal"])  # one value for `linearize`, another for the reference
SOME = """as_strided baddbmm cholesky_solve cumprod fft.irfft gather index_put linalg.qr
    linalg.svdvals nn.functional.batch_norm nn.functional.conv2d nn.functional.max_pool2d
    nn.functional.grid_sample nn.functional.nll_loss nn.functional.pad.reflect
    nn.functional.unfold sort split where""".split()


def pytest_generate_tests(metafunc):
    """Reads the whole table of operators only for the tests that ask for it, and if they run."""
    if "other" in metafunc.fixturenames:
        wanted = "not exhaustive" not in metafunc.config.option.markexpr
        names = [*curated("vjp"), *others("vjp")] if wanted else ["left out by -m"]
        metafunc.parametrize("other", [name for name in names if name not in DRAWN_TWICE])


@pytest.mark.parametrize("name", SOME)
def test_op(name, monkeypatch):
    monkeypatch.setattr(lamina, "vjp", by_transposing)
    if name == "nn.functional.grid_sample" and not grids_differentiate_twice():
        with pytest.raises(BrokenLawError, match=r"NotDifferentiableError: aten.grid_sampler"):
            laws.hold(name, "vjp")
    else:
        laws.hold(name, "vjp")


@pytest.mark.exhaustive
def test_every_op(other, monkeypatch):
    monkeypatch.setattr(lamina, "vjp", by_transposing)
    if other in NOT_SEEN:
        with pytest.raises(Exception, match="linear_transpose met"):
            laws.hold(other, "vjp")
    else:
        laws.hold(other, "vjp")


def search(monkeypatch, part, examples, fills):
    """Random programs under random stacks of transforms, with transposes for every vjp."""
    names = {name: getattr(lamina, name) for name in lamina.__all__}
    patched = types.SimpleNamespace(**names | {"vjp": by_transposing})
    monkeypatch.setattr(random_programs, "lamina", patched)
    random_programs.search(part, examples, fills)


def test_random_programs(monkeypatch):
    search(monkeypatch, 500, 25, fills=False)


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(4))
def test_many_random_programs(part, monkeypatch):
    search(monkeypatch, 510 + part, 200, part % 2 == 1)


# -- what is not linear ----------------------------------------------------------------------------


def kept_out(x):
    with torch.no_grad():
        return x * 2


NOT_LINEAR = {
    "aten.sin.default": lambda x: x.sin(),
    "aten.mul.Tensor": lambda x: 2 * x * x.sum(),
    "aten.div.Tensor": lambda x: A[0] / x,
    "aten.relu.default": lambda x: x.relu(),
    "aten.round.default": lambda x: x.round(),
    "aten.detach.default": lambda x: x.detach() + x,
    "aten.gt.Scalar": lambda x: torch.where(x > 0, x, 2 * x),
    "aten.native_dropout.default": lambda x: nn.functional.dropout(x, 0.5, True),
    "aten.linalg_inv_ex.default": lambda x: torch.linalg.inv(torch.outer(x, A[0])),
    "aten.logcumsumexp.default": lambda x: x.logcumsumexp(0),
    "aten.add.Tensor": lambda x: (2 * x + 3).cumsum(0),
    "aten.max.default": lambda x: x * 2 + x.max(),
}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_what_is_not_linear_is_named(name):
    with pytest.raises(NotLinearError, match=f"met {name}, which is not linear in the inputs"):
        linear_transpose(NOT_LINEAR[name], X)


def test_without_gradients_nothing_is_known_to_be_linear():
    with pytest.raises(NotLinearError, match="depends on the input, but has no derivative"):
        linear_transpose(kept_out, X)


def test_a_branch_on_the_input():
    with pytest.raises(NotLinearError, match=r"met aten\.gt\.Scalar"):
        linear_transpose(lambda x: x if x.sum() > 0 else -x, X)


def test_an_op_whose_derivative_depends_on_the_input():
    assert_expected_inline(
        said(NotLinearError, lambda: linear_transpose(lambda x: x * x, X)),
        """\
linear_transpose met aten.mul.Tensor, which is not linear in the inputs
  while interpreting at level 1: linear_transpose
  its derivative depends on the input
  to fix: use linear ops of the inputs alone""",
    )


def test_a_constant_added():
    assert_expected_inline(
        said(NotLinearError, lambda: linear_transpose(lambda x: 2 * (x + 1), X)),
        """\
linear_transpose met aten.add.Tensor, which is not linear in the inputs
  while interpreting at level 1: linear_transpose
  it adds a constant: of zeros it is not zero
  to fix: use linear ops of the inputs alone""",
    )


def test_a_constant_output():
    assert_expected_inline(
        said(NotLinearError, lambda: linear_transpose(lambda x: (x, A), X)),
        """\
linear_transpose met an output, which is not linear in the inputs
  while interpreting at level 1: linear_transpose
  it is a constant other than zero
  to fix: use linear ops of the inputs alone""",
    )


def test_integers():
    assert_expected_inline(
        said(NotDifferentiableError, lambda: linear_transpose(lambda x: x, torch.arange(3))),
        """\
linear_transpose has nothing to differentiate: no floating-point or complex tensor
  primals[0]: torch.int64 tensor of shape [3]
  to fix: pass a tensor converted with .float()""",
    )


def test_a_cotangent_of_another_shape():
    transposed = linear_transpose(lambda x: A @ x, X)
    assert_expected_inline(
        said(TangentError, lambda: transposed(X)),
        """\
cotangents does not match output
  output: torch.float64 tensor of shape [4]
  cotangents: torch.float64 tensor of shape [3]
  to fix: pass a tensor of the same shape and dtype, or None for zero""",
    )
