"""Train a network on CIFAR-100 from scratch.

    python train.py --quick           # two minutes: runs/[synthetic-]quick
    python train.py                   # plain cross-entropy: runs/baseline
    python train.py --smoothing 0.1   # the one modification: runs/smoothing0.1
    python train.py --resume          # continue a run that was stopped

The run directory runs/<name>, named after the flags off their defaults, gets
config.json, log.csv (a row an epoch), curves.png, last.pt (the last epoch, for
--resume) and best.pt (the weights of the best validation epoch, for --resume,
evaluate.py and gradcam.py). 10,000 of the 50,000 training images are held out
for validation; the test set is not touched. A resumed run is bit-identical to
one without a stop on a CPU with as many threads, on a GPU by --deterministic.
"""

import contextlib
import ctypes
import io
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import utils
from data import TITLES, augment, epoch_plan, find_cifar100, load_dataset, mix, mix_plan, normalize, pad
from data import split_id, split_train_val
from model import MODELS, make_model
from utils import ScriptError, duration, require

STUDY = {"epochs": 40, "lr": 0.01, "weight_decay": 5e-4, "width": 64, "limit": None}  # the defaults,
QUICK = {"epochs": 4, "lr": 0.1, "width": 16, "limit": 10_000}  # those of --quick,
ADAMW = {"lr": 1e-3, "weight_decay": 0.05}  # and those of --model cct


# ---- the recipe -----------------------------------------------------------------------------------------


def lr_at(step, total_steps, warmup_steps, peak):
    """Learning rate of one optimizer step, counted from 0: linear up to peak, then a cosine down to zero.

    A plain function of the step: nothing to save, nothing to restore. At step warmup_steps - 1 it is the peak.
    Loshchilov and Hutter, arXiv:1608.03983, without restarts; warmup as in Goyal et al., arXiv:1706.02677.
    """
    if step < warmup_steps:
        return peak * ((step + 1) / warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))


def make_optimizer(model, lr, momentum, weight_decay, adamw=False):
    """SGD with Nesterov momentum, or AdamW, as one fused kernel on CPU and CUDA.

    The state begins with zeros: if float16 overflows in the first step, fused SGD would take uninitialised memory. So
    restore() also knows the shapes.
    """
    parameters = list(model.parameters())
    fused = parameters[0].device.type in ("cpu", "cuda")  # also spares a wait for the GradScaler's check
    options = {"lr": lr, "weight_decay": weight_decay, "fused": fused}
    if adamw:
        optimizer = torch.optim.AdamW(parameters, betas=(momentum, 0.999), **options)
    else:
        optimizer = torch.optim.SGD(parameters, momentum=momentum, nesterov=True, **options)
    for parameter in parameters:
        names = ("exp_avg", "exp_avg_sq") if adamw else ("momentum_buffer",)
        optimizer.state[parameter] = {name: torch.zeros_like(parameter) for name in names}
        if adamw:
            optimizer.state[parameter]["step"] = torch.zeros((), device=parameter.device if fused else "cpu")
    return optimizer


def train_epoch(args, epoch, images, labels, net, optimizer, scaler, mixed_precision):
    """One epoch, counted from 1; returns (mean loss of its steps, accuracy) on its augmented images.

    images: (N, 40, 40, 3) uint8, padded; labels: (N,) int64; both on the device of net. The incomplete last batch is
    dropped: its step would be as long as any other, its gradient noisier. Each epoch leaves out other images.
    """
    steps = len(images) // args.batch_size
    total_steps, warmup_steps = args.epochs * steps, round(args.warmup_epochs * steps)
    order, offsets, flips = [part.to(images.device) for part in epoch_plan(args.seed, epoch, len(images))]
    mixing = args.mixup > 0 or args.cutmix > 0
    mixes = mix_plan(args.seed, epoch, steps, args.mixup, args.cutmix) if mixing else None
    loss_sum, hits = torch.zeros((2,), device=images.device)  # summed there: .item() waits for the device
    net.train()

    def note(done, seconds):  # .item() waits for the device: twice a second at most
        return f"loss {loss_sum.item() / done:.3f}, {done * args.batch_size / seconds:,.0f} images/s"

    for i in utils.track(range(steps), f"epoch {epoch}/{args.epochs}, step", note, (args.epochs - epoch) * steps):
        optimizer.param_groups[0]["lr"] = lr_at((epoch - 1) * steps + i, total_steps, warmup_steps, args.lr)
        batch = slice(i * args.batch_size, (i + 1) * args.batch_size)
        inputs = augment(images, order[batch], offsets[batch], flips[batch])  # (B, 3, 32, 32)
        targets = labels[order[batch]]  # (B,)
        if mixing:
            inputs, targets = mix(inputs, targets, *mixes[i])  # targets (B, 100)
        with mixed_precision:
            logits = net(inputs)  # (B, 100)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=args.smoothing)
        optimizer.zero_grad()
        scaler.scale(loss).backward()  # a disabled scaler changes nothing
        scaler.step(optimizer)
        scaler.update()
        loss_sum += loss.detach()
        true = targets.argmax(1) if mixing else targets  # of a mixed image the dominant label
        hits += (logits.argmax(1) == true).sum()
    return loss_sum.item() / steps, hits.item() / (steps * args.batch_size)


def validate(model, images, labels, mixed_precision):
    """(cross-entropy without smoothing, so that runs compare; accuracy) on (N, 32, 32, 3) uint8 images."""
    with mixed_precision:
        size = 500 if images.is_cuda else 128  # a GPU likes few launches, a CPU its cache
        logits = utils.predict(model, map(normalize, images.split(size)))  # (N, 100)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).sum().item() / len(labels)


def fit(args, device, precision, run_dir, checkpoint):
    """Train until the last epoch or early stopping; returns the rows of log.csv. checkpoint: of load_last()."""
    configure(device, args.deterministic)
    train_set, val_set, split = load_split(args, device)
    if checkpoint.get("split", split) != split:
        raise ScriptError(f"{run_dir}: this NumPy splits images differently; resume with the version in config.json")
    torch.manual_seed(args.seed)
    model = make_model(args.model, width=args.width).to(device, memory_format=utils.memory_format(device))
    net = torch.compile(model) if args.compile else model  # the same weights; `model` is what is saved
    optimizer = make_optimizer(model, args.lr, args.momentum, args.weight_decay, adamw=args.model == "cct")
    dtype, reason = precision
    mixed_precision = torch.autocast(device.type, dtype, enabled=dtype is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    precision_name = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32"}[dtype]
    setup = {"device": utils.device_name(device), "precision": precision_name, "threads": torch.get_num_threads()}
    setup |= {"torch": str(torch.__version__), "numpy": np.__version__}  # all that decides the bits but the arguments
    config = {"command": args.command, "args": vars(args), "dataset": args.dataset, **setup}
    config["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    config |= {"train_images": len(train_set[1]), "val_images": len(val_set[1]), "finished": False}
    announce(run_dir, args, config, reason)
    history = checkpoint["history"]
    if history:
        restore(checkpoint, run_dir / "last.pt", setup, model, optimizer, scaler)
    utils.write_json(run_dir / "config.json", config)
    print(HEADER, flush=True)

    images_per_epoch = len(train_set[1]) // args.batch_size * args.batch_size
    for epoch in range(len(history) + 1, args.epochs + 1):
        begin = time.monotonic()
        training = train_epoch(args, epoch, *train_set, net, optimizer, scaler, mixed_precision)
        speed = images_per_epoch / max(time.monotonic() - begin, 1e-3)  # a coarse clock may not have moved
        validation = validate(model, *val_set, mixed_precision)
        if not math.isfinite(training[0] + validation[0]):  # before it overwrites a good checkpoint
            ways = "try a lower --lr, or with fp16 --amp off"
            raise ScriptError(f"training diverged (loss is NaN or infinite) in epoch {epoch}; {ways}", code=1)
        lr = optimizer.param_groups[0]["lr"]  # of the epoch's last step
        seconds = round(time.monotonic() - begin, 2)
        row = dict(zip(COLUMNS, (epoch, lr, *training, *validation, seconds, round(speed, 1))))
        history = [*history, row]
        best = best_of(history)
        stop_early = epoch < args.epochs and 0 < args.patience <= epoch - best["epoch"]

        # last.pt first: after a kill in between, check_best() writes best.pt
        content = {"format": 1, "args": without_places(vars(args)), "epoch": epoch, "split": split}
        content |= {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        content |= {"setup": setup, "history": history, "finished": epoch == args.epochs or stop_early}
        save_checkpoint(run_dir / "last.pt", content)
        if best is row:
            save_best(run_dir, content)
        write_log(run_dir, args, history, curves=seconds > 5)  # drawing takes 0.3 s
        print(epoch_line(row, best, args.epochs), flush=True)
        if stop_early:
            print(f"no better validation accuracy in {args.patience} epochs: stopping early")
            break
    return history


def configure(device, deterministic):
    """Settings of the whole process."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # older torch reads it once, as cuBLAS starts
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # filling each new tensor costs 12 to 15 %
    torch.backends.cudnn.benchmark = not deterministic  # it picks algorithms by timing them

    # glibc returns the memory of a large tensor to the system at once, and every new one costs page faults.
    # Keeping it makes training on a CPU 5 to 15 % faster, for up to a tenth more memory.
    if device.type == "cpu" and sys.platform == "linux":
        for option, value in ((-4, 0), (-1, -1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            ctypes.CDLL(None).mallopt(option, value)


def load_split(args, device):
    """(images, labels) to train on, padded, and (images, labels) held out, on the device; the split's checksum."""
    images, labels = load_dataset(args.dataset, args.data_dir, train=True, download=True, url=args.data_url)
    train_index, val_index = split_train_val(labels, args.val_size, args.seed)
    train_index = train_index[: args.limit]
    train_set = pad(images[train_index]).to(device), labels[train_index].to(device)
    val_set = images[val_index].to(device), labels[val_index].to(device)
    return train_set, val_set, split_id(val_index)


# ---- what is printed ------------------------------------------------------------------------------------

HEADER = """\
                     training    validation         best
  epoch      lr   loss      %   loss      %      % epoch images/s  left"""


def epoch_line(row, best, epochs):
    """One row of the log for the screen, under HEADER. best: the row of the best epoch so far."""
    left = duration((epochs - row["epoch"]) * row["seconds"])
    return (
        f"{row['epoch']:>3}/{epochs:<3} {row['lr']:7.5f} {row['train_loss']:6.3f} {100 * row['train_acc']:6.2f} "
        f"{row['val_loss']:6.3f} {100 * row['val_acc']:6.2f} {100 * best['val_acc']:6.2f} {best['epoch']:5} "
        f"{row['images_per_second']:8,.0f}  {left}"
    )


def announce(run_dir, args, config, reason):
    """What is trained, where and how."""
    print(f"{TITLES[args.dataset]}: {config['train_images']:,} training, {config['val_images']:,} validation images")
    print(f"{MODELS[args.model]}: {config['parameters']:,} parameters, at most {args.epochs} epochs")
    print(f"{config['device']}, torch {config['torch']}, CPU threads: {config['threads']}")
    print(f"{config['precision']}: {reason}")
    print(f"run directory: {utils.plain(run_dir)}")
    if args.mixup or args.cutmix:
        print("images are mixed: the training accuracy is that of their dominant labels")
    if config["device"].startswith("cpu") and args.width > 16 and args.model == "resnet18":
        print("a CPU may need many hours; for a first look: python train.py --quick")
        print("the same study in 20 minutes a run: --width 16 --lr 0.1")


def draw_curves(name, args, history):
    """A Figure: loss and accuracy by epoch. Runs of as many epochs have the same ranges, to be compared by eye."""
    title = f"Training {MODELS[args.model]} on {TITLES[args.dataset]}: {utils.plain(name)}"
    figure, panels = utils.new_figure(10, 4, 1, 2, title)
    parts = (
        ("loss", 1, 4.7, "cross-entropy (nats)", ", smoothed" if args.smoothing else ""),  # a guess: ln(100)
        ("acc", 100, 100, "accuracy (%)", ", dominant label" if args.mixup or args.cutmix else ""),
    )
    epochs, best = [row["epoch"] for row in history], best_of(history)["epoch"]
    for axes, (key, scale, top, label, how) in zip(panels, parts):
        train_values = [scale * row[f"train_{key}"] for row in history]
        val_values = [scale * row[f"val_{key}"] for row in history]
        axes.plot(epochs, train_values, "-o", color=utils.BLUE, label=f"training, augmented{how}", markersize=3)
        axes.plot(epochs, val_values, "--o", color=utils.VERMILION, label="validation", markersize=3)
        axes.axvline(best, color=utils.GRAY, linestyle=":", label=f"best validation accuracy: epoch {best}")
        axes.set(xlabel="epoch", ylabel=label, xlim=(0.5, args.epochs + 0.5), ylim=(0, top))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    return figure


# ---- a run directory ------------------------------------------------------------------------------------

ELSEWHERE = "use another --output-dir"
COLUMNS = "epoch lr train_loss train_acc val_loss val_acc seconds images_per_second".split()  # of log.csv


def exclusive(run_dir):
    """An open lock file in run_dir: until it is closed, or its process ends, a second process is refused."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(run_dir / ".lock", "a")  # never emptied: it may be a link
    except OSError as error:
        raise ScriptError(f"{run_dir}: {error.strerror}; {ELSEWHERE}") from None
    with contextlib.suppress(ImportError, OSError):  # Windows has no fcntl, and some network drives have no locks
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ScriptError(f"another process is training in {run_dir}; wait for it, or {ELSEWHERE}") from None
    return file


def best_of(history):
    """The row of the epoch with the best validation accuracy, the first of equals."""
    return max(history, key=lambda row: row["val_acc"])


def without_places(args):
    """The arguments that make a run, without those that say where: a checkpoint may be published."""
    return {flag: value for flag, value in args.items() if flag not in utils.PLACES}


def save_checkpoint(path, content):
    buffer = io.BytesIO()  # in memory first: torch hides the reason when a write fails
    torch.save(content, buffer)
    utils.write_file(path, buffer.getbuffer())


def save_best(run_dir, checkpoint):
    """best.pt from a last.pt whose epoch is the best so far."""
    content = {key: checkpoint[key] for key in ("format", "args", "epoch", "split", "model")}
    save_checkpoint(run_dir / "best.pt", content | {"val_acc": checkpoint["history"][-1]["val_acc"]})


def write_log(run_dir, args, history, curves=True):
    """log.csv and curves.png. A failure only warns: a spreadsheet on Windows locks the file it shows."""
    try:
        utils.write_csv(run_dir / "log.csv", history)
    except ScriptError as error:
        utils.warn(str(error))
    if curves:
        utils.save_figure(run_dir / "curves.png", draw_curves, run_dir.resolve().name, args, history)


def load_last(run_dir, args):
    """The checkpoint to continue from, or one without epochs where none was saved. Never overwrites or mixes runs."""
    path = run_dir / "last.pt"
    saved = [name for name in ("last.pt", "best.pt", "log.csv") if (run_dir / name).exists()]
    if not saved:
        if args.resume:
            print("nothing to resume yet, starting from the beginning")
        return {"history": [], "finished": False}
    if "last.pt" not in saved:
        raise ScriptError(f"{run_dir} has a {saved[0]} but no last.pt to continue from; {ELSEWHERE}")
    if not args.resume:
        raise ScriptError(f"{run_dir} already holds a run; add --resume to continue it, or {ELSEWHERE}")
    checkpoint, now = utils.load_checkpoint(path), without_places(vars(args))
    if "history" not in checkpoint:
        raise ScriptError(f"{path} has weights only, as a best.pt; {ELSEWHERE}")
    for flag, value in now.items():
        then = checkpoint["args"].get(flag)
        if then != value:
            difference = f"--{flag.replace('_', '-')} {then}, not {value}"
            raise ScriptError(f"{run_dir} was started with {difference}; repeat its flags, or {ELSEWHERE}")
    check_best(run_dir, checkpoint)
    return checkpoint


def check_best(run_dir, checkpoint):
    """Refuse a best.pt that is not of the best epoch in last.pt; if that is last.pt's own, write it again."""
    path, best = run_dir / "best.pt", best_of(checkpoint["history"])
    found = utils.load_checkpoint(path) if path.exists() else {}
    if all(found.get(key) == best[key] for key in ("epoch", "val_acc")):
        return
    state = f"{path} is missing, or not of epoch {best['epoch']}, the best so far"
    if best["epoch"] < checkpoint["epoch"]:
        raise ScriptError(f"{state}; put it back, or {ELSEWHERE}")
    print(f"{utils.plain(state)}: written again from last.pt")
    save_best(run_dir, checkpoint)


def restore(checkpoint, path, setup, model, optimizer, scaler):
    """Copy weights, optimizer and GradScaler from a last.pt into ours; settings such as momentum are the flags'.

    Fused kernels trust the shapes, dtypes and layouts: with others they would write past the end.
    """
    utils.load_weights(model, checkpoint["model"], path)
    with utils.reading(path, "python train.py with another --output-dir", "a last.pt to continue from"):
        for number, state in enumerate(optimizer.state.values()):
            for name, value in state.items():
                found = checkpoint["optimizer"]["state"][number][name]
                same = (found.shape, found.dtype) == (value.shape, value.dtype)
                require(same, f"a bad {name} of parameter {number}")  # copy_ would stretch and convert
                value.copy_(found)
        if checkpoint["scaler"]:  # empty if the run began without one
            scaler.load_state_dict(checkpoint["scaler"])
        then = checkpoint["setup"]
        changes = [f"{key} was {then.get(key)}, now {now}" for key, now in setup.items() if then.get(key) != now]
    print(f"resuming after epoch {checkpoint['epoch']}")
    if changes:
        utils.warn(f"{', '.join(changes)}: continuing, but the result will not be bit-identical")


def finish(run_dir, args, history):
    """Write what the end of training leaves to write; also again, if a kill came just before it."""
    utils.write_json(run_dir / "config.json", utils.open_run(run_dir)[1] | {"finished": True})
    write_log(run_dir, args, history)
    best, spent = best_of(history), duration(sum(row["seconds"] for row in history))
    print(f"best validation accuracy {100 * best['val_acc']:.2f} % in epoch {best['epoch']}; trained for {spent}")
    files = "config.json", "log.csv", "curves.png", "last.pt", "best.pt"
    written = ", ".join(name for name in files if (run_dir / name).exists())
    print(f"wrote {written} to {utils.plain(run_dir)}")
    print(f"next: python evaluate.py {utils.quote(run_dir)}")
    return {"run_dir": str(run_dir), "best_epoch": best["epoch"], "val_acc": best["val_acc"]}


# ---- the command line -----------------------------------------------------------------------------------


def parse_args(argv):
    """The arguments, with the presets and the names that follow from them."""
    parser = utils.ArgumentParser(__file__, __doc__)
    add = parser.add_argument_group("training").add_argument
    add("--smoothing", type=float, default=0.0, help="label smoothing a: targets (1 - a) one-hot + a / 100")
    add("--epochs", type=int, help=f"passes over the training images, at most (default: {STUDY['epochs']})")
    add("--batch-size", type=int, default=128, help="images per step")
    add("--lr", type=float, help=f"learning rate at the end of the warmup (default: {STUDY['lr']})")
    add("--momentum", type=float, default=0.9, help="Nesterov momentum; beta1 of AdamW")
    add("--weight-decay", type=float, help=f"L2 penalty; of AdamW, decoupled (default: {STUDY['weight_decay']})")
    add("--warmup-epochs", type=float, help="epochs of linear warmup (default: an eighth of the epochs)")
    add("--patience", type=int, default=6, help="early stopping: epochs without a better validation accuracy; 0: off")
    add("--seed", type=int, default=42, help="of the split, initial weights, order and augmentation")
    add("--val-size", type=int, default=10_000, help="training images held out, equally many of each class")
    add("--width", type=int, help=f"channels of the first stage; 16: several times faster (default: {STUDY['width']})")
    add("--limit", type=int, metavar="N", help="train on the first N training images only")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="auto: the fastest that is safe")
    add("--compile", action="store_true", help="torch.compile: starts later, and may be faster on a GPU")
    add("--deterministic", action="store_true", help="bit-identical runs on a GPU, somewhat slower")
    add("--mixup", type=float, default=0.0, metavar="ALPHA", help="MixUp, for instance 0.2; 0: off")
    add("--cutmix", type=float, default=0.0, metavar="ALPHA", help="CutMix; with --mixup: either, per batch")
    add("--model", choices=MODELS, default="resnet18", help="cct is trained by AdamW: lr 1e-3, decay 0.05")

    where = parser.add_argument_group("where")
    add = where.add_argument
    quick = "a first look: width 16, 10,000 images, 4 epochs, lr 0.1; synthetic without CIFAR-100"
    add("--quick", action="store_true", help=quick)
    add("--dataset", choices=("cifar100", "synthetic"), help="synthetic: a made-up stand-in (default: cifar100)")
    utils.add_common_flags(where)
    add("--data-url", metavar="URL", help="where to download cifar-100-python.tar.gz from; not with --quick")
    add("--output-dir", metavar="DIR", help="the run directory, if not runs/<name>")
    add("--resume", action="store_true", help="continue from the run's last.pt; start if there is none")
    args = parser.parse_args(argv)

    defaults = STUDY | (QUICK if args.quick else {}) | (ADAMW if args.model == "cct" else {})
    defaults["warmup_epochs"] = (args.epochs or defaults["epochs"]) / 8
    recipe = [flag for flag in vars(args) if flag not in utils.PLACES | {"dataset"}]  # in the order above
    defaults = {flag: defaults.get(flag, parser.get_default(flag)) for flag in recipe}
    for flag, default in defaults.items():
        if getattr(args, flag) is None:
            setattr(args, flag, default)
    args.output_dir = os.path.expanduser(args.output_dir or "")
    check(parser, args)

    named, args.data_dir = args.data_dir, os.path.abspath(os.path.expanduser(args.data_dir or "data"))
    missing = find_cifar100(args.data_dir) is None
    if args.dataset is None:
        args.dataset = "synthetic" if args.quick and missing and not named else "cifar100"
    if args.dataset == "cifar100" and missing and (args.quick or (named and not args.data_url)):
        ways = "--quick alone takes synthetic images, and train.py alone downloads it into data/"
        parser.error(f"no CIFAR-100 in --data-dir {args.data_dir}, nor up to two levels below; {ways}")
    name, args.command = names_of(args, defaults)
    args.output_dir = args.output_dir or str(Path("runs") / name)
    return args


def check(parser, args):
    """What argparse cannot check. torch ignores a negative or NaN smoothing, for one."""
    train_size = 50_000 - args.val_size
    images = train_size if args.limit is None else args.limit
    for flag, valid, wanted in (
        ("--smoothing", 0 <= args.smoothing < 1, "in [0, 1)"),
        ("--epochs", args.epochs >= 1, "at least 1"),
        ("--lr", 0 < args.lr < math.inf, "positive and finite"),
        ("--momentum", 0 < args.momentum < 1, "in (0, 1)"),
        ("--weight-decay", 0 <= args.weight_decay < math.inf, "0 or positive, and finite"),
        ("--warmup-epochs", 0 <= args.warmup_epochs < args.epochs, f"at least 0 and below --epochs {args.epochs}"),
        ("--patience", args.patience >= 0, "at least 0"),
        ("--seed", 0 <= args.seed < 2**32, "in 0..4294967295"),
        ("--val-size", args.val_size in range(100, 50_000, 100), "a multiple of 100 in 100..49900"),
        ("--width", 1 <= args.width <= 1024, "in 1..1024"),
        ("--limit", 2 <= images <= train_size, f"in 2..{train_size}, the images there are"),
        ("--batch-size", 2 <= args.batch_size <= images, f"in 2..{images}, the training images"),
        ("--mixup", 0 <= args.mixup <= 100, "in [0, 100]"),
        ("--cutmix", 0 <= args.cutmix <= 100, "in [0, 100]"),
        ("--output-dir", not args.output_dir.startswith("~"), "below the home of a user of this machine"),
    ):
        if not valid:
            parser.error(f"{flag} {getattr(args, flag[2:].replace('-', '_'))} must be {wanted}")


def names_of(args, defaults):
    """(name, command) of a run. baseline, smoothing0.1 or quick, then -<flag><value> for each flag off its default."""
    name, command = ("quick", "python train.py --quick") if args.quick else ("baseline", "python train.py")
    for flag, default in defaults.items():
        value, word = getattr(args, flag), flag.replace("_", "-")
        if value != default:
            short = f"{value:g}" if isinstance(value, float) else value
            name += f"-{word}" if value is True else f"-{word}{short}"
            command += f" --{word}" if value is True else f" --{word} {value}"
    name = name.replace("baseline-smoothing", "smoothing")
    if args.dataset == "synthetic":
        name, command = f"synthetic-{name}", f"{command} --dataset synthetic"
    return name, command


def main(argv=None):
    """Train one run; returns {"run_dir", "best_epoch", "val_acc"}."""
    args = parse_args(argv)
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):  # by torchrun
        raise ScriptError("a run is one process; start train.py once per GPU, with its own --seed and --device cuda:N")
    device = utils.select_device(args.device)
    precision = utils.select_precision(args.amp, device)
    run_dir = Path(args.output_dir)
    with exclusive(run_dir):
        checkpoint = load_last(run_dir, args)
        if checkpoint["finished"]:
            print(f"already finished after epoch {checkpoint['epoch']}")
            return finish(run_dir, args, checkpoint["history"])
        try:
            history = fit(args, device, precision, run_dir, checkpoint)
        except KeyboardInterrupt as interrupt:
            code = 143 if interrupt.args else 130
            raise ScriptError("stopped; add --resume to continue after the last epoch shown", code) from None
        return finish(run_dir, args, history)


if __name__ == "__main__":
    utils.run_script(main)
