"""The error family: every class is also the builtin error that callers would expect to catch.

A message says what happened, where (op, level, transform as the user wrote it), with which values
and what to do instead, one per line. `message` joins the lines.
"""

from __future__ import annotations

__all__ = [
    "AbsentOpError",
    "AnomalyError",
    "BatchSizeError",
    "CapturedTensorError",
    "ChangedOpsWarning",
    "DataDependentError",
    "EscapedTensorError",
    "FallbackWarning",
    "LaminaError",
    "MissingRuleError",
    "MutationError",
    "NoLengthError",
    "NonScalarLossError",
    "NotDifferentiableError",
    "NotLinearError",
    "RandomnessError",
    "RuleError",
    "StructureError",
    "TangentError",
    "TorchHookError",
    "UntestedTorchWarning",
    "message",
]


class LaminaError(Exception):
    """Base class of all errors that Lamina raises itself; catch it to catch them all.

    Errors of PyTorch, such as a shape that does not fit, reach the caller as they are.

    Example:
        >>> import torch
        >>> from lamina import grad
        >>> try:
        ...     grad(torch.sin)(torch.zeros(3))
        ... except LaminaError as error:
        ...     print(type(error).__name__)
        NonScalarLossError
    """


class StructureError(LaminaError, ValueError, RuntimeError):
    """An option, such as `in_dims`, `out_dims` or `argnums`, does not fit what it describes.

    `in_dims` and `out_dims` are trees like the arguments and the output, where one entry may stand
    for a whole subtree. The message names the first place where the two part.

    Example:
        >>> import torch
        >>> from lamina import vmap
        >>> vmap(torch.add, in_dims=(0, 2))(torch.ones(3), torch.ones(4, 3))
        Traceback (most recent call last):
            ...
        lamina_core.errors.StructureError: in_dims has 2 for argument args[1] of shape [4, 3]
          to fix: use an int in [-2, 1], or None

        The batch dim of the second argument is its last:

        >>> vmap(torch.add, in_dims=(0, 1))(torch.ones(3), torch.ones(4, 3)).shape
        torch.Size([3, 4])
    """


class BatchSizeError(LaminaError, ValueError):
    """The mapped arguments of `vmap` disagree on the batch size, or none is mapped.

    Example:
        >>> import torch
        >>> from lamina import vmap
        >>> x, w = torch.ones(3, 4), torch.ones(4)
        >>> vmap(torch.dot)(x, w)
        Traceback (most recent call last):
            ...
        lamina_core.errors.BatchSizeError: the mapped arguments of vmap have different sizes
          args[0] of shape [3, 4] has size 3 in dim 0
          args[1] of shape [4] has size 4 in dim 0
          to fix: map over dims of one size, or pass None in in_dims for the others

        Every example shares `w`, so it is not mapped:

        >>> vmap(torch.dot, in_dims=(0, None))(x, w)
        tensor([4., 4., 4.])
    """


class NonScalarLossError(LaminaError, RuntimeError):
    """The function given to `grad` did not return a single real tensor of shape ().

    Only such an output has a gradient; others have a jacobian (`jacrev`, `jacfwd`), or can be
    differentiated example by example (`vmap(grad(f))`).

    Example:
        >>> import torch
        >>> from lamina import grad, vmap
        >>> grad(torch.sin)(torch.zeros(3))
        Traceback (most recent call last):
            ...
        lamina_core.errors.NonScalarLossError: grad needs a loss of shape [], got one of shape [3]
          while interpreting at level 1: grad
          to fix: reduce it, with .sum() or .mean()
        >>> vmap(grad(torch.sin))(torch.zeros(3))
        tensor([1., 1., 1.])
    """


class NotDifferentiableError(LaminaError, TypeError, RuntimeError):
    """There is nothing to differentiate, or an op has no derivative.

    Example:
        >>> import torch
        >>> from lamina import grad
        >>> grad(torch.sum)(torch.arange(3))
        Traceback (most recent call last):
            ...
        lamina_core.errors.NotDifferentiableError: grad has nothing to differentiate: no ...
          args[0]: torch.int64 tensor of shape [3]
          to fix: pass a tensor converted with .float(), or choose another argument with argnums
        >>> grad(torch.sum)(torch.arange(3).float())
        tensor([1., 1., 1.])
    """


class NotLinearError(LaminaError, ValueError):
    """The function given to `linear_transpose` is not linear.

    Linear is f(a x + b y) = a f(x) + b f(y): no product of two inputs, no constant added.

    Example:
        >>> import torch
        >>> from lamina import linear_transpose
        >>> linear_transpose(lambda x: 2 * x * x.sum(), torch.zeros(3))
        Traceback (most recent call last):
            ...
        lamina_core.errors.NotLinearError: linear_transpose met aten.mul.Tensor, which is not ...
          ...

        The transpose of the derivative of any function is its `vjp`.

        >>> from lamina import vjp
        >>> out, vjp_fn = vjp(lambda x: 2 * x * x.sum(), torch.ones(3))
        >>> vjp_fn(torch.ones(3))
        (tensor([12., 12., 12.]),)
    """


class TangentError(LaminaError, ValueError, RuntimeError):
    """Tangents or cotangents do not match the values they belong to.

    Tangents are like the primals of `jvp`, cotangents like the output of the function given to
    `vjp`: one entry a leaf, of its shape and dtype. None stands for zero.

    Example:
        >>> import torch
        >>> from lamina import vjp
        >>> out, vjp_fn = vjp(torch.sum, torch.ones(3))
        >>> vjp_fn(torch.ones(3))
        Traceback (most recent call last):
            ...
        lamina_core.errors.TangentError: cotangents does not match output
          output: torch.float32 tensor of shape []
          cotangents: torch.float32 tensor of shape [3]
          to fix: pass a tensor of the same shape and dtype, or None for zero (1 of a number)
        >>> vjp_fn(torch.ones(()))
        (tensor([1., 1., 1.]),)
    """


class MissingRuleError(LaminaError, NotImplementedError):
    """An op has no rule at a transform, and no generic route serves it.

    Under `vmap` the generic route is a loop over the examples, which `config.fallback = "error"`
    closes: good in tests, where slow ops should not go unnoticed.

    Example:
        >>> import torch
        >>> from lamina import config, vmap
        >>> a = torch.ones(2, 3, 4, dtype=torch.int8)
        >>> config.fallback = "error"
        >>> vmap(torch._int_mm)(a, a.mT)
        Traceback (most recent call last):
            ...
        lamina_core.errors.MissingRuleError: no batching rule for aten._int_mm.default: ...
          while interpreting at level 1: vmap(batch_size=2, randomness='error')
          ...
        >>> config.fallback = "silent"
        >>> vmap(torch._int_mm)(a, a.mT).shape
        torch.Size([2, 3, 3])
        >>> config.fallback = "warn"
    """


class RuleError(LaminaError, RuntimeError):
    """A rule is registered wrongly or gave an answer that breaks its contract.

    Answers are checked with `LAMINA_DEBUG=1`; registration always.

    Example:
        >>> import torch
        >>> from lamina_core.rules import RuleTable
        >>> RuleTable("batching").register(torch.sin, lambda info, in_dims, x: (x, in_dims[0]))
        Traceback (most recent call last):
            ...
        lamina_core.errors.RuleError: a batching rule is registered for an OpOverload
          got: builtin_function_or_method sin
          to fix: name the overload, such as aten.sum.dim_IntList
    """


class EscapedTensorError(LaminaError, RuntimeError):
    """A tensor of a transform was used after the transform had returned.

    A batched tensor stands for one example inside the mapped function; outside there is no such
    thing any more. What a derivative was taken of stands for its value, and is no error.

    Example:
        >>> import torch
        >>> from lamina import vmap
        >>> seen = []
        >>> def f(x):
        ...     seen.append(x * 2)
        ...     return x
        >>> x = vmap(f)(torch.ones(2, 3))
        >>> seen[0] + 1
        Traceback (most recent call last):
            ...
        lamina_core.errors.EscapedTensorError: a batched tensor of shape [3] is used after its ...
          escaped from level 1: vmap(batch_size=2, randomness='error')
          to fix: return the tensor from the mapped function instead of storing it
        >>> x, doubled = vmap(lambda x: (x, x * 2))(torch.ones(2, 3))
    """


class AbsentOpError(LaminaError, NotImplementedError):
    """An op that the running version of torch does not have was called by its own name.

    Rules name ops of several versions: see `lamina_core.overloads`.

    Example:
        >>> from lamina_core.overloads import aten
        >>> aten.an_op_of_the_future.default(1.0)
        Traceback (most recent call last):
            ...
        lamina_core.errors.AbsentOpError: torch ... has no op aten.an_op_of_the_future.default
          to fix: use what took its place in this version, or a torch that has the op
    """


class AnomalyError(LaminaError, RuntimeError):
    """A derivative came out as NaN while `torch.autograd.detect_anomaly` was on.

    Example:
        >>> import torch
        >>> from lamina import grad
        >>> with torch.autograd.set_detect_anomaly(True):
        ...     grad(lambda x: x.sqrt() * 0)(torch.zeros(()))
        Traceback (most recent call last):
            ...
        lamina_core.errors.AnomalyError: the pullback of aten.sqrt.default (SqrtBackward0) gave NaN
          ...
    """


class CapturedTensorError(LaminaError, RuntimeError):
    """A function with a rule of its own used a tensor of a transform that it was not given.

    Such functions are `torch.autograd.Function`, `custom_vjp`, `custom_jvp` and `custom_vmap`. The
    rule says nothing about a captured tensor, so its derivative would be lost.

    Example:
        >>> import torch
        >>> from lamina import grad
        >>> class Scale(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         return x * captured
        ...
        ...     @staticmethod
        ...     def backward(ctx, ct):
        ...         return ct
        >>> def loss(x):
        ...     global captured
        ...     captured = x * 2
        ...     return Scale.apply(x)
        >>> grad(loss)(torch.tensor(3.0))
        Traceback (most recent call last):
            ...
        lamina_core.errors.CapturedTensorError: ...
    """


class DataDependentError(LaminaError, RuntimeError):
    """A batched value was needed as one Python value, or would give a ragged shape.

    Example:
        >>> import torch
        >>> from lamina import vmap
        >>> vmap(lambda x: x if x > 0 else -x)(torch.tensor([1.0, -2.0]))
        Traceback (most recent call last):
            ...
        lamina_core.errors.DataDependentError: aten.item.default needs one Python value, but ...
          while interpreting at level 1: vmap(batch_size=2, randomness='error')
          it comes from .item(), float(), bool(), int() or an `if` on a batched tensor
          to fix: use torch.where in place of an `if`, and tensor ops in place of .item()
        >>> vmap(lambda x: torch.where(x > 0, x, -x))(torch.tensor([1.0, -2.0]))
        tensor([1., 2.])
    """


class NoLengthError(LaminaError, TypeError):
    """A tensor without dims was asked for its length, as `torch.tensor` does with a list of them.

    Example:
        >>> import torch
        >>> from lamina import vmap
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> vmap(lambda x: torch.tensor([x[1], x[0]]))(x)
        Traceback (most recent call last):
            ...
        lamina_core.errors.NoLengthError: len() of a 0-d tensor
          it is BatchedTensor(level=1, bdim=0, size=2, f32[])
          to fix: use torch.stack([x, y]) where torch.tensor([x, y]) asked for it
        >>> vmap(lambda x: torch.stack([x[1], x[0]]))(x)
        tensor([[2., 1.],
                [4., 3.]])
    """


class RandomnessError(LaminaError, RuntimeError):
    """A random op ran under `vmap(randomness="error")`, the default.

    Whether examples share a draw is for the caller to say.

    Example:
        >>> import torch
        >>> from lamina import vmap
        >>> noisy = lambda x: x + torch.randn(())
        >>> vmap(noisy)(torch.zeros(2))
        Traceback (most recent call last):
            ...
        lamina_core.errors.RandomnessError: aten.randn.default draws random numbers, and vmap ...
          while interpreting at level 1: vmap(batch_size=2, randomness='error')
          ...
        >>> same = vmap(noisy, randomness="same")(torch.zeros(2))
        >>> bool(same[0] == same[1])
        True
    """


class MutationError(LaminaError, RuntimeError):
    """An in-place op whose meaning under the active transforms is not clear.

    Example:
        >>> import torch
        >>> from lamina import vmap
        >>> total = torch.zeros(3)
        >>> vmap(lambda x: total.add_(x))(torch.ones(2, 3))
        Traceback (most recent call last):
            ...
        lamina_core.errors.MutationError: aten.add_.Tensor writes a value of this transform to ...
          while interpreting at level 1: vmap(batch_size=2, randomness='error')
          captured, or passed without being mapped: a tensor of shape [3]
          ...

        There is one `total` and a value to write for each example. Return what is to be added:

        >>> total += vmap(lambda x: x)(torch.ones(2, 3)).sum(0)
    """


class FallbackWarning(UserWarning):
    """An op under `vmap` runs example by example, which is slow.

    It is given once per op. `config.fallback` turns it into an error, or off.

    Example:
        >>> import torch
        >>> from lamina import config, vmap
        >>> config.fallback
        'warn'
        >>> config.fallback = "silent"
        >>> a = torch.ones(2, 3, 4, dtype=torch.int8)
        >>> vmap(torch._int_mm)(a, a.mT).shape
        torch.Size([2, 3, 3])
        >>> config.fallback = "warn"
    """


class TorchHookError(LaminaError, ImportError):
    """A private part of torch that Lamina stands on is gone, or no longer does what it did.

    It is raised when `lamina` is imported. Else a gradient might be wrong and nobody would know.

    Example:
        >>> from lamina_core.torch_hooks.doors import door
        >>> door("torch._C._gone", "an example")
        Traceback (most recent call last):
            ...
        lamina_core.errors.TorchHookError: torch ... has no torch._C._gone, on which Lamina stands
          it is needed for: an example
          to fix: install a version of torch that Lamina has been tested with (its README ...
    """


class ChangedOpsWarning(UserWarning):
    """Ops of the running torch are not those that Lamina's rules were written for.

    It is given once, by the import, and lists them. A rule relies on the arguments of its op, so
    the rules of these are left out: the ops are decomposed, run example by example or given
    PyTorch's own derivative, which may be slow. `python -m lamina.doctor` shows what changed.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", ChangedOpsWarning)
        ...     import lamina
    """


class UntestedTorchWarning(UserWarning):
    """Lamina was imported with a version of torch that its tests have not run on.

    It is given once, by the import, which then tries the transforms and fails if one is wrong.
    `python -m lamina.doctor` tries more, and compares that torch with the tested ones. To import
    without the warning:

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", UntestedTorchWarning)
        ...     import lamina
    """


def message(what: str, *lines: str) -> str:
    """Join the first line of an error and its indented details, leaving out empty ones."""
    return "\n  ".join([what, *(line for line in lines if line)])
