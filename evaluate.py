"""Score trained runs on CIFAR-100's test set, judge a change, write the report.

    python evaluate.py runs/baseline                     # one run
    python evaluate.py runs/baseline runs/baseline-seed43 runs/smoothing0.1 ...
    python evaluate.py ... --stress            # corruptions and an attack, too

Runs of one recipe differ in the seed alone. The first recipe is the baseline;
every other one gets a verdict on what the study says (COMPARISONS, ABOUT_ONE).

The idea: a metric is a value for each test image, and their mean is the run's
figure. So a recipe is a matrix (runs, images), a comparison is arithmetic on
two matrices, and estimate() makes every interval of a verdict. To add a
metric, add a line to Scores.means(). To add a claim, add an entry to
COMPARISONS or ABOUT_ONE.

Writes into each run directory test_logits.npy (10000, 100) float32 and
test_labels.npy (10000,) int64, where row i is test image i; the same for the
validation images; metrics.json (fractions; 95 % intervals of means: ci95);
confusion.npy (row = true class, column = predicted), per_class.csv, a picture
of each, and reliability.png. --stress adds stress.csv, stress_preds.npy and
stress_confidence.npy (65 conditions, N). The first run of each changed recipe
(of a recipe alone: its first run) gets verdict.json, report.md and pictures.
Logits of an unchanged best.pt are kept. Tables name runs without the
flags that all of them share.
"""

import collections
import functools
import json
import math
import os
import re
import textwrap
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch

import utils
from data import CORRUPTIONS, DOUBTFUL, DUPLICATES, NUM_CLASSES, SMALL_ANIMALS, SUPERCLASS_OF, SUPERCLASSES, TITLES
from data import attack, class_names, corrupt, is_test_set, load_dataset, normalize, split_id, split_train_val, votes
from model import MODELS
from utils import ScriptError, calibration_bins, confusion_matrix, log_softmax, warn

CONFIDENT = 0.9  # the study's failures are wrong with a confidence above this
MARGIN = 0.01  # accuracies within a point of each other count as the same
FEWEST = 20  # images; a mean among fewer gets no figure
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # 97.5 % points of Student's t
SMALL = np.isin(np.arange(NUM_CLASSES), SMALL_ANIMALS)  # (100,) is the class one of a small animal?


# ---- the idea -------------------------------------------------------------------------------------------


def estimate(*arms):
    """(figure, half): the mean value of one recipe, or its change from the first recipe to the second.

    arms: matrices (runs, N) of a value for each run and test image. figure +- half is the 95 % interval. half is
    None if a recipe has one run, since its seed may be the reason. Two parts of the error add in squares: the
    randomness of training (spread between runs) and the choice of test images, which all runs share.
    """
    images, change = arms[0].shape[1], arms[-1].mean(0)  # (N,)
    if len(arms) == 2:
        change = change - arms[0].mean(0)
    figure, freedom = change.mean(), sum(len(arm) - 1 for arm in arms)
    if min(map(len, arms)) < 2:
        return figure, None
    t = STUDENT[freedom - 1] if freedom <= len(STUDENT) else 1.96 + 2.4 / freedom
    share = sum(1 / len(arm) for arm in arms)  # variance of the figure per variance of one run
    of_runs = sum(((arm.mean(1) - arm.mean()) ** 2).sum() for arm in arms) / freedom
    of_images = change.var() / images
    # What runs do by chance on single images is in both parts; it is taken out of the second one.
    residuals = [arm - arm.mean(1, keepdims=True) - arm.mean(0) + arm.mean() for arm in arms]
    noise = sum((part**2).sum() for part in residuals) / freedom / images**2
    both = t**2 * share * of_runs + 1.96**2 * max(0, of_images - share * noise)
    return figure, math.sqrt(max(both, 1.96**2 * of_images))  # never shorter than the images alone make it


@dataclass
class Claim:
    """What the study says, and the value for each run and image that decides it."""

    text: str
    side: str  # what is claimed of the figure: "above" or "below" the reference, or "within" MARGIN of it
    values: Callable  # (runs of a recipe, baselines): (runs, N)
    study: str  # the study's own words
    meaning: str  # what the figure is
    reference: float = 0.0
    unit: str = "points"
    needs: str = ""  # "official": the test images of CIFAR-100; else a file of the run, a key of NEEDS
    remark: Callable = lambda runs, baselines: ""  # what a reader must know beside the figure


def each(value):
    """The values of a claim that looks at each run alone: value(run) is (N,)."""
    return lambda runs, baselines: np.array([value(run) for run in runs], np.float64)


COMPARISONS = [  # changed minus baseline
    Claim("accuracy stays within 1 point", "within", each(lambda run: run.raw.correct),
          "does not change total accuracy significantly", "test accuracy"),
    Claim("fewer confident errors (> 0.90)", "below", each(lambda run: run.raw.failures),
          "decreases extreme confidence on incorrect predictions", "share of images, wrong with confidence above 0.90",
          remark=lambda runs, base: confident_errors(runs, base)),
    Claim("fewer errors in the surest half", "below", each(lambda run: surest_half(run)),
          "", "error rate of the half of the images that a run is most confident of"),
    Claim("earlier failures less confident", "below", lambda runs, base: on_failures(runs, base, "raw"),
          "failure cases identified previously have less confidence",
          "confidence on the confident failures of baselines with other seeds"),
    Claim("the same, temperature-scaled", "below", lambda runs, base: on_failures(runs, base, "scaled"),
          "", "the same after temperature scaling; the next row says how confidence as a whole still differs"),
    Claim("calibration improves", "below", lambda runs, base: miscalibration(runs),
          "calibration has been improved", "distance of mean confidence from accuracy",
          remark=lambda runs, base: "confidence - accuracy is {:+.1f} and {:+.1f} points, after temperature scaling "
          "{:+.1f} and {:+.1f}".format(*before_and_after(runs, base, "signed_gap", "signed_gap_scaled"))),
    Claim("less accuracy lost to corruption", "above", lambda runs, base: corruption_effect(runs, base),
          "slight boost to robustness",
          "accuracy under 12 x 5 corruptions minus clean accuracy; who is right less often has less to lose",
          needs="stress",
          remark=lambda runs, base: "corrupted accuracy is {:.1f} and {:.1f} %, clean {:.1f} and {:.1f} %, on all test "
          "images {:.1f} and {:.1f} %".format(*before_and_after(runs, base, "corrupted", "clean", "accuracy"))),
]  # fmt: skip
ABOUT_ONE = [  # for the baseline and for the changed recipe, side by side
    Claim("validation accuracy falls again", "below", each(lambda run: late_change(run, "val_acc")),
          "peaks early; performance degrades",
          "mean validation accuracy of the last quarter of the epochs minus that of the third quarter", needs="log"),
    Claim("validation loss rises again", "above", each(lambda run: late_change(run, "val_loss")),
          "mild overfitting", "mean validation loss of the last quarter of the epochs minus that of the third quarter",
          unit="nats", needs="log"),
    Claim("errors are mostly in the superclass", "above",
          each(lambda run: mean_among(run.raw.same_superclass, ~run.raw.correct)),
          "mostly made between the similar fine-grained categories",
          "share of the errors inside the superclass; mostly: above 50 %",
          reference=0.5, unit="%", needs="official",
          remark=lambda runs, base: f"by chance {100 * np.mean([chance_inside(run.confusion) for run in runs]):.1f} %"),
    Claim("small animals are below average", "below",
          each(lambda run: contrast(run.raw.correct, SMALL[run.labels], ~SMALL[run.labels])),
          "small animals are among the lowest performing", "accuracy of 15 small animals minus that of all others",
          needs="official", remark=lambda runs, base: worst_animals(runs)),
    Claim("failures rely more on the border", "above", each(lambda run: contrast(*run.attention)),
          "attention is often focused on the background",
          "share of confident failures that lose more confidence without their border than without their centre, "
          "minus that share of correct predictions of like confidence", needs="attention",
          remark=lambda runs, base: f"{sum(run.attention[1].sum() for run in runs):,} of "
          f"{sum(run.raw.failures.sum() for run in runs):,} failures measured"),
    Claim("confident failures are more often doubtful", "above",
          each(lambda run: contrast(DOUBTFUL, run.raw.failures, run.raw.sure_hits)),
          "highly confident errors on ambiguous images",
          "share of confident failures whose label fewer than 3 of 5 people uphold, minus that share of confident hits",
          needs="official", remark=lambda runs, base: "inflated: people looked where networks disagreed, not at hits"),
]  # fmt: skip


NEEDS = {
    "official": "the test images of CIFAR-100",
    "log": "log.csv with 4 epochs",
    "attention": "failures.py and gradcam.py on a run of each recipe",
    "stress": "--stress on a run of each recipe",
}


class Undecided(Exception):
    """Why a claim has no figure."""


def judge(claim, runs, baselines=None):
    """One row of the verdict: figure and interval of runs against baselines, or of runs alone."""
    row = {"claim": claim.text, "recipe": runs[0].name, "figure": None, "ci95": None, "word": "not decided"}
    row |= {"runs": {}, "note": ""}
    everyone = [baselines, runs] if baselines else [runs]
    recipes = [[run for run in recipe if not claim.needs or getattr(run, claim.needs)] for recipe in everyone]
    try:
        if not all(recipes):
            raise Undecided(f"needs {NEEDS[claim.needs]}")
        arms = [claim.values(recipe, recipes[0]) for recipe in recipes]
        figure, half = estimate(*arms)
        if not math.isfinite(figure):
            raise Undecided("undefined: no image or epoch that the claim is about")
        row["figure"], row["note"] = float(figure), claim.remark(recipes[-1], recipes[0])
        row["runs"] = {run.name: float(x.mean()) for recipe, arm in zip(recipes, arms) for run, x in zip(recipe, arm)}
        if half is not None:
            low, high = row["ci95"] = [float(figure - half), float(figure + half)]
            row["word"] = decide(low - claim.reference, high - claim.reference, claim.side)
            if claim.side == "within":
                row["note"] = "the interval excludes 0" if low > 0 or high < 0 else "the interval includes 0"
        if recipes != everyone:
            partly = f"of {sum(map(len, recipes))} of the {sum(map(len, everyone))} runs"
            row["note"] = "; ".join(filter(None, [row["note"], partly]))
    except Undecided as reason:
        row["note"] = str(reason)
    return row


def decide(low, high, side):
    """Does the interval of figure - reference lie inside the claimed range, outside of it, or neither?"""
    bottom, top = {"below": (-math.inf, 0), "above": (0, math.inf), "within": (-MARGIN, MARGIN)}[side]
    if bottom < low and high < top:
        return "supported"
    return "contradicted" if high < bottom or low > top else "not decided"


# ---- logits ---------------------------------------------------------------------------------------------

ARRAYS = ("test_logits.npy", "test_labels.npy", "val_logits.npy", "val_labels.npy")


def compute_logits(run_dir, config, args):
    """Run best.pt over the test and the validation images in float32; save logits and labels."""
    device = utils.select_device(args.device)
    model, checkpoint = utils.load_best(run_dir, device)
    dataset, data_dir = utils.dataset_of(config, args)
    images, labels = load_dataset(dataset, data_dir, train=True)
    _, val_index = split_train_val(labels, checkpoint["args"]["val_size"], checkpoint["args"]["seed"])
    if checkpoint.get("split") != split_id(val_index):
        reason = "this version of NumPy splits training and validation images differently"
        raise ScriptError(f"{run_dir}: {reason}; evaluate with the version in config.json")
    splits = {"val": (images[val_index], labels[val_index]), "test": load_dataset(dataset, data_dir, train=False)}
    where = f"epoch {checkpoint['epoch']}, on {utils.device_name(device)}"
    print(f"{utils.plain(run_dir)}: logits of best.pt, {where}", flush=True)
    for split, (images, labels) in splits.items():
        batches = utils.track(images.split(500), f"{split} batch")
        logits = utils.predict(model, (normalize(batch.to(device)) for batch in batches))
        utils.write_npy(run_dir / f"{split}_logits.npy", logits.cpu().numpy())
        utils.write_npy(run_dir / f"{split}_labels.npy", labels.numpy())
    # The scores come later; until then metrics.json says which best.pt these logits belong to.
    known = {"best.pt": checkpoint["sha256"]} | {name: utils.sha256(run_dir / name) for name in ARRAYS}
    utils.write_json(run_dir / "metrics.json", {"sha256": known})


def is_current(run_dir):
    """Do best.pt and the arrays have the checksums of metrics.json? A file that was not published may be missing."""
    try:
        known = utils.recorded_checksums(run_dir)
    except ScriptError:
        return False  # missing or damaged: computed again
    found = {name: utils.sha256(run_dir / name) for name in ("best.pt", *ARRAYS)}
    published = not (run_dir / "last.pt").exists() and found["test_logits.npy"]
    optional = ("best.pt", "val_logits.npy", "val_labels.npy") if published else ()
    return all(found[name] == known.get(name) or (name in optional and found[name] is None) for name in found)


# ---- one run: a value for each test image ---------------------------------------------------------------


class Scores:
    """What logits (N, 100) predict for N images: arrays (N,). Metrics are computed from these."""

    def __init__(self, logits, labels):
        log_probs, rows = log_softmax(logits), np.arange(len(labels))
        self.labels, self.probs = labels, np.exp(log_probs)
        true_logits = logits[rows, labels][:, None]
        ahead = (logits > true_logits) | ((logits == true_logits) & (np.arange(logits.shape[1]) < labels[:, None]))
        self.pred = logits.argmax(1)
        self.confidence = self.probs[rows, self.pred]  # largest softmax probability
        self.true_probability = self.probs[rows, labels]
        self.correct = self.pred == labels
        self.top5 = ahead.sum(1) < 5  # where logits tie, the lower label leads
        self.nll = -log_probs[rows, labels]  # in nats
        self.brier = (self.probs**2).sum(1) - 2 * self.true_probability + 1  # sum of (probability - target)^2
        self.same_superclass = SUPERCLASS_OF[self.pred] == SUPERCLASS_OF[labels]  # right, or an error inside it
        self.failures = ~self.correct & (self.confidence > CONFIDENT)  # the study's confident failures
        self.sure_hits = self.correct & (self.confidence > CONFIDENT)

    def means(self):
        """{metric: (N,)} of the metrics that are means over the images."""
        return {
            "accuracy": self.correct,
            "top5_accuracy": self.top5,
            "superclass_accuracy": self.same_superclass,
            "confident_errors": self.failures,
            "mean_confidence": self.confidence,
            "signed_gap": self.confidence - self.correct,  # above 0: more confident than right
            "nll": self.nll,
            "brier": self.brier,
        }

    def intervals(self):
        """{metric: [low, high]} of means(): 95 % for the choice of test images."""
        found = {}
        for name, values in self.means().items():
            half = 1.96 * values.std() / math.sqrt(len(values))
            found[name] = [values.mean() - half, values.mean() + half]
        return found | {"accuracy": list(utils.wilson_interval(self.correct.sum(), len(self.correct)))}

    def metrics(self):
        """{metric: float}, NaN where undefined, as without errors."""
        found = {name: values.mean() for name, values in self.means().items()}
        macro = utils.macro_scores(confusion_matrix(self.labels, self.pred, NUM_CLASSES))
        found["macro_precision"], found["macro_recall"], found["macro_f1"] = macro
        inside = self.same_superclass[~self.correct]
        found["errors_within_superclass"] = inside.mean() if len(inside) else math.nan
        found["ece"] = utils.calibration_error(self.confidence, self.correct)
        found["auroc_failure"] = auroc(self.confidence, self.correct)
        return {name: float(value) for name, value in found.items()}


def auroc(confidence, correct):
    """P(a correct image is more confident than a wrong one), ties half; NaN without errors or without hits."""
    hits, errors = np.sort(confidence[correct]), confidence[~correct]
    if len(hits) == 0 or len(errors) == 0:
        return math.nan
    not_above = (np.searchsorted(hits, errors, "left") + np.searchsorted(hits, errors, "right")) / 2
    return 1 - not_above.mean() / len(hits)


def fit_temperature(logits, labels):
    """The T in 0.01..100 that minimises the NLL of logits / T, Guo et al., arXiv:1706.04599; six digits.

    Fit it on images held out from training, and never on those that are scored. The NLL is convex in b = 1/T,
    so its slope, the mean of (sum_k p_k z_k) - z_y, changes sign once: bisection. Where it does not, as with no
    error at all, the nearer bound comes back.
    """
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(1, keepdims=True)  # so that exp() cannot overflow
    true_logits = logits[np.arange(len(labels)), labels]
    low, high = 0.01, 100.0
    for _ in range(25):  # ln(high / low) from 9.2 to 3e-7
        b = math.sqrt(low * high)
        p = np.exp(b * logits)
        slope = (np.einsum("nc,nc->n", p, logits) / p.sum(1) - true_logits).mean()
        low, high = (low, b) if slope > 0 else (b, high)
    return float(f"{1 / b:.6g}")


def trust(val, test):
    """When may one trust an answer? From Scores of the validation and of the test images.

    answers: the share of the test images above the confidence down to which 95 % of the validation images are
    right, and their accuracy. sets: all classes with p >= t, t such that 90 % of the validation images' sets hold
    the true class (split conformal, Sadinle et al., arXiv:1609.00451): the share of test images whose set holds it,
    the mean number of classes, and the share in the worst class, since the promise is only on average. NaN where
    undefined.
    """
    names, n = ("answers", "answers_accuracy", "set_coverage", "set_size", "set_worst_class"), len(val.labels)
    order = np.argsort(-val.confidence, kind="stable")
    right = np.cumsum(val.correct[order]) / np.arange(1, n + 1)
    last = np.diff(val.confidence[order], append=-1) != 0  # of equal confidences: a threshold admits all of them
    good = np.flatnonzero(last & (right >= 0.95))
    answered = test.confidence >= (val.confidence[order[good[-1]]] if len(good) else math.inf)
    accuracy = test.correct[answered].mean() if answered.any() else math.nan
    t = np.sort(val.true_probability)[n - math.ceil(0.9 * (n + 1))]  # the (n + 1 - ceil)-th smallest
    held, sizes = test.true_probability >= t, (test.probs >= t).sum(1)
    worst = min(held[test.labels == label].mean() for label in np.unique(test.labels))
    return dict(zip(names, (answered.mean(), accuracy, held.mean(), sizes.mean(), worst)))


class Run:
    """A trained run on the test images, as the rest of this file sees it."""

    def __init__(self, folder, config, name, logits, labels, temperature, trust):
        self.folder, self.config, self.name, self.labels = folder, config, name, labels
        self.dataset, self.seed = config["dataset"], config["args"].get("seed")
        self.class_names = class_names(self.dataset)
        self.title = f"{utils.plain(folder.resolve().name)}: {len(labels):,} test images of {TITLES[self.dataset]}"
        self.official = is_test_set(labels)  # then it is known which images are doubtful, and which have duplicates
        self.trust = trust  # of trust()
        self.raw, self.scaled = Scores(logits, labels), Scores(logits / temperature, labels)
        self.confusion = confusion_matrix(labels, self.raw.pred, NUM_CLASSES)
        self.values = self.raw.metrics()  # {metric: float}
        scaled = self.scaled.metrics()
        moved = ("confident_errors", "mean_confidence", "signed_gap", "nll", "brier", "ece", "auroc_failure")
        self.values |= {f"{name}_scaled": scaled[name] for name in moved} | {"temperature": temperature}
        if self.official:
            self.values["accuracy_without_duplicates"] = float(self.raw.correct[~DUPLICATES].mean())

    def table(self, name, made_by, columns, parse=list):
        """parse(rows) of a CSV file in the folder; [] without it. What is damaged or foreign is left out."""
        path, what, images = self.folder / name, "a table of this run", range(len(self.labels))
        if not path.exists():
            return []
        try:
            rows = utils.read_csv(path, made_by, what, columns)
            known = utils.checkpoint_id(self.folder) if "checkpoint" in columns else None
            with utils.reading(path, made_by, what):
                utils.require(all(row.get("checkpoint") == known for row in rows), "it belongs to another best.pt")
                utils.require(all(row.get("index", 0) in images for row in rows), "no such test image")
                return parse(rows)
        except ScriptError as error:
            warn(f"{error}; left out")
            return []

    @functools.cached_property
    def log(self):
        """{column: (epochs,)} of log.csv, or None."""
        columns = ("train_loss", "train_acc", "val_loss", "val_acc", "seconds")
        rows = self.table("log.csv", "python train.py", dict.fromkeys(columns, float))
        return {name: np.array([row[name] for row in rows]) for name in columns} if rows else None

    @functools.cached_property
    def occlusions(self):
        """The rows of attention.csv: what hiding the border, and the centre, costs failures and their matched hits."""
        columns = {"pair": int, "index": int, "group": str, "border_drop": float, "centre_drop": float}
        made_by = f"python gradcam.py {utils.quote(self.folder)}"
        return self.table("attention.csv", made_by, columns | {"checkpoint": str})

    @functools.cached_property
    def attention(self):
        """(border, failed, matched), (N,) bool: does hiding the border cost more? Is it a failure? A hit like one?

        None without attention.csv.
        """
        rows = self.occlusions
        if not rows:
            return None
        border, failed, matched = np.zeros((3, len(self.labels)), bool)
        sure = {row["pair"] for row in rows if row["group"] == "failure" and self.raw.failures[row["index"]]}
        for row in [row for row in rows if row["pair"] in sure]:  # failures.py may have listed less confident ones
            border[row["index"]] = row["border_drop"] > row["centre_drop"]
            (failed if row["group"] == "failure" else matched)[row["index"]] = True
        return border, failed, matched & self.raw.correct

    stress = functools.cached_property(lambda self: read_stress(self))  # a Stress, or None


def read_run(folder, config, name):
    """The Run of a directory that has logits. A published one may be without those of the validation images."""
    test = utils.load_logits(folder, "test")
    if (folder / "val_logits.npy").exists():
        val = utils.load_logits(folder, "val")
        return Run(folder, config, name, *test, fit_temperature(*val), trust(Scores(*val), Scores(*test)))
    path, made_by = folder / "metrics.json", f"python evaluate.py {utils.quote(folder)}"
    with utils.reading(path, made_by, "the scores of a run") as content:
        known = json.loads(content)
        utils.require(0 < known["temperature"] < math.inf, "no temperature")
        promises = {key: math.nan if value is None else float(value) for key, value in known["trust"].items()}
    return Run(folder, config, name, *test, known["temperature"], promises)


def ensemble(runs):
    """{metric: value} of the mean probability: a deep ensemble, Lakshminarayanan et al., arXiv:1612.01474."""
    mean = np.mean([run.raw.probs for run in runs], 0)
    correct = mean.argmax(1) == runs[0].labels
    return {"accuracy": correct.mean(), "ece": utils.calibration_error(mean.max(1), correct)}


# ---- the values of the claims ---------------------------------------------------------------------------


def mean_among(values, chosen):
    """(N,) values whose mean is the mean of `values` among the chosen images.

    Each is that mean plus what its image contributes to it (its influence), so estimate() can take it.
    """
    if chosen.sum() < FEWEST:
        raise Undecided(f"needs {FEWEST} such images in each run, one has {chosen.sum()}")
    mean = values[chosen].mean()
    return mean + chosen * (values - mean) / chosen.mean()


def contrast(values, chosen, others):
    """(N,) values whose mean is the mean of `values` among the chosen images minus that among others."""
    return mean_among(values, chosen) - mean_among(values, others)


def surest_half(run):
    """(N,) values whose mean is the error rate of the N/2 most confident images.

    An image's influence counts from the error rate at the edge, since another image takes its place there.
    """
    n, order = len(run.labels), np.argsort(-run.raw.confidence, kind="stable")
    wrong, half, around = ~run.raw.correct[order], n // 2, max(1, min(500, n // 20))
    rate, edge = wrong[:half].mean(), wrong[half - around : half + around].mean()
    sure = np.arange(n) < half
    values = np.empty(n)
    values[order] = rate + (sure * (wrong - edge) - (rate - edge) * half / n) * n / half
    return values


def on_failures(runs, baselines, kind):
    """(runs, N): confidence ("raw" or "scaled") on the confident failures of baselines, averaged over these sets.

    Failures picked for their confidence in one run look better in any other run (regression to the mean). So each
    run is read on the failures of baselines of other seeds.
    """
    found = []
    for run in runs:
        sets = [other.raw.failures for other in baselines if other.seed != run.seed]
        if not sets:
            raise Undecided("needs baselines of two seeds")
        found.append(np.mean([mean_among(getattr(run, kind).confidence, failures) for failures in sets], 0))
    return np.array(found)


def miscalibration(runs):
    """(runs, N) values whose mean is |mean confidence - accuracy| of the recipe."""
    gaps = np.array([run.raw.confidence - run.raw.correct for run in runs])
    return gaps * np.sign(gaps.mean())


def corruption_effect(runs, baselines):
    """(runs, n): on each image of the stress test, the share of corruptions under which it is right, minus clean."""
    if len({len(run.stress.correct[0]) for run in baselines + runs}) > 1:
        raise Undecided("needs --stress with the same --stress-images on all runs")
    return np.array([run.stress.correct[KINDS == "corruption"].mean(0) - run.stress.correct[0] for run in runs])


def late_change(run, column):
    """(1,): the mean of a column of log.csv over the last quarter of the epochs minus that over the third."""
    curve = run.log[column]
    if len(curve) < 4:
        raise Undecided(f"needs {NEEDS['log']}")
    quarter = len(curve) // 4
    return np.array([curve[-quarter:].mean() - curve[-2 * quarter : -quarter].mean()])


def chance_inside(confusion):
    """Share of errors inside the true superclass if the class predicted did not depend on the true one.

    confusion (C, C). Keeps how often each class is mistaken and how often it is wrongly predicted; a pair of
    equal classes is no error.
    """
    errors = confusion - np.diag(np.diag(confusion))
    independent = np.outer(errors.sum(1), errors.sum(0))
    np.fill_diagonal(independent, 0)
    inside = SUPERCLASS_OF[:, None] == SUPERCLASS_OF
    return float(independent[inside].sum() / independent.sum()) if independent.any() else math.nan


def before_and_after(runs, baselines, *metrics):
    """Of each metric: its mean over the baselines, and over the changed runs, in percent."""
    return [100 * np.mean([values_of(run)[key] for run in arm]) for key in metrics for arm in (baselines, runs)]


def confident_errors(runs, baselines):
    """Confident errors fall by construction if smoothing is new and its highest target is below 0.905."""
    before, a = (recipe[0].config["args"].get("smoothing") or 0 for recipe in (baselines, runs))
    target = 1 - a + a / NUM_CLASSES
    follows = before < a and target < CONFIDENT + 0.005
    why = f"by construction: smoothing {a:g} has no target above {target:.3f}; " if follows else ""
    scaled = before_and_after(runs, baselines, "confident_errors_scaled")
    return why + "after temperature scaling {:.2f} and {:.2f} %".format(*scaled)


def worst_animals(runs):
    worst = [np.argsort(np.diag(run.confusion), kind="stable")[:10] for run in runs]  # equally many images a class
    return f"{SMALL[worst].sum(1).mean():.1f} of the ten worst classes, by chance {len(SMALL_ANIMALS) / 10:g}"


# ---- stress ---------------------------------------------------------------------------------------------

GROUPS = {"noise": CORRUPTIONS[:3], "blur": CORRUPTIONS[3:6], "weather": CORRUPTIONS[6:8], "digital": CORRUPTIONS[8:]}
EPSILONS = (0.25, 1, 2, 8)  # bounds of the attack: largest change of a pixel, in 1/255
# (kind, name, strength): the rows of stress.csv and of the two arrays
CONDITIONS = [("clean", "", 0), *(("corruption", name, severity) for name in CORRUPTIONS for severity in range(1, 6))]
CONDITIONS += [("pgd", "", epsilon) for epsilon in EPSILONS]
KINDS, NAMES, STRENGTHS = map(np.array, zip(*CONDITIONS))  # (65,) each


# What a run makes of n of the test images under every condition: (65, n) bool and (65, n) float32
Stress = collections.namedtuple("Stress", "correct confidence")


def first_of_each_class(labels, count):
    """Indices, in order, of the first images of every class: `count` of them in all."""
    by_class = np.argsort(labels, kind="stable").reshape(NUM_CLASSES, -1)
    return np.sort(by_class[:, : count // NUM_CLASSES].ravel())


def measure_stress(run, args):
    """Measure a run's Stress on args.stress_images test images, and save it once it is complete."""
    images, labels = load_dataset(*utils.dataset_of(run.config, args), train=False)
    if not np.array_equal(labels.numpy(), run.labels):
        raise ScriptError(f"{run.folder} was scored on other images than those here; set --data-dir")
    index, device = first_of_each_class(run.labels, args.stress_images), utils.select_device(args.device)
    images, labels = images[index], labels[index]
    model, checkpoint = utils.load_best(run.folder, device)
    model.requires_grad_(False)
    dtype, _ = utils.select_precision("auto", device)
    autocast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype is not None)
    preds, confidence = [], []
    for kind, name, strength in utils.track(CONDITIONS, f"{run.name}: condition"):
        shown = corrupt(images, name, strength) if kind == "corruption" else images
        batches = []
        for batch, true in zip(shown.split(250), labels.split(250)):
            batch = batch.to(device)
            if kind == "pgd":
                batch = attack(model, batch, true.to(device), strength, autocast=autocast)
            batches.append(normalize(batch))
        with autocast():
            probs = utils.predict(model, batches).softmax(1)
        preds.append(probs.argmax(1).cpu().numpy().astype(np.uint8))
        confidence.append(probs.amax(1).cpu().numpy())
    preds = np.array(preds)
    run.stress = found = Stress(preds == labels.numpy(), np.array(confidence))
    columns = {"kind": KINDS, "name": NAMES, "strength": [strength for _, _, strength in CONDITIONS]}
    columns |= {"accuracy": found.correct.mean(1), "mean_confidence": found.confidence.mean(1)}
    common = {"images": len(labels), "checkpoint": checkpoint["sha256"]}
    rows = [dict(zip(columns, values)) | common for values in zip(*columns.values())]
    utils.write_npy(run.folder / "stress_preds.npy", preds)
    utils.write_npy(run.folder / "stress_confidence.npy", found.confidence)
    utils.write_csv(run.folder / "stress.csv", rows)


def read_stress(run):
    """The Stress that was saved for this best.pt, or None."""
    made_by = f"python evaluate.py {utils.quote(run.folder)} --stress"

    def parse(rows):
        utils.require(len(rows) == len(CONDITIONS), f"{len(rows)} conditions instead of {len(CONDITIONS)}")
        labels = run.labels[first_of_each_class(run.labels, rows[0]["images"])]
        shape, what = (len(CONDITIONS), len(labels)), "stress results"
        preds = utils.read_npy(run.folder / "stress_preds.npy", made_by, what, shape, "u")
        confidence = utils.read_npy(run.folder / "stress_confidence.npy", made_by, what, shape, "f")
        correct = preds == labels
        same = np.allclose([row["accuracy"] for row in rows], correct.mean(1), atol=1e-5)
        utils.require(same, "it does not fit stress_preds.npy")
        return Stress(correct, confidence)

    return run.table("stress.csv", made_by, {"images": int, "accuracy": float, "checkpoint": str}, parse) or None


# ---- tables ---------------------------------------------------------------------------------------------

# The tables of scores: {column: (metric, what it is)}
CLASSIFICATION = {
    "no dup.": ("accuracy_without_duplicates", "accuracy without 891 images with a near-duplicate in the training set"),
    "precision": ("macro_precision", "mean over the 100 classes (macro)"),
    "recall": ("macro_recall", "mean over the classes"),
    "F1": ("macro_f1", "mean over the classes"),
    "top-5": ("top5_accuracy", "the true class is among the five most likely"),
    "superclass": ("superclass_accuracy", "the predicted class is in the right superclass"),
    "conf.err": ("confident_errors", "wrong with a confidence (largest probability) above 0.90, of all images"),
}
CALIBRATION = {
    "NLL": ("nll", "negative log probability of the true class, in nats"),
    "Brier": ("brier", "squared distance of the probabilities from the truth, 0 to 2"),
    "gap": ("signed_gap", "mean confidence minus accuracy, above 0 if over-confident"),
    "ECE": ("ece", "expected calibration error, in 15 bins of confidence"),
    "AUROC": ("auroc_failure", "how often a correct image is more confident than a wrong one; 50 by chance"),
    "T": ("temperature", "logits divided by it have the lowest NLL on validation images; above 1 if over-confident"),
    "NLL/T": ("nll_scaled", "NLL of the logits divided by T"),
    "ECE/T": ("ece_scaled", "ECE of these"),
}
FAILURES = {
    "failures (images)": ("failures", "confident failures: wrong with a confidence above 0.90"),
    "doubtful (images)": ("doubtful", "of these, how many have a label that fewer than three of five people uphold; "
                          "a lower bound, since people looked only where a network disagreed (arXiv:2103.14749)"),
}  # fmt: skip
STRESS = {
    "clean": ("clean", "accuracy on these images without corruption"),
    "confidence": ("clean_confidence", "mean confidence there"),
    "corrupted": ("corrupted", "accuracy under 12 corruptions in 5 severities, then by their kind"),
    "conf. corr.": ("corrupted_confidence", "mean confidence under corruption"),
    **{group: (group, ", ".join(names).replace("_", " ")) for group, names in GROUPS.items()},
    "PGD": ("pgd", "accuracy under an attack that changes pixels by up to 1/255, in 10 steps"),
}
TRUST = {
    "ECE": CALIBRATION["ECE"],
    "answers": ("answers", "share of images above the confidence at which 95 of 100 validation answers are right"),
    "right": ("answers_accuracy", "accuracy of these answers"),
    "sets hold": ("set_coverage", "how often the true class is in the set of likely classes; the aim is 90 %"),
    "set size (classes)": ("set_size", "classes in such a set, on average"),
    "worst class": ("set_worst_class", "how often in the worst class, about 82 if the promise held for each class"),
}
BRIEF = {name: (CLASSIFICATION | CALIBRATION)[name] for name in ("no dup.", "F1", "top-5", "conf.err", "ECE", "T")}
DECIMALS = {"nll": 3, "brier": 3, "temperature": 3, "nll_scaled": 3, "set_size": 2, "failures": 0, "doubtful": 0}


def cell(value, digits=2, unit=100):
    """A fraction in percent, [low, high] as an interval, or a dash where there is nothing."""
    if isinstance(value, list):
        return f"[{', '.join(cell(end, digits, unit) for end in value)}]"
    if value is None or math.isnan(value):
        return "-"
    return f"{round(float(unit * value), digits) + 0.0:.{digits}f}"  # + 0.0: never -0.00


def values_of(run):
    """{metric: value} of all that the tables show of a run."""
    found = run.values | run.trust | {"failures": run.raw.failures.sum()}
    if run.official:
        found["doubtful"] = (run.raw.failures & DOUBTFUL).sum()
    if run.stress:
        (correct, confidence), corrupted = run.stress, KINDS == "corruption"
        found |= {"clean": correct[0].mean(), "clean_confidence": float(confidence[0].mean())}
        found |= {"corrupted": correct[corrupted].mean(), "corrupted_confidence": float(confidence[corrupted].mean())}
        found |= {group: correct[np.isin(NAMES, names)].mean() for group, names in GROUPS.items()}
        found["pgd"] = correct[(KINDS == "pgd") & (STRENGTHS == 1)].mean()
    return found


def score_lines(arms):
    """[(name, {metric: value}, interval of the accuracy)]: of each run, and of the runs of a recipe together."""
    found = []
    for arm in arms:
        of_runs = [values_of(run) for run in arm]
        for run, values in zip(arm, of_runs):
            found.append((run.name, values, f" {cell(run.raw.intervals()['accuracy'], 1)}"))
        if len(arm) > 1:
            together = {key: [values.get(key, math.nan) for values in of_runs] for key in of_runs[0]}
            found.append((f"  mean of {len(arm)}", {key: np.mean(values) for key, values in together.items()}, ""))
            found.append(("  deviation", {key: np.std(values, ddof=1) for key, values in together.items()}, ""))
            found.append((f"  ensemble of {len(arm)}", ensemble(arm), ""))
    return found


def score_rows(lines, columns):
    """Rows of text: name, accuracy with its interval, and these columns. Lines with none of them are left out."""
    rows, keys = [], [metric for metric, _ in columns.values()]
    for name, values, interval in lines:
        cells = [cell(values.get(key), *((DECIMALS[key], 1) if key in DECIMALS else ())) for key in keys]
        if set(cells) != {"-"}:
            rows.append([name, cell(values["accuracy"]) + interval, *cells])
    return rows


def figure_cell(claim, row):
    """-0.87 [-1.60, -0.13] points."""
    if row["figure"] is None:
        return "no figure"
    style = (3, 1) if claim.unit == "nats" else (2, 100)
    interval = f" {cell(row['ci95'], *style)}" if row["ci95"] else ""
    return f"{cell(row['figure'], *style)}{interval} {claim.unit}"


def print_table(header, rows):
    """Rows of text under a header. The first column names the row, on a line of its own where there is no room."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    widths[0] = min(widths[0], max(0, 80 - sum(widths[1:]) - len(widths)))
    for name, *cells in [header, *rows]:
        if len(name) > widths[0]:
            print(name)
            name = ""
        print(" ".join([name.ljust(widths[0]), *(text.rjust(width) for text, width in zip(cells, widths[1:]))]))


def print_scores(runs, arms):
    alone = [[run] for run in runs if not any(run in arm for arm in arms)]
    print(f"{len(runs[0].labels):,} test images of {TITLES[runs[0].dataset]}")
    print_table(["in %", "accuracy [95 %]", *BRIEF], score_rows(score_lines(arms + alone), BRIEF))
    print("no dup.: without 891 images that have a near-duplicate in the training set.")
    print("F1: macro. conf.err: wrong with a confidence above 0.90, of all images. ECE:")
    print("calibration error. T: temperature of the validation images; above 1 if")
    print("over-confident.")


def print_verdict(study):
    """A sentence for each row of the verdict. Of one recipe only what is decided."""
    alone = len(study.arms) == 1
    rows = [(claim, row) for claim, row in study.rows if not alone or row["word"] != "not decided"]
    if rows:
        print("\n" + textwrap.fill(study.heading, 79))
    for claim, row in rows:
        note = f"; {row['note']}" if row["note"] else ""
        text = f"{row['word']:<13} {study.title(claim, row)}: {figure_cell(claim, row)}{note}"
        print(textwrap.fill(text, 79, subsequent_indent=" " * 14, break_on_hyphens=False))


# ---- pictures: each function returns its figure ---------------------------------------------------------

COLORS = (utils.BLUE, utils.VERMILION)  # of the baselines and of the changed runs


def draw_confusion(run):
    figure, axes = utils.new_figure(10, 9.4, title=f"{run.title}: confusion matrix")
    order = np.argsort(SUPERCLASS_OF, kind="stable")
    shown = run.confusion[np.ix_(order, order)].astype(float)
    shown[shown == 0] = np.nan
    picture = axes.imshow(shown, cmap="viridis", norm="log", vmin=1, vmax=100)
    ticks = [1, 2, 5, 10, 20, 50, 100]
    figure.colorbar(picture, ax=axes, label="test images (logarithmic)", shrink=0.6, format="%d", ticks=ticks)
    real = run.dataset == "cifar100"  # the synthetic set has no superclasses with names
    families = [name.replace("_", " ") if real else f"group {k}" for k, name in enumerate(SUPERCLASSES)]
    axes.set_xticks(np.arange(2, 100, 5), families, rotation=90, fontsize=9)
    axes.set_yticks(np.arange(2, 100, 5), families, fontsize=9)
    for edge in range(0, NUM_CLASSES, 5):  # a frame around the five classes of each superclass
        left, right = edge - 0.5, edge + 4.5
        axes.plot([left, right, right, left, left], [left, left, right, right, left], color="black", linewidth=0.8)
    axes.set(xlabel="predicted class", ylabel="true class", title="by superclass; frames: errors inside a superclass")
    return figure


def draw_per_class(run):
    """The ten worst and the ten best classes; per_class.csv has all."""
    rows = sorted(per_class_rows(run), key=lambda row: row["accuracy"])
    rows = rows[:10] + rows[-10:]
    figure, axes = utils.new_figure(10, 5.5, title=f"{run.title}: the ten worst and the ten best classes")
    accuracy, low, high = (100 * np.array([row[key] for row in rows]) for key in ("accuracy", "low", "high"))
    places = [*range(10), *range(11, 21)]
    axes.errorbar(accuracy, places, xerr=[accuracy - low, high - accuracy], fmt="o", ecolor=utils.GRAY)
    mean = 100 * run.values["accuracy"]
    axes.axvline(mean, color=utils.VERMILION, linestyle="--", label=f"all 100 classes: {mean:.1f} %")
    axes.set_yticks(places, [row["class"] for row in rows])
    axes.set(xlabel="accuracy on the class's images (%), with 95 % interval", xlim=(0, 100))
    axes.legend(loc="lower right")
    return figure


def draw_reliability(run):
    """Accuracy against confidence in 15 bins, above the images in each; as trained and temperature-scaled."""
    options = {"sharex": True, "sharey": "row", "height_ratios": [3, 1]}
    figure, axes = utils.new_figure(10, 6.5, 2, 2, f"{run.title}: is confidence accuracy?", **options)
    panels = (run.raw, "as trained"), (run.scaled, f"temperature {run.values['temperature']:.3f}")
    centers = (np.arange(15) + 0.5) * 100 / 15
    for (top, bottom), (scores, label) in zip(axes.T, panels):
        bins = calibration_bins(scores.confidence)
        count = np.bincount(bins, minlength=15)
        accuracy = 100 * np.bincount(bins, scores.correct, 15) / np.maximum(count, 1)
        top.bar(centers, accuracy, 100 / 15, color=utils.BLUE, edgecolor="white", label="accuracy in the bin")
        top.plot([0, 100], [0, 100], "--", color=utils.VERMILION, label="perfectly calibrated")
        ece = 100 * utils.calibration_error(scores.confidence, scores.correct)
        top.set(title=f"{label}: calibration error {ece:.2f} %", xlim=(0, 100), ylim=(0, 100))
        bottom.bar(centers, count, 100 / 15, color=utils.GRAY, edgecolor="white")
        bottom.set(xlabel="confidence (%)")
    axes[0, 0].set(ylabel="accuracy (%)")
    axes[1, 0].set(ylabel="test images")
    axes[0, 0].legend(loc="upper left")
    return figure


def draw_training(study):
    """Training and validation curves of every run, in the colour of its recipe; the best epochs are marked."""
    figure, panels = utils.new_figure(10, 4.5, 1, 2, f"Training on {TITLES[study.dataset]}")
    for axes, key, scale in (panels[0], "loss", 1), (panels[1], "acc", 100):
        for arm, color in zip(study.arms, COLORS):
            args = utils.recipe(arm[0].config)
            how = ", smoothed" if key == "loss" and args.get("smoothing") else ""
            how += ", mixed images" if args["mixup"] or args["cutmix"] else ""
            axes.plot([], [], ":", color=color, label=f"{arm[0].name}: training{how}")
            axes.plot([], [], "-", color=color, label=f"{arm[0].name}: validation")
            for log in [run.log for run in arm if run.log]:
                epochs, best = np.arange(1, len(log["val_acc"]) + 1), log["val_acc"].argmax()
                axes.plot(epochs, scale * log[f"train_{key}"], ":", color=color, linewidth=1)
                axes.plot(epochs, scale * log[f"val_{key}"], "-o", color=color, linewidth=1, markevery=[best])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    panels[0].set(xlabel="epoch", ylabel="cross-entropy (nats)", ylim=(0, math.log(NUM_CLASSES)))
    panels[1].set(xlabel="epoch", ylabel="accuracy (%); dots: best epoch", ylim=(0, 100))
    return figure


def draw_verdict(study):
    """A line per row of the verdict, each on a scale of its own, with the runs as dots and the interval."""
    rows = [(claim, row) for claim, row in study.rows if row["figure"] is not None]
    title = f"{study.last.name}: does what the study says hold?"
    figure, axes = utils.new_figure(10, 1.5 + 0.4 * len(rows), title=title)
    baselines, names = {run.name for run in study.arms[0]}, []
    for y, (claim, row) in enumerate(rows):
        sign, margin = -1 if claim.side == "below" else 1, MARGIN if claim.side == "within" else 0
        of_baselines = [value for name, value in row["runs"].items() if name in baselines]
        zero = np.mean(of_baselines) if claim in COMPARISONS else claim.reference
        dots = sign * (np.array([*row["runs"].values()]) - zero)
        ends = sign * (np.array(row["ci95"] or [row["figure"]]) - claim.reference)
        scale = max(1e-9, margin, *abs(ends), *abs(dots))
        claimed = (-margin / scale, margin / scale) if margin else (0, 1.1)
        axes.fill_betweenx([y - 0.4, y + 0.4], *claimed, color="black", alpha=0.06, linewidth=0)
        axes.plot([0, 0], [y - 0.4, y + 0.4], color="black", linewidth=0.8)
        axes.plot(ends / scale, np.full(len(ends), y), "-|", color="black", linewidth=1.5)
        for run, place in zip(row["runs"], dots / scale):
            height, color = (-0.2, COLORS[0]) if run in baselines else (0.2, COLORS[1])
            axes.plot(place, y + height, "o", color=color, markersize=4)
        axes.text(1.25, y, f"{figure_cell(claim, row)}: {row['word']}", fontsize=9, verticalalignment="center")
        names.append(study.title(claim, row))
    for arm, color in zip(study.arms, COLORS):
        axes.plot([], [], "o", color=color, markersize=4, label=f"runs of {arm[0].name}")
    axes.set(xlim=(-1.2, 1.2), ylim=(max(len(rows), 1) - 0.5, -0.5), xticks=[])
    axes.set_xlabel("line: 95 % interval; shaded: as claimed (a claimed fall points right); each row has its own scale")
    axes.set_yticks(range(len(rows)), names, fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return figure


def draw_stress(study):
    """Accuracy by corruption, accuracy and confidence against severity, accuracy under attack: means over the runs."""
    images = study.first.stress.correct.shape[1]
    title = f"{TITLES[study.dataset]} under stress: {images:,} test images, means over the runs"
    figure, (left, middle, right) = utils.new_figure(10, 5.2, 1, 3, title)
    names = sorted(CORRUPTIONS, key=lambda name: study.first.stress.correct[NAMES == name].mean())
    for arm, color in zip(study.arms, COLORS):
        # (65,) each, in percent: means over the runs and images
        accuracy = 100 * np.mean([run.stress.correct.mean(1) for run in arm], 0)
        confidence = 100 * np.mean([run.stress.confidence.mean(1) for run in arm], 0)
        left.plot([accuracy[NAMES == name].mean() for name in names], range(len(names)), "o", color=color)
        for values, style, what in (accuracy, "-o", "accuracy"), (confidence, "--", "confidence"):
            curve = [values[(KINDS != "pgd") & (STRENGTHS == severity)].mean() for severity in range(6)]
            middle.plot(curve, style, color=color, markersize=4, label=f"{arm[0].name}: {what}")
        right.plot(EPSILONS, accuracy[KINDS == "pgd"], "-o", color=color, markersize=4)
    left.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    left.set(xlabel="accuracy (%), mean of severities", xlim=(0, 100))
    middle.set(xlabel="severity (0: clean images)", ylabel="mean over the corruptions (%)", ylim=(0, 100))
    right.set(xlabel="PGD: largest change\nof a pixel, in 1/255", ylabel="accuracy (%)", ylim=(0, 100), xscale="log")
    right.set_xticks(EPSILONS, [f"{epsilon:g}" for epsilon in EPSILONS])
    right.minorticks_off()
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.legend(*middle.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    return figure


# ---- files of a run -------------------------------------------------------------------------------------


def per_class_rows(run):
    """One dict per class, in label order: what per_class.csv holds. The accuracy on a class's images is its recall."""
    hits, images, predicted = np.diag(run.confusion), run.confusion.sum(1), run.confusion.sum(0)
    errors, names = run.confusion - np.diag(hits), np.array(run.class_names)
    low, high = utils.wilson_interval(hits, np.maximum(images, 1))
    columns = {"label": range(NUM_CLASSES), "class": names, "superclass": np.array(list(SUPERCLASSES))[SUPERCLASS_OF]}
    columns |= {"images": images, "accuracy": hits / np.maximum(images, 1), "low": low, "high": high}
    columns |= {"precision": hits / np.maximum(predicted, 1), "f1": 2 * hits / np.maximum(images + predicted, 1)}
    columns |= {"mostly_taken_for": np.where(errors.any(1), names[errors.argmax(1)], ""), "times": errors.max(1)}
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def write_run(run):
    """metrics.json, confusion.npy, per_class.csv and the pictures of a run."""
    folder = run.folder
    if not (folder / "val_logits.npy").exists():
        return  # published without: metrics.json has what cannot be computed from what is here
    content = {"images": len(run.labels)} | run.values | {"trust": run.trust, "ci95": run.raw.intervals()}
    known = utils.recorded_checksums(folder) if (folder / "metrics.json").exists() else {}
    content["sha256"] = {name: utils.sha256(folder / name) for name in ARRAYS} | known
    utils.write_npy(folder / "confusion.npy", run.confusion)
    utils.write_csv(folder / "per_class.csv", per_class_rows(run))
    pictures = {"confusion.png": draw_confusion, "per_class.png": draw_per_class, "reliability.png": draw_reliability}
    publish(folder / "metrics.json", content, pictures, run)


def publish(path, content, pictures, subject):
    """Write a JSON file and, beside it, the pictures {name: function of subject} that are missing.

    If the content is new, all of them are drawn, and before it is written: after a kill they are drawn again.
    """
    try:
        same = json.loads(path.read_bytes()) == utils.rounded(content)
    except (OSError, ValueError):
        same = False
    for name, draw in pictures.items():
        if not (same and (path.parent / name).exists()):
            utils.save_figure(path.parent / name, draw, subject)
    utils.write_json(path, content)


# ---- the report -----------------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
STUDY = {"smoothing": 0.1, "epochs": 40, "lr": 0.01, "width": 64, "model": "resnet18", "mixup": 0.0, "cutmix": 0.0}
PUBLISHED = {"accuracy": 0.6596, "macro_precision": 0.6611, "macro_recall": 0.6596, "macro_f1": 0.6588}  # by the study


class Study:
    """One recipe or two, [baselines] or [baselines, changed], on the same images."""

    def __init__(self, arms):
        self.arms, self.runs, self.recipes = arms, sum(arms, []), [arm[0].name for arm in arms]
        self.first, self.last = arms[0][0], arms[-1][0]
        self.dataset, self.folder = self.first.dataset, self.last.folder
        self.confusions = [np.mean([run.confusion for run in arm], 0) for arm in arms]
        self.stress_images = {run.stress.correct.shape[1] if run.stress else 0 for run in self.runs}  # 0: not measured
        before, after = utils.recipe(self.first.config), utils.recipe(self.last.config)
        differing = [key for key in before | after if before.get(key) != after.get(key)]
        changes = [f"{key} {after.get(key)} (was {before.get(key)})" for key in differing]
        seeds = " against ".join(", ".join(str(run.seed) for run in arm) for arm in arms)
        what = f"What changes with {', '.join(changes)}" if len(arms) > 1 else f"{self.first.name} alone"
        self.heading = utils.plain(f"{what}; seeds {seeds}")
        self.rows = [(claim, judge(claim, changed, arms[0])) for claim in COMPARISONS for changed in arms[1:]]
        self.rows += [(claim, judge(claim, arm)) for claim in ABOUT_ONE for arm in arms]

    def title(self, claim, row):
        """The claim and, where there are two recipes, which of them a row is about."""
        if claim in COMPARISONS or len(self.arms) == 1:
            return claim.text
        return f"{claim.text} ({'baseline' if row['recipe'] == self.first.name else 'changed'})"

    def results(self, claim):
        """The rows on a claim as text: one on the change, or one for each recipe."""
        rows = [row for other, row in self.rows if other is claim]
        notes = [f"; {row['note']}" if row["note"] else "" for row in rows]
        return [f"{figure_cell(claim, row)} (**{row['word']}**{note})" for row, note in zip(rows, notes)]

    def levels(self, claim):
        """Of a comparison: the mean of each recipe, before and after the change."""
        if claim in ABOUT_ONE:
            return []
        [values] = [row["runs"] for other, row in self.rows if other is claim]
        means = [[values[run.name] for run in arm if run.name in values] for arm in self.arms]
        return [cell(np.mean(part)) if part else "-" for part in means]

    def command(self, script, *runs):
        """A command as typed in the folder of the scripts. What follows the first run is compared with it."""
        places = [run.folder.resolve() for run in runs]
        places = [utils.quote(path.relative_to(HERE) if path.is_relative_to(HERE) else path) for path in places]
        compare = ["--compare"] if len(runs) > 1 and script != "evaluate" else []
        return " ".join([f"python {script}.py", *places[:1], *compare, *places[1:]])

    def picture(self, run, name, command, current=True):
        """A picture in a run's folder, linked relatively, or the command that makes it."""
        path = run.folder / name
        if not (path.exists() and current):
            weights = "" if name == "failures.png" or (run.folder / "best.pt").exists() else ", with its best.pt"
            return f"*Missing: {name} of {run.name}. To make it{weights}:* `{command}`"
        target = Path(os.path.relpath(path.resolve(), self.folder.resolve())).as_posix()
        return f"![{path.stem} of {run.name}]({urllib.parse.quote(target)})"


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(text).replace("|", "\\|") for text in cells) + " |" for cells in lines)


def setup_table(study):
    rows = []
    for run in study.runs:
        epochs, config = ["-"] * 4, run.config
        if run.log:
            curve, hours = run.log["val_acc"], run.log["seconds"].sum() / 3600
            last = f"{cell(run.log['train_acc'][-1])} / {cell(curve[-1])}"
            epochs = [f"{curve.argmax() + 1} of {len(curve)}", cell(curve.max()), last, f"{hours:.1f}"]
        machine = "{}, {}, threads: {}, torch {}".format(*map(config.get, ("device", "precision", "threads", "torch")))
        row = [run.name, f"`{config.get('command', '-')}`", run.seed, *epochs, machine]
        rows.append([utils.plain(text) for text in row])
    header = ["run", "command", "seed", "best epoch", "its validation accuracy (%)"]
    return markdown([*header, "last epoch: training / validation (%)", "hours", "machine"], rows)


def settings(study):
    """What train.py did, in words: once, or for each recipe where this differs."""
    found = []
    for run in (study.first, study.last):
        args, config = utils.recipe(run.config), run.config
        optimizer = "AdamW, beta1" if args["model"] == "cct" else "SGD with Nesterov momentum"
        warmup = str(args.get("warmup_epochs")).removesuffix(".0")
        found.append(
            f"{config.get('parameters')} parameters, trained from scratch on random crops and flips of "
            f"{config.get('train_images')} images by {optimizer} {args.get('momentum')}, weight decay "
            f"{args.get('weight_decay')}, batch {args.get('batch_size')}; learning rate up to {args.get('lr')} in "
            f"{warmup} epochs, then down along a cosine. The weights of the epoch with the best "
            f"accuracy on {args.get('val_size')} other training images are kept. Test images were not used."
        )
    first, last = map(utils.plain, found)
    both = f"Each run of {study.first.name}: {first}\n\nEach run of {study.last.name}: {last}"
    return f"Each run: {first}" if first == last else both


def findings(study, text):
    """What became of the claims about one recipe whose text begins so, a sentence for each."""
    lines = []
    for claim in [claim for claim in ABOUT_ONE if claim.text.startswith(text)]:
        found = [f"{name} {result}" for name, result in zip(study.recipes, study.results(claim))]
        lines.append(f"- The study says \"{claim.study}\". We measure the {claim.meaning}: {', '.join(found)}.")
    return "\n".join(lines)


def fates(study, listed, made_by):
    """Paragraphs: what the runs predict on the mistakes that are listed, rows of failures.csv of the first run."""
    first, outcomes, examples = study.first, [], []
    if not listed:
        return [f"*No failures are listed for {first.name}. To list some, if need be by --threshold 0.5:* `{made_by}`"]
    index = [row["index"] for row in listed]
    drops = {row["index"]: (row["border_drop"], row["centre_drop"]) for row in first.occlusions}
    lost = {i: f"{round(100 * border)} / {round(100 * centre)}" for i, (border, centre) in drops.items()}
    for run in study.runs:
        same = (run.raw.pred == first.raw.pred)[index].sum()
        repaired = run.raw.correct[index].sum()
        counts = (repaired, same, len(index) - repaired - same)
        shares = [f"{count} of {len(index)} ({100 * count / len(index):.0f} %)" for count in counts]
        role = "these mistakes" if run is first else "control: another seed" if run in study.arms[0] else "changed"
        outcomes.append([run.name, role, *shares, cell(run.raw.confidence[index].mean(), 1)])
    for i in [row["index"] for row in listed if row["representative"]]:
        people = "-" if votes(i) is None or not first.official else f"{votes(i)} of 5"
        preds = [f"{run.class_names[run.raw.pred[i]]} {100 * run.raw.confidence[i]:.0f} %" for run in study.runs]
        examples.append([i, first.class_names[first.labels[i]], people, *preds, lost.get(i, "-")])
    counted = ["run", "", "repaired", "same wrong class", "another wrong class", "mean confidence (%)"]
    header = ["test image", "label", "people who agree (-: not asked)", *(run.name for run in study.runs)]
    header.append(f"{first.name}: points lost without border / centre")
    compared = [
        f"What the runs predict on the mistakes of {first.name} that its failures.csv lists:",
        markdown(counted, outcomes),
        "Mistakes that were picked for their confidence in one run look better in any other run. A control shows by "
        "how much. Compare it with changed runs of other seeds than these mistakes: equal seeds can make runs alike.",
    ]
    return [
        *(compared if len(study.runs) > 1 else []),
        "Examples, evenly spread over the ranks of confidence, at most one per pair of classes:",
        markdown(header, examples),
        study.picture(first, "failures.png", made_by),
    ]


def verdict_table(study, claims, columns):
    rows = []
    for claim in claims:
        said = f"\"{claim.study}\"" if claim.study else ""
        rows.append([said, claim.text, claim.meaning, *study.levels(claim), *study.results(claim)])
    return markdown(["the study says", "tested as", "the figure is", *columns], rows)


def superclass_table(study):
    rows = []
    for k, superclass in enumerate(SUPERCLASSES):
        inside, row = SUPERCLASS_OF == k, [superclass.replace("_", " ")]
        for confusion in study.confusions:
            hits, images = np.diag(confusion)[inside].sum(), confusion[inside].sum()
            stay = confusion[np.ix_(inside, inside)].sum() - hits
            row += [cell(hits / images, 1), cell(stay / max(images - hits, 1e-9), 0)]
        rows.append(row)
    columns = [f"{name}: {what}" for name in study.recipes for what in ("accuracy (%)", "errors inside (%)")]
    return markdown(["superclass", *columns], rows)


def pairs_table(study):
    """The ten pairs of classes most often taken for each other by the first recipe."""
    names, errors = study.first.class_names, [confusion + confusion.T for confusion in study.confusions]
    order = np.argsort(-np.triu(errors[0], 1), axis=None, kind="stable")[:10]
    pairs = zip(*np.unravel_index(order, errors[0].shape))
    rows = [[f"{names[i]} / {names[j]}", *(f"{both[i, j]:.1f}" for both in errors)] for i, j in pairs]
    return markdown(["pair", *study.recipes], rows)


def classes_table(study):
    values = [np.diag(confusion) / np.maximum(confusion.sum(1), 1) for confusion in study.confusions]
    columns, order = [f"{name} (%)" for name in study.recipes], np.argsort(values[0], kind="stable")
    groups, rows = {"worst": order[:10], "best": order[:-11:-1]}, []
    if len(values) > 1:
        columns, values = [*columns, "change"], [*values, values[1] - values[0]]
        groups["largest changes"] = np.argsort(-np.abs(values[2]), kind="stable")[:10]
    for group, labels in groups.items():
        rows += [[group, study.first.class_names[k], *(cell(found[k], 1) for found in values)] for k in labels]
    return markdown(["", "class", *columns], rows)


def report(study):
    """The text of report.md: the study's sections, in its order, from the runs at hand."""
    first, last, arms = study.first, study.last, study.arms
    synthetic = " (SYNTHETIC data)" if study.dataset == "synthetic" else ""
    networks = " and ".join(dict.fromkeys(MODELS[utils.recipe(arm[0].config)["model"]] for arm in arms))
    others, control = [arm[0] for arm in arms[1:]], arms[0][1:2]
    seeds = " and ".join(f"{len(arm)} of {arm[0].name}" for arm in arms)
    sizes, unequal = {len(arm) for arm in arms}, ""
    if len(sizes) > 1 and min(sizes) > 1:
        unequal = f" Here there are {seeds}: unless that was fixed beforehand, the intervals are too short."

    find, explain = study.command("failures", first, *others, *control), study.command("gradcam", first, *others)
    columns = {"index": int, "representative": int, "confidence": float, "checkpoint": str}
    listed = first.table("failures.csv", find, columns)
    lowest = min([row["confidence"] for row in listed], default=1)
    find += f" --threshold {math.floor(100 * lowest) / 100:g}" if lowest <= CONFIDENT else ""
    evaluate = study.command("evaluate", *study.runs)
    measure = f"{evaluate} --stress"
    commands = [run.config["command"] for run in study.runs if "command" in run.config] + [measure, find, explain]
    commands += [study.command(script, run) for run in study.runs[1:] for script in ("failures", "gradcam")]
    commands = "\n".join(map(utils.plain, [*commands, evaluate]))
    if study.folder.resolve().is_relative_to(HERE / "results"):
        commands = commands.replace(" results/", " runs/")  # where train.py writes what was published there

    shares = [100 * np.mean([run.trust["answers"] for run in arm]) for arm in arms]
    answers = ", ".join(f"{name} {share:.0f} %" for name, share in zip(study.recipes, shares))
    count = " or ".join(f"{number:,}" for number in sorted(study.stress_images - {0}))

    scores = score_lines(arms)
    if not synthetic and any(STUDY.items() <= utils.recipe(arm[0].config).items() for arm in arms):
        scores.insert(0, ("the study (smoothing 0.1)", PUBLISHED, ""))

    def table(columns):
        """A line for each column, then the table."""
        rows = score_rows(scores, columns)
        explained = "\n".join(f"- {column}: {meaning}." for column, (_, meaning) in columns.items())
        return [explained, markdown(["in %", "accuracy [95 %]", *columns], rows)] if rows else []

    paragraphs = [
        f"# {networks} on {TITLES[study.dataset]}: {' and '.join(study.recipes)}",
        f"## 1. Setup{synthetic}",
        f"**{study.heading}.**",
        settings(study),
        setup_table(study),
        "The study is \"Stress-testing of convolutional neural networks on CIFAR-100\", "
        "https://github.com/gautamkushwaha/DL_Team_Assignment_1. It trained one ResNet-18, with label smoothing 0.1. "
        "To another change its sentences are only questions.",
        f"## 2. Training{synthetic}",
        study.picture(last, "training.png", evaluate),
        "Training figures are of augmented images. Where a recipe smooths or mixes, the loss is that of such targets "
        "and the accuracy that of the dominant label. Validation figures are of plain images and targets. A gap "
        "between training and validation is no verdict here. What is tested is whether validation gets worse again.",
        findings(study, "validation"),
        f"## 3. Scores{synthetic}",
        "Accuracy: share of the test images that are classified correctly. Its interval covers the choice of test "
        "images, not the seed. Deviation: standard deviation between the seeds. Ensemble: the mean probability of the "
        "runs. NLL, Brier and T are not in percent.",
        *table(CLASSIFICATION),
        *table(CALIBRATION),
        f"## 4. Confident failures{synthetic}",
        *table(FAILURES),
        *fates(study, listed, find),
        f"## 5. What the network looked at{synthetic}",
        study.picture(first, "gradcam.png", explain, current=bool(first.occlusions)),  # both are of one call
        "Each cell of a map has seen the whole image: the map and its line are a rough place. Where a "
        "picture's title names another run, *other* is that run.",
        findings(study, "failures rely"),
        f"## 6. What the change did{synthetic}",
        "*Supported*: the 95 % interval lies wholly where the claim says. *Contradicted*: it lies wholly elsewhere. "
        "*Not decided*: neither, or there is no interval. It covers the randomness of training and, for figures of "
        "test images, their choice, and needs two seeds of each recipe. Equal numbers, fixed beforehand, are the rule: "
        f"seeds added after a look at the first can tip a verdict.{unequal} The intervals are not corrected for their "
        "number: one in twenty misses the truth.",
        verdict_table(study, COMPARISONS, ["before (%)", "after (%)", "change [95 %]"])
        if others
        else "A comparison needs two recipes.",
        verdict_table(study, ABOUT_ONE, [f"{name} [95 %]" for name in study.recipes]),
        study.picture(last, "verdict.png", evaluate),
        f"## 7. Confusion and classes{synthetic}",
        study.picture(first, "confusion.png", evaluate),
        "Errors inside: share of the errors whose predicted class is in the same superclass.",
        "Synthetic superclasses have no names." if synthetic else superclass_table(study),
        f"The pairs of classes that {first.name} confuses most: errors in both directions, on the 200 images of the "
        "two, means over the seeds.",
        pairs_table(study),
        "Accuracy of classes, means over the seeds; per_class.csv of each run has all. Published runs of one recipe "
        "differ by up to 17 points in a class, so between means of three about 10 are noise. The picture shows "
        f"{first.name} alone.",
        classes_table(study),
        study.picture(first, "per_class.png", evaluate),
        f"## 8. Stress{synthetic}",
        f"Test images: {count or 'none yet'}, equally many of each class. The corruptions are in the style of "
        "CIFAR-100-C, 12 of its 15, re-implemented, so they do not compare with a published mCE. One attack does not "
        "measure robustness.",
        *table(STRESS),
        study.picture(last, "stress.png", measure),
        f"## 9. May I trust it?{synthetic}",
        "Two promises, set on validation images and tried on test images: 95 of 100 answers are right, if only "
        "confident images are answered; 90 of 100 sets of likely classes hold the true class. Neither covers other "
        f"images, such as those of section 8. Share of the images that may be answered so: {answers}.",
        *table(TRUST),
        study.picture(first, "reliability.png", evaluate),
        f"## 10. Limits{synthetic}",
        f"Seeds: {seeds}. Where seeds differ as in the published runs (0.25 points), two seeds of each recipe show a "
        "change of 2 points of accuracy nine times in ten, one of 1 point every other time. Three show 1 point nine "
        "times in ten. Half a point needs more than five.",
        "Words of the study that are not tested: \"background\" (the border is only near to it), \"lowest\" (below "
        "average is), \"human intuition\", \"barely noticeable differences\".",
        "Some test labels are wrong (section 4). Some test images have a near-duplicate among the training images.",
        f"## 11. Reproduce{synthetic}",
        f"```\n{commands}\n```",
    ]  # fmt: skip
    return "\n\n".join(paragraphs) + "\n"


def write_report(study, measured):
    """verdict.json, the pictures that need several runs, and report.md; returns its path.

    measured: whether stress has just been measured, so that an old picture shows other results.
    """
    pictures = {"training.png": draw_training, "verdict.png": draw_verdict}
    alike = len(study.stress_images) == 1 and 0 not in study.stress_images
    if alike:
        pictures["stress.png"] = draw_stress
    if measured or not alike:
        (study.folder / "stress.png").unlink(missing_ok=True)
    publish(study.folder / "verdict.json", {"claims": [row for _, row in study.rows]}, pictures, study)
    utils.write_file(study.folder / "report.md", report(study).encode())
    return study.folder / "report.md"


# ---- main -----------------------------------------------------------------------------------------------


def without_shared_words(names):
    """Names of runs without what all have in them: a-lr0.1, a-lr0.1-seed43, b-lr0.1 -> a, a-seed43, b."""
    # a value may be 1e-05, and four flags have two words
    words = [re.split(r"(?<!batch)(?<!val)(?<!warmup)(?<!weight)-(?!\d)", name) for name in names]
    shared = set.intersection(*map(set, words)) if len(names) > 1 else set()
    short = ["-".join([first, *(word for word in rest if word not in shared)]) for first, *rest in words]
    return short if len(set(short)) == len(names) else names


def by_recipe(runs):
    """The runs in lists of one recipe each, by seed; recipes as they come. What cannot be compared stays out."""
    arms = []
    for run in runs:
        arm = next((arm for arm in arms if utils.recipe(arm[0].config) == utils.recipe(run.config)), [])
        if not run.config.get("finished", True):
            epoch, epochs = len(run.log["val_acc"]) if run.log else 0, run.config["args"].get("epochs")
            reason = f"stopped after epoch {epoch} of {epochs} (continue it with --resume)"
        elif arms and not np.array_equal(run.labels, arms[0][0].labels):
            reason = f"was scored on other images than {arms[0][0].name}"
        elif run.seed in [other.seed for other in arm]:
            reason = f"repeats the seed {run.seed} of its recipe"
        else:
            if not arm:
                arms.append(arm)
            arm.append(run)
            continue
        warn(f"{run.name} {reason}; left out of means and verdict")
    return [sorted(arm, key=lambda run: run.seed or 0) for arm in arms]  # `runs/*` gives seed43 before its seed 42


def parse_args(argv):
    parser = utils.ArgumentParser(__file__, __doc__)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="run directory of train.py (default: the one in runs/ trained last)")
    add("--stress", action="store_true", help="also measure corruptions and an attack: minutes per run on a CPU")
    add("--stress-images", type=int, default=1000, metavar="N", help="test images for --stress, N/100 of each class")
    utils.add_common_flags(parser)
    args = parser.parse_args(argv)
    if args.stress_images % 100 or not 100 <= args.stress_images <= 10_000:
        parser.error(f"--stress-images {args.stress_images} must be a multiple of 100 in 100..10000")
    if args.device != "auto":
        utils.select_device(args.device)  # a wrong one is refused even if nothing needs it
    return args


def main(argv=None):
    """Evaluate the given runs; returns {run directory: {metric: value}}."""
    args = parse_args(argv)
    folders = []
    for run_dir, config in [utils.open_run(text) for text in dict.fromkeys(args.runs or [None])]:
        if (run_dir / "best.pt").exists() or (run_dir / "test_logits.npy").exists():
            folders.append((run_dir, config))
        else:
            warn(f"{run_dir} has no saved epoch and is passed over")
    if not folders:
        raise ScriptError("no run with a saved epoch among those given; run python train.py first")
    for run_dir, config in folders:
        if (run_dir / "best.pt").exists() and not is_current(run_dir):
            compute_logits(run_dir, config, args)
    names = without_shared_words(utils.short_names([run_dir for run_dir, _ in folders]))
    runs = [read_run(*folder, name) for folder, name in zip(folders, names)]
    for run in runs:
        write_run(run)
    arms = by_recipe(runs)
    print_scores(runs, arms)
    if args.stress:
        for run in runs:
            if run.stress and len(run.stress.correct[0]) != args.stress_images:
                found = f"{run.folder} has stress results on {len(run.stress.correct[0])} images"
                raise ScriptError(f"{found}; give the same --stress-images, or delete its stress.csv")
    unmeasured = [run for run in runs if not run.stress] if args.stress else []
    for run in unmeasured:
        measure_stress(run, args)

    # the first recipe alone, or every other one against it
    studies = [Study([arms[0], changed]) for changed in arms[1:]] or [Study([arm]) for arm in arms]
    for study in studies:
        print_verdict(study)
    if len(arms) < 2 or min(map(len, arms)) < 2:
        print("A comparison needs two recipes with two seeds each (same flags, other --seed).")
    reports = [write_report(study, measured=bool(unmeasured)) for study in studies]
    first, *others = sum(arms, []) or runs[:1]
    if not (first.folder / "failures.csv").exists():
        compare = " ".join(["", "--compare", *(utils.quote(run.folder) for run in others)]) if others else ""
        print(f"next: python failures.py {utils.quote(first.folder)}{compare}{utils.data_flag(args)}")
    for path in reports:
        print(f"report: {utils.plain(path)}")
    return {str(run.folder): run.values for run in runs}


if __name__ == "__main__":
    utils.run_script(main)
