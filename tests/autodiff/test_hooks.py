"""Hooks of tensors and modules fire under transforms, once a pass, with values of their level."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lamina import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from lamina_core.errors import NotDifferentiableError

X = torch.tensor([0.3, 1.1, -0.7], dtype=torch.float64)


def hooked(x, hook=lambda g: g * 10):
    y = x * 2
    y.register_hook(hook)
    return (y * y).sum()


def by_autograd(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


def test_a_hook_changes_the_gradient():
    torch.testing.assert_close(grad(hooked)(X), by_autograd(hooked, X))
    torch.testing.assert_close(vjp(hooked, X)[1](torch.ones((), dtype=X.dtype))[0], 80 * X)


def test_under_vmap_it_sees_one_example():
    seen = []

    def see(g):
        seen.append((tuple(g.shape), g.dim()))
        return g * 10

    batch = torch.stack([X, 2 * X])
    torch.testing.assert_close(vmap(grad(lambda x: hooked(x, see)))(batch), 80 * batch)
    torch.testing.assert_close(
        grad(lambda b: vmap(lambda x: hooked(x, see))(b).sum())(batch), 80 * batch
    )
    leaf = batch.clone().requires_grad_()
    vmap(lambda x: hooked(x, see), in_dims=1)(leaf.mT.contiguous()).sum().backward()
    torch.testing.assert_close(leaf.grad, 80 * batch)
    assert seen == [((3,), 1)] * 3


def test_a_hook_of_an_input_gets_the_whole_gradient_once():
    seen = []

    def f(x):
        x.register_hook(lambda g: seen.append(g.clone()))
        return (x * x).sum() + x.sin().sum()

    expected = 2 * X + X.cos()
    torch.testing.assert_close(grad(f)(X), expected)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected)


def test_several_hooks_run_in_order_and_can_be_removed():
    def f(x):
        y = x * 1
        first = y.register_hook(lambda g: g + 1)
        y.register_hook(lambda g: g * 3)
        y.register_hook(lambda g: None)
        gone = y.register_hook(lambda g: g * 100)
        gone.remove()
        with first:
            pass  # a handle removes its hook at the end of a block
        return y.sum()

    torch.testing.assert_close(grad(f)(X), torch.full_like(X, 3.0))


def test_a_hook_is_differentiated():
    def f(x):
        y = x * x
        y.register_hook(lambda g: g * g)
        return (y * y).sum()

    # d/dx of (2 y)^2 2 x = 8 x^5
    torch.testing.assert_close(grad(f)(X), 8 * X**5)
    torch.testing.assert_close(torch.diag(hessian(f)(X)), 40 * X**4)
    torch.testing.assert_close(jvp(grad(f), (X,), (X,))[1], 40 * X**5)
    torch.testing.assert_close(grad(lambda x: grad(f)(x).sum())(X), 40 * X**4)


def test_hooks_fire_once_a_pass():
    calls = []
    _, pull = vjp(lambda x: hooked(x, lambda g: calls.append(1)), X)
    one = torch.ones((), dtype=X.dtype)
    pull(one)
    pull(one)
    assert len(calls) == 2
    jacrev(lambda x: hooked(x, lambda g: calls.append(1)))(X)
    assert len(calls) == 3


def test_hooks_meet_checkpoints_and_writes():
    def f(x):
        y = x * 2
        y.register_hook(lambda g: g * 10)
        y.mul_(x)  # the hook is of what y was
        return checkpoint(torch.sin, y, use_reentrant=False).sum()

    def plain(x):
        y = x * 2
        y.register_hook(lambda g: g * 10)
        return (y * x).sin().sum()

    torch.testing.assert_close(grad(f)(X), by_autograd(plain, X))


def test_a_hook_of_a_captured_parameter_is_autograds_own():
    w = torch.ones(3, dtype=X.dtype, requires_grad=True)

    def f(x):
        y = x * w
        y.register_hook(lambda g: g * 10)
        return y.sum()

    vmap(f)(torch.stack([X, X])).sum().backward()
    torch.testing.assert_close(w.grad, 20 * X)


def test_a_tensor_that_nothing_follows_takes_no_hook():
    with pytest.raises(NotDifferentiableError, match="doesn't require gradient"):
        vmap(lambda x: x.register_hook(lambda g: g))(X)
    with pytest.raises(RuntimeError, match="doesn't require gradient"):
        grad(lambda x: (torch.ones(3).register_hook(lambda g: g), x.sum())[1])(X)


def test_an_error_in_a_hook_reaches_the_caller():
    def fail(g):
        raise ValueError("from a hook")

    with pytest.raises(ValueError, match="from a hook"):
        vmap(grad(lambda x: hooked(x, fail)))(torch.stack([X, X]))
    torch.testing.assert_close(grad(hooked)(X), 80 * X)


def network(*hooks):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    for register in hooks:
        register(net[1])
    return net


HOOKS = {
    "full backward": lambda m: m.register_full_backward_hook(lambda m, gi, go: (10 * gi[0],)),
    "full backward pre": lambda m: m.register_full_backward_pre_hook(lambda m, go: (3 * go[0],)),
    "forward": lambda m: m.register_forward_hook(lambda m, args, out: out * 2),
    "forward pre": lambda m: m.register_forward_pre_hook(lambda m, args: (args[0] + 1,)),
}


@pytest.mark.parametrize("names", [[name] for name in HOOKS] + [list(HOOKS)], ids="+".join)
def test_hooks_of_modules(names):
    net = network(*[HOOKS[name] for name in names])
    params = {name: p.detach() for name, p in net.named_parameters()}
    batch = torch.stack([X, 2 * X, -X])

    def loss(params, x):
        return functional_call(net, params, (x,)).sum()

    expected = torch.autograd.grad(net(batch).sum(), list(net.parameters()))
    each = vmap(grad(loss), (None, 0))(params, batch)
    together = grad(lambda p: vmap(loss, (None, 0))(p, batch).sum())(params)
    whole = grad(loss)(params, batch)
    net.zero_grad()
    vmap(net)(batch).sum().backward()
    for (name, p), wanted in zip(net.named_parameters(), expected, strict=True):
        torch.testing.assert_close(each[name].sum(0), wanted)
        torch.testing.assert_close(together[name], wanted)
        torch.testing.assert_close(whole[name], wanted)
        torch.testing.assert_close(p.grad, wanted)
