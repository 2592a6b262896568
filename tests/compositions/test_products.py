"""`hvp`, `vhp`, `jacobian` and the values that come with derivatives, against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

from lamina import grad, hessian, hvp, jacfwd, jacobian, jacrev, vhp, vmap
from lamina_core.errors import (
    NonScalarLossError,
    NotDifferentiableError,
    StructureError,
    TangentError,
)
from tests.errors.saying import said

DOUBLE = torch.float64
X = torch.tensor([0.3, 0.7, 1.1], dtype=DOUBLE)
V = torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE)
PRODUCTS = {"hvp": hvp, "vhp": vhp}


def loss(x):
    return (x.prod() * x.sin()).sum() + x.square().sum().sqrt()


def counted(f):
    def counting(*args, **kwargs):
        counting.runs += 1
        return f(*args, **kwargs)

    counting.runs = 0
    return counting


# -- products with the hessian ---------------------------------------------------------------------


@pytest.mark.parametrize("name", PRODUCTS)
def test_product(name):
    f = counted(loss)
    value, (product,) = PRODUCTS[name](f, (X,), (V,))
    assert f.runs == 1
    theirs = getattr(torch.autograd.functional, name)(loss, X, V)
    torch.testing.assert_close((value, product), theirs)


@pytest.mark.parametrize("name", PRODUCTS)
def test_product_of_trees(name):
    def f(tree, y, *, scale):
        a, n = tree["a"], tree["n"]
        return (a.sin() * y**3).sum() * scale * n, {"seen": y + 0}

    tree = {"a": X, "n": 2}
    value, product, aux = PRODUCTS[name](
        f, (tree, X.cos()), ({"a": V, "n": None}, None), has_aux=True, scale=0.5
    )

    def plain(a, y):
        return (a.sin() * y**3).sum()

    theirs = torch.autograd.functional.hvp(plain, (X, X.cos()), (V, torch.zeros_like(V)))
    torch.testing.assert_close(value, theirs[0])
    torch.testing.assert_close((product[0]["a"], product[1]), theirs[1])
    assert product[0]["n"] is None
    torch.testing.assert_close(aux["seen"], X.cos())


@pytest.mark.parametrize("name", PRODUCTS)
def test_product_under_transforms(name):
    product = PRODUCTS[name]
    matrix = torch.autograd.functional.hessian(loss, X)
    eye = torch.eye(3, dtype=DOUBLE)
    torch.testing.assert_close(vmap(lambda v: product(loss, (X,), (v,))[1][0])(eye), matrix)
    rows = torch.stack([X, X.cos()])
    torch.testing.assert_close(
        vmap(lambda x: product(loss, (x,), (V,))[1][0])(rows),
        torch.stack([torch.autograd.functional.hvp(loss, row, V)[1] for row in rows]),
    )
    torch.testing.assert_close(
        grad(lambda x: product(loss, (x,), (V,))[1][0].sum())(X),
        torch.func.grad(lambda x: (torch.func.hessian(loss)(x) @ V).sum())(X),
    )


def test_errors_of_products():
    assert_expected_inline(
        said(StructureError, lambda: hvp(loss, X, V)),
        """\
hvp got primals of type Tensor and tangents of type Tensor
  to fix: pass a tuple of arguments and a tuple of their tangents""",
    )
    assert_expected_inline(
        said(NotDifferentiableError, lambda: vhp(loss, (torch.arange(3),), (None,))),
        """\
vhp has nothing to differentiate: no floating-point or complex tensor
  primals[0]: torch.int64 tensor of shape [3]
  to fix: pass a tensor converted with .float()""",
    )
    for product in PRODUCTS.values():
        with pytest.raises(NonScalarLossError):
            product(torch.sin, (X,), (V,))
        with pytest.raises(TangentError):
            product(loss, (X,), (V[:2],))


# -- jacobian by mode ------------------------------------------------------------------------------


def tall(x):
    return torch.outer(x.sin(), torch.cat([x, x * x])), x.sum()


def wide(x):
    return x.prod() * x[0]


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
@pytest.mark.parametrize("f", [tall, wide])
def test_every_mode_gives_the_jacobian(f, mode, chunk_size):
    theirs = torch.func.jacrev(f)(X)
    torch.testing.assert_close(jacobian(f, mode=mode, chunk_size=chunk_size)(X), theirs)


@pytest.mark.parametrize("f", [tall, wide])
def test_the_choice_of_mode_takes_no_second_run(f):
    g = counted(f)
    jacobian(g)(X)
    assert g.runs == 1


def test_auto_pushes_forward_what_is_tall(monkeypatch):
    widths = []
    usual = torch.zeros

    def zeros(*args, **kwargs):
        widths.append(args)
        return usual(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros", zeros)
    jacobian(lambda x: torch.outer(x, x))(X)  # a basis of [3, 3], not of [9, 9]
    assert widths == [(3, 3)]


def test_jacobian_in_several_arguments_with_constants():
    def f(tree, y):
        a, n = tree
        return {"p": torch.outer(a, y) * n, "q": a.sum()}

    args = ((X, 2), X[:2].cos())
    found = jacobian(f, (0, 1))(*args)
    theirs = torch.func.jacrev(lambda a, y: f((a, 2), y), (0, 1))(X, X[:2].cos())
    for name in ("p", "q"):
        (by_a, constant), by_y = found[name]
        assert constant is None
        torch.testing.assert_close((by_a, by_y), theirs[name])


def test_a_write_to_the_argument_happens_once():
    count = torch.zeros((), dtype=DOUBLE)

    def f(x, count):
        count.add_(1)
        return torch.outer(x, x.sin())

    theirs = torch.func.jacrev(lambda x: torch.outer(x, x.sin()))(X)
    torch.testing.assert_close(jacobian(f)(X, count), theirs)
    assert count == 1


@pytest.mark.parametrize("f", [tall, wide])
def test_jacobian_under_transforms(f):
    rows = torch.stack([X, X.cos()])
    torch.testing.assert_close(vmap(jacobian(f))(rows), torch.func.vmap(torch.func.jacrev(f))(rows))
    first = jacobian(lambda x: torch.cat([o.flatten() for o in _tuple(f(x))]))
    torch.testing.assert_close(
        jacobian(first)(X),
        torch.func.hessian(lambda x: torch.cat([o.flatten() for o in _tuple(f(x))]))(X),
    )


def _tuple(out):
    return out if isinstance(out, tuple) else (out,)


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [jacrev, jacfwd, jacobian])
@pytest.mark.parametrize("f", [tall, wide])
def test_the_value_comes_with_the_jacobian(transform, f):
    g = counted(f)
    value, found = transform(g, with_value=True)(X)
    assert g.runs == 1
    torch.testing.assert_close((value, found), (f(X), torch.func.jacrev(f)(X)))

    def with_aux(x):
        return f(x), {"aux": x * 2, "text": "as it is"}

    (value, aux), found = transform(with_aux, with_value=True, has_aux=True)(X)
    torch.testing.assert_close((value, found), (f(X), torch.func.jacrev(f)(X)))
    torch.testing.assert_close(aux["aux"], 2 * X)
    assert aux["text"] == "as it is"
    found, aux = transform(with_aux, has_aux=True)(X)
    torch.testing.assert_close(found, torch.func.jacrev(f)(X))
    assert aux["text"] == "as it is"


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_value_and_gradient_come_with_the_hessian(chunk_size):
    value, first, second = hessian(loss, with_value=True, chunk_size=chunk_size)(X)
    theirs = loss(X), torch.func.grad(loss)(X), torch.func.hessian(loss)(X)
    torch.testing.assert_close((value, first, second), theirs)
    (value, aux), first, second = hessian(
        lambda x: (loss(x), x + 1), has_aux=True, with_value=True, chunk_size=chunk_size
    )(X)
    torch.testing.assert_close((value, first, second), theirs)
    torch.testing.assert_close(aux, X + 1)


def test_values_under_vmap():
    rows = torch.stack([X, X.cos()])
    value, first, second = vmap(hessian(loss, with_value=True))(rows)
    torch.testing.assert_close(value, torch.func.vmap(loss)(rows))
    torch.testing.assert_close(first, torch.func.vmap(torch.func.grad(loss))(rows))
    torch.testing.assert_close(second, torch.func.vmap(torch.func.hessian(loss))(rows))
