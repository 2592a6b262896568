"""What `vmap` says about options that do not fit its arguments or outputs."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline

from lamina import grad, vmap
from lamina_core.errors import BatchSizeError, StructureError
from tests.errors.saying import said

X = torch.arange(6.0).reshape(2, 3)


def first(*args):
    return args[0]


def test_in_dims_with_too_many_entries():
    assert_expected_inline(said(StructureError, lambda: vmap(first, in_dims=(0, 0))(X)), """""")


def test_in_dims_with_too_few_entries_inside_an_argument():
    assert_expected_inline(
        said(StructureError, lambda: vmap(first, in_dims=((0, 0),))((X, X, X))), """"""
    )


def test_in_dims_with_other_keys():
    assert_expected_inline(
        said(StructureError, lambda: vmap(first, in_dims=({"a": 0},))({"w": X})), """"""
    )


def test_in_dims_deeper_than_the_arguments():
    assert_expected_inline(
        said(StructureError, lambda: vmap(first, in_dims=(0, (0, 0)))(X, X)), """"""
    )


def test_in_dims_of_a_wrong_type():
    assert_expected_inline(said(StructureError, lambda: vmap(first, in_dims="rows")(X)), """""")


def test_an_entry_of_in_dims_of_a_wrong_type():
    assert_expected_inline(
        said(StructureError, lambda: vmap(first, in_dims=(0, {"w": 0.5}))(X, {"w": X})), """"""
    )


def test_a_bool_is_no_dim():
    assert_expected_inline(said(StructureError, lambda: vmap(first, in_dims=True)(X)), """""")


def test_in_dims_out_of_range():
    assert_expected_inline(
        said(StructureError, lambda: vmap(first, in_dims=({"w": (None, -3)},))({"w": (X, X)})),
        """""",
    )


def test_a_tensor_of_rank_0_cannot_be_mapped():
    assert_expected_inline(said(StructureError, lambda: vmap(first)(X, torch.tensor(1.0))), """""")


def test_sizes_that_differ():
    assert_expected_inline(
        said(
            BatchSizeError,
            lambda: vmap(first, in_dims=(0, {"w": 1, "b": None}))(X, {"w": X, "b": X}),
        ),
        """""",
    )


def test_no_tensor_to_map():
    assert_expected_inline(said(BatchSizeError, lambda: vmap(first)(1, 2.0)), """""")


def test_nothing_is_mapped():
    assert_expected_inline(
        said(BatchSizeError, lambda: vmap(first, in_dims=(None, None))(X, X)), """"""
    )


def test_no_argument():
    assert_expected_inline(said(BatchSizeError, lambda: vmap(lambda x: x)(x=X)), """""")


def test_out_dims_is_none_for_an_output_that_is_batched():
    assert_expected_inline(
        said(StructureError, lambda: vmap(lambda x: (3, {"w": x}), out_dims=None)(X)), """"""
    )


def test_out_dims_is_none_in_a_nested_vmap():
    assert_expected_inline(
        said(StructureError, lambda: vmap(vmap(first, out_dims=None))(X)), """"""
    )


def test_out_dims_out_of_range():
    assert_expected_inline(
        said(StructureError, lambda: vmap(lambda x: {"w": x}, out_dims=2)(X)), """"""
    )


def test_out_dims_of_a_wrong_type():
    assert_expected_inline(said(StructureError, lambda: vmap(first, out_dims="rows")(X)), """""")


def test_a_bool_is_no_out_dim():
    assert_expected_inline(said(StructureError, lambda: vmap(first, out_dims=True)(X)), """""")


def test_out_dims_with_too_many_entries():
    assert_expected_inline(
        said(StructureError, lambda: vmap(lambda x: (x, x), out_dims=(0, 0, 0))(X)), """"""
    )


def test_out_dims_deeper_than_the_output():
    assert_expected_inline(
        said(StructureError, lambda: grad(lambda x: vmap(first, out_dims=(0, 1))(x).sum())(X)),
        """""",
    )


def test_randomness_of_no_kind():
    assert_expected_inline(said(StructureError, lambda: vmap(first, randomness="all")), """""")


def test_chunk_size_of_zero():
    assert_expected_inline(said(StructureError, lambda: vmap(first, chunk_size=0)), """""")


def test_chunk_size_of_a_wrong_type():
    assert_expected_inline(said(StructureError, lambda: vmap(first, chunk_size=1.5)), """""")


def test_chunk_size_is_no_bool():
    assert_expected_inline(said(StructureError, lambda: vmap(first, chunk_size=True)), """""")
