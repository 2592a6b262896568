"""LSTMs, and the fused layer that a CPU runs in float32 with its backward, in ordinary ops.

The gates stand in the order of PyTorch's weights: input, forget, cell, output.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina_core.overloads import aten

__all__ = ["LSTM"]


class _Run:
    """One layer in one direction, run over [T, N, C].

    Attributes:
        order: The steps in the order in which they are run.
        gates: For each run step the activations of the four gates, each [N, H].
        cells, states: For each run step the cell and the state before it, each [N, H]; the last
            entry is what the layer ends with.
    """

    def __init__(self, x: Any, weights: Any, hx: Any, cx: Any, reverse: bool) -> None:
        w_ih, w_hh, b_ih, b_hh = weights
        steps, rows = x.shape[0], x.shape[1]
        self.order = list(range(steps))[:: -1 if reverse else 1]
        self.gates: list[Any] = []
        self.states, self.cells = [hx.reshape(rows, -1)], [cx.reshape(rows, -1)]
        into = x.matmul(w_ih.t())
        if b_ih is not None:
            into = into + (b_ih + b_hh)
        for t in self.order:
            i, f, g, o = (into[t] + self.states[-1].matmul(w_hh.t())).chunk(4, -1)
            gates = (i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid())
            cell = gates[1] * self.cells[-1] + gates[0] * gates[2]
            self.gates.append(gates)
            self.cells.append(cell)
            self.states.append(gates[3] * cell.tanh())

    def in_time(self, found: list[Any]) -> Any:
        """What the run steps gave, as [T, ...]."""
        return torch.stack(found if self.order == sorted(self.order) else found[::-1])


def _weights(w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, has_biases: bool) -> Any:
    return (w_ih, w_hh, b_ih, b_hh) if has_biases else (w_ih, w_hh, None, None)


def lstm_layer(
    input: Any,
    weight0: Any,
    weight1: Any,
    weight2: Any,
    weight3: Any,
    hx_: Any,
    cx_: Any,
    reverse: bool,
    batch_sizes: Any,
    mode: int,
    hidden_size: int,
    num_layers: int,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    train: bool,
) -> Any:
    """[T, N, C], weights, twice [N, H] -> [T, N, H], state and cell at the end, nothing."""
    weights = _weights(weight0, weight1, weight2, weight3, has_biases)
    run = _Run(input, weights, hx_, cx_, reverse)
    ends = run.states[-1].reshape(hx_.shape), run.cells[-1].reshape(cx_.shape)
    return run.in_time(run.states[1:]), *ends, input.new_empty(0, dtype=torch.uint8)


def lstm_layer_backward(
    input: Any,
    weight1: Any,
    weight2: Any,
    weight3: Any,
    weight4: Any,
    hx_: Any,
    cx_tmp: Any,
    output: Any,
    hy_: Any,
    cy_: Any,
    grad_output: Any,
    grad_hy: Any,
    grad_cy: Any,
    reverse: bool,
    mode: int,
    hidden_size: int,
    num_layers: int,
    has_biases: bool,
    *others: Any,
) -> Any:
    """The cotangents of [T, N, C], of the weights, and of twice [N, H]."""
    weights = _weights(weight1, weight2, weight3, weight4, has_biases)
    run = _Run(input, weights, hx_, cx_tmp, reverse)
    zero = torch.zeros_like(run.states[0])
    state_ct, cell_ct = (
        zero if ct is None else ct.reshape(zero.shape) for ct in (grad_hy, grad_cy)
    )
    pulled = []
    for step in reversed(range(len(run.order))):
        i, f, g, o = run.gates[step]
        before, size = run.cells[step], run.cells[step + 1].tanh()
        if grad_output is not None:
            state_ct = state_ct + grad_output[run.order[step]]
        cell_ct = cell_ct + state_ct * o * (1 - size * size)
        gate_cts = [
            cell_ct * g * i * (1 - i),
            cell_ct * before * f * (1 - f),
            cell_ct * i * (1 - g * g),
            state_ct * size * o * (1 - o),
        ]
        pulled.append(torch.cat(gate_cts, -1))
        cell_ct = cell_ct * f
        state_ct = pulled[-1].matmul(weight2)
    gates_ct, states = run.in_time(pulled[::-1]), run.in_time(run.states[:-1])
    flat = gates_ct.flatten(0, 1).t()
    bias_ct = gates_ct.sum((0, 1)) if has_biases else None
    return (
        gates_ct.matmul(weight1),
        flat.matmul(input.flatten(0, 1)),
        flat.matmul(states.flatten(0, 1)),
        torch.zeros_like(weight3) if bias_ct is None else bias_ct,
        torch.zeros_like(weight4) if bias_ct is None else bias_ct,
        state_ct.reshape(hx_.shape),
        cell_ct.reshape(cx_tmp.shape),
    )


def lstm(input: Any, hx: Any, *rest: Any) -> tuple[Any, Any, Any]:
    """[T, N, I], [L, N, H], [L, N, H] -> [T, N, H], [L, N, H], [L, N, H]; see the schema for more.

    It is PyTorch's decomposition, whose final states have a dim too many in torch 2.11 and 2.12.
    """
    out, h, c = aten.lstm.input.decompose(input, hx, *rest)
    return out, h.reshape(hx[0].shape), c.reshape(hx[1].shape)


LSTM: dict[Any, Any] = {
    aten.lstm.input: lstm,
    aten.mkldnn_rnn_layer.default: lstm_layer,
    aten.mkldnn_rnn_layer_backward.default: lstm_layer_backward,
}
