"""Pytrees: round trips, foreign container types, paths, prefixes and the texts of their errors."""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from typing import Any, NamedTuple

import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
from hypothesis import given
from hypothesis import strategies as st

from lamina_core import pytree
from lamina_core.errors import LaminaError, StructureError

# The types under test. Registries are global, so each is registered once, here.


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


def extend(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keys = st.one_of(st.integers(0, 9), st.text("abc", max_size=2), st.tuples(st.integers(0, 2)))
    dicts = st.dictionaries(keys, children, max_size=3)
    lists = st.lists(children, max_size=3)
    return st.one_of(
        dicts,
        lists,
        lists.map(tuple),
        lists.map(lambda items: deque(items, maxlen=4)),
        lists.map(lambda items: Box(*items, label="b")),
        dicts.map(OrderedDict),
        dicts.map(lambda items: defaultdict(list, items)),
        dicts.map(UserDict),
        st.builds(Point, children, children),
        st.builds(TorchLayer, children, children),
        st.builds(GlobalPair, children, children),
        st.builds(State, children, st.integers(0, 3)),
    )


trees = st.recursive(st.one_of(st.none(), st.integers(), st.booleans()), extend, max_leaves=12)


# Round trips.


@given(trees)
def test_unflatten_undoes_flatten(tree):
    flat, spec = pytree.flatten(tree)
    assert same(pytree.unflatten(spec, flat), tree)
    assert len(flat) == spec.num_leaves
    assert all(map(pytree.is_leaf, flat))
    assert pytree.leaves(tree) == flat
    assert pytree.structure(tree) == spec
    assert hash(pytree.structure(tree)) == hash(spec)


@given(trees)
def test_tree_map_agrees_with_flatten(tree):
    flat, spec = pytree.flatten(tree)
    mapped = pytree.tree_map(lambda a, b: [a, b], tree, tree)
    assert same(mapped, pytree.unflatten(spec, [[leaf, leaf] for leaf in flat]))
    assert same(pytree.tree_map(lambda a: a, tree), tree)


@given(trees)
def test_a_tree_of_indices_is_a_prefix_that_gives_the_indices(tree):
    _, spec = pytree.flatten(tree)
    indices = list(range(spec.num_leaves))
    prefix = pytree.unflatten(spec, indices)
    assert pytree.broadcast_prefix(prefix, tree, what="in_dims", of="args") == indices
    assert pytree.broadcast_prefix(None, spec, what="in_dims", of="args") == [None] * len(indices)


@given(trees)
def test_there_is_a_path_for_each_leaf_and_no_two_are_equal(tree):
    paths, flat, spec = pytree.flatten_with_paths(tree)
    assert (flat, spec) == pytree.flatten(tree)
    assert len(paths) == len(set(paths)) == len(flat)


def test_none_is_a_leaf():
    assert pytree.leaves([None, (None,), {}]) == [None, None]
    assert pytree.is_leaf(None)


@pytest.mark.parametrize(
    "leaf", [torch.zeros(2), 1, True, 1.5, 1j, "ab", b"ab", torch.float32, torch.relu, object()]
)
def test_everything_unregistered_is_one_leaf(leaf):
    flat, spec = pytree.flatten(leaf)
    assert flat[0] is leaf
    assert spec.is_leaf()
    assert pytree.is_leaf(leaf)
    assert pytree.unflatten(spec, flat) is leaf


def test_an_unregistered_subclass_of_a_container_is_a_leaf():
    for leaf in (Unregistered(a=1), collections.Counter("ab"), collections.ChainMap({"a": 1})):
        assert pytree.leaves(leaf) == [leaf]
        assert pytree.is_leaf(leaf)


def test_torch_containers_are_nodes():
    result = torch.tensor([[1.0, 3.0, 2.0]]).max(dim=1)
    flat, spec = pytree.flatten(result)
    assert len(flat) == 2
    assert not pytree.is_leaf(result)
    assert type(pytree.unflatten(spec, flat)) is torch.return_types.max


def test_a_size_stays_a_size_while_ints_fill_it():
    assert same(pytree.tree_map(lambda n: n + 1, torch.Size([2, 3])), torch.Size([3, 4]))
    assert same(pytree.tree_map(lambda n: None, torch.Size([2, 3])), (None, None))


def test_default_factory_and_maxlen_survive():
    flat, spec = pytree.flatten((defaultdict(list, a=1), deque([1], maxlen=3)))
    table, queue = pytree.unflatten(spec, flat)
    assert table["new"] == []
    assert queue.maxlen == 3


# The order of dict keys.


def test_leaves_come_in_sorted_key_order_and_the_insertion_order_is_restored():
    tree = {"b": 1, "a": 2}
    flat, spec = pytree.flatten(tree)
    assert flat == [2, 1]
    assert list(pytree.unflatten(spec, flat)) == ["b", "a"]
    assert spec == pytree.structure({"a": 0, "b": 0})


def test_an_ordered_dict_keeps_its_order():
    assert pytree.leaves(OrderedDict(b=1, a=2)) == [1, 2]
    assert pytree.structure(OrderedDict(b=1, a=2)) != pytree.structure(OrderedDict(a=1, b=2))


def test_keys_of_several_types_and_keys_that_do_not_compare():
    mixed = {"b": 1, 2: 2, None: 3, (1,): 4, "a": 5, 1: 6}
    flat, spec = pytree.flatten(mixed)
    assert same(pytree.unflatten(spec, flat), mixed)
    assert spec == pytree.structure(dict(reversed(mixed.items())))

    first, second = Incomparable(), Incomparable()
    flat, spec = pytree.flatten({first: 1, second: 2})
    assert flat == [1, 2]
    assert pytree.unflatten(spec, flat) == {first: 1, second: 2}
    assert spec != pytree.structure({second: 2, first: 1})


def test_user_dict():
    tree = UserDict(b=1, a=[2, 3])
    paths, flat, spec = pytree.flatten_with_paths(tree)
    assert paths == ["['b']", "['a'][0]", "['a'][1]"]
    assert same(pytree.unflatten(spec, flat), tree)


# Types registered elsewhere.


def test_torch_dataclass():
    tree = [TorchLayer(1, 2, name="dropped")]
    paths, flat, spec = pytree.flatten_with_paths(tree)
    assert (paths, flat) == (["[0].weight", "[0].bias"], [1, 2])
    assert pytree.unflatten(spec, flat) == [TorchLayer(1, 2)]
    assert not pytree.is_leaf(tree[0])


def test_a_none_field_of_a_torch_dataclass_is_structure():
    flat, spec = pytree.flatten(TorchLayer(1))
    assert flat == [1]
    assert pytree.unflatten(spec, [5]) == TorchLayer(5, None)
    assert spec != pytree.structure(TorchLayer(1, 2))


def test_torch_node_without_keys():
    tree = {"box": Box(1, (2, 3), label="a")}
    paths, flat, spec = pytree.flatten_with_paths(tree)
    assert flat == [1, 2, 3]
    assert len(set(paths)) == 3
    assert all(path.startswith("['box'][<flat index ") for path in paths)
    assert pytree.unflatten(spec, flat) == tree
    assert spec != pytree.structure({"box": Box(1, (2, 3), label="b")})


def test_torch_mapping_without_keys_has_key_paths():
    tree = Output(logits=1, states=(2, 3))
    paths, flat, spec = pytree.flatten_with_paths(tree)
    assert paths == ["['logits']", "['states'][0]", "['states'][1]"]
    assert same(pytree.unflatten(spec, flat), tree)


def test_torch_nodes_inside_each_other():
    tree = Box(TorchLayer(Box(1), Output(a=TorchLayer(2, 3))))
    flat, spec = pytree.flatten(tree)
    assert flat == [1, 2, 3]
    assert pytree.unflatten(spec, flat) == tree


def test_is_leaf_knows_torch_nodes_before_any_flatten():
    class Fresh:
        pass

    torch_pytree.register_pytree_node(Fresh, lambda x: ([], None), lambda children, _: Fresh())
    assert not pytree.is_leaf(Fresh())


def test_optree_nodes():
    for cls in (GlobalPair, LaminaPair):
        paths, flat, spec = pytree.flatten_with_paths(cls(1, [2]))
        assert (paths, flat) == ([".left", ".right[0]"], [1, 2])
        assert pytree.unflatten(spec, flat) == cls(1, [2])
    foreign = ForeignPair(1, 2)
    assert pytree.leaves(foreign) == [foreign]


def test_optree_dataclass_keeps_its_static_field():
    paths, flat, spec = pytree.flatten_with_paths(State([1], step=4))
    assert (paths, flat) == ([".value[0]"], [1])
    assert pytree.unflatten(spec, [9]) == State([9], step=4)


def test_a_type_seen_as_a_leaf_may_be_registered_with_torch_later():
    class Late:
        def __init__(self, item):
            self.item = item

    assert len(pytree.leaves(Late(1))) == 1
    assert isinstance(pytree.leaves(Late(1))[0], Late)
    torch_pytree.register_pytree_node(
        Late, lambda late: ([late.item], None), lambda children, _: Late(*children)
    )
    assert pytree.leaves([Late(1), 2]) == [1, 2]


def test_register_node_goes_before_what_torch_knows():
    class Twice:
        def __init__(self, item):
            self.item = item

    torch_pytree.register_pytree_node(
        Twice, lambda x: ([x.item], None), lambda children, _: Twice(*children)
    )
    assert pytree.leaves(Twice(1)) == [1]
    returned = pytree.register_node(
        Twice, lambda x: ([x.item, x.item], None), lambda _, children: Twice(children[0])
    )
    assert returned is Twice
    assert pytree.leaves(Twice(1)) == [1, 1]
    with pytest.raises(ValueError, match="already registered"):
        pytree.register_node(Twice, lambda x: ([], None), lambda _, children: Twice(0))


def test_threads_that_meet_new_types_at_once_all_see_nodes():
    rounds, workers = 20, 8
    failures = []
    for _ in range(rounds):

        class New:
            def __init__(self, *items):
                self.items = items

        class Own(New):
            pass

        torch_pytree.register_pytree_node(
            New, lambda x: (list(x.items), None), lambda children, _, cls=New: cls(*children)
        )
        barrier = threading.Barrier(workers)

        def work(index, new=New, own=Own, barrier=barrier):
            barrier.wait()
            if index == 0:
                pytree.register_node(own, lambda x: (x.items, None), lambda _, items: own(*items))
            try:
                flat, spec = pytree.flatten((new(1, new(2)), 3))
                again = pytree.unflatten(spec, flat)
                if flat != [1, 2, 3] or type(again[0]) is not new:
                    failures.append(flat)
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert pytree.leaves(Own(1, 2)) == [1, 2]
    assert failures == []


# Paths.


def test_paths_read_as_python():
    tree = {"w": [Point(1, (2,)), deque([3])], 4: OrderedDict(k=State(5))}
    paths, _, _ = pytree.flatten_with_paths(tree)
    named = dict(zip(paths, pytree.leaves(tree), strict=True))
    expected = {
        "[4]['k'].value": 5,
        "['w'][0].x": 1,
        "['w'][0].y[0]": 2,
        "['w'][1][0]": 3,
    }
    assert named == expected
    for path, leaf in expected.items():
        assert eval("tree" + path, {"tree": tree}) == leaf
    assert pytree.flatten_with_paths(7)[0] == [""]
    assert pytree.flatten_with_paths(())[0] == []
    assert pytree.flatten_with_paths(torch.return_types.max((1, 2)))[0] == [".values", ".indices"]


# Prefixes.


def spread(prefix, tree, **kwargs):
    return pytree.broadcast_prefix(prefix, tree, what="in_dims", of="args", **kwargs)


@pytest.mark.parametrize(
    ("prefix", "tree", "expected"),
    [
        (0, (1, 2), [0, 0]),
        (None, {"a": 1, "b": [2, 3]}, [None] * 3),
        (0, 5, [0]),
        ((), (), []),
        (0, (), []),
        ((0, None), (1, 2), [0, None]),
        ([0, None], (1, 2), [0, None]),
        ((0, None), [1, 2], [0, None]),
        ([0, [None, 1]], (1, (2, 3)), [0, None, 1]),
        ([0, [None, 1]], (1, Point((2, 2), 3)), [0, None, None, 1]),
        (Point(0, 1), (2, 3), [0, 1]),
        (Point(0, 1), Point(2, 3), [0, 1]),
        ((0, 1), torch.return_types.max((1, 2)), [0, 1]),
        ((0, 1), deque([1, 2]), [0, 1]),
        ((2, 3), torch.Size([5, 5]), [2, 3]),
        ({"b": 1, "a": 0}, {"a": 5, "b": (6, 6)}, [0, 1, 1]),
        ({"b": 1, "a": 0}, OrderedDict(b=5, a=(6, 6)), [1, 0, 0]),
        (OrderedDict(b=1, a=0), defaultdict(int, a=5, b=6), [0, 1]),
        ({"b": 1, "a": 0}, UserDict(b=5, a=6), [1, 0]),
        (UserDict(a=0, b=1), UserDict(b=5, a=6), [1, 0]),
        ({"a": 0, "b": 1}, Output(b=5, a=6), [1, 0]),
        (Output(a=0, b=1), Output(b=5, a=6), [1, 0]),
        (TorchLayer(0, 1), TorchLayer(5, 6), [0, 1]),
        (TorchLayer(0, None), TorchLayer(5, 6), [0, None]),
        (TorchLayer(0, 1), TorchLayer(5, None), [0]),
        (State(0, step=1), State((1, 2), step=2), [0, 0]),
        (Box(0, None), Box(1, (2, 3)), [0, None, None]),
        (("a", 1.5), (1, 2), ["a", 1.5]),
    ],
)
def test_broadcast_prefix(prefix, tree, expected):
    assert spread(prefix, tree) == expected
    assert spread(prefix, pytree.structure(tree)) == expected


def test_is_prefix_leaf_stops_at_containers():
    def is_pair(x):
        return isinstance(x, tuple) and all(isinstance(item, int) for item in x)

    assert spread([(0, 1), None], (1, [2, 3]), is_prefix_leaf=is_pair) == [(0, 1), None, None]
    assert spread((0, 1), (1, 2), is_prefix_leaf=is_pair) == [(0, 1), (0, 1)]


LIKE = "\n  to fix: write {0} like {1}, or put one value in its place for the whole of {1}"


@pytest.mark.parametrize(
    ("prefix", "tree", "text"),
    [
        (
            (0, 1),
            (5,),
            "in_dims does not fit args\n"
            "  in_dims has 2 entries but args has 1" + LIKE.format("in_dims", "args"),
        ),
        (
            (0,),
            (5, 6),
            "in_dims does not fit args\n"
            "  in_dims has 1 entry but args has 2" + LIKE.format("in_dims", "args"),
        ),
        (
            (0, {"w": [0, 0, 0]}),
            (5, {"w": (6, 7)}),
            "in_dims does not fit args\n"
            "  in_dims[1]['w'] has 3 entries but args[1]['w'] has 2"
            + LIKE.format("in_dims[1]['w']", "args[1]['w']"),
        ),
        (
            ({"a": 0, "c": 0, "{": 0},),
            ({"a": 5, "b": 6, 7: 8},),
            "in_dims does not fit args\n"
            "  keys of args[0] that in_dims[0] lacks: 'b', 7\n"
            "  keys of in_dims[0] that args[0] lacks: 'c', '{'"
            + LIKE.format("in_dims[0]", "args[0]"),
        ),
        (
            ({"a": 0},),
            ((5,),),
            "in_dims does not fit args\n"
            "  in_dims[0] is of type dict but args[0] is of type tuple"
            + LIKE.format("in_dims[0]", "args[0]"),
        ),
        (
            ([0],),
            ({"a": 5},),
            "in_dims does not fit args\n"
            "  in_dims[0] is of type list but args[0] is of type dict"
            + LIKE.format("in_dims[0]", "args[0]"),
        ),
        (
            (Range(0, 1),),
            (Point(5, 6),),
            "in_dims does not fit args\n"
            "  in_dims[0] is of type Range but args[0] is of type Point"
            + LIKE.format("in_dims[0]", "args[0]"),
        ),
        (
            (0, [None]),
            (5, torch.zeros(3)),
            "in_dims does not fit args\n"
            "  in_dims[1] is of type list but args[1] is a single leaf\n"
            "  to fix: put one value in the place of in_dims[1]",
        ),
        (
            [Point(0, [0, [0, 0]])],
            (Point(5, (6, (7,))),),
            "in_dims does not fit args\n"
            "  in_dims[0].y[1] has 2 entries but args[0].y[1] has 1"
            + LIKE.format("in_dims[0].y[1]", "args[0].y[1]"),
        ),
        (
            [[0, (0, 0)]],
            (Point(5, (6,)),),
            "in_dims does not fit args\n"
            "  in_dims[0][1] has 2 entries but args[0].y has 1"
            + LIKE.format("in_dims[0][1]", "args[0].y"),
        ),
        (
            TorchLayer(0, [0, 0]),
            TorchLayer(5, [6]),
            "in_dims does not fit args\n"
            "  in_dims.bias has 2 entries but args.bias has 1"
            + LIKE.format("in_dims.bias", "args.bias"),
        ),
        (
            {"a": 0, "b": (0,)},
            {"a": 5, "b": ()},
            "in_dims does not fit args\n"
            "  in_dims['b'] has 1 entry but args['b'] has 0"
            + LIKE.format("in_dims['b']", "args['b']"),
        ),
        (
            [Box(0)],
            [Box(1, 2)],
            "in_dims does not fit args\n"
            "  in_dims[0] has 1 entry but args[0] has 2" + LIKE.format("in_dims[0]", "args[0]"),
        ),
    ],
)
def test_the_error_of_a_mismatch_names_the_place(prefix, tree, text):
    with pytest.raises(StructureError) as caught:
        spread(prefix, tree)
    assert str(caught.value) == text
    assert isinstance(caught.value, LaminaError)
    assert isinstance(caught.value, ValueError)


def test_the_names_in_the_error_are_the_caller_s():
    with pytest.raises(StructureError) as caught:
        pytree.broadcast_prefix((0, 0), torch.zeros(2), what="out_dims", of="the output")
    assert str(caught.value) == (
        "out_dims does not fit the output\n"
        "  out_dims is of type tuple but the output is a single leaf\n"
        "  to fix: put one value in the place of out_dims"
    )


def test_the_error_of_tree_map():
    with pytest.raises(StructureError) as caught:
        pytree.tree_map(lambda a, b: a, {"a": (1,)}, {"a": [1]})
    assert str(caught.value) == (
        "tree 2 of tree_map does not fit the first tree\n  Expected an instance of tuple, got [1]."
    )


def test_tree_map_gives_deeper_trees_whole():
    assert pytree.tree_map(lambda a, b: b, {"a": 1}, {"a": [2, 3]}) == {"a": [2, 3]}


def test_namedtuple_made_by_the_function():
    pair = namedtuple("pair", "a b")
    tree = pair(1, [2])
    paths, flat, spec = pytree.flatten_with_paths(tree)
    assert paths == [".a", ".b[0]"]
    assert same(pytree.unflatten(spec, flat), tree)
