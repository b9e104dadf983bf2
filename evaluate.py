"""Score trained runs on the CIFAR-100 test set.

    python evaluate.py runs/baseline                        # one run
    python evaluate.py runs/baseline runs/smoothing0.1      # side by side, below the published numbers
    python evaluate.py runs/baseline* runs/smoothing0.1*    # several seeds of each: a verdict on the study's claims

Writes into each run directory test_logits.npy (10000, 100) float32 and test_labels.npy (10000,) int64, where
row i is test image i; the same for the 5,000 validation images; metrics.json (fractions, 95 % intervals under
ci95); confusion.npy (row = true class, column = predicted), confusion.png, per_class.csv, per_class.png,
superclasses.csv, label_errors.csv and reliability.png. Logits that are there already are not computed again:
then neither checkpoint nor data set is needed. The first run of every further recipe is compared with the first
run of all, image by image: comparison.json and its two figures. Each further recipe gets a verdict against the
first one, in verdict.json and verdict.png. --ensemble writes ensemble.csv and ensemble.json.
"""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import torch

import utils
from data import NUM_CLASSES, SUPERCLASS_OF, SUPERCLASSES, TITLES, class_names, load_dataset, normalize
from data import split_id, split_train_val
from model import resnet18
from utils import ScriptError, calibration_bins, calibration_error, confusion_matrix, log_softmax

# The study that this collection rebuilds, its baseline: ResNet-18, CIFAR-100 test set.
PUBLISHED = {"accuracy": 0.6596, "macro_precision": 0.6611, "macro_recall": 0.6596, "macro_f1": 0.6588}

ARRAYS = ("test_logits.npy", "test_labels.npy", "val_logits.npy", "val_labels.npy")


# ---- logits ------------------------------------------------------------------------------------------------


def compute_logits(run_dir, config, data_dir, device):
    """Run best.pt over the test and the validation images in float32; save logits and labels."""
    checkpoint = utils.load_checkpoint(run_dir / "best.pt")
    trained = checkpoint["args"]
    model = resnet18(width=trained["width"])
    utils.load_weights(model, checkpoint["model"], run_dir / "best.pt")
    model.to(device, memory_format=torch.channels_last)

    images, labels = load_dataset(config["dataset"], data_dir, train=True)
    _, val_index = split_train_val(labels, trained["val_size"], trained["seed"])
    if checkpoint.get("split") != split_id(val_index):
        reason = "this version of NumPy splits training and validation images differently"
        raise ScriptError(f"{run_dir}: {reason}; evaluate with the version in config.json")
    splits = {"val": (images[val_index], labels[val_index])}
    splits["test"] = load_dataset(config["dataset"], data_dir, train=False)
    print(f"{run_dir}: logits of best.pt, epoch {checkpoint['epoch']}, on {utils.device_name(device)}", flush=True)
    arrays = {}
    for split, (images, labels) in splits.items():
        batches = utils.track(images.split(500), f"{split} batch")
        logits = utils.predict(model, (normalize(batch.to(device)) for batch in batches))
        arrays |= {f"{split}_logits.npy": logits.cpu().numpy(), f"{split}_labels.npy": labels.numpy()}
    (run_dir / "metrics.json").unlink(missing_ok=True)  # it describes the files that are replaced now
    for name, array in arrays.items():
        write_array(run_dir / name, array)


def write_array(path, array):
    utils.write_file(path, lambda file: np.save(file, array, allow_pickle=False))


def logits_are_current(run_dir):
    """Whether the saved logits can stand: they came from best.pt, by metrics.json, or there is no best.pt."""
    if not all((run_dir / name).exists() for name in ARRAYS):
        return False
    if not (run_dir / "best.pt").exists():
        return True
    if not (run_dir / "metrics.json").exists():
        return False
    metrics = utils.read_json(run_dir / "metrics.json", f"python evaluate.py {utils.quote(run_dir)} --refresh")
    return (metrics.get("sha256") or {}).get("best.pt") == utils.sha256(run_dir / "best.pt")


# ---- metrics -----------------------------------------------------------------------------------------------


def image_scores(logits, labels):
    """What is known of each image, as a dict of (N,) arrays; the mean of most of them is a metric.

    probs ((N, C), their softmax), pred, confidence (largest probability), correct, top5, nll (nats), brier
    (sum over classes of (p - target)^2, in [0, 2]), superclass (right, or the error stays in the
    superclass), within (wrong, but in the superclass).
    """
    log_probs = log_softmax(logits)
    probs = np.exp(log_probs)
    rows, pred = np.arange(len(labels)), logits.argmax(1)
    correct = pred == labels
    ranked = np.argsort(-logits, axis=1, kind="stable")  # where logits tie, the lower label comes first
    superclass = SUPERCLASS_OF[pred] == SUPERCLASS_OF[labels]
    return {
        "probs": probs,
        "pred": pred,
        "confidence": probs[rows, pred],
        "correct": correct,
        "top5": (ranked[:, :5] == labels[:, None]).any(1),
        "nll": -log_probs[rows, labels],
        "brier": (probs**2).sum(1) - 2 * probs[rows, labels] + 1,
        "superclass": superclass,
        "within": superclass & ~correct,
    }


def confident_failures(scores):
    """(N,) bool: wrong with confidence above 0.90, the study's notion of a failure."""
    return ~scores["correct"] & (scores["confidence"] > 0.9)


def fit_temperature(logits, labels):
    """The T > 0 that minimises the NLL of logits / T, Guo et al., arXiv:1706.04599.

    Fit it on images held out from training, and never on those that are scored.

    The NLL is convex in b = 1/T, and its derivative, the mean of (sum_k p_k z_k) - z_y, only rises: bisect
    for its zero. Searched in 0.01..100; where the NLL has no minimum there, as with no error at all, the
    nearer bound comes back.
    """
    true_logits = logits[np.arange(len(labels)), labels]
    low, high = math.log(1 / 100), math.log(1 / 0.01)  # of log b
    for _ in range(50):
        middle = (low + high) / 2
        probs = np.exp(log_softmax(logits * math.exp(middle)))
        if ((probs * logits).sum(1) - true_logits).mean() > 0:
            high = middle
        else:
            low = middle
    return math.exp(-(low + high) / 2)


def adaptive_calibration_error(confidence, correct, num_bins=15):
    """ECE over bins of equally many images instead of equal width. Nixon et al., arXiv:1904.01685."""
    gaps = (confidence - correct)[np.argsort(confidence, kind="stable")]
    return float(sum(abs(part.sum()) for part in np.array_split(gaps, num_bins)) / len(gaps))


def null_calibration_error(confidence, draws=1000, seed=0):
    """ECE that a perfectly calibrated model of these confidences would show on average: the noise floor.

    The labels are redrawn: image i is right with probability confidence_i. Broecker and Smith 2007.
    """
    rng = np.random.default_rng(seed)
    outcomes = (rng.random(len(confidence)) < confidence for _ in range(draws))
    return float(np.mean([calibration_error(confidence, correct) for correct in outcomes]))


def risk_coverage(confidence, correct):
    """Error rates (N,) among the 1, 2, ... N most confident images; their mean is the AURC, lower is better.

    Geifman, Uziel, El-Yaniv, arXiv:1805.08206. Images of equal confidence share their error rate, which is
    the mean over all orders of the tied images.
    """
    _, tie, count = np.unique(-confidence, return_inverse=True, return_counts=True)
    errors = (np.bincount(tie, ~correct) / count)[tie]
    return np.cumsum(errors[np.argsort(tie, kind="stable")]) / np.arange(1, len(errors) + 1)


def best_aurc(error_rate):
    """AURC of a perfect ranking, every error below every correct image: r + (1 - r) ln(1 - r).

    AURC minus this is E-AURC: what the ranking adds to the errors themselves.
    """
    accuracy = 1 - np.asarray(error_rate, np.float64)
    return 1 - accuracy + accuracy * np.log(np.maximum(accuracy, 1e-300))


def failure_auroc(confidence, correct):
    """P(a correct image is more confident than a wrong one), ties half; None without errors or hits."""
    hits, errors = int(correct.sum()), int((~correct).sum())
    if not hits or not errors:
        return None
    _, tie, count = np.unique(confidence, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[tie]  # from 1, the mean rank where tied
    return float((rank[correct].sum() - hits * (hits + 1) / 2) / (hits * errors))


def resample(labels, resamples=2000, seed=0):
    """Yield blocks (100, N) float32: how often each test image is drawn in each of 100 bootstrap resamples.

    The test set has 100 images of every class by design, so each class is redrawn from its own images. The
    same seed gives the same resamples: that is what pairs two runs.
    """
    rng = np.random.default_rng(seed)
    by_class = np.argsort(labels, kind="stable")
    class_size = np.bincount(labels, minlength=NUM_CLASSES)
    size = np.repeat(class_size, class_size)  # (N,) in the order of by_class
    first = np.repeat(np.cumsum(class_size) - class_size, class_size)
    for _ in range(resamples // 100):
        drawn = by_class[first + (rng.random((100, len(labels))) * size).astype(np.int64)]
        yield np.stack([np.bincount(row, minlength=len(labels)) for row in drawn]).astype(np.float32)


def resampled_metrics(scores, labels, counts):
    """{metric: (R,) values} in resamples of the test images; counts (R, N) says how often each was drawn.

    Almost everything is a sum over images, so one matrix product gives it for all resamples.
    """
    n, confidence, correct, wrong = len(labels), scores["confidence"], scores["correct"], ~scores["correct"]
    gap = confidence - correct
    means = {
        "accuracy": correct,
        "top5_accuracy": scores["top5"],
        "nll": scores["nll"],
        "brier": scores["brier"],
        "mean_confidence": confidence,
        "signed_gap": gap,
        "superclass_accuracy": scores["superclass"],
        "confident_errors": confident_failures(scores),
        "within": scores["within"],
    }
    classes = np.arange(NUM_CLASSES)
    groups = {
        "hits": (labels[:, None] == classes) & correct[:, None],
        "predicted": scores["pred"][:, None] == classes,
        "bin_gaps": gap[:, None] * (calibration_bins(confidence)[:, None] == np.arange(15)),
    }
    columns = np.column_stack([*means.values(), *groups.values()]).astype(np.float32)
    sums = (counts @ columns).astype(np.float64)
    values = {name: sums[:, i] / n for i, name in enumerate(means)}
    hits, predicted, bin_gaps = np.split(sums[:, len(means) :], [NUM_CLASSES, 2 * NUM_CLASSES], axis=1)
    macro = utils.macro_scores_from_counts(hits, np.bincount(labels, minlength=NUM_CLASSES), predicted)
    values |= dict(zip(("macro_precision", "macro_recall", "macro_f1"), macro))
    values["ece"] = np.abs(bin_gaps).sum(1) / n
    order = np.argsort(confidence, kind="stable")[::-1]  # so that the adaptive bins are those of the metric itself
    drawn = counts[:, order].astype(np.float64)
    wrong_drawn = drawn * wrong[order]
    images, errors = np.cumsum(drawn, 1), np.cumsum(wrong_drawn, 1)
    gaps = np.cumsum(drawn * gap[order], 1)
    ends = np.cumsum([len(part) for part in np.array_split(np.arange(n), 15)][::-1])
    bin_gaps = np.diff([np.interp(ends, *row) for row in zip(images, gaps)], axis=1, prepend=0)
    values["ece_adaptive"] = np.abs(bin_gaps).sum(1) / n
    covered = math.ceil(0.8 * n)
    values["risk_at_80"] = np.array([np.interp(covered, *row) for row in zip(images, errors)]) / covered
    values["aurc"] = (drawn * errors / np.maximum(images, 1)).sum(1) / n
    values["eaurc"] = values["aurc"] - best_aurc(1 - values["accuracy"])
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample without errors gives NaN
        values["errors_within_superclass"] = values.pop("within") / (1 - values["accuracy"])
        correct_drawn = drawn - wrong_drawn  # each wrong image: how many correct ones are above it?
        pairs = (wrong_drawn * np.cumsum(correct_drawn, 1)).sum(1)
        values["auroc_failure"] = pairs / (errors[:, -1] * (n - errors[:, -1]))
    return values


def bootstrap(labels, runs, measure=resampled_metrics):
    """[{metric: (2000, ...) values} for each run], over the same resamples of the test images.

    measure(run, labels, counts) gives the values in the resamples of counts (R, N); by default, runs are the
    image_scores of each.
    """
    blocks = [[measure(run, labels, counts) for run in runs] for counts in resample(labels)]
    return [
        {name: np.concatenate([block[k][name] for block in blocks]) for name in blocks[0][k]}
        for k in range(len(runs))
    ]


def interval(values):
    """[low, high]: the middle 95 % of bootstrap values, None if some are undefined."""
    return None if np.isnan(values).any() else np.quantile(values, [0.025, 0.975]).tolist()


def confidence_metrics(scores):
    """Calibration of the confidence in image_scores, and how well it ranks the errors."""
    confidence, correct = scores["confidence"], scores["correct"]
    risk = risk_coverage(confidence, correct)
    return {
        "mean_confidence": confidence.mean(),
        "signed_gap": confidence.mean() - correct.mean(),  # above 0: more confident than right
        "ece": calibration_error(confidence, correct),
        "ece_null": null_calibration_error(confidence),
        "ece_adaptive": adaptive_calibration_error(confidence, correct),
        "nll": scores["nll"].mean(),
        "brier": scores["brier"].mean(),
        "aurc": risk.mean(),
        "eaurc": risk.mean() - best_aurc(1 - correct.mean()),
        "risk_at_80": risk[math.ceil(0.8 * len(risk)) - 1],  # error rate of the most confident 80 %
        "auroc_failure": failure_auroc(confidence, correct),  # null without errors
        "confident_errors": confident_failures(scores).mean(),
    }


def describe(scores, scaled, labels):
    """metrics.json but for temperature and sha256, of image_scores as trained and temperature-scaled."""
    wrong = ~scores["correct"]
    precision, recall, f1 = utils.macro_scores(confusion_matrix(labels, scores["pred"], NUM_CLASSES))
    inside, errors = permuted_errors(labels[wrong], scores["pred"][wrong])
    null = inside.sum(1) / np.maximum(errors.sum(1), 1)
    metrics = {
        "images": len(labels),
        "accuracy": scores["correct"].mean(),
        "macro_precision": precision,
        "macro_recall": recall,
        "macro_f1": f1,
        "top5_accuracy": scores["top5"].mean(),
        "superclass_accuracy": scores["superclass"].mean(),
        "errors_within_superclass": scores["within"].sum() / wrong.sum() if wrong.any() else None,
        "errors_within_superclass_null": null.mean() if wrong.any() else None,
    }
    metrics |= confidence_metrics(scores)
    metrics |= {f"{name}_scaled": value for name, value in confidence_metrics(scaled).items()}
    metrics = {
        name: value if value is None or isinstance(value, int) else float(value) for name, value in metrics.items()
    }
    values = bootstrap(labels, [scores])[0]
    for name in ("ece", "ece_adaptive"):
        del values[name]  # neither a mean nor a rate, and resampling inflates it
    values["errors_within_superclass_null"] = null if wrong.any() else np.full(1, np.nan)
    metrics["ci95"] = {name: ends for name, value in values.items() if (ends := interval(value))}
    return metrics


def compute_metrics(logits, labels, val_logits, val_labels):
    """(metrics.json but for its sha256, image_scores as trained, image_scores after temperature scaling)."""
    temperature = fit_temperature(val_logits, val_labels)
    scores, scaled = image_scores(logits, labels), image_scores(logits / temperature, labels)
    return describe(scores, scaled, labels) | {"temperature": temperature}, scores, scaled


# ---- structure of the errors, label noise, ensembles -------------------------------------------------------


def permuted_errors(labels, preds, permutations=1000, seed=0):
    """What errors by chance would look like: the wrong predictions dealt out anew among the wrong images.

    labels, preds: (E,) of the errors. Keeps how often each class is mistaken and how often it is wrongly
    named. A permuted prediction that happens to be right is no error and left out. Returns (permutations,
    20) counts by true superclass: errors inside it, and errors.
    """
    rng = np.random.default_rng(seed)
    own = SUPERCLASS_OF[labels]
    member = (own[:, None] == np.arange(len(SUPERCLASSES))).astype(np.float32)  # (E, 20)
    inside, errors = [], []
    for _ in range(permutations // 100):
        dealt = rng.permuted(np.tile(preds, (100, 1)), axis=1)  # (100, E)
        wrong = dealt != labels
        inside.append((wrong & (SUPERCLASS_OF[dealt] == own)).astype(np.float32) @ member)
        errors.append(wrong.astype(np.float32) @ member)
    return np.concatenate(inside).astype(np.int64), np.concatenate(errors).astype(np.int64)


def superclass_rows(labels, preds):
    """One dict per superclass: what superclasses.csv holds. share: of its errors, how many stay inside it."""
    wrong = preds != labels
    own, named = SUPERCLASS_OF[labels], SUPERCLASS_OF[preds]
    dealt_inside, dealt_errors = permuted_errors(labels[wrong], preds[wrong])
    null = dealt_inside.sum(0) / np.maximum(dealt_errors.sum(0), 1)
    ends = np.quantile(dealt_inside / np.maximum(dealt_errors, 1), [0.025, 0.975], axis=0)
    rows = []
    for k, name in enumerate(SUPERCLASSES):
        images, errors, inside = (int((mask & (own == k)).sum()) for mask in (own >= 0, wrong, wrong & (named == k)))
        low, high = utils.wilson_interval(inside, max(errors, 1))
        row = {"superclass": name, "images": images, "accuracy": 1 - errors / max(images, 1)}
        row["superclass_accuracy"] = 1 - (errors - inside) / max(images, 1)
        row |= {"errors": errors, "inside": inside, "share": inside / max(errors, 1), "low": low, "high": high}
        rows.append(row | {"null": null[k], "null_low": ends[0, k], "null_high": ends[1, k]})
    return rows


def label_candidates(probs, labels):
    """Images whose label confident learning doubts: (indices, suggested labels), the most doubtful first.

    Northcutt, Jiang, Chuang, arXiv:1911.00068. probs: (N, C) out of sample, best after temperature scaling.
    With t_k the mean probability of class k on the images labelled k, an image belongs to the likeliest of
    the classes with p_k >= t_k; where that is not its label, it is a candidate, ranked by p_label - max
    p_other. On this test set about one candidate in four is a real label error (Northcutt et al.,
    arXiv:2103.14749).
    """
    rows = np.arange(len(labels))
    own = probs[rows, labels]
    threshold = np.bincount(labels, own, NUM_CLASSES) / np.maximum(np.bincount(labels, minlength=NUM_CLASSES), 1)
    eligible = np.where(probs >= threshold, probs, -1)
    suggested = eligible.argmax(1)
    doubted = np.flatnonzero((eligible[rows, suggested] >= 0) & (suggested != labels))
    others = probs.copy()
    others[rows, labels] = -1
    margin = own - others.max(1)
    doubted = doubted[np.argsort(margin[doubted], kind="stable")]
    return doubted, suggested[doubted]


def read_label_errors(path):
    """People's votes on the labels of M test images: {"index", "given", "guessed", "votes": (M,) integers}.

    path: cifar100_mturk.json of github.com/cleanlab/label-errors (Apache-2.0), Northcutt et al.,
    arXiv:2103.14749: a list of {id, given_original_label, our_guessed_label, mturk: {given, guessed,
    neither, both}}, five votes per image. Raises ScriptError for anything else.
    """
    expected = "cifar100_mturk.json of github.com/cleanlab/label-errors is wanted"
    try:
        entries = json.loads(Path(path).expanduser().read_text())
        columns = {
            "index": [entry["id"] for entry in entries],
            "given": [entry["given_original_label"] for entry in entries],
            "guessed": [entry["our_guessed_label"] for entry in entries],
            "votes": [entry["mturk"]["given"] for entry in entries],  # for the given label
        }
        whole = all(type(value) is int for column in columns.values() for value in column)
    except OSError as error:
        raise ScriptError(f"--label-errors {path} cannot be read ({error.strerror}); {expected}") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ScriptError(f"--label-errors {path} is another file ({type(error).__name__}); {expected}") from None
    limits = {"index": 9_999, "given": NUM_CLASSES - 1, "guessed": NUM_CLASSES - 1, "votes": 5}
    whole = whole and all(0 <= value <= limits[name] for name, column in columns.items() for value in column)
    if not whole or not entries or len(set(columns["index"])) < len(entries):
        raise ScriptError(f"--label-errors {path} has ids, labels or votes that cannot be; {expected}")
    return {name: np.array(column) for name, column in columns.items()}


LABEL_ERROR_COLUMNS = "index,given,suggested,given_probability,suggested_probability,source".split(",")


def label_noise(run_dir, scores, scaled, labels, names, audit):
    """Write label_errors.csv; print and return how many of the confident failures may be the label's fault.

    audit: of read_label_errors, whose images count where fewer than 3 of 5 people voted for the given
    label; None takes the candidates of confident learning.
    """
    probs, candidates = scaled["probs"], label_candidates(scaled["probs"], labels)
    index, suggested = candidates
    source = "confident learning"
    if audit:
        if not np.array_equal(audit["given"], labels[audit["index"]]):
            raise ScriptError(f"the file of --label-errors was made for other labels than those of {run_dir}")
        index, suggested = (audit[key][audit["votes"] < 3] for key in ("index", "guessed"))
        source = "audit"
    values = (index, labels[index], suggested, probs[index, labels[index]], probs[index, suggested])
    rows = [
        dict(zip(LABEL_ERROR_COLUMNS, (i, names[given], names[other], p, q, source)))
        for i, given, other, p, q in zip(*values)
    ]
    utils.write_csv(run_dir / "label_errors.csv", LABEL_ERROR_COLUMNS, rows)

    doubtful = np.isin(np.arange(len(labels)), index)
    failures = confident_failures(scores)
    covered = int((failures & doubtful).sum())
    content = {"source": source, "images": len(index), "confident_errors": int(failures.sum()), "covered": covered}
    covered = f"{covered:,} of the {failures.sum():,} confident errors"
    if audit:
        accuracy = scores["correct"][~doubtful].mean()
        ece = calibration_error(scores["confidence"][~doubtful], scores["correct"][~doubtful])
        confirmed = int(doubtful[candidates[0]].sum())
        content |= {"accuracy_without": float(accuracy), "ece_without": ece}
        content |= {"candidates": len(candidates[0]), "candidates_in_audit": confirmed}
        print(
            f"  labels that fewer than 3 of 5 people confirmed: {len(index):,}, among them {covered}; accuracy without "
            f"them\n    {100 * accuracy:.2f} %, ECE {100 * ece:.2f} %. Confident learning from these logits names "
            f"{len(candidates[0]):,}, {confirmed:,} of them right"
        )
    else:
        print(
            f"  labels that confident learning doubts: {len(index):,}, among them {covered}, as nearly every confident\n"
            "    error would be; most of these labels are right. --label-errors FILE takes people's votes instead"
        )
    return content


def ensemble_uncertainty(probs):
    """(mean probs (N, C), {name: (N,)}) of a deep ensemble with probs (R, N, C).

    predictive_entropy: of the mean probability, in nats. mutual_information: that minus the members' mean
    entropy; 0 where all say the same. disagreement: share of the pairs of members that predict different
    classes. Lakshminarayanan et al., arXiv:1612.01474; Depeweg et al., arXiv:1710.07283.
    """

    def entropy(p):
        return -(p * np.log(np.maximum(p, 1e-300))).sum(-1)

    mean = probs.mean(0)
    preds = probs.argmax(2)
    pairs = [preds[i] != preds[j] for i, j in itertools.combinations(range(len(probs)), 2)]
    total = entropy(mean)
    return mean, {
        "predictive_entropy": total,
        "mutual_information": np.maximum(total - entropy(probs).mean(0), 0),  # negative by rounding only
        "disagreement": np.mean(pairs, 0),
    }


def evaluate_ensemble(runs, labels, names):
    """Metrics of the mean probability of all runs; writes ensemble.csv and ensemble.json.

    After temperature scaling: the mean of the scaled probabilities. A temperature of the ensemble's own
    would need validation images that no member was trained on, and another seed has others.
    """
    folder = runs[0]["dir"]
    kinds = []
    for kind in ("scores", "scaled"):
        mean, uncertainty = ensemble_uncertainty(np.stack([run[kind]["probs"] for run in runs]))
        kinds.append((image_scores(np.log(np.maximum(mean, 1e-300)), labels), uncertainty))
    (scores, uncertainty), (scaled, _) = kinds
    rows = [
        {"index": i, "true": names[labels[i]], "predicted": names[scores["pred"][i]]}
        | {"confidence": scores["confidence"][i]}
        | {name: values[i] for name, values in uncertainty.items()}
        for i in range(len(labels))
    ]
    utils.write_csv(folder / "ensemble.csv", rows[0], rows)
    metrics = describe(scores, scaled, labels)
    utils.write_json(folder / "ensemble.json", {"runs": [str(run["dir"]) for run in runs]} | metrics)
    print(f"\nensemble of {', '.join(str(run['dir']) for run in runs)}: mean probability")
    ranks = {"confidence": scores["confidence"]} | {name: -values for name, values in uncertainty.items()}
    areas = ((name, failure_auroc(values, scores["correct"])) for name, values in ranks.items())
    print("  AUROC for its errors: " + ", ".join(f"{name} {100 * area:.2f} %" for name, area in areas if area))
    print(f"  wrote ensemble.csv and ensemble.json to {folder}")
    return metrics


# ---- the claims --------------------------------------------------------------------------------------------

# Fixed before any run was looked at.
MARGIN = 0.01  # accuracies within a point of each other count as the same


def claim_measures(baselines):
    """measure(run, labels, counts) for bootstrap(): what the claims need of each run.

    on_failures: mean confidence on the confident failures of the baselines of other seeds. Failures picked
    for their confidence in one run look better in any other, so no run is asked about its own, if there is
    another baseline. own_failures: on its own. at_coverage: error rate among a run's most confident images,
    as many as the baselines have above 0.90 on average.
    """
    coverage = max(np.mean([(run["scores"]["confidence"] > 0.9).mean() for run in baselines]), 1e-4)

    def measure(run, labels, counts):
        n, correct, confidence = len(labels), run["scores"]["correct"], run["scores"]["confidence"]
        raw, scaled = (resampled_metrics(run[kind], labels, counts) for kind in ("scores", "scaled"))
        values = {name: raw[name] for name in ("accuracy", "ece", "aurc", "errors_within_superclass")}
        values["ece_scaled"] = scaled["ece"]
        strangers = [other for other in baselines if other["seed"] != run["seed"]] or baselines
        drawn = counts * np.sum([confident_failures(other["scores"]) for other in strangers], 0)
        own = counts * confident_failures(run["scores"])
        with np.errstate(invalid="ignore"):  # 0 / 0 without failures
            for kind, suffix in (("scores", ""), ("scaled", "_scaled")):
                values["on_failures" + suffix] = drawn @ run[kind]["confidence"] / drawn.sum(1)
                values["own_failures" + suffix] = own @ run[kind]["confidence"] / own.sum(1)
        order = np.argsort(-confidence, kind="stable")
        images, errors = (np.cumsum(part[:, order], 1, np.float64) for part in (counts, counts * ~correct))
        covered = np.array([np.interp(coverage * n, *row) for row in zip(images, errors)])
        values["at_coverage"] = covered / (coverage * n)
        member = SUPERCLASS_OF[labels][:, None] == np.arange(len(SUPERCLASSES))
        values["by_superclass"] = counts @ (member & correct[:, None]) / np.maximum(member.sum(0), 1)  # (R, 20)
        return values

    return measure


def luck(figure, draws, error, degrees):
    """Draws of a figure that cover the choice of test images and the luck of the training runs.

    draws: its bootstrap values over test images. error: its standard error over training runs, estimated
    with so many degrees of freedom: hence a Student t; 0 if there is one run of each. Images on which runs
    differ by luck are in both parts, so intervals are rather too wide than too narrow.
    """
    rng = np.random.default_rng(0)
    draws = figure + rng.choice(draws - draws.mean(), 100_000)
    return draws + error * rng.standard_t(degrees, len(draws)) if degrees else draws


def decide(ends, side, reference):
    """The word for an interval: supported if it lies on the claimed side, contradicted if on the other.

    side: "below" or "above" the reference, or "within" MARGIN of it.
    """
    low, high = (end - reference for end in ends)
    supported, contradicted = {
        "below": (high < 0, low > 0),
        "above": (low > 0, high < 0),
        "within": (-MARGIN < low and high < MARGIN, low > MARGIN or high < -MARGIN),
    }[side]
    return "supported" if supported else "contradicted" if contradicted else "not decided"


def claim(text, figure, ends, side, reference, control, control_value, note=""):
    """One row of the verdict; a note says why it could not be decided."""
    known = ends is not None and not np.isnan(ends).any()
    figure, control_value = (None if x is None or np.isnan(x) else float(x) for x in (figure, control_value))
    row = {"claim": text, "figure": figure, "ci95": [float(end) for end in ends] if known else None}
    row |= {"side": side, "reference": float(reference), "control": control, "control_value": control_value}
    note = note or ("" if known else "too few confident failures for an interval")
    return row | {"word": "not decided" if note else decide(ends, side, reference), "note": note}


def judge(baselines, changed, labels):
    """The claims of the study, measured: the rows of verdict.json.

    baselines, changed: the runs of two recipes, as dicts of scores and scaled (image_scores), seed, and
    attention (attention.json of gradcam.py, or None).
    """
    runs, degrees = baselines + changed, len(baselines) + len(changed) - 2
    measure, once = claim_measures(baselines), np.ones((1, len(labels)), np.float32)
    whole = [measure(run, labels, once) for run in runs]
    whole = {name: np.array([values[name][0] for values in whole]) for name in whole[0]}  # (runs, ...)
    draws = bootstrap(labels, runs, measure)
    draws = {name: np.array([values[name] for values in draws]) for name in whole}  # (runs, 2000, ...)
    first = np.array([1 / len(baselines)] * len(baselines) + [0] * len(changed))  # weights: mean of the baselines
    change = np.array([-1 / len(baselines)] * len(baselines) + [1 / len(changed)] * len(changed))

    def spread(values):
        """Standard deviation between seeds of (runs,) values; both recipes are taken to vary alike."""
        arms = np.split(values, [len(baselines)])
        return math.sqrt(sum(((arm - arm.mean()) ** 2).sum() for arm in arms) / degrees) if degrees else math.nan

    def estimate(weights, values, draws):
        """(figure, draws of it) for a weighted sum over the runs."""
        error = spread(values) * np.linalg.norm(weights)
        return weights @ values, luck(weights @ values, weights @ draws, error, degrees)

    rows = []
    single = "" if degrees else "one run of each: the luck of training is not in the interval; train other seeds"

    def add_change(text, name, side, control="deviation between seeds", value=None, note=""):
        figure, values = estimate(change, whole[name], draws[name])
        value = spread(whole[name]) if value is None else value
        ends = np.quantile(values, [0.025, 0.975])
        rows.append(claim(text, figure, ends, side, 0, control, value, note or single))

    failures = sum(confident_failures(run["scores"]).sum() for run in baselines)
    few = "" if failures >= utils.FEWEST else f"the baselines have fewer than {utils.FEWEST} confident failures"
    biased = "biased: picked in the one run it is compared with; train the baseline with another seed"
    add_change("accuracy stays the same, within 1 point", "accuracy", "within")
    for scaled, suffix in (("", ""), (", scaled", "_scaled")):
        text, name = f"confident failures become less confident{scaled}", f"on_failures{suffix}"
        if len(baselines) > 1:
            alone = np.mean((whole[name] - whole[f"own_failures{suffix}"])[: len(baselines)])
            add_change(text, name, "below", "another baseline seed alone", alone, few)
        else:
            add_change(text, name, "below", "none", math.nan, few or biased)
    add_change("fewer confident failures, at equal coverage", "at_coverage", "below", note=few)
    for kind, scaled, suffix in (("scores", "", ""), ("scaled", ", scaled", "_scaled")):
        floor = np.mean([null_calibration_error(run[kind]["confidence"], 100) for run in runs])
        add_change(f"calibration improves (ECE){scaled}", f"ece{suffix}", "below", "ECE of a calibrated model", floor)
    add_change("confidence ranks the errors better (AURC)", "aurc", "below")

    figure, values = estimate(first, whole["errors_within_superclass"], draws["errors_within_superclass"])
    ends = np.quantile(values, [0.025, 0.975])
    wrong = [~run["scores"]["correct"] for run in baselines]
    dealt = [permuted_errors(labels[mask], run["scores"]["pred"][mask], 100) for run, mask in zip(baselines, wrong)]
    inside, errors = np.sum(dealt, (0, 2, 3))
    null = inside / max(errors, 1)
    text = "errors stay in the superclass more than by chance"
    rows.append(claim(text, figure, ends, "above", null, "wrong predictions shuffled", null))
    rows.append(claim("most errors stay in the superclass", figure, ends, "above", 0.5, "half", 0.5))

    # Worst means below every other one. Each comparison at its full level proves that; that one of them goes the other
    # way is looked for 19 times, hence Bonferroni there. Hsu 1996, multiple comparisons with the best.
    superclasses = list(SUPERCLASSES)
    small, others = superclasses.index("small_mammals"), [k for k in range(20) if superclasses[k] != "small_mammals"]
    gaps = []
    for k in others:
        gap = whole["by_superclass"][:, small] - whole["by_superclass"][:, k]
        figure, values = estimate(first, gap, draws["by_superclass"][:, :, small] - draws["by_superclass"][:, :, k])
        gaps.append((figure, *np.quantile(values, [0.025 / len(others), 0.975])))
    figure, *ends = np.max(gaps, 0)
    lowest = others[int(np.argmax([gap[0] for gap in gaps]))]
    control = f"accuracy of {superclasses[lowest]}"
    value = first @ whole["by_superclass"][:, lowest]
    rows.append(claim("small mammals are the worst superclass", figure, ends, "below", 0, control, value))
    return rows + judge_attention([run["attention"] for run in baselines if run["attention"]], bool(degrees))


# What the verdict reads of attention.json, each a {mean, low, high}.
ATTENTION = {
    "failures": ("border_reliance", "centre_drop"), "matched": ("border_reliance",),
    "failures_minus_matched": ("border_reliance",),
}  # fmt: skip


def judge_attention(reports, several):
    """The rows on attention, from attention.json of the baselines that have been through gradcam.py.

    several: whether the verdict is on several seeds, so that a single report is not enough.
    """
    texts = "failures need the border more than the centre", "failures need the border more than correct ones do"
    if not reports:
        note = "not measured: run failures.py and gradcam.py on the baseline"
        return [claim(text, None, None, "above", 0, "", None, note) for text in texts]

    def mean(group, figure):
        return np.mean([report[group][figure]["mean"] for report in reports])

    rows, note = [], ""
    if several and len(reports) == 1:
        note = "attention of one baseline only: the luck of training is not in the interval; run gradcam.py on others"
    for text, group, control, value in (
        (texts[0], "failures", "hiding the centre", mean("failures", "centre_drop")),
        (texts[1], "failures_minus_matched", "correct, equally confident", mean("matched", "border_reliance")),
    ):
        values = np.array([report[group]["border_reliance"]["mean"] for report in reports])
        width = np.mean(
            [np.ptp([report[group]["border_reliance"][end] for end in ("low", "high")]) for report in reports]
        )
        by_images = np.random.default_rng(1).normal(0, width / (2 * 1.96), 2000)
        degrees = len(reports) - 1
        error = values.std(ddof=1) / math.sqrt(len(values)) if degrees else 0
        ends = np.quantile(luck(values.mean(), by_images, error, degrees), [0.025, 0.975])
        rows.append(claim(text, values.mean(), ends, "above", 0, control, value, note))
    return rows


def print_verdict(rows):
    """The table of the claims, in points (1 / 100)."""
    width = max(len(row["claim"]) for row in rows)
    print(f"{'claim':<{width}} {'claimed':>8} {'figure':>7}  {'95 % interval':<16} {'control':>7}  word")
    for row in rows:
        side = {"below": "<", "above": ">", "within": "+-"}[row["side"]]
        claimed = f"{side} {100 * (MARGIN if row['side'] == 'within' else row['reference']):.3g}"
        figure, control = ("-" if x is None else f"{100 * x:.2f}" for x in (row["figure"], row["control_value"]))
        ends = "[{:.2f}, {:.2f}]".format(*(100 * end for end in row["ci95"])) if row["ci95"] else "-"
        print(f"{row['claim']:<{width}} {claimed:>8} {figure:>7}  {ends:<16} {control:>7}  {row['word']}")
    for note in dict.fromkeys(row["note"] for row in rows if row["note"]):
        print(f"  not decided: {note}")


def verdict(baselines, changed, labels):
    """Print the claims about the step from one recipe to another; verdict.json and .png go to the second."""
    folder = changed[0]["dir"]
    names = [
        f"{arm[0]['dir'].name} (seed{'s' * (len(arm) > 1)} {', '.join(str(run['seed']) for run in arm)})"
        for arm in (baselines, changed)
    ]
    print(f"\nverdict on the step from {names[0]}\nto {names[1]}; in points")
    rows = judge(baselines, changed, labels)
    print_verdict(rows)
    print(
        "  scaled: after temperature scaling of each run. control: what the figure would be without the effect, or how far\n"
        "  luck alone moves it; verdict.json says which. Intervals: the choice of test images"
        + (" and the luck of training." if len(baselines + changed) > 2 else ".")
    )
    attended = sum(run["attention"] is not None for run in baselines)
    if 0 < attended < len(baselines):
        print(
            f"  The border: in {attended} of {len(baselines)} baselines; gradcam.py has not been through the others."
        )
    content = dict(zip(("baselines", "changed"), ([str(run["dir"]) for run in arm] for arm in (baselines, changed))))
    content["baselines_with_attention"] = attended
    utils.write_json(folder / "verdict.json", content | {"claims": rows})
    draw_verdict(folder / "verdict.png", rows, f"from {names[0]}\nto {names[1]}")
    print(f"  wrote verdict.json and verdict.png to {folder}")
    return rows


# ---- files and figures -------------------------------------------------------------------------------------


def confused_pairs(confusion, count=20):
    """The unordered pairs of classes most often taken for each other: [(i, j, errors)], most errors first."""
    errors = np.triu(confusion + confusion.T, 1)
    order = np.argsort(-errors, axis=None, kind="stable")[:count]
    return [(i, j, int(errors[i, j])) for i, j in zip(*np.unravel_index(order, errors.shape)) if errors[i, j]]


def draw_confusion(path, confusion, names, title):
    figure, (matrix, bars) = utils.new_figure(20, 13, 1, 2, width_ratios=[14, 6])
    order = np.argsort(SUPERCLASS_OF, kind="stable")
    shown = confusion[np.ix_(order, order)].astype(float)
    np.fill_diagonal(shown, np.nan)  # the hits would own the colour scale
    picture = matrix.imshow(shown, cmap="cividis")
    labels = [names[k] for k in order]
    matrix.set_xticks(range(NUM_CLASSES), labels, rotation=90, fontsize=6)
    matrix.set_yticks(range(NUM_CLASSES), labels, fontsize=6)
    for edge in range(0, NUM_CLASSES, 5):  # a frame around the five classes of each superclass
        matrix.plot(
            np.array([0, 5, 5, 0, 0]) + edge - 0.5,
            np.array([0, 0, 5, 5, 0]) + edge - 0.5,
            color="white",
            linewidth=0.7,
        )
    matrix.set(xlabel="predicted class", ylabel="true class")
    matrix.set_title("errors; frames: the superclasses; blank diagonal: correct")
    figure.colorbar(picture, ax=matrix, label="test images", shrink=0.5)

    pairs = confused_pairs(confusion)[::-1]
    colors = [utils.BLUE if SUPERCLASS_OF[i] == SUPERCLASS_OF[j] else utils.VERMILION for i, j, _ in pairs]
    bars.barh([f"{names[i]} / {names[j]}" for i, j, _ in pairs], [errors for _, _, errors in pairs], color=colors)
    bars.margins(y=0.01)
    bars.set(
        xlabel="errors, both ways together",
        title="most confused pairs\nblue: same superclass, vermilion: different ones",
    )
    figure.suptitle(title)
    utils.save_figure(figure, path)


def per_class_rows(confusion, names):
    """One dict per class, in label order: what per_class.csv holds."""
    hits, images, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    errors = confusion - np.diag(hits)
    low, high = utils.wilson_interval(hits, np.maximum(images, 1))
    superclasses = list(SUPERCLASSES)
    return [
        {
            "label": k,
            "class": names[k],
            "superclass": superclasses[SUPERCLASS_OF[k]],
            "images": images[k],
            "accuracy": hits[k] / max(images[k], 1),  # of its images: this is the recall
            "low": low[k],
            "high": high[k],
            "precision": hits[k] / max(predicted[k], 1),
            "f1": 2 * hits[k] / max(images[k] + predicted[k], 1),
            "mostly_taken_for": names[errors[k].argmax()] if errors[k].any() else "",
            "times": errors[k].max(),
        }
        for k in range(len(names))
    ]


def draw_per_class(path, rows, title):
    figure, axes = utils.new_figure(8, 14)
    rows = sorted(rows, key=lambda row: row["accuracy"])
    accuracy, low, high = (100 * np.array([row[key] for row in rows]) for key in ("accuracy", "low", "high"))
    axes.errorbar(
        accuracy,
        range(len(rows)),
        xerr=[accuracy - low, high - accuracy],
        fmt="o",
        color=utils.BLUE,
        ecolor=utils.GRAY,
        markersize=3,
    )
    axes.set_yticks(range(len(rows)), [row["class"] for row in rows], fontsize=6)
    axes.set(
        xlabel="accuracy on the images of the class (%), with 95 % Wilson interval",
        ylim=(-1, len(rows)),
        xlim=(0, 100),
        title=title,
    )
    axes.axvline(accuracy.mean(), color=utils.VERMILION, linestyle="--", label=f"mean {accuracy.mean():.1f} %")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right")
    utils.save_figure(figure, path)


def draw_reliability(path, runs, title):
    """Accuracy against confidence in 15 bins, above the images in each; as trained and temperature-scaled."""
    figure, axes = utils.new_figure(11 * len(runs), 6.5, 2, 2 * len(runs), sharex=True, height_ratios=[3, 1])
    panels = []
    for run in runs:
        name = f"{run['dir'].name}\n" if len(runs) > 1 else ""
        panels.append((run["scores"], f"{name}as trained", run["metrics"], ""))
        panels.append(
            (run["scaled"], f"{name}logits / {run['metrics']['temperature']:.3f}", run["metrics"], "_scaled")
        )
    centers = (np.arange(15) + 0.5) / 15
    for (top, bottom), (seen, label, metrics, suffix) in zip(axes.T, panels):
        bins = calibration_bins(seen["confidence"])
        count = np.bincount(bins, minlength=15)
        filled = count > 0
        accuracy, confidence = (
            np.bincount(bins, seen[what], 15)[filled] / count[filled] for what in ("correct", "confidence")
        )
        top.bar(centers[filled], accuracy, 1 / 15, color=utils.BLUE, edgecolor="white", label="accuracy in the bin")
        top.plot(confidence, confidence, "D", color=utils.VERMILION, markersize=4, label="mean confidence in the bin")
        top.plot([0, 1], [0, 1], "--", color=utils.GRAY, label="perfectly calibrated")
        ece, null = (100 * metrics[f"{key}{suffix}"] for key in ("ece", "ece_null"))
        top.set(title=f"{label}: ECE {ece:.2f} % ({null:.2f} % if calibrated)")
        top.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        top.legend(loc="upper left")
        bottom.bar(centers, count, 1 / 15, color=utils.GRAY, edgecolor="white")
        bottom.set(xlabel="confidence (largest probability)", ylabel="test images")
    figure.suptitle(title)
    utils.save_figure(figure, path)


def draw_risk_coverage(path, runs, title):
    """Error rate among the most confident images against their share, of two runs."""
    figure, axes = utils.new_figure(8, 5.5)
    for run, color in zip(runs, (utils.BLUE, utils.VERMILION)):
        for kind, style, label in (("scores", "-", "as trained"), ("scaled", ":", "after temperature scaling")):
            risk = risk_coverage(run[kind]["confidence"], run[kind]["correct"])
            label = f"{run['dir'].name}, {label}: AURC {100 * risk.mean():.2f} %"
            axes.plot(100 * np.arange(1, len(risk) + 1) / len(risk), 100 * risk, style, color=color, label=label)
    axes.axvline(80, color=utils.GRAY, linewidth=0.8)
    axes.set(xlabel="coverage: the most confident share of the test images (%)", ylabel="error rate among them (%)")
    axes.set(xlim=(0, 100), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.suptitle(title, fontsize=10)
    utils.save_figure(figure, path)


WORD_COLORS = {"supported": utils.BLUE, "contradicted": utils.VERMILION, "not decided": utils.GRAY}


def draw_verdict(path, rows, title):
    """One line per claim, its interval on a scale of its own; rows: of judge()."""
    figure, axes = utils.new_figure(13.3, 1.6 + 0.48 * len(rows))
    axes.set(xlim=(-4.6, 5.6), ylim=(len(rows) - 0.4, -1.3))
    axes.axis("off")
    heads = (
        (-4.5, "claim", "left"),
        (1.35, "figure, 95 % interval", "left"),
        (2.75, "control", "left"),
        (5.5, "word", "right"),
    )
    for x, head, side in heads:
        axes.text(x, -0.8, head, ha=side, va="center", fontsize=10, weight="bold")
    axes.text(0, -0.8, "wrong  |  as claimed", ha="center", va="center", fontsize=9)
    for y, row in enumerate(rows):
        color = WORD_COLORS[row["word"]]
        axes.text(-4.5, y, row["claim"], va="center", fontsize=10)
        axes.text(5.5, y, row["word"], ha="right", va="center", fontsize=10, color=color, weight="bold")
        if row["figure"] is None:
            axes.text(1.35, y, "not measured", va="center", fontsize=9, color=utils.GRAY)
            continue
        sign = -1 if row["side"] == "below" else 1  # the claimed side is always to the right
        points = np.array([row["figure"], *(row["ci95"] or [])]) - row["reference"]
        margin = MARGIN if row["side"] == "within" else 0
        scale = 1.1 * max(np.abs(points).max(), 1.5 * margin, 1e-9)
        left, right = (-margin / scale, margin / scale) if margin else (0, 1)
        axes.fill_betweenx([y - 0.4, y + 0.4], left, right, color=utils.BLUE, alpha=0.12, linewidth=0)
        axes.plot([0, 0], [y - 0.4, y + 0.4], color="black", linewidth=0.8)
        axes.plot(sign * points[0] / scale, y, "o", color=color)
        text = f"{100 * row['figure']:.2f}"
        if row["ci95"]:
            axes.plot(sign * points[1:] / scale, [y, y], color=color, linewidth=2)
            text += " [{:.2f}, {:.2f}]".format(*(100 * end for end in row["ci95"]))
        axes.text(1.35, y, text, va="center", fontsize=9)
        if row["control_value"] is not None:
            axes.text(2.75, y, f"{100 * row['control_value']:.1f}  {row['control']}", va="center", fontsize=8)
    figure.suptitle(f"{title}\nin points; every line on its own scale, shaded: as claimed", fontsize=11)
    utils.save_figure(figure, path)


CLASSIFICATION = {  # column: (key in metrics.json, factor, decimals)
    "accuracy": ("accuracy", 100, 2), "precision": ("macro_precision", 100, 2), "recall": ("macro_recall", 100, 2),
    "F1": ("macro_f1", 100, 2), "top-5": ("top5_accuracy", 100, 2), "super": ("superclass_accuracy", 100, 2),
    "inside": ("errors_within_superclass", 100, 2), "chance": ("errors_within_superclass_null", 100, 2),
    "sure+wrong": ("confident_errors", 100, 2),
}  # fmt: skip
CONFIDENCE = {
    "gap": ("signed_gap", 100, 2), "ECE": ("ece", 100, 2), "null": ("ece_null", 100, 2), "ECE-ad": ("ece_adaptive", 100, 2),
    "NLL": ("nll", 1, 3), "Brier": ("brier", 1, 3), "AURC": ("aurc", 100, 2), "E-AURC": ("eaurc", 100, 2),
    "AUROC": ("auroc_failure", 100, 2), "risk@80": ("risk_at_80", 100, 2),
}  # fmt: skip


def print_table(columns, rows):
    """rows: (name, metrics) pairs; a metric that is missing or undefined is a dash."""
    width = max(len(name) for name, _ in rows)
    print(f"\n{'':{width}} " + " ".join(f"{column:>10}" for column in columns))
    for name, metrics in rows:
        values = [(metrics.get(key), factor, digits) for key, factor, digits in columns.values()]
        cells = [f"{'-':>10}" if x is None else f"{factor * x:10.{digits}f}" for x, factor, digits in values]
        print(f"{name:{width}} " + " ".join(cells))


def print_tables(results, published):
    """Classification, the published run first; then confidence, as trained and after temperature scaling."""
    print_table(CLASSIFICATION, [("published study", PUBLISHED)] * published + list(results.items()))
    print(
        "In %. Precision, recall, F1: macro. super: right superclass. inside: share of the errors inside their superclass;\n"
        "chance: the same with the wrong predictions shuffled. sure+wrong: wrong with confidence above 0.90, of all\n"
        "images; smoothing 0.1 teaches 0.901 at most, so there it falls by construction. Intervals: metrics.json."
    )
    rows = []
    for name, metrics in results.items():
        temperature = f"T = {metrics['temperature']:.3f}" if "temperature" in metrics else "scaled"
        scaled = {key: metrics.get(f"{key}_scaled") for key, *_ in CONFIDENCE.values()}
        rows += [(name, metrics), (f"{temperature:>{len(name)}}", scaled)]
    print_table(CONFIDENCE, rows)
    print(
        "In %, but for NLL (nats) and Brier. gap: mean confidence - accuracy. null: ECE of a calibrated model. ECE-ad: bins\n"
        "of equally many images. E-AURC: AURC above a perfect ranking's. AUROC: of confidence, for errors. risk@80: error\n"
        "rate of the most confident 80 %. T: after dividing the logits by the temperature that suits the validation images."
    )


def mean_and_spread(arm):
    """{name: metrics}: mean and standard deviation over the seeds of one recipe, if it has several."""
    if len(arm) < 2:
        return {}
    keys = [key for key, value in arm[0]["metrics"].items() if isinstance(value, float)]
    columns = {key: [run["metrics"][key] for run in arm] for key in keys}
    columns = {key: values for key, values in columns.items() if None not in values}
    name = arm[0]["dir"].name
    return {
        f"{name}: mean of {len(arm)}": {key: np.mean(values) for key, values in columns.items()},
        f"{name}: deviation": {key: np.std(values, ddof=1) for key, values in columns.items()},
    }


def evaluate(run_dir, config, args, device, audit):
    """Everything for one run: prints, writes its files, and returns what the comparisons need, as a dict."""
    if device:
        compute_logits(run_dir, config, args.data_dir, device)
    logits, labels = utils.load_logits(run_dir, "test")
    metrics, scores, scaled = compute_metrics(logits, labels, *utils.load_logits(run_dir, "val"))
    names = class_names(config["dataset"])
    title = f"{run_dir.name}, {len(labels):,} test images of {TITLES[config['dataset']]}"
    unfinished = "" if config.get("finished") else "; the run is not finished, this is its best epoch so far"
    print(f"\n{title}{unfinished}")
    metrics["label_errors"] = label_noise(run_dir, scores, scaled, labels, names, audit)
    present = [name for name in ("best.pt", *ARRAYS) if (run_dir / name).exists()]
    metrics["sha256"] = {name: utils.sha256(run_dir / name) for name in present}
    run = {"dir": run_dir, "config": config, "seed": config["args"].get("seed"), "metrics": metrics}
    run |= {"labels": labels, "scores": scores, "scaled": scaled, "attention": read_attention(run_dir, scores)}

    confusion = confusion_matrix(labels, scores["pred"], NUM_CLASSES)
    rows, families = per_class_rows(confusion, names), superclass_rows(labels, scores["pred"])
    write_array(run_dir / "confusion.npy", confusion)
    draw_confusion(run_dir / "confusion.png", confusion, names, title)
    utils.write_csv(run_dir / "per_class.csv", rows[0], rows)
    utils.write_csv(run_dir / "superclasses.csv", families[0], families)
    draw_per_class(run_dir / "per_class.png", rows, title)
    draw_reliability(run_dir / "reliability.png", [run], title)
    utils.write_json(run_dir / "metrics.json", metrics)

    def percent(key):
        return f"{100 * metrics[key]:.2f} % [{', '.join(f'{100 * end:.2f}' for end in metrics['ci95'][key])}]"

    print(f"  accuracy {percent('accuracy')}, superclass right {percent('superclass_accuracy')}, in [95 % interval]")
    if metrics["errors_within_superclass"] is not None:
        chance = percent("errors_within_superclass_null")
        print(
            f"  errors inside the superclass {percent('errors_within_superclass')}; with wrong predictions shuffled {chance}"
        )
        ranked = sorted((row for row in families if row["errors"]), key=lambda row: -row["share"])
        shares = [f"{row['superclass']} {100 * row['share']:.0f} %" for row in ranked]
        print(f"    most: {', '.join(shares[:3])}; least: {', '.join(shares[-3:])}")
    pairs = confused_pairs(confusion, 5)
    print("  most confused: " + ", ".join(f"{names[i]}/{names[j]} {errors}" for i, j, errors in pairs))
    print(f"  {'ten worst classes':<37} ten best, accuracy in % [95 % Wilson interval]")
    ranked = sorted(rows, key=lambda row: row["accuracy"])
    cells = [
        f"{row['class']:<14} {100 * row['accuracy']:3.0f} [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"
        for row in ranked
    ]
    for worst, best in zip(cells[:10], cells[:-11:-1]):
        print(f"    {worst:<36} {best}")
    print(
        "  wrote metrics.json, confusion.npy, per_class.csv, superclasses.csv, label_errors.csv, confusion.png, "
        "per_class.png and reliability.png"
    )
    return run


def read_attention(run_dir, scores):
    """attention.json of gradcam.py if it is of this best.pt and of these confident failures; None otherwise."""
    path, made_by = run_dir / "attention.json", f"python gradcam.py {utils.quote(run_dir)}"
    if not path.exists():
        return None
    report = utils.read_json(path, made_by)
    try:
        figures = [report[g][f][k] for g, fs in ATTENTION.items() for f in fs for k in ("mean", "low", "high")]
        sound = all(value is None or (isinstance(value, float) and math.isfinite(value)) for value in figures)
        of_other = (run_dir / "best.pt").exists() and report["sha256"]["best.pt"] != utils.sha256(run_dir / "best.pt")
        ours = report["lowest_confidence"] > 0.9 and report["images"] == confident_failures(scores).sum()
    except (KeyError, TypeError):
        sound = of_other = ours = False
    if not sound:
        raise ScriptError(f"{path} is not of this gradcam.py; run {made_by} again, or delete it")
    if of_other:
        utils.warn(f"{path} is of another best.pt and left out; run {made_by} again")
    elif not ours:
        again = f"python failures.py {utils.quote(run_dir)}, then {made_by}"
        utils.warn(f"{path} is not of the failures above 0.90 and left out; run {again}")
    elif None not in figures:  # too few images for an interval
        return report
    return None


def compare(first, second):
    """Print and save what changes from the first run to the second, on the same test images; returns the
    content.

    Every difference has a 95 % interval from 2,000 resamples of the test images, the same ones for both
    runs. It covers the choice of test images, not the luck of a training run: for that, compare several
    seeds.
    """
    labels, first_dir, second_dir = first["labels"], first["dir"], second["dir"]
    only_first, only_second, p = utils.mcnemar(first["scores"]["correct"], second["scores"]["correct"])
    content = {"reference": str(first_dir), "mcnemar_p": p}
    content |= {"only_reference_right": only_first, "only_this_right": only_second}
    print(f"\n{first_dir} -> {second_dir}, difference [95 % interval]; * where the interval leaves out 0")
    print(f"  right in the first only {only_first:,}, in the second only {only_second:,}; exact McNemar p = {p:.2g}")
    unscaled = ["accuracy", "macro_f1"]  # a temperature does not change them
    both = "signed_gap confident_errors ece ece_adaptive nll brier aurc eaurc auroc_failure risk_at_80".split()
    for kind, suffix in (("scores", ""), ("scaled", "_scaled")):
        pair = [first[kind], second[kind]]
        values = bootstrap(labels, pair)
        whole = [resampled_metrics(scores, labels, np.ones((1, len(labels)), np.float32)) for scores in pair]
        print(f"  {'after temperature scaling' if suffix else 'as trained':<26} {'first':>8} {'second':>8}")
        for name in both if suffix else unscaled + both:
            (a,), (b,) = whole[0][name], whole[1][name]
            ends = interval(values[1][name] - values[0][name])
            content[name + suffix] = {"reference": a, "this": b, "difference": b - a, "ci95": ends} if ends else None
            if ends:
                factor, digits = (1, 4) if name in ("nll", "brier") else (100, 2)
                a, b, difference, low, high = (f"{factor * x:.{digits}f}" for x in (a, b, b - a, *ends))
                star = "" if ends[0] <= 0 <= ends[1] else " *"
                print(f"    {name:<24} {a:>8} {b:>8} {difference:>9} [{low}, {high}]{star}")
    utils.write_json(second_dir / "comparison.json", content)
    title = f"{first_dir.name} and {second_dir.name}, {len(labels):,} test images of {TITLES[second['config']['dataset']]}"
    draw_reliability(second_dir / "comparison_reliability.png", [first, second], title)
    draw_risk_coverage(second_dir / "comparison_risk_coverage.png", [first, second], title)
    print(f"  wrote comparison.json, comparison_reliability.png and comparison_risk_coverage.png to {second_dir}")
    return content


def by_recipe(runs):
    """The runs in lists of one recipe each, in the order in which the recipes come."""
    arms = []
    for run in runs:
        arm = next((arm for arm in arms if utils.recipe(arm[0]["config"]) == utils.recipe(run["config"])), None)
        if arm is None:
            arms.append([run])
        elif run["seed"] in [other["seed"] for other in arm]:
            utils.warn(
                f"{run['dir']} repeats the seed {run['seed']} of its recipe and is left out of means and verdict"
            )
        else:
            arm.append(run)
    return arms


def warn_of_differences(arms):
    """Two recipes compare fairly if they differ in the smoothing alone."""
    ours = utils.recipe(arms[0][0]["config"])
    for arm in arms[1:]:
        theirs = utils.recipe(arm[0]["config"])
        for key in sorted(key for key in ours.keys() - {"smoothing"} if ours[key] != theirs.get(key)):
            utils.warn(f"{arms[0][0]['dir']} and {arm[0]['dir']} differ in {key}: {ours[key]} and {theirs.get(key)}")


def main(argv=None):
    """Evaluate the given runs; returns {run directory: metrics}."""
    parser = utils.ArgumentParser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory of train.py")
    parser.add_argument("--refresh", action="store_true", help="compute the logits again although they are there")
    parser.add_argument("--ensemble", action="store_true", help="also score the mean probability of all runs")
    parser.add_argument(
        "--label-errors",
        metavar="FILE",
        help="cifar100_mturk.json of github.com/cleanlab/label-errors: people's votes",
    )
    utils.add_common_flags(parser)
    args = parser.parse_args(argv)
    folders = [utils.open_run(run) for run in dict.fromkeys(args.runs)]
    for run_dir, config in folders:
        utils.check_dataset(run_dir, config["dataset"], args.dataset)
        if args.label_errors and config["dataset"] != "cifar100":
            parser.error(f"--label-errors is about CIFAR-100, and {run_dir} about {config['dataset']} images")
    if args.ensemble and len(folders) < 2:
        parser.error("--ensemble takes two runs or more")
    audit = read_label_errors(args.label_errors) if args.label_errors else None
    stale = [args.refresh or not logits_are_current(run_dir) for run_dir, _ in folders]
    device = utils.select_device(args.device) if any(stale) or args.device != "auto" else None

    runs = [evaluate(*folder, args, device if compute else None, audit) for folder, compute in zip(folders, stale)]
    first, dataset = runs[0], folders[0][1]["dataset"]
    comparable = [
        run for run in runs if run["config"]["dataset"] == dataset and np.array_equal(run["labels"], first["labels"])
    ]
    arms = by_recipe(comparable)
    results = {str(run["dir"]): run["metrics"] for run in runs}
    if args.ensemble:
        if len(comparable) < len(runs):
            raise ScriptError("--ensemble takes runs that were evaluated on the same test images")
        results[f"ensemble of {len(runs)}"] = evaluate_ensemble(runs, first["labels"], class_names(dataset))
    synthetic = {str(run["dir"]) for run in runs if run["config"]["dataset"] == "synthetic"}
    table = {name + " (SYNTHETIC)" * (name in synthetic): metrics for name, metrics in results.items()}
    for arm in arms:
        table |= mean_and_spread(arm)
    print_tables(table, published=not synthetic)
    for other in [arm[0] for arm in arms[1:]] or comparable[1:]:
        compare(first, other)
    warn_of_differences(arms)
    for arm in arms[1:]:
        verdict(arms[0], arm, first["labels"])
    others = "".join(f" --compare {utils.quote(arm[0]['dir'])}" for arm in arms[1:2])
    if len(runs) == 1:
        print("to compare: train another run, such as python train.py --smoothing 0.1, and name both here")
    print(f"next: python failures.py {utils.quote(first['dir'])}{others}{utils.data_dir_flag(args)}")
    return results


if __name__ == "__main__":
    utils.run_script(main)
