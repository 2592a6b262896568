"""`facts`: what the schema of an op says."""

from __future__ import annotations

import pytest
import torch

from lamina_core.schema import facts

aten = torch.ops.aten


def test_facts_are_kept():
    assert facts(aten.sin.default) is facts(aten.sin.default)


@pytest.mark.parametrize(
    ("op", "tensors", "lists", "keywords"),
    [
        (aten.sin.default, (0,), (), ()),
        (aten.add.Tensor, (0, 1), (), ()),
        (aten.add.Scalar, (0,), (), ()),
        (aten.cat.default, (), (0,), ()),
        (aten.clamp.Tensor, (0, 1, 2), (), ()),
        (aten.index.Tensor, (0,), (1,), ()),
        (aten.ones.default, (), (), ()),
        (aten.searchsorted.Tensor, (0, 1), (), ("sorter",)),
        (aten.sum.IntList_out, (0,), (), ("out",)),
        (aten.where.self, (0, 1, 2), (), ()),
    ],
    ids=str,
)
def test_where_tensors_are(op, tensors, lists, keywords):
    known = facts(op)
    assert (known.tensor_args, known.list_args, known.tensor_kwargs) == (tensors, lists, keywords)


def test_names():
    known = facts(aten.sum.dim_IntList)
    assert known.name == "aten.sum.dim_IntList"
    assert known.arg_names == ("self", "dim", "keepdim", "dtype")
    assert known.positional == ("self", "dim", "keepdim")


@pytest.mark.parametrize(
    ("op", "mutated"),
    [
        (aten.add.Tensor, ()),
        (aten.add_.Tensor, (0,)),
        (aten.sum.IntList_out, ("out",)),
        (aten.max.dim_max, ("max", "max_values")),
        (aten._foreach_add_.Scalar, (0,)),
    ],
    ids=str,
)
def test_what_is_written(op, mutated):
    known = facts(op)
    assert known.mutated == mutated
    assert known.is_out_variant() == (bool(mutated) and isinstance(mutated[0], str))


@pytest.mark.parametrize(
    ("op", "counterpart"),
    [
        (aten.add_.Tensor, aten.add.Tensor),
        (aten.__iand__.Tensor, aten.__and__.Tensor),
        (aten.sum.IntList_out, aten.sum.dim_IntList),
        (aten.max.dim_max, aten.max.dim),
        (aten.t_.default, aten.t.default),
        (aten.copy_.default, aten.copy.default),
        (aten.ones.out, aten.ones.default),
    ],
    ids=str,
)
def test_the_op_that_does_the_same_out_of_place(op, counterpart):
    assert facts(op).functional() is counterpart


def of(fact):
    """The names of the ops among a list for which a fact holds."""
    listed = [
        aten.add.Tensor,
        aten.add_.Tensor,
        aten.bernoulli.default,
        aten.complex.default,
        aten.contiguous.default,
        aten.dropout.default,
        aten.linear.default,
        aten.mm.default,
        aten.rand.default,
        aten.reshape.default,
        aten.scaled_dot_product_attention.default,
        aten.select.int,
        aten.split.Tensor,
        aten.t_.default,
        aten.to.dtype,
    ]
    return {str(op).removeprefix("aten.") for op in listed if getattr(facts(op), fact)}


def test_views():
    assert of("is_view") == {"select.int", "split.Tensor"}


def test_random_ops():
    assert of("is_random") == {"bernoulli.default", "dropout.default", "rand.default"}


def test_elementwise_ops():
    assert of("is_pointwise") == {"add.Tensor", "add_.Tensor", "complex.default"}


def test_composite_ops():
    assert {"linear.default", "scaled_dot_product_attention.default"} <= of("is_composite")
    assert not {"add.Tensor", "mm.default", "select.int"} & of("is_composite")


@pytest.mark.parametrize(
    ("op", "returns"),
    [
        (aten.sin.default, ("tensor",)),
        (aten.max.dim, ("tensor", "tensor")),
        (aten.split.Tensor, ("list",)),
        (aten.item.default, ("other",)),
        (aten._foreach_add_.Scalar, ()),
    ],
    ids=str,
)
def test_what_is_returned(op, returns):
    assert facts(op).returns == returns


def test_an_elementwise_op_is_called_by_its_python_binding():
    assert facts(aten.sin.default).call is torch.sin
    x = torch.ones(3)
    assert torch.equal(facts(aten.mm.default).call(x[None], x[:, None]), torch.tensor([[3.0]]))


@pytest.mark.parametrize(
    "op",
    [
        aten.binary_cross_entropy.default,
        aten.binary_cross_entropy_with_logits.default,
        aten.mse_loss.default,
        aten.smooth_l1_loss.default,
        aten.soft_margin_loss.default,
    ],
    ids=str,
)
def test_a_default_is_that_of_the_schema(op):
    # Some bindings have another default for `reduction`, and torch leaves out what is the default.
    x, y = torch.tensor([0.3, 0.6]), torch.tensor([1.0, 0.0])
    torch.testing.assert_close(facts(op).call(x, y), op(x, y))
