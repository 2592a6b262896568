"""Saved-tensor hooks and checkpointing: the same gradients, less memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.autograd import Function
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lamina import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from lamina.autodiff import saved
from lamina_core.wrapper import plain_of

DOUBLE = torch.float64


def inputs():
    return torch.linspace(-1.1, 1.3, 12, dtype=DOUBLE).reshape(3, 4) + 0.05


XS = inputs()
X = XS[0]
W = torch.linspace(-1, 1, 16, dtype=DOUBLE).reshape(4, 4).sin() + torch.eye(4, dtype=DOUBLE)


class Cube(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, ct):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * ct


def body(x, w):
    """Ops with a rule of each kind, a borrowed one, one that writes, and a Function."""
    for _ in range(2):
        x = torch.tanh(w @ x) * x.sin()
    y = torch.nn.functional.softplus(x)
    y.mul_(2)
    return torch.special.erfcx(y) * torch.linalg.det(w + x) + Cube.apply(y)


def checkpointed(x, w):
    return checkpoint(body, x, w, use_reentrant=False)


def reentrant(x, w):
    return checkpoint(lambda x, w: body(x, w) * 1, x, w, use_reentrant=True)


def without_early_stop(x, w):
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        return checkpoint(body, x, w, use_reentrant=False)


def nested(x, w):
    return checkpoint(
        lambda x: checkpoint(body, x * 1, w, use_reentrant=False) * 2, x, use_reentrant=False
    ).div(2)


def closed_over(x, w):
    return checkpoint(lambda x: body(x, w), x, use_reentrant=False)


def on_the_cpu(x, w):
    with save_on_cpu():
        return body(x, w)


def as_numpy(x, w):
    pair = saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy)
    with pair:
        return body(x, w)


WAYS = [checkpointed, reentrant, without_early_stop, nested, closed_over, on_the_cpu, as_numpy]
TRANSFORMS = {
    "vmap": lambda f: vmap(f, (0, None))(XS, W),
    "grad": lambda f: grad(lambda w: f(X, w).sum())(W),
    "vjp": lambda f: vjp(f, X, W)[1](X),
    "vjp twice": lambda f: [vjp_fn(X) for vjp_fn in [vjp(f, X, W)[1]] * 2],
    "jvp": lambda f: jvp(f, (X, W), (X, W)),
    "jacrev": lambda f: jacrev(f)(X, W),
    "vmap(grad)": lambda f: vmap(grad(lambda x: f(x, W).sum()))(XS),
    "grad(vmap)": lambda f: grad(lambda w: vmap(f, (0, None))(XS, w).sum())(W),
    "grad(grad)": lambda f: grad(lambda w: grad(lambda x: f(x, w).sum())(X).sin().sum())(W),
    "hessian": lambda f: hessian(lambda x: f(x, W).sum())(X),
    "grad(jvp)": lambda f: grad(lambda x: jvp(lambda x: f(x, W), (x,), (X,))[1].sum())(X),
    "vmap(hessian)": lambda f: vmap(hessian(lambda x: f(x, W).sum()))(XS),
    "f(f)": lambda f: grad(lambda x: f(f(x, W).tanh(), W).sum())(X),
    "grad in between": lambda f: grad(
        lambda x: f(grad(lambda y: f(y, W).sin().sum())(x).tanh(), W).sum()
    )(X),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("way", WAYS)
def test_the_same_result(way, transform):
    run = TRANSFORMS[transform]
    torch.testing.assert_close(run(way), run(body))
    assert saved.active == 0


@pytest.mark.parametrize("way", [checkpointed, on_the_cpu, as_numpy])
def test_under_the_users_autograd(way):
    found = []
    for f in (way, body):
        x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
        first = grad(lambda x, w=w, f=f: f(x, w).sum())(x)
        found.append((first.detach(), *torch.autograd.grad(first.sin().sum(), (x, w))))
    torch.testing.assert_close(*found)


def test_grad_inside_a_checkpointed_function():
    def f(x):
        slope = grad(lambda y: (y * x).sin().sum())(x.cos())
        return slope.exp() * x

    expected = grad(lambda x: f(x).sum())(X)
    found = grad(lambda x: checkpoint(f, x, use_reentrant=False).sum())(X)
    torch.testing.assert_close(found, expected)
    leaf = X.clone().requires_grad_()
    checkpoint(f, leaf, use_reentrant=False).sum().backward()
    torch.testing.assert_close(leaf.grad, expected)


def test_a_reentrant_checkpoint_outside_of_transforms_is_pytorchs_own():
    leaf = X.clone().requires_grad_()
    out = checkpoint(torch.sin, leaf, use_reentrant=True)
    assert type(out.grad_fn).__name__ == "CheckpointFunctionBackward"
    out.sum().backward()
    torch.testing.assert_close(leaf.grad, X.cos())


def test_dropout_draws_the_same_numbers_again():
    def f(x):
        return torch.nn.functional.dropout(x.sin(), 0.5) * x

    x = torch.ones(64, dtype=DOUBLE)
    out, pullback = vjp(lambda x: checkpoint(f, x, use_reentrant=False), x)
    (x_ct,) = pullback(torch.ones_like(x))
    kept = out != 0
    torch.testing.assert_close(x_ct, kept * 2 * (x.cos() * x + x.sin()))


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()) for _ in range(3)]
    return torch.nn.Sequential(*layers).double()


def test_per_sample_gradients_of_checkpointed_modules(blocks):
    params = [{k: v.detach() for k, v in block.named_parameters()} for block in blocks]

    def loss(params, x, run):
        for block, own in zip(blocks, params, strict=True):
            x = run(lambda own, x, block=block: functional_call(block, own, (x,)), own, x)
        return x.square().sum()

    plain = lambda f, *args: f(*args)
    again = lambda f, *args: checkpoint(f, *args, use_reentrant=False)
    found = vmap(grad(lambda params, x: loss(params, x, again)), (None, 0))(params, XS)
    expected = vmap(grad(lambda params, x: loss(params, x, plain)), (None, 0))(params, XS)
    torch.testing.assert_close(found, expected)


class Deep(torch.nn.Module):
    """Runs its blocks, under a checkpoint or not."""

    def __init__(self, blocks, run):
        super().__init__()
        self.blocks, self.run = blocks, run

    def forward(self, x):
        return self.run(self.blocks, x)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_second_run_of_a_checkpoint_sees_the_tensors_of_functional_call(blocks, frozen):
    """Although the module holds its own again by then: which are others, and may be frozen."""
    blocks.requires_grad_(not frozen)
    again = Deep(blocks, lambda f, x: checkpoint(f, x, use_reentrant=False))
    plain = Deep(blocks, lambda f, x: f(x))
    params = {name: 2 * param.detach() for name, param in plain.named_parameters()}

    def gradients(model, params, x):
        return grad(lambda p, x: functional_call(model, p, (x,)).square().sum(), (0, 1))(params, x)

    close = torch.testing.assert_close
    close(gradients(again, params, X), gradients(plain, params, X))
    found, expected = (
        vmap(lambda p, x, m=m: gradients(m, p, x), (None, 0))(params, XS) for m in (again, plain)
    )
    close(found, expected)
    leaves = {name: param.clone().requires_grad_() for name, param in params.items()}
    found, expected = (
        torch.autograd.grad(functional_call(m, leaves, (X,)).sum(), list(leaves.values()))
        for m in (again, plain)
    )
    close(found, expected)


# ---------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------


class Watch:
    """Counts the activations that are alive, and the most there ever were."""

    def __init__(self):
        self.refs = []
        self.most = 0
        self.runs = 0

    def block(self, x):
        self.runs += 1
        for _ in range(10):
            x = x.exp().tanh()
            self.refs.append(weakref.ref(plain_of(x)))
            self.most = max(self.most, self.alive())
        return x

    def alive(self):
        return sum(ref() is not None for ref in self.refs)


LOSSES = {
    "grad": lambda f: grad(lambda x: f(x).sum())(X),
    "vjp": lambda f: vjp(f, X)[1](X),
    "vmap(grad)": lambda f: vmap(grad(lambda x: f(x).sum()))(XS),
}


@pytest.mark.parametrize("transform", LOSSES)
def test_checkpointing_lowers_the_peak(transform):
    def run(call):
        watch = Watch()

        def f(x):
            for _ in range(10):
                x = call(watch.block, x)
            return x

        gc.collect()
        gc.disable()
        try:
            result = LOSSES[transform](f)
        finally:
            gc.enable()
        return result, watch

    expected, plain = run(lambda block, x: block(x))
    found, less = run(lambda block, x: checkpoint(block, x, use_reentrant=False))
    torch.testing.assert_close(found, expected)
    assert plain.runs == 10
    assert less.runs == 20
    assert plain.most >= 100
    assert less.most <= 25


def test_packed_residuals_are_not_kept():
    watch = Watch()
    with saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy):
        _, pullback = vjp(watch.block, X)
    gc.collect()
    assert watch.alive() <= 1
    assert pullback(X)[0].shape == X.shape


@pytest.mark.parametrize("outer", [lambda f: f, vmap])
def test_a_pullback_does_not_keep_what_the_function_returned(outer):
    def f(x):
        out, pullback = vjp(lambda x: (x * 2, x.exp()), x)
        twice = weakref.ref(plain_of(out[0]))
        exp = weakref.ref(plain_of(out[1]))
        del out
        assert twice() is None
        assert exp() is not None  # a residual
        return pullback((x, None))[0]

    torch.testing.assert_close(outer(f)(XS), 2 * XS)


def test_a_pullback_does_not_keep_aux():
    out, pullback, aux = vjp(lambda x: (x * 2, x.sin()), X, has_aux=True)
    kept = weakref.ref(aux)
    del aux
    assert kept() is None
    torch.testing.assert_close(pullback(out)[0], 4 * X)


def test_hooks_see_plain_tensors_in_order():
    seen = []

    def pack(tensor):
        assert not torch.is_grad_enabled()
        seen.append((type(tensor), tuple(tensor.shape)))
        return len(seen), tensor

    def unpack(packed):
        seen.append(packed[0])
        return packed[1]

    with saved_tensors_hooks(pack, unpack):
        vmap(grad(lambda x: (x.sin() * x).sum()))(XS)
    plain = (torch.Tensor, (3, 4))
    assert seen == [plain, plain, plain, 2, 3, 1] or seen == [plain, plain, plain, 3, 2, 1]


def test_an_error_of_a_hook_leaves_no_trace():
    def fail(_):
        raise KeyError("stop")

    for pair in (saved_tensors_hooks(fail, fail), saved_tensors_hooks(lambda t: t, fail)):
        with pytest.raises(KeyError), pair:
            grad(lambda x: x.sin().sum())(X)
        assert saved.active == 0
        torch.testing.assert_close(grad(lambda x: x.sin().sum())(X), X.cos())


def test_a_function_that_saves_something_else_the_second_time():
    calls = []

    def f(x):
        calls.append(0)
        return x.sin() if len(calls) == 1 else x.sum().sin() * x

    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        grad(lambda x: checkpoint(f, x, use_reentrant=False).sum())(X)
    torch.testing.assert_close(grad(lambda x: x.sin().sum())(X), X.cos())
