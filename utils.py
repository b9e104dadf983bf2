"""What two scripts or more share: metrics, errors, files, runs, devices, figures.

    from utils import load_model, macro_scores, confusion_matrix, calibration_error
    model = load_model("runs/baseline")     # the best network, in eval mode
    confusion = confusion_matrix(labels, preds, num_classes=100)
    precision, recall, f1 = macro_scores(confusion)

Importing this file has no side effect.
"""

import argparse
import contextlib
import csv
import errno
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
import textwrap
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from model import MODELS, make_model

BLUE, VERMILION, GRAY = "#0072B2", "#D55E00", "#999999"  # Okabe and Ito: colour-blind readers tell them apart
PLACES = {"data_dir", "data_url", "device", "output_dir", "resume", "quick", "command"}  # not of the recipe
NEWER_FLAGS = {"model": "resnet18", "mixup": 0.0, "cutmix": 0.0}  # of runs from before these flags
RANGES = {"seed": range(2**32), "epochs": range(1, 2**31), "width": range(1, 1025), "val_size": range(50_000)}  # int


# ---- metrics --------------------------------------------------------------------------------------------


def log_softmax(logits):
    """log softmax over the last axis in float64, where exp() of a row sums to 1 within 1e-15."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def confusion_matrix(labels, preds, num_classes):
    """Counts (C, C) int64, row = true class, column = predicted class, from two (N,) arrays of integers.

    Raises ValueError unless both are integers in 0..C-1 and equally many.
    """
    pairs = np.stack([labels, preds])  # ValueError unless they are equally long
    require(pairs.ndim == 2 and pairs.dtype.kind in "iu", "labels and preds must be (N,) integers")
    require(((pairs >= 0) & (pairs < num_classes)).all(), f"a class outside 0..{num_classes - 1}")
    labels, preds = pairs.astype(np.int64)
    return np.bincount(labels * num_classes + preds, minlength=num_classes**2).reshape(num_classes, num_classes)


def macro_scores(confusion):
    """Unweighted means over the classes of precision, recall and F1, each in [0, 1].

    confusion: (C, C) counts, row = true class, column = predicted class. A precision, recall or F1 of 0/0 counts as
    0, so the mean is always over C classes (scikit-learn: zero_division=0). Example: [[3, 1], [2, 4]] has precisions
    3/5, 4/5, recalls 3/4, 4/6, and F1 6/9, 8/11. Raises ValueError if the matrix is not square.
    """
    confusion = np.asarray(confusion, np.float64)
    square = confusion.ndim == 2 and confusion.shape[0] == confusion.shape[1]
    require(square, f"a confusion matrix is square, got shape {confusion.shape}")
    hits, true, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    ratios = (hits, predicted), (hits, true), (2 * hits, true + predicted)
    return tuple(float(np.divide(a, b, out=np.zeros(len(b)), where=b > 0).mean()) for a, b in ratios)


def calibration_bins(confidence, num_bins=15):
    """Bin index (N,) int64 of each confidence: num_bins of equal width on (0, 1], closed on the right."""
    return np.digitize(confidence, np.linspace(0, 1, num_bins + 1)[1:-1], right=True)


def calibration_error(confidence, correct, num_bins=15):
    """Expected calibration error in [0, 1]: sum over bins of (n_b / N) |accuracy_b - mean confidence_b|.

    confidence: (N,) largest softmax probability. correct: (N,) bool. Guo et al., arXiv:1706.04599, equation 3.
    n_b cancels: n_b (accuracy_b - mean confidence_b) is the sum of (correct - confidence) over the bin.
    """
    gaps = np.asarray(confidence, np.float64) - np.asarray(correct, np.float64)
    sums = np.bincount(calibration_bins(confidence, num_bins), weights=gaps, minlength=num_bins)
    return float(np.abs(sums).sum() / len(gaps))


def wilson_interval(hits, n):
    """95 % interval (low, high) of a proportion of hits in n > 0 trials, also at 0 and n. Wilson 1927."""
    z, p = 1.959964, hits / n
    center, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = (center - half) / (1 + z**2 / n), (center + half) / (1 + z**2 / n)
    return np.clip(low, 0, p), np.clip(high, p, 1)  # at 0 and n rounding must not cross the proportion


# ---- errors and the command line ------------------------------------------------------------------------


class ScriptError(Exception):
    """One line for the user: what is wrong; what to do. code: the exit status, as in run_script()."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


def require(condition, reason):
    """ValueError(reason) unless the condition holds."""
    if not condition:
        raise ValueError(reason)


def plain(text):
    """A text without control characters, which could move the cursor or colour the terminal."""
    return "".join(character for character in str(text) if character.isprintable())


def warn(message):
    print(f"warning: {plain(message)}", file=sys.stderr, flush=True)


def quote(path):
    """A path as one writes it on a command line."""
    return shlex.quote(plain(Path(path).as_posix()))


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        silent = action.default in (None, []) or action.default is False  # "(default: None)" tells nobody anything
        return action.help if silent else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with a script's docstring and the defaults in --help, and without abbreviations.

    A mistake raises ScriptError, which in a notebook is an ordinary exception, instead of SystemExit. parse_args(None)
    takes no arguments: sys.argv there is that of the notebook's kernel.
    """

    def __init__(self, script, docstring):
        options = {"formatter_class": HelpFormatter, "allow_abbrev": False}
        super().__init__(prog=Path(script).name, description=docstring, **options)

    def parse_args(self, argv):
        return super().parse_args([str(word) for word in argv or ()])

    def error(self, message):
        raise ScriptError(f"{message}; python {self.prog} --help lists the arguments")


def add_common_flags(parser, device=True):
    where = "folder with CIFAR-100, at most two levels down (default: data, or as in training)"
    parser.add_argument("--data-dir", metavar="DIR", help=where)
    if device:
        which = "auto, cpu, cuda, cuda:N or mps; auto takes a GPU if there is one"
        parser.add_argument("--device", default="auto", help=which)


def run_script(main):
    """Run main() as a script does: one line on stderr instead of a traceback, and a telling exit status.

    0: done. 2: a wrong argument or input file. 1: network, disk, memory or divergence. 130: Ctrl-C. 143: SIGTERM.
    A bug in these scripts still shows its traceback.
    """

    def stop(signum, frame):
        for other in (signal.SIGINT, signal.SIGTERM):  # a second Ctrl-C must not interrupt the clean-up
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt("SIGTERM") if signum == signal.SIGTERM else KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)  # by default SIGTERM ends Python without running any `finally`
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks
    try:
        try:
            main(sys.argv[1:])
        finally:
            if sys.stdout:  # None if it was closed
                sys.stdout.flush()  # before the line of an error; a closed pipe is noticed here
        return
    except ScriptError as error:
        message, code = str(error), error.code
    except KeyboardInterrupt as interrupt:
        message, code = "stopped", 143 if interrupt.args else 130
    except BrokenPipeError:  # `python evaluate.py ... | head`: quiet, as a program that SIGPIPE ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        where, what = error.filename or "the system", error.strerror or error
        message, code = f"{where}: {what}; what was saved is intact", 1
    except (MemoryError, RuntimeError) as error:  # cuDNN without memory finds no "engine" or "algorithm"
        if not re.search("(?i)alloc|memoryerror|out of memory|find an engine|valid cuDNN algorithm", repr(error)):
            raise
        message, code = "out of memory; use another --device (to train: a smaller --batch-size)", 1
    print(f"{Path(sys.argv[0]).name}: error: {plain(message)}", file=sys.stderr)
    sys.exit(code)


# ---- files ----------------------------------------------------------------------------------------------


def write_file(path, content):
    """Write bytes: a kill leaves the old file or the new one. Returns whether the content is new.

    An equal file is left alone, so scoring a published run again leaves a clone clean. A link's target is written.
    """
    path = Path(os.path.realpath(path))
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if path.is_file() and path.read_bytes() == content:
            return False
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            try:
                os.fsync(file.fileno())  # on the disk, before its name points to it
            except OSError as error:  # some network drives cannot
                if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
                    raise
        os.replace(partial, path)
        return True
    except OSError as error:
        advice = "free some space or use another folder"
        raise ScriptError(f"cannot write {path} ({error.strerror or error}); {advice}", code=1) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def rounded(value):
    """A JSON value with six significant digits in every float, and null for NaN and infinity."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [rounded(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}") + 0.0 if math.isfinite(value) else None  # + 0.0: never -0.0
    return value.item() if isinstance(value, np.generic) else value


def write_json(path, content):
    write_file(path, (json.dumps(rounded(content), indent=2) + "\n").encode())


def write_csv(path, rows, columns=None):
    """A header and one line per dict; columns: the header, if rows may be empty. Returns whether it is new."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rounded(rows))
    return write_file(path, text.getvalue().encode())


def write_npy(path, array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_file(path, buffer.getbuffer())


def sha256(path):
    """Hex digest of a file, or None if there is no such file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else None


@contextlib.contextmanager
def reading(path, made_by, what):
    """The bytes of a file, to be parsed in the `with` block; ScriptError in one line if it is missing or damaged.

    made_by: the command that makes the file. what: the content expected, such as "a list of failures". The block
    may raise anything: on damaged files json, csv, zip, NumPy and torch raise KeyError to UnicodeDecodeError.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise ScriptError(f"no {path}; run {made_by} first") from None
    except OSError as error:
        raise ScriptError(f"{path} cannot be read ({error.strerror}); it should be {what}") from None
    try:
        yield content
    except ScriptError:  # of another file that is read in the block
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ScriptError(f"{path} is not {what} ({reason}); run {made_by} again") from None


def read_csv(path, made_by, what, columns):
    """The rows of a CSV file as dicts. columns: {name: type} that must be there; the others are text."""
    with reading(path, made_by, what) as content:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig")))  # spreadsheets begin it with a BOM
        missing = columns.keys() - set(reader.fieldnames or ())
        require(not missing, f"it lacks {', '.join(sorted(missing))}")
        rows = list(reader)
        require(all(None not in row and None not in row.values() for row in rows), "a row is cut short or too long")
        return [row | {name: kind(row[name]) for name, kind in columns.items()} for row in rows]


def read_npy(path, made_by, what, shape, kinds, wrong=lambda array: [], digest=None):
    """A .npy array, never unpickling, of this shape (None: any length) and a dtype of these kinds ("iu": integers).

    wrong(array): which rows have a value that cannot be. digest: the file's SHA-256, if it is known.
    """
    with reading(path, made_by, what) as content:
        same = digest in (None, hashlib.sha256(content).hexdigest())
        require(same, "damaged or replaced: metrics.json was made from another one")
        array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)  # np.load would take other formats
        fits = array.size > 0 and array.shape[1:] == shape[1:] and shape[0] in (None, len(array))
        require(fits and array.dtype.kind in kinds, f"{array.dtype} {array.shape} instead of {kinds} {shape}")
        rows = np.flatnonzero(wrong(array))
        require(len(rows) == 0, f"a NaN, an infinity or a label outside 0..99 in row {rows[:1]}")
        return array


# ---- runs -----------------------------------------------------------------------------------------------


def last_run():
    """The run in runs/ that was trained last, by its best.pt; its name is the first line printed."""
    found = sorted(Path("runs").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ScriptError("no RUN given, and no trained run in runs/; run python train.py first")
    run_dir = found[-1].parent
    print(f"{quote(run_dir)}, which was trained last")
    return run_dir


def open_run(text, writable=True):
    """(path, config.json as a dict) of the run that the user typed; None: last_run(). writable: must it be?"""
    run_dir = Path(os.path.expanduser(text)) if text is not None else last_run()
    if run_dir.is_file():
        raise ScriptError(f"{run_dir} is a file; name the run directory, such as {run_dir.parent}")
    inside = [] if (run_dir / "config.json").exists() else sorted(run_dir.glob("*/config.json"))
    if inside:
        runs = " ".join(quote(path.parent) for path in inside)
        raise ScriptError(f"{run_dir} is no run, but holds some; name those you mean: {runs}")
    with reading(run_dir / "config.json", "python train.py", "the config.json of a run") as content:
        config = json.loads(content)
        args = NEWER_FLAGS | config["args"]
        require(config["dataset"] in ("cifar100", "synthetic"), "no known data set")
        require(args["model"] in MODELS, f"no model {args['model']!r} here")
        require(isinstance(args.get("smoothing", 0.0), (int, float)), f"smoothing is {args.get('smoothing')!r}")
        for flag, allowed in RANGES.items():
            value = args.get(flag, allowed[-1])
            require(type(value) is int and value in allowed, f"{flag} is {value!r}")
    if writable and not os.access(run_dir, os.W_OK):
        raise ScriptError(f"{run_dir} cannot be written to; copy it to a folder of yours")
    return run_dir, config


def short_names(folders):
    """A name for each run directory: its own, or where two have the same, its path below the folder they share."""
    paths = [Path(folder).resolve() for folder in folders]
    names = [path.name for path in paths]
    if len(set(names)) < len(set(paths)):
        names = [path.relative_to(os.path.commonpath(paths)).as_posix() for path in paths]
    return [plain(name) for name in names]


def recipe(config):
    """All that a run was trained with, but its seed: {flag: value}."""
    args = NEWER_FLAGS | config["args"]
    return {flag: value for flag, value in args.items() if flag not in PLACES | {"seed"}}


def dataset_of(config, args):
    """(dataset, data_dir) of a run: the user's --data-dir, else the folder that the run remembers, else data."""
    remembered = str(config["args"].get("data_dir") or "data")
    reached = os.path.exists(remembered)  # False also where it may not be looked
    return config["dataset"], args.data_dir or (remembered if reached else "data")


def data_flag(args):
    """The --data-dir that was given, for the command to run next."""
    return f" --data-dir {quote(args.data_dir)}" if args.data_dir else ""


def check_torch():
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        reason = "before 2.6 a checkpoint can run code, CVE-2025-32434"
        raise ScriptError(f"torch {torch.__version__} is too old ({reason}); install torch 2.6 or newer")


def load_checkpoint(path):
    """The dict that train.py saved, tensors on the CPU, with the SHA-256 of these bytes under "sha256".

    Nothing in the file is executed (weights_only). Its CRC sums are compared first, which torch.load does not do: a
    flipped bit in a tensor would go unnoticed.
    """
    check_torch()
    with reading(path, "python train.py", "a checkpoint of this project") as content:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
            require(stored, "compressed, which torch does not do")  # 4 MB could unpack to 8 GB
            damaged = archive.testzip()
        require(not damaged, f"wrong CRC in {damaged}")
        try:
            checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # torch's own text advises to switch the protection off
            asks = re.search(r"GLOBAL (\S+)", str(error))
            raise ValueError(f"it asks to run {asks[1]}, refused" if asks else type(error).__name__) from None
        require(checkpoint["format"] == 1 and type(checkpoint["epoch"]) is int, "another version of train.py")
        digest = hashlib.sha256(content).hexdigest()
        return checkpoint | {"args": NEWER_FLAGS | checkpoint["args"], "sha256": digest}


def load_weights(model, state, path, assign=False):
    """Put a checkpoint's weights into model. assign: the tensors themselves, into a model that has no memory yet."""
    try:
        model.load_state_dict(state, assign=assign)  # compares names and shapes
        finite = all(tensor.isfinite().all() for tensor in model.state_dict().values())
    except (AttributeError, RuntimeError, TypeError) as error:  # names every tensor that is missing or does not fit
        some = textwrap.shorten(str(error), 160, placeholder=" ...")
        raise ScriptError(f"{path} belongs to another network ({some}); use a run of train.py") from None
    if not finite:
        raise ScriptError(f"{path} holds NaN or infinite weights; train again with a lower --lr")


def load_best(run, device):
    """(network, checkpoint) of a run's best.pt: the network with its weights, on the device, in eval mode."""
    run_dir, config = open_run(run, writable=False)
    path, args = run_dir / "best.pt", NEWER_FLAGS | config["args"]
    checkpoint = load_checkpoint(path)
    for flag, value in rounded(checkpoint["args"]).items():  # config.json has six digits
        if flag not in PLACES and value != args.get(flag):
            was = f"--{flag.replace('_', '-')} {value}, config.json says {args.get(flag)}"
            raise ScriptError(f"{path} belongs to another run ({was}); put its own best.pt back")
    with torch.device("meta"):  # shapes without memory: a file cannot make it larger than itself
        model = make_model(args["model"], width=args["width"])
    load_weights(model, checkpoint["model"], path, assign=True)
    model = model.float().to(device, memory_format=memory_format(device))
    return model.eval(), checkpoint | {"args": args}


def load_model(run, device="cpu"):
    """The best network of a run, in eval mode: load_model("runs/baseline")(normalize(images)) gives logits (N, 100)."""
    return load_best(run, device)[0]


def recorded_checksums(run_dir):
    """{file: SHA-256} in metrics.json: of best.pt and of the arrays that it was made from."""
    path, made_by = Path(run_dir) / "metrics.json", f"python evaluate.py {quote(run_dir)}"
    with reading(path, made_by, "the scores of a run") as content:
        known = json.loads(content)["sha256"]
        require(isinstance(known, dict), "no checksums")
        return known


def load_logits(run_dir, split):
    """(logits, labels) that evaluate.py saved for split "test" or "val": (N, 100) float64 and (N,) int64.

    Raises ScriptError for a wrong shape, dtype or value, and for other files than metrics.json was made from.
    """
    run_dir, made_by = Path(run_dir), f"python evaluate.py {quote(run_dir)}"
    known = recorded_checksums(run_dir) if (run_dir / "metrics.json").exists() else {}

    def load(kind, *demands):
        name = f"{split}_{kind}.npy"
        return read_npy(run_dir / name, made_by, f"the {kind} of a run", *demands, digest=known.get(name))

    logits = load("logits", (10_000 if split == "test" else None, 100), "f", lambda array: ~np.isfinite(array).all(1))
    labels = load("labels", (len(logits),), "iu", lambda array: (array < 0) | (array > 99))
    return logits.astype(np.float64), labels.astype(np.int64)


def checkpoint_id(run_dir):
    """SHA-256 of the best.pt that a run's logits come from, by metrics.json; files made from them carry it.

    A published run keeps it without its best.pt. Raises ScriptError if best.pt has changed since.
    """
    known, now = recorded_checksums(run_dir).get("best.pt"), sha256(Path(run_dir) / "best.pt")
    if now not in (None, known):
        again = f"run python evaluate.py {quote(run_dir)} again"
        raise ScriptError(f"{run_dir}: best.pt has changed since its logits were saved; {again}")
    return known


# ---- device ---------------------------------------------------------------------------------------------


def select_device(name):
    """torch.device for "auto", "cpu", "cuda", "cuda:N" or "mps", after one real operation on it.

    From here on float32 means float32: by default an Ampere GPU's convolutions keep 10 of 23 mantissa bits.
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
    except (RuntimeError, AssertionError) as error:  # a P100 is "available" to a PyTorch without kernels for it
        reason, advice = str(error).splitlines()[0], "choose another GPU (Kaggle: T4) or --device cpu"
        raise ScriptError(f"{name} does not run this PyTorch ({reason}); {advice}", code=1) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.9 warns that this name will change
        torch.backends.cudnn.allow_tf32 = False
    return device


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.backends.cpu.get_cpu_capability()})" if device.type == "cpu" else device.type


def select_precision(amp, device):
    """(dtype, reason): the dtype for torch.autocast, None for float32, and why.

    Hardware without bfloat16 emulates it, several times slower than float32; torch.cuda.is_bf16_supported()
    counts that as support. float16 needs a GradScaler: gradients below 6e-8 would become zero.
    """
    fast, reason, name = "off", "no half precision is known to be fast and safe here", device_name(device)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            fast, reason = "bf16", "fast on this GPU"
        elif capability >= (7, 0) and not re.search(r"GTX 16|MX[45]50\b|\bT(400|500|550|600|1000|1200|2000)\b", name):
            # those compute NaN: github.com/pytorch/pytorch/issues/77955
            fast, reason = "fp16", "this GPU has no bfloat16"
    elif device.type == "cpu" and Path("/proc/cpuinfo").exists():  # on Linux
        if re.search(r"\b(avx512_bf16|amx_bf16)\b", Path("/proc/cpuinfo").read_text()):  # ARM's lacks fast gradients
            fast, reason = "bf16", "fast on this CPU"
    possible = {"off", fast, "fp16"} if device.type == "cuda" else {"off", fast}
    if amp not in possible | {"auto"}:
        raise ScriptError(f"--amp {amp} is not for {name}; choose {', '.join(sorted(possible))}, or leave it out")
    if amp != "auto":
        fast, reason = amp, "as asked"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[fast], reason


def memory_format(device):
    """channels_last, which convolutions are faster in, but not on Apple's GPUs.

    There batch norm's gradients are wrong in that format (github.com/pytorch/pytorch/issues/175189).
    """
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last


@torch.no_grad()
def predict(model, batches):
    """Logits (N, C) float32 of all batches (B, 3, 32, 32), in order, on the model's device. It stays in eval mode."""
    model.eval()
    return torch.cat([model(images).float() for images in batches])


# ---- progress and figures -------------------------------------------------------------------------------


def on_terminal():
    return getattr(sys.stdout, "isatty", bool)()  # a notebook's stand-in may lack it


def track(items, what, note=None, later=0):
    """Yield the items of a sequence, with a progress line: redrawn twice a second, in a file or pipe every 30 s.

    note: what to add, a function of the items done and the seconds they took. later: items that come after these.
    """
    redraw, start = on_terminal(), time.monotonic()
    width, shown = shutil.get_terminal_size().columns - 1, start
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - shown >= (0.5 if redraw else 30):
            more = f"{note(done, now - start)}, " if note else ""
            left = (now - start) / done * (len(items) - done + later)
            text, shown = f"{what} {done}/{len(items)}: {more}{duration(left)} left", now
            # What comes next, an error too, overwrites the line.
            print(f"\r{text[:width]:<{width}}\r" if redraw else text, end="" if redraw else "\n", flush=True)
        yield item
    if redraw:
        print(f"{'':<{width}}\r", end="", flush=True)


def duration(seconds):
    """4:31:10: hours, minutes, seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def new_figure(width, height, rows=1, columns=1, title=None, **kwargs):
    """(figure, axes) in inches, without pyplot: no window, no state; a notebook's own plots stay."""
    if "matplotlib" not in sys.modules and "ipykernel" not in sys.modules:
        # `!python train.py` in Colab inherits the notebook's backend, which cannot be imported outside it.
        os.environ["MPLBACKEND"] = "agg"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure._repr_png_ = lambda: png(figure)  # so a notebook shows it where it ends a cell
    if title:
        figure.suptitle(title.replace("$", r"\$"))  # in a run's name it begins no formula
    return figure, figure.subplots(rows, columns, **kwargs)


def png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def save_figure(path, draw, *args):
    """Write draw(*args), a Figure, as a PNG; returns whether it did. Any failure is one warning, and stops nothing."""
    try:
        write_file(path, png(draw(*args)))
        return True
    except Exception as error:  # a broken matplotlibrc, LaTeX that is missing, a full disk
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warn(f"no {Path(path).name}: {reason}")
        with contextlib.suppress(OSError):
            Path(path).unlink()  # it shows what was
        return False
