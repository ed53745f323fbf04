"""What the documents say is true: their specs are valid, their links lead somewhere, their targets exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.egress_attempts import ATTEMPTS
from voidbox.spec import parse_spec

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
FENCED = re.compile(r"^```yaml\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
MAKE = re.compile(r"\bmake ([a-z][a-z-]+)")


def specs() -> list[tuple[str, str]]:
    """Every YAML block that is a whole spec, with its place."""
    return [
        (f"{path.relative_to(ROOT)} block {number}", block)
        for path in DOCUMENTS
        for number, block in enumerate(FENCED.findall(path.read_text()), start=1)
        if "api_version:" in block and "kind:" in block
    ]


@pytest.mark.parametrize(("place", "text"), specs(), ids=lambda value: value if "\n" not in value else "")
def test_every_spec_in_the_documents_is_valid(place: str, text: str) -> None:
    spec = parse_spec(text, filename=f"{place}.yaml", base_dir=ROOT / "examples/quickstart")
    assert spec.name


def test_the_readme_shows_a_spec() -> None:
    assert any(place.startswith("README.md") for place, _ in specs())


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    missing = [target for target in LINK.findall(path.read_text()) if not (path.parent / target).exists()]
    assert missing == []


def test_every_make_target_that_is_named_exists() -> None:
    argv = ["make", "-C", str(ROOT), "-pRrq", ":"]
    listed = subprocess.run(argv, capture_output=True, text=True, check=False).stdout
    targets = set(re.findall(r"^([a-z][a-z-]*):", listed, re.MULTILINE))
    named = {(path.name, target) for path in DOCUMENTS for target in MAKE.findall(path.read_text())}
    wrong = {(name, target) for name, target in named if target not in targets}
    # Words that follow "make" in plain sentences.
    assert {pair for pair in wrong if pair[1] not in {"one", "run", "it", "this", "the"}} == set()


def test_every_attempt_on_the_network_is_published_with_how_it_ends() -> None:
    text = (ROOT / "docs/security.md").read_text()
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \| [^|]+ \|$", text, re.M))
    assert {name: rows.get(name) for name in ATTEMPTS} == ATTEMPTS
    assert len(ATTEMPTS) >= 40
