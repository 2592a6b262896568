"""The `_foreach` ops of optimisers under `vmap`: each overload, and its in-place form."""

from __future__ import annotations

import pytest
import torch

from lamina import vmap
from lamina_core.schema import facts
from tests.batching.stacking import assert_stacked

aten = torch.ops.aten

NAMES = sorted(
    name.removeprefix("aten::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("aten::_foreach_")
)


def overload(name):
    base, _, which = name.partition(".")
    return getattr(getattr(aten, base), which or "default")


def argument(kind, name, op):
    """An argument of a kind: two tensors a list, and numbers for each."""
    shapes = [(3, 2, 2), (3, 4, 4)] if "_foreach_mm" in op else [(3, 2), (3, 4)]
    return {
        "List[Tensor]": [
            torch.linspace(0.5, 0.9, torch.Size(shape).numel()).reshape(shape) for shape in shapes
        ],
        "List[number]": [1.5, 2.0],
        "number": 2.0,
        "Tensor": torch.tensor([1.5, 2.0]) if name == "scalars" else torch.tensor(1.5),
        "bool": False,
    }.get(kind)


@pytest.mark.parametrize("name", [n for n in NAMES if not n.split(".")[-1].endswith("out")])
def test_every_overload(name):
    op = overload(name)
    known = facts(op)
    schema = [a for a in op._schema.arguments if not a.kwarg_only]
    args = [argument(str(a.type), a.name, name) for a in schema]
    lists = known.list_args

    def f(*tensors):
        filled = list(args)
        for k, at in enumerate(lists):
            pair = list(tensors[2 * k : 2 * k + 2])
            filled[at] = [x.clone() for x in pair] if at in known.mutated else pair
        out = op(*filled)
        return filled[0] if known.mutated else out

    assert_stacked(f, *[x for at in lists for x in args[at]])


def test_a_list_may_be_batched_in_part():
    shared = torch.tensor([1.0, 2.0])
    first, second = vmap(lambda x: torch._foreach_add([x, shared], 1.0), out_dims=(0, None))(
        torch.zeros(3, 2)
    )
    assert first.shape == (3, 2)
    assert second.tolist() == [2.0, 3.0]


def test_an_optimiser_of_each_example():
    def f(start, target):
        weight = start.clone()
        momentum = torch.zeros_like(weight)
        for _ in range(3):
            slope = weight - target
            torch._foreach_mul_([momentum], 0.9)
            torch._foreach_add_([momentum], [slope])
            torch._foreach_add_([weight], [momentum], alpha=-0.1)
        return weight

    assert_stacked(f, torch.arange(6.0).reshape(3, 2), torch.ones(3, 2))
