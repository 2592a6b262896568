"""Methods of wrappers that skip C++ mean what the same methods of plain tensors mean."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lamina

X = torch.arange(2 * 3 * 4 * 5, dtype=torch.float64).reshape(2, 3, 4, 5).sin()

CALLS = {
    "index": lambda x: x[1],
    "index from the end": lambda x: x[-1],
    "index by a slice": lambda x: x[1:],
    "index by several": lambda x: x[:, 1, ..., None],
    "index by a mask": lambda x: torch.where(x > 0, x, 0)[torch.tensor([True, False, True])],
    "index by a tensor": lambda x: x[torch.tensor([2, 0])],
    "expand": lambda x: x.unsqueeze(1).expand(-1, 2, -1, -1),
    "expand to a size": lambda x: x.expand(torch.Size([2, 3, 4, 5])),
    "expand by name": lambda x: x.expand(size=(2, 3, 4, 5)),
    "permute": lambda x: x.permute(2, 0, 1),
    "permute by a tuple": lambda x: x.permute((-1, 0, 1)),
    "permute by name": lambda x: x.permute(dims=(2, 1, 0)),
    "reshape": lambda x: x.reshape(4, 15),
    "reshape by a list": lambda x: x.reshape([-1, 6]),
    "reshape by name": lambda x: x.reshape(shape=(6, 10)),
    "select": lambda x: x.select(1, -2),
    "select by name": lambda x: x.select(dim=2, index=3),
    "squeeze": lambda x: x.unsqueeze(0).squeeze(),
    "squeeze a dim": lambda x: x.unsqueeze(2).squeeze(2).squeeze(0),
    "squeeze dims": lambda x: x.unsqueeze(0).squeeze((0, 1)),
    "t": lambda x: x[0].t(),
    "transpose": lambda x: x.transpose(0, -1),
    "transpose by name": lambda x: x.transpose(dim0=1, dim1=0),
    "unsqueeze": lambda x: x.unsqueeze(-1),
    "view": lambda x: x.view(12, 5),
    "view by a size": lambda x: x.view(torch.Size([3, 20])),
}

LEVELS = {
    "vmap": lambda f: lamina.vmap(f)(X),
    "vmap(vmap)": lambda f: lamina.vmap(lamina.vmap(f))(X.expand(2, 2, 3, 4, 5))[1],
    "vjp": lambda f: torch.stack([lamina.vjp(f, x)[0] for x in X]),
    "jvp": lambda f: torch.stack([lamina.jvp(f, (x,), (x,))[0] for x in X]),
    "vmap(vjp)": lambda f: lamina.vmap(lambda x: lamina.vjp(f, x)[0])(X),
    "jvp(vmap)": lambda f: lamina.jvp(lamina.vmap(f), (X,), (X,))[0],
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", CALLS)
def test_a_method_means_what_it_means_outside(name, level):
    f = CALLS[name]
    torch.testing.assert_close(LEVELS[level](f), torch.stack([f(x) for x in X]))


def test_a_view_as_another_dtype():
    torch.testing.assert_close(lamina.vmap(lambda x: x.view(torch.int64))(X), X.view(torch.int64))


WRONG = {
    "index": (lambda x: x[7], IndexError),
    "permute": (lambda x: x.permute(0, 1), RuntimeError),
    "reshape": (lambda x: x.reshape(7, 7), RuntimeError),
    "select": (lambda x: x.select(3, 0), IndexError),
    "squeeze": (lambda x: x.squeeze(5), IndexError),
    "transpose": (lambda x: x.transpose(0, 9), IndexError),
    "unsqueeze": (lambda x: x.unsqueeze(-9), IndexError),
    "view": (lambda x: x.view(7), RuntimeError),
    "view by a float": (lambda x: x.view(1.5), TypeError),
}


@pytest.mark.parametrize("level", ["vmap", "vjp", "jvp"])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_raises_what_it_raises_outside(name, level):
    f, kind = WRONG[name]
    with pytest.raises(kind):
        f(X[0])
    with pytest.raises(kind):
        LEVELS[level](f)


class Seen(TorchDispatchMode):
    """A mode of the user's, which wants to see every op."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    """A mode of the user's, which wants to see every function of torch."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("level", ["vmap", "vjp", "jvp"])
def test_a_function_mode_inside_the_transform_sees_what_would_be_skipped(level):
    seen = []

    def f(x):
        with Called() as mode:
            out = (x.unsqueeze(0) * 2).sin()
        seen.append(mode.names)
        return out

    LEVELS[level](f)
    assert seen[0] == ["unsqueeze", "mul", "sin"]


@pytest.mark.parametrize("level", ["vmap", "vjp", "jvp"])
def test_a_mode_inside_the_transform_sees_what_would_be_skipped(level):
    seen = []

    def f(x):
        with Seen() as mode:
            out = -x[0]
        seen.extend(mode.names)
        return out

    LEVELS[level](f)
    assert seen[:2] == ["aten.select.int", "aten.neg.default"]


@pytest.mark.parametrize("name", ["expand", "permute", "reshape", "view"])
@pytest.mark.parametrize("level", ["vmap", "vjp", "jvp"])
def test_no_sizes_are_no_call(name, level):
    with pytest.raises(TypeError):
        getattr(X, name)()
    with pytest.raises(TypeError):
        LEVELS[level](lambda x: getattr(x[0, 0, 0], name)())


def wave(x):
    return ((x * x).sin() * x[0]).sum()


def slope(x):
    out, pullback = lamina.vjp(lambda x: (x * x).sin() * x[0], x)
    return pullback(torch.ones_like(out))[0]


def test_a_mode_around_a_pullback_sees_all_of_it():
    x = X.flatten(0, 2)
    seen = []

    def f(x):
        out, pullback = lamina.vjp(lambda x: (x * x).sin() * x[0], x)
        with Seen() as mode:
            grad = pullback(torch.ones_like(out))[0]
        seen.extend(mode.names)
        return grad

    torch.testing.assert_close(lamina.vmap(f)(x), lamina.vmap(slope)(x))
    assert {"aten.cos.default", "aten.mul.Tensor"} <= set(seen)


def test_a_graph_is_traced_inside_the_transform():
    x = X.flatten(0, 2)
    graphs = []

    def f(x):
        graphs.append(make_fx(slope)(x))
        return graphs[0](x)

    torch.testing.assert_close(lamina.vmap(f)(x), lamina.vmap(slope)(x))
    assert torch._C._len_torch_dispatch_stack() == 0


def test_a_mode_around_the_transform_may_be_taken_off_inside():
    with FakeTensorMode():
        x = torch.empty(3, 4)

        def f(x):
            with unset_fake_temporarily():
                return (x * 2).sin()

        assert type(lamina.vmap(f)(x)) is FakeTensor


class Maps(TorchDispatchMode):
    """A mode of the user's whose handler runs a transform."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.sin.default and not self.found:
            self.found.append(None)
            self.found[0] = lamina.vmap(lamina.grad(wave))(X.flatten(0, 2))
        return func(*args, **(kwargs or {}))


def test_the_handler_of_a_mode_around_the_transform_may_run_another():
    with Maps() as mode:
        lamina.vmap(lambda x: x.sin())(X)
    assert type(mode.found[0]) is torch.Tensor
    torch.testing.assert_close(mode.found[0], lamina.vmap(lamina.grad(wave))(X.flatten(0, 2)))
