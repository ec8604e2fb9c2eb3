"""What the pages say of themselves: their links lead somewhere, and they name all that there is."""

import re
from pathlib import Path

import pytest
from comfyui_gcfg.command.main import app
from typer.main import get_command

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page):
    """The names by which a page's headings are reached, as the usual viewers of Markdown make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    missing = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert missing == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000


def test_the_index_names_every_page():
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    named = {link for link in LINK.findall(index) if not link.startswith("../")}
    assert {path.name for path in DOCS.glob("*.md")} - {"README.md"} == named


def test_the_reference_names_every_command():
    def walk(command, name):
        if hasattr(command, "commands"):
            return {
                path: text for sub, c in command.commands.items() for path, text in walk(c, f"{name} {sub}").items()
            }
        argument = next(p.metavar or p.name.upper() for p in command.params if p.param_type_name == "argument")
        return {f"`{name} {argument}`": command.help.partition("\n\n")[0]}

    rows = re.findall(r"^\| (`gcfg .*?`) \| (.*) \|$", (DOCS / "command.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert dict(rows) == walk(get_command(app), "gcfg")
