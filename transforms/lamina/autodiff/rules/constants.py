"""Ops whose results have no derivative: comparisons, roundings, positions, factories, draws.

Gradients through them are zeros, as PyTorch gives them for the roundings.
"""

from __future__ import annotations

from lamina.autodiff.declare import constant
from lamina_core.overloads import aten
from lamina_core.schema import facts
from lamina_core.schema_record import is_recorded

COMPARISONS = """
    allclose any all eq equal ge greater gt is_nonzero isclose isfinite isin isinf isnan isneginf
    isposinf isreal le less logical_and logical_not logical_or logical_xor lt ne signbit
"""
INTEGERS = """
    __and__ __lshift__ __or__ __rshift__ __xor__ bitwise_and bitwise_left_shift bitwise_not
    bitwise_or bitwise_right_shift bitwise_xor bincount bucketize count_nonzero gcd histc lcm
    nonzero nonzero_static searchsorted
"""
POSITIONS = "argmax argmin argsort"
ROUNDINGS = """
    ceil fix floor floor_divide heaviside round sign trunc
"""
FACTORIES = """
    _local_scalar_dense detach empty_like full_like item new_empty new_empty_strided new_full
    new_ones new_zeros ones_like rand_like randint_like randn_like zero zeros_like
"""
# Of what a draw overwrites, only the shape and dtype are left; `bernoulli` is PyTorch's own zero.
DRAWS = """
    bernoulli cauchy exponential geometric log_normal normal_functional random uniform
"""
# What is drawn from a key depends on nothing else.
KEYED = """
    _philox_key_fold_in _philox_key_split _philox_normal _philox_randint _philox_uniform
"""


def overloads(names: str) -> list[object]:
    """Every overload of the ops that writes to nothing."""
    found = []
    for name in names.split():
        packet = getattr(aten, name)
        for overload in packet.overloads():
            op = getattr(packet, overload)
            if not is_recorded(op):  # newer than these lists
                continue
            kinds = {str(a.type) for a in op._schema.arguments}
            if facts(op).mutated or not kinds & {"Tensor", "List[Tensor]"}:
                continue
            found.append(op)
    return found


constant(*overloads(COMPARISONS))
constant(*overloads(INTEGERS))
constant(*overloads(POSITIONS))
constant(*overloads(ROUNDINGS))
constant(*overloads(FACTORIES))
constant(*overloads(DRAWS))
constant(*overloads(KEYED))
constant(aten.fill.Scalar)  # of what it overwrites, only the shape and dtype are left
