"""Find the mistakes that a run is sure of, and what other runs predict there.

    python failures.py                                # of the run trained last
    python failures.py RUN --compare runs/smoothing0.1 runs/baseline-seed43

Reads the logits that evaluate.py saved; writes into RUN failures.csv, a row
per test image that is wrong with confidence above 0.90, the most confident
first, and failures.png. gradcam.py shows what the network looked at there.

Failures picked for their confidence in one run look better in any other run
(regression to the mean). So add a control to --compare, a run of the same
recipe under another seed: what happens there is no effect of a change.

Columns of failures.csv: votes is how many of five people uphold the label
(Northcutt et al., arXiv:2103.14749), empty where nobody was asked. Each run
of --compare has, after its name: _outcome (repaired, same wrong class, another
wrong class), _predicted and _confidence. checkpoint: SHA-256 of RUN's best.pt.
"""

import math
import textwrap

import numpy as np

import utils
from data import DOUBTFUL, SUPERCLASS_OF, TITLES, class_names, is_test_set, load_dataset, votes
from utils import ScriptError

COLUMNS = "index true predicted confidence true_probability same_superclass representative votes checkpoint".split()
ACROSS, SHOWN = 5, 15  # in failures.png: images in a row, images in all


class Run:
    """What a run predicts for the N test images: probs (N, 100); labels, preds, confidence, correct (N,)."""

    def __init__(self, folder, config, name):
        self.folder, self.config, self.name = folder, config, name
        self.recipe, self.seed = utils.recipe(config), config["args"].get("seed")
        logits, self.labels = utils.load_logits(folder, "test")
        self.checkpoint = utils.checkpoint_id(folder)  # refuses logits of an older best.pt
        self.probs = np.exp(utils.log_softmax(logits))
        self.preds, self.confidence = self.probs.argmax(1), self.probs.max(1)
        self.correct = self.preds == self.labels
        self.official = is_test_set(self.labels)  # then people's votes belong to these images


def confident_failures(run, threshold):
    """Indices of the images that are wrong with confidence above threshold, the most confident first."""
    wrong = np.flatnonzero(~run.correct & (run.confidence > threshold))
    return wrong[np.argsort(-run.confidence[wrong], kind="stable")]


def representative(failures, preds, labels, count):
    """`count` of the failures, evenly spread over the ranks, at most one per pair of classes.

    For 3: the most confident, the median, the least confident. A rank whose pair of classes is taken gives
    way to the nearest that brings a new pair; fewer come back if there are not enough pairs.
    """
    chosen = {}  # pair of classes: the failure that stands for it
    for target in np.linspace(0, len(failures) - 1, count):
        for i in failures[np.argsort(np.abs(np.arange(len(failures)) - target), kind="stable")]:
            pair = int(labels[i]), int(preds[i])
            if pair not in chosen:
                chosen[pair] = i
                break
    return list(chosen.values())


def make_rows(run, others, failures, chosen, dataset):
    """The rows of failures.csv as dicts. chosen: the representative ones of the failures."""
    rows, names = [], class_names(dataset)
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
            "votes": votes(i) if run.official else None,
        }
        for other in others:
            wrong = "same wrong class" if other.preds[i] == pred else "another wrong class"
            row[f"{other.name}_outcome"] = "repaired" if other.correct[i] else wrong
            row[f"{other.name}_predicted"] = names[other.preds[i]]
            row[f"{other.name}_confidence"] = other.confidence[i]
        rows.append(row | {"checkpoint": run.checkpoint})
    return rows


def doubt(row):
    """A word on an image whose label fewer than three of five people uphold, else ""."""
    return f"label doubtful: {row['votes']} of 5 agree" if row["votes"] in (0, 1, 2) else ""


def say(text):
    """Print a sentence on lines of at most 79 columns."""
    print(textwrap.fill(text, 79, subsequent_indent="  ", break_on_hyphens=False))


def print_fate(run, other, controls, failures, rows):
    """What becomes of the failures in another run."""
    print(other.name)
    if other in controls:
        print("  control: the same recipe, another seed")
    outcomes = [row[f"{other.name}_outcome"] for row in rows]
    repaired, same, another = map(outcomes.count, ("repaired", "same wrong class", "another wrong class"))
    print(f"  repaired: {repaired:,} of {len(rows):,}, same wrong class: {same:,}, another wrong class: {another:,}")
    before, after = run.confidence[failures].mean(), other.confidence[failures].mean()
    print(f"  mean confidence: {100 * before:.1f} % -> {100 * after:.1f} %")


def draw(images, rows, title, other):
    """The representative failures, then the most confident others; a Figure.

    images: (N, 32, 32, 3) uint8. other: the name of a run whose predictions are shown as well, or None.
    """
    chosen = sum(row["representative"] for row in rows)
    rows = sorted(rows, key=lambda row: -row["representative"])[: max(SHOWN, chosen)]  # each part by confidence
    across = min(ACROSS, len(rows))
    rows = rows[: max(chosen, len(rows) - len(rows) % across)]  # full rows
    height = math.ceil(len(rows) / across)
    text = f"{title}\norange: representative, evenly spread over the ranks; black: the most confident others"
    text += f"\nother: what {other} predicts" if other else ""
    figure, grid = utils.new_figure(10, 2.95 * height + 0.9, height, across, text, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, row in zip(grid.flat, rows):
        word, color = ("representative", utils.VERMILION) if row["representative"] else ("", "black")
        lines = [word, f"true: {row['true']}", f"predicted: {row['predicted']}"]
        lines += [f"{100 * row['confidence']:.2f} %, image {row['index']}"]
        lines += [f"other: {row[other + '_predicted']} {100 * row[other + '_confidence']:.0f} %"] if other else []
        lines += [doubt(row)]
        axes.imshow(images[row["index"]], interpolation="nearest")
        axes.set_title("\n".join(filter(None, lines)), fontsize=9.5, color=color)
    return figure


def parse_args(argv):
    parser = utils.ArgumentParser(__file__, __doc__)
    add = parser.add_argument
    add("run", metavar="RUN", nargs="?", help="run that evaluate.py has scored (default: the one trained last)")
    add("--compare", nargs="+", default=[], metavar="RUN", help="other runs: what do they predict on these images?")
    add("--threshold", type=float, default=0.9, help="confidence above which a mistake counts")
    add("--top", type=int, default=3, metavar="N", help="how many representative failures to choose")
    utils.add_common_flags(parser, device=False)
    args = parser.parse_args(argv)
    if not 0 <= args.threshold < 1:
        parser.error(f"--threshold {args.threshold} must be in [0, 1)")
    if not 1 <= args.top <= 24:
        parser.error(f"--top {args.top} must be in 1..24")
    return args


def read_runs(first, others):
    """Run objects, which must be different runs on the same images; all but the first are only read."""
    opened = [utils.open_run(first), *(utils.open_run(folder, writable=False) for folder in others)]
    folders = [folder.resolve() for folder, _ in opened]
    if len(set(folders)) < len(folders):
        raise ScriptError("RUN and --compare must be different runs")
    run, *others = [Run(*pair, name) for pair, name in zip(opened, utils.short_names(folders))]
    for other in others:
        if not np.array_equal(other.labels, run.labels):
            raise ScriptError(f"{other.folder} was evaluated on other images than {run.folder}; use one data set")
    return run, others


def main(argv=None):
    """Returns the rows of failures.csv as a list of dicts."""
    args = parse_args(argv)
    run, others = read_runs(args.run, args.compare)
    dataset, data_dir = utils.dataset_of(run.config, args)
    controls = [other for other in others if other.recipe == run.recipe and other.seed != run.seed]
    failures = confident_failures(run, args.threshold)
    chosen = representative(failures, run.preds, run.labels, args.top)
    rows = make_rows(run, others, failures, chosen, dataset)
    what = f"{TITLES[dataset]} test images that are wrong with confidence above {args.threshold}"
    say(f"{run.name}: {len(rows):,} {what} (wrong in all: {(~run.correct).sum():,} of {len(run.labels):,})")
    picture, folder = run.folder / "failures.png", utils.quote(run.folder)
    if utils.write_csv(run.folder / "failures.csv", rows, None if rows else COLUMNS):
        picture.unlink(missing_ok=True)  # it shows the old failures
    if not rows:
        print(f"nothing to show; wrote an empty failures.csv to {folder}")
        if not run.correct.all():  # the ten most confident mistakes exceed it; the last --threshold counts
            tenth = run.confidence[confident_failures(run, 0)[:10]].min()
            words = [*(argv or ()), "--threshold", math.floor(100 * tenth - 1e-9) / 100]
            print("next: python failures.py", *(utils.quote(str(word)) for word in words))
        return rows

    if run.official:
        hits = run.correct & (run.confidence > args.threshold)
        of_hits = f"{100 * DOUBTFUL[hits].mean():.1f} %" if hits.any() else "none"
        count = f"{DOUBTFUL[failures].sum():,} of {len(rows):,}"
        say(f"{count} have a label that fewer than three of five people confirm; of the confident hits {of_hits}")
    print("representative: evenly spread over the ranks, one per pair of classes")
    for row in [row for row in rows if row["representative"]]:
        words = [f"{row['true']} taken for {row['predicted']}", f"{100 * row['confidence']:.2f} %", doubt(row)]
        print(f"  image {row['index']:>5}: {', '.join(filter(None, words))}")
    for other in others:
        print_fate(run, other, controls, failures, rows)
    if others and not controls:
        print("Failures picked for their confidence in one run look better in any other run.")
        print("By how much: --compare with the same recipe under another --seed, too.")
    print(f"wrote failures.csv to {folder}", flush=True)

    images, _ = load_dataset(dataset, data_dir, train=False)
    title = textwrap.fill(f"{run.name}: {what}, {len(rows):,} in all", 90)
    if utils.save_figure(picture, draw, images.numpy(), rows, title, others[0].name if others else None):
        print(f"wrote failures.png to {folder}")
    script = "gradcam" if (run.folder / "best.pt").exists() else "evaluate"  # a published run may be without it
    print(f"next: python {script}.py {folder}{utils.data_flag(args)}")
    return rows


if __name__ == "__main__":
    utils.run_script(main)
