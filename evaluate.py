"""Score trained runs on the CIFAR-100 test set, and judge what a change does.

    python evaluate.py runs/baseline                        # one run
    python evaluate.py runs/baseline runs/baseline-seed43 runs/smoothing0.1 ...
    python evaluate.py runs/baseline runs/smoothing0.1 --stress

Runs of one recipe differ in the seed alone. The first recipe is the baseline;
every other one gets a verdict on the study's claims (see README), with
intervals that cover the choice of test images and the randomness of training.

The idea: a metric is computed from weighted test images. Weights of one give
its value, the weights of a bootstrap resample one draw of it, many draws
its interval; a claim is arithmetic on the draws of several runs. To add a
metric, add a line to metrics(); to add a claim, add an entry to CLAIMS.
The file follows this order: logits, the scores of each image, metrics,
resamples, claims, stress, tables and pictures, main.

Writes into each run directory test_logits.npy (10000, 100) float32 and
test_labels.npy (10000,) int64, where row i is test image i; the same for the
validation images; metrics.json (fractions, 95 % intervals under ci95);
confusion.npy (row = true class, column = predicted) and .png, per_class.csv
and .png, reliability.png; into the first run of each changed recipe
verdict.json and .png. --stress adds stress_preds.npy, stress_confidence.npy,
stress.csv and .png. Logits that are there already are not computed again.
"""

import itertools
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F

import utils
from data import CORRUPTIONS, NUM_CLASSES, SMALL_ANIMALS, SUPERCLASS_OF, SUPERCLASSES, TITLES
from data import class_names, corrupt, load_dataset, normalize, split_id, split_train_val
from model import MODELS
from utils import ScriptError, calibration_bins, confusion_matrix, log_softmax, warn

# The study's one run: ResNet-18 with smoothing 0.1, best epoch of 40, CIFAR-100 test set.
PUBLISHED = {"accuracy": 0.6596, "macro_precision": 0.6611, "macro_recall": 0.6596, "macro_f1": 0.6588}

ARRAYS = ("test_logits.npy", "test_labels.npy", "val_logits.npy", "val_labels.npy")
CONFIDENT = 0.9  # the study's failures are wrong with a confidence above this
UNSCALED = {  # metrics that a temperature leaves alone
    "accuracy", "macro_precision", "macro_recall", "macro_f1", "top5_accuracy",
    "superclass_accuracy", "errors_within_superclass",
}  # fmt: skip
MARGIN = 0.01  # accuracies within a point of each other count as the same
RESAMPLES, BLOCK = 2000, 100  # bootstrap resamples of the test images, and how many are handled at once


# ---- logits ---------------------------------------------------------------------------------------------


def compute_logits(run_dir, dataset, data_dir, device):
    """Run best.pt over the test and the validation images in float32; save logits and labels."""
    model, checkpoint = utils.load_best(run_dir, device)
    images, labels = load_dataset(dataset, data_dir, train=True)
    _, val_index = split_train_val(labels, checkpoint["args"]["val_size"], checkpoint["args"]["seed"])
    if checkpoint.get("split") != split_id(val_index):
        reason = "this version of NumPy splits training and validation images differently"
        raise ScriptError(f"{run_dir}: {reason}; evaluate with the version in config.json")
    splits = {"val": (images[val_index], labels[val_index]), "test": load_dataset(dataset, data_dir, train=False)}
    print(f"{run_dir}: logits of best.pt, epoch {checkpoint['epoch']}, on {utils.device_name(device)}", flush=True)
    for split, (images, labels) in splits.items():
        batches = utils.track(images.split(500), f"{split} batch")
        logits = utils.predict(model, (normalize(batch.to(device)) for batch in batches))
        utils.write_npy(run_dir / f"{split}_logits.npy", logits.cpu().numpy())
        utils.write_npy(run_dir / f"{split}_labels.npy", labels.numpy())
    # The scores come later; until then metrics.json says which best.pt these logits belong to.
    utils.write_json(run_dir / "metrics.json", {"sha256": checksums(run_dir)})


def checksums(run_dir):
    """{file: SHA-256} of the arrays and of their best.pt; if that is gone, its checksum from metrics.json."""
    found = {name: utils.sha256(run_dir / name) for name in ("best.pt", *ARRAYS)}
    found["best.pt"] = found["best.pt"] or known_checksums(run_dir).get("best.pt")
    return found


def known_checksums(run_dir):
    """The checksums in metrics.json; {} if it is missing or damaged: the scores are computed again."""
    try:
        return utils.recorded_checksums(run_dir)
    except ScriptError:
        return {}


# ---- one run --------------------------------------------------------------------------------------------


class Scores:
    """What logits (N, C) predict for N test images: arrays (N,). Metrics are computed from these and weights."""

    def __init__(self, logits, labels):
        log_probs = log_softmax(logits)
        probs, rows = np.exp(log_probs), np.arange(len(labels))
        true_logits = logits[rows, labels][:, None]
        ahead = (logits > true_logits) | ((logits == true_logits) & (np.arange(logits.shape[1]) < labels[:, None]))
        self.pred = logits.argmax(1)
        self.confidence = probs[rows, self.pred]  # largest softmax probability
        self.correct = self.pred == labels
        # top5: is the true class among the five most likely? Where logits tie, the lower label leads.
        self.top5 = ahead.sum(1) < 5
        self.nll = -log_probs[rows, labels]  # -log of the true class's probability, in nats
        self.brier = (probs**2).sum(1) - 2 * probs[rows, labels] + 1  # sum of (probability - target)^2, in [0, 2]
        self.same_superclass = SUPERCLASS_OF[self.pred] == SUPERCLASS_OF[labels]  # right, or an error inside it
        self.failures = ~self.correct & (self.confidence > CONFIDENT)  # the study's confident failures


def fit_temperature(logits, labels):
    """The T in 0.01..100 that minimises the NLL of logits / T, Guo et al., arXiv:1706.04599.

    Fit it on images held out from training, and never on those that are scored. The NLL is convex in b = 1/T,
    so its slope, the mean of (sum_k p_k z_k) - z_y, changes sign once: bisection. Where it does not, as with no
    error at all, the nearer bound comes back.
    """
    logits = logits - logits.max(1, keepdims=True)  # so that exp() cannot overflow
    true_logits = logits[np.arange(len(labels)), labels]
    low, high = 0.01, 100.0
    for _ in range(45):  # ln(high / low) from 9.2 to 3e-13
        b = math.sqrt(low * high)
        p = np.exp(b * logits)
        slope = (np.einsum("nc,nc->n", p, logits) / p.sum(1) - true_logits).mean()
        low, high = (low, b) if slope > 0 else (b, high)
    return 1 / b


class Run:
    """A trained run on the test images, as the rest of this file sees it."""

    def __init__(self, name, config, logits, labels, temperature, scaled_logits=None, folder=None):
        self.name, self.config, self.folder = name, config, folder
        self.seed = config["args"].get("seed")
        self.logits, self.labels = logits, labels  # (N, 100) float64 and (N,) int64
        self.temperature = temperature  # None for an ensemble, whose members are scaled one by one
        self.scaled_logits = logits / temperature if scaled_logits is None else scaled_logits
        self.raw, self.scaled = Scores(logits, labels), Scores(self.scaled_logits, labels)
        self.confusion = confusion_matrix(labels, self.raw.pred, NUM_CLASSES)
        self.stress = None  # a Stress, once it is read or measured
        self.draws = {}  # {metric: (RESAMPLES,)}, once measure() was called
        self.values = {}  # {metric: float}, and with the suffix _scaled
        for suffix, scores, same in (("", self.raw, ()), ("_scaled", self.scaled, UNSCALED)):
            found = metrics(scores, labels, np.ones((1, len(labels))))
            found["ece_null"] = [calibrated_ece(scores.confidence)]
            self.values |= {name + suffix: float(value[0]) for name, value in found.items() if name not in same}

    def measure(self, weights):
        """Fill draws: every metric in every resample of the test images."""
        blocks = np.split(weights, range(BLOCK, len(weights), BLOCK))
        found = [metrics(self.raw, self.labels, block.astype(np.float32)) for block in blocks]
        self.draws = {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def read_run(run_dir, config):
    """The Run of a directory that has logits."""
    logits, labels = utils.load_logits(run_dir, "test")
    temperature = fit_temperature(*utils.load_logits(run_dir, "val"))
    return Run(run_dir.resolve().name, config, logits, labels, temperature, folder=run_dir)


def ensemble(runs):
    """(Run of the mean probability, {what: (N,)}): a deep ensemble, Lakshminarayanan et al., arXiv:1612.01474.

    disagreement: share of the pairs of members that predict different classes. mutual_information: entropy of
    the mean probability minus the members' mean entropy, in nats (Depeweg et al., arXiv:1710.07283).
    Scaled: the mean of the scaled probabilities. It has no temperature of its own: seeds split differently, so
    no validation image is held out from every member.
    """
    log_probs = np.array([log_softmax(run.logits) for run in runs])  # (members, N, 100)
    log_mean = np.logaddexp.reduce(log_probs) - math.log(len(runs))
    log_scaled = np.logaddexp.reduce([log_softmax(run.scaled_logits) for run in runs]) - math.log(len(runs))
    pairs = [a.raw.pred != b.raw.pred for a, b in itertools.combinations(runs, 2)]
    information = (np.exp(log_probs) * (log_probs - log_mean)).sum(2).mean(0)  # mean KL divergence from the mean
    extra = {"disagreement": np.mean(pairs, 0), "mutual_information": np.maximum(information, 0)}  # < 0 by rounding
    return Run(f"ensemble of {len(runs)}", runs[0].config, log_mean, runs[0].labels, None, log_scaled), extra


# ---- metrics --------------------------------------------------------------------------------------------


@np.errstate(invalid="ignore", divide="ignore")
def metrics(scores, labels, weights):
    """{metric: (R,) values}, NaN where undefined, as without errors. weights (R, N): how often each image counts."""
    s, w, n = scores, weights, weights.sum(1)
    wrong, gap = ~s.correct, s.confidence - s.correct
    columns = {  # metrics that are means over the images
        "accuracy": s.correct,
        "top5_accuracy": s.top5,
        "superclass_accuracy": s.same_superclass,
        "errors_within_superclass": s.same_superclass & wrong,  # divided by the errors below
        "nll": s.nll,
        "brier": s.brier,
        "mean_confidence": s.confidence,
        "signed_gap": gap,  # above 0: more confident than right
        "confident_errors": s.failures,
    }
    gap_in_bins = gap[:, None] * (calibration_bins(s.confidence)[:, None] == np.arange(15))
    # float64: in float32 the order of the sums, which threads change, would show in the sixth digit
    means = w.astype(np.float64) @ np.column_stack([*columns.values(), gap_in_bins]) / n[:, None]
    found = dict(zip(columns, means.T))
    found["ece"] = np.abs(means[:, len(columns) :]).sum(1)  # see utils.calibration_error
    found["errors_within_superclass"] = found["errors_within_superclass"] / (1 - found["accuracy"])
    true, predicted = (np.eye(NUM_CLASSES, dtype=w.dtype)[classes] for classes in (labels, s.pred))  # (N, 100)
    counts = w @ np.hstack([true * s.correct[:, None], true, predicted])
    macro = utils.macro_scores_from_counts(*np.split(counts, 3, axis=1))
    found["macro_precision"], found["macro_recall"], found["macro_f1"] = macro
    found["aurc"], found["auroc_failure"] = rank_by_confidence(s.confidence, wrong, w)
    return found


def rank_by_confidence(confidence, wrong, w):
    """(AURC, AUROC of confidence for errors), each (R,), for weights (R, N).

    AURC: the error rate among the images at least as confident as image i, averaged over i; lower is better
    (Geifman, Uziel, El-Yaniv, arXiv:1805.08206). AUROC: P(a correct image is more confident than a wrong
    one), ties half; NaN without errors or without hits.
    """
    order = np.argsort(-confidence, kind="stable")
    falling, wrong, drawn = -confidence[order], wrong[order], w.take(order, 1)
    before = np.searchsorted(falling, falling) - 1  # the last image that is more confident; -1: there is none
    last = np.searchsorted(falling, falling, "right") - 1  # the last one that is equally confident
    images, errors = np.cumsum(drawn, 1), np.cumsum(drawn * wrong, 1)  # at least as confident
    hits, n, wrong_n = images - errors, images[:, -1], errors[:, -1]
    aurc = (drawn * errors.take(last, 1) / np.maximum(images.take(last, 1), 1)).sum(1, dtype=np.float64) / n
    above = hits[:, before[wrong]] * (before[wrong] >= 0) + hits[:, last[wrong]]  # ties once, the others twice
    pairs = (drawn[:, wrong] * above).sum(1, dtype=np.float64) / 2
    return aurc, pairs / (wrong_n * (n - wrong_n))


def calibrated_ece(confidence):
    """The ECE that a perfectly calibrated model of these confidences shows on average: its noise floor.

    Over a bin, correct - confidence then sums to about normal with variance sum p (1 - p), p the confidence. The
    mean absolute value of that is sqrt(2 / pi) standard deviations.
    """
    variance = np.bincount(calibration_bins(confidence), confidence * (1 - confidence))
    return float(np.sqrt(2 / np.pi * variance).sum() / len(confidence))


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


# ---- resamples ------------------------------------------------------------------------------------------


def resample(labels, seed=0):
    """How often each image is drawn in each bootstrap resample: (RESAMPLES, N) uint8.

    The test set has 100 images of every class by design, so each class is redrawn from its own images. All
    runs get the same resamples: that pairs them.
    """
    rng = np.random.default_rng(seed)
    by_class = np.argsort(labels, kind="stable")
    classes = labels[by_class]
    first, size = np.searchsorted(classes, classes), np.bincount(labels)[classes]  # of each image's class
    weights = np.empty((RESAMPLES, len(labels)), np.uint8)
    for row in weights:
        drawn = by_class[first + (rng.random(len(labels)) * size).astype(np.int64)]
        row[:] = np.bincount(drawn, minlength=len(labels))
    return weights


def weighted_mean(values, weights):
    """Means (R,) of values (N,) under weights (R, N); 0 where all weights are 0."""
    return np.einsum("rn,n->r", weights, values, dtype=np.float64) / np.maximum(weights.sum(1), 1e-9)


def interval(draws):
    """[low, high]: the middle 95 % of the draws, None if some are undefined."""
    return None if draws is None or np.isnan(draws).any() else np.quantile(draws, [0.025, 0.975]).tolist()


# ---- the claims -----------------------------------------------------------------------------------------


@dataclass
class Estimate:
    """A claim's statistic, and what to hold it against."""

    figure: float | None = None
    draws: np.ndarray | None = None  # of the figure, over test images and training runs
    control: str = ""  # what the figure would be without the effect, or how far seeds alone move it
    control_value: float | None = None
    reference: float = 0.0  # the claim is about figure - reference
    dots: tuple = ((), ())  # the runs of each arm, on the scale of figure - reference
    unit: float = 100  # 100: points; 1: nats
    control_is_count: bool = False
    note: str = ""  # why it cannot be decided


class Arm:
    """A quantity of the runs of one recipe, from [(value, draws (RESAMPLES,))] of the runs."""

    def __init__(self, pairs):
        self.values = np.array([value for value, _ in pairs])  # (R,)
        self.draws = np.array([draws for _, draws in pairs])  # (R, RESAMPLES), in resamples of the test images
        self.mean, runs = self.values.mean(), len(pairs)
        # The part of the mean's variance over images that the runs do not share; the spread between seeds has it too.
        own = (self.draws - self.draws.mean(0)).var(1).sum()
        self.image_noise = own / (runs * (runs - 1)) if runs > 1 else 0.0


class Recipes:
    """The runs of two recipes on the same test images; of one alone, if changed is empty. weights: of resample()."""

    def __init__(self, baselines, changed, weights):
        self.baselines, self.changed, self.weights = baselines, changed, weights
        self.arms = [arm for arm in (baselines, changed) if arm]

    def quantity(self, measure):
        """An Arm per recipe, of measure(run): (value, draws (RESAMPLES,))."""
        return [Arm([measure(run) for run in arm]) for arm in self.arms]

    def metric(self, name):
        return self.quantity(lambda run: (run.values[name], run.draws[name]))

    def mean(self, of_images, weights=None):
        """An Arm per recipe, of the mean over the images of of_images(run), (N,)."""
        weights = self.weights if weights is None else weights
        return self.quantity(lambda run: (of_images(run).mean(), weighted_mean(of_images(run), weights)))


def spread(arms):
    """(standard deviation between seeds, degrees of freedom): all recipes are taken to vary alike."""
    degrees = sum(len(arm.values) - 1 for arm in arms)
    squares = sum(((arm.values - arm.mean) ** 2).sum() for arm in arms)
    return (math.sqrt(squares / degrees) if degrees else math.nan), degrees


def with_noise(figure, draws, image_noise, error, degrees, seed=0):
    """Draws of a figure over test images and training runs.

    draws: (RESAMPLES,) over images. error: standard error over training runs, with a Student t of so many
    degrees of freedom; without a degree the draws are over images alone. The variance of the result is that
    of the draws, minus the image_noise that the error contains as well, plus that of the t. Where runs agree
    by chance, the error is smaller than that noise, and no more than the error is taken out.
    """
    centred = draws - draws.mean()
    variance = centred.var()
    shrink = math.sqrt(max(0.0, 1 - min(image_noise, error**2) / variance)) if variance else 1.0
    noisy = figure + shrink * np.tile(centred, 20)  # each with 20 draws of the t
    return noisy + error * np.random.default_rng(seed).standard_t(degrees, len(noisy)) if degrees else noisy


def level(arm, arms, seed=0):
    """(figure, draws): the mean of one arm; the spread between seeds is that of all arms."""
    s, degrees = spread(arms)
    return arm.mean, with_noise(arm.mean, arm.draws.mean(0), arm.image_noise, s / len(arm.values) ** 0.5, degrees, seed)


def one_recipe(arms, control, control_value, reference=0.0, **about):
    """The Estimate of the first arm's mean, against a reference."""
    dots = (arms[0].values - reference, ())
    return Estimate(*level(arms[0], arms), control, control_value, reference, dots, **about)


def change(arms, control=(), unit=100):
    """The Estimate of the changed runs' mean minus the baselines'. control: (text, value); default: between seeds."""
    before, after = arms
    figure, draws = after.mean - before.mean, after.draws.mean(0) - before.draws.mean(0)
    s, degrees = spread(arms)
    error = s * math.sqrt(1 / len(before.values) + 1 / len(after.values))
    noisy = with_noise(figure, draws, before.image_noise + after.image_noise, error, degrees)
    dots = tuple(arm.values - before.mean for arm in arms)
    return Estimate(figure, noisy, *(control or ("deviation between seeds", s)), dots=dots, unit=unit)


def confident_errors_fall(recipes):
    """They fall by construction if smoothing is new and its highest target, 1 - a + a / 100, is below 0.905."""
    before, a = (arm[0].config["args"].get("smoothing") or 0 for arm in recipes.arms)
    target = 1 - a + a / NUM_CLASSES
    control = (f"highest target under smoothing {a:g}", target) if before < a and target < CONFIDENT + 0.005 else ()
    return change(recipes.metric("confident_errors"), control)


def errors_at_equal_coverage(recipes):
    """Error rate among equally many most confident images: as many as the baselines have above 0.90."""
    count = round(np.mean([(run.raw.confidence > CONFIDENT).sum() for run in recipes.baselines]))
    if count < 50:
        return Estimate(note=f"the baselines have {count} images above {CONFIDENT}; 50 are needed")

    def error_rate(run):
        order = np.argsort(-run.raw.confidence, kind="stable")
        wrong = ~run.raw.correct[order]
        draws = [np.repeat(wrong, drawn)[:count].mean() for drawn in recipes.weights.take(order, 1)]
        return wrong[:count].mean(), np.array(draws)

    return change(recipes.quantity(error_rate))


def confidence_on_failures(recipes, kind):
    """Change of confidence ("raw" or "scaled") on the confident failures of baselines of other seeds.

    Confident failures of one run regress to the mean in any other. So on the failures of each baseline, a set
    of images, only runs of other seeds are compared; then the differences are averaged over the sets.
    """
    runs, split = recipes.baselines + recipes.changed, len(recipes.baselines)
    sets, drops = [], []
    for k, picker in enumerate(recipes.baselines):
        picked = picker.raw.failures
        others = np.array([run.seed != picker.seed for run in runs])
        if picked.sum() < 10 or not others[:split].any() or not others[split:].any():
            continue
        arms = recipes.mean(lambda run: getattr(run, kind).confidence[picked], recipes.weights[:, picked])
        of_runs = np.concatenate([np.column_stack([arm.values, arm.draws]) for arm in arms])  # (runs, 1 + RESAMPLES)
        sets.append(np.where(others[:, None], of_runs, np.nan))
        drops.append(np.nanmean(sets[-1][:split, 0]) - of_runs[k, 0])
    if not sets:
        return Estimate(note="needs baselines of two seeds with 10 confident failures each, and runs of other seeds")

    def difference_and_deviations(table):
        """Of (sets, runs, n): the change (n,), and how far each run lies from the others of its recipe (runs, n)."""
        before, after = table[:, :split].mean(1), table[:, split:].mean(1)
        of_runs = (table - (before + after)[:, None] / 2).mean(0)  # without what a set has in common
        parts = of_runs[:split], of_runs[split:]
        return (after - before).mean(0).filled(np.nan), np.ma.concatenate([part - part.mean(0) for part in parts])

    table = np.ma.masked_invalid(sets)  # (sets, runs, 1 + RESAMPLES); masked: the run has the set's own seed
    difference, deviations = difference_and_deviations(table)
    figure, used = difference[0], ~np.ma.getmaskarray(deviations)[:, 0]
    dots = deviations[:split, 0].compressed(), figure + deviations[split:, 0].compressed()
    about = {"control": "what another baseline seed does", "control_value": np.mean(drops), "dots": dots}
    if min(used[:split].sum(), used[split:].sum()) < 2:
        note = "needs two runs of each recipe on failures of other seeds"
        return Estimate(figure, with_noise(figure, difference[1:], 0.0, 0.0, 0), note=note, **about)
    # A run is compared with others in several sets, so its effect enters many deviations. How much, a unit effect
    # of each run shows. With the same two seeds in both recipes, this is the t-test of two paired differences.
    weights, mixing = difference_and_deviations(0 * table[..., :1] + np.eye(len(runs)))
    products = mixing.filled(0).T @ mixing.filled(0)
    share = (weights**2).sum() / products.trace()  # variance of the change per sum of squared deviations
    error = math.sqrt(share * (deviations[:, 0] ** 2).sum())
    degrees = products.trace() ** 2 / (products**2).sum()  # Satterthwaite
    image_noise = share * deviations[:, 1:].var(1).sum()
    return Estimate(figure, with_noise(figure, difference[1:], image_noise, error, degrees), **about)


def calibration_improves(recipes):
    """Change of a recipe's |mean confidence - accuracy|: of the mean over runs, since per run it is mostly noise."""
    arms = recipes.metric("signed_gap")
    (before, before_draws), (after, after_draws) = (level(arm, arms, seed) for seed, arm in enumerate(arms))
    draws = np.abs(after_draws) - np.abs(before_draws)
    dots = tuple(np.abs(arm.values) - abs(before) for arm in arms)
    return Estimate(abs(after) - abs(before), draws, "deviation between seeds", spread(arms)[0], dots=dots)


def errors_stay_in_superclass(recipes):
    arms = recipes.metric("errors_within_superclass")
    chance = np.mean([chance_within_superclass(run.confusion) for run in recipes.baselines])
    return one_recipe(arms, f"chance; the figure is {arms[0].mean / chance:.1f} times that", chance, chance)


def small_animals_are_worst(recipes):
    """Mean accuracy of the 15 classes of small animals minus that of the 85 others."""
    labels = recipes.baselines[0].labels
    small = np.isin(labels, SMALL_ANIMALS)
    signed = np.where(small, 1 / small.mean(), -1 / (~small).mean())
    arms = recipes.mean(lambda run: run.raw.correct * signed)
    worst = [np.argsort(np.diag(run.confusion), kind="stable")[:10] for run in recipes.baselines]  # equally many images
    control = f"of the ten worst classes; {len(SMALL_ANIMALS) / 10:g} by chance"
    return one_recipe(arms, control, np.isin(worst, SMALL_ANIMALS).sum(1).mean(), control_is_count=True)


def attention_on_border(recipes):
    """From gradcam.py's attention.csv: failures and correct predictions, in pairs of equal confidence and class."""
    pairs, shares = [], []
    for run in recipes.baselines:
        failures, matched = read_attention(run)
        if len(failures) < 20:
            continue
        border = [np.array([row["border_drop"] > row["centre_drop"] for row in rows]) for rows in (failures, matched)]
        shares.append([part.mean() for part in border])
        difference = border[0].astype(float) - border[1]
        drawn = weighted_mean(difference, recipes.weights[:, [row["index"] for row in failures]])
        pairs.append((difference.mean(), drawn))
    if not pairs:
        return Estimate(note="needs 20 confident failures that went through failures.py and gradcam.py")
    of_failures, of_matched = np.mean(shares, 0)
    control = f"of matched correct predictions; {100 * of_failures:.1f} of failures"
    few = "attention of one baseline alone" if len(pairs) == 1 else ""
    return one_recipe([Arm(pairs)], control, of_matched, note=few)


def worse_after_peak(runs, column):
    """How much validation accuracy or loss ("val_acc" or "val_loss") worsens from its best epoch to the last.

    The best epoch is that of the *other* runs' mean curve, within its first three quarters: a run's own best
    epoch is partly noise, and always looks better than its last.
    """
    sign, unit = (1, 100) if column == "val_acc" else (-1, 1)
    curves = {run: sign * curve for run in runs if len(curve := read_curve(run, column))}
    found = []  # (epoch of the peak, what is lost after it)
    for run, curve in curves.items() if len(curves) > 1 else ():
        others = np.mean([*zip(*(curves[other] for other in curves if other is not run))], 1)  # as long as the shortest
        peak = int(others[: math.ceil(0.75 * len(others))].argmax())
        if peak < len(curve):
            found.append((peak + 1, curve[peak] - curve[-1]))
        else:
            warn(f"{run.folder} stopped in epoch {len(curve)}, before {peak + 1}: left out of the row on {column}")
    if len(found) < 2:
        return Estimate(note="needs the log.csv of two runs of the recipe")
    epochs, values = zip(*found)
    arm = Arm([(value, np.zeros(RESAMPLES)) for value in values])  # no test images, no choice of them
    return one_recipe([arm], "epoch of the peak", np.mean(epochs), unit=unit, control_is_count=True)


def accurate_under(recipes, kind, strength=None):
    """Change of the accuracy under "corruption", the mean over all of them, or under "pgd" of a strength.

    Control: the change on the same images, clean; under attack, the accuracy of the changed runs on images made
    against the baselines, a weaker attack.
    """
    before, after = [run.stress for run in recipes.baselines], [run.stress for run in recipes.changed]
    if None in before + after:
        return Estimate(note="needs evaluate.py --stress on all runs, with the same images")
    if any(np.isnan(stress.correct(kind, strength)).any() for stress in before + after):
        return Estimate(note="--stress was interrupted; run the same command to continue")
    # Not by class: with 10 images of each, resamples within the classes would vary too little.
    weights = resample(np.zeros_like(before[0].labels), seed=1)
    arms = recipes.mean(lambda run: run.stress.correct(kind, strength), weights)
    if kind == "corruption":
        clean = [np.mean([stress.accuracy("clean") for stress in arm]) for arm in (before, after)]
        return change(arms, ("change on clean images", clean[1] - clean[0]))
    made_against_them = {stress.surrogate for stress in after} <= {stress.checkpoint for stress in before}
    transferred = np.mean([stress.accuracy("transfer", strength) for stress in after]) if made_against_them else None
    return change(arms, ("accuracy on the baseline's images", transferred))


@dataclass
class Claim:
    text: str
    side: str  # what is claimed of figure - reference: "above" or "below" 0, or "within" MARGIN of 0
    statistic: Callable  # of Recipes; returns an Estimate
    arms: tuple = (0, 1)  # which it needs: 0 the baselines, 1 the changed runs


# What the study says in words, and one thing that it does not (AUROC). The list and the margin were fixed after
# six-epoch runs and before the 40-epoch ones.
CLAIMS = [
    Claim("accuracy stays within 1 point", "within", lambda s: change(s.metric("accuracy"))),
    Claim("fewer confident errors (> 0.90)", "below", confident_errors_fall),
    Claim("fewer errors at equal coverage", "below", errors_at_equal_coverage),
    Claim("earlier failures less confident", "below", lambda s: confidence_on_failures(s, "raw")),
    Claim("the same, temperature-scaled", "below", lambda s: confidence_on_failures(s, "scaled")),
    # signed: an absolute value would have a floor and a bias
    Claim("over-confidence falls", "below", lambda s: change(s.metric("signed_gap"), ("no change", 0.0))),
    Claim("calibration improves (gap)", "below", calibration_improves),
    # scaled: beyond what one temperature can mend
    Claim("generalizes better (NLL, scaled)", "below", lambda s: change(s.mean(lambda run: run.scaled.nll), unit=1)),
    Claim("ranks its errors better (AUROC)", "above", lambda s: change(s.metric("auroc_failure"))),
    Claim("more accurate under corruption", "above", lambda s: accurate_under(s, "corruption")),
    Claim("more accurate under PGD at 1/255", "above", lambda s: accurate_under(s, "pgd", 1)),
    Claim("errors stay inside superclasses", "above", errors_stay_in_superclass, (0,)),
    Claim("small animals do worst", "below", small_animals_are_worst, (0,)),
    Claim("failures rely more on the border", "above", attention_on_border, (0,)),
    Claim("accuracy peaks early (baseline)", "above", lambda s: worse_after_peak(s.baselines, "val_acc"), (0,)),
    Claim("accuracy peaks early (changed)", "above", lambda s: worse_after_peak(s.changed, "val_acc"), (1,)),
    Claim("loss rises again (baseline)", "above", lambda s: worse_after_peak(s.baselines, "val_loss"), (0,)),
    Claim("loss rises again (changed)", "above", lambda s: worse_after_peak(s.changed, "val_loss"), (1,)),
]
REAL_CLASSES = {errors_stay_in_superclass, small_animals_are_worst}  # make no sense on synthetic images


def decide(ends, side):
    """The verdict on an interval of figure - reference: inside the claimed range, outside of it, or neither."""
    bottom, top = {"below": (-math.inf, 0), "above": (0, math.inf), "within": (-MARGIN, MARGIN)}[side]
    low, high = ends
    if bottom < low and high < top:
        return "supported"
    return "contradicted" if high < bottom or low > top else "not decided"


def judge(recipes, synthetic=False):
    """[(Claim, Estimate, ends, word)]: of every claim; ends: [low, high] of the figure, or None."""
    rows = []
    for claim in CLAIMS:
        arms = [(recipes.baselines, recipes.changed)[k] for k in claim.arms]
        if not all(arms) or (synthetic and claim.statistic in REAL_CLASSES):
            continue
        estimate = claim.statistic(recipes)
        ends = interval(estimate.draws)
        if ends is None:
            estimate.figure = None
            estimate.note = estimate.note or "undefined: some resample has no image that the claim is about"
        elif min(map(len, arms)) < 2:
            estimate.note = "one run of a recipe: its seed may be the reason; train it with other seeds"
        word = "not decided" if estimate.note else decide([end - estimate.reference for end in ends], claim.side)
        rows.append((claim, estimate, ends, word))
    return rows


def read_curve(run, column):
    """A column of the run's log.csv, (epochs,) float64; empty without one."""
    path, columns = run.folder / "log.csv", {"epoch": int, column: float}
    rows = utils.read_csv(path, "python train.py --resume", "the log of a run", columns) if path.exists() else []
    if not rows:
        warn(f"no epoch in {path}: the run is left out of the row on {column}")
    return np.array([row[column] for row in rows])


def read_attention(run):
    """(failures, matched): rows of gradcam.py's attention.csv on confident failures, in pairs; ([], []) without it."""
    path, made_by = run.folder / "attention.csv", f"python gradcam.py {utils.quote(run.folder)}"
    if not path.exists():
        return [], []
    columns = {"pair": int, "index": int, "group": str, "checkpoint": str, "border_drop": float, "centre_drop": float}
    rows = utils.read_csv(path, made_by, "attention figures", columns)
    found = {group: {row["pair"]: row for row in rows if row["group"] == group} for group in ("failure", "matched")}
    clear = run.raw.confidence > CONFIDENT + 0.001  # a published run's float16 may cross the threshold
    wanted = set(np.flatnonzero(run.raw.failures & clear))
    again = f"python failures.py {utils.quote(run.folder)}, then {made_by}"
    if {row["checkpoint"] for row in rows} - {utils.checkpoint_id(run.folder) or ""}:
        warn(f"{path} belongs to another best.pt and is left out; run {again}")
    elif not wanted <= {row["index"] for row in found["failure"].values()}:
        warn(f"{path} does not have all failures above {CONFIDENT} and is left out; run {again}")
    else:
        pairs = [k for k, row in found["failure"].items() if k in found["matched"] and row["index"] in wanted]
        return tuple([found[group][k] for k in pairs] for group in ("failure", "matched"))
    return [], []


# ---- stress ---------------------------------------------------------------------------------------------

GROUPS = {"noise": CORRUPTIONS[:3], "blur": CORRUPTIONS[3:6], "weather": CORRUPTIONS[6:8], "digital": CORRUPTIONS[8:]}
EPSILONS = (0.25, 1, 2, 8)  # bounds of the attacks: largest change of a pixel, in 1/255
CONDITIONS = (  # (kind, name, strength), the rows of stress.csv and of the arrays
    [("clean", "", 0)]
    + [("corruption", name, severity) for name in CORRUPTIONS for severity in range(1, 6)]
    + [("shift", f"{dy} {dx}", 1) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
    + [(attack, "", epsilon) for attack in ("fgsm", "pgd", "transfer") for epsilon in EPSILONS]
)
COST = {"fgsm": 3, "pgd": 21, "transfer": 21}  # in forward passes; the others: 1


@dataclass(eq=False)
class Stress:
    """Predictions of a run on N of the test images under every condition; NaN confidence: not measured."""

    labels: np.ndarray  # (N,)
    preds: np.ndarray  # (conditions, N) uint8
    confidence: np.ndarray  # (conditions, N) float32
    source: str  # of the corrupted images
    checkpoint: str  # SHA-256 of the best.pt that was measured
    surrogate: str = ""  # of the best.pt that the images of the transfer conditions were made against

    def __post_init__(self):
        self.images = len(self.labels), self.source  # what runs must have in common to be compared

    def rows(self, kind, strength=None, name=None):
        """Indices of the conditions of a kind, of all strengths and names if none is given."""
        found = enumerate(CONDITIONS)
        return [k for k, c in found if c[0] == kind and name in (None, c[1]) and strength in (None, c[2])]

    def share(self, rows, hits):
        """(N,): the share of these conditions in which hits (conditions, N) is true; NaN if one is not measured."""
        return np.where(np.isnan(self.confidence[rows]), np.nan, hits[rows]).mean(0)

    def correct(self, kind, strength=None, name=None):
        """(N,): share of these conditions under which an image is classified correctly."""
        return self.share(self.rows(kind, strength, name), self.preds == self.labels)

    def accuracy(self, kind, strength=None, name=None):
        return float(self.correct(kind, strength, name).mean())

    def mean_confidence(self, kind, strength=None):
        return float(self.confidence[self.rows(kind, strength)].mean())


def attack(model, images, labels, epsilon, steps, autocast):
    """Adversarial images (B, 32, 32, 3) float32 in 0..255, within epsilon of the clean ones in every pixel.

    steps = 1: FGSM, one step of epsilon (Goodfellow et al., arXiv:1412.6572). More: PGD from a random start
    in steps of 2.5 epsilon / steps (Madry et al., arXiv:1706.06083). Both climb the margin max_{k != y} z_k -
    z_y: the cross-entropy's gradient vanishes where the softmax saturates.
    """
    clean = images.float()
    x, step = clean, epsilon
    if steps > 1:
        start = torch.rand(clean.shape, generator=torch.Generator().manual_seed(0)).to(clean.device)
        x, step = clean + epsilon * (2 * start - 1), 2.5 * epsilon / steps
    true = F.one_hot(labels, NUM_CLASSES).bool()
    for _ in range(steps):
        x = x.clamp(0, 255).requires_grad_()
        with torch.enable_grad(), autocast():
            logits = model(normalize(x)).float()
            margin = (logits.masked_fill(true, -torch.inf).amax(1) - logits[true]).sum()
        (gradient,) = torch.autograd.grad(margin, x)
        x = x.detach() + step * gradient.sign()
        x = torch.minimum(torch.maximum(x, clean - epsilon), clean + epsilon)
    return x.clamp(0, 255)


def first_of_each_class(labels, count):
    """Indices, in order, of the first images of every class: `count` of them in all."""
    by_class = np.argsort(labels, kind="stable").reshape(NUM_CLASSES, -1)
    return np.sort(by_class[:, : count // NUM_CLASSES].ravel())


def read_cifar_c(folder, name, severity, index, shape=(32, 32, 3)):
    """Test images of these indices in the authors' CIFAR-100-C: 5 severities of 10,000, one after the other."""
    path, shape = Path(folder).expanduser() / f"{name}.npy", (50_000, *shape)
    made_by = "the download of CIFAR-100-C (zenodo.org/records/3555552)"
    array = utils.read_npy(path, made_by, "a file of CIFAR-100-C", shape, "iu")
    return torch.from_numpy(array[(severity - 1) * 10_000 + index])


class StressTest:
    """Measures the runs of one call under every condition: the images, the networks, the options."""

    def __init__(self, args, runs, baselines, device):
        dataset, data_dir = utils.dataset_of(runs[0].folder, runs[0].config, args)
        images, labels = load_dataset(dataset, data_dir, train=False)
        if not np.array_equal(labels.numpy(), runs[0].labels):
            raise ScriptError(f"the runs were scored on other images than those in {data_dir}; set --data-dir")
        self.index = first_of_each_class(runs[0].labels, args.stress_images)
        self.images, self.labels = images[self.index], labels[self.index]
        self.cifar_c, self.source = args.cifar_c, "CIFAR-100-C" if args.cifar_c else "CIFAR-100-C style"
        if args.cifar_c:
            found = read_cifar_c(args.cifar_c, "labels", 1, self.index, shape=())
            if not np.array_equal(found, self.labels):
                raise ScriptError(f"{args.cifar_c}: labels.npy has other labels than the test set; set --cifar-c")
        for run in runs:
            if run.stress and run.stress.images != (len(self.index), self.source):
                found = f"{run.folder} has stress results on {run.stress.images[0]} images, {run.stress.source}"
                raise ScriptError(f"{found}; give the same --stress-images and --cifar-c, or --refresh")
        self.baselines, self.device = baselines, device
        dtype, _ = utils.select_precision("auto", device)
        self.autocast = lambda: torch.autocast(device.type, dtype, enabled=dtype is not None)

    def batches(self, kind, name, strength, attacked):
        """The images of a condition, (B, 32, 32, 3) in 0..255 on the device, 250 at a time."""
        images = self.images
        if kind == "corruption" and self.cifar_c:
            images = read_cifar_c(self.cifar_c, name, strength, self.index)
        elif kind == "corruption":
            images = corrupt(images, name, strength)
        elif kind == "shift":
            dy, dx = map(int, name.split())
            padded = F.pad(images, (0, 0, 1, 1, 1, 1))  # black, as in the training's crops
            images = padded[:, 1 + dy : 33 + dy, 1 + dx : 33 + dx]
        for batch, labels in zip(images.split(250), self.labels.split(250)):
            batch, labels = batch.to(self.device), labels.to(self.device)
            if kind in ("fgsm", "pgd", "transfer"):
                batch = attack(attacked, batch, labels, strength, 1 if kind == "fgsm" else 10, self.autocast)
            yield batch

    def measure(self, run):
        """Measure what run.stress lacks, saving after every condition: an interrupted test goes on from there."""
        if run.stress is None:
            shape = (len(CONDITIONS), len(self.index))
            blank = np.zeros(shape, np.uint8), np.full(shape, np.nan, np.float32)
            run.stress = Stress(self.labels.numpy(), *blank, self.source, utils.checkpoint_id(run.folder))
        stress, surrogate = run.stress, None  # whose images a changed run is shown in the transfer conditions
        if run not in self.baselines:
            same_seed = [base for base in self.baselines if base.seed == run.seed]
            surrogate = (same_seed or self.baselines)[0].folder
            if stress.surrogate != utils.checkpoint_id(surrogate):
                stress.surrogate = utils.checkpoint_id(surrogate)
                stress.confidence[stress.rows("transfer")] = np.nan
        wanted = [k for k, (kind, _, _) in enumerate(CONDITIONS) if surrogate or kind != "transfer"]
        todo = [k for k in wanted if np.isnan(stress.confidence[k, 0])]
        if not todo:  # as with a published run, whose best.pt is elsewhere
            return
        model = utils.load_model(run.folder, self.device).requires_grad_(False)
        other = utils.load_model(surrogate, self.device).requires_grad_(False) if surrogate else None
        if np.isnan(stress.confidence).all():  # the arrays come first: no old stress.csv may describe them
            (run.folder / "stress.csv").unlink(missing_ok=True)
        for k in utils.track(todo, f"{run.name}: condition", [COST.get(CONDITIONS[k][0], 1) for k in todo]):
            batches = self.batches(*CONDITIONS[k], other if CONDITIONS[k][0] == "transfer" else model)
            with self.autocast():
                probs = utils.predict(model, map(normalize, batches)).softmax(1)
            confidence, preds = probs.max(1)
            stress.confidence[k], stress.preds[k] = confidence.cpu().numpy(), preds.cpu().numpy()
            write_stress(run)


def write_stress(run):
    """stress_preds.npy, stress_confidence.npy, and last stress.csv, which says what these arrays are."""
    stress, rows = run.stress, []
    for k, (kind, name, strength) in enumerate(CONDITIONS):
        row = {"kind": kind, "name": name, "strength": strength}  # NaN, what is not measured, becomes an empty cell
        row |= {"accuracy": stress.accuracy(kind, strength, name), "mean_confidence": stress.confidence[k].mean()}
        row |= {"images": len(stress.labels), "source": stress.source, "checkpoint": stress.checkpoint}
        rows.append(row | {"surrogate": stress.surrogate if kind == "transfer" else ""})
    utils.write_npy(run.folder / "stress_preds.npy", stress.preds)
    utils.write_npy(run.folder / "stress_confidence.npy", stress.confidence)
    utils.write_csv(run.folder / "stress.csv", rows)


def read_stress(run):
    """The Stress that was saved for this best.pt, or None."""
    path, made_by = run.folder / "stress.csv", f"python evaluate.py {utils.quote(run.folder)} --stress --refresh"
    if not path.exists():
        return None
    kinds = {"images": int, "source": str, "checkpoint": str, "surrogate": str}
    rows = utils.read_csv(path, made_by, "stress results", kinds)
    if not rows or rows[0]["checkpoint"] != (utils.checkpoint_id(run.folder) or ""):
        warn(f"{path} belongs to another best.pt and is left out; run {made_by}")
        return None
    labels = run.labels[first_of_each_class(run.labels, rows[0]["images"])]
    shape = (len(CONDITIONS), len(labels))
    preds = utils.read_npy(run.folder / "stress_preds.npy", made_by, "stress results", shape, "u")
    confidence = utils.read_npy(run.folder / "stress_confidence.npy", made_by, "stress results", shape, "f")
    about = rows[0]["source"], rows[0]["checkpoint"], rows[-1]["surrogate"]  # the last condition is a transfer
    return Stress(labels, preds, confidence, *about)


# ---- tables ---------------------------------------------------------------------------------------------


def print_table(header, rows, markdown=False):
    """Rows of text under a header. The first column names the row, on a line of its own where there is no room."""
    if markdown:
        for cells in [header, ["---"] * len(header), *rows]:
            print("| " + " | ".join(cells) + " |")
        return
    widths = [max(len(cells[k]) for cells in [header, *rows]) for k in range(len(header))]
    widths[0] = min(widths[0], max(0, 79 - sum(widths[1:]) - len(widths)))
    for cells in [header, *rows]:
        if len(cells[0]) > widths[0]:
            print(cells[0])
            cells = ["", *cells[1:]]
        print(f"{cells[0]:<{widths[0]}} " + " ".join(f"{text:>{w}}" for text, w in zip(cells[1:], widths[1:])))


def cell(value, unit=100, digits=2):
    """A fraction as points, [low, high] as an interval, or a dash where there is nothing."""
    if isinstance(value, list):
        return f"[{', '.join(cell(end, unit, digits) for end in value)}]"
    return "-" if value is None or math.isnan(value) else f"{unit * value + 0.0:.{digits}f}"


CLASSIFICATION = {"precision": "macro_precision", "recall": "macro_recall", "F1": "macro_f1", "top-5": "top5_accuracy",
                  "super": "superclass_accuracy", "conf.err": "confident_errors"}  # fmt: skip
CALIBRATION = {"NLL": "nll", "Brier": "brier", "gap": "signed_gap", "ECE": "ece", "floor": "ece_null",
               "AURC": "aurc", "AUROC": "auroc_failure"}  # fmt: skip


def print_scores(named, published, markdown):
    """named: [(name, values, interval of the accuracy or None)] of runs, means over seeds and ensembles."""
    table = []
    shown = [("published (smoothing 0.1)", PUBLISHED, None), *named] if published else named
    for name, values, ends in shown:
        accuracy = cell(values["accuracy"]) + (f" {cell(ends, digits=1)}" if ends else "")
        table.append([name, accuracy] + [cell(values.get(key)) for key in CLASSIFICATION.values()])
    print_table(["in %", "accuracy [95 %]", *CLASSIFICATION], table, markdown)
    print()
    table = []
    for name, values, _ in named:
        t = values.get("temperature")
        for label, suffix in ((name, ""), (f"  T = {t:.3f}" if t else "    scaled", "_scaled")):
            found = {key: values[key + suffix] for key in CALIBRATION.values()}
            cells = [cell(v, 1, 3) if key in ("nll", "brier") else cell(v) for key, v in found.items()]
            table.append([label, *cells])
    print_table(["in %, NLL in nats", *CALIBRATION], table, markdown)


LEGEND = """\
precision, recall, F1: macro. super: right superclass. conf.err: wrong with a
confidence above 0.90, of all images. gap: mean confidence - accuracy. floor:
ECE of a perfectly calibrated model. AURC: mean error rate over all coverages.
AUROC: a right image is more confident than a wrong one. T: the same with
logits / T, where T fits the validation images."""


def print_details(run, names):
    """The hardest and easiest classes of a run, and the pairs it confuses."""
    cells = []
    for row in sorted(per_class_rows(run, names), key=lambda row: row["accuracy"]):
        ends = cell([row["low"], row["high"]], digits=0)
        cells.append(f"{row['class']:<15} {cell(row['accuracy'], digits=0):>3} {ends}")
    print(f"\n{'ten worst classes':<38} ten best, accuracy in % [95 %]")
    for worst, best in zip(cells[:10], cells[:-11:-1]):
        print(f"  {worst:<36} {best}")
    pairs = [f"{names[i]}/{names[j]} {errors}" for i, j, errors in confused_pairs(run.confusion, 5)]
    print(textwrap.fill("most confused: " + ", ".join(pairs), 79, subsequent_indent="  "))


def print_verdict(rows, markdown):
    """The table of the claims, and why some are not decided."""
    table, notes = [], {}
    for claim, estimate, ends, word in rows:
        style = (100, 2) if estimate.unit == 100 else (1, 3)
        control = cell(estimate.control_value, *((1, 1) if estimate.control_is_count else style))
        table.append([claim.text, cell(estimate.figure, *style), cell(ends, *style), control, word])
        if estimate.note:
            notes.setdefault(estimate.note, []).append(claim.text)
    print_table(["claim", "figure", "95 % interval", "control", "verdict"], table, markdown)
    if any(estimate.control.startswith("highest target") for _, estimate, _, _ in rows):
        print("fewer confident errors: by construction, no target is above the control")
    for note, texts in notes.items():
        which = f"{len(texts)} rows" if len(texts) > 2 else ", ".join(texts)
        print(textwrap.fill(f"not decided ({which}): {note}", 79, subsequent_indent="  "))


def print_stress(runs, markdown):
    first = runs[0].stress
    print(f"\nstress, in %: {len(first.labels):,} test images, {len(CORRUPTIONS)} corruptions, {first.source}")
    table = []
    for run in runs:
        s = run.stress
        groups = [np.mean([s.accuracy("corruption", name=name) for name in names]) for names in GROUPS.values()]
        found = [of(kind) for kind in ("clean", "corruption") for of in (s.accuracy, s.mean_confidence)]
        shifted = s.share(s.rows("shift"), s.preds != s.preds[0]).mean()  # how often a shift changes the prediction
        table.append([run.name] + [cell(value, digits=1) for value in [*found, *groups, shifted]])
    print_table(["", "clean", "conf", "corrupt", "conf", *GROUPS, "shift"], table, markdown)
    print()
    shown = [("fgsm", 1), ("fgsm", 8)] + [(kind, e) for kind in ("pgd", "transfer") for e in EPSILONS]
    shown = [(kind, e) for kind, e in shown if not all(math.isnan(run.stress.accuracy(kind, e)) for run in runs)]
    heads = [f"{kind.replace('transfer', 'tr.')} {e:g}" for kind, e in shown]
    table = [[run.name] + [cell(run.stress.accuracy(kind, e), digits=1) for kind, e in shown] for run in runs]
    print_table(["accuracy at eps in 1/255", *heads], table, markdown)


# ---- files and pictures ---------------------------------------------------------------------------------


def confused_pairs(confusion, count=20):
    """The unordered pairs of classes most often taken for each other: [(i, j, errors)], most errors first."""
    errors = np.triu(confusion + confusion.T, 1)
    order = np.argsort(-errors, axis=None, kind="stable")[:count]
    return [(i, j, int(errors[i, j])) for i, j in zip(*np.unravel_index(order, errors.shape)) if errors[i, j]]


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


def draw_confusion(path, run, names, title):
    figure, (matrix, bars) = utils.new_figure(16, 11, 1, 2, title, width_ratios=[10, 6])
    order = np.argsort(SUPERCLASS_OF, kind="stable")
    shown = run.confusion[np.ix_(order, order)].astype(float)
    np.fill_diagonal(shown, np.nan)  # the hits would own the colour scale
    shown[shown == 0] = np.nan
    picture = matrix.imshow(shown, cmap="viridis", norm="log", vmin=1, vmax=max(2, np.nanmax(shown, initial=1)))
    real = names[0] == "apple"  # the synthetic set has no superclasses with names
    families = [name.replace("_", " ") if real else f"group {k}" for k, name in enumerate(SUPERCLASSES)]
    matrix.set_xticks(np.arange(2, 100, 5), families, rotation=90, fontsize=9)
    matrix.set_yticks(np.arange(2, 100, 5), families, fontsize=9)
    for edge in range(0, NUM_CLASSES, 5):  # a frame around the five classes of each superclass
        left, right = edge - 0.5, edge + 4.5
        matrix.plot([left, right, right, left, left], [left, left, right, right, left], color="black", linewidth=0.8)
    matrix.set(xlabel="predicted class", ylabel="true class", title="errors; frames: inside a superclass")
    ticks = [1, 2, 5, 10, 20, 50]
    figure.colorbar(picture, ax=matrix, label="test images (logarithmic)", shrink=0.5, format="%d", ticks=ticks)
    pairs = confused_pairs(run.confusion)[::-1]
    colors = [utils.BLUE if SUPERCLASS_OF[i] == SUPERCLASS_OF[j] else utils.VERMILION for i, j, _ in pairs]
    bars.barh([f"{names[i]} / {names[j]}" for i, j, _ in pairs], [errors for _, _, errors in pairs], color=colors)
    title_of_bars = "most confused pairs\nblue: same superclass, vermilion: different"
    bars.set(title=title_of_bars, xlabel="errors, both ways together", ymargin=0.01)
    utils.save_figure(figure, path)


def draw_per_class(path, run, names, title):
    rows = sorted(per_class_rows(run, names), key=lambda row: row["accuracy"])
    figure, axes = utils.new_figure(8, 14)
    accuracy, low, high = (100 * np.array([row[key] for row in rows]) for key in ("accuracy", "low", "high"))
    errors = [accuracy - low, high - accuracy]
    axes.errorbar(accuracy, range(len(rows)), xerr=errors, fmt="o", color=utils.BLUE, ecolor=utils.GRAY, markersize=3)
    axes.set_yticks(range(len(rows)), [row["class"] for row in rows], fontsize=7)
    axes.set(xlabel="accuracy on the class's images (%), with 95 % Wilson interval", title=title)
    axes.set(xlim=(0, 100), ylim=(-1, len(rows)))
    axes.axvline(accuracy.mean(), color=utils.VERMILION, linestyle="--", label=f"mean {accuracy.mean():.1f} %")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right")
    utils.save_figure(figure, path)


def draw_reliability(path, run, names, title):
    """Accuracy against confidence in 15 bins, above the images in each; as trained and temperature-scaled."""
    figure, axes = utils.new_figure(9, 6.5, 2, 2, title, sharex=True, sharey="row", height_ratios=[3, 1])
    panels = (run.raw, "as trained", ""), (run.scaled, f"logits / {run.temperature:.3f}", "_scaled")
    centers = (np.arange(15) + 0.5) / 15
    for (top, bottom), (scores, label, suffix) in zip(axes.T, panels):
        bins = calibration_bins(scores.confidence)
        count = np.bincount(bins, minlength=15)
        filled = count > 0
        accuracy = np.bincount(bins, scores.correct, 15)[filled] / count[filled]
        confidence = np.bincount(bins, scores.confidence, 15)[filled] / count[filled]
        top.bar(centers[filled], accuracy, 1 / 15, color=utils.BLUE, edgecolor="white", label="accuracy in the bin")
        top.plot(confidence, confidence, "D", color=utils.VERMILION, markersize=4, label="mean confidence in the bin")
        top.plot([0, 1], [0, 1], "--", color=utils.GRAY, label="perfectly calibrated")
        ece, floor = cell(run.values[f"ece{suffix}"]), cell(run.values[f"ece_null{suffix}"])
        top.set(title=f"{label}: ECE {ece} % ({floor} % if calibrated)", xlim=(0, 1), ylim=(0, 1))
        bottom.bar(centers, count, 1 / 15, color=utils.GRAY, edgecolor="white")
        bottom.set(xlabel="confidence (largest probability)")
    axes[0, 0].set(ylabel="accuracy")
    axes[1, 0].set(ylabel="test images")
    axes[0, 0].legend(loc="upper left")
    utils.save_figure(figure, path)


def write_run(run, args):
    """metrics.json, confusion.npy, per_class.csv and the pictures of a run, which are drawn if the scores are new."""
    folder, dataset = run.folder, run.config["dataset"]
    ci95 = {name: ends for name, draws in run.draws.items() if (ends := interval(draws))}
    del ci95["ece"]  # resampling inflates it
    content = {"images": len(run.labels)} | run.values | {"temperature": run.temperature, "ci95": ci95}
    content["sha256"] = checksums(folder)
    new = utils.write_json(folder / "metrics.json", content)
    names = class_names(dataset)
    utils.write_npy(folder / "confusion.npy", run.confusion)
    utils.write_csv(folder / "per_class.csv", per_class_rows(run, names))
    title = f"{run.name}: {len(run.labels):,} test images of {TITLES[dataset]}"
    published = not (folder / "best.pt").exists()  # it keeps the pictures that it came with
    pictures = {"confusion.png": draw_confusion, "per_class.png": draw_per_class, "reliability.png": draw_reliability}
    due = [name for name in pictures if new or args.refresh or not (published or (folder / name).exists())]
    for name in due:
        (folder / name).unlink(missing_ok=True)  # so that Ctrl-C leaves no picture of older scores
    for name in due:
        pictures[name](folder / name, run, names, title)


def draw_verdict(path, rows, title):
    """A line per claim, each on a scale of its own: the runs as small dots, figure with interval, verdict."""
    figure, axes = utils.new_figure(12, 1.6 + 0.46 * len(rows), title=title)
    axes.set(xlim=(-3.6, 4.6), ylim=(len(rows) - 0.4, -1.3))
    axes.axis("off")
    for x, head, side in ((-3.5, "claim", "left"), (1.3, "figure, 95 % interval", "left"), (4.5, "verdict", "right")):
        axes.text(x, -0.8, head, ha=side, va="center", fontsize=11, weight="bold")
    axes.text(0, -0.8, "shaded: as claimed; small dots: the runs", ha="center", va="center", fontsize=9)
    for y, (claim, estimate, ends, word) in enumerate(rows):
        color = {"supported": utils.BLUE, "contradicted": utils.VERMILION, "not decided": utils.GRAY}[word]
        axes.text(-3.5, y, claim.text, va="center", fontsize=11)
        axes.text(4.5, y, word, ha="right", va="center", fontsize=11, color=color, weight="bold")
        if ends is None:
            axes.text(1.3, y, "no figure", va="center", fontsize=10, color=utils.GRAY)
            continue
        sign = -1 if claim.side == "below" else 1  # the claimed side is always to the right
        low, middle, high = sign * (np.array([ends[0], estimate.figure, ends[1]]) - estimate.reference)
        margin = MARGIN if claim.side == "within" else 0
        scale = 1.1 * max(1e-9, 1.5 * margin, *map(abs, (low, high, *estimate.dots[0], *estimate.dots[1])))
        left, right = (-margin / scale, margin / scale) if margin else (0, 1)
        axes.fill_betweenx([y - 0.4, y + 0.4], left, right, color=utils.BLUE, alpha=0.1, linewidth=0)
        axes.plot([0, 0], [y - 0.4, y + 0.4], color="black", linewidth=0.8)
        for dots, shift, edge in zip(estimate.dots, (-0.22, 0.22), (utils.GRAY, color)):
            places = [sign * dot / scale for dot in dots]
            axes.plot(places, [y + shift] * len(places), "o", color=edge, markersize=3, alpha=0.7)
        axes.plot([low / scale, high / scale], [y, y], color=color, linewidth=2)
        axes.plot(middle / scale, y, "o", color=color)
        digits, unit = (2, "points") if estimate.unit == 100 else (3, "nats")
        parts = [cell(value, estimate.unit, digits) for value in (estimate.figure, ends)]
        axes.text(1.3, y, f"{' '.join(parts)} {unit}", va="center", fontsize=10)
    utils.save_figure(figure, path)


def draw_stress(path, arms, title):
    """Accuracy by corruption; accuracy and confidence against severity; accuracy under attack."""
    figure, (left, middle, right) = utils.new_figure(15, 5, 1, 3, title)
    names = sorted(CORRUPTIONS, key=lambda name: arms[0][0].stress.accuracy("corruption", name=name))
    points = [("clean", 0)] + [("corruption", severity) for severity in range(1, 6)]
    attacks = {"pgd": ("-o", "PGD"), "fgsm": (":", "FGSM"), "transfer": ("--", "made against the baseline")}
    for arm, color in zip(arms, (utils.BLUE, utils.VERMILION)):
        label, found = arm[0].name, [run.stress for run in arm]
        dots = [(100 * s.accuracy("corruption", name=name), name.replace("_", " ")) for s in found for name in names]
        left.plot(*zip(*dots), "o", color=color, markersize=4, label=label)
        accuracy = 100 * np.mean([[s.accuracy(*point) for point in points] for s in found], 0)
        confidence = 100 * np.mean([[s.mean_confidence(*point) for point in points] for s in found], 0)
        left.axvline(accuracy[0], color=color, linewidth=0.8)
        middle.plot(accuracy, "-o", color=color, markersize=4, label=f"{label}: accuracy")
        middle.plot(confidence, "--", color=color, label=f"{label}: mean confidence")
        middle.fill_between(range(6), accuracy, confidence, color=color, alpha=0.12)
        for kind, (style, what) in attacks.items():
            measured = [s for s in found if not math.isnan(s.accuracy(kind, EPSILONS[0]))]
            if measured:
                values = 100 * np.mean([[s.accuracy(kind, epsilon) for epsilon in EPSILONS] for s in measured], 0)
                right.plot(EPSILONS, values, style, color=color, markersize=4, label=f"{label}: {what}")
    left.set(xlabel="accuracy (%), mean of 5 severities; line: clean", xlim=(0, 100))
    middle.set(xlabel="severity of the corruption (0: clean)", ylabel="%", ylim=(0, 100))
    right.set(xlabel="largest change of a pixel, in 1/255", ylabel="accuracy (%)", ylim=(0, 100), xscale="log")
    right.set_xticks(EPSILONS, [f"{epsilon:g}" for epsilon in EPSILONS])
    right.minorticks_off()
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        if axes.lines:  # there is none where no attack was measured
            axes.legend(fontsize=8)
    utils.save_figure(figure, path)


# ---- main -----------------------------------------------------------------------------------------------


def by_recipe(runs):
    """The runs in lists of one recipe each, in the order in which the recipes come."""
    arms = []
    for run in runs:
        arm = next((arm for arm in arms if utils.recipe(arm[0].config) == utils.recipe(run.config)), None)
        if arm is None:
            arms.append([run])
        elif run.seed in [other.seed for other in arm]:
            warn(f"{run.folder} repeats the seed {run.seed} of its recipe and is left out of means and verdict")
        else:
            arm.append(run)
    return arms


def find_runs(texts):
    """[(run_dir, config)] of the runs that can be scored: those with an epoch saved, or with logits."""
    found = []
    for text in dict.fromkeys(texts):
        run_dir = Path(text).expanduser()
        usable = any((run_dir / name).exists() for name in ("best.pt", "test_logits.npy"))
        if run_dir.is_dir() and not usable:
            warn(f"{run_dir} has no saved epoch and is passed over")
        else:
            found.append(utils.open_run(text))
    if not found:
        raise ScriptError("no run with a saved epoch among those given; run python train.py first")
    return found


def parse_args(argv):
    parser = utils.ArgumentParser(__file__, __doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run directory of train.py")
    add("--refresh", action="store_true", help="compute logits, pictures and stress again although they are there")
    add("--markdown", action="store_true", help="print the tables in Markdown")
    add("--stress", action="store_true", help="also measure corruptions, attacks and shifts: minutes per run on a CPU")
    add("--stress-images", type=int, default=1000, metavar="N", help="test images for --stress, N/100 of each class")
    add("--cifar-c", metavar="FOLDER", help="for --stress, take the corrupted images from the authors' CIFAR-100-C")
    utils.add_common_flags(parser)
    args = parser.parse_args(argv)
    if args.stress_images % 100 or not 100 <= args.stress_images <= 10_000:
        parser.error(f"--stress-images {args.stress_images} must be a multiple of 100 in 100..10000")
    if args.cifar_c and not Path(args.cifar_c).expanduser().is_dir():
        parser.error(f"--cifar-c {args.cifar_c} is no folder")
    return args


def update_logits(folders, args):
    """Compute the logits that are missing or outdated. Returns the device, None if none is needed."""
    places = {run_dir: utils.dataset_of(run_dir, config, args) for run_dir, config in folders}
    stale = [run_dir for run_dir in places if (run_dir / "best.pt").exists()]
    stale = [run_dir for run_dir in stale if args.refresh or known_checksums(run_dir) != checksums(run_dir)]
    device = utils.select_device(args.device) if stale or args.stress or args.device != "auto" else None
    for run_dir in stale:
        compute_logits(run_dir, *places[run_dir], device)
    return device


def report_scores(runs, arms, args):
    """Print what every run scores; for the runs of one recipe their mean, deviation and ensemble."""
    dataset = runs[0].config["dataset"]
    table, notes = [], []
    for arm in arms + [[run] for run in runs if not any(run in arm for arm in arms)]:
        for run in arm:
            table.append((run.name, run.values | {"temperature": run.temperature}, interval(run.draws["accuracy"])))
        if len(arm) == 1:
            continue
        columns = {key: [run.values[key] for run in arm] for key in arm[0].values}
        table.append((f"  mean of {len(arm)}", {key: np.mean(column) for key, column in columns.items()}, None))
        table.append(("  deviation", {key: np.std(column, ddof=1) for key, column in columns.items()}, None))
        together, extra = ensemble(arm)
        table.append((f"  {together.name}", together.values, None))
        right, parts = together.raw.correct, []
        for what, v in extra.items():
            means = f"{v[right].mean():.3f} where right, {v[~right].mean():.3f} where wrong"
            parts.append(f"{what.replace('_', ' ')} {means}")
        notes.append(f"{together.name} ({arm[0].name} ...): {'; '.join(parts)}")
    print(f"{len(runs[0].labels):,} test images of {TITLES[dataset]}")
    print_scores(table, dataset == "cifar100", args.markdown)
    print(LEGEND)
    for note in notes:
        print(textwrap.fill(note, 79, subsequent_indent="  "))
    if len(runs) == 1:
        print_details(runs[0], class_names(dataset))


def report_claims(recipes, args):
    """Print the verdict on two recipes; write verdict.json, verdict.png and stress.png of the first changed run."""
    first, folder = recipes.baselines[0], recipes.arms[-1][0].folder
    dataset = first.config["dataset"]
    before, after = utils.recipe(first.config), utils.recipe(recipes.arms[-1][0].config)
    keys = [key for key in before | after if before.get(key) != after.get(key)]  # none if there is one recipe
    changes = ", ".join(f"{key} {after.get(key)} (was {before.get(key)})" for key in keys)
    what = f"What changes with {changes}" if recipes.changed else f"What the study says of one recipe, {first.name}"
    seeds = " against ".join(", ".join(str(run.seed) for run in arm) for arm in recipes.arms)
    print("\n" + textwrap.fill(f"{what}; seeds {seeds}", 79))
    rows = judge(recipes, dataset == "synthetic")
    print_verdict(rows, args.markdown)
    content = {"baselines": [run.name for run in recipes.baselines], "changed": [run.name for run in recipes.changed]}
    content |= {"dataset": dataset, "claims": []}
    for claim, estimate, ends, word in rows:
        row = {"claim": claim.text, "figure": estimate.figure, "ci95": ends, "word": word}
        content["claims"].append(row | {"control": estimate.control, "control_value": estimate.control_value})
    verdict, stress = folder / "verdict.png", folder / "stress.png"
    if utils.write_json(folder / "verdict.json", content) or args.refresh:
        for picture in (verdict, stress):  # so that Ctrl-C leaves no picture of older figures
            picture.unlink(missing_ok=True)
    if not verdict.exists():
        common = {"model": MODELS.get(before["model"], before["model"]), "epochs": f"{before.get('epochs')} epochs"}
        about = [TITLES[dataset], *(text for key, text in common.items() if key not in keys), f"seeds {seeds}"]
        title = textwrap.fill(f"{what}: do the claims hold? {', '.join(about)}", 128)
        draw_verdict(verdict, rows, title)
    print(f"wrote verdict.json and verdict.png to {folder}")
    stressed = [arm for arm in recipes.arms if all(run.stress for run in arm)]
    if stressed and (args.stress or not stress.exists()):
        draw_stress(stress, stressed, f"{TITLES[dataset]} under stress, {stressed[0][0].stress.source}")


def main(argv=None):
    """Evaluate the given runs; returns {run directory: {metric: value}}."""
    args = parse_args(argv)

    # logits and metrics of every run
    folders = find_runs(args.runs)
    device = update_logits(folders, args)
    runs = [read_run(*folder) for folder in folders]
    comparable = [run for run in runs if np.array_equal(run.labels, runs[0].labels)]
    arms = by_recipe(comparable)
    weights = resample(runs[0].labels)
    for run in runs:
        if run not in comparable:
            warn(f"{run.folder} was scored on other images than {runs[0].folder} and is compared with nothing")
        run.measure(weights if run in comparable else resample(run.labels))
        write_run(run, args)
        run.stress = None if args.refresh and args.stress else read_stress(run)
    report_scores(runs, arms, args)

    # stress
    if args.stress:
        test = StressTest(args, comparable, arms[0], device)
        for run in comparable:
            test.measure(run)
    stressed = [run for run in comparable if run.stress]
    for run in stressed:
        if run.stress.images != stressed[0].stress.images:
            warn(f"{run.folder}: its stress test is left out; it has other images than that of {stressed[0].folder}")
            run.stress = None
    if stressed:
        print_stress([run for run in stressed if run.stress], args.markdown)

    # claims: every other recipe against the first one
    for changed in arms[1:] or [[]]:
        report_claims(Recipes(arms[0], changed, weights), args)
    others = [utils.quote(run.folder) for run in [arm[0] for arm in arms[1:]] + arms[0][1:]]
    compare = f" --compare {' '.join(others)}" if others else ""
    print("metrics.json, per_class.csv and pictures are in the run directories")
    print(f"next: python failures.py {utils.quote(runs[0].folder)}{compare}{utils.data_flag(args)}")
    return {str(run.folder): run.values for run in runs}


if __name__ == "__main__":
    utils.run_script(main)
