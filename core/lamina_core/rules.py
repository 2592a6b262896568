"""`RuleTable`: the rules of one transform, one per `OpOverload`, with checked registration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lamina_core.errors import RuleError, message
from lamina_core.overloads import is_absent
from lamina_core.schema_record import accepts
from lamina_core.torch_hooks.registry import OpOverload

__all__ = ["STATES", "Rule", "RuleTable"]

# The states of an (op, transform) pair, best first. "generic" is the loop over the examples under
# vmap ("fallback") and PyTorch's own formula for derivatives ("borrowed").
STATES = ("rule", "family", "decomposed", "generic", "missing")
# Rules of others are written for the torch that they run.
_OURS = ("lamina.", "torch.")


@dataclass(frozen=True)
class Rule:
    """One registered rule.

    Attributes:
        op: The overload it serves.
        function: What runs; its signature is the transform's own convention.
        state: "rule" for one written by hand, "family" for one made from the op's schema.
        owner: Module and name of the function, for messages.
    """

    op: Any
    function: Callable[..., Any]
    state: str
    owner: str


class RuleTable:
    """Rules by overload.

    A rule for an op that the running torch lacks (`lamina_core.overloads`), or has with arguments
    that no tested version has (`lamina_core.schema_record`), is noted and serves nothing.

    Args:
        transform: The name that messages use, such as "batching".

    Attributes:
        absent: The rules whose op the running torch does not have.
        changed: The rules of Lamina itself whose op is another there than on all tested versions.

    Raises:
        RuleError: On registration for something that is no `OpOverload`, or twice for one.

    Example:
        >>> import torch
        >>> table = RuleTable("demo")
        >>> table.register(torch.ops.aten.sin.default, lambda x: x)
        >>> table.lookup(torch.ops.aten.sin.default).state
        'rule'
        >>> table.lookup(torch.ops.aten.cos.default) is None
        True
    """

    def __init__(self, transform: str) -> None:
        self.transform = transform
        self.absent: list[Rule] = []
        self.changed: list[Rule] = []
        self._rules: dict[int, Rule] = {}

    def register(self, op: Any, function: Callable[..., Any], *, state: str = "rule") -> None:
        """Add the rule of one overload."""
        if not isinstance(op, OpOverload) and not is_absent(op):
            raise RuleError(
                message(
                    f"a {self.transform} rule is registered for an OpOverload",
                    f"got: {type(op).__name__} {getattr(op, '__name__', op)}",
                    "to fix: name the overload, such as aten.sum.dim_IntList",
                )
            )
        owner = f"{function.__module__}.{getattr(function, '__qualname__', repr(function))}"
        known = self._of(op)
        if known is not None:
            raise RuleError(
                message(
                    f"a second {self.transform} rule for {op}",
                    f"first owner: {known.owner}",
                    f"second owner: {owner}",
                    "to fix: keep one of the two",
                )
            )
        rule = Rule(op, function, state, owner)
        if is_absent(op):
            self.absent.append(rule)
        elif owner.startswith(_OURS) and not accepts(op):
            self.changed.append(rule)
        else:
            self._rules[id(op)] = rule

    def _of(self, op: Any) -> Rule | None:
        """The registered rule of an overload, be it one that serves or not."""
        others = (rule for rule in (*self.absent, *self.changed) if rule.op is op)
        return self._rules.get(id(op)) or next(others, None)

    def lookup(self, op: Any) -> Rule | None:
        """The rule of an overload, or None."""
        return self._rules.get(id(op))

    def __iter__(self) -> Any:
        """Iterate over all rules, in the order of registration."""
        return iter(self._rules.values())

    def __len__(self) -> int:
        """How many overloads have a rule."""
        return len(self._rules)

    def describe(self, op: Any, state: str) -> str:
        """A state and, for a registered rule, who owns it."""
        rule = self.lookup(op)
        return state if rule is None else f"{state} ({rule.owner})"

    def siblings(self, op: Any) -> list[str]:
        """Names of the registered overloads of the same op, for messages."""
        name = op._schema.name
        return sorted(str(rule.op) for rule in self if rule.op._schema.name == name)
