"""Pytrees of containers that torch, optree or the user have registered."""

from __future__ import annotations

import threading

import pytest
import torch.utils._pytree as torch_pytree

from lamina_core import pytree
from tests.core.containers import (
    Box,
    ForeignPair,
    GlobalPair,
    LaminaPair,
    Output,
    State,
    TorchLayer,
    same,
)


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
