"""The fused parts of recurrent cells, which PyTorch has for a GPU alone.

For the test they get kernels on a CPU, in ordinary ops, which take no batch dim: the rules have to
make one call of all examples. The oracle is the loop.
"""

from __future__ import annotations

import pytest
import torch

import lamina
from tests.batching.test_matmul_conv_norm import WHERE, agree, batches

aten = torch.ops.aten
N, H = 2, 5


def lstm(from_input, from_hidden, cx, b_input=None, b_hidden=None):
    assert cx.dim() == 2
    gates = from_input + from_hidden
    if b_input is not None:
        gates = gates + b_input + b_hidden
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cy = f * cx + i * g
    return o * cy.tanh(), cy, torch.cat([i, f, g, o], 1)


def lstm_backward(hy_ct, cy_ct, cx, cy, workspace, has_bias):
    assert cx.dim() == 2
    i, f, g, o = workspace.chunk(4, 1)
    top = cy.tanh()
    hy_ct = torch.zeros_like(cx) if hy_ct is None else hy_ct
    inner = hy_ct * o * (1 - top**2)
    if cy_ct is not None:
        inner = inner + cy_ct
    parts = (inner * g * i * (1 - i), inner * cx * f * (1 - f))
    gates = torch.cat([*parts, inner * i * (1 - g**2), hy_ct * top * o * (1 - o)], 1)
    return gates, inner * f, gates.sum(0) if has_bias else None


def gru(from_input, from_hidden, hx, b_input=None, b_hidden=None):
    assert hx.dim() == 2
    if b_input is not None:
        from_input, from_hidden = from_input + b_input, from_hidden + b_hidden
    (r, z, n), (r_h, z_h, n_h) = from_input.chunk(3, 1), from_hidden.chunk(3, 1)
    r, z = (r + r_h).sigmoid(), (z + z_h).sigmoid()
    n = (n + r * n_h).tanh()
    return n + z * (hx - n), torch.cat([r, z, n, hx, n_h], 1)


def gru_backward(ct, workspace, has_bias):
    assert ct.dim() == 2
    r, z, n, hx, n_h = workspace.chunk(5, 1)
    new = ct * (1 - z) * (1 - n**2)
    first = torch.cat([new * n_h * r * (1 - r), ct * (hx - n) * z * (1 - z)], 1)
    gates, hidden = torch.cat([first, new], 1), torch.cat([first, new * r], 1)
    sums = (gates.sum(0), hidden.sum(0)) if has_bias else (None, None)
    return gates, hidden, ct * z, *sums


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    monkeypatch.setattr(lamina.config, "fallback", "error")
    monkeypatch.setattr(lamina.config, "debug", 1)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_thnn_fused_lstm_cell", lstm, "CPU")
        library.impl("_thnn_fused_lstm_cell_backward_impl", lstm_backward, "CPU")
        library.impl("_thnn_fused_gru_cell", gru, "CPU")
        library.impl("_thnn_fused_gru_cell_backward", gru_backward, "CPU")
        yield


CELLS = {"lstm": (aten._thnn_fused_lstm_cell, 4), "gru": (aten._thnn_fused_gru_cell, 3)}


@WHERE
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("name", CELLS)
def test_cells(name, biases, where):
    op, count = CELLS[name]
    rows, row = (N, count * H), (count * H,)
    for args, in_dims in batches(rows, rows, (N, H), *[row] * 2 * biases, where=where):
        agree(op, args, in_dims)


@WHERE
@pytest.mark.parametrize("has_bias", [True, False])
def test_backward_of_lstm(has_bias, where):
    op = aten._thnn_fused_lstm_cell_backward_impl
    kept = slice(3 if has_bias else 2)
    for args, in_dims in batches(*[(N, H)] * 4, (N, 4 * H), where=where):
        agree(lambda *args: op(*args, has_bias)[kept], args, in_dims)
    for args, in_dims in batches(*[(N, H)] * 3, (N, 4 * H), where=where):
        agree(lambda ct, *args: op(ct, None, *args, has_bias)[kept], args, in_dims)


@WHERE
@pytest.mark.parametrize("has_bias", [True, False])
def test_backward_of_gru(has_bias, where):
    op = aten._thnn_fused_gru_cell_backward
    kept = slice(5 if has_bias else 3)
    for args, in_dims in batches((N, H), (N, 5 * H), where=where):
        agree(lambda *args: op(*args, has_bias)[kept], args, in_dims)


@pytest.mark.parametrize("name", CELLS)
def test_a_gradient_for_every_example(name):
    """PyTorch's own formula calls the fused backward."""
    op, count = CELLS[name]
    (args, in_dims), *_ = batches(*[(N, count * H)] * 2, (N, H), *[(count * H,)] * 2)
    reference = {"lstm": lstm, "gru": gru}[name]

    def loss(cell):
        return lambda *args: cell(*args)[0].square().sum()

    every = tuple(range(len(args)))
    actual = lamina.vmap(lamina.grad(loss(op), every), in_dims)(*args)
    rows = [torch.func.grad(loss(reference), every)(*row) for row in zip(*args, strict=True)]
    expected = tuple(torch.stack(column) for column in zip(*rows, strict=True))
    torch.testing.assert_close(actual, expected)
