"""The README and the pages of docs/: every link leads somewhere, and every file they name exists."""

import re

import pytest
from places import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "runtime|storage|sharding|loaders|model|train|eval|launch|tests|benchmarks|configs|deepspeed_configs"


def anchors(page) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.is_file(), target
            assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_exist(page) -> None:
    named = re.findall(rf"(?<![\w/.])(?:{FOLDERS})/[\w/]+\.(?:py|yaml|json|sh|sbatch|md)\b", page.read_text())
    placeholder = re.compile(r"NAME|DATASET|/X\.")
    assert [name for name in named if not (placeholder.search(name) or (ROOT / name).is_file())] == []
