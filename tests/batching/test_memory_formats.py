"""Strides under vmap are those of an example, and views stay views.

The oracle is the same function on each example alone, as plain PyTorch lays it out.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lamina import grad, vmap

LAST = torch.channels_last
BATCH = 6
WEIGHT = torch.linspace(-1, 1, 108).reshape(4, 3, 3, 3)


def examples(layout, in_dim=0):
    """[B, 2, 3, 4, 5] with the batch dim moved, the examples laid out as asked."""
    x = torch.arange(BATCH * 120.0).reshape(BATCH, 2, 3, 4, 5).sin()
    if layout == "channels last":
        x = x.flatten(0, 1).contiguous(memory_format=LAST).unflatten(0, (BATCH, 2))
    return x.movedim(0, in_dim).contiguous() if in_dim else x


def layout_of(x):
    kinds = [torch.contiguous_format]
    if x.dim() == 4:
        kinds.append(LAST)
    return (
        tuple(x.shape),
        x.stride(),
        [x.is_contiguous(memory_format=kind) for kind in kinds],
    )


LAYOUTS = {
    "add": lambda x: x + x.flip(0),
    "as_strided": lambda x: x.as_strided((3, 4), (1, 6)),
    "clone": lambda x: x.clone(),
    "clone, channels last": lambda x: x.clone(memory_format=LAST),
    "contiguous": lambda x: x.contiguous(),
    "contiguous, channels last": lambda x: x.contiguous(memory_format=LAST),
    "conv2d": lambda x: F.conv2d(x, WEIGHT, padding=1),
    "diagonal": lambda x: x.diagonal(0, 2, 3),
    "empty_like": lambda x: torch.empty_like(x).zero_(),
    "expand": lambda x: x[:1].expand(3, 3, 4, 5),
    "itself": lambda x: x,
    "linear": lambda x: F.linear(x, torch.ones(7, 5)),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "mT": lambda x: x.mT,
    "permute": lambda x: x.permute(3, 1, 0, 2),
    "relu": lambda x: x.relu(),
    "select": lambda x: x[..., 0],
    "slice": lambda x: x[:, 1:, ::2],
    "to, channels last": lambda x: x.to(memory_format=LAST),
    "to a dtype": lambda x: x.to(torch.float64),
    "to a dtype, channels last": lambda x: x.to(torch.float64, memory_format=LAST),
    "unfold": lambda x: x.unfold(3, 2, 2),
    "zeros_like": lambda x: torch.zeros_like(x),
    "zeros_like, channels last": lambda x: torch.zeros_like(x, memory_format=LAST),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_the_layout_is_that_of_an_example(name, layout):
    f = LAYOUTS[name]
    x = examples(layout)
    seen = []

    def spying(x):
        out = f(x)
        seen.append(layout_of(out))
        return out

    alone = [example.clone() for example in x]
    torch.testing.assert_close(vmap(spying)(x), torch.stack([f(example) for example in alone]))
    assert seen == [layout_of(f(alone[0]))]


@pytest.mark.parametrize("in_dim", [1, 2, 4])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
def test_a_batch_dim_in_the_middle_is_out_of_the_way(in_dim, memory_format):
    x = examples("contiguous", in_dim)

    def f(x):
        out = x.contiguous(memory_format=memory_format)
        assert out.is_contiguous(memory_format=memory_format)
        out = x.clone(memory_format=memory_format)
        assert out.is_contiguous(memory_format=memory_format)
        return x.view(6, 20).reshape(2, 12, 5).view_as(x)

    torch.testing.assert_close(vmap(f, in_dims=in_dim)(x), x.movedim(in_dim, 0))


def test_what_has_the_layout_already_is_handed_through():
    def f(x):
        assert x.contiguous(memory_format=LAST) is x
        assert x.to(memory_format=LAST) is x
        assert x.to(torch.float32, memory_format=LAST) is x
        assert x.clone(memory_format=LAST) is not x
        return x

    vmap(f)(examples("channels last"))


def test_channels_last_of_volumes():
    x = torch.arange(2 * 3 * 60.0).reshape(2, 1, 3, 3, 4, 5)

    def f(x):
        for out in (
            x.contiguous(memory_format=torch.channels_last_3d),
            x.to(memory_format=torch.channels_last_3d),
        ):
            assert out.stride() == (180, 1, 60, 15, 3)
        return out

    torch.testing.assert_close(vmap(f)(x), x)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_a_module_in_channels_last(layout):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2))
    module.to(memory_format=LAST).requires_grad_(False)
    x = examples(layout)
    torch.testing.assert_close(vmap(module)(x), torch.stack([module(e) for e in x]))

    def loss(x):
        return module(x).square().sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(loss(example) for example in leaf), leaf)
    torch.testing.assert_close(vmap(grad(loss))(x), expected)


@pytest.mark.parametrize("convert", ["clone", "contiguous", "to"])
def test_gradients_keep_the_layout_of_autograd(convert):
    def f(x):
        return (getattr(x, convert)(memory_format=LAST) ** 2).sum()

    x = examples("contiguous")[0]
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf), leaf)
    found = grad(f)(x)
    torch.testing.assert_close(found, expected)
    assert found.stride() == expected.stride()


# -- views -----------------------------------------------------------------------------------------

VIEWS = {
    "as_strided": lambda x: x.as_strided((2, 3), x.stride()[:2]),
    "as_strided with an offset": lambda x: x.as_strided((2, 2), x.stride()[2:], 1),
    "chunk": lambda x: x.chunk(2, 1)[0],
    "diagonal": lambda x: x.diagonal(0, 2, 3),
    "flatten": lambda x: x.flatten(2),
    "hsplit": lambda x: x.hsplit(3)[1],
    "movedim": lambda x: x.movedim(1, 0),
    "mT": lambda x: x.mT,
    "narrow": lambda x: x.narrow(3, 1, 2),
    "None and a slice": lambda x: x[None, ..., 1:3],
    "permute": lambda x: x.permute(3, 1, 0, 2),
    "select": lambda x: x[..., 0],
    "select, then t": lambda x: x[0, 0].t(),
    "slice": lambda x: x[:, 1:, ::2],
    "split": lambda x: x.split(2, 3)[1],
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "swapaxes": lambda x: x.swapaxes(0, 3),
    "tensor_split": lambda x: x.tensor_split(2, 0)[1],
    "unbind": lambda x: x.unbind(1)[2],
    "unflatten": lambda x: x.unflatten(2, (2, 2)),
    "unfold": lambda x: x.unfold(3, 2, 2),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "view": lambda x: x.view(2, 3, 20),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_a_write_through_a_view_shows_in_its_base(name, layout):
    view = VIEWS[name]

    def written(x):
        part = view(x)
        part.mul_(2)
        part.add_(1)
        return part

    def made(x):
        mine = x.clone()
        return written(mine), mine

    x = examples(layout)
    rows = [made(example) for example in x]
    expected = [torch.stack(column) for column in zip(*rows, strict=True)]
    torch.testing.assert_close(list(vmap(made)(x)), expected)
    for in_dim in (0, 2):
        argument = x.movedim(0, in_dim).clone()
        part = vmap(written, in_dims=in_dim)(argument)
        torch.testing.assert_close([part, argument.movedim(in_dim, 0)], expected)


@pytest.mark.parametrize("name", VIEWS)
def test_a_write_to_the_base_shows_in_a_view(name):
    view = VIEWS[name]

    def f(x):
        mine = x.clone()
        part = view(mine)
        mine.mul_(2)
        mine[0].add_(1)
        return part

    x = examples("contiguous")
    torch.testing.assert_close(vmap(f)(x), torch.stack([f(example) for example in x]))


def test_a_write_through_a_layout_that_needed_a_copy_stays_in_the_copy():
    def f(x):
        mine = x.clone()
        copy = mine.to(memory_format=LAST)
        copy.zero_()
        itself = copy.to(memory_format=LAST)
        itself.add_(1)
        return mine, copy

    x = examples("contiguous")
    mine, copy = vmap(f)(x)
    torch.testing.assert_close(mine, x)
    torch.testing.assert_close(copy, torch.ones_like(x))


def test_a_write_to_an_expanded_tensor_is_an_error():
    x = torch.arange(6.0).reshape(2, 3)
    with pytest.raises(RuntimeError, match="single memory location"):
        x[0].clone().expand(4, 3).add_(1)
    with pytest.raises(RuntimeError, match="single memory location"):
        vmap(lambda x: x.clone().expand(4, 3).add_(x))(x)


@pytest.mark.parametrize("shape", [(3, 3), (5, 3), (2, 7)])
@pytest.mark.parametrize("wrap", [False, True])
def test_fill_diagonal_is_a_write_through_a_view(shape, wrap):
    x = torch.arange(4.0 * shape[0] * shape[1]).reshape(4, *shape)

    def f(x):
        mine = x * 2
        mine.fill_diagonal_(-1.0, wrap)
        return mine

    torch.testing.assert_close(vmap(f)(x), torch.stack([f(example) for example in x]))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(f(e).square().sum() for e in leaf), leaf)
    torch.testing.assert_close(vmap(grad(lambda x: f(x).square().sum()))(x), expected)
    argument = x.clone()
    vmap(lambda x: x.fill_diagonal_(5.0, wrap), in_dims=2)(argument.movedim(0, 2))
    for example, filled in zip(x, argument, strict=True):
        torch.testing.assert_close(filled, example.clone().fill_diagonal_(5.0, wrap))


@pytest.mark.parametrize("in_dim", [0, 1, 2, -1])
def test_arguments_show_the_strides_of_an_example(in_dim):
    """They lie in the caller's memory, so a copy must be one where it is outside."""
    x = torch.arange(24.0).reshape(2, 3, 4)
    views = (
        lambda a: a,
        lambda a: a[1:],
        lambda a: a.t(),
        lambda a: a.unbind()[1],
        lambda a: a[:, :1].expand(-1, 3),
        lambda a: a.unsqueeze(0),
        lambda a: a.unflatten(1, (1, -1)),
    )

    def strides(a):
        return [(dense(v(a)), v(a).is_contiguous()) for v in views]

    def dense(a):
        return [stride for size, stride in zip(a.shape, a.stride(), strict=True) if size != 1]

    seen = []
    vmap(lambda a: seen.append(strides(a)) or a, in_dim)(x)
    assert seen == [strides(x.select(in_dim, 0))]


@pytest.mark.parametrize("in_dim", [0, 1, 2, -1])
@pytest.mark.parametrize(
    "copy",
    [
        lambda a: a.contiguous(),
        lambda a: a.reshape(-1),
        lambda a: a.flatten(),
        lambda a: a[1:].contiguous(),
        lambda a: a.t().reshape(-1),
    ],
)
def test_writes_reach_the_argument_where_they_do_outside(copy, in_dim):
    def f(a):
        return copy(a).add_(100) * 1, a.sum()

    looped, mapped = (torch.arange(24.0).reshape(2, 3, 4) for _ in range(2))
    count = looped.shape[in_dim]
    expected = [f(looped.select(in_dim, i)) for i in range(count)]
    actual = vmap(f, in_dim)(mapped)
    torch.testing.assert_close(mapped, looped)
    for out, rows in zip(actual, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(out, torch.stack(rows))


@pytest.mark.parametrize("in_dim", [0, 1, 2])
def test_strides_of_an_argument_are_those_of_an_example(in_dim):
    x = torch.arange(24.0).reshape(2, 3, 4)
    for f in (
        lambda a: a.as_strided((2, 2), (2, 1)) * 1,
        lambda a: a[1:].as_strided((2,), (1,)) * 1,
        lambda a: a.t().as_strided((2, 2), (1, 2)) * 1,
    ):
        expected = torch.stack([f(example) for example in x.unbind(in_dim)])
        torch.testing.assert_close(vmap(f, in_dim)(x), expected)
