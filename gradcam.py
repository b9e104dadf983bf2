"""Show which parts of an image speak for a class, according to a trained run: Grad-CAM.

    python gradcam.py runs/baseline                          # the failures that failures.py has just found
    python gradcam.py runs/baseline --index 3 141 59         # images of the test set
    python gradcam.py runs/baseline --image photo.png        # any picture

Writes gradcam.png (image, map for the predicted class, map for the true class) and gradcam.csv (a row per image) into the
run directory. From failures.csv, the picture shows the representative failures, the csv has them all.

Selvaraju et al., arXiv:1610.02391. With A^k the k-th channel of a layer's output and y^c the logit of class c,

    alpha_k^c = mean over the cells (i, j) of  d y^c / d A^k_ij
    map^c     = sum over k of  alpha_k^c A^k            and  Grad-CAM = ReLU(map^c)

In a network that ends in mean-pooling and a linear layer, the map of the last layer is the logit itself, spread over the
cells: its sum plus the bias of class c equals y^c. In CIFAR's ResNet-18 layer4 has 4x4 cells of 8x8 pixels, and each has
seen the whole image: read it as a rough direction, never as an outline. --layer layer3 has 8x8 cells, without that identity.
"""

import csv
import difflib
import io
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import utils
from data import class_names, load_dataset, normalize
from model import resnet18
from utils import ScriptError

BORDER = 4  # pixels: the outermost ring, 448 of the 1,024 pixels


def grad_cam(model, images, targets, layer="layer4"):
    """Signed raw Grad-CAM maps (N, h, w) float32, before the ReLU, on the images' device.

    model: a plain network in any mode (it is run in eval mode and put back). images: (N, 3, H, W), normalised.
    targets: (N,) int64, the class to explain in each image. layer: name of a module whose output is (N, K, h, w).
    One backward pass serves the batch, because in eval mode no image's logit depends on another image. Works under
    no_grad and with frozen parameters, and leaves no hook and no gradient behind. Raises ValueError for an unusable layer.
    """
    saved = {}

    def forward_hook(module, inputs, output):
        if not isinstance(output, torch.Tensor) or output.ndim != 4:
            raise ValueError(f"layer {layer} has no spatial map")
        saved["activations"] = output.detach().clone()  # A, a copy: an operation in place may follow
        # A hook on the tensor, not on the module: the latter fails where an operation in place follows,
        # https://github.com/pytorch/pytorch/issues/61519
        output.register_hook(backward_hook)

    def backward_hook(gradient):
        saved["gradients"] = gradient  # d y^c / d A

    module = dict(model.named_modules()).get(layer)
    if module is None:
        raise ValueError(f"the network has no layer {layer}")
    training = model.training
    handle = module.register_forward_hook(forward_hook)
    try:
        model.eval()  # in training mode batch norm would mix the images
        with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
            inputs = images.detach().float().requires_grad_()  # so that there is a graph even if the weights are frozen
            logits = model(inputs)  # (N, C)
            score = logits.gather(1, targets[:, None]).sum()
            torch.autograd.grad(score, inputs)  # unlike score.backward(), leaves the parameters' .grad alone
    finally:
        handle.remove()
        model.train(training)
    alpha = saved["gradients"].mean((2, 3), keepdim=True)  # (N, K, 1, 1)
    return (alpha * saved["activations"]).sum(1)  # (N, h, w)


def upsample(maps, size=32):
    """Raw maps (N, h, w) to (N, size, size), bilinear between the centres of the cells."""
    return F.interpolate(maps[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0]


def border_energy(maps):
    """Share of the positive map (N, h, w) in the outermost 4 of 32 pixels, (N,); NaN for a map without positive cells.

    An even map has 448 / 1024 = 0.4375 there. It says "border", which is not the same as "background".
    """
    positive = upsample(maps.clamp(min=0))
    inner = positive[:, BORDER:-BORDER, BORDER:-BORDER].sum((1, 2))
    return 1 - inner / positive.sum((1, 2))  # 0 / 0 is NaN


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
        done.append(f"{'cut to its central square and ' if width != height else ''}resized from {width}x{height} to 32x32")
        image = ImageOps.fit(image, (32, 32), Image.Resampling.BICUBIC)
    return np.array(image), done


def class_label(text, names):
    """Label of a class given by name or number; ScriptError with the nearest names if there is none."""
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    near = difflib.get_close_matches(text, names, 3, cutoff=0) if not text.lstrip("-").isdecimal() else []
    raise ScriptError(f"--target {text} is no class; use a number in 0..{len(names) - 1} or a name" + f", such as {', '.join(near)}" * bool(near))


def read_failures(run_dir):
    """The rows of failures.csv as dicts of strings."""
    path, made_by = run_dir / "failures.csv", f"python failures.py {run_dir}"
    try:
        reader = csv.DictReader(io.StringIO(path.read_text()))
        rows = list(reader)
        indices = [int(row["index"]) for row in rows]
        sound = len(set(indices)) == len(indices) and all(0 <= i < 10_000 for i in indices)
        sound = sound and {"index", "predicted", "representative"} <= set(reader.fieldnames or ())
        sound = sound and all(row["representative"] in ("0", "1") and row["predicted"] for row in rows)
    except FileNotFoundError:
        raise ScriptError(f"no {path}; run {made_by} first, or give --index or --image") from None
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        sound = False
    if not sound:
        raise ScriptError(f"{path} is not a list of failures; run {made_by} again")
    return rows


def draw(path, rows, images, panels, layer, title):
    """One line per image: the image, then its maps on one scale from 0 to 1, the highest value of any map of that image.

    panels: for each image a list of (class name, probability, raw map (h, w)).
    """
    columns = 1 + max(map(len, panels))
    figure, grid = utils.new_figure(2.9 * columns + 0.6, 2.75 * len(rows) + 0.9, len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, row, image, maps in zip(grid, rows, images, panels):
        axes[0].imshow(image, interpolation="nearest")
        truth = f"\ntrue: {row['true']}" if row["true"] else ""
        axes[0].set_title(f"{row['image']}{truth}\nsays: {row['predicted']} {100 * row['confidence']:.1f} %", fontsize=9)
        cams = upsample(torch.stack([raw for _, _, raw in maps]).clamp(min=0))
        cams = cams / cams.max().clamp(min=1e-12)
        for axis, (name, probability, raw), cam in zip(axes[1:], maps, cams):
            picture = axis.imshow(cam, cmap="viridis", vmin=0, vmax=1)
            nothing = "" if (raw > 0).any() else "\nno positive evidence"
            axis.set_title(f"for {name} ({100 * probability:.1f} %){nothing}", fontsize=9)
    figure.colorbar(picture, ax=grid, label="Grad-CAM / highest value in the line", shrink=min(1, 2 / len(rows)))
    height, width = panels[0][0][2].shape
    figure.suptitle(f"{title}\nGrad-CAM at {layer}, {height}x{width} cells", fontsize=11)
    utils.save_figure(figure, path)


def main(argv=None):
    """Returns the rows of gradcam.csv as a list of dicts."""
    parser = utils.ArgumentParser(__doc__)
    parser.add_argument("run", metavar="RUN", help="run directory of train.py")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--index", type=int, nargs="+", metavar="I", help="test images, counted from 0, instead of failures.csv")
    which.add_argument("--image", metavar="FILE", help="a picture file instead of test images")
    parser.add_argument("--target", default="predicted", help="class to explain: predicted, true, or a class by name or number")
    parser.add_argument("--layer", default="layer4", help="layer1 ... layer4, or any module in them, such as layer4.0")
    utils.add_common_flags(parser)
    args = parser.parse_args(argv)
    run_dir = Path(args.run).expanduser()
    if args.index is not None:
        args.index = list(dict.fromkeys(args.index))
        if not all(0 <= i < 10_000 for i in args.index):
            parser.error(f"--index {' '.join(map(str, args.index))} must be in 0..9999")
        if len(args.index) > 64:
            parser.error(f"--index has {len(args.index)} images; 64 fit into one picture")
    if args.image and args.target == "true":
        parser.error("--target true needs a known class; with --image use predicted or a class")
    device = utils.select_device(args.device)
    checkpoint = utils.load_checkpoint(run_dir / "best.pt")
    dataset = checkpoint["args"]["dataset"]
    if args.dataset not in (None, dataset):
        raise ScriptError(f"{run_dir} was trained on {dataset}, not on --dataset {args.dataset}; leave the flag out")
    names = class_names(dataset)
    asked = None if args.target in ("predicted", "true") else class_label(args.target, names)
    failures = read_failures(run_dir) if args.index is None and args.image is None else None
    if failures == []:
        print(f"{run_dir}/failures.csv is empty: no failures to explain; --index or --image show others")
        return []

    torch.backends.cudnn.allow_tf32 = False  # float32 in full, as in evaluate.py
    model = resnet18(width=checkpoint["args"]["width"])
    utils.load_weights(model, checkpoint["model"], run_dir / "best.pt")
    model.to(device)
    if args.image:
        pixels, done = read_image(Path(args.image).expanduser())
        print(f"{args.image}: {', '.join(done) or 'used as it is'}")
        images, labels, titles = torch.from_numpy(pixels)[None], None, [Path(args.image).name]
    else:
        index = args.index or [int(row["index"]) for row in failures]
        images, labels = (part[index] for part in load_dataset(dataset, args.data_dir, train=False))
        titles = [f"image {i}" for i in index]

    inputs = [normalize(batch.to(device)) for batch in images.split(100)]
    probs = utils.predict(model, inputs).softmax(1).cpu()
    preds = probs.argmax(1)
    if failures and [names[k] for k in preds] != [row["predicted"] for row in failures]:
        raise ScriptError(f"{run_dir}/failures.csv is not of this best.pt; run python evaluate.py {run_dir} and python failures.py {run_dir} again")

    def maps_for(classes):
        """Raw maps (N, h, w) on the CPU for one class per image."""
        try:
            parts = [grad_cam(model, batch, part.to(device), args.layer) for batch, part in zip(inputs, classes.split(100))]
        except ValueError as error:
            raise ScriptError(f"--layer {args.layer}: {error}; use layer1, layer2, layer3, layer4 or a module in them") from None
        return torch.cat(parts).cpu()

    targets = preds if args.target == "predicted" else labels if args.target == "true" else torch.full_like(preds, asked)
    maps = maps_for(targets)
    if not maps.isfinite().all():
        raise ScriptError("the maps have NaN or infinite values; is the checkpoint sound?", code=1)
    true_maps = maps_for(labels) if labels is not None else None

    border = border_energy(maps)
    rows, panels = [], []
    for n, title in enumerate(titles):
        rows.append(
            {
                "image": title,
                "true": names[labels[n]] if labels is not None else "",
                "predicted": names[preds[n]],
                "confidence": float(probs[n].max()),
                "target": names[targets[n]],
                "target_probability": float(probs[n, targets[n]]),
                "layer": args.layer,
                "map_sum": float(maps[n].sum()),
                "map_max": float(maps[n].max()),
                "border_energy": float(border[n]),
            }
        )
        panels.append([(names[targets[n]], float(probs[n, targets[n]]), maps[n])])
        if labels is not None and labels[n] != targets[n]:
            panels[-1].append((names[labels[n]], float(probs[n, labels[n]]), true_maps[n]))
    utils.write_csv(run_dir / "gradcam.csv", rows[0], rows)
    shown = [n for n in range(len(rows)) if not failures or failures[n]["representative"] == "1"]
    name = "CIFAR-100 test images" if dataset == "cifar100" else "SYNTHETIC test images"
    draw(
        run_dir / "gradcam.png",
        [rows[n] for n in shown],
        [images[n].numpy() for n in shown],
        [panels[n] for n in shown],
        args.layer,
        f"{run_dir.name} on {name if not args.image else 'a picture of yours'}",
    )
    empty = int((maps <= 0).flatten(1).all(1).sum())
    print(f"{len(rows)} images, {maps.shape[1]}x{maps.shape[2]} cells at {args.layer}; {empty} maps without positive evidence for their target")
    print(f"wrote gradcam.png ({len(shown)} images) and gradcam.csv ({len(rows)}) to {run_dir}")
    return rows


if __name__ == "__main__":
    utils.run_script(main)
