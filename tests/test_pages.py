"""README and docs/: links lead somewhere, files, recipes and settings exist, examples import what there is."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from places import ROOT

from train.config.settings import load_settings

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = (
    "runtime|storage|sharding|preprocessing|loaders|model|train|eval|launch|tests|benchmarks|configs|deepspeed_configs"
)
NAMED_FILE = re.compile(rf"(?<![\w/.])(?:{FOLDERS})/[\w/]+\.(?:py|yaml|json|sh|sbatch|md)\b")
PLACEHOLDER = re.compile(r"NAME|DATASET|/X\.")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def runs(page: Path) -> list[list[str]]:
    """[CONFIG, key=value ...] of the page's commands that name a recipe."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)).replace("\\\n", " ")
    found = []
    for words in (shlex.split(line, comments=True) for line in blocks.splitlines()):
        recipes = [word for word in words if re.fullmatch(r"configs/(?!corpora).*\.yaml", word)]
        if recipes:
            found.append(recipes + [word for word in words if re.match(r"[a-z]\w*(\.\w+)*=", word)])
    return found


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.is_file(), target
            assert not anchor or anchor in anchors(file), target


@each_page
def test_files_named_exist(page: Path) -> None:
    named = [name for name in NAMED_FILE.findall(page.read_text()) if not PLACEHOLDER.search(name)]
    assert [name for name in named if not (ROOT / name).is_file()] == []


@each_page
def test_commands_name_real_recipes_and_settings(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for config, *overrides in runs(page):
        load_settings(config, overrides)


@pytest.mark.parametrize("page", [each for each in PAGES if each.parent.name != "how-to"], ids=lambda page: page.name)
def test_examples_import_what_there_is(page: Path) -> None:  # tests/how_to runs the examples of how-to pages
    for example in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        imports = [node for node in ast.parse(example).body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), page.name, "exec"), {})
