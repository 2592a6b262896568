"""Saved-tensor hooks and ops whose formula is borrowed: hooks get what the formula saves."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from benchmarks.harness import peak_memory
from lamina import grad, hessian, jvp, saved_residuals, vjp, vmap
from lamina.autodiff.reverse import state_of

DOUBLE = torch.float64
aten = torch.ops.aten
LINKS, BLOCKS = 4, 6


def block(x):
    """Each link saves both operands of a product; the scale keeps values in range."""
    for _ in range(LINKS):
        x = torch.linalg.cross(x, x.roll(1, -1)) * 0.5 + 0.3
    return x


def stack(call, x):
    for _ in range(BLOCKS):
        x = call(block, x)
    return x.square().sum()


def directly(f, x):
    return f(x)


def again(f, x):
    return checkpoint(f, x, use_reentrant=False)


def by_numpy(f, x):
    with saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy):
        return f(x)


TRANSFORMS = {
    "grad": lambda f, x: grad(f)(x),
    "vmap(grad)": lambda f, x: vmap(grad(f))(x),
    "grad(vmap)": lambda f, x: grad(lambda x: vmap(f)(x).sum())(x),
    "grad(grad)": lambda f, x: grad(lambda x: grad(f)(x).sin().sum())(x),
    "jvp(grad)": lambda f, x: jvp(grad(f), (x,), (x.cos(),))[1],
    "vmap(grad(grad))": lambda f, x: vmap(grad(lambda x: grad(f)(x).sin().sum()))(x),
}


def test_the_op_of_these_tests_is_borrowed():
    assert state_of(aten.linalg_cross.default) == "generic"


@pytest.mark.parametrize("call", [again, by_numpy])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_same_result(transform, call):
    x = torch.linspace(-0.5, 1, 12, dtype=DOUBLE).reshape(4, 3)
    run = TRANSFORMS[transform]
    found, expected = (run(lambda x, c=c: stack(c, x), x) for c in (call, directly))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transform", ["grad", "vmap(grad)"])
def test_checkpointing_frees_what_the_formulas_keep(transform):
    x = torch.linspace(-0.5, 1, 3 * 2**14).reshape(16, -1, 3)
    run = TRANSFORMS[transform]
    whole, less = (
        peak_memory(lambda c=c: run(lambda x: stack(c, x), x)) for c in (directly, again)
    )
    leaf = x.clone().requires_grad_()
    plain = peak_memory(lambda: torch.autograd.grad(stack(again, leaf), leaf))
    # Two tensors a link without checkpoints; with them one a block, and the links of one block.
    assert whole > 2 * LINKS * BLOCKS * x.nbytes
    assert less < (BLOCKS + 2 * LINKS + 6) * x.nbytes
    assert less <= plain + 2**12


@pytest.mark.parametrize("order", [1, 2])
def test_nothing_is_held_that_hooks_have_packed(order):
    packed = []

    def pack(tensor):
        packed.append(tensor.numpy().copy())
        return len(packed) - 1

    def unpack(place):
        return torch.from_numpy(packed[place].copy())

    f = block if order == 1 else grad(lambda x: block(x).sin().sum())
    x = torch.linspace(-0.5, 1, 3 * 2**12, dtype=DOUBLE).reshape(-1, 3)

    def held():
        with saved_tensors_hooks(pack, unpack):
            return vjp(f, x)

    held()
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        out, pullback = held()
    events = profiler.profiler.kineto_results.events()
    alive = sum(e.nbytes() for e in events if e.name() == "[memory]")
    assert alive <= x.nbytes + 2**12  # the output
    torch.testing.assert_close(pullback(out), vjp(f, x)[1](out))
    torch.testing.assert_close(pullback(x), vjp(f, x)[1](x))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", ["dense", "transposed", "sliced", "expanded", "windows"])
def test_hooks_that_change_the_layout(form, transposed):
    """The formula of det asks whether the matrix was contiguous, as plain PyTorch's does."""
    base = torch.linspace(0, 3, 42, dtype=DOUBLE).sin()
    x = {
        "dense": base[:16].reshape(4, 4),
        "transposed": base[:16].reshape(4, 4).mT,
        "sliced": base[:40].reshape(4, 10)[:, 3:7],
        "expanded": base[:16].reshape(4, 4).expand(2, 4, 4),
        "windows": base.square().unfold(0, 4, 2)[:4],
    }[form]

    def f(x):
        x = x.mT if transposed else x
        return torch.linalg.det(x).sum()

    leaf = x.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf), leaf)
    torch.testing.assert_close(grad(lambda x: by_numpy(f, x))(x), expected)
    second = hessian(lambda x: by_numpy(f, x))(x)
    torch.testing.assert_close(second, torch.func.hessian(f)(leaf.detach()))


def test_random_ops_are_not_drawn_again():
    def f(x):
        return torch.nn.functional.rrelu(x, 0.1, 0.9, training=True)

    x = -torch.ones(64, dtype=DOUBLE)
    out, pullback = vjp(lambda x: again(f, x), x)
    torch.testing.assert_close(pullback(torch.ones_like(x))[0], -out)
    out, pullback = vjp(lambda x: by_numpy(f, x), x)
    torch.testing.assert_close(pullback(torch.ones_like(x))[0], -out)


@pytest.fixture
def cubed():
    """An op from outside PyTorch, whose formula keeps a tensor where no hook is asked."""

    def forward(x):
        return x**3

    def keep(ctx, inputs, output):
        ctx.x = inputs[0]

    with torch.library._scoped_library("lamina_test_saved", "FRAGMENT") as library:
        library.define("cubed(Tensor x) -> Tensor")
        library.impl("cubed", forward, "CompositeExplicitAutograd")
        torch.library.register_autograd(
            "lamina_test_saved::cubed",
            lambda ctx, ct: 3 * ctx.x**2 * ct,
            setup_context=keep,
            lib=library,
        )
        yield torch.ops.lamina_test_saved.cubed


@pytest.mark.parametrize("call", [again, by_numpy])
def test_ops_from_outside_keep_their_graph(cubed, call):
    x = torch.linspace(-1, 1, 5, dtype=DOUBLE)
    found = hessian(lambda x: call(cubed, x).sum())(x)
    torch.testing.assert_close(found, torch.diag(6 * x))


def test_residuals_are_listed_under_hooks():
    x = torch.linspace(-1, 1, 9).reshape(3, 3)
    with saved_tensors_hooks(lambda t: t * 1, lambda t: t):
        found = saved_residuals(lambda x: torch.linalg.cross(x.sin(), x.cos()).sum(), x)
    assert {residual.why for residual in found} == {"held by saved-tensor hooks"}
