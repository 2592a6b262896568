"""Pytrees: nested containers taken apart into a list of leaves and a spec, and put together again.

optree does the work, in its namespace "lamina". The conventions on top of it:

* `None` is a leaf. What an absent argument or gradient means is for a transform to say.
* Containers are tuples, lists, dicts, `OrderedDict`, `defaultdict`, deques, namedtuples, struct
  sequences such as `torch.return_types.max`, `UserDict`, and every type registered with
  `register_node`, with optree (in the namespace "lamina" or globally) or with torch's own pytree
  module. All else is a leaf; so are instances of unregistered subclasses of builtin containers.
* Containers that torch knows are taken apart as torch does it: in its dataclasses a field that is
  None belongs to the structure and is no leaf.
* Dict leaves come in the order of the sorted keys, so equal dicts have equal specs. Keys of several
  types are grouped by type; where keys do not compare at all they keep insertion order.
* Unflattening restores the exact type, and the key order of the tree that was flattened.
"""

from __future__ import annotations

import threading
from collections import UserDict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypeVar

import optree
import torch
from optree import PyTreeSpec

from lamina_core.errors import StructureError, message
from lamina_core.torch_hooks.pytrees import TORCH_NODES, GetAttrKey, MappingKey, NodeDef

__all__ = [
    "PyTreeSpec",
    "broadcast_prefix",
    "flatten",
    "flatten_with_paths",
    "is_leaf",
    "leaves",
    "register_node",
    "structure",
    "tree_map",
    "unflatten",
]

NAMESPACE = "lamina"

_T = TypeVar("_T")
_FlattenFunc = Callable[
    [_T], tuple[Iterable[Any], Any] | tuple[Iterable[Any], Any, Iterable[Any] | None]
]


# The spec of a single leaf.
_ANY_LEAF: Any = 0
LEAF = optree.tree_structure(_ANY_LEAF, none_is_leaf=True, namespace=NAMESPACE)


# Flatten and unflatten.


def flatten(tree: Any) -> tuple[list[Any], PyTreeSpec]:
    """Take a tree apart: its leaves in order, and the spec that `unflatten` needs.

    >>> flatten({"w": [1, 2], "b": None})
    ([None, 1, 2], PyTreeSpec({'b': *, 'w': [*, *]}, NoneIsLeaf))
    """
    # Part of the fixed cost of every transform call: one C++ call and a look at the leaves, 1 us
    # for a tuple of one tensor. Each container type that torch knows takes another round, once.
    if isinstance(tree, torch.Tensor):
        return [tree], LEAF  # the usual argument and the usual output
    while True:
        flat, spec = optree.tree_flatten(tree, none_is_leaf=True, namespace=NAMESPACE)
        if _leaf_types.issuperset(map(type, flat)) and len(TORCH_NODES) == _torch_nodes_seen:
            return flat, spec
        if not _adopt_torch_nodes(flat):
            return flat, spec


def unflatten(spec: PyTreeSpec, flat: Iterable[Any]) -> Any:
    """Put a tree together again, with other leaves perhaps.

    >>> tree = {"w": [1, 2], "b": None}
    >>> flat, spec = flatten(tree)
    >>> unflatten(spec, flat)
    {'w': [1, 2], 'b': None}
    """
    if spec is LEAF:
        (leaf,) = flat
        return leaf
    return spec.unflatten(flat)


def leaves(tree: Any) -> list[Any]:
    """List the leaves of a tree.

    >>> leaves((1, {"a": None}))
    [1, None]
    """
    return flatten(tree)[0]


def structure(tree: Any) -> PyTreeSpec:
    """Give the spec of a tree; specs compare equal when the trees differ in their leaves alone.

    >>> structure([1, 2]) == structure([3, None])
    True
    """
    return flatten(tree)[1]


def tree_map(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Apply `fn` leaf by leaf; trees in `rest` must have the structure of the first, or go deeper.

    >>> tree_map(lambda x, y: x + y, {"a": 1, "b": (2,)}, {"a": 10, "b": (20,)})
    {'a': 11, 'b': (22,)}
    """
    flat, spec = flatten(tree)
    columns = [flat]
    for position, other in enumerate(rest, start=2):
        try:
            columns.append(spec.flatten_up_to(other))
        except ValueError as error:
            what = f"tree {position} of tree_map does not fit the first tree"
            raise StructureError(message(what, str(error))) from None
    return spec.unflatten(map(fn, *columns))


def is_leaf(x: Any) -> bool:
    """Say whether `x` is a leaf: None, a tensor, or anything that is not a registered container.

    >>> is_leaf(None), is_leaf("text"), is_leaf(())
    (True, True, False)
    """
    if not optree.tree_is_leaf(x, none_is_leaf=True, namespace=NAMESPACE):
        return False
    return type(x) not in TORCH_NODES or not _adopt_torch_nodes([x])


def flatten_with_paths(tree: Any) -> tuple[list[str], list[Any], PyTreeSpec]:
    """Flatten, and name each leaf by the Python expression that reaches it, for error messages.

    >>> paths, _, _ = flatten_with_paths({"w": [1, 2]})
    >>> paths
    ["['w'][0]", "['w'][1]"]
    >>> flatten_with_paths(3)[0]
    ['']
    """
    flat, spec = flatten(tree)
    return [accessor.codify("") for accessor in spec.accessors()], flat, spec


# Prefixes: `in_dims`, `out_dims` and the like.


def broadcast_prefix(
    prefix: Any,
    tree_or_spec: Any,
    *,
    what: str,
    of: str,
    is_prefix_leaf: Callable[[Any], bool] | None = None,
) -> list[Any]:
    """Spread a prefix of a tree over its leaves: one entry per leaf of the tree.

    A leaf of the prefix, such as an int or None, holds for the whole subtree in its place. Any
    sequence may stand for any other (a list for a tuple of arguments, a tuple for a namedtuple) and
    any mapping with the same keys for another; namedtuples of two types do not match. A container
    for which `is_prefix_leaf` answers True is one value. `what` and `of` name prefix and tree in
    the error. The values are not judged here.

    >>> args = (7, {"b": 8, "w": (9, 9)})
    >>> broadcast_prefix([0, {"w": None, "b": 1}], args, what="in_dims", of="args")
    [0, 1, None, None]
    >>> broadcast_prefix((0, 0), ([5],), what="in_dims", of="args")
    Traceback (most recent call last):
    lamina_core.errors.StructureError: in_dims does not fit args
      in_dims has 2 entries but args has 1
      to fix: write in_dims like args, or put one value in its place for the whole of args
    """
    spec = tree_or_spec if isinstance(tree_or_spec, PyTreeSpec) else structure(tree_or_spec)

    stop = is_prefix_leaf or is_leaf
    # One value an argument is the usual case; this way takes 1 us, and 4 us without it.
    if stop is is_leaf and type(prefix) in (tuple, list) and spec.type in (tuple, list):
        plain = _DIM_TYPES.issuperset(map(type, prefix))
        if plain and len(prefix) == spec.num_leaves == spec.num_nodes - 1:
            return list(prefix)

    def spread(part: Any, below: PyTreeSpec, trail: tuple[int, ...]) -> list[Any]:
        if part is None or type(part) is int or stop(part) or is_leaf(part):
            return [part] * below.num_leaves
        try:
            parts = _match(part, below)
        except _MismatchError as error:
            _raise_mismatch(error, prefix, spec, trail, what, of)
        entries: list[Any] = []
        for i, (child, child_spec) in enumerate(zip(parts, below.children(), strict=True)):
            entries += spread(child, child_spec, (*trail, i))
        return entries

    return spread(prefix, spec, ())


_DIM_TYPES = frozenset((int, type(None)))


class _MismatchError(Exception):
    """Lines about a node where prefix and tree part; `{0}` and `{1}` stand for the two places."""


def _match(prefix: Any, spec: PyTreeSpec) -> list[Any]:
    """Children of a prefix node, one for each child of the node of the tree in its order."""
    node, given = spec.type, type(prefix)
    if node is None:
        raise _MismatchError(f"{{0}} is of type {given.__name__} but {{1}} is a single leaf")
    if issubclass(node, Mapping) and isinstance(prefix, Mapping):
        keys = [entry.key if isinstance(entry, MappingKey) else entry for entry in spec.entries()]
        missing = [key for key in keys if key not in prefix]
        extra = list(prefix.keys() - set(keys))
        if missing or extra:
            raise _MismatchError(
                _listing("keys of {1} that {0} lacks", missing),
                _listing("keys of {0} that {1} lacks", extra),
            )
        return [prefix[key] for key in keys]
    sequences = (tuple, list, deque)
    if issubclass(node, sequences) and isinstance(prefix, sequences):
        named = optree.is_namedtuple_class(node) and optree.is_namedtuple_class(given)
        if node is given or not named:
            return _of_length(list(prefix), spec)
    elif node is given:
        return _match_custom(prefix, spec)
    raise _MismatchError(f"{{0}} is of type {given.__name__} but {{1}} is of type {node.__name__}")


def _match_custom(prefix: Any, spec: PyTreeSpec) -> list[Any]:
    """Children of a prefix node of a registered type, which the node of the tree has too."""
    level = optree.tree_flatten_one_level(prefix, none_is_leaf=True, namespace=NAMESPACE)
    children, _, entries, _ = level
    wanted = spec.entries()
    if not all(isinstance(entry, GetAttrKey) for entry in (*wanted, *entries)):
        return _of_length(list(children), spec)
    # torch's dataclasses leave out the fields that are None, in a prefix and in a tree alike.
    given = dict(zip(entries, children, strict=True))
    return [given.get(entry) for entry in wanted]


def _of_length(children: list[Any], spec: PyTreeSpec) -> list[Any]:
    count, wanted = len(children), spec.num_children
    if count != wanted:
        entries = "entry" if count == 1 else "entries"
        raise _MismatchError(f"{{0}} has {count} {entries} but {{1}} has {wanted}")
    return children


def _listing(title: str, keys: list[Any]) -> str:
    shown = ", ".join(sorted(map(repr, keys))).replace("{", "{{").replace("}", "}}")
    return f"{title}: {shown}" if keys else ""


def _raise_mismatch(
    error: _MismatchError, prefix: Any, spec: PyTreeSpec, trail: tuple[int, ...], what: str, of: str
) -> NoReturn:
    """Raise the error of a mismatch at the node that `trail` leads to, child by child."""
    here, there = what, of
    for i in trail:
        step = _step(spec, i)
        here += f"[{i}]" if type(prefix) in (tuple, list, deque) else step
        there += step
        prefix, spec = _match(prefix, spec)[i], spec.child(i)
    advice = f"write {here} like {there}, or put one value in its place for the whole of {there}"
    if spec.type is None:
        advice = f"put one value in the place of {here}"
    lines = [str(line).format(here, there) for line in error.args]
    report = message(f"{what} does not fit {of}", *lines, f"to fix: {advice}")
    raise StructureError(report) from None


def _step(spec: PyTreeSpec, i: int) -> str:
    """Name the way from a node to its child `i`: the first step to the first leaf below it."""
    children = spec.children()
    if children[i].num_leaves == 0:
        return f"[{spec.entry(i)!r}]"
    return spec.accessors()[sum(child.num_leaves for child in children[:i])][0].codify("")


# Registration.

# Types known to be leaves. Others are looked up among torch's nodes when first met, and join the
# set when torch does not know them; it shrinks to these again when torch learns of new nodes.
_PLAIN_LEAF_TYPES: set[type] = {torch.Tensor, torch.nn.Parameter, torch.dtype, torch.device}
_PLAIN_LEAF_TYPES |= {int, float, bool, complex, str, bytes, type(None)}
_leaf_types = _PLAIN_LEAF_TYPES.copy()
_torch_nodes_seen = len(TORCH_NODES)
_adopted: set[type] = set()
_lock = threading.Lock()


def register_node(
    cls: type[_T],
    flatten_func: _FlattenFunc[_T],
    unflatten_func: Callable[[Any, Any], _T],
    *,
    path_entry_type: type[optree.PyTreeEntry] = optree.AutoEntry,
) -> type[_T]:
    """Make a class a container for Lamina; types registered with torch or optree need no more.

    `flatten_func(x)` gives `(children, aux)` or `(children, aux, entries)`; `entries` name the
    children in paths, in the way that `path_entry_type` says. `unflatten_func(aux, children)`
    builds the object again. `aux` is compared with `==` when specs are.

    >>> class Pair:
    ...     def __init__(self, left, right):
    ...         self.left, self.right = left, right
    >>> def take_apart(pair):
    ...     return (pair.left, pair.right), None
    >>> _ = register_node(Pair, take_apart, lambda _, children: Pair(*children))
    >>> leaves([Pair(1, 2), 3])
    [1, 2, 3]
    """
    with _lock:
        if cls in _adopted:  # What the user says explicitly goes before what torch was told.
            optree.unregister_pytree_node(cls, namespace=NAMESPACE)
            _adopted.discard(cls)
        _register(cls, flatten_func, unflatten_func, path_entry_type)
    return cls


def _register(cls: Any, flatten_func: Any, unflatten_func: Any, entry: Any) -> None:
    optree.register_pytree_node(
        cls, flatten_func, unflatten_func, path_entry_type=entry, namespace=NAMESPACE
    )


def _is_registered(cls: type) -> bool:
    return optree.register_pytree_node.get(cls, namespace=NAMESPACE) is not None


class _TorchEntry(optree.PyTreeEntry):
    """A step of a path into a container that torch knows: one of its `KeyEntry`s, or an index."""

    __slots__ = ()

    def __call__(self, obj: Any, /) -> Any:
        return self.entry.get(obj)

    def codify(self, /, node: str = "") -> str:
        return super().codify(node) if isinstance(self.entry, int) else f"{node}{self.entry}"


def _adopt_torch_nodes(flat: Iterable[Any]) -> bool:
    """Register the types of `flat` that torch knows as containers; say whether there are any."""
    global _torch_nodes_seen
    found = False
    with _lock:
        if len(TORCH_NODES) != _torch_nodes_seen:
            _torch_nodes_seen = len(TORCH_NODES)
            _leaf_types.intersection_update(_PLAIN_LEAF_TYPES)
        for cls in set(map(type, flat)) - _leaf_types:
            node = TORCH_NODES.get(cls)
            if node is None:
                _leaf_types.add(cls)
                continue
            found = True
            if not _is_registered(cls):
                _register(cls, *_adapt(node), _TorchEntry)
                _adopted.add(cls)
    return found


def _adapt(node: NodeDef) -> tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]:
    """Turn torch's functions for a container into optree's; torch's context is the aux data."""
    with_keys = node.flatten_with_keys_fn

    def flatten_func(x: Any) -> tuple[Iterable[Any], Any, Iterable[Any] | None]:
        children, context = node.flatten_fn(x)
        entries: list[Any] | None = None
        if with_keys is not None:
            # Only the keys: the context beside them is not always the one `unflatten_fn` takes.
            entries = [key for key, _ in with_keys(x)[0]]
        elif isinstance(x, Mapping) and list(map(id, children)) == list(map(id, x.values())):
            entries = list(map(MappingKey, x))
        return children, context, entries

    def unflatten_func(context: Any, children: Iterable[Any]) -> Any:
        return node.unflatten_fn(list(children), context)

    return flatten_func, unflatten_func


def _build_size(_: None, children: Iterable[Any]) -> Any:
    sizes = tuple(children)
    return torch.Size(sizes) if all(isinstance(n, int | torch.SymInt) for n in sizes) else sizes


if not _is_registered(UserDict):  # both are when this module is loaded again
    register_node(
        UserDict,
        lambda x: (list(x.values()), tuple(x), tuple(x)),
        lambda keys, children: UserDict(zip(keys, children, strict=True)),
        path_entry_type=optree.MappingEntry,
    )
    # torch knows its sizes as nodes, but builds a plain tuple; so do we where other things fill it.
    register_node(torch.Size, lambda x: (tuple(x), None), _build_size)
