"""Alias groups: what a write to a wrapper does to its base, its views and the caller's tensor."""

from __future__ import annotations

import pytest
import torch

from lamina.autodiff.reverse import ReverseInterpreter
from lamina_core.errors import MutationError
from lamina_core.scatter import scatter
from lamina_core.scopes import run_at
from lamina_core.views import refresh

aten = torch.ops.aten


@pytest.fixture
def level():
    with ReverseInterpreter("grad") as interpreter:
        yield interpreter


@pytest.fixture
def base(level):
    return level.leaf(plain(lambda: torch.arange(6.0).reshape(2, 3))) * 1


def plain(call, *args):
    """Run something outside the level, on plain tensors."""
    with run_at(None):
        return call(*args)


def value(wrapper):
    return plain(wrapper.value.tolist)


def test_a_view_remembers_how_it_was_made(base):
    row = base[1]
    assert row.recipe.parent is base
    assert row.recipe.op is aten.select.int
    assert (row.recipe.args, row.recipe.index) == ((0, 1), None)
    assert row.recipe.version == base.version == 0


def test_one_of_several_views_remembers_which_it_is(base):
    columns = base.unbind(1)
    assert [column.recipe.index for column in columns] == [0, 1, 2]
    assert all(column.recipe.parent is base for column in columns)


def test_what_is_no_view_has_no_recipe(base):
    assert base.recipe is None
    assert (base * 2).recipe is None


def test_a_write_counts(level, base):
    base.add_(1)
    assert (base.version, level.mutated) == (1, True)
    base.add_(1)
    assert base.version == 2


def test_a_write_to_the_base_makes_views_stale_until_they_are_used(level, base):
    row = base[1]
    base.mul_(10)
    assert value(row) == [3.0, 4.0, 5.0]
    assert row.recipe.version != base.version
    refresh(level, row)
    assert value(row) == [30.0, 40.0, 50.0]
    assert row.recipe.version == base.version
    assert row.version == 1


def test_refresh_of_a_fresh_view_does_nothing(level, base):
    row = base[1]
    before = row.value
    refresh(level, row)
    assert row.value is before


def test_refresh_goes_up_a_chain_of_views(level, base):
    last = base.t()[2][1:]
    base.mul_(10)
    refresh(level, last)
    assert value(last) == [50.0]


def test_a_write_to_a_view_reaches_its_base_and_its_siblings(level, base):
    row, column = base[1], base[:, 2]
    row.zero_()
    assert value(base) == [[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]]
    refresh(level, column)
    assert value(column) == [2.0, 0.0]
    assert row.recipe.version == base.version


def test_a_write_to_one_of_several_views(base):
    base.unbind(1)[1].zero_()
    assert value(base) == [[0.0, 0.0, 2.0], [3.0, 0.0, 5.0]]


def test_old_values_stay(base):
    before = base.value
    base.zero_()
    assert plain(before.tolist) == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_an_argument_that_was_written_to_is_noted_once(level):
    x = level.leaf(plain(torch.ones, 3))
    x.add_(1)
    x[0].zero_()
    assert [w is x for w in level.written] == [True]
    assert value(x) == [0.0, 2.0, 2.0]


def test_a_change_of_shape_makes_the_tensor_a_view_of_what_it_was(level, base):
    row = base[0]
    base.t_()
    assert base.shape == (3, 2)
    assert base.reshaped == base.version == 1
    base.zero_()
    refresh(level, row)
    assert value(row) == [0.0, 0.0, 0.0]


VIEWS = {
    "alias": lambda x: aten.alias(x),
    "as_strided": lambda x: x.as_strided((2, 2), (3, 2)),
    "diagonal": lambda x: x.diagonal(),
    "expand_same": lambda x: x.expand(2, 3),
    "flatten": lambda x: x.flatten(),
    "movedim": lambda x: x.movedim(0, 1),
    "narrow": lambda x: x.narrow(1, 1, 2),
    "permute": lambda x: x.permute(-1, 0),
    "select": lambda x: x.select(-1, 1),
    "slice": lambda x: x[:, ::2],
    "squeeze": lambda x: x[:1].squeeze(0),
    "transpose": lambda x: x.transpose(0, 1),
    "unflatten": lambda x: x.unflatten(1, (3, 1)),
    "unfold": lambda x: x.unfold(1, 2, 2),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "view": lambda x: x.view(3, 2),
    "view_as": lambda x: x.view_as(torch.empty(6)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_write_through_a_view_writes_what_pytorch_writes(base, name):
    def scaled(x):
        VIEWS[name](x).mul_(-2)
        return x

    expected = plain(lambda: scaled(torch.arange(6.0).reshape(2, 3)).tolist())
    assert value(scaled(base)) == expected


@pytest.mark.parametrize("view", [torch.real, torch.imag, torch.view_as_real, torch.conj])
def test_a_write_through_a_view_of_a_complex_tensor(level, view):
    def scaled(x):
        view(x).mul_(-2)
        return x

    made = plain(lambda: torch.complex(torch.arange(3.0), torch.ones(3)))
    expected = plain(lambda: scaled(made.clone()).tolist())
    assert value(scaled(level.leaf(made) * 1)) == expected


def test_scatter_leaves_parent_and_values_alone(base):
    row = base[1]
    written, new = scatter(row, row * 0)
    assert written is base
    assert value(new) == [[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]]
    assert value(base) == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_a_write_through_another_dtype_is_refused(base):
    with pytest.raises(MutationError, match=r"views torch\.float32 as torch\.int32"):
        base.view(torch.int32).zero_()
