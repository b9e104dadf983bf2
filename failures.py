"""Find the mistakes a run is sure of, and what becomes of them in another run.

    python failures.py runs/baseline
    python failures.py runs/baseline --compare runs/smoothing0.1
    python failures.py runs/baseline --compare runs/smoothing0.1 --control runs/baseline-seed43 runs/baseline-seed44

Reads the logits that evaluate.py saved. Writes failures.csv (one row per test image that is wrong with
confidence above 0.90, most confident first) and failures.png into the run directory; gradcam.py reads
failures.csv and adds its attention figures. The columns: what the run says; label_doubted, by evaluate.py's
label_errors.csv; for each run of --compare (other_, other2_...) and --control (control_, control2_...) what
it says to the same image; over_seeds: stable if all control runs make the same mistake, luck if none of
them is wrong.
"""

import csv
import io

import numpy as np

import utils
from data import SUPERCLASS_OF, TITLES, class_names, load_dataset
from utils import ScriptError, log_softmax

SHOWN = 24  # most confident failures in the picture, below the representative ones
COLUMNS = "index,true,predicted,confidence,true_probability,same_superclass,representative".split(",")
OUTCOMES = ("repaired", "same wrong class", "new wrong class")


def find_failures(probs, labels, threshold):
    """Indices of the images that are wrong with confidence above threshold, the most confident first."""
    preds, confidence = probs.argmax(1), probs.max(1)
    wrong = np.flatnonzero((preds != labels) & (confidence > threshold))
    return wrong[np.argsort(-confidence[wrong], kind="stable")]


def representative(failures, preds, labels, count):
    """`count` of the failures, evenly spread over the ranks, at most one per pair of classes.

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


def points(values):
    """Mean of (N,) values and its 95 % interval as text, in percentage points."""
    mean, low, high = utils.mean_interval(values)
    ends = "(too few for an interval)" if low is None else f"[{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{100 * mean:+.1f} points {ends}"


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


def add_columns(rows, name, probs, failures, preds, labels, names):
    """Add to each row what another run says to the image: <name>_predicted, <name>_confidence and so on."""
    other_preds, confidence = probs.argmax(1), probs.max(1)
    for row, outcome in zip(rows, outcomes(failures, preds, labels, other_preds)):
        i = row["index"]
        row[f"{name}_outcome"] = outcome
        row[f"{name}_predicted"] = names[other_preds[i]]
        row[f"{name}_confidence"] = float(confidence[i])
        row[f"{name}_wrong_probability"] = float(probs[i, preds[i]])  # of the class that was wrongly predicted
        row[f"{name}_true_probability"] = float(probs[i, labels[i]])


def over_seeds(fates):
    """What the same recipe makes of a failure under other seeds, from its outcomes there."""
    if set(fates) == {"same wrong class"}:
        return "stable"
    return "luck" if set(fates) == {"repaired"} else "mixed"


def read_columns(path, keys):
    """{index: {key: text}} of a csv that another script wrote; {} if there is none."""
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text())))
        return {int(row["index"]): {key: row[key] for key in keys} for row in rows}
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return {}


def share(count, of):
    """A share and its 95 % Wilson interval, as text."""
    low, high = utils.wilson_interval(count, max(of, 1))
    return f"{count:6,} {100 * count / max(of, 1):6.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def print_fate(rows, name, broken, right):
    """What has become of the failures in another run: shares, and means before and after.

    broken: how many of the `right` confident correct images are wrong there: what is repaired has its price.
    """
    for outcome in OUTCOMES:
        print(f"  {outcome:<17} {share(sum(row[f'{name}_outcome'] == outcome for row in rows), len(rows))}")
    print(f"  {'newly broken':<17} {share(broken, right)} of the {right:,} images it is right on, as confidently")
    for what, before, after in (
        ("confidence", "confidence", "confidence"),
        ("wrong class", "confidence", "wrong_probability"),
        ("true class", "true_probability", "true_probability"),
    ):
        before, after = (100 * np.mean([row[key] for row in rows]) for key in (before, f"{name}_{after}"))
        print(f"  mean {what:<12} {before:6.1f} % -> {after:.1f} %")


def print_matched(confidence, correct, other_confidence, other_correct, threshold):
    """Confident mistakes of two runs, both at the coverage that the threshold gives the first one.

    A threshold on the confidence itself would favour the run that is less confident of everything.
    """
    covered = int((confidence > threshold).sum())
    mistakes = []
    for c, right in ((confidence, correct), (other_confidence, other_correct)):
        most_confident = np.argsort(-c, kind="stable")[:covered]
        mistakes.append(np.isin(np.arange(len(c)), most_confident) & ~right)
    *_, p = utils.mcnemar(*mistakes)
    first, second = (mistake.sum() for mistake in mistakes)
    print(f"{first:,} -> {second:,} wrong among the {covered:,} most confident images of each, McNemar p = {p:.2g}")


def main(argv=None):
    """Returns the rows of failures.csv as a list of dicts."""
    parser = utils.ArgumentParser(__doc__)
    parser.add_argument("run", metavar="RUN", help="run directory that evaluate.py has been through")
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="DIR", help="other runs: what do they say to the same images?"
    )
    parser.add_argument(
        "--control", nargs="+", default=[], metavar="DIR", help="RUN under other seeds: what does chance alone do?"
    )
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
    if args.control and not args.compare:
        parser.error("--control goes with --compare")
    others, controls = (  # {"other": ..., "other2": ...}: how their columns begin, folder and config
        {kind + str(k) * (k > 1): utils.open_run(folder) for k, folder in enumerate(folders, 1)}
        for kind, folders in (("other", args.compare), ("control", args.control))
    )
    folders = [run_dir.resolve(), *(folder.resolve() for folder, _ in (others | controls).values())]
    if len(set(folders)) < len(folders):
        parser.error("RUN, --compare and --control must be different runs")
    for folder, its_config in controls.values():
        if utils.recipe(its_config) != utils.recipe(config):
            parser.error(
                f"--control {folder} has another recipe than {run_dir}; take the same flags and another --seed"
            )
        if its_config["args"].get("seed") == config["args"].get("seed"):
            parser.error(
                f"--control {folder} has the seed of {run_dir}, so it tells nothing of chance; take another --seed"
            )

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
    doubted = read_columns(run_dir / "label_errors.csv", ["suggested", "source"])
    for row in rows if (run_dir / "label_errors.csv").exists() else ():
        row["label_doubted"] = doubted[row["index"]]["source"] if row["index"] in doubted else ""
        row["label_suggested"] = doubted[row["index"]]["suggested"] if row["index"] in doubted else ""
    title = f"{TITLES[config['dataset']]} test images that are wrong with confidence above {args.threshold}"
    print(f"{len(rows):,} {title}, of {(preds != labels).sum():,} wrong ones of {len(labels):,}: {run_dir}")
    all_probs = {}
    for name, (folder, its_config) in (others | controls).items():
        all_probs[name], its_labels = read_probs(folder)
        if its_config["dataset"] != config["dataset"] or not np.array_equal(its_labels, labels):
            raise ScriptError(f"{folder} was evaluated on other images than {run_dir}; compare on one data set")
        add_columns(rows, name, all_probs[name], failures, preds, labels, names)
    for row in rows if controls else ():
        row["over_seeds"] = over_seeds([row[f"{name}_outcome"] for name in controls])
    correct = preds == labels
    for name, (folder, its_config) in others.items():
        its_probs = all_probs[name]
        its_failures = find_failures(its_probs, labels, args.threshold)
        shared = len(np.intersect1d(failures, its_failures))
        print(f"{len(its_failures):,} such images, {shared:,} of them the same: {folder}")
        smoothing = its_config["args"].get("smoothing") or 0
        ceiling = 1 - smoothing + smoothing / len(names)
        if smoothing and args.threshold > ceiling - 0.05:
            taught = f"smoothing {smoothing} teaches a confidence of {ceiling:.3f} at most"
            utils.warn(f"{taught}: fewer failures above {args.threshold} prove nothing")
        its_correct = its_probs.argmax(1) == labels
        print_matched(confidence, correct, its_probs.max(1), its_correct, args.threshold)
        if not rows:
            continue
        print(f"the {len(rows):,} failures of {run_dir} in {folder}:")
        sure = correct & (confidence > args.threshold)
        print_fate(rows, name, int((sure & ~its_correct).sum()), int(sure.sum()))
        print(f"  naive difference  {points(its_probs.max(1)[failures] - confidence[failures])}")
        if not controls:
            continue
        control = np.mean([all_probs[other].max(1)[failures] for other in controls], 0)
        print(f"  control - first   {points(control - confidence[failures])}: what another seed does by itself")
        print(
            f"  this - control    {points(its_probs.max(1)[failures] - control)}: the effect; neither picked the images"
        )
        if its_config["args"].get("seed") == config["args"].get("seed"):
            utils.warn(
                f"{folder} shares its seed with {run_dir}, so the same initial weights and order of images make "
                "their mistakes alike, and the effect too small; one with a third seed is a cleaner comparison"
            )
    if others and rows and not controls:
        print(
            "  The naive difference is biased downwards: failures picked for their confidence in one run look better\n"
            "  in any other run. --control with the first run under another seed takes the bias out."
        )
    if controls and rows:
        words = [row["over_seeds"] for row in rows]
        counts = ", ".join(f"{words.count(word):,} {word}" for word in ("stable", "mixed", "luck"))
        print(f"over the {len(controls) + 1} seeds of {run_dir}: {counts}")

    path = run_dir / "failures.csv"
    before = {i: row["representative"] for i, row in read_columns(path, ["representative"]).items()}
    now = {row["index"]: str(row["representative"]) for row in rows}
    stale = ["failures.png"] + ["gradcam.png"] * (before != now)  # what shows another choice of failures
    stale += ["gradcam.csv", "attention.csv", "attention.json"] * (before.keys() != now.keys())  # ... another list
    for name in stale:
        (run_dir / name).unlink(missing_ok=True)
    attention = read_columns(run_dir / "attention.csv", utils.ATTENTION)
    rows = [row | attention.get(row["index"], {}) for row in rows]
    utils.write_csv(path, rows[0] if rows else COLUMNS, rows)
    if not rows:
        print(f"nothing to show: no mistake above the threshold; wrote an empty failures.csv to {run_dir}")
        return rows
    print(f"{len(chosen)} representative ones, spread evenly over the ranks, at most one per pair of classes:")
    for row in rows:
        if row["representative"]:
            words = f"{row['true']} taken for {row['predicted']}"
            print(f"  image {row['index']:>5}: {words}, {100 * row['confidence']:.1f} %")
    print(f"wrote failures.csv to {run_dir}", flush=True)

    images, true_labels = load_dataset(config["dataset"], args.data_dir, train=False)
    if not np.array_equal(true_labels, labels):
        again = f"run python evaluate.py {utils.quote(run_dir)} --refresh"
        raise ScriptError(f"{run_dir}/test_labels.npy differs from the data set in {args.data_dir}; {again}")
    title = f"{run_dir.name}: {title}\norange: representative; the others: the most confident"
    draw(
        run_dir / "failures.png",
        images.numpy(),
        rows,
        title + (f"; there: {others['other'][0].name}" if others else ""),
    )
    print(f"wrote failures.png to {run_dir}")
    print(f"next: python gradcam.py {utils.quote(run_dir)}{utils.data_dir_flag(args)}")
    return rows


if __name__ == "__main__":
    utils.run_script(main)
