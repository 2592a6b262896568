"""The schemas of all ops on the versions of torch that were tested: what rules were written for.

A rule relies on the names, the order, the kinds and the defaults of its op's arguments, and on what
the op writes to. `schemas.txt` has the schema of every op, more than one where versions differ. A
rule whose op has yet another schema in the running torch is not registered, so that the op is
decomposed, looped over or given PyTorch's own derivative instead, and a warning lists such ops.

    python -m lamina_core.schema_record            # what is new, gone and changed in this torch
    python -m lamina_core.schema_record --record   # add this torch to the record

`LAMINA_SCHEMAS=error` in the environment, which the tests set, makes a rule for an op that is not
in the record an error.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lamina_core.config import config
from lamina_core.errors import ChangedOpsWarning, RuleError, message
from lamina_core.overloads import NAMESPACES, overloads
from lamina_core.torch_hooks.registry import all_op_names
from lamina_core.versions import minor_version

__all__ = ["Report", "accepts", "check", "is_recorded", "record", "report", "warn_of_changes"]

PATH = Path(__file__).with_name("schemas.txt")
_HEADER = "# torch "
# Importing these defines ops, which torch otherwise leaves to their first use.
_DEFINE_OPS = (
    "torch.nn.modules.linear_cross_entropy",
    "torch.distributed._functional_collectives",
)


class Report(NamedTuple):
    """How the ops of the running torch differ from those recorded.

    Attributes:
        new: Ops that no recorded version has.
        gone: Ops that the nearest recorded version has and this one lacks.
        changed: Ops by name, with the schema here and one that was recorded.
    """

    new: list[str]
    gone: list[str]
    changed: dict[str, str]


class _Record(NamedTuple):
    """The file: the versions in it, and for each schema the versions that have it."""

    versions: list[str]
    schemas: dict[str, list[str]]


def _read() -> _Record:
    header, *lines = PATH.read_text().splitlines()
    versions = header.removeprefix(_HEADER).split()
    schemas = {}
    for line in lines:
        schema, _, note = line.partition("  # ")
        schemas[schema] = _versions_of(note, versions)
    return _Record(versions, schemas)


def _versions_of(note: str, versions: list[str]) -> list[str]:
    if note.startswith("since "):
        return versions[versions.index(note.removeprefix("since ")) :]
    if note.startswith("until "):
        return versions[: versions.index(note.removeprefix("until ")) + 1]
    return note.split() or versions


def _note_of(have: list[str], versions: list[str]) -> str:
    """The versions that have a schema, in a form that a version more does not change."""
    if have == versions:
        return ""
    if have == versions[-len(have) :]:
        return f"  # since {have[0]}"
    if have == versions[: len(have)]:
        return f"  # until {have[-1]}"
    return f"  # {' '.join(have)}"


@cache
def _accepted() -> dict[str, list[str]]:
    """The recorded schemas of each op, by its name for the dispatcher."""
    found: dict[str, list[str]] = {}
    for line in PATH.read_text().splitlines()[1:]:
        schema = line.partition("  # ")[0]
        found.setdefault(schema.partition("(")[0], []).append(schema)
    return found


def is_recorded(op: Any) -> bool:
    """Whether a tested version of torch has an op of that name.

    Example:
        >>> from lamina_core.overloads import aten
        >>> is_recorded(aten.sum.dim_IntList), is_recorded(aten.of_the_future.default)
        (True, False)
    """
    return op.name() in _accepted()


def check(op: Any) -> str | None:
    """What is different about an op, or None if it is as in one of the tested versions.

    Nothing is known of an op that is not in the record: that is no difference.
    """
    recorded = _accepted().get(op.name())
    here = str(op._schema)
    if recorded is None or here in recorded:
        return None
    return f"{here}, where the record has {' or '.join(recorded)}"


_refused: set[str] = set()


def accepts(op: Any) -> bool:
    """Whether a rule of ours may serve an op of the running torch; `warn_of_changes` lists others.

    Raises:
        RuleError: Under `LAMINA_SCHEMAS=error`, if it may not, or if the op is not in the record.
    """
    difference = check(op)
    if config.schemas == "error" and (difference or not is_recorded(op)):
        raise RuleError(
            message(
                f"{op} is not the op that its rule was written for",
                difference or f"{op._schema} is not in the record",
                "to fix: see that the rule is right for it, and run "
                "`python -m lamina_core.schema_record --record`",
            )
        )
    if difference:
        _refused.add(str(op))
    return difference is None


def warn_of_changes() -> None:
    """Say, once, which ops have changed, so that their rules do not serve."""
    if _refused:
        ops = sorted(_refused)
        _refused.clear()
        warnings.warn(
            message(
                f"ops of torch {torch.__version__} are not those that Lamina has rules for",
                f"changed: {', '.join(ops)}",
                "they are decomposed, looped over or given PyTorch's own derivative instead",
                "to fix: nothing, if that is fast enough; `python -m lamina.doctor` shows how they "
                "have changed",
            ),
            ChangedOpsWarning,
            stacklevel=3,
        )


# -- the running torch -----------------------------------------------------------------------------


def _running() -> Iterator[str]:
    """The schemas of the running torch, without those of `out=` variants, which have no rules."""
    for module in _DEFINE_OPS:
        with suppress(ImportError):  # a version or a build without it
            importlib.import_module(module)
    for full in sorted(all_op_names()):
        namespace, _, name = full.partition("::")
        if namespace not in NAMESPACES:
            continue
        base, _, overload = name.partition(".")
        schema = getattr(getattr(overloads(namespace), base), overload or "default")._schema
        written = (a for a in schema.arguments if a.alias_info and a.alias_info.is_write)
        if not any(argument.kwarg_only for argument in written):
            yield str(schema)


def report() -> Report:
    """The ops of the running torch, compared with those of the version nearest to it."""
    recorded, here = _read(), {schema.partition("(")[0]: schema for schema in _running()}
    version = _this_version()
    older = [v for v in recorded.versions if minor_version(v) <= minor_version(version)]
    nearest = older[-1] if older else recorded.versions[0]
    there = {s.partition("(")[0] for s, have in recorded.schemas.items() if nearest in have}
    accepted = _accepted()
    return Report(
        new=sorted(name for name in here if name not in accepted),
        gone=sorted(there - set(here)),
        changed={
            name: f"{schema}, where the record has {' or '.join(accepted[name])}"
            for name, schema in here.items()
            if name in accepted and schema not in accepted[name]
        },
    )


def record() -> None:
    """Put the schemas of the running torch into the record, in place of those of its version."""
    known = _read() if PATH.exists() else _Record([], {})
    version = _this_version()
    versions = sorted({*known.versions, version}, key=minor_version)
    schemas = {s: [v for v in have if v != version] for s, have in known.schemas.items()}
    for schema in _running():
        schemas.setdefault(schema, []).append(version)
    lines = [_HEADER + " ".join(versions)]
    for schema, have in sorted(schemas.items()):
        if have:
            have.sort(key=minor_version)
            lines.append(schema + _note_of(have, versions))
    PATH.write_text("\n".join(lines) + "\n")
    _accepted.cache_clear()


def _this_version() -> str:
    return ".".join(map(str, minor_version(torch.__version__)))


def main(arguments: list[str] | None = None) -> None:
    """Print the report, or record the running torch."""
    parser = argparse.ArgumentParser(prog="python -m lamina_core.schema_record")
    parser.add_argument("--record", action="store_true", help="add the running torch to the record")
    if parser.parse_args(arguments).record:
        record()
    new, gone, changed = report()
    lines = [f"new: {name}" for name in new] + [f"gone: {name}" for name in gone]
    lines += [f"changed: {difference}" for difference in changed.values()]
    sys.stdout.write("\n".join(lines or ["as recorded"]) + "\n")


if __name__ == "__main__":
    main()
