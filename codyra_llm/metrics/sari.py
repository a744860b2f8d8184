"""SARI (Xu et al., 2016, ACL Anthology Q16-1029) in the variant of tensor2tensor, Hugging Face and so
TRACE.

Each different word becomes a number of two bytes, so that a text is a short array and a pair of words one
number. A source has ten times as many n-grams as a prediction, and nearly all of them occur once there and in
no other text. Those are all rightly deleted, so only their number is needed."""

import operator
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence, Set
from functools import cache, reduce
from itertools import chain, count, repeat
from typing import NamedTuple

Gram = Hashable  # a word, a pair, or two pairs that overlap or follow each other

EXACT = {0.0, 0.25, 0.5, 0.75, 1.0}  # shares whose sums are exact in floating point

MOST = 1 << 16  # different words that two bytes can number
LONG = 20_000  # letters of all texts of a call, above which they may have too many different words

# Limits of what is kept from call to call. A text without white space is kept with its numbers, so that it is
# tokenised once, if it has at most KEPT_LETTERS letters.
KEPT_PARTS = 1 << 16  # such texts
KEPT_LETTERS = 64
ALL_LETTERS = 1 << 22  # letters of all words that have a number


def sari(source: str, prediction: str, references: Sequence[str]) -> float:
    """SARI of one prediction, 0..100, against one or more references."""
    given, found, *wanted = _texts([source, prediction, *references])
    total, all_single = 0.0, False
    for n in range(1, 5):
        of_length = _of_length(given, found, wanted, n, all_single)
        total += of_length.score()
        all_single = all_single or (n > 1 and not of_length.may_be_longer())
    return 100.0 * total / 4


class _Text(NamedTuple):
    """Words and pairs of neighbours, in order: as numbers, or as they are."""

    words: Sequence[Hashable]
    pairs: Sequence[Hashable]

    def grams(self, n: int) -> Sequence[Gram]:
        if n <= 2:
            return self.words if n == 1 else self.pairs
        return list(zip(self.pairs, self.pairs[n - 2 :], strict=False))


class _Numbers(dict[str, bytes]):
    """Maps a text without white space to the numbers of its words, the tokens of the 13a tokenisation. That
    can be done piece by piece: the rules of 13a look at two neighbouring characters at most, and white space
    is to them like any character that is neither a digit nor a mark."""

    def __init__(self):
        self.of_word: dict[str, bytes] = {}
        self.unused = count()
        self.letters = 0

    def __missing__(self, part: str) -> bytes:
        numbers = b"".join([self.number(word) for word in _tokens(part)])
        if len(part) <= KEPT_LETTERS:
            self[part] = numbers
        return numbers

    def number(self, word: str) -> bytes:
        found = self.of_word.get(word)
        if found is None:  # another thread's number stands
            found = self.of_word.setdefault(word, next(self.unused).to_bytes(2, "little"))
            self.letters += len(word)
        return found

    def has_room(self) -> bool:
        """Whether there are numbers for all words of another call."""
        return len(self.of_word) < MOST - LONG and len(self) < KEPT_PARTS and self.letters < ALL_LETTERS


_numbers = _Numbers()


def _texts(texts: list[str]) -> list[_Text]:
    """The texts with equal numbers for equal words."""
    global _numbers
    if sum(map(len, texts)) > LONG:
        listed = [_words(text) for text in texts]
        return [_Text(words, list(zip(words, words[1:], strict=False))) for words in listed]
    if not _numbers.has_room():
        _numbers = _Numbers()
    numbers = _numbers  # another thread may begin anew
    found = [b"".join(map(numbers.__getitem__, _parts(text))) for text in texts]
    return [_numbered(data or numbers.number("")) for data in found]  # an empty word, as published


def _numbered(data: bytes) -> _Text:
    """The text of words of two bytes each."""
    words = memoryview(data).cast("H").tolist()
    pairs: list[Hashable] = [0] * (len(words) - 1)
    for first in (0, 1):  # four bytes are a pair, which begins at an even place or at an odd one
        size = (len(words) - first) // 2 * 4
        pairs[first::2] = memoryview(data)[2 * first : 2 * first + size].cast("I").tolist()
    return _Text(words, pairs)


@cache
def _tokenizer():
    from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp  # slow to import, and of use to SARI alone

    return TokenizerRegexp()


# What 13a writes out before it looks at marks, in this order.
ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))


def _parts(text: str) -> list[str]:
    """The text at white space, without what 13a takes out: skipped text and hyphenation."""
    if "<" in text or "-\n" in text:
        text = text.lower().replace("<skipped>", "").replace("-\n", "")
    return text.split()


def _tokens(part: str) -> list[str]:
    """The words of a text without white space, in lower case; no rule looks further than such a text."""
    part = part.lower()
    if part.isalnum():  # no rule looks at letters and digits alone
        return [part]
    for mark, plain in ENTITIES:
        part = part.replace(mark, plain)
    # Without the tokenizer's own cache, which keeps 65,536 texts of any length.
    return type(_tokenizer()).__call__.__wrapped__(_tokenizer(), f" {part} ").split(" ")


def _words(text: str) -> list[str]:
    words: list[str] = []
    for part in _parts(text):
        words += _tokens(part)
    return words or [""]


class _OfLength(NamedTuple):
    """The n-grams of one length. Those that the source shares with another text are counted in every text; of
    the rest, only how many there are."""

    grams: Sequence[Gram]  # the source's; empty where they can't matter
    distinct: int  # of the source's
    shared: Set[Gram]
    given: Mapping[Gram, int]  # the source's counts, in the order of the text; all of them for n = 1
    found: Mapping[Gram, int]  # the prediction's counts
    wanted: Mapping[Gram, int]  # the references' counts
    added: Set[Gram]  # the prediction's that are not in the source
    to_add: Set[Gram]  # the references'
    times: int  # references, by which counts are multiplied

    def may_be_longer(self) -> bool:
        """Whether an n-gram of the source that is longer by one word may occur twice there, or in another
        text. Both the n-grams that it begins and ends with would have to as well."""
        if self.distinct == len(self.grams) and not self.shared:
            return False
        common = set(self.shared)  # those that occur twice, or in another text
        if self.distinct < len(self.grams):
            seen = set()
            for gram in self.grams:
                if gram in seen:
                    common.add(gram)
                else:
                    seen.add(gram)
        # A byte per n-gram, 1 for the common ones: are two of them neighbours?
        return b"\1\1" in bytes(map(common.__contains__, self.grams))

    def score(self) -> float:
        """(F1 of kept + precision of deleted + F1 of added) / 3."""
        hits = len(self.added & self.to_add)
        added = _f1(_ratio(hits, len(self.added)), _ratio(hits, len(self.to_add)))
        if not self.shared:  # nothing was or should be kept, so all deletions are right
            return (1.0 + 1.0 + added) / 3
        return (self._kept() + self._deleted() + added) / 3

    def _kept(self) -> float:
        """F1 of the kept n-grams."""
        rightly = to_keep = 0
        shares: dict[Gram, float] = {}
        for gram in self.shared:
            given, wanted = self.given[gram] * self.times, self.wanted.get(gram, 0)
            to_keep += min(given, wanted)
            if gram in self.found:
                kept = min(given, self.found[gram] * self.times)
                right = min(kept, wanted)
                rightly += right
                shares[gram] = right / kept
        in_order = map(shares.__getitem__, filter(shares.__contains__, self.given))
        precision = _ratio(reduce(operator.add, in_order, 0.0), len(shares))
        return _f1(precision, _ratio(rightly, to_keep))

    def _deleted(self) -> float:
        """Precision of the deleted n-grams."""
        shares: dict[Gram, float] = {}  # for all that are missing here it is 1
        whole = self.distinct
        for gram in self.shared:
            deleted, wanted = self.given[gram] - self.found.get(gram, 0), self.wanted.get(gram, 0)
            if deleted <= 0:
                shares[gram] = 0.0
                whole -= 1
            elif wanted:
                shares[gram] = max(deleted * self.times - wanted, 0) / (deleted * self.times)
        return _ratio(self._sum(shares), whole)

    def _sum(self, shares: dict[Gram, float]) -> float:
        """The sum of `shares`, plus 1 for every other n-gram of the source."""
        if EXACT.issuperset(shares.values()):  # then no sum is rounded
            return self.distinct - len(shares) + sum(shares.values())
        # In the order of the text, in which the published sum is rounded.
        order = self.given if len(self.given) == self.distinct else dict.fromkeys(self.grams)
        return reduce(operator.add, map(shares.get, order, repeat(1.0)), 0.0)


def _of_length(given: _Text, found: _Text, wanted: list[_Text], n: int, all_single: bool) -> _OfLength:
    """The n-grams of source, prediction and references. `all_single`: each of the source's is known to occur
    once there and in no other text."""
    of_prediction, of_references = found.grams(n), [text.grams(n) for text in wanted]
    predicted, required = set(of_prediction), set().union(*of_references)
    if all_single:
        distinct = max(len(given.words) - n + 1, 0)
        return _OfLength((), distinct, set(), {}, {}, {}, predicted, required, len(wanted))
    grams = given.grams(n)
    counts = Counter(grams) if n == 1 else {}  # most words are repeated, few pairs are
    source = counts.keys() if n == 1 else set(grams)
    shared = source & (predicted | required)
    return _OfLength(
        grams=grams,
        distinct=len(source),
        shared=shared,
        given=counts or _counts([grams], shared),
        found=_counts([of_prediction], shared),
        wanted=_counts(of_references, shared),
        added=predicted - shared,
        to_add=required - shared,
        times=len(wanted),
    )


def _counts(texts: list[Sequence[Gram]], shared: Set[Gram]) -> Mapping[Gram, int]:
    """How often each of `shared` is in all of them."""
    return Counter(filter(shared.__contains__, chain(*texts))) if shared else {}


def _ratio(part: float, whole: int) -> float:
    return part / whole if whole else 1.0  # 0/0 = 1: nothing to do, and nothing done wrongly


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
