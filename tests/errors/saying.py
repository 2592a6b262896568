"""How the tests of this folder read a message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lamina_core.errors import LaminaError


def said(kind: type[Exception], call: Callable[[], Any]) -> str:
    """The message of the error that a call raises, which is of `kind` and no subclass of it.

    Each is one of ours and also the builtin error that callers would expect to catch.
    """
    with pytest.raises(kind) as caught:
        call()
    assert caught.type is kind
    assert issubclass(kind, LaminaError)
    assert any(base.__module__ == "builtins" for base in kind.__mro__[2:-2])
    return str(caught.value)
