"""Train a network on CIFAR-100 from scratch.

    python train.py --quick           # a first look, two minutes: runs/quick
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

import ctypes
import io
import math
import os
import re
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
from utils import ScriptError, duration

QUICK = {"width": 16, "limit": 10_000, "epochs": 4, "lr": 0.1}  # the defaults of --quick
ADAMW = {"lr": 1e-3, "weight_decay": 0.05}  # and those of --model cct
FILES = ("config.json", "log.csv", "curves.png", "last.pt", "best.pt")  # that this script writes


# ---- the command line -----------------------------------------------------------------------------------


def parse_args(argv):
    parser = utils.ArgumentParser(__file__, __doc__)
    recipe = parser.add_argument_group("recipe")
    add = recipe.add_argument
    add("--smoothing", type=float, default=0.0, help="label smoothing a: targets (1 - a) one-hot + a / 100")
    add("--epochs", type=int, default=40, help="passes over the training images, at most")
    add("--batch-size", type=int, default=128, help="images per step")
    add("--lr", type=float, default=0.01, help="learning rate at the end of the warmup")
    add("--momentum", type=float, default=0.9, help="Nesterov momentum; beta1 of AdamW")
    add("--weight-decay", type=float, default=5e-4, help="L2 penalty on all parameters; of AdamW, decoupled")
    add("--warmup-epochs", type=float, help="epochs of linear warmup (default: an eighth of the epochs)")
    add("--patience", type=int, default=6, help="early stopping: epochs without a better validation accuracy; 0: off")
    add("--seed", type=int, default=42, help="of the split, initial weights, order and augmentation")
    add("--val-size", type=int, default=10_000, help="training images held out, equally many of each class")
    add("--width", type=int, default=64, help="channels of the first stage; 16 is several times faster")
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
    utils.add_common_flags(where, dataset="cifar100")
    add("--data-url", metavar="URL", help="where to download cifar-100-python.tar.gz from")
    add("--output-dir", metavar="DIR", help="the run directory, if not runs/<name>")
    add("--resume", action="store_true", help="continue from the run's last.pt; start if there is none")

    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**QUICK, dataset=None)
    if args.model == "cct":
        parser.set_defaults(**ADAMW)
    parser.set_defaults(warmup_epochs=parser.parse_args(argv).epochs / 8)
    args = parser.parse_args(argv)  # again: what was given overrides these defaults
    check(parser, args)

    data_dir = Path(args.data_dir or "data").expanduser().resolve()
    found = find_cifar100(data_dir)
    args.dataset = args.dataset or ("cifar100" if found else "synthetic")
    mistyped = args.data_dir and not data_dir.exists()
    if args.dataset == "cifar100" and not found and (mistyped or args.quick):
        advice = "to download it, create the folder and omit --quick; for a first look without it: --quick alone"
        parser.error(f"no CIFAR-100 in --data-dir {data_dir}; {advice}")
    args.data_dir = str(data_dir)  # absolute: the scripts that read this run find the data from anywhere

    args.output_dir = args.output_dir or str(Path("runs") / run_name(args, recipe._group_actions))
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


def run_name(args, flags):
    """baseline, smoothing0.1 or quick, then -<flag><value> for each other recipe flag off its default."""
    name = "quick" if args.quick else "baseline"
    for flag in flags:  # argparse's actions, which know their defaults
        value = getattr(args, flag.dest)
        if value != flag.default:
            text = "" if value is True else f"{value:g}" if isinstance(value, float) else str(value)
            name += f"-{flag.dest.replace('_', '-')}{text}"
    name = re.sub("^baseline-smoothing", "smoothing", name)
    return f"synthetic-{name}" if args.dataset == "synthetic" and not args.quick else name


# ---- the parts of the recipe ----------------------------------------------------------------------------


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
        return torch.optim.AdamW(parameters, betas=(momentum, 0.999), **options)
    optimizer = torch.optim.SGD(parameters, momentum=momentum, nesterov=True, **options)
    # Without this, fused SGD starts from uninitialised memory if float16 overflows in the very first step.
    for parameter in parameters:
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


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


# ---- a run directory ------------------------------------------------------------------------------------


def exclusive(run_dir):
    """An open lock file in run_dir: until it is closed, a second process is refused."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(run_dir / ".lock", "w")
    except OSError as error:
        raise ScriptError(f"cannot write to {run_dir} ({error.strerror}); choose another --output-dir") from None
    if not utils.lock(file):
        raise ScriptError(f"another process is training in {run_dir}; wait for it, or choose another --output-dir")
    return file


def load_last(run_dir, args):
    """The checkpoint to continue from; for a new run, one without epochs. Never overwrites a run, never mixes two.

    A folder in which no epoch was saved counts as empty.
    """
    last, elsewhere = run_dir / "last.pt", "use another --output-dir"
    if not args.resume and any((run_dir / name).exists() for name in ("last.pt", "best.pt", "log.csv")):
        raise ScriptError(f"{run_dir} already holds a run; add --resume to continue it, or {elsewhere}")
    if not last.exists():
        if (run_dir / "log.csv").exists():
            raise ScriptError(f"{run_dir} has a log.csv but no last.pt to continue from; {elsewhere}")
        if args.resume:
            print("nothing to resume yet, starting from the beginning")
        return {"history": [], "finished": False}
    checkpoint = utils.load_checkpoint(last)
    if "optimizer" not in checkpoint:
        raise ScriptError(f"{last} holds weights only, like a best.pt; put the real one back, or {elsewhere}")
    for name, old in checkpoint["args"].items():
        new, flag = getattr(args, name, None), "--" + name.replace("_", "-")
        if name not in utils.PLACES and new != old:
            raise ScriptError(f"{run_dir} was started with {flag} {old}, not {new}; repeat its flags, or {elsewhere}")
    return checkpoint


def restore(checkpoint, path, setup, model, optimizer, scaler):
    """Restore weights, optimizer and GradScaler from a last.pt."""
    utils.load_weights(model, checkpoint["model"], path)
    try:
        for group in checkpoint["optimizer"]["param_groups"]:
            group["fused"] = optimizer.defaults["fused"]  # for this device, not the one the run began on
        optimizer.load_state_dict(checkpoint["optimizer"])
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if value.shape == parameter.shape:  # fused kernels pair values by address: give it the same layout
                    state[key] = torch.empty_like(parameter).copy_(value)
        if checkpoint["scaler"] and scaler.is_enabled():  # empty if the run began without one
            scaler.load_state_dict(checkpoint["scaler"])
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError):
        raise ScriptError(f"{path} is incomplete; train anew in another --output-dir") from None
    print(f"resuming after epoch {checkpoint['epoch']}")
    for key, now in setup.items():
        then = checkpoint["setup"].get(key)
        if then != now and (key != "threads" or setup["device"].startswith("cpu")):
            utils.warn(f"{key} was {then}, now {now}: continuing, but the result will not be bit-identical")


def save_checkpoint(path, content):
    buffer = io.BytesIO()  # in memory first: torch hides the reason when a write fails
    torch.save(content, buffer)
    utils.write_file(path, buffer.getbuffer())


def best_of(history):
    """The row of the epoch with the best validation accuracy, the first of equals."""
    return max(history, key=lambda row: row["val_acc"])


def write_log(run_dir, args, history, curves=True):
    """log.csv and curves.png. A failure only warns: a spreadsheet on Windows locks the file it shows."""
    try:
        utils.write_csv(run_dir / "log.csv", history)
        if curves:
            draw_curves(run_dir, args, history)
    except ScriptError as error:
        utils.warn(str(error))


def draw_curves(run_dir, args, history):
    training = "training, augmented" + (", smoothed" if args.smoothing else "")
    training += ", dominant label" if args.mixup or args.cutmix else ""
    title = f"Training {MODELS[args.model]} on {TITLES[args.dataset]}: {run_dir.resolve().name}"  # of "." too
    figure, (left, right) = utils.new_figure(10, 4, 1, 2, title)
    epochs, best = [row["epoch"] for row in history], best_of(history)["epoch"]
    for axes, key, scale, label in (left, "loss", 1, "cross-entropy (nats)"), (right, "acc", 100, "accuracy (%)"):
        train_values = [scale * row[f"train_{key}"] for row in history]
        val_values = [scale * row[f"val_{key}"] for row in history]
        axes.plot(epochs, train_values, "-o", color=utils.BLUE, label=training, markersize=3)
        axes.plot(epochs, val_values, "--o", color=utils.VERMILION, label="validation", markersize=3)
        axes.axvline(best, color=utils.GRAY, linestyle=":", label=f"best validation accuracy: epoch {best}")
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    utils.save_figure(figure, run_dir / "curves.png")


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


def check_finite(loss, dtype, step, history):
    """Stop a run that has diverged before it overwrites a good checkpoint."""
    if not math.isfinite(loss):
        kept = f"last.pt is of epoch {len(history)}" if history else "nothing was saved yet"
        remedy = "a lower --lr or --amp off" if dtype is torch.float16 else "a lower --lr"
        raise ScriptError(f"training diverged (loss is NaN or infinite) by step {step}; {kept}; try {remedy}", code=1)


def announce(run_dir, args, setup, sizes, reason):
    """What is trained, where and how."""
    print(f"{TITLES[args.dataset]}: {sizes['train_images']:,} training, {sizes['val_images']:,} validation images")
    print(f"{MODELS[args.model]}: {sizes['parameters']:,} parameters, at most {args.epochs} epochs")
    print(f"{setup['device']}, torch {setup['torch']}, CPU threads: {setup['threads']}")
    print(f"{setup['precision']}: {reason}")
    print(f"run directory: {run_dir}")
    if args.mixup or args.cutmix:
        print("images are mixed: the training accuracy is that of their dominant labels")


# ---- training -------------------------------------------------------------------------------------------


def train(args, device, precision, run_dir, checkpoint):
    """Train until the last epoch or early stopping. checkpoint: of load_last(); updated when an epoch is saved."""
    configure(device, args.deterministic)

    # data: all of it on the device
    images, labels = load_dataset(args.dataset, args.data_dir, train=True, url=args.data_url)
    train_index, val_index = split_train_val(labels, args.val_size, args.seed)
    split = split_id(val_index)
    if checkpoint.get("split", split) != split:
        raise ScriptError(f"{run_dir}: this NumPy splits images differently; resume with the version in config.json")
    train_index = train_index[: args.limit]
    train_images, train_labels = pad(images[train_index]).to(device), labels[train_index].to(device)
    val_images, val_labels = images[val_index].to(device), labels[val_index].to(device)
    del images  # 154 MB

    # network and optimizer
    torch.manual_seed(args.seed)
    model = make_model(args.model, width=args.width).to(device, memory_format=utils.memory_format(device))
    net = torch.compile(model) if args.compile else model  # the same weights; `model` is what is saved
    optimizer = make_optimizer(model, args.lr, args.momentum, args.weight_decay, adamw=args.model == "cct")
    dtype, reason = precision
    mixed_precision = torch.autocast(device.type, dtype, enabled=dtype is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    # The incomplete last batch is dropped: its step would be as long as any other, its gradient noisier. Each
    # epoch is shuffled anew, so other images are left out.
    steps_per_epoch = len(train_images) // args.batch_size
    total_steps, warmup_steps = args.epochs * steps_per_epoch, round(args.warmup_epochs * steps_per_epoch)
    mixing = args.mixup > 0 or args.cutmix > 0

    # start or continue
    setup = {  # what decides the bits besides the arguments
        "device": utils.device_name(device),
        "precision": {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32"}[dtype],
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sizes = {"parameters": parameters, "train_images": len(train_images), "val_images": len(val_images)}
    announce(run_dir, args, setup, sizes, reason)
    if checkpoint["history"]:
        restore(checkpoint, run_dir / "last.pt", setup, model, optimizer, scaler)
    for partial in [path for name in FILES for path in run_dir.glob(f".{name}.*.partial")]:
        partial.unlink()  # of a process that was killed while it wrote
    config = {"args": vars(args), "dataset": args.dataset, **setup, **sizes, "finished": False}
    utils.write_json(run_dir / "config.json", config)
    print(HEADER, flush=True)

    progress = utils.Progress()
    for epoch in range(len(checkpoint["history"]) + 1, args.epochs + 1):
        begin = time.monotonic()
        order, offsets, flips = [part.to(device) for part in epoch_plan(args.seed, epoch, len(train_images))]
        mixes = mix_plan(args.seed, epoch, steps_per_epoch, args.mixup, args.cutmix) if mixing else None
        loss_sum, hits = torch.zeros((2,), device=device)  # summed there: .item() waits for the device
        model.train()
        for i in range(steps_per_epoch):
            # one step
            step = (epoch - 1) * steps_per_epoch + i
            lr = lr_at(step, total_steps, warmup_steps, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = slice(i * args.batch_size, (i + 1) * args.batch_size)
            inputs = augment(train_images, order[batch], offsets[batch], flips[batch])  # (B, 3, 32, 32)
            targets = train_labels[order[batch]]  # (B,)
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

            # progress
            if progress.due():
                mean_loss = loss_sum.item() / (i + 1)  # waits for the device
                check_finite(mean_loss, dtype, step + 1, checkpoint["history"])
                pace = (time.monotonic() - begin) / (i + 1)  # seconds a step
                speed, left = args.batch_size / pace, duration(pace * (total_steps - step - 1))
                where = f"epoch {epoch}/{args.epochs}, step {i + 1}/{steps_per_epoch}"
                progress.show(f"{where}: loss {mean_loss:.3f}, {speed:,.0f} images/s, {left} left")
            if step == 9 and device.type == "cpu" and not args.compile:
                hours = (time.monotonic() - begin) / (i + 1) * total_steps / 3600
                if hours > 1.5:
                    progress.clear()
                    print(f"about {hours:.0f} h here; for a first look: python train.py --quick", flush=True)
        train_loss = loss_sum.item() / steps_per_epoch  # waits for the device
        trained = time.monotonic()

        # validation
        batches = map(normalize, val_images.split(args.batch_size))
        with mixed_precision:
            val_logits = utils.predict(model, batches)  # (10000, 100)
        val_loss = F.cross_entropy(val_logits, val_labels).item()
        check_finite(train_loss + val_loss, dtype, step + 1, checkpoint["history"])
        row = {
            "epoch": epoch,
            "lr": lr,  # of the epoch's last step
            "train_loss": train_loss,  # on augmented images, with the smoothing
            "train_acc": hits.item() / (steps_per_epoch * args.batch_size),
            "val_loss": val_loss,  # without smoothing, so that runs compare
            "val_acc": (val_logits.argmax(1) == val_labels).sum().item() / len(val_labels),
            "seconds": round(time.monotonic() - begin, 2),
            "images_per_second": round(steps_per_epoch * args.batch_size / (trained - begin), 1),
        }
        history = [*checkpoint["history"], row]
        best = best_of(history)
        stop_early = args.patience > 0 and epoch - best["epoch"] >= args.patience

        # save: best.pt before last.pt; killed in between, the epoch is repeated
        common = {"format": 1, "args": vars(args), "epoch": epoch, "split": split, "model": model.state_dict()}
        if best is row:
            save_checkpoint(run_dir / "best.pt", common | {"val_acc": row["val_acc"]})
        content = common | {
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "setup": setup,
            "history": history,
            "finished": epoch == args.epochs or stop_early,
        }
        save_checkpoint(run_dir / "last.pt", content)
        checkpoint |= content  # in place: main() tells from it what is kept
        write_log(run_dir, args, history, curves=row["seconds"] > 5)  # drawing takes 0.3 s

        # report
        progress.clear()
        print(epoch_line(row, best, args.epochs), flush=True)
        if epoch > args.warmup_epochs + 1 and row["train_acc"] < 0.015:
            utils.warn("training accuracy is still at chance, 1 %; try another --lr")
        if stop_early:
            print(f"no better validation accuracy in {args.patience} epochs: stopping early")
            break


def finish(run_dir, args, checkpoint):
    """Write what the end of training leaves to write; also again, if a kill came just before it."""
    history, best = checkpoint["history"], best_of(checkpoint["history"])
    _, config = utils.open_run(run_dir)
    utils.write_json(run_dir / "config.json", config | {"finished": True})
    write_log(run_dir, args, history)
    spent = duration(sum(row["seconds"] for row in history))
    print(f"best validation accuracy {100 * best['val_acc']:.2f} % in epoch {best['epoch']}; trained for {spent}")
    print(f"wrote {', '.join(FILES)} to {run_dir}")
    print(f"next: python evaluate.py {utils.quote(run_dir)}")
    return {"run_dir": str(run_dir), "best_epoch": best["epoch"], "val_acc": best["val_acc"]}


def main(argv=None):
    """Train one run; returns {"run_dir", "best_epoch", "val_acc"}."""
    args = parse_args(argv)
    device = utils.select_device(args.device)
    precision = utils.select_precision(args.amp, device)
    run_dir = Path(args.output_dir).expanduser()
    with exclusive(run_dir):
        checkpoint = load_last(run_dir, args)
        if checkpoint["finished"]:
            print(f"already finished after epoch {checkpoint['epoch']}")
            return finish(run_dir, args, checkpoint)
        try:
            train(args, device, precision, run_dir, checkpoint)
        except KeyboardInterrupt as interrupt:
            code, done = 143 if interrupt.args else 130, len(checkpoint["history"])
            kept = f"last.pt holds epoch {done}" if done else "nothing was saved yet"
            raise ScriptError(f"stopped in epoch {done + 1}; {kept}; add --resume to continue", code) from None
        except Exception as error:
            compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
            if args.compile and (compiler or "torch.compile" in str(error)):
                reason = " ".join(str(error).split("\n")[:2])
                raise ScriptError(f"--compile does not work here ({reason}); leave it out", code=1) from None
            raise
        return finish(run_dir, args, checkpoint)


if __name__ == "__main__":
    utils.run_script(main)
