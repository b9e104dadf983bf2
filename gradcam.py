"""Show what a network looks at: Grad-CAM, by a forward and a backward hook.

    python gradcam.py                        # failures of the run trained last
    python gradcam.py runs/baseline --compare runs/smoothing0.1
    python gradcam.py runs/baseline --index 3 141      # images of the test set
    python gradcam.py runs/baseline --image photo.png  # any picture

Selvaraju et al., arXiv:1610.02391. With A^k the k-th channel of a layer's
output and y^c the logit of class c,

    alpha_k^c = mean over the cells (i, j) of  d y^c / d A^k_ij
    map^c     = sum over k of  alpha_k^c A^k     and  Grad-CAM = ReLU(map^c)

The forward hook keeps A, the backward hook the gradient. Where a network ends
in mean-pooling and a linear layer, the last map is the logit, spread over the
cells: its sum plus the bias of class c is y^c. So the difference of two
classes' maps shows where the lead of one comes from. In CIFAR's ResNet-18 that
layer, layer4, has 4x4 cells of 8x8 pixels, and each has seen the whole image:
a rough direction, no outline. --layer layer3 has 8x8 cells and lacks that
identity.

Writes into the run directory:
    gradcam.png    a row per representative failure: maps for the predicted and
                   the true class, their difference, another run's map
    gradcam.csv    a row per failure: sums of the signed maps, the largest cell
    attention.csv  a row per failure, and one for a correct prediction like
                   it in confidence and, if near, class: the probability of the
                   predicted class that is lost if the outermost 4 pixels are
                   hidden (border_drop), or the inner 21x21 (centre_drop)
Other pictures get other names: gradcam-index.png, gradcam-photo-2f1a0c7e.png.

In a notebook:
    model = load_model("runs/baseline")            # from utils
    predict_image(model, "photo.png")              # [("wolf", 0.93), ...]
    picture(model, images[:3], labels[:3])         # a matplotlib figure
"""

import contextlib
import difflib
import math
import textwrap
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import utils
from data import CLASS_NAMES, DOUBTFUL, TITLES, as_pixels, class_names, load_dataset, normalize, votes
from model import LAST_MAP, MODELS, make_model
from utils import ScriptError, require

BATCH = 100  # images
NEAR = 0.02  # in matching, a correct prediction of another class counts as this much further away
SANITY_LAYER = {"resnet18": "layer3", "cct": "tokens"}  # of 8x8 cells
SANITY_LIMIT = 0.5  # our convention: maps more alike than this support no claim
FORMATS = "PNG JPEG GIF BMP TIFF WEBP PPM".split()  # Pillow would also start Ghostscript for a PostScript file


# ---- Grad-CAM -------------------------------------------------------------------------------------------


def grad_cam(model, images, targets, layer="layer4"):
    """Signed raw Grad-CAM maps (N, h, w) float32, before the ReLU, on the network's device.

    model: run in eval mode and put back. images: (N, 3, H, W) float, normalised. targets: (N,) int64, the class
    to explain in each image. layer: the name of a module whose output is (N, K, h, w). Works under no_grad and
    inference_mode, with frozen, half and double weights, and leaves no hook and no gradient behind. One backward
    pass serves the batch: in eval mode no image's logit depends on another image. ValueError for wrong arguments.
    """
    modules, weight, saved = dict(model.named_modules()), next(model.parameters()), {}
    training = [module for module in model.modules() if module.training]
    parts = ", ".join(name for name, _ in model.named_children())
    require(layer in modules, f"the network has no layer {layer}; its parts are {parts}")
    sound = isinstance(images, torch.Tensor) and images.is_floating_point()
    sound = sound and (images.abs() <= 10).all()  # in 0..1: may be low contrast
    require(sound, "images must be normalised floats (N, 3, H, W), as data.normalize makes them")
    targets = torch.as_tensor(targets)
    fitting = targets.dtype == torch.int64 and targets.shape == images.shape[:1]
    require(fitting, "targets must be int64 (N,), a class for each image, such as torch.tensor([3])")

    def backward_hook(gradient):
        saved["gradient"] = gradient

    def forward_hook(module, inputs, output):
        require(output.ndim == 4, f"the output of layer {layer} is no map (N, K, h, w)")
        # A starts the graph: the backward pass ends here, whether or not the weights before it are frozen.
        A = saved["A"] = output.detach().requires_grad_()
        A.register_hook(backward_hook)  # goes with A
        return A.clone()  # what follows may change it in place, as ReLU(inplace=True) does

    try:
        model.eval()  # in training mode batch norm would mix the images
        with torch.inference_mode(False), torch.enable_grad(), modules[layer].register_forward_hook(forward_hook):
            layout = utils.memory_format(weight.device)
            logits = model(images.to(weight.device, weight.dtype, copy=True, memory_format=layout))  # (N, C)
            require("A" in saved, f"the network does not use layer {layer}")
            known = ((targets >= 0) & (targets < logits.shape[1])).all()
            require(known, f"targets outside 0..{logits.shape[1] - 1}")
            score = logits.gather(1, targets.to(weight.device, copy=True)[:, None]).sum()
            score.backward(inputs=[saved["A"]])  # no parameter gets a .grad
    finally:
        for module in training:
            module.training = True
    A, gradient = saved["A"].detach().float(), saved["gradient"].float()  # (N, K, h, w)
    alpha = gradient.mean((2, 3), keepdim=True)  # (N, K, 1, 1)
    return (alpha * A).sum(1)  # (N, h, w)


def make_maps(model, images, classes, layer):
    """grad_cam in batches: maps (N, h, w), on the CPU, of images (N, 32, 32, 3) uint8 for classes (N,)."""
    device = next(model.parameters()).device
    batches = utils.track(list(zip(images.split(BATCH), classes.split(BATCH))), "maps, batch")
    return torch.cat([grad_cam(model, normalize(x.to(device)), y, layer).cpu() for x, y in batches])


def upsample(maps):
    """Maps (N, k, h, w) to (N, k, 32, 32), bilinear between the centres of the cells."""
    return F.interpolate(maps, size=(32, 32), mode="bilinear", align_corners=False)


def probabilities(model, images):
    """Probabilities (N, 100) float32, on the CPU, for images (N, 32, 32, 3) uint8."""
    device = next(model.parameters()).device
    return utils.predict(model, [normalize(part.to(device)) for part in images.split(BATCH)]).softmax(1).cpu()


def explain(model, images, labels=None, target="predicted", layer="layer4", names=CLASS_NAMES):
    """What speaks for a class in each image: (rows of gradcam.csv as dicts, signed maps (N, 2, h, w)).

    images: (N, 32, 32, 3) uint8. labels: (N,) int64, the true classes; None takes the targets. target: the
    class to explain, "predicted", "true" or a label. names: of the classes, by label. The two maps of an
    image are those for its target and for its label. Raises ValueError for anything else.
    """
    require(labels is not None or target != "true", "target true needs the labels")
    images = as_pixels(images)
    probs = probabilities(model, images)
    preds = probs.argmax(1)
    known = {"predicted": preds, "true": labels}
    targets = torch.as_tensor(known[target] if target in known else torch.full_like(preds, target))
    labels = targets if labels is None else torch.as_tensor(labels)
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
    }
    return [dict(zip(columns, values)) for values in zip(*columns.values())], maps


def picture(model, images, labels=None, target="predicted", layer="layer4", names=CLASS_NAMES, captions=None, title="",
            other=None):  # fmt: skip
    """A matplotlib figure with a row per image: the image and, beside it, the map for its target.

    If the label is another class: also the map for that, on the same scale, and the signed difference of the
    two maps. Arguments as for explain(). captions: N texts. other: (network, layer) of another run; the last
    column is its map for what it predicts.
    """
    images = as_pixels(images)
    rows, maps = explain(model, images, labels, target, layer, names)
    other_rows, other_maps = explain(other[0], images, layer=other[1], names=names) if other else (rows, maps)
    mistakes = any(row["target"] != row["true"] for row in rows)
    n, columns = len(images), 2 + 2 * mistakes + bool(other)
    asked = target if target in ("predicted", "true") else "asked"
    title += f"\nGrad-CAM at {layer}, {maps.shape[2]}x{maps.shape[3]} cells"
    title += "\nLine on the image: half of the first map's largest value"
    title = "\n".join(textwrap.fill(line, 22 * columns, break_on_hyphens=False) for line in title.strip().splitlines())
    height = 2.6 * n + 0.8 + 0.2 * title.count("\n")
    figure, grid = utils.new_figure(2 * columns, height, n + 1, columns, title, height_ratios=[20] * n + [1])
    for axis in grid.flat:
        axis.axis("off")

    def show(axis, values, top, text, lowest=0, colours="viridis"):
        values = values / top.clamp(min=1e-12)
        axis.imshow(values, vmin=lowest, vmax=1, cmap=colours, interpolation="bilinear")
        axis.set_title(text, fontsize=9.5)

    cams, leads = upsample(maps.clamp(min=0)), upsample(maps[:, :1] - maps[:, 1:])
    their_cams = upsample(other_maps.clamp(min=0))
    for i, (axes, row, theirs) in enumerate(zip(grid, rows, other_rows)):
        caption = captions[i] if captions else f"image {i}" + ("" if labels is None else f"\ntrue: {row['true']}")
        axes[0].set_title(caption.replace("$", r"\$"), fontsize=9.5)
        axes[0].imshow(images[i], interpolation="nearest")
        half = cams[i, 0].max().item() / 2
        if cams[i, 0].min() < half:
            for colour, width in (("black", 2.5), ("white", 1)):
                axes[0].contour(cams[i, 0], [half], colors=colour, linewidths=width)
        weak = "" if row["map_max"] > 0 else ", no evidence"
        text = f"{asked}: {row['target']}\n{100 * row['target_probability']:.2f} %{weak}"
        show(axes[1], cams[i, 0], cams[i].max(), text)
        if row["target"] != row["true"]:
            text = f"true: {row['true']}\n{100 * row['true_probability']:.2f} %"
            show(axes[2], cams[i, 1], cams[i].max(), text)  # on the same scale
            text = f"{row['target']}\nrather than {row['true']}"
            show(axes[3], leads[i, 0], leads[i].abs().max(), text, -1, "PuOr_r")
        if other:
            text = f"other run: {theirs['predicted']}\n{100 * theirs['confidence']:.2f} %"
            show(axes[-1], their_cams[i, 0], their_cams[i, 0].max(), text)

    bars = [(1, "evidence for the class", ["none", "most in row"])]
    bars += [(3, "class it speaks for", ["true", asked])] if mistakes else []
    bars += [(columns - 1, "evidence for the class", ["none", "most in map"])] if other else []
    for column, label, ends in bars:
        grid[n, column].axis("on")
        shown = next(axis.images[0] for axis in grid[:n, column] if axis.images)
        bar = figure.colorbar(shown, cax=grid[n, column], orientation="horizontal")
        bar.set_label(label, fontsize=9.5)
        bar.set_ticks(shown.get_clim(), labels=ends, fontsize=9.5)
        for text, side in zip(bar.ax.get_xticklabels(), ("left", "right")):
            text.set_horizontalalignment(side)
    return figure


# ---- sanity checks: do the maps show this class and this network? ---------------------------------------


def spearman(first, second):
    """Spearman's rank correlation (N,) of two tensors (N, ...), image by image; NaN where one is constant."""
    # A cell's rank, around 0: how many cells are smaller, minus how many are larger. Ties share theirs.
    a, b = ((x[:, :, None] - x[:, None]).sign().sum(2) for x in (first.flatten(1).double(), second.flatten(1).double()))
    return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()  # 0 / 0 is NaN


def sanity_checks(model, args, images, classes):
    """Mean |Spearman rho| of the 8x8 maps with maps that must differ: {their name: float}; NaN if undefined.

    Near 1 for another class, drawn at random, the maps ignore the class (Sixt et al., arXiv:1912.09818); near 1
    for untrained weights, what was learnt (Adebayo et al., arXiv:1810.03292). Small values are necessary, not
    sufficient. args: train.py's arguments. images: (N, 32, 32, 3) uint8. classes: (N,) int64.
    """
    layer = SANITY_LAYER[args["model"]]
    torch.manual_seed(0)
    untrained = make_model(args["model"], width=args["width"]).to(next(model.parameters()).device).eval()
    shift = torch.randint(1, 100, (len(classes),), generator=torch.Generator().manual_seed(0))
    own = make_maps(model, images, classes, layer)
    maps = {
        "another class": make_maps(model, images, (classes + shift) % 100, layer),
        "untrained weights": make_maps(untrained, images, classes, layer),
    }
    return {name: spearman(own, other).abs().nanmean().item() for name, other in maps.items()}


# ---- attention: what hiding a part costs ----------------------------------------------------------------


def occlusion_drops(model, images, classes):
    """What a class (N,) loses in probability with the border, and with the centre, hidden: two (N,) float64.

    Hidden: replaced by the mean colour, 0 in normalised images (N, 3, 32, 32). The border is the outermost 4
    pixels, 448 in all; the centre, the control, a square of 21x21 = 441. Border is not background.
    """
    border = F.pad(torch.zeros(24, 24, device=images.device), [4] * 4, value=1).bool()
    centre = F.pad(torch.ones(21, 21, device=images.device), [5, 6, 5, 6]).bool()

    def probability(images):
        logits = utils.predict(model, utils.track(images.split(BATCH), "hiding parts, batch"))
        return logits.cpu().double().softmax(1).gather(1, classes[:, None])[:, 0].numpy()

    intact = probability(images)
    return [intact - probability(images.masked_fill(mask, 0)) for mask in (border, centre)]


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


def measure_attention(run, failures, test_set):
    """The rows of attention.csv: all failures (n,), then the correct predictions that match them."""
    (images, labels), device = test_set, next(run.model.parameters()).device
    logits, _ = utils.load_logits(run.folder, "test")
    preds, confidence = logits.argmax(1), np.exp(utils.log_softmax(logits)).max(1)
    correct = np.flatnonzero(preds == labels.numpy())
    matched = match_on_confidence(confidence[failures], preds[failures], confidence[correct], preds[correct])
    index = np.concatenate([failures, correct[matched]])
    normalised, classes = normalize(images[index].to(device)), torch.from_numpy(preds[index])
    border_drop, centre_drop = occlusion_drops(run.model, normalised, classes)
    columns = {
        "pair": [*range(len(failures)), *range(len(matched))],
        "group": ["failure"] * len(failures) + ["matched"] * len(matched),
        "index": index,
        "true": [run.names[label] for label in labels[index]],
        "predicted": [run.names[label] for label in preds[index]],
        "confidence": confidence[index],
        "border_drop": border_drop,
        "centre_drop": centre_drop,
        "checkpoint": [run.sha256] * len(index),
    }
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def print_attention(rows):
    """The means of attention.csv. evaluate.py judges the difference in the last column, over several runs."""
    print("points of confidence lost    centre hidden  border hidden  more at the border")
    for group, name in (("failure", "failures"), ("matched", "matched hits")):
        drops = [(row["centre_drop"], row["border_drop"]) for row in rows if row["group"] == group]
        centre, border = 100 * np.array(drops).reshape(-1, 2).T
        more = 100 * (border > centre).mean()
        print(f"{len(drops):7,} {name:<21}{centre.mean():13.1f}{border.mean():15.1f}{more:10.1f} % of them")
    print("Border is not background, and hidden parts are unlike the training images.")


# ---- pictures from elsewhere ----------------------------------------------------------------------------


def read_image(path):
    """A picture file as (32, 32, 3) uint8: upright, its central square, on white, in RGB; else ScriptError."""
    try:
        with Image.open(Path(path).expanduser(), formats=FORMATS) as image:
            image.load()
            with contextlib.suppress(Exception):  # a broken EXIF block is ignored, but not broken pixels
                image = ImageOps.exif_transpose(image)  # upright
        if image.mode.startswith(("I", "F")):  # 16-bit gray: convert() would clip it all to white
            values = np.asarray(image, np.float64)
            values = 255 * (values - values.min()) / max(np.ptp(values), 1e-12)
            image = Image.fromarray(values.round().astype(np.uint8))
        image = ImageOps.fit(image.convert("RGBA"), (32, 32), Image.Resampling.BICUBIC)
        image = Image.alpha_composite(Image.new("RGBA", (32, 32), "white"), image)  # transparency hides colours
        return np.array(image.convert("RGB"))
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error...
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ScriptError(f"--image {path} is not a readable picture ({reason}); use PNG or JPEG") from None


def predict_image(model, image, names=CLASS_NAMES):
    """The five likeliest classes of a picture: [(class name, probability)], the likeliest first.

    image: a file, or pixels (32, 32, 3) uint8, an array or a tensor. names: of the 100 classes, by label.
    Raises ScriptError for a file that is no readable picture, ValueError for other pixels.
    """
    pixels = as_pixels(image if isinstance(image, (np.ndarray, torch.Tensor)) else read_image(image))
    [probs] = probabilities(model, pixels)
    top = probs.topk(5)
    return [(names[label], p) for p, label in zip(top.values.tolist(), top.indices.tolist())]


# ---- the command line -----------------------------------------------------------------------------------


def parse_args(argv):
    parser = utils.ArgumentParser(__file__, __doc__)
    add = parser.add_argument
    add("run", metavar="RUN", nargs="?", help="run directory of train.py (default: the run trained last)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--index", type=int, nargs="+", default=[], metavar="I", help="test images, from 0, up to 64")
    which.add_argument("--image", metavar="FILE", help="a picture file instead of test images")
    add("--compare", metavar="RUN", help="another run: draw also its map for the class that it predicts")
    add("--target", default="predicted", help="class to explain: predicted, true, or its name or number")
    add("--layer", help="a module, such as layer3 or layer4.0 (default: the last that has a map)")
    utils.add_common_flags(parser)
    args = parser.parse_args(argv)
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


class Run:
    """A run's network, and what it takes to explain it. text: as typed. layer: None takes the last that has a map."""

    def __init__(self, text, layer, device, writable=True):
        self.folder, self.config = utils.open_run(text, writable)
        self.name, self.dataset = utils.plain(self.folder.resolve().name), self.config["dataset"]
        self.names = class_names(self.dataset)
        self.model, checkpoint = utils.load_best(self.folder, device)
        self.args, self.sha256 = checkpoint["args"], checkpoint["sha256"]  # of train.py; of what was loaded
        last = LAST_MAP[self.args["model"]]
        self.layer = layer or last
        try:
            grad_cam(self.model, torch.zeros(1, 3, 32, 32), torch.tensor([0]), self.layer)
        except ValueError as error:
            raise ScriptError(f"--layer {self.layer}: {error}; try {last}, or leave it out") from None


def draw(path, run, other, images, labels, target, captions, what=""):
    """Save the picture() of these images."""
    title = f"{MODELS[run.args['model']]} trained on {TITLES[run.dataset]}, run {run.name}{what}"
    title += f"\nother run: {other.name}" if other else ""
    title += f", at {other.layer}" if other and other.layer != run.layer else ""
    pair = (other.model, other.layer) if other else None
    arguments = run.model, images, labels, target, run.layer, run.names, captions, title, pair
    if utils.save_figure(path, picture, *arguments):
        print(f"wrote {utils.quote(path)}")


def explain_file(run, other, target, path):
    """--image: print and return the five likeliest classes, and draw the maps."""
    pixels, path = read_image(path), Path(utils.plain(path))
    top = predict_image(run.model, pixels, run.names)
    print(f"{path.name}: the network sees its central square, on white, in 32x32 pixels")
    for name, p in top:
        print(f"  {100 * p:5.1f} %  {name}")
    # Two pictures may have one name, in two folders: the checksum of their pixels tells them apart.
    drawing = run.folder / f"gradcam-{path.stem[:40]}-{zlib.crc32(pixels):08x}.png"
    draw(drawing, run, other, pixels, None, target, [path.name])
    return top


def caption(dataset, index, name):
    """The words above a test image; name: its true class."""
    doubtful = dataset == "cifar100" and DOUBTFUL[index]
    doubt = f"\nlabel doubtful: {votes(index)} of 5 agree" if doubtful else ""
    return f"test image {index}\ntrue: {name}{doubt}"


def explain_test_images(run, other, target, test_set, index, shown, stem, what):
    """Write stem.csv of the test images in index, and stem.png of those shown; returns the rows."""
    images, labels = test_set
    rows, _ = explain(run.model, images[index], labels[index], target, run.layer, run.names)
    rows = [{"index": i, **row, "checkpoint": run.sha256} for i, row in zip(index, rows)]
    table, drawing = run.folder / f"{stem}.csv", run.folder / f"{stem}.png"
    if utils.write_csv(table, rows):
        drawing.unlink(missing_ok=True)  # it shows other maps
    empty = sum(row["map_max"] <= 0 for row in rows)
    print(f"wrote {utils.quote(table)}\n  {empty} of {len(rows)} maps have no positive evidence for their target")
    captions = [caption(run.dataset, i, run.names[labels[i]]) for i in shown]
    draw(drawing, run, other, images[shown], labels[shown], target, captions, what)
    return rows


def read_failures(run):
    """The rows of failures.csv as dicts, if they and the logits come from the best.pt that was loaded."""
    path, made_by = run.folder / "failures.csv", f"python failures.py {utils.quote(run.folder)}"
    columns = {"index": lambda text: range(10_000).index(int(text)), "representative": int, "checkpoint": str}
    rows = utils.read_csv(path, made_by, "a list of failures", columns)
    known = {utils.checkpoint_id(run.folder), *(row["checkpoint"] for row in rows)}
    if known != {run.sha256}:
        raise ScriptError(f"{path} comes from another best.pt; run {made_by} again")
    return rows


def explain_failures(run, other, target, test_set, failures):
    """Maps, sanity checks and attention for the rows of failures.csv; returns the rows of gradcam.csv."""
    images, _ = test_set
    index = [row["index"] for row in failures]
    shown = [row["index"] for row in failures if row["representative"]]
    rows = explain_test_images(run, other, target, test_set, index, shown, "gradcam", ": confident mistakes")

    attention = measure_attention(run, index, test_set)
    utils.write_csv(run.folder / "attention.csv", attention)
    print(f"wrote {utils.quote(run.folder / 'attention.csv')}")
    print_attention(attention)

    some = index[:: math.ceil(len(index) / BATCH)]  # at most 100, evenly spread
    classes = probabilities(run.model, images[some]).argmax(1)
    for name, rho in sanity_checks(run.model, run.args, images[some], classes).items():
        verdict = "< 0.5: 8x8 maps change" if rho < SANITY_LIMIT else "not < 0.5: 8x8 maps support no claim"
        print(f"sanity: {name}: mean |rho| {rho:.2f}, {verdict}")
    return rows


def main(argv=None):
    """Returns the rows of the csv file as dicts; with --image, the five likeliest [(class, probability)]."""
    args = parse_args(argv)
    device = utils.select_device(args.device)
    run = Run(args.run, args.layer, device)
    target = args.target if args.target in ("predicted", "true") else class_label(args.target, run.names)
    other = Run(args.compare, args.layer, device, writable=False) if args.compare else None
    if other and (other.folder.resolve() == run.folder.resolve() or other.dataset != run.dataset):
        raise ScriptError(f"--compare {args.compare} must be another run, trained on the same data set")
    if other:
        run.name, other.name = utils.short_names([run.folder, other.folder])
    if args.image is not None:
        return explain_file(run, other, target, args.image)
    failures = [] if args.index else read_failures(run)
    test_set = load_dataset(*utils.dataset_of(run.config, args), train=False)
    if args.index:
        return explain_test_images(run, other, target, test_set, args.index, args.index, "gradcam-index", "")
    rows = explain_failures(run, other, target, test_set, failures) if failures else []
    if not failures:
        print(f"{utils.quote(run.folder)}/failures.csv is empty: no mistake is above the threshold.")
        print("A lower --threshold of failures.py lists some; --index explains other images.")
        for name in ("gradcam.png", "gradcam.csv", "attention.csv"):
            (run.folder / name).unlink(missing_ok=True)  # of failures that are no longer listed
    print("A report compares the runs that are named:")
    print(f"next: python evaluate.py {utils.quote(run.folder)}{utils.data_flag(args)}")
    return rows


if __name__ == "__main__":
    utils.run_script(main)
