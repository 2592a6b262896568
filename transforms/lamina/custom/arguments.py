"""The arguments of a function with a rule of its own: bound by position, and taken apart."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lamina.autodiff.checks import describe, structure_text
from lamina_core import pytree
from lamina_core.errors import RuleError, StructureError, message
from lamina_core.views import refresh_levels

__all__ = ["Arguments", "Output", "Signature", "need_like", "pair_of"]

Tensor = torch.Tensor
_BY_POSITION = frozenset(
    (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
)


def _name_of(fun: Any) -> str:
    """How messages name a function."""
    return getattr(fun, "__name__", None) or type(fun).__name__


class Signature:
    """The parameters of a function, and which of them are not differentiated."""

    def __init__(
        self, fun: Callable[..., Any], nondiff_argnums: Any, nondiff_argnames: Any
    ) -> None:
        self.name = _name_of(fun)
        try:
            self.signature: inspect.Signature | None = inspect.signature(fun)
        except (TypeError, ValueError):  # some builtins have none
            self.signature = None
        numbers = [nondiff_argnums] if isinstance(nondiff_argnums, int) else list(nondiff_argnums)
        names = [nondiff_argnames] if isinstance(nondiff_argnames, str) else list(nondiff_argnames)
        known = [] if self.signature is None else list(self.signature.parameters)
        for name in names:
            if name not in known:
                raise StructureError(
                    message(
                        f"nondiff_argnames of {self.name} has {name!r}, which is no parameter",
                        f"parameters: {', '.join(known)}",
                        "to fix: name a parameter",
                    )
                )
        self.nondiff = tuple(sorted({*numbers, *map(known.index, names)}))
        # How many arguments there are when all are given, of a function without stars.
        kinds = [p.kind for p in self.signature.parameters.values()] if self.signature else []
        self._count = len(kinds) if _BY_POSITION.issuperset(kinds) else None

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """All arguments by position, defaults filled in.

        Raises:
            StructureError: If one cannot be given by position, or there is no argument at one of
                `nondiff_argnums`.
        """
        if not kwargs and len(args) == self._count:
            return self._checked(args)  # binding would take 10 us
        if self.signature is not None:
            bound = self.signature.bind(*args, **kwargs)
            bound.apply_defaults()
            args, kwargs = bound.args, bound.kwargs
        if kwargs:
            raise StructureError(
                message(
                    f"{self.name} has arguments that cannot be given by position: "
                    f"{', '.join(kwargs)}",
                    "a rule of the user's takes all arguments by position",
                    "to fix: take keyword-only parameters out of its signature",
                )
            )
        return self._checked(args)

    def _checked(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments, if there is one at each of `nondiff_argnums`."""
        if any(not 0 <= at < len(args) for at in self.nondiff):
            raise StructureError(
                message(
                    f"nondiff_argnums of {self.name} is {self.nondiff}, but it is called with "
                    f"{len(args)} arguments",
                    "to fix: name positions of arguments, counted from 0",
                )
            )
        return args


class Arguments:
    """The arguments of one call.

    Attributes:
        args: All of them, by position.
        nondiff: Those that are not differentiated.
        leaves: The leaves of the others.
        spec: The structure of the tuple of the others.
        places: Which leaves are tensors.
    """

    def __init__(self, args: tuple[Any, ...], nondiff: Sequence[int]) -> None:
        self.args = args
        self._at = nondiff
        self.nondiff = tuple([args[at] for at in nondiff])
        others = tuple([arg for at, arg in enumerate(args) if at not in nondiff])
        self.leaves, self.spec = pytree.flatten(others)
        self.places = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        refresh_levels(self.tensors)

    @property
    def tensors(self) -> list[Any]:
        """The tensors among the leaves."""
        return [self.leaves[i] for i in self.places]

    def forget(self) -> None:
        """Let go of the tensors: what a tape keeps for the backward pass is for rules to say."""
        for place in self.places:
            self.leaves[place] = None
        self.args = tuple([arg if at in self._at else None for at, arg in enumerate(self.args)])

    def filled(self, tensors: Sequence[Any], *, static: Sequence[Any] | None = None) -> list[Any]:
        """The leaves with other tensors (and with `static` in place of the other leaves)."""
        leaves = list(self.leaves if static is None else static)
        for i, tensor in zip(self.places, tensors, strict=True):
            leaves[i] = tensor
        return leaves

    def tree(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """The differentiated arguments, made of the given leaves."""
        return pytree.unflatten(self.spec, leaves)

    def placed(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """All arguments, the differentiated ones made of the given leaves."""
        if not self._at:
            return self.tree(leaves)
        others = iter(self.tree(leaves))
        return tuple([arg if at in self._at else next(others) for at, arg in enumerate(self.args)])


class Output:
    """The output of one call.

    Attributes:
        spec: Its structure.
        places: Which leaves are tensors.
    """

    def __init__(self, tree: Any) -> None:
        leaves, self.spec = pytree.flatten(tree)
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.tensors = [leaves[i] for i in self.places]
        self._static = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def forget(self) -> list[Any]:
        """Let go of the tensors, and return them."""
        tensors, self.tensors = self.tensors, []
        return tensors

    def filled(self, tensors: Sequence[Any], *, static: bool = True) -> list[Any]:
        """The leaves with other tensors (and None in place of the other leaves, on demand)."""
        leaves = list(self._static) if static else [None] * len(self._static)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return leaves

    def tree(self, tensors: Sequence[Any]) -> Any:
        """The output, made of other tensors."""
        return pytree.unflatten(self.spec, self.filled(tensors))


def pair_of(answer: Any, who: str, wanted: str) -> tuple[Any, Any]:
    """What a rule returned, if that is a pair.

    Raises:
        RuleError: If it is not.
    """
    if isinstance(answer, (tuple, list)) and len(answer) == 2:
        return answer[0], answer[1]
    got = type(answer).__name__
    if isinstance(answer, (tuple, list)):
        got += f" of {len(answer)}"
    raise RuleError(
        message(f"{who} returned a {got}", f"expected: a pair {wanted}", f"to fix: return {wanted}")
    )


def need_like(
    given: Any, spec: Any, like: Sequence[Any], *, who: str, what: str, of: str
) -> list[Any]:
    """The leaves of what a rule returned, which has to be like something else; None is zero.

    Args:
        given: What the rule returned; None may stand for a whole subtree.
        spec: The structure wanted.
        like: For each leaf, anything with the shape and dtype wanted, or None if it is ignored.
        who: The rule, for messages.
        what: What it returned, for messages.
        of: What it has to be like, for messages.

    Raises:
        RuleError: If the structure, a shape or a dtype differs.
    """
    found = _spread(given, spec)
    if found is None:
        raise RuleError(
            message(
                f"{who} returned {what} whose structure is not that of {of}",
                f"expected: {structure_text(spec)}",
                f"got: {structure_text(pytree.structure(given))}",
                f"to fix: return one entry for each leaf of {of}, None for zero",
            )
        )
    for i, (leaf, wanted) in enumerate(zip(found, like, strict=True)):
        if wanted is None:
            found[i] = None
        elif leaf is not None and not (
            isinstance(leaf, Tensor) and leaf.shape == wanted.shape and leaf.dtype == wanted.dtype
        ):
            path = spec.accessors()[i].codify("")
            raise RuleError(
                message(
                    f"{who} returned {what} that do not fit {of}",
                    f"expected at {path or 'the only leaf'}: {wanted.dtype} tensor of shape "
                    f"{list(wanted.shape)}",
                    f"got: {describe(leaf)}",
                    "to fix: return a tensor of the same shape and dtype, or None for zero",
                )
            )
    return found


def _spread(given: Any, spec: Any) -> list[Any] | None:
    """The leaves of a tree of a structure in which None may stand for subtrees, or None."""
    leaves, found = pytree.flatten(given)
    if found == spec:
        return leaves
    if given is None:
        return [None] * spec.num_leaves
    if spec.is_leaf() or found.is_leaf():
        return None
    if found.type is not spec.type or found.num_children != spec.num_children:
        return None
    if found.entries() != spec.entries():
        return None
    spread: list[Any] = []
    start = 0
    for inner, wanted in zip(found.children(), spec.children(), strict=True):
        part = _spread(pytree.unflatten(inner, leaves[start : start + inner.num_leaves]), wanted)
        if part is None:
            return None
        spread += part
        start += inner.num_leaves
    return spread
