"""No test here loops by accident, or reaches a rule through torch.func."""

from __future__ import annotations

import pytest
from torch._functorch import autograd_function

import lamina
from tests.batching.registered.ops import CALLS


@pytest.fixture(autouse=True)
def no_calls(monkeypatch):
    """Forgets the calls of rules, forbids loops, and bars the way into torch.func's own."""
    CALLS.clear()
    monkeypatch.setattr(lamina.config, "fallback", "error")

    def barred(*args, **kwargs):
        raise AssertionError("the rule was reached through torch.func")

    monkeypatch.setattr(autograd_function, "custom_function_call_vmap_helper", barred)


@pytest.fixture
def looping(monkeypatch):
    monkeypatch.setattr(lamina.config, "fallback", "silent")
