"""What `grad`, `vjp` and `jvp` say about arguments, outputs and tangents that do not fit."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

from lamina import grad, jvp, value_and_grad, vjp, vmap
from lamina_core.errors import (
    NonScalarLossError,
    NotDifferentiableError,
    StructureError,
    TangentError,
)
from tests.errors.saying import said

X = torch.arange(6.0).reshape(2, 3)
N = torch.arange(3)


def first(*args):
    return args[0]


def total(x):
    return x.sum()


def test_a_loss_of_one_element():
    assert_expected_inline(
        said(NonScalarLossError, lambda: grad(lambda x: x.sum().reshape(1))(X)),
        """\
grad needs a loss of shape [], got one of shape [1]
  while interpreting at level 1: grad
  to fix: take its one element, with .squeeze()""",
    )


def test_a_loss_of_three_elements():
    assert_expected_inline(
        said(NonScalarLossError, lambda: grad(lambda x: x.sum(0))(X)),
        """\
grad needs a loss of shape [], got one of shape [3]
  while interpreting at level 1: grad
  to fix: reduce it, with .sum() or .mean()""",
    )


def test_a_loss_that_is_no_scalar_inside_vmap():
    assert_expected_inline(
        said(NonScalarLossError, lambda: vmap(grad(first))(X)),
        """\
grad needs a loss of shape [], got one of shape [3]
  while interpreting at level 2: grad
  to fix: reduce it, with .sum() or .mean()""",
    )


def test_a_loss_that_is_a_number():
    assert_expected_inline(
        said(NonScalarLossError, lambda: grad(lambda x: 3.0)(X)),
        """\
grad needs a loss that is one tensor
  while interpreting at level 1: grad
  output: float
  to fix: return the loss alone, or (loss, aux) with has_aux=True""",
    )


def test_a_loss_that_is_none():
    assert_expected_inline(
        said(NonScalarLossError, lambda: value_and_grad(lambda x: None)(X)),
        """\
grad needs a loss that is one tensor
  while interpreting at level 1: grad
  output: NoneType
  to fix: return the loss alone, or (loss, aux) with has_aux=True""",
    )


def test_a_loss_in_a_dict():
    assert_expected_inline(
        said(NonScalarLossError, lambda: grad(lambda x: {"loss": x.sum()})(X)),
        """\
grad needs a loss that is one tensor
  while interpreting at level 1: grad
  output['loss']: torch.float32 tensor of shape []
  to fix: return the loss alone, or (loss, aux) with has_aux=True""",
    )


def test_several_losses():
    assert_expected_inline(
        said(NonScalarLossError, lambda: grad(lambda x: (x.sum(), x))(X)),
        """\
grad needs a loss that is one tensor
  while interpreting at level 1: grad
  output[0]: torch.float32 tensor of shape []
  output[1]: torch.float32 tensor of shape [2, 3]
  to fix: return the loss alone, or (loss, aux) with has_aux=True""",
    )


def test_no_loss():
    assert_expected_inline(
        said(NonScalarLossError, lambda: grad(lambda x: ())(X)),
        """\
grad needs a loss that is one tensor
  while interpreting at level 1: grad
  the output holds no leaf
  to fix: return the loss alone, or (loss, aux) with has_aux=True""",
    )


def test_an_integer_loss():
    assert_expected_inline(
        said(NonScalarLossError, lambda: grad(lambda x: x.sum().long())(X)),
        """\
grad needs a real floating-point loss, got one of dtype torch.int64
  while interpreting at level 1: grad
  to fix: compute the loss with floating-point tensors""",
    )


def test_a_complex_loss():
    assert_expected_inline(
        said(NonScalarLossError, lambda: grad(lambda x: x.sum() * 1j)(X)),
        """\
grad needs a real floating-point loss, got one of dtype torch.complex64
  while interpreting at level 1: grad
  to fix: take its real part, or pass holomorphic=True for a complex derivative""",
    )


def test_an_integer_argument():
    assert_expected_inline(
        said(NotDifferentiableError, lambda: grad(total)(N)),
        """\
grad has nothing to differentiate: no floating-point or complex tensor
  args[0]: torch.int64 tensor of shape [3]
  to fix: pass a tensor converted with .float(), or choose another argument with argnums""",
    )


def test_arguments_without_a_floating_point_tensor():
    assert_expected_inline(
        said(
            NotDifferentiableError,
            lambda: grad(first, argnums=(0, -1))({"w": N, "n": 2}, X, [N] * 6),
        ),
        """\
grad has nothing to differentiate: no floating-point or complex tensor
  args[0]['n']: int
  args[0]['w']: torch.int64 tensor of shape [3]
  args[2][0]: torch.int64 tensor of shape [3]
  args[2][1]: torch.int64 tensor of shape [3]
  and 4 more
  to fix: pass a tensor converted with .float(), or choose another argument with argnums""",
    )


def test_vjp_of_integers():
    assert_expected_inline(
        said(NotDifferentiableError, lambda: vjp(first, N, {"w": N})),
        """\
vjp has nothing to differentiate: no floating-point or complex tensor
  primals[0]: torch.int64 tensor of shape [3]
  primals[1]['w']: torch.int64 tensor of shape [3]
  to fix: pass a tensor converted with .float()""",
    )


def test_vjp_of_nothing():
    assert_expected_inline(
        said(NotDifferentiableError, lambda: vjp(lambda: X)),
        """\
vjp has nothing to differentiate: no floating-point or complex tensor
  primals holds no leaf
  to fix: pass a tensor converted with .float()""",
    )


def test_jvp_of_integers():
    assert_expected_inline(
        said(NotDifferentiableError, lambda: jvp(first, (N,), (N,))),
        """\
jvp has nothing to differentiate: no floating-point or complex tensor
  primals[0]: torch.int64 tensor of shape [3]
  to fix: pass a tensor converted with .float()""",
    )


def test_argnums_out_of_range():
    assert_expected_inline(
        said(StructureError, lambda: grad(first, argnums=2)(X, X)),
        """\
argnums of grad is 2, but there are 2 positional arguments
  arguments passed by keyword are not differentiated
  to fix: pass the argument positionally and name its position""",
    )


def test_argnums_out_of_range_of_one():
    assert_expected_inline(
        said(StructureError, lambda: grad(total, argnums=(0, -2))(X)),
        """\
argnums of grad is (0, -2), but there is 1 positional argument
  arguments passed by keyword are not differentiated
  to fix: pass the argument positionally and name its position""",
    )


def test_an_argument_by_keyword():
    assert_expected_inline(
        said(StructureError, lambda: grad(total)(x=X)),
        """\
argnums of grad is 0, but there are 0 positional arguments
  arguments passed by keyword are not differentiated
  to fix: pass the argument positionally and name its position""",
    )


def test_argnums_that_name_an_argument_twice():
    assert_expected_inline(
        said(StructureError, lambda: grad(first, argnums=(0, -2))(X, X)),
        """\
argnums of grad names an argument twice: (0, -2)
  to fix: name it once""",
    )


def test_argnums_that_are_empty():
    assert_expected_inline(
        said(StructureError, lambda: grad(first, argnums=())(X)),
        """\
argnums of grad is ()
  to fix: pass an int, or a tuple of at least one int""",
    )


def test_argnums_that_are_no_int():
    assert_expected_inline(
        said(StructureError, lambda: grad(first, argnums=1.0)(X)),
        """\
argnums of grad is 1.0
  to fix: pass an int, or a tuple of at least one int""",
    )


def test_argnums_with_an_entry_that_is_no_int():
    assert_expected_inline(
        said(StructureError, lambda: grad(first, argnums=(0, "w"))(X)),
        """\
argnums of grad is (0, 'w')
  to fix: pass an int, or a tuple of at least one int""",
    )


def test_argnums_with_a_bool():
    assert_expected_inline(
        said(StructureError, lambda: grad(first, argnums=True)(X, X)),
        """\
argnums of grad is True
  to fix: pass an int, or a tuple of at least one int""",
    )


def test_has_aux_without_a_pair():
    assert_expected_inline(
        said(StructureError, lambda: grad(total, has_aux=True)(X)),
        """\
what the function returns should be a tuple: (output, aux) if has_aux is True
  while interpreting at level 1: grad
  it returned: torch.float32 tensor of shape []
  to fix: return (output, aux)""",
    )


def test_has_aux_with_three_outputs():
    assert_expected_inline(
        said(StructureError, lambda: vjp(lambda x: (x, 1, 2), X, has_aux=True)),
        """\
what the function returns should be a tuple: (output, aux) if has_aux is True
  while interpreting at level 1: vjp
  it returned: a tuple of length 3
  to fix: return (output, aux)""",
    )


def test_has_aux_of_jvp():
    assert_expected_inline(
        said(StructureError, lambda: jvp(lambda x: {"loss": x}, (X,), (X,), has_aux=True)),
        """\
what the function returns should be a tuple: (output, aux) if has_aux is True
  while interpreting at level 1: jvp
  it returned: dict
  to fix: return (output, aux)""",
    )


def test_cotangents_of_another_structure():
    assert_expected_inline(
        said(TangentError, lambda: vjp(lambda x: {"a": x, "b": (x, x)}, X)[1]((X, X))),
        """\
the structure of cotangents is not that of output
  output: {'a': *, 'b': (*, *)}
  cotangents: (*, *)
  to fix: pass one entry of cotangents for each leaf of output, None for zero (1 of a number)""",
    )


def test_a_cotangent_of_another_shape():
    assert_expected_inline(
        said(TangentError, lambda: vjp(lambda x: {"a": x}, X)[1]({"a": N})),
        """\
cotangents['a'] does not match output['a']
  output['a']: torch.float32 tensor of shape [2, 3]
  cotangents['a']: torch.int64 tensor of shape [3]
  to fix: pass a tensor of the same shape and dtype, or None for zero (1 of a number)""",
    )


def test_a_cotangent_of_another_dtype():
    assert_expected_inline(
        said(TangentError, lambda: vjp(first, X)[1](X.double())),
        """\
cotangents does not match output
  output: torch.float32 tensor of shape [2, 3]
  cotangents: torch.float64 tensor of shape [2, 3]
  to fix: pass a tensor of the same shape and dtype, or None for zero (1 of a number)""",
    )


def test_a_cotangent_that_is_a_number():
    assert_expected_inline(
        said(TangentError, lambda: vjp(total, X)[1](1.0)),
        """\
cotangents does not match output
  output: torch.float32 tensor of shape []
  cotangents: float
  to fix: pass a tensor of the same shape and dtype, or None for zero (1 of a number)""",
    )


def test_primals_that_are_no_tuple():
    assert_expected_inline(
        said(StructureError, lambda: jvp(first, X, X)),
        """\
jvp got primals of type Tensor and tangents of type Tensor
  to fix: pass a tuple of arguments and a tuple of their tangents""",
    )


def test_too_few_tangents():
    assert_expected_inline(
        said(TangentError, lambda: jvp(first, (X, X), (X,))),
        """\
the structure of tangents is not that of primals
  primals: (*, *)
  tangents: (*,)
  to fix: pass one entry of tangents for each leaf of primals, None for zero""",
    )


def test_a_tangent_of_another_shape():
    assert_expected_inline(
        said(TangentError, lambda: jvp(first, (1, {"w": X}), (None, {"w": N}))),
        """\
tangents[1]['w'] does not match primals[1]['w']
  primals[1]['w']: torch.float32 tensor of shape [2, 3]
  tangents[1]['w']: torch.int64 tensor of shape [3]
  to fix: pass a tensor of the same shape and dtype, or None for zero""",
    )


def test_a_tangent_of_another_dtype():
    assert_expected_inline(
        said(TangentError, lambda: jvp(first, (X,), (X.double(),))),
        """\
tangents[0] does not match primals[0]
  primals[0]: torch.float32 tensor of shape [2, 3]
  tangents[0]: torch.float64 tensor of shape [2, 3]
  to fix: pass a tensor of the same shape and dtype, or None for zero""",
    )


def test_strict_and_an_output_that_does_not_depend_on_the_primals():
    assert_expected_inline(
        said(
            TangentError, lambda: jvp(lambda x: {"a": x, "b": X, "c": 3}, (X,), (X,), strict=True)
        ),
        """\
strict=True, but this does not depend on the primals: output['b'], output['c']
  while interpreting at level 1: jvp
  to fix: pass strict=False to get a zero tangent""",
    )


ABSENT = {
    "a number": (lambda x: x.sum(), None),
    "one element": (lambda x: x.sum()[None] * 2, None),
    "in a dict": (lambda x: {"a": x.sum()}, {"a": None}),
    "both of two": (lambda x: (x.sum(), x.prod()), (None, None)),
    "one of two": (lambda x: (x.sum(), x * 2), (None, X)),
    "a vector": (lambda x: x * 2, None),
    "a vector and a number": (lambda x: (x.sum(), x * 2), (None, None)),
    "a complex number": (lambda x: x.sum() * 1j, None),
}


@pytest.mark.parametrize("name", ABSENT)
def test_no_cotangent_is_what_it_is_in_torch_func(name):
    f, cotangents = ABSENT[name]
    try:
        (want,) = torch.func.vjp(f, X)[1](cotangents)
    except RuntimeError:
        with pytest.raises(TangentError, match="no cotangent is given"):
            vjp(f, X)[1](cotangents)
        return
    torch.testing.assert_close(vjp(f, X)[1](cotangents), (want,))
    mapped = vmap(lambda x: vjp(f, x)[1](cotangents)[0])(torch.stack([X, X]))
    torch.testing.assert_close(mapped, torch.stack([want, want]))


def test_no_cotangent_is_zero_beside_one_that_is_given():
    f, given = (lambda x: (x.sin(), x * 2)), torch.ones_like(X)
    torch.testing.assert_close(vjp(f, X)[1]((None, given)), (2 * given,))
