"""Models of other people, unmodified: every kind of architecture of `transformers`.

Per-sample gradients, a directional derivative and a Hessian-vector product of each, held against
`torch.autograd`, with the per-example loop forbidden.
"""

from __future__ import annotations

import functools

import pytest

import lamina

pytest.importorskip("transformers", reason="the extra 'models' is not installed")

from tests.models import zoo
from tests.models.problem import CHECKS, Problem

problem = functools.cache(Problem)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", zoo.NAMES)
def test_model(name, check, monkeypatch):
    monkeypatch.setattr(lamina.config, "fallback", "error")
    CHECKS[check](problem(name), lamina)
