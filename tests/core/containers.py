"""Containers of every kind, registered here once because registries are global."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, deque
from typing import Any, NamedTuple

import optree
import torch.utils._pytree as torch_pytree


class Point(NamedTuple):
    x: Any
    y: Any


class Range(NamedTuple):
    low: Any
    high: Any


@dataclasses.dataclass
class TorchLayer:
    """Registered with torch as a dataclass."""

    weight: Any
    bias: Any = None
    name: str = "layer"


torch_pytree.register_dataclass(
    TorchLayer, field_names=["weight", "bias"], drop_field_names=["name"]
)


class Box:
    """Registered with torch, without keys."""

    def __init__(self, *items: Any, label: str = "") -> None:
        self.items, self.label = items, label

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Box) and (self.items, self.label) == (other.items, other.label)

    __hash__ = None  # type: ignore[assignment]


def _build_box(children: Any, label: str) -> Box:
    assert type(children) is list  # what torch gives its own nodes
    return Box(*children, label=label)


torch_pytree.register_pytree_node(Box, lambda box: (list(box.items), box.label), _build_box)


class Output(OrderedDict):
    """A dict registered with torch without keys, as the outputs of well-known libraries are."""


torch_pytree.register_pytree_node(
    Output,
    lambda out: (list(out.values()), list(out.keys())),
    lambda values, keys: Output(zip(keys, values, strict=True)),
)


@dataclasses.dataclass
class GlobalPair:
    """Registered with optree for every namespace."""

    left: Any
    right: Any


@dataclasses.dataclass
class LaminaPair:
    """Registered with optree in our namespace."""

    left: Any
    right: Any


@dataclasses.dataclass
class ForeignPair:
    """Registered with optree in a namespace that is not ours."""

    left: Any
    right: Any


for _cls, _namespace in (
    (GlobalPair, optree.registry.__GLOBAL_NAMESPACE),
    (LaminaPair, "lamina"),
    (ForeignPair, "elsewhere"),
):
    optree.register_pytree_node(
        _cls,
        lambda pair: ((pair.left, pair.right), None, ("left", "right")),
        lambda _, children, cls=_cls: cls(*children),
        path_entry_type=optree.GetAttrEntry,
        namespace=_namespace,
    )


@optree.dataclasses.dataclass(namespace="lamina")
class State:
    """A dataclass made with optree, with a static field."""

    value: Any
    step: int = optree.dataclasses.field(default=0, pytree_node=False)


class Incomparable:
    """A dict key that cannot be sorted."""


class Unregistered(dict):
    pass


def same(a: Any, b: Any) -> bool:
    """Equality that also tells the types of containers and the order of dict keys."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list, deque)):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or a == b
