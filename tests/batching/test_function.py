"""`torch.autograd.Function` under `vmap`: what examples share, random draws, rules of its own."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import Function

from lamina import grad, jvp, vjp, vmap
from lamina_core.errors import RandomnessError, RuleError
from tests.autodiff.functions import Product
from tests.under import DOUBLE, inputs


def test_an_argument_that_examples_share():
    xs, w = inputs(), torch.arange(4.0, dtype=DOUBLE)

    def loss(call):
        return lambda w: vmap(lambda x: call(x, w))(xs).sin().sum()

    call = lambda x, w: Product.apply(x, 2.0, w)[0]
    plain = lambda x, w: x * 2 * w
    torch.testing.assert_close(grad(loss(call))(w), grad(loss(plain))(w))
    torch.testing.assert_close(
        jvp(loss(call), (w,), (w.cos(),)), jvp(loss(plain), (w,), (w.cos(),))
    )


class SharedOutput(Function):
    """The second output does not depend on the mapped argument."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(w)
        return x + w, w.square()

    @staticmethod
    def backward(ctx, ct, square_ct):
        (w,) = ctx.saved_tensors
        return ct, ct + 2 * w * square_ct


def test_an_output_that_examples_share():
    xs, w = inputs(), torch.arange(4.0, dtype=DOUBLE)

    def loss(call):
        def one(x, w):
            total, square = call(x, w)
            return total.sin() * square

        return lambda w: vmap(one, (0, None))(xs, w).sum() + vmap(lambda x: call(x, w)[1])(xs).sum()

    found = grad(loss(SharedOutput.apply))(w)
    expected = grad(loss(lambda x, w: (x + w, w.square())))(w)
    torch.testing.assert_close(found, expected)


class Random(Function):
    @staticmethod
    def forward(ctx, x):
        mask = (torch.rand(x.shape) < 0.5).to(x.dtype)
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx, ct):
        return ct * ctx.saved_tensors[0]


def test_randomness():
    x = torch.ones(64, 32, dtype=DOUBLE)
    with pytest.raises(RandomnessError):
        vmap(Random.apply)(x)
    same = vmap(Random.apply, randomness="same")(x)
    assert (same == same[0]).all()
    different = vmap(Random.apply, randomness="different")(x)
    assert not (different == different[0]).all()

    def pulled(x):
        out, pullback = vjp(Random.apply, x)
        return out, pullback(torch.ones_like(out))[0]

    out, x_ct = vmap(pulled, randomness="different")(x)
    assert torch.equal(out, x_ct)


def test_a_vmap_rule_with_several_outputs():
    class Pair(Function):
        @staticmethod
        def forward(x, y):
            return x * 2, y.sum(0)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.size = inputs[1].shape[0]

        @staticmethod
        def backward(ctx, ct, sum_ct):
            return ct * 2, sum_ct.expand(ctx.size, *sum_ct.shape)

        @staticmethod
        def vmap(info, in_dims, x, y):
            x_bdim, y_bdim = in_dims
            assert y_bdim is None
            return (x * 2, y.sum(0)), (x_bdim, None)

    xs, y = inputs(), torch.ones(2, 4, dtype=DOUBLE)
    out, total = vmap(Pair.apply, (1, None), (1, None))(xs.T, y)
    torch.testing.assert_close(out, xs.T * 2)
    torch.testing.assert_close(total, y.sum(0))
    found = grad(lambda y: vmap(lambda x: Pair.apply(x, y)[1] * x)(xs).sum())(y)
    torch.testing.assert_close(found, xs.sum(0).expand(2, 4))


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (lambda x: x, "the vmap of Bad returned Tensor"),
        (lambda x: ((x, x), (0,)), "the vmap of Bad returned 2 outputs and out_dims (0,)"),
        (lambda x: (x, 1), "the vmap of Bad returned an output of shape [3, 4] with out_dims 1"),
        (lambda x: (x, 5), "the vmap of Bad returned an output of shape [3, 4] with out_dims 5"),
    ],
)
def test_a_wrong_answer_of_a_vmap_rule(answer, text):
    class Bad(Function):
        @staticmethod
        def forward(x):
            return x

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def vmap(info, in_dims, x):
            return answer(x)

    with pytest.raises(RuleError) as error:
        vmap(Bad.apply)(inputs())
    assert str(error.value).startswith(text)
