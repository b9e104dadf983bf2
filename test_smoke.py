"""Tests, offline, about two minutes on two cores.

    python test_smoke.py             # or pytest
    python test_smoke.py resume      # tests with "resume" in their names

The whole chain runs on synthetic data, and its parts are compared with
something independent. Tests on the real CIFAR-100 run where it is found
(data/, or ../shared/cifar100), and are skipped elsewhere. The last line says
whether the installation works. What is longer is in .ci/: corruptions in plain
loops, kills at random instants, damaged files, simulated studies.
"""

import contextlib
import copy
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import unittest.mock
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.models.vision_transformer import Encoder
from torchvision.transforms import functional as TF
from torchvision.transforms import v2

import data
import evaluate
import failures
import gradcam
import train
import utils
from model import LAST_MAP, make_model, resnet18
from utils import ScriptError

HERE = Path(__file__).resolve().parent
SMALL = "--dataset synthetic --device cpu --epochs 3 --warmup-epochs 1 --lr 0.1".split()
TINY = [*SMALL, *"--width 8 --limit 300 --batch-size 100 --val-size 100".split()]
HOLDER = tempfile.TemporaryDirectory(prefix="smoke tést ")  # removed at the end
SCRATCH = Path(HOLDER.name)  # for this session's files; its name has a blank and an accent

read_csv = functools.partial(utils.read_csv, made_by="a script", what="a table", columns={})  # rows of text
replaced = unittest.mock.patch.object  # with replaced(owner, name, value): ...
raises = unittest.TestCase().assertRaises  # with raises(error): ...
raised = unittest.TestCase().assertRaisesRegex  # with raised(error, pattern): ...
not_on_windows = unittest.skipIf(os.name == "nt", "not on Windows: its signals, links, locks or shell")
Killed = SystemExit  # what no `except Exception` stops, like a kill


def quietly(function, *args):
    """(result, what was printed) of function(*args)."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        result = function(*args)
    return result, printed.getvalue()


def script(*args, cwd=HERE, **variables):
    """Run a script as a user does, on as many threads as here (another number rounds differently); CompletedProcess."""
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(HERE)} | variables
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def new_folder(name):
    """A folder of this session, with its parents; it may be there already."""
    folder = SCRATCH / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def refused(function, argument, code, *words):
    """function(argument) must raise a one-line ScriptError with this code that says all the words."""
    with raises(ScriptError, msg=argument) as caught:
        quietly(function, argument)
    message = str(caught.exception)
    assert caught.exception.code == code, f"{argument}: code {caught.exception.code}: {message}"
    assert "\n" not in message, message
    missing = [word for word in words if word not in message]
    assert not missing, f"{argument}: no {missing} in: {message}"


@functools.cache
def chain():
    """Two synthetic runs, trained, evaluated, compared and explained by the scripts; (run directories, output)."""
    runs, printed = [SCRATCH / "baseline", SCRATCH / "smoothing0.1"], []
    flags = [*SMALL, "--batch-size", "50", "--val-size", "500"]
    others = "--width 16 --limit 4000".split(), "--width 8 --limit 2000 --smoothing 0.1".split()
    for run_dir, other in zip(runs, others):
        printed.append(quietly(train.main, [*flags, *other, "--output-dir", str(run_dir)])[1])
    printed.append(quietly(evaluate.main, [*map(str, runs), "--device", "cpu"])[1])
    printed.append(quietly(failures.main, [str(runs[0]), "--compare", str(runs[1]), "--threshold", "0.85"])[1])
    printed.append(quietly(gradcam.main, [str(runs[0]), "--device", "cpu"])[1])
    return runs, printed


def copy_of_run(name, *without, number=0):
    """A copy of a run of the chain, the baseline, under another name, without some of its files."""
    return shutil.copytree(chain()[0][number], SCRATCH / name, ignore=shutil.ignore_patterns(*without))


# ---- model ---------------------------------------------------------------------------------------------------------


def test_model_resnet18_equals_torchvision():
    reference, model = torchvision.models.resnet18(num_classes=100), resnet18()
    reference.conv1, reference.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    reference.load_state_dict(model.state_dict())
    assert sum(p.numel() for p in model.parameters()) == 11_220_132
    images = torch.randn(4, 3, 32, 32)
    for training in (True, False):  # in training mode first, so that the running statistics change
        ours, theirs = model.train(training)(images), reference.train(training)(images)
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4), (ours - theirs).abs().max()


@torch.no_grad()
def test_model_cct_equals_torchvision():
    """Its blocks against the encoder of torchvision's vision transformer, whose attention is torch's own."""
    model, reference = make_model("cct", num_classes=10), Encoder(64, 2, 2, 128, 128, 0.0, 0.0).eval()
    # The authors' CCT-2/3x2 has 283,723: their pooling, which is a mean here, is a linear layer of 128 + 1.
    assert sum(p.numel() for p in model.parameters()) == 283_723 - 129
    for name, weight in model.blocks.named_parameters():
        torch.nn.init.normal_(weight, 0.0 if "qkv" in name else 0.5, 0.1)
    reference.pos_embedding, reference.ln = model.position, model.norm
    for ours, theirs in zip(model.blocks, reference.layers):
        theirs.ln_1, theirs.ln_2, theirs.mlp[0], theirs.mlp[3] = ours.norm1, ours.norm2, ours.mlp[0], ours.mlp[2]
        theirs.self_attention.in_proj_weight, theirs.self_attention.out_proj = ours.qkv.weight, ours.proj
    images, relu, pool = torch.randn(4, 3, 32, 32), torch.nn.ReLU(), torch.nn.MaxPool2d(3, 2, 1)
    stem = torch.nn.Sequential(model.conv1, relu, pool, model.conv2, relu, pool)
    tokens = reference(stem(images).flatten(2).transpose(1, 2))  # (4, 64, 128)
    assert torch.allclose(model(images), model.fc(tokens.mean(1)), rtol=1e-4, atol=1e-4)


def test_model_first_weights():
    """He's variance, 2 / fan_out; and the draws of a seed, which every published run began with."""
    for name, draws in (("resnet18", (-0.00034880, 0.00076855)), ("cct", (0.07552033, 0.00006554))):
        torch.manual_seed(42)
        model = make_model(name)
        found = [model.conv1.weight[0, 0, 0, 0].item(), model.fc.weight[-1, -1].item()]
        assert np.allclose(found, draws, atol=1e-6), (name, found)
    assert abs(resnet18().layer4[1].conv2.weight.var().item() / (2 / (512 * 9)) - 1) < 0.01
    with raises(ValueError):
        make_model("resnet50")


# ---- train: the parts ----------------------------------------------------------------------------------------------


def test_train_presets_and_run_names():
    """The study's settings, what --quick and cct change, and a name that is a function of the flags."""
    flags = "epochs lr weight_decay warmup_epochs width limit val_size patience momentum batch_size seed".split()
    for given, wanted in (
        ("", (40, 0.01, 5e-4, 5, 64, None)), ("--quick", (4, 0.1, 5e-4, 0.5, 16, 10_000)),
        ("--model cct --epochs 12", (12, 1e-3, 0.05, 1.5, 64, None)), ("--quick --lr 1", (4, 1, 5e-4, 0.5, 16, 10_000)),
    ):  # fmt: skip
        args = vars(train.parse_args(given.split()))
        assert tuple(args[flag] for flag in flags) == (*wanted, 10_000, 6, 0.9, 128, 42), given
    for given, name in (
        ("--seed 43 --width 16 --lr 0.1 --patience 0", "baseline-lr0.1-patience0-seed43-width16"),
        ("--smoothing 0.1 --epochs 12 --lr 0.1 --warmup-epochs 1.5", "smoothing0.1-epochs12-lr0.1"),
        ("--dataset synthetic --weight-decay 1e-3 --compile", "synthetic-baseline-weight-decay0.001-compile"),
        ("--device cpu --resume --val-size 10000", "baseline"), ("--cutmix 1 --mixup 0.2", "baseline-mixup0.2-cutmix1"),
        ("--model cct --lr 0.01", "baseline-lr0.01-modelcct"), ("--quick --dataset synthetic", "synthetic-quick"),
    ):  # fmt: skip
        args = train.parse_args(given.split())
        again = train.parse_args(shlex.split(args.command)[2:])  # as the report names it
        assert args.output_dir == again.output_dir == str(Path("runs") / name), given
    shown = script("train.py", "--help", COLUMNS="80").stdout
    assert max(map(len, shown.splitlines())) <= 79 and "(default: 0.0005)" in shown, shown


def test_train_optimizer_is_torch_s_also_after_an_overflow():
    """What a T4 does in float16: the scaler skips a first step with infinite gradients, and all is as without it."""
    for name, options in (("SGD", {"momentum": 0.8, "nesterov": True}), ("AdamW", {"betas": (0.8, 0.999)})):
        weights = []
        for ours, factors in ((False, [1, 2, 3]), (True, [1, 2, 3]), (True, [math.inf, 1, 2, 3])):
            model, scaler = torch.nn.Linear(3, 2, bias=False), torch.amp.GradScaler("cpu", init_scale=4.0)
            torch.nn.init.ones_(model.weight)
            optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1, weight_decay=0.05, **options)
            if ours:
                optimizer = train.make_optimizer(model, 0.1, 0.8, 0.05, adamw=name == "AdamW")
            for factor in factors:
                optimizer.zero_grad()
                scaler.scale(factor * model(torch.ones(1, 3)).sum()).backward()
                scaler.step(optimizer)
                scaler.update()
            weights.append(model.weight.detach())
        assert all(torch.allclose(weights[0], other) for other in weights[1:]), weights


def test_train_mixing_is_torchvision_s_in_distribution():
    """lam of 4,000 batches beside MixUp and CutMix of torchvision.transforms.v2; targets are what the pixels show."""
    torch.manual_seed(0)
    shades, labels = torch.arange(3.0), torch.arange(3)
    images = shades.view(3, 1, 1, 1).repeat(1, 3, 32, 32)
    for flag, alpha, transform in (("mixup", 0.4, v2.MixUp), ("cutmix", 1.0, v2.CutMix), ("cutmix", 0.3, v2.CutMix)):
        reference = transform(alpha=alpha, num_classes=3)
        theirs = np.array([reference(images, labels)[1][0, 0].item() for _ in range(4000)])
        ours = np.array([lam for lam, _ in data.mix_plan(7, 1, 4000, **{flag: alpha})])
        distance = max(abs(np.mean(ours <= x) - np.mean(theirs <= x)) for x in np.linspace(0, 1, 101))
        assert distance < 0.045, (flag, alpha, distance)  # Kolmogorov-Smirnov: 99.9 % of equal distributions
        for plan in data.mix_plan(3, 1, 50, **{flag: alpha}):
            mixed, targets = data.mix(images.clone(), labels, *plan)
            assert torch.allclose(targets.sum(1), torch.ones(3))
            assert torch.allclose(mixed.mean((1, 2, 3)), targets[:, :3] @ shades, atol=1e-5)
            assert (plan[1] is None) == (flag == "mixup") and (flag == "mixup" or mixed.unique().numel() <= 3)
    assert 0.45 < np.mean([box is None for _, box in data.mix_plan(1, 1, 2000, mixup=0.2, cutmix=1.0)]) < 0.55
    assert data.mix_plan(1, 2, 9, 0.2, 1.0) == data.mix_plan(1, 2, 9, 0.2, 1.0) != data.mix_plan(1, 3, 9, 0.2, 1.0)


# ---- train: the run ------------------------------------------------------------------------------------------------


def command(name, *flags):
    """The flags for a run of a few seconds."""
    return [*TINY, *flags, "--output-dir", str(SCRATCH / name)]


def trained(name, *flags):
    """(its directory, what was printed) of a run of a few seconds."""
    return SCRATCH / name, quietly(train.main, command(name, *flags))[1]


@functools.cache
def undisturbed(*flags):
    """The directory of such a run that nothing stops."""
    return trained(" ".join(["undisturbed", *flags]), *flags)[0]


def bits_of(value):
    """A nested structure without clock and places, each tensor as its bytes."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    if isinstance(value, dict):
        left_out = {"seconds", "images_per_second", "sha256", *utils.PLACES}
        return {key: bits_of(item) for key, item in value.items() if key not in left_out}
    return [bits_of(item) for item in value] if isinstance(value, (list, tuple)) else value


def same_run(run_dir, other):
    """Whether two runs have the same checkpoints and log, but for the clock and places."""
    readers = {"last.pt": utils.load_checkpoint, "best.pt": utils.load_checkpoint, "log.csv": read_csv}
    return all(bits_of(read(run_dir / name)) == bits_of(read(other / name)) for name, read in readers.items())


def fails_at(name, moment, error):
    """While this lasts, the error is raised just before or after a file of this name is moved into place."""
    replace = os.replace

    def fatal(source, target):
        here = Path(target).name == name
        if moment == "after" or not here:
            replace(source, target)
        if here:
            raise error

    return replaced(os, "replace", fatal)


def change_last(run_dir, **changes):
    """Replace parts of its last.pt."""
    train.save_checkpoint(run_dir / "last.pt", utils.load_checkpoint(run_dir / "last.pt") | changes)


def test_train_resume_is_the_same_run_bit_for_bit():
    """Killed before and after a file is moved into place, again and again, once on another device; then continued."""
    last_before, last_after, log_before = ("last.pt", "before"), ("last.pt", "after"), ("log.csv", "before")
    for kills, flags, words in (
        ([last_before, last_after, last_before], "", "best.pt is missing"),  # the first last.pt alone
        ([("best.pt", "after"), log_before, last_before], "", "after epoch 2"),
        ([last_after, last_before], "--model cct --mixup 0.4 --cutmix 1 --smoothing 0.1", "after epoch 1"),
    ):
        name, printed = f"killed {words} {flags}", io.StringIO()
        run_dir, again = SCRATCH / name, command(name, *flags.split(), "--resume")
        for file, moment in kills:
            with raises(Killed), fails_at(file, moment, Killed), contextlib.redirect_stdout(printed):
                train.main(again)
        if words == "after epoch 2":  # as on a Mac: neither fused nor channels_last
            optimizer = utils.load_checkpoint(run_dir / "last.pt")["optimizer"]
            for state in optimizer["state"].values():
                state["momentum_buffer"] = state["momentum_buffer"].contiguous()
            change_last(run_dir, optimizer=optimizer | {"param_groups": "never read"})
        done = script("train.py", *again)  # as after a real kill: nothing of the old process is left
        assert done.returncode == 0 and not done.stderr and words in printed.getvalue() + done.stdout, done
        assert same_run(run_dir, undisturbed(*flags.split())) and ("dominant" in done.stdout) == ("mixup" in flags)
        state = utils.load_checkpoint(run_dir / "last.pt")["optimizer"]["state"][0]
        assert ("exp_avg" in state) == ("cct" in flags)  # AdamW


def test_train_stops_early_and_keeps_the_best():
    flags = "--epochs 99 --patience 2 --lr 1e-9 --limit 44 --batch-size 4 --width 17".split()  # learns nothing
    run_dir, printed = trained("early", *flags)
    best, log = utils.load_checkpoint(run_dir / "best.pt"), read_csv(run_dir / "log.csv")
    accuracies = [float(row["val_acc"]) for row in log]
    assert best["epoch"] == len(accuracies) - 2 and f"in epoch {best['epoch']};" in printed
    assert best["val_acc"] == max(accuracies) == accuracies[best["epoch"] - 1]
    assert not set(best["args"]) & utils.PLACES  # a published checkpoint names nobody's folders
    assert train.best_of([{"epoch": 1, "val_acc": 0.5}, {"epoch": 2, "val_acc": 0.5}])["epoch"] == 1  # not better
    for hint in ("for a first look: python train.py --quick", "in 20 minutes a run: --width 16 --lr 0.1"):
        assert printed.count(hint) == 1, printed  # on a CPU
    own = (run_dir / "best.pt").read_bytes()  # its weights are nowhere else, so a resume needs it
    for other in (undisturbed() / "best.pt", None):
        shutil.copy(other, run_dir / "best.pt") if other else (run_dir / "best.pt").unlink()
        refused(train.main, command("early", *flags, "--resume"), 2, "best.pt", f"epoch {best['epoch']}, the best")
    (run_dir / "best.pt").write_bytes(own)
    assert "already finished" in trained("early", *flags, "--resume")[1]
    with replaced(train, "validate", lambda *args: (1.0, 0.5)):
        assert "early" not in trained("two epochs", *flags, "--epochs", "2", "--patience", "1")[1]  # but at the end


def test_train_loop_equals_a_plain_one():
    """Two epochs against a loop written anew: split, order, augmentation, mixing, smoothing, lr, decay, Nesterov."""
    flags = "--epochs 2 --lr 0.001 --smoothing 0.3 --weight-decay 0.5 --amp off --warmup-epochs 0.7 --limit 350".split()
    for seed, mixing in ((42, []), (43, ["--mixup", "0.5", "--cutmix", "1"])):
        run_dir, _ = trained(f"plain loop {seed}", *flags, *mixing, "--seed", str(seed))  # rounding must not grow
        images, labels = data.load_synthetic()
        keep = data.split_train_val(labels, 100, seed)[0][:350]  # three batches of 100; the rest is dropped
        padded, labels = data.pad(images[keep]), labels[keep]
        torch.manual_seed(seed)
        model = resnet18(width=8).train()
        parameters, hits, loss_sum = list(model.parameters()), 0, 0
        velocity, initial = [torch.zeros_like(p) for p in parameters], [p.detach().clone() for p in parameters]
        for step in range(6):  # warmup over 2 steps (0.7 of 3), cosine over 4
            lr = 1e-3 * (0.5, 1, 1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125))[step]
            epoch, i = divmod(step, 3)
            order, offsets, flips = (part[100 * i : 100 * i + 100] for part in data.epoch_plan(seed, epoch + 1, 350))
            batch, targets = data.augment(padded, order, offsets, flips), F.one_hot(labels[order], 100).float()
            if mixing:
                batch, targets = data.mix(batch, labels[order], *data.mix_plan(seed, epoch + 1, 3, 0.5, 1.0)[i])
            logits = model(batch)
            loss = -((0.7 * targets + 0.003) * logits.log_softmax(1)).sum(1).mean()
            gradients = torch.autograd.grad(loss, parameters)
            hits += (logits.argmax(1) == targets.argmax(1)).sum().item() * epoch  # in the second epoch
            loss_sum += loss.item() * epoch
            with torch.no_grad():
                for p, g, v in zip(parameters, gradients, velocity):
                    g = g + 0.5 * p
                    v.mul_(0.9).add_(g)
                    p.sub_(lr * (g + 0.9 * v))
        last = utils.load_checkpoint(run_dir / "last.pt")
        for (name, ours), start in zip(model.named_parameters(), initial):
            error, update = (ours - last["model"][name]).norm(), (last["model"][name] - start).norm()
            assert error < 0.05 * update, (mixing, name, error, update)
        row = last["history"][1]
        assert round(300 * row["train_acc"]) == hits, mixing  # of the dominant label
        assert math.isclose(row["train_loss"], loss_sum / 3, rel_tol=1e-3)
        assert math.isclose(row["lr"], lr, rel_tol=1e-6)


def test_train_curves_have_the_same_ranges_for_every_run():
    args = train.parse_args([*TINY, "--smoothing", "0.1", "--mixup", "1", "--epochs", "40"])
    rows = [dict(zip(train.COLUMNS, (epoch, 0.1, 0.2, 0.3, 0.4, 0.5, 6, 7))) for epoch in (1, 2)]
    loss, accuracy = train.draw_curves("a $run", args, rows).axes
    assert (loss.get_ylim(), accuracy.get_ylim(), loss.get_xlim()) == ((0, 4.7), (0, 100), (0.5, 40.5))
    for axes, values, words in ((loss, (0.2, 0.4), "smoothed"), (accuracy, (30, 50), "dominant label")):
        assert [list(line.get_ydata()) for line in axes.lines[:2]] == [[value] * 2 for value in values]
        assert words in axes.get_legend().get_texts()[0].get_text()


# ---- data --------------------------------------------------------------------------------------------------


@not_on_windows
def test_data_are_the_official_ones():
    """In a folder given with ~ and a blank in its name, through a link."""
    source, unpack = HERE / "data/cifar-100-python", HERE.parent / "shared/cifar100/unpack.py"
    if not (source / "train").exists():
        if not unpack.exists():
            raise unittest.SkipTest("no CIFAR-100 here")
        subprocess.run([sys.executable, unpack, SCRATCH / "real"], check=True, capture_output=True)
        source = SCRATCH / "real/cifar-100-python"
    (new_folder("some data") / "cifar-100-python").symlink_to(source)
    with unittest.mock.patch.dict(os.environ, HOME=str(SCRATCH)):
        (images, labels), printed = quietly(data.load_cifar100, "~/some data", False)
    meta, test = (pickle.loads((source / name).read_bytes(), encoding="latin1") for name in ("meta", "test"))
    assert (images.permute(0, 3, 1, 2).flatten(1).numpy() == test["data"]).all() and not printed
    assert labels.tolist() == test["fine_labels"] and data.is_test_set(labels)
    assert data.CLASS_NAMES == meta["fine_label_names"] and list(data.SUPERCLASSES) == meta["coarse_label_names"]
    assert (data.SUPERCLASS_OF[labels] == test["coarse_labels"]).all()
    small = {data.CLASS_NAMES[label] for label in data.SMALL_ANIMALS}
    assert len(small) == 15 and small > set("mouse shrew bee cockroach worm crab".split())
    images, labels = data.load_cifar100(source)  # the folder itself, not its parent
    assert images.shape == (50_000, 32, 32, 3) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    std, mean = torch.std_mean(images.flatten(0, 2) / 255.0, 0)
    assert np.allclose(mean, data.MEAN, atol=5e-5) and np.allclose(std, data.STD, atol=5e-5)


def test_data_facts_are_those_of_the_two_lists():
    people = {index: data.votes(index) for index in range(10_000) if data.votes(index) is not None}
    duplicates = np.flatnonzero(data.DUPLICATES).tolist()
    assert (len(people), len(duplicates)) == (2235, 891)
    assert np.flatnonzero(data.DOUBTFUL).tolist() == [index for index in people if people[index] < 3]
    lists = HERE.parent / "shared/test_images"
    if not lists.exists():
        raise unittest.SkipTest("the lists are not here; their counts are right")
    rows = read_csv(lists / "votes.csv")
    assert people == {int(row["test"]): int(row["votes_given"]) + int(row["votes_both"]) for row in rows}
    assert duplicates == [int(row["test"]) for row in read_csv(lists / "duplicates.csv")]


def test_data_split_and_draws_are_even_and_functions_of_the_seed():
    labels = data.load_synthetic()[1]
    train_index, val_index = data.split_train_val(labels, 5000, 42)
    assert (torch.bincount(labels[val_index]) == 50).all()
    assert torch.equal(torch.cat([train_index, val_index]).sort().values, torch.arange(50_000))
    order, offsets, flips = data.epoch_plan(42, 1, 45_000)
    assert (data.split_id(val_index), order[:3].tolist()) == (2821721131, [32238, 25985, 23692])  # as ever
    assert torch.equal(order.sort().values, torch.arange(45_000))
    counts = torch.bincount(offsets[:, 0] * 9 + offsets[:, 1], minlength=81)
    assert (counts - 45_000 / 81).abs().max() < 110 and abs(flips.double().mean() - 0.5) < 0.01  # 4 sigma
    torch.rand(5), np.random.rand(5)  # nobody else's draws matter
    for seed, epoch in ((42, 1), (42, 2), (43, 1)):
        assert torch.equal(val_index, data.split_train_val(labels, 5000, seed)[1]) == (seed == 42)
        assert torch.equal(order, data.epoch_plan(seed, epoch, 45_000)[0]) == ((seed, epoch) == (42, 1))


def test_data_augmentation_is_every_crop_and_flip_of_torchvision():
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    cases = list(itertools.product(range(9), range(9), (False, True)))
    offsets, flips = torch.tensor([case[:2] for case in cases]), torch.tensor([case[2] for case in cases])
    index = torch.arange(len(cases)) % 3
    batch = data.augment(data.pad(images), index, offsets, flips)
    assert batch.shape == (162, 3, 32, 32) and batch.is_contiguous(memory_format=torch.channels_last)
    for n, (row, column, flip) in enumerate(cases):
        expected = TF.crop(TF.pad(images[index[n]].permute(2, 0, 1), 4), row, column, 32, 32)
        expected = TF.normalize((TF.hflip(expected) if flip else expected) / 255, data.MEAN, data.STD)
        assert torch.allclose(batch[n], expected, atol=1e-5), cases[n]
    data.mean_std.cache_clear()
    with torch.inference_mode():
        data.normalize(images)  # called in this mode first, it has a gradient afterwards
    data.normalize(images.float().requires_grad_()).sum().backward()


# ---- corruptions and the attack (.ci/corruptions.py has the operations again, in plain loops) ------------------------


def test_corrupt_draws_by_seed_and_place():
    images = data.load_synthetic(train=False)[0][[0, 0, 1, 2]]  # a copy
    before = images.clone()
    random = "gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "fog", "elastic_transform"
    for name in data.CORRUPTIONS:
        found = data.corrupt(images, name, 3)
        assert found.dtype == torch.uint8 and torch.equal(found[:3], data.corrupt(images[:3], name, 3)), name
        assert torch.equal(found[0], found[1]) == (name not in random), name  # another place, other draws
        assert torch.equal(found, data.corrupt(images, name, 3, seed=1)) == (name not in random), name
    assert torch.equal(images, before) and torch.equal(found, data.corrupt(images, name, 3.0))
    many = data.corrupt(images[:1].expand(502, 32, 32, 3), "impulse_noise", 5)  # more than one block
    assert len(many.unique(dim=0)) == 502


def test_corrupt_attack_on_a_linear_network():
    """The margin grows everywhere in the direction `up`, so the attack ends at the edge of the ball."""
    clean, up, seen = data.load_synthetic(train=False)[0][:20].float(), torch.randn(32, 32, 3).sign(), []

    class Linear(torch.nn.Module):
        def forward(self, x):
            assert not self.training
            seen.append(x.detach())
            along = (x * up).sum((1, 2, 3))[:, None]
            return torch.cat([-along, along, -1e6 + 0 * along.expand(-1, 98)], 1)  # classes 0, 1, and no others

    with replaced(data, "normalize", lambda x: x), torch.inference_mode():
        attacked = data.attack(Linear(), clean.byte(), torch.zeros(20, dtype=torch.int64), 8)
    assert torch.equal(attacked, (clean + 8 * up).clamp(0, 255)) and len(seen) == 10
    inside = (clean > 8) & (clean < 247)
    start, step = (seen[0] - clean)[inside], (seen[1] - seen[0])[inside]
    assert start.abs().max() <= 8 and abs(start.mean()) < 0.1 and abs(start.std() - 8 / 3**0.5) < 0.1  # uniform
    assert abs(step.abs().max() - 2.5 * 8 / 10) < 1e-4


# ---- metrics and intervals -----------------------------------------------------------------------------------------


def test_utils_macro_scores_by_hand():
    confusion = utils.confusion_matrix([0, 0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 0, 1, 0, 0, 1], 3)
    assert confusion.tolist() == [[3, 1, 0], [1, 1, 0], [1, 1, 0]]
    for matrix, precisions, recalls, f1s in (
        (confusion, [3 / 5, 1 / 3, 0], [3 / 4, 1 / 2, 0], [6 / 9, 2 / 5, 0]),  # never predicted: 0/0 counts as 0
        ([[3, 1], [2, 4]], [3 / 5, 4 / 5], [3 / 4, 4 / 6], [6 / 9, 8 / 11]),  # of the docstring
    ):
        assert np.allclose(utils.macro_scores(matrix), [np.mean(part) for part in (precisions, recalls, f1s)])
    for wrong in (np.zeros((2, 3)), np.zeros(4)):
        with raised(ValueError, "square"):
            utils.macro_scores(wrong)
    for labels, preds in (([1, 0, 2], [-1, 0, 2]), ([0, 3], [0, 1]), ([0], [0, 1]), ([0.5], [0]), ([[0]], [[0]])):
        with raises(ValueError):
            utils.confusion_matrix(labels, preds, 3)


def test_utils_wilson_interval_and_softmax():
    """An end p of the interval is 1.96 standard errors, its own sqrt(p (1 - p) / n), from the share."""
    for hits, n in ((3, 10), (0, 10), (10, 10), (59, 100), (1, 1)):
        for end in utils.wilson_interval(hits, n):
            assert math.isclose(abs(end - hits / n), 1.959964 * math.sqrt(end * (1 - end) / n), abs_tol=1e-7), (hits, n)
    for n in range(1, 300):
        for hits in (0, n):
            low, high = utils.wilson_interval(hits, n)
            assert 0 <= low <= hits / n <= high <= 1, (hits, n)  # not by rounding either: no bar of negative length
    logits = np.array([[0.0, math.log(3)], [1000.0, 1000.0], [-2000.0, 2000.0]])
    assert np.allclose(np.exp(utils.log_softmax(logits)), [[1 / 4, 3 / 4], [1 / 2, 1 / 2], [0, 1]])


def test_utils_progress_by_a_clock_of_its_own():
    """A terminal gets one line, redrawn; a pipe whole lines, every 30 s; the time left counts what comes later."""
    note = "{} in {} s".format
    for terminal, lines in ((True, ["1/4: 1 in 10 s, 0:01:10", "2/4: 2 in 20 s, 0:01:00", "3/4: 3 in 30 s, 0:00:50"]),
                            (False, ["3/4: 3 in 30 s, 0:00:50"])):  # fmt: skip
        out, clock = io.StringIO(), unittest.mock.Mock(side_effect=[0, 0, 10, 20, 30])
        out.isatty = lambda terminal=terminal: terminal
        with replaced(utils, "time", unittest.mock.Mock(monotonic=clock)), contextlib.redirect_stdout(out):
            assert list(utils.track("abcd", "thing", note, later=4)) == list("abcd")
        shown = [line.strip() for line in re.split("[\r\n]", out.getvalue())]
        assert [line for line in shown if line] == [f"thing {line} left" for line in lines]
        assert ("\r" in out.getvalue()) == terminal and ("\n" in out.getvalue()) != terminal
    assert [*map(utils.duration, (59.6, 16270))] == ["0:01:00", "4:31:10"]


def random_case(n=400, spread=3.0):
    """(logits (n, 100), labels) with about half of them right; rounded so that there are ties."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 100, n)
    logits = rng.normal(size=(n, 100)) + spread * (np.arange(100) == labels[:, None])
    return logits.round(1), labels


def run_of(logits, labels, seed=42, name="run", temperature=1.0, dataset="synthetic", **args):
    config = {"args": {"seed": seed, **args}, "dataset": dataset}
    return evaluate.Run(Path("nowhere"), config, name, logits, labels, temperature, {})


def test_metrics_against_loops():
    logits, labels = random_case()
    scores = evaluate.Scores(logits, labels)
    for i, label in enumerate(labels):
        weights = [math.exp(z) for z in logits[i]]
        probs = [w / math.fsum(weights) for w in weights]
        assert math.isclose(scores.confidence[i], max(probs)) and math.isclose(scores.nll[i], -math.log(probs[label]))
        assert math.isclose(scores.brier[i], math.fsum((p - (k == label)) ** 2 for k, p in enumerate(probs)))
        ranked = sorted(range(100), key=lambda k: (-logits[i, k], k))
        assert scores.pred[i] == ranked[0] and scores.top5[i] == (label in ranked[:5])
        assert scores.failures[i] == (label != ranked[0] and max(probs) > 0.9)
        family = next(group.split() for group in data.SUPERCLASSES.values() if data.CLASS_NAMES[label] in group.split())
        assert scores.same_superclass[i] == (data.CLASS_NAMES[ranked[0]] in family)
    scores.confidence = scores.confidence.round(2)  # ties; some lie on an edge of a bin
    confidence, correct, wrong = scores.confidence, scores.correct, ~scores.correct
    ece = 0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        ece += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean()) if inside.any() else 0
    assert math.isclose(utils.calibration_error([0.95, 0.05], [False, True]), 0.95)  # the signs do not cancel
    assert utils.calibration_bins(np.array([0, 1e-9, 1 / 15, 0.0667, 1])).tolist() == [0, 0, 0, 1, 14]
    macro = utils.macro_scores(utils.confusion_matrix(labels, scores.pred, 100))
    pairs = [(a > b) + (a == b) / 2 for a in confidence[correct] for b in confidence[wrong]]
    expected = dict(zip(("macro_precision", "macro_recall", "macro_f1"), macro)) | {
        "accuracy": correct.mean(), "nll": scores.nll.mean(), "brier": scores.brier.mean(), "ece": ece,
        "auroc_failure": sum(pairs) / len(pairs), "errors_within_superclass": scores.same_superclass[wrong].mean(),
        "signed_gap": confidence.mean() - correct.mean(), "confident_errors": scores.failures.mean(),
        "mean_confidence": confidence.mean(), "top5_accuracy": scores.top5.mean(),
        "superclass_accuracy": scores.same_superclass.mean(),
    }  # fmt: skip
    found = scores.metrics()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert math.isclose(found[name], value), name


def test_metrics_chance_inside_superclass_against_permutations():
    rng, shares = np.random.default_rng(0), []
    labels, preds = rng.integers(0, 100, 3000), np.minimum(rng.poisson(30, 3000), 99)
    labels, preds = labels[labels != preds], preds[labels != preds]
    for _ in range(300):  # the wrong predictions permuted; one that is right by chance is no error
        dealt = rng.permutation(preds)
        shares.append((data.SUPERCLASS_OF[dealt] == data.SUPERCLASS_OF[labels])[dealt != labels].mean())
    chance = evaluate.chance_inside(utils.confusion_matrix(labels, preds, 100))
    assert abs(chance - np.mean(shares)) < 5 * np.std(shares) / math.sqrt(300) + 1e-4
    assert math.isnan(evaluate.chance_inside(np.eye(100, dtype=int)))


def test_metrics_temperature():
    logits, labels = random_case(2000)
    nll_at = lambda z, t: -utils.log_softmax(z / t)[np.arange(2000), labels].mean()  # noqa: E731
    best = evaluate.fit_temperature(logits, labels)
    for factor in (1, 3, 0.2, 40):
        scaled = logits * factor
        t = evaluate.fit_temperature(scaled, labels)
        assert math.isclose(t, factor * best, rel_tol=1e-5)
        assert nll_at(scaled, t) < min(nll_at(scaled, 0.99 * t), nll_at(scaled, 1.01 * t))
    assert math.isclose(evaluate.fit_temperature(5.0 * np.eye(100), np.arange(100)), 0.01)  # no minimum: the bound
    half = logits.astype(np.float16)
    assert evaluate.fit_temperature(half, labels) == evaluate.fit_temperature(half.astype(np.float64), labels)
    run = run_of(logits, labels, temperature=2.0)
    heights = [[bar.get_height() for bar in axes.patches] for axes in evaluate.draw_reliability(run).axes]
    for scores, shares, counts in zip((run.raw, run.scaled), heights[:2], heights[2:]):
        assert counts == np.bincount(utils.calibration_bins(scores.confidence), minlength=15).tolist()
        assert math.isclose(np.dot(shares, counts), 100 * scores.correct.sum())
    order = np.argsort(data.SUPERCLASS_OF, kind="stable")
    shown = evaluate.draw_confusion(run).axes[0].images[0].get_array().filled(0)
    assert (shown == run.confusion[np.ix_(order, order)]).all()
    assert math.isclose(run.values["nll_scaled"], nll_at(logits, 2.0)) and "accuracy_scaled" not in run.values


def test_metrics_extremes_and_ensemble():
    """All right, all wrong, one image: no warning, and null where JSON would say NaN. The mean of probabilities."""
    logits, labels = 20.0 * np.eye(100), np.arange(100)
    with np.errstate(all="raise", under="ignore"):
        perfect, hopeless = run_of(logits, labels).values, run_of(logits, (labels + 1) % 100).values
        single = run_of(logits[:1], labels[:1]).values
    assert perfect["accuracy"] == 1 == perfect["macro_f1"] and math.isnan(perfect["errors_within_superclass"])
    assert hopeless["accuracy"] == 0 == hopeless["macro_f1"] and hopeless["confident_errors"] == 1
    assert single["macro_recall"] == 0.01 and utils.rounded(perfect)["auroc_failure"] is None
    assert evaluate.auroc(np.array([0.9, 0.8]), np.array([False, True])) == 0  # the surest is wrong
    one, two = np.full((2, 100), -50.0), np.full((2, 100), -50.0)
    one[:, 0], two[:, 1] = 50, 10  # each sure of another class: the mean of the logits would be one's
    together = evaluate.ensemble([run_of(one, np.array([0, 1])), run_of(two, np.array([0, 1]))])
    assert together == {"accuracy": 0.5, "ece": 0.0}  # half sure of each, and half right


def test_metrics_trust_against_loops():
    rng = np.random.default_rng(3)
    val, labels = evaluate.Scores(*random_case(1000, 5.0)), np.arange(500) % 100
    other = evaluate.Scores(rng.normal(size=(500, 100)) + 6 * np.eye(100)[labels], labels)
    order = sorted(range(1000), key=lambda i: -val.confidence[i])
    right, threshold = 0, None
    for rank, i in enumerate(order, start=1):
        right += val.correct[i]
        if right >= 0.95 * rank:
            threshold = val.confidence[i]
    t = sorted(val.true_probability)[1001 - math.ceil(0.9 * 1001) - 1]
    for test in (other, val):  # of val one probability is t
        found, images = evaluate.trust(val, test), range(len(test.labels))
        answered = [i for i in images if test.confidence[i] >= threshold]
        assert found["answers"] == len(answered) / len(images)
        assert math.isclose(found["answers_accuracy"], np.mean([test.correct[i] for i in answered]))
        sets = [[k for k in range(100) if test.probs[i, k] >= t] for i in images]
        held = np.array([test.labels[i] in sets[i] for i in images])
        assert math.isclose(found["set_coverage"], held.mean())
        assert math.isclose(found["set_size"], np.mean([len(s) for s in sets]))
        assert math.isclose(found["set_worst_class"], min(held[test.labels == k].mean() for k in range(100)))
    val.confidence[:], val.correct = 0.8, np.arange(1000) < 960  # all alike: all 96 % are answered, or none of 94 %
    assert evaluate.trust(val, val)["answers"] == 1
    val.correct = np.arange(1000) < 940
    assert evaluate.trust(val, val)["answers"] == 0
    coverage = []  # of calibrated probabilities: the label is drawn from them
    for _ in range(60):
        logits = rng.normal(size=(1200, 100)) * 3
        probs = np.exp(utils.log_softmax(logits))
        labels = (probs.cumsum(1) > rng.random((1200, 1))).argmax(1)
        parts = [evaluate.Scores(logits[part], labels[part]) for part in (slice(600), slice(600, None))]
        coverage.append(evaluate.trust(*parts)["set_coverage"])
    assert abs(np.mean(coverage) - 0.9) < 0.01, np.mean(coverage)
    eye, labels = 20.0 * np.eye(100), np.arange(100)
    wrong = evaluate.Scores(eye, (labels + 1) % 100)
    assert evaluate.trust(evaluate.Scores(eye, labels), other)["answers"] >= 0  # no error at all
    assert evaluate.trust(wrong, other)["answers"] == 0


# ---- the verdict ---------------------------------------------------------------------------------------------------


def simulated_runs(labels, seeds, rng, images=0, better=0.0, sharper=1.0, kin=0.0, apart=0.03):
    """Runs of one recipe on the test images of number `images`; better raises the true logit, sharper scales all.

    apart: standard deviation between seeds of the logits' log-scale.
    """
    hot = np.arange(100) == labels[:, None]
    relatives = (data.SUPERCLASS_OF == data.SUPERCLASS_OF[labels][:, None]) & ~hot
    shown = np.random.default_rng([images, len(labels)])
    ease, shared = shown.normal(scale=1.2, size=(len(labels), 1)), shown.normal(scale=0.8, size=(len(labels), 100))
    runs = []
    for seed in seeds:
        signal, scale = 3.6 + better + 0.04 * rng.normal(), 3.0 * sharper * math.exp(apart * rng.normal())
        noise = rng.normal(scale=0.6, size=(len(labels), 100))
        logits = scale * ((signal + ease) * hot + kin * relatives + shared + noise)
        runs.append(run_of(logits, labels, seed, f"{better} {sharper} {seed}", 2 * sharper, "cifar100"))
    return runs


def verdict_of(baselines, changed):
    """{(claim's text, "baseline" or "changed"): row}; a comparison is about the changed runs."""
    compared = {(c.text, "changed"): evaluate.judge(c, changed, baselines) for c in evaluate.COMPARISONS if changed}
    arms = {"baseline": baselines, "changed": changed}
    alone = {(c.text, name): evaluate.judge(c, arm) for c in evaluate.ABOUT_ONE for name, arm in arms.items() if arm}
    return compared | alone


def test_verdict_estimate_against_a_bootstrap():
    """The image part from 8,000 resamples of the test images, the seed part as a t-test; also one recipe alone."""
    rng, n, t = np.random.default_rng(0), 500, {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
    weights = rng.multinomial(n, np.full(n, 1 / n), 8000) / n  # (draws, N)
    for sizes, of_runs in itertools.product(((2, 2), (2, 3), (3,)), (-1, 0.0, 0.1)):
        images, arms = rng.normal(size=n), []
        for size in sizes:
            arm = images + of_runs * rng.normal(size=(size, 1)) + rng.normal(size=(size, n))
            arms.append(arm - arm.mean(1, keepdims=True) if of_runs < 0 else arm)  # -1: seeds that agree by luck
        draws = [weights @ arm.T for arm in arms]  # (draws, runs) of each recipe
        figures = draws[-1].mean(1) - (draws[0].mean(1) if len(arms) == 2 else 0)
        noise = sum((part - part.mean(1, keepdims=True)).var(0).sum() / (k * (k - 1)) for part, k in zip(draws, sizes))
        freedom = sum(sizes) - len(sizes)
        spread = sum(((arm.mean(1) - arm.mean()) ** 2).sum() for arm in arms) / freedom * sum(1 / k for k in sizes)
        both = t[freedom] ** 2 * spread + 1.96**2 * max(0, figures.var() - noise)
        half = math.sqrt(max(both, 1.96**2 * figures.var()))
        figure, found = evaluate.estimate(*arms)
        assert math.isclose(figure, figures.mean(), abs_tol=0.01) and abs(found / half - 1) < 0.04, (sizes, found, half)
    values = np.array([[0.1], [0.3], [0.8]])  # no images: a t-test of three values
    assert np.allclose(evaluate.estimate(values), [0.4, 4.303 * np.std(values, ddof=1) / math.sqrt(3)])
    assert evaluate.estimate(values[:1], values)[1] is None


def test_verdict_influence_values():
    """Their mean is the statistic, their variance over N that of its resamples."""
    logits, labels = random_case(2000)
    rng = np.random.default_rng(0)
    run = run_of(logits + rng.normal(size=logits.shape) / 100, labels)  # no ties
    chosen, confidence, wrong = labels < 30, run.raw.confidence, ~run.raw.correct

    def surest(index):
        return wrong[index[np.argsort(-confidence[index], kind="stable")[: len(index) // 2]]].mean()

    for values, statistic in (
        (evaluate.mean_among(wrong, chosen), lambda index: wrong[index[chosen[index]]].mean()),
        (evaluate.surest_half(run), surest),
    ):
        drawn = np.array([statistic(rng.integers(0, 2000, 2000)) for _ in range(1500)])
        assert math.isclose(values.mean(), statistic(np.arange(2000)))
        assert abs(values.std() / math.sqrt(2000) / drawn.std() - 1) < 0.1, (values.std(), drawn.std())
    with raised(evaluate.Undecided, "needs 20 such images in each run, one has 19"):
        evaluate.mean_among(wrong, np.arange(2000) < 19)


def test_verdict_is_right_on_simulated_runs():
    labels, rng = np.arange(1000) % 100, np.random.default_rng(0)
    null = verdict_of(simulated_runs(labels, (1, 2), rng), simulated_runs(labels, (1, 2), rng))
    assert not [text for (text, name), row in null.items() if row["word"] == "supported" and text in COMPARED], null
    base = simulated_runs(labels, (1, 2, 3), rng, kin=2.0, sharper=2.0)
    blunt = verdict_of(base, simulated_runs(labels, (1, 2, 3), rng, kin=2.0, sharper=1.4))
    assert blunt["earlier failures less confident", "changed"]["word"] == "supported"
    assert blunt["the same, temperature-scaled", "changed"]["word"] == "not decided"  # only the scale has changed
    worse = verdict_of(base, simulated_runs(labels, (1, 2, 3), rng, kin=2.0, sharper=2.0, better=-1.0))
    assert worse["accuracy stays within 1 point", "changed"]["word"] == "contradicted"


COMPARED = {claim.text for claim in evaluate.COMPARISONS}


def test_verdict_decides_by_the_interval():
    no, yes, never = "not decided", "supported", "contradicted"
    for ends, *words in (  # below 0, above 0, within a point of 0
        ((-2, -1), yes, never, never), ((1, 2), never, yes, never), ((0.011, 0.02), never, yes, never),
        ((-0.009, 0.009), no, no, yes), ((-0.011, 0.009), no, no, no), ((-0.02, 0.02), no, no, no),
    ):  # fmt: skip
        assert [evaluate.decide(*ends, side) for side in ("below", "above", "within")] == words, ends
    for claim in evaluate.COMPARISONS + evaluate.ABOUT_ONE:  # what has to fall says so
        falls = re.search("fewer|less confident|the same|calibration|falls|below", claim.text)
        assert claim.side == ("within" if "within" in claim.text else "below" if falls else "above"), claim.text
    assert [*map(evaluate.cell, (-4e-5, 0.2851, math.nan, [-0.1, 1]))] == ["0.00", "28.51", "-", "[-10.00, 100.00]"]


def test_verdict_figures_by_hand():
    labels, rng = np.arange(10_000) % 100, np.random.default_rng(0)
    with replaced(evaluate, "is_test_set", lambda labels: True):
        base, other = simulated_runs(labels, (1, 2), rng, sharper=1.5), simulated_runs(labels, (1, 3), rng, sharper=0.8)
    for k, run in enumerate(base + other):
        correct = rng.random((65, 1000)) < 0.5
        run.stress = evaluate.Stress(correct, correct.astype(np.float32))
        run.folder = new_folder(f"by hand {k}")
        columns = ("train_loss", "train_acc", "val_loss", "val_acc", "seconds")
        utils.write_csv(run.folder / "log.csv", [dict.fromkeys(columns, (k + 1) * e**2) for e in range(9)])
    rows = verdict_of(base, other)

    def on(run, picker):
        return run.raw.confidence[picker.raw.failures].mean()

    def means(of_run):  # of the baselines, and of the others
        return [np.mean([of_run(run) for run in arm]) for arm in (base, other)]

    # No run is read on failures of its own seed: 1 on those of base 2; base 2 on base 1; other 3 on both.
    before = (on(base[0], base[1]) + on(base[1], base[0])) / 2
    after = (on(other[0], base[1]) + (on(other[1], base[0]) + on(other[1], base[1])) / 2) / 2
    small = np.isin(labels, data.SMALL_ANIMALS)
    surest = lambda run: np.argsort(-run.raw.confidence, kind="stable")[:5000]  # noqa: E731
    gap = means(lambda run: run.raw.confidence.mean() - run.raw.correct.mean())
    doubtful = [[data.DOUBTFUL[part].mean() for part in (run.raw.sure_hits, run.raw.failures)] for run in base]
    for (text, name), first, second in (
        (("accuracy stays within 1 point", "changed"), *means(lambda run: run.raw.correct.mean())),
        (("fewer confident errors (> 0.90)", "changed"), *means(lambda run: run.raw.failures.mean())),
        (("fewer errors in the surest half", "changed"), *means(lambda run: (~run.raw.correct[surest(run)]).mean())),
        (("earlier failures less confident", "changed"), before, after),
        (("calibration improves", "changed"), *np.abs(gap)),
        (("less accuracy lost to corruption", "changed"),
         *means(lambda run: run.stress.correct[1:61].mean() - run.stress.correct[0].mean())),
        # 9 epochs e have (k + 1) e^2, k = 2 and 3: the last two of them against the two before
        (("validation accuracy falls again", "changed"), 3.5 * (5**2 + 6**2) / 2, 3.5 * (7**2 + 8**2) / 2),
        (("small animals are below average", "baseline"),
         *[means(lambda run: run.raw.correct[part].mean())[0] for part in (~small, small)]),
        (("errors are mostly in the superclass", "baseline"), 0,
         means(lambda run: run.raw.same_superclass[~run.raw.correct].mean())[0]),
        (("confident failures are more often doubtful", "baseline"), *np.mean(doubtful, 0)),
    ):  # fmt: skip
        assert math.isclose(rows[text, name]["figure"], second - first, rel_tol=1e-6, abs_tol=1e-9), text
    row = rows["accuracy stays within 1 point", "changed"]
    assert set(row["runs"]) == {run.name for run in base + other}
    assert row["note"] == f"the interval {'includes' if row['ci95'][0] <= 0 <= row['ci95'][1] else 'excludes'} 0"
    gaps = [100 * np.mean([kind(run).confidence - kind(run).correct for run in arm])
            for kind in (lambda run: run.raw, lambda run: run.scaled) for arm in (base, other)]  # fmt: skip
    words = "confidence - accuracy is {:+.1f} and {:+.1f} points, after temperature scaling {:+.1f} and {:+.1f}"
    assert rows["calibration improves", "changed"]["note"] == words.format(*gaps)
    for run in base + other:
        run.values["confident_errors_scaled"] = 0.01 if run in base else 0.02
    assert evaluate.confident_errors(other, base) == "after temperature scaling 1.00 and 2.00 %"
    other[0].stress = evaluate.Stress(*(part[:, :500] for part in other[0].stress))
    study = evaluate.Study([base, other])
    shown = [(claim, row) for claim, row in study.rows if row["figure"] is not None]
    bars = [line for line in evaluate.draw_verdict(study).axes[0].lines if line.get_marker() == "|"]
    for (claim, row), bar in zip(shown, bars, strict=True):  # what is claimed points right
        ends = np.array(row["ci95"] or [row["figure"]]) - claim.reference
        assert (np.sign(bar.get_xdata()) == np.sign(-ends if claim.side == "below" else ends)).all(), claim.text
    curve = evaluate.draw_stress(study).axes[1].lines[0].get_ydata()  # of the baselines, against severity
    assert math.isclose(curve[1], 100 * np.mean([run.stress.correct[1:61:5].mean() for run in base]))
    (base[0].folder / "log.csv").unlink()
    del base[0].log  # it was read once
    rows = verdict_of(base, other)
    assert "with the same --stress-images" in rows["less accuracy lost to corruption", "changed"]["note"]
    assert rows["validation loss rises again", "baseline"]["note"] == "of 1 of the 2 runs"


def test_verdict_what_has_no_figure_says_why():
    labels, rng = np.arange(1000) % 100, np.random.default_rng(0)
    sharp, mild = (simulated_runs(labels, [1, 2], rng, sharper=s) for s in (2.0, 0.2))  # mild: nothing above 0.90
    for (base, changed), key, note in (
        ((sharp[:1], mild[:1]), ("accuracy stays within 1 point", "changed"), ""),
        ((sharp[:1], mild[:1]), ("earlier failures less confident", "changed"), "needs baselines of two seeds"),
        ((mild, sharp), ("earlier failures less confident", "changed"), "needs 20 such images"),
        ((sharp, mild), ("less accuracy lost to corruption", "changed"), "needs --stress"),
        ((sharp, []), ("validation loss rises again", "baseline"), "needs log.csv"),
        ((sharp, []), ("failures rely more on the border", "baseline"), "failures.py and gradcam.py"),
        ((sharp, []), ("confident failures are more often doubtful", "baseline"), "test images of CIFAR-100"),
    ):
        row = quietly(verdict_of, base, changed)[0][key]
        assert note in row["note"] and row["ci95"] is None and row["word"] == "not decided", (key, row)
        assert (row["figure"] is None) == (row["note"] != "")
    for before, after, expected in ((0, 0.1, True), (0.1, 0.2, True), (0, 0.01, False), (0.1, 0.1, False)):
        arms = [[run_of(*random_case(200), smoothing=a)] for a in (before, after)]
        assert ("by construction" in evaluate.confident_errors(*reversed(arms))) == expected, (before, after)


# ---- stress --------------------------------------------------------------------------------------------------------


def without_drawing(main, *argv):
    """(result, what is printed) of main(argv), with dummies as pictures."""
    with replaced(utils, "save_figure", lambda path, draw, *args: Path(path).write_bytes(b"drawn")):
        return quietly(main, [str(arg) for arg in argv])


def within_79_columns(printed):
    """No line is longer, but for those with a path of this session."""
    return all(len(line) <= 79 for line in printed.splitlines() if SCRATCH.name not in line)


def json_of(path):
    return json.loads(path.read_text())


def test_chain_stress():
    """Measured once, saved when complete, the conditions by hand; what does not belong together is left out."""
    runs = [copy_of_run("stressed", "*.png"), copy_of_run("stressed too", "*.png", number=1)]
    flags, listed = [*runs, "--stress", "--stress-images", "100", "--device", "cpu"], runs[1] / "stress.csv"
    with replaced(evaluate, "attack", side_effect=KeyboardInterrupt), raises(KeyboardInterrupt):
        quietly(evaluate.main, flags)
    assert not (runs[0] / "stress.csv").exists()
    printed = without_drawing(evaluate.main, *flags)[1]
    with replaced(evaluate, "corrupt", None):  # any use of it would raise: later calls read the files
        report = without_drawing(evaluate.main, *flags)[1]
    assert within_79_columns(printed) and (runs[1] / "stress.png").exists()
    assert printed.split("lost to corruption")[1] == report.split("lost to corruption")[1]
    study = evaluate.Study([[evaluate.read_run(*utils.open_run(run), run.name)] for run in runs])
    (runs[1] / "stress.png").write_bytes(b"of other images")
    for measured, content in ((False, b"of other images"), (True, b"drawn")):
        without_drawing(lambda _: evaluate.write_report(study, measured))
        assert (runs[1] / "stress.png").read_bytes() == content
    preds, confidence, labels = (np.load(runs[1] / f"{name}.npy") for name in
                                 ("stress_preds", "stress_confidence", "test_labels"))  # fmt: skip
    index = sorted(np.flatnonzero(labels == k)[0] for k in range(100))  # the first image of each class
    assert preds.shape == (65, 100) and len(read_csv(listed)) == 65
    for row, pred in zip(read_csv(listed), preds):
        assert abs(float(row["accuracy"]) - (pred == labels[index]).mean()) < 1e-5, row
    images, model = data.load_synthetic(False)[0][index], utils.load_model(runs[1])
    dtype, _ = utils.select_precision("auto", torch.device("cpu"))
    autocast = functools.partial(torch.autocast, "cpu", dtype, enabled=dtype is not None)
    attacked = data.attack(model, images, torch.from_numpy(labels[index]), 1, 10, autocast)
    for condition, shown in (
        (("clean", "", 0), images), (("corruption", "fog", 3), data.corrupt(images, "fog", 3)),
        (("pgd", "", 1), attacked),
    ):  # fmt: skip
        place = evaluate.CONDITIONS.index(condition)
        with autocast():
            probs = utils.predict(model, [data.normalize(shown)]).softmax(1)
        assert (preds[place] == probs.argmax(1).numpy()).mean() > 0.98, condition
        assert abs(confidence[place].mean() - probs.amax(1).mean()) < 0.01, condition
    refused(evaluate.main, [runs[0], "--stress", "--stress-images", "200"], 2, "100 images", "stress.csv")
    text, digest = listed.read_text(), utils.sha256(runs[1] / "best.pt")
    short, other = "\n".join(text.splitlines()[:2]) + "\n", np.load(runs[0] / "stress_preds.npy")
    for content, word in ((short, "1 conditions"), (text.replace(digest, "0" * 64), "another best.pt")):
        listed.write_text(content)
        printed = without_drawing(evaluate.main, *runs)[1]
        assert word in printed and "left out" in printed and "needs --stress" in printed, printed
        assert not (runs[1] / "stress.png").exists()  # it would show other results
    listed.write_text(text)
    utils.write_npy(runs[1] / "stress_preds.npy", other)
    assert "does not fit stress_preds.npy" in without_drawing(evaluate.main, *runs)[1]


# ---- evaluate.py in the chain --------------------------------------------------------------------------------------


def test_chain_evaluate_writes_what_it_says():
    for run_dir in chain()[0]:
        metrics, rows = json_of(run_dir / "metrics.json"), read_csv(run_dir / "per_class.csv")
        logits, labels = np.load(run_dir / "test_logits.npy"), np.load(run_dir / "test_labels.npy")
        assert logits.shape == (10_000, 100) and logits.dtype == np.float32 and labels.dtype == np.int64
        assert (labels == data.load_synthetic(False)[1].numpy()).all()  # row i is test image i
        confusion, expected = np.load(run_dir / "confusion.npy"), np.zeros((100, 100))
        np.add.at(expected, (labels, logits.argmax(1)), 1)  # row true, column predicted
        assert (confusion == expected).all()
        val, best = evaluate.Scores(*utils.load_logits(run_dir, "val")), utils.load_checkpoint(run_dir / "best.pt")
        assert metrics["sha256"]["best.pt"] == best["sha256"] == utils.sha256(run_dir / "best.pt")
        assert abs(val.correct.mean() - best["val_acc"]) < 0.01  # the validation images of its own split
        val_loss = float(read_csv(run_dir / "log.csv")[best["epoch"] - 1]["val_loss"])
        assert abs(val_loss - val.nll.mean()) < 0.05  # without smoothing
        of_classes = np.mean([float(row["accuracy"]) for row in rows])
        for accuracy in ((logits.argmax(1) == labels).mean(), of_classes):
            assert abs(accuracy - metrics["accuracy"]) < 1e-5 and len(rows) == 100
        assert np.allclose(metrics["ci95"]["accuracy"], utils.wilson_interval(np.trace(confusion), 10_000), atol=1e-5)
        nll = evaluate.Scores(logits, labels).nll
        half = 1.96 * nll.std() / 100
        assert np.allclose(metrics["ci95"]["nll"], [nll.mean() - half, nll.mean() + half], rtol=1e-5)
        temperature = evaluate.fit_temperature(*utils.load_logits(run_dir, "val"))  # not on the test images
        assert math.isclose(metrics["temperature"], temperature, rel_tol=1e-4)
        for name in ("confusion.png", "per_class.png", "reliability.png"):
            assert (run_dir / name).stat().st_size > 10_000
    claims = json_of(chain()[0][1] / "verdict.json")["claims"]
    assert set(claims[0]) == {"claim", "recipe", "figure", "ci95", "word", "runs", "note"}
    assert "SYNTHETIC" in chain()[1][2] and within_79_columns(chain()[1][2])
    assert "\r" not in "".join(chain()[1])  # no terminal: whole lines only


def test_chain_report():
    """Each section, relative links to pictures that exist, commands for what is missing; without data or network."""
    baseline, smoothed = chain()[0]
    _, printed = quietly(evaluate.main, [baseline, smoothed])
    path = smoothed / "report.md"
    assert printed.splitlines()[-1] == f"report: {path}"
    report = path.read_text("utf-8")
    sections = re.findall(r"^## (\d+)\. .* \(SYNTHETIC data\)$", report, re.M)
    assert sections == [str(k) for k in range(1, 12)] and "SYNTHETIC" in report.splitlines()[0]
    links = re.findall(r"!\[[^]]+\]\(([^)]+)\)", report)
    assert len(links) >= 7 and all((smoothed / link.replace("%20", " ")).exists() for link in links), links
    assert "--stress`" in report  # the section on stress names its command
    assert re.search(r"^python failures.py .* --threshold 0.8[5-9]$", report, re.M)  # as the list was made
    for run in (baseline, smoothed):  # of different widths
        assert f"Each run of {run.name}: {json_of(run / 'config.json')['parameters']} parameters" in report
    metrics = [json_of(run / "metrics.json") for run in (baseline, smoothed)]
    for value in metrics:
        for part in (f"| {100 * value['accuracy']:.2f} [", f"| {100 * value['trust']['set_coverage']:.2f} |"):
            assert part in report, part
    for claim in json_of(smoothed / "verdict.json")["claims"]:
        assert claim["word"] in report and claim["claim"] in report
    index = [int(row["index"]) for row in read_csv(baseline / "failures.csv")]
    preds = [np.load(run / "test_logits.npy").argmax(1) for run in (baseline, smoothed)]
    labels = np.load(baseline / "test_labels.npy")
    repaired, same = (preds[1] == labels)[index].sum(), (preds[1] == preds[0])[index].sum()
    assert f"| {repaired} of {len(index)} (" in report and f"| {same} of {len(index)} (" in report
    accuracies = " | ".join(f"{100 * value['accuracy']:.2f}" for value in metrics)
    assert f"| test accuracy | {accuracies} |" in report  # before and after
    chosen = [row["index"] for row in read_csv(baseline / "failures.csv") if row["representative"] == "1"]
    for row in read_csv(baseline / "attention.csv"):
        lost = " / ".join(f"{round(100 * float(row[part]))}" for part in ("border_drop", "centre_drop"))
        assert row["index"] not in chosen or re.search(rf"^\| {row['index']} \| .* \| {lost} \|$", report, re.M), row
    alone = copy_of_run("reported alone", "failures.csv", "gradcam.png", "*.pt")
    _, printed = without_drawing(evaluate.main, alone)
    text = (alone / "report.md").read_text("utf-8")
    assert "not decided" not in printed and "A comparison needs" in printed
    for command in ("python failures.py", "python gradcam.py"):
        assert f"`{command} {utils.quote(alone.resolve())}`" in text, text
    before = path.read_bytes()
    without_drawing(evaluate.main, baseline, smoothed)
    assert path.read_bytes() == before  # no clock, no order of files in it
    twin = copy_of_run("twin-x1", "*.pt", "*.png")
    config = json_of(twin / "config.json")
    utils.write_json(twin / "config.json", config | {"args": config["args"] | {"seed": 43}})
    first, changed = (copy_of_run(name, "*.pt", "*.png", number=k) for k, name in enumerate(("base-x1", "changed-x1")))
    _, printed = without_drawing(evaluate.main, first, twin, changed)
    text = (changed / "report.md").read_text("utf-8")
    assert "  mean of 2" in printed and "|   ensemble of 2 |" in text and "| control: another seed |" in text
    assert "Seeds: 2 of base and 1 of changed." in text  # names without what all share
    for names in (["a-x1"], ["a-b-c", "a-c-b"], ["a-warmup-epochs2", "a-warmup-epochs3"], ["a-lr1e-05", "a-lr2e-05"]):
        assert evaluate.without_shared_words(names) == names
    printed = without_drawing(evaluate.main, twin, alone)[1]  # the mistakes are those of the first seed
    assert f"next: python failures.py {utils.quote(alone)} --compare {utils.quote(twin)}\n" in printed
    assert "Here there are" not in report
    (first / "gradcam.png").write_bytes(b"of another network")
    (first / "attention.csv").unlink()
    without_drawing(evaluate.main, first, changed)
    assert "*Missing: gradcam.png" in (changed / "report.md").read_text("utf-8")
    for header in re.findall(r"^\| in % \| accuracy \[95 %\] \| (.*) \|$", text, re.M):
        assert all(f"\n- {column}: " in text for column in header.split(" | ")), header


# ---- failures ------------------------------------------------------------------------------------------------------


def wrong_images():
    """(labels, preds, confidence): ten mistakes at 0.99, 0.98 ... 0.90, 100 right at 0.95, the others at 0.6."""
    labels = data.load_synthetic(train=False)[1].numpy()
    preds, confidence = labels.copy(), np.full(10_000, 0.6)
    preds[:10] = (labels[:10] + 1) % 100
    confidence[:10], confidence[10:110] = 0.99 - np.arange(10) / 100, 0.95
    return labels, preds, confidence


def logits_of(preds, confidence):
    """Logits (N, 100) whose softmax has `confidence` in the predicted class and the rest in equal parts."""
    logits = np.repeat(np.log((1 - confidence) / 99)[:, None], 100, 1)
    logits[np.arange(len(preds)), preds] = np.log(confidence)
    return logits


def run_from(path, logits=None, labels=None, dataset="synthetic", **args):
    """An evaluated run by hand, without a best.pt; of wrong_images(), where nothing else is given."""
    true, *wrong = wrong_images()
    run_dir = new_folder(path)
    config = {"dataset": dataset, "args": {"smoothing": 0.0, "seed": 42, "dataset": dataset} | args, "finished": True}
    utils.write_json(run_dir / "config.json", config)
    utils.write_npy(run_dir / "test_logits.npy", logits_of(*wrong) if logits is None else logits)
    utils.write_npy(run_dir / "test_labels.npy", true if labels is None else labels)
    utils.write_json(run_dir / "metrics.json", {"sha256": {"best.pt": f"checkpoint of {path}"}})
    return run_dir


def drawn(main, *argv):
    """The figure that main(argv) would save."""
    figures = []
    with replaced(utils, "save_figure", lambda path, draw, *args: figures.append(draw(*args))):
        quietly(main, [str(arg) for arg in argv])
    return figures[0]


find = functools.partial(without_drawing, failures.main)  # (rows, printed)
explain = functools.partial(without_drawing, gradcam.main, "--device", "cpu")  # the same


def test_chain_failures():
    baseline, printed = chain()[0][0], chain()[1][3]
    rows = read_csv(baseline / "failures.csv")
    logits, labels = np.load(baseline / "test_logits.npy"), np.load(baseline / "test_labels.npy")
    probs = np.exp(utils.log_softmax(logits))
    wrong = [i for i in range(10_000) if probs[i].argmax() != labels[i] and probs[i].max() > 0.85]
    assert [int(row["index"]) for row in rows] == sorted(wrong, key=lambda i: (-probs[i].max(), i)) and len(wrong) > 10
    added = [f"smoothing0.1_{what}" for what in ("outcome", "predicted", "confidence")]
    assert list(rows[0]) == [*failures.COLUMNS[:-1], *added, "checkpoint"]
    assert {row["checkpoint"] for row in rows} == {utils.sha256(baseline / "best.pt")}
    assert f"next: python gradcam.py {utils.quote(baseline)}\n" in printed and within_79_columns(printed)
    assert "any other run" in printed and "people" not in printed  # no control; images that nobody looked at
    preds, same = np.repeat([1, 2], 5), np.zeros(10, int)  # the rule, by hand
    assert failures.representative(np.arange(10), preds, np.arange(10), 3) == [0, 4, 9]
    assert failures.representative(np.arange(10), same, same, 3) == [0]  # one pair of classes
    assert failures.representative(np.arange(10), torch.tensor(same), torch.tensor(same), 3) == [0]


def test_failures_votes_and_other_runs_by_hand():
    """Whose label people doubt, and what a control and a changed run, in folders of one name, make of failures."""
    labels, preds, confidence = wrong_images()
    there, now, doubtful = preds.copy(), confidence.copy(), np.arange(10_000) % 100 == 1  # image 1; 1 % of the hits
    there[:3], there[3], now[:10] = labels[:3], (labels[3] + 2) % 100, 0.5
    first, copied = run_from("first", dataset="cifar100"), run_from("copied", dataset="cifar100")
    control = run_from("seed43/same", logits_of(there, now), dataset="cifar100", seed=43)
    changed = run_from("changed/same", logits_of(there, now), dataset="cifar100", seed=44, smoothing=0.1)
    with (
        replaced(failures, "load_dataset", lambda *args, **more: data.load_synthetic(train=False)),
        replaced(failures, "votes", lambda i: 2 if doubtful[i] else 3),
        replaced(failures, "DOUBTFUL", doubtful),
    ):
        assert {row["votes"] for row in find(first)[0]} == {None}  # other labels than those that people looked at
        with replaced(failures, "is_test_set", lambda labels: True):
            rows, printed = find(first, "--compare", control, changed, copied)
            figure = drawn(failures.main, first, "--compare", control)
    names, same = data.CLASS_NAMES, int(data.SUPERCLASS_OF[labels[1]] == data.SUPERCLASS_OF[preds[1]])
    mistake = [1, names[labels[1]], names[preds[1]], 0.98, 0.00020202, same, 0, 2]  # 0.02 / 99 for each other class
    fates = ["repaired", names[labels[1]], 0.5] * 2 + ["same wrong class", names[preds[1]], 0.98]
    assert [*utils.rounded(rows[1]).values()] == [*mistake, *fates, "checkpoint of first"]
    assert [row["index"] for row in rows] == [*range(9)]
    outcomes = ["repaired"] * 3 + ["another wrong class"] + ["same wrong class"] * 5
    assert [row["seed43/same_outcome"] for row in rows] == outcomes
    fate = "repaired: 3 of 9, same wrong class: 5, another wrong class: 1"
    for text in (
        "1 of 9 have a label that fewer than three of five people confirm; of the confident hits 1.0 %",
        f"seed43/same control: the same recipe, another seed {fate} mean confidence: 95.0 % -> 50.0 %",
        f"changed/same {fate}", f"next: python evaluate.py {utils.quote(first)}",  # no best.pt for gradcam.py
    ):  # fmt: skip
        assert text in " ".join(printed.split()), printed
    assert printed.count("control") == 1 and figure.get_suptitle().startswith("first: CIFAR-100 test images")
    images = data.load_synthetic(train=False)[0].numpy()
    for axes, row in zip(figure.axes, sorted(rows, key=lambda row: -row["representative"])):
        title, i = axes.get_title(), row["index"]
        assert (axes.images[0].get_array() == images[i]).all()
        assert ("representative" in title) == (axes.title.get_color() != "black") == row["representative"]
        assert ("label doubtful: 2 of 5 agree" in title) == (i == 1)
        for word in (row["true"], row["predicted"], f"image {i}", f"other: {row['seed43/same_predicted']} 50 %"):
            assert word in title
    doubted, upheld = (np.flatnonzero(data.DOUBTFUL == value)[0] for value in (True, False))
    doubt = f"test image {doubted}\ntrue: lion\nlabel doubtful: {data.votes(doubted)} of 5 agree"
    assert gradcam.caption("cifar100", doubted, "lion") == doubt
    assert not any("doubt" in gradcam.caption(*of, "lion") for of in (("synthetic", doubted), ("cifar100", upheld)))


# ---- Grad-CAM ------------------------------------------------------------------------------------------------------


def trained_like(name="resnet18", width=8):
    """A random network whose batch norms have seen data, and images for it."""
    torch.manual_seed(1)
    model, images = make_model(name, width=width), torch.randn(6, 3, 32, 32)
    for _ in range(3):
        model(torch.randn(32, 3, 32, 32))
    return model.eval(), images


def test_gradcam_identities_at_the_last_map():
    """Under a pooled linear head the map is classic CAM / (h w), and its sum plus the bias is the logit."""
    targets, features = torch.tensor([0, 5, 5, 99, 42, 17]), {}
    for name, layer in LAST_MAP.items():
        model, images = trained_like(name)
        maps, module = gradcam.grad_cam(model, images, targets, layer), getattr(model, layer)
        with torch.no_grad(), module.register_forward_hook(lambda module, inputs, output: features.update(out=output)):
            logits = model(images)
        assert maps.shape == (6, *features["out"].shape[2:]) and maps.dtype == torch.float32 and (maps < 0).any()
        cam = torch.einsum("nk,nkhw->nhw", model.fc.weight[targets], features["out"]) / maps[0].numel()
        assert torch.allclose(maps, cam, rtol=1e-5, atol=1e-6), name
        sums, logits = maps.sum((1, 2)) + model.fc.bias[targets], logits[torch.arange(6), targets]
        assert torch.allclose(sums, logits, rtol=1e-5, atol=1e-5), name


def test_gradcam_at_other_layers_follows_the_definition():
    """alpha from numerical derivatives of the logit, in float64, channel by channel."""
    model, images = trained_like(width=4)
    with torch.no_grad():
        x = F.relu(model.bn1(model.conv1(images[:1])))
        activations = model.layer3(model.layer2(model.layer1(x))).double()
        tail, head = copy.deepcopy(model.layer4).double(), copy.deepcopy(model.fc).double()
        moves = 1e-6 * torch.eye(16).double()[:, :, None, None]  # image k: all cells of channel k move together
        up, down = head(tail(activations + moves).mean((2, 3))), head(tail(activations - moves).mean((2, 3)))
        slopes = (up - down)[:, 7] / 2e-6  # (16,): for each channel the sum of d y / d A over its cells
        expected = torch.einsum("k,khw->hw", slopes / activations[0, 0].numel(), activations[0])
    ours = gradcam.grad_cam(model, images[:1], torch.tensor([7]), "layer3")[0]
    assert ours.shape == (8, 8) and torch.allclose(ours, expected.float(), rtol=1e-3, atol=1e-5)


def test_gradcam_batch_modes_and_traces():
    """Neither batch, mode nor dtype matters; nothing is left behind; what is no argument."""
    (model, images), targets = trained_like(), torch.arange(6)
    maps = gradcam.grad_cam(model, images, targets)
    single = [gradcam.grad_cam(model, images[n : n + 1], targets[n : n + 1]) for n in range(6)]
    assert torch.allclose(torch.cat(single), maps, rtol=1e-3, atol=1e-6)
    model.train().requires_grad_(False)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.allclose(gradcam.grad_cam(model, images.clone(), targets.clone()), maps, atol=1e-6)
    for dtype, near in ((torch.float64, 1e-5), (torch.float16, 2e-2)):
        found = gradcam.grad_cam(copy.deepcopy(model).to(dtype), images, targets)
        assert found.dtype == torch.float32 and torch.allclose(found, maps, atol=near * maps.abs().max()), dtype
    model.requires_grad_(True).never = torch.nn.Conv2d(3, 3, 1)
    for arguments, word in (
        ((images, targets, "layer5"), "no layer layer5; its parts are conv1"), ((images, targets, "fc"), "no map"),
        ((images, targets, "never"), "not use layer never"), ((images * 128, targets), "data.normalize"),
        ((images, 3), "torch.tensor([3])"), ((images, targets + 95), "0..99"), ((images, targets - 1), "0..99"),
    ):  # fmt: skip
        with raised(ValueError, re.escape(word)):
            gradcam.grad_cam(model, *arguments)
    model.bn1.eval()  # frozen, as in fine-tuning
    gradcam.grad_cam(model, images, targets)
    assert model.layer1.training and not model.bn1.training
    in_place, plain = (torch.nn.Sequential(model.conv1, torch.nn.ReLU(inplace), torch.nn.AdaptiveAvgPool2d(1),
                       torch.nn.Flatten(), torch.nn.Linear(8, 10)) for inplace in (True, False))  # fmt: skip
    plain[4] = in_place[4]
    assert torch.equal(*(gradcam.grad_cam(net, images, targets, "0") for net in (in_place, plain)))
    assert model.training and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_gradcam_sanity_checks_by_hand():
    """Spearman's rho with ties; maps that ignore the weights are told from maps that depend on the class."""
    rows = torch.tensor([[1, 2, 3, 4], [1, 2, 2, 9], [5, 5, 5, 5]])
    others = torch.tensor([[10, 30, 20, 40], [4, 3, 1, 2], [1, 2, 3, 4]])
    # ranks 1 2.5 2.5 4 and 4 3 1 2: covariance (-1.5 * 1.5 + 0 + 0 + 1.5 * -0.5) / sqrt(4.5 * 5)
    assert np.allclose(gradcam.spearman(rows, others), [0.8, -3 / math.sqrt(4.5 * 5), math.nan], equal_nan=True)
    assert np.allclose(gradcam.spearman(rows[:2].byte(), 255 - rows[:2].byte()), -1)  # no wrap-around
    generator = torch.Generator().manual_seed(0)
    images, classes = torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8, generator=generator), torch.arange(8)
    for name in gradcam.SANITY_LAYER:
        (model, _), args = trained_like(name), {"model": name, "width": 8}
        sanity = gradcam.sanity_checks(model, args, images, classes)
        assert all(0 < rho < gradcam.SANITY_LIMIT for rho in sanity.values()), (name, sanity)

    def maps(net, x, y, layer):  # image 0 has none; other weights turn the sign, so that rho is -1
        return x[:, int(torch.equal(y, classes))] * (-1 if net is model else 1) * (y != y[0])[:, None, None]

    with replaced(gradcam, "grad_cam", maps):
        another, untrained = gradcam.sanity_checks(model, args, images, classes).values()
    assert another < 0.3 and math.isclose(untrained, 1)


def test_gradcam_pictures_show_what_they_say():
    """Maps on one scale for a row, the signed difference, another run's map on its own; the texts name the classes."""
    (model, _), images, names = trained_like(), data.load_synthetic(train=False)[0][:2], data.CLASS_NAMES
    other, x = trained_like(width=4)[0], data.normalize(images[:1])
    preds, elsewhere = (gradcam.probabilities(net, images).argmax(1) for net in (model, other))
    labels = torch.stack([(preds[0] + 1) % 100, preds[1]])
    figure = gradcam.picture(model, images, labels.numpy(), captions=["a$b$", "second"], other=(other, "layer4"))
    grid = np.array(figure.axes).reshape(3, 5)
    a, b, c = (gradcam.grad_cam(net, x, y[:1]) for net, y in ((model, preds), (model, labels), (other, elsewhere)))
    cams, lead = gradcam.upsample(torch.stack([a, b, c], 1).clamp(min=0))[0], gradcam.upsample((a - b)[None])[0, 0]
    tops = cams[:2].max(), cams[:2].max(), lead.abs().max(), cams[2].max()
    for axis, values, top in zip(grid[0, 1:], (*cams[:2], lead, cams[2]), tops):
        assert np.allclose(axis.images[0].get_array(), values / top.clamp(min=1e-12), atol=1e-5)
    assert np.array_equal(grid[0, 0].images[0].get_array(), images[0]) and not grid[1, 2].images  # second: no mistake
    words = (r"a\$b\$", f"predicted: {names[preds[0]]}", f"true: {names[labels[0]]}", "rather than",
             f"other run: {names[elsewhere[0]]}")  # fmt: skip
    assert all(word in axis.get_title() for axis, word in zip(grid[0], words))
    assert [text.get_text() for text in grid[2, 3].get_xticklabels()] == ["true", "predicted"]
    true = gradcam.picture(model, images[:1], labels[:1], "true")
    assert f"true: {names[labels[0]]}" in true.axes[1].get_title()
    asked = gradcam.picture(model, images[0], target=7, layer="layer3")
    assert f"asked: {names[7]}" in asked.axes[1].get_title() and "layer3, 8x8 cells" in asked.get_suptitle()
    assert asked._repr_png_()[1:4] == b"PNG"  # a notebook shows it
    assert gradcam.predict_image(model, images[0].numpy())[0][0] == names[preds[0]]
    for function, *arguments in (
        (gradcam.predict_image, images / 255), (gradcam.predict_image, images[0].numpy() / 255),  # plt.imread: floats
        (gradcam.picture, images / 255), (gradcam.predict_image, images), (gradcam.picture, images, None, "true"),
        *((gradcam.picture, images, wrong) for wrong in (labels[:1], labels + 100, [1.5, 2.5])),
    ):  # fmt: skip
        with raises(ValueError):
            function(model, *arguments)


def test_chain_gradcam():
    """A row for each failure: the sum of a map is the logit without its bias. Other images go to other files."""
    baseline, smoothed = chain()[0]
    failed, explained = read_csv(baseline / "failures.csv"), read_csv(baseline / "gradcam.csv")
    assert [row["index"] for row in explained] == [row["index"] for row in failed]
    logits, bias = np.load(baseline / "test_logits.npy"), utils.load_model(baseline).fc.bias.detach()
    for row, own in zip(explained[:20], failed):
        assert row["checkpoint"] == own["checkpoint"] and row["target"] == own["predicted"]
        for name, total, p in (("target", "map_sum", "confidence"), ("true", "true_map_sum", "true_probability")):
            label = int(row[name][-2:])
            assert math.isclose(float(row[total]) + bias[label], logits[int(row["index"]), label], abs_tol=1e-3)
            assert math.isclose(float(row[f"{name}_probability"]), float(own[p]), abs_tol=1e-4), name
    before = {path: path.read_bytes() for path in baseline.iterdir()}
    flags = "--index 3 141 --layer layer3 --target synthetic_07 --compare".split()
    rows, printed = explain(baseline, *flags, smoothed)
    assert [(row["index"], row["target"], row["layer"]) for row in rows] == [(i, flags[-2], "layer3") for i in (3, 141)]
    changed = {path.name for path in baseline.iterdir() if before.get(path) != path.read_bytes()}
    assert changed == {"gradcam-index.csv", "gradcam-index.png"} and "sanity" not in printed
    figure = drawn(gradcam.main, baseline, "--device", "cpu", "--compare", smoothed)
    words = "ResNet-18", "SYNTHETIC", "run baseline", "other run: smoothing0.1", "layer4, 4x4 cells"
    assert all(word in figure.get_suptitle() for word in words) and len(figure.axes) == 4 * 5
    for flags, word in ((["--compare", baseline], "another run"), (["--compare", SCRATCH / "x"], "config.json")):
        refused(gradcam.main, [baseline, *flags], 2, word)


def test_chain_gradcam_predicts_a_picture_without_data_and_logits():
    run_dir = copy_of_run("published", "*.npy", "*.csv", "*.png", "last.pt", "metrics.json")
    for place, shade in (("ca", 99), ("do", 200)):
        image = new_folder(place) / "0001.png"
        Image.new("L", (50, 40), shade).save(image)
        with replaced(gradcam, "load_dataset", None):  # any use of it would raise
            top, printed = explain(run_dir, "--image", image)
        pixels = torch.full((1, 32, 32, 3), shade, dtype=torch.uint8)
        probs, best = utils.load_model(run_dir)(data.normalize(pixels)).detach().softmax(1)[0].topk(5)
        assert [name for name, _ in top] == [f"synthetic_{label:02d}" for label in best]
        assert np.allclose([p for _, p in top], probs, atol=1e-6)
        assert all(f"{100 * p:5.1f} %  {name}" in printed for name, p in top)
    assert len(list(run_dir.glob("gradcam-0001-*.png"))) == len(list(run_dir.glob("gradcam*"))) == 2


def test_chain_attention():
    """The matches are correct, distinct, and as confident; the drops are those of the network, pixel by pixel."""
    baseline, printed = chain()[0][0], chain()[1][4]
    rows, listed = read_csv(baseline / "attention.csv"), read_csv(baseline / "failures.csv")
    columns = "pair group index true predicted confidence border_drop centre_drop checkpoint".split()
    failed, matched = ([row for row in rows if row["group"] == group] for group in ("failure", "matched"))
    assert list(rows[0]) == columns and [row["pair"] for row in failed] == [row["pair"] for row in matched]
    for name in (*columns[2:6], "checkpoint"):
        assert [row[name] for row in failed] == [row[name] for row in listed], name
    logits, labels = np.load(baseline / "test_logits.npy"), np.load(baseline / "test_labels.npy")
    picked = [int(row["index"]) for row in matched]
    preds, sure = logits.argmax(1), np.exp(utils.log_softmax(logits)).max(1)
    index = [int(row["index"]) for row in failed]
    hits = np.flatnonzero(preds == labels)
    matches = gradcam.match_on_confidence(sure[index], preds[index], sure[hits], preds[hits])
    assert len(set(picked)) == len(picked) and picked == hits[matches].tolist()
    model, row = utils.load_model(baseline), failed[0]
    image, target = data.normalize(data.load_synthetic(train=False)[0][[int(row["index"])]]), int(row["predicted"][-2:])
    border, centre = torch.zeros_like(image), image.clone()
    border[:, :, 4:28, 4:28] = image[:, :, 4:28, 4:28]
    centre[:, :, 5:26, 5:26] = 0  # 441 pixels; the border has 448
    p, *hidden = model(torch.cat([image, border, centre])).softmax(1)[:, target].tolist()
    assert np.allclose([float(row["border_drop"]), float(row["centre_drop"])], [p - x for x in hidden], atol=1e-5)
    centre, border = (100 * np.array([float(row[f"{part}_drop"]) for row in failed]) for part in ("centre", "border"))
    share = 100 * np.mean(border > centre)
    assert f"{centre.mean():13.1f}{border.mean():15.1f}{share:10.1f} % of them" in printed
    assert printed.count("sanity: ") == 2 and within_79_columns(printed)
    assert printed.endswith(f"next: python evaluate.py {utils.quote(baseline)}\n")  # the report; nothing leads back
    # The nearest, each once, in the order of the failures; of one class if that is at most 0.02 further away.
    matches = [0.95, 0.94, 0.91], np.array([7, 8, 9]), [0.951, 0.935, 0.965, 0.84], np.array([5, 5, 7, 9])
    assert gradcam.match_on_confidence(*matches).tolist() == [2, 1, 0]


# ---- notebooks -----------------------------------------------------------------------------------------------------


def test_places_notebook():
    """An import does nothing; pictures need no display."""
    program = """
import os, sys, random
before, state = set(os.listdir()), random.getstate()
from model import resnet18
from data import load_cifar100, corrupt, CLASS_NAMES, normalize
from gradcam import grad_cam, predict_image
from utils import load_model, macro_scores, confusion_matrix, calibration_error
import train, evaluate, failures, gradcam, torch, utils
assert set(os.listdir()) == before and "matplotlib" not in sys.modules and random.getstate() == state
names = "model data train evaluate failures gradcam utils".split()  # after %run train.py they are still modules
assert not any(callable(vars(module).get(name)) for module in (train, evaluate, failures, gradcam) for name in names)
figure, axes = utils.new_figure(3, 3)
utils.save_figure("figure.png", lambda: figure)
print(os.path.getsize("figure.png") > 5000)
"""
    colab = "module://matplotlib_inline.backend_inline"  # what `!python train.py` inherits, and may not have
    done = script("-B", "-c", program, cwd=SCRATCH, MPLBACKEND=colab)
    assert done.returncode == 0 and done.stdout == "True\n", done.stderr


# ---- runner --------------------------------------------------------------------------------------------------------


def run(tests):
    """Run these tests on one thread, and print a line for each; returns their outcomes."""
    torch.set_num_threads(1)
    outcomes = []
    for test in tests:
        start, outcome, note = time.monotonic(), "passed", ""
        try:
            test()
        except unittest.SkipTest as reason:
            outcome, note = "skipped", f": {reason}"
        except Exception:
            outcome, note = "failed", "\n" + traceback.format_exc()
        outcomes.append(outcome)
        print(f"{outcome:7} {time.monotonic() - start:6.1f} s  {test.__name__}{note}", flush=True)
    return outcomes


def main(patterns):
    """Run the tests whose names have one of the patterns in them, in two processes; returns the exit status."""
    tests = [test for name, test in globals().items() if name.startswith("test_")]
    tests = [test for test in tests if not patterns or any(pattern in test.__name__ for pattern in patterns)]
    if not tests:  # --help, another flag, or a mistyped name
        print(__doc__)
        return 0 if "--help" in patterns else 2
    if not __debug__:
        print("without python -O and PYTHONOPTIMIZE, please: they leave out every assert")
        return 2
    begin = time.monotonic()
    parts = [test for test in tests if re.match("test_(model|train|data|corrupt)", test.__name__)]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        other = pool.submit(run, parts)
        outcomes = run([test for test in tests if test not in parts])  # these share the networks of chain()
        outcomes += other.result()
    passed, failed, skipped = map(outcomes.count, ("passed", "failed", "skipped"))
    print(f"{passed} passed, {failed} failed, {skipped} skipped in {utils.duration(time.monotonic() - begin)}")
    print("something does not work here: see above" if failed else "the installation works")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
