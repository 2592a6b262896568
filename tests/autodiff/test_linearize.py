"""`linearize`: one run of the function, and a derivative that is right wherever it is called."""

from __future__ import annotations

import types

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.autograd import Function

import lamina
from lamina import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from lamina_core.errors import (
    EscapedTensorError,
    MutationError,
    NotDifferentiableError,
    NotLinearError,
    TangentError,
)
from tests import laws
from tests.compositions import test_random_programs as random_programs
from tests.errors.saying import said
from tests.samples import curated, others

DOUBLE = torch.float64
X = torch.tensor([0.3, 0.7, 1.1], dtype=DOUBLE)
T = torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE)


def f(x):
    return torch.stack([x.prod(), x.sin().sum()]) * x[0]


def pushed(f, primals, tangents):
    """The derivative as PyTorch's forward mode gives it."""
    return torch.func.jvp(f, primals, tangents)[1]


def counted(f):
    def counting(*args):
        counting.runs += 1
        return f(*args)

    counting.runs = 0
    return counting


# -- what it gives ---------------------------------------------------------------------------------


def test_one_run_serves_all_directions():
    g = counted(f)
    out, jvp_fn = linearize(g, X)
    rows = [jvp_fn(e) for e in torch.eye(3, dtype=DOUBLE)]
    assert g.runs == 1
    torch.testing.assert_close(out, f(X))
    torch.testing.assert_close(torch.stack(rows, -1), torch.func.jacfwd(f)(X))


def test_structures_constants_and_keywords():
    def g(tree, n, *, scale):
        a, b = tree["a"], tree["b"][0]
        return {"sum": (a * b * scale).sum(), "rest": [a * n, b.long(), "text", None]}

    tree = {"a": X, "b": [X.sin(), 3, None]}
    out, jvp_fn = linearize(g, tree, torch.tensor(2), scale=T)
    assert out["rest"][2:] == ["text", None]
    result = jvp_fn({"a": T, "b": [None, None, None]}, None)
    torch.testing.assert_close(result["sum"], (T * X.sin() * T).sum())
    torch.testing.assert_close(result["rest"][0], 2 * T)
    assert result["rest"][1:] == [None, None, None]


def test_an_output_that_does_not_depend_on_the_input_gets_zeros():
    out, jvp_fn = linearize(lambda x: (x.round(), torch.ones(2), x.detach() * 3), X)
    for value, tangent in zip(out, jvp_fn(T), strict=True):
        assert tangent.shape == value.shape
        assert tangent.dtype == value.dtype
        assert not tangent.any()


def test_the_input_itself_is_an_output():
    out, jvp_fn = linearize(lambda x: (x, x.flip(0)), X)
    assert out[0] is X
    torch.testing.assert_close(jvp_fn(T), (T, T.flip(0)))


def test_aux_is_handed_back():
    _, jvp_fn, aux = linearize(lambda x: (x.sin(), {"cos": x.cos(), "n": 3}), X, has_aux=True)
    torch.testing.assert_close(aux["cos"], X.cos())
    assert aux["n"] == 3
    torch.testing.assert_close(jvp_fn(T), X.cos() * T)


def test_complex_numbers():
    z, t = torch.complex(X, T), torch.complex(T, X)

    def g(z):
        return z * z.conj(), (z.exp() * 2j).real, torch.view_as_real(z)

    _, jvp_fn = linearize(g, z)
    wanted = (2 * (z.conj() * t).real + 0j, (z.exp() * t * 2j).real, torch.view_as_real(t))
    torch.testing.assert_close(jvp_fn(t), wanted)


def test_a_tangent_with_other_strides_than_its_primal():
    x, t = torch.arange(6.0).reshape(2, 3), torch.randn(3, 2).T
    _, jvp_fn = linearize(lambda x: x.view(6).sin().view(3, 2), x)
    torch.testing.assert_close(jvp_fn(t), (x.cos() * t).reshape(3, 2))


def test_memory_of_what_no_output_needs_is_not_kept():
    def g(x):
        (x.exp() * 2).sum()
        return x.sin()

    _, jvp_fn = linearize(g, X)
    (program,) = [
        cell.cell_contents
        for cell in jvp_fn.__closure__
        if type(cell.cell_contents).__name__ == "Program"
    ]
    assert [step.name for step in program.steps] == ["aten.mul.Tensor"]


# -- over every op, against PyTorch's own pullbacks and differences --------------------------------


def by_linearizing(f, primals, tangents):
    """`jvp`, by way of a linearization that has been called before."""
    out, jvp_fn = linearize(f, *primals)
    jvp_fn(*[t if t is None else torch.ones_like(t) for t in tangents])
    return out, jvp_fn(*tangents)


# Each borrows a formula, writes in place within one, goes by two pullbacks, or has many outputs.
SOME = """as_strided baddbmm cholesky_solve cross cumprod fft.irfft gather index_put linalg.inv
    linalg.qr linalg.svdvals nn.functional.batch_norm nn.functional.conv2d
    nn.functional.cross_entropy nn.functional.gelu nn.functional.layer_norm
    nn.functional.max_pool2d nn.functional.pad.reflect
    nn.functional.scaled_dot_product_attention nn.functional.unfold sort split where""".split()


def pytest_generate_tests(metafunc):
    """Reads the whole table of operators only for the tests that ask for it, and if they run."""
    if "other" in metafunc.fixturenames:
        wanted = "not exhaustive" not in metafunc.config.option.markexpr
        names = [*curated("jvp"), *others("jvp")] if wanted else ["left out by -m"]
        metafunc.parametrize("other", names)


@pytest.mark.parametrize("name", SOME)
def test_op(name, monkeypatch):
    monkeypatch.setattr(lamina, "jvp", by_linearizing)
    laws.hold(name, "jvp")


@pytest.mark.exhaustive
def test_every_op(other, monkeypatch):
    monkeypatch.setattr(lamina, "jvp", by_linearizing)
    laws.hold(other, "jvp")


def search(monkeypatch, part, examples, fills):
    """Random programs under random stacks of transforms, with `linearize` for every jvp."""
    names = {name: getattr(lamina, name) for name in lamina.__all__}
    patched = types.SimpleNamespace(**names | {"jvp": by_linearizing})
    monkeypatch.setattr(random_programs, "lamina", patched)
    random_programs.search(part, examples, fills)


@pytest.mark.parametrize("fills", [False, True])
def test_random_programs(fills, monkeypatch):
    search(monkeypatch, 400 + fills, 25, fills)


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(4))
def test_many_random_programs(part, monkeypatch):
    search(monkeypatch, 410 + part, 200, part % 2 == 1)


# -- with the other transforms ---------------------------------------------------------------------


def linearized(f):
    """The derivative along x.cos() and along ones, by one linearization."""

    def both(x):
        _, jvp_fn = linearize(f, x)
        return jvp_fn(x.cos()) + jvp_fn(torch.ones_like(x))

    return both


def by_torch(f):
    def both(x):
        return pushed(f, (x,), (x.cos(),)) + pushed(f, (x,), (torch.ones_like(x),))

    return both


TF = torch.func
COMPOSITIONS = {
    "vmap": lambda lib, g: lib.vmap(g)(torch.stack([X, T])),
    "grad": lambda lib, g: lib.grad(lambda x: g(x).sin().sum())(X),
    "jacrev": lambda lib, g: lib.jacrev(g)(X),
    "jacfwd": lambda lib, g: lib.jacfwd(g)(X),
    "vmap(grad)": lambda lib, g: lib.vmap(lib.grad(lambda x: g(x).sum()))(torch.stack([X, T])),
    "hessian": lambda lib, g: lib.hessian(lambda x: g(x).sum())(X),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_inside(name):
    torch.testing.assert_close(
        COMPOSITIONS[name](lamina, linearized(f)), COMPOSITIONS[name](TF, by_torch(f))
    )


INNER = {
    "grad": lambda lib: lib.grad(lambda x: f(x).sum()),
    "vmap": lambda lib: lambda x: lib.vmap(lambda a, b: a * b.sin())(x, x.cos()),
    "jvp": lambda lib: lambda x: lib.jvp(f, (x,), (x.sin(),))[1],
    "vmap(grad)": lambda lib: lambda x: lib.vmap(lib.grad(lambda a: a.sin() * a))(x),
    "jacrev": lambda lib: lib.jacrev(f),
}


@pytest.mark.parametrize("name", INNER)
def test_of(name):
    _, jvp_fn = linearize(INNER[name](lamina), X)
    torch.testing.assert_close(jvp_fn(T), pushed(INNER[name](TF), (X,), (T,)))


def test_of_itself():
    _, jvp_fn = linearize(linearized(f), X)
    torch.testing.assert_close(jvp_fn(T), pushed(by_torch(f), (X,), (T,)))


def test_the_derivative_is_a_function_like_any_other():
    _, jvp_fn = linearize(f, X)
    jacobian = torch.func.jacrev(f)(X)
    torch.testing.assert_close(vmap(jvp_fn, out_dims=1)(torch.eye(3, dtype=DOUBLE)), jacobian)
    torch.testing.assert_close(jacrev(jvp_fn)(T), jacobian)
    torch.testing.assert_close(jacfwd(jvp_fn)(T), jacobian)
    torch.testing.assert_close(jvp(jvp_fn, (X,), (T,))[1], jacobian @ T)
    torch.testing.assert_close(vjp(jvp_fn, X)[1](T[:2])[0], jacobian.T @ T[:2])
    assert not hessian(lambda t: jvp_fn(t).sum())(T).any()


def test_the_gradient_reaches_what_the_function_captured():
    w = torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE, requires_grad=True)
    _, jvp_fn = linearize(lambda x: (nn.functional.linear(x, torch.outer(w, w)) * x).sum(), X)
    (actual,) = torch.autograd.grad(jvp_fn(T), w)
    plain = (nn.functional.linear(T, torch.outer(w, w)) * X).sum() + (
        nn.functional.linear(X, torch.outer(w, w)) * T
    ).sum()
    torch.testing.assert_close(actual, torch.autograd.grad(plain, w)[0])


def test_a_module_with_its_parameters_as_arguments():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in params.items()}

    def run(params):
        return functional_call(model, params, (X,))

    _, jvp_fn = linearize(run, params)
    torch.testing.assert_close(jvp_fn(tangents), pushed(run, (params,), (tangents,)))


# -- writes ----------------------------------------------------------------------------------------


def test_writes_inside_the_function():
    def g(x):
        out = torch.zeros(4, dtype=DOUBLE)
        out[1:] = x * x
        out[0] = out[2]
        out[1:3].mul_(x[1:])
        return out

    _, jvp_fn = linearize(g, X)
    torch.testing.assert_close(jvp_fn(T), torch.autograd.functional.jvp(g, X, T)[1])


def test_a_write_to_the_argument_reaches_the_caller_and_not_the_derivative():
    x = X.clone()
    _, jvp_fn = linearize(lambda x: x.sin() * x.mul_(2), x)
    torch.testing.assert_close(x, 2 * X)
    torch.testing.assert_close(jvp_fn(T), X.cos() * T * 2 * X + X.sin() * 2 * T)


def test_a_later_write_to_what_the_derivative_needs():
    w = X.clone()
    _, jvp_fn = linearize(lambda x: (x * w).sin(), X)
    jvp_fn(T)
    w.add_(1)
    assert_expected_inline(
        said(MutationError, lambda: jvp_fn(T)),
        """\
a tensor that linearize has kept for aten.mul.Tensor was written to in place
  it has the shape [3]
  to fix: write to a clone of it""",
    )


@pytest.mark.parametrize("view", [False, True])
def test_a_later_write_at_the_level_of_another_transform(view):
    def g(x):
        base = x * 1
        point = base[:] if view else base
        _, jvp_fn = linearize(lambda y: y * y, point)
        base.add_(1)
        return jvp_fn(T).sum()

    with pytest.raises(MutationError, match="was written to in place"):
        grad(g)(X)


# -- functions with rules of their own -------------------------------------------------------------


class Cube(Function):
    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx, ct):
        (x,) = ctx.saved_tensors
        return 3 * Twice.apply(x * x * ct) / 2

    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return 3 * Twice.apply(x * x * t) / 2


class Twice(Function):
    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, ct):
        return 2 * ct


class CubeByBackward(Cube):
    jvp = Function.jvp


@pytest.mark.parametrize("cube", [Cube, CubeByBackward])
def test_a_function_whose_rule_applies_another(cube):
    _, jvp_fn = linearize(lambda x: cube.apply(x.sin()), X)
    wanted = pushed(lambda x: x.sin() ** 3, (X,), (T,))
    torch.testing.assert_close(jvp_fn(T), wanted)
    torch.testing.assert_close(jacrev(jvp_fn)(T) @ T, wanted)


def a_function(rule):
    """The identity, with a rule for tangents."""

    class Identity(Function):
        @staticmethod
        def forward(x):
            return x * 1

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def jvp(ctx, t):
            return rule(t)

    return Identity.apply


def test_a_rule_that_looks_at_its_tangent():
    identity = a_function(lambda t: t if t.sum() > 0 else -t)
    assert_expected_inline(
        said(NotLinearError, lambda: linearize(identity, X)),
        """\
linearize met aten.is_nonzero.default, which is not linear in the tangents
  while interpreting at level 1: linearize
  it asks for a Python value, which is not known yet
  to fix: use linear ops of the tangents alone""",
    )


def test_a_rule_that_draws():
    identity = a_function(lambda t: nn.functional.dropout(t, 0.5, training=True))
    with pytest.raises(NotLinearError, match="it draws random numbers"):
        linearize(identity, X)


def test_a_rule_that_keeps_its_tangent():
    kept = []
    identity = a_function(lambda t: kept.append(t) or t)
    _, jvp_fn = linearize(identity, X)
    torch.testing.assert_close(jvp_fn(T), T)
    assert_expected_inline(
        said(EscapedTensorError, lambda: kept[0] + 1),
        """\
a tangent of shape [3] is used after its transform has returned
  escaped from level 1: linearize
  to fix: do not store tangents in the rules of an autograd.Function""",
    )


# -- arguments that do not fit ---------------------------------------------------------------------


def test_nothing_to_differentiate():
    assert_expected_inline(
        said(NotDifferentiableError, lambda: linearize(f, torch.arange(3))),
        """\
linearize has nothing to differentiate: no floating-point or complex tensor
  primals[0]: torch.int64 tensor of shape [3]
  to fix: pass a tensor converted with .float()""",
    )


def test_tangents_of_another_structure():
    _, jvp_fn = linearize(f, X)
    assert_expected_inline(
        said(TangentError, lambda: jvp_fn(T, T)),
        """\
the structure of tangents is not that of primals
  primals: (*,)
  tangents: (*, *)
  to fix: pass one entry of tangents for each leaf of primals, None for zero""",
    )


def test_a_tangent_of_another_shape():
    _, jvp_fn = linearize(f, X)
    assert_expected_inline(
        said(TangentError, lambda: jvp_fn(T[:2])),
        """\
tangents[0] does not match primals[0]
  primals[0]: torch.float64 tensor of shape [3]
  tangents[0]: torch.float64 tensor of shape [2]
  to fix: pass a tensor of the same shape and dtype, or None for zero""",
    )


def test_the_level_is_left_when_the_function_raises():
    def broken(x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        linearize(broken, X)
    assert lamina.debug.stack_text() == "level 0: plain PyTorch"


@pytest.mark.parametrize(
    "f", [torch.sign, torch.round, torch.floor, torch.detach, lambda x: torch.fill(x, 1.0)]
)
@pytest.mark.parametrize("followed", [True, False])
def test_a_function_without_slope(f, followed):
    x = torch.tensor([0.5, -1.25]).requires_grad_(followed)
    assert torch.equal(linearize(f, x)[1](torch.ones(2)) + 1, torch.ones(2))
