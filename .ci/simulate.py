#!/usr/bin/env python3
"""Simulated studies: how often are the verdict's intervals and words right?

    python .ci/simulate.py 1000        # so many studies of each of eight kinds: half an hour
    python .ci/simulate.py 1000 2 0.05 0.15   # seeds of each recipe, what is added to the true logit, spread

Two recipes with two or three seeds each, 2,000 test images of their own in every study; without an effect and with
one of about a point of accuracy; seeds that differ little (the scale of their logits by 3 %) and much (15 %). An
interval should cover the true change, which is the mean of the figures over all studies, in 93 to 99 %; without an
effect no row should be "supported" in more than 5 %.
"""

import itertools
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from test_smoke import COMPARED, simulated_runs, verdict_of  # noqa: E402

LABELS = np.arange(2000) % 100


def studies(count, seeds, better, apart):
    """Print coverage and words of `count` studies."""
    rows, words = defaultdict(list), Counter()
    for number in range(count):
        rng = np.random.default_rng([number, seeds, round(1000 * better), round(1000 * apart)])
        options = {"images": number, "apart": apart, "sharper": 1.5}
        arms = [simulated_runs(LABELS, range(seeds), rng, **options, better=extra) for extra in (0, better)]
        for (text, _), row in verdict_of(*arms).items():
            if text in COMPARED and row["ci95"]:
                rows[text].append((row["figure"], *row["ci95"]))
                words[text] += row["word"] == "supported"
    print(f"{seeds} v {seeds} seeds, better by {better}, seeds apart by {apart}:", flush=True)
    for text, found in rows.items():
        figure, low, high = np.array(found).T
        truth = figure.mean() if better else 0
        covered = 100 * ((low <= truth) & (truth <= high)).mean()
        wide = 100 * (high - low).mean() / 2
        print(f"  {text:<34} change {100 * truth:+6.2f}, +-{wide:5.2f}, covered {covered:5.1f} %, "
              f"supported {100 * words[text] / len(found):5.1f} % of {len(found)}", flush=True)  # fmt: skip


if __name__ == "__main__":
    count, *kind = map(float, sys.argv[1:] or ["100"])
    kinds = [(int(kind[0]), *kind[1:])] if kind else itertools.product((2, 3), (0.0, 0.06), (0.03, 0.15))
    for seeds, better, apart in kinds:
        studies(int(count), seeds, better, apart)
