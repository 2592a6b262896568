"""What a `torch.autograd.Function` may not return, capture or write to, and the texts about it."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import Function

from lamina import grad, vmap
from lamina_core.errors import CapturedTensorError, MutationError, RuleError
from tests.autodiff.functions import Sin
from tests.under import DOUBLE, FIRST, inputs


def returning(gradients):
    class Returns(Function):
        @staticmethod
        def forward(ctx, x, y):
            return x * 2

        @staticmethod
        def backward(ctx, ct):
            return gradients(ct)

    return lambda x: Returns.apply(x, None).sum()


def test_none_is_zero_and_extra_nones_are_allowed():
    x = inputs()[0]
    zero = torch.zeros_like(x)
    torch.testing.assert_close(grad(returning(lambda ct: (None, None)))(x), zero)
    torch.testing.assert_close(grad(returning(lambda ct: (ct, None, None)))(x), zero + 1)


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap(grad)", "grad(vmap)"])
@pytest.mark.parametrize(
    ("gradients", "text"),
    [
        (lambda ct: ct, "the backward of Returns returned 1 gradients, but its forward takes 2"),
        (lambda ct: (ct, None, ct), "the backward of Returns returned 3 gradients"),
        (lambda ct: (ct[:3], None), "the backward of Returns returned a tensor of shape [3] as"),
        (lambda ct: (1.0, None), "the backward of Returns returned float as gradient 0"),
    ],
)
def test_wrong_gradients(transform, gradients, text):
    with pytest.raises(RuleError) as error:
        FIRST[transform](returning(gradients), inputs())
    assert str(error.value).startswith(text)


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "vmap(grad)"])
def test_a_captured_tensor_of_an_active_transform(transform):
    def f(x):
        class Captures(Function):
            @staticmethod
            def forward(ctx, y):
                return y * x

            @staticmethod
            def backward(ctx, ct):
                return ct * x

        return Captures.apply(x * 2)

    with pytest.raises(CapturedTensorError) as error:
        FIRST[transform](f, inputs())
    assert "the forward of Captures uses a tensor that is not one of its arguments" in str(
        error.value
    )
    torch.testing.assert_close(grad(lambda x: x.sin().sum())(inputs()), inputs().cos())


def test_a_captured_constant_is_allowed():
    def f(x):
        mask = torch.ones(4, dtype=DOUBLE)

        class Captures(Function):
            @staticmethod
            def forward(ctx, y):
                return y * mask

            @staticmethod
            def backward(ctx, ct):
                return ct * mask

        return Captures.apply(x).sum()

    torch.testing.assert_close(grad(f)(inputs()[0]), torch.ones(4, dtype=DOUBLE))


def test_dirty_tensors_that_cannot_be_followed():
    def mark(ctx, x):
        ctx.mark_dirty(x)

    class Hidden(Function):
        @staticmethod
        def forward(ctx, x):
            mark(ctx, x)
            return x

    class NotReturned(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mark_dirty(x)
            return x * 2

    for function in (Hidden, NotReturned):
        with pytest.raises(MutationError, match=f"{function.__name__} marks a tensor as dirty"):
            grad(lambda x, apply=function.apply: apply(x * 1).sum())(inputs()[0])


def test_a_shared_argument_written_to_under_vmap():
    class AddTo(Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.mark_dirty(x)
            return x.add_(y)

    shared = inputs()[0]
    with pytest.raises((MutationError, RuleError)):
        vmap(lambda y: AddTo.apply(shared, y))(inputs())
    assert torch.equal(shared, inputs()[0])


def test_keyword_arguments_of_the_legacy_form():
    with pytest.raises(TypeError, match=r"Sin\.apply got keyword arguments: x"):
        grad(lambda x: (x + Sin.apply(x=x)).sum() + Sin.apply(x, x=x))(inputs()[0])
