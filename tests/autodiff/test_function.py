"""`torch.autograd.Function` under every transform: each against the same thing in plain ops."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lamina import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from lamina_core.errors import (
    CapturedTensorError,
    MutationError,
    NotDifferentiableError,
    RandomnessError,
    RuleError,
)

DOUBLE = torch.float64

# Each transform as a function of (f, xs), where f maps a vector of 4 to a vector, and xs is [3, 4].
FIRST_ORDER = {
    "plain": lambda f, xs: f(xs[0]),
    "vmap": lambda f, xs: vmap(f)(xs),
    "vmap last": lambda f, xs: vmap(f, 1, 1)(xs.T.contiguous()),
    "vmap(vmap)": lambda f, xs: vmap(vmap(f))(torch.stack([xs, xs.sin()])),
    "grad": lambda f, xs: grad(lambda x: f(x).sin().sum())(xs[0]),
    "vjp": lambda f, xs: vjp(f, xs[0])[1](xs[2])[0],
    "jacrev": lambda f, xs: jacrev(f)(xs[0]),
    "vmap(grad)": lambda f, xs: vmap(grad(lambda x: f(x).sin().sum()))(xs),
    "vmap(grad) last": lambda f, xs: vmap(grad(lambda x: f(x).sin().sum()), 1)(xs.T.contiguous()),
    "vmap(jacrev)": lambda f, xs: vmap(jacrev(f))(xs),
    "grad(vmap)": lambda f, xs: grad(lambda xs: vmap(f)(xs).sin().sum())(xs),
    "vmap(grad(vmap))": lambda f, xs: vmap(grad(lambda xs: vmap(f)(xs).sin().sum()))(
        torch.stack([xs, xs.cos()])
    ),
}
FORWARD = {
    "jvp": lambda f, xs: torch.stack(jvp(f, (xs[0],), (xs[1],))),
    "jacfwd": lambda f, xs: jacfwd(f)(xs[0]),
    "jvp(vmap)": lambda f, xs: jvp(vmap(f), (xs,), (xs.sin(),))[1],
    "vmap(jvp)": lambda f, xs: vmap(lambda x: jvp(f, (x,), (x.cos(),))[1])(xs),
}
SECOND_ORDER = {
    "hessian": lambda f, xs: hessian(lambda x: f(x).sin().sum())(xs[0]),
    "jvp(grad)": lambda f, xs: jvp(grad(lambda x: f(x).sin().sum()), (xs[0],), (xs[1],))[1],
    "jvp(jvp)": lambda f, xs: jvp(lambda x: jvp(f, (x,), (x.sin(),))[1], (xs[0],), (xs[1],))[1],
    "grad(grad)": lambda f, xs: grad(lambda x: grad(lambda x: f(x).sin().sum())(x).sin().sum())(
        xs[0]
    ),
    "grad(jvp)": lambda f, xs: grad(lambda x: jvp(f, (x,), (x.cos(),))[1].sin().sum())(xs[0]),
    "vmap(hessian)": lambda f, xs: vmap(hessian(lambda x: f(x).sin().sum()))(xs),
    "grad(vmap(grad))": lambda f, xs: grad(
        lambda xs: vmap(grad(lambda x: f(x).sin().sum()))(xs).sin().sum()
    )(xs),
    "jacfwd(jacfwd(jacrev))": lambda f, xs: jacfwd(jacfwd(jacrev(f)))(xs[0]),
}
FIRST = {**FIRST_ORDER, **FORWARD}
ALL = {**FIRST, **SECOND_ORDER}

PAIRS = []
ONCE = []


def pair(plain, into=PAIRS):
    """Registers a function that calls a Function beside its twin in plain ops."""

    def register(calls):
        into.append(pytest.param(calls, plain, id=calls.__name__))
        return calls

    return register


# ---------------------------------------------------------------------------------------------
# Functions in both forms. Derivatives that are not those of the forward tell a Function whose
# backward is used from one whose forward is differentiated.
# ---------------------------------------------------------------------------------------------


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


def inputs():
    return torch.linspace(-1.1, 1.3, 12, dtype=DOUBLE).reshape(3, 4) + 0.05


@pytest.mark.parametrize("transform", ALL)
@pytest.mark.parametrize(("calls", "plain"), PAIRS)
def test_under(transform, calls, plain):
    xs = inputs()
    run = ALL[transform]
    torch.testing.assert_close(run(calls, xs.clone()), run(plain, xs))
    assert torch.equal(xs, inputs())


@pytest.mark.parametrize("transform", FIRST_ORDER)
@pytest.mark.parametrize(("calls", "plain"), ONCE)
def test_once_differentiable_under(transform, calls, plain):
    xs = inputs()
    torch.testing.assert_close(FIRST_ORDER[transform](calls, xs), FIRST_ORDER[transform](plain, xs))


@pytest.mark.parametrize("transform", [*FORWARD, *SECOND_ORDER])
def test_once_differentiable_twice(transform):
    with pytest.raises(NotDifferentiableError) as error:
        ALL[transform](once, inputs())
    assert str(error.value) == (
        "the backward of Once is differentiated, but it is marked with @once_differentiable\n"
        "  a second derivative needs that, and so does jvp of a function without a jvp\n"
        "  to fix: write the backward with differentiable ops and take the decorator off"
    )


def test_once_differentiable_is_only_an_error_if_it_is_pulled_back_twice():
    x = inputs()[0]
    value, _ = vjp(lambda x: grad(lambda x: Once.apply(x).sum())(x), x)
    torch.testing.assert_close(value, 3 * x.square())


def test_forward_runs_once_on_plain_tensors():
    seen = []

    class Counted(Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(type(x))
            return x * 2

        @staticmethod
        def backward(ctx, ct):
            return ct * 2

    x = inputs()[0]
    grad(lambda x: grad(lambda x: jvp(Counted.apply, (x,), (x,))[1].square().sum())(x).sum())(x)
    assert seen == [torch.Tensor]


def test_numpy_inside():
    x = inputs()[0]
    expected = (x**3).cos() * 3 * x.square()
    torch.testing.assert_close(grad(lambda x: Numpy.apply(x).sin().sum())(x), expected)
    value, _ = vjp(lambda x: grad(lambda x: Numpy.apply(x).sum())(x), x)
    torch.testing.assert_close(value, 3 * x.square())


def test_gradients_inside_forward():
    x = inputs()[0]
    found = grad(lambda x: grad(lambda y: GradientsInside.apply(y))(x.detach()).sum() + x.sum())(x)
    torch.testing.assert_close(found, torch.ones_like(x))
    found = grad(lambda x: GradientsInside.apply(x))(x)
    torch.testing.assert_close(found, x.cos() * x + x.sin())


# ---------------------------------------------------------------------------------------------
# The user's own autograd around and beside the transforms
# ---------------------------------------------------------------------------------------------


def test_under_the_users_autograd():
    xs = inputs()
    for run in (FIRST["vmap"], FIRST["grad"], FIRST["vmap(grad)"], FIRST["jvp"], ALL["hessian"]):
        for calls, plain in ((legacy, PAIRS[0].values[1]), (saved_output, torch.exp)):
            grads = []
            for f in (calls, plain):
                leaf = xs.clone().requires_grad_()
                out = run(f, leaf).sin().sum()
                (first,) = torch.autograd.grad(out, leaf, create_graph=True)
                (second,) = torch.autograd.grad(first.square().sum(), leaf)
                grads.append((first.detach(), second))
            torch.testing.assert_close(*grads)


def test_a_captured_parameter_that_requires_grad():
    weight = torch.tensor([1.0, 2.0, 0.5, -1.0], dtype=DOUBLE, requires_grad=True)
    x = inputs()[0]

    def loss(x):
        return Product.apply(x, 2.0, weight)[0].sin().sum()

    found = grad(loss)(x)
    (weight_ct,) = torch.autograd.grad(found.sum(), weight)
    y = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad((y * weight * 2).sin().sum(), y, create_graph=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(weight_ct, torch.autograd.grad(expected.sum(), weight)[0])


def test_outside_of_transforms_nothing_changes():
    x = inputs()[0].requires_grad_()
    out = Sin.apply(x)
    assert type(out.grad_fn).__name__ == "SinBackward"
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], 3 * x.cos())


def test_an_apply_stored_before_the_import():
    program = """
import torch

class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, ct):
        return ct * 2

stored = Doubled.apply

from lamina import grad

assert grad(lambda x: stored(x).sum())(torch.ones(2)).tolist() == [2, 2]
"""
    path = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": path})


def test_only_constants():
    """No argument is transformed: an output can still be written to with values that are."""
    constant = inputs()[1]

    def f(x):
        out = Sin.apply(constant)
        out.mul_(x)
        return out.sum()

    torch.testing.assert_close(grad(f)(inputs()[0]), constant.sin())


def test_under_no_grad():
    def f(x):
        with torch.no_grad():
            y = Sin.apply(x)
        return (x * y).sum()

    x = inputs()[0]
    torch.testing.assert_close(grad(f)(x), x.sin())


# ---------------------------------------------------------------------------------------------
# vmap
# ---------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------
# State
# ---------------------------------------------------------------------------------------------


def test_the_result_does_not_depend_on_which_level_asks_for_gradients():
    """`needs_input_grad` tells each level what that level needs."""
    seen = []

    class Needs(Function):
        @staticmethod
        def forward(ctx, x, y):
            seen.append(ctx.needs_input_grad)
            return x * 2 + y

        @staticmethod
        def backward(ctx, ct):
            seen.append(ctx.needs_input_grad)
            return ct * 2, ct

    x, y = inputs()[0], inputs()[1]
    grad(lambda y: grad(lambda x: Needs.apply(x, y).sin().sum())(x).sum())(y)
    assert seen == [(True, True), (True, False), (False, True)]


def test_nothing_is_kept_alive():
    refs = []

    class Kept(Function):
        @staticmethod
        def forward(ctx, x):
            out = x.exp()
            ctx.save_for_backward(out)
            refs.append(weakref.ref(out))
            return out

        @staticmethod
        def backward(ctx, ct):
            return ct * ctx.saved_tensors[0]

    gc.disable()
    try:
        grad(lambda x: Kept.apply(x).sum())(inputs()[0])
        grad(lambda x: grad(lambda x: Kept.apply(x).sum())(x).sum())(inputs()[0])
        assert [ref() for ref in refs] == [None, None]
    finally:
        gc.enable()


def test_threads():
    results = []

    def work():
        names = ("grad", "vmap(grad)", "hessian", "jvp")
        results.extend(ALL[name](legacy, inputs()) for name in names)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 12


def test_an_exception_in_forward_or_backward_leaves_the_levels_working():
    class Fails(Function):
        @staticmethod
        def forward(ctx, x):
            raise KeyError("stop")

    class FailsBackward(Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, ct):
            raise KeyError("stop")

    def f(x):
        for function in (Fails, FailsBackward):
            with pytest.raises(KeyError):
                grad(lambda x, apply=function.apply: apply(x).sum())(x)
            with pytest.raises(KeyError):
                vmap(grad(lambda x, apply=function.apply: apply(x * x)))(x)
        return x.sin().sum()

    torch.testing.assert_close(grad(f)(inputs()[0]), inputs()[0].cos())
