"""What the documents say is true: their code runs and their links lead somewhere."""

import re
from pathlib import Path

import pytest

from lamina.extend import temporary_rules

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith((".", "venv")) for part in path.relative_to(ROOT).parts)
)

_CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)#]+?)(?:#[^)]*)?\)")


@pytest.mark.parametrize("name", ["README.md", "docs/extending.md"])
def test_the_code_of_a_document_runs_from_top_to_bottom(name):
    path = ROOT / name
    text = path.read_text()
    namespace: dict[str, object] = {}
    with temporary_rules():
        for block in _CODE.finditer(text):
            # Empty lines in front make tracebacks show the line of the document.
            before = "\n" * text.count("\n", 0, block.start(1))
            exec(compile(before + block[1], str(path), "exec"), namespace)
    assert namespace, f"{name} has no code any more"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(path):
    links = _LINK.findall(path.read_text())
    broken = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not broken
