"""How many checks of third-party models pass, in Lamina and in torch.func?

The models are those of `tests/models`: every kind of architecture of `transformers`, unmodified.
For each, per-sample gradients, a directional derivative and a Hessian-vector product have to agree
with `torch.autograd`, without a per-example loop.

    python benchmarks/models.py [--quick] [--json FILE] [--markdown FILE]
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch

import harness
import lamina
from lamina_core.errors import FallbackWarning

sys.path.append(str(Path(__file__).parents[1]))
from tests.models import zoo
from tests.models.problem import CHECKS, Problem

CONTENDERS: dict[str, ModuleType] = {"lamina": lamina, "torch.func": torch.func}


def outcome(check: str, problem: Problem, lib: ModuleType) -> tuple[bool, str]:
    """Whether a check passes, and if not the first line that says why."""
    try:
        with warnings.catch_warnings():
            # Either warns when it loops over the examples.
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message="There is a performance drop")
            warnings.simplefilter("error", FallbackWarning)
            CHECKS[check](problem, lib)
    except Exception as error:  # a refusal is a result, which the table reports
        return False, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return True, ""


def main(arguments: list[str] | None = None) -> harness.Report:
    """Tries all checks; returns what it printed."""
    report = harness.start("Checks of third-party models.", arguments)
    names = ["bert", "llama"] if report.settings.quick else zoo.NAMES
    table = harness.Table(
        "Checks of models that pass",
        ["model", *(f"{who}: {c}" for who in CONTENDERS for c in CHECKS)],
    )
    passed = dict.fromkeys(CONTENDERS, 0)
    for name in names:
        problem = Problem(name)
        cells = []
        for who, lib in CONTENDERS.items():
            for check in CHECKS:
                fine, why = outcome(check, problem, lib)
                passed[who] += fine
                cells.append("yes" if fine else "no")
                if not fine:
                    table.note_failures({(f"{name}, {check}", who): why[:150]})
        table.add(name, *cells)
    report.add(table)
    total = harness.Table("In all", ["", *CONTENDERS])
    total.add(f"of {len(names) * len(CHECKS)} checks", *(str(passed[who]) for who in CONTENDERS))
    report.add(total)
    report.save()
    return report


if __name__ == "__main__":
    main()
