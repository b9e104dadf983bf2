"""CIFAR-100 in memory: loading, split, augmentation, class names, and a synthetic stand-in.

    from data import load_cifar100
    images, labels = load_cifar100("data", train=False)    # (10000, 32, 32, 3) uint8, (10000,) int64

The whole training set is 154 MB of bytes, so it lives on the device as one tensor; there are no worker
processes, and a batch is cut, mirrored and normalised where it is needed. Krizhevsky: Learning multiple
layers of features from tiny images, 2009, https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import functools
import http.client
import socket
import tarfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from utils import ScriptError

NUM_CLASSES = 100
ARCHIVE_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
ARCHIVE_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
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
SUPERCLASS_OF = np.array(
    [[name in group.split() for group in SUPERCLASSES.values()].index(True) for name in CLASS_NAMES]
)


TITLES = {"cifar100": "CIFAR-100", "synthetic": "SYNTHETIC data"}  # for what is printed and drawn


def class_names(dataset):
    """The 100 names by label; made-up ones for the synthetic set, whose images show none of the real things."""
    return CLASS_NAMES if dataset == "cifar100" else [f"synthetic_{label:02d}" for label in range(NUM_CLASSES)]


def load_dataset(dataset, data_dir, train, url=None):
    """images (N, 32, 32, 3) uint8 and labels (N,) int64 of "cifar100" or "synthetic"; N is 50,000 or 10,000."""
    return load_cifar100(data_dir, train, url) if dataset == "cifar100" else load_synthetic(train)


def load_cifar100(data_dir="data", train=True, url=None):
    """images (N, 32, 32, 3) uint8 and labels (N,) int64; N is 50,000 if train, else 10,000.

    Downloads the archive if there is no cifar-100-python yet.

    data_dir: the folder that holds cifar-100-python, or that folder itself; it may be read-only if it is
    complete. url: where to get the archive; any byte-identical copy will do, since torchvision compares MD5
    sums before it unpacks or unpickles anything. Raises ScriptError, code 1 if the download fails, 2 if the
    files are not the official ones.
    """
    try:
        import torchvision  # here, because only CIFAR-100 needs it
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        raise ScriptError(
            f"torchvision does not go with torch {torch.__version__} ({error}); pip install -r requirements.txt in a fresh environment"
        ) from None

    data_dir = Path(data_dir).expanduser().resolve()
    folder = data_dir if (data_dir / "train").exists() else data_dir / "cifar-100-python"

    class CIFAR100(torchvision.datasets.CIFAR100):
        pass

    CIFAR100.url, CIFAR100.base_folder = url or ARCHIVE_URL, folder.name
    if not folder.exists():
        download(CIFAR100, data_dir)
    try:
        dataset = CIFAR100(folder.parent, train)
    except (RuntimeError, OSError):  # torchvision says the same for missing and damaged files
        files = [*CIFAR100.train_list, *CIFAR100.test_list, [CIFAR100.meta["filename"], CIFAR100.meta["md5"]]]
        intact = torchvision.datasets.utils.check_integrity
        wrong = [f"{name} (MD5 {md5})" for name, md5 in files if not intact(folder / name, md5)]
        raise ScriptError(
            f"{folder} is not the official CIFAR-100: missing, unreadable or altered: {', '.join(wrong)}; "
            "point --data-dir elsewhere, or delete that folder to download it again"
        ) from None
    return torch.from_numpy(np.ascontiguousarray(dataset.data)), torch.tensor(dataset.targets)


def download(cifar100, data_dir):
    """Fetch and unpack the archive (161 MB) into data_dir, with a time-out that torchvision does not set."""
    if data_dir.is_file() or (data_dir / "batches.meta").exists():
        raise ScriptError(f"--data-dir {data_dir} is a file, or CIFAR-10; name a folder for cifar-100-python")
    print(f"downloading {cifar100.url} to {data_dir}: 161 MB, and its server can take an hour", flush=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        cifar100(data_dir, train=False, download=True)
    except (OSError, RuntimeError, ValueError, EOFError, tarfile.TarError, http.client.HTTPException) as error:
        raise ScriptError(
            f"cannot get CIFAR-100 from {cifar100.url} ({error}); on Kaggle, switch the notebook's Internet on; or use "
            f"--data-dir FOLDER with a copy on this disk, --data-url URL of any copy with MD5 {ARCHIVE_MD5}, "
            "or --dataset synthetic",
            code=1,
        ) from None
    finally:
        socket.setdefaulttimeout(before)


@functools.cache  # a process that trains and evaluates makes it once
def load_synthetic(train=True):
    """A stand-in with CIFAR-100's shapes, made in a second: images (N, 32, 32, 3) uint8, labels (N,) int64.

    Every class is a pattern of 4x4 colour blocks; the five classes of a superclass share a third of theirs.
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
    """Sorted indices (train, val) with val_size / 100 validation images of every class.

    A function of the seed alone.

    labels: (N,) int64 with equally many of each class. val_size: a multiple of 100.
    """
    order = np.random.default_rng([seed, 0]).permutation(len(labels))
    by_class = order[np.argsort(labels.numpy()[order], kind="stable")].reshape(NUM_CLASSES, -1)
    val, train = np.split(by_class, [val_size // NUM_CLASSES], axis=1)
    return torch.from_numpy(np.sort(train.ravel())), torch.from_numpy(np.sort(val.ravel()))


def split_id(val_index):
    """A checksum of the split: another one means that NumPy's generator has changed, and a checkpoint's with it."""
    return zlib.crc32(val_index.numpy().tobytes())


def normalize(images):
    """uint8 (B, 32, 32, 3) to float32 (B, 3, 32, 32), zero mean and unit variance per channel, channels_last in memory."""
    mean, std = _mean_std(images.device)
    return (images.permute(0, 3, 1, 2).float() - mean) / std


@functools.cache  # one copy to each device, not one in every step
def _mean_std(device):
    return tuple(torch.tensor(values, device=device).view(1, 3, 1, 1) * 255 for values in (MEAN, STD))


def pad(images):
    """(N, 32, 32, 3) uint8 to (N, 40, 40, 3): four black pixels on each side, as RandomCrop(32, padding=4) adds."""
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
    """One training batch by one gather: a random window of each padded image, mirrored where flips says so.

    padded: (N, 40, 40, 3) uint8. index (B,), offsets (B, 2) as row and column, flips (B,): a slice of
    epoch_plan, on the device of padded. Returns (B, 3, 32, 32) float32, normalised. The mirror image costs
    nothing: its columns count down.
    """
    window = torch.arange(32, device=padded.device)
    rows = offsets[:, :1] + window  # (B, 32)
    columns = offsets[:, 1:] + torch.where(flips[:, None], 31 - window, window)  # (B, 32)
    return normalize(padded[index[:, None, None], rows[:, :, None], columns[:, None, :]])
