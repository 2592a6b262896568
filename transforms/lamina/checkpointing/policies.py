"""What `checkpoint` keeps of a function's first run: policies, under the names that JAX gave them.

A policy is asked about each ATen op on plain tensors, in the form in which transforms and PyTorch
hand it to the kernels: `policy(op, *args, **kwargs)`. For a value named by `checkpoint_name` it is
asked as `policy(checkpoint_name, tensor, name=name)`. Dots are matrix products, attention among
them; a dot has batch dims if both its operands run over them (`torch.bmm` of more than one matrix).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lamina.checkpointing.kept import DROP, Offload
from lamina.checkpointing.rematerialise import Policy, checkpoint_name
from lamina_core.errors import StructureError, message
from lamina_core.overloads import aten

__all__ = [
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "everything_saveable",
    "nothing_saveable",
    "offload_dot_with_no_batch_dims",
    "save_and_offload_only_these_names",
    "save_any_names_but_these",
    "save_anything_except_these_names",
    "save_from_both_policies",
    "save_only_these_names",
]

# The positions of the two factors.
_PRODUCTS: dict[Any, tuple[int, int]] = {
    aten.addbmm.default: (1, 2),
    aten.addmm.default: (1, 2),
    aten.addmv.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.bmm.default: (0, 1),
    aten.dot.default: (0, 1),
    aten.linear.default: (0, 1),
    aten.matmul.default: (0, 1),
    aten.mm.default: (0, 1),
    aten.mv.default: (0, 1),
    aten.vdot.default: (0, 1),
}
_ATTENTION = frozenset(
    getattr(aten, name).default
    for name in (
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "scaled_dot_product_attention",
    )
)


def everything_saveable(op: Any, *args: Any, **kwargs: Any) -> bool:
    """Keep all, as if there were no checkpoint (views and random ops are made again)."""
    return True


def nothing_saveable(op: Any, *args: Any, **kwargs: Any) -> bool:
    """Keep nothing but the arguments, as without a policy."""
    return False


def dots_saveable(op: Any, *args: Any, **kwargs: Any) -> bool:
    """Keep the results of matrix products, which cost most to compute.

    Example:
        >>> import torch
        >>> from lamina import checkpoint, checkpoint_policies, grad
        >>> layer = checkpoint(
        ...     lambda x, w: (x @ w).tanh().exp().sum(), policy=checkpoint_policies.dots_saveable
        ... )
        >>> grad(layer)(torch.zeros(1, 2), torch.eye(2))
        tensor([[1., 1.]])
    """
    return op in _PRODUCTS or op in _ATTENTION


def dots_with_no_batch_dims_saveable(op: Any, *args: Any, **kwargs: Any) -> bool:
    """Keep the results of matrix products with weights: those without batch dims."""
    if op not in _PRODUCTS:
        return False
    first, second = (args[at] for at in _PRODUCTS[op])
    return min(first.dim(), second.dim()) <= 2 or first.shape[:-2].numel() == 1


def save_only_these_names(*names: str) -> Policy:
    """Keep the values with one of these names."""
    wanted = frozenset(names)

    def policy(op: Any, *args: Any, **kwargs: Any) -> bool:
        return op is checkpoint_name and kwargs["name"] in wanted

    return policy


def save_any_names_but_these(*names: str) -> Policy:
    """Keep the values with any other name."""
    unwanted = frozenset(names)

    def policy(op: Any, *args: Any, **kwargs: Any) -> bool:
        return op is checkpoint_name and kwargs["name"] not in unwanted

    return policy


def save_anything_except_these_names(*names: str) -> Policy:
    """Keep all values, also those without a name, except those with one of these."""
    unwanted = frozenset(names)

    def policy(op: Any, *args: Any, **kwargs: Any) -> Any:
        return DROP if op is checkpoint_name and kwargs["name"] in unwanted else True

    return policy


def save_from_both_policies(first: Policy, second: Policy) -> Policy:
    """Keep what one of two policies keeps, in the way of the first if both do."""

    def policy(op: Any, *args: Any, **kwargs: Any) -> Any:
        return first(op, *args, **kwargs) or second(op, *args, **kwargs)

    return policy


def offload_dot_with_no_batch_dims(offload_src: str, offload_dst: str) -> Policy:
    """Keep matrix products without batch dims in the memory of the host.

    Args:
        offload_src: "device".
        offload_dst: "pinned_host" or "unpinned_host".
    """
    how = _offload(offload_src, offload_dst)

    def policy(op: Any, *args: Any, **kwargs: Any) -> Any:
        return how if dots_with_no_batch_dims_saveable(op, *args, **kwargs) else False

    return policy


def save_and_offload_only_these_names(
    *,
    names_which_can_be_saved: Sequence[str],
    names_which_can_be_offloaded: Sequence[str],
    offload_src: str,
    offload_dst: str,
) -> Policy:
    """Keep the values with one of these names, some of them in the memory of the host.

    Args:
        names_which_can_be_saved: Names of values to keep where they are.
        names_which_can_be_offloaded: Names of values to keep in the memory of the host.
        offload_src: "device".
        offload_dst: "pinned_host" or "unpinned_host".

    Raises:
        StructureError: If a name is in both lists.
    """
    saved, offloaded = frozenset(names_which_can_be_saved), frozenset(names_which_can_be_offloaded)
    both = ", ".join(sorted(saved & offloaded))
    if both:
        raise StructureError(
            message(
                f"names both to be saved and to be offloaded: {both}",
                "to fix: put each name in one of the lists",
            )
        )
    how = _offload(offload_src, offload_dst)

    def policy(op: Any, *args: Any, **kwargs: Any) -> Any:
        if op is not checkpoint_name:
            return False
        return how if kwargs["name"] in offloaded else kwargs["name"] in saved

    return policy


def _offload(source: str, target: str) -> Offload:
    if source != "device" or target not in ("pinned_host", "unpinned_host"):
        raise StructureError(
            message(
                f"offloading from {source!r} to {target!r}",
                "to fix: offload from 'device' to 'pinned_host' or 'unpinned_host'",
            )
        )
    return Offload(pinned=target == "pinned_host")
