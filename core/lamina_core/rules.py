"""`RuleTable`: the rules of one transform, one per `OpOverload`, with checked registration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakSet

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
        handlers: What an interpreter has made of the rules, by the id of the op; empty again
            whenever there is a new rule.
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

    # All there are: a rule for all transforms concerns the handlers of each.
    tables: ClassVar[WeakSet[RuleTable]] = WeakSet()

    def __init__(self, transform: str) -> None:
        self.transform = transform
        self.handlers: dict[int, Any] = {}
        RuleTable.tables.add(self)
        self.absent: list[Rule] = []
        self.changed: list[Rule] = []
        self._rules: dict[int, Rule] = {}

    def register(
        self,
        op: Any,
        function: Callable[..., Any],
        *,
        state: str = "rule",
        replace: bool = False,
        given: bool = False,
    ) -> None:
        """Add the rule of one overload.

        Args:
            op: The overload.
            function: What runs.
            state: One of `STATES`.
            replace: Whether it may take the place of another.
            given: Whether it is given by others, for the torch that they run.
        """
        if not isinstance(op, OpOverload) and not is_absent(op):
            article = "an" if self.transform[0] in "aeiou" else "a"
            raise RuleError(
                message(
                    f"{article} {self.transform} rule is registered for an OpOverload",
                    f"got: {type(op).__name__} {getattr(op, '__name__', op)}",
                    "to fix: name the overload, such as aten.sum.dim_IntList",
                )
            )
        owner = f"{function.__module__}.{getattr(function, '__qualname__', repr(function))}"
        known = self._of(op)
        if known is not None and not replace:
            raise RuleError(
                message(
                    f"a second {self.transform} rule for {op}",
                    f"first owner: {known.owner}",
                    f"second owner: {owner}",
                    "to fix: keep one of the two; lamina.extend takes replace=True",
                )
            )
        rule = Rule(op, function, state, owner)
        if is_absent(op):
            self.absent.append(rule)
        elif not given and owner.startswith(_OURS) and not accepts(op):
            self.changed.append(rule)
        else:
            self._rules[id(op)] = rule
            self.handlers.clear()

    @classmethod
    def forget_handlers(cls) -> None:
        """Let the handlers of all transforms be made anew."""
        for table in cls.tables:
            table.handlers.clear()

    def kept(self) -> Callable[[], None]:
        """Remember the rules of now; what it returns brings them back."""
        rules, absent = dict(self._rules), list(self.absent)

        def restore() -> None:
            self._rules, self.absent = rules, absent
            self.handlers.clear()

        return restore

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
