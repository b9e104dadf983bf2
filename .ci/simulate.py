#!/usr/bin/env python3
"""Simulated studies: how often are the verdict's intervals and words right?

    python .ci/simulate.py 200         # so many studies of each kind; half a second each

Two recipes that do not differ, with two or three seeds each and test images of their own in every study: the
interval of the accuracy's change should cover 0 in 92 to 97 % of them, and no row may be "supported" in more
than 5 %. Then a changed recipe that is better by about a point, or half: how often does the interval of the
accuracy's change leave out 0?
"""

import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from test_smoke import simulated_runs, study_of, verdict_of  # noqa: E402

LABELS = np.arange(5000) % 100
ACCURACY = "accuracy stays within 1 point"
TRUE = {"errors stay inside superclasses", "small animals do worst"}  # about the baselines; one of them is true here


def studies(count, seeds, **change):
    """The rows of `count` studies whose changed recipe has a change."""
    for number in range(count):
        rng = np.random.default_rng([number, len(seeds)])
        baselines = simulated_runs(LABELS, seeds, rng, images=number)
        changed = simulated_runs(LABELS, seeds, rng, images=number, **change)
        yield verdict_of(study_of(baselines, changed))


def main(count):
    for seeds in ((1, 2), (1, 2, 3)):
        supported, covered = Counter(), 0
        for rows in studies(count, seeds):
            low, high = rows[ACCURACY][1]
            covered += low < 0 < high
            supported.update(text for text, (_, _, word) in rows.items() if word == "supported" and text not in TRUE)
        del supported[ACCURACY]  # here it is true
        print(f"{len(seeds)} seeds, no effect, {count} studies: accuracy's interval covers 0 in {covered}")
        print("  supported although false: " + (", ".join(f"{t} {n}" for t, n in supported.most_common()) or "none"))
        for better in (0.05, 0.1):
            found, figures = 0, []
            for rows in studies(count, seeds, better=better):
                estimate, (low, high), _ = rows[ACCURACY]
                found += low > 0
                figures.append(estimate.figure)
            print(f"  a recipe better by {100 * np.mean(figures):.2f} points is seen in {found} of {count}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
