"""The tree keeps its order: who imports whom, how long a file is, what a note cites.

The imports are read from the source, not from `sys.modules`: what counts is what is written.
"""

from __future__ import annotations

import ast
import functools
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("lamina", "lamina_core")
LONGEST = 450

# What the rules of a transform may import of our own: helpers of their declaration, and facts.
RULES_MAY_IMPORT = {
    "lamina.batching.rules": {
        "lamina.batching.advanced",
        "lamina.batching.agreement",
        "lamina.batching.bounds",
        "lamina.batching.dims",
        "lamina.batching.table",
        "lamina.batching.rules",
        "lamina_core.dispatch",
        "lamina_core.errors",
        "lamina_core.half",
        "lamina_core.overloads",
        "lamina_core.schema",
        "lamina_core.schema_record",
        "lamina_core.torch_hooks.registry",
    },
    "lamina.autodiff.rules": {
        "lamina.autodiff.conventions",
        "lamina.autodiff.declare",
        "lamina.autodiff.outside",
        "lamina.autodiff.shapes",
        "lamina.autodiff.rules",
        "lamina_core.dispatch",
        "lamina_core.errors",
        "lamina_core.half",
        "lamina_core.overloads",
        "lamina_core.schema",
        "lamina_core.schema_record",
    },
}

# Other implementations of what we implement: not ours to call.
FORBIDDEN = (
    "torch._functorch",
    "torch._C._functorch",
    "torch.autograd.functional",
    "functorch",
    "torch.vmap",
    *(f"torch.func.{name}" for name in "grad grad_and_value hessian jacfwd jacrev jvp".split()),
    *(f"torch.func.{name}" for name in "functionalize linearize vjp vmap".split()),
)


@functools.cache
def sources() -> dict[str, Path]:
    """Every module of the packages by its dotted name."""
    found = {}
    for top in (ROOT / "core", ROOT / "transforms"):
        for package in PACKAGES:
            for path in sorted((top / package).rglob("*.py")):
                parts = path.relative_to(top).with_suffix("").parts
                found[".".join(parts).removesuffix(".__init__")] = path
    return found


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(sources()[module].read_text())


def targets(node: ast.AST) -> list[str]:
    """What an import statement names: modules, and names that may be modules."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


@functools.cache
def imports(module: str) -> frozenset[str]:
    """All that a module imports, for its types too; ours as the name of a module."""
    found = set()
    pending: list[ast.AST] = [tree_of(module)]
    while pending:
        node = pending.pop()
        found.update(ours_or_other(target) for target in targets(node))
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)
    return frozenset(found)


def ours_or_other(target: str) -> str:
    """The module in which an imported name lives, where that is one of ours."""
    if target in sources():
        return target
    home = target.rpartition(".")[0]
    return home if home in sources() else target


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def crossings(inside: str, outside: str) -> list[str]:
    return [
        f"{module} imports {target}"
        for module in sources()
        if is_within(module, inside)
        for target in sorted(imports(module))
        if is_within(target, outside)
    ]


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        ("lamina_core", "lamina"),
        ("lamina.batching", "lamina.autodiff"),
        ("lamina.autodiff", "lamina.batching"),
        ("lamina.batching", "lamina.jacobians"),
        ("lamina.autodiff", "lamina.jacobians"),
    ],
)
def test_one_part_knows_nothing_of_the_other(inside, outside):
    assert crossings(inside, outside) == []


def test_jacobians_stand_on_public_calls_and_checks_of_arguments():
    ours = {target for target in imports("lamina.jacobians.api") if target.startswith("lamina.")}
    assert ours == {
        "lamina.autodiff.api",
        "lamina.autodiff.checks",
        "lamina.jacobians.rows",
        "lamina.batching.api",
    }


def test_no_cycle():
    graph = {
        module: {t for t in imports(module) if t in sources() and t != module}
        for module in sources()
    }
    # A package only re-exports what its modules hold, and is loaded before them.
    graph["lamina"] = set()
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("module", sources())
def test_no_import_inside_a_function(module):
    found = [
        f"line {node.lineno}: {target}"
        for function in ast.walk(tree_of(module))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        for target in targets(node)
        if target.partition(".")[0] in PACKAGES
    ]
    assert found == []


@pytest.mark.parametrize("package", RULES_MAY_IMPORT)
def test_rules_import_their_declaration_helpers_alone(package):
    allowed = RULES_MAY_IMPORT[package]
    found = [
        f"{module} imports {target}"
        for module in sources()
        if module.startswith(package + ".")
        for target in sorted(imports(module))
        if target.partition(".")[0] in PACKAGES
        and not any(is_within(target, known) for known in allowed)
    ]
    assert found == []


@pytest.mark.parametrize("module", sources())
def test_a_module_says_what_it_is(module):
    docstring = ast.get_docstring(tree_of(module))
    assert docstring
    assert docstring[0].isupper() or docstring[0] == "`"


@pytest.mark.parametrize("module", sources())
def test_a_file_is_not_too_long(module):
    assert len(sources()[module].read_text().splitlines()) <= LONGEST


@pytest.mark.parametrize("module", sources())
def test_no_other_implementation_is_called(module):
    names = [ast.unparse(n) for n in ast.walk(tree_of(module)) if isinstance(n, ast.Attribute)]
    names += [target for node in ast.walk(tree_of(module)) for target in targets(node)]
    found = [name for name in names if any(is_within(name, other) for other in FORBIDDEN)]
    assert found == []


@pytest.mark.parametrize("module", sources())
def test_private_parts_of_torch_are_named_in_one_place(module):
    if is_within(module, "lamina_core.torch_hooks"):
        return
    names = [ast.unparse(n) for n in ast.walk(tree_of(module)) if isinstance(n, ast.Attribute)]
    names += [target for node in ast.walk(tree_of(module)) for target in targets(node)]
    private = re.compile(r"(torch(\.\w+)*|_C)\._[A-Za-z]")
    public = re.compile(r"torch\.(ops\.|_safe_softmax$)")  # ops, by whichever name
    assert [name for name in names if private.match(name) and not public.match(name)] == []


_TITLE = re.compile(r"^\s*# NOTE \[([^\]]+)\]", re.MULTILINE)
_CITATION = re.compile(r"NOTE\s+\[([^\]]+)\]")


def test_every_citation_of_a_note_resolves():
    texts = {module: path.read_text() for module, path in sources().items()}
    texts |= {str(p.relative_to(ROOT)): p.read_text() for p in readmes()}
    titles = [title for text in texts.values() for title in _TITLE.findall(text)]
    assert len(titles) == len(set(titles)), "two notes have one title"
    broken = [
        f"{name}: NOTE [{cited}]"
        for name, text in texts.items()
        for cited in _CITATION.findall(text)
        if cited not in titles
    ]
    assert broken == []


def readmes() -> list[Path]:
    return sorted(p for top in ("core", "transforms") for p in (ROOT / top).rglob("README.md"))


def test_every_folder_of_the_source_has_a_readme_of_one_page():
    folders = {path.parent for path in sources().values()}
    assert {path.parent for path in readmes()} == folders
    for path in readmes():
        assert len(path.read_text().splitlines()) <= 40, path


@pytest.mark.parametrize("path", readmes(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_readme_names_files_that_exist_and_every_file(path):
    text = path.read_text()
    named = set(re.findall(r"`([\w./]+\.py)`", text))
    assert [name for name in sorted(named) if not (path.parent / name).exists()] == []
    if path.parent.name != "rules":
        files = {p.name for p in path.parent.glob("*.py")} - {"__init__.py"}
        assert files - {Path(name).name for name in named} == set()
