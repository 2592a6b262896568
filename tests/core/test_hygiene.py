"""Whatever happens in the user's function, a transform leaves PyTorch's state as it found it."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lamina import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap


def state():
    """All of PyTorch's thread-local state that a transform could disturb, comparable with ==."""
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "excluded keys": str(torch._C._dispatch_tls_local_exclude_set()),
        "included keys": str(torch._C._dispatch_tls_local_include_set()),
        "dispatch modes": [id(mode) for mode in _get_current_dispatch_mode_stack()],
        "function modes": torch._C._len_torch_function_stack(),
        "torch function": torch._C._is_torch_function_enabled(),
        "random state": torch.get_rng_state().tolist(),
        "forward mode level": torch.autograd.forward_ad._current_level,
    }


X = torch.tensor([0.3, 1.1, -0.7], dtype=torch.float64)

# Each calls its argument inside a transform or a nest of them.
NESTS = {
    "vmap": lambda f: vmap(f)(X),
    "grad": lambda f: grad(lambda x: f(x).sum())(X),
    "vjp": lambda f: vjp(f, X),
    "jvp": lambda f: jvp(f, (X,), (X,)),
    "jacrev": lambda f: jacrev(f)(X),
    "jacfwd": lambda f: jacfwd(f)(X),
    "hessian": lambda f: hessian(lambda x: f(x).sum())(X),
    "vmap(vmap)": lambda f: vmap(vmap(f))(X.repeat(2, 1)),
    "vmap(grad)": lambda f: vmap(grad(lambda x: f(x).sum()))(X),
    "grad(vmap)": lambda f: grad(lambda x: vmap(f)(x).sum())(X),
    "jvp(grad)": lambda f: jvp(grad(lambda x: f(x).sum()), (X,), (X,)),
    "grad(grad)": lambda f: grad(lambda x: grad(lambda y: f(y).sum())(x).sum())(X),
    "vmap(jacfwd(jacrev))": lambda f: vmap(jacfwd(jacrev(f)))(X),
}


class Stop(Exception):
    """Raised by the user's function."""


def raiser(error):
    def f(x):
        y = x.sin() * 2
        y.add_(x)
        raise error

    return f


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, SystemExit, RuntimeError])
@pytest.mark.parametrize("nest", NESTS)
def test_an_exception_leaves_no_trace(nest, error):
    before = state()
    with pytest.raises(error):
        NESTS[nest](raiser(error))
    assert state() == before
    torch.testing.assert_close(grad(lambda x: x.sin().sum())(X), X.cos())


@pytest.mark.parametrize("nest", NESTS)
def test_an_error_of_pytorch_leaves_no_trace(nest):
    before = state()
    with pytest.raises(RuntimeError):
        NESTS[nest](lambda x: (x.sin() * 2).reshape(7, 5, 2))
    assert state() == before


@pytest.mark.parametrize("nest", NESTS)
def test_success_leaves_no_trace(nest):
    before = state()
    NESTS[nest](lambda x: x.sin() * x)
    assert state() == before


@pytest.mark.parametrize("nest", NESTS)
def test_an_exception_caught_between_levels_leaves_the_outer_level_working(nest):
    def outer(x):
        y = x.sin()
        with pytest.raises(Stop):
            NESTS[nest](raiser(Stop))
        return (y * x).sum()

    before = state()
    torch.testing.assert_close(grad(outer)(X), X.cos() * X + X.sin())
    torch.testing.assert_close(vmap(outer)(X), X.sin() * X)
    torch.testing.assert_close(jvp(outer, (X,), (torch.ones_like(X),))[1], grad(outer)(X).sum())
    assert state() == before


def test_an_exception_in_a_pullback_leaves_no_trace():
    out, pullback = vjp(torch.sin, X)
    before = state()
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        pullback(torch.ones(5, 4, dtype=torch.float64))
    assert state() == before
    torch.testing.assert_close(pullback(torch.ones_like(out))[0], X.cos())


def test_an_exception_while_a_generator_is_suspended():
    def rows(x):
        for i in range(3):
            yield x[i].sin()
            if i == 1:
                raise Stop

    before = state()
    with pytest.raises(Stop):
        grad(lambda x: torch.stack(list(rows(x))).sum())(X)
    assert state() == before


@pytest.mark.parametrize("enabled", [True, False])
def test_the_callers_grad_mode_is_kept(enabled):
    with torch.set_grad_enabled(enabled):
        torch.testing.assert_close(grad(lambda x: x.sin().sum())(X), X.cos())
        torch.testing.assert_close(vmap(grad(torch.sin))(X), X.cos())
        assert torch.is_grad_enabled() == enabled
    assert torch.is_grad_enabled()


def test_a_grad_mode_left_changed_by_the_function_is_undone():
    def f(x):
        torch.set_grad_enabled(False)
        return x.sum()

    try:
        grad(f)(X)
        assert torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


def test_the_state_inside_is_the_users_own():
    seen = []

    def f(x):
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return x.sum()

    grad(f)(X)
    vmap(f)(X)
    assert seen == [(True, False)] * 2


def test_inference_mode():
    with torch.inference_mode():
        torch.testing.assert_close(grad(lambda x: x.sin().sum())(X), X.cos())
        torch.testing.assert_close(vmap(torch.sin)(X), X.sin())


def compute():
    """One of each kind of transform, with an answer to compare; a check fails by raising."""
    weight = torch.randn(3, 3, dtype=torch.float64)

    def f(x):
        return torch.tanh(weight @ x).square().sum()

    xs = torch.randn(4, 3, dtype=torch.float64)
    expected = torch.autograd.functional.jacobian(lambda xs: vector_of(f, xs).sum(), xs)
    torch.testing.assert_close(vmap(grad(f))(xs), expected)
    expected = torch.autograd.functional.hessian(f, xs[0])
    torch.testing.assert_close(hessian(f)(xs[0]), expected)
    torch.testing.assert_close(jvp(f, (xs[0],), (xs[1],))[1], grad(f)(xs[0]) @ xs[1])


def vector_of(f, xs):
    return torch.stack([f(x) for x in xs])


def run_threads(*targets):
    errors, states = [], []

    def guarded(target):
        before = state()
        try:
            target()
        except BaseException as error:  # handed to the main thread
            errors.append(error)
        after = state()
        # These two belong to the process, so other threads move them too.
        shared = {"random state", "forward mode level"}
        states.append(all(before[k] == after[k] for k in before.keys() - shared))

    threads = [threading.Thread(target=guarded, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(states)
    return errors


def test_four_threads_at_once():
    def repeatedly():
        for _ in range(8):
            compute()

    assert run_threads(*[repeatedly] * 4) == []


def test_threads_after_an_exception_on_another():
    def failing():
        for nest in NESTS.values():
            with pytest.raises(Stop):
                nest(raiser(Stop))
        raise Stop

    errors = run_threads(failing, compute, failing, compute)
    assert [type(error) for error in errors] == [Stop, Stop]
    assert run_threads(compute, compute) == []
    compute()


def test_a_level_belongs_to_its_thread():
    """A thread started inside a transform begins at level 0: plain PyTorch."""
    results = []

    def f(x):
        errors = run_threads(lambda: results.append(X.sin().sum().item()), compute)
        assert errors == []
        return x.sin().sum()

    torch.testing.assert_close(grad(f)(X), X.cos())
    assert results == [X.sin().sum().item()]
