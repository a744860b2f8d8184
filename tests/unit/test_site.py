"""The documentation as a site: every page is in it, and it builds without warnings or network."""

import logging
import re
import socket

import pytest
import yaml
from commands import PAGES
from helpers import ROOT

CONFIG = ROOT / "mkdocs.yml"
pytestmark = pytest.mark.skipif(not CONFIG.is_file(), reason="not a checkout")


def named(nav):
    """The pages of a nav, at any depth."""
    for entry in nav:
        for value in entry.values():
            if isinstance(value, str):
                yield value
            else:
                yield from named(value)


def test_every_page_is_in_the_nav():
    text = re.sub(r"!!python/\S+", "", CONFIG.read_text(encoding="utf-8"))
    names = list(named(yaml.safe_load(text)["nav"]))
    assert len(names) == len(set(names))
    at_top = {"index.md", "contributing.md", "changelog.md"}  # docs/mkdocs_hooks.py makes them
    assert set(names) == at_top | {page.name for page in PAGES if page.parent.name == "docs"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site's folder; no connection can be made while it is built."""
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install -e '.[docs]'")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    def refused(*_):
        raise AssertionError("the site was built with the network's help")

    folder = tmp_path_factory.mktemp("site")
    level = logging.getLogger("mkdocs").level
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refused)
        config = load_config(str(CONFIG), site_dir=str(folder), strict=True)
        build(config)  # raises Abort where anything was warned of
    logging.getLogger("mkdocs").setLevel(level)
    return folder


def test_it_builds_without_a_warning(site):
    for page in PAGES:
        name = "index" if page.name == "README.md" else page.stem
        assert (site / f"{name}.html").is_file(), name


def test_no_page_loads_anything_from_elsewhere(site):
    for page in site.glob("*.html"):
        loaded = re.findall(
            r"<(?:script|link|img)[^>]* (?:src|href)=\"?(https?://[^\s\">]+)", page.read_text()
        )
        assert loaded == [], page.name


def test_lists_and_tables_are_seen_as_such(site):
    """Python-Markdown wants a blank line before them where GitHub does not."""
    for page in site.glob("*.html"):
        article = page.read_text(encoding="utf-8").partition("<article")[2].partition("</article>")[0]
        text = re.sub(r"<pre.*?</pre>|<code.*?</code>", "", article, flags=re.DOTALL)
        assert re.findall(r"^(?:- |1\. |\|).*", re.sub(r"<[^>]*>", "", text), re.MULTILINE) == [], page.name


def test_links_out_of_the_pages_become_text(site):
    text = (site / "codyra.html").read_text(encoding="utf-8")
    assert "benchmarks/trace/results" in text and "href=../benchmarks" not in text
    assert 'href="own_data.html"' in (site / "index.html").read_text(encoding="utf-8")
