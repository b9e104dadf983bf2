"""Train ResNet-18 on CIFAR-100 from scratch.

    python train.py                     # the baseline: plain cross-entropy   -> runs/baseline
    python train.py --smoothing 0.1     # the one modification                -> runs/smoothing0.1
    python train.py --resume            # the same command continues a run that was killed, as if it had not been

Writes into runs/<name>, where the name says which flags differ from their defaults: config.json, log.csv (a row an
epoch), curves.png, last.pt (all that --resume needs) and best.pt (the weights of the best validation epoch, which
evaluate.py and gradcam.py read). 5,000 of the training images are held out for validation; the test set is not touched.
"""

import contextlib
import io
import math
import re
import shlex
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import utils
from data import augment, epoch_plan, load_dataset, normalize, pad, split_train_val
from model import resnet18
from utils import ScriptError, duration

COLUMNS = "epoch,lr,train_loss,train_acc,val_loss,val_acc,seconds,images_per_second".split(",")
PLACES = {"data_dir", "dataset", "data_url", "device", "output_dir", "resume"}  # flags that leave the recipe alone


def parse_args(argv):
    parser = utils.ArgumentParser(__doc__)
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--smoothing", type=float, default=0.0, help="label smoothing a: targets are (1 - a) one-hot + a / 100")
    recipe.add_argument("--epochs", type=int, default=40, help="passes over the training images, at most")
    recipe.add_argument("--batch-size", type=int, default=128, help="images per step")
    recipe.add_argument("--lr", type=float, default=0.01, help="learning rate at the end of the warmup")
    recipe.add_argument("--momentum", type=float, default=0.9, help="Nesterov momentum")
    recipe.add_argument("--weight-decay", type=float, default=5e-4, help="L2 penalty, on all parameters")
    recipe.add_argument("--warmup-epochs", type=int, default=2, help="epochs of linear warmup before the cosine decay to zero")
    recipe.add_argument("--patience", type=int, default=10, help="stop after this many epochs without a better validation accuracy; 0: never")
    recipe.add_argument("--seed", type=int, default=42, help="of the split, the initial weights, the order and the augmentation")
    recipe.add_argument("--val-size", type=int, default=5000, help="training images held out, the same number of each class")
    recipe.add_argument("--width", type=int, default=64, help="channels of the first stage; 16 is 12 times faster to train")
    recipe.add_argument("--limit", type=int, metavar="N", help="train on the first N training images only, for a quick look")
    recipe.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="mixed precision; auto takes what is fast here")
    recipe.add_argument("--compile", action="store_true", help="torch.compile: a minute longer to start, then faster on a GPU")
    recipe.add_argument("--deterministic", action="store_true", help="the same bits in every run on one GPU, somewhat slower")
    places = parser.add_argument_group("where")
    utils.add_common_flags(places, dataset="cifar100")
    places.add_argument("--data-url", metavar="URL", help="where to download cifar-100-python.tar.gz, if not from its authors")
    places.add_argument("--output-dir", metavar="DIR", help="the run directory, if not runs/<name>")
    places.add_argument("--resume", action="store_true", help="continue the run from its last.pt; start it if there is none")
    args = parser.parse_args(argv)

    def require(flag, valid, wanted):
        if not valid:
            value = getattr(args, flag[2:].replace("-", "_"))
            parser.error(f"{flag} {value} must be {wanted}")

    require("--smoothing", 0 <= args.smoothing < 1, "in [0, 1)")  # torch trains with 0 if it is negative or NaN
    require("--epochs", args.epochs >= 1, "at least 1")
    require("--lr", 0 < args.lr < math.inf, "positive and finite")
    require("--momentum", 0 < args.momentum < 1, "in (0, 1)")
    require("--weight-decay", 0 <= args.weight_decay < math.inf, "0 or positive, and finite")
    require("--warmup-epochs", 0 <= args.warmup_epochs < args.epochs, f"at least 0 and below --epochs {args.epochs}")
    require("--patience", args.patience >= 0, "at least 0")
    require("--seed", 0 <= args.seed < 2**32, "in 0..4294967295")
    require("--val-size", 100 <= args.val_size < 50_000 and args.val_size % 100 == 0, "a multiple of 100 in 100..49900")
    require("--width", args.width >= 1, "at least 1")
    train_size = 50_000 - args.val_size
    require("--limit", args.limit is None or 1 <= args.limit <= train_size, f"in 1..{train_size}, the training images there are")
    train_size = args.limit or train_size
    require("--batch-size", 2 <= args.batch_size <= train_size, f"in 2..{train_size}, the number of training images")

    recipe_flags = [action.dest for action in recipe._group_actions]
    args.output_dir = args.output_dir or str(Path("runs") / run_name(args, recipe_flags, parser.get_default))
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

    Hardware without bfloat16 emulates it, several times slower than float32; torch.cuda.is_bf16_supported() counts that
    as support. float16 needs a GradScaler: gradients below 6e-8 would become zero.
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
        raise ScriptError(f"--amp {amp} is not for {utils.device_name(device)}; choose {', '.join(sorted(possible))}, or leave it to auto")
    else:
        reason = "as asked"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp], reason


def lr_at(step, total_steps, warmup_steps, peak):
    """Learning rate of one optimizer step, counted from 0: linear up to peak, then a cosine down to zero.

    A plain function of the step: nothing to save, nothing to restore. lr_at(warmup_steps - 1) is peak exactly.
    Loshchilov and Hutter, arXiv:1608.03983, without restarts; warmup as in Goyal et al., arXiv:1706.02677.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))


@contextlib.contextmanager
def exclusive(run_dir):
    """Refuse a second process in run_dir. The system drops the lock with the process, however that ends."""
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
            raise ScriptError(f"another process is training in {run_dir}; wait for it, or choose another --output-dir") from None
        except (ImportError, OSError):
            pass  # Windows, and some network drives, have no such locks
        yield


def load_last(run_dir, args):
    """The checkpoint to continue from, or None for a new run. Never overwrites or mixes runs."""
    last, log = run_dir / "last.pt", run_dir / "log.csv"
    if not args.resume:
        if (run_dir / "config.json").exists() or last.exists():
            raise ScriptError(f"{run_dir} already holds a run; add --resume to continue it, or choose another --output-dir")
        return None
    if not last.exists():
        if log.exists():
            raise ScriptError(f"{run_dir} has a log.csv but no last.pt to continue from; choose another --output-dir")
        print(f"nothing to resume in {run_dir} yet, starting from the beginning")
        return None
    checkpoint = utils.load_checkpoint(last)
    if "optimizer" not in checkpoint:
        raise ScriptError(f"{last} holds weights only and cannot be continued; it is a best.pt, restore the real last.pt")
    for flag, old in checkpoint["args"].items():
        new = getattr(args, flag, None)
        if (flag not in PLACES or flag == "dataset") and new != old:
            raise ScriptError(
                f"{run_dir} was started with --{flag.replace('_', '-')} {old}, not {new}; repeat its flags to continue it, "
                "or choose another --output-dir"
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
        for part, color, style in (("train", utils.BLUE, "-"), ("val", utils.VERMILION, "--")):
            name = {"train": "training, augmented", "val": "validation"}[part]
            axes.plot(epochs, [scale * row[f"{part}_{key}"] for row in history], style, color=color, label=name, marker="." if len(epochs) < 3 else None)
        axes.axvline(best_epoch, color=utils.GRAY, linestyle=":", label=f"best validation accuracy: epoch {best_epoch}")
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    figure.suptitle(title)
    utils.save_figure(figure, path)


def main(argv=None):
    """Train one run; returns {"run_dir", "best_epoch", "val_acc"}."""
    args = parse_args(argv)
    device = utils.select_device(args.device)
    dtype, reason = select_precision(args.amp, device)
    run_dir = Path(args.output_dir).expanduser()
    with exclusive(run_dir):
        return train(args, device, dtype, reason, run_dir)


def train(args, device, dtype, reason, run_dir):
    checkpoint = load_last(run_dir, args)
    for stale in run_dir.glob(".*.partial"):  # of a process that was killed while it wrote
        stale.unlink()
    torch.use_deterministic_algorithms(args.deterministic)
    torch.backends.cudnn.benchmark = not args.deterministic

    images, labels = load_dataset(args.dataset, args.data_dir, train=True, url=args.data_url)
    train_index, val_index = split_train_val(labels, args.val_size, args.seed)
    train_index = train_index[: args.limit]
    train_images, train_labels = pad(images[train_index]).to(device), labels[train_index].to(device)
    val_images, val_labels = images[val_index].to(device), labels[val_index].to(device)

    torch.manual_seed(args.seed)
    model = resnet18(width=args.width).to(device, memory_format=torch.channels_last)
    net = torch.compile(model) if args.compile else model  # the same parameters; only `model` is saved and validated
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, nesterov=True, fused=device.type != "mps"
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    # The last, smaller batch of each epoch is left out: its few images would make a step as long as any other, on a noisier
    # gradient. Every epoch has another order, so no image is left out twice in a row but by chance.
    steps_per_epoch = len(train_images) // args.batch_size
    total_steps, warmup_steps = args.epochs * steps_per_epoch, args.warmup_epochs * steps_per_epoch
    name = "CIFAR-100" if args.dataset == "cifar100" else "SYNTHETIC data"
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32"}[dtype]
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{utils.device_name(device)} | {precision}, {reason} | torch {torch.__version__} | ResNet-18, {parameters:,} parameters\n"
        f"{name}: {len(train_images):,} training and {len(val_images):,} validation images | "
        f"{args.epochs} epochs of {steps_per_epoch} steps -> {run_dir}"
    )
    # What decides the bits besides the arguments: a resumed run that differs here is as good a run, but not the same one.
    setup = {"device": utils.device_name(device), "precision": precision, "torch": str(torch.__version__), "threads": torch.get_num_threads()}
    config = {"args": vars(args), "dataset": args.dataset, "parameters": parameters, **setup}
    config |= {"train_images": len(train_images), "val_images": len(val_images), "finished": False}

    history, best_epoch, best_acc, finished = [], 0, -1.0, False
    if checkpoint:
        utils.load_weights(model, checkpoint["model"], run_dir / "last.pt")
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"] and scaler.is_enabled():  # empty if the run began without one
            scaler.load_state_dict(checkpoint["scaler"])
        history, best_epoch, best_acc, finished = (checkpoint[key] for key in ("history", "best_epoch", "best_acc", "finished"))
        print(f"resuming after epoch {len(history)}" if not finished else f"already finished after epoch {len(history)}")
        for key, value in setup.items():
            if value != checkpoint["setup"][key] and not finished:
                utils.warn(f"{key} was {checkpoint['setup'][key]} and is {value} now: not bit for bit the run that it would have been")
        utils.write_csv(run_dir / "log.csv", COLUMNS, history)  # in case it was killed between last.pt and log.csv
    utils.write_json(run_dir / "config.json", config)

    progress, seconds = utils.Progress(), 0.0
    header = f"{'epoch':>7} {'lr':>8} {'train loss':>11} {'train %':>8} {'val loss':>9} {'val %':>7} {'best':>10} {'seconds':>8} {'images/s':>9}  left"
    try:
        if not finished:
            print(header, flush=True)
        for epoch in range(len(history) + 1, args.epochs + 1):
            if finished:
                break
            start = time.monotonic()
            order, offsets, flips = (part.to(device) for part in epoch_plan(args.seed, epoch, len(train_images)))
            loss_sum, hits = torch.zeros((), device=device), torch.zeros((), device=device)  # stay there: reading them waits
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
                    check_finite(loss_sum, step, history)
                    speed = (i + 1) * args.batch_size / (time.monotonic() - start)
                    left = (total_steps - step - 1) * args.batch_size / speed
                    progress.show(
                        f"epoch {epoch}/{args.epochs}, step {i + 1}/{steps_per_epoch}: loss {loss_sum.item() / (i + 1):.3f}, {speed:,.0f} images/s, "
                        f"{duration((steps_per_epoch - i - 1) * args.batch_size / speed)} left in the epoch, {duration(left)} in the run"
                    )
            check_finite(loss_sum, step, history)
            trained = time.monotonic()
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                val_logits = utils.predict(model, map(normalize, val_images.split(500)))
            row = {
                "epoch": epoch,
                "lr": lr,  # of the epoch's last step
                "train_loss": loss_sum.item() / steps_per_epoch,  # with smoothing, if any; on augmented images
                "train_acc": hits.item() / (steps_per_epoch * args.batch_size),
                "val_loss": F.cross_entropy(val_logits, val_labels).item(),  # without smoothing, so that runs compare
                "val_acc": (val_logits.argmax(1) == val_labels).double().mean().item(),
                "seconds": round(time.monotonic() - start, 2),
                "images_per_second": round(steps_per_epoch * args.batch_size / (trained - start), 1),
            }
            history.append(row)
            better = row["val_acc"] > best_acc
            if better:
                best_epoch, best_acc = epoch, row["val_acc"]
            finished = epoch == args.epochs or (args.patience > 0 and epoch - best_epoch >= args.patience)

            # best.pt before last.pt: killed in between, the epoch is repeated and writes the same best.pt again.
            common = {"format": 1, "args": vars(args), "model": model.state_dict(), "epoch": epoch}
            if better:
                save_checkpoint(run_dir / "best.pt", common | {"val_acc": best_acc})
            save_checkpoint(
                run_dir / "last.pt",
                common
                | {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "history": history, "setup": setup}
                | {"best_epoch": best_epoch, "best_acc": best_acc, "finished": finished},
            )
            utils.write_csv(run_dir / "log.csv", COLUMNS, history)

            progress.clear()
            print(
                f"{epoch:>4}/{args.epochs:<2} {lr:8.5f} {row['train_loss']:11.4f} {100 * row['train_acc']:8.2f} {row['val_loss']:9.4f} "
                f"{100 * row['val_acc']:7.2f} {100 * best_acc:6.2f}@{best_epoch:<3} {row['seconds']:8.1f} {row['images_per_second']:9,.0f}  "
                f"{duration((args.epochs - epoch) * row['seconds'])}",
                flush=True,
            )
            if epoch > args.warmup_epochs and row["train_acc"] < 0.015:
                utils.warn("training accuracy is still at chance, 1 %; try another --lr")
    except KeyboardInterrupt as interrupt:
        kept = f"last.pt holds epoch {len(history)}; the same command with --resume goes on from there" if history else "nothing was saved yet"
        raise ScriptError(f"stopped in epoch {len(history) + 1}; {kept}", code=143 if isinstance(interrupt, utils.Terminated) else 130) from None
    except Exception as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise ScriptError(f"--compile does not work here ({str(error).strip().splitlines()[0]}); leave it out", code=1) from None
        raise

    utils.write_json(run_dir / "config.json", config | {"finished": True})
    draw_curves(run_dir / "curves.png", history, best_epoch, f"ResNet-18 on {name}: {run_dir.name}")
    if len(history) < args.epochs:
        print(f"stopped early: no better validation accuracy in {args.patience} epochs")
    print(f"best validation accuracy {100 * best_acc:.2f} % in epoch {best_epoch}; trained for {duration(sum(row['seconds'] for row in history))}")
    print(f"wrote config.json, log.csv, curves.png, last.pt and best.pt to {run_dir}")
    print(f"next: python evaluate.py {shlex.quote(str(run_dir))}")
    return {"run_dir": str(run_dir), "best_epoch": best_epoch, "val_acc": best_acc}


def check_finite(loss_sum, step, history):
    """Stop a run that has diverged, before it overwrites a good checkpoint. Waits for the device."""
    if not math.isfinite(loss_sum.item()):
        kept = f"last.pt is from epoch {len(history)}" if history else "nothing was saved yet"
        raise ScriptError(f"training diverged (loss is NaN or infinite) by step {step + 1}; {kept}; try a lower --lr", code=1)


if __name__ == "__main__":
    utils.run_script(main)
