"""Score trained runs on the CIFAR-100 test set, judge what a change does, and write the report.

    python evaluate.py runs/baseline                       # one run
    python evaluate.py runs/baseline runs/baseline-seed43 runs/smoothing0.1 runs/smoothing0.1-seed43
    python evaluate.py ... --stress                        # corruptions and an attack, too

Runs of one recipe differ in the seed alone. The first recipe is the baseline; every other one gets a verdict on
what the study says (CLAIMS below).

The idea: a metric is a value for each test image, and their mean is the run's figure. So a recipe is a matrix
(runs, images), a comparison is arithmetic on two matrices, and one function, estimate(), makes every interval.
To add a metric, add a line to Scores.means(). To add a claim, add an entry to CLAIMS.

Writes into each run directory test_logits.npy (10000, 100) float32 and test_labels.npy (10000,) int64, where row
i is test image i; the same for the validation images; metrics.json (fractions; 95 % intervals of means under
ci95); confusion.npy (row = true class, column = predicted) and .png, per_class.csv and .png, reliability.png.
--stress adds stress_preds.npy, stress_confidence.npy (65 conditions, N) and stress.csv. The first run of each
changed recipe gets verdict.json and report.md with its pictures. Logits that are there are not computed again.
"""

import functools
import json
import math
import os
import textwrap
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
    real: bool = False  # makes no sense on synthetic images
    remark: Callable = lambda row, *recipes: ""  # what a reader must know beside the figure


def each(value):
    """The values of a claim that looks at each run alone: value(run) is (N,)."""
    return lambda runs, baselines: np.array([value(run) for run in runs], np.float64)


COMPARISONS = [  # changed minus baseline
    Claim("accuracy stays within 1 point", "within", each(lambda run: run.raw.correct),
          "does not change total accuracy significantly", "test accuracy",
          remark=lambda row, *recipes: accuracy_remark(row, *recipes)),
    Claim("fewer confident errors (> 0.90)", "below", each(lambda run: run.raw.failures),
          "decreases extreme confidence on incorrect predictions", "share of images wrong above 0.90",
          remark=lambda row, *recipes: construction_remark(row, *recipes)),
    Claim("fewer errors in the surest half", "below", each(lambda run: surest_half(run)),
          "", "error rate of the half of the images that a run is most sure of"),
    Claim("earlier failures less confident", "below", lambda runs, base: on_failures(runs, base, "raw"),
          "failure cases identified previously have less confidence",
          "confidence on the confident failures of baselines of other seeds"),
    Claim("the same, temperature-scaled", "below", lambda runs, base: on_failures(runs, base, "scaled"),
          "", "the same after temperature scaling: is it more than a general loss of confidence?"),
    Claim("calibration improves", "below", lambda runs, base: miscalibration(runs),
          "calibration has been improved", "distance of mean confidence from accuracy",
          remark=lambda row, *recipes: scaled_gap_remark(row, *recipes)),
    Claim("less accuracy lost to corruption", "above", each(lambda run: corruption_effect(run)),
          "slight boost to robustness", "accuracy under 12 x 5 corruptions minus clean accuracy"),
]  # fmt: skip
ABOUT_ONE = [  # for the baseline and for the changed recipe, side by side
    Claim("validation accuracy falls again", "below", each(lambda run: late_change(run, "val_acc")),
          "peaks early; performance degrades", "mean of the last quarter of the epochs minus that of the third"),
    Claim("validation loss rises again", "above", each(lambda run: late_change(run, "val_loss")),
          "mild overfitting", "the same with the validation loss", unit="nats"),
    Claim("errors are mostly in the superclass", "above",
          each(lambda run: mean_among(run.raw.same_superclass, ~run.raw.correct)),
          "mostly made between the similar fine-grained categories", "share of the errors inside the superclass",
          reference=0.5, unit="%", real=True, remark=lambda row, *recipes: superclass_remark(row, *recipes)),
    Claim("small animals are below average", "below", each(lambda run: small_animals(run)),
          "small animals are among the lowest performing", "accuracy of 15 classes minus that of the others",
          real=True, remark=lambda row, *recipes: small_animals_remark(row, *recipes)),
    Claim("failures rely more on the border", "above", lambda runs, base: border_reliance(runs),
          "attention is often focused on the background",
          "images that lose more if the border is hidden than if the centre is: confident failures minus like hits",
          remark=lambda row, *recipes: border_remark(row, *recipes)),
    Claim("confident failures are doubtful images", "above", each(lambda run: doubtful_failures(run)),
          "highly confident errors on ambiguous images",
          "label not upheld by 3 of 5 people: confident failures minus confident hits", real=True),
]  # fmt: skip


class Undecided(Exception):
    """Why a claim has no figure."""


def judge(claim, runs, baselines, name):
    """One row of the verdict: figure and interval of runs against baselines, or of runs alone if these are None."""
    row = {"claim": claim.text, "recipe": name, "figure": None, "ci95": None, "word": "not decided"}
    row |= {"runs": {}, "note": ""}
    try:
        if claim.real and runs[0].config["dataset"] == "synthetic":
            raise Undecided("synthetic images have no such classes")
        recipes = [runs] if baselines is None else [baselines, runs]
        arms = [claim.values(recipe, recipes[0]) for recipe in recipes]
        used = [run for recipe, arm in zip(recipes, arms) for run in recipe[: len(arm)]]
        row["runs"] = dict(zip([run.name for run in used], np.concatenate([arm.mean(1) for arm in arms]).tolist()))
        figure, half = estimate(*arms)
        if not math.isfinite(figure):
            raise Undecided("undefined: no image or epoch that the claim is about")
        row["figure"] = float(figure)
        if half is None:
            row["note"] = "one run of a recipe: its seed may be the reason. "
        else:
            row["ci95"] = [float(figure - half), float(figure + half)]
            row["word"] = decide(*(end - claim.reference for end in row["ci95"]), claim.side)
        row["note"] += claim.remark(row, *recipes)
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


def compute_logits(run_dir, dataset, data_dir, device):
    """Run best.pt over the test and the validation images in float32; save logits and labels."""
    model, checkpoint = utils.load_best(run_dir, device)
    images, labels = load_dataset(dataset, data_dir, train=True)
    _, val_index = split_train_val(labels, checkpoint["args"]["val_size"], checkpoint["args"]["seed"])
    if checkpoint.get("split") != split_id(val_index):
        reason = "this version of NumPy splits training and validation images differently"
        raise ScriptError(f"{run_dir}: {reason}; evaluate with the version in config.json")
    splits = {"val": (images[val_index], labels[val_index]), "test": load_dataset(dataset, data_dir, train=False)}
    print(f"{utils.plain(run_dir)}: logits of best.pt, epoch {checkpoint['epoch']}, on {utils.device_name(device)}", flush=True)
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
    """What logits (N, C) predict for N images: arrays (N,). Metrics are computed from these."""

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

    answers: the share of the test images above the confidence at which 95 % of the validation images were right,
    and their accuracy. sets: all classes with p >= t, t such that 90 % of the validation images' sets hold the
    true class (split conformal, Sadinle et al., arXiv:1609.00451): share of test images whose set holds it, mean
    number of classes, and the share in the worst class, since the promise is only on average. None where
    undefined: fewer than 100 validation images, or no such confidence.
    """
    found = dict.fromkeys(("answers", "answers_accuracy", "set_coverage", "set_size", "set_worst_class"))
    n = len(val.labels)
    if n < 100:
        return found
    order = np.argsort(-val.confidence, kind="stable")
    accuracy_so_far = np.cumsum(val.correct[order]) / np.arange(1, n + 1)
    good = np.flatnonzero(accuracy_so_far >= 0.95)
    if len(good):
        answered = test.confidence >= val.confidence[order[good[-1]]]
        found["answers"] = answered.mean()
        found["answers_accuracy"] = test.correct[answered].mean() if answered.any() else None
    t = np.sort(val.true_probability)[n - math.ceil(0.9 * (n + 1))]  # the (n + 1 - ceil)-th smallest
    held = test.true_probability >= t
    found["set_coverage"], found["set_size"] = held.mean(), (test.probs >= t).sum(1).mean()
    found["set_worst_class"] = min(held[test.labels == label].mean() for label in np.unique(test.labels))
    return {name: None if value is None else float(value) for name, value in found.items()}


class Run:
    """A trained run on the test images, as the rest of this file sees it."""

    def __init__(self, folder, config, name, logits, labels, temperature, trust=None):
        self.folder, self.config, self.name, self.labels = folder, config, name, labels
        self.seed = config["args"].get("seed")
        self.trust = trust  # of trust()
        self.raw, self.scaled = Scores(logits, labels), Scores(logits / temperature, labels)
        self.confusion = confusion_matrix(labels, self.raw.pred, NUM_CLASSES)
        self.stress = None  # a Stress, once it is read or measured
        self.values = self.raw.metrics()  # {metric: float}
        scaled = self.scaled.metrics()
        moved = ("confident_errors", "mean_confidence", "signed_gap", "nll", "brier", "ece", "auroc_failure")
        self.values |= {f"{name}_scaled": scaled[name] for name in moved} | {"temperature": temperature}
        self.official = is_test_set(labels)  # then it is known which images are doubtful, and which have duplicates
        if self.official:
            self.values["accuracy_without_duplicates"] = float(self.raw.correct[~DUPLICATES].mean())

    log = functools.cached_property(lambda run: read_log(run))
    attention = functools.cached_property(lambda run: read_attention(run))


def read_run(folder, config, name):
    """The Run of a directory that has logits. A published one may be without those of the validation images."""
    logits, labels = utils.load_logits(folder, "test")
    if (folder / "val_logits.npy").exists():
        val_logits, val_labels = utils.load_logits(folder, "val")
        temperature = fit_temperature(val_logits, val_labels)
        run = Run(folder, config, name, logits, labels, temperature)
        run.trust = trust(Scores(val_logits, val_labels), run.raw)
        return run
    path, made_by = folder / "metrics.json", f"python evaluate.py {utils.quote(folder)}"
    known = utils.read_json(path, made_by, "the scores of a run")
    with utils.reading(path, made_by, "the scores of a run without val_logits.npy"):
        temperature = known["temperature"]
        utils.require(0 < temperature < math.inf and isinstance(known["trust"], dict), "no temperature or trust")
    return Run(folder, config, name, logits, labels, temperature, known["trust"])


def ensemble(runs):
    """Scores of the mean probability: a deep ensemble, Lakshminarayanan et al., arXiv:1612.01474."""
    mean = np.mean([run.raw.probs for run in runs], 0)
    return Scores(np.log(np.maximum(mean, 1e-300)), runs[0].labels)


# ---- the values of the claims ---------------------------------------------------------------------------


def mean_among(values, chosen):
    """(N,) values whose mean is the mean of `values` among the chosen images.

    Each is that mean plus what its image contributes to it (its influence), so estimate() can take it.
    """
    if chosen.sum() < FEWEST:
        raise Undecided(f"needs {FEWEST} such images, there are {chosen.sum()}")
    mean = values[chosen].mean()
    return mean + chosen * (values - mean) / chosen.mean()


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


def corruption_effect(run):
    """(n,): on each image of the stress test, the share of corruptions under which it is right, minus clean."""
    if run.stress is None:
        raise Undecided("needs --stress on all runs, with the same images")
    return run.stress.correct[KINDS == "corruption"].mean(0) - run.stress.correct[0]


def late_change(run, column):
    """(1,): the mean of a column of log.csv over the last quarter of the epochs minus that over the third."""
    log = run.log
    if log is None or len(log[column]) < 4:
        raise Undecided("needs the log.csv of each run, with 4 epochs")
    curve, quarter = log[column], len(log[column]) // 4
    return np.array([curve[-quarter:].mean() - curve[-2 * quarter : -quarter].mean()])


def small_animals(run):
    """(N,) values whose mean is the accuracy on small animals minus that on the other classes."""
    small = SMALL[run.labels]
    return mean_among(run.raw.correct, small) - mean_among(run.raw.correct, ~small)


def border_reliance(runs):
    """(runs, N), from gradcam.py's attention.csv: of the failures, and of hits of like confidence and class."""
    found = []
    for run in runs:
        border, failed, matched = run.attention
        if failed.sum() >= FEWEST and matched.sum() >= FEWEST:
            found.append(mean_among(border, failed) - mean_among(border, matched))
    if not found:
        raise Undecided(f"needs {FEWEST} confident failures that went through failures.py and gradcam.py")
    return np.array(found)


def doubtful_failures(run):
    """(N,): the share of doubtful labels among confident failures minus that among confident hits."""
    if not run.official:
        raise Undecided("needs the official test images, in their order")
    return mean_among(DOUBTFUL, run.raw.failures) - mean_among(DOUBTFUL, run.raw.sure_hits)


def read_log(run):
    """{column: (epochs,)} of log.csv; None without one, or with a damaged one, which costs its own rows alone."""
    path, columns = run.folder / "log.csv", ("train_loss", "train_acc", "val_loss", "val_acc", "seconds")
    try:
        rows = utils.read_csv(path, "python train.py", "the log of a run", dict.fromkeys(columns, float))
    except ScriptError as error:
        warn(f"{error}; left out")
        return None
    return {name: np.array([row[name] for row in rows]) for name in columns} if rows else None


def read_attention(run):
    """attention.csv as (border, failed, matched), (N,) each: does hiding the border cost more? which images are these?"""
    n, path, made_by = len(run.labels), run.folder / "attention.csv", f"python gradcam.py {utils.quote(run.folder)}"
    border, failed, matched = np.zeros(n), np.zeros(n, bool), np.zeros(n, bool)
    if not path.exists():
        return border, failed, matched
    columns = {"index": int, "group": str, "checkpoint": str, "border_drop": float, "centre_drop": float}
    try:
        rows = utils.read_csv(path, made_by, "attention figures", columns)
        if {row["checkpoint"] for row in rows} - {utils.checkpoint_id(run.folder)}:
            raise ScriptError(f"{path} belongs to another best.pt; run {made_by}")
        with utils.reading(path, made_by, "attention figures"):
            utils.require(all(row["index"] in range(n) for row in rows), "no test image")
    except ScriptError as error:
        warn(f"{error}; left out")
        return border, failed, matched
    for row in rows:
        border[row["index"]] = row["border_drop"] > row["centre_drop"]
        (failed if row["group"] == "failure" else matched)[row["index"]] = True
    return border, failed & run.raw.failures, matched & run.raw.correct


def chance_within_superclass(confusion):
    """Share of errors inside the true superclass if the class predicted did not depend on the true one.

    confusion (C, C). Keeps how often each class is mistaken and how often it is wrongly predicted; a pair of
    equal classes is no error.
    """
    errors = confusion - np.diag(np.diag(confusion))
    independent = np.outer(errors.sum(1), errors.sum(0))
    np.fill_diagonal(independent, 0)
    inside = SUPERCLASS_OF[:, None] == SUPERCLASS_OF
    return float(independent[inside].sum() / independent.sum()) if independent.any() else math.nan


# ---- what a reader must know beside a figure ------------------------------------------------------------


def accuracy_remark(row, *recipes):
    if row["ci95"] is None:
        return ""
    low, high = row["ci95"]
    return "the interval excludes 0" if low > 0 or high < 0 else "the interval includes 0"


def construction_remark(row, *recipes):
    """Confident errors fall by construction if smoothing is new and its highest target is below 0.905."""
    before, a = (recipe[0].config["args"].get("smoothing") or 0 for recipe in recipes)
    target = 1 - a + a / NUM_CLASSES
    follows = before < a and target < CONFIDENT + 0.005
    return f"by construction: smoothing {a:g} has no target above {target:.3f}" if follows else ""


def scaled_gap_remark(row, *recipes):
    gaps = [np.mean([run.values["signed_gap_scaled"] for run in recipe]) for recipe in recipes]
    before, after = (f"{100 * gap:+.1f}" for gap in gaps)
    return f"after temperature scaling confidence - accuracy is {before} and {after} points"


def superclass_remark(row, runs):
    return f"by chance {100 * np.mean([chance_within_superclass(run.confusion) for run in runs]):.1f} %"


def small_animals_remark(row, runs):
    worst = [np.argsort(np.diag(run.confusion), kind="stable")[:10] for run in runs]  # equally many images a class
    return f"{SMALL[worst].sum(1).mean():.1f} of the ten worst classes, by chance {len(SMALL_ANIMALS) / 10:g}"


def border_remark(row, runs):
    measured = sum(run.attention[1].sum() for run in runs)
    return f"{measured:,} of {sum(run.raw.failures.sum() for run in runs):,} failures measured"


# ---- stress ---------------------------------------------------------------------------------------------

GROUPS = {"noise": CORRUPTIONS[:3], "blur": CORRUPTIONS[3:6], "weather": CORRUPTIONS[6:8], "digital": CORRUPTIONS[8:]}
EPSILONS = (0.25, 1, 2, 8)  # bounds of the attack: largest change of a pixel, in 1/255
CONDITIONS = (  # (kind, name, strength): the rows of stress.csv and of the two arrays
    [("clean", "", 0)]
    + [("corruption", name, severity) for name in CORRUPTIONS for severity in range(1, 6)]
    + [("pgd", "", epsilon) for epsilon in EPSILONS]
)
KINDS, NAMES, STRENGTHS = map(np.array, zip(*CONDITIONS))  # (65,) each


@dataclass
class Stress:
    """What a run makes of n of the test images under every condition."""

    correct: np.ndarray  # (65, n) bool
    confidence: np.ndarray  # (65, n) float32


def first_of_each_class(labels, count):
    """Indices, in order, of the first images of every class: `count` of them in all."""
    by_class = np.argsort(labels, kind="stable").reshape(NUM_CLASSES, -1)
    return np.sort(by_class[:, : count // NUM_CLASSES].ravel())


def stress_of(run, images, labels, device):
    """The Stress of a run, measured under every condition, and saved at the end.

    images (n, 32, 32, 3) uint8 and labels (n,): first_of_each_class of the test set.
    """
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
    preds, confidence = np.array(preds), np.array(confidence)
    correct, rows = preds == labels.numpy(), []
    for k, (kind, name, strength) in enumerate(CONDITIONS):
        row = {"kind": kind, "name": name, "strength": strength, "accuracy": correct[k].mean()}
        row |= {"mean_confidence": confidence[k].mean(), "images": len(labels), "checkpoint": checkpoint["sha256"]}
        rows.append(row)
    utils.write_npy(run.folder / "stress_preds.npy", preds)
    utils.write_npy(run.folder / "stress_confidence.npy", confidence)
    utils.write_csv(run.folder / "stress.csv", rows)
    return Stress(correct, confidence)


def read_stress(run):
    """The Stress that was saved for this best.pt, or None."""
    path, made_by = run.folder / "stress.csv", f"python evaluate.py {utils.quote(run.folder)} --stress"
    if not path.exists():
        return None
    try:
        columns = {"images": int, "accuracy": float, "checkpoint": str}
        rows = utils.read_csv(path, made_by, "stress results", columns)
        with utils.reading(path, made_by, "stress results"):
            utils.require(len(rows) == len(CONDITIONS), f"{len(rows)} conditions instead of {len(CONDITIONS)}")
            utils.require(rows[0]["checkpoint"] == utils.checkpoint_id(run.folder), "of another best.pt")
            utils.require(rows[0]["images"] in range(100, 10_001, 100), "a strange number of images")
        labels = run.labels[first_of_each_class(run.labels, rows[0]["images"])]
        shape = (len(CONDITIONS), len(labels))
        preds = utils.read_npy(run.folder / "stress_preds.npy", made_by, "stress results", shape, "u")
        confidence = utils.read_npy(run.folder / "stress_confidence.npy", made_by, "stress results", shape, "f")
        correct = preds == labels
        with utils.reading(path, made_by, "stress results"):
            same = np.allclose([row["accuracy"] for row in rows], correct.mean(1), atol=1e-5)
            utils.require(same, "it does not fit stress_preds.npy")
    except ScriptError as error:
        warn(f"{error}; left out")
        return None
    return Stress(correct, confidence)


def measure_stress(runs, args, device):
    """Measure the runs that have no stress results yet."""
    for run in runs:
        if run.stress and run.stress.correct.shape[1] != args.stress_images:
            found = f"{run.folder} has stress results on {run.stress.correct.shape[1]} images"
            raise ScriptError(f"{found}; give the same --stress-images, or delete its stress.csv")
    for run in runs:
        if run.stress:
            continue
        images, labels = load_dataset(*utils.dataset_of(run.config, args), train=False)
        if not np.array_equal(labels.numpy(), run.labels):
            raise ScriptError(f"{run.folder} was scored on other images than those here; set --data-dir")
        index = first_of_each_class(run.labels, args.stress_images)
        run.stress = stress_of(run, images[index], labels[index], device)


# ---- tables ---------------------------------------------------------------------------------------------


def print_table(header, rows):
    """Rows of text under a header. The first column names the row, on a line of its own where there is no room."""
    widths = [max(len(cells[k]) for cells in [header, *rows]) for k in range(len(header))]
    widths[0] = min(widths[0], max(0, 79 - sum(widths[1:]) - len(widths)))
    for cells in [header, *rows]:
        if len(cells[0]) > widths[0]:
            print(cells[0])
            cells = ["", *cells[1:]]
        print(f"{cells[0]:<{widths[0]}} {' '.join(f'{text:>{w}}' for text, w in zip(cells[1:], widths[1:]))}".rstrip())


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(text).replace("|", "\\|") for text in cells) + " |" for cells in lines)


def cell(value, digits=2, unit=100):
    """A fraction in percent, [low, high] as an interval, or a dash where there is nothing."""
    if isinstance(value, list):
        return f"[{', '.join(cell(end, digits, unit) for end in value)}]"
    return "-" if value is None or math.isnan(value) else f"{unit * value + 0.0:.{digits}f}"


def figure_cell(claim, row):
    """-0.87 [-1.65, -0.09] points."""
    style = (3, 1) if claim.unit == "nats" else (2, 100)
    interval = f" {cell(row['ci95'], *style)}" if row["ci95"] else ""
    return f"{cell(row['figure'], *style)}{interval} {claim.unit}" if row["figure"] is not None else "-"


BRIEF = {"no dup.": "accuracy_without_duplicates", "F1": "macro_f1", "top-5": "top5_accuracy",
         "conf.err": "confident_errors", "ECE": "ece", "T": "temperature"}  # fmt: skip
CLASSIFICATION = {"no dup.": "accuracy_without_duplicates", "precision": "macro_precision", "recall": "macro_recall",
                  "F1": "macro_f1", "top-5": "top5_accuracy", "superclass": "superclass_accuracy",
                  "confident errors": "confident_errors"}  # fmt: skip
CALIBRATION = {"NLL": "nll", "Brier": "brier", "gap": "signed_gap", "ECE": "ece", "AUROC": "auroc_failure",
               "T": "temperature", "NLL/T": "nll_scaled", "gap/T": "signed_gap_scaled", "ECE/T": "ece_scaled",
               "AUROC/T": "auroc_failure_scaled"}  # fmt: skip


def score_rows(arms, columns):
    """A row of text for each run; of several runs of a recipe also their mean and deviation."""
    named = []
    for arm in arms:
        named += [(run.name, run.values, f" {cell(accuracy_interval(run.raw), 1)}") for run in arm]
        if len(arm) > 1:
            of_runs = {key: [run.values[key] for run in arm] for key in arm[0].values}
            named.append((f"  mean of {len(arm)}", {key: np.mean(found) for key, found in of_runs.items()}, ""))
            named.append(("  deviation", {key: np.std(found, ddof=1) for key, found in of_runs.items()}, ""))
    rows = []
    for name, values, interval in named:
        plain_numbers = {"nll", "brier", "temperature", "nll_scaled"}
        cells = [cell(values.get(key), *((3, 1) if key in plain_numbers else ())) for key in columns.values()]
        rows.append([name, cell(values["accuracy"]) + interval, *cells])
    return rows


def accuracy_interval(scores):
    low, high = utils.wilson_interval(scores.correct.sum(), len(scores.correct))
    return [float(low), float(high)]


def print_scores(runs, arms):
    alone = [[run] for run in runs if not any(run in arm for arm in arms)]
    print(f"{len(runs[0].labels):,} test images of {TITLES[runs[0].config['dataset']]}")
    print_table(["in %", "accuracy [95 %]", *BRIEF], score_rows(arms + alone, BRIEF))
    print("no dup.: without 891 images that have a near-duplicate in training. F1: macro.")
    print("conf.err: wrong with a confidence above 0.90, of all images. ECE: calibration")
    print("error. T: temperature of the validation images; above 1 if over-confident.")


def print_verdict(study, rows):
    """rows: [(claim, row)]. A comparison is one line; a claim about one recipe has a line for each recipe."""
    print("\n" + textwrap.fill(study.heading, 79))
    table, notes, last = [], {}, None
    for claim, row in rows:
        alone = claim in ABOUT_ONE
        if alone and claim is not last:
            table.append([claim.text, "", ""])
        table.append([f"  {row['recipe']}" if alone else claim.text, figure_cell(claim, row), row["word"]])
        which = f"{claim.text} ({row['recipe']})" if alone else claim.text
        notes[row["note"]] = [*notes.get(row["note"], []), which]
        last = claim
    print_table(["claim", "figure [95 % interval]", "verdict"], table)
    for note, which in notes.items():
        where = which[0] if len(which) == 1 else f"{len(which)} rows"
        if note:
            print(textwrap.fill(f"{where}: {note}", 79, subsequent_indent="  "))


# ---- pictures -------------------------------------------------------------------------------------------

COLORS = (utils.BLUE, utils.VERMILION)  # of the baselines and of the changed runs


def title_of(run):
    return f"{run.name}: {len(run.labels):,} test images of {TITLES[run.config['dataset']]}"


def draw_confusion(run, names):
    figure, axes = utils.new_figure(10, 9.4, title=f"{title_of(run)}: confusion matrix")
    order = np.argsort(SUPERCLASS_OF, kind="stable")
    shown = run.confusion[np.ix_(order, order)].astype(float)
    shown[shown == 0] = np.nan
    picture = axes.imshow(shown, cmap="viridis", norm="log", vmin=1, vmax=100)
    real = names[0] == "apple"  # the synthetic set has no superclasses with names
    families = [name.replace("_", " ") if real else f"group {k}" for k, name in enumerate(SUPERCLASSES)]
    axes.set_xticks(np.arange(2, 100, 5), families, rotation=90, fontsize=9)
    axes.set_yticks(np.arange(2, 100, 5), families, fontsize=9)
    for edge in range(0, NUM_CLASSES, 5):  # a frame around the five classes of each superclass
        left, right = edge - 0.5, edge + 4.5
        axes.plot([left, right, right, left, left], [left, left, right, right, left], color="black", linewidth=0.8)
    axes.set(xlabel="predicted class", ylabel="true class", title="by superclass; frames: errors inside a superclass")
    ticks = [1, 2, 5, 10, 20, 50, 100]
    figure.colorbar(picture, ax=axes, label="test images (logarithmic)", shrink=0.6, format="%d", ticks=ticks)
    return figure


def draw_per_class(run, names):
    """The ten worst and the ten best classes; per_class.csv has all."""
    rows = sorted(per_class_rows(run, names), key=lambda row: row["accuracy"])
    rows = rows[:10] + rows[-10:]
    figure, axes = utils.new_figure(10, 5.5, title=f"{title_of(run)}: the ten worst and the ten best classes")
    accuracy, low, high = (100 * np.array([row[key] for row in rows]) for key in ("accuracy", "low", "high"))
    places, errors = [*range(10), *range(11, 21)], [accuracy - low, high - accuracy]
    axes.errorbar(accuracy, places, xerr=errors, fmt="o", color=utils.BLUE, ecolor=utils.GRAY, markersize=4)
    axes.set_yticks(places, [row["class"] for row in rows], fontsize=9)
    axes.set(xlabel="accuracy on the class's images (%), with 95 % interval", xlim=(0, 100), ylim=(-1, 21))
    mean = 100 * run.values["accuracy"]
    axes.axvline(mean, color=utils.VERMILION, linestyle="--", label=f"all 100 classes: {mean:.1f} %")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def draw_reliability(run, names):
    """Accuracy against confidence in 15 bins, above the images in each; as trained and temperature-scaled."""
    options = {"sharex": True, "sharey": "row", "height_ratios": [3, 1]}
    figure, axes = utils.new_figure(10, 6.5, 2, 2, f"{title_of(run)}: is confidence accuracy?", **options)
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
    figure, panels = utils.new_figure(10, 4.5, 1, 2, f"Training on {TITLES[study.dataset]}", sharex=True)
    for arm, color in zip(study.arms, COLORS):
        smoothed = ", smoothed" if arm[0].config["args"].get("smoothing") else ""
        for axes, key, scale, suffix in (panels[0], "loss", 1, smoothed), (panels[1], "acc", 100, ""):
            axes.plot([], [], ":", color=color, label=f"{arm[0].name}: training{suffix}")
            axes.plot([], [], "-", color=color, label=f"{arm[0].name}: validation")
            for log in filter(None, (run.log for run in arm)):
                epochs, best = np.arange(1, len(log["val_acc"]) + 1), log["val_acc"].argmax()
                axes.plot(epochs, scale * log[f"train_{key}"], ":", color=color, linewidth=1)
                axes.plot(epochs, scale * log[f"val_{key}"], "-", color=color, linewidth=1)
                axes.plot(epochs[best], scale * log[f"val_{key}"][best], "o", color=color, markersize=5)
    panels[0].set(xlabel="epoch", ylabel="cross-entropy (nats)", ylim=(0, math.log(NUM_CLASSES)))
    panels[1].set(xlabel="epoch", ylabel="accuracy (%); dots: best epoch", ylim=(0, 100))
    for axes in panels:
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    return figure


def draw_verdict(study):
    """A line per row of the verdict, each on a scale of its own, with the runs as dots and the interval."""
    rows = [(claim, row) for claim, row in study.rows if row["figure"] is not None]
    title = f"{study.arms[-1][0].name}: does what the study says hold?"
    figure, axes = utils.new_figure(10, 1.5 + 0.4 * len(rows), title=title)
    axes.set(xlim=(-4.6, 4.6), ylim=(len(rows) - 0.4, -2.1))
    axes.axis("off")
    text = functools.partial(axes.text, va="center", fontsize=9)
    text(-4.6, -1.7, "as claimed: to the right; each row has its own scale")
    for x, head in (-4.6, "claim"), (1.2, "figure [95 % interval]"), (3.5, "verdict"):
        text(x, -0.9, head, weight="bold")
    for x, color, arm in zip((-0.5, 1.3), COLORS, study.arms):
        axes.plot(x, -1.7, "o", color=color, markersize=4)
        text(x + 0.1, -1.7, textwrap.shorten(f"runs of {arm[0].name}", 36, placeholder="..."))
    baselines = {run.name for run in study.arms[0]}
    for y, (claim, row) in enumerate(rows):
        sign, alone = -1 if claim.side == "below" else 1, claim in ABOUT_ONE
        recipe = "baseline" if row["recipe"] == study.arms[0][0].name else "changed"
        text(-4.6, y, f"{claim.text} ({recipe})" if alone and len(study.arms) > 1 else claim.text)
        text(1.2, y, figure_cell(claim, row))
        text(3.5, y, row["word"], weight="bold")
        zero = claim.reference if alone else np.mean([v for name, v in row["runs"].items() if name in baselines])
        dots = [(sign * (value - zero), name in baselines) for name, value in row["runs"].items()]
        shift = claim.reference if alone else 0
        middle, *ends = (sign * (value - shift) for value in (row["figure"], *(row["ci95"] or ())))
        margin = MARGIN if claim.side == "within" else 0
        scale = 1.15 * max(1e-9, margin, *map(abs, (middle, *ends)), *(abs(place) for place, _ in dots))
        claimed = (-margin / scale, margin / scale) if margin else (0, 1)
        axes.fill_betweenx([y - 0.4, y + 0.4], *claimed, color="black", alpha=0.06, linewidth=0)
        axes.plot([0, 0], [y - 0.4, y + 0.4], color="black", linewidth=0.8)
        for place, is_baseline in dots:
            height, color = (-0.2, COLORS[0]) if is_baseline else (0.2, COLORS[1])
            axes.plot(place / scale, y + height, "o", color=color, markersize=4)
        axes.plot([end / scale for end in ends], [y] * len(ends), color="black", linewidth=1.5)
        axes.plot(middle / scale, y, "|", color="black", markersize=9)
    return figure


def draw_stress(study):
    """Accuracy by corruption, accuracy and confidence against severity, accuracy under attack: means over the runs."""
    images = study.arms[0][0].stress.correct.shape[1]
    title = f"{TITLES[study.dataset]} under stress: {images:,} test images, means over the runs"
    figure, (left, middle, right) = utils.new_figure(10, 5.2, 1, 3, title)
    severity = np.where(KINDS == "clean", 0, np.where(KINDS == "corruption", STRENGTHS, -1))
    names = sorted(CORRUPTIONS, key=lambda name: study.arms[0][0].stress.correct[NAMES == name].mean())
    for arm, color in zip(study.arms, COLORS):
        # (65,) each, in percent: means over the runs and images
        accuracy = 100 * np.mean([run.stress.correct.mean(1) for run in arm], 0)
        confidence = 100 * np.mean([run.stress.confidence.mean(1) for run in arm], 0)
        by_name = [accuracy[NAMES == name].mean() for name in names]
        left.plot(by_name, range(len(names)), "o", color=color, label=arm[0].name)
        left.axvline(accuracy[0], color=color, linewidth=0.8)
        curves = [[values[severity == level].mean() for level in range(6)] for values in (accuracy, confidence)]
        middle.plot(curves[0], "-o", color=color, markersize=4, label="accuracy")
        middle.plot(curves[1], "--", color=color, label="confidence")
        middle.fill_between(range(6), *curves, color=color, alpha=0.1)
        right.plot(EPSILONS, accuracy[KINDS == "pgd"], "-o", color=color, markersize=4)
    left.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    left.set(xlabel="accuracy (%), mean of severities\n(line: clean images)", xlim=(0, 100))
    middle.set(xlabel="severity (0: clean)", ylabel="mean accuracy and confidence (%)", ylim=(0, 100))
    right.set(xlabel="PGD: largest change\nof a pixel, in 1/255", ylabel="accuracy (%)", ylim=(0, 100), xscale="log")
    right.set_xticks(EPSILONS, [f"{epsilon:g}" for epsilon in EPSILONS])
    right.minorticks_off()
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    middle.legend(fontsize=9)
    return figure


# ---- files of a run -------------------------------------------------------------------------------------


def per_class_rows(run, names):
    """One dict per class, in label order: what per_class.csv holds. The accuracy on a class's images is its recall."""
    hits, images, predicted = np.diag(run.confusion), run.confusion.sum(1), run.confusion.sum(0)
    errors = run.confusion - np.diag(hits)
    low, high = utils.wilson_interval(hits, np.maximum(images, 1))
    columns = {"label": range(NUM_CLASSES), "class": names, "superclass": np.array(list(SUPERCLASSES))[SUPERCLASS_OF]}
    columns |= {"images": images, "accuracy": hits / np.maximum(images, 1), "low": low, "high": high}
    columns |= {"precision": hits / np.maximum(predicted, 1), "f1": 2 * hits / np.maximum(images + predicted, 1)}
    columns["mostly_taken_for"] = np.where(errors.any(1), np.array(names)[errors.argmax(1)], "")
    columns["times"] = errors.max(1)
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def write_run(run):
    """metrics.json, confusion.npy, per_class.csv and the pictures of a run, which are drawn if the scores are new."""
    folder, names = run.folder, class_names(run.config["dataset"])
    if not (folder / "val_logits.npy").exists():
        return  # published without: metrics.json has what cannot be computed from what is here
    content = {"images": len(run.labels)} | run.values | {"trust": run.trust}
    content["ci95"] = {"accuracy": accuracy_interval(run.raw)}
    for name, values in run.raw.means().items():
        half = 1.96 * values.std() / math.sqrt(len(values))
        content["ci95"].setdefault(name, [values.mean() - half, values.mean() + half])
    known = utils.recorded_checksums(folder) if (folder / "metrics.json").exists() else {}
    content["sha256"] = {name: utils.sha256(folder / name) for name in ARRAYS} | known
    pictures = {"confusion.png": draw_confusion, "per_class.png": draw_per_class, "reliability.png": draw_reliability}
    draw_due(folder, pictures, folder / "metrics.json", content, run, names)
    utils.write_npy(folder / "confusion.npy", run.confusion)
    utils.write_csv(folder / "per_class.csv", per_class_rows(run, names))
    utils.write_json(folder / "metrics.json", content)


def draw_due(folder, pictures, path, content, *what):
    """Draw the pictures {name: function} that are missing, and all of them if content is not what path has.

    The caller writes path afterwards: whatever happens until then, the pictures are drawn again.
    """
    try:
        same = json.loads(path.read_bytes()) == utils.rounded(content)
    except (OSError, ValueError):
        same = False
    for name, draw in pictures.items():
        if not (same and (folder / name).exists()):
            utils.save_figure(folder / name, draw, *what)


# ---- the report -----------------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
STUDY = {"smoothing": 0.1, "epochs": 40, "lr": 0.01, "width": 64, "model": "resnet18", "mixup": 0.0, "cutmix": 0.0}
PUBLISHED = ["the study (smoothing 0.1)", "65.96", "-", "66.11", "65.96", "65.88", "-", "-", "-"]  # as CLASSIFICATION


class Study:
    """One recipe or two, [baselines] or [baselines, changed], on the same images: verdict and report."""

    def __init__(self, baselines, changed):
        self.arms = [arm for arm in (baselines, changed) if arm]
        self.runs = baselines + changed
        self.first, self.last, self.folder = baselines[0], self.arms[-1][0], self.arms[-1][0].folder
        self.dataset = self.first.config["dataset"]
        before, after = utils.recipe(self.first.config), utils.recipe(self.last.config)
        differing = [key for key in before | after if before.get(key) != after.get(key)]
        changes = [f"{key} {after.get(key)} (was {before.get(key)})" for key in differing]
        seeds = " against ".join(", ".join(str(run.seed) for run in arm) for arm in self.arms)
        what = f"What changes with {', '.join(changes)}" if changed else f"{self.first.name} alone"
        self.heading = utils.plain(f"{what}; seeds {seeds}")
        self.rows = [(claim, judge(claim, changed, baselines, self.last.name)) for claim in COMPARISONS if changed]
        self.rows += [(claim, judge(claim, arm, None, arm[0].name)) for claim in ABOUT_ONE for arm in self.arms]

    def rows_on(self, text):
        """The rows of the claims whose text begins so, as a list in Markdown."""
        lines = []
        for claim, row in self.rows:
            if claim.text.startswith(text):
                note = f" ({row['note']})" if row["note"] else ""
                lines.append(f"- {row['recipe']}, {claim.meaning}: {figure_cell(claim, row)}{note}. "
                             f"The study says \"{claim.study}\": **{row['word']}**.")  # fmt: skip
        return "\n".join(lines)

    def picture(self, run, name, words, made_by):
        """A picture in a run's folder, linked relatively, or the command that makes it."""
        path = run.folder / name
        if not path.exists():
            return f"*Missing: {words}. To make it:* `{made_by}`"
        target = Path(os.path.relpath(path.resolve(), self.folder.resolve())).as_posix()
        return f"![{words}]({target.replace(' ', '%20')})"

    def commands(self):
        """{what: command} that make the files of this study, as typed in the folder of the scripts."""
        found = {"evaluate": f"python evaluate.py {' '.join(map(place, self.runs))}"}
        found["stress"] = f"{found['evaluate']} --stress"
        for run in self.runs:
            arm = next(arm for arm in self.arms if run in arm)
            others = [self.first if arm is self.arms[-1] else self.last] if len(self.arms) > 1 else []
            others += [other for other in arm if other is not run][:1]  # the control
            compare = f" --compare {' '.join(map(place, others))}" if others else ""
            found["failures", run] = f"python failures.py {place(run)}{compare}"
            maps = f" --compare {place(self.last)}" if run is self.first and len(self.arms) > 1 else ""
            found["gradcam", run] = f"python gradcam.py {place(run)}{maps}"
        return found


def place(run):
    """A run directory as a command names it from the folder of the scripts, wherever the report is written from."""
    folder = run.folder.resolve()
    return utils.quote(folder.relative_to(HERE) if folder.is_relative_to(HERE) else folder)


def setup_table(study):
    rows = []
    for run in study.runs:
        config, log = run.config, run.log
        epochs = ["-"] * 3
        if log:
            best = log["val_acc"].argmax()
            hours = log["seconds"].sum() / 3600
            epochs = [f"{best + 1} of {len(log['val_acc'])}", cell(log["val_acc"][best]), f"{hours:.1f}"]
        machine = ", ".join(str(config.get(key, "-")) for key in ("device", "precision", "torch"))
        row = [run.name, f"`{config.get('command', '-')}`", run.seed, *epochs]
        rows.append([*map(utils.plain, row), utils.plain(f"{machine}, {config.get('threads', '-')} threads")])
    return markdown(["run", "command", "seed", "best epoch", "validation accuracy (%)", "hours", "machine"], rows)


def read_failures(study):
    """The rows of failures.csv of the first run, if they belong to its logits; [] otherwise."""
    run = study.first
    columns = {"index": int, "representative": int, "checkpoint": str}
    try:
        rows = utils.read_csv(run.folder / "failures.csv", "python failures.py", "a list of failures", columns)
        known = utils.checkpoint_id(run.folder)
    except ScriptError:
        return []
    fitting = all(row["checkpoint"] == known and row["index"] in range(len(run.labels)) for row in rows)
    return rows if fitting else []


def failures_text(study):
    """What the runs make of the mistakes in failures.csv of the first run."""
    first, others, names = study.first, study.runs[1:], class_names(study.dataset)
    rows = read_failures(study)
    if not rows:
        return f"*Missing: a list of mistakes of {first.name}. To make it:* `{study.commands()['failures', first]}`"
    index, table = [row["index"] for row in rows], []
    for run in others:
        repaired = run.raw.correct[index].sum()
        same = (run.raw.pred == first.raw.pred)[index].sum()
        counts = [f"{n} of {len(index)} ({100 * n / len(index):.0f} %)" for n in (repaired, same, len(index) - repaired - same)]
        role = "the control: another seed" if run in study.arms[0] else "changed"
        table.append([run.name, role, *counts, cell(run.raw.confidence[index].mean(), 1)])
    fates = markdown(["run", "", "repaired", "same wrong class", "another wrong class", "mean confidence (%)"], table)
    table = []
    for i in [row["index"] for row in rows if row["representative"]]:
        people = votes(i) if first.official else None
        preds = [f"{names[run.raw.pred[i]]} {100 * run.raw.confidence[i]:.0f} %" for run in study.runs]
        table.append([i, names[first.labels[i]], "-" if people is None else f"{people} of 5", *preds])
    header = ["test image", "label", "people who uphold it", *(run.name for run in study.runs)]
    mean = cell(first.raw.confidence[index].mean(), 1)
    return f"""\
{first.name} makes the {len(index)} mistakes in its failures.csv with a mean confidence of {mean} %. Other runs:

{fates if others else "(no other run)"}

Failures picked for their confidence in one run look better in any other run. So the change has an effect only beyond
that of the control.

Three of them, evenly spread over the ranks of confidence, one per pair of classes:

{markdown(header, table)}"""


def counts_table(study):
    rows = []
    for run in study.runs:
        failures = run.raw.failures
        doubtful = (failures & DOUBTFUL).sum() if run.official else "-"
        rows.append([run.name, failures.sum(), cell(failures.mean()), doubtful])
    return markdown(["run", "confident failures", "of all images (%)", "with a doubtful label"], rows)


def comparison_table(study):
    rows = []
    for claim, row in study.rows:
        if claim in COMPARISONS:
            said = f"\"{claim.study}\"" if claim.study else ""
            rows.append([said, claim.text, figure_cell(claim, row), row["word"], claim.meaning, row["note"]])
    header = ["the study says", "tested as", "change [95 %]", "verdict", "change of", "note"]
    return markdown(header, rows) if rows else "A comparison needs a second recipe."


def alone_table(study):
    """The claims about one recipe, with the recipes side by side."""
    names, table = [arm[0].name for arm in study.arms], []
    for claim in ABOUT_ONE:
        found = [row for other, row in study.rows if other is claim]
        cells = [f"{figure_cell(claim, row)}: {row['word']}" for row in found]
        notes = "; ".join(dict.fromkeys(row["note"] for row in found if row["note"]))
        table.append([f"\"{claim.study}\"", claim.text, *cells, claim.meaning, notes])
    return markdown(["the study says", "tested as", *names, "the figure is", "note"], table)


def superclass_table(study, confusions):
    """Accuracy and share of errors that stay inside, for each superclass; confusions: a mean (100, 100) per recipe."""
    rows = []
    for k, superclass in enumerate(SUPERCLASSES):
        inside, row = SUPERCLASS_OF == k, [superclass.replace("_", " ")]
        for confusion in confusions:
            hits, images = np.diag(confusion)[inside].sum(), confusion[inside].sum()
            stay = confusion[np.ix_(inside, inside)].sum() - hits
            row += [cell(hits / images, 1), cell(stay / max(images - hits, 1e-9), 0)]
        rows.append(row)
    columns = [f"{arm[0].name}: {what}" for arm in study.arms for what in ("accuracy (%)", "errors inside (%)")]
    return markdown(["superclass", *columns], rows)


def pairs_table(study, confusions):
    """The ten pairs of classes most often taken for each other by the first recipe."""
    errors = [confusion + confusion.T for confusion in confusions]
    order = np.argsort(-np.triu(errors[0], 1), axis=None, kind="stable")[:10]
    names, rows = class_names(study.dataset), []
    for i, j in zip(*np.unravel_index(order, errors[0].shape)):
        rows.append([f"{names[i]} / {names[j]}", *(f"{both[i, j]:.1f}" for both in errors)])
    return markdown(["pair", *(arm[0].name for arm in study.arms)], rows)


def classes_table(study, confusions):
    names, accuracy = class_names(study.dataset), [np.diag(c) / np.maximum(c.sum(1), 1) for c in confusions]
    order, change = np.argsort(accuracy[0], kind="stable"), accuracy[-1] - accuracy[0]
    groups, rows = {"worst": order[:10], "best": order[:-11:-1]}, []
    if len(study.arms) > 1:
        groups["largest changes"] = np.argsort(-np.abs(change), kind="stable")[:10]
    for group, labels in groups.items():
        rows += [[group, names[k], *(cell(found[k], 1) for found in accuracy), cell(change[k], 1)] for k in labels]
    return markdown(["", "class", *(f"{arm[0].name} (%)" for arm in study.arms), "change"], rows)


def stress_table(study):
    rows = []
    for run in [run for run in study.runs if run.stress]:
        correct, confidence, corrupted = run.stress.correct, run.stress.confidence, KINDS == "corruption"
        values = [correct[0], confidence[0], correct[corrupted], confidence[corrupted]]
        values += [correct[np.isin(NAMES, names)] for names in GROUPS.values()]
        values.append(correct[(KINDS == "pgd") & (STRENGTHS == 1)])
        rows.append([run.name, *(cell(float(value.mean()), 1) for value in values)])
    header = ["in %", "clean", "confidence", "corrupted", "confidence", *GROUPS, "PGD at 1/255"]
    return markdown(header, rows) if rows else f"*Missing. To measure it:* `{study.commands()['stress']}`"


def trust_table(study):
    rows = []
    for arm in study.arms:
        for run in arm:
            shares = [cell(run.trust[key], 1) for key in ("answers", "answers_accuracy", "set_coverage")]
            sets = [cell(run.trust["set_size"], 2, 1), cell(run.trust["set_worst_class"], 0)]
            rows.append([run.name, cell(run.values["accuracy"]), cell(run.values["ece"]), *shares, *sets])
        if len(arm) > 1:
            together = ensemble(arm)
            ece = utils.calibration_error(together.confidence, together.correct)
            rows.append([f"ensemble of {len(arm)}", cell(together.correct.mean()), cell(ece), *["-"] * 5])
    return markdown(["in %", "accuracy", "ECE", "answers", "right", "sets hold", "classes", "worst class"], rows)


def report(study):
    """The study's sections, in its order, from the runs at hand: the text of report.md."""
    commands, first, last = study.commands(), study.first, study.last
    synthetic = " (SYNTHETIC data)" if study.dataset == "synthetic" else ""
    network = MODELS.get(first.config["args"].get("model"), "ResNet-18")
    names = " and ".join(arm[0].name for arm in study.arms)
    confusions = [np.mean([run.confusion for run in arm], 0) for arm in study.arms]
    scores = score_rows(study.arms, CLASSIFICATION)
    if any(STUDY.items() <= utils.recipe(arm[0].config).items() for arm in study.arms) and not synthetic:
        scores.insert(0, PUBLISHED)
    reproduce = [run.config["command"] for run in study.runs if "command" in run.config]
    reproduce += [commands["stress"], *(commands[what, run] for run in study.runs for what in ("failures", "gradcam"))]
    reproduce = utils.plain("; ".join([*reproduce, commands["evaluate"]])).replace("; ", "\n")
    reproduce = reproduce.replace(" results/", " runs/")  # where train.py writes what was published there
    return f"""\
# {network} on {TITLES[study.dataset]}: {names}

{study.heading}.

## 1. Setup{synthetic}

{setup_table(study)}

## 2. Training{synthetic}

{study.picture(last, "training.png", "training and validation curves", commands["evaluate"])}

The training loss is on augmented images and includes the smoothing; the validation loss does neither.

{study.rows_on("validation")}

## 3. Scores{synthetic}

- accuracy [95 %]: test images classified correctly. Its interval covers the choice of test images alone.
- no dup.: accuracy without the 891 test images that have a near-duplicate in training.
- precision, recall, F1: means over the 100 classes (macro). top-5: the true class is among the five most likely.
- superclass: the predicted class is in the right superclass.
- confident errors: wrong with a confidence above 0.90, of all test images.
- NLL: negative log probability of the true class, in nats. Brier: squared distance of the probabilities, 0 to 2.
- gap: mean confidence minus accuracy. ECE: expected calibration error in 15 bins.
- AUROC: how often a correct image is more confident than a wrong one.
- T: the temperature that fits the validation images; NLL/T and so on: after dividing the logits by it.

{markdown(["in %", "accuracy [95 %]", *CLASSIFICATION], scores)}

{markdown(["in %, NLL in nats", "accuracy [95 %]", *CALIBRATION], score_rows(study.arms, CALIBRATION))}

## 4. Confident failures{synthetic}

A confident failure is wrong with a confidence above 0.90.

{counts_table(study)}

A label is doubtful if fewer than three of five people uphold it (Northcutt et al., arXiv:2103.14749). People looked
at 2,235 test images, which a network's disagreement had picked. So the counts are lower bounds.

{failures_text(study)}

{study.picture(first, "failures.png", f"confident failures of {first.name}", commands["failures", first])}

## 5. What the network looked at{synthetic}

{study.picture(first, "gradcam.png", f"Grad-CAM of confident failures of {first.name}", commands["gradcam", first])}

A map of layer4 has 4x4 cells, and each cell has seen the whole image. It shows a direction, no outline.

{study.rows_on("failures rely")}

## 6. What the change did{synthetic}

*Supported*: the 95 % interval lies on the claimed side. *Contradicted*: it lies on the other side. *Not decided*:
neither. The interval covers the choice of test images and the randomness of training; it needs two runs of each
recipe, and equally many. The thirteen rows are not corrected for their number.

{comparison_table(study)}

{alone_table(study)}

{study.picture(last, "verdict.png", "the verdict", commands["evaluate"])}

## 7. Confusion and classes{synthetic}

{study.picture(first, "confusion.png", f"confusion matrix of {first.name}", commands["evaluate"])}

{superclass_table(study, confusions) if not synthetic else "Synthetic images have no superclasses."}

The ten most confused pairs of {first.name}: errors in both directions, of 200 images, means over the runs.

{pairs_table(study, confusions)}

Accuracy of classes, means over the runs. A class has 100 test images, so between two single runs a difference of up
to 20 points is noise.

{classes_table(study, confusions)}

{study.picture(first, "per_class.png", f"worst and best classes of {first.name}", commands["evaluate"])}

## 8. Stress{synthetic}

Accuracy on the first test images of each class: 12 corruptions in 5 severities (CIFAR-100-C style, 12 of 15,
re-implemented, so not comparable with published mCE), and PGD of 10 steps. One attack does not measure robustness.

{stress_table(study)}

{study.picture(last, "stress.png", "accuracy under corruption and attack", commands["stress"])}

## 9. May I trust it?{synthetic}

- answers: the share of test images that may be answered if 95 of 100 answers are to be right. The confidence that
  this takes comes from the validation images. right: the accuracy on them.
- sets hold: name all classes above a probability chosen so that on validation images 90 % of the sets hold the true
  class. classes: how many are named, on average. worst class: the promise is only on average.
- ensemble: the mean probability of the runs.

Both promises end where images differ from the training images, as under corruption.

{trust_table(study)}

{study.picture(first, "reliability.png", f"confidence and accuracy of {first.name}", commands["evaluate"])}

## 10. Limits{synthetic}

- Seeds: {" and ".join(f"{len(arm)} of {arm[0].name}" for arm in study.arms)}. Two of each recipe see a change of two \
points of accuracy nine times in ten, and of one point every second time. Three see one point nine times in ten. Half \
a point needs more than five.
- Not tested: "background" (border is not background), "human intuition", "barely noticeable differences".
- Some test labels are wrong (section 4). Some test images have near-duplicates in training (section 3).

## 11. Reproduce{synthetic}

```
{reproduce}
```
"""


def write_report(study):
    """verdict.json, the pictures that need several runs, and report.md; returns the report's path."""
    folder, content = study.folder, {"baselines": [run.name for run in study.arms[0]]}
    content |= {"changed": [run.name for run in study.arms[1]] if len(study.arms) > 1 else [], "dataset": study.dataset}
    content["claims"] = [row for _, row in study.rows]
    pictures = {"training.png": draw_training, "verdict.png": draw_verdict}
    if all(run.stress for run in study.runs):
        pictures["stress.png"] = draw_stress
    draw_due(folder, pictures, folder / "verdict.json", content, study)
    utils.write_json(folder / "verdict.json", content)
    utils.write_file(folder / "report.md", report(study).encode())
    return folder / "report.md"


# ---- main -----------------------------------------------------------------------------------------------


def by_recipe(runs):
    """The runs in lists of one recipe each, in the order in which the recipes come; what cannot be compared stays out."""
    arms = []
    for run in runs:
        arm = next((arm for arm in arms if utils.recipe(arm[0].config) == utils.recipe(run.config)), None)
        reason = None
        if not run.config.get("finished", True):
            log, epochs = run.log, run.config["args"].get("epochs")
            reason = f"stopped after epoch {len(log['val_acc']) if log else 0} of {epochs} (continue it with --resume)"
        elif arms and not np.array_equal(run.labels, arms[0][0].labels):
            reason = f"was scored on other images than {arms[0][0].name}"
        elif arm and run.seed in [other.seed for other in arm]:
            reason = f"repeats the seed {run.seed} of its recipe"
        elif arm:
            arm.append(run)
        else:
            arms.append([run])
        if reason:
            warn(f"{run.name} {reason}; left out of means and verdict")
    return arms


def find_runs(texts):
    """[(run_dir, config)] of the runs that can be scored: those with an epoch saved, or with logits."""
    found = []
    for text in dict.fromkeys(texts or [None]):
        run_dir, config = utils.open_run(text)
        if any((run_dir / name).exists() for name in ("best.pt", "test_logits.npy")):
            found.append((run_dir, config))
        else:
            warn(f"{run_dir} has no saved epoch and is passed over")
    if not found:
        raise ScriptError("no run with a saved epoch among those given; run python train.py first")
    return found


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
    return args


def update_logits(folders, args):
    """Compute the logits that are missing or outdated. Returns the device, None if none is needed."""
    stale = [(run_dir, config) for run_dir, config in folders if (run_dir / "best.pt").exists() and not is_current(run_dir)]
    device = utils.select_device(args.device) if stale or args.stress or args.device != "auto" else None
    for run_dir, config in stale:
        compute_logits(run_dir, *utils.dataset_of(config, args), device)
    return device


def main(argv=None):
    """Evaluate the given runs; returns {run directory: {metric: value}}."""
    args = parse_args(argv)
    folders = find_runs(args.runs)
    device = update_logits(folders, args)
    names = utils.short_names([run_dir for run_dir, _ in folders])
    runs = [read_run(*folder, name) for folder, name in zip(folders, names)]
    for run in runs:
        write_run(run)
        run.stress = read_stress(run)
    arms = by_recipe(runs)
    print_scores(runs, arms)
    if args.stress:
        measure_stress(runs, args, device)

    # the first recipe alone, or every other one against it
    reports = []
    for study in [Study(arms[0], changed) for changed in arms[1:] or [[]]] if arms else []:
        rows = study.rows if len(study.arms) > 1 else [pair for pair in study.rows if pair[1]["word"] != "not decided"]
        if rows:
            print_verdict(study, rows)
        reports.append(write_report(study))
    if len(arms) < 2:
        print("A verdict needs two recipes, and two seeds of each: python train.py --seed 43")
    if not (runs[0].folder / "failures.csv").exists():
        others = [run.folder for run in runs[1:]]
        compare = f" --compare {' '.join(map(utils.quote, others))}" if others else ""
        print(f"next: python failures.py {utils.quote(runs[0].folder)}{compare}{utils.data_flag(args)}")
    for path in reports:
        print(f"report: {utils.plain(path)}")
    return {str(run.folder): run.values for run in runs}


if __name__ == "__main__":
    utils.run_script(main)
