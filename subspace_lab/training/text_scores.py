"""How near a text is to the one wanted, in [0, 1]: the figures of the text benchmarks, each a mean of these.

* exact_match: the same but for case, punctuation and white space (the T5 benchmarks').
* exact_text: the same but for white space at the ends (TRACE's accuracy).
* first_character: the first characters are the same (TRACE's ScienceQA: a choice, then reasons).
* rouge_l: F1 of the longest common subsequence of words (Lin 2004).
* edit_similarity: 2 M / T, M matching characters of T (Ratcliff & Obershelp), which TRACE takes for code.
* sari: mean F1 of n-grams kept and added and precision of those deleted, n = 1 … 4 (Xu et al. 2016).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from typing import Literal, get_args

Metric = Literal["exact_match", "exact_text", "first_character", "rouge_l", "edit_similarity", "sari"]
METRICS: tuple[Metric, ...] = get_args(Metric)

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LITERAL = re.compile(r"<(?:STR|NUM|CHAR)_LIT(?::(.*?))?>", re.DOTALL)


def score(metric: Metric, answer: str, wanted: str, source: str = "") -> float:
    """Return the score in [0, 1] of one answer.

    Args:
        metric: which.
        answer: the model's.
        wanted: the reference.
        source: what was asked; only sari looks at it.
    """
    if metric == "sari":
        return sari(source, answer, [wanted])
    return _PAIRS[metric](answer, wanted)


def exact_match(answer: str, wanted: str) -> float:
    """Return whether the texts are the same but for case, punctuation and white space."""
    return float(_plain(answer) == _plain(wanted))


def rouge_l(answer: str, wanted: str) -> float:
    """Return the F1 of the longest common subsequence of words."""
    a, b = answer.split(), wanted.split()
    if not a or not b:
        return 0.0
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b))


def edit_similarity(answer: str, wanted: str) -> float:
    """Return 2 M / T of two pieces of code, in which the placeholders of literals stand for the literals."""
    return SequenceMatcher(None, _literals(answer), _literals(wanted)).ratio()


def sari(source: str, answer: str, references: Sequence[str]) -> float:
    """Return SARI of one simplified sentence, a fraction.

    Counts of source and answer are taken once per reference, as the references' are added up.
    """
    words = [text.lower().split() for text in (source, answer, *references)]
    kept = deleted = added = 0.0
    for n in range(1, 5):
        s, a, *rs = ([tuple(w[i : i + n]) for i in range(len(w) - n + 1)] for w in words)
        in_source = Counter({gram: count * len(rs) for gram, count in Counter(s).items()})
        in_answer = Counter({gram: count * len(rs) for gram, count in Counter(a).items()})
        wanted = Counter(gram for r in rs for gram in r)
        keeps, should_keep = in_source & in_answer, in_source & wanted
        good = keeps & wanted
        precision = _mean([good[gram] / keeps[gram] for gram in keeps])
        recall = sum(good.values()) / sum(should_keep.values()) if should_keep else 1.0
        kept += _f1(precision, recall)
        drops = in_source - in_answer
        deleted += _mean([(drops - wanted)[gram] / drops[gram] for gram in drops])
        adds, should_add = set(a) - set(s), set(wanted) - set(s)
        found = len(adds & should_add)
        added += _f1(found / len(adds) if adds else 1.0, found / len(should_add) if should_add else 1.0)
    return (kept + deleted + added) / 12


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _plain(text: str) -> str:
    return " ".join(text.casefold().translate(_PUNCTUATION).split())


def _literals(code: str) -> str:
    code = code.replace("<NUM_LIT>", "0")
    return _LITERAL.sub(lambda match: match[1] or "", code)


_PAIRS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "exact_text": lambda answer, wanted: float(answer.strip() == wanted.strip()),
    "first_character": lambda answer, wanted: float(answer.strip()[:1] == wanted.strip()[:1]),
    "rouge_l": rouge_l,
    "edit_similarity": edit_similarity,
}
