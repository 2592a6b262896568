"""What a tensor of a transform says of itself: requires_grad, grad_fn, is_leaf, requires_grad_."""

from __future__ import annotations

import pytest
import torch

from lamina import grad, jacrev, jvp, vjp, vmap
from lamina_core.errors import LaminaError, NotDifferentiableError

X = torch.tensor([0.3, 1.1, -0.7])


def answers(x):
    with torch.no_grad():
        apart = x * 2
    y = x * 2
    return {
        "x": x.requires_grad,
        "x is a leaf": x.is_leaf,
        "x made by": x.grad_fn and x.grad_fn.name(),
        "y": y.requires_grad,
        "y is a leaf": y.is_leaf,
        "y made by": y.grad_fn and y.grad_fn.name(),
        "detached": y.detach().requires_grad,
        "under no_grad": apart.requires_grad,
        "rounded to ints": y.int().requires_grad,
        "new": torch.zeros(2).requires_grad,
        "in place": torch.zeros(3).add_(x).requires_grad,
        "a view of it": x[1:].requires_grad,
    }


def plain(x):
    return answers(x.clone().requires_grad_())


UNDER = {
    "grad": lambda f: grad(lambda x: f(x).sum())(X),
    "vjp": lambda f: vjp(f, X),
    "jacrev": lambda f: jacrev(f)(X),
    "vmap(grad)": lambda f: vmap(grad(lambda x: f(x).sum()))(X.expand(2, 3)),
    "grad(grad)": lambda f: grad(lambda x: grad(lambda y: f(y).sum())(x).sum())(X),
    "jvp(grad)": lambda f: jvp(grad(lambda x: f(x).sum()), (X,), (X,)),
    "vmap, of what requires grad": lambda f: vmap(f)(X.expand(2, 3).clone().requires_grad_()),
    "jvp, of what requires grad": lambda f: jvp(f, (X.clone().requires_grad_(),), (X,)),
}


@pytest.mark.parametrize("name", UNDER)
def test_it_answers_as_outside(name):
    seen = []

    def f(x):
        seen.append(answers(x))
        return x.sin()

    UNDER[name](f)
    assert seen == [plain(X)]


@pytest.mark.parametrize("transform", ["vmap", "jvp"])
def test_what_nothing_follows_does_not_require_grad(transform):
    seen = []

    def f(x):
        seen.append((x.requires_grad, x.is_leaf, x.grad_fn, (x * 2).requires_grad))
        return x

    vmap(f)(X) if transform == "vmap" else jvp(f, (X,), (X,))
    assert seen == [(False, True, None, False)]


def test_a_tangent_that_requires_grad_is_enough():
    w = torch.tensor(2.0, requires_grad=True)
    seen = []
    jvp(lambda x: (seen.append(x.requires_grad), x)[1], (X,), (X * w,))
    assert seen == [True]


def test_code_that_branches_on_requires_grad():
    def soft_in_training(x):
        with torch.set_grad_enabled(x.requires_grad):
            return (torch.tanh(x) if x.requires_grad else x.round()).sum()

    torch.testing.assert_close(grad(soft_in_training)(X), 1 - X.tanh() ** 2)


def test_requires_grad_is_accepted_where_it_says_what_is_so():
    def f(x):
        assert x.requires_grad_() is x
        x.requires_grad = True
        y = torch.ones(3)
        y.requires_grad_(False)
        return (x * x.detach().requires_grad_(False) * y).sum()

    torch.testing.assert_close(grad(f)(X), X)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: torch.ones(3).requires_grad_(),
        lambda x: x.detach().requires_grad_(),
        lambda x: x.requires_grad_(False),
        lambda x: setattr(x * 1, "requires_grad", False),
    ],
)
def test_requires_grad_is_refused_where_it_would_change_anything(change):
    with pytest.raises(NotDifferentiableError, match="requires_grad_") as caught:
        grad(lambda x: (change(x), x.sum())[1])(X)
    assert "to fix: " in str(caught.value)
    assert isinstance(caught.value, LaminaError)
    assert isinstance(caught.value, RuntimeError)


def test_a_function_finds_its_arguments_as_in_pytorch():
    seen = []

    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            seen.append((x.requires_grad, y.requires_grad, ctx.needs_input_grad))
            ctx.mark_non_differentiable(*[t for t in (x, y) if not t.requires_grad])
            ctx.save_for_backward(x, y)
            return x * y

        @staticmethod
        def backward(ctx, ct):
            x, y = ctx.saved_tensors
            return ct * y, ct * x

    grad(lambda x: Both.apply(x, X).sum())(X)
    vmap(grad(lambda x, y: Both.apply(x, y), 1))(X, X)
    second = grad(lambda x: grad(lambda x: Both.apply(x, x).sum())(x).sum())(X)
    assert seen[:2] == [(True, False, (True, False)), (False, True, (False, True))]
    torch.testing.assert_close(second, torch.full((3,), 2.0))
