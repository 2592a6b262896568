"""Trees that have to fit others: prefixes, `tree_map`, and the texts of their errors."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, deque

import pytest
import torch

from lamina_core import pytree
from lamina_core.errors import LaminaError, StructureError
from tests.core.containers import Box, Output, Point, Range, State, TorchLayer


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
