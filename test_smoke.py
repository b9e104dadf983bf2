"""Tests, offline, about a minute on two cores: the whole chain on synthetic data, and its parts against something independent.

    python test_smoke.py             # or pytest
    python test_smoke.py resume      # only the tests with "resume" in their names
    python test_smoke.py --long      # the long ones too, some ten minutes: kills at random instants, 500 damaged files

Tests on the real CIFAR-100 run where it is found (data/, or ../shared/cifar100), and are skipped elsewhere.
"""

import contextlib
import csv
import functools
import io
import itertools
import json
import math
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import unittest
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import evaluate
import failures
import gradcam
import train
import utils
from model import resnet18
from utils import ScriptError

HERE = Path(__file__).resolve().parent
TINY = "--dataset synthetic --device cpu --width 8 --limit 300 --batch-size 100 --val-size 100 --epochs 3 --warmup-epochs 1 --lr 0.1".split()


@functools.cache
def scratch():
    """A folder for this session's files, with a blank and an umlaut in its name; removed at the end."""
    holder = tempfile.TemporaryDirectory(prefix="smoke tést ")
    scratch.holder = holder
    return Path(holder.name)


def quietly(function, *args):
    """(result, what was printed) of function(*args)."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        result = function(*args)
    return result, printed.getvalue()


def environment(**changes):
    """For a subprocess: as many threads as here, because another number rounds differently."""
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(HERE)} | changes


def script(*args, env=None, cwd=HERE):
    """Run a script as a user does; returns the CompletedProcess, output as text."""
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env or environment(), capture_output=True, text=True, timeout=300)


def refused(main, argv, code, *words):
    """main(argv) must raise a one-line ScriptError with this code that says all the words."""
    try:
        quietly(main, [str(arg) for arg in argv])
    except ScriptError as error:
        message = str(error)
        assert error.code == code, f"{argv}: code {error.code}: {message}"
        assert "\n" not in message, message
        missing = [word for word in words if word not in message]
        assert not missing, f"{argv}: no {missing} in: {message}"
        return
    raise AssertionError(f"{argv} was accepted")


@contextlib.contextmanager
def replaced(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def real_data():
    """A --data-dir with the official CIFAR-100, or skip the test."""
    if (HERE / "data/cifar-100-python/train").exists():
        return HERE / "data"
    unpack = HERE.parent / "shared/cifar100/unpack.py"
    if not unpack.exists():
        raise unittest.SkipTest("no CIFAR-100 here")
    subprocess.run([sys.executable, unpack, scratch() / "real"], check=True, capture_output=True)
    return scratch() / "real"


def make_run(name, *flags):
    """Train (and leave unevaluated) a run of a few seconds; returns its directory."""
    run_dir = scratch() / name
    quietly(train.main, [*TINY, *flags, "--output-dir", str(run_dir)])
    return run_dir


@functools.cache
def chain():
    """Two synthetic runs, trained, evaluated, compared and explained through the scripts' main(); (run directories, output)."""
    runs, printed = [scratch() / "baseline", scratch() / "smoothing0.1"], []
    flags = "--dataset synthetic --device cpu --limit 4000 --batch-size 50 --val-size 500 --epochs 3 --warmup-epochs 1 --lr 0.1".split()
    for run_dir, others in zip(runs, (["--width", "16"], ["--width", "8", "--smoothing", "0.1", "--limit", "2000"])):
        printed.append(quietly(train.main, [*flags, *others, "--output-dir", str(run_dir)])[1])
    printed.append(quietly(evaluate.main, [*map(str, runs), "--device", "cpu"])[1])
    printed.append(quietly(failures.main, [str(runs[0]), "--compare", str(runs[1]), "--threshold", "0.75"])[1])
    printed.append(quietly(gradcam.main, [str(runs[0]), "--device", "cpu"])[1])
    return runs, printed


def copy_of_run(name, *without):
    """A copy of the chain's baseline under another name, without some of its files."""
    run_dir = scratch() / name
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(chain()[0][0], run_dir, ignore=shutil.ignore_patterns(*without) if without else None)
    return run_dir


def read_csv(path):
    return list(csv.DictReader(io.StringIO(Path(path).read_text())))


# ---- model -----------------------------------------------------------------------------------------------------------


def test_model_equals_torchvision():
    import torchvision

    reference = torchvision.models.resnet18(num_classes=100)
    reference.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    reference.maxpool = torch.nn.Identity()
    model = resnet18()
    assert sum(p.numel() for p in model.parameters()) == 11_220_132
    reference.load_state_dict(model.state_dict())
    images = torch.randn(4, 3, 32, 32)
    for training in (True, False):  # in training mode first, so that the running statistics are not the initial ones
        ours, theirs = model.train(training)(images), reference.train(training)(images)
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4), (ours - theirs).abs().max()


def test_model_initial_scale():
    """He initialisation: the variance of a convolution's weights is 2 / fan_out."""
    weight = resnet18().layer4[1].conv2.weight
    assert abs(weight.var().item() / (2 / (512 * 9)) - 1) < 0.01


def test_model_learns_a_few_images():
    torch.manual_seed(0)
    model = resnet18(width=8)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, nesterov=True)
    images, labels = torch.randn(20, 3, 32, 32), torch.arange(20)
    for _ in range(40):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05, loss.item()


# ---- data ------------------------------------------------------------------------------------------------------------


def test_data_names_and_constants_are_the_official_ones():
    folder = real_data() / "cifar-100-python"
    meta, test = (pickle.loads((folder / name).read_bytes(), encoding="latin1") for name in ("meta", "test"))
    assert data.CLASS_NAMES == meta["fine_label_names"]
    assert list(data.SUPERCLASSES) == meta["coarse_label_names"]
    assert (data.SUPERCLASS_OF[test["fine_labels"]] == test["coarse_labels"]).all()
    images, labels = data.load_cifar100(folder)  # the folder itself, not its parent
    assert images.shape == (50_000, 32, 32, 3) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    pixels = images.double() / 255
    assert torch.allclose(pixels.mean((0, 1, 2)), torch.tensor(data.MEAN).double(), atol=5e-5)
    assert torch.allclose(pixels.std((0, 1, 2)), torch.tensor(data.STD).double(), atol=5e-5)
    images, labels = data.load_cifar100(folder.parent, train=False)
    assert (images[7].permute(2, 0, 1).flatten().numpy() == test["data"][7]).all() and labels.tolist() == test[
        "fine_labels"
    ]


def test_data_split_is_stratified_and_a_function_of_the_seed():
    labels = data.load_synthetic()[1]
    train_index, val_index = data.split_train_val(labels, 5000, 42)
    assert len(train_index) == 45_000 and (torch.bincount(labels[val_index]) == 50).all()
    assert torch.equal(torch.cat([train_index, val_index]).sort().values, torch.arange(50_000))
    assert torch.equal(val_index, data.split_train_val(labels, 5000, 42)[1])
    assert not torch.equal(val_index, data.split_train_val(labels, 5000, 43)[1])


def test_data_augmentation_is_every_crop_and_flip_of_torchvision():
    from torchvision.transforms import functional as TF

    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    cases = list(itertools.product(range(9), range(9), (False, True)))
    offsets, flips = (torch.tensor([case[:2] for case in cases]), torch.tensor([case[2] for case in cases]))
    index = torch.arange(len(cases)) % 3
    batch = data.augment(data.pad(images), index, offsets, flips)
    assert batch.shape == (162, 3, 32, 32) and batch.is_contiguous(memory_format=torch.channels_last)
    for n, (row, column, flip) in enumerate(cases):
        expected = TF.crop(TF.pad(images[index[n]].permute(2, 0, 1), 4), row, column, 32, 32)
        expected = TF.normalize((TF.hflip(expected) if flip else expected) / 255, data.MEAN, data.STD)
        assert torch.allclose(batch[n], expected, atol=1e-5), cases[n]


def test_data_epoch_plan_draws_evenly_and_from_seed_and_epoch_alone():
    order, offsets, flips = data.epoch_plan(42, 1, 45_000)
    assert torch.equal(order.sort().values, torch.arange(45_000))
    counts = torch.bincount(offsets[:, 0] * 9 + offsets[:, 1], minlength=81)
    chi2 = ((counts - 45_000 / 81) ** 2 / (45_000 / 81)).sum().item()
    assert 40 < chi2 < 140, chi2  # 80 degrees of freedom: 99.99 % of fair draws
    assert abs(flips.double().mean().item() - 0.5) < 0.01
    torch.rand(5), np.random.rand(5)  # nobody else's draws matter
    assert torch.equal(order, data.epoch_plan(42, 1, 45_000)[0])
    for seed, epoch in ((42, 2), (43, 1), (0, 1)):
        assert not torch.equal(order, data.epoch_plan(seed, epoch, 45_000)[0])


def test_data_synthetic_is_fast_balanced_and_fixed():
    data.load_synthetic.cache_clear()
    start = time.monotonic()
    images, labels = data.load_synthetic(train=False)
    assert time.monotonic() - start < 5
    assert images.shape == (10_000, 32, 32, 3) and (torch.bincount(labels) == 100).all()
    data.load_synthetic.cache_clear()
    assert torch.equal(images, data.load_synthetic(train=False)[0])


# ---- train -----------------------------------------------------------------------------------------------------------


def test_train_lr_schedule():
    lr = functools.partial(train.lr_at, total_steps=100, warmup_steps=10, peak=0.4)
    assert math.isclose(lr(0), 0.04) and lr(9) == 0.4 and lr(10) == 0.4
    assert math.isclose(lr(55), 0.2) and 0 < lr(99) < 0.001
    assert math.isclose(lr(32.5), 0.4 * 0.5 * (1 + math.sqrt(0.5)))
    assert train.lr_at(0, 10, 0, 0.4) == 0.4


def test_train_run_names():
    for flags, name in (
        ("", "baseline"),
        ("--smoothing 0.1", "smoothing0.1"),
        ("--seed 43", "baseline-seed43"),
        ("--lr 0.1 --smoothing 0.1", "smoothing0.1-lr0.1"),
        ("--smoothing 0.1 --weight-decay 1e-3 --epochs 6", "smoothing0.1-epochs6-weight-decay0.001"),
        ("--dataset synthetic --limit 500 --deterministic", "synthetic-baseline-limit500-deterministic"),
        ("--data-dir elsewhere --device cpu --resume", "baseline"),
    ):
        assert train.parse_args(flags.split()).output_dir == str(Path("runs") / name), flags


def test_train_precision():
    cpu, fake = torch.device("cpu"), torch.cuda.get_device_capability
    assert train.select_precision("off", cpu)[0] is None
    refused(lambda argv: train.select_precision("fp16", cpu), [], 2, "--amp fp16")
    try:
        for capability, dtype in (
            ((7, 5), torch.float16),
            ((6, 0), torch.float16),
            ((8, 0), torch.bfloat16),
            ((9, 0), torch.bfloat16),
        ):
            torch.cuda.get_device_capability = lambda device: capability
            assert train.select_precision("auto", torch.device("cuda:0"))[0] is dtype
    finally:
        torch.cuda.get_device_capability = fake


def tensors_and_log(run_dir):
    """All that must agree between two runs that are the same: checkpoints but for the clock, and the log but for the clock."""
    clock = ("seconds", "images_per_second")
    found = {}
    for name in ("last.pt", "best.pt"):
        checkpoint = utils.load_checkpoint(run_dir / name)
        for row in checkpoint.get("history", []):
            for key in clock:
                row.pop(key)
        checkpoint["args"] = {key: value for key, value in checkpoint["args"].items() if key not in utils.PLACES}
        found[name] = checkpoint
    found["log.csv"] = [
        {key: value for key, value in row.items() if key not in clock} for row in read_csv(run_dir / "log.csv")
    ]
    return found


def equal(a, b):
    """Whether two nested structures are the same, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and a.numpy().tobytes() == b.numpy().tobytes()
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@functools.cache
def straight_run():
    return make_run("straight")


class Killed(BaseException):
    """What no `except Exception` stops, like a kill."""


@contextlib.contextmanager
def killed_at(call, moment):
    """Die just before or after the call-th time that a file is moved into place.

    A run moves config.json, and in each epoch best.pt (if it is better), last.pt and log.csv, in this order.
    """
    calls, replace = [], os.replace

    def fatal(*paths):
        calls.append(paths)
        if len(calls) == call and moment == "before":
            raise Killed
        replace(*paths)
        if len(calls) == call:
            raise Killed

    os.replace = fatal
    try:
        yield
    finally:
        os.replace = replace


def test_train_resume_is_the_same_run_bit_for_bit():
    """Killed where it hurts, before and after each file is moved into place, again and again in one run; then continued."""
    for name, kills in (
        ("a", [(2, "before"), (2, "after"), (3, "after")]),
        ("b", [(3, "before"), (4, "before"), (3, "before"), (3, "after")]),
    ):
        run_dir, argv = (
            scratch() / f"killed {name}",
            [*TINY, "--output-dir", str(scratch() / f"killed {name}"), "--resume"],
        )
        for call, moment in kills:
            try:
                with killed_at(call, moment):
                    quietly(train.main, argv)
                raise AssertionError(f"{call} {moment} was not reached")
            except Killed:
                pass
            for checkpoint in run_dir.glob("*.pt"):
                utils.load_checkpoint(checkpoint)  # the old one or the new one, never half of one
        quietly(train.main, argv)
        assert equal(tensors_and_log(run_dir), tensors_and_log(straight_run())), name


def test_train_resume_after_a_real_kill():
    run_dir = scratch() / "really killed"
    program = "import os, train; plan = train.epoch_plan; train.epoch_plan = lambda s, epoch, n: os._exit(9) if epoch == 3 else plan(s, epoch, n); train.main()"
    assert script("-c", program, *TINY, "--output-dir", run_dir).returncode == 9
    (run_dir / ".best.pt.123.partial").write_text("left behind by a kill while writing")
    _, printed = quietly(train.main, [*TINY, "--output-dir", str(run_dir), "--resume"])
    assert "resuming after epoch 2" in printed and "warning" not in printed, printed
    assert equal(tensors_and_log(run_dir), tensors_and_log(straight_run()))
    assert not list(run_dir.glob(".*.partial"))


def test_train_resume_comparison_notices_a_lost_momentum():
    """The negative control of the test above."""
    interrupted = interrupted_run("no momentum", epoch=2)
    checkpoint = utils.load_checkpoint(interrupted / "last.pt")
    checkpoint["optimizer"]["state"] = {}
    train.save_checkpoint(interrupted / "last.pt", checkpoint)
    quietly(train.main, [*TINY, "--output-dir", str(interrupted), "--resume"])
    assert not equal(tensors_and_log(interrupted), tensors_and_log(straight_run()))


def interrupted_run(name, epoch, *flags):
    """A run that Ctrl-C stopped in this epoch."""
    run_dir, plan = scratch() / name, train.epoch_plan

    def stop(seed, number, n):
        if number == epoch:
            raise KeyboardInterrupt
        return plan(seed, number, n)

    train.epoch_plan = stop
    try:
        refused(
            train.main,
            [*TINY, *flags, "--output-dir", run_dir],
            130,
            f"stopped in epoch {epoch}",
            "--resume" if epoch > 1 else "nothing",
        )
    finally:
        train.epoch_plan = plan
    return run_dir


def test_train_resume_says_what_it_does():
    run_dir = interrupted_run("says", 2)
    good = (run_dir / "last.pt").read_bytes()
    for damage in ({"optimizer": {}}, {"optimizer": {"state": {}, "param_groups": []}}):
        train.save_checkpoint(run_dir / "last.pt", utils.load_checkpoint(run_dir / "last.pt") | damage)
        refused(train.main, [*TINY, "--output-dir", run_dir, "--resume"], 2, "incomplete")
    shutil.copy(run_dir / "best.pt", run_dir / "last.pt")
    refused(train.main, [*TINY, "--output-dir", run_dir, "--resume"], 2, "weights only")
    (run_dir / "last.pt").write_bytes(good)
    refused(train.main, [*TINY, "--output-dir", run_dir], 2, "--resume", "already holds a run")
    for flag, value, old in (
        ("--lr", "0.2", "0.1"),
        ("--seed", "1", "42"),
        ("--epochs", "4", "3"),
        ("--smoothing", "0.1", "0.0"),
        ("--amp", "off", "auto"),
    ):
        refused(train.main, [*TINY, flag, value, "--output-dir", run_dir, "--resume"], 2, flag, value, old)
    _, printed = quietly(train.main, [*TINY, "--output-dir", str(run_dir), "--resume"])
    assert "resuming after epoch 1" in printed and equal(tensors_and_log(run_dir), tensors_and_log(straight_run()))
    _, printed = quietly(train.main, [*TINY, "--output-dir", str(run_dir), "--resume"])
    assert "already finished after epoch 3" in printed
    _, printed = quietly(train.main, [*TINY, "--epochs", "2", "--output-dir", str(scratch() / "new"), "--resume"])
    assert "nothing to resume" in printed and (scratch() / "new/best.pt").exists()


def test_train_stops_early_and_keeps_the_best():
    run_dir = make_run("early", "--epochs", "30", "--patience", "2", "--lr", "1e-9")  # nothing is learnt
    log, best, last = (
        read_csv(run_dir / "log.csv"),
        utils.load_checkpoint(run_dir / "best.pt"),
        utils.load_checkpoint(run_dir / "last.pt"),
    )
    accuracies = [float(row["val_acc"]) for row in log]
    assert len(log) < 30 and best["epoch"] == len(log) - 2 == last["best_epoch"]
    assert best["val_acc"] == max(accuracies) == accuracies[best["epoch"] - 1]


def test_train_loop_equals_a_plain_one():
    """Two epochs against a loop written anew: split, order, augmentation, smoothing, lr, weight decay, Nesterov."""
    flags = "--epochs 2 --lr 0.001 --smoothing 0.3 --weight-decay 0.5 --amp off".split()
    run_dir = make_run("plain loop", *flags)  # a small lr, at which rounding does not grow
    images, labels = data.load_synthetic()
    keep = data.split_train_val(labels, 100, 42)[0][:300]
    padded, labels = data.pad(images[keep]), labels[keep]
    torch.manual_seed(42)
    model = resnet18(width=8).train()
    parameters = list(model.parameters())
    velocity, initial = [torch.zeros_like(p) for p in parameters], [p.detach().clone() for p in parameters]
    for step, lr in enumerate((1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3, 7.5e-4, 2.5e-4)):  # warmup over 3 steps, cosine over 3
        epoch, i = divmod(step, 3)
        order, offsets, flips = (part[100 * i : 100 * i + 100] for part in data.epoch_plan(42, epoch + 1, 300))
        log_probs = model(data.augment(padded, order, offsets, flips)).log_softmax(1)
        targets = 0.7 * F.one_hot(labels[order], 100) + 0.3 / 100
        gradients = torch.autograd.grad(-(targets * log_probs).sum(1).mean(), parameters)
        with torch.no_grad():
            for p, g, v in zip(parameters, gradients, velocity):
                g = g + 0.5 * p
                v.mul_(0.9).add_(g)
                p.sub_(lr * (g + 0.9 * v))
    trained = utils.load_checkpoint(run_dir / "last.pt")["model"]
    for (name, ours), start in zip(model.named_parameters(), initial):
        error, update = (ours - trained[name]).norm(), (trained[name] - start).norm()
        assert error < 0.02 * update, (name, error, update)


def test_train_divergence_is_one_line_and_saves_nothing():
    one_step = ["--limit", "100", "--warmup-epochs", "0"]  # its weights blow up after its only loss
    for n, flags in enumerate((["--momentum", "0.99"], one_step)):
        run_dir = scratch() / f"diverged {n}"
        refused(train.main, [*TINY, "--lr", "1e30", *flags, "--output-dir", run_dir], 1, "diverged", "--lr")
        assert not list(run_dir.glob("*.pt"))


def test_train_optimizer_survives_an_overflow_in_the_first_step():
    """What a T4 does in float16: the scaler skips a step with infinite gradients; then all is as without that step."""
    weights = []
    for overflow in (True, False):
        model = torch.nn.Linear(3, 2, bias=False)
        torch.nn.init.ones_(model.weight)
        optimizer = train.make_optimizer(model, 0.1, 0.9, 5e-4)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for factor in [math.inf] * overflow + [1.0, 2.0, 3.0]:
            optimizer.zero_grad()
            scaler.scale(factor * model(torch.ones(1, 3)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append(model.weight.detach())
    assert torch.allclose(*weights) and weights[0].isfinite().all(), weights


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_macro_scores_by_hand():
    confusion = utils.confusion_matrix([0, 0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 0, 1, 0, 0, 1], 3)
    assert confusion.tolist() == [[3, 1, 0], [1, 1, 0], [1, 1, 0]]
    precision, recall, f1 = utils.macro_scores(confusion)  # class 2 is never predicted: 0/0 counts as 0
    assert math.isclose(precision, (3 / 5 + 1 / 3 + 0) / 3) and math.isclose(recall, (3 / 4 + 1 / 2 + 0) / 3)
    assert math.isclose(f1, (6 / 9 + 2 / 5 + 0) / 3)
    try:
        utils.macro_scores(np.zeros((2, 3)))
    except ValueError as error:
        assert "square" in str(error)
    else:
        raise AssertionError("a matrix that is not square was accepted")


def random_case(n=400, seed=0, spread=3.0):
    """(logits (n, 100), labels) with about half of them right; confidences rounded so that there are ties."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 100, n)
    logits = rng.normal(size=(n, 100)) + spread * (np.arange(100) == labels[:, None])
    return logits.round(1), labels


def test_metrics_against_loops():
    logits, labels = random_case()
    scores = evaluate.image_scores(logits, labels)
    for i in range(len(labels)):
        weights = [math.exp(z) for z in logits[i]]
        probs = [w / math.fsum(weights) for w in weights]
        assert math.isclose(scores["confidence"][i], max(probs)) and math.isclose(
            scores["nll"][i], -math.log(probs[labels[i]])
        )
        brier = math.fsum((p - (k == labels[i])) ** 2 for k, p in enumerate(probs))
        assert math.isclose(scores["brier"][i], brier)
        ranked = sorted(range(100), key=lambda k: (-logits[i, k], k))
        assert scores["pred"][i] == ranked[0] and scores["top5"][i] == (labels[i] in ranked[:5])
        family = next(group for group in data.SUPERCLASSES.values() if data.CLASS_NAMES[labels[i]] in group.split())
        assert scores["superclass"][i] == (data.CLASS_NAMES[ranked[0]] in family.split())
        assert scores["within"][i] == (scores["superclass"][i] and ranked[0] != labels[i])

    confidence, correct = scores["confidence"].round(2), scores["correct"]
    ece = 0
    for b in range(15):
        inside = [i for i in range(len(labels)) if b / 15 < confidence[i] <= (b + 1) / 15]
        if inside:
            ece += (
                len(inside)
                / len(labels)
                * abs(sum(correct[inside]) / len(inside) - sum(confidence[inside]) / len(inside))
            )
    assert math.isclose(utils.calibration_error(confidence, correct), ece, rel_tol=1e-9)
    assert utils.calibration_bins(np.array([1e-9, 1 / 15, 0.0667, 1.0])).tolist() == [0, 0, 1, 14]

    pairs = [(a > b) + (a == b) / 2 for a in confidence[correct] for b in confidence[~correct]]
    assert math.isclose(evaluate.failure_auroc(confidence, correct), sum(pairs) / len(pairs))
    assert evaluate.failure_auroc(confidence[correct], correct[correct]) is None

    rng, curves = np.random.default_rng(1), []
    for _ in range(2000):  # ties: the mean over random orders
        order = np.lexsort((rng.random(len(labels)), -confidence))
        curves.append(np.cumsum(~correct[order]) / np.arange(1, len(labels) + 1))
    risk, spread = evaluate.risk_coverage(confidence, correct), np.std(curves, 0) / math.sqrt(2000)
    assert (np.abs(risk - np.mean(curves, 0)) <= 5 * spread + 1e-12).all()
    three = evaluate.risk_coverage(np.array([0.8, 0.9, 0.7]), np.array([False, True, True]))
    assert np.allclose(three, [0, 1 / 2, 1 / 3])


def test_metrics_ranking_and_adaptive_bins_by_hand():
    """Ten images, confidence 1.0, 0.9 ... 0.1, of which the second and the two last are wrong."""
    confidence, correct = np.arange(10, 0, -1) / 10, np.array([1, 0, 1, 1, 1, 1, 1, 1, 0, 0], bool)
    scores = {"confidence": confidence, "correct": correct, "nll": confidence, "brier": confidence}
    metrics = evaluate.confidence_metrics(scores)
    errors = [0, 1, 1, 1, 1, 1, 1, 1, 2, 3]
    assert math.isclose(metrics["aurc"], sum(e / (i + 1) for i, e in enumerate(errors)) / 10)
    assert math.isclose(metrics["risk_at_80"], 1 / 8) and math.isclose(metrics["auroc_failure"], (14 + 1 * 1) / 21)
    # A perfect ranking of very many images reaches best_aurc, the worst one cannot be told from it if all are wrong.
    many = np.arange(20_000)
    for rate in (0, 0.22, 1):
        best = evaluate.risk_coverage(-many / 20_000, many < 20_000 * (1 - rate)).mean()
        assert math.isclose(best, evaluate.best_aurc(rate), abs_tol=1e-4), rate
    assert math.isclose(metrics["eaurc"], metrics["aurc"] - (0.3 + 0.7 * math.log(0.7)))
    # Five bins of two images; equal width would make ten.
    gaps = [abs(sum(confidence[i : i + 2] - correct[i : i + 2])) / 10 for i in range(0, 10, 2)]
    assert math.isclose(evaluate.adaptive_calibration_error(confidence, correct, 5), sum(gaps))
    assert math.isclose(
        evaluate.adaptive_calibration_error(confidence, correct), np.abs(confidence - correct).sum() / 10
    )


def test_metrics_errors_by_chance():
    """The wrong predictions dealt out anew: against a slow loop, and by hand where only one deal is possible."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 100, 300)
    preds = np.where(rng.random(300) < 0.5, (labels + 1) % 100, (labels * 7 + 3) % 100)
    labels, preds = labels[preds != labels], preds[preds != labels]
    inside, errors = evaluate.permuted_errors(labels, preds)
    shares = []
    for _ in range(1000):
        pairs = [(y, p) for y, p in zip(labels, rng.permutation(preds)) if y != p]
        shares.append(np.mean([data.SUPERCLASS_OF[y] == data.SUPERCLASS_OF[p] for y, p in pairs]))
    null = inside.sum(1) / errors.sum(1)
    assert abs(null.mean() - np.mean(shares)) < 4 * np.std(shares) / math.sqrt(500)
    assert abs(null.std() / np.std(shares) - 1) < 0.15
    # apple and pear are fruit, bed is furniture: an apple taken for a pear, a pear for an apple, a bed for an apple
    apple, pear, bed = (data.CLASS_NAMES.index(name) for name in ("apple", "pear", "bed"))
    true, named = np.array([apple, pear, bed]), np.array([pear, apple, apple])
    rows = {row["superclass"]: row for row in evaluate.superclass_rows(true, named)}
    fruit, furniture = rows["fruit_and_vegetables"], rows["household_furniture"]
    assert (fruit["images"], fruit["errors"], fruit["inside"], fruit["share"]) == (2, 2, 2, 1)
    assert (fruit["accuracy"], fruit["superclass_accuracy"]) == (0, 1) and furniture["superclass_accuracy"] == 0
    assert (furniture["inside"], furniture["null"]) == (0, 0) and rows["trees"]["errors"] == 0
    assert fruit["null"] == 1  # nothing but fruit is dealt, and a deal that hits is no error
    right = evaluate.superclass_rows(np.arange(100), np.arange(100))
    assert all(row["superclass_accuracy"] == 1 and row["null"] == 0 for row in right)


def test_metrics_label_candidates_against_a_loop():
    logits, labels = random_case(800, spread=1.5)
    probs = np.exp(utils.log_softmax(logits))
    threshold = [probs[labels == k, k].mean() for k in range(100)]
    wanted = []
    for i, p in enumerate(probs):
        above = [k for k in range(100) if p[k] >= threshold[k]]
        if above and (likeliest := max(above, key=lambda k: p[k])) != labels[i]:
            others = [p[k] for k in range(100) if k != labels[i]]
            wanted.append((p[labels[i]] - max(others), i, likeliest))
    index, suggested = evaluate.label_candidates(probs, labels)
    assert len(wanted) > 50 and list(zip(index, suggested)) == [(i, k) for _, i, k in sorted(wanted)]


def votes(index, given, guessed, votes_for_given):
    """An entry of cleanlab's audit."""
    labels = {"given_original_label": int(given), "our_guessed_label": int(guessed)}
    return {"id": int(index), **labels, "mturk": {"given": votes_for_given, "guessed": 5 - votes_for_given}}


def test_bad_attention():
    """attention.json of gradcam.py goes into the verdict only if it is whole, of this best.pt and of all its failures."""
    run_dir = copy_of_run("attentive", "*.png", "attention.*")
    logits, labels = utils.load_logits(run_dir, "test")
    scores = evaluate.image_scores(logits, labels)
    read = lambda: evaluate.read_attention(run_dir, scores)  # noqa: E731
    assert read() is None
    path, figure = run_dir / "attention.json", {"mean": 0.1, "low": 0.0, "high": 0.2}
    good = {group: dict.fromkeys(keys, figure) for group, keys in evaluate.ATTENTION.items()}
    good |= {"images": int(evaluate.confident_failures(scores).sum()), "lowest_confidence": 0.91}
    good["sha256"] = {"best.pt": utils.sha256(run_dir / "best.pt")}
    utils.write_json(path, good)
    assert read() == good
    for change, word in (
        ({"sha256": {"best.pt": "another"}}, "another best.pt"),
        ({"lowest_confidence": 0.66}, "not of the failures above 0.90"),
        ({"images": good["images"] - 1}, "not of the failures above 0.90"),
    ):
        utils.write_json(path, good | change)
        report, printed = quietly(read)
        assert report is None and word in printed, printed
    none = {**good, "matched": {"border_reliance": {"mean": 0.1, "low": None, "high": None}}}
    utils.write_json(path, none)  # too few to have an interval
    assert quietly(read) == (None, "")
    bad = {**good, "matched": {"border_reliance": {"mean": "0.1", "low": 0.0, "high": 0.2}}}
    for content in (
        "",
        "[]",
        "{}",
        json.dumps(bad),
        json.dumps(good).replace("0.1", "NaN"),
        json.dumps(good | {"failures": 3}),
        json.dumps(good | {"lowest_confidence": None}),
    ):
        path.write_text(content)
        refused(lambda argv: read(), [], 2, "attention.json", "gradcam.py")


def test_chain_label_errors():
    """An audit that doubts known images: what is counted, and what the accuracy is without them."""
    run_dir = copy_of_run("audited", "*.png", "*.pt", "attention.*")
    logits, labels = np.load(run_dir / "test_logits.npy"), np.load(run_dir / "test_labels.npy")
    scores = evaluate.image_scores(logits, labels)
    sure, hits = np.flatnonzero(evaluate.confident_failures(scores)), np.flatnonzero(scores["correct"])
    entries = [votes(i, labels[i], scores["pred"][i], 2) for i in sure[:2]]
    entries += [votes(hits[0], labels[hits[0]], 99 - labels[hits[0]], 0), votes(hits[1], labels[hits[1]], 7, 3)]
    path = scratch() / "audit.json"
    path.write_text(json.dumps(entries))
    config = json.loads((run_dir / "config.json").read_text())
    refused(evaluate.main, [run_dir, "--label-errors", path], 2, "CIFAR-100", "synthetic")
    utils.write_json(run_dir / "config.json", config | {"dataset": "cifar100"})  # as if
    with replaced(utils, "save_figure", lambda figure, path: None):
        results, printed = quietly(evaluate.main, [str(run_dir), "--label-errors", str(path)])
    found = results[str(run_dir)]["label_errors"]
    assert (found["images"], found["covered"], found["confident_errors"]) == (3, 2, len(sure))
    kept = np.setdiff1d(np.arange(10_000), [*sure[:2], hits[0]])
    assert math.isclose(found["accuracy_without"], scores["correct"][kept].mean())
    assert f"among them 2 of the {len(sure)} confident errors" in printed
    rows = read_csv(run_dir / "label_errors.csv")
    assert [int(row["index"]) for row in rows] == [*sure[:2], hits[0]] and rows[0]["source"] == "audit"
    assert data.CLASS_NAMES[scores["pred"][sure[0]]] == rows[0]["suggested"]
    good = entries[0]
    for content, word in (
        ("", "another file"), ("{}", "cannot be"), ("[]", "cannot be"), ("[1]", "another file"), ("[" * 100_000, "another file"),
        (json.dumps([good, good]), "cannot be"), (json.dumps([good | {"id": 10_000}]), "cannot be"),
        (json.dumps([good | {"id": "3"}]), "cannot be"), (json.dumps([good | {"our_guessed_label": 100}]), "cannot be"),
        (json.dumps([good | {"mturk": {}}]), "another file"), (json.dumps([good | {"mturk": {"given": True}}]), "cannot be"),
        (json.dumps([good | {"given_original_label": 99 - good["given_original_label"]}]), "other labels"),
        ("\x93NUMPY", "another file"),
    ):  # fmt: skip
        path.write_text(content)
        refused(evaluate.main, [run_dir, "--label-errors", path], 2, word)
    refused(
        evaluate.main,
        [run_dir, "--label-errors", scratch() / "none.json"],
        2,
        "cannot be read",
        "cifar100_mturk.json",
    )


def test_metrics_ensemble_by_hand():
    """Three members, two images, three classes: they agree on the first, and are sure of different things on the second."""
    probs = np.array([[[0.5, 0.25, 0.25], [1, 0, 0]], [[0.5, 0.25, 0.25], [0, 1, 0]], [[0.5, 0.25, 0.25], [0, 1, 0]]])
    unsure = np.array([[[1, 0]], [[0.5, 0.5]]])  # one is sure, one is not: mean entropy ln(2) / 2
    total = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert np.allclose(evaluate.ensemble_uncertainty(unsure)[1]["mutual_information"], total - math.log(2) / 2)
    mean, uncertainty = evaluate.ensemble_uncertainty(probs)
    assert np.allclose(mean, [[0.5, 0.25, 0.25], [1 / 3, 2 / 3, 0]])
    third = -(math.log(1 / 3) + 2 * math.log(2 / 3)) / 3
    assert np.allclose(uncertainty["predictive_entropy"], [1.5 * math.log(2), third])
    assert np.allclose(uncertainty["mutual_information"], [0, third])
    assert np.allclose(uncertainty["disagreement"], [0, 2 / 3])


def test_metrics_temperature_is_where_the_derivative_vanishes():
    logits, labels = random_case(2000)
    for factor in (1, 3, 0.2):
        temperature = evaluate.fit_temperature(logits * factor, labels)
        nll = lambda t: -utils.log_softmax(logits * factor / t)[np.arange(2000), labels].mean()  # noqa: E731
        assert abs(nll(temperature * 1.0001) - nll(temperature * 0.9999)) < 1e-7
        assert nll(temperature) < min(nll(temperature * 1.01), nll(temperature * 0.99))
        assert math.isclose(temperature / factor, evaluate.fit_temperature(logits, labels), rel_tol=1e-6)


def test_metrics_temperature_comes_from_the_validation_images():
    (logits, labels), (val_logits, val_labels) = random_case(500), random_case(500, seed=1, spread=5.0)
    metrics = evaluate.compute_metrics(logits, labels, val_logits, val_labels)[0]
    assert metrics["temperature"] == evaluate.fit_temperature(val_logits, val_labels)
    assert not math.isclose(metrics["temperature"], evaluate.fit_temperature(logits, labels), rel_tol=0.01)
    scaled = utils.log_softmax(logits / metrics["temperature"])
    assert math.isclose(metrics["nll_scaled"], -scaled[np.arange(500), labels].mean())
    confidence = np.exp(scaled).max(1)
    assert math.isclose(metrics["ece_scaled"], utils.calibration_error(confidence, logits.argmax(1) == labels))


def test_metrics_per_class_and_pairs_by_hand():
    confusion = np.zeros((100, 100), int)
    confusion[0, :4], confusion[1, :4], confusion[2, :4] = [6, 3, 1, 0], [2, 8, 0, 0], [1, 0, 0, 9]
    names = [f"class {k}" for k in range(100)]
    first, second, third = evaluate.per_class_rows(confusion, names)[:3]
    assert (first["images"], first["accuracy"], first["precision"]) == (10, 0.6, 6 / 9)
    assert math.isclose(first["f1"], 2 * 0.6 * (6 / 9) / (0.6 + 6 / 9))
    assert (first["mostly_taken_for"], first["times"]) == ("class 1", 3) and third["mostly_taken_for"] == "class 3"
    assert (third["accuracy"], third["precision"], third["f1"]) == (0, 0, 0) and third["low"] == 0 < third[
        "high"
    ] < 0.3
    assert math.isclose(second["low"], utils.wilson_interval(8, 10)[0])
    assert evaluate.confused_pairs(confusion, 2) == [(2, 3, 9), (0, 1, 5)]
    assert len(evaluate.confused_pairs(confusion)) == 3  # pairs without errors are left out


def test_metrics_intervals():
    low, high = utils.wilson_interval(np.array([0, 5, 10]), np.array([10, 10, 10]))
    assert np.allclose(low, [0, 0.2366, 0.7225], atol=1e-4) and np.allclose(
        high, [0.2775, 0.7634, 1], atol=1e-4
    )  # Newcombe 1998
    rng = np.random.default_rng(0)
    labels = np.arange(10_000) % 100
    pred = np.where(rng.random(10_000) < 0.7, labels, (labels + 1) % 100)
    logits = 5.0 * (np.arange(100) == pred[:, None])
    values = evaluate.bootstrap(labels, [evaluate.image_scores(logits, labels)])[0]
    intervals = {name: evaluate.interval(value) for name, value in values.items()}
    low, high = intervals["accuracy"]
    accuracy = (pred == labels).mean()
    assert (
        low < accuracy < high
        and abs((high - low) / (2 * 1.96 * math.sqrt(accuracy * (1 - accuracy) / 10_000)) - 1) < 0.1
    )
    assert np.allclose(intervals["macro_recall"], intervals["accuracy"])  # equally many images of each class
    assert 0.0 <= intervals["errors_within_superclass"][0] <= intervals["errors_within_superclass"][1] <= 1.0


def test_metrics_resampled_agree_with_their_definitions():
    """Every image drawn once gives the metric itself; drawn as they come, the metric of the repeated images."""
    logits, labels = random_case(1000)
    logits += np.random.default_rng(7).normal(size=logits.shape) * 1e-3  # no ties
    labels = np.sort(labels)
    metrics, scores, scaled = evaluate.compute_metrics(logits, labels, logits, labels)
    counts = next(evaluate.resample(labels))[:3]
    assert (counts.sum(1) == 1000).all() and len(set(map(bytes, counts))) == 3
    for row in counts:
        assert (np.bincount(labels, row, 100) == np.bincount(labels, minlength=100)).all()  # each class from its own
    counts[0] = 1
    values = evaluate.resampled_metrics(scores, labels, counts)
    for name, value in values.items():
        assert math.isclose(value[0], metrics[name], rel_tol=1e-5, abs_tol=1e-7), name
    repeated = np.repeat(np.arange(1000), counts[1].astype(int))
    redrawn = evaluate.compute_metrics(logits[repeated], labels[repeated], logits, labels)[0]
    for name, value in values.items():
        assert math.isclose(value[1], redrawn[name], rel_tol=5e-3, abs_tol=1e-5), (name, value[1], redrawn[name])


def test_metrics_mean_interval():
    values = np.random.default_rng(0).normal(3, 2, 1000)
    mean, low, high = utils.mean_interval(np.append(values, np.nan))
    assert math.isclose(mean, values.mean()) and abs((high - low) / (3.92 * values.std() / math.sqrt(1000)) - 1) < 0.1
    assert utils.mean_interval(values[:19]) == (values[:19].mean(), None, None)  # too few look alike
    assert None not in utils.mean_interval(values[:20]) and utils.mean_interval(values[:0]) == (None, None, None)
    assert "+100.0 points (too few for an interval)" == failures.points(np.ones(3))
    ends = np.array([utils.wilson_interval(hits, n) for n in range(1, 200) for hits in (0, n)])
    assert 0 <= ends.min() and ends.max() <= 1  # not by rounding either: -0.0 % looks wrong


def test_metrics_mcnemar():
    """12 and 4 discordant pairs: p = 2 P(Binomial(16, 1/2) <= 4) = 0.0768; none: 1."""
    first, second = np.array([True] * 12 + [False] * 4 + [True] * 5), np.array([False] * 12 + [True] * 4 + [True] * 5)
    assert utils.mcnemar(first, second)[:2] == (12, 4)
    assert math.isclose(utils.mcnemar(first, second)[2], 2 * (1 + 16 + 120 + 560 + 1820) / 2**16)
    assert utils.mcnemar(first, first) == (0, 0, 1.0)
    assert 0 < utils.mcnemar(np.arange(4000) < 2300, np.arange(4000) >= 2300)[2] < 1e-15


def control_lines(scale):
    """The last lines of failures.py for three runs that differ by chance; and, if scale is not 2, in the second's confidence."""
    rng = np.random.default_rng(2)
    labels = np.arange(10_000) % 100
    shared = rng.normal(size=(10_000, 100)) + 3.5 * (np.arange(100) == labels[:, None])
    dirs = []
    for name in ("first", "second", "third"):
        dirs.append(scratch() / f"null {scale}" / name)
        dirs[-1].mkdir(parents=True)
        logits = (scale if name == "second" else 2.0) * (shared + 0.7 * rng.normal(size=shared.shape))
        evaluate.write_array(dirs[-1] / "test_logits.npy", logits)
        evaluate.write_array(dirs[-1] / "test_labels.npy", labels)
        utils.write_json(
            dirs[-1] / "config.json", {"dataset": "synthetic", "args": {"smoothing": 0.0, "seed": len(dirs)}}
        )
    first, second, third = map(str, dirs)
    load, failures.load_dataset = (
        failures.load_dataset,
        lambda *args, **kwargs: (torch.zeros(10_000, 32, 32, 3, dtype=torch.uint8), labels),
    )
    try:
        rows, printed = quietly(failures.main, [first, "--compare", second, "--control", third, "--threshold", "0.6"])
    finally:
        failures.load_dataset = load
    effects = {line.split("  ")[1]: line for line in printed.splitlines() if "points" in line}
    number = {name: float(line.split("points")[0].split()[-1]) for name, line in effects.items()}
    assert len(rows) > 200
    ends = [float(end) for end in effects["this - control"].split("[")[1].split("]")[0].split(",")]
    return number["naive difference"], number["control - first"], ends


def test_failures_control_takes_the_selection_out():
    naive, chance, (low, high) = control_lines(2.0)  # no effect, and yet the failures look better
    assert naive < -10 and abs(chance - naive) < 3 and low <= 0 <= high and low < high
    naive, chance, (low, high) = control_lines(1.0)  # an effect: half the logits
    assert high < -5 and naive < chance < -10


def test_metrics_null_calibration_error_is_what_a_calibrated_model_shows():
    rng = np.random.default_rng(3)
    confidence = rng.uniform(0.5, 1, 5000)
    own = [utils.calibration_error(confidence, rng.random(5000) < confidence) for _ in range(50)]
    assert abs(evaluate.null_calibration_error(confidence) - np.mean(own)) < 5 * np.std(own) / math.sqrt(50)


def test_metrics_extremes():
    """All right, all wrong, one image: no division by zero, no warning, no NaN in metrics.json."""
    logits, labels = 20.0 * np.eye(100), np.arange(100)
    with np.errstate(all="raise", under="ignore"):
        perfect = evaluate.compute_metrics(logits, labels, logits, labels)[0]
        hopeless = evaluate.compute_metrics(logits, (labels + 1) % 100, logits, labels)[0]
        single = evaluate.compute_metrics(logits[:1], labels[:1], logits, labels)[0]
    assert (
        perfect["accuracy"] == 1 == perfect["macro_f1"]
        and perfect["errors_within_superclass"] is None is perfect["auroc_failure"]
    )
    assert hopeless["accuracy"] == 0 == hopeless["macro_f1"] and hopeless["aurc"] == 1 == hopeless["confident_errors"]
    assert single["images"] == 1 and single["macro_recall"] == 0.01
    for metrics in (perfect, hopeless, single):
        assert "NaN" not in json.dumps(metrics) and "Infinity" not in json.dumps(metrics)


# ---- the verdict -----------------------------------------------------------------------------------------------------


def simulated_runs(labels, seeds, rng, images=0, better=0.0, sharper=1.0, kin=0.0, luck=1.0):
    """Runs of one recipe: seeds differ by luck, recipes by what is asked for; all share the images of that number.

    better is added to the true class's logit, sharper multiplies all of them, kin is added to the other classes of the
    true superclass, luck is how far seeds differ.
    """
    n = len(labels)
    hot = np.arange(100) == labels[:, None]
    relatives = (data.SUPERCLASS_OF == data.SUPERCLASS_OF[labels][:, None]) & ~hot
    shown = np.random.default_rng([images, n])
    ease, shared = shown.normal(scale=1.2, size=(n, 1)), shown.normal(scale=0.8, size=(n, 100))
    runs = []
    for seed in seeds:
        signal, scale = (
            3.6 + better + luck * 0.04 * rng.normal(),
            3.0 * sharper * math.exp(luck * 0.03 * rng.normal()),
        )
        logits = scale * (
            (signal + ease) * hot + kin * relatives + shared + rng.normal(scale=0.6 * luck, size=(n, 100))
        )
        scores, scaled = (evaluate.image_scores(z, labels) for z in (logits, logits / sharper / 2))
        runs.append({"seed": seed, "scores": scores, "scaled": scaled, "attention": None})
    return runs


def simulated_words(n, seeds, seed, change={}, **both):
    """{claim: word} of a verdict on simulated runs; change says what the second recipe does."""
    rng, labels = np.random.default_rng(seed), np.arange(n) % 100
    baselines = simulated_runs(labels, seeds, rng, seed, **both)
    rows = evaluate.judge(baselines, simulated_runs(labels, seeds, rng, seed, **{**both, **change}), labels)
    return [row["word"] for row in rows]


SAME, SURE, SURE_SCALED, COVERED, ECE, ECE_SCALED, AURC, KIN, MOSTLY, SMALL = range(10)  # rows of the verdict


def test_verdict_is_right_on_simulated_runs():
    """No effect: hardly a claim is supported. A large one: it is found. `--long` has a hundred of each."""
    null = [simulated_words(1000, (1, 2), seed) for seed in range(10)]
    false = [sum(words[i] == "supported" for words in null) for i in range(SMALL + 1)]
    assert max(false[SURE:]) <= 1, false
    assert all(words[MOSTLY] == "contradicted" for words in null)
    for seed in (2, 3):
        blunt = simulated_words(1000, (1, 2, 3), seed, {"sharper": 0.7}, kin=2.0, sharper=2.0)
        assert (blunt[SURE], blunt[ECE], blunt[KIN]) == ("supported",) * 3, (
            blunt
        )  # the baselines are far too confident
        assert blunt[SURE_SCALED] == blunt[ECE_SCALED] == "not decided", blunt  # only the scale has changed
        worse = simulated_words(1000, (1, 2, 3), seed, {"better": -1.0})
        assert worse[SAME] == worse[AURC] == "contradicted", worse


def test_verdict_needs_more_than_one_run():
    labels, rng = np.arange(1000) % 100, np.random.default_rng(0)
    (first,), (second,) = (simulated_runs(labels, [1], rng, sharper=sharper) for sharper in (2.0, 0.5))
    rows = evaluate.judge([first], [second], labels)
    assert {row["word"] for row in rows[: AURC + 1]} == {"not decided"}, rows
    assert "luck of training" in rows[ECE]["note"] and "biased" in rows[SURE]["note"] and rows[ECE]["ci95"]
    assert rows[MOSTLY]["word"] == "contradicted"  # this one is about the network at hand
    own = evaluate.confident_failures(first["scores"])
    naive = second["scores"]["confidence"][own].mean() - first["scores"]["confidence"][own].mean()
    assert math.isclose(rows[SURE]["figure"], naive, rel_tol=1e-5)
    mild = simulated_runs(labels, [1, 2], rng, sharper=0.2)  # nothing is above 0.90
    rows = evaluate.judge(mild, [second], labels)
    assert "fewer than 20 confident failures" in rows[SURE]["note"] == rows[COVERED]["note"], rows[SURE]


def test_verdict_by_hand():
    for ends, side, reference, word in (
        ((-2, -1), "below", 0, "supported"), ((-2, 1), "below", 0, "not decided"), ((1, 2), "below", 0, "contradicted"),
        ((1, 2), "above", 0, "supported"), ((1, 2), "above", 1.5, "not decided"), ((1, 2), "above", 3, "contradicted"),
        ((-0.009, 0.009), "within", 0, "supported"), ((-0.011, 0.009), "within", 0, "not decided"),
        ((0.002, 0.009), "within", 0, "supported"), ((0.011, 0.02), "within", 0, "contradicted"),
        ((-0.02, 0.02), "within", 0, "not decided"), ((-0.03, -0.02), "within", 0, "contradicted"),
    ):  # fmt: skip
        assert evaluate.decide(ends, side, reference) == word, (ends, side)
    # Student's t with 2 degrees of freedom: 4.303 standard errors; the normal draws alone: 1.96
    draws = np.random.default_rng(0).normal(5, 1, 2000)
    low, high = np.quantile(evaluate.luck(0.0, draws, 0.0, 0), [0.025, 0.975])
    assert abs(low + 1.96) < 0.15 and abs(high - 1.96) < 0.15
    low, high = np.quantile(evaluate.luck(7.0, np.zeros(2000), 10.0, 2), [0.025, 0.975])
    assert abs((high - 7) / 43.03 - 1) < 0.05 and abs((7 - low) / 43.03 - 1) < 0.05
    # No run is asked about failures that were picked on it.
    labels, rng = np.arange(1000) % 100, np.random.default_rng(0)
    runs = simulated_runs(labels, [1, 2, 3], rng)
    value = evaluate.claim_measures(runs)(runs[0], labels, np.ones((1, 1000), np.float32))["on_failures"][0]
    confidence = runs[0]["scores"]["confidence"]
    foreign = [confidence[evaluate.confident_failures(run["scores"])] for run in runs[1:]]
    assert math.isclose(value, np.concatenate(foreign).mean(), rel_tol=1e-6)
    # The control: what another baseline says to a baseline's failures, against what that one says itself.
    moved = []
    for run in runs:
        picked = [evaluate.confident_failures(other["scores"]) for other in runs if other is not run]
        own = run["scores"]["confidence"][evaluate.confident_failures(run["scores"])]
        moved.append(np.concatenate([run["scores"]["confidence"][mask] for mask in picked]).mean() - own.mean())
    row = evaluate.judge(runs, simulated_runs(labels, [1], rng), labels)[SURE]
    assert math.isclose(row["control_value"], np.mean(moved), rel_tol=1e-5) and row["control_value"] < -0.1
    # Attention: the interval of one report, and the luck of two that differ.
    figure = lambda mean: {"mean": mean, "low": mean - 0.0196, "high": mean + 0.0196}  # noqa: E731
    report = lambda mean: {group: dict.fromkeys(keys, figure(mean)) for group, keys in evaluate.ATTENTION.items()}  # noqa: E731
    one, two = (evaluate.judge_attention([report(m) for m in ms], len(ms) > 1) for ms in ([0.1], [0.05, 0.15]))
    assert [row["word"] for row in one + two] == ["supported"] * 2 + ["not decided"] * 2
    assert np.allclose(one[0]["ci95"], [0.0804, 0.1196], atol=0.002) and math.isclose(two[0]["figure"], 0.1)
    # One report among several baselines says nothing of the luck of training.
    row = evaluate.judge_attention([report(0.1)], True)[0]
    assert row["word"] == "not decided" and "one baseline only" in row["note"] and row["ci95"]
    runs = simulated_runs(labels, [1, 2], rng)
    runs[0]["attention"] = report(0.1)
    assert [row["word"] for row in evaluate.judge(runs, runs[:1], labels)[-2:]] == ["not decided"] * 2
    assert [row["word"] for row in evaluate.judge(runs[:1], runs[1:], labels)[-2:]] == ["supported"] * 2


# ---- Grad-CAM --------------------------------------------------------------------------------------------------------


def trained_like(width=8):
    """A random network whose batch norms have seen data, and images for it."""
    torch.manual_seed(1)
    model, images = resnet18(width=width), torch.randn(6, 3, 32, 32)
    for _ in range(3):
        model(torch.randn(32, 3, 32, 32))
    return model.eval(), images


def test_gradcam_identities_at_layer4():
    """Under a pooled linear head the map is classic CAM / (h w), and its sum plus the bias is the logit."""
    model, images = trained_like()
    targets = torch.tensor([0, 5, 5, 99, 42, 17])
    maps = gradcam.grad_cam(model, images, targets)
    features = {}
    handle = model.layer4.register_forward_hook(lambda module, inputs, output: features.update(out=output))
    with torch.no_grad():
        logits = model(images)
    handle.remove()
    assert maps.shape == (6, 4, 4) and maps.dtype == torch.float32 and (maps < 0).any()
    cam = torch.einsum("nk,nkhw->nhw", model.fc.weight[targets], features["out"]) / 16
    assert torch.allclose(maps, cam, rtol=1e-5, atol=1e-6)
    chosen = logits[torch.arange(6), targets]
    assert torch.allclose(maps.sum((1, 2)) + model.fc.bias[targets], chosen, rtol=1e-5, atol=1e-5)
    others = (targets + 50) % 100  # the margin map: where class a's lead over class b comes from
    margin = maps - gradcam.grad_cam(model, images, others)
    bias = model.fc.bias[targets] - model.fc.bias[others]
    assert torch.allclose(margin.sum((1, 2)) + bias, chosen - logits[torch.arange(6), others], rtol=1e-5, atol=1e-5)


def test_gradcam_at_other_layers_follows_the_definition():
    """alpha from numerical derivatives of the logit, in float64, channel by channel."""
    model, images = trained_like(width=4)
    tail = torch.nn.Sequential(model.layer4)
    with torch.no_grad():
        x = F.relu(model.bn1(model.conv1(images[:1])))
        activations = model.layer3(model.layer2(model.layer1(x))).double()
        tail, head = tail.double(), model.fc.double()
        step, alpha = 1e-6, []
        for k in range(activations.shape[1]):
            shifted = [activations.clone() for _ in range(2)]
            shifted[0][0, k] += step
            shifted[1][0, k] -= step
            up, down = (head(tail(a).mean((2, 3)))[0, 7] for a in shifted)
            alpha.append(
                (up - down) / (2 * step) / activations[0, k].numel()
            )  # all cells moved together: the sum of d y / d A
        expected = torch.einsum("k,khw->hw", torch.stack(alpha), activations[0])
    model.float()
    ours = gradcam.grad_cam(model, images[:1], torch.tensor([7]), "layer3")[0]
    assert ours.shape == (8, 8) and torch.allclose(ours, expected.float(), rtol=1e-3, atol=1e-5)


def test_gradcam_batch_modes_and_traces():
    model, images = trained_like()
    targets = torch.arange(6)
    for layer in ("layer4", "layer3", "layer2.0", "conv1", "layer4.1.conv2"):
        together = gradcam.grad_cam(model, images, targets, layer)
        single = torch.cat([gradcam.grad_cam(model, images[n : n + 1], targets[n : n + 1], layer) for n in range(6)])
        assert torch.allclose(together, single, rtol=1e-3, atol=1e-6), layer
    maps = gradcam.grad_cam(model, images, targets)
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(gradcam.grad_cam(model, images, targets), maps, atol=1e-6)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    for layer, word in (("layer5", "no layer"), ("fc", "no spatial map"), ("", "no spatial map")):
        try:
            gradcam.grad_cam(model, images, targets, layer)
        except ValueError as error:
            assert word in str(error)
        else:
            raise AssertionError(layer)
        assert not any(module._forward_hooks for module in model.modules())


def test_gradcam_with_a_relu_in_place_after_the_layer():
    torch.manual_seed(0)
    conv, fc = torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.Linear(5, 100)
    images, targets = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    in_place, plain = (
        torch.nn.Sequential(conv, torch.nn.ReLU(flag), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), fc)
        for flag in (True, False)
    )
    assert torch.equal(
        gradcam.grad_cam(in_place, images, targets, "0"), gradcam.grad_cam(plain, images, targets, "0")
    )


def test_gradcam_border_energy():
    maps = torch.zeros(4, 8, 8)
    maps[0] = 1
    maps[1, 3:5, 3:5] = 1
    maps[2, 0, 0] = 1
    energy = gradcam.border_energy(maps)
    assert math.isclose(energy[0], 0.4375, rel_tol=1e-5) and energy[1] == 0 and energy[2] > 0.8 and energy[3].isnan()
    maps[0, 4, 4] = -5  # negative cells do not count
    assert gradcam.border_energy(maps)[0] > 0.4375


def test_gradcam_spearman_by_hand():
    rows = np.array([[1, 2, 3, 4], [1, 2, 2, 9], [5, 5, 5, 5]], float)
    others = np.array([[10, 30, 20, 40], [4, 3, 1, 2], [1, 2, 3, 4]], float)
    # ranks 1 2.5 2.5 4 and 4 3 1 2: covariance (-1.5 * 1.5 + 0 + 0 + 1.5 * -0.5) / sqrt(4.5 * 5)
    assert np.allclose(gradcam.spearman(rows, others)[:2], [0.8, -3 / math.sqrt(4.5 * 5)])
    assert np.isnan(gradcam.spearman(rows, others)[2])


def test_gradcam_matches_by_hand():
    """The nearest, each once, in the order of the failures; no more than there are; of one class if 0.02 allow it."""
    sure, candidates = [0.95, 0.94, 0.91], np.array([0.5, 0.92, 0.949, 0.99])
    match = lambda classes, *others: gradcam.match_on_confidence(sure, classes, *others).tolist()  # noqa: E731
    assert match([7, 7, 7], candidates, np.full(4, 7)) == [2, 1, 3]
    assert match([7, 7, 7], candidates, np.full(4, 8)) == [2, 1, 3]
    assert match([7, 7, 7], np.array([0.93]), np.array([7])) == [0]
    assert match([7, 8, 9], np.array([0.951, 0.935, 0.965, 0.84]), np.array([5, 5, 7, 9])) == [2, 1, 0]


class Corner(torch.nn.Module):
    """A network that can be worked out: the logit of class 0 is the sum of the red channel over the top left 8x8 pixels."""

    def __init__(self):
        super().__init__()
        self.layer3, self.weight = torch.nn.AvgPool2d(4), torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        score = 0.1 * self.weight * self.layer3(x)[:, 0, :2, :2].sum((1, 2)) * 16
        return torch.stack([score, torch.zeros_like(score)], 1)


def test_gradcam_occlusion_and_insertion_on_a_known_network():
    """Red 1 everywhere: the logit is 6.4; the border holds 48 of the 64 pixels that count, the centre square 9 (5..7)."""
    model, images, classes = Corner(), torch.ones(2, 3, 32, 32), torch.tensor([0, 0])
    p = lambda pixels: 1 / (1 + math.exp(-0.1 * pixels))  # noqa: E731
    intact = gradcam.probability(model, images, classes)
    assert np.allclose(intact, p(64)) and intact.dtype == torch.float64
    border, centre = gradcam.occlusion_drops(model, images, classes, intact)
    assert np.allclose(border, p(64) - p(16)) and np.allclose(centre, p(64) - p(55))
    # A map that knows the corner deletes all of it in the first of 16 steps; one that ranks it last, in the last.
    maps = torch.zeros(2, 32, 32)
    maps[0, :8, :8], maps[1, :8, :8] = 1, -1
    with replaced(gradcam, "blur", torch.zeros_like):
        ends = [gradcam.probability(model, x, classes) for x in (images, images * 0, images * 0)]
        good, bad = gradcam.insertion_minus_deletion(model, images, classes, maps, *ends).tolist()
    first, last = (p(64) + p(0)) / 2, (p(64) + p(0)) / 2
    deleted_first, deleted_last = (first + 15 * p(0)) / 16, (last + 15 * p(64)) / 16
    assert math.isclose(good, deleted_last - deleted_first, rel_tol=1e-6) and math.isclose(bad, -good, rel_tol=1e-6)


def test_gradcam_insertion_against_a_loop():
    """Pixel by pixel, in the order of the map, on a real network and image; no ties."""
    model, images = trained_like()
    images, classes = images[:2], torch.tensor([3, 5])
    maps = torch.rand(2, 32, 32, generator=torch.Generator().manual_seed(4))
    blank, start = torch.zeros_like(images), gradcam.blur(images)
    assert start.std() < 0.5 * images.std() and start.shape == images.shape
    ends = [gradcam.probability(model, x, classes) for x in (images, blank, start)]
    areas = gradcam.insertion_minus_deletion(model, images, classes, maps, *ends)
    for k in range(2):
        pixels = sorted(((maps[k, i, j].item(), i, j) for i in range(32) for j in range(32)), reverse=True)
        area = 0
        for canvas, source, sign in ((images[k].clone(), blank[k], -1), (start[k].clone(), images[k], 1)):
            curve = []
            for step in range(17):
                with torch.no_grad():
                    curve.append(model.eval()(canvas[None]).double().softmax(1)[0, classes[k]].item())
                for _, i, j in pixels[64 * step : 64 * step + 64]:
                    canvas[:, i, j] = source[:, i, j]
            area += sign * (sum(curve) - curve[0] / 2 - curve[16] / 2) / 16
        assert math.isclose(areas[k].item(), area, abs_tol=1e-6), (areas[k], area)


def test_gradcam_sanity_checks_tell_a_map_that_ignores_the_network():
    model, images = trained_like()
    images = torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(8)
    before = torch.random.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sanity = gradcam.sanity_checks(model, images, classes)
    checks = ["other_image", "random_logit", "fc", "layer4", "layer3", "layer2", "layer1", "stem"]
    assert list(sanity) == checks and gradcam.is_sane(sanity)
    assert all(abs(value["rho"]) <= value["abs_rho"] < gradcam.SANITY_LIMIT for value in sanity.values()), sanity
    assert torch.equal(before, torch.random.get_rng_state())  # its random networks leave the generator alone
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    signs = torch.tensor([1, -1]).repeat(4)[:, None, None]
    edges = lambda model, images, targets, layer: F.avg_pool2d(images.abs().mean(1), 4)  # noqa: E731
    either = lambda model, images, targets, layer: (
        edges(model, images, targets, layer)
        * (  # noqa: E731
            signs if torch.equal(targets, classes) and (model.fc.weight == weights["fc.weight"]).all() else 1
        )
    )  # the same pattern, but for its sign: a mean of signed correlations would be 0
    constant = lambda model, images, targets, layer: torch.ones(len(images), 8, 8)  # noqa: E731
    for maps, rho, size in ((edges, 1, 1), (either, 0, 1), (constant, None, None)):
        with replaced(gradcam, "grad_cam", maps):
            sanity = gradcam.sanity_checks(model, images, classes)
        for name in checks[1:]:
            found = sanity[name]["rho"], sanity[name]["abs_rho"]
            assert found == (rho, size) or np.allclose(found, (rho, size), atol=1e-9), (name, found)
        assert not gradcam.is_sane(sanity)


def test_gradcam_a_single_map_has_no_other():
    model, image = trained_like()[0], torch.randint(256, (1, 32, 32, 3), dtype=torch.uint8)
    figures = gradcam.attention_figures(model, image, torch.tensor([3]))
    assert list(figures) == utils.ATTENTION and np.isnan(figures["insertion_deletion_other"])
    assert np.isfinite(figures["insertion_deletion_shuffled"])


def test_gradcam_says_when_maps_support_no_claim():
    report = json.loads((chain()[0][0] / "attention.json").read_text())
    assert "supports no claim" not in gradcam.attention_table(report | {"sane": True})
    printed = gradcam.attention_table(report | {"sane": False})
    assert "supports no claim" in printed and "border reliance: their difference" in printed


def test_chain_attention():
    """attention.csv, .json and failures.csv say the same; the matches are correct, distinct, and as confident."""
    baseline = chain()[0][0]
    rows, report = read_csv(baseline / "attention.csv"), json.loads((baseline / "attention.json").read_text())
    failed, matched = ([row for row in rows if row["group"] == group] for group in ("failure", "matched"))
    listed = read_csv(baseline / "failures.csv")
    assert (
        [row["index"] for row in failed] == [row["index"] for row in listed] == [row["matched_to"] for row in matched]
    )
    assert all(own[name] == row[name] for own, row in zip(failed, listed) for name in utils.ATTENTION)
    logits, labels = np.load(baseline / "test_logits.npy"), np.load(baseline / "test_labels.npy")
    picked = [int(row["index"]) for row in matched]
    assert len(set(picked)) == len(picked) == report["images"] and (logits.argmax(1) == labels)[picked].all()
    distance = [abs(float(own["confidence"]) - float(row["confidence"])) for own, row in zip(failed, matched)]
    assert np.median(distance) < 0.01 and math.isclose(
        np.exp(utils.log_softmax(logits))[picked[0]].max(), float(matched[0]["confidence"])
    )
    assert math.isclose(report["largest_gap"], max(distance)) and math.isclose(report["mean_gap"], np.mean(distance))
    alike = sum(own["predicted"] == row["predicted"] for own, row in zip(failed, matched))
    assert report["pairs"] == len(matched) and report["pairs_of_one_class"] == alike > len(matched) / 2
    assert report["lowest_confidence"] == min(float(row["confidence"]) for row in failed)
    values = {
        name: [np.array([float(row[name]) for row in some]) for some in (failed, matched)] for name in utils.ATTENTION
    }
    for name in ("border_drop", "border_reliance", "insertion_deletion"):
        (a, b) = values[name]
        means = [report[group][name]["mean"] for group in ("failures", "matched", "failures_minus_matched")]
        assert np.allclose(means, [a.mean(), b.mean(), (a - b).mean()]), name
        figure = report["failures_minus_matched"][name]
        assert abs((figure["high"] - figure["low"]) / (3.92 * (a - b).std() / math.sqrt(len(a))) - 1) < 0.15
    difference = values["insertion_deletion"][0] - values["insertion_deletion_other"][0]
    assert math.isclose(report["failures"]["minus_other"]["mean"], difference.mean())
    # A network that has learnt: its maps are better than shuffled ones, and than those of other images.
    assert report["failures"]["minus_shuffled"]["low"] > 0 and report["failures"]["minus_other"]["low"] > 0
    assert np.allclose(values["border_reliance"][0], values["border_drop"][0] - values["centre_drop"][0])
    assert report["sane"] == gradcam.is_sane(report["sanity"])
    assert report["sanity"]["stem"]["abs_rho"] < report["sanity"]["fc"]["abs_rho"] < 1  # the deeper, the more is lost
    # the first failure, by itself and by hand
    model = resnet18(width=16)
    model.load_state_dict(utils.load_checkpoint(baseline / "best.pt")["model"])
    images, _ = data.load_synthetic(train=False)
    image, target = (
        data.normalize(images[[int(failed[0]["index"])]]),
        torch.tensor(logits[[int(failed[0]["index"])]].argmax(1)),
    )
    hidden = image.clone()
    hidden[..., :4, :] = hidden[..., -4:, :] = hidden[..., :, :4] = hidden[..., :, -4:] = 0
    with torch.no_grad():
        p, q = model.eval()(torch.cat([image, hidden])).softmax(1)[:, target].flatten().tolist()
    assert math.isclose(p - q, float(failed[0]["border_drop"]), abs_tol=1e-5)
    energy = gradcam.border_energy(gradcam.grad_cam(model, image, target, "layer3")).item()
    assert math.isclose(energy, float(failed[0]["border_energy"]), abs_tol=1e-5)


def test_chain_attention_can_be_interrupted():
    run_dir = copy_of_run("impatient", "gradcam.*", "attention.*")
    before = (run_dir / "failures.csv").read_bytes()

    def interrupt(*args):
        raise KeyboardInterrupt

    with replaced(gradcam, "occlusion_drops", interrupt):
        try:
            quietly(gradcam.main, [str(run_dir), "--device", "cpu"])
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError("no attention figures were computed")
    assert (run_dir / "gradcam.png").exists() and (run_dir / "gradcam.csv").exists()
    assert not (run_dir / "attention.csv").exists() and (run_dir / "failures.csv").read_bytes() == before
    printed = quietly(gradcam.main, [str(run_dir), "--device", "cpu", "--index", "3", "5"])[1]
    assert "attention" not in printed and not (run_dir / "attention.json").exists()
    # they are measured once for one checkpoint and list of failures
    run_dir = copy_of_run("attended")
    with replaced(gradcam, "measure_attention", interrupt):
        printed = quietly(gradcam.main, [str(run_dir), "--device", "cpu", "--layer", "layer3"])[1]
        assert "as measured before" in printed and "border reliance: their difference" in printed
        for path, old, new in (("attention.json", utils.sha256(run_dir / "best.pt"), "another"),
                               ("attention.csv", "\nfailure,", "\nfailure,1"), ("attention.json", '"pairs"', '"no"'),
                               ("attention.json", '"rho": ', '"rho": "x", "no": '), ("attention.json", '"sanity": {', '"sanity": 1, "no": {'),
                               ("failures.csv", "insertion_deletion_other", "other")):  # fmt: skip
            content = (run_dir / path).read_text()
            assert old in content
            (run_dir / path).write_text(content.replace(old, new))
            try:
                quietly(gradcam.main, [str(run_dir), "--device", "cpu"])
            except KeyboardInterrupt:
                (run_dir / path).write_text(content)
            else:
                raise AssertionError(f"{path} was taken for up to date")
    # the same list of failures keeps the figures, another one drops them; another choice of them drops the picture
    with replaced(utils, "save_figure", lambda figure, path: None):
        quietly(failures.main, [str(run_dir), "--threshold", "0.75"])
        assert (run_dir / "gradcam.png").exists() and (run_dir / "gradcam.csv").exists()
        quietly(failures.main, [str(run_dir), "--threshold", "0.75", "--top", "4"])
        assert not (run_dir / "gradcam.png").exists() and (run_dir / "gradcam.csv").exists()
        rows = quietly(failures.main, [str(run_dir), "--threshold", "0.75"])[0]
        assert float(rows[0]["border_drop"]) == float(read_csv(chain()[0][0] / "failures.csv")[0]["border_drop"])
        rows = quietly(failures.main, [str(run_dir), "--threshold", "0.6"])[0]
        assert "border_drop" not in rows[0] and not (run_dir / "attention.csv").exists()


def test_chain_attention_of_one_failure():
    run_dir = copy_of_run("lonely", "gradcam.*", "attention.*")
    second = float(read_csv(run_dir / "failures.csv")[1]["confidence"])
    with replaced(utils, "save_figure", lambda figure, path: None):
        rows = quietly(failures.main, [str(run_dir), "--threshold", str(second)])[0]
        printed = quietly(gradcam.main, [str(run_dir), "--device", "cpu"])[1]
    report = json.loads((run_dir / "attention.json").read_text())
    (row,) = read_csv(run_dir / "failures.csv")
    assert len(rows) == report["images"] == report["pairs"] == 1 and report["sanity"]["other_image"]["rho"] is None
    figure = report["failures"]["border_reliance"]
    assert figure == {"mean": float(row["border_reliance"]), "low": None, "high": None}
    assert (
        f"{figure['mean']:.3f} " in printed and "[" not in printed.split("border reliance")[1].split("insertion")[0]
    )


def test_gradcam_reads_any_image():
    from PIL import Image

    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    rotated, exif = rgb.copy(), Image.Exif()
    exif[0x0112] = 6
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    wide = Image.fromarray(np.linspace(1000, 60_000, 32 * 32).astype(np.uint16).reshape(32, 32))
    cases = {
        "rgb.png": (rgb, {}, "central square and resized from 60x40"),
        "gray.png": (rgb.convert("L"), {}, "converted from L"),
        "palette.gif": (rgb.convert("P"), {}, "converted from P"),
        "cmyk.jpg": (rgb.convert("CMYK"), {}, "converted from CMYK"),
        "rotated.jpg": (rotated, {"exif": exif}, "upright"),
        "clear.png": (clear, {}, "transparency"),
        "wide.png": (wide, {}, "1000..60000"),
        "frames.gif": (rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}, "first of 2 frames"),
        "dot.png": (Image.new("RGB", (1, 1), (9, 9, 9)), {}, "resized from 1x1"),
        "exact.png": (rgb.crop((0, 0, 32, 32)), {}, ""),
    }
    for name, (image, options, word) in cases.items():
        image.save(scratch() / name, **options)
        pixels, done = gradcam.read_image(scratch() / name)
        assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8 and word in ", ".join(done), (name, done)
        assert word or not done
    assert (gradcam.read_image(scratch() / "clear.png")[0] == 255).all()  # white, not the hidden red
    values = gradcam.read_image(scratch() / "wide.png")[0][..., 0]
    assert values[0, 0] == 0 and values[-1, -1] == 255 and 100 < values[16, 0] < 156  # not clipped to white
    assert gradcam.read_image(scratch() / "rotated.jpg")[1][1].endswith("40x60 to 32x32")


# ---- the chain -------------------------------------------------------------------------------------------------------


def test_chain_learns_and_writes_everything():
    (baseline, smoothed), printed = chain()
    log = read_csv(baseline / "log.csv")
    assert list(log[0]) == train.COLUMNS and [row["epoch"] for row in log] == ["1", "2", "3"]
    assert math.isclose(float(log[0]["lr"]), 0.1)  # the end of the warmup
    wanted = "config.json log.csv curves.png last.pt best.pt metrics.json confusion.npy confusion.png per_class.csv per_class.png reliability.png superclasses.csv label_errors.csv"
    for name in (*wanted.split(), *evaluate.ARRAYS):
        assert (baseline / name).exists() and (smoothed / name).exists(), name
    for name in (
        "comparison.json",
        "comparison_reliability.png",
        "comparison_risk_coverage.png",
        "verdict.json",
        "verdict.png",
    ):
        assert (smoothed / name).exists(), name
    for name in ("failures.csv", "failures.png", "gradcam.csv", "gradcam.png"):
        assert (baseline / name).exists(), name
    metrics, config = (json.loads((baseline / name).read_text()) for name in ("metrics.json", "config.json"))
    assert 0.05 < 1 - metrics["accuracy"] < 0.3, metrics["accuracy"]  # learnt, and left something to fail at
    assert metrics["confident_errors"] > 0
    assert config["dataset"] == "synthetic" and config["finished"] and config["threads"] == torch.get_num_threads()
    assert all("SYNTHETIC" in text for text in printed[:4]) and "next: python evaluate.py" in printed[0]
    assert "published study" not in printed[2]  # whose numbers are of real images
    wanted = (
        "accuracy macro_precision macro_recall macro_f1 top5_accuracy nll brier ece ece_null mean_confidence signed_gap aurc auroc_failure "
        "temperature nll_scaled ece_scaled superclass_accuracy errors_within_superclass confident_errors ci95 "
        "errors_within_superclass_null ece_adaptive eaurc risk_at_80 aurc_scaled eaurc_scaled auroc_failure_scaled risk_at_80_scaled "
        "brier_scaled ece_adaptive_scaled ece_null_scaled signed_gap_scaled label_errors"
    )
    assert set(wanted.split()) <= set(metrics)
    for name, (low, high) in metrics["ci95"].items():
        assert low <= metrics[name] <= high, name


def test_chain_comparison():
    (baseline, smoothed), printed = chain()
    comparison = json.loads((smoothed / "comparison.json").read_text())
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (baseline, smoothed)]
    for name in ("accuracy", "nll", "ece", "aurc", "auroc_failure", "macro_f1"):
        entry = comparison[name]
        for key, its_metrics in zip(("reference", "this"), metrics):
            assert math.isclose(entry[key], its_metrics[name], rel_tol=1e-4), name
        assert math.isclose(entry["difference"], entry["this"] - entry["reference"])
        assert entry["ci95"][0] < entry["difference"] < entry["ci95"][1], name
    assert math.isclose(comparison["nll_scaled"]["this"], metrics[1]["nll_scaled"], rel_tol=1e-4)
    labels = np.load(baseline / "test_labels.npy")
    first, second = (np.load(run / "test_logits.npy").argmax(1) == labels for run in (baseline, smoothed))
    counts = int((first & ~second).sum()), int((second & ~first).sum())
    assert (comparison["only_reference_right"], comparison["only_this_right"]) == counts
    assert math.isclose(comparison["accuracy"]["difference"], (counts[1] - counts[0]) / 10_000, abs_tol=1e-6)
    assert "differ in width: 16 and 8" in printed[2] and "differ in smoothing" not in printed[2]
    # Paired: a run against a copy of itself differs in nothing, in no resample.
    twin = copy_of_run("twin", "*.png", "*.pt")
    with replaced(utils, "save_figure", lambda figure, path: None):  # the slow part
        quietly(evaluate.main, [str(baseline), str(twin)])
    comparison = json.loads((twin / "comparison.json").read_text())
    entries = [entry for entry in comparison.values() if isinstance(entry, dict)]
    assert comparison["mcnemar_p"] == 1 and len(entries) > 10
    assert all(entry["difference"] == 0 and entry["ci95"] == [0, 0] for entry in entries)


@functools.cache
def seeds_of_chain():
    """Evaluated copies of the chain's runs, two seeds of each recipe, the second with other logits; (directories, output)."""
    rng, runs = np.random.default_rng(0), []
    for source in chain()[0]:
        for seed in (42, 43):
            run_dir = scratch() / f"{source.name}-seed{seed}"
            shutil.copytree(
                source, run_dir, ignore=shutil.ignore_patterns("*.png", "*.pt", "metrics.json", "attention*")
            )
            config = json.loads((run_dir / "config.json").read_text())
            config["args"] |= {"seed": seed, "width": 16, "limit": None}
            utils.write_json(run_dir / "config.json", config)
            if seed == 43:
                for split in ("test", "val"):
                    logits = np.load(run_dir / f"{split}_logits.npy")
                    logits += rng.normal(scale=0.5, size=logits.shape).astype(np.float32)
                    evaluate.write_array(run_dir / f"{split}_logits.npy", logits)
            runs.append(run_dir)
    with replaced(utils, "save_figure", lambda figure, path: None):
        printed = quietly(evaluate.main, [*map(str, runs), "--ensemble"])[1]
    return runs, printed


def test_chain_verdict():
    runs, printed = seeds_of_chain()
    verdict = json.loads((runs[2] / "verdict.json").read_text())
    assert [verdict["baselines"], verdict["changed"]] == [list(map(str, runs[:2])), list(map(str, runs[2:]))]
    rows = {row["claim"]: row for row in verdict["claims"]}
    assert len(rows) == len(verdict["claims"]) == 12
    metrics = [json.loads((run / "metrics.json").read_text()) for run in runs]
    for claim, name in (
        ("accuracy stays the same, within 1 point", "accuracy"),
        ("calibration improves (ECE)", "ece"),
        ("confidence ranks the errors better (AURC)", "aurc"),
    ):
        values = [run[name] for run in metrics]
        assert math.isclose(rows[claim]["figure"], np.mean(values[2:]) - np.mean(values[:2]), rel_tol=1e-3), claim
        assert rows[claim]["ci95"][0] < rows[claim]["figure"] < rows[claim]["ci95"][1]
    spread = math.sqrt((np.var(values[:2]) + np.var(values[2:])))  # pooled over two recipes of two seeds
    assert math.isclose(rows[claim]["control_value"], spread, rel_tol=1e-3)
    inside = np.mean([run["errors_within_superclass"] for run in metrics[:2]])
    assert math.isclose(rows["most errors stay in the superclass"]["figure"], inside, rel_tol=1e-4)
    accuracy = [np.diag(np.load(run / "confusion.npy")).reshape(100) for run in runs[:2]]
    by_superclass = np.array([np.mean(accuracy, 0)[data.SUPERCLASS_OF == k].mean() / 100 for k in range(20)])
    small = by_superclass[list(data.SUPERCLASSES).index("small_mammals")]
    lowest = np.delete(by_superclass, list(data.SUPERCLASSES).index("small_mammals")).min()
    assert math.isclose(rows["small mammals are the worst superclass"]["figure"], small - lowest, rel_tol=1e-3)
    assert "(seeds 42, 43)" in printed and f"{runs[0].name}: mean of 2" in printed and "not measured" in printed
    # evaluate ends with it, a picture can be drawn of it, and a recipe is not counted twice under one seed
    assert printed.index("verdict on the step") > printed.index("after temperature scaling")
    figure = drawn(evaluate.draw_verdict, None, verdict["claims"], "title")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert all(row["claim"] in texts for row in verdict["claims"])
    assert texts.count("not decided") == sum(row["word"] == "not decided" for row in verdict["claims"])
    configs = [{"dir": run, "seed": seed, "config": json.loads((run / "config.json").read_text())}
               for run, seed in zip([*runs, runs[0]], (42, 43, 42, 43, 42))]  # fmt: skip
    arms, printed = quietly(evaluate.by_recipe, configs)
    assert arms == [configs[:2], configs[2:4]] and f"{runs[0]} repeats the seed 42" in printed


def test_chain_ensemble():
    runs, printed = seeds_of_chain()
    probs = [np.exp(utils.log_softmax(np.load(run / "test_logits.npy"))) for run in runs]
    labels, mean = np.load(runs[0] / "test_labels.npy"), np.mean(probs, 0)
    metrics, rows = json.loads((runs[0] / "ensemble.json").read_text()), read_csv(runs[0] / "ensemble.csv")
    assert math.isclose(metrics["accuracy"], (mean.argmax(1) == labels).mean()) and "ensemble of 4" in printed
    assert math.isclose(metrics["nll"], -np.log(mean[np.arange(10_000), labels]).mean())
    assert metrics["nll_scaled"] != metrics["nll"] and "temperature" not in metrics
    for i in (0, 77, 9_999):
        assert math.isclose(float(rows[i]["confidence"]), mean[i].max()) and int(rows[i]["index"]) == i
        pairs = [p[i].argmax() != q[i].argmax() for p, q in itertools.combinations(probs, 2)]
        assert math.isclose(float(rows[i]["disagreement"]), sum(pairs) / 6)
    refused(evaluate.main, [runs[0], "--ensemble"], 2, "two runs or more")


def test_chain_failures_over_the_seeds():
    """Two controls and two others: their columns, what is stable, and the difference of the means."""
    (first, control, *others), _ = seeds_of_chain()
    third = first.with_name("third")
    shutil.copytree(control, third, dirs_exist_ok=True)
    (third / "metrics.json").unlink()  # of other logits than those written now
    logits, labels = np.load(first / "test_logits.npy"), np.load(first / "test_labels.npy")
    wrong = np.flatnonzero(logits.argmax(1) != labels)
    logits[wrong[::2], labels[wrong[::2]]] += 20  # every second mistake is repaired
    evaluate.write_array(third / "test_logits.npy", logits)
    with replaced(utils, "save_figure", lambda figure, path: None):
        flags = ["--threshold", "0.5", "--compare", *others, "--control", control, third]
        rows, printed = quietly(failures.main, list(map(str, [first, *flags])))
    columns = (
        "other_confidence other2_confidence control_confidence control2_confidence over_seeds label_doubted".split()
    )
    assert set(columns) <= set(rows[0]) and len(rows) > 20 and "over the 3 seeds" in printed
    for row in rows:
        outcomes = {row["control_outcome"], row["control2_outcome"]}
        word = "stable" if outcomes == {"same wrong class"} else "luck" if outcomes == {"repaired"} else "mixed"
        assert row["over_seeds"] == word and (row["control2_outcome"] == "repaired") == (row["index"] in wrong[::2])
    assert {row["over_seeds"] for row in rows} >= {"stable", "mixed"}
    mean_control = np.mean([(row["control_confidence"] + row["control2_confidence"]) / 2 for row in rows])
    for name in ("other", "other2"):  # each compared run by itself: they may be of several recipes
        effect = np.mean([row[f"{name}_confidence"] for row in rows]) - mean_control
        assert f"this - control    {100 * effect:+.1f} points" in printed, printed
    refused(failures.main, [first, "--compare", others[0], "--control", others[1]], 2, "another recipe", "--seed")
    refused(failures.main, [control, "--compare", others[0], "--control", third], 2, "has the seed", "--seed")
    doubted = {row["index"]: row["suggested"] for row in read_csv(first / "label_errors.csv")}
    assert all(row["label_suggested"] == doubted.get(str(row["index"]), "") for row in rows)
    broken = np.load(first / "test_logits.npy").argmax(1) == labels
    broken &= np.exp(utils.log_softmax(np.load(first / "test_logits.npy"))).max(1) > 0.5
    count = (broken & (np.load(others[0] / "test_logits.npy").argmax(1) != labels)).sum()
    line = next(line for line in printed.splitlines() if "newly broken" in line)
    assert line.split()[2].replace(",", "") == str(count) and f"of the {broken.sum():,} images" in line


def test_chain_matched_coverage():
    """Equally many of the most confident images of each run, each run ranked by its own confidence."""
    confidence, other = np.array([0.95, 0.92, 0.5, 0.4]), np.array([0.1, 0.2, 0.6, 0.7])
    correct, other_correct = np.array([True, False, False, True]), np.array([True, True, False, False])
    printed = quietly(failures.print_matched, confidence, correct, other, other_correct, 0.9)[1]
    assert printed.startswith("1 -> 2 wrong among the 2 most confident images"), printed


def test_chain_keeps_row_order_and_agrees_with_itself():
    baseline = chain()[0][0]
    logits, labels, confusion = (
        np.load(baseline / name) for name in ("test_logits.npy", "test_labels.npy", "confusion.npy")
    )
    assert logits.shape == (10_000, 100) and logits.dtype == np.float32 and labels.dtype == np.int64
    images, true_labels = data.load_synthetic(train=False)
    assert (labels == true_labels.numpy()).all()
    checkpoint = utils.load_checkpoint(baseline / "best.pt")
    model = resnet18(width=16)
    model.load_state_dict(checkpoint["model"])
    some = [0, 1, 4_999, 9_999]
    with torch.no_grad():
        mean, std = (torch.tensor(values)[:, None, None] for values in (data.MEAN, data.STD))
        direct = torch.cat([model.eval()(((images[i].permute(2, 0, 1) / 255 - mean) / std)[None]) for i in some])
    assert np.allclose(direct, logits[some], atol=1e-3)
    metrics = json.loads((baseline / "metrics.json").read_text())
    assert math.isclose(np.trace(confusion) / confusion.sum(), metrics["accuracy"]) and confusion.sum() == 10_000
    assert math.isclose((logits.argmax(1) == labels).mean(), metrics["accuracy"])
    rows = read_csv(baseline / "per_class.csv")
    assert math.isclose(np.mean([float(row["accuracy"]) for row in rows]), metrics["macro_recall"])
    assert math.isclose(np.mean([float(row["f1"]) for row in rows]), metrics["macro_f1"])
    # bf16 or float32, the validation accuracy of training is that of evaluation, give or take a few images
    val_logits, val_labels = np.load(baseline / "val_logits.npy"), np.load(baseline / "val_labels.npy")
    assert len(val_labels) == 500 and abs((val_logits.argmax(1) == val_labels).mean() - checkpoint["val_acc"]) < 0.02


def test_chain_failures():
    (baseline, smoothed), printed = chain()
    rows = read_csv(baseline / "failures.csv")
    assert list(rows[0])[:6] == "index,true,predicted,confidence,true_probability,same_superclass".split(",")
    probs, labels = (
        np.exp(utils.log_softmax(np.load(baseline / "test_logits.npy"))),
        np.load(baseline / "test_labels.npy"),
    )
    other = np.load(smoothed / "test_logits.npy").argmax(1)
    expected = sorted(
        (-probs[i].max(), i) for i in range(10_000) if probs[i].argmax() != labels[i] and probs[i].max() > 0.75
    )
    assert [int(row["index"]) for row in rows] == [i for _, i in expected] and len(rows) > 10
    for row in rows[:20]:
        i = int(row["index"])
        assert row["true"] == f"synthetic_{labels[i]:02d}" and math.isclose(
            float(row["true_probability"]), probs[i, labels[i]]
        )
        fate = (
            "repaired"
            if other[i] == labels[i]
            else "same wrong class"
            if other[i] == probs[i].argmax()
            else "new wrong class"
        )
        assert row["other_outcome"] == fate
        assert int(row["same_superclass"]) == (data.SUPERCLASS_OF[labels[i]] == data.SUPERCLASS_OF[probs[i].argmax()])
    assert "such images" in printed[3] and "repaired" in printed[3] and "naive difference" in printed[3]
    assert sum(row["representative"] == "1" for row in rows) == 3 and rows[0]["representative"] == "1"
    assert f"{len(rows):,} SYNTHETIC data test images that are wrong with confidence above 0.75" in printed[3]


def test_chain_failures_representative_rule():
    labels, preds = np.arange(10), np.array([1, 1, 1, 1, 1, 2, 2, 2, 2, 2])
    pick = failures.representative
    assert pick(np.arange(10), preds, labels, 3) == [0, 4, 9]
    assert pick(np.arange(10), preds, labels, 1) == [0]
    same = np.zeros(10, int)  # every failure of one pair: only one of them is shown
    assert pick(np.arange(10), same, same, 3) == [0] and pick(np.arange(0), preds, labels, 3) == []


def test_chain_gradcam():
    baseline = chain()[0][0]
    failed, explained = read_csv(baseline / "failures.csv"), read_csv(baseline / "gradcam.csv")
    assert [row["index"] for row in explained] == [row["index"] for row in failed]
    logits, bias = (
        np.load(baseline / "test_logits.npy"),
        utils.load_checkpoint(baseline / "best.pt")["model"]["fc.bias"].numpy(),
    )
    for row, failure in zip(explained[:20], failed):
        target = int(
            row["target"][-2:]
        )  # the sum over the cells is the logit without its bias, through the whole chain
        assert math.isclose(float(row["map_sum"]) + bias[target], logits[int(failure["index"]), target], abs_tol=1e-3)
        true = int(row["true"][-2:])
        assert math.isclose(
            float(row["true_map_sum"]) + bias[true], logits[int(failure["index"]), true], abs_tol=1e-3
        )
    run_dir = copy_of_run("explained", "last.pt")
    rows, printed = quietly(
        gradcam.main, [str(run_dir), "--index", "3", "3", "141", "--layer", "layer3", "--target", "synthetic_07"]
    )
    assert len(rows) == 2 and rows[0]["target"] == "synthetic_07" and "8x8 cells at layer3" in printed
    rows, _ = quietly(gradcam.main, [str(run_dir), "--index", "3", "--target", "true"])
    assert rows[0]["target"] == rows[0]["true"] and rows[0]["map_sum"] == rows[0]["true_map_sum"]
    from PIL import Image

    Image.new("L", (50, 40), 99).save(scratch() / "gray.png")
    rows, printed = quietly(gradcam.main, [str(run_dir), "--image", str(scratch() / "gray.png")])
    assert len(rows) == 1 and rows[0]["true"] == "" and "converted from L" in printed


def drawn(function, *args):
    """The figure that a drawing function would save."""
    figures = []
    with replaced(utils, "save_figure", lambda figure, path: figures.append(figure)):
        function(*args)
    return figures[0]


def test_figures_show_what_they_say():
    confusion = np.diag(np.full(100, 50))
    confusion[3, 70] = 7  # true 3, predicted 70
    matrix, bars = drawn(evaluate.draw_confusion, None, confusion, data.CLASS_NAMES, "").axes[:2]
    shown = matrix.images[0].get_array()
    rows, columns = ([label.get_text() for label in axis.get_ticklabels()] for axis in (matrix.yaxis, matrix.xaxis))
    assert shown[rows.index(data.CLASS_NAMES[3]), columns.index(data.CLASS_NAMES[70])] == 7 and shown.sum() == 7
    assert rows[:5] == data.SUPERCLASSES["aquatic_mammals"].split() and np.isnan(np.diag(shown.filled(np.nan))).all()
    assert bars.patches[0].get_width() == 7

    predicted, true = torch.rand(4, 4) - 0.5, torch.rand(4, 4) - 0.5
    row = {"index": 1, "true": "bear", "predicted": "wolf", "confidence": 0.9}
    panels = [[("wolf", 0.9, predicted), ("bear", 0.05, true)]]
    figure = drawn(gradcam.draw, None, [row], [np.zeros((32, 32, 3), np.uint8)], panels, "layer4", "")
    _, first, second, margin = (axes.images[0].get_array() for axes in figure.axes[:4])
    up = [gradcam.upsample(raw[None])[0] for raw in (predicted.clamp(min=0), true.clamp(min=0), predicted - true)]
    assert np.allclose(first, up[0] / max(up[0].max(), up[1].max())) and first.max() <= 1
    assert np.allclose(second, up[1] / max(up[0].max(), up[1].max()))  # on the same scale as the first
    assert np.allclose(margin, up[2] / up[2].abs().max())


def test_chain_evaluates_again_without_checkpoint_and_data():
    run_dir = copy_of_run("logits only", "*.pt", "*.png", "failures.csv")
    for name in ("test_logits.npy", "val_logits.npy"):
        evaluate.write_array(run_dir / name, np.load(run_dir / name).astype(np.float16))
    (run_dir / "metrics.json").unlink()
    data.load_synthetic.cache_clear()
    before, load = json.loads((chain()[0][0] / "metrics.json").read_text()), evaluate.load_dataset
    evaluate.load_dataset = None  # any use of it would raise
    try:
        metrics = quietly(evaluate.main, [str(run_dir)])[0][str(run_dir)]
    finally:
        evaluate.load_dataset = load
    assert abs(metrics["accuracy"] - before["accuracy"]) < 0.001 and abs(metrics["nll"] - before["nll"]) < 0.001
    assert (run_dir / "confusion.png").exists()


def test_chain_evaluates_anew_when_the_checkpoint_has_changed():
    run_dir = copy_of_run("changed", "last.pt", "*.png")
    shutil.copy(chain()[0][1] / "best.pt", run_dir / "best.pt")
    assert evaluate.logits_are_current(chain()[0][0]) and not evaluate.logits_are_current(run_dir)
    with replaced(utils, "save_figure", lambda figure, path: None):
        _, printed = quietly(evaluate.main, [str(run_dir)])
    assert "logits of best.pt" in printed and evaluate.logits_are_current(run_dir)
    assert (np.load(run_dir / "test_logits.npy") == np.load(chain()[0][1] / "test_logits.npy")).all()


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_bad_arguments():
    """Refused with the flag named, and before any file is changed."""
    run, elsewhere = shlex.quote(str(chain()[0][0])), shlex.quote(str(scratch() / "not made"))
    table = [  # script, arguments, words expected in the line
        (train, "--nonsense", "--nonsense"), (train, "--smooth 0.1", "--smooth"), (train, "--lr", "--lr"),
        (train, "--batch-size 0", "--batch-size 0"), (train, "--batch-size -8", "--batch-size -8"), (train, "--batch-size abc", "abc"),
        (train, "--batch-size 1e3", "1e3"), (train, "--batch-size 1", "--batch-size 1"), (train, "--batch-size 200 --limit 100", "--batch-size 200"),
        (train, "--device cuda:77", "cuda:77"), (train, "--device foo", "this machine has cpu"),
        (train, "--smoothing 1.5", "[0, 1)"), (train, "--smoothing -0.1", "[0, 1)"), (train, "--smoothing nan", "[0, 1)"),
        (train, "--smoothing 1", "[0, 1)"), (train, "--smoothing 0,1", "0,1"), (train, "--smoothing inf", "[0, 1)"),
        (train, "--epochs 0", "--epochs 0"), (train, "--epochs -3", "--epochs -3"), (train, "--epochs 1.5", "1.5"),
        (train, "--epochs 5 --warmup-epochs 5", "--warmup-epochs 5"), (train, "--warmup-epochs -1", "--warmup-epochs -1"),
        (train, "--lr 0", "--lr 0"), (train, "--lr -1", "--lr -1"), (train, "--lr nan", "--lr nan"), (train, "--lr inf", "--lr inf"),
        (train, "--weight-decay -1", "--weight-decay -1"), (train, "--weight-decay nan", "--weight-decay nan"), (train, "--momentum 1", "--momentum 1"),
        (train, "--seed -1", "--seed -1"), (train, "--seed 18446744073709551616", "--seed"), (train, "--seed x", "--seed"),
        (train, "--val-size 0", "--val-size 0"), (train, "--val-size 50000", "--val-size 50000"), (train, "--val-size -5", "--val-size -5"),
        (train, "--val-size 150", "multiple of 100"), (train, "--limit 0", "--limit 0"), (train, "--limit 45001", "45000"),
        (train, "--patience -1", "--patience -1"), (train, "--width 0", "--width 0"), (train, "--amp fp16 --device cpu", "--amp fp16"),
        (train, "--dataset imagenet", "imagenet"), (train, f"--output-dir {shlex.quote(__file__)}", "--output-dir"),
        (evaluate, "", "RUN"), (evaluate, elsewhere, "train.py"), (evaluate, f"{run} --device cuda:77", "cuda:77"), (evaluate, f"{run} --bins 3", "--bins"),
        (evaluate, f"{run} --dataset cifar100", "synthetic"), (failures, elsewhere, "train.py"), (failures, f"{run} --top 0", "--top 0"),
        (failures, f"{run} --top -1", "--top -1"), (failures, f"{run} --threshold 1.5", "--threshold 1.5"), (failures, f"{run} --threshold nan", "nan"),
        (failures, f"{run} --compare {elsewhere}", "train.py"), (failures, f"{run} --control {run}", "--compare"), (failures, f"{run} --compare {run}", "different"), (evaluate, f"{run} {elsewhere}", "train.py"), (failures, f"{run} --device foo", "foo"),
        (gradcam, elsewhere, "train.py"), (gradcam, f"{run} --index -1", "0..9999"), (gradcam, f"{run} --index 10000", "0..9999"),
        (gradcam, f"{run} --index abc", "abc"), (gradcam, f"{run} --index 1 --image x.png", "not allowed"),
        (gradcam, f"{run} --index {' '.join(map(str, range(65)))}", "64"), (gradcam, f"{run} --index 1 --target 100", "0..99"),
        (gradcam, f"{run} --index 1 --target -1", "0..99"), (gradcam, f"{run} --index 1 --target sinthetic_07", "synthetic_07"),
        (gradcam, f"{run} --index 1 --layer layer5", "layer4"), (gradcam, f"{run} --index 1 --layer fc", "layer4"),
        (gradcam, f"{run} --image x.png --target true", "--target true"), (gradcam, f"{run} --image {elsewhere}", "not made"),
        (gradcam, f"{run} --image https://example.org/cat.png", "example.org"), (gradcam, f"{run} --image {run}", "--image"),
    ]  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in scratch().rglob("*") if path.is_file()}
    for module, arguments, *words in table:
        refused(module.main, shlex.split(arguments), 2, *words)
    assert before == {path: path.stat().st_mtime_ns for path in scratch().rglob("*") if path.is_file()}


def zipped(entries):
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


class Payload:
    """Unpickled, it makes a file: the proof that somebody's code has run."""

    def __reduce__(self):
        return open, (str(scratch() / "pwned"), "w")


def test_bad_worlds():
    """What this machine does not have: old versions, GPUs that do not work, a full memory, a server that falls silent."""
    with replaced(torch, "__version__", "2.5.1"):
        refused(lambda argv: utils.select_device("cpu"), [], 2, "2.6", "too old")
    if not torch.cuda.is_available():
        with replaced(torch.cuda, "device_count", lambda: 1):  # as a P100: there, but no operation works
            refused(lambda argv: utils.select_device("cuda"), [], 1, "does not run this PyTorch", "--device cpu")
    with replaced(torch.cuda, "get_device_capability", lambda device: (7, 5)):  # a T4 would emulate bfloat16
        with replaced(utils, "device_name", lambda device: "Tesla T4"):
            refused(lambda argv: train.select_precision("bf16", torch.device("cuda:0")), [], 2, "Tesla T4", "fp16")

    for error, code, word in (
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), 1, "--batch-size"),
        (MemoryError(), 1, "out of memory"),
        (OSError(5, "Input/output error", "somewhere"), 1, "somewhere: Input/output error"),
        (KeyboardInterrupt(), 130, "stopped"),
        (utils.Terminated(), 143, "stopped"),
        (ScriptError("this; do that"), 2, "this; do that"),
    ):

        def main():
            raise error

        printed = io.StringIO()
        try:
            with contextlib.redirect_stderr(printed):
                utils.run_script(main)
        except SystemExit as stop:
            assert stop.code == code and word in printed.getvalue() and printed.getvalue().count("\n") == 1, error
        else:
            raise AssertionError(error)

    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent, replaced(data, "TIMEOUT", 0.5):
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        start = time.monotonic()
        refused(lambda argv: data.load_cifar100(scratch() / "silent", url=url), [], 1, "timed out", "--data-url")
        assert time.monotonic() - start < 10


def test_bad_checkpoints():
    run_dir = copy_of_run("bad checkpoint", "*.png", "*.npy", "metrics.json")
    last = (run_dir / "last.pt").read_bytes()
    good = (run_dir / "best.pt").read_bytes()
    checkpoint = utils.load_checkpoint(run_dir / "best.pt")
    state = checkpoint["model"]
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1  # in a tensor; torch.load does not notice
    torch.load(io.BytesIO(flipped), weights_only=True)
    other = {
        name: torch.zeros(10, tensor.shape[1])
        if name == "fc.weight"
        else torch.zeros(10)
        if name == "fc.bias"
        else tensor
        for name, tensor in state.items()
    }
    stem = state | {"conv1.weight": torch.zeros(16, 3, 7, 7)}
    table = {
        "empty": (b"", "not a checkpoint"), "text": (b"hello\n" * 99, "not a checkpoint"), "html": (b"<!DOCTYPE html><html>" * 99, "not a checkpoint"),
        "truncated": (good[: len(good) // 2], "not a checkpoint"), "one bit": (bytes(flipped), "CRC"), "other zip": (zipped({"a.txt": "hello"}), "not a checkpoint"),
        "malicious": (saved(checkpoint | {"epoch": Payload()}), "asks to run"), "legacy": (saved(checkpoint, _use_new_zipfile_serialization=False), "refused"),
        "malicious legacy": (saved({"x": Payload()}, _use_new_zipfile_serialization=False), "refused"), "raw pickle": (pickle.dumps(Payload()), "refused"),
        "whole model": (saved(resnet18(width=4)), "asks to run"), "bare weights": (saved(state), "train.py"), "a list": (saved([1, 2]), "train.py"),
        "no weights": (saved({key: value for key, value in checkpoint.items() if key != "model"}), "train.py"), "newer": (saved(checkpoint | {"format": 2}), "version"),
        "no args": (saved(checkpoint | {"args": None}), "train.py"), "huge": (saved(checkpoint | {"args": checkpoint["args"] | {"width": 10**9}}), "train.py"),
        "10 classes": (saved(checkpoint | {"model": other}), "fc.weight"), "another stem": (saved(checkpoint | {"model": stem}), "conv1.weight"),
        "NaN": (saved(checkpoint | {"model": state | {"fc.bias": state["fc.bias"] * math.nan}}), "NaN"),
        "missing keys": (saved(checkpoint | {"model": {}}), "another network"),
    }  # fmt: skip
    arguments = {**vars(train.parse_args(["--output-dir", str(run_dir)])), **checkpoint["args"]}
    flags = [
        f"--{key.replace('_', '-')}={value}"
        for key, value in arguments.items()
        if key not in utils.PLACES and value not in (None, False)
    ]
    for name, (content, word) in table.items():
        (run_dir / "best.pt").write_bytes(content)
        refused(gradcam.main, [run_dir, "--index", "1"], 2, "best.pt", word)
        refused(evaluate.main, [run_dir], 2, "best.pt", word)
        (run_dir / "last.pt").write_bytes(content)
        argv = [*flags, "--dataset", "synthetic", "--device", "cpu", "--output-dir", run_dir, "--resume"]
        refused(
            train.main,
            argv,
            2,
            "last.pt",
            word if name not in ("10 classes", "another stem", "NaN", "missing keys") else "best.pt",
        )
    assert not (scratch() / "pwned").exists()
    (run_dir / "best.pt").unlink()
    refused(evaluate.main, [run_dir], 2, "no ", "best.pt", "train.py")
    (run_dir / "last.pt").write_bytes(last)  # and the good ones, in other clothes
    for name, content in {
        "DataParallel": checkpoint | {"model": {f"module.{key}": value for key, value in state.items()}},
        "compiled": checkpoint | {"model": {f"_orig_mod.{key}": value for key, value in state.items()}},
        "half": checkpoint
        | {"model": {key: value.half() if value.is_floating_point() else value for key, value in state.items()}},
    }.items():
        (run_dir / "best.pt").write_bytes(saved(content))
        assert len(quietly(gradcam.main, [str(run_dir), "--index", "1"])[0]) == 1, name


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def test_bad_logits():
    run_dir = copy_of_run("bad logits", "*.png", "*.pt", "metrics.json")
    logits, labels = np.load(run_dir / "test_logits.npy"), np.load(run_dir / "test_labels.npy")
    spoilt = {
        value: np.where((np.arange(10_000) == 77)[:, None], value, logits)
        for value in (math.nan, math.inf, -math.inf)
    }
    giant = npy(logits)[:128].replace(b"(10000, 100), }      ", b"(10000000000, 100), }")  # 4 TB
    pickled = io.BytesIO()
    np.savez(pickled, payload=np.array([Payload()], dtype=object))
    table = [
        ("test_logits.npy", content, word)
        for content, word in (
            (b"", "not readable"), (b"hello", "not readable"), (npy(logits)[:999_999], "not readable"), (giant, "not readable"),
            (npy(np.array([Payload()], dtype=object), allow_pickle=True), "pickled objects"), (pickle.dumps(Payload()), "not readable"),
            (pickled.getvalue(), "not readable"), (npy(logits[:, :10]), "(10000, 10)"), (npy(logits[0]), "(100,)"), (npy(logits[:9999]), "9999"), (npy(logits[:0]), "(0, 100)"),
            (npy(logits.astype(complex)), "complex"), (npy(logits.astype(int)), "int64"), (npy(logits.astype(str)), "<U"),
            (npy(spoilt[math.nan]), "row 77"), (npy(spoilt[math.inf]), "row 77"), (npy(spoilt[-math.inf]), "row 77"),
        )
    ] + [
        ("test_labels.npy", content, word)
        for content, word in (
            (npy(labels[:9999]), "(9999,)"), (npy(labels.astype(float)), "float64"), (npy(labels - 1), "0..99"), (npy(labels + 1), "0..99"), (b"", "not readable"),
        )
    ]  # fmt: skip
    for name, content, word in table:
        good = (run_dir / name).read_bytes()
        (run_dir / name).write_bytes(content)
        for script_main in (failures.main, evaluate.main):
            refused(script_main, [run_dir], 2, name, word)
        (run_dir / name).write_bytes(good)
    assert not (scratch() / "pwned").exists()
    for name in evaluate.ARRAYS[:2]:
        good = (run_dir / name).read_bytes()
        (run_dir / name).unlink()
        refused(failures.main, [run_dir], 2, f"no {run_dir / name}", "evaluate.py")
        (run_dir / name).write_bytes(good)
    # Labels of another data set, and files that are not those that metrics.json was made from.
    evaluate.write_array(run_dir / "test_labels.npy", np.roll(labels, 1))
    refused(failures.main, [run_dir], 2, "differs from the data set")
    (run_dir / "failures.csv").unlink()
    shutil.copy(chain()[0][0] / "metrics.json", run_dir)
    refused(
        failures.main,
        [run_dir],
        2,
        "test_labels.npy is not the file that metrics.json was made from",
        "delete metrics.json",
    )
    evaluate.write_array(run_dir / "test_labels.npy", labels)
    quietly(failures.main, [str(run_dir)])
    # Probabilities are allowed, but not in silence.
    (run_dir / "metrics.json").unlink()
    evaluate.write_array(run_dir / "test_logits.npy", np.exp(utils.log_softmax(logits)))
    assert "looks like probabilities" in quietly(failures.main, [str(run_dir)])[1]


def test_bad_failures_csv():
    run_dir = copy_of_run("bad csv", "*.png", "last.pt")
    good = (run_dir / "failures.csv").read_text()
    header, first, *rest = good.splitlines()
    for content in (
        "",
        "hello\n",
        header + "\n" + first + "\n" + first,
        f"{header}\n{first.replace(first.split(',')[0], '10000', 1)}",
        "\0",
        f"{header}\n1,2,3",
        good.rstrip("\n") + ",one cell more\n",
    ):
        (run_dir / "failures.csv").write_text(content)
        refused(gradcam.main, [run_dir], 2, "failures.csv", "failures.py")
    (run_dir / "failures.csv").write_text(
        good.replace(first.split(",")[2], "synthetic_77" if "synthetic_77" not in first else "synthetic_78")
    )
    refused(gradcam.main, [run_dir], 2, "not of this best.pt")
    (run_dir / "failures.csv").unlink()
    refused(gradcam.main, [run_dir], 2, "no ", "failures.py")


def test_nothing_to_show_is_no_error():
    run_dir = copy_of_run("sure", "*.png", "last.pt", "metrics.json")
    labels = np.load(run_dir / "test_labels.npy")
    evaluate.write_array(run_dir / "test_logits.npy", 9.0 * (np.arange(100) == labels[:, None]))
    (run_dir / "failures.png").write_text("of another time")
    rows, printed = quietly(failures.main, [str(run_dir)])
    assert rows == [] and "nothing to show" in printed and not (run_dir / "failures.png").exists()
    assert "no failures to explain" in quietly(gradcam.main, [str(run_dir)])[1]


def test_bad_images():
    run, files = chain()[0][0], scratch() / "images"
    files.mkdir()
    from PIL import Image

    image = Image.effect_noise((64, 64), 90)
    image.save(files / "good.png")
    good = (files / "good.png").read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 4
    Image.new("1", (10_000, 10_000)).save(files / "bomb.png")
    for name, content in {
        "text.png": b"hello", "empty.png": b"", "short.png": good[: len(good) // 2], "flipped.png": bytes(flipped), "bomb.png": None,
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "paper.pdf": b"%PDF-1.4 ...", "missing.png": None,
    }.items():  # fmt: skip
        if content is not None:
            (files / name).write_bytes(content)
        refused(gradcam.main, [run, "--image", files / name], 2, name, "--image")


def test_bad_data_folders():
    folder = scratch() / "bad data"
    (folder / "cifar-100-python").mkdir(parents=True)
    load = lambda argv: data.load_cifar100(*argv)  # noqa: E731
    refused(load, [folder], 2, "train (MD5 16019d7e3df5f24257cddd939b257f8d)", "--data-dir")
    for name in ("train", "test", "meta"):
        (folder / "cifar-100-python" / name).write_bytes(pickle.dumps(Payload()))
    refused(load, [folder], 2, "altered")
    refused(load, [folder / "cifar-100-python"], 2, "altered")
    refused(load, [Path(__file__)], 2, "is a file")
    assert not (scratch() / "pwned").exists()


def serve(handler):
    """A web server on this machine for one test: its URL, and a function that ends it."""
    import http.server
    import threading

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/cifar-100-python.tar.gz", server.shutdown


def test_bad_downloads():
    import http.server
    import tarfile

    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        member = tarfile.TarInfo("../pwned")
        tar.addfile(member, io.BytesIO())
    answers = {
        "503": (503, b""),
        "html": (200, b"<html>login</html>"),
        "evil": (200, archive.getvalue()),
        "cut": (200, None),
    }

    for name, (status, body) in answers.items():

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.send_header("Content-Length", str(999 if body is None else len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body or b"")

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        url, stop = serve(Handler)
        refused(
            lambda argv: data.load_cifar100(scratch() / f"download {name}", url=url),
            [],
            1,
            url,
            "--data-dir",
            "--data-url",
            "eb9058c3",
        )
        stop()
    refused(lambda argv: data.load_cifar100(scratch() / "download", url="http://127.0.0.1:9/x"), [], 1, "refused")
    refused(lambda argv: data.load_cifar100(scratch() / "download", url="nonsense"), [], 1, "nonsense")
    assert not (scratch() / "pwned").exists() and not list(scratch().glob("download*/cifar-100-python"))


def test_download_works():
    """The way to a good copy: an archive with the right MD5, which we cannot make; so with the MD5 of one that we can."""
    import http.server
    import tarfile

    import torchvision

    folder = real_data() / "cifar-100-python"
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz", compresslevel=0) as tar:
        tar.add(folder, arcname="cifar-100-python")
    import hashlib

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(archive.getvalue())))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(archive.getvalue())

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    url, stop = serve(Handler)
    md5, torchvision.datasets.CIFAR100.tgz_md5 = (
        torchvision.datasets.CIFAR100.tgz_md5,
        hashlib.md5(archive.getvalue()).hexdigest(),
    )
    try:
        (images, labels), printed = quietly(lambda: data.load_cifar100(scratch() / "fetched", train=False, url=url))
    finally:
        torchvision.datasets.CIFAR100.tgz_md5 = md5
        stop()
    assert len(images) == 10_000 and "downloading" in printed and "%" in printed  # it shows that it moves
    shutil.rmtree(scratch() / "fetched")


# ---- places ----------------------------------------------------------------------------------------------------------


def test_places_exit_codes_and_one_line():
    run_dir = chain()[0][0]
    offline = ["--data-url", "http://127.0.0.1:9/x", "--data-dir", scratch() / "empty"]
    for argv, code, word in (
        (["train.py", "--lr", "-1"], 2, "train.py: error: --lr -1.0"),
        (["train.py", *offline, "--output-dir", scratch() / "no data"], 1, "train.py: error: cannot get CIFAR-100"),
        (["failures.py", run_dir, "--threshold", "0.5", "--device", "cpu"], 0, ""),
    ):
        done = script(*argv)
        assert (done.returncode, done.stderr.count("\n")) == (code, int(code > 0)), (argv, done.stderr)
        assert done.stderr.startswith(word), (argv, done.stderr)
        assert "Traceback" not in done.stderr and "\r" not in done.stdout  # no terminal: whole lines only


def test_places_signals():
    """SIGTERM and Ctrl-C: one line, what is kept, how to go on; 143 and 130. The pipe closed: quiet."""
    import signal

    def heed_ctrl_c():  # a process that a script started in the background would ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        run_dir = scratch() / f"signal {code}"
        flags = [*TINY, "--epochs", "2000", "--patience", "0", "--output-dir", str(run_dir)]
        process = subprocess.Popen(
            [sys.executable, "train.py", *flags],
            cwd=HERE,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heed_ctrl_c,
        )
        while not (run_dir / "log.csv").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == code, stderr
        assert stderr.count("\n") == 1 and "stopped in epoch" in stderr and "--resume" in stderr, stderr
        utils.load_checkpoint(run_dir / "last.pt")
    command = f'"{sys.executable}" failures.py "{copy_of_run("piped")}" | head -n 1'
    pipe = subprocess.run(command, shell=True, cwd=HERE, env=environment(), capture_output=True, text=True)
    assert pipe.stderr == "", pipe.stderr


def test_places_two_processes_in_one_directory():
    run_dir = make_run("locked")
    with train.exclusive(run_dir):
        refused(train.main, [*TINY, "--output-dir", run_dir, "--resume"], 2, "another process")
    quietly(train.main, [*TINY, "--output-dir", str(run_dir), "--resume"])


def test_places_full_disk():
    """A write that fails half-way is one line and code 1, and leaves the old file."""
    target = scratch() / "kept.json"
    utils.write_json(target, {"old": 1})

    def fail(file):
        file.write(b"half of the ne")
        raise OSError(28, "No space left on device")

    refused(lambda argv: utils.write_file(target, fail), [], 1, "No space left", "kept.json")
    assert json.loads(target.read_text()) == {"old": 1} and not list(scratch().glob(".*.partial"))


def test_places_notebook():
    """Imported, nothing happens; called in a cell, errors are ordinary exceptions; the notebook's backend does not matter."""
    program = """
import os, sys, random
before = set(os.listdir())
state = random.getstate()
from model import resnet18
from data import load_cifar100
from gradcam import grad_cam
from utils import macro_scores, confusion_matrix, calibration_error
import train, evaluate, failures, torch
seed = torch.initial_seed()
assert set(os.listdir()) == before and "matplotlib" not in sys.modules and random.getstate() == state
sys.argv = ["ipykernel_launcher.py", "-f", "kernel.json"]
for module in (train, evaluate, failures):
    try:
        module.main()
    except Exception as error:
        assert "-f" in str(error) or "RUN" in str(error), error
    else:
        raise SystemExit("accepted the kernel's arguments")
train.draw_curves("curves.png", [dict(epoch=1, train_loss=1, val_loss=1, train_acc=0.1, val_acc=0.1)], 1, "title")
print(os.path.getsize("curves.png") > 5000)
"""
    folder = scratch() / "notebook"
    folder.mkdir()
    done = script(
        "-B",
        "-c",
        program,
        cwd=folder,
        env=environment(MPLBACKEND="module://matplotlib_inline.backend_inline_not_there"),
    )
    assert done.returncode == 0 and done.stdout == "True\n", done.stderr


def test_places_read_only_data():
    """As on Kaggle: a data folder that cannot be written to, given with ~ and with a blank in its name."""
    source, folder = real_data(), scratch() / "read only"
    (folder / "cifar-100-python").mkdir(parents=True)
    for name in ("train", "test", "meta"):
        (folder / "cifar-100-python" / name).symlink_to(source / "cifar-100-python" / name)
    (folder / "cifar-100-python").chmod(0o555)
    folder.chmod(0o555)
    home = os.environ.get("HOME")
    os.environ["HOME"] = str(scratch())
    try:
        images, _ = data.load_cifar100("~/read only", train=False)
    finally:
        os.environ["HOME"] = home or ""
        folder.chmod(0o755), (folder / "cifar-100-python").chmod(0o755)
    assert len(images) == 10_000 and sorted(path.name for path in folder.rglob("*")) == [
        "cifar-100-python",
        "meta",
        "test",
        "train",
    ]


# ---- long ------------------------------------------------------------------------------------------------------------


def long_test_20_kills_at_random_instants():
    """SIGKILL after a random time, again and again, until the run is through: the same bits as without."""
    rng, kills, rounds = np.random.default_rng(int(time.time())), 0, 0
    flags = [*TINY, "--epochs", "8", "--limit", "1000"]
    straight = scratch() / "undisturbed"
    start = time.monotonic()
    assert script("train.py", *flags, "--output-dir", straight).returncode == 0
    whole = time.monotonic() - start
    while kills < 20:
        run_dir, rounds = scratch() / f"tormented {rounds}", rounds + 1
        while True:
            command = [sys.executable, "train.py", *flags, "--output-dir", str(run_dir), "--resume"]
            process = subprocess.Popen(
                command, cwd=HERE, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            try:
                process.wait(rng.uniform(0.3, 1) * whole)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
                for checkpoint in run_dir.glob("*.pt"):
                    utils.load_checkpoint(checkpoint)
                continue
            assert process.returncode == 0, process.stderr.read()
            break
        assert equal(tensors_and_log(run_dir), tensors_and_log(straight))
    print(f"{kills} kills in {rounds} runs")


def mutations(content, count, rng):
    """`count` damaged versions of a file: cut short, bits flipped, bytes overwritten, pieces swapped or repeated."""
    for n in range(count):
        damaged, at = bytearray(content), int(rng.integers(len(content)))
        kind = n % 5
        if kind == 0:
            damaged = damaged[:at]
        elif kind == 1:
            damaged[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:  # near the start or the end, where the headers are
            at = int(rng.integers(min(400, len(content)))) * (1 if rng.random() < 0.5 else -1)
            damaged[at] ^= 1 << int(rng.integers(8))
        elif kind == 3:
            piece = rng.bytes(int(rng.integers(1, 64)))
            damaged[at : at + len(piece)] = piece
        else:
            start, length = int(rng.integers(len(content))), int(rng.integers(1, 4096))
            damaged[at : at + length] = content[start : start + length]
        yield bytes(damaged)


def long_test_100_verdicts():
    """Where a claim is false, it is called supported in at most 5 of 100 simulated studies."""
    for seeds in ((1, 2), (1, 2, 3)):  # no effect
        null = [simulated_words(1000, seeds, 1000 + seed) for seed in range(100)]
        false = [sum(words[i] == "supported" for words in null) for i in range(SMALL + 1)]
        print(f"  {len(seeds)} seeds: supported without an effect, of 100, by claim: {false}", flush=True)
        assert max(false[SURE:]) <= 5, false
    rng, false = np.random.default_rng(0), [0] * 5
    for _ in range(300):  # quick, so more of them
        # Accuracy falls by the margin itself; luck of three runs each, in points.
        accuracies = rng.normal(scale=0.2, size=(2, 3)) - np.array([[0.0], [100 * evaluate.MARGIN]])
        figure = (accuracies[1].mean() - accuracies[0].mean() + rng.normal(scale=0.2)) / 100
        error = math.sqrt(accuracies.var(1, ddof=1).mean() * 2 / 3) / 100
        values = evaluate.luck(figure, rng.normal(scale=0.002, size=2000), error, 4)
        false[0] += evaluate.decide(np.quantile(values, [0.025, 0.975]), "within", 0) == "supported"
        # Border and centre matter alike, to failures and to correct predictions: one network, and three that differ.
        reports = []
        for luck in (0, *rng.normal(scale=0.05, size=3)):
            figures = {name: rng.normal(size=150) * rng.random(150) for name in utils.ATTENTION}
            figures["border_reliance"] = figures["border_drop"] - figures["centre_drop"]
            figures["border_reliance"][:75] += luck
            reports.append(gradcam.summarise(figures, 75))
        rows = evaluate.judge_attention(reports[:1], False) + evaluate.judge_attention(reports[1:], True)
        for row, claim in enumerate(rows):
            false[row + 1] += claim["word"] == "supported"
    print(
        f"  of 300, accuracy at the margin; the two of attention, of one baseline and of three: {false}", flush=True
    )
    assert max(false) <= 15, false


def long_test_500_mutations():
    """Damaged files get the result of the good file or one line; never a traceback, a hang, or another number."""
    from PIL import Image

    run_dir = copy_of_run("mutated", "*.png")
    picture = scratch() / "mutated.png"
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(picture)
    checkpoint = utils.load_checkpoint(run_dir / "last.pt")
    flags = [
        f"--{key.replace('_', '-')}={value}"
        for key, value in checkpoint["args"].items()
        if key not in utils.PLACES and value not in (None, False)
    ]
    resume = [*flags, "--dataset", "synthetic", "--device", "cpu", "--output-dir", str(run_dir), "--resume"]
    explain, evaluation, failed = (
        [str(run_dir), "--index", "1", "2"],
        [str(run_dir)],
        [str(run_dir), "--threshold", "0.5"],
    )

    def result(module, argv):
        """What main() returns, but for the checksums of the damaged file itself."""
        found = quietly(module.main, argv)[0]
        return {run: metrics | {"sha256": None} for run, metrics in found.items()} if module is evaluate else found

    save_figure = utils.save_figure
    utils.save_figure = lambda figure, path: None  # the slow part, and not what is tested
    rng, outcomes = np.random.default_rng(int(time.time())), {}
    try:
        for path, count, calls in (
            (run_dir / "best.pt", 130, [(gradcam, explain), (evaluate, evaluation)]),
            (run_dir / "last.pt", 100, [(train, resume)]),
            (run_dir / "test_logits.npy", 100, [(failures, failed), (evaluate, evaluation)]),
            (run_dir / "test_labels.npy", 80, [(failures, failed), (evaluate, evaluation)]),
            (run_dir / "val_logits.npy", 30, [(evaluate, evaluation)]),
            (picture, 100, [(gradcam, [*explain[:1], "--image", str(picture)])]),
        ):
            good = path.read_bytes()
            expected = {module: result(module, argv) for module, argv in calls}
            others = {other: other.read_bytes() for other in run_dir.iterdir() if other.is_file() and other != path}
            for damaged in mutations(good, count, rng):
                for module, argv in calls:
                    path.write_bytes(damaged)
                    try:
                        same = repr(result(module, argv)) == repr(expected[module])
                        outcome = "same result" if same else "ANOTHER RESULT"
                    except ScriptError as error:
                        assert "\n" not in str(error) and error.code == 2
                        outcome = "one line"
                    outcomes[outcome] = outcomes.get(outcome, 0) + 1
                    assert outcome != "ANOTHER RESULT", (path, module)
                    for other, content in others.items():
                        if other.read_bytes() != content:
                            other.write_bytes(content)
            path.write_bytes(good)
    finally:
        utils.save_figure = save_figure
    print(f"540 damaged files, {sum(outcomes.values())} attempts: {outcomes}")


# ---- runner ----------------------------------------------------------------------------------------------------------


def run_tests(patterns, long):
    tests = [f for name, f in globals().items() if name.startswith(("test_", "long_test_") if long else "test_")]
    tests = [f for f in tests if not patterns or any(pattern in f.__name__ for pattern in patterns)]
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for test in tests:
        start = time.monotonic()
        try:
            test()
            outcome, note = "passed", ""
        except unittest.SkipTest as reason:
            outcome, note = "skipped", f": {reason}"
        except Exception:
            outcome, note = "failed", "\n" + traceback.format_exc()
        counts[outcome] += 1
        print(f"{outcome:7} {time.monotonic() - start:6.1f} s  {test.__name__}{note}", flush=True)
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    return 1 if counts["failed"] or not tests else 0


if __name__ == "__main__":
    sys.exit(run_tests([a for a in sys.argv[1:] if a != "--long"], "--long" in sys.argv))
