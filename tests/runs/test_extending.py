"""The methods of docs/extending.md besides its first: each is seqlora where its own part is switched off."""

import re

import pytest
import torch
from commands import BLOCK, ROOT, plugin
from helpers import learnt

PAGE = ROOT / "docs" / "extending.md"
pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="not a checkout")


@pytest.fixture(scope="module")
def last_update(tiny_llama, toy_stream, tmp_path_factory):
    """Function from a method's section to the run of two tasks, with the plug-in of the page loaded."""
    place = tmp_path_factory.mktemp("extending")
    texts = [found[2] for found in BLOCK.finditer(PAGE.read_text(encoding="utf-8"))]
    (place / "kinds.py").write_text(next(text for text in texts if re.match("# kinds.py\n", text)))

    def run(name, **settings):
        out = place / "_".join([name, *map(str, settings.values())])
        return learnt(tiny_llama, toy_stream, out, {"name": name, "rank": 2, **settings}, epochs=1)

    with plugin(place / "kinds.py"):
        yield lambda name, **settings: run(name, **settings).archive().load(1)


def same(one, other):
    return one.scale == other.scale and all(
        torch.equal(adapter.a, other.adapters[site].a) and torch.equal(adapter.b, other.adapters[site].b)
        for site, adapter in one.adapters.items()
    )


@pytest.mark.parametrize(
    "name, off, on", [("calm", {"weight": 0}, {"weight": 1}), ("first", {"kept": 0}, {})]
)
def test_without_its_own_part_it_is_seqlora(name, off, on, last_update):
    plain = last_update("seqlora")
    assert same(last_update(name, **off), plain) and not same(last_update(name, **on), plain)


def test_the_second_task_changes_half_as_much(last_update):
    plain, fading = last_update("seqlora", fresh=True), last_update("fading")
    assert fading.scale == plain.scale / 2 and fading.mode == plain.mode == "add"
