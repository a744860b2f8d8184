"""What mkdocs needs in addition to the pages (mkdocs.yml): the pages at the top level of the repository, and
links that lead out of docs/.
"""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
TOP = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that stand at the top level."""
    for source, name in TOP.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=relinked(text, "")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Mend the links of the pages in docs/."""
    return markdown if page.file.src_uri in TOP.values() else relinked(markdown, "docs")


def relinked(markdown: str, folder: str) -> str:
    """The page that stands in `folder` of the repository ("": at the top level) with links as the site has
    them: from docs/, and the text alone of those to files that are not in the site. Code is left as it is."""
    parts = CODE.split(markdown)
    parts[::2] = [LINK.sub(lambda found: _link(found, folder), text) for text in parts[::2]]
    return "".join(parts)


def _link(found: re.Match[str], folder: str) -> str:
    image, text, target = found.groups()
    text = LINK.sub(lambda inner: _link(inner, folder), text)
    path, hash_mark, anchor = target.partition("#")
    if not path or "://" in target:
        return f"{image}[{text}]({target})"
    place = posixpath.normpath(posixpath.join(folder, path))
    if place in TOP:
        return f"{image}[{text}]({TOP[place]}{hash_mark}{anchor})"
    if place.startswith("docs/"):
        return f"{image}[{text}]({os.path.relpath(place, 'docs')}{hash_mark}{anchor})"
    return text
