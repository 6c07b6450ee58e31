"""BLEU, ROUGE-L and CIDEr-D of free answers, as the captioning toolkit computes them (version matched: pycocoevalcap
1.2).

Texts are first cut into tokens (:func:`tokens`), as its Penn Treebank tokeniser does for plain sentences: lower case,
punctuation dropped, clitics ("it's", "don't") apart. Every function takes n candidates [n] and their references
[n][>= 1], as token lists, and returns the figure of the set and that of each item [n]. METEOR is not here: papers
report the METEOR 1.5 program, which needs Java (:func:`meteor_1_5` calls pycocoevalcap where it is installed).
"""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from navsim_ext.errors import DataError, MissingError

Tokens = list[str]
BLEU_ORDERS = 4
ROUGE_BETA = 1.2
CIDER_SIGMA = 6.0
CIDER_SCALE = 10.0
_TINY, _SMALL = 1e-15, 1e-9
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|ll|re|ve))\b")
_TOKEN = re.compile(r"n't|'(?:s|m|d|ll|re|ve)\b|\d+(?:[.,:/]\d+)*%?|\w+(?:[-.&/]\w+)*|[$%&+=/*]", re.UNICODE)


@dataclass(frozen=True)
class LanguageScore:
    """Figure of the whole set, and of each item [n]."""

    mean: float
    each: NDArray[np.float64]


def tokens(text: str) -> Tokens:
    """Lower-case tokens without punctuation: ``"It's 12 m, stop."`` -> ``it 's 12 m stop``."""
    return _TOKEN.findall(_CLITIC.sub(r" \1", text.lower()))


def bleu(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> dict[int, LanguageScore]:
    """BLEU-1 to BLEU-4: geometric mean of clipped n-gram precisions with a brevity penalty.

    BLEU_N = min(1, exp(1 - r / c)) * (prod_{n <= N} p_n)^(1 / N); r is the closest reference length. The set's
    figure sums counts over all items before dividing. p_n = (matches + 1e-15) / (n-grams + 1e-9), which keeps items
    without a match finite; the item's figure of BLEU-4 is therefore tiny, not 0, where no 4-gram matches.
    """
    _check(candidates, references)
    matches, totals = np.zeros((len(candidates), BLEU_ORDERS)), np.zeros((len(candidates), BLEU_ORDERS))
    lengths, closest = np.zeros(len(candidates)), np.zeros(len(candidates))
    for item, (candidate, known) in enumerate(zip(candidates, references, strict=True)):
        lengths[item] = len(candidate)
        closest[item] = min((abs(len(one) - len(candidate)), len(one)) for one in known)[1]
        for order in range(1, BLEU_ORDERS + 1):
            counts = _ngrams(candidate, order)
            most: Counter[tuple[str, ...]] = Counter()
            for one in known:
                most |= _ngrams(one, order)
            matches[item, order - 1] = sum((counts & most).values())
            totals[item, order - 1] = max(len(candidate) - order + 1, 0)
    each = _bleu(matches, totals, lengths, closest)
    whole = _bleu(matches.sum(0)[None], totals.sum(0)[None], lengths.sum()[None], closest.sum()[None])[0]
    return {order: LanguageScore(float(whole[order - 1]), each[:, order - 1]) for order in range(1, BLEU_ORDERS + 1)}


def _bleu(matches: NDArray, totals: NDArray, lengths: NDArray, closest: NDArray) -> NDArray[np.float64]:
    precision = (matches + _TINY) / (totals + _SMALL)
    mean = np.cumprod(precision, axis=1) ** (1.0 / np.arange(1, BLEU_ORDERS + 1))
    ratio = (lengths + _TINY) / (closest + _SMALL)
    return mean * np.where(ratio < 1, np.exp(1.0 - 1.0 / np.minimum(ratio, 1.0)), 1.0)[:, None]


def rouge_l(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> LanguageScore:
    """ROUGE-L: F of the longest common subsequence, (1 + b^2) P R / (R + b^2 P) with b = 1.2.

    P and R are each the best over the references, as in the toolkit.
    """
    _check(candidates, references)
    each = np.zeros(len(candidates))
    for item, (candidate, known) in enumerate(zip(candidates, references, strict=True)):
        common = [_common_length(candidate, one) for one in known]
        precision = max(common) / len(candidate) if candidate else 0.0
        recall = max(length / len(one) if one else 0.0 for length, one in zip(common, known, strict=True))
        if precision and recall:
            each[item] = (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)
    return LanguageScore(float(each.mean()), each)


def _common_length(one: Tokens, other: Tokens) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for token in one:
        diagonal = 0
        for place, theirs in enumerate(other, start=1):
            above = row[place]
            row[place] = diagonal + 1 if token == theirs else max(above, row[place - 1])
            diagonal = above
    return row[-1]


def cider(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> LanguageScore:
    """CIDEr-D (Vedantam et al. 2015): cosine of tf-idf vectors of n-grams, n = 1 ... 4, times 10.

    g(w) = tf(w) (ln n - ln max(1, df(w))) with df the number of items whose references hold w; candidate weights are
    clipped to the reference's; a Gaussian of the difference in length (in bigrams, as the toolkit counts it), sigma 6,
    punishes repetition. Document frequencies come from this set's references: the figure depends on the set.
    """
    _check(candidates, references)
    known_grams: Counter[tuple[str, ...]] = Counter()
    for known in references:
        known_grams.update({gram for one in known for order in range(1, 5) for gram in _ngrams(one, order)})
    log_items = math.log(len(candidates))
    each = np.zeros(len(candidates))
    for item, (candidate, known) in enumerate(zip(candidates, references, strict=True)):
        mine = _weights(candidate, known_grams, log_items)
        similarities = []
        for one in known:
            theirs = _weights(one, known_grams, log_items)
            difference = max(len(candidate) - 1, 0) - max(len(one) - 1, 0)
            decay = math.exp(-(difference**2) / (2 * CIDER_SIGMA**2))
            similarities.append(np.mean([_clipped_cosine(a, b) for a, b in zip(mine, theirs, strict=True)]) * decay)
        each[item] = CIDER_SCALE * np.mean(similarities)
    return LanguageScore(float(each.mean()), each)


def _weights(text: Tokens, known: Counter[tuple[str, ...]], log_items: float) -> list[dict[tuple[str, ...], float]]:
    """tf-idf weights of the n-grams of a text, for n = 1 ... 4."""
    return [
        {gram: count * (log_items - math.log(max(1, known[gram]))) for gram, count in _ngrams(text, order).items()}
        for order in range(1, 5)
    ]


def _clipped_cosine(mine: dict[tuple[str, ...], float], theirs: dict[tuple[str, ...], float]) -> float:
    norms = math.sqrt(sum(w * w for w in mine.values())) * math.sqrt(sum(w * w for w in theirs.values()))
    product = sum(min(weight, theirs[gram]) * theirs[gram] for gram, weight in mine.items() if gram in theirs)
    return product / norms if norms else product


def meteor_1_5(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> LanguageScore:
    """METEOR 1.5 through pycocoevalcap's program; raises MissingError where the package or a Java runtime is absent."""
    try:
        from pycocoevalcap.meteor.meteor import Meteor
    except ModuleNotFoundError as error:
        raise MissingError("METEOR 1.5 needs the package pycocoevalcap: pip install 'trivium[language]'") from error
    if shutil.which("java") is None:
        raise MissingError("METEOR 1.5 needs a Java runtime: there is no `java` on the PATH")
    _check(candidates, references)
    known = {item: [" ".join(tokens(text)) for text in texts] for item, texts in enumerate(references)}
    asked = {item: [" ".join(tokens(text))] for item, text in enumerate(candidates)}
    mean, each = Meteor().compute_score(known, asked)
    return LanguageScore(float(mean), np.asarray(each, np.float64))


def _ngrams(text: Tokens, order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(text[start : start + order]) for start in range(len(text) - order + 1))


def _check(candidates: Sequence[object], references: Sequence[Sequence[object]]) -> None:
    if not candidates or len(candidates) != len(references):
        raise DataError(f"{len(candidates)} candidates and {len(references)} lists of references: one list each needed")
    without = [item for item, known in enumerate(references) if not known]
    if without:
        raise DataError(f"items {without[:5]} have no reference")
