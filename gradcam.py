"""Show which parts of an image speak for a class, according to a trained run: Grad-CAM.

    python gradcam.py runs/baseline                          # the failures that failures.py has just found
    python gradcam.py runs/baseline --index 3 141 59         # images of the test set
    python gradcam.py runs/baseline --image photo.png        # any picture

Writes gradcam.png (image, map for the predicted class, map for the true class, their difference) and
gradcam.csv (a row per image) into the run directory. From failures.csv, the csv has all failures and the
picture the representative ones. For all failures, and for correct predictions of the same confidence, it then
measures what the network attends to: attention.csv, attention.json, and new columns in failures.csv.

gradcam.csv is about --layer: map_sum and true_map_sum are the sums of the signed maps of the target and of
the true class, map_max is the largest cell, border_energy as below. The attention figures are always about
the predicted class at layer3.

Selvaraju et al., arXiv:1610.02391. With A^k the k-th channel of a layer's output and y^c the logit of class
c,

    alpha_k^c = mean over the cells (i, j) of  d y^c / d A^k_ij
    map^c     = sum over k of  alpha_k^c A^k            and  Grad-CAM = ReLU(map^c)

In a network that ends in mean-pooling and a linear layer, the map of the last layer is the logit itself,
spread over the cells: its sum plus the bias of class c equals y^c. So the difference of two classes' maps
shows exactly where the lead of one over the other comes from. In CIFAR's ResNet-18, layer4 has 4x4 cells of
8x8 pixels, and each has seen the whole image: read it as a rough direction, never as an outline. --layer
layer3 has 8x8 cells, and without that identity.
"""

import copy
import csv
import difflib
import io
import json
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import gaussian_blur

import utils
from data import TITLES, class_names, load_dataset, normalize
from model import resnet18
from utils import ScriptError

BORDER = 4  # pixels: the outermost ring, 448 of the 1,024 pixels
STEPS = 16  # of deletion and insertion, 64 pixels each
FIGURES_LAYER = "layer3"  # 8x8 cells, for the attention figures; the 4x4 of layer4 are too coarse
NEAR = 0.02  # in matching, a correct prediction of another class counts as this much further away
SANITY_LIMIT = 0.5  # our convention: maps more like those of a random class or network are not trusted


def grad_cam(model, images, targets, layer="layer4"):
    """Signed raw Grad-CAM maps (N, h, w) float32, before the ReLU, on the images' device.

    model: a plain network, wholly in training or in eval mode; it is run in eval mode and put back. images:
    (N, 3, H, W), normalised. targets: (N,) int64, the class to explain in each image. layer: name of a module
    whose output is (N, K, h, w). Works under no_grad and with frozen parameters, and leaves no hook and no
    gradient behind. One backward pass serves the batch, because in eval mode no image's logit depends on
    another image. Raises ValueError for an unusable layer.
    """
    saved = {}

    def forward_hook(module, inputs, output):
        if not isinstance(output, torch.Tensor) or output.ndim != 4:
            raise ValueError(f"layer {layer} has no spatial map")
        # A becomes the start of the graph: the backward pass ends here, frozen weights before it or not.
        saved["A"] = activations = output.detach().float().requires_grad_()
        activations.register_hook(backward_hook)
        return activations.clone()  # goes on through the network; an operation in place there leaves A alone

    def backward_hook(gradient):
        saved["dy/dA"] = gradient

    module = dict(model.named_modules()).get(layer)
    if module is None:
        raise ValueError(f"the network has no layer {layer}")
    training = model.training
    handle = module.register_forward_hook(forward_hook)
    try:
        model.eval()  # in training mode batch norm would mix the images
        with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
            logits = model(images.float())  # (N, C)
            score = logits.gather(1, targets[:, None]).sum()
            torch.autograd.grad(score, saved["A"])  # unlike score.backward(), leaves the parameters' .grad alone
    finally:
        handle.remove()
        model.train(training)
    alpha = saved["dy/dA"].mean((2, 3), keepdim=True)  # (N, K, 1, 1)
    return (alpha * saved["A"].detach()).sum(1)  # (N, h, w)


def upsample(maps, size=32):
    """Raw maps (N, h, w) to (N, size, size), bilinear between the centres of the cells."""
    return F.interpolate(maps[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0]


def border_energy(maps):
    """Share of the positive map (N, h, w) in the outermost 4 of 32 pixels, (N,); NaN if nothing is positive.

    An even map has 448 / 1024 = 0.4375 there. It says "border", which is not the same as "background".
    """
    positive = upsample(maps.clamp(min=0))
    inner = positive[:, BORDER:-BORDER, BORDER:-BORDER].sum((1, 2))
    return 1 - inner / positive.sum((1, 2))  # 0 / 0 is NaN


# ---- attention figures: for numbers, not for pictures --------------------------------------------------------


@torch.no_grad()
def probability(model, images, classes):
    """Probability (N,) float64, on the CPU, of one class (N,) for each of the images (N, 3, H, W)."""
    logits = model(images.contiguous(memory_format=torch.channels_last)).cpu().double()
    return logits.softmax(1).gather(1, classes.cpu()[:, None])[:, 0]


def occlusion_drops(model, images, classes, intact):
    """How much the probability falls from intact (N,) without the border, and without the centre: two (N,).

    Without: replaced by the mean colour, 0 in normalised images (N, 3, 32, 32). The border is the outermost 4
    pixels, 448 in all; the centre, the control, a square of 21x21 = 441.
    """
    border = torch.ones(32, 32, dtype=torch.bool, device=images.device)
    border[BORDER:-BORDER, BORDER:-BORDER] = False
    centre = torch.zeros_like(border)
    centre[5:26, 5:26] = True
    return [intact - probability(model, images.masked_fill(mask, 0), classes) for mask in (border, centre)]


def blur(images):
    """Gaussian blur with sigma 3 pixels: nothing is left to recognise, and no new edge appears."""
    return gaussian_blur(images, kernel_size=19, sigma=3.0)


def insertion_minus_deletion(model, images, classes, maps, intact, blank, blurred):
    """Area under the insertion curve minus that under the deletion curve, (N,); high for a good map.

    Petsiuk, Das, Saenko, RISE, arXiv:1806.07421. The pixels, ordered by the upsampled signed map (N, h, w),
    are replaced by the mean colour (deletion), or put back into the blurred image (insertion), 64 at a
    time; ties in random order. intact, blank, blurred: the probabilities (N,) of the images at the ends of
    the curves.
    """
    values = upsample(maps).flatten(1)
    ties = torch.randperm(values.shape[1], generator=torch.Generator().manual_seed(0)).to(values.device)
    order = ties[values[:, ties].argsort(dim=1, descending=True, stable=True)]
    turn = (order.argsort(1) * STEPS // 1024).view(-1, 1, 32, 32)  # the step at which a pixel's turn comes
    start = blur(images)
    deletion, insertion = (intact + blank) / 2, (blurred + intact) / 2  # trapezoids: the ends count half
    for step in range(1, STEPS):
        deletion = deletion + probability(model, images.masked_fill(turn < step, 0), classes)
        insertion = insertion + probability(model, torch.where(turn < step, images, start), classes)
    return (insertion - deletion) / STEPS


def raw_maps(model, images, classes):
    """Signed layer3 maps (N, 8, 8) of images (N, 32, 32, 3) uint8, on the model's device, 100 at a time."""
    device, parts = next(model.parameters()).device, zip(images.split(100), classes.split(100))
    return torch.cat([grad_cam(model, normalize(x.to(device)), y.to(device), FIGURES_LAYER) for x, y in parts])


def attention_figures(model, images, classes):
    """The figures of utils.ATTENTION for images (N, 32, 32, 3) uint8 and classes (N,): {name: (N,) float64}.

    The map is that of the class at layer3. Its controls in insertion_deletion: the same map with its cells
    shuffled, which keeps it as smooth (scattered pixels would destroy any picture faster), and the map of
    another image, which keeps the habit of looking at the centre.
    """
    device, rng = next(model.parameters()).device, torch.Generator().manual_seed(0)
    maps = raw_maps(model, images, classes)
    cells = torch.rand(len(maps), maps[0].numel(), generator=rng).argsort(1).to(device)
    shuffled = maps.flatten(1).gather(1, cells).view_as(maps)
    circle = torch.randperm(len(maps), generator=rng).to(device)
    others = torch.empty_like(maps)
    others[circle] = maps[circle.roll(1)]  # the map of the neighbour in a random circle: never one's own
    found = {name: [] for name in utils.ATTENTION}
    for part in utils.track([slice(i, i + 100) for i in range(0, len(images), 100)], "attention, batch"):
        batch, target = normalize(images[part].to(device)), classes[part].to(device)
        ends = [probability(model, x, target) for x in (batch, torch.zeros_like(batch), blur(batch))]
        border, centre = occlusion_drops(model, batch, target, ends[0])
        areas = [
            insertion_minus_deletion(model, batch, target, kind[part], *ends) for kind in (maps, shuffled, others)
        ]
        values = (border_energy(maps[part]).cpu().double(), border, centre, border - centre, *areas)
        for name, value in zip(utils.ATTENTION, values):
            found[name].append(value)
    if len(maps) == 1:
        found["insertion_deletion_other"] = [torch.tensor([torch.nan])]
    return {name: torch.cat(values).numpy() for name, values in found.items()}


def match_on_confidence(confidence, classes, candidates, candidate_classes):
    """Position of a correct prediction like each failure, by confidence and predicted class: (min(N, M),) int64.

    confidence, classes: (N,) of the failures; the others (M,) of the correct predictions. Failure by failure,
    the nearest confidence that is not yet taken; one of another class counts as 0.02 further away.
    """
    left, matches = np.array(candidates, np.float64), []
    for value, label in list(zip(confidence, classes))[: len(candidates)]:
        matches.append(int((np.abs(left - value) + NEAR * (candidate_classes != label)).argmin()))
        left[matches[-1]] = np.inf
    return np.array(matches, np.int64)


def spearman(first, second):
    """Spearman's rank correlation (N,) of the rows of two (N, cells) arrays; NaN where a row is constant."""

    def ranks(row):
        _, place, count = np.unique(row, return_inverse=True, return_counts=True)
        rank = (np.cumsum(count) - (count - 1) / 2)[place]  # the mean rank where tied
        return rank - rank.mean()

    a, b = (np.array([ranks(row) for row in rows]) for rows in (first, second))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))


def sanity_checks(model, images, classes):
    """Are the signed maps those of this class and of this network? {what: {"rho", "abs_rho"}}, means over images.

    images: (N, 32, 32, 3) uint8. classes: (N,) int64. rho: Spearman correlation of a map with a map that must
    differ; abs_rho: its absolute value, as correlations of either sign cancel in a mean. None if undefined.
    other_image: with the map of the next image, which tells how alike maps are by habit. random_logit: with
    that of a random other class; near 1, the map does not depend on the class (Sixt et al.,
    arXiv:1912.09818). fc ... stem: after drawing new weights for that stage and all before it in this list; a
    map that survives does not show what was learnt (Adebayo et al., arXiv:1810.03292).
    """

    def maps_of(network, targets):
        return raw_maps(network, images, targets).flatten(1).cpu().numpy()

    own = maps_of(model, classes)
    shift = torch.randint(1, 100, (len(classes),), generator=torch.Generator().manual_seed(0))
    found = {
        "other_image": spearman(own, np.roll(own, 1, 0) if len(own) > 1 else own * np.nan),
        "random_logit": spearman(own, maps_of(model, (classes + shift) % 100)),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = resnet18(width=model.conv1.out_channels)
    changed = copy.deepcopy(model)
    for stage in ("fc", "layer4", "layer3", "layer2", "layer1", "stem"):
        for name in ("conv1", "bn1") if stage == "stem" else (stage,):
            getattr(changed, name).load_state_dict(getattr(fresh, name).state_dict())
        found[stage] = spearman(own, maps_of(changed, classes))

    def mean(values):
        return None if np.isnan(values).all() else float(np.nanmean(values))

    return {name: {"rho": mean(values), "abs_rho": mean(abs(values))} for name, values in found.items()}


def is_sane(sanity):
    """Whether the maps differ enough from those of random classes and of a wholly random network."""
    similar = [sanity[name]["abs_rho"] for name in ("random_logit", "stem")]
    return None not in similar and max(similar) <= SANITY_LIMIT


def summarise(figures, n):
    """Means with 95 % intervals for attention.json: figures (n failures, then their matches) by group.

    Differences to the matches are those of the pairs, and differences between maps those of the same image.
    """
    values = dict(figures)
    for control in ("shuffled", "other"):
        values[f"minus_{control}"] = values["insertion_deletion"] - values.pop(f"insertion_deletion_{control}")
    pairs = len(values["border_drop"]) - n
    groups = {
        "failures": {name: value[:n] for name, value in values.items()},
        "matched": {name: value[n:] for name, value in values.items()},
        "failures_minus_matched": {name: value[:pairs] - value[n:] for name, value in values.items()},
    }
    keys = ("mean", "low", "high")
    return {
        group: {name: dict(zip(keys, utils.mean_interval(value))) for name, value in some.items()}
        for group, some in groups.items()
    }


def attention_table(report):
    """attention.json as lines for people."""

    def cell(figure):
        known = [f"{figure[key]:.3f}" for key in ("mean", "low", "high") if figure[key] is not None]
        return "-" if not known else known[0] if len(known) == 1 else f"{known[0]} [{known[1]}, {known[2]}]"

    words = {
        "border_energy": "border energy (even: 0.438)",
        "border_drop": "lost without the border",
        "centre_drop": "lost without the centre",
        "border_reliance": "border reliance: their difference",
        "insertion_deletion": "insertion - deletion",
        "minus_shuffled": "... minus that of shuffled maps",
        "minus_other": "... minus that of others' maps",
    }
    heads = {"failures": "failures", "matched": "correct, as confident", "failures_minus_matched": "difference"}
    lines = [f"{'mean [95 % interval]':<38}" + "".join(f"{head:<26}" for head in heads.values())]
    for name, word in words.items():
        lines.append(f"  {word:<36}" + "".join(f"{cell(report[group][name]):<26}" for group in heads))
    if report["pairs"]:
        lines.append(
            f"  {report['pairs']} pairs, {report['pairs_of_one_class']} of one predicted class; confidences differ by "
            f"{report['mean_gap']:.4f} on average, {report['largest_gap']:.4f} at most"
        )
    sanity = report["sanity"].items()
    checks = [f"{name} {x['rho']:.2f} ({x['abs_rho']:.2f})" for name, x in sanity if x["rho"] is not None]
    lines.append(f"  sanity, mean Spearman rho (mean |rho|) with the map of: {', '.join(checks)}")
    if report["sane"]:
        lines += [
            f"  Not above {SANITY_LIMIT} for a random class or a random network: the least that a map must do, and no proof. What",
            "  is above other_image, two maps that are alike by habit, they share with maps that explain nothing.",
        ]
    else:
        lines += [
            f"  These maps fail: above {SANITY_LIMIT} for a random class or a random network. What is computed from them,",
            "  border energy and insertion - deletion, supports no claim. Border reliance does not use them.",
        ]
    return "\n".join(
        [
            *lines,
            "  Border is not background, and a sea or a plain has none. Hidden parts are unlike any training image, so",
            "  compare only the columns, and a map with its controls.",
        ]
    )


def table_of_before(run_dir, failures):
    """attention_table of attention.json if that is whole, of this best.pt and of these rows of failures.csv; or None."""
    try:
        report = json.loads((run_dir / "attention.json").read_text())
        rows = csv.DictReader(io.StringIO((run_dir / "attention.csv").read_text()))
        index = [int(row["index"]) for row in rows if row["group"] == "failure"]
        same = report["sha256"]["best.pt"] == utils.sha256(run_dir / "best.pt")
        same = same and index == [row["index"] for row in failures] and utils.ATTENTION[-1] in failures[0]
        return attention_table(report) if same else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error):
        return None


def measure_attention(model, run_dir, failures, images, classes, test_set, logits, names):
    """Measure and write attention.csv and attention.json, whose content it returns; add the figures to failures.csv.

    failures: the rows of failures.csv, with images (n, 32, 32, 3) and predicted classes (n,). Each is paired
    with a correct prediction of the test set (images, labels), by logits (N, 100).
    """
    test_images, labels = test_set
    confidence = np.exp(utils.log_softmax(logits)).max(1)
    correct = np.flatnonzero(logits.argmax(1) == labels.numpy())
    sure = np.array([row["confidence"] for row in failures])
    matched = correct[match_on_confidence(sure, classes.numpy(), confidence[correct], labels.numpy()[correct])]
    n, pairs, index = len(failures), len(matched), [row["index"] for row in failures]
    figures = attention_figures(
        model, torch.cat([images, test_images[matched]]), torch.cat([classes, labels[matched]])
    )
    some = torch.linspace(0, n - 1, min(n, 200)).long()
    sanity = sanity_checks(model, images[some], classes[some])
    columns = {  # of attention.csv
        "group": ["failure"] * n + ["matched"] * pairs,
        "index": index + matched.tolist(),
        "matched_to": [""] * n + index[:pairs],
        "true": [row["true"] for row in failures] + [names[labels[i]] for i in matched],
        "predicted": [row["predicted"] for row in failures] + [names[labels[i]] for i in matched],
        "confidence": sure.tolist() + confidence[matched].tolist(),
    }
    columns |= {name: ["" if np.isnan(x) else x for x in values.tolist()] for name, values in figures.items()}
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    utils.write_csv(run_dir / "attention.csv", columns, rows)
    failures = [row | {name: own[name] for name in utils.ATTENTION} for row, own in zip(failures, rows)]
    utils.write_csv(run_dir / "failures.csv", failures[0], failures)
    gaps = np.abs(sure[:pairs] - confidence[matched])
    report = {
        "layer": FIGURES_LAYER,
        "images": n,
        "lowest_confidence": float(sure.min()),
        "without_positive_evidence": int(np.isnan(figures["border_energy"][:n]).sum()),
        "pairs": pairs,
        "pairs_of_one_class": int((classes[:pairs] == labels[matched]).sum()),
        "mean_gap": float(gaps.mean()) if pairs else None,  # between the confidences of a pair
        "largest_gap": float(gaps.max()) if pairs else None,
        "sanity": sanity,
        "sane": is_sane(sanity),
        "sha256": {"best.pt": utils.sha256(run_dir / "best.pt")},
    }
    report |= summarise(figures, n)
    utils.write_json(run_dir / "attention.json", report)
    return report


# ---- pictures ------------------------------------------------------------------------------------------------


def read_image(path):
    """Any picture file as (32, 32, 3) uint8, and a list of words on what was done to it."""
    from PIL import Image, ImageOps

    done = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.verify()  # the CRC sums of a PNG, which load() skips
            image = Image.open(path)
            if getattr(image, "n_frames", 1) > 1:
                done.append(f"first of {image.n_frames} frames")
            image.load()
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error...
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ScriptError(f"--image {path} is not a readable picture ({reason}); use PNG or JPEG") from None
    upright = ImageOps.exif_transpose(image)
    if upright.size != image.size or upright.tobytes() != image.tobytes():
        done.append("turned upright by its EXIF tag")
    image = upright
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit gray: convert("RGB") would clip it all to white
        values = np.asarray(image, np.float64)
        low, high = values.min(), values.max()
        image = Image.fromarray(((values - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8))
        done.append(f"gray values {low:g}..{high:g} scaled to 0..255")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")  # transparent pixels keep hidden colours
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        done.append("transparency put on white")
    if image.mode != "RGB":
        done.append(f"converted from {image.mode} to RGB")
        image = image.convert("RGB")
    if image.size != (32, 32):
        width, height = image.size
        done.append(
            f"{'cut to its central square and ' if width != height else ''}resized from {width}x{height} to 32x32"
        )
        image = ImageOps.fit(image, (32, 32), Image.Resampling.BICUBIC)
    return np.array(image), done


def class_label(text, names):
    """Label of a class given by name or number; ScriptError with the nearest names if there is none."""
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    near = difflib.get_close_matches(text, names, 3, cutoff=0) if not text.lstrip("-").isdecimal() else []
    raise ScriptError(
        f"--target {text} is no class; use a number in 0..{len(names) - 1} or a name"
        + f", such as {', '.join(near)}" * bool(near)
    )


def read_failures(run_dir):
    """The rows of failures.csv, as dicts of strings but for index (int) and confidence (float)."""
    path, made_by = run_dir / "failures.csv", f"python failures.py {utils.quote(run_dir)}"
    try:
        reader = csv.DictReader(io.StringIO(path.read_text()))
        rows = [row | {"index": int(row["index"]), "confidence": float(row["confidence"])} for row in reader]
        indices = [row["index"] for row in rows]
        sound = {"index", "confidence", "true", "predicted", "representative"} <= set(reader.fieldnames or ())
        sound = sound and len(set(indices)) == len(indices) and all(0 <= i < 10_000 for i in indices)
        sound = sound and (not rows or any(row["representative"] == "1" for row in rows))
        sound = sound and all(None not in row and None not in row.values() for row in rows)  # as many cells as heads
    except FileNotFoundError:
        raise ScriptError(f"no {path}; run {made_by} first, or give --index or --image") from None
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        sound = False
    if not sound:
        raise ScriptError(f"{path} is not a list of failures; run {made_by} again")
    return rows


def draw(path, rows, images, panels, layer, title):
    """One row of pictures per image: itself, its maps on one scale, and the difference of two maps.

    panels: for each image a list of (class name, probability, raw map (h, w)). Where there are two, the
    target's and the true class's, their signed difference is the margin map.
    """
    columns = 1 + max(2 * len(maps) - 1 for maps in panels)  # 2 or 4
    figure, grid = utils.new_figure(2.8 * columns + 1.6, 2.75 * len(rows) + 0.9, len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    margin_picture = None
    for axes, row, image, maps in zip(grid, rows, images, panels):
        axes[0].imshow(image, interpolation="nearest")
        truth = f"image {row['index']}\ntrue: {row['true']}" if row["true"] else "your picture"
        axes[0].set_title(f"{truth}\nsays: {row['predicted']} {100 * row['confidence']:.1f} %", fontsize=9)
        raws = torch.stack([raw for _, _, raw in maps])
        cams = upsample(raws.clamp(min=0))
        cams = cams / cams.max().clamp(min=1e-12)
        for axis, (name, probability, raw), cam in zip(axes[1:], maps, cams):
            picture = axis.imshow(cam.numpy(), cmap="viridis", vmin=0, vmax=1)
            nothing = "" if (raw > 0).any() else "\nno positive evidence"
            axis.set_title(f"for {name} ({100 * probability:.1f} %){nothing}", fontsize=9)
        if len(maps) == 2:
            margin = upsample((raws[0] - raws[1])[None])[0]
            margin_picture = axes[3].imshow(
                margin / margin.abs().max().clamp(min=1e-12), cmap="PuOr_r", vmin=-1, vmax=1
            )
            axes[3].set_title(f"{maps[0][0]}\nrather than {maps[1][0]}", fontsize=9)
    shrink = min(1, 2 / len(rows))
    figure.colorbar(picture, ax=grid, label="Grad-CAM / highest value in the row", shrink=shrink)
    if margin_picture:
        figure.colorbar(margin_picture, ax=grid, label="difference of the maps / largest in the row", shrink=shrink)
    height, width = panels[0][0][2].shape
    figure.suptitle(f"{title}\nGrad-CAM at {layer}, {height}x{width} cells", fontsize=11)
    utils.save_figure(figure, path)


def parse_args(argv):
    parser = utils.ArgumentParser(__doc__)
    parser.add_argument("run", metavar="RUN", help="run directory of train.py")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--index", type=int, nargs="+", metavar="I", help="test images, from 0, instead of failures.csv"
    )
    which.add_argument("--image", metavar="FILE", help="a picture file instead of test images")
    parser.add_argument(
        "--target", default="predicted", help="class to explain: predicted, true, or its name or number"
    )
    parser.add_argument(
        "--layer", default="layer4", help="layer1 ... layer4, or any module in them, such as layer4.0"
    )
    utils.add_common_flags(parser)
    args = parser.parse_args(argv)
    if args.index is not None:
        args.index = list(dict.fromkeys(args.index))
        if not all(0 <= i < 10_000 for i in args.index):
            parser.error(f"--index {' '.join(map(str, args.index))} must be in 0..9999")
        if len(args.index) > 64:
            parser.error(f"--index has {len(args.index)} images; 64 fit into one picture")
    if args.image is not None and args.target == "true":
        parser.error("--target true needs a known class; with --image use predicted or a class")
    return args


def load_model(run_dir, checkpoint, device, layer):
    """The run's best network on the device, in eval mode, after a trial of the layer."""
    model = resnet18(width=checkpoint["args"]["width"])
    utils.load_weights(model, checkpoint["model"], run_dir / "best.pt")
    model.to(device).eval()
    try:
        grad_cam(
            model, torch.zeros(1, 3, 32, 32, device=device), torch.zeros(1, dtype=torch.int64, device=device), layer
        )
    except ValueError as error:
        raise ScriptError(f"--layer {layer}: {error}; use layer1 ... layer4 or a module in them") from None
    return model


def main(argv=None):
    """Returns the rows of gradcam.csv as a list of dicts."""
    args = parse_args(argv)
    device = utils.select_device(args.device)
    run_dir, _ = utils.open_run(args.run)
    checkpoint = utils.load_checkpoint(run_dir / "best.pt")
    dataset = checkpoint["args"]["dataset"]
    utils.check_dataset(run_dir, dataset, args.dataset)
    names = class_names(dataset)
    asked = None if args.target in ("predicted", "true") else class_label(args.target, names)
    model = load_model(run_dir, checkpoint, device, args.layer)
    failures = None
    if args.image is not None:
        pixels, done = read_image(Path(args.image).expanduser())
        print(f"{args.image}: {', '.join(done) or 'used as it is'}")
        index, images, labels = [""], torch.from_numpy(pixels)[None], None
    else:
        if args.index is None:
            failures = read_failures(run_dir)
            if not failures:
                for stale in ("gradcam.png", "gradcam.csv", "attention.csv", "attention.json"):
                    (run_dir / stale).unlink(missing_ok=True)
                print(f"{run_dir}/failures.csv is empty: no failures to explain; --index or --image show others")
                return []
        index = args.index or [row["index"] for row in failures]
        test_logits = utils.load_logits(run_dir, "test")[0] if failures else None
        test_set = load_dataset(dataset, args.data_dir, train=False)
        images, labels = (part[index] for part in test_set)

    inputs = [normalize(batch.to(device)) for batch in images.split(100)]
    probs = utils.predict(model, inputs).softmax(1).cpu()
    confidence, preds = probs.max(1)
    for n, row in enumerate(failures or ()):
        same = (row["true"], row["predicted"]) == (names[labels[n]], names[preds[n]])
        if not same or abs(row["confidence"] - confidence[n].item()) > 0.01:
            again = f"run python evaluate.py {utils.quote(run_dir)}, then python failures.py {utils.quote(run_dir)}"
            raise ScriptError(f"{run_dir}/failures.csv is not of this best.pt and this data set; {again}")

    def maps_of(classes):
        """Raw maps (N, h, w) on the CPU of all images, for classes (N,)."""
        batches = utils.track(list(zip(inputs, classes.split(100))), "Grad-CAM, batch")
        return torch.cat([grad_cam(model, batch, part.to(device), args.layer).cpu() for batch, part in batches])

    targets = {"predicted": preds, "true": labels}.get(args.target, torch.full_like(preds, asked or 0))
    maps = maps_of(targets)
    if not maps.isfinite().all():
        raise ScriptError("the maps have NaN or infinite values; is the checkpoint sound?", code=1)
    true_maps = maps_of(labels) if labels is not None else None
    border = border_energy(maps)
    rows = [
        {
            "index": index[n],
            "true": names[labels[n]] if labels is not None else "",
            "predicted": names[preds[n]],
            "confidence": confidence[n].item(),
            "target": names[targets[n]],
            "target_probability": probs[n, targets[n]].item(),
            "layer": args.layer,
            "map_sum": maps[n].sum().item(),
            "true_map_sum": true_maps[n].sum().item() if labels is not None else "",
            "map_max": maps[n].max().item(),
            "border_energy": "" if border[n].isnan() else border[n].item(),
        }
        for n in range(len(images))
    ]
    utils.write_csv(run_dir / "gradcam.csv", rows[0], rows)

    shown = [n for n in range(len(rows)) if failures is None or failures[n]["representative"] == "1"]
    panels = []
    for n in shown:
        panels.append([(rows[n]["target"], rows[n]["target_probability"], maps[n])])
        if labels is not None and labels[n] != targets[n]:
            panels[-1].append((names[labels[n]], probs[n, labels[n]].item(), true_maps[n]))
    title = f"{run_dir.name} on {TITLES[dataset] + ' test images' if args.image is None else Path(args.image).name}"
    pictures = [images[n].numpy() for n in shown]
    draw(run_dir / "gradcam.png", [rows[n] for n in shown], pictures, panels, args.layer, title)
    empty = int((maps <= 0).flatten(1).all(1).sum())
    print(f"{len(rows)} images of {TITLES[dataset]}" if args.image is None else args.image, end="")
    print(
        f", {maps.shape[1]}x{maps.shape[2]} cells at {args.layer}, {empty} without positive evidence for their target"
    )
    print(
        f"mean border energy of these maps {border.nanmean():.3f}: their share in the outermost 4 pixels, 0.438 if even; "
        "border is not background,\nand cells as large as layer4's are coarse: --layer layer3 is finer"
    )
    print(f"wrote gradcam.png ({len(shown)} images) and gradcam.csv ({len(rows)}) to {run_dir}")
    if failures:
        table = table_of_before(run_dir, failures)
        what = f"attention to the border, and what the maps are worth, for all {len(failures)} failures"
        if table:
            print(f"\n{what}, as measured before; to do it again, delete {run_dir}/attention.json\n{table}")
        else:
            print(f"\n{what}; Ctrl-C keeps the above", flush=True)
            report = measure_attention(model, run_dir, failures, images, preds, test_set, test_logits, names)
            print(attention_table(report))
            print(f"wrote attention.csv and attention.json to {run_dir}, and added these figures to failures.csv")
    return rows


if __name__ == "__main__":
    utils.run_script(main)
