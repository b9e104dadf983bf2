"""Train ResNet-18 on CIFAR-100 from scratch.

    python train.py                     # the baseline: plain cross-entropy   -> runs/baseline
    python train.py --smoothing 0.1     # the one modification                -> runs/smoothing0.1
    python train.py --resume            # the same command goes on with a run that was killed

Writes into runs/<name>, where the name says which flags differ from their defaults: config.json, log.csv (a row
an epoch), curves.png, last.pt (all that --resume needs) and best.pt (the weights of the best validation epoch,
which evaluate.py and gradcam.py read). 5,000 of the training images are held out for validation; the test set is
not touched. On a CPU with the same number of threads a resumed run ends with the same bits as an undisturbed
one; --deterministic asks the same of a GPU.
"""

import contextlib
import io
import math
import os
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import utils
from data import TITLES, augment, epoch_plan, load_dataset, normalize, pad, split_id, split_train_val
from model import resnet18
from utils import ScriptError, duration

COLUMNS = "epoch,lr,train_loss,train_acc,val_loss,val_acc,seconds,images_per_second".split(",")


def parse_args(argv):
    parser = utils.ArgumentParser(__doc__)
    recipe = parser.add_argument_group("recipe")
    add = recipe.add_argument
    add("--smoothing", type=float, default=0.0, help="label smoothing a: targets are (1 - a) one-hot + a / 100")
    add("--epochs", type=int, default=40, help="passes over the training images, at most")
    add("--batch-size", type=int, default=128, help="images per step")
    add("--lr", type=float, default=0.01, help="learning rate at the end of the warmup")
    add("--momentum", type=float, default=0.9, help="Nesterov momentum")
    add("--weight-decay", type=float, default=5e-4, help="L2 penalty, on all parameters")
    add("--warmup-epochs", type=int, help="epochs of linear warmup (default: 2, or all but one of a shorter run)")
    add("--patience", type=int, default=10, help="stop after so many epochs without a better accuracy; 0: never")
    add("--seed", type=int, default=42, help="of the split, the initial weights, the order and the augmentation")
    add("--val-size", type=int, default=5000, help="training images held out, equally many of each class")
    add("--width", type=int, default=64, help="channels of the first stage; 16 is several times faster on a CPU")
    add("--limit", type=int, metavar="N", help="train on the first N training images only, for a quick look")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="mixed precision; auto: what is fast")
    add("--compile", action="store_true", help="torch.compile: starts later, and may be faster on a GPU")
    add("--deterministic", action="store_true", help="the same bits in every run on one GPU, somewhat slower")

    where = parser.add_argument_group("where")
    utils.add_common_flags(where, dataset="cifar100")
    where.add_argument("--data-url", metavar="URL", help="where to download cifar-100-python.tar.gz from")
    where.add_argument("--output-dir", metavar="DIR", help="the run directory, if not runs/<name>")
    where.add_argument("--resume", action="store_true", help="go on from the run's last.pt; start if there is none")
    args = parser.parse_args(argv)
    recipe_flags = [action.dest for action in recipe._group_actions]
    args.output_dir = args.output_dir or str(Path("runs") / run_name(args, recipe_flags, parser.get_default))
    if args.warmup_epochs is None:
        args.warmup_epochs = min(2, max(args.epochs - 1, 0))

    def require(flag, valid, wanted):
        if not valid:
            value = getattr(args, flag[2:].replace("-", "_"))
            parser.error(f"{flag} {value} must be {wanted}")

    # torch trains without smoothing if it is negative or NaN, and says nothing
    require("--smoothing", 0 <= args.smoothing < 1, "in [0, 1)")
    require("--epochs", args.epochs >= 1, "at least 1")
    require("--lr", 0 < args.lr < math.inf, "positive and finite")
    require("--momentum", 0 < args.momentum < 1, "in (0, 1)")
    require("--weight-decay", 0 <= args.weight_decay < math.inf, "0 or positive, and finite")
    require("--warmup-epochs", 0 <= args.warmup_epochs < args.epochs, f"at least 0 and below --epochs {args.epochs}")
    require("--patience", args.patience >= 0, "at least 0")
    require("--seed", 0 <= args.seed < 2**32, "in 0..4294967295")
    whole = 100 <= args.val_size < 50_000 and args.val_size % 100 == 0
    require("--val-size", whole, "a multiple of 100 in 100..49900")
    require("--width", 1 <= args.width <= 1024, "in 1..1024")
    train_size = 50_000 - args.val_size
    require("--limit", args.limit is None or 1 <= args.limit <= train_size, f"in 1..{train_size}, the images there are")
    train_size = args.limit or train_size
    require("--batch-size", 2 <= args.batch_size <= train_size, f"in 2..{train_size}, the number of training images")
    return args


def run_name(args, recipe_flags, default):
    """baseline, or smoothing0.1, then -<flag><value> for every other recipe flag that is not at its default."""
    name = f"smoothing{args.smoothing}" if args.smoothing else "baseline"
    for flag in recipe_flags[1:]:
        value = getattr(args, flag)
        if value != default(flag):
            name += f"-{flag.replace('_', '-')}" + ("" if value is True else str(value))
    return f"synthetic-{name}" if args.dataset == "synthetic" else name


def select_precision(amp, device):
    """(dtype, reason): the dtype for torch.autocast, None for float32, and why.

    Hardware without bfloat16 emulates it, several times slower than float32; torch.cuda.is_bf16_supported()
    counts that as support. float16 needs a GradScaler: gradients below 6e-8 would become zero.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        fast, reason = ("bf16", "fast on this GPU") if capability >= (8, 0) else ("fp16", "this GPU has no bfloat16")
        possible = {"off", "fp16", fast}
    elif device.type == "cpu":
        try:
            has_bf16 = re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", Path("/proc/cpuinfo").read_text())
        except OSError:  # not Linux
            has_bf16 = False
        fast, reason = ("bf16", "fast on this CPU") if has_bf16 else ("off", "this CPU has no bfloat16")
        possible = {"off", fast}
    else:
        fast, reason, possible = "off", "not tried on this device", {"off"}
    if amp == "auto":
        amp = fast
    elif amp not in possible:
        choices = ", ".join(sorted(possible))
        raise ScriptError(f"--amp {amp} is not for {utils.device_name(device)}; choose {choices}, or leave it out")
    else:
        reason = "as asked"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp], reason


def lr_at(step, total_steps, warmup_steps, peak):
    """Learning rate of one optimizer step, counted from 0: linear up to peak, then a cosine down to zero.

    A plain function of the step: nothing to save, nothing to restore. At step warmup_steps - 1 it is peak
    exactly. Loshchilov and Hutter, arXiv:1608.03983, without restarts; warmup as in Goyal et al.,
    arXiv:1706.02677.
    """
    if step < warmup_steps:
        return peak * ((step + 1) / warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))


def make_optimizer(model, lr, momentum, weight_decay):
    """SGD with Nesterov momentum on all parameters, as one fused kernel where there is one."""
    parameters = list(model.parameters())
    fused = parameters[0].device.type != "mps"  # fused also spares a wait for the GradScaler's overflow check
    optimizer = torch.optim.SGD(parameters, lr, momentum, weight_decay=weight_decay, nesterov=True, fused=fused)
    # Without this, fused SGD starts from uninitialised memory if float16 overflows in the very first step.
    for parameter in parameters:
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


@contextlib.contextmanager
def exclusive(run_dir):
    """Refuse a second process in run_dir (not on Windows). The lock goes when the process ends, however it ends."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / ".lock", "w")
    except OSError as error:
        raise ScriptError(f"cannot write to {run_dir} ({error.strerror}); choose another --output-dir") from None
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            advice = "wait for it, or choose another --output-dir"
            raise ScriptError(f"another process is training in {run_dir}; {advice}") from None
        except (ImportError, OSError):
            pass  # Windows, and some network drives, have no such locks
        yield


def load_last(run_dir, args):
    """The checkpoint to go on from, or None for a new run. Never overwrites a run, never mixes two."""
    last = run_dir / "last.pt"
    if not args.resume:
        if (run_dir / "config.json").exists() or last.exists():
            advice = "add --resume to go on with it, or use another --output-dir"
            raise ScriptError(f"{run_dir} already holds a run; {advice}")
        return None
    if not last.exists():
        if (run_dir / "log.csv").exists():
            raise ScriptError(f"{run_dir} has a log.csv but no last.pt to go on from; use another --output-dir")
        print(f"nothing to resume in {run_dir} yet, starting from the beginning")
        return None
    checkpoint = utils.load_checkpoint(last)
    if not {"optimizer", "scaler", "history", "setup", "best_epoch", "best_acc", "finished"} <= checkpoint.keys():
        raise ScriptError(f"{last} holds weights only, it may be a best.pt; put the real last.pt back, or train anew")
    for flag, old in checkpoint["args"].items():
        new = getattr(args, flag, None)
        if flag not in utils.PLACES and new != old:
            flag = "--" + flag.replace("_", "-")
            raise ScriptError(
                f"{run_dir} was started with {flag} {old}, not {new}; repeat the flags of its start to go on with it, "
                "or use another --output-dir"
            )
    return checkpoint


def save_checkpoint(path, content):
    buffer = io.BytesIO()  # in memory first: torch hides the reason when a write fails
    torch.save(content, buffer)
    utils.write_file(path, lambda file: file.write(buffer.getbuffer()))


def draw_curves(path, history, best_epoch, title):
    figure, (left, right) = utils.new_figure(10, 4, 1, 2)
    epochs = [row["epoch"] for row in history]
    for axes, key, scale, label in ((left, "loss", 1, "cross-entropy (nats)"), (right, "acc", 100, "accuracy (%)")):
        for part, name, style in (("train", "training, augmented", "-o"), ("val", "validation", "--o")):
            color = utils.BLUE if part == "train" else utils.VERMILION
            values = [scale * row[f"{part}_{key}"] for row in history]
            axes.plot(epochs, values, style, color=color, label=name, markersize=3)
        axes.axvline(
            best_epoch, color=utils.GRAY, linestyle=":", label=f"best validation accuracy: epoch {best_epoch}"
        )
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    figure.suptitle(title)
    utils.save_figure(figure, path)


HEADER = "  epoch       lr  train loss  train %  val loss   val %     best @ epoch  seconds  images/s  left"


def epoch_line(row, best_acc, best_epoch, epochs):
    """One row of the log for the screen, under HEADER; accuracies in %."""
    left = duration((epochs - row["epoch"]) * row["seconds"])
    return (
        f"{row['epoch']:>4}/{epochs:<3}{row['lr']:8.5f} {row['train_loss']:11.4f} {100 * row['train_acc']:8.2f} "
        f"{row['val_loss']:9.4f} {100 * row['val_acc']:7.2f} {100 * best_acc:8.2f} @ {best_epoch:<5} "
        f"{row['seconds']:8.1f} {row['images_per_second']:9,.0f}  {left}"
    )


def check_finite(loss, where, history):
    """Stop a run that has diverged before it overwrites a good checkpoint. loss: a tensor; waits for the device."""
    if not math.isfinite(loss.item()):
        kept = f"last.pt is of epoch {len(history)}" if history else "nothing was saved yet"
        raise ScriptError(f"training diverged (loss is NaN or infinite) {where}; {kept}; try a lower --lr", code=1)


def main(argv=None):
    """Train one run; returns {"run_dir", "best_epoch", "val_acc"}."""
    args = parse_args(argv)
    device = utils.select_device(args.device)
    precision = select_precision(args.amp, device)
    run_dir = Path(args.output_dir).expanduser()
    with exclusive(run_dir):
        checkpoint = load_last(run_dir, args)
        if checkpoint and checkpoint["finished"]:
            print(f"already finished after epoch {len(checkpoint['history'])}")
        else:
            checkpoint = train(args, device, precision, run_dir, checkpoint)
        return finish(run_dir, args, checkpoint)


def train(args, device, precision, run_dir, checkpoint=None):
    """Train until the last epoch or until it no longer helps; returns the content of last.pt."""
    for stale in run_dir.glob(".*.partial"):  # of a process that was killed while it wrote
        stale.unlink()
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # older torch asks for it, before cuBLAS starts
    torch.use_deterministic_algorithms(args.deterministic)
    torch.backends.cudnn.benchmark = not args.deterministic  # else it picks algorithms by timing them

    images, labels = load_dataset(args.dataset, args.data_dir, train=True, url=args.data_url)
    train_index, val_index = split_train_val(labels, args.val_size, args.seed)
    train_index = train_index[: args.limit]
    train_images, train_labels = pad(images[train_index]).to(device), labels[train_index].to(device)
    val_images, val_labels = images[val_index].to(device), labels[val_index].to(device)
    del images  # 154 MB

    torch.manual_seed(args.seed)
    model = resnet18(width=args.width).to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, args.lr, args.momentum, args.weight_decay)
    dtype, reason = precision
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    # The last, smaller batch of an epoch is left out: its few images would make a step as long as any other,
    # on a noisier gradient. The order is another one in every epoch, so these are other images each time.
    steps_per_epoch = len(train_images) // args.batch_size
    total_steps, warmup_steps = args.epochs * steps_per_epoch, args.warmup_epochs * steps_per_epoch
    setup = {  # what decides the bits besides the arguments
        "device": utils.device_name(device),
        "precision": {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32"}[dtype],
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }
    parameters = sum(parameter.numel() for parameter in model.parameters())
    config = {"args": vars(args), "dataset": args.dataset, "parameters": parameters, **setup}
    config |= {"train_images": len(train_images), "val_images": len(val_images), "finished": False}
    print(
        f"{setup['device']}, {setup['threads']} threads | {setup['precision']}: {reason} | torch {setup['torch']} | "
        f"ResNet-18, {parameters:,} parameters\n"
        f"{TITLES[args.dataset]}: {len(train_images):,} training and {len(val_images):,} validation images | "
        f"{args.epochs} epochs of {steps_per_epoch} steps -> {run_dir}"
    )

    history, best_epoch, best_acc = [], 0, -1.0
    if checkpoint:
        restore(checkpoint, model, optimizer, scaler, run_dir / "last.pt")
        history, best_epoch, best_acc = (checkpoint[key] for key in ("history", "best_epoch", "best_acc"))
        print(f"resuming after epoch {len(history)}")
        for key, now in setup.items():
            then = checkpoint["setup"].get(key)
            if then != now and (key != "threads" or device.type == "cpu"):
                utils.warn(f"{key} was {then} and is {now} now: as good a run, but not the same bits")
    utils.write_json(run_dir / "config.json", config)

    progress = utils.Progress()
    try:
        net = torch.compile(model) if args.compile else model  # the same weights; `model` is what is saved
        print(HEADER, flush=True)
        for epoch in range(len(history) + 1, args.epochs + 1):
            start = time.monotonic()
            order, offsets, flips = (part.to(device) for part in epoch_plan(args.seed, epoch, len(train_images)))
            loss_sum, hits = torch.zeros((2,), device=device)  # summed there: reading a number waits for the device
            model.train()
            for i in range(steps_per_epoch):
                step = (epoch - 1) * steps_per_epoch + i
                lr = lr_at(step, total_steps, warmup_steps, args.lr)
                for group in optimizer.param_groups:
                    group["lr"] = lr

                batch = slice(i * args.batch_size, (i + 1) * args.batch_size)
                inputs = augment(train_images, order[batch], offsets[batch], flips[batch])  # (B, 3, 32, 32)
                targets = train_labels[order[batch]]  # (B,)
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    logits = net(inputs)  # (B, 100)
                loss = F.cross_entropy(logits.float(), targets, label_smoothing=args.smoothing)
                optimizer.zero_grad()
                scaler.scale(loss).backward()  # a disabled scaler changes nothing
                scaler.step(optimizer)
                scaler.update()

                loss_sum += loss.detach()
                hits += (logits.argmax(1) == targets).sum()
                if progress.due():
                    check_finite(loss_sum, f"by step {step + 1}", history)
                    speed = (i + 1) * args.batch_size / (time.monotonic() - start)
                    in_epoch, in_run = ((n - 1) * args.batch_size / speed for n in (steps_per_epoch - i, total_steps - step))
                    progress.show(
                        f"epoch {epoch}/{args.epochs} step {i + 1}/{steps_per_epoch} loss {loss_sum.item() / (i + 1):.3f} "
                        f"{speed:,.0f} images/s, {duration(in_run)} left (epoch: {duration(in_epoch)})"
                    )
            check_finite(loss_sum, f"by step {step + 1}", history)
            trained = time.monotonic()

            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                val_logits = utils.predict(model, map(normalize, val_images.split(args.batch_size)))  # (5000, 100)
            val_loss = F.cross_entropy(val_logits, val_labels)
            check_finite(val_loss, f"by step {step + 1}", history)
            row = {
                "epoch": epoch,
                "lr": lr,  # of the epoch's last step
                "train_loss": loss_sum.item() / steps_per_epoch,  # on augmented images, with the smoothing
                "train_acc": hits.item() / (steps_per_epoch * args.batch_size),
                "val_loss": val_loss.item(),  # without smoothing, so that runs compare
                "val_acc": (val_logits.argmax(1) == val_labels).sum().item() / len(val_labels),
                "seconds": round(time.monotonic() - start, 2),
                "images_per_second": round(steps_per_epoch * args.batch_size / (trained - start), 1),
            }
            better = row["val_acc"] > best_acc
            if better:
                best_epoch, best_acc = epoch, row["val_acc"]
            tired = args.patience > 0 and epoch - best_epoch >= args.patience

            # best.pt before last.pt: killed in between, the epoch is repeated and writes the same best.pt
            # again.
            common = {"format": 1, "args": vars(args), "epoch": epoch, "model": model.state_dict()}
            common["split"] = split_id(val_index)
            if better:
                save_checkpoint(run_dir / "best.pt", common | {"val_acc": best_acc})
            checkpoint = common | {
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "setup": setup,
                "history": [*history, row],
                "best_epoch": best_epoch,
                "best_acc": best_acc,
                "finished": epoch == args.epochs or tired,
            }
            save_checkpoint(run_dir / "last.pt", checkpoint)
            history.append(row)
            utils.write_csv(run_dir / "log.csv", COLUMNS, history)

            progress.clear()
            print(epoch_line(row, best_acc, best_epoch, args.epochs), flush=True)
            if epoch > args.warmup_epochs and row["train_acc"] < 0.015:
                utils.warn("training accuracy is still at chance, 1 %; try another --lr")
            if tired:
                print(f"no better validation accuracy in {args.patience} epochs: stopping early")
                break
    except KeyboardInterrupt as interrupt:
        code = 143 if isinstance(interrupt, utils.Terminated) else 130
        kept = "nothing was saved yet; start again with the same command and --resume"
        if history:
            kept = f"last.pt holds epoch {len(history)}; the same command with --resume goes on from there"
        raise ScriptError(f"stopped in epoch {len(history) + 1}; {kept}", code) from None
    except Exception as error:
        if args.compile and not isinstance(error, ScriptError) and not history:
            reason = " ".join(str(error).split("\n")[:2])
            raise ScriptError(f"--compile does not work here ({reason}); leave it out", code=1) from None
        raise
    return checkpoint


def restore(checkpoint, model, optimizer, scaler, path):
    """Put weights, momentum and scale of a last.pt back in place."""
    utils.load_weights(model, checkpoint["model"], path)
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"] and scaler.is_enabled():  # empty if the run began without one
            scaler.load_state_dict(checkpoint["scaler"])
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError):
        raise ScriptError(f"{path} is incomplete; train anew in another --output-dir") from None


def finish(run_dir, args, checkpoint):
    """Write what the end of training leaves to write; also again, if a kill came just before it."""
    history, best_epoch, best_acc = (checkpoint["history"], checkpoint["best_epoch"], checkpoint["best_acc"])
    _, config = utils.open_run(run_dir)
    utils.write_json(run_dir / "config.json", config | {"finished": True})
    utils.write_csv(run_dir / "log.csv", COLUMNS, history)
    title = f"ResNet-18 on {TITLES[args.dataset]}: {run_dir.name}"
    draw_curves(run_dir / "curves.png", history, best_epoch, title)
    seconds = sum(row["seconds"] for row in history)
    print(f"best validation accuracy {100 * best_acc:.2f} % in epoch {best_epoch}; trained for {duration(seconds)}")
    print(f"wrote config.json, log.csv, curves.png, last.pt and best.pt to {run_dir}")
    print(f"next: python evaluate.py {utils.quote(run_dir)}{utils.data_dir_flag(args)}")
    return {"run_dir": str(run_dir), "best_epoch": best_epoch, "val_acc": best_acc}


if __name__ == "__main__":
    utils.run_script(main)
