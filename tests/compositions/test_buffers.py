"""Buffers made inside functions that run in unusual places."""

from __future__ import annotations

import pytest
import torch

import lamina

XS = torch.tensor([[0.3, -0.7, 1.1], [0.5, 0.2, -0.4]], dtype=torch.float64)


def _filled(v):
    buffer = torch.zeros(3, dtype=torch.float64)
    buffer.copy_(v)
    return buffer.sin()


def _mapped(v):
    custom = lamina.custom_vmap(_filled)
    custom.def_vmap(lambda size, in_batched, v: (lamina.vmap(_filled)(v), True))
    return custom(v)


class _Function(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(v):
        return _filled(v)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, ct):
        return ct * ctx.saved_tensors[0].cos()


FUNCTIONS = pytest.mark.parametrize(
    "function", [_filled, _mapped, _Function.apply], ids=["plain", "custom_vmap", "Function"]
)


@FUNCTIONS
def test_under_vmap_with_autograd_outside(function):
    xs = XS.clone().requires_grad_()
    lamina.vmap(function)(xs).sum().backward()
    torch.testing.assert_close(xs.grad, XS.cos())


@FUNCTIONS
@pytest.mark.parametrize("keeps", [False, True])
def test_in_a_checkpoint_with_a_policy(function, keeps):
    again = lamina.checkpoint(function, policy=lambda op, *args, **kwargs: keeps)
    torch.testing.assert_close(lamina.vmap(again)(XS), XS.sin())
    by_example = lamina.vmap(lamina.grad(lambda v: again(v).sum()))(XS)
    torch.testing.assert_close(by_example, XS.cos())
    together = lamina.grad(lambda xs: lamina.vmap(again)(xs).sum())(XS)
    torch.testing.assert_close(together, XS.cos())


@FUNCTIONS
def test_a_mode_of_the_users_sees_what_runs_at_the_bottom(function):
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    def watched(v):
        with Mode():
            return function(v)

    torch.testing.assert_close(lamina.grad(lambda v: watched(v).sum())(XS[0]), XS[0].cos())
    assert torch.ops.aten.sin.default in seen
