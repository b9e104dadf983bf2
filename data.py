"""CIFAR-100 in memory: loading, split, augmentation, corruptions, class names, and a synthetic stand-in.

    from data import load_cifar100, corrupt
    images, labels = load_cifar100("data", train=False)    # (10000, 32, 32, 3) uint8, (10000,) int64
    foggy = corrupt(images, "fog", severity=3)             # the same shape and dtype

The whole training set is 154 MB of bytes, so it lives on the device; there are no worker processes, and a
batch is cropped, flipped and normalised where it is needed. Krizhevsky: Learning multiple layers of features
from tiny images, 2009, https://www.cs.toronto.edu/~kriz/cifar.html.

To add a corruption: a line at the end of STRENGTHS, and a branch in _corrupted().
"""

import functools
import hashlib
import http.client
import io
import math
import pickle
import tarfile
import tempfile
import time
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from utils import Progress, ScriptError, duration, lock, memory_format, replace, require

NUM_CLASSES = 100
ARCHIVE_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
MIRROR_URL = "https://dataset.bj.bcebos.com/cifar/cifar-100-python.tar.gz"  # PaddlePaddle's, the same bytes
ARCHIVE_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
ARCHIVE_SIZE = 169_001_437  # bytes
FILES_MD5 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
TIMEOUT = 20  # seconds without a single byte

# Mean and standard deviation of each channel over all pixels of the 50,000 training images, in [0, 1]. The
# often-copied std (0.2009, 0.1984, 0.2023) is the average of the stds within single images, which is smaller.
MEAN = (0.5071, 0.4865, 0.4409)
STD = (0.2673, 0.2564, 0.2762)

# The 20 superclasses in the order of their official labels 0..19, and the five classes of each.
SUPERCLASSES = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
CLASS_NAMES = sorted(" ".join(SUPERCLASSES.values()).split())  # alphabetical, so index = official label 0..99
SUPERCLASS_OF = np.argsort(" ".join(SUPERCLASSES.values()).split()) // 5  # by label: its place above, five to a group
# The 15 classes of insects, other invertebrates and small mammals, for the claim about small animals.
SMALL_ANIMALS = np.flatnonzero(np.isin(SUPERCLASS_OF, [7, 13, 16])).tolist()

TITLES = {"cifar100": "CIFAR-100", "synthetic": "SYNTHETIC data"}  # for what is printed and drawn


def class_names(dataset):
    """The 100 names by label; made-up ones for the synthetic set, whose images show no real things."""
    return CLASS_NAMES if dataset == "cifar100" else [f"synthetic_{label:02d}" for label in range(NUM_CLASSES)]


def load_dataset(dataset, data_dir, train, url=None):
    """images (N, 32, 32, 3) uint8 and labels (N,) int64 of "cifar100" or "synthetic"; N: 50,000 or 10,000."""
    return load_cifar100(data_dir, train, url) if dataset == "cifar100" else load_synthetic(train)


def find_cifar100(data_dir):
    """The folder with train, test and meta: data_dir or its cifar-100-python; None if there is neither."""
    data_dir = Path(data_dir).expanduser().resolve()
    folder = data_dir / "cifar-100-python"
    if folder.exists():
        return folder
    return data_dir if any((data_dir / name).is_file() for name in FILES_MD5) else None


def load_cifar100(data_dir="data", train=True, url=None):
    """images (N, 32, 32, 3) uint8 and labels (N,) int64; N is 50,000 if train, else 10,000.

    data_dir: the folder that holds cifar-100-python, or that folder itself; it may be read-only. Without one
    the archive is downloaded. url: where from; any byte-identical copy will do, since MD5 sums are compared
    before anything is unpacked or unpickled. Raises ScriptError, code 1 if the download fails, 2 if the files
    are not the official ones.
    """
    folder = find_cifar100(data_dir) or download(Path(data_dir).expanduser().resolve(), url or ARCHIVE_URL)
    files = {name: (folder / name).read_bytes() if (folder / name).is_file() else b"" for name in FILES_MD5}
    wrong = [f"{name} (MD5 {md5})" for name, md5 in FILES_MD5.items() if md5_of(files[name]) != md5]
    if wrong:
        found = f"{folder} is not the official CIFAR-100: missing or altered: {', '.join(wrong)}"
        raise ScriptError(f"{found}; point --data-dir elsewhere, or delete that folder to download it again")
    content = pickle.loads(files["train" if train else "test"], encoding="latin1")  # written by Python 2
    images = content["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return torch.from_numpy(np.ascontiguousarray(images)), torch.tensor(content["fine_labels"])


def md5_of(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()  # else FIPS systems refuse it


def download(data_dir, url):
    """Fetch and unpack the archive into data_dir/cifar-100-python, which appears when it is complete."""
    if data_dir.is_file() or (data_dir / "batches.meta").exists():
        raise ScriptError(f"--data-dir {data_dir} is a file, or CIFAR-10; name a folder for cifar-100-python")
    folder = data_dir / "cifar-100-python"
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with open(data_dir / ".cifar-100-python.lock", "w") as file:
            if not lock(file):
                print("another process is downloading CIFAR-100; waiting for it", flush=True)
                lock(file, wait=True)
            if folder.exists():  # fetched by that process
                return folder
            archive = tarfile.open(fileobj=io.BytesIO(fetch(url)))
            with tempfile.TemporaryDirectory(prefix=".cifar-100-", dir=data_dir) as partial:
                unpacked = Path(partial, "cifar-100-python")
                unpacked.mkdir()
                for name in FILES_MD5:  # nothing else, and to no path that the archive names
                    (unpacked / name).write_bytes(archive.extractfile(f"cifar-100-python/{name}").read())
                replace(unpacked, folder)
    except OSError as error:
        reason = f"there is no cifar-100-python in {data_dir}, and none can be written to it ({error})"
        raise ScriptError(f"{reason}; use another --data-dir", code=1) from None
    return folder


def fetch(url):
    """The bytes of the archive, their MD5 checked. Shows speed and time left."""
    other = ARCHIVE_URL if url == MIRROR_URL else MIRROR_URL
    print(f"downloading {url}", flush=True)
    content, progress, start, warned = bytearray(), Progress(), time.monotonic(), False
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            while len(content) <= ARCHIVE_SIZE and (chunk := response.read1(65536)):  # what has arrived
                content += chunk
                done, seconds = len(content) / ARCHIVE_SIZE, time.monotonic() - start
                left = seconds / done - seconds
                if seconds > TIMEOUT and left > 600 and not warned:
                    warned = True
                    progress.clear()
                    print(f"this takes {duration(left)}; another server has it, too:\n  --data-url {other}", flush=True)
                if progress.due():
                    speed = f"{len(content) / 1e6 / seconds:.2f} MB/s"
                    progress.show(f"{done:.0%} of {ARCHIVE_SIZE // 10**6} MB, {speed}, {duration(left)} left")
        if md5_of(content) != ARCHIVE_MD5:
            raise ValueError(f"{len(content):,} bytes, wrong MD5")
    except (OSError, ValueError, http.client.HTTPException) as error:
        ways = f"--data-url {other}, or any copy with MD5 {ARCHIVE_MD5}, or --data-dir FOLDER with a copy on this disk"
        also = "on Kaggle, switch the notebook's Internet on; train.py --quick needs no download"
        raise ScriptError(f"cannot get CIFAR-100 from {url} ({error}); try {ways}; {also}", code=1) from None
    finally:
        progress.clear()
    return content


@functools.cache  # a process that trains and evaluates makes it once
def load_synthetic(train=True):
    """A stand-in with CIFAR-100's shapes, made in a second: images (N, 32, 32, 3) uint8, labels (N,) int64.

    Every class is a pattern of 4x4 colours, each one third its superclass's and two thirds its own.
    An image blends its class's pattern with a share of up to 0.55 of another one's, plus noise. Where that
    share is above one half the label is wrong in effect, so that even a perfect classifier makes mistakes,
    some of them confident.
    """
    shared, own = np.random.default_rng(100).integers(0, 200, (2, NUM_CLASSES, 4, 4, 3))  # for both splits
    patterns = (shared[SUPERCLASS_OF] + 2 * own) / 3
    n = 50_000 if train else 10_000
    rng = np.random.default_rng([100, 1 + train])
    labels = rng.permutation(n) % NUM_CLASSES  # balanced, in random order
    others = (labels + rng.integers(1, NUM_CLASSES, n)) % NUM_CLASSES
    share = rng.uniform(0, 0.55, (n, 1, 1, 1))
    blocks = ((1 - share) * patterns[labels] + share * patterns[others]).astype(np.uint8)
    images = blocks.repeat(8, axis=1).repeat(8, axis=2)
    images += rng.integers(0, 56, images.shape, dtype=np.uint8)  # at most 199 + 55 = 254
    return torch.from_numpy(images), torch.from_numpy(labels)


def split_train_val(labels, val_size, seed):
    """Stratified split by the seed alone: sorted indices (train, val), val_size / 100 of every class in val.

    labels: (N,) int64 with equally many of each class. val_size: a multiple of 100.
    """
    order = np.random.default_rng([seed, 0]).permutation(len(labels))
    by_class = order[np.argsort(labels.numpy()[order], kind="stable")].reshape(NUM_CLASSES, -1)
    val, train = np.split(by_class, [val_size // NUM_CLASSES], axis=1)
    return torch.from_numpy(np.sort(train.ravel())), torch.from_numpy(np.sort(val.ravel()))


def split_id(val_index):
    """A checksum of the split: it changes if another NumPy draws another split for the same seed."""
    return zlib.crc32(val_index.numpy().tobytes())


def normalize(images):
    """uint8 (B, 32, 32, 3) to float32 (B, 3, 32, 32), zero mean and unit variance per channel.

    In memory it stays channels_last, except on Apple's GPUs (see utils.memory_format).
    """
    mean, std = _mean_std(images.device)
    images = (images.permute(0, 3, 1, 2).float() - mean) / std
    return images.contiguous(memory_format=memory_format(images.device))


@functools.cache  # one copy to each device, not one in every step
def _mean_std(device):
    return tuple(torch.tensor(values).view(1, 3, 1, 1).to(device) * 255 for values in (MEAN, STD))


def pad(images):
    """(N, 32, 32, 3) uint8 to (N, 40, 40, 3): four black pixels on each side, as RandomCrop(32, 4) adds."""
    return F.pad(images, (0, 0, 4, 4, 4, 4))


def epoch_plan(seed, epoch, n):
    """All random draws of one epoch: order (n,) int64, crop offsets (n, 2) in 0..8 int64, flips (n,) bool.

    Entry i belongs to the i-th image that the epoch visits. Derived from (seed, epoch) and nothing else, so
    epoch 7 is the same on every device, and the same whether or not the process was restarted before it.
    epoch counts from 1; 0 is the split.
    """
    rng = np.random.default_rng([seed, epoch])
    plan = rng.permutation(n), rng.integers(0, 9, (n, 2)), rng.random(n) < 0.5
    return tuple(torch.from_numpy(part) for part in plan)


def augment(padded, index, offsets, flips):
    """One training batch by one gather: a random crop of each padded image, flipped where flips says so.

    padded: (N, 40, 40, 3) uint8. index (B,), offsets (B, 2) as row and column, flips (B,): a slice of
    epoch_plan, on the device of padded. Returns (B, 3, 32, 32) float32, normalised. The mirror image costs
    nothing: its columns count down.
    """
    window = torch.arange(32, device=padded.device)
    rows = offsets[:, :1] + window  # (B, 32)
    columns = offsets[:, 1:] + torch.where(flips[:, None], 31 - window, window)  # (B, 32)
    return normalize(padded[index[:, None, None], rows[:, :, None], columns[:, None, :]])


def mix_plan(seed, epoch, steps, mixup=0.0, cutmix=0.0):
    """How each batch of an epoch is mixed: a list of (lam, box), from (seed, epoch) alone like epoch_plan.

    mixup, cutmix: the alpha of each; if both are above 0, every batch takes one of them at random. lam: the
    share of an image that stays, drawn from Beta(alpha, alpha). box: the rows and columns that CutMix
    replaces, centred anywhere and cut off at the edges, after which lam is the share outside; None for MixUp.
    Zhang et al., arXiv:1710.09412; Yun et al., arXiv:1905.04899.
    """
    rng, plan = np.random.default_rng([seed, epoch, 1]), []
    for _ in range(steps):
        cut = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
        lam, box = rng.beta(*[cutmix if cut else mixup] * 2), None
        if cut:
            center, half = rng.integers(0, 32, 2), int(16 * math.sqrt(1 - lam))
            (top, left), (bottom, right) = np.maximum(center - half, 0), np.minimum(center + half, 32)
            lam = 1 - (bottom - top) * (right - left) / 32**2
            box = slice(top, bottom), slice(left, right)
        plan.append((float(lam), box))
    return plan


def mix(images, labels, lam, box):
    """Mix each image of a batch, and its one-hot label, with the one before it, as an entry of mix_plan says.

    images: (B, 3, 32, 32), changed in place by CutMix. labels: (B,). Returns (images, targets (B, 100)).
    """
    targets = torch.eye(NUM_CLASSES, device=labels.device)[labels]
    if box is None:
        images = images.lerp(images.roll(1, 0), 1 - lam)
    else:
        images[..., box[0], box[1]] = images[..., box[0], box[1]].roll(1, 0)
    return images, targets.lerp(targets.roll(1, 0), 1 - lam)


# ---- corruptions -------------------------------------------------------------------------------------------

STRENGTHS = {  # at severity 1, 2, 3, 4, 5
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation; white is 1
    "shot_noise": (500, 250, 100, 75, 50),  # photons of a white pixel
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),  # share of the values that become 0 or 1
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),  # radius, sigma of its edge
    "glass_blur": ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2)),  # sigma, times that pixels move
    "zoom_blur": (1.06, 1.11, 1.16, 1.21, 1.26),  # largest magnification
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),  # thickness, smoothness
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),  # added to the V of HSV
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # factor
    # shift of three points; amplitude and sigma of the field that moves each pixel
    "elastic_transform": ((2.56, 0, 0), (2.24, 1.6, 6.4), (1.92, 2.56, 1.92), (1.6, 3.2, 1.28), (0.96, 3.2, 0.96)),
    "pixelate": (30, 28, 27, 24, 20),  # pixels to a side
    "jpeg_compression": (80, 65, 58, 50, 40),  # quality
}
CORRUPTIONS = tuple(STRENGTHS)


def corrupt(images, name, severity, seed=0):
    """(N, 32, 32, 3) uint8 CPU images, corrupted: CIFAR-100-C style, re-implemented. Same shape and dtype.

    name: one of CORRUPTIONS. severity: 1 to 5. Operations and strengths are those of CIFAR-100-C (Hendrycks
    and Dietterich, arXiv:1903.12261) without motion blur, snow and frost, which need ImageMagick or
    photographs. The noise comes from the seed, the corruption, the severity and the image's place in the
    call, so image i gets the same whatever N is. Raises ValueError for a wrong argument.
    """
    require(name in CORRUPTIONS, f"unknown corruption {name!r}; there are {', '.join(CORRUPTIONS)}")
    require(severity in range(1, 6), f"severity {severity!r} is not one of 1, 2, 3, 4, 5")
    sound = isinstance(images, torch.Tensor) and images.dtype == torch.uint8 and images.shape[1:] == (32, 32, 3)
    require(sound, "images must be a uint8 tensor (N, 32, 32, 3), as load_cifar100 returns them")
    corrupted = torch.empty_like(images)
    for start in range(0, len(images), 500):  # in blocks, to save memory
        block = images[start : start + 500].numpy()
        rngs = [np.random.default_rng([seed, CORRUPTIONS.index(name), severity, start + i]) for i in range(len(block))]
        pixels = np.clip(_corrupted(block, name, STRENGTHS[name][severity - 1], rngs), 0, 1) * 255
        corrupted[start : start + 500] = torch.from_numpy(pixels.astype(np.uint8))  # truncates, as the original does
    return corrupted


def _corrupted(images, name, strength, rngs):
    """Pixels (N, 32, 32, 3), 0 to 1 before clipping, of uint8 images. rngs: one generator per image."""
    x = images / 255.0
    planes = torch.from_numpy(x).permute(0, 3, 1, 2)  # (N, 3, 32, 32)
    if name == "gaussian_noise":
        return x + np.stack([rng.normal(0, strength, (32, 32, 3)) for rng in rngs])
    if name == "shot_noise":
        return np.stack([rng.poisson(image * strength) for image, rng in zip(x, rngs)]) / strength
    if name == "impulse_noise":
        hit, white = np.stack([rng.random((2, 32, 32, 3)) for rng in rngs], axis=1)
        return np.where(hit < strength, white < 0.5, x)
    if name == "defocus_blur":  # a point becomes a disk with a soft edge
        radius, sigma = strength
        squares = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)  # of the distance from the centre
        disk = (squares[:, None] + squares <= radius**2).double()
        gauss = torch.exp(-squares / (2 * sigma**2))
        kernel = F.conv2d(disk[None, None], torch.outer(gauss, gauss)[None, None], padding=1)
        kernel *= (1 + 1e-8) / kernel.sum()  # so that truncation leaves even areas as they are
        planes = F.pad(planes, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(planes, kernel.expand(3, 1, 3, 3), groups=3).permute(0, 2, 3, 1).numpy()
    if name == "glass_blur":
        sigma, times = strength
        pixels = (_gaussian_blur(x, sigma, 4, "edge") * 255).astype(np.uint8)
        n, rows, columns = np.ogrid[: len(x), 2:32, 2:32]
        for _ in range(times):  # the original means to swap two pixels, but copies one, and so do we
            up, left = np.stack([rng.integers(0, 2, (2, 30, 30)) for rng in rngs], axis=1)
            pixels[:, 2:, 2:] = pixels[n, rows - up, columns - left]
        return _gaussian_blur(pixels / 255.0, sigma, 4, "edge")
    if name == "zoom_blur":  # the mean of the image and its magnifications by 1, 1.01, ...
        planes, factors = planes.float(), np.arange(1, strength, 0.01)
        total = planes.clone()
        for factor in factors:
            cut = math.ceil(32 / factor)
            size, first = round(cut * factor), (32 - cut) // 2
            part = planes[:, :, first : first + cut, first : first + cut]
            part = F.interpolate(part, (size, size), mode="bilinear", align_corners=True)
            first = (size - 32) // 2
            total += part[:, :, first : first + 32, first : first + 32]
        return (total / (len(factors) + 1)).permute(0, 2, 3, 1).numpy()
    if name == "fog":
        thickness, smoothness = strength
        white = x.max((1, 2, 3), keepdims=True)
        return (x + thickness * _clouds(smoothness, rngs)[..., None]) * white / (white + thickness)
    if name == "brightness":  # hue and saturation stay if all three colours grow by the same factor
        value = x.max(3, keepdims=True)
        return np.clip(value + strength, 0, 1) * (1 - (value - x) / np.maximum(value, 1e-9))
    if name == "contrast":
        mean = x.mean((1, 2), keepdims=True)
        return (x - mean) * strength + mean
    if name == "elastic_transform":
        return _elastic(planes, *strength, rngs).permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(image) for image in images]
    if name == "pixelate":
        pictures = [picture.resize((strength, strength), Image.BOX) for picture in pictures]
        return np.stack([picture.resize((32, 32), Image.BOX) for picture in pictures]) / 255.0
    files = [io.BytesIO() for _ in pictures]  # jpeg_compression
    for picture, file in zip(pictures, files):
        picture.save(file, "JPEG", quality=strength)
    return np.stack([Image.open(file) for file in files]) / 255.0


def _gaussian_blur(x, sigma, truncate, edge):
    """(N, 32, 32, C) blurred in both directions; the kernel ends at truncate * sigma. edge: see np.pad."""
    radius = int(truncate * sigma + 0.5)
    kernel = np.exp(-((np.arange(-radius, radius + 1) / sigma) ** 2) / 2)
    sources = np.pad(np.arange(32), radius, mode=edge)  # the pixels of a padded row
    windows = np.lib.stride_tricks.sliding_window_view(sources, len(kernel))  # (32, len(kernel))
    blur = kernel / kernel.sum() @ np.eye(32)[windows]  # (32, 32): row i makes pixel i
    return np.einsum("hi,wj,nijc->nhwc", blur, blur, x, optimize=True)


def _clouds(smoothness, rngs):
    """(N, 32, 32) in [0, 1] by the diamond-square algorithm; opposite edges are neighbours.

    A point between four known ones gets their mean and a random shift, at ever smaller distances and shifts.
    """
    height, step, shift = np.zeros((len(rngs), 32, 32)), 32, 10_000
    while step >= 2:
        half = step // 2
        shifts = np.stack([rng.uniform(-shift, shift, (3, 32 // step, 32 // step)) for rng in rngs], axis=1)
        corners = height[:, ::step, ::step]
        right, below = corners + np.roll(corners, -1, 2), corners + np.roll(corners, -1, 1)
        centres = (right + np.roll(right, -1, 1)) / 4 + shifts[0]
        height[:, half::step, half::step] = centres
        height[:, ::step, half::step] = (right + centres + np.roll(centres, 1, 1)) / 4 + shifts[1]
        height[:, half::step, ::step] = (below + centres + np.roll(centres, 1, 2)) / 4 + shifts[2]
        step, shift = half, shift / smoothness**2
    height -= height.min((1, 2), keepdims=True)
    return height / height.max((1, 2), keepdims=True)


def _elastic(planes, shift, amplitude, sigma, rngs):
    """(N, 3, 32, 32): an affine map, given by random shifts of three points, then a smooth random field."""
    points = np.array([[26, 26, 1], [26, 6, 1], [6, 6, 1]])  # column, row, 1
    moved = np.stack([points + np.pad(rng.uniform(-shift, shift, (3, 2)), [(0, 0), (0, 1)]) for rng in rngs])
    back = np.linalg.solve(moved, points[None])[..., :2]  # (N, 3, 2): from a pixel to the place of its colour
    columns, rows = np.meshgrid(np.arange(32), np.arange(32))
    places = np.stack([columns, rows, np.ones_like(rows)], axis=2)  # (32, 32, 3)
    grid = 2 * (places @ back[:, None]) / 31 - 1  # -1 and 1: centres of the outermost pixels
    planes = F.grid_sample(planes, torch.from_numpy(grid), padding_mode="reflection", align_corners=True)
    if amplitude == 0:
        return planes
    field = np.stack([rng.uniform(-1, 1, (32, 32, 2)) for rng in rngs])
    field = amplitude * _gaussian_blur(field, sigma, 3, "symmetric")
    grid = (2 * (places[..., :2] + field) + 1) / 32 - 1  # -1 and 1: their outer edges
    return F.grid_sample(planes, torch.from_numpy(grid), padding_mode="reflection", align_corners=False)
