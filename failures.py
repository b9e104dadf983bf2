"""Find the mistakes a run is sure of, and what becomes of them in another run.

    python failures.py runs/baseline
    python failures.py runs/baseline --compare runs/smoothing0.1

Reads the logits that evaluate.py saved. Writes failures.csv (one row per test image that is wrong with
confidence above 0.90, most confident first) and failures.png into the run directory; gradcam.py reads
failures.csv.
"""

import numpy as np

import utils
from data import SUPERCLASS_OF, TITLES, class_names, load_dataset
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
    """`count` of the failures, evenly spread from the most to the least confident, at most one per pair of classes.

    For 3: the most confident, the median, the nearest to the threshold. A rank whose pair of classes is taken
    gives way to the nearest rank that brings a new pair; fewer come back if there are not enough pairs.
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


def read_probs(run_dir):
    """(probs (N, 100) float64, labels (N,) int64) of an evaluated run on the test images."""
    logits, labels = utils.load_logits(run_dir, "test")
    return np.exp(log_softmax(logits)), labels


def outcomes(failures, preds, labels, other_preds):
    """What another run makes of each failure: one of OUTCOMES."""
    repaired, same = other_preds[failures] == labels[failures], other_preds[failures] == preds[failures]
    return [OUTCOMES[0 if r else 1 if s else 2] for r, s in zip(repaired, same)]


def draw(path, images, rows, title):
    """The representative failures, then, on a new row, the most confident others."""
    chosen = [row for row in rows if row["representative"]]
    others = [row for row in rows if not row["representative"]][:SHOWN]
    columns = 6
    first = -(-len(chosen) // columns) * columns  # where the others begin
    cells = [*range(len(chosen)), *range(first, first + len(others))]
    height = cells[-1] // columns + 1
    figure, grid = utils.new_figure(2.2 * columns, 2.75 * height + 0.8, height, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for cell, row in zip(cells, chosen + others):
        axes = grid.flat[cell]
        axes.imshow(images[row["index"]], interpolation="nearest")
        text = f"image {row['index']}\ntrue: {row['true']}\nsays: {row['predicted']} {100 * row['confidence']:.1f} %"
        if "other_predicted" in row:
            text += f"\nthere: {row['other_predicted']} {100 * row['other_confidence']:.1f} %"
        axes.set_title(text, fontsize=8, color=utils.VERMILION if row["representative"] else "black")
    figure.suptitle(title)
    utils.save_figure(figure, path)


def compare(rows, failures, preds, labels, probs, other_probs, names):
    """Add to each row what another run says to the image; print what became of the failures."""
    other_preds, other_confidence = other_probs.argmax(1), other_probs.max(1)
    for row, outcome in zip(rows, outcomes(failures, preds, labels, other_preds)):
        i = row["index"]
        row["outcome"] = outcome
        row["other_predicted"] = names[other_preds[i]]
        row["other_confidence"] = float(other_confidence[i])
        row["other_probability"] = float(other_probs[i, preds[i]])  # of the class that was wrongly predicted
        row["other_true_probability"] = float(other_probs[i, labels[i]])
    for outcome in OUTCOMES:
        count = sum(row["outcome"] == outcome for row in rows)
        print(f"  {outcome:<17} {count:6,} {100 * count / len(rows):6.1f} %")
    for what, before, after in (
        ("confidence", "confidence", "other_confidence"),
        ("wrong class", "confidence", "other_probability"),
        ("true class", "true_probability", "other_true_probability"),
    ):
        means = [100 * np.mean([row[key] for row in rows]) for key in (before, after)]
        print(f"  mean {what:<12} {means[0]:6.1f} % -> {means[1]:.1f} %")
    print(
        "  Failures that were picked for their confidence in one run tend to look better in any other run, be it only\n"
        "  another seed: these numbers alone show no effect."
    )


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
    if args.device != "auto":
        utils.select_device(args.device)  # nothing runs there, but a wrong one is as wrong as in the other scripts
    run_dir, config = utils.open_run(args.run)
    utils.check_dataset(run_dir, config["dataset"], args.dataset)
    other_dir, other_config = utils.open_run(args.compare) if args.compare else (None, None)

    probs, labels = read_probs(run_dir)
    names, preds, confidence = class_names(config["dataset"]), probs.argmax(1), probs.max(1)
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
    title = f"{TITLES[config['dataset']]} test images that are wrong with confidence above {args.threshold}"
    print(f"{len(rows):,} {title}, of {(preds != labels).sum():,} wrong ones of {len(labels):,}: {run_dir}")
    if other_dir:
        other_probs, other_labels = read_probs(other_dir)
        if other_config["dataset"] != config["dataset"] or not np.array_equal(other_labels, labels):
            raise ScriptError(
                f"{other_dir} was evaluated on other images than {run_dir}; compare runs on one data set"
            )
        others = find_failures(other_probs, labels, args.threshold)
        shared = len(np.intersect1d(failures, others))
        print(f"{len(others):,} such images, {shared:,} of them the same: {other_dir}")
        smoothing = other_config["args"].get("smoothing") or 0
        if args.threshold >= 1 - smoothing + smoothing / len(names) - 0.01 and smoothing:
            ceiling = 1 - smoothing + smoothing / len(names)
            utils.warn(
                f"smoothing {smoothing} teaches a confidence of {ceiling:.4g} at most: fewer above {args.threshold} proves nothing"
            )
        if rows:
            print(f"the {len(rows):,} failures of {run_dir} in {other_dir}:")
            compare(rows, failures, preds, labels, probs, other_probs, names)

    for stale in ("failures.png", "gradcam.png", "gradcam.csv"):
        (run_dir / stale).unlink(missing_ok=True)  # of another list of failures
    utils.write_csv(run_dir / "failures.csv", rows[0] if rows else COLUMNS, rows)
    if not rows:
        print(f"nothing to show: no mistake above the threshold; wrote an empty failures.csv to {run_dir}")
        return rows
    print(
        f"{len(chosen)} representative ones, evenly spread from the most to the least confident, at most one per pair:"
    )
    for row in rows:
        if row["representative"]:
            print(
                f"  image {row['index']:>5}: {row['true']} taken for {row['predicted']}, {100 * row['confidence']:.1f} %"
            )
    print(f"wrote failures.csv to {run_dir}", flush=True)

    images, true_labels = load_dataset(config["dataset"], args.data_dir, train=False)
    if not np.array_equal(true_labels, labels):
        again = f"run python evaluate.py {utils.quote(run_dir)} --refresh"
        raise ScriptError(f"{run_dir}/test_labels.npy differs from the data set in {args.data_dir}; {again}")
    title = f"{run_dir.name}: {title}\norange: representative; the others: the most confident"
    draw(run_dir / "failures.png", images.numpy(), rows, title + (f"; there: {other_dir.name}" if other_dir else ""))
    print(f"wrote failures.png to {run_dir}")
    print(f"next: python gradcam.py {utils.quote(run_dir)}")
    return rows


if __name__ == "__main__":
    utils.run_script(main)
