"""Show what a trained network looks at: Grad-CAM maps, and occlusion tests.

    python gradcam.py runs/baseline                    # its confident failures
    python gradcam.py runs/baseline --index 3 141      # images of the test set
    python gradcam.py runs/baseline --image photo.png  # any picture

Writes into the run directory:
    gradcam.png    a row per image (of the failures, the representative ones):
                   maps for the predicted and the true class, their difference
    gradcam.csv    a row per image: sums of the signed maps for the target and
                   for the true class, the largest cell, the border's share
    attention.csv  a row for each failure, and one for a correct prediction
                   that matches it in class and confidence. border_drop,
                   centre_drop: the probability of the predicted class that is
                   lost if that part is hidden. insertion_deletion: how well
                   the map ranks the pixels (RISE); _shuffled, _other: the
                   same for its cells shuffled, and for another image's map
    gradcam-photo.png  with --image photo.png, and nothing else

In a notebook:
    model = load_model("runs/baseline")            # from utils
    predict_image(model, "photo.png")              # [("wolf", 0.93), ...]
    picture(model, images[:3], labels[:3])         # a matplotlib figure

Selvaraju et al., arXiv:1610.02391. With A^k the k-th channel of a layer's
output and y^c the logit of class c,

    alpha_k^c = mean over the cells (i, j) of  d y^c / d A^k_ij
    map^c     = sum over k of  alpha_k^c A^k     and  Grad-CAM = ReLU(map^c)

In a network that ends in mean-pooling and a linear layer, the map of the last
layer is the logit, spread over the cells: its sum plus the bias of class c is
y^c. So the difference of two classes' maps shows where the lead of one over
the other comes from. In CIFAR's ResNet-18 that layer, layer4, has 4x4 cells of
8x8 pixels, and each has seen the whole image: a rough direction, no outline.
--layer layer3 has 8x8 cells and lacks that identity. attention.csv is always
about the predicted class at layer3 (of a transformer: at its tokens).
"""

import difflib
import math
import textwrap
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import utils
from data import CLASS_NAMES, TITLES, class_names, load_dataset, normalize
from model import LAST_MAP, MODELS, make_model
from utils import ScriptError

BATCH = 100  # images
BORDER = 4  # pixels: the outermost ring, 448 of the 1,024 pixels
STEPS = 16  # of deletion and insertion, 64 pixels each
NEAR = 0.02  # in matching, a correct prediction of another class counts as this much further away
FEWEST = 20  # pairs; fewer give no interval
SANITY_LIMIT = 0.5  # our convention: maps more alike than this support no claim
ATTENTION_LAYER = {"resnet18": "layer3", "resnet34": "layer3", "cct": "tokens"}  # of 8x8 cells
FIGURES = ["border_energy", "border_drop", "centre_drop"]
FIGURES += ["insertion_deletion", "insertion_deletion_shuffled", "insertion_deletion_other"]


# ---- Grad-CAM -------------------------------------------------------------------------------------------


def grad_cam(model, images, targets, layer="layer4"):
    """Signed raw Grad-CAM maps (N, h, w) float32, before the ReLU, on the images' device.

    model: a plain network, wholly in training or in eval mode; it is run in eval mode and put back. images:
    (N, 3, H, W) float, normalised. targets: (N,) int64, the class to explain in each image. layer: a module
    of the network, or its name, whose output is (N, K, h, w). Works under no_grad and with frozen parameters,
    and leaves no hook and no gradient behind. One backward pass serves the batch, because in eval mode no
    image's logit depends on another image. Raises ValueError for an argument that cannot be right.
    """
    module = check_arguments(model, images, targets, layer)
    saved = {}

    def record(module, inputs, output):
        utils.require(getattr(output, "ndim", 0) == 4, f"the output of layer {layer} is no map (N, K, h, w)")
        # A starts the graph: the backward pass ends here, whether or not the weights before it are frozen.
        saved["A"] = output.detach().float().requires_grad_()
        return saved["A"].clone()  # goes on through the network, which may change it in place

    training, device = model.training, images.device
    try:
        model.eval()  # in training mode batch norm would mix the images
        with module.register_forward_hook(record), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            images = images.float().contiguous(memory_format=utils.memory_format(device))
            logits = model(images)  # (N, C)
            unknown = ((targets < 0) | (targets >= logits.shape[1])).any()
            utils.require(not unknown, f"targets outside 0..{logits.shape[1] - 1}")
            score = logits.gather(1, targets.to(device)[:, None]).sum()
            (gradient,) = torch.autograd.grad(score, saved["A"])  # (N, K, h, w); no parameter gets a .grad
    finally:
        model.train(training)
    alpha = gradient.mean((2, 3), keepdim=True)  # (N, K, 1, 1)
    return (alpha * saved["A"].detach()).sum(1)  # (N, h, w)


def check_arguments(model, images, targets, layer):
    """The module that layer is or names; ValueError for what grad_cam cannot work with."""
    shaped = isinstance(images, torch.Tensor) and images.ndim == 4 and images.shape[1] == 3
    sound = shaped and images.is_floating_point() and not (images.abs() > 10).any()  # in 0..1: may be low contrast
    utils.require(sound, "images must be normalised floats (N, 3, H, W), as data.normalize makes them")
    fitting = isinstance(targets, torch.Tensor) and targets.dtype == torch.int64 and targets.shape == images.shape[:1]
    utils.require(fitting, "targets must be int64 (N,), a class for each image, such as torch.tensor([3])")
    modules = dict(model.named_modules())
    module = modules.get(layer, layer)
    parts = ", ".join(name for name, _ in model.named_children())
    utils.require(module in modules.values(), f"the network has no layer {layer}; its parts are {parts}")
    return module


def make_maps(model, images, classes, layer):
    """grad_cam in batches: maps (N, h, w), on the CPU, of images (N, 32, 32, 3) uint8 for classes (N,)."""
    device = next(model.parameters()).device
    batches = utils.track(list(zip(images.split(BATCH), classes.split(BATCH))), "maps, batch")
    return torch.cat([grad_cam(model, normalize(x.to(device)), y, layer).cpu() for x, y in batches])


def upsample(maps):
    """Raw maps (N, h, w) to (N, 32, 32), bilinear between the centres of the cells."""
    return F.interpolate(maps[:, None], size=(32, 32), mode="bilinear", align_corners=False)[:, 0]


def border_energy(maps):
    """Share of the positive map (N, h, w) in the outermost 4 of 32 pixels, (N,); NaN if nothing is positive.

    An even map has 448 / 1024 = 0.4375 there. It says "border", which is not the same as "background".
    """
    positive = upsample(maps.clamp(min=0))
    inner = positive[:, BORDER:-BORDER, BORDER:-BORDER].sum((1, 2))
    return 1 - inner / positive.sum((1, 2))  # 0 / 0 is NaN


# ---- sanity checks: do the maps show this class and this network? ---------------------------------------


def spearman(first, second):
    """Spearman's rank correlation (N,) of two tensors (N, ...), image by image; NaN where one is constant."""

    def ranks(x):  # twice the mean rank, around 0: how many cells are smaller, plus how many are not larger
        rank = ((x[:, :, None] > x[:, None]).sum(2) + (x[:, :, None] >= x[:, None]).sum(2)).double()
        return rank - rank.mean(1, keepdim=True)

    a, b = ranks(first.flatten(1)), ranks(second.flatten(1))
    return (a * b).sum(1) / ((a**2).sum(1) * (b**2).sum(1)).sqrt()  # 0 / 0 is NaN


def sanity_checks(model, untrained, images, classes, layer):
    """Mean |Spearman rho| of the maps with maps that must differ, {their name: float}; NaN if undefined.

    random_logit: the map for a random other class; near 1, the map does not depend on the class (Sixt et al.,
    arXiv:1912.09818). random_weights: the map of the untrained network; near 1, the map does not show what
    was learnt (Adebayo et al., arXiv:1810.03292). another_image: the map of the next image, for reference.
    images: (N, 32, 32, 3) uint8. classes: (N,) int64.
    """
    own = make_maps(model, images, classes, layer)
    shift = torch.randint(1, 100, (len(classes),), generator=torch.Generator().manual_seed(0))
    others = {
        "random_logit": make_maps(model, images, (classes + shift) % 100, layer),
        "random_weights": make_maps(untrained, images, classes, layer),
        "another_image": own.roll(1, 0) if len(own) > 1 else torch.zeros_like(own),
    }
    return {name: mean_interval(spearman(own, maps).abs().numpy())[0] for name, maps in others.items()}


def sanity_in_words(sanity):
    """What sanity_checks found, as text."""
    if sanity["random_logit"] <= SANITY_LIMIT and sanity["random_weights"] <= SANITY_LIMIT:  # NaN is not
        text = "The maps change when the class or the weights are randomised (|rho| <= 0.5).\n"
        text += "Necessary, not sufficient."
    else:
        text = "The maps do not change enough when the class or the weights are randomised\n"
        text += "(|rho| > 0.5 or undefined): border share and ranking support no claim."
    sizes = ", ".join(f"{name.replace('_', ' ')} {rho:.2f}" for name, rho in sanity.items())
    return f"{text}\n  mean |rho|: {sizes}"


# ---- attention: what hiding a part costs ----------------------------------------------------------------


def probability(model, images, classes):
    """Probability (N,) float64, on the CPU, of one class (N,) for each of the images (N, 3, H, W)."""
    batches = images.contiguous(memory_format=utils.memory_format(images.device)).split(BATCH)
    return utils.predict(model, batches).cpu().double().softmax(1).gather(1, classes.cpu()[:, None])[:, 0]


def occlusion_drops(model, images, classes, intact):
    """Drops of the probability from intact (N,) with the border, and with the centre, occluded: two (N,).

    Occluded: replaced by the mean colour, 0 in normalised images (N, 3, 32, 32). The border is the outermost 4
    pixels, 448 in all; the centre, the control, a square of 21x21 = 441.
    """
    border = F.pad(torch.zeros(24, 24, device=images.device), [BORDER] * 4, value=1).bool()
    centre = F.pad(torch.ones(21, 21, device=images.device), [5, 6, 5, 6]).bool()
    return [intact - probability(model, images.masked_fill(mask, 0), classes) for mask in (border, centre)]


def blur(images):
    """Gaussian blur with sigma 3 pixels: nothing is left to recognise, and no new edge appears."""
    x = torch.arange(-9.0, 10.0, device=images.device)
    kernel = torch.exp(-(x**2) / (2 * 3**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, 19)
    images = F.conv2d(F.pad(images, (9, 9, 9, 9), mode="reflect"), kernel, groups=3)  # along the rows
    return F.conv2d(images, kernel.transpose(2, 3), groups=3)  # along the columns


def insertion_minus_deletion(model, images, classes, maps, blank, blurred):
    """Area under the insertion curve minus that under the deletion curve, (N,); high for a good map.

    Petsiuk, Das, Saenko, RISE, arXiv:1806.07421. The pixels, ordered by the upsampled signed map (N, h, w),
    are replaced by the mean colour (deletion), or put back into the blurred image (insertion), 64 at a time;
    ties in random order. blank, blurred: the probabilities (N,) where deletion ends and insertion begins.
    """
    values = upsample(maps).flatten(1).cpu()
    ties = torch.randperm(1024, generator=torch.Generator().manual_seed(0))
    order = ties[values[:, ties].argsort(dim=1, descending=True, stable=True)]
    turn = order.argsort(1) * STEPS // 1024  # (N, 1024), the step that takes a pixel
    turn, start = turn.view(-1, 1, 32, 32).to(images.device), blur(images)
    area = (blurred - blank) / 2  # by trapezoids the ends count half; the intact image is an end of both curves
    for step in utils.track(range(1, STEPS), "attention, step"):
        area += probability(model, torch.where(turn < step, images, start), classes)
        area -= probability(model, images.masked_fill(turn < step, 0), classes)
    return area / STEPS


def attention_figures(model, images, classes, layer):
    """FIGURES for images (N, 32, 32, 3) uint8, by the maps for their classes (N,): {name: (N,) float64}.

    The controls of insertion_deletion: the same map with its cells shuffled, which keeps it as smooth
    (scattered pixels would destroy any picture faster), and the map of the image before, which keeps the
    centre bias.
    """
    maps = make_maps(model, images, classes, layer)
    cells = torch.rand(len(maps), maps[0].numel(), generator=torch.Generator().manual_seed(0)).argsort(1)
    shuffled = maps.flatten(1).gather(1, cells).view_as(maps)
    images = normalize(images.to(next(model.parameters()).device))
    intact, *ends = [probability(model, x, classes) for x in (images, torch.zeros_like(images), blur(images))]
    drops = occlusion_drops(model, images, classes, intact)
    kinds = maps, shuffled, maps.roll(1, 0)
    areas = [insertion_minus_deletion(model, images, classes, kind, *ends) for kind in kinds]
    values = border_energy(maps).double(), *drops, *areas
    return {name: value.numpy() for name, value in zip(FIGURES, values)}


def match_on_confidence(confidence, classes, candidates, candidate_classes):
    """Position of a correct prediction like each failure, by confidence and class: (min(N, M),) int64.

    confidence, classes: (N,) of the failures; the others (M,) of the correct predictions. Failure by failure,
    the nearest confidence that is not yet taken; one of another class counts as 0.02 further away.
    """
    left, matches = np.array(candidates, np.float64), []
    for value, label in list(zip(confidence, classes))[: len(candidates)]:
        matches.append(int((np.abs(left - value) + NEAR * (candidate_classes != label)).argmin()))
        left[matches[-1]] = np.inf
    return np.array(matches, np.int64)


def measure_attention(subject, layer, failures, test_set, checkpoint):
    """The rows of attention.csv: all failures, then the correct predictions that match them.

    failures: (n,) indices into the test set (images, labels). checkpoint: the SHA-256 of best.pt.
    """
    (images, labels), names = test_set, subject.names
    logits, _ = utils.load_logits(subject.run_dir, "test")
    preds, confidence = logits.argmax(1), np.exp(utils.log_softmax(logits)).max(1)
    correct = np.flatnonzero(preds == labels.numpy())
    matched = match_on_confidence(confidence[failures], preds[failures], confidence[correct], preds[correct])
    index = np.concatenate([failures, correct[matched]])
    columns = {
        "pair": [*range(len(failures)), *range(len(matched))],
        "group": ["failure"] * len(failures) + ["matched"] * len(matched),
        "index": index,
        "true": [names[label] for label in labels[index]],
        "predicted": [names[label] for label in preds[index]],
        "confidence": confidence[index],
        **attention_figures(subject.model, images[index], torch.from_numpy(preds[index]), layer),
        "checkpoint": [checkpoint] * len(index),
    }
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def saved_attention(path, failures, checkpoint):
    """The rows of attention.csv, or None if they belong to another best.pt or to other failures (n,)."""
    columns = {"pair": int, "group": str, "index": int, "predicted": str, "checkpoint": str}
    columns |= {name: lambda text: float(text or "nan") for name in ["confidence", *FIGURES]}
    try:
        rows = utils.read_csv(path, "python gradcam.py", "attention figures", columns)
    except ScriptError:
        return None  # missing or damaged: measured again
    known = [(row["index"], row["checkpoint"]) for row in rows if row["group"] == "failure"]
    pairs = [row["pair"] for row in rows if row["group"] == "matched"]
    same = known == [(i, checkpoint) for i in failures] and pairs == list(range(len(failures)))[: len(pairs)]
    return rows if same else None


def mean_interval(values):
    """(mean, low, high), NaNs left out: 1.96 standard errors to each side; NaN for fewer than 20 values."""
    values = values[~np.isnan(values)]
    mean = float(values.mean()) if len(values) else math.nan
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values)) if len(values) >= FEWEST else math.nan
    return mean, mean - half, mean + half


def points(rows):
    """{what: (n,) in percentage points} for n rows of attention.csv."""
    value = {name: 100 * np.array([row[name] for row in rows], np.float64) for name in FIGURES}
    centre, border, area = value["centre_drop"], value["border_drop"], value["insertion_deletion"]
    return {
        "map in the border (even: 43.8)": value["border_energy"],
        "lost if the centre is hidden": centre,
        "lost if the border is hidden": border,
        "gap between these two": centre - border,
        "images that lose more at the border": 100.0 * (border > centre),
        "insertion - deletion": area,
        "  minus that of its cells shuffled": area - value["insertion_deletion_shuffled"],
        "  minus that of another image's map": area - value["insertion_deletion_other"],
    }


def attention_table(rows):
    """attention.csv as text: means, and the mean difference within the pairs with its 95 % interval."""
    failed = [row for row in rows if row["group"] == "failure"]
    correct = [row for row in rows if row["group"] == "matched"]  # the k-th is the partner of failure k
    failures, matched, n = points(failed), points(correct), len(correct)
    lines = [f"{'mean, in percentage points':<36} failures  matched  difference [95 %]"]
    for name in failures:
        difference, low, high = mean_interval(failures[name][:n] - matched[name])
        interval = "" if math.isnan(low) else f" [{low:+.1f}, {high:+.1f}]"
        a, b = mean_interval(failures[name])[0], mean_interval(matched[name])[0]
        lines.append(f"{name:<36} {a:8.1f} {b:8.1f} {difference:+7.1f}{interval}")
    alike = sum(a["predicted"] == b["predicted"] for a, b in zip(failed, correct))
    apart = np.mean([abs(a["confidence"] - b["confidence"]) for a, b in zip(failed, correct)] or [np.nan])
    lines.append(f"{n} pairs, {alike} of one predicted class, mean confidence gap {apart:.3f}")
    if n < FEWEST:
        lines.append(f"Fewer than {FEWEST} pairs give no interval.")
    return "\n".join(lines)


# ---- pictures -------------------------------------------------------------------------------------------


def read_image(path):
    """Any picture file as (32, 32, 3) uint8: its central square, on white. And in words what it was."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # above 89 million pixels
            with Image.open(path) as file:
                turned = file.getexif().get(0x0112) in range(2, 9)  # its orientation; loading a TIFF removes it
                image, frames = ImageOps.exif_transpose(file), getattr(file, "n_frames", 1)
        words = f"{image.mode} {image.width}x{image.height}"
        words += ", turned upright by its EXIF tag" if turned else ""
        words += f", first of {frames} frames" if frames > 1 else ""
        if image.mode.startswith(("I", "F")):  # 16-bit gray: convert() would clip it all to white
            image, span = stretch(image)
            words += f", values {span} scaled to 0..255"
        image = ImageOps.fit(image.convert("RGBA"), (32, 32), Image.Resampling.BICUBIC)
        image = Image.alpha_composite(Image.new("RGBA", (32, 32), "white"), image)  # transparency hides colours
        return np.array(image.convert("RGB")), words
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error...
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ScriptError(f"--image {path} is not a readable picture ({reason}); use PNG or JPEG") from None


def stretch(image):
    """A gray picture of any range as one in 0..255, and its range in words."""
    values = np.asarray(image, np.float64)
    utils.require(np.isfinite(values).all(), "a NaN or infinite pixel")
    low, high = values.min(), values.max()
    values = 255 * (values - low) / max(high - low, 1e-12)
    return Image.fromarray(values.round().astype(np.uint8)), f"{low:g}..{high:g}"


def probabilities(model, images):
    """Probabilities (N, 100) float32, on the CPU, for images (N, 32, 32, 3) uint8."""
    device = next(model.parameters()).device
    return utils.predict(model, [normalize(part.to(device)) for part in images.split(BATCH)]).softmax(1).cpu()


def predict_image(model, image, names=CLASS_NAMES):
    """The five likeliest classes of a picture: [(class name, probability)], the likeliest first.

    image: a file, or pixels (32, 32, 3) uint8, an array or a tensor. names: of the 100 classes, by label.
    Raises ScriptError for a file that is no readable picture.
    """
    pixels = image if isinstance(image, (np.ndarray, torch.Tensor)) else read_image(image)[0]
    top = probabilities(model, torch.as_tensor(pixels)[None])[0].topk(5)
    return [(names[label], p) for p, label in zip(top.values.tolist(), top.indices.tolist())]


def explain(model, images, labels=None, target="predicted", layer="layer4", names=CLASS_NAMES):
    """What speaks for a class in each image: (rows of gradcam.csv as dicts, signed maps (N, 2, h, w)).

    images: (N, 32, 32, 3) uint8. labels: (N,) int64, the true classes; None takes the targets. target: the
    class to explain, "predicted", "true" or a label. names: of the classes, by label. The two maps of an
    image are those for its target and for its label.
    """
    probs = probabilities(model, images)
    preds = probs.argmax(1)
    asked = {"predicted": preds, "true": labels}
    targets = asked[target] if target in asked else torch.full_like(preds, target)
    labels = targets if labels is None else labels
    maps = torch.stack([make_maps(model, images, classes, layer) for classes in (targets, labels)], 1)
    columns = {
        "true": [names[label] for label in labels],
        "predicted": [names[label] for label in preds],
        "confidence": probs.amax(1).tolist(),
        "target": [names[label] for label in targets],
        "target_probability": probs.gather(1, targets[:, None])[:, 0].tolist(),
        "true_probability": probs.gather(1, labels[:, None])[:, 0].tolist(),
        "layer": [layer] * len(images),
        "map_sum": maps[:, 0].sum((1, 2)).tolist(),
        "true_map_sum": maps[:, 1].sum((1, 2)).tolist(),
        "map_max": maps[:, 0].amax((1, 2)).tolist(),
        "border_energy": border_energy(maps[:, 0]).tolist(),
    }
    return [dict(zip(columns, values)) for values in zip(*columns.values())], maps


def picture(model, images, labels=None, target="predicted", layer="layer4", names=CLASS_NAMES, captions=None, title=""):
    """A matplotlib figure with a row per image: the image and, laid over it, the map for its target.

    If the label is another class: also the map for that, on the same scale, and the signed difference of the
    two maps. Arguments as for explain(); captions: N texts.
    """
    rows, maps = explain(model, images, labels, target, layer, names)
    n, columns = len(images), 4 if any(row["target"] != row["true"] for row in rows) else 2
    where = layer if isinstance(layer, str) else type(layer).__name__
    title = f"{textwrap.fill(title, 20 * columns)}\nGrad-CAM at {where}, {maps.shape[2]}x{maps.shape[3]} cells".strip()
    heights = [20] * n + [1]  # the last row holds the colour bars
    figure, grid = utils.new_figure(2.2 * columns, 2.55 * n + 1.1, n + 1, columns, title, height_ratios=heights)
    for axis in grid.flat:
        axis.axis("off")

    scales = (0, "viridis"), (0, "viridis"), (-1, "PuOr_r")  # lowest value and colours of the three overlays
    for i, (axes, image, row) in enumerate(zip(grid, images, rows)):
        target, true = row["target"], row["true"]
        cams, lead = upsample(maps[i].clamp(min=0)), upsample(maps[i, :1] - maps[i, 1:])
        overlays = [*(cams / cams.max().clamp(min=1e-12)), *(lead / lead.abs().max().clamp(min=1e-12))]
        asked = "predicted" if target == row["predicted"] else "asked"
        weak = "" if row["map_max"] > 0 else ", no positive evidence"
        texts = [f"{asked}: {target}\n{100 * row['target_probability']:.1f} %{weak}"]
        if target != true:
            texts += [f"true: {true}\n{100 * row['true_probability']:.1f} %", f"{target}\nrather than {true}"]
        caption = captions[i] if captions else f"image {i}"
        axes[0].imshow(image)
        axes[0].set_title(caption if labels is None else f"{caption}\ntrue: {true}", fontsize=9)
        for axis, overlay, (lowest, colours), text in zip(axes[1:], overlays, scales, texts):
            axis.imshow(image.float().mean(-1), cmap="gray", vmin=0, vmax=255)
            axis.imshow(overlay, vmin=lowest, vmax=1, cmap=colours, alpha=0.6, interpolation="bilinear")
            axis.set_title(text, fontsize=9)
    for column, text in ((1, "Grad-CAM (1: row's top)"), (3, "difference (1: largest)"))[: columns // 2]:
        overlay = next(axis.images[1] for axis in grid[:n, column] if axis.images)
        grid[n, column].axis("on")
        figure.colorbar(overlay, cax=grid[n, column], orientation="horizontal", label=text)
    return figure


# ---- the command line -----------------------------------------------------------------------------------


def parse_args(argv):
    parser = utils.ArgumentParser(__file__, __doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="run directory of train.py")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--index", type=int, nargs="+", metavar="I", help="test images, from 0, up to 64")
    which.add_argument("--image", metavar="FILE", help="a picture file instead of test images")
    add("--target", default="predicted", help="class to explain: predicted, true, or its name or number")
    add("--layer", help="a module, such as layer3 or layer4.0 (default: the last that has a map)")
    utils.add_common_flags(parser)
    args = parser.parse_args(argv)
    args.index = list(dict.fromkeys(args.index or []))  # each once
    if len(args.index) > 64 or not set(args.index) <= set(range(10_000)):
        parser.error(f"--index {' '.join(map(str, args.index))} must be up to 64 images in 0..9999")
    if args.image is not None and args.target == "true":
        parser.error("--target true needs a known class; with --image use predicted or a class")
    return args


def class_label(text, names):
    """Label of a class given by name or number; ScriptError with the nearest names if there is none."""
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    near = ", ".join(difflib.get_close_matches(text, names, 3, cutoff=0))
    raise ScriptError(f"--target {text} is no class; use a number in 0..{len(names) - 1} or a name, such as {near}")


def read_failures(run_dir, checkpoint):
    """The rows of failures.csv as dicts, if they come from this best.pt, whose SHA-256 is given."""
    path, made_by = run_dir / "failures.csv", f"python failures.py {utils.quote(run_dir)}"
    columns = {"index": int, "true": str, "representative": int, "checkpoint": str}
    rows = utils.read_csv(path, made_by, "a list of failures", columns)
    if any(row["checkpoint"] != checkpoint for row in rows):
        utils.checkpoint_id(run_dir)  # names evaluate.py if the logits, too, come from another best.pt
        raise ScriptError(f"{path} comes from another best.pt; run {made_by} again")
    index = {row["index"] for row in rows} & set(range(10_000))
    if len(index) < len(rows) or (rows and not any(row["representative"] for row in rows)):
        raise ScriptError(f"{path} is not a list of failures; run {made_by} again")
    return rows


class Subject:
    """What the command line asks about: a run's network, its data set, a target and a layer."""

    def __init__(self, args):
        self.device = utils.select_device(args.device)
        self.run_dir, config = utils.open_run(args.run)
        self.dataset, self.data_dir = utils.dataset_of(self.run_dir, config, args)
        self.data_flag = utils.data_flag(args)
        self.names = class_names(self.dataset)
        self.target = args.target if args.target in ("predicted", "true") else class_label(args.target, self.names)
        self.model, checkpoint = utils.load_best(self.run_dir, self.device)
        self.trained = checkpoint["args"]  # train.py's arguments
        last = LAST_MAP[self.trained["model"]]
        self.layer = args.layer or last
        try:
            grad_cam(self.model, torch.zeros(1, 3, 32, 32, device=self.device), torch.tensor([0]), self.layer)
        except ValueError as error:
            raise ScriptError(f"--layer {self.layer}: {error}; try {last}") from None


def draw(subject, images, labels, captions, what, name):
    """Save the picture() of these images in the run directory."""
    s = subject
    title = f"{MODELS[s.trained['model']]} trained on {TITLES[s.dataset]}, run {s.run_dir.resolve().name}{what}"
    figure = picture(s.model, images, labels, s.target, s.layer, s.names, captions, title)
    utils.save_figure(figure, s.run_dir / name)
    print(f"wrote {s.run_dir / name}")


def explain_file(subject, path):
    """--image: print and return the five likeliest classes, and draw the maps."""
    pixels, words = read_image(path)
    top = predict_image(subject.model, pixels, subject.names)
    words += "; the network sees its central square, on white, in RGB 32x32"
    print(textwrap.fill(f"{path.name}: {words}", 79))
    for name, p in top:
        print(f"  {100 * p:5.1f} %  {name}")
    draw(subject, torch.from_numpy(pixels)[None], None, [path.name.replace("$", r"\$")], "", f"gradcam-{path.stem}.png")
    return top


def explain_test_images(subject, index):
    """Maps for these test images, or for the run's failures if index is empty; returns the rows of gradcam.csv."""
    run_dir, run = subject.run_dir, utils.quote(subject.run_dir)
    checkpoint = utils.sha256(run_dir / "best.pt")
    failures = [] if index else read_failures(run_dir, checkpoint)
    index = index or [row["index"] for row in failures]
    if not index:
        print(f"{run_dir}/failures.csv is empty: no mistake is above the threshold.")
        print("A lower --threshold of failures.py lists some. To explain other images,")
        print(f"next: python gradcam.py {run} --index 0 1 2{subject.data_flag}")
        return []
    images, labels = load_dataset(subject.dataset, subject.data_dir, train=False)
    rows, _ = explain(subject.model, images[index], labels[index], subject.target, subject.layer, subject.names)
    if failures and [row["true"] for row in rows] != [row["true"] for row in failures]:
        again = f"python evaluate.py {run}, then python failures.py {run}"
        raise ScriptError(f"{run_dir}/failures.csv does not fit this data set; run {again}")
    rows = [{"index": i} | row for i, row in zip(index, rows)]
    utils.write_csv(run_dir / "gradcam.csv", rows)
    print(f"wrote {run_dir / 'gradcam.csv'}")
    empty = sum(row["map_max"] <= 0 for row in rows)
    print(f"  {empty} of {len(rows)} maps have no positive evidence for their target")
    shown = [row["index"] for row in failures if row["representative"]] or index
    what = ": confident mistakes on test images" if failures else ": test images"
    draw(subject, images[shown], labels[shown], [f"test image {i}" for i in shown], what, "gradcam.png")
    if failures:
        report_attention(subject, index, (images, labels), checkpoint)
        print(f"next: python evaluate.py {run}")
    return rows


def report_attention(subject, failures, test_set, checkpoint):
    """Measure attention.csv, unless it fits these failures (n,); print what it says and the sanity checks."""
    model, trained = subject.model, subject.trained
    path, layer = subject.run_dir / "attention.csv", ATTENTION_LAYER[trained["model"]]
    rows = saved_attention(path, failures, checkpoint)
    if rows:
        print(f"\nattention at {layer} as measured before (to repeat it, delete attention.csv)")
    else:
        print(f"\nattention at {layer}, measured now (Ctrl-C keeps the above)", flush=True)
        rows = measure_attention(subject, layer, failures, test_set, checkpoint)
        utils.write_csv(path, rows)
        print(f"wrote {path}")
    print(attention_table(rows))

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        untrained = make_model(trained["model"], width=trained["width"]).to(subject.device).eval()
    images = test_set[0][failures[:: math.ceil(len(failures) / BATCH)]]  # at most 100, evenly spread
    sanity = sanity_checks(model, untrained, images, probabilities(model, images).argmax(1), layer)
    print(sanity_in_words(sanity))
    print("Border is not background, and occluded images are unlike the training images.")


def main(argv=None):
    """Returns the rows of gradcam.csv as dicts; with --image, the five likeliest [(class, probability)]."""
    args = parse_args(argv)
    subject = Subject(args)
    if args.image is not None:
        return explain_file(subject, Path(args.image).expanduser())
    return explain_test_images(subject, args.index)


if __name__ == "__main__":
    utils.run_script(main)
