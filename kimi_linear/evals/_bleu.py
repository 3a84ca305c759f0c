"""Sentence BLEU with Chen and Cherry's fourth smoothing, as NLTK computes it.

Papineni et al. 2002; Chen and Cherry 2014, "A Systematic Comparison of Smoothing Techniques
for Sentence-Level BLEU", technique 4 with K = 5.
"""

import math
from collections import Counter
from collections.abc import Sequence

ORDER = 4
K = 5


def bleu(reference: Sequence[str], candidate: Sequence[str]) -> float:
    """BLEU of a candidate against one reference, 0.0 .. 1.0."""
    n = len(candidate)
    matches = [_matches(reference, candidate, order) for order in range(1, ORDER + 1)]
    if matches[0] == 0:
        return 0.0
    logs, zeros = [], 0
    for order, match in enumerate(matches, 1):
        total = max(1, n - order + 1)
        if match == 0 and n == 1:  # nothing to smooth with: the order is left out
            continue
        if match == 0:
            zeros += 1
            logs.append(math.log(math.log(n) / (2**zeros * K) / total))
        else:
            logs.append(math.log(match / total))
    brevity = 1.0 if n > len(reference) else math.exp(1 - len(reference) / n)
    return brevity * math.exp(math.fsum(logs) / ORDER)


def _matches(reference: Sequence[str], candidate: Sequence[str], order: int) -> int:
    """n-grams of the candidate that the reference has, each as often as there."""
    return (_grams(reference, order) & _grams(candidate, order)).total()


def _grams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[i:] for i in range(order)), strict=False))
