"""Functions of `torch.autograd.Function` in both forms, each beside its twin in plain ops.

Derivatives that are not those of the forward tell a Function whose backward is used from one whose
forward is differentiated.
"""

from __future__ import annotations

import functools

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests import under
from tests.under import DOUBLE

PAIRS = []
ONCE = []
pair = functools.partial(under.pair, into=PAIRS)


class Sin(Function):
    @staticmethod
    def forward(ctx, x):
        assert not torch.is_grad_enabled()
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, ct):
        (x,) = ctx.saved_tensors
        return 3 * ct * x.cos()


class SinInTwoSteps(Function):
    @staticmethod
    def forward(x):
        assert not torch.is_grad_enabled()
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        (x,) = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, ct):
        (x,) = ctx.saved_tensors
        return 3 * ct * x.cos()


class SinWithAll(SinInTwoSteps):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, x_t):
        (x,) = ctx.saved_tensors
        return 3 * x_t * x.cos()

    @staticmethod
    def vmap(info, in_dims, x):
        assert x.shape[in_dims[0]] == info.batch_size
        assert info.randomness == "error"
        return SinWithAll.apply(x), in_dims[0]


@pair(lambda x: 3 * x.sin() - 2 * x.detach().sin())
def legacy(x):
    return Sin.apply(x)


@pair(lambda x: 3 * x.sin() - 2 * x.detach().sin())
def two_steps(x):
    return SinInTwoSteps.apply(x)


@pair(lambda x: 3 * x.sin() - 2 * x.detach().sin())
def with_jvp_and_vmap(x):
    return SinWithAll.apply(x)


class Product(Function):
    """Two tensors, a number, and two outputs of different shapes."""

    @staticmethod
    def forward(ctx, x, factor, y):
        ctx.save_for_backward(x, y)
        ctx.factor = factor
        return x * y * factor, (x * y).sum()

    @staticmethod
    def backward(ctx, ct, total_ct):
        x, y = ctx.saved_tensors
        both = ct * ctx.factor + total_ct
        x_ct = both * y if ctx.needs_input_grad[0] else None
        y_ct = both * x if ctx.needs_input_grad[2] else None
        return x_ct, None, y_ct


@pair(lambda x: x.sin() * x * 2 * (x.sin() * x).sum())
def two_outputs(x):
    product, total = Product.apply(x.sin(), 2, x)
    return product * total


@pair(lambda x: x * x * 2)
def the_same_argument_twice(x):
    return Product.apply(x, 2.0, x)[0]


@pair(lambda x: x * x.detach() * 2)
def an_argument_and_its_detached_self(x):
    return Product.apply(x, 2.0, x.detach())[0]


@pair(lambda x: (x * torch.arange(4.0, dtype=DOUBLE)).sum() * x)
def a_constant_argument_and_an_unused_output(x):
    return Product.apply(torch.arange(4.0, dtype=DOUBLE), 7, x)[1] * x


class SavesItsOutput(Function):
    @staticmethod
    def forward(ctx, x):
        out = x.exp()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, ct):
        (out,) = ctx.saved_tensors
        return ct * out


@pair(lambda x: x.exp())
def saved_output(x):
    return SavesItsOutput.apply(x)


class KeepsTensorsAsAttributes(Function):
    @staticmethod
    def forward(ctx, x, options):
        ctx.x = x
        ctx.more = {"list": [x, options["power"]], "none": None}
        return x ** options["power"]

    @staticmethod
    def backward(ctx, ct):
        x, power = ctx.more["list"]
        assert x is ctx.x
        return ct * power * x ** (power - 1), None


@pair(lambda x: x**3)
def attributes(x):
    return KeepsTensorsAsAttributes.apply(x, {"power": 3})


class NoZeros(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx, sin_ct, cos_ct):
        (x,) = ctx.saved_tensors
        terms = []
        if sin_ct is not None:
            terms.append(sin_ct * x.cos())
        if cos_ct is not None:
            terms.append(-cos_ct * x.sin())
        return sum(terms) if terms else None


@pair(lambda x: x.sin())
def unmaterialised_zeros(x):
    return NoZeros.apply(x)[0]


class SortWithNumbers(Function):
    @staticmethod
    def forward(ctx, x):
        values, order = x.sort()
        rounded = x.round()
        ctx.mark_non_differentiable(order, rounded)
        ctx.save_for_backward(order)
        return values, order, rounded

    @staticmethod
    def backward(ctx, ct, order_ct, rounded_ct):
        assert not rounded_ct.any() if type(rounded_ct) is torch.Tensor else True
        (order,) = ctx.saved_tensors
        return torch.zeros_like(ct).scatter(0, order, ct)


@pair(lambda x: x.sort()[0].sin() * x.detach().round())
def not_differentiable_outputs(x):
    values, order, rounded = SortWithNumbers.apply(x)
    assert order.dtype == torch.int64
    return values.sin() * rounded


class Identity(Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, ct):
        return ct * 2


@pair(lambda x: x.sin() + (x - x.detach()))
def returns_its_argument(x):
    return Identity.apply(x) - x + x.sin()


class CallsAnother(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return Sin.apply(x)

    @staticmethod
    def backward(ctx, ct):
        (x,) = ctx.saved_tensors
        return SavesItsOutput.apply(x) * ct


@pair(lambda x: x.exp() - x.detach().exp() + x.detach().sin())
def nested(x):
    return CallsAnother.apply(x)


class Broadcasts(Function):
    @staticmethod
    def forward(ctx, x, bias):
        return x + bias

    @staticmethod
    def backward(ctx, ct):
        return ct, ct


@pair(lambda x: (x + x.sum()).sin())
def gradients_that_broadcast(x):
    return Broadcasts.apply(x, x.sum()).sin()


class WritesToItsArgument(Function):
    @staticmethod
    def forward(ctx, x):
        x.mul_(2).add_(1)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, ct):
        return ct * 2


@pair(lambda x: (x.sin() * 2 + 1) * x.sin())
def dirty(x):
    y = x.sin()
    z = y * 1
    out = WritesToItsArgument.apply(z)
    assert out is z
    return z * y


@pair(lambda x: torch.cat([x[:2].sin() * 2 + 1, x[2:].sin()]))
def dirty_view(x):
    y = x.sin()
    WritesToItsArgument.apply(y[:2])
    return y


class KeywordArguments(Function):
    @staticmethod
    def forward(x, power=2):
        return x**power

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.power = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, ct):
        (x,) = ctx.saved_tensors
        return ct * ctx.power * x ** (ctx.power - 1), None


@pair(lambda x: x**2 + x**3)
def keyword_arguments(x):
    return KeywordArguments.apply(x) + KeywordArguments.apply(x, power=3)


class Once(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, ct):
        (x,) = ctx.saved_tensors
        return ct * 3 * x.square()


@pair(lambda x: x**3, into=ONCE)
def once(x):
    return Once.apply(x)


class GradientsInside(Function):
    """A forward that computes its own gradient with PyTorch's autograd: reentrant checkpointing."""

    @staticmethod
    def forward(ctx, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            out = (x.sin() * x).sum()
            (ctx.gradient,) = torch.autograd.grad(out, x)
        return out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, ct):
        return ctx.gradient * ct


class Numpy(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(x.numpy() ** 3)

    @staticmethod
    @once_differentiable
    def backward(ctx, ct):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(3 * x.numpy() ** 2 * ct.numpy())
