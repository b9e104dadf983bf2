"""Score trained runs on the CIFAR-100 test set.

    python evaluate.py runs/baseline                        # one run
    python evaluate.py runs/baseline runs/smoothing0.1      # side by side, below the published numbers

Writes into each run directory test_logits.npy (10000, 100) float32 and test_labels.npy (10000,) int64, where
row i is test image i; the same for the 5,000 validation images; metrics.json (fractions, 95 % intervals under
ci95); confusion.npy (row = true class, column = predicted), confusion.png, per_class.csv, per_class.png and
reliability.png. Logits that are there already are not computed again: then neither checkpoint nor data set is
needed. The second and every further run is compared with the first one, image by image: comparison.json.
"""

import math

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
    """Whether the saved logits can stand: metrics.json says that they came from best.pt, or there is no best.pt."""
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

    pred, confidence (largest probability), correct, top5, nll (nats), brier (sum over classes of (p -
    target)^2, in [0, 2]), superclass (right, or the error stays in the superclass), within (wrong, but in the
    superclass).
    """
    log_probs = log_softmax(logits)
    probs = np.exp(log_probs)
    rows, pred = np.arange(len(labels)), logits.argmax(1)
    correct = pred == labels
    ranked = np.argsort(-logits, axis=1, kind="stable")  # where logits tie, the lower label comes first
    superclass = SUPERCLASS_OF[pred] == SUPERCLASS_OF[labels]
    return {
        "pred": pred,
        "confidence": probs[rows, pred],
        "correct": correct,
        "top5": (ranked[:, :5] == labels[:, None]).any(1),
        "nll": -log_probs[rows, labels],
        "brier": (probs**2).sum(1) - 2 * probs[rows, labels] + 1,
        "superclass": superclass,
        "within": superclass & ~correct,
    }


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


def null_calibration_error(confidence, draws=1000, seed=0):
    """ECE that a perfectly calibrated model of these confidences would show on average: the noise floor.

    The labels are redrawn: image i is right with probability confidence_i. Broecker and Smith 2007.
    """
    rng = np.random.default_rng(seed)
    outcomes = (rng.random(len(confidence)) < confidence for _ in range(draws))
    return float(np.mean([calibration_error(confidence, correct) for correct in outcomes]))


def area_under_risk_coverage(confidence, correct):
    """AURC in [0, 1], lower is better: the error rate among the i most confident images, averaged over i.

    Geifman, Uziel, El-Yaniv, arXiv:1805.08206. Images of equal confidence share their error rate, which is
    the mean over all orders of the tied images.
    """
    _, tie, count = np.unique(-confidence, return_inverse=True, return_counts=True)
    errors = (np.bincount(tie, ~correct) / count)[tie]
    risk = np.cumsum(errors[np.argsort(tie, kind="stable")]) / np.arange(1, len(errors) + 1)
    return float(risk.mean())


def failure_auroc(confidence, correct):
    """P(a correct image is more confident than a wrong one), ties counting half; None without errors or without hits."""
    hits, errors = int(correct.sum()), int((~correct).sum())
    if not hits or not errors:
        return None
    _, tie, count = np.unique(confidence, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[tie]  # from 1, the mean rank where tied
    return float((rank[correct].sum() - hits * (hits + 1) / 2) / (hits * errors))


def resample(labels, resamples=2000, seed=0):
    """Yield blocks (100, N) float32: how often each test image is drawn in each of 100 bootstrap resamples.

    The test set has 100 images of every class by design, so each class is redrawn from its own images. The same
    seed gives the same resamples: that is what pairs two runs.
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
        "confident_errors": wrong & (confidence > 0.9),
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
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample without errors gives NaN
        values["errors_within_superclass"] = values.pop("within") / (1 - values["accuracy"])

        order = np.argsort(-confidence, kind="stable")
        drawn = counts[:, order].astype(np.float64)
        wrong_drawn = drawn * wrong[order]
        errors, images = np.cumsum(wrong_drawn, 1), np.cumsum(drawn, 1)
        values["aurc"] = (drawn * errors / np.maximum(images, 1)).sum(1) / n
        correct_drawn = drawn - wrong_drawn  # each wrong image: how many correct ones are above it?
        pairs = (wrong_drawn * np.cumsum(correct_drawn, 1)).sum(1)
        values["auroc_failure"] = pairs / (errors[:, -1] * (n - errors[:, -1]))
    return values


def bootstrap(labels, *runs):
    """[{metric: (2000,) values} for each run's image_scores], over the same resamples of the test images."""
    blocks = [[resampled_metrics(scores, labels, counts) for scores in runs] for counts in resample(labels)]
    return [
        {name: np.concatenate([block[k][name] for block in blocks]) for name in blocks[0][k]}
        for k in range(len(runs))
    ]


def interval(values):
    """[low, high]: the middle 95 % of bootstrap values, None if some are undefined."""
    return None if np.isnan(values).any() else np.quantile(values, [0.025, 0.975]).tolist()


def compute_metrics(logits, labels, val_logits, val_labels):
    """(metrics.json but for its sha256, image_scores as trained, image_scores after temperature scaling)."""
    scores = image_scores(logits, labels)
    confidence, correct, wrong = scores["confidence"], scores["correct"], ~scores["correct"]
    precision, recall, f1 = utils.macro_scores(confusion_matrix(labels, scores["pred"], NUM_CLASSES))
    temperature = fit_temperature(val_logits, val_labels)
    scaled = image_scores(logits / temperature, labels)
    metrics = {
        "images": len(labels),
        "accuracy": correct.mean(),
        "macro_precision": precision,
        "macro_recall": recall,
        "macro_f1": f1,
        "top5_accuracy": scores["top5"].mean(),
        "nll": scores["nll"].mean(),
        "brier": scores["brier"].mean(),
        "ece": calibration_error(confidence, correct),
        "ece_null": null_calibration_error(confidence),
        "mean_confidence": confidence.mean(),
        "signed_gap": confidence.mean() - correct.mean(),  # above 0: more confident than right
        "aurc": area_under_risk_coverage(confidence, correct),
        "auroc_failure": failure_auroc(confidence, correct),  # null without errors
        "temperature": temperature,
        "nll_scaled": scaled["nll"].mean(),
        "ece_scaled": calibration_error(scaled["confidence"], correct),
        "ece_scaled_null": null_calibration_error(scaled["confidence"]),
        "superclass_accuracy": scores["superclass"].mean(),
        "errors_within_superclass": scores["within"].sum() / wrong.sum() if wrong.any() else None,
        "confident_errors": (wrong & (confidence > 0.9)).mean(),
    }
    metrics = {
        name: value if value is None or isinstance(value, int) else float(value) for name, value in metrics.items()
    }
    values = bootstrap(labels, scores)[0]
    values.pop("ece")  # neither a mean nor a rate, and resampling inflates it
    metrics["ci95"] = {name: ends for name, value in values.items() if (ends := interval(value))}
    return metrics, scores, scaled


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


def draw_reliability(path, scores, scaled, metrics, title):
    """Accuracy against confidence in 15 bins, as trained and after temperature scaling, above the number of images."""
    figure, axes = utils.new_figure(11, 6.5, 2, 2, sharex=True, height_ratios=[3, 1])
    panels = (
        (scores, "as trained", metrics["ece"], metrics["ece_null"]),
        (scaled, f"logits / {metrics['temperature']:.3f}", metrics["ece_scaled"], metrics["ece_scaled_null"]),
    )
    centers = (np.arange(15) + 0.5) / 15
    for (top, bottom), (seen, label, ece, null) in zip(axes.T, panels):
        bins = calibration_bins(seen["confidence"])
        count = np.bincount(bins, minlength=15)
        filled = count > 0
        accuracy, confidence = (
            np.bincount(bins, seen[what], 15)[filled] / count[filled] for what in ("correct", "confidence")
        )
        top.bar(centers[filled], accuracy, 1 / 15, color=utils.BLUE, edgecolor="white", label="accuracy in the bin")
        top.plot(confidence, confidence, "D", color=utils.VERMILION, markersize=4, label="mean confidence in the bin")
        top.plot([0, 1], [0, 1], "--", color=utils.GRAY, label="perfectly calibrated")
        top.set(title=f"{label}: ECE {100 * ece:.2f} % ({100 * null:.2f} % if calibrated)")
        top.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        top.legend(loc="upper left")
        bottom.bar(centers, count, 1 / 15, color=utils.GRAY, edgecolor="white")
        bottom.set(xlabel="confidence (largest probability)", ylabel="test images")
    figure.suptitle(title)
    utils.save_figure(figure, path)


TABLE = {  # column: (key in metrics.json, factor, decimals)
    "accuracy": ("accuracy", 100, 2), "precision": ("macro_precision", 100, 2), "recall": ("macro_recall", 100, 2),
    "F1": ("macro_f1", 100, 2), "top-5": ("top5_accuracy", 100, 2), "NLL": ("nll", 1, 3), "Brier": ("brier", 1, 3),
    "ECE": ("ece", 100, 2), "gap": ("signed_gap", 100, 2), "AURC": ("aurc", 100, 2), "T": ("temperature", 1, 3),
    "NLL/T": ("nll_scaled", 1, 3), "ECE/T": ("ece_scaled", 100, 2), "sure+wrong": ("confident_errors", 100, 2),
}  # fmt: skip


def print_table(results, configs):
    """Runs as rows, the published one first; in % but for NLL, Brier and T."""
    real = all(config["dataset"] == "cifar100" for config in configs)
    rows = {"published study": PUBLISHED} if real else {}
    for (name, metrics), config in zip(results.items(), configs):
        rows[name if config["dataset"] == "cifar100" else f"{name} (SYNTHETIC)"] = metrics
    width = max(map(len, rows))
    print(f"\n{'':{width}} " + " ".join(f"{column:>9}" for column in TABLE))
    for name, metrics in rows.items():
        cells = [
            f"{factor * metrics[key]:9.{digits}f}" if key in metrics else f"{'-':>9}"
            for key, factor, digits in TABLE.values()
        ]
        print(f"{name:{width}} " + " ".join(cells))
    print(
        "In %, but for NLL (nats), Brier and T. Precision, recall, F1: macro. gap: mean confidence - accuracy. /T: after\n"
        "temperature scaling on validation images. sure+wrong: share of all images that are wrong with confidence\n"
        "above 0.90; smoothing 0.1 teaches 0.901 at most, so there it falls by construction. Intervals: metrics.json."
    )


def evaluate(run_dir, config, args, device):
    """Everything for one run; returns its metrics, and what compare() needs of it."""
    if device:
        compute_logits(run_dir, config, args.data_dir, device)
    logits, labels = utils.load_logits(run_dir, "test")
    metrics, scores, scaled = compute_metrics(logits, labels, *utils.load_logits(run_dir, "val"))
    present = [name for name in ("best.pt", *ARRAYS) if (run_dir / name).exists()]
    metrics["sha256"] = {name: utils.sha256(run_dir / name) for name in present}

    names = class_names(config["dataset"])
    title = f"{run_dir.name}, {len(labels):,} test images of {TITLES[config['dataset']]}"
    confusion = confusion_matrix(labels, scores["pred"], NUM_CLASSES)
    rows = per_class_rows(confusion, names)
    write_array(run_dir / "confusion.npy", confusion)
    draw_confusion(run_dir / "confusion.png", confusion, names, title)
    utils.write_csv(run_dir / "per_class.csv", rows[0], rows)
    draw_per_class(run_dir / "per_class.png", rows, title)
    draw_reliability(run_dir / "reliability.png", scores, scaled, metrics, title)
    utils.write_json(run_dir / "metrics.json", metrics)

    def percent(key):
        return f"{100 * metrics[key]:.2f} % [{', '.join(f'{100 * end:.2f}' for end in metrics['ci95'][key])}]"

    ranked = sorted(rows, key=lambda row: row["accuracy"])
    print(
        f"\n{title}" + ("" if config.get("finished") else "; the run is not finished, this is its best epoch so far")
    )
    print(f"  accuracy {percent('accuracy')}, superclass right {percent('superclass_accuracy')}, in [95 % interval]")
    if metrics["errors_within_superclass"] is not None:
        print(
            f"  errors that stay inside the superclass {percent('errors_within_superclass')}, by chance 4 of 99, 4.04 %"
        )
    for what, some in (("worst", ranked[:5]), ("best", ranked[:-6:-1])):
        print(f"  {what} classes: " + ", ".join(f"{row['class']} {100 * row['accuracy']:.0f} %" for row in some))
    pairs = confused_pairs(confusion, 5)
    print("  most confused: " + ", ".join(f"{names[i]}/{names[j]} {errors}" for i, j, errors in pairs))
    print("  wrote metrics.json, confusion.npy, per_class.csv, confusion.png, per_class.png and reliability.png")
    return metrics, (run_dir, labels, scores, scaled)


def compare(first, second):
    """Print and save what changes from the first run to the second, on the same test images; returns the content.

    Every difference has a 95 % interval from 2,000 resamples of the test images, the same ones for both runs. It covers
    the choice of test images, not the luck of a training run: for that, compare several seeds.
    """
    (first_dir, labels, *first_scores), (second_dir, _, *second_scores) = first, second
    only_first, only_second, p = utils.mcnemar(first_scores[0]["correct"], second_scores[0]["correct"])
    content = {"reference": str(first_dir), "mcnemar_p": p}
    content |= {"only_reference_right": only_first, "only_this_right": only_second}
    print(f"\n{first_dir} -> {second_dir}, difference [95 % interval]; * where the interval leaves out 0")
    print(f"  right in the first only {only_first:,}, in the second only {only_second:,}; exact McNemar p = {p:.2g}")
    unscaled = ["accuracy", "macro_f1"]  # a temperature does not change them
    both = ["signed_gap", "confident_errors", "ece", "nll", "brier", "aurc", "auroc_failure"]
    once = np.ones((1, len(labels)), np.float32)  # every image drawn once: the metric itself
    for suffix, before, after in zip(("", "_scaled"), first_scores, second_scores):
        values = bootstrap(labels, before, after)
        whole = [resampled_metrics(scores, labels, once) for scores in (before, after)]
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
    print(f"  wrote comparison.json to {second_dir}")
    return content


def warn_of_differences(runs):
    """Two runs compare fairly if they differ in the smoothing alone, or in the seed alone."""
    (first, config), *others = runs
    ours = config["args"]
    for other, other_config in others:
        theirs = other_config["args"]
        differ = sorted(key for key in ours.keys() - utils.PLACES if ours[key] != theirs.get(key))
        for key in differ:
            if key not in ("smoothing", "seed") or {"smoothing", "seed"} <= set(differ):
                utils.warn(f"{first} and {other} differ in {key}: {ours[key]} and {theirs.get(key)}")


def main(argv=None):
    """Evaluate the given runs; returns {run directory: metrics}."""
    parser = utils.ArgumentParser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory of train.py")
    parser.add_argument("--refresh", action="store_true", help="compute the logits again although they are there")
    utils.add_common_flags(parser)
    args = parser.parse_args(argv)
    runs = [utils.open_run(run) for run in dict.fromkeys(args.runs)]
    for run_dir, config in runs:
        utils.check_dataset(run_dir, config["dataset"], args.dataset)
    stale = [args.refresh or not logits_are_current(run_dir) for run_dir, _ in runs]
    device = utils.select_device(args.device) if any(stale) or args.device != "auto" else None

    results, scored = {}, []
    for (run_dir, config), compute in zip(runs, stale):
        results[str(run_dir)], scores = evaluate(run_dir, config, args, device if compute else None)
        scored.append(scores)
    print_table(results, [config for _, config in runs])
    for other, (_, config) in zip(scored[1:], runs[1:]):
        if config["dataset"] == runs[0][1]["dataset"] and np.array_equal(other[1], scored[0][1]):
            compare(scored[0], other)
    warn_of_differences(runs)
    first, others = runs[0][0], "".join(f" --compare {utils.quote(run_dir)}" for run_dir, _ in runs[1:2])
    if not others:
        print("to compare: train another run, such as python train.py --smoothing 0.1, and name both here")
    print(f"next: python failures.py {utils.quote(first)}{others}{utils.data_dir_flag(args)}")
    return results


if __name__ == "__main__":
    utils.run_script(main)
