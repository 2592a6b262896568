"""What an op's schema says, worked out once per `OpOverload` and kept.

`facts(op)` answers: which arguments hold tensors, is it a view, what does it write to, is it
random, which op does the same out of place. Nothing on the hot path reads a schema again.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina_core.torch_hooks.registry import BINDINGS, has_kernel

__all__ = [
    "FACTORY_OPTIONS",
    "OpFacts",
    "facts",
    "is_tensor_list_type",
    "is_tensor_type",
    "reads_bits",
    "resolved",
]

# Ops that are random although torch does not tag them so: they decompose into tagged ones, or draw
# through a generator they do not name.
_ALSO_RANDOM = frozenset(
    {
        "aten::dropout",
        "aten::feature_dropout",
        "aten::alpha_dropout",
        "aten::feature_alpha_dropout",
    }
)
# Elementwise although torch does not tag them so. The parts of hardswish and log_sigmoid have other
# derivatives than these at the places where the parts have kinks.
_ALSO_POINTWISE = frozenset(
    {
        "aten::_conj_physical",  # tagged in later versions than 2.11
        "aten::complex",
        "aten::hardswish",
        "aten::leaky_relu",  # tagged from torch 2.12 on
        "aten::log_sigmoid",
        "aten::polar",
        "aten::rsub",
    }
)
# Tagged as random for one argument only; what they do otherwise is deterministic.
_NOT_RANDOM = frozenset({"aten::scaled_dot_product_attention"})

# Said to be views, but they give their argument itself or a copy of it. What lift_fresh hands over
# has just been made by `torch.tensor`: nobody else holds that memory.
_NOT_VIEWS = frozenset({"aten::contiguous", "aten::lift_fresh", "aten::to"})
# Views where the memory allows it, and copies elsewhere.
_MAY_BE_VIEWS = frozenset({"aten::flatten", "aten::reshape"})
# Besides the views: ops whose results hold elements of their operands, moved, repeated or left out.
# What writes through a view ends in is among them.
_STRUCTURAL = frozenset(
    f"aten::{name}"
    for name in (
        "_reshape_copy",
        "_unsafe_view",
        "as_strided_scatter",
        "cat",
        "clone",
        "contiguous",
        "diagonal_scatter",
        "flip",
        "lift_fresh",
        "repeat",
        "roll",
        "select_scatter",
        "slice_scatter",
        "stack",
    )
)
# Their results depend on the shape, dtype and device of their operands, and on no element.
_SHAPE_ALONE = frozenset(
    f"aten::{name}"
    for name in (
        "_has_same_storage_numel",
        "_new_zeros_with_same_feature_meta",
        "empty_like",
        "full_like",
        "is_same_size",
        "new_empty",
        "new_empty_strided",
        "new_full",
        "new_ones",
        "new_zeros",
        "ones_like",
        "zeros_like",
    )
)


def is_tensor_type(kind: str) -> bool:
    """Whether a schema type is a tensor or an optional tensor."""
    return kind in ("Tensor", "Optional[Tensor]")


def is_tensor_list_type(kind: str) -> bool:
    """Whether a schema type is a list of (optional) tensors."""
    return kind in ("List[Tensor]", "List[Optional[Tensor]]", "Optional[List[Tensor]]")


class OpFacts:
    """The facts of one overload.

    Attributes:
        op: The overload itself.
        call: What runs the op fastest: PyTorch's own Python binding, where there is one, parses
            the arguments in half the time that an `OpOverload` takes (1.1 against 1.9 us).
        name: How messages name it, such as `aten.sum.dim_IntList`.
        arg_names: Names of all arguments in schema order.
        tensor_args: Positions of positional arguments that hold a tensor.
        list_args: Positions of positional arguments that hold a list of tensors.
        tensor_kwargs: Names of keyword-only arguments that hold a tensor or a list of them.
        may_be_view: The output shares memory with the first argument, or is a copy of it.
        is_view: The output shares memory with the first argument, which is not written.
        mutated: Positions (or keyword names) of the arguments that the op writes to.
        is_random: Draws random numbers.
        is_structural: Its results hold elements of its operands, moved, repeated or left out.
        shape_alone: Reads the shape, dtype and device of its operands, and none of their elements.
        is_pointwise: Tagged as elementwise.
        is_composite: Made of other ops by a C++ function that `decompose` can run.
        returns: The kinds of the outputs: "tensor", "list" or "other".
    """

    __slots__ = (
        "_functional",
        "arg_names",
        "call",
        "is_composite",
        "is_pointwise",
        "is_random",
        "is_structural",
        "is_view",
        "list_args",
        "may_be_view",
        "mutated",
        "name",
        "op",
        "positional",
        "returns",
        "shape_alone",
        "tensor_args",
        "tensor_kwargs",
    )

    def __init__(self, op: Any) -> None:
        schema = op._schema
        self.op = op
        self.name = str(op)
        self.arg_names = tuple(argument.name for argument in schema.arguments)
        self.positional = tuple(a.name for a in schema.arguments if not a.kwarg_only)
        tensors, lists, keywords, mutated = [], [], [], []
        for position, argument in enumerate(schema.arguments):
            kind = str(argument.type)
            holds_tensor, holds_list = is_tensor_type(kind), is_tensor_list_type(kind)
            if argument.kwarg_only:
                if holds_tensor or holds_list:
                    keywords.append(argument.name)
            elif holds_tensor:
                tensors.append(position)
            elif holds_list:
                lists.append(position)
            if argument.alias_info is not None and argument.alias_info.is_write:
                mutated.append(argument.name if argument.kwarg_only else position)
        self.tensor_args = tuple(tensors)
        self.list_args = tuple(lists)
        self.tensor_kwargs = tuple(keywords)
        self.mutated: tuple[int | str, ...] = tuple(mutated)
        self.may_be_view = schema.name in _MAY_BE_VIEWS
        self.is_view = bool(op.is_view) and schema.name not in _NOT_VIEWS and not self.may_be_view
        self.is_pointwise = torch.Tag.pointwise in op.tags or schema.name in _ALSO_POINTWISE
        self.is_random = (
            torch.Tag.nondeterministic_seeded in op.tags or schema.name in _ALSO_RANDOM
        ) and schema.name not in _NOT_RANDOM
        self.shape_alone = schema.name in _SHAPE_ALONE
        self.is_structural = (
            self.is_view or self.may_be_view or schema.name in _STRUCTURAL
        ) and not mutated
        # Overloads of TorchScript alone (aten.any.str) are listed, but the dispatcher lacks them.
        known_to_dispatcher = has_kernel(op.name())
        self.is_composite = known_to_dispatcher and op._can_decompose()
        self.returns = tuple(_return_kind(str(r.type)) for r in schema.returns)
        self._functional: Any = False
        # `_op` is what an OpOverload calls; calling it directly saves 0.4 us.
        # A binding takes no None in a list of tensors, as indices have it, and some have another
        # default for `reduction`, which torch leaves out where it is that of the schema.
        fast = (
            self.returns == ("tensor",)
            and not (self.is_random or self.mutated or lists)
            and "reduction" not in self.arg_names
        )
        self.call = _fast_call(op) if fast else op._op
        if reads_bits(op):
            self.call = _resolved_call(op)

    def functional(self) -> Any:
        """The overload that computes what this one writes, out of place; None if there is none.

        `aten.add_.Tensor` gives `aten.add.Tensor`, `aten.sum.IntList_out` gives
        `aten.sum.dim_IntList`: the overload whose arguments are those of this one without the
        written-only `out`s. `aten.ones.out` gives `aten.ones.default`, which has `FACTORY_OPTIONS`
        besides.
        """
        if self._functional is False:
            self._functional = _find_functional(self)
        return self._functional

    def is_out_variant(self) -> bool:
        """Whether the op writes to keyword `out` arguments only."""
        return bool(self.mutated) and all(isinstance(m, str) for m in self.mutated)


def reads_bits(op: Any) -> bool:
    """Whether an op refuses what is lazily conjugated or negated.

    User code cannot see that the value of a wrapper is, and need not ask for the memory to be
    brought up to date.
    """
    return id(op) in _READ_BITS


_READ_BITS = frozenset(map(id, (torch.ops.aten.view_as_real.default, torch.ops.aten.view.dtype)))


def _resolved_call(op: Any) -> Any:
    call = op._op
    return lambda x, *args: call(resolved(x), *args)


def resolved(x: Any) -> Any:
    """A tensor with its memory brought up to date: itself, or a copy."""
    return x.resolve_conj().resolve_neg()


def _fast_call(op: Any) -> Any:
    base = op._schema.name.removeprefix("aten::")
    for home in BINDINGS:
        binding = getattr(home, base, None)
        if type(binding) is type(torch.sin) or type(binding) is type(torch.Tensor.view):
            return binding
    return op._op


def _return_kind(kind: str) -> str:
    if is_tensor_type(kind):
        return "tensor"
    return "list" if is_tensor_list_type(kind) else "other"


def _find_functional(known: OpFacts) -> Any:
    namespace, base = known.op._schema.name.split("::")
    packets = getattr(torch.ops, namespace)
    names = [base]
    if not known.is_out_variant():
        stem = base.removesuffix("_")
        names = [stem, f"{stem}_functional", f"{base}_functional"]
        if base.startswith("__i"):  # `__iand__` writes what `__and__` computes
            names.append("__" + base.removeprefix("__i"))
    outs = set(known.mutated) if known.is_out_variant() else set()
    wanted = _signature(a for a in known.op._schema.arguments if a.name not in outs)
    for name in names:
        packet = getattr(packets, name, None)
        if packet is None:
            continue
        for overload in packet.overloads():
            candidate = getattr(packet, overload)
            schema = candidate._schema
            if any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments):
                continue
            if _signature(schema.arguments) == wanted:
                return candidate
            if known.is_out_variant() and _makes_tensors(schema):
                rest = [a for a in schema.arguments if a.name not in FACTORY_OPTIONS]
                if _signature(rest) == wanted:
                    return candidate
    return None


# What a factory is told about its result, and its `out=` variant reads off `out`.
FACTORY_OPTIONS = ("dtype", "layout", "device", "pin_memory")


def _makes_tensors(schema: Any) -> bool:
    return {argument.name for argument in schema.arguments} >= set(FACTORY_OPTIONS)


def _signature(arguments: Any) -> list[tuple[str, str]]:
    """Names and types; the first operand is called `self` here and `input` there."""
    pairs = [(argument.name, str(argument.type)) for argument in arguments]
    return [("self" if name == "input" else name, kind) for name, kind in pairs]


_FACTS: dict[int, OpFacts] = {}


def facts(op: Any) -> OpFacts:
    """The facts of an overload, from the cache.

    Example:
        >>> import torch
        >>> add_ = facts(torch.ops.aten.add_.Tensor)
        >>> add_.tensor_args, add_.mutated, add_.functional()
        ((0, 1), (0,), <OpOverload(op='aten.add', overload='Tensor')>)
    """
    # Keyed by id: the hash of an OpOverload is a Python method and costs 120 ns. The entry keeps
    # the overload alive, so the id stays its own.
    found = _FACTS.get(id(op))
    if found is None:
        found = _FACTS[id(op)] = OpFacts(op)
    return found
