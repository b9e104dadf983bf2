"""Find the mistakes a run is sure of, and what becomes of them in another run.

    python failures.py runs/baseline
    python failures.py runs/baseline --compare runs/smoothing0.1

Reads the logits that evaluate.py saved. Writes failures.csv (one row per test image that is wrong with confidence above
0.90, most confident first) and failures.png into the run directory; gradcam.py reads failures.csv.
"""

import shlex
from pathlib import Path

import numpy as np

import utils
from data import SUPERCLASS_OF, class_names, load_dataset
from utils import ScriptError, log_softmax

SHOWN = 24  # most confident failures in the picture, below the representative ones
COLUMNS = "index,true,predicted,confidence,true_probability,same_superclass,representative".split(",")
OUTCOMES = ("repaired", "same wrong class", "new wrong class")


def find_failures(probs, labels, threshold):
    """Indices of the images that are wrong with confidence above threshold: most confident first, then by index."""
    preds, confidence = probs.argmax(1), probs.max(1)
    wrong = np.flatnonzero((preds != labels) & (confidence > threshold))
    return wrong[np.argsort(-confidence[wrong], kind="stable")]


def representative(failures, preds, labels, count):
    """`count` of the failures, evenly spread from the most to the least confident, at most one per (true, predicted) pair.

    For 3: the most confident, the median, the nearest to the threshold. A rank whose pair of classes is taken gives way to
    the nearest rank that brings a new pair; fewer come back if there are not enough pairs.
    """
    chosen, pairs = [], set()
    for target in np.linspace(0, len(failures) - 1, count) if len(failures) else ():
        for rank in np.argsort(np.abs(np.arange(len(failures)) - target), kind="stable"):
            pair = (labels[failures[rank]], preds[failures[rank]])
            if pair not in pairs:
                pairs.add(pair)
                chosen.append(failures[rank])
                break
    return chosen


def read_run(run_dir):
    """(name of the data set, probs (N, 100) float64, labels (N,) int64) of an evaluated run."""
    logits, labels = utils.load_logits(run_dir, "test")
    return utils.read_config(run_dir)["dataset"], np.exp(log_softmax(logits)), labels


def outcomes(failures, preds, labels, other_preds):
    """What another run makes of each failure: one of OUTCOMES."""
    repaired, same = other_preds[failures] == labels[failures], other_preds[failures] == preds[failures]
    return [OUTCOMES[0 if r else 1 if s else 2] for r, s in zip(repaired, same)]


def draw(path, images, rows, chosen, title):
    """Representative failures in the first row, then the most confident ones; image i of the test set per cell."""
    shown = [row for row in rows if row["index"] in chosen]
    shown += [row for row in rows if row["index"] not in chosen][:SHOWN]
    columns = min(6, max(len(shown), 3))
    first = -(-len(chosen) // columns) * columns  # the others begin on a new row
    cells = list(range(len(chosen))) + list(range(first, first + len(shown) - len(chosen)))
    height = -(-(cells[-1] + 1) // columns)
    figure, grid = utils.new_figure(2.2 * columns, 2.75 * height + 0.8, height, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for cell, row in zip(cells, shown):
        axes = grid.flat[cell]
        axes.imshow(images[row["index"]], interpolation="nearest")
        text = f"image {row['index']}\ntrue: {row['true']}\nsays: {row['predicted']} {100 * row['confidence']:.1f} %"
        if "other_predicted" in row:
            text += f"\nthen: {row['other_predicted']} {100 * row['other_confidence']:.1f} %"
        axes.set_title(text, fontsize=8, color=utils.VERMILION if row["index"] in chosen else "black")
    figure.suptitle(title)
    utils.save_figure(figure, path)


def main(argv=None):
    """Returns the rows of failures.csv as a list of dicts."""
    parser = utils.ArgumentParser(__doc__)
    parser.add_argument("run", metavar="RUN", help="run directory that evaluate.py has been through")
    parser.add_argument("--compare", metavar="DIR", help="another run: what does it say to the same images?")
    parser.add_argument("--threshold", type=float, default=0.9, help="confidence above which a mistake counts")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="how many representative failures to choose")
    utils.add_common_flags(parser)
    args = parser.parse_args(argv)
    if not 0 <= args.threshold < 1:
        parser.error(f"--threshold {args.threshold} must be in [0, 1)")
    if not 1 <= args.top <= 24:
        parser.error(f"--top {args.top} must be in 1..24")
    utils.select_device(args.device)  # nothing runs there; a wrong one is as wrong here as in the other scripts

    run_dir = Path(args.run).expanduser()
    dataset, probs, labels = read_run(run_dir)
    if args.dataset not in (None, dataset):
        raise ScriptError(f"{run_dir} was trained on {dataset}, not on --dataset {args.dataset}; leave the flag out")
    names, preds, confidence = class_names(dataset), probs.argmax(1), probs.max(1)
    failures = find_failures(probs, labels, args.threshold)
    chosen = representative(failures, preds, labels, args.top)
    rows = [
        {
            "index": int(i),
            "true": names[labels[i]],
            "predicted": names[preds[i]],
            "confidence": float(confidence[i]),
            "true_probability": float(probs[i, labels[i]]),
            "same_superclass": int(SUPERCLASS_OF[labels[i]] == SUPERCLASS_OF[preds[i]]),
            "representative": int(i in chosen),
        }
        for i in failures
    ]
    errors = int((preds != labels).sum())
    name = "CIFAR-100" if dataset == "cifar100" else "SYNTHETIC"
    print(f"{run_dir}: {errors:,} of {len(labels):,} {name} test images wrong, {len(failures):,} of them with confidence above {args.threshold}")

    if args.compare:
        other_dir = Path(args.compare).expanduser()
        other_dataset, other_probs, other_labels = read_run(other_dir)
        if other_dataset != dataset or not np.array_equal(other_labels, labels):
            raise ScriptError(f"{other_dir} was evaluated on other images than {run_dir}; compare runs on the same data set")
        other_preds, other_confidence = other_probs.argmax(1), other_probs.max(1)
        for row, outcome in zip(rows, outcomes(failures, preds, labels, other_preds)):
            i = row["index"]
            row |= {"other_predicted": names[other_preds[i]], "other_confidence": float(other_confidence[i])}
            row |= {"other_true_probability": float(other_probs[i, labels[i]]), "outcome": outcome}
        others = find_failures(other_probs, labels, args.threshold)
        print(f"{other_dir}: {len(others):,} such failures, {len(np.intersect1d(failures, others)):,} on the same images")
        if rows:
            print(f"the {len(rows):,} failures of {run_dir}, seen by {other_dir}:")
            for outcome in OUTCOMES:
                count = sum(row["outcome"] == outcome for row in rows)
                print(f"  {outcome:<17} {count:6,} {100 * count / len(rows):6.1f} %")
            before, after = confidence[failures].mean(), other_confidence[failures].mean()
            print(f"  mean confidence   {100 * before:.1f} % -> {100 * after:.1f} %")
            print("  Failures chosen for their confidence in one run look better in any other run, be it only another seed: no effect is shown yet.")

    utils.write_csv(run_dir / "failures.csv", rows[0] if rows else COLUMNS, rows)
    if not rows:
        (run_dir / "failures.png").unlink(missing_ok=True)
        print(f"nothing to show: no mistake above the threshold; wrote an empty failures.csv to {run_dir}")
        return rows

    print(f"{len(chosen)} representative ones, evenly spread from the most to the least confident, at most one per pair of classes:")
    for row in rows:
        if row["representative"]:
            print(f"  image {row['index']:>5}: {row['true']} taken for {row['predicted']}, confidence {100 * row['confidence']:.1f} %")
    images, true_labels = load_dataset(dataset, args.data_dir, train=False)
    if not np.array_equal(true_labels, labels):
        raise ScriptError(f"{run_dir}/test_labels.npy differs from the data set in {args.data_dir}; run python evaluate.py {run_dir} --refresh")
    title = f"{run_dir.name} on {name} test images: wrong, with confidence above {args.threshold}\nred: representative; the others: most confident first"
    draw(run_dir / "failures.png", images.numpy(), rows, chosen, title + (f"; then: {other_dir.name}" if args.compare else ""))
    print(f"wrote failures.csv and failures.png to {run_dir}")
    print(f"next: python gradcam.py {shlex.quote(str(run_dir))}")
    return rows


if __name__ == "__main__":
    utils.run_script(main)
