"""Writes to what a transform did not make.

The caller sees those to the input; a captured tensor takes no values of a transform.
"""

from __future__ import annotations

import pytest
import torch

from lamina import grad, jvp, vmap
from lamina_core.errors import MutationError

# ---------------------------------------------------------------------------------------------
# Writes to the input of a transform
# ---------------------------------------------------------------------------------------------


def fresh():
    return torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_caller_sees_a_write_under_vmap():
    xs = fresh()
    out = vmap(lambda x: x.add_(1).sin())(xs)
    torch.testing.assert_close(xs, fresh() + 1)
    torch.testing.assert_close(out, (fresh() + 1).sin())


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_the_caller_sees_a_write_through_a_view_under_vmap(dim):
    def f(x):
        x[1:2] = x[:1] * 2
        return x.sum()

    xs = fresh()
    expected = fresh()
    for example in expected.unbind(dim):
        example[1:2] = example[:1] * 2
    vmap(f, dim)(xs)
    torch.testing.assert_close(xs, expected)


def test_the_caller_sees_a_write_to_an_unmapped_argument():
    total, xs = torch.zeros(4, dtype=torch.float64), fresh()
    vmap(lambda total, x: (total.add_(1), x)[1], (None, 0))(total, xs)
    torch.testing.assert_close(total, torch.ones(4, dtype=torch.float64))


def test_the_caller_sees_a_write_under_grad():
    def f(x, count):
        count.add_(1)
        return (x * x).sum()

    x, count = fresh()[0], torch.zeros(())
    torch.testing.assert_close(grad(f)(x, count), 2 * x)
    assert count.item() == 1


def test_the_caller_sees_a_write_of_a_tracked_value_under_grad():
    def f(x, running):
        running.mul_(0.9).add_(x, alpha=0.1)
        return (x * x).sum()

    x, running = fresh()[0], fresh()[1]
    torch.testing.assert_close(grad(f)(x, running), 2 * x)
    torch.testing.assert_close(running, fresh()[1] * 0.9 + x * 0.1)
    assert not running.requires_grad


def test_the_caller_sees_a_write_to_what_is_differentiated():
    def f(x):
        x.mul_(2)
        return x.sin().sum()

    x = fresh()[0]
    torch.testing.assert_close(grad(f)(x), 2 * (2 * fresh()[0]).cos())
    torch.testing.assert_close(x, 2 * fresh()[0])


def test_the_caller_sees_a_write_under_jvp():
    def f(x):
        y = x.sin()
        x.mul_(2)
        return y * x

    x = fresh()[0]
    value, tangent = jvp(f, (x,), (torch.ones_like(x),))
    old = fresh()[0]
    torch.testing.assert_close(value, old.sin() * 2 * old)
    torch.testing.assert_close(tangent, old.cos() * 2 * old + old.sin() * 2)
    torch.testing.assert_close(x, 2 * old)


def test_the_caller_sees_a_write_under_vmap_of_grad():
    def f(x, running):
        running.add_(x)
        return (x * x).sum()

    xs, running = fresh(), torch.zeros(3, 4, dtype=torch.float64)
    torch.testing.assert_close(vmap(grad(f))(xs, running), 2 * xs)
    torch.testing.assert_close(running, xs)


def test_an_outer_level_sees_a_write_of_an_inner_one():
    def f(x):
        y = x.sin()
        vmap(lambda row: row.mul_(2))(y)
        return y.sum()

    xs = fresh()
    torch.testing.assert_close(grad(f)(xs), 2 * xs.cos())


# ---------------------------------------------------------------------------------------------
# Writes to captured tensors
# ---------------------------------------------------------------------------------------------

CAPTURED_WRITES = {
    "add_": lambda t, x: t.add_(x),
    "copy_": lambda t, x: t.copy_(x),
    "[...] =": lambda t, x: t.__setitem__(..., x),
    "[1] =": lambda t, x: t.__setitem__(1, x[1]),
    "view.mul_": lambda t, x: t[:2].mul_(x[:2]),
    "out=": lambda t, x: torch.sin(x, out=t),
    "index_add_": lambda t, x: t.index_add_(0, torch.tensor([0, 1, 2, 3]), x),
}


@pytest.mark.parametrize("write", CAPTURED_WRITES)
def test_a_batched_value_written_to_a_captured_tensor(write):
    captured = torch.ones(4, dtype=torch.float64)

    def f(x):
        CAPTURED_WRITES[write](captured, x)
        return x

    with pytest.raises(MutationError):
        vmap(f)(fresh())
    assert torch.equal(captured, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("write", CAPTURED_WRITES)
def test_a_tracked_value_written_to_a_captured_tensor(write):
    captured = torch.ones(4, dtype=torch.float64)

    def f(x):
        CAPTURED_WRITES[write](captured, x)
        return x.sum()

    with pytest.raises(MutationError):
        grad(f)(fresh()[0])
    assert torch.equal(captured, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("write", CAPTURED_WRITES)
def test_a_dual_value_written_to_a_captured_tensor(write):
    captured = torch.ones(4, dtype=torch.float64)

    def f(x):
        CAPTURED_WRITES[write](captured, x)
        return x.sum()

    with pytest.raises(MutationError):
        jvp(f, (fresh()[0],), (fresh()[1],))
    assert torch.equal(captured, torch.ones(4, dtype=torch.float64))


def test_an_inner_value_written_to_a_tensor_of_an_outer_level():
    def outer(x):
        y = x.sin()
        return vmap(lambda row: y.add_(row))(torch.ones(2, 4, dtype=torch.float64)).sum()

    with pytest.raises(MutationError):
        grad(outer)(fresh()[0])


def test_an_unbatched_value_written_to_a_captured_tensor():
    captured = torch.zeros(4)

    def f(x):
        captured.add_(1)
        return x + captured[0]

    out = vmap(f)(torch.zeros(3))
    torch.testing.assert_close(captured, torch.ones(4))
    torch.testing.assert_close(out, torch.ones(3))


def test_a_detached_value_written_to_a_captured_tensor():
    captured = torch.zeros(4, dtype=torch.float64)

    def f(x):
        captured.copy_(x.detach())
        return (x * x).sum()

    x = fresh()[0]
    torch.testing.assert_close(grad(f)(x), 2 * x)
    torch.testing.assert_close(captured, x)


def test_an_assignment_to_data_changes_the_value_alone():
    def f(x, shape=(2,)):
        y = x * 1
        y.data = torch.zeros(shape)
        return y.exp().sum()

    assert grad(f)(torch.ones(2)).tolist() == [1.0, 1.0]
    with pytest.raises(MutationError, match=r"an assignment to \.data"):
        grad(lambda x: f(x, (3,)))(torch.ones(2))
