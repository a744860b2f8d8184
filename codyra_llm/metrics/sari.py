"""SARI (Xu et al., 2016, ACL Anthology Q16-1029) in the variant of tensor2tensor, Hugging Face and so
TRACE.

A source has ten times as many n-grams as a prediction, and nearly all of them are there once and nowhere
else. Such a one is deleted, rightly, and is only counted: none is built. For an n-gram that is repeated, or
that is in another text too, so are the two (n-1)-grams within it, and so they are found among few places.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence, Set
from functools import cache, reduce
from itertools import compress
from operator import add
from typing import NamedTuple

Gram = str | tuple[str, ...]  # a word, or several

EXACT = {0.0, 0.25, 0.5, 0.75, 1.0}

KEPT_WORDS = 1 << 16  # as many different words, of at most so many letters, are tokenised once
KEPT_LETTERS = 64


def sari(source: str, prediction: str, references: Sequence[str]) -> float:
    """SARI of one prediction, 0..100, against one or more references."""
    given, *others = [_words(text) for text in (source, prediction, *references)]
    places = list(range(len(given)))
    total = 0.0
    for n in range(1, 5):
        found, *of_references = [Counter(_grams(words, n)) for words in others]
        wanted = of_references[0] if len(of_references) == 1 else sum(of_references, Counter())
        known = _known(given, n, places, found.keys() | wanted.keys())
        total += _of_length(known, found, wanted, len(references))
        places = [at for at, after in zip(known.places, known.places[1:], strict=False) if after == at + 1]
    return 100.0 * total / 4


class _Words(dict[str, list[str]]):
    """By a text without white space its tokens: those of the 13a tokenisation, whose rules look at two
    neighbouring characters and see white space as any other that is neither a digit nor a mark."""

    def __missing__(self, text: str) -> list[str]:
        tokens = _tokenize(text)
        if len(text) <= KEPT_LETTERS:
            if len(self) >= KEPT_WORDS:
                self.clear()
            self[text] = tokens
        return tokens


_KNOWN = _Words()


@cache
def _tokenizer():
    from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp  # slow to import, and of use to SARI alone

    return TokenizerRegexp()


def _tokenize(text: str) -> list[str]:
    # Without the tokenizer's own cache, which keeps 65,536 texts of any length.
    return type(_tokenizer()).__call__.__wrapped__(_tokenizer(), f" {text} ").split(" ")


# What 13a changes before it looks at marks, in this order: skipped text, hyphenation, four entities.
_WRITTEN_OUT = (("<skipped>", ""), ("-\n", ""), ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))


def _words(text: str) -> list[str]:
    text = text.lower()
    for mark, plain in _WRITTEN_OUT:
        text = text.replace(mark, plain)
    words: list[str] = []
    for part in text.split():
        words += _KNOWN[part]
    return words or [""]  # an empty word, as published


def _grams(words: Sequence[str], n: int) -> Iterable[Gram]:
    return words if n == 1 else zip(*(words[i:] for i in range(n)), strict=False)


class _Known(NamedTuple):
    """What is known of the source's n-grams of one length."""

    shared: dict[Gram, int]  # how often those of another text are there, in the order of the source
    grams: list[Gram]  # the shared and the repeated ones in order, each as often as it is there
    places: list[int]  # where they begin
    size: int  # places of all n-grams
    distinct: int


def _known(words: list[str], n: int, places: list[int], elsewhere: Set[Gram]) -> _Known:
    """`places`: where an n-gram can begin that is repeated, or one of those `elsewhere`, in order."""
    size = max(len(words) - n + 1, 0)
    grams: Sequence[Gram] = words
    if n > 1:
        columns = ([words[at + offset] for at in places] for offset in range(n))
        grams = list(zip(*columns, strict=True))
    counts = Counter(grams)
    shared = {gram: count for gram, count in counts.items() if gram in elsewhere}
    wanted = shared.keys() | {gram for gram, count in counts.items() if count > 1}
    kept = [gram in wanted for gram in grams]
    distinct = size - len(grams) + len(counts)
    return _Known(shared, list(compress(grams, kept)), list(compress(places, kept)), size, distinct)


def _of_length(source: _Known, prediction: dict[Gram, int], reference: dict[Gram, int], times: int) -> float:
    """(F1 of kept + precision of deleted + F1 of added) / 3 of n-grams of one length; `times`: the number of
    references, by which counts are multiplied."""
    kept = rightly_kept = to_keep = 0
    kept_shares = 0.0
    deleted_shares: dict[Gram, float] = {}  # 1 for all that are not here
    whole = source.distinct
    for gram, count in source.shared.items():
        given, wanted = prediction.get(gram, 0), reference.get(gram, 0)
        to_keep += min(count * times, wanted)
        if given:
            all_kept = min(count, given) * times
            right = min(all_kept, wanted)
            rightly_kept += right
            kept_shares += right / all_kept
            kept += 1
        if count <= given:
            deleted_shares[gram] = 0.0
            whole -= 1
        elif wanted:
            all_deleted = (count - given) * times
            deleted_shares[gram] = max(all_deleted - wanted, 0) / all_deleted
    keep = _f1(_ratio(kept_shares, kept), _ratio(rightly_kept, to_keep))
    delete = _ratio(_sum(source, deleted_shares), whole)
    return (keep + delete + _added(source.shared, prediction, reference)) / 3


def _sum(source: _Known, shares: dict[Gram, float]) -> float:
    """Of `shares`, and 1 for every other n-gram of the source."""
    if EXACT.issuperset(shares.values()):  # then no sum is rounded
        return source.distinct - len(shares) + sum(shares.values())
    addends = [1.0] * source.size  # in the order of the text, in which the published sum is rounded
    left = dict(shares)
    for place, gram in zip(source.places, source.grams, strict=True):
        addends[place] = left.get(gram, 1.0)
        left[gram] = 0.0  # from its second place on
    return reduce(add, addends, 0.0)


def _added(source: Collection[Gram], prediction: Collection[Gram], reference: Collection[Gram]) -> float:
    """F1 of the n-grams that are not in the source."""
    added = [gram for gram in prediction if gram not in source]
    to_add = sum(gram not in source for gram in reference)
    rightly_added = sum(gram in reference for gram in added)
    return _f1(_ratio(rightly_added, len(added)), _ratio(rightly_added, to_add))


def _ratio(part: float, whole: int) -> float:
    return part / whole if whole else 1.0  # 0/0 = 1: nothing to do, and nothing done wrongly


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
