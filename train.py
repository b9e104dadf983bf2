"""Train a network on CIFAR-100 from scratch.

    python train.py --quick           # two minutes: runs/[synthetic-]quick
    python train.py                   # plain cross-entropy: runs/baseline
    python train.py --smoothing 0.1   # the one modification: runs/smoothing0.1
    python train.py --resume          # continue a run that was stopped

The run directory runs/<name>, named after the flags that differ from their
defaults, gets config.json, log.csv (a row an epoch), curves.png, last.pt (all
that --resume needs) and best.pt (the weights of the best validation epoch,
which evaluate.py and gradcam.py read). 10,000 of the 50,000 training images
are held out for validation; the test set is not touched. On a CPU with the
same number of threads, a resumed run is bit-identical to one that was never
stopped; on a GPU that needs --deterministic.
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

    A plain function of the step: nothing to save, nothing to restore. At step warmup_steps - 1 it is peak
    exactly. Loshchilov and Hutter, arXiv:1608.03983, without restarts; warmup as in Goyal et al.,
    arXiv:1706.02677.
    """
    if step < warmup_steps:
        return peak * ((step + 1) / warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))


def make_optimizer(model, lr, momentum, weight_decay, adamw=False):
    """SGD with Nesterov momentum, or AdamW, on all parameters, as one fused kernel where there is one."""
    parameters = list(model.parameters())
    options = {"lr": lr, "weight_decay": weight_decay}
    options["fused"] = parameters[0].device.type in ("cpu", "cuda")  # also spares a wait for the GradScaler's check
    if adamw:
        optimizer = torch.optim.AdamW(parameters, betas=(momentum, 0.999), **options)
    else:
        optimizer = torch.optim.SGD(parameters, momentum=momentum, nesterov=True, **options)
    # torch would add these zeros in the first step, but fused SGD takes uninitialised memory if float16 overflows
    # there; and so restore() knows which values there are, and their shapes.
    for parameter in parameters:
        names = ("exp_avg", "exp_avg_sq") if adamw else ("momentum_buffer",)
        optimizer.state[parameter] = {name: torch.zeros_like(parameter) for name in names}
        if adamw:
            optimizer.state[parameter]["step"] = torch.zeros((), device=parameter.device if options["fused"] else "cpu")
    return optimizer


def train_epoch(args, epoch, images, labels, net, optimizer, scaler, mixed_precision, watch):
    """One epoch, counted from 1; returns (mean loss of its steps, accuracy) on its augmented images.

    images: (N, 40, 40, 3) uint8, padded; labels: (N,) int64; both on the device of net. watch.after_step() is
    called after each step. The incomplete last batch is dropped: its step would be as long as any other, its
    gradient noisier. Each epoch is shuffled anew, so other images are left out.
    """
    steps = len(images) // args.batch_size
    total_steps, warmup_steps = args.epochs * steps, round(args.warmup_epochs * steps)
    order, offsets, flips = [part.to(images.device) for part in epoch_plan(args.seed, epoch, len(images))]
    mixing = args.mixup > 0 or args.cutmix > 0
    mixes = mix_plan(args.seed, epoch, steps, args.mixup, args.cutmix) if mixing else None
    loss_sum, hits = torch.zeros((2,), device=images.device)  # summed there: .item() waits for the device
    net.train()
    for i in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr_at((epoch - 1) * steps + i, total_steps, warmup_steps, args.lr)
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
        watch.after_step(i, loss_sum)
    return loss_sum.item() / steps, hits.item() / (steps * args.batch_size)


def validate(model, images, labels, mixed_precision):
    """(cross-entropy without smoothing, so that runs compare; accuracy) on (N, 32, 32, 3) uint8 images."""
    with mixed_precision:
        size = 500 if images.is_cuda else 128  # a GPU likes few launches, a CPU its cache
        logits = utils.predict(model, map(normalize, images.split(size)))  # (N, 100)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).sum().item() / len(labels)


def fit(args, device, precision, run_dir, checkpoint):
    """Train until the last epoch or early stopping. checkpoint: of load_last(); updated when an epoch is saved."""
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

    sizes = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    sizes |= {"train_images": len(train_set[1]), "val_images": len(val_set[1])}
    precision_name = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32"}[dtype]
    setup = {"device": utils.device_name(device), "precision": precision_name, "threads": torch.get_num_threads()}
    setup |= {"torch": str(torch.__version__), "numpy": np.__version__}  # all that decides the bits but the arguments
    announce(run_dir, args, setup, sizes, reason)
    if checkpoint["history"]:
        restore(checkpoint, run_dir / "last.pt", setup, model, optimizer, scaler)
    for partial in [path for name in FILES for path in run_dir.glob(f".{name}.*.partial")]:
        with contextlib.suppress(OSError):
            partial.unlink()  # of a process that was killed while it wrote
    config = {"command": args.command, "args": vars(args), "dataset": args.dataset, **setup, **sizes, "finished": False}
    utils.write_json(run_dir / "config.json", config)
    print(HEADER, flush=True)

    steps = len(train_set[1]) // args.batch_size
    for epoch in range(len(checkpoint["history"]) + 1, args.epochs + 1):
        watch = Watch(args, epoch, steps)
        training = train_epoch(args, epoch, *train_set, net, optimizer, scaler, mixed_precision, watch)
        speed = steps * args.batch_size / watch.seconds()
        validation = validate(model, *val_set, mixed_precision)
        check_finite(training[0] + validation[0], epoch, epoch * steps)
        lr = optimizer.param_groups[0]["lr"]  # of the epoch's last step
        values = epoch, lr, *training, *validation, round(watch.seconds(), 2), round(speed, 1)
        row = dict(zip(COLUMNS, values))
        history = [*checkpoint["history"], row]
        best = best_of(history)
        stop_early = args.patience > 0 and epoch - best["epoch"] >= args.patience

        # last.pt first: after a kill in between, check_best() writes best.pt
        content = {"format": 1, "args": without_places(vars(args)), "epoch": epoch, "split": split}
        content |= {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        content |= {"setup": setup, "history": history, "finished": epoch == args.epochs or stop_early}
        save_checkpoint(run_dir / "last.pt", content)
        checkpoint |= content  # in place: main() tells from it what is kept
        if best is row:
            save_best(run_dir, checkpoint)
        write_log(run_dir, args, history, curves=row["seconds"] > 5)  # drawing takes 0.3 s

        watch.clear()
        print(epoch_line(row, best, args.epochs), flush=True)
        if epoch > args.warmup_epochs + 1 and row["train_acc"] < 0.015:
            utils.warn("training accuracy is still at chance, 1 %; try another --lr")
        if stop_early:
            print(f"no better validation accuracy in {args.patience} epochs: stopping early")
            break


def configure(device, deterministic):
    """Settings of the whole process."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for older torch, before cuBLAS starts
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # filling each new tensor costs 12 to 15 %
    torch.backends.cudnn.benchmark = not deterministic  # it picks algorithms by timing them

    # glibc returns the memory of a large tensor to the system at once, and every new one costs page faults.
    # Keeping it makes training on a CPU 5 to 15 % faster, for up to a tenth more memory. musl has no mallopt.
    libc = ctypes.CDLL(None) if device.type == "cpu" and sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        for option, value in ((-4, 0), (-1, -1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            libc.mallopt(option, value)


def load_split(args, device):
    """(images, labels) to train on, padded; (images, labels) held out; the split's checksum. All on the device."""
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


def announce(run_dir, args, setup, sizes, reason):
    """What is trained, where and how."""
    print(f"{TITLES[args.dataset]}: {sizes['train_images']:,} training, {sizes['val_images']:,} validation images")
    print(f"{MODELS[args.model]}: {sizes['parameters']:,} parameters, at most {args.epochs} epochs")
    print(f"{setup['device']}, torch {setup['torch']}, CPU threads: {setup['threads']}")
    print(f"{setup['precision']}: {reason}")
    print(f"run directory: {utils.plain(run_dir)}")
    if args.mixup or args.cutmix:
        print("images are mixed: the training accuracy is that of their dominant labels")


class Watch(utils.Progress):
    """The clock of one epoch, and its progress line; on a CPU also how long the whole run will take."""

    def __init__(self, args, epoch, steps):
        super().__init__()
        self.args, self.epoch, self.steps, self.begin = args, epoch, steps, time.monotonic()

    def seconds(self):
        return max(time.monotonic() - self.begin, 1e-3)  # a coarse clock may not have moved

    def after_step(self, i, loss_sum):
        """i: the step of this epoch, from 0. loss_sum: of its steps so far, a tensor on the device."""
        step, total_steps = (self.epoch - 1) * self.steps + i, self.args.epochs * self.steps
        pace = self.seconds() / (i + 1)  # seconds a step
        if self.due():
            loss = loss_sum.item() / (i + 1)  # waits for the device
            check_finite(loss, self.epoch, step + 1)
            speed, left = self.args.batch_size / pace, duration(pace * (total_steps - step - 1))
            where = f"epoch {self.epoch}/{self.args.epochs}, step {i + 1}/{self.steps}"
            self.show(f"{where}: loss {loss:.3f}, {speed:,.0f} images/s, {left} left")
        hours = pace * total_steps / 3600
        if step == 9 and hours > 1.5 and loss_sum.device.type == "cpu" and not self.args.compile:
            self.clear()
            print(f"about {hours:.0f} h here; for a first look: python train.py --quick", flush=True)
            if self.args.width > 16:
                print("the same study in 20 minutes a run: --width 16 --lr 0.1", flush=True)


def check_finite(loss, epoch, step):
    """Stop a run that has diverged before it overwrites a good checkpoint."""
    if not math.isfinite(loss):
        kept = f"last.pt is of epoch {epoch - 1}" if epoch > 1 else "nothing was saved yet"
        reason = f"training diverged (loss is NaN or infinite) by step {step}"
        raise ScriptError(f"{reason}; {kept}; try a lower --lr, or with fp16 --amp off", code=1)


def draw_curves(name, args, history):
    """A Figure: loss and accuracy by epoch. Its ranges are fixed, so that two runs can be laid side by side."""
    title = f"Training {MODELS[args.model]} on {TITLES[args.dataset]}: {utils.plain(name)}"
    figure, panels = utils.new_figure(10, 4, 1, 2, title)
    smoothed = ", smoothed" if args.smoothing else ""
    mixed = ", dominant label" if args.mixup or args.cutmix else ""
    epochs, best = [row["epoch"] for row in history], best_of(history)["epoch"]
    parts = ("loss", 1, 4.7, "cross-entropy (nats)", smoothed), ("acc", 100, 100, "accuracy (%)", mixed)
    for axes, (key, scale, top, label, how) in zip(panels, parts):  # guessing costs ln(100) = 4.61 nats
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

FILES = ("config.json", "log.csv", "curves.png", "last.pt", "best.pt")  # that this script writes
ANEW = "python train.py with another --output-dir", "a last.pt to continue from"  # what utils.reading() says of one
COLUMNS = "epoch lr train_loss train_acc val_loss val_acc seconds images_per_second".split()  # of log.csv


def exclusive(run_dir):
    """An open lock file in run_dir: until it is closed, a second process is refused."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(run_dir / ".lock", "a")  # never emptied: it may be a link
    except OSError as error:
        raise ScriptError(f"cannot write to {run_dir} ({error.strerror}); choose another --output-dir") from None
    if not utils.lock(file):
        raise ScriptError(f"another process is training in {run_dir}; wait for it, or choose another --output-dir")
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
    """The checkpoint to continue from; for a new run, one without epochs. Never overwrites a run, never mixes two.

    A folder in which no epoch was saved counts as empty.
    """
    path, elsewhere = run_dir / "last.pt", "use another --output-dir"
    saved = [name for name in ("last.pt", "best.pt", "log.csv") if (run_dir / name).exists()]
    if saved and not args.resume:
        raise ScriptError(f"{run_dir} already holds a run; add --resume to continue it, or {elsewhere}")
    if saved and not path.exists():
        raise ScriptError(f"{run_dir} has a {saved[0]} but no last.pt to continue from; {elsewhere}")
    if not saved:
        if args.resume:
            print("nothing to resume yet, starting from the beginning")
        return {"history": [], "finished": False}
    checkpoint, now = utils.load_checkpoint(path), without_places(vars(args))
    with utils.reading(path, *ANEW):
        require("optimizer" in checkpoint, "weights only, as in a best.pt")
        require(type(checkpoint["split"]) is int and type(checkpoint["finished"]) is bool, "a bad split or end")
        rows, then = checkpoint["history"], checkpoint["args"]
        require(rows and [list(row) for row in rows] == [COLUMNS] * checkpoint["epoch"], "a history of other epochs")
        require(np.isfinite([list(row.values()) for row in rows]).all(), "a history with NaN or infinity")
        changed = [flag for flag, value in now.items() if then.get(flag) != value]
    if changed:
        difference = f"--{changed[0].replace('_', '-')} {then.get(changed[0])}, not {now[changed[0]]}"
        raise ScriptError(f"{run_dir} was started with {difference}; repeat its flags, or {elsewhere}")
    check_best(run_dir, checkpoint)
    return checkpoint


def check_best(run_dir, checkpoint):
    """Refuse a best.pt that is not of the best epoch in last.pt; if that is last.pt's own, write it again."""
    path, best = run_dir / "best.pt", best_of(checkpoint["history"])
    try:
        found = utils.load_checkpoint(path)
        same_run = without_places(found["args"]) == without_places(checkpoint["args"])
        ahead = found["epoch"] == checkpoint["epoch"] + 1  # an earlier train.py wrote best.pt first
        if same_run and (ahead or (found["epoch"], found["val_acc"]) == (best["epoch"], best["val_acc"])):
            return
    except (ScriptError, KeyError, RuntimeError):
        pass  # missing, damaged or made up
    state = f"{utils.plain(path)} is missing, damaged, or of another run or epoch"
    if best["epoch"] < checkpoint["epoch"]:
        lost = f"epoch {best['epoch']}, the best so far, is lost without it"
        raise ScriptError(f"{state}; {lost}: put it back, or use another --output-dir")
    print(f"{state}: written again from last.pt")
    save_best(run_dir, checkpoint)


def restore(checkpoint, path, setup, model, optimizer, scaler):
    """Restore weights, optimizer and GradScaler from a last.pt.

    Its values are copied into our own, which have the shapes, dtypes and layouts that fused kernels trust; with
    others they would write past the end. Settings such as momentum follow from the flags.
    """
    utils.load_weights(model, checkpoint["model"], path)
    with utils.reading(path, *ANEW):
        for number, state in enumerate(optimizer.state.values()):
            for name, value in state.items():
                found = checkpoint["optimizer"]["state"][number][name]
                fits = (found.shape, found.dtype) == (value.shape, value.dtype)  # copy_ would stretch and convert
                require(fits, f"a bad {name} of parameter {number}")
                value.copy_(found.detach())
        if checkpoint["scaler"] and scaler.is_enabled():  # empty if the run began without one
            own = scaler.state_dict()
            scaler.load_state_dict({key: type(value)(checkpoint["scaler"][key]) for key, value in own.items()})
            require(0 < scaler.state_dict()["scale"] < math.inf, "a bad scale")
        then, on_cpu = checkpoint["setup"], setup["device"].startswith("cpu")
        changed = [key for key, now in setup.items() if then.get(key) != now and (key != "threads" or on_cpu)]
    print(f"resuming after epoch {checkpoint['epoch']}")
    if changed:
        changes = ", ".join(f"{key} was {then.get(key)}, now {setup[key]}" for key in changed)
        utils.warn(f"{changes}: continuing, but the result will not be bit-identical")


def finish(run_dir, args, checkpoint):
    """Write what the end of training leaves to write; also again, if a kill came just before it."""
    history, best = checkpoint["history"], best_of(checkpoint["history"])
    _, config = utils.open_run(run_dir)
    utils.write_json(run_dir / "config.json", config | {"finished": True})
    write_log(run_dir, args, history)
    spent = duration(sum(row["seconds"] for row in history))
    print(f"best validation accuracy {100 * best['val_acc']:.2f} % in epoch {best['epoch']}; trained for {spent}")
    written = [name for name in FILES if (run_dir / name).exists()]
    print(f"wrote {', '.join(written)} to {utils.plain(run_dir)}")
    print(f"next: python evaluate.py {utils.quote(run_dir)}")
    return {"run_dir": str(run_dir), "best_epoch": best["epoch"], "val_acc": best["val_acc"]}


# ---- the command line -----------------------------------------------------------------------------------


def parse_args(argv):
    """The arguments, with the presets and the names that follow from them."""
    parser = utils.ArgumentParser(__file__, __doc__)
    add = parser.add_argument_group("recipe").add_argument
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
    precisions = ("auto", "bf16", "fp16", "off")
    add("--amp", choices=precisions, default="auto", help="mixed precision; auto: the fastest that is safe")
    add("--compile", action="store_true", help="torch.compile: starts later, and may be faster on a GPU")
    add("--deterministic", action="store_true", help="bit-identical runs on a GPU, somewhat slower")
    add("--mixup", type=float, default=0.0, metavar="ALPHA", help="MixUp, for instance 0.2; 0: off")
    add("--cutmix", type=float, default=0.0, metavar="ALPHA", help="CutMix; with --mixup: either, per batch")
    add("--model", choices=MODELS, default="resnet18", help="cct is trained by AdamW: lr 1e-3, decay 0.05")

    where = parser.add_argument_group("where")
    add = where.add_argument
    quick = "a first look: width 16, 10,000 images, 4 epochs, lr 0.1; synthetic if there is no CIFAR-100"
    add("--quick", action="store_true", help=quick)
    add("--dataset", choices=("cifar100", "synthetic"), help="synthetic: a made-up stand-in (default: cifar100)")
    utils.add_common_flags(where)
    add("--data-url", metavar="URL", help="where to download cifar-100-python.tar.gz from; with --data-dir, into it")
    add("--output-dir", metavar="DIR", help="the run directory, if not runs/<name>")
    add("--resume", action="store_true", help="continue from the run's last.pt; start if there is none")
    args = parser.parse_args(argv)

    defaults = STUDY | (QUICK if args.quick else {}) | (ADAMW if args.model == "cct" else {})
    defaults["warmup_epochs"] = (defaults["epochs"] if args.epochs is None else args.epochs) / 8
    recipe = [flag for flag in vars(args) if flag not in utils.PLACES | {"dataset"}]  # in the order above
    defaults = {flag: defaults.get(flag, parser.get_default(flag)) for flag in recipe}
    for flag, default in defaults.items():
        if getattr(args, flag) is None:
            setattr(args, flag, default)
    check(parser, args)

    try:
        data_dir = Path(args.data_dir or "data").expanduser().resolve()
        run_dir = Path(args.output_dir or "").expanduser()
    except RuntimeError:  # ~name/...
        parser.error("--data-dir or --output-dir begins with ~ and the name of no user here")
    here = find_cifar100(data_dir)
    if args.dataset is None:
        args.dataset = "synthetic" if args.quick and not here and not args.data_dir else "cifar100"
    may_download = not args.quick and (args.data_url or not args.data_dir)
    if args.dataset == "cifar100" and not here and not may_download:
        ways = "without --data-dir, --quick takes synthetic images, and train.py alone downloads it into data/"
        parser.error(f"no CIFAR-100 in --data-dir {data_dir}, nor up to two levels below; {ways}")
    args.data_dir = str(data_dir)  # absolute: the scripts that read this run find the data from anywhere
    name, args.command = names_of(args, defaults)
    args.output_dir = str(run_dir if args.output_dir else Path("runs") / name)
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
    ):
        if not valid:
            parser.error(f"{flag} {getattr(args, flag[2:].replace('-', '_'))} must be {wanted}")


def names_of(args, defaults):
    """(name, command) of a run. baseline, smoothing0.1 or quick, then -<flag><value> for each flag off its default."""
    name, command = ("quick", "python train.py --quick") if args.quick else ("baseline", "python train.py")
    for flag, default in defaults.items():
        value = getattr(args, flag)
        if value != default:
            flag = flag.replace("_", "-")
            text = "" if value is True else f"{value:g}" if isinstance(value, float) else str(value)
            name += f"-{flag}{text}"
            command += f" --{flag}" if value is True else f" --{flag} {value}"
    name = name.replace("baseline-smoothing", "smoothing")
    if args.dataset == "synthetic":
        name, command = f"synthetic-{name}", f"{command} --dataset synthetic"
    return name, command


def main(argv=None):
    """Train one run; returns {"run_dir", "best_epoch", "val_acc"}."""
    args = parse_args(argv)
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):  # by torchrun
        ways = "start train.py once per GPU, each with a --seed or --output-dir of its own and --device cuda:N"
        raise ScriptError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but a run is one process; {ways}")
    device = utils.select_device(args.device)
    precision = utils.select_precision(args.amp, device)
    run_dir = Path(args.output_dir)
    with exclusive(run_dir):
        checkpoint = load_last(run_dir, args)
        if checkpoint["finished"]:
            print(f"already finished after epoch {checkpoint['epoch']}")
            return finish(run_dir, args, checkpoint)
        try:
            fit(args, device, precision, run_dir, checkpoint)
        except KeyboardInterrupt as interrupt:
            code, done = 143 if interrupt.args else 130, len(checkpoint["history"])
            kept = f"last.pt holds epoch {done}" if done else "nothing was saved yet"
            raise ScriptError(f"stopped in epoch {done + 1}; {kept}; add --resume to continue", code) from None
        return finish(run_dir, args, checkpoint)


if __name__ == "__main__":
    utils.run_script(main)
