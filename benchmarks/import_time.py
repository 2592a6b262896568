"""What does importing Lamina cost, beyond importing torch, and what do the first calls cost?

Each number is of a process of its own, in seconds of its processor, which a busy machine does not
change much. The modules have been compiled to bytecode before, as they are after the first run.
Torch does some things at their first use, to which the import of Lamina leaves them: for the first
op on a wrapper inside another transform it imports `torch.distributed.tensor`, and for the first
checkpoint its compiler.

    python benchmarks/import_time.py [--quick] [--json FILE] [--markdown FILE]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import numpy as np

import harness

TORCH = "import torch"
LAMINA = f"{TORCH}; x = torch.ones(3); import lamina"
GRAD = f"{LAMINA}; lamina.grad(lambda x: (x**2).sum())(x)"
# What is timed, and what comes before it.
CASES = {
    "import torch": ("pass", TORCH),
    "import lamina, after torch": (TORCH, "import lamina"),
    "the first grad": (LAMINA, "lamina.grad(lambda x: (x**2).sum())(x)"),
    "the first vmap(grad), after a grad": (GRAD, "lamina.vmap(lamina.grad(lambda x: x**2))(x)"),
}
_PROGRAM = """
import time
{before}
start = time.process_time()
{timed}
print(time.process_time() - start)
"""


def seconds(before: str, timed: str, bytecode: str) -> float:
    """Processor seconds of a statement in a process of its own."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    program = _PROGRAM.format(before=before, timed=timed)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def measure(rounds: int) -> harness.Table:
    """One row a case."""
    table = harness.Table("Import and first calls", ["what", "s", "least s"])
    with tempfile.TemporaryDirectory() as bytecode:
        for before, timed in CASES.values():
            seconds(before, timed, bytecode)
        for what, (before, timed) in CASES.items():
            samples = np.array([seconds(before, timed, bytecode) for _ in range(rounds)])
            table.add(what, harness.median(samples), float(samples.min()))
    return table


def main(arguments: list[str] | None = None) -> harness.Report:
    """Runs the measurement; returns what it printed."""
    report = harness.start("The time that an import takes.", arguments)
    report.add(measure(1 if report.settings.quick else 9))
    report.save()
    return report


if __name__ == "__main__":
    main()
