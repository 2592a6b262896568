"""A `torch.autograd.Function` whose arguments all examples share may draw numbers all the same."""

from __future__ import annotations

import pytest
import torch

import lamina
from lamina_core.errors import RandomnessError

B = 3
SHARED = torch.tensor([1.0, 2.0])
MAPPED = torch.arange(1.0, B + 1)


class Noisy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        noise = torch.rand(2)
        ctx.save_for_backward(noise)
        return x * noise

    @staticmethod
    def backward(ctx, ct):
        return ct * ctx.saved_tensors[0]


class SavesNoise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(torch.rand(2))
        return x * 2

    @staticmethod
    def backward(ctx, ct):
        return ct * ctx.saved_tensors[0]


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, ct):
        return 2 * ct * ctx.saved_tensors[0]


def noisy(x):
    return lambda b: Noisy.apply(x) * b


@pytest.mark.parametrize("function", [Noisy, SavesNoise])
def test_an_unmapped_draw_for_each_example_is_an_error(function):
    with pytest.raises(RandomnessError, match="none of its arguments is mapped"):
        lamina.vmap(lambda b: function.apply(SHARED) * b, randomness="different")(MAPPED)


def test_an_unmapped_draw_is_an_error_where_draws_are():
    with pytest.raises(RandomnessError, match="was not told what that means"):
        lamina.vmap(noisy(SHARED))(MAPPED)


def test_an_unmapped_draw_may_be_the_same_for_all():
    torch.manual_seed(0)
    out = lamina.vmap(noisy(SHARED), randomness="same")(MAPPED)
    torch.manual_seed(0)
    torch.testing.assert_close(out, SHARED * torch.rand(2) * MAPPED[:, None])


def test_a_level_below_does_not_hide_the_draw():
    def loss(x):
        return lamina.vmap(noisy(x), randomness="different")(MAPPED).sum()

    with pytest.raises(RandomnessError, match="none of its arguments is mapped"):
        lamina.grad(loss)(SHARED)


def test_only_the_level_that_is_passed_by_is_asked():
    def inner(x):
        return lamina.vmap(noisy(x), randomness="same")(MAPPED)

    shared = SHARED.expand(2, 2)
    torch.manual_seed(0)
    out = lamina.vmap(inner, randomness="different")(shared)
    assert not torch.equal(out[0], out[1])
    torch.testing.assert_close(out[:, 0] * 3, out[:, 2])


@pytest.mark.parametrize("randomness", ["error", "different", "same"])
def test_a_function_without_draws_is_run_once_for_all(randomness):
    def mapped(x):
        return lamina.vmap(lambda b: Square.apply(x) * b, randomness=randomness)(MAPPED)

    expected = SHARED.square() * MAPPED[:, None]
    torch.testing.assert_close(mapped(SHARED), expected)
    gradient = lamina.grad(lambda x: mapped(x).sum())
    torch.testing.assert_close(gradient(SHARED), 2 * SHARED * MAPPED.sum())
    torch.testing.assert_close(lamina.jvp(mapped, (SHARED,), (SHARED,)), (expected, 2 * expected))
    torch.testing.assert_close(lamina.vmap(mapped)(SHARED.expand(2, 2)), expected.expand(2, B, 2))
    x = SHARED.clone().requires_grad_()
    mapped(x).sum().backward()
    torch.testing.assert_close(x.grad, gradient(SHARED))
