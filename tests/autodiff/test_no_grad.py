"""`torch.no_grad()` inside a transform: constants in reverse mode, nothing in forward mode."""

from __future__ import annotations

import pytest
import torch

import lamina

X = torch.tensor([0.3, 1.1, -0.7], dtype=torch.float64)


def captured(x):
    with torch.no_grad():
        c = x.sin()
    return c * x


def captured_twice(x):
    with torch.no_grad():
        c = 2 * x
    return c * x


def written(x):
    y = x * 2
    with torch.no_grad():
        y.mul_(x)
        y[1:] += x[:-1]
    return y


def written_behind(x):
    y = x * 2
    y.detach().mul_(3)
    y[:2].detach().add_(1)
    return y * x


class Doubled(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, ct):
        return ct * 2

    @staticmethod
    def jvp(ctx, x_t):
        return x_t * 2


def with_a_function(x):
    with torch.no_grad():
        c = Doubled.apply(x)
    return c * x


def with_a_transform(lib):
    def f(x):
        with torch.no_grad():
            return lib.grad(lambda y: (y * x).sin().sum())(x) * x

    return f


FUNCTIONS = [captured, written, with_a_function, with_a_transform]
UNDER = {
    "jvp": lambda lib, f: lib.jvp(f, (X,), (X,))[1],
    "jacfwd": lambda lib, f: lib.jacfwd(f)(X),
    "jacrev": lambda lib, f: lib.jacrev(f)(X),
    "vmap(jacfwd)": lambda lib, f: lib.vmap(lib.jacfwd(f))(torch.stack([X, -X])),
    "jacrev(jacfwd)": lambda lib, f: lib.jacrev(lib.jacfwd(f))(X),
    "jacfwd(jacrev)": lambda lib, f: lib.jacfwd(lib.jacrev(f))(X),
    "jacfwd, no_grad around": lambda lib, f: torch.no_grad()(lib.jacfwd(f))(X),
    # torch.func of torch 2.11 cannot do it in inference mode, where the values are the same.
    "jacfwd, inference mode around": lambda lib, f: (
        torch.inference_mode if lib is lamina else torch.no_grad
    )()(lib.jacfwd(f))(X),
}


@pytest.mark.parametrize("name", UNDER)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_as_in_torch_func(function, name):
    if (function, name) == (with_a_function, "jacrev(jacfwd)"):
        # There a Function is recorded at outer levels under no_grad too, unlike what is not one.
        expected = UNDER[name](torch.func, captured_twice)
        torch.testing.assert_close(UNDER[name](lamina, function), expected)
        return
    found, expected = (
        UNDER[name](lib, function(lib) if function is with_a_transform else function)
        for lib in (lamina, torch.func)
    )
    torch.testing.assert_close(found, expected)


# torch.func raises for writes to tangents at second order, or follows a write through `detach`.
TWICE = [(a, b) for a in (lamina.jacrev, lamina.jacfwd) for b in (lamina.jacrev, lamina.jacfwd)]


def test_forward_mode_follows_writes_at_second_order():
    expected = torch.diag_embed(torch.diag(torch.full_like(X, 4.0)))
    torch.testing.assert_close(lamina.jacfwd(lamina.jacfwd(written))(X), expected)


@pytest.mark.parametrize(("outer", "inner"), TWICE)
def test_a_write_through_detach_changes_the_value_alone(outer, inner):
    value = 6 * X + torch.tensor([1.0, 1.0, 0.0], dtype=X.dtype)
    torch.testing.assert_close(torch.diag(inner(written_behind)(X)), value + 2 * X)
    expected = torch.diag_embed(torch.diag(torch.full_like(X, 4.0)))
    torch.testing.assert_close(outer(inner(written_behind))(X), expected)


def test_a_function_without_a_jvp_is_followed_too():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, ct):
            (x,) = ctx.saved_tensors
            return 3 * x * x * ct

    def f(x):
        with torch.no_grad():
            return Cube.apply(x)

    torch.testing.assert_close(lamina.jvp(f, (X,), (X,))[1], 3 * X**3)


def test_rules_of_ones_own():
    @lamina.custom_jvp
    def cube(x):
        return x**3

    @cube.defjvp
    def _(primals, tangents):
        return cube(primals[0]), 3 * primals[0] ** 2 * tangents[0]

    def f(x):
        with torch.no_grad():
            return cube(x)

    torch.testing.assert_close(lamina.jvp(f, (X,), (X,))[1], 3 * X**3)
    torch.testing.assert_close(lamina.grad(lambda x: f(x).sum())(X), torch.zeros_like(X))
