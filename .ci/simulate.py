#!/usr/bin/env python3
"""Simulated studies: how often are the verdict's intervals and words right?

    python .ci/simulate.py 120         # so many studies of each kind; half a second each

Two recipes that do not differ, with two or three seeds each and test images of their own in every study: no row
may be "supported" in more than 5 % of them, whether the confidence of seeds differs little or much, and the
interval of the accuracy's change should cover 0 in 92 to 97 % (from four times as many studies of the accuracy
alone, with all resamples). Then a changed recipe that is better by one point or two: how often does the interval
of the accuracy's change leave out 0?
"""

import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate  # noqa: E402
from test_smoke import recipes_of, simulated_runs, verdict_of  # noqa: E402

LABELS = np.arange(5000) % 100
ACCURACY = "accuracy stays within 1 point"
TRUE = {"errors stay inside superclasses", "small animals do worst"}  # about the baselines; one of them is true here


def studies(count, seeds, apart=0.03, **change):
    """The rows of `count` studies whose changed recipe has a change; apart: see simulated_runs()."""
    for number in range(count):
        rng = np.random.default_rng([number, len(seeds)])
        baselines = simulated_runs(LABELS, seeds, rng, images=number, apart=apart)
        changed = simulated_runs(LABELS, seeds, rng, images=number, apart=apart, **change)
        yield verdict_of(recipes_of(baselines, changed))


def coverage(count, seeds):
    """How many of `count` studies without an effect have an interval of the accuracy's change that covers 0."""
    weights, covered = evaluate.resample(LABELS), 0
    for number in range(count):
        rng = np.random.default_rng([number, len(seeds)])
        recipes = [simulated_runs(LABELS, seeds, rng, images=number) for _ in range(2)]
        arms = evaluate.Recipes(*recipes, weights).mean(lambda run: run.raw.correct)
        low, high = evaluate.interval(evaluate.change(arms).draws)
        covered += low < 0 < high
    return covered


def main(count):
    for seeds in ((1, 2), (1, 2, 3)):
        covered = coverage(4 * count, seeds)
        print(f"{len(seeds)} seeds, no effect: accuracy's interval covers 0 in {covered} of {4 * count}", flush=True)
        for apart in (0.03, 0.15):
            supported = Counter()
            for rows in studies(count, seeds, apart):
                supported.update(text for text, (_, _, word) in rows.items() if word == "supported")
            wrong = [f"{text} {number}" for text, number in supported.most_common() if text not in TRUE | {ACCURACY}]
            print(f"  apart {apart}: supported although false, of {count}: {', '.join(wrong) or 'none'}", flush=True)
        for better in (0.05, 0.1):
            found, figures = 0, []
            for rows in studies(count, seeds, better=better):
                estimate, (low, high), _ = rows[ACCURACY]
                found += low > 0
                figures.append(estimate.figure)
            print(f"  a recipe better by {100 * np.mean(figures):.2f} points is seen in {found} of {count}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
