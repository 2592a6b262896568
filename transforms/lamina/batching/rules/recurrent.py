"""Recurrent layers and cells.

With the same weights for all examples a layer batches by itself. Otherwise it is made of ops that
batch: the input products of all steps are one linear op; what is left in the loop over time is the
product with the hidden state and the gates.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear

from lamina.batching.dims import ensure_batched, fold, unfold
from lamina.batching.table import batching_rule, decomposition
from lamina_core.overloads import aten

State = tuple[Any, ...]


# -- one step: the products of the input and of the hidden state -> the new state ------------------


def _lstm_step(gates: Any, hidden: Any, state: State) -> State:
    gate_in, forget, cell, gate_out = (gates + hidden).chunk(4, -1)
    c = forget.sigmoid() * state[1] + gate_in.sigmoid() * cell.tanh()
    return gate_out.sigmoid() * c.tanh(), c


def _gru_step(gates: Any, hidden: Any, state: State) -> State:
    reset_x, update_x, new_x = gates.chunk(3, -1)
    reset_h, update_h, new_h = hidden.chunk(3, -1)
    update = (update_x + update_h).sigmoid()
    new = (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh()
    return (new + update * (state[0] - new),)


def _tanh_step(gates: Any, hidden: Any, state: State) -> State:
    return ((gates + hidden).tanh(),)


def _relu_step(gates: Any, hidden: Any, state: State) -> State:
    return ((gates + hidden).relu(),)


Step = Callable[[Any, Any, State], State]


# -- layers ----------------------------------------------------------------------------------------


def _one_direction(step: Step, x: Any, state: State, weights: Any, reverse: bool) -> Any:
    """[T, N, I] -> [T, N, H] and the last state."""
    w_input, w_hidden, b_input, b_hidden, projection = weights
    gates = linear(x, w_input, b_input).unbind(0)
    outs = []
    for at in reversed(gates) if reverse else gates:
        state = step(at, linear(state[0], w_hidden, b_hidden), state)
        if projection is not None:
            state = (linear(state[0], projection), *state[1:])
        outs.append(state[0])
    return torch.stack(outs[::-1] if reverse else outs), state


def _layers(
    step: Step,
    x: Any,
    states: State,
    params: Any,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Any, ...]:
    """All layers; `states` are [layers * directions, N, H] each, and so are the ones returned."""
    if batch_first:
        x = x.transpose(0, 1)
    directions = 2 if bidirectional else 1
    width = len(params) // (num_layers * directions)
    projected = width == (5 if has_biases else 3)
    rows = [s.unbind(0) for s in states]
    last: list[State] = []
    for layer in range(num_layers):
        sides = []
        for side in range(directions):
            place = layer * directions + side
            given = list(params[place * width : (place + 1) * width])
            projection = given.pop() if projected else None
            weights = (*given, projection) if has_biases else (*given, None, None, projection)
            out, state = _one_direction(
                step, x, tuple(row[place] for row in rows), weights, reverse=side == 1
            )
            sides.append(out)
            last.append(state)
        x = sides[0] if directions == 1 else torch.cat(sides, -1)
        if dropout > 0 and train and layer < num_layers - 1:
            x = torch.dropout(x, dropout, True)
    if batch_first:
        x = x.transpose(0, 1)
    return x, *(torch.stack(column) for column in zip(*last, strict=True))


def _register_layers(op: Any, step: Step) -> None:
    @batching_rule(op)
    def layers(info: Any, in_dims: Any, *args: Any) -> Any:
        """[B, T, N, I], [B, L, N, H] -> [B, T, N, H], and the last states: B joins N."""
        x, hx, _, _, num_layers, dropout, train, _, batch_first = args
        draws = dropout > 0 and train and num_layers > 1
        if draws or any(bdim is not None for bdim in in_dims[2]):
            return info.at_level(partial(_of_any, step), args, in_dims)
        size, n = info.batch_size, 0 if batch_first else 1
        x = fold(x, in_dims[0], n, size)
        # Some kernels want contiguous states.
        if isinstance(hx, (list, tuple)):
            pairs = zip(hx, in_dims[1], strict=True)
            hx = [fold(s, bdim, 1, size).contiguous() for s, bdim in pairs]
        else:
            hx = fold(hx, in_dims[1], 1, size).contiguous()
        out, *last = op(x, hx, *args[2:])
        return (unfold(out, n, size), *(unfold(s, 1, size) for s in last)), (n, *[1] * len(last))


def _of_any(step: Step, x: Any, hx: Any, *rest: Any) -> tuple[Any, ...]:
    """The layers from ops that batch: of weights for each example, or with dropout between."""
    return _layers(step, x, tuple(hx) if isinstance(hx, (list, tuple)) else (hx,), *rest)


_register_layers(aten.gru.input, _gru_step)
_register_layers(aten.lstm.input, _lstm_step)
_register_layers(aten.rnn_relu.input, _relu_step)
_register_layers(aten.rnn_tanh.input, _tanh_step)


# -- cells -----------------------------------------------------------------------------------------


def _cell(
    step: Step, x: Any, state: State, w_input: Any, w_hidden: Any, b_input: Any, b_hidden: Any
) -> State:
    return step(linear(x, w_input, b_input), linear(state[0], w_hidden, b_hidden), state)


@decomposition(aten.gru_cell.default)
def gru_cell(x: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
    """[N, I], [N, H] -> [N, H]"""
    return _cell(_gru_step, x, (hx,), w_ih, w_hh, b_ih, b_hh)[0]


@decomposition(aten.lstm_cell.default)
def lstm_cell(x: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
    """[N, I], ([N, H], [N, H]) -> [N, H], [N, H]"""
    return _cell(_lstm_step, x, tuple(hx), w_ih, w_hh, b_ih, b_hh)


@decomposition(aten.rnn_relu_cell.default)
def rnn_relu_cell(x: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
    """[N, I], [N, H] -> [N, H]"""
    return _cell(_relu_step, x, (hx,), w_ih, w_hh, b_ih, b_hh)[0]


@decomposition(aten.rnn_tanh_cell.default)
def rnn_tanh_cell(x: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
    """[N, I], [N, H] -> [N, H]"""
    return _cell(_tanh_step, x, (hx,), w_ih, w_hh, b_ih, b_hh)[0]


# -- the fused part of a cell on a GPU: gates to states, elementwise but for the biases ------------


def _register_fused(op: Any) -> None:
    @batching_rule(op, state="family")
    def fused(
        info: Any,
        in_dims: Any,
        from_input: Any,
        from_hidden: Any,
        state: Any,
        b_input: Any = None,
        b_hidden: Any = None,
    ) -> Any:
        """[B, N, G], twice, [B, N, H], [B, G], twice -> [B, N, ...]: B joins N."""
        size = info.batch_size
        gates = [
            fold(v, d, 0, size) for v, d in zip((from_input, from_hidden), in_dims, strict=False)
        ]
        biases = (b_input, b_hidden)
        if any(d is not None for d in in_dims[3:]):  # a row of its own for every example
            gates = [
                (unfold(v, 0, size) + ensure_batched(b, d, size).unsqueeze(1)).flatten(0, 1)
                for v, b, d in zip(gates, biases, in_dims[3:], strict=True)
            ]
            biases = (None, None)
        outs = op(*gates, fold(state, in_dims[2], 0, size), *biases)
        return tuple(unfold(out, 0, size) for out in outs), 0


_register_fused(aten._thnn_fused_gru_cell.default)
_register_fused(aten._thnn_fused_lstm_cell.default)


def _register_fused_backward(op: Any, sums: tuple[int, ...]) -> None:
    """`sums` are the outputs whose sums over N are the cotangents of the biases."""

    @batching_rule(op, state="family")
    def fused_backward(info: Any, in_dims: Any, *args: Any) -> Any:
        """[B, N, ...], for each operand -> the same, and [B, G] for each bias."""
        size = info.batch_size
        *operands, has_bias = args
        folded = [
            None if v is None else fold(v, d, 0, size)
            for v, d in zip(operands, in_dims[:-1], strict=True)
        ]
        found = op(*folded, False)[: -len(sums)]
        outs = [unfold(out, 0, size) for out in found]
        rows = [outs[at].sum(1) if has_bias else None for at in sums]
        return (*outs, *rows), 0


_register_fused_backward(aten._thnn_fused_gru_cell_backward.default, (0, 1))
_register_fused_backward(aten._thnn_fused_lstm_cell_backward_impl.default, (0,))
