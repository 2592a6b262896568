"""Pytrees: round trips, the order of dict keys, and paths."""

from __future__ import annotations

import collections
from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamina_core import pytree
from tests.core.containers import (
    Box,
    GlobalPair,
    Incomparable,
    Point,
    State,
    TorchLayer,
    Unregistered,
    same,
)


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


def test_namedtuple_made_by_the_function():
    pair = namedtuple("pair", "a b")
    tree = pair(1, [2])
    paths, flat, spec = pytree.flatten_with_paths(tree)
    assert paths == [".a", ".b[0]"]
    assert same(pytree.unflatten(spec, flat), tree)
