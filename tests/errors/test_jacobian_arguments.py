"""What `jacrev`, `jacfwd`, `hessian` and the tools for modules say about what does not fit."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from torch import nn

from lamina import hessian, jacfwd, jacrev, stack_module_state
from lamina_core.errors import NotDifferentiableError, StructureError
from tests.errors.saying import said

X = torch.arange(6.0).reshape(2, 3)
N = torch.arange(3)


def first(*args):
    return args[0]


def test_jacrev_of_an_integer_output():
    assert_expected_inline(
        said(NotDifferentiableError, lambda: jacrev(lambda x: (x, {"n": x.long()}))(X)), """\
jacrev needs a function that returns real floating-point tensors
  output[1]['n']: torch.int64 tensor of shape [2, 3]
  to fix: return other values as aux, with has_aux=True"""
    )


def test_jacfwd_of_an_integer_output():
    assert_expected_inline(
        said(NotDifferentiableError, lambda: jacfwd(lambda x: (x, {"n": x.long()}))(X)), """"""
    )


def test_jacrev_of_a_complex_output():
    assert_expected_inline(
        said(NotDifferentiableError, lambda: jacrev(lambda x: x * 1j)(X)), """"""
    )


def test_jacrev_of_a_number():
    assert_expected_inline(said(NotDifferentiableError, lambda: jacrev(lambda x: 3.0)(X)), """""")


def test_jacrev_of_integers():
    assert_expected_inline(said(NotDifferentiableError, lambda: jacrev(first)(N)), """""")


def test_jacfwd_of_integers():
    assert_expected_inline(
        said(NotDifferentiableError, lambda: jacfwd(first, argnums=1)(X, {"n": N})), """"""
    )


def test_argnums_of_jacfwd():
    assert_expected_inline(said(StructureError, lambda: jacfwd(first, argnums=3)(X, X)), """""")


def test_argnums_of_hessian():
    assert_expected_inline(said(StructureError, lambda: hessian(first, argnums=())(X)), """""")


def test_chunk_size_of_jacrev():
    assert_expected_inline(said(StructureError, lambda: jacrev(first, chunk_size=0)), """""")


def test_chunk_size_of_hessian():
    assert_expected_inline(said(StructureError, lambda: hessian(first, chunk_size=-1)), """""")


def test_randomness_of_jacfwd():
    assert_expected_inline(said(StructureError, lambda: jacfwd(first, randomness="all")), """""")


def test_no_model_to_stack():
    assert_expected_inline(said(StructureError, lambda: stack_module_state([])), """""")


def test_one_model_that_is_not_in_a_list():
    assert_expected_inline(
        said(StructureError, lambda: stack_module_state(nn.Linear(3, 2))), """"""
    )


def test_models_of_two_classes():
    assert_expected_inline(
        said(
            StructureError,
            lambda: stack_module_state([nn.Linear(3, 2), nn.Linear(3, 2), nn.Conv1d(3, 2, 1)]),
        ),
        """""",
    )


def test_models_in_two_modes():
    assert_expected_inline(
        said(StructureError, lambda: stack_module_state([nn.Linear(3, 2), nn.Linear(3, 2).eval()])),
        """""",
    )


def test_models_of_two_shapes():
    assert_expected_inline(
        said(StructureError, lambda: stack_module_state([nn.Linear(3, 2), nn.Linear(4, 2)])), """"""
    )


def test_models_with_other_parameters():
    assert_expected_inline(
        said(
            StructureError,
            lambda: stack_module_state([nn.Linear(3, 2), nn.Linear(3, 2, bias=False)]),
        ),
        """""",
    )


def test_models_of_which_one_is_frozen():
    assert_expected_inline(
        said(
            StructureError,
            lambda: stack_module_state([nn.Linear(3, 2), nn.Linear(3, 2).requires_grad_(False)]),
        ),
        """""",
    )
