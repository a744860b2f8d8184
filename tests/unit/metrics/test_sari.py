"""SARI on any text against its definition, and its words against those of sacrebleu."""

import random
from collections import Counter
from functools import reduce
from operator import add

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codyra_llm.metrics.sari import _words, sari


def plain_sari(source: list[str], prediction: list[str], references: list[list[str]]) -> float:
    """The definition on words, every n-gram built and counted, sums in the order of the source."""
    total, times = 0.0, len(references)
    for n in range(1, 5):
        given, found = (grams(words, n) for words in (source, prediction))
        wanted = sum((grams(words, n) for words in references), Counter())
        kept = {gram: min(count, found[gram]) * times for gram, count in given.items() if found[gram]}
        gone = {gram: (count - found[gram]) * times for gram, count in given.items() if count > found[gram]}
        right = [min(count, wanted[gram]) / count for gram, count in kept.items()]
        rightly_kept = sum(min(count, wanted[gram]) for gram, count in kept.items())
        to_keep = sum(min(count * times, wanted[gram]) for gram, count in given.items())
        keep = harmonic(share(reduce(add, right, 0.0), len(kept)), share(rightly_kept, to_keep))
        shares = [max(count - wanted[gram], 0) / count for gram, count in gone.items()]
        added, to_add = found.keys() - given.keys(), wanted.keys() - given.keys()
        hits = len(added & to_add)
        total += (
            keep
            + share(reduce(add, shares, 0.0), len(gone))
            + harmonic(share(hits, len(added)), share(hits, len(to_add)))
        ) / 3
    return 100.0 * total / 4


def grams(words: list[str], n: int) -> Counter:
    return Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1))


def share(part: float, whole: int) -> float:
    return part / whole if whole else 1.0


def harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0


FEW_WORDS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=40)  # so that most n-grams are repeated


@given(FEW_WORDS, FEW_WORDS, st.lists(FEW_WORDS, min_size=1, max_size=3))
def test_sari_is_its_definition_to_the_last_digit(source, prediction, references):
    texts = [" ".join(words) for words in references]
    assert sari(" ".join(source), " ".join(prediction), texts) == plain_sari(source, prediction, references)


@pytest.mark.parametrize("limits", [{"LONG": 0}, {"KEPT_PARTS": 1}, {"KEPT_LETTERS": 0}, {"ALL_LETTERS": 0}])
def test_sari_is_the_same_with_words_as_they_are_and_with_numbers_that_begin_anew(limits, monkeypatch):
    for name, limit in limits.items():
        monkeypatch.setattr(f"codyra_llm.metrics.sari.{name}", limit)
    draw = random.Random(0)
    for _ in range(60):
        words = [[draw.choice("abcdefgh") for _ in range(draw.randrange(1, 40))] for _ in range(4)]
        source, prediction, *references = words
        texts = [" ".join(each) for each in words]
        assert sari(texts[0], texts[1], texts[2:]) == plain_sari(source, prediction, references)


PIECES = [
    "a",
    "B.",
    "Σ",
    "ΑΣ",
    "İ",
    "ß",
    "-",
    "-\n",
    "<skipped>",
    "<SKIPPED>",
    "&QUOT;",
    "&amp;quot;",
    "&lt;",
]
PIECES += ["<", ">", " ", "\n", "\u2028", "1.5", ",6", "数", "😀", "e\u0301", "_", "'s", "skipped>", "\ud800"]


@given(*3 * [st.lists(st.sampled_from(PIECES), max_size=12).map("".join)])
def test_sari_tokenises_each_piece_as_it_would_the_whole_text(source, prediction, reference):
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    words = [Tokenizer13a()(text.lower()).split(" ") for text in (source, prediction, reference)]
    assert sari(source, prediction, [reference]) == plain_sari(*words[:2], words[2:])


MARKS = st.text(alphabet="ab.,-0159&;<> \n\tÄ'\"_/\u00a0\x1c", max_size=40)


@given(MARKS)
def test_words_are_those_of_sacrebleus_13a(text):
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    assert _words(text) == Tokenizer13a()(text.lower()).split(" ")
