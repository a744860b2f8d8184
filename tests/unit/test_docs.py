"""README.md and docs/*.md: commands run or parse, recipes are valid, links lead somewhere, generated parts
are current.
"""

import re

import pytest
import reference
from commands import BLOCK, PAGES, PROGRAMS, ROOT

from codyra_llm.config.recipe import Recipe
from codyra_llm.config.registry import METHODS

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not a checkout")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = BLOCK.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            found = (page.parent / path).resolve() if path else page
            assert found.exists(), target
            titles = re.findall(r"^#+ (.*)", found.read_text(), re.M) if anchor else []
            assert not anchor or anchor in map(slug, titles), target
    for path in re.findall(r"(?:docs|tests|recipes|benchmarks|codyra_llm)/[\w./-]*\w", page.read_text()):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("benchmarks/**/README.md")], ids=str)
def test_no_section_is_there_twice(page):
    titles = re.findall(r"^##? .*", BLOCK.sub("", page.read_text()), re.M)
    assert len(titles) == len(set(titles))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_in_the_text_exist(page):
    known = {key.name for key in reference.keys(Recipe)}
    known |= {key.name for method in METHODS.values() for key in reference.own_keys(method)}
    known |= {name[: dot.start()] for name in known for dot in re.finditer(r"\.", name)}  # sections
    known.add("output.lr")  # which bad_input.md shows refused
    named = re.findall(rf"`((?:{'|'.join(Recipe.model_fields)})\.[a-z_.]+)", page.read_text())
    assert [
        name
        for name in named
        if name.strip(".") not in known and not name.endswith((".py", ".json", ".jsonl", ".safetensors"))
    ] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_setting_is_in_a_fenced_block(page):
    """Indented blocks are code too, and no other test sees them."""
    words = "|".join([*map(re.escape, PROGRAMS), *(f"{name}:" for name in Recipe.model_fields)])
    assert re.findall(rf"^    (?:{words}).*", BLOCK.sub("", page.read_text()), re.M) == []


def slug(title):
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def test_generated_parts_are_current():
    """`python docs/reference.py` writes them."""
    used = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text == reference.renewed(text), page.name
        used |= {found[2] for found in reference.PART.finditer(text)}
    assert used == reference.PARTS.keys()


def test_every_key_and_every_method_is_described():
    shown = (ROOT / "docs/recipes.md").read_text()
    for key in [*reference.keys(Recipe), *(key for m in METHODS.values() for key in reference.own_keys(m))]:
        assert key.name == "method.name" or (key.meaning and f"`{key.name}`" in shown), key.name
    for method in METHODS.values():
        assert not method.trains or "Cost" in method.__doc__, method.name
        assert method.name == "none" or re.search(r"\d{4}\.\d{5}|code", method.__doc__), (
            f"{method.name} names no source"
        )


def test_the_index_lists_every_page():
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in readme] == []
