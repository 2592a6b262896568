"""Writes through what may be a view, and to what shows one element in several places.

Whether `reshape` gives a view or a copy is PyTorch's to say, and the answer shows in what a write
does. The oracle is the loop over the examples in plain PyTorch, for values and gradients.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lamina import grad, jvp, vmap
from lamina_core.errors import MutationError

DOUBLE = torch.float64
XS = torch.linspace(-1, 2, 24, dtype=DOUBLE).reshape(4, 2, 3).sin()


def zeros(*shape):
    return torch.zeros(shape, dtype=DOUBLE)


# What gives a tensor of [2, 3] itself, a view of it or a copy.
SEEN = {
    "+z": lambda z: +z,
    "adjoint": lambda z: z.adjoint(),
    "as_strided": lambda z: z.as_strided((2, 2), (1, 3)),
    "as_tensor": torch.as_tensor,
    "atleast_3d": torch.atleast_3d,
    "broadcast_to": lambda z: z.broadcast_to(1, 2, 3),
    "cartesian_prod": lambda z: torch.cartesian_prod(z[0]),
    "chunk": lambda z: z.chunk(2)[0],
    "conj": lambda z: z.conj(),
    "conj_physical": torch.conj_physical,
    "contiguous": lambda z: z.contiguous(),
    "diagonal": lambda z: z.diagonal(),
    "double": lambda z: z.double(),
    "dropout in eval": lambda z: F.dropout(z, 0.5, training=False),
    "expand": lambda z: z.expand(1, 2, 3),
    "flatten": lambda z: z.flatten(),
    "flatten 1": lambda z: z.flatten(1),
    "list": lambda z: list(z)[1],
    "meshgrid": lambda z: torch.meshgrid(z[0], indexing="ij")[0],
    "movedim": lambda z: z.movedim(0, 1),
    "narrow": lambda z: z.narrow(1, 1, 2),
    "nn.Flatten": lambda z: nn.Flatten(0)(z),
    "nn.Identity": lambda z: nn.Identity()(z),
    "nn.Unflatten": lambda z: nn.Unflatten(1, (3, 1))(z),
    "permute": lambda z: z.permute(1, 0),
    "ravel": lambda z: z.ravel(),
    "real": torch.real,
    "reshape": lambda z: z.reshape(-1),
    "reshape again": lambda z: z.reshape(6).reshape(3, 2)[1:].flatten(),
    "reshape as": lambda z: z.reshape_as(zeros(3, 2)),
    "reshape of columns": lambda z: z[:, :2].reshape(-1),
    "reshape of z.T": lambda z: z.T.reshape(-1),
    "reshape of z.T in three": lambda z: z.T.reshape(3, 1, 2),
    "reshape to itself": lambda z: z.reshape(2, 3),
    "resolve_conj": lambda z: z.resolve_conj(),
    "rows of flat": lambda z: z.flatten()[1:5].view(2, 2),
    "select": lambda z: z[1],
    "slice": lambda z: z[:, ::2],
    "split": lambda z: z.split(1)[1],
    "sum_to_size": lambda z: z.sum_to_size(2, 3),
    "tensor_split": lambda z: z.tensor_split(2, 1)[1],
    "to": lambda z: z.to(DOUBLE),
    "type_as": lambda z: z.type_as(z),
    "unbind": lambda z: z.unbind(1)[2],
    "unfold": lambda z: z.unfold(1, 1, 1),
    "view": lambda z: z.view(-1),
    "view_as_complex": lambda z: torch.view_as_real(torch.view_as_complex(z.reshape(3, 2))),
}
MADE = {
    "zeros": lambda x: zeros(2, 3),
    "zeros.T": lambda x: zeros(3, 2).T,
    "a slice of zeros": lambda x: zeros(4, 3)[1:3],
    "zeros written to": lambda x: torch.cat([zeros(1, 3), x[:1]]),
    "a clone": lambda x: x.clone(),
}


def _to_the_view(z, seen, t):
    seen(z).add_(t)
    return z


def _to_a_row_of_the_view(z, seen, t):
    seen(z)[0] = t
    return z


def _to_the_tensor(z, seen, t):
    view = seen(z)
    z.add_(t)
    return view


def _to_another_view(z, seen, t):
    view = seen(z)
    seen(z).add_(t)
    return torch.cat([view.reshape(-1), z.reshape(-1)])


def _to_both(z, seen, t):
    view = seen(z)
    z.mul_(t)
    view.add_(t)
    z.add_(t)
    return torch.cat([view.reshape(-1), z.reshape(-1)])


WRITES = (_to_the_view, _to_a_row_of_the_view, _to_the_tensor, _to_another_view, _to_both)


def loss(function):
    return lambda x: function(x).sin().sum()


def plain_gradient(function, x):
    """The gradient by PyTorch's autograd; None where it refuses."""
    leaf = x.clone().requires_grad_()
    try:
        (found,) = torch.autograd.grad(loss(function)(leaf), leaf, allow_unused=True)
    except RuntimeError:
        return None
    return torch.zeros_like(x) if found is None else found


def check(function):
    """`function` under vmap and both modes, against PyTorch on each example."""
    values = torch.stack([function(x.clone()) for x in XS])
    torch.testing.assert_close(vmap(function)(XS), values)
    torch.testing.assert_close(vmap(function, -1)(XS.movedim(0, -1).contiguous()), values)
    gradients = [plain_gradient(function, x) for x in XS]
    if any(gradient is None for gradient in gradients):
        return
    want = torch.stack(gradients)
    torch.testing.assert_close(vmap(grad(loss(function)))(XS), want)
    torch.testing.assert_close(grad(lambda xs: loss(vmap(function))(xs))(XS), want)
    tangent = XS[0].cos()
    pushed = jvp(loss(function), (XS[0],), (tangent,))[1]
    torch.testing.assert_close(pushed, (want[0] * tangent).sum())


@pytest.mark.parametrize("name", SEEN)
def test_a_write_reaches_what_it_reaches_outside(name):
    seen = SEEN[name]
    for make in MADE.values():
        for write in WRITES:

            def function(x, make=make, write=write):
                return write(make(x), seen, 2 * x[0, 1]).clone()

            try:
                function(XS[0].clone())
            except RuntimeError:  # a view that this layout does not have
                continue
            check(function)


# -- one element in several places -----------------------------------------------------------------


def _row_of_expanded(x):
    z = zeros(3)
    rows = z.expand(2, 3)
    rows[0] = x[0]
    return torch.cat([z, rows.reshape(-1)])


def _added_to_a_row_of_expanded(x):
    z = x[0].clone()
    rows = z.expand(2, 3)
    rows[1].mul_(x[1])
    return torch.cat([z, rows.reshape(-1)])


def _filled(x):
    z = zeros(3)
    rows = z.expand(2, 3)
    rows.fill_(2.0)
    rows[0] += x[0]
    return torch.cat([z, rows.reshape(-1)])


def _windows(x):
    z = zeros(3)
    windows = z.unfold(0, 2, 1)
    first = windows[0]
    windows[1].add_(x[0, 0])
    first.add_(x[0, 1])
    return torch.cat([z, windows.reshape(-1), first])


def _strided(x):
    z = x[0].clone()
    windows = z.as_strided((2, 2), (1, 1))
    windows[1, 0] = x[0, 2]
    windows[0].mul_(2)
    return torch.cat([z, windows.reshape(-1)])


def _meshgrid(x):
    z = zeros(3)
    grid = torch.meshgrid(z, z, indexing="ij")[0]
    grid[0, 0] = x[0, 0]
    return torch.cat([z, grid.reshape(-1)])


def _broadcast(x):
    z = x[0].clone()
    first = z.broadcast_to(2, 3)
    second = torch.broadcast_tensors(z, zeros(2, 3))[0]
    first[1] = 2 * x[1]
    second[0, 0] = 5.0
    return torch.cat([z, first.reshape(-1), second.reshape(-1)])


def _copied_out_of_expanded(x):
    z = zeros(1, 3)
    copy = z.expand(2, 3).reshape(-1)
    copy[0] = x[0, 0]
    return torch.cat([z.reshape(-1), copy])


@pytest.mark.parametrize(
    "function",
    [
        _row_of_expanded,
        _added_to_a_row_of_expanded,
        _filled,
        _windows,
        _strided,
        _meshgrid,
        _broadcast,
        _copied_out_of_expanded,
    ],
)
def test_other_places_of_an_element_show_what_was_written(function):
    check(function)


@pytest.mark.parametrize(
    "write",
    [
        lambda z, x: z.add_(x),
        lambda z, x: z.copy_(x),
        lambda z, x: z.mul_(2),
        lambda z, x: torch.add(z, x, out=z),
    ],
)
@pytest.mark.parametrize("make", [lambda x: zeros(1, 3), lambda x: x[:1].clone()])
def test_an_expanded_tensor_is_not_written_to(make, write):
    def function(x):
        z = make(x).expand(2, 3)
        write(z, x)
        return z.sum()

    with pytest.raises(RuntimeError, match="single memory location"):
        function(XS[0].clone())
    for transformed, argument in ((vmap(function), XS), (grad(function), XS[0])):
        with pytest.raises(MutationError, match="expanded"):
            transformed(argument)
    with pytest.raises(MutationError, match="expanded"):
        vmap(grad(function))(XS)


def test_an_argument_expanded_inside_is_not_written_to():
    xs = XS[:, :, :1].expand(4, 2, 3)
    with pytest.raises(MutationError, match="expanded"):
        vmap(lambda x: x.add_(1))(xs)
    vmap(lambda x: x.fill_(3.0))(xs)
    assert bool((xs == 3).all())


def test_an_argument_expanded_over_its_examples_is_not_written_to():
    xs = XS[0].clone().expand(4, 2, 3)
    for write in (lambda x: x.add_(1), lambda x: x[0].copy_(x[1]), lambda x: x.reshape(-1).neg_()):
        with pytest.raises(MutationError, match="expanded"):
            vmap(write)(xs)
    assert torch.equal(xs[0], XS[0])


# -- another dtype ---------------------------------------------------------------------------------


def test_bits_written_through_a_view_of_another_dtype():
    def function(x):
        z = zeros(3)
        z.view(DOUBLE)[2] = x[1, 2]
        z.view(torch.int64)[1] = x[0].view(torch.int64)[1]
        z.view(torch.int16)[0] = 7
        return z.view(torch.int64)

    values = torch.stack([function(x) for x in XS])
    assert torch.equal(vmap(function)(XS), values)


def test_bits_have_no_derivative():
    def function(x):
        z = x[0].clone()
        z.view(torch.int64).add_(1)
        return z.sum()

    for transformed in (
        grad(function),
        vmap(grad(function)),
        grad(lambda x: vmap(function)(x).sum()),
    ):
        with pytest.raises(MutationError, match="derivative"):
            transformed(XS[None] if transformed is None else XS)
