"""A pullback may be called again: later, under any transform, when its level is long gone."""

from __future__ import annotations

import pytest
import torch

from lamina import grad, jacrev, jvp, linearize, vjp, vmap
from lamina_core.errors import MutationError

X = torch.tensor([0.3, 0.7, 1.1], dtype=torch.float64)
CT = torch.tensor([1.0, -2.0], dtype=torch.float64)


def f(x):
    return torch.stack([x.prod(), torch.linalg.svdvals(torch.outer(x, x)).sum()]) * x[0].sin()


JACOBIAN = torch.func.jacrev(f)(X)


def test_twice_and_more():
    _, vjp_fn = vjp(f, X)
    for _ in range(3):
        torch.testing.assert_close(vjp_fn(CT)[0], CT @ JACOBIAN)


def test_under_transforms_that_came_later():
    _, vjp_fn = vjp(f, X)

    def pulled(ct):
        return vjp_fn(ct)[0]

    eye = torch.eye(2, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(vmap(pulled)(eye), JACOBIAN)
        torch.testing.assert_close(
            grad(lambda ct: pulled(ct).sin().sum())(CT), JACOBIAN @ (CT @ JACOBIAN).cos()
        )
        torch.testing.assert_close(jacrev(pulled)(CT), JACOBIAN.T)
        torch.testing.assert_close(jvp(pulled, (CT,), (CT.cos(),))[1], CT.cos() @ JACOBIAN)
        torch.testing.assert_close(vmap(grad(lambda ct: pulled(ct)[1]))(eye)[0], JACOBIAN[:, 1])
        torch.testing.assert_close(pulled(CT), CT @ JACOBIAN)
    torch.testing.assert_close(linearize(pulled, CT)[1](CT.cos()), CT.cos() @ JACOBIAN)


@pytest.mark.parametrize("around", [vmap, lambda g: lambda rows: torch.stack([g(r) for r in rows])])
def test_inside_a_transform_that_is_still_active(around):
    rows = torch.stack([X, X.cos()])

    def g(x):
        _, vjp_fn = vjp(f, x)
        return vmap(lambda ct: vjp_fn(ct)[0])(torch.eye(2, dtype=x.dtype)) + vjp_fn(CT)[0]

    wanted = [torch.func.jacrev(f)(row) for row in rows]
    torch.testing.assert_close(around(g)(rows), torch.stack([j + CT @ j for j in wanted]))


def test_the_gradient_in_the_point_of_a_pullback_called_twice():
    def g(x):
        _, vjp_fn = vjp(f, x)
        return (vjp_fn(CT)[0] * vjp_fn(CT.cos())[0]).sum()

    def theirs(x):
        jacobian = torch.func.jacrev(f)(x)
        return ((CT @ jacobian) * (CT.cos() @ jacobian)).sum()

    torch.testing.assert_close(grad(g)(X), torch.func.grad(theirs)(X))


def test_a_pullback_that_left_the_transform_around_it():
    kept = []

    def g(x):
        out, vjp_fn = vjp(f, x)
        kept.append(vjp_fn)
        return out.sum()

    grad(g)(X)
    torch.testing.assert_close(kept[0](CT)[0], CT @ JACOBIAN)


def test_a_write_to_what_it_needs_is_noticed():
    x = X.clone()
    _, vjp_fn = vjp(lambda x: x * x, x)
    x.add_(1)
    with pytest.raises(MutationError, match="was written to in place"):
        vjp_fn(X)


def test_what_an_inner_transform_left_behind_keeps_its_derivative():
    def f(x):
        kept = []

        def inner(y):
            kept.append(y * 2)
            return y.sum()

        grad(inner)(x)
        return (x * kept[0]).sum()

    x = torch.tensor([3.0, -1.0])
    assert torch.equal(grad(f)(x), 4 * x)
    assert torch.equal(jvp(f, (x,), (torch.ones(2),))[1], 4 * x.sum())


@pytest.mark.parametrize("taken", ["the tensor", "a view of it"])
@pytest.mark.parametrize("outer", [grad, vmap, lambda f: f])
def test_a_write_to_what_a_pullback_needs_is_noticed_at_every_level(taken, outer):
    def f(x):
        x = x * 1
        _, vjp_fn = vjp(torch.sin, x if taken == "the tensor" else x[:])
        x.add_(1)
        return vjp_fn(torch.ones(2))[0].sum()

    x = torch.randn(2, 2) if outer is vmap else torch.randn(2)
    with pytest.raises(MutationError, match=r"gradient of aten\.sin\.default"):
        outer(f)(x)


def test_the_tangent_of_a_view_may_lie_otherwise_in_memory():
    x, x_t = torch.randn(2, 3), torch.randn(3, 2).t()
    assert torch.equal(jvp(lambda x: x.view(6), (x,), (x_t,))[1], x_t.reshape(6))
