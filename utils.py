"""What two scripts or more share: errors, files, devices, metrics, progress and figures.

    from utils import macro_scores, confusion_matrix, calibration_error
    confusion = confusion_matrix(labels, logits.argmax(1), num_classes=100)
    precision, recall, f1 = macro_scores(confusion)

Importing this file has no side effect.
"""

import argparse
import csv
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

BLUE, VERMILION, GRAY = "#0072B2", "#D55E00", "#999999"  # Okabe and Ito: colour-blind readers tell them apart


# Columns that gradcam.py adds to failures.csv; attention.csv has them too.
ATTENTION = (
    "border_energy border_drop centre_drop border_reliance "
    "insertion_deletion insertion_deletion_shuffled insertion_deletion_other"
).split()
PLACES = {"data_dir", "data_url", "device", "output_dir", "resume"}  # flags of train.py that leave the recipe alone
FEWEST = 20  # images, below which their mean has no interval, and a claim no word

# ---- errors and the command line ---------------------------------------------------------------------------


class ScriptError(Exception):
    """One line for the user: what is wrong; what to do.

    code: the exit status. 2: a wrong argument or input file. 1: the world failed (network, disk, memory,
    divergence).
    """

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised as an exception so that `finally` and `with` clean up as they do after Ctrl-C."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        plain = action.default is None or action.default is False  # "(default: None)" tells nobody anything
        return action.help if plain else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse that prints the docstring and the defaults in --help and takes no abbreviations.

    It raises ScriptError instead of SystemExit, so that main([...]) in a notebook cell raises an ordinary
    exception.
    """

    def __init__(self, docstring):
        super().__init__(description=docstring, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise ScriptError(f"{message}; {self.prog} --help lists the arguments")


def add_common_flags(parser, dataset=None):
    """The three flags of every script. dataset: the default; None takes it from the run."""
    parser.add_argument(
        "--data-dir", default="data", help="folder that holds cifar-100-python, or that folder itself"
    )
    parser.add_argument(
        "--dataset",
        choices=["cifar100", "synthetic"],
        default=dataset,
        help="synthetic: a made-up stand-in, to try the scripts without the data"
        + ("" if dataset else " (default: the one the run was trained on)"),
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:N or mps; auto takes a GPU if there is one"
    )


def run_script(main):
    """Run main() as a script does: one line on stderr instead of a traceback, and a telling exit status.

    0: done. 2: a wrong argument or input file. 1: the world failed. 130: Ctrl-C. 143: SIGTERM. A bug in these
    scripts still shows its traceback.
    """

    def terminate(signum, frame):
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)  # by default SIGTERM ends Python without running any `finally`
    try:
        main()
        sys.stdout.flush()
        return
    except ScriptError as error:
        message, code = str(error), error.code
    except KeyboardInterrupt as interrupt:
        message, code = "stopped", 143 if isinstance(interrupt, Terminated) else 130
    except BrokenPipeError:  # `python evaluate.py ... | head`: quiet, as a program that SIGPIPE ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        message, code = f"{error.filename or 'the system'}: {error.strerror or error}; nothing written is lost", 1
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "alloc" not in str(error).lower():
            raise
        message, code = "out of memory; use another --device (to train: a smaller --batch-size)", 1
    sys.stdout.flush()
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(code)


def data_dir_flag(args):
    """What the next command has to repeat to find the data."""
    return f" --data-dir {quote(args.data_dir)}" if args.data_dir != "data" else ""


def quote(path):
    """A path as one writes it on a command line."""
    return shlex.quote(Path(path).as_posix())


def warn(message):
    print(f"warning: {message}", file=sys.stderr, flush=True)


# ---- files -------------------------------------------------------------------------------------------------


def write_file(path, write):
    """Call write(file) on a new binary file, then move it over path: a kill leaves the old content or the new one."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before the name points to it
        os.replace(partial, path)
    except OSError as error:
        raise ScriptError(
            f"cannot write {path} ({error.strerror or error}); free some space or use another folder; the file of before is intact",
            code=1,
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def write_text(path, text):
    write_file(path, lambda file: file.write(text.encode()))


def write_json(path, content):
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_csv(path, columns, rows):
    """A header and one line per dict; floats keep all their digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def sha256(path):
    """Hex digest of a file, or None if there is no such file."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except FileNotFoundError:
        return None


def read_json(path, made_by):
    """The dict in a JSON file; made_by is the command to run when it is missing."""
    try:
        content = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ScriptError(f"no {path}; run {made_by} first") from None
    except (OSError, ValueError) as error:
        raise ScriptError(f"{path} is not readable as JSON ({error}); run {made_by} again") from None
    if not isinstance(content, dict):
        raise ScriptError(f"{path} holds no JSON object; run {made_by} again")
    return content


def open_run(text):
    """(path, config.json as a dict) of a run directory that can be written to, from what the user typed."""
    run_dir = Path(text).expanduser()
    if run_dir.is_file():
        raise ScriptError(f"{run_dir} is a file; name the run directory, such as {run_dir.parent}")
    config = read_json(run_dir / "config.json", "python train.py")
    if config.get("dataset") not in ("cifar100", "synthetic") or not isinstance(config.get("args"), dict):
        raise ScriptError(f"{run_dir / 'config.json'} is not of train.py; name a run directory of python train.py")
    if not os.access(run_dir, os.W_OK):
        raise ScriptError(f"{run_dir} cannot be written to; copy it to a folder of yours")
    return run_dir, config


def recipe(config):
    """All that a run was trained with, but its seed."""
    return {key: value for key, value in config["args"].items() if key not in PLACES | {"seed"}}


def check_dataset(run_dir, dataset, asked):
    """The data set is the run's; --dataset may only repeat it."""
    if asked not in (None, dataset):
        raise ScriptError(f"{run_dir} was trained on {dataset}, not on --dataset {asked}; leave the flag out")


def check_torch():
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        reason = "before 2.6 a checkpoint can run code, CVE-2025-32434"
        raise ScriptError(f"torch {torch.__version__} is too old ({reason}); install torch 2.6 or newer")


def load_checkpoint(path):
    """The dict that train.py saved: tensors and plain Python only, on the CPU.

    Nothing in the file is executed (weights_only), and its CRC sums are compared first, which torch.load does
    not do: a flipped bit in a tensor would go unnoticed. Raises ScriptError for anything but an intact
    checkpoint of this project.
    """
    path = Path(path)
    if not path.is_file():
        raise ScriptError(f"no {path}; run python train.py first, or name the folder of a run that has it")
    check_torch()
    try:
        content = path.read_bytes()  # checked and loaded from the same bytes
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"wrong CRC in {damaged}")
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch raise anything from KeyError to UnicodeDecodeError here
        asks = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks to run {asks[1]}" if asks else (str(error).strip() or type(error).__name__).splitlines()[0]
        message = f"{path} is not a checkpoint of this project ({reason}); refused, nothing was executed"
        raise ScriptError(message) from None
    try:
        args = checkpoint["args"]
        sound = [
            checkpoint["format"] == 1,
            type(checkpoint["epoch"]) is int,
            args["dataset"] in ("cifar100", "synthetic"),
            all(type(args[key]) is int and args[key] >= 0 for key in ("width", "seed", "val_size")),
            1 <= args["width"] <= 1024,
            all(isinstance(tensor, torch.Tensor) for tensor in checkpoint["model"].values()),
        ]
    except (TypeError, KeyError, AttributeError, IndexError):
        sound = [False]
    if not all(sound):
        raise ScriptError(f"{path} is not a checkpoint of this version of train.py; train one with python train.py")
    return checkpoint


def load_weights(model, state, path):
    """Copy a checkpoint's weights into model, also from DataParallel or torch.compile, which prefix the names."""
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor for name, tensor in state.items()}
    own = model.state_dict()
    shapes, wanted = ({name: tuple(tensor.shape) for name, tensor in part.items()} for part in (state, own))
    wrong = [name for name in wanted | shapes if shapes.get(name) != wanted.get(name)]
    if wrong:
        some = f"{len(wrong)} tensors differ: {', '.join(wrong[:3])}"
        raise ScriptError(f"{path} is of another network ({some}); use a run of train.py")
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise ScriptError(f"{path} holds NaN or infinite weights; the run diverged, train again with a lower --lr")
    model.load_state_dict(state)


def load_array(path, made_by, again):
    """A .npy array, never unpickling; ScriptError if it is missing or unreadable, with the remedy for each."""
    try:
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("an archive of arrays")
        return array
    except FileNotFoundError:
        raise ScriptError(f"no {path}; run {made_by} first") from None
    except Exception as error:  # numpy raises EOFError, ValueError, MemoryError, SyntaxError... on damaged headers
        reason = "no .npy file, or pickled objects in it" if "pickle" in str(error) else type(error).__name__
        raise ScriptError(f"{path} is not readable as a NumPy array ({reason}); {again}") from None


def load_logits(run_dir, split):
    """(logits, labels) that evaluate.py saved for split "test" or "val": (N, 100) float64 and (N,) int64.

    Raises ScriptError for a wrong shape, dtype or value, and for files other than those that metrics.json was
    made from.
    """
    run_dir = Path(run_dir)
    paths = run_dir / f"{split}_logits.npy", run_dir / f"{split}_labels.npy"
    made_by = f"python evaluate.py {quote(run_dir)}"
    again = f"run {made_by} --refresh" if (run_dir / "best.pt").exists() else "restore it from where the run was made"
    logits, labels = (load_array(path, made_by, again) for path in paths)

    def require(valid, path, what):
        if not valid:
            raise ScriptError(f"{path} {what}; {again}")

    sound = logits.ndim == 2 and logits.shape[1] == 100 and len(logits) > 0 and logits.dtype.kind == "f"
    require(sound, paths[0], f"is {logits.dtype} {logits.shape}, floats (N, 100) are wanted")
    require(split != "test" or len(logits) == 10_000, paths[0], f"has {len(logits)} rows for the 10000 test images")
    sound = labels.shape == (len(logits),) and labels.dtype.kind in "iu"
    require(sound, paths[1], f"is {labels.dtype} {labels.shape}, integers ({len(logits)},) are wanted")
    require(labels.min() >= 0 and labels.max() < 100, paths[1], "has labels outside 0..99")
    bad_rows = np.flatnonzero(~np.isfinite(logits).all(1))
    require(len(bad_rows) == 0, paths[0], f"has a NaN or infinite value in row {next(iter(bad_rows), None)}")
    if (run_dir / "metrics.json").exists():
        known = read_json(run_dir / "metrics.json", made_by).get("sha256")
        for path in (*paths, run_dir / "best.pt"):
            expected = known.get(path.name) if isinstance(known, dict) else None
            if path.exists() and expected not in (None, sha256(path)):
                what = "is not the file that metrics.json was made from: damaged, or replaced since"
                raise ScriptError(f"{path} {what}; {again}" + ", or delete metrics.json" * ("restore" in again))
    if logits.min() >= 0 and np.abs(logits.sum(1, dtype=np.float64) - 1).max() < 1e-3:
        warn(f"{paths[0]} looks like probabilities, not logits: every confidence computed from it is too low")
    return logits.astype(np.float64), labels.astype(np.int64)


# ---- device ------------------------------------------------------------------------------------------------


def select_device(name):
    """torch.device for "auto", "cpu", "cuda", "cuda:N" or "mps", after one real operation on it.

    Makes float32 mean float32 from here on: by default, convolutions on an Ampere GPU keep 10 of its 23
    mantissa bits.
    """
    check_torch()
    found = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    found += ["mps"] * torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else found[-1]
    if name not in found and not (name == "cuda" and "cuda:0" in found):
        raise ScriptError(f"--device {name} is not here; this machine has {', '.join(found)}")
    device = torch.device(name)
    try:
        torch.ones(1, device=device).add(1).item()
    except RuntimeError as error:  # a P100 is "available" to a PyTorch that has no kernels for it
        reason = str(error).splitlines()[0]
        advice = "choose another GPU (Kaggle: T4) or --device cpu"
        raise ScriptError(f"{name} does not run this PyTorch ({reason}); {advice}", code=1) from None
    torch.backends.cudnn.allow_tf32 = False
    return device


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.backends.cpu.get_cpu_capability()})" if device.type == "cpu" else device.type


@torch.no_grad()
def predict(model, batches):
    """Logits (N, C) float32 of all batches (B, 3, 32, 32), in order, on the model's device, in eval mode."""
    model.eval()
    return torch.cat([model(images).float() for images in batches])


# ---- metrics -----------------------------------------------------------------------------------------------


def log_softmax(logits):
    """log softmax over the last axis in float64, where exp() of a row sums to 1 within 1e-15."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def confusion_matrix(labels, preds, num_classes):
    """Counts (C, C) int64, row = true class, column = predicted class, from two (N,) integer arrays."""
    labels, preds = np.asarray(labels, np.int64), np.asarray(preds, np.int64)
    counts = np.bincount(labels * num_classes + preds, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def macro_scores(confusion):
    """Unweighted means over the classes of precision, recall and F1, each in [0, 1].

    confusion: (..., C, C) counts, row = true class, column = predicted class; leading axes are kept. A
    precision, recall or F1 of 0/0 counts as 0, so the mean is always over C classes (scikit-learn:
    zero_division=0). Example: [[3, 1], [2, 4]] has precisions 3/5, 4/5, recalls 3/4, 4/6, and F1 6/9, 8/11.
    Raises ValueError if the matrix is not square.
    """
    confusion = np.asarray(confusion, np.float64)
    if confusion.ndim < 2 or confusion.shape[-1] != confusion.shape[-2]:
        raise ValueError(f"a confusion matrix is square, got shape {confusion.shape}")
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    return macro_scores_from_counts(hits, confusion.sum(-1), confusion.sum(-2))


def macro_scores_from_counts(hits, true_counts, predicted_counts):
    """macro_scores from (..., C) counts per class: right ones, images of the class, predictions of the class."""

    def mean_ratio(a, b):
        return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=b > 0).mean(-1)

    return (
        mean_ratio(hits, predicted_counts),
        mean_ratio(hits, true_counts),
        mean_ratio(2 * hits, true_counts + predicted_counts),
    )


def calibration_bins(confidence, num_bins=15):
    """Bin index (N,) int64 of each confidence: num_bins of equal width on (0, 1], closed on the right."""
    return np.digitize(confidence, np.linspace(0, 1, num_bins + 1)[1:-1], right=True)


def calibration_error(confidence, correct, num_bins=15):
    """Expected calibration error in [0, 1]: sum over bins of (n_b / N) |accuracy_b - mean confidence_b|.

    confidence: (N,) largest softmax probability. correct: (N,) bool. Guo et al., arXiv:1706.04599, equation
    3.
    """
    gaps = np.asarray(confidence, np.float64) - np.asarray(correct, np.float64)
    sums = np.bincount(calibration_bins(confidence, num_bins), weights=gaps, minlength=num_bins)
    return float(np.abs(sums).sum() / len(gaps))


def wilson_interval(hits, n):
    """95 % interval (low, high) of a proportion of hits in n > 0 trials; never empty, also at 0 and n. Wilson 1927."""
    z, p = 1.959964, hits / n
    center, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return np.maximum(center - half, 0) / (1 + z**2 / n), np.minimum((center + half) / (1 + z**2 / n), 1)


def mean_interval(values, resamples=2000):
    """(mean, low, high) of (N,) values but for NaN, with a 95 % bootstrap interval; None where there is none.

    Below 20 values only the mean: so few, drawn again and again, look too much alike.
    """
    values = values[~np.isnan(values)]
    if len(values) < FEWEST:
        return (float(values.mean()) if len(values) else None), None, None
    rng = np.random.default_rng(0)
    blocks = (rng.integers(0, len(values), (100, len(values))) for _ in range(resamples // 100))
    means = np.concatenate([values[block].mean(1) for block in blocks])
    return float(values.mean()), *np.quantile(means, [0.025, 0.975]).tolist()


def mcnemar(first, second):
    """Exact McNemar test of two (N,) bool arrays of correct answers: (only first right, only second right, p).

    p: how often chance would divide the images on which they differ at least as unevenly, if each were a fair coin.
    """
    b, c = int((first & ~second).sum()), int((~first & second).sum())
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1))
    return b, c, min(1.0, 2 * tail / 2 ** (b + c))


# ---- progress and figures ----------------------------------------------------------------------------------


class Progress:
    """A line on how far it is: redrawn twice a second on a terminal, a whole line every 30 s in a file or pipe."""

    def __init__(self):
        self.redraw = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.interval = 0.5 if self.redraw else 30.0  # seconds
        self.last = time.monotonic()

    def due(self):
        return time.monotonic() - self.last >= self.interval

    def show(self, text):
        self.last = time.monotonic()
        if self.redraw:
            width = shutil.get_terminal_size().columns - 1
            print("\r" + text[:width].ljust(width), end="", flush=True)
        else:
            print(text, flush=True)

    def clear(self):
        """Make room for a line that stays."""
        if self.redraw:
            print("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r", end="")


def track(items, what):
    """Yield the items of a sequence, showing how many are done and the time left."""
    progress, start = Progress(), time.monotonic()
    for done, item in enumerate(items):
        if done and progress.due():
            left = (time.monotonic() - start) / done * (len(items) - done)
            progress.show(f"{what} {done}/{len(items)}, {duration(left)} left")
        yield item
    progress.clear()


def duration(seconds):
    """42 s, 7 min 03 s or 4 h 31 min."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
    )


def new_figure(width, height, rows=1, columns=1, **kwargs):
    """(figure, axes) in inches, without pyplot: no window, no state, and a notebook's own plots are left alone."""
    if "matplotlib" not in sys.modules and "ipykernel" not in sys.modules:
        # `!python train.py` in Colab inherits the notebook's backend, which cannot be imported outside the
        # notebook.
        os.environ["MPLBACKEND"] = "agg"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **kwargs)


def save_figure(figure, path):
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=150))
