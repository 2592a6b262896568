"""Registered ops that write to their arguments."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from lamina import grad, jvp, vmap
from lamina_core.errors import MutationError, NotDifferentiableError
from tests.batching.registered.ops import CALLS, OPS, accumulate_, rand, zero_all_
from tests.errors.saying import said


def test_a_write_to_what_is_made_inside(looping):
    x, by = rand(4, 3), rand(3)

    def f(x, by):
        mine = x.sin()
        return accumulate_(mine, by), mine

    sums, mine = vmap(f, in_dims=(0, None))(x, by)
    torch.testing.assert_close(mine, x.sin() + by)
    torch.testing.assert_close(sums, (x.sin() + by).sum(-1))


def test_a_write_to_what_all_examples_share_until_then(looping):
    x = rand(4, 3)

    def f(x):
        mine = torch.zeros(3, dtype=torch.float64)
        other = mine[1:]
        accumulate_(mine, x)
        return mine, other

    mine, other = vmap(f)(x)
    torch.testing.assert_close(mine, x)
    torch.testing.assert_close(other, x[:, 1:])


def test_a_write_through_a_view(looping):
    x, by = rand(4, 3, 5), rand(4, 3)

    def f(x, by):
        mine = x.clone()
        accumulate_(mine[:, 1], by)
        return mine

    expected = x.clone()
    expected[:, :, 1] += by
    torch.testing.assert_close(vmap(f)(x, by), expected)


def test_a_write_to_an_argument_reaches_the_caller(looping):
    x, by = rand(3, 4), rand(4, 3)
    expected = x + by.T
    vmap(accumulate_, in_dims=(1, 0))(x, by)
    torch.testing.assert_close(x, expected)


def test_a_write_under_two_levels(looping):
    x, by = rand(2, 4, 3), rand(4, 3)

    def f(x, by):
        mine = x * 2
        accumulate_(mine, by)
        return mine

    torch.testing.assert_close(vmap(vmap(f), in_dims=(0, None))(x, by), 2 * x + by)


def test_a_list_of_tensors_is_written(looping):
    x, y = rand(4, 3), rand(4, 2)

    def f(x, y):
        x, y = x.clone(), y.clone()
        zero_all_([x, y[1:]])
        return x, y

    zeroed, rest = vmap(f)(x, y)
    torch.testing.assert_close(zeroed, torch.zeros_like(x))
    torch.testing.assert_close(rest, torch.stack([y[:, 0], torch.zeros(4).double()], 1))


def test_an_op_that_returns_what_it_writes(looping):
    x = rand(4, 3)

    def f(x):
        mine, count = x.clone(), torch.zeros(())
        out = OPS.negate_(mine, count=count)
        assert out is mine
        return OPS.negate_(out[1:]), out, count

    part, whole, count = vmap(f)(x)
    torch.testing.assert_close(part, x[:, 1:])
    torch.testing.assert_close(whole, torch.cat([-x[:, :1], x[:, 1:]], 1))
    torch.testing.assert_close(count, torch.ones(4))


def test_the_rule_of_an_op_that_writes():
    @torch.library.custom_op("lamina_tests::fill_", mutates_args={"x"})
    def fill_(x: Tensor, y: Tensor) -> None:
        x.copy_(y)

    @fill_.register_vmap
    def _(info, in_dims, x, y):
        CALLS.append(in_dims)
        x = x.movedim(in_dims[0], -1)
        x.copy_(y if in_dims[1] is None else y.movedim(in_dims[1], -1))
        return None, None

    def f(x, y):
        mine = torch.zeros(3, dtype=torch.float64)
        fill_(mine, y)
        fill_(x, y)
        return mine

    x, y = rand(4, 3), rand(3, 4)
    torch.testing.assert_close(vmap(f, in_dims=(0, 1))(x, y), y.T)
    torch.testing.assert_close(x, y.T)
    assert len(CALLS) == 2


def test_a_write_to_a_captured_tensor_is_an_error(looping):
    captured = torch.zeros(3, dtype=torch.float64)
    text = said(MutationError, lambda: vmap(lambda x: accumulate_(captured, x))(rand(4, 3)))
    assert "lamina_tests.accumulate_.default writes a value of this transform" in text
    assert not captured.any()


def test_a_write_of_constants_inside_a_derivative():
    x = rand(3)

    def f(y):
        mine = x.clone()
        accumulate_(mine, x)
        return (mine * y).sum()

    torch.testing.assert_close(grad(f)(rand(3)), 2 * x)
    torch.testing.assert_close(jvp(f, (x,), (x,))[1], (2 * x * x).sum())


def test_a_write_that_would_lose_a_derivative_is_an_error():
    x = rand(3)

    def into(y):
        mine = y.clone()
        accumulate_(mine, x)
        return mine.sum()

    def of(y):
        mine = x.clone()
        accumulate_(mine, y)
        return mine.sum()

    for f in (into, of):
        for call in (lambda f=f: grad(f)(x), lambda f=f: jvp(f, (x,), (x,))):
            text = said(NotDifferentiableError, call)
            assert "accumulate_.default writes to its argument and has no derivative" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        def quietly(y):
            with torch.no_grad():
                mine = y.clone()
                accumulate_(mine, y)
            return (mine * y).sum()

        torch.testing.assert_close(grad(quietly)(x), 2 * x)


def test_per_sample_gradients_around_a_write(looping):
    x = rand(4, 3)

    def f(y):
        mine = y.detach().clone()
        accumulate_(mine, y.detach())
        return (mine * y).sum()

    torch.testing.assert_close(vmap(grad(f))(x), 2 * x)
