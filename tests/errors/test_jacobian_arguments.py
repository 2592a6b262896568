"""What `jacrev`, `jacfwd`, `hessian` and the tools for modules say about what does not fit."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from torch import nn

from lamina import hessian, jacfwd, jacobian, jacrev, stack_module_state
from lamina_core.errors import NotDifferentiableError, StructureError
from tests.errors.saying import said

X = torch.arange(6.0).reshape(2, 3)
N = torch.arange(3)


def first(*args):
    return args[0]


def test_jacrev_of_an_integer_output():
    assert_expected_inline(
        said(NotDifferentiableError, lambda: jacrev(lambda x: (x, {"n": x.long()}))(X)),
        """\
jacrev needs a function that returns floating-point or complex tensors
  output[1]['n']: torch.int64 tensor of shape [2, 3]
  to fix: return other values as aux, with has_aux=True""",
    )


def test_jacfwd_of_an_integer_output():
    assert_expected_inline(
        said(NotDifferentiableError, lambda: jacfwd(lambda x: (x, {"n": x.long()}))(X)),
        """\
jacfwd needs a function that returns floating-point or complex tensors
  output[1]['n']: torch.int64 tensor of shape [2, 3]
  to fix: return other values as aux, with has_aux=True""",
    )


def test_mode_of_jacobian():
    assert_expected_inline(
        said(StructureError, lambda: jacobian(first, mode="fwd")),
        """\
mode of jacobian is 'fwd'
  to fix: pass 'auto', 'forward' or 'reverse'""",
    )


def test_jacobian_of_an_integer_output():
    assert_expected_inline(
        said(NotDifferentiableError, lambda: jacobian(lambda x: x.long())(X)),
        """\
jacobian needs a function that returns floating-point or complex tensors
  output: torch.int64 tensor of shape [2, 3]
  to fix: return other values as aux, with has_aux=True""",
    )


def test_a_holomorphic_function_of_a_real_argument():
    assert_expected_inline(
        said(NotDifferentiableError, lambda: jacrev(first, holomorphic=True)({"x": X})),
        """\
jacrev got holomorphic=True, but not everything is complex
  args[0]['x']: torch.float32 tensor of shape [2, 3]
  to fix: leave holomorphic out, or convert with .to(torch.complex64)""",
    )


def test_a_holomorphic_function_with_a_real_value():
    assert_expected_inline(
        said(NotDifferentiableError, lambda: jacfwd(torch.abs, holomorphic=True)(X + 0j)),
        """\
jacfwd got holomorphic=True, but not everything is complex
  output: torch.float32 tensor of shape [2, 3]
  to fix: leave holomorphic out, or convert with .to(torch.complex64)""",
    )


def test_jacrev_of_a_number():
    assert_expected_inline(
        said(NotDifferentiableError, lambda: jacrev(lambda x: 3.0)(X)),
        """\
jacrev needs a function that returns floating-point or complex tensors
  output: float
  to fix: return other values as aux, with has_aux=True""",
    )


def test_jacrev_of_integers():
    assert_expected_inline(
        said(NotDifferentiableError, lambda: jacrev(first)(N)),
        """\
jacrev has nothing to differentiate: no floating-point or complex tensor
  args[0]: torch.int64 tensor of shape [3]
  to fix: pass a tensor converted with .float(), or choose another argument with argnums""",
    )


def test_jacfwd_of_integers():
    assert_expected_inline(
        said(NotDifferentiableError, lambda: jacfwd(first, argnums=1)(X, {"n": N})),
        """\
jacfwd has nothing to differentiate: no floating-point or complex tensor
  args[1]['n']: torch.int64 tensor of shape [3]
  to fix: pass a tensor converted with .float(), or choose another argument with argnums""",
    )


def test_argnums_of_jacfwd():
    assert_expected_inline(
        said(StructureError, lambda: jacfwd(first, argnums=3)(X, X)),
        """\
argnums of jacfwd is 3, but there are 2 positional arguments
  arguments passed by keyword are not differentiated
  to fix: pass the argument positionally and name its position""",
    )


def test_argnums_of_hessian():
    assert_expected_inline(
        said(StructureError, lambda: hessian(first, argnums=())(X)),
        """\
argnums of jacfwd is ()
  to fix: pass an int, or a tuple of at least one int""",
    )


def test_chunk_size_of_jacrev():
    assert_expected_inline(
        said(StructureError, lambda: jacrev(first, chunk_size=0)),
        """\
chunk_size of jacrev is 0
  to fix: pass an int > 0, or None""",
    )


def test_chunk_size_of_hessian():
    assert_expected_inline(
        said(StructureError, lambda: hessian(first, chunk_size=-1)),
        """\
chunk_size of hessian is -1
  to fix: pass an int > 0, or None""",
    )


def test_randomness_of_jacfwd():
    assert_expected_inline(
        said(StructureError, lambda: jacfwd(first, randomness="all")),
        """\
randomness of jacfwd is 'all'
  to fix: pass 'error', 'same' or 'different'""",
    )


def test_no_model_to_stack():
    assert_expected_inline(
        said(StructureError, lambda: stack_module_state([])),
        """\
stack_module_state got no model
  to fix: pass a list of at least one model""",
    )


def test_one_model_that_is_not_in_a_list():
    assert_expected_inline(
        said(StructureError, lambda: stack_module_state(nn.Linear(3, 2))),
        """\
stack_module_state got a Linear
  to fix: pass a list of at least one model""",
    )


def test_models_of_two_classes():
    assert_expected_inline(
        said(
            StructureError,
            lambda: stack_module_state([nn.Linear(3, 2), nn.Linear(3, 2), nn.Conv1d(3, 2, 1)]),
        ),
        """\
the models have different classes
  models[0] is a Linear, models[2] a Conv1d
  to fix: stack the models of each class by themselves""",
    )


def test_models_in_two_modes():
    assert_expected_inline(
        said(StructureError, lambda: stack_module_state([nn.Linear(3, 2), nn.Linear(3, 2).eval()])),
        """\
some models are in train mode and some in eval mode
  models[0] is in train mode, models[1] in eval mode
  to fix: call .train() or .eval() on all of them""",
    )


def test_models_of_two_shapes():
    assert_expected_inline(
        said(StructureError, lambda: stack_module_state([nn.Linear(3, 2), nn.Linear(4, 2)])),
        """\
the models differ in 'weight'
  models[0] has a torch.float32 tensor of shape [2, 3] that requires grad
  models[1] has a torch.float32 tensor of shape [2, 4] that requires grad
  to fix: stack models of one architecture, with requires_grad set alike""",
    )


def test_models_with_other_parameters():
    assert_expected_inline(
        said(
            StructureError,
            lambda: stack_module_state([nn.Linear(3, 2), nn.Linear(3, 2, bias=False)]),
        ),
        """\
the models differ in 'bias'
  models[0] has a torch.float32 tensor of shape [2] that requires grad
  models[1] has none
  to fix: stack models of one architecture, with requires_grad set alike""",
    )


def test_models_of_which_one_is_frozen():
    assert_expected_inline(
        said(
            StructureError,
            lambda: stack_module_state([nn.Linear(3, 2), nn.Linear(3, 2).requires_grad_(False)]),
        ),
        """\
the models differ in 'bias'
  models[0] has a torch.float32 tensor of shape [2] that requires grad
  models[1] has a torch.float32 tensor of shape [2]
  to fix: stack models of one architecture, with requires_grad set alike""",
    )
