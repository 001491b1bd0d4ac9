"""Scores and their intervals.

A score is a pair (got, possible) per item. The value of a metric is sum(got) / sum(possible).
"""

import math
import re
from collections import Counter

import numpy as np


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% score interval of a share (Wilson 1927). n = 0 gives (0, 1)."""
    if n == 0:
        return 0.0, 1.0
    share, spread = successes / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(got, possible, samples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The 95% percentile interval of sum(got) / sum(possible) over items drawn with replacement."""
    got, possible = np.asarray(got, float), np.asarray(possible, float)
    rows = np.random.default_rng(seed).integers(0, len(got), (samples, len(got)))
    totals = possible[rows].sum(1)
    values = np.divide(got[rows].sum(1), totals, out=np.zeros(samples), where=totals > 0)
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def ratio(scores) -> float | None:
    """sum(got) / sum(possible) of score pairs; None when nothing was possible."""
    possible = sum(score[1] for score in scores)
    return sum(score[0] for score in scores) / possible if possible else None


def interval(scores) -> list[float] | None:
    """Wilson's where every item is right or wrong; otherwise the bootstrap over items, which are what is independent.

    All-right and all-wrong items have no spread to draw from, so they take Wilson's too, over the items.
    """
    if not scores or not sum(score[1] for score in scores):
        return None
    got, possible = np.asarray(scores, float).T
    if np.all(possible == 1) and np.all((got == 0) | (got == 1)) or np.all(got == possible) or not got.any():
        return [round(x, 4) for x in wilson(len(got) * float(got.sum() / possible.sum()), len(got))]
    return [round(x, 4) for x in bootstrap(got, possible)]


def row(task: str, split: str, metric: str, scores, *, chance=None, original=None, tokenizer=None) -> dict:
    """A line of the report. `scores`, and each of the other three where it is not a number, are score pairs.
    Items in which nothing was possible do not count."""
    if isinstance(scores, list):
        scores = [score for score in scores if score[1]]

    def number(value):
        value = ratio(value) if isinstance(value, list) else value
        return None if value is None else round(float(value), 4)

    return {
        "task": task, "split": split, "metric": metric, "value": number(scores),
        "interval": interval(scores) if isinstance(scores, list) else None, "chance": number(chance),
        "ceiling_original": number(original), "ceiling_tokenizer": number(tokenizer),
        "n": len(scores) if isinstance(scores, list) else 0,
    }


def overlap(want, given) -> tuple[int, int]:
    """Score of two multisets: what they share, over the larger one, so that more than asked costs."""
    want, given = Counter(want), Counter(given)
    return (want & given).total(), max(want.total(), given.total())


def normal(text: str) -> str:
    """Lower case, punctuation and articles gone, single spaces."""
    words = re.sub(r"[^\w\s']", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def word_score(want: str, given: str) -> tuple[float, int]:
    """(words of `want` less the edits that turn it into `given`, words): together they give 1 - WER.

    Edits are Levenshtein's over words. An item never counts below 0, so that one endless reply cannot hide the rest.
    """
    want, given = normal(want).split(), normal(given).split()
    costs = list(range(len(given) + 1))
    for i, word in enumerate(want, 1):
        before, costs[0] = costs[0], i
        for j, other in enumerate(given, 1):
            before, costs[j] = costs[j], min(costs[j] + 1, costs[j - 1] + 1, before + (word != other))
    return max(0, len(want) - costs[-1]), len(want)


def token_f1(want: str, given: str) -> float:
    """Harmonic mean of precision and recall over words, each counted as often as it comes (SQuAD, Rajpurkar et al.
    2016)."""
    want, given = normal(want).split(), normal(given).split()
    shared = (Counter(want) & Counter(given)).total()
    return 2 * shared / (len(want) + len(given)) if shared else float(want == given)


def rouge_l(want: str, given: str) -> float:
    """The same of the longest common subsequence of words (ROUGE-L with equal weights, Lin 2004)."""
    want, given = normal(want).split(), normal(given).split()
    lengths = [0] * (len(given) + 1)
    for word in want:
        before = 0
        for j, other in enumerate(given, 1):
            before, lengths[j] = lengths[j], before + 1 if word == other else max(lengths[j], lengths[j - 1])
    return 2 * lengths[-1] / (len(want) + len(given)) if lengths[-1] else float(want == given)


def iou(one, other) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1), ends included (integers 0-99)."""
    width = min(one[2], other[2]) - max(one[0], other[0]) + 1
    height = min(one[3], other[3]) - max(one[1], other[1]) + 1
    if width <= 0 or height <= 0:
        return 0.0
    inner = width * height
    area = sum((box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (one, other))
    return inner / (area - inner)


def detection_score(want, given, threshold: float = 0.5) -> tuple[int, int]:
    """Boxes found with the right name and IoU >= threshold, each wanted box once; over the larger count."""
    left, hits = list(want), 0
    for name, box in given:
        best = max((item for item in left if item[0] == name), key=lambda item: iou(item[1], box), default=None)
        if best is not None and iou(best[1], box) >= threshold:
            left.remove(best)
            hits += 1
    return hits, max(len(want), len(given))


def psnr(one, other) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures of one shape; capped at 100 for equal ones."""
    error = np.mean((np.asarray(one, float) - np.asarray(other, float)) ** 2)
    return float(min(100.0, 10 * np.log10(255**2 / max(error, 1e-9))))
