"""Find the mistakes that a run is sure of, and what other runs predict there.

    python failures.py runs/baseline
    python failures.py runs/baseline --compare runs/smoothing0.1

Reads the logits that evaluate.py saved. Writes into the first run directory
failures.csv (a row per test image that is wrong with confidence above 0.90,
the most confident first; gradcam.py reads it) and failures.png.

Failures picked for their confidence in one run look better in any other run
(regression to the mean). So add a control to --compare, a run of the same
recipe under another seed: what happens there is not the effect of a change.

Columns of failures.csv for each run of --compare, after its folder's name:
_outcome (repaired, same wrong class, new wrong class), _predicted,
_confidence, _wrong_probability (of what the first run predicts) and
_true_probability. With controls, over_seeds: is the same mistake made by all
seeds of the recipe, some, or this seed only?
"""

import math
import textwrap

import numpy as np

import utils
from data import SUPERCLASS_OF, TITLES, class_names, load_dataset
from utils import ScriptError

SHOWN = 12  # most confident failures in the picture, below the representative ones
COLUMNS = "index true predicted confidence true_probability same_superclass representative checkpoint".split()
OUTCOMES = ("repaired", "same wrong class", "new wrong class")
SEEDS = ("all seeds", "some seeds", "this seed only")  # of the recipe, that make the same mistake


class Run:
    """What a run predicts for the N test images: probs (N, 100); labels, preds, confidence, correct (N,)."""

    def __init__(self, folder, config):
        self.folder, self.config, self.name = folder, config, folder.resolve().name
        self.recipe, self.seed = utils.recipe(config), config["args"].get("seed")
        logits, self.labels = utils.load_logits(folder, "test")
        self.probs = np.exp(utils.log_softmax(logits))
        self.preds, self.confidence = self.probs.argmax(1), self.probs.max(1)
        self.correct = self.preds == self.labels

    def failures(self, threshold):
        """Indices of the images that are wrong with confidence above threshold, the most confident first."""
        wrong = np.flatnonzero(~self.correct & (self.confidence > threshold))
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")]


def representative(failures, preds, labels, count):
    """`count` of the failures, evenly spread over the ranks, at most one per pair of classes.

    For 3: the most confident, the median, the nearest to the threshold. A rank whose pair of classes is taken
    gives way to the nearest rank that brings a new pair; fewer come back if there are not enough pairs.
    """
    chosen = {}  # pair of classes: the failure that stands for it
    for target in np.linspace(0, len(failures) - 1, count):
        for i in failures[np.argsort(np.abs(np.arange(len(failures)) - target), kind="stable")]:
            if (labels[i], preds[i]) not in chosen:
                chosen[labels[i], preds[i]] = i
                break
    return list(chosen.values())


def make_rows(run, others, controls, failures, chosen, names):
    """The rows of failures.csv as dicts. chosen: the representative failures; names: of the classes."""
    rows, checkpoint = [], utils.checkpoint_id(run.folder)
    for i in failures.tolist():
        label, pred = run.labels[i], run.preds[i]
        row = {
            "index": i,
            "true": names[label],
            "predicted": names[pred],
            "confidence": run.confidence[i],
            "true_probability": run.probs[i, label],
            "same_superclass": int(SUPERCLASS_OF[label] == SUPERCLASS_OF[pred]),
            "representative": int(i in chosen),
        }
        for other in others:
            wrong = "same wrong class" if other.preds[i] == pred else "new wrong class"
            row[f"{other.name}_outcome"] = "repaired" if other.correct[i] else wrong
            row[f"{other.name}_predicted"] = names[other.preds[i]]
            row[f"{other.name}_confidence"] = other.confidence[i]
            row[f"{other.name}_wrong_probability"] = other.probs[i, pred]
            row[f"{other.name}_true_probability"] = other.probs[i, label]
        if controls:
            same = [control.preds[i] == pred for control in controls]
            row["over_seeds"] = SEEDS[0 if all(same) else 1 if any(same) else 2]
        rows.append(row | {"checkpoint": checkpoint})
    return rows


def say(text, indent="  "):
    """Print a sentence on lines of at most 79 columns."""
    after = indent + "  "
    print(textwrap.fill(text, 79, initial_indent=indent, subsequent_indent=after, break_on_hyphens=False))


def share(count, of):
    """A share in percent and its 95 % Wilson interval, as text."""
    low, high = utils.wilson_interval(count, of) if of else (0, 1)
    return f"{100 * count / max(of, 1):.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def print_fate(run, other, controls, failures, rows, threshold):
    """What another run predicts for the failures, and how many mistakes it makes itself."""
    print(other.name + (" (control)" if other in controls else ""))
    for word in OUTCOMES:
        count = sum(row[f"{other.name}_outcome"] == word for row in rows)
        print(f"  {word + ':':<17} {count:,} of {len(rows):,}, {share(count, len(rows))}")
    sure = run.correct & (run.confidence > threshold)
    newly_wrong, of = (sure & ~other.correct).sum(), sure.sum()
    what = f"{newly_wrong:,} of {of:,} images that {run.name} gets right above the threshold"
    say(f"newly wrong:      {what}, {share(newly_wrong, of)}")
    before, after = run.confidence[failures].mean(), other.confidence[failures].mean()
    change = f"mean confidence:  {100 * before:.1f} % -> {100 * after:.1f} %"
    if controls and other not in controls:
        without = np.mean([control.confidence[failures].mean() for control in controls])
        change += f"; in the control runs {100 * before:.1f} % -> {100 * without:.1f} %"
    say(change)
    its_own = other.failures(threshold)
    same = len(np.intersect1d(failures, its_own))
    say(f"confident failures of its own: {len(its_own):,}, {same:,} of them the same images")
    smoothing = other.recipe.get("smoothing") or 0
    ceiling = 1 - smoothing + smoothing / 100  # the target of the true class, one of 100
    if smoothing and threshold > ceiling - 0.05:
        target = f"smoothing {smoothing} has no target above {ceiling:.3f}"
        say(f"({target}, so having fewer failures above {threshold} proves nothing)")
    covered = int((run.confidence > threshold).sum())  # of this run the failures are the wrong ones among them
    wrong = (~other.correct[np.argsort(-other.confidence, kind="stable")[:covered]]).sum()
    say(f"wrong among the {covered:,} most confident images of each run: {len(failures):,} -> {wrong:,}")


def draw(path, images, rows, title, other):
    """The representative failures, then, on a new row, the most confident others.

    images: (N, 32, 32, 3) uint8. other: the name of a run whose predictions are shown as well, or None.
    """
    title += "\norange: representative, evenly spread over the ranks; black: the most confident others"
    title += f"\nother: what {other} predicts" if other else ""
    chosen = [row for row in rows if row["representative"]]
    others = [row for row in rows if not row["representative"]][:SHOWN]
    first = math.ceil(len(chosen) / 6)  # rows of the representative ones, six in a row
    height = first + math.ceil(len(others) / 6)
    figure, grid = utils.new_figure(13.2, 2.95 * height + 0.9, height, 6, title, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, row in zip([*grid.flat[: len(chosen)], *grid[first:].flat], chosen + others):
        lines = [f"true: {row['true']}", f"predicted: {row['predicted']}"]
        lines += [f"{100 * row['confidence']:.1f} %, image {row['index']}"]
        if other:
            lines += [f"other: {row[other + '_predicted']} {100 * row[other + '_confidence']:.0f} %"]
        color = utils.VERMILION if row["representative"] else "black"
        axes.imshow(images[row["index"]], interpolation="nearest")
        axes.set_title("\n".join(lines), fontsize=10, color=color)
    utils.save_figure(figure, path)


def parse_args(argv):
    parser = utils.ArgumentParser(__file__, __doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="run directory that evaluate.py has scored")
    add("--compare", nargs="+", default=[], metavar="DIR", help="other runs: what do they predict on these images?")
    add("--threshold", type=float, default=0.9, help="confidence above which a mistake counts")
    add("--top", type=int, default=3, metavar="N", help="how many representative failures to choose")
    utils.add_common_flags(parser)
    args = parser.parse_args(argv)
    if not 0 <= args.threshold < 1:
        parser.error(f"--threshold {args.threshold} must be in [0, 1)")
    if not 1 <= args.top <= 24:
        parser.error(f"--top {args.top} must be in 1..24")
    if args.device != "auto":
        utils.select_device(args.device)  # not used here; a wrong name is an error all the same
    return args


def read_runs(folders):
    """Run objects, which must be different runs on the same images; all but the first are only read."""
    runs = [Run(*utils.open_run(folder, writable=i == 0)) for i, folder in enumerate(folders)]
    if len({run.name for run in runs}) < len(runs):
        raise ScriptError("RUN and --compare must be different runs, in folders with different names")
    first, *others = runs
    for run in others:
        if not np.array_equal(run.labels, first.labels):
            raise ScriptError(f"{run.folder} was evaluated on other images than {first.folder}; use one data set")
    return first, others


def main(argv=None):
    """Returns the rows of failures.csv as a list of dicts."""
    args = parse_args(argv)
    run, others = read_runs([args.run, *args.compare])
    dataset, data_dir = utils.dataset_of(run.folder, run.config, args)
    controls = [other for other in others if other.recipe == run.recipe and other.seed != run.seed]
    failures = run.failures(args.threshold)
    chosen = representative(failures, run.preds, run.labels, args.top)
    rows = make_rows(run, others, controls, failures, chosen, class_names(dataset))
    what = f"{TITLES[dataset]} test images that are wrong with confidence above {args.threshold}"
    wrong = f"{(~run.correct).sum():,} of {len(run.labels):,}"
    say(f"{run.name}: {len(rows):,} {what} (wrong in all: {wrong})", "")
    picture = run.folder / "failures.png"
    if utils.write_csv(run.folder / "failures.csv", rows, None if rows else COLUMNS):
        picture.unlink(missing_ok=True)  # it shows the old failures
    if not rows:
        print(f"nothing to show; wrote an empty failures.csv to {run.folder}")
        if not run.correct.all():  # the ten most confident mistakes exceed it; the last --threshold counts
            threshold = math.floor(100 * run.confidence[run.failures(0)[:10]].min() - 1e-9) / 100
            print("next: python failures.py", *(utils.quote(str(word)) for word in [*argv, "--threshold", threshold]))
        return rows

    print("representative: evenly spread over the ranks, one per pair of classes")
    for row in [row for row in rows if row["representative"]]:
        print(f"  image {row['index']:>5}: {row['true']} taken for {row['predicted']}, {100 * row['confidence']:.1f} %")
    for other in others:
        print_fate(run, other, controls, failures, rows, args.threshold)
    if controls:
        counts = [f"{word}: {sum(row['over_seeds'] == word for row in rows):,}" for word in SEEDS]
        say(f"control: the same recipe, another seed; the same mistake in {', '.join(counts)}", "")
    elif others:
        print("Failures picked for their confidence in one run look better in any other run.")
        print("By how much: --compare with the same recipe under another --seed, too.")
    print(f"wrote failures.csv to {run.folder}", flush=True)

    try:
        images, labels = load_dataset(dataset, data_dir, train=False)
    except ScriptError as error:
        message = f"failures.csv is written, but failures.png needs the images: {error}"
        raise ScriptError(message, error.code) from None
    if not np.array_equal(labels, run.labels):
        again = f"run python evaluate.py {utils.quote(run.folder)} again"
        raise ScriptError(f"{run.folder}: test_labels.npy differs from the data set in {data_dir}; {again}")
    title = f"{run.name}: {what}, {len(rows):,} in all"
    draw(picture, images.numpy(), rows, title, others[0].name if others else None)
    print(f"wrote failures.png to {run.folder}")
    if (run.folder / "best.pt").exists():  # a published run may be without it
        print(f"next: python gradcam.py {utils.quote(run.folder)}{utils.data_flag(args)}")
    return rows


if __name__ == "__main__":
    utils.run_script(main)
