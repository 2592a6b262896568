"""The ops that run example by example on purpose, each with the reason.

They are exceptions: whatever has a batched form has a rule. `lamina.config.fallback` holds for them
as for an op without a rule, and the warning tells the reason.
"""

from __future__ import annotations

from typing import Any

from lamina_core.overloads import aten

__all__ = ["LOOPED"]

_INTEGERS = "PyTorch has no product of batches of integer matrices"
_PACKED = "its kernel packs or reads the packed weights of one matrix"
_PROCESSES = "a part of SyncBatchNorm, which exchanges what it computes with other processes"
_SCALED = "its kernel scales the rows or tiles of one matrix"

LOOPED: dict[Any, str] = {
    aten._convert_weight_to_int4pack.default: _PACKED,
    aten._convert_weight_to_int4pack_for_cpu.default: _PACKED,
    aten._dyn_quant_matmul_4bit.default: _PACKED,
    aten._dyn_quant_pack_4bit_weight.default: _PACKED,
    aten._int_mm.default: _INTEGERS,
    aten._scaled_mm.default: _SCALED,
    aten._scaled_mm_v2.default: _SCALED,
    aten._weight_int4pack_mm.default: _PACKED,
    aten._weight_int4pack_mm_for_cpu.default: _PACKED,
    aten._weight_int8pack_mm.default: _PACKED,
    aten.batch_norm_backward_elemt.default: _PROCESSES,
    aten.batch_norm_backward_reduce.default: _PROCESSES,
    aten.batch_norm_elemt.default: _PROCESSES,
    aten.batch_norm_gather_stats.default: _PROCESSES,
    aten.batch_norm_gather_stats_with_counts.default: _PROCESSES,
    aten.batch_norm_stats.default: _PROCESSES,
}
