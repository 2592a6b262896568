"""Functions whose backward is marked with `@once_differentiable`: first derivatives, in both modes.

Forward mode transposes the backward in the cotangents alone, or says why it cannot.
"""

from __future__ import annotations

import pytest
import torch
from torch.amp import custom_bwd, custom_fwd
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lamina import grad, jacfwd, jacrev, jvp, linear_transpose, linearize, vjp, vmap
from lamina_core.errors import NotDifferentiableError
from tests.autodiff.functions import ONCE, GradientsInside, Numpy, Once, once
from tests.under import ALL, DOUBLE, FIRST, SECOND_ORDER, inputs


@pytest.mark.parametrize("transform", FIRST)
@pytest.mark.parametrize(("calls", "plain"), ONCE)
def test_under(transform, calls, plain):
    xs = inputs()
    torch.testing.assert_close(FIRST[transform](calls, xs), FIRST[transform](plain, xs))


TWICE = (
    "the backward of {name} is differentiated, but it is marked with @once_differentiable\n"
    "  it serves first derivatives, by vjp or by jvp; a second one needs its own\n"
    "  to fix: write the backward with differentiable ops and take the decorator off"
)


@pytest.mark.parametrize("transform", SECOND_ORDER)
def test_twice(transform):
    with pytest.raises(NotDifferentiableError) as error:
        ALL[transform](once, inputs())
    assert str(error.value) == TWICE.format(name="Once")


def inside(x):
    return GradientsInside.apply(x)


@pytest.mark.parametrize(
    "run",
    [
        lambda x, t: grad(lambda x: grad(inside)(x).sum())(x),
        lambda x, t: jvp(grad(inside), (x,), (t,)),
        lambda x, t: grad(lambda x: jvp(inside, (x,), (t,))[1])(x),
        lambda x, t: jvp(lambda x: jvp(inside, (x,), (t,))[1], (x,), (t,)),
    ],
    ids=["grad(grad)", "jvp(grad)", "grad(jvp)", "jvp(jvp)"],
)
def test_twice_where_forward_saves_an_intermediate_value_alone(run):
    x = inputs()[0]
    with pytest.raises(NotDifferentiableError) as error:
        run(x, x.cos())
    assert str(error.value) == TWICE.format(name="GradientsInside")


def test_forward_mode_where_forward_saves_an_intermediate_value():
    x = inputs()[0]
    expected = ((x.cos() * x + x.sin()) * x.cos()).sum()
    torch.testing.assert_close(jvp(inside, (x,), (x.cos(),))[1], expected)


def test_is_only_an_error_if_it_is_pulled_back_twice():
    x = inputs()[0]
    value, _ = vjp(lambda x: grad(lambda x: Once.apply(x).sum())(x), x)
    torch.testing.assert_close(value, 3 * x.square())


def test_the_jvp_is_linear_in_the_tangent():
    x, t = inputs()[0], inputs()[1]
    slope = 3 * x.square()

    def push(t):
        return jvp(once, (x,), (t,))[1]

    torch.testing.assert_close(vjp(push, t)[1](t.cos())[0], slope * t.cos())
    torch.testing.assert_close(jvp(push, (t,), (t.cos(),))[1], slope * t.cos())
    _, linear = linearize(once, x)
    torch.testing.assert_close(linear(t), slope * t)
    torch.testing.assert_close(linear_transpose(linear, t)(t.cos())[0], slope * t.cos())


def test_the_users_autograd_around_it():
    x = inputs()[0]
    t = inputs()[1].requires_grad_()
    (found,) = torch.autograd.grad(jvp(once, (x,), (t,))[1].sum(), t)
    torch.testing.assert_close(found, 3 * x.square())
    leaf = x.clone().requires_grad_()
    pushed = jvp(once, (leaf,), (t.detach(),))[1]
    with pytest.raises(NotDifferentiableError, match="marked with @once_differentiable"):
        torch.autograd.grad(pushed.sum(), leaf)


class Several(Function):
    """Real and complex arguments, one that is no tensor, two outputs of which one is constant."""

    @staticmethod
    def forward(ctx, x, power, z):
        ctx.power = power
        ctx.save_for_backward(x, z)
        largest = x.argmax()
        ctx.mark_non_differentiable(largest)
        return x**power * z, largest

    @staticmethod
    @once_differentiable
    def backward(ctx, ct, _):
        x, z = ctx.saved_tensors
        slope = ctx.power * x ** (ctx.power - 1)
        z_ct = torch.empty_like(ct)
        z_ct.copy_(ct).mul_(x**ctx.power)
        return (ct * (slope * z).conj()).real, None, z_ct


def test_several_arguments():
    x, z = inputs()[0], torch.complex(inputs()[1], inputs()[2])
    plain = lambda x, z: x**3 * z
    calls = lambda x, z: Several.apply(x, 3, z)[0]
    torch.testing.assert_close(
        jvp(calls, (x, z), (x.cos(), 1j * z)), jvp(plain, (x, z), (x.cos(), 1j * z))
    )
    torch.testing.assert_close(jacfwd(calls, 1)(x, z), jacfwd(plain, 1)(x, z))
    xs = inputs()
    torch.testing.assert_close(
        vmap(lambda x: jvp(calls, (x, z), (x.cos(), 1j * z))[1])(xs),
        vmap(lambda x: jvp(plain, (x, z), (x.cos(), 1j * z))[1])(xs),
    )


def test_a_function_without_gradients_has_a_zero_tangent():
    class Flat(Function):
        @staticmethod
        def forward(ctx, x):
            return x.round()

        @staticmethod
        @once_differentiable
        def backward(ctx, ct):
            return None

    x = inputs()[0]
    assert torch.equal(jvp(Flat.apply, (x,), (x,))[1], torch.zeros_like(x))


# ---------------------------------------------------------------------------------------------
# What cannot be transposed is an error and never a zero
# ---------------------------------------------------------------------------------------------


def branching(ct, slope):
    return ct * slope if ct.any() else None


def constant(ct, slope):
    return slope.clone()


def detached(ct, slope):
    return ct.detach() * slope


def not_linear(ct, slope):
    return ct.abs() * slope


def pointer(ct, slope):
    assert ct.data_ptr()
    return ct * slope


def python_number(ct, slope):
    return ct.sum().item() * slope


def random(ct, slope):
    return ct * torch.rand_like(slope) * torch.rand_like(ct)


def through_numpy(ct, slope):
    return torch.from_numpy(ct.numpy() * slope.numpy())


def without_grad(ct, slope):
    with torch.no_grad():
        return ct * slope


REFUSED = {
    branching: "NotLinearError: linear_transpose met aten.any.default, which is not linear",
    constant: "NotLinearError: linear_transpose met an output, which is not linear",
    detached: "NotLinearError: linear_transpose met aten.detach.default, which is not linear",
    not_linear: "NotLinearError: linear_transpose met aten.abs.default, which is not linear",
    pointer: "MissingRuleError: the memory of TrackedTensor(",
    python_number: "NotLinearError: linear_transpose met aten.item.default, which is not linear",
    random: "NotLinearError: linear_transpose met aten.rand_like.default, which is not linear",
    through_numpy: "DataDependentError: the NumPy array",
    without_grad: "NotLinearError: linear_transpose met aten.mul.Tensor, which is not linear",
}


@pytest.mark.parametrize("rule", REFUSED, ids=lambda rule: rule.__name__)
def test_refused(rule):
    class Cube(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @once_differentiable
        def backward(ctx, ct):
            (x,) = ctx.saved_tensors
            return rule(ct, 3 * x.square())

    x = inputs()[0]
    assert torch.isfinite(jacrev(Cube.apply)(x) if rule is detached else x).all()
    with pytest.raises(NotDifferentiableError) as error:
        jvp(Cube.apply, (x,), (x,))
    first, met, fix = str(error.value).split("\n")
    assert first == (
        "the jvp of Cube could not be made of its backward, which is marked with "
        "@once_differentiable"
    )
    assert met.startswith("  jvp transposes it in the cotangents, and met " + REFUSED[rule])
    assert fix == (
        "  to fix: define jvp in Cube, or write its backward with torch ops that are linear in the "
        "cotangents"
    )


def test_numpy_on_what_was_saved_is_fine():
    class Cube(Numpy):
        @staticmethod
        @once_differentiable
        def backward(ctx, ct):
            (x,) = ctx.saved_tensors
            return torch.from_numpy(3 * x.numpy() ** 2) * ct

    x = inputs()[0]
    torch.testing.assert_close(jvp(Cube.apply, (x,), (x,))[1], 3 * x**3)
    with pytest.raises(NotDifferentiableError, match="the jvp of Numpy could not be made"):
        jvp(Numpy.apply, (x,), (x,))


def test_a_mark_behind_another_decorator():
    class Cast(Function):
        @staticmethod
        @custom_fwd(device_type="cpu")
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @custom_bwd(device_type="cpu")
        @once_differentiable
        def backward(ctx, ct):
            (x,) = ctx.saved_tensors
            return ct * 3 * x.square()

    x = inputs()[0]
    assert x.dtype is DOUBLE
    torch.testing.assert_close(grad(lambda x: Cast.apply(x).sum())(x), 3 * x.square())
    with pytest.raises(NotDifferentiableError, match="define jvp in Cast"):
        jvp(Cast.apply, (x,), (x,))


class CubeWithVmap(Function):
    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, ct):
        (x,) = ctx.saved_tensors
        return ct * 3 * x.square()

    @staticmethod
    def vmap(info, in_dims, x):
        return CubeWithVmap.apply(x), in_dims[0]


@pytest.mark.parametrize("transform", FIRST)
def test_with_a_vmap_of_its_own(transform):
    xs, run = inputs(), FIRST[transform]
    torch.testing.assert_close(run(CubeWithVmap.apply, xs), run(lambda x: x**3, xs))
