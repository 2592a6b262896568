"""Derivatives of the fused LSTM layer that a CPU runs in float32; other layers are decomposed.

The pullback is the fused backward. The pushforward, and the derivatives of the pullback, are those
of the same in ordinary ops.
"""

from __future__ import annotations

from typing import Any

from lamina.autodiff.declare import vjp_rule
from lamina_core.overloads import aten

fused = aten.mkldnn_rnn_layer.default
fused_backward = aten.mkldnn_rnn_layer_backward.default


@vjp_rule(fused)
def lstm_layer_rule(
    needs: Any,
    input: Any,
    weight0: Any,
    weight1: Any,
    weight2: Any,
    weight3: Any,
    hx_: Any,
    cx_: Any,
    reverse: bool,
    batch_sizes: Any,
    *options: Any,
) -> Any:
    """[T, N, C], weights, twice [N, H] -> [T, N, H], state and cell at the end, a workspace"""
    operands = (input, weight0, weight1, weight2, weight3, hx_, cx_)
    outs = fused(*operands, reverse, batch_sizes, *options)
    return outs, (operands, outs, reverse, batch_sizes, options), _lstm_layer_pullback


def _lstm_layer_pullback(residuals: Any, needs: Any, *cts: Any) -> Any:
    operands, outs, reverse, batch_sizes, options = residuals
    mode, hidden_size, num_layers, has_biases, bidirectional, batch_first, train = options
    found = fused_backward(
        *operands,
        *outs[:3],
        *cts[:3],
        reverse,
        mode,
        hidden_size,
        num_layers,
        has_biases,
        train,
        bidirectional,
        batch_sizes,
        batch_first,
        outs[3],
    )
    return [ct if needed else None for ct, needed in zip(found, needs, strict=True)]
