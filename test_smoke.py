"""Tests, offline, about two minutes on two cores.

    python test_smoke.py             # or pytest
    python test_smoke.py resume      # tests with "resume" in their names

The whole chain runs on synthetic data, and its parts are compared with
something independent. Tests on the real CIFAR-100 run where it is found
(data/, or ../shared/cifar100), and are skipped elsewhere. The last line says
whether the installation works. What takes longer is in .ci/: kills at random
instants, damaged files, simulated studies.
"""

import colorsys
import contextlib
import copy
import functools
import hashlib
import http.client
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
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import unittest.mock
import urllib.request
import urllib.response
import zipfile
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.io import decode_jpeg, encode_jpeg
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


def test_model_cct_equals_torchvision():
    """Its blocks against the encoder of torchvision's vision transformer, whose attention is torch's own."""
    model = make_model("cct", num_classes=10)
    # The authors' CCT-2/3x2 has 283,723: their pooling, which is a mean here, is a linear layer of 128 + 1.
    assert sum(p.numel() for p in model.parameters()) == 283_723 - 129
    reference, ours = Encoder(64, 2, 2, 128, 128, 0.0, 0.0), model.state_dict()
    theirs = {"pos_embedding": ours["position"], "ln.weight": ours["norm.weight"], "ln.bias": ours["norm.bias"]}
    names = {"ln_1": "norm1", "ln_2": "norm2", "self_attention.out_proj": "proj", "mlp.0": "mlp.0", "mlp.3": "mlp.2"}
    for n in range(2):
        layer, block = f"layers.encoder_layer_{n}", f"blocks.{n}"
        for (name, own), part in itertools.product(names.items(), ("weight", "bias")):
            theirs[f"{layer}.{name}.{part}"] = torch.nn.init.normal_(ours[f"{block}.{own}.{part}"], 0.5, 0.2)
        theirs[f"{layer}.self_attention.in_proj_weight"] = torch.nn.init.normal_(ours[f"{block}.qkv.weight"], 0, 0.1)
        theirs[f"{layer}.self_attention.in_proj_bias"] = torch.zeros(384)
    reference.load_state_dict(theirs)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        relu, pool = torch.nn.ReLU(), torch.nn.MaxPool2d(3, 2, 1)
        stem = torch.nn.Sequential(model.conv1, relu, pool, model.conv2, relu, pool)
        tokens = reference.eval()(stem(images).flatten(2).transpose(1, 2))  # (4, 64, 128)
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
    modules = "data evaluate failures gradcam model train utils".split()
    assert not [name for name in modules if callable(vars(train).get(name))]  # `%run train.py` hides no module
    shown = script("train.py", "--help", COLUMNS="80").stdout
    assert max(map(len, shown.splitlines())) <= 79 and "(default: 0.0005)" in shown, shown


def test_train_takes_the_data_that_are_there():
    """A folder that was named is taken or refused, never left for another; without one, --quick is synthetic."""
    below, empty = new_folder("below/some/cifar-100-python"), new_folder("empty")
    for name in ("train", "test", "meta"):
        (below / name).touch()
    named, elsewhere = ["--data-dir", below.parent.parent], ["--data-dir", empty]
    for given, dataset in (
        (["--quick"], "synthetic"), ([], "cifar100"), ([*named, "--quick"], "cifar100"), (named, "cifar100"),
        ([*named, "--dataset", "synthetic"], "synthetic"), ([*elsewhere, "--data-url", "http://x"], "cifar100"),
    ):  # fmt: skip
        with replaced(train, "find_cifar100", train.find_cifar100 if "--data-dir" in given else lambda folder: None):
            assert train.parse_args(given).dataset == dataset, given
    flag_sets = "", "--quick", "--quick --data-url http://x"  # --quick never downloads
    for flags, folder in itertools.product(flag_sets, (empty, SCRATCH / "nowhere")):
        refused(train.main, [*flags.split(), "--data-dir", folder], 2, f"no CIFAR-100 in --data-dir {folder}")


def test_train_precision():
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    assert utils.select_precision("off", cpu)[0] is None
    refused(functools.partial(utils.select_precision, "fp16"), cpu, 2, "--amp fp16")
    refused(functools.partial(utils.select_precision, "bf16"), torch.device("mps"), 2, "--amp bf16")
    for name, capability, dtype in (
        ("Tesla T4", (7, 5), torch.float16), ("Tesla P100", (6, 0), None), ("NVIDIA A100", (8, 0), torch.bfloat16),
        ("GeForce GTX 1660 Ti", (7, 5), None), ("NVIDIA T1000", (7, 5), None), ("GeForce MX450", (7, 5), None),  # NaN
    ):  # fmt: skip
        known = replaced(torch.cuda, "get_device_capability", lambda device: capability)
        with known, replaced(utils, "device_name", lambda device: name):
            assert utils.select_precision("auto", gpu)[0] is dtype, name
            if capability < (8, 0):  # would emulate bfloat16
                refused(functools.partial(utils.select_precision, "bf16"), gpu, 2, name, "fp16")


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
    images, labels = torch.arange(2.0).view(2, 1, 1, 1).repeat(1, 3, 32, 32), torch.arange(2)  # black and white
    for flag, alpha, transform in (("mixup", 0.4, v2.MixUp), ("cutmix", 1.0, v2.CutMix), ("cutmix", 0.3, v2.CutMix)):
        reference = transform(alpha=alpha, num_classes=2)
        theirs = np.array([reference(images, labels)[1][0, 0].item() for _ in range(4000)])
        ours = np.array([lam for lam, _ in data.mix_plan(7, 1, 4000, **{flag: alpha})])
        distance = max(abs(np.mean(ours <= x) - np.mean(theirs <= x)) for x in np.linspace(0, 1, 101))
        assert distance < 0.045, (flag, alpha, distance)  # Kolmogorov-Smirnov: 99.9 % of equal distributions
        for plan in data.mix_plan(3, 1, 50, **{flag: alpha}):
            mixed, targets = data.mix(images.clone(), labels, *plan)
            assert torch.allclose(targets.sum(1), torch.ones(2))
            assert torch.allclose(mixed.mean((1, 2, 3)), targets[:, 1], atol=1e-6)  # the share of the white image
            assert (plan[1] is None) == (flag == "mixup") and (flag == "mixup" or mixed.unique().numel() <= 2)
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


def test_train_resume_refuses_what_is_not_its_own():
    """A last.pt or flags of another run, and values that a fused optimizer would read and write past their end."""
    with fails_at("log.csv", "after", KeyboardInterrupt):
        refused(train.main, command("mine"), 130, "stopped; add --resume")
    run_dir, again = SCRATCH / "mine", command("mine", "--resume")
    config, last, best = (run_dir / name for name in ("config.json", "last.pt", "best.pt"))
    good, before, checkpoint = last.read_bytes(), config.read_bytes(), utils.load_checkpoint(last)
    states = checkpoint["optimizer"]["state"]
    momentum = states[0]["momentum_buffer"]
    for value in (torch.ones(1), momentum.double(), momentum.to_sparse(), momentum.to("meta"), "x"):
        change_last(run_dir, optimizer={"state": {**states, 0: {"momentum_buffer": value}}})
        refused(train.main, again, 2, "last.pt to continue from")
    last.write_bytes(good)
    for change in ("--lr 0.2", "--seed 1", "--epochs 4", "--cutmix 1", "--amp off"):
        refused(train.main, [*again, *change.split()], 2, f"was started with {change.split()[0]}", change.split()[1])
    refused(train.main, command("mine"), 2, "--resume", "already holds a run")
    change_last(run_dir, split=1)
    refused(train.main, again, 2, "NumPy splits images")
    shutil.copy(best, last)
    refused(train.main, again, 2, "weights only")
    last.unlink()
    refused(train.main, again, 2, "no last.pt")
    last.write_bytes(good)
    assert config.read_bytes() == before  # no refusal has changed anything
    shutil.copy(undisturbed() / "best.pt", best)  # of epoch 3; last.pt's own epoch is the best so far
    change_last(run_dir, setup=checkpoint["setup"] | {"torch": "2.0", "numpy": "1"})
    _, printed = trained("mine", "--resume")
    assert printed.count("warning") == 1, printed
    for words in ("written again", "after epoch 1", "torch was 2.0", "not be bit-identical"):
        assert words in printed, printed
    assert same_run(run_dir, undisturbed()) and "already finished after epoch 3" in trained("mine", "--resume")[1]


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


def test_train_loop_equals_a_plain_one():
    """Two epochs against a loop written anew: split, order, augmentation, mixing, smoothing, lr, decay, Nesterov."""
    flags = "--epochs 2 --lr 0.001 --smoothing 0.3 --weight-decay 0.5 --amp off --warmup-epochs 0.7 --limit 350".split()
    for mixing in ([], ["--mixup", "0.5", "--cutmix", "1"]):
        run_dir, _ = trained(f"plain loop {len(mixing)}", *flags, *mixing)  # a small lr: rounding does not grow
        images, labels = data.load_synthetic()
        keep = data.split_train_val(labels, 100, 42)[0][:350]  # three batches of 100; the rest is dropped
        padded, labels = data.pad(images[keep]), labels[keep]
        torch.manual_seed(42)
        model = resnet18(width=8).train()
        parameters, hits, loss_sum = list(model.parameters()), 0, 0
        velocity, initial = [torch.zeros_like(p) for p in parameters], [p.detach().clone() for p in parameters]
        for step in range(6):  # warmup over 2 steps (0.7 of 3), cosine over 4
            lr = 1e-3 * (0.5, 1, 1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125))[step]
            epoch, i = divmod(step, 3)
            order, offsets, flips = (part[100 * i : 100 * i + 100] for part in data.epoch_plan(42, epoch + 1, 350))
            batch, targets = data.augment(padded, order, offsets, flips), F.one_hot(labels[order], 100).float()
            if mixing:
                batch, targets = data.mix(batch, labels[order], *data.mix_plan(42, epoch + 1, 3, 0.5, 1.0)[i])
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


def test_train_failures_are_one_line_and_save_nothing():
    """Divergence, at once or after the last loss; a full disk. The folder stays as good as empty."""
    argv, huge = command("failed"), ["--lr", "1e30"]
    for flags in ("--momentum 0.99", "--limit 100 --warmup-epochs 0"):  # one step: its weights blow up after its loss
        refused(train.main, [*argv, *huge, *flags.split()], 1, "diverged", "in epoch 1", "--lr", "--amp off")
    with fails_at("last.pt", "before", OSError(28, "No space left on device")):
        refused(train.main, argv, 1, "last.pt", "No space left")
    assert "nothing to resume yet" in trained("failed", "--epochs", "1", "--warmup-epochs", "0", "--resume")[1]


def test_train_goes_on_within_79_columns_when_nothing_but_checkpoints_can_be_written():
    """log.csv held by Excel or a scanner, no pictures, a clock that stands still, a link for a lock, an odd name."""
    row = {"epoch": 1, "lr": 0.00929, "train_loss": 4.6051, "train_acc": 1.0, "val_loss": 12.34567, "val_acc": 1.0}
    line = train.epoch_line(row | {"seconds": 4567.8, "images_per_second": 123456.7}, row | {"epoch": 100}, 100)
    assert max(map(len, [line, *train.HEADER.splitlines()])) <= 79 and line.endswith("  125 h 36 min"), line
    precious, denied = SCRATCH / "precious", unittest.mock.Mock(side_effect=PermissionError(13, "Permission denied"))
    precious.write_text("kept")
    os.link(precious, new_folder("busy\x7f") / ".lock")
    with (
        replaced(utils, "device_name", lambda device: "NVIDIA GeForce RTX 4070 Laptop GPU"),
        fails_at("log.csv", "before", PermissionError(13, "Permission denied")), replaced(Path, "unlink", denied),
        replaced(time, "monotonic", lambda: 7.0), replaced(utils, "new_figure", denied),
    ):  # fmt: skip
        run_dir, printed = trained("busy\x7f")
    lines = printed.replace(str(run_dir)[:-1], "runs/smoothing0.1").splitlines()
    warnings = [text for text in lines if "warning: " in text]
    assert len(warnings) == 5 and max(len(text) for text in lines if text not in warnings) <= 79, printed
    assert "SYNTHETIC" in lines[0] and "\x7f" not in printed and precious.read_text() == "kept", printed
    assert "wrote config.json, last.pt, best.pt to" in printed, printed
    config = json.loads((run_dir / "config.json").read_text())
    assert config["finished"] and Path(config["args"]["data_dir"]).is_absolute()


def test_train_curves_have_the_same_ranges_for_every_run():
    args = train.parse_args([*TINY, "--smoothing", "0.1", "--mixup", "1", "--epochs", "40"])
    rows = [dict.fromkeys(train.COLUMNS, 0.9) | {"epoch": epoch} for epoch in (1, 2)]
    loss, accuracy = train.draw_curves("a $run", args, rows).axes
    assert (loss.get_ylim(), accuracy.get_ylim(), loss.get_xlim()) == ((0, 4.7), (0, 100), (0.5, 40.5))
    for axes, value, words in ((loss, 0.9, "smoothed"), (accuracy, 90, "dominant label")):
        assert [list(line.get_ydata()) for line in axes.lines[:2]] == [[value] * 2] * 2
        assert words in axes.get_legend().get_texts()[0].get_text()


# ---- train: devices, processes -------------------------------------------------------------------------------------


@not_on_windows
def test_train_sigterm_and_a_second_process():
    """One line, how to go on, 143; what was saved is whole. Meanwhile nobody else may train there."""
    argv = command("terminated", "--epochs", "2000", "--patience", "0")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "train.py", *argv], cwd=HERE, **pipes)
    next(line for line in process.stdout if "1/2000" in line)  # the row of the first epoch
    refused(train.main, [*argv, "--resume"], 2, "another process is training")
    process.terminate()
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and stderr.count("\n") == 1 and "stopped; add --resume" in stderr, stderr
    utils.load_checkpoint(SCRATCH / "terminated/last.pt")


def test_train_bad_arguments():
    """Refused with the flag named."""
    for flags, values in (
        ("--batch-size --epochs --val-size --limit --width", "0 -8 1.5 1e3 abc"), ("--batch-size", "1 200"),
        ("--val-size", "150 50000"), ("--limit", "1 40001"), ("--lr --momentum", "0 -1 nan inf"),
        ("--smoothing --momentum", "1 -0.1 nan inf 0,1"), ("--warmup-epochs", "40"), ("--seed --patience", "-1 x"),
        ("--weight-decay --mixup --cutmix --warmup-epochs", "-1 nan inf"), ("--seed", "18446744073709551616"),
        ("--model --dataset --device", "resnet34 cuda:77"), ("--output-dir --data-dir", "~nosuchuser/x"),
    ):  # fmt: skip
        for flag, value in itertools.product(flags.split(), values.split()):
            refused(train.main, ["--limit", "150", f"{flag}={value}"], 2, flag)
    with unittest.mock.patch.dict(os.environ, WORLD_SIZE="2"):  # under torchrun
        refused(train.main, [], 2, "a run is one process", "once per GPU")
    for flags in ("--nonsense", "--smooth 0.1", "--lr", "--amp fp16 --device cpu"):
        refused(train.main, flags.split(), 2, flags.split()[0])
    refused(train.main, ["--output-dir", __file__], 2, "--output-dir")


# ---- data --------------------------------------------------------------------------------------------------


@not_on_windows
def test_data_are_the_official_ones_also_read_only():
    """As on Kaggle: a folder that cannot be written to, given with ~ and with a blank in its name."""
    source, unpack = HERE / "data/cifar-100-python", HERE.parent / "shared/cifar100/unpack.py"
    if not (source / "train").exists():
        if not unpack.exists():
            raise unittest.SkipTest("no CIFAR-100 here")
        subprocess.run([sys.executable, unpack, SCRATCH / "real"], check=True, capture_output=True)
        source = SCRATCH / "real/cifar-100-python"
    parent = new_folder("read only")
    (parent / "cifar-100-python").symlink_to(source)
    parent.chmod(0o555)
    with unittest.mock.patch.dict(os.environ, HOME=str(SCRATCH)):
        (images, labels), printed = quietly(data.load_cifar100, "~/read only", False)
    parent.chmod(0o755)
    assert [path.name for path in parent.iterdir()] == ["cifar-100-python"] and not printed
    meta, test = (pickle.loads((source / name).read_bytes(), encoding="latin1") for name in ("meta", "test"))
    assert (images.permute(0, 3, 1, 2).flatten(1).numpy() == test["data"]).all()
    assert labels.tolist() == test["fine_labels"] and data.is_test_set(labels)
    assert data.CLASS_NAMES == meta["fine_label_names"] and list(data.SUPERCLASSES) == meta["coarse_label_names"]
    assert (data.SUPERCLASS_OF[labels] == test["coarse_labels"]).all()
    small = {data.CLASS_NAMES[label] for label in data.SMALL_ANIMALS}
    assert len(small) == 15 and small > set("mouse shrew bee cockroach worm crab".split())
    images, labels = data.load_cifar100(source)  # the folder itself, not its parent
    assert images.shape == (50_000, 32, 32, 3) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    for channel, mean, std in zip(images.reshape(-1, 3).T, data.MEAN, data.STD):
        share, value = torch.bincount(channel).double() / len(channel), torch.arange(256) / 255
        assert abs((share * value).sum() - mean) < 5e-5
        assert abs((share * (value - mean) ** 2).sum().sqrt() - std) < 5e-5


def test_data_facts_are_those_of_the_two_lists():
    people = {index: data.votes(index) for index in range(10_000) if data.votes(index) is not None}
    duplicates = np.flatnonzero(data.DUPLICATES).tolist()
    assert (len(people), data.DOUBTFUL.sum(), len(duplicates)) == (2235, 465, 891)
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
    assert len(train_index) == 45_000 and (torch.bincount(labels[val_index]) == 50).all()
    assert torch.equal(torch.cat([train_index, val_index]).sort().values, torch.arange(50_000))
    order, offsets, flips = data.epoch_plan(42, 1, 45_000)
    assert torch.equal(order.sort().values, torch.arange(45_000))
    counts = torch.bincount(offsets[:, 0] * 9 + offsets[:, 1], minlength=81)
    chi2 = ((counts - 45_000 / 81) ** 2 / (45_000 / 81)).sum().item()
    assert 40 < chi2 < 140, chi2  # 80 degrees of freedom: 99.99 % of fair draws
    assert abs(flips.double().mean().item() - 0.5) < 0.01
    torch.rand(5), np.random.rand(5)  # nobody else's draws matter
    for seed, epoch in ((42, 1), (42, 2), (43, 1), (0, 1)):
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


# ---- corruptions: the operations of CIFAR-100-C again, in plain loops and other libraries -------------------


def plain_defocus(x, rng, radius, sigma):
    """A disk, blurred by a Gaussian, moves over the image."""
    squares = np.arange(-1, 2) ** 2
    disk = plain_blur(1.0 * (squares[:, None] + squares <= radius**2), sigma, 1 / sigma, "constant")
    x = np.pad(x, [(1, 1), (1, 1), (0, 0)], mode="reflect")
    total = sum(disk[i, j] * x[i : i + 32, j : j + 32] for i, j in np.ndindex(3, 3))
    return total / disk.sum() + 1e-9  # even areas stay, also truncated


def plain_brightness(x, rng, more):
    pixels = [colorsys.rgb_to_hsv(*pixel) for pixel in x.reshape(-1, 3)]
    return np.reshape([colorsys.hsv_to_rgb(h, s, min(v + more, 1)) for h, s, v in pixels], x.shape)


def plain_zoom(x, rng, end):
    images = [x]
    for factor in np.arange(1, end, 0.01):
        cut = math.ceil(32 / factor)
        size = round(cut * factor)
        places = (32 - cut) // 2 + np.linspace(0, cut - 1, size)[(size - 32) // 2 :][:32]
        read = functools.partial(np.interp, places, np.arange(32))
        images.append(np.apply_along_axis(read, 1, np.apply_along_axis(read, 0, x)))
    return np.mean(images, axis=0)


def plain_blur(x, sigma, cut, edge):
    """A Gaussian blur of the first two axes, a line at a time."""
    radius = int(cut * sigma + 0.5)
    kernel = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(-radius, radius + 1)]
    for axis in (0, 1):
        x = np.apply_along_axis(lambda line: np.convolve(np.pad(line, radius, mode=edge), kernel, "valid"), axis, x)
    return x / sum(kernel) ** 2


def plain_glass(x, rng, sigma, times):
    x = (plain_blur(x, sigma, 4, "edge") * 255).astype(np.uint8)
    for _ in range(times):
        up, left = rng.integers(0, 2, (2, 30, 30))
        for h, w in itertools.product(range(31, 1, -1), repeat=2):
            a, b = h - up[h - 2, w - 2], w - left[h - 2, w - 2]
            x[h, w], x[a, b] = x[a, b], x[h, w]  # copies, because x[h, w] on the right is a view
    return plain_blur(x / 255, sigma, 4, "edge")


def plain_fog(x, rng, thickness, decay):
    z, step, wobble = np.zeros((32, 32)), 32, 100
    while step > 1:
        h, draws = step // 2, rng.uniform(-(wobble**2), wobble**2, (3, 32 // step, 32 // step))
        diagonal, straight = ((h, h), (h, -h), (-h, h), (-h, -h)), ((h, 0), (-h, 0), (0, h), (0, -h))
        for draw, down, right, around in zip(draws, (h, 0, h), (h, h, 0), (diagonal, straight, straight)):
            for i, j in np.ndindex(draw.shape):
                r, c = i * step + down, j * step + right
                z[r, c] = sum(z[(r + a) % 32, (c + b) % 32] for a, b in around) / 4 + draw[i, j]
        step, wobble = h, wobble / decay
    z = (z - z.min()) / (z.max() - z.min())
    return (x + thickness * z[:, :, None]) * x.max() / (x.max() + thickness)


def plain_elastic(x, rng, alpha, sigma, affine):
    def read(x, rows, columns, mode):
        x = np.pad(x, [(9, 9), (9, 9), (0, 0)], mode=mode)
        r, c = np.floor(rows).astype(int), np.floor(columns).astype(int)
        down, right = (rows - r)[..., None], (columns - c)[..., None]
        upper, lower = ((1 - right) * x[r + k, c + 9] + right * x[r + k, c + 10] for k in (9, 10))
        return (1 - down) * upper + down * lower

    points = np.array([[26, 26], [26, 6], [6, 6]])  # column, row
    moved = points + rng.uniform(-32 * affine, 32 * affine, (3, 2))
    matrix = points.T @ np.linalg.inv(np.vstack([moved.T, np.ones(3)]))  # (2, 3), of column vectors
    rows, columns = np.mgrid[:32, :32]
    x = read(x, *np.tensordot(matrix, [columns, rows, 0 * rows + 1], 1)[::-1], "reflect")
    if alpha == 0:
        return x
    moves = 32 * alpha * plain_blur(rng.uniform(-1, 1, (32, 32, 2)), 32 * sigma, 3, "symmetric")
    return read(x, rows + moves[..., 1], columns + moves[..., 0], "symmetric")


def test_corrupt_equals_the_plain_operations():
    """At each of the five published strengths, but for rounding before the truncation."""
    elastic = (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)
    image = data.load_synthetic(train=False)[0][:1]
    x, box = image[0].numpy() / 255, TF.InterpolationMode.BOX
    pixels = image[0].permute(2, 0, 1).contiguous()  # (3, 32, 32)
    picture = TF.to_pil_image(pixels)
    for name, plain, strengths in (
        ("gaussian_noise", lambda x, rng, sigma: x + rng.normal(0, sigma, x.shape), (0.04, 0.06, 0.08, 0.09, 0.1)),
        ("shot_noise", lambda x, rng, photons: rng.poisson(photons * x) / photons, (500, 250, 100, 75, 50)),
        ("impulse_noise", lambda x, rng, share: np.where(rng.random(x.shape) < share, rng.random(x.shape) < 0.5, x),
         (0.01, 0.02, 0.03, 0.05, 0.07)),
        ("contrast", lambda x, rng, share: (1 - share) * x.mean((0, 1)) + share * x, (0.75, 0.5, 0.4, 0.3, 0.15)),
        ("brightness", plain_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
        ("jpeg_compression", lambda x, rng, quality: decode_jpeg(encode_jpeg(pixels, quality)).permute(1, 2, 0) / 255,
         (80, 65, 58, 50, 40)),
        ("pixelate", lambda x, rng, size: np.array(TF.resize(TF.resize(picture, [size] * 2, box), [32] * 2, box)) / 255,
         (30, 28, 27, 24, 20)),
        ("defocus_blur", plain_defocus, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
        ("zoom_blur", plain_zoom, (1.06, 1.11, 1.16, 1.21, 1.26)),
        ("glass_blur", plain_glass, ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))),
        ("fog", plain_fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
        ("elastic_transform", plain_elastic, elastic),
    ):
        for severity, strength in enumerate(strengths, start=1):
            rng = np.random.default_rng([0, data.CORRUPTIONS.index(name), severity, 0])
            strength = strength if isinstance(strength, tuple) else (strength,)
            expected = np.clip(np.asarray(plain(x, rng, *strength)), 0, 1) * 255
            apart = np.abs(data.corrupt(image, name, severity)[0].numpy().astype(int) - expected.astype(int))
            assert apart.max() <= 1 and (apart > 0).mean() < 0.005, (name, severity, apart.max(), (apart > 0).mean())


def test_corrupt_draws_by_seed_and_place():
    images = data.load_synthetic(train=False)[0][:4].clone()
    images[1] = images[0]
    before = images.clone()
    random = "gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "fog", "elastic_transform"
    assert len(data.CORRUPTIONS) == 12
    for name in data.CORRUPTIONS:
        found = data.corrupt(images, name, 3)
        assert found.dtype == torch.uint8 and torch.equal(found[:3], data.corrupt(images[:3], name, 3)), name
        assert torch.equal(found[0], found[1]) == (name not in random), name  # another place, other draws
        assert torch.equal(found, data.corrupt(images, name, 3, seed=1)) == (name not in random), name
    assert torch.equal(images, before)
    many = data.corrupt(images[:1].expand(502, 32, 32, 3), "impulse_noise", 5)  # more than one block
    assert len(many.unique(dim=0)) == 502


def test_corrupt_and_attack_refuse_other_images_and_arguments():
    images, labels = torch.arange(2 * 3072).byte().reshape(2, 32, 32, 3), torch.tensor([3, 4])
    array, attack = images.numpy(), functools.partial(data.attack, None)
    for given, expected in ((images, images), (array, images), (array[::-1], images.flip(0)), (array[1], images[1:])):
        assert torch.equal(data.as_pixels(given), expected)
    calls = [(data.corrupt, images, *wrong) for wrong in (("snow", 1), ("fog", "3"), ("fog", 0), ("fog", 6))]
    wrong = (labels.int(), 1), (labels[:1], 1), ([3, 4], 1), (labels, -1), (labels, math.nan), (labels, 1, 0)
    calls += [(attack, images, *arguments) for arguments in wrong]
    for x in (images / 255, array / 255, array.astype(int), images.char(), images.mT, images[None], images[0, 0], None):
        calls += [(data.as_pixels, x), (data.corrupt, x, "fog", 1), (attack, x, labels, 1)]
    for function, *arguments in calls:
        with raises(ValueError, msg=arguments):
            function(*arguments)


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


# ---- bad data and downloads --------------------------------------------------------------------------------


class Pickled:
    """Unpickled, it calls function(*arguments)."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


Payload = functools.partial(Pickled, open, str(SCRATCH / "pwned"), "w")  # makes a file, if somebody's code has run


def answer(content):
    """A response of urllib with these bytes; without a URL of its own, it is no redirection."""
    response = urllib.response.addinfourl(io.BytesIO(content), {}, None)
    response.length = len(content)
    return response


@contextlib.contextmanager
def small_archive():
    """(bytes, mock) of an archive of 20 training and 10 test images, which torchvision takes for the official one.

    The mock stands for urlopen, and answers every request with the archive.
    """
    old, archive = Pickled(warnings.warn, "dtype(): align should be passed as a boolean"), io.BytesIO()  # by Python 2
    files, sums = {"meta": pickle.dumps({"fine_label_names": []})}, {}
    for name, n in (("train", 20), ("test", 10)):
        files[name] = pickle.dumps({"data": np.zeros((n, 3072), np.uint8), "fine_labels": [*range(n)], "old": old})
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in files.items():
            member, sums[name] = tarfile.TarInfo(f"cifar-100-python/{name}"), hashlib.md5(content).hexdigest()
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    official = {f"{name}_list": [[name, sums[name]]] for name in ("train", "test")}
    official["meta"] = {"filename": "meta", "key": "fine_label_names", "md5": sums["meta"]}
    official["tgz_md5"] = hashlib.md5(archive.getvalue()).hexdigest()
    with unittest.mock.patch.multiple(torchvision.datasets.CIFAR100, **official):
        with replaced(urllib.request, "urlopen", side_effect=lambda request: answer(archive.getvalue())) as asked:
            yield archive.getvalue(), asked


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*") if not path.name.endswith(".lock"))


@not_on_windows
def test_data_are_found_up_to_two_levels_below():
    for place, found in (("", 1), ("cifar-100-python", 1), ("a", 1), ("a/b", 1), ("a/b/c", 0), (".hidden", 0)):
        top, folder = new_folder(f"below {place}"), new_folder(f"below {place}/{place}")
        (top / "0").symlink_to(top)
        for name in ("train", "test", "meta"):
            (folder / name).touch()
        assert data.find_cifar100(top) == (folder if found else None), place
    with replaced(os, "scandir", side_effect=PermissionError):
        assert data.find_cifar100(top) is None


def test_bad_data_folders():
    top, load = new_folder("bad data/below"), data.load_cifar100
    folder, archive = top / "cifar-100-python", top / "cifar-100-python.tar.gz"
    for empty in (top, top / "nowhere", Path(__file__), "~nosuchuser/x"):
        assert data.find_cifar100(empty) is None
        refused(load, empty, 2, f"no CIFAR-100 in {empty}", "--data-dir", "python train.py")
    with small_archive() as (content, _), warnings.catch_warnings():
        warnings.simplefilter("error")
        archive.write_bytes(content)
        assert data.find_cifar100(top) == folder
        refused(load, top, 2, f"no CIFAR-100 in {top}")  # only train.py may unpack it
        (_, labels), printed = quietly(load, top, False, True, "nonsense")
        assert labels.tolist() == list(range(10)) and not printed
        archive.unlink()
        assert str(folder) in quietly(load, top.parent)[1] and not quietly(load, top.parent)[1]  # said once
        for name in ("train", "test", "meta"):
            good = (folder / name).read_bytes()
            (folder / name).write_bytes(pickle.dumps(Payload()))
            for where, download in ((top, False), (folder, False), (top, True)):
                altered = f"{folder} is not the official CIFAR-100", "altered", "--data-dir"
                refused(functools.partial(load, download=download), where, 2, *altered)
            (folder / name).unlink()
            refused(load, top, 2, f"{folder} is not the official CIFAR-100", "missing")
            (folder / name).write_bytes(good)
    assert not (SCRATCH / "pwned").exists()


def test_bad_downloads():
    folder, url = SCRATCH / "download", "http://somewhere/any.tgz"
    load, ways_out = functools.partial(data.load_cifar100, folder, True, True), ("--data-dir", "--quick", "Internet")
    for answers, word in (
        (urllib.error.HTTPError(url, 503, "Service Unavailable", {}, None), "503"), (TimeoutError("timed out"), "timed"),
        (http.client.BadStatusLine("HTTP/1.0 9"), "HTTP/1.0 9"), (http.client.IncompleteRead(b"", 999), "999 more"),
        ([answer(b""), answer(b"<html>login</html>")], "corrupted"),
    ):  # fmt: skip
        with replaced(urllib.request, "urlopen", side_effect=answers):
            refused(load, url, 1, url, word, f"--data-url {data.MIRROR_URL}", *ways_out)
    for url, word in (("nonsense", "nonsense"), ("http://127.0.0.1:9/x", "refused"), (Path(__file__).as_uri(), "file:")):
        refused(load, url, 1, url, word, *ways_out)
    assert files_in(folder) == []
    refused(functools.partial(data.load_cifar100, __file__, True, True), "nonsense", 1, "exists", "--data-dir")
    with replaced(data, "MIRROR_URL", "nonsense"):  # the mirror fails: the official server is named
        refused(load, "nonsense", 1, f"--data-url {data.ARCHIVE_URL}")


def test_download_works_also_after_an_interruption():
    folder, load, url = SCRATCH / "fetched", data.load_cifar100, "http://somewhere/any.tgz"
    with small_archive() as (_, asked), replaced(socket, "setdefaulttimeout") as timeout:
        with raises(Killed), replaced(os, "rename", side_effect=Killed):  # when all is unpacked
            quietly(load, folder, True, True, url)
        assert files_in(folder) == []
        (images, labels), printed = quietly(load, folder, False, True, url)
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):  # as if they were closed
            load(SCRATCH / "fetched again", True, True, url)
    assert images.shape == (10, 32, 32, 3) and labels.tolist() == list(range(10)) and labels.dtype == torch.int64
    assert files_in(folder) == ["cifar-100-python", "meta", "test", "train"]
    assert url in printed and f"--data-url {data.MIRROR_URL}\n" in printed and "\r" not in printed
    assert asked.call_count == 6  # torchvision asks for redirections first
    assert timeout.mock_calls == [unittest.mock.call(20), unittest.mock.call(None)] * 3  # seconds


@not_on_windows
def test_download_happens_once_and_without_locks_harms_nobody():
    folder, printed, meet, rename = new_folder("shared"), io.StringIO(), threading.Barrier(2), os.rename
    url = "http://somewhere/any.tgz"
    with small_archive() as (_, asked), ThreadPoolExecutor() as pool:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            with open(folder / ".cifar-100-python.lock", "w") as file:  # somebody else holds it
                assert utils.lock(file)
                found = [pool.submit(data.load_cifar100, folder, True, True, url) for _ in range(2)]
                deadline = time.monotonic() + 300
                while printed.getvalue().count("waiting") < 2 and time.monotonic() < deadline:
                    time.sleep(0.05)
                assert printed.getvalue().count("waiting") == 2 and not asked.called
            assert [len(one.result()[0]) for one in found] == [20, 20] and asked.call_count == 2
            with replaced(data, "lock", return_value=True), replaced(os, "rename") as together:
                together.side_effect = lambda *paths: meet.wait(300) + 1 and rename(*paths)  # both have downloaded
                found = [pool.submit(data.load_cifar100, SCRATCH / "unlocked", True, True, url) for _ in range(2)]
                assert [len(one.result()[0]) for one in found] == [20, 20]


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


def random_case(n=400, spread=3.0):
    """(logits (n, 100), labels) with about half of them right; rounded so that there are ties."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 100, n)
    logits = rng.normal(size=(n, 100)) + spread * (np.arange(100) == labels[:, None])
    return logits.round(1), labels


def run_of(logits, labels, seed=42, name="run", temperature=1.0, dataset="synthetic", **args):
    config = {"args": {"seed": seed, **args}, "dataset": dataset}
    return evaluate.Run(Path("nowhere"), config, name, logits, labels, temperature)


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
    run = run_of(logits, labels, temperature=2.0)
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
    assert np.allclose(together.probs[:, :2], 0.5) and together.correct.tolist() == [True, False]


def test_metrics_trust_against_loops():
    rng = np.random.default_rng(3)
    cases = [evaluate.Scores(*case) for case in (random_case(1000, 5.0), random_case(700, 5.0))]
    val, test = cases[0], evaluate.Scores(rng.normal(size=(500, 100)) + 6 * np.eye(100)[np.arange(500) % 100],
                                          np.arange(500) % 100)  # fmt: skip
    found = evaluate.trust(val, test)
    order = sorted(range(1000), key=lambda i: -val.confidence[i])
    right, threshold = 0, None
    for rank, i in enumerate(order, start=1):
        right += val.correct[i]
        if right >= 0.95 * rank:
            threshold = val.confidence[i]
    answered = [i for i in range(500) if test.confidence[i] >= threshold]
    assert found["answers"] == len(answered) / 500
    assert math.isclose(found["answers_accuracy"], np.mean([test.correct[i] for i in answered]))
    t = sorted(val.true_probability)[1001 - math.ceil(0.9 * 1001) - 1]
    sets = [[k for k in range(100) if test.probs[i, k] >= t] for i in range(500)]
    held = [test.labels[i] in sets[i] for i in range(500)]
    assert math.isclose(found["set_coverage"], np.mean(held))
    assert math.isclose(found["set_size"], np.mean([len(s) for s in sets]))
    assert math.isclose(found["set_worst_class"], min(np.mean(held[k::100]) for k in range(100)))
    coverage = []  # of calibrated probabilities: the label is drawn from them
    for _ in range(60):
        logits = rng.normal(size=(1200, 100)) * 3
        probs = np.exp(utils.log_softmax(logits))
        labels = (probs.cumsum(1) > rng.random((1200, 1))).argmax(1)
        parts = [evaluate.Scores(logits[part], labels[part]) for part in (slice(600), slice(600, None))]
        coverage.append(evaluate.trust(*parts)["set_coverage"])
    assert abs(np.mean(coverage) - 0.9) < 0.01, np.mean(coverage)
    eye, labels = 20.0 * np.eye(100), np.arange(100)
    wrong, few = evaluate.Scores(eye, (labels + 1) % 100), evaluate.Scores(eye[:99], labels[:99])
    assert evaluate.trust(evaluate.Scores(eye, labels), test)["answers"] is not None  # no error at all
    assert evaluate.trust(wrong, test)["answers"] == 0 and np.isnan(list(evaluate.trust(few, test).values())).all()


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
    """The image part from 4,000 resamples of the test images, the seed part as a t-test; also one recipe alone."""
    rng, n, t = np.random.default_rng(0), 500, {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
    weights = rng.multinomial(n, np.full(n, 1 / n), 4000) / n  # (draws, N)
    for sizes, of_runs in itertools.product(((2, 2), (2, 3), (3,)), (0.0, 0.1)):
        images, arms = rng.normal(size=n), []
        for size in sizes:
            arms.append(images + of_runs * rng.normal(size=(size, 1)) + rng.normal(size=(size, n)))
        draws = [weights @ arm.T for arm in arms]  # (draws, runs) of each recipe
        figures = draws[-1].mean(1) - (draws[0].mean(1) if len(arms) == 2 else 0)
        noise = sum((part - part.mean(1, keepdims=True)).var(0).sum() / (k * (k - 1)) for part, k in zip(draws, sizes))
        freedom = sum(sizes) - len(sizes)
        spread = sum(((arm.mean(1) - arm.mean()) ** 2).sum() for arm in arms) / freedom * sum(1 / k for k in sizes)
        half = math.sqrt(max(t[freedom] ** 2 * spread + 1.96**2 * max(0, figures.var() - noise), 1.96**2 * figures.var()))
        figure, found = evaluate.estimate(*arms)
        assert math.isclose(figure, figures.mean(), abs_tol=0.01) and abs(found / half - 1) < 0.12, (sizes, found, half)
    values = np.array([[0.1], [0.3], [0.8]])  # no images: a t-test of three values
    assert np.allclose(evaluate.estimate(values), [0.4, 4.303 * np.std(values, ddof=1) / math.sqrt(3)])
    assert evaluate.estimate(values[:1], values)[1] is None


def test_verdict_influence_values():
    """Their mean is the statistic, their variance over N that of its resamples."""
    logits, labels = random_case(2000)
    run, rng = run_of(logits + np.random.default_rng(1).normal(size=logits.shape) / 100, labels), np.random.default_rng(0)
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
    with raised(evaluate.Undecided, "needs 20 such images, there are 19"):
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


def test_verdict_figures_by_hand():
    labels, rng = np.arange(10_000) % 100, np.random.default_rng(0)
    with replaced(evaluate, "is_test_set", lambda labels: True):
        base, other = simulated_runs(labels, (1, 2), rng, sharper=1.5), simulated_runs(labels, (1, 3), rng, sharper=1.0)
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

    # No run is read on failures of its own seed: base 1 and other 1 on those of base 2; base 2 on base 1; other 3 on both.
    before = (on(base[0], base[1]) + on(base[1], base[0])) / 2
    after = (on(other[0], base[1]) + (on(other[1], base[0]) + on(other[1], base[1])) / 2) / 2
    small, surest = np.isin(labels, data.SMALL_ANIMALS), lambda run: np.argsort(-run.raw.confidence, kind="stable")[:5000]
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
        (("confident failures are doubtful images", "baseline"), *np.mean(doubtful, 0)),
    ):  # fmt: skip
        assert math.isclose(rows[text, name]["figure"], second - first, rel_tol=1e-6, abs_tol=1e-9), text
    row = rows["accuracy stays within 1 point", "changed"]
    assert set(row["runs"]) == {run.name for run in base + other}
    assert row["note"] == f"the interval {'includes' if row['ci95'][0] <= 0 <= row['ci95'][1] else 'excludes'} 0"
    other[0].stress = evaluate.Stress(*(part[:, :500] for part in other[0].stress))
    assert "with the same images" in verdict_of(base, other)["less accuracy lost to corruption", "changed"]["note"]


def test_verdict_what_has_no_figure_says_why():
    labels, rng = np.arange(1000) % 100, np.random.default_rng(0)
    sharp, mild = (simulated_runs(labels, [1, 2], rng, sharper=s) for s in (2.0, 0.2))  # mild: nothing above 0.90
    for (base, changed), key, note in (
        ((sharp[:1], mild[:1]), ("accuracy stays within 1 point", "changed"), ""),
        ((sharp[:1], mild[:1]), ("earlier failures less confident", "changed"), "needs baselines of two seeds"),
        ((mild, sharp), ("earlier failures less confident", "changed"), "needs 20 such images"),
        ((sharp, mild), ("less accuracy lost to corruption", "changed"), "needs --stress"),
        ((sharp, []), ("validation loss rises again", "baseline"), "needs the log.csv"),
        ((sharp, []), ("failures rely more on the border", "baseline"), "failures.py and gradcam.py"),
        ((sharp, []), ("confident failures are doubtful images", "baseline"), "test images of CIFAR-100"),
    ):
        row = quietly(verdict_of, base, changed)[0][key]
        assert note in row["note"] and row["ci95"] is None and row["word"] == "not decided", (key, row)
        assert (row["figure"] is None) == (row["note"] != "")
    for before, after, expected in ((0, 0.1, True), (0.1, 0.2, True), (0, 0.01, False), (0.1, 0.1, False)):
        arms = [[run_of(*random_case(200), smoothing=a)] for a in (before, after)]
        assert bool(evaluate.highest_target(*reversed(arms))) == expected, (before, after)


def test_verdict_reads_attention_of_this_checkpoint_only():
    logits, labels = random_case(10_000, spread=9.0)
    run = run_of(3 * logits, (labels + (np.arange(10_000) < 30)) % 100)  # 30 confident failures at least
    run.folder = run_from("attention")
    claim = next(claim for claim in evaluate.ABOUT_ONE if "border" in claim.text)
    failed, rows = np.flatnonzero(run.raw.failures), []
    matched = np.flatnonzero(run.raw.sure_hits)[: len(failed)]
    for group, index, period in (("failure", failed, 1), ("matched", matched, 3)):
        for pair, i in enumerate(index):  # every failure loses more at the border, every third match does
            row = {"pair": pair, "group": group, "index": i, "border_drop": 0.5 if pair % period == 0 else 0.1}
            rows.append(row | {"centre_drop": 0.3, "checkpoint": "checkpoint of attention"})
    other = [row | {"checkpoint": "abd"} for row in rows]
    strange = [row | {"index": 10_000} for row in rows]
    for content, word in ((other, "another best.pt"), (strange, "no such test image")):
        utils.write_csv(run.folder / "attention.csv", content)
        row, printed = quietly(evaluate.judge, claim, [run])
        assert word in printed and "left out" in printed and "gradcam.py" in row["note"]
    utils.write_csv(run.folder / "attention.csv", rows[:-1])
    share = np.mean(np.arange(len(failed) - 1) % 3 == 0)
    row = evaluate.judge(claim, [run])
    assert math.isclose(row["figure"], 1 - share)
    assert row["note"] == f"{len(failed)} of {len(failed)} failures measured"


# ---- stress --------------------------------------------------------------------------------------------------------


def without_drawing(main, *argv):
    """(result, what is printed) of main(argv), with dummies as pictures."""
    with replaced(utils, "save_figure", lambda path, draw, *args: Path(path).write_bytes(b"drawn")):
        return quietly(main, [str(arg) for arg in argv])


def within_79_columns(printed):
    """No line is longer, but for those with a path of this session."""
    return all(len(line) <= 79 for line in printed.splitlines() if str(SCRATCH) not in line)


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
    assert within_79_columns(printed) and printed.split("lost to corruption")[1] == report.split("lost to corruption")[1]
    preds, labels = np.load(runs[1] / "stress_preds.npy"), np.load(runs[1] / "test_labels.npy")
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
        with autocast():
            found = utils.predict(model, [data.normalize(shown)]).argmax(1).numpy()
        assert (preds[evaluate.CONDITIONS.index(condition)] == found).mean() > 0.98, condition
    refused(evaluate.main, [runs[0], "--stress", "--stress-images", "200"], 2, "100 images", "stress.csv")
    text, digest = listed.read_text(), utils.sha256(runs[1] / "best.pt")
    short, other = "\n".join(text.splitlines()[:2]) + "\n", np.load(runs[0] / "stress_preds.npy")
    for content, word in ((short, "1 conditions"), (text.replace(digest, "0" * 64), "another best.pt")):
        listed.write_text(content)
        printed = without_drawing(evaluate.main, *runs)[1]
        assert word in printed and "left out" in printed and "needs --stress" in printed, printed
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
        for accuracy in ((logits.argmax(1) == labels).mean(), np.trace(confusion) / confusion.sum(), of_classes):
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


def test_chain_evaluate_leaves_out_what_cannot_be_compared():
    """Empty folders, other labels, the same seed again, an unfinished run, a folder of runs: each with a word."""
    first, empty = copy_of_run("the first", "*.pt", "*.png"), new_folder("empty run")
    utils.write_json(empty / "config.json", json_of(first / "config.json"))
    refused(evaluate.main, [empty], 2, "python train.py")
    copies = [copy_of_run(name, "*.pt", "*.png") for name in ("its twin", "other labels", "unfinished")]
    for folder, change in zip(copies, ({}, {"seed": 43}, {"seed": 44})):
        config = json_of(folder / "config.json")
        config |= {"args": config["args"] | change, "finished": change != {"seed": 44}}
        utils.write_json(folder / "config.json", config)
    utils.write_npy(copies[1] / "test_labels.npy", (np.load(copies[1] / "test_labels.npy") + 1) % 100)
    utils.write_json(copies[1] / "metrics.json", {"sha256": {}})
    _, printed = without_drawing(evaluate.main, first, empty, *copies)
    for words in ("empty run has no saved epoch", "other labels was scored on other images", "its twin repeats the seed",
                  "unfinished stopped after epoch 3 of 3 (continue it with --resume)"):  # fmt: skip
        assert words in printed, printed
    assert "mean of" not in printed
    assert {claim["recipe"] for claim in json_of(first / "verdict.json")["claims"]} == {"the first"}
    holder = shutil.copytree(first, SCRATCH / "several/one").parent
    shutil.copytree(first, holder / "two/one")
    refused(evaluate.main, [holder], 2, "holds some", "several/one")
    _, printed = without_drawing(evaluate.main, holder / "one", holder / "two/one")
    assert "several/one" in printed and "two/one" in printed  # names that tell them apart
    shutil.copytree(chain()[0][0], SCRATCH / "with/runs/last")
    assert script(HERE / "evaluate.py", cwd=SCRATCH / "with").stdout.startswith("runs/last, which was trained last\n")


def test_chain_evaluate_files_scores_under_the_network_that_made_them():
    """Another best.pt moved in while logits are computed, or copied in from another run, is noticed."""
    run_dir, other = copy_of_run("moved", "*.npy", "*.png"), chain()[0][1] / "best.pt"
    (run_dir / "metrics.json").unlink()
    own, predict = utils.sha256(run_dir / "best.pt"), utils.predict

    def meddle(model, batches):
        shutil.copy(other, run_dir / "best.pt")
        return predict(model, batches)

    with replaced(utils, "predict", meddle):
        without_drawing(evaluate.main, run_dir, "--device", "cpu")
    assert json_of(run_dir / "metrics.json")["sha256"]["best.pt"] == own
    for module in (failures, evaluate):
        refused(module.main, [run_dir, *["--device", "cpu"] * (module is evaluate)], 2, "best.pt")
    refused(evaluate.main, [run_dir, "--device", "cpu"], 2, "belongs to another run", "config.json says")


def test_chain_report():
    """Each section, relative links to pictures that exist, commands for what is missing; without data or network."""
    baseline, smoothed = chain()[0]
    _, printed = quietly(evaluate.main, [baseline, smoothed])
    path = smoothed / "report.md"
    assert printed.splitlines()[-1] == f"report: {path}"
    report = path.read_text()
    sections = re.findall(r"^## (\d+)\. .* \(SYNTHETIC data\)$", report, re.M)
    assert sections == [str(k) for k in range(1, 12)] and "SYNTHETIC" in report.splitlines()[0]
    links = re.findall(r"!\[[^]]+\]\(([^)]+)\)", report)
    assert len(links) >= 7 and all((smoothed / link.replace("%20", " ")).exists() for link in links), links
    assert "--stress`" in report  # the section on stress names its command
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
    alone = copy_of_run("reported alone", "failures.csv", "gradcam.png", "*.pt")
    _, printed = without_drawing(evaluate.main, alone)
    text = (alone / "report.md").read_text()
    assert "not decided" not in printed and "A comparison needs" in printed
    for command in ("python failures.py", "python gradcam.py"):
        assert f"`{command} {utils.quote(alone.resolve())}`" in text, text
    before = path.read_bytes()
    without_drawing(evaluate.main, baseline, smoothed)
    assert path.read_bytes() == before  # no clock, no order of files in it
    twin = copy_of_run("twin", "*.pt", "*.png")
    config = json_of(twin / "config.json")
    utils.write_json(twin / "config.json", config | {"args": config["args"] | {"seed": 43}})
    _, printed = without_drawing(evaluate.main, baseline, twin, copy_of_run("changed", "*.pt", "*.png", number=1))
    text = (SCRATCH / "changed/report.md").read_text()
    assert "  mean of 2" in printed and "|   ensemble |" in text and "| control: another seed |" in text
    assert "Here there are 2 of baseline and 1 of changed." in text and "Here there are" not in report
    for header in re.findall(r"^\| in % \| accuracy \[95 %\] \| (.*) \|$", text, re.M):
        assert all(f"\n- {column}: " in text for column in header.split(" | ")), header


def test_chain_pictures_are_drawn_when_they_are_due():
    """If missing, or if the scores have changed; a failure to draw hides no number."""
    run_dir = copy_of_run("drawn", "*.pt")
    drawn = lambda: [call.args[0].name for call in save.call_args_list]  # noqa: E731
    (run_dir / "confusion.png").unlink()
    with replaced(utils, "save_figure") as save:
        quietly(evaluate.main, [run_dir])
    assert "confusion.png" in drawn() and "reliability.png" not in drawn()
    metrics = json_of(run_dir / "metrics.json")
    utils.write_json(run_dir / "metrics.json", metrics | {"accuracy": 0.5})
    with replaced(utils, "save_figure") as save:
        quietly(evaluate.main, [run_dir])
    assert {"confusion.png", "per_class.png", "reliability.png"} <= set(drawn())
    with replaced(evaluate, "draw_confusion", side_effect=RuntimeError("Failed to process string with tex")):
        _, printed = quietly(evaluate.main, [run_dir])
    assert "warning: no confusion.png: Failed to process string with tex" in printed and "accuracy [95 %]" in printed


@functools.cache
def published():
    """{name: Run} of results/, from a copy of this session's."""
    results = HERE / "results"
    if not results.exists():
        raise unittest.SkipTest("no published runs here")
    work = shutil.copytree(results, SCRATCH / "results")
    folders = sorted(path.parent for path in work.glob("*/config.json"))
    runs = {path.name: evaluate.read_run(*utils.open_run(path), path.name) for path in folders}
    for run in runs.values():
        run.stress = evaluate.read_stress(run)
    return runs


def test_published_runs_agree_with_themselves():
    """The commands of results/README.md, without data, change no published file; failures are those of the logits."""
    work = next(iter(published().values())).folder.parent
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    commands = re.findall(r"^python evaluate.py (.*)$", (work / "README.md").read_text(), re.M)
    with replaced(evaluate, "HERE", SCRATCH), replaced(evaluate, "load_dataset", None):
        for command in commands:
            without_drawing(evaluate.main, *(work / Path(name).name for name in command.split()))
    changed = [path for path, content in before.items() if path.read_bytes() != content]
    assert commands and not changed, changed
    for run in published().values():
        listed = [int(row["index"]) for row in read_csv(run.folder / "failures.csv")]
        assert sorted(listed) == np.flatnonzero(run.raw.failures).tolist(), run.name


def test_published_numbers_in_readme():
    """Each row that begins with a published run is computed anew; other numbers of that section are in a report."""
    runs, readme = published(), (HERE / "README.md").read_text()
    columns = {
        "accuracy": lambda run: run.raw.correct.mean(),
        "no dup.": lambda run: run.raw.correct[~data.DUPLICATES].mean(),
        "F1": lambda run: run.values["macro_f1"],
        "confident errors": lambda run: run.raw.failures.mean(),
        "surest half": lambda run: evaluate.surest_half(run).mean(),
        "gap": lambda run: run.values["signed_gap"],
        "corrupted": lambda run: run.stress.correct[evaluate.KINDS == "corruption"].mean(),
        "answers": lambda run: run.trust["answers"],
    }
    section = readme.split("## What we found")[1].split("\n## ")[0]
    reports = "".join(path.read_text() for path in (HERE / "results").glob("*/report.md"))
    header, checked = [], 0
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        name = cells[0].strip("`")
        header = cells if cells[0] == "run" else header
        if name not in runs:
            known = re.findall(r"[-+]?\d+\.\d+", reports) + ["65.96", "65.88", "73.5", "0.1", "5.5"]
            unknown = [number for number in re.findall(r"[-+]?\d+\.\d+", line) if number not in known]
            assert not unknown, (line, unknown)
            continue
        same = [run for run in runs.values() if utils.recipe(run.config) == utils.recipe(runs[name].config)]
        for column, cell in list(zip(header, cells))[1:]:
            found = [100 * columns[column](run) for run in same] if column in columns else []
            spread = f" ± {np.std(found, ddof=1):.2f}" if len(found) > 1 else ""
            seeds = ", ".join(sorted(str(run.seed) for run in same))
            expected = f"{np.mean(found):.2f}{spread}" if found else seeds if column == "seeds" else cell
            assert cell == expected, (name, column, cell, expected)
            checked += column in columns
    assert checked > 20


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
    (baseline, smoothed), printed = chain()
    rows = read_csv(baseline / "failures.csv")
    logits, labels = np.load(baseline / "test_logits.npy"), np.load(baseline / "test_labels.npy")
    probs, other = np.exp(utils.log_softmax(logits)), np.load(smoothed / "test_logits.npy").argmax(1)
    wrong = [i for i in range(10_000) if probs[i].argmax() != labels[i] and probs[i].max() > 0.85]
    assert [int(row["index"]) for row in rows] == sorted(wrong, key=lambda i: (-probs[i].max(), i)) and len(wrong) > 10
    added = [f"smoothing0.1_{what}" for what in ("outcome", "predicted", "confidence")]
    assert list(rows[0]) == [*failures.COLUMNS, *added, "checkpoint"]
    for row in rows[:20]:
        i, pred = int(row["index"]), probs[int(row["index"])].argmax()
        assert row["true"] == f"synthetic_{labels[i]:02d}" and row["predicted"] == f"synthetic_{pred:02d}"
        assert row["true_probability"] == f"{probs[i, labels[i]]:.6g}" and row["confidence"] == f"{probs[i].max():.6g}"
        assert int(row["same_superclass"]) == (data.SUPERCLASS_OF[labels[i]] == data.SUPERCLASS_OF[pred])
        assert (row["smoothing0.1_outcome"] == "repaired") == (other[i] == labels[i]) and row["votes"] == ""
        assert row["checkpoint"] == utils.sha256(baseline / "best.pt")
    assert sum(row["representative"] == "1" for row in rows) == 3 and rows[0]["representative"] == "1"
    assert "any other run" in printed[3] and "people" not in printed[3] and within_79_columns(printed[3])
    assert f"next: python gradcam.py {utils.quote(baseline)}\n" in printed[3]
    preds, same = np.repeat([1, 2], 5), np.zeros(10, int)  # the rule, by hand
    assert failures.representative(np.arange(10), preds, np.arange(10), 3) == [0, 4, 9]
    assert failures.representative(np.arange(10), same, same, 3) == [0]  # one pair of classes


def test_failures_votes_and_other_runs_by_hand():
    """Whose label people doubt, and what a control and a changed run, in folders of one name, make of failures."""
    looked = [i for i in range(10_000) if data.votes(i) is not None]
    doubtful = next(i for i in looked if data.votes(i) == 2)
    failed = [9999, doubtful, *[i for i in looked if data.votes(i) == 3][:6]]  # at 9999 nobody looked
    (labels, *_), confidence, hits = wrong_images(), np.full(10_000, 0.6), [9998, looked[-1]]
    preds, (confidence[failed], confidence[hits]) = labels.copy(), (0.98 - np.arange(8) / 100, 0.95)
    preds[failed] = (labels[failed] + 1) % 100
    first, copied = (run_from(name, logits_of(preds, confidence), dataset="cifar100") for name in ("first", "copied"))
    there, now = preds.copy(), confidence.copy()
    there[failed[:3]], there[failed[3]], now[failed] = labels[failed[:3]], (labels[failed[3]] + 2) % 100, 0.5
    control, changed = (
        run_from(f"{name}/same", logits_of(there, now), dataset="cifar100", **args)
        for name, args in (("seed43", {"seed": 43}), ("changed", {"seed": 44, "smoothing": 0.1}))
    )
    with replaced(failures, "load_dataset", lambda *args, **more: data.load_synthetic(train=False)):
        assert {row["votes"] for row in find(first)[0]} == {None}  # other labels than those that people looked at
    official = replaced(failures, "is_test_set", lambda labels: True)
    with official, replaced(failures, "load_dataset", lambda *args, **more: data.load_synthetic(train=False)):
        rows, printed = find(first, "--compare", control, changed, copied)
        figure = drawn(failures.main, first, "--compare", control)
        assert len(drawn(failures.main, first, "--top", 7).axes) == 10 > len(figure.axes) == 5  # of eight; full rows
    for column, values in (
        ("index", failed),
        ("votes", [None, 2, *[3] * 6]),
        ("checkpoint", ["checkpoint of first"] * 8),
        ("seed43/same_outcome", ["repaired"] * 3 + ["another wrong class"] + ["same wrong class"] * 4),
        ("changed/same_predicted", [data.CLASS_NAMES[label] for label in there[failed]]),
        ("copied_outcome", ["same wrong class"] * 8),
    ):
        assert [row[column] for row in rows] == values, column
    assert np.allclose([rows[0]["confidence"], rows[0]["changed/same_confidence"]], [0.98, 0.5])
    share, fate = 50 * (data.votes(looked[-1]) < 3), "repaired: 3 of 8, same wrong class: 4, another wrong class: 1"
    for text in (
        f"1 of 8 have a label that fewer than three of five people confirm; of the confident hits {share:.1f} %",
        f"seed43/same control: the same recipe, another seed {fate} mean confidence: 94.5 % -> 50.0 %",
        f"changed/same {fate}", f"next: python evaluate.py {utils.quote(first)}",  # no best.pt for gradcam.py
    ):  # fmt: skip
        assert text in " ".join(printed.split()), printed
    assert printed.count("control") == 1  # a copy is none
    assert figure.get_suptitle().startswith("first: CIFAR-100 test images") and figure.get_figwidth() == 10
    images = data.load_synthetic(train=False)[0].numpy()
    for axes, row in zip(figure.axes, sorted(rows, key=lambda row: -row["representative"])):
        title = axes.get_title()
        assert (axes.images[0].get_array() == images[row["index"]]).all() and axes.title.get_fontsize() >= 9
        assert ("representative" in title) == (axes.title.get_color() != "black") == row["representative"]
        assert re.findall("label doubtful: .*", title) == ["label doubtful: 2 of 5 agree"] * (row["index"] == doubtful)
        for word in (row["true"], row["predicted"], f"image {row['index']}", f"other: {row['seed43/same_predicted']}"):
            assert word in title
    words = f"test image {doubtful}\ntrue: lion"
    assert gradcam.caption("cifar100", doubtful, "lion") == f"{words}\nlabel doubtful: 2 of 5 agree"
    assert gradcam.caption("synthetic", doubtful, "lion") == words
    assert not any("doubtful" in gradcam.caption("cifar100", i, "lion") for i in (9999, failed[2]))


def test_failures_nothing_to_show_is_no_error():
    run, other = run_from("sure/one"), run_from("sure/two words", seed=43)
    (run / "failures.png").write_text("of another threshold")
    typed = [str(run), "--threshold", "0.995", "--compare", str(other), "--data-dir", str(SCRATCH)]
    rows, printed = find(*typed)
    assert rows == [] and "nothing to show" in printed and not (run / "failures.png").exists()
    assert utils.read_csv(run / "failures.csv", "", "", dict.fromkeys(failures.COLUMNS, str)) == []
    command = shlex.split(printed.split("next: python failures.py ")[1])
    assert command == [*typed, "--threshold", "0.89"] and len(find(*command)[0]) == 10  # it works
    labels, _, confidence = wrong_images()
    assert "next" not in find(run_from("sure/all", logits_of(labels, confidence)))[1]  # no mistake at all


def test_failures_refuses():
    """Wrong flags change nothing. Without the images the list is written, and no older picture stays."""
    run, rolled = run_from("refusing/one"), run_from("refusing/rolled", labels=np.roll(wrong_images()[0], 1))
    for flags, *words in (
        (["--top", "0"], "--top 0"), (["--threshold", "nan"], "nan"), (["--device", "cpu"], "--device"),
        (["--compare", run], "different runs"), (["--compare", rolled], "rolled", "other images"),
    ):  # fmt: skip
        refused(failures.main, [run, *flags], 2, *words)
    assert not (run / "failures.csv").exists()
    refused(failures.main, [rolled], 2, "test_labels.npy differs from the data set", "evaluate.py")
    (run / "failures.png").write_text("older")
    with replaced(failures, "load_dataset", side_effect=ScriptError("no network", code=1)):
        refused(failures.main, [run], 1, "failures.csv is written", "failures.png", "no network")
    assert len(read_csv(run / "failures.csv")) == 9 and not (run / "failures.png").exists()
    with replaced(os, "access", lambda path, mode: Path(path) != rolled):  # as in /kaggle/input: only read
        refused(failures.main, [run, "--compare", rolled], 2, "other images")
        refused(failures.main, [rolled], 2, "cannot be written to")


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
    """Neither batch, mode, dtype nor a ReLU in place matters; nothing is left behind; what is no argument."""
    (model, images), targets = trained_like(), torch.arange(6)
    maps = gradcam.grad_cam(model, images, targets)
    single = [gradcam.grad_cam(model, images[n : n + 1], targets[n : n + 1]) for n in range(6)]
    assert torch.allclose(torch.cat(single), maps, rtol=1e-3, atol=1e-6)
    model.train().requires_grad_(False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(gradcam.grad_cam(model, images, targets), maps, atol=1e-6)
    with torch.inference_mode():
        assert torch.allclose(gradcam.grad_cam(model, images.clone(), targets.clone()), maps, atol=1e-6)
        unfit = make_model("resnet18", width=4)
    for dtype, near in ((torch.float64, 1e-5), (torch.float16, 2e-2)):
        found = gradcam.grad_cam(copy.deepcopy(model).to(dtype), images, targets)
        assert found.dtype == torch.float32 and torch.allclose(found, maps, atol=near * maps.abs().max()), dtype
    conv, fc, found = torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.Linear(5, 100), []
    for in_place in (True, False):  # it changes what was hooked
        layers = conv, torch.nn.ReLU(in_place), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), fc
        found.append(gradcam.grad_cam(torch.nn.Sequential(*layers), images, targets, "0"))
    assert torch.equal(*found)
    model.never, model.ignored = torch.nn.Conv2d(3, 3, 1), torch.nn.Conv2d(3, 3, 1)

    def run_ignored(module, inputs):  # nothing comes of it
        model.ignored(inputs[0])

    watch = model.conv1.register_forward_pre_hook(run_ignored)
    pixels, stranger = torch.zeros(6, 32, 32, 3, dtype=torch.uint8), trained_like()[0].layer4
    for arguments, word in (
        ((images, targets, "layer5"), "no layer layer5; its parts are conv1"), ((images, targets, None), "no layer"),
        ((images, targets, stranger), "no layer"), ((images, targets, "fc"), "no map"),
        ((images, targets, "never"), "on layer never"), ((images, targets, "ignored"), "on layer ignored"),
        ((pixels, targets), "data.normalize"), ((images * 128, targets), "data.normalize"),
        ((images, 3), "torch.tensor([3])"), ((images, targets[:5]), "targets"), ((images, targets.float()), "targets"),
        ((images, targets + 95), "outside 0..99"), ((images, targets - 1), "outside 0..99"),
    ):  # fmt: skip
        with raised(ValueError, re.escape(word)):
            gradcam.grad_cam(model, *arguments)
    with raised(ValueError, "outside torch.inference_mode"):
        gradcam.grad_cam(unfit, images, targets)
    watch.remove()
    assert model.training and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_gradcam_sanity_checks_by_hand():
    """Spearman's rho with ties; maps that ignore the class or the weights are told from maps that do not."""
    rows = torch.tensor([[1, 2, 3, 4], [1, 2, 2, 9], [5, 5, 5, 5]])
    others = torch.tensor([[10, 30, 20, 40], [4, 3, 1, 2], [1, 2, 3, 4]])
    # ranks 1 2.5 2.5 4 and 4 3 1 2: covariance (-1.5 * 1.5 + 0 + 0 + 1.5 * -0.5) / sqrt(4.5 * 5)
    assert np.allclose(gradcam.spearman(rows, others), [0.8, -3 / math.sqrt(4.5 * 5), math.nan], equal_nan=True)
    generator = torch.Generator().manual_seed(0)
    images, classes = torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8, generator=generator), torch.arange(8)
    for name in gradcam.SANITY_LAYER:
        (model, _), args = trained_like(name), {"model": name, "width": 8}
        sanity = gradcam.sanity_checks(model, args, images, classes)
        assert all(0 < rho < gradcam.SANITY_LIMIT for rho in sanity.values()), (name, sanity)
    for maps, *expected in (  # of another class, of other weights
        (lambda net, x, y, layer: x.abs().mean(1) * (-1 if net is model else 1), 1, 1),  # rho is -1 in one of them
        (lambda net, x, y, layer: x[:, int(net is model)], 1, None),
        (lambda net, x, y, layer: x[:, int(torch.equal(y, classes))], None, 1),
        (lambda net, x, y, layer: torch.ones(len(x), 8, 8), math.nan, math.nan),
    ):
        with replaced(gradcam, "grad_cam", maps):
            found = gradcam.sanity_checks(model, args, images, classes).values()
        for value, rho in zip(found, expected):
            assert value < 0.3 if rho is None else np.isclose(value, rho, equal_nan=True)


def test_gradcam_reads_any_image():
    """Upright, on white, the central square, 16 bits scaled; all else is one line, and starts no other program."""
    files, exif, read = new_folder("images/folder.png").parent, Image.Exif(), {}
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 60, 3), dtype=np.uint8))
    exact, exif[0x0112] = rgb.crop((14, 0, 46, 32)), 6
    still, turned = exact.convert("P"), exact.transpose(Image.Transpose.ROTATE_270)
    deep = Image.fromarray(np.linspace(1000, 60_000, 32 * 32).astype(np.uint16).reshape(32, 32))
    for name, image, options, expected in (
        ("square.png", rgb, {}, exact), ("turned.png", exact, {"exif": exif}, turned),
        ("turned.tif", exact, {"exif": exif}, turned), ("broken.png", exact, {"exif": b"Exif\0\0junk junk"}, exact),
        ("gray.png", rgb.convert("L"), {}, exact.convert("L").convert("RGB")), ("deep.png", deep, {}, None),
        ("clear.png", Image.new("RGBA", (32, 32), (255, 0, 0, 0)), {}, 255), ("ink.jpg", rgb.convert("CMYK"), {}, None),
        ("hole.png", still, {"transparency": still.getpixel((0, 0))}, None), ("some.gif", still, {}, None),
        ("dot.png", Image.new("RGB", (1, 1), (9, 9, 9)), {}, 9),
    ):  # fmt: skip
        image.save(files / name, **options)
        read[name] = gradcam.read_image(files / name)
        assert read[name].shape == (32, 32, 3) and read[name].dtype == np.uint8, name
        assert expected is None or (read[name] == np.asarray(expected)).all(), name
    values = read["deep.png"][..., 0]
    assert (read["hole.png"][0, 0] == 255).all() and values[0, 0] == 0 and 100 < values[16, 0] < 156  # not clipped
    good, postscript = (files / "square.png").read_bytes(), io.BytesIO()
    rgb.save(postscript, "EPS")
    Image.new("1", (10_000, 10_000)).save(files / "bomb.png")
    Image.new("F", (9, 9), math.nan).save(files / "nan.tif")
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 4  # in the pixels, where no EXIF block may be the excuse
    damaged = {"text.png": b"hello", "empty.png": b"", "short.png": good[:900], "photo.png": postscript.getvalue()}
    damaged["flipped.png"] = flipped
    for name, content in damaged.items():
        (files / name).write_bytes(content)
    with replaced(subprocess, "check_call", side_effect=Killed), replaced(subprocess, "Popen", side_effect=Killed):
        for name in (*damaged, "bomb.png", "folder.png", "missing.png", "nan.tif"):
            refused(gradcam.read_image, files / name, 2, name, "--image")
    refused(gradcam.read_image, "~nosuchuser/x.png", 2, "~nosuchuser")


def test_gradcam_pictures_show_what_they_say():
    """Maps on one scale for a row, the signed difference, another run's map on its own; the texts name the classes."""
    (model, _), images, names = trained_like(), data.load_synthetic(train=False)[0][:2], data.CLASS_NAMES
    other = trained_like(width=4)[0]
    preds, elsewhere = (gradcam.probabilities(net, images).argmax(1) for net in (model, other))
    labels = torch.stack([(preds[0] + 1) % 100, preds[1]])
    figure = gradcam.picture(model, images, labels.numpy(), captions=["a$b$", "second"], other=(other, "layer4"))
    grid = np.array(figure.axes).reshape(3, 5)
    x = data.normalize(images[:1])
    a, b, c = (gradcam.grad_cam(net, x, y[:1]) for net, y in ((model, preds), (model, labels), (other, elsewhere)))
    cams, lead = gradcam.upsample(torch.cat([a, b, c]).clamp(min=0)), gradcam.upsample(a - b)[0]
    tops = cams[:2].max(), cams[:2].max(), lead.abs().max(), cams[2].max()
    for axis, values, top in zip(grid[0, 1:], (*cams[:2], lead, cams[2]), tops):
        assert np.allclose(axis.images[0].get_array(), values / top.clamp(min=1e-12), atol=1e-5)
        assert axis.images[0].get_alpha() is None and axis.title.get_fontsize() >= 9  # no mixture with the image
    assert np.array_equal(grid[0, 0].images[0].get_array(), images[0]) and not grid[1, 2].images  # second: no mistake
    words = (r"a\$b\$", f"predicted: {names[preds[0]]}", f"true: {names[labels[0]]}", "rather than",
             f"other run: {names[elsewhere[0]]}")  # fmt: skip
    assert all(word in axis.get_title() for axis, word in zip(grid[0], words)) and figure.get_figwidth() == 10
    asked = gradcam.picture(model, images[0], target=7, layer=model.layer3)
    assert f"asked: {names[7]}" in asked.axes[1].get_title() and "Sequential, 8x8 cells" in asked.get_suptitle()
    assert asked._repr_png_()[1:4] == b"PNG"  # a notebook shows it
    assert gradcam.predict_image(model, images[0].numpy())[0][0] == names[preds[0]]
    for pixels in (images / 255, images[0].numpy() / 255, images[:, :16], images[0].tolist()):  # plt.imread: floats
        for function in (gradcam.predict_image, gradcam.picture, gradcam.explain):
            with raises((ValueError, ScriptError), msg=function):
                function(model, pixels)
    for wrong in (labels[:1], labels + 100, [1.5, 2.5]):
        with raises(ValueError):
            gradcam.explain(model, images, wrong)


def test_chain_gradcam():
    """A row for each failure: the sum of a map is the logit without its bias. Other images go to other files."""
    baseline, smoothed = chain()[0]
    failed, explained = read_csv(baseline / "failures.csv"), read_csv(baseline / "gradcam.csv")
    assert [row["index"] for row in explained] == [row["index"] for row in failed]
    logits, bias = np.load(baseline / "test_logits.npy"), utils.load_model(baseline).fc.bias.detach()
    for row, own in zip(explained[:20], failed):
        assert row["checkpoint"] == own["checkpoint"]
        for name, column in (("confidence",) * 2, ("target_probability", "confidence"), ("true_probability",) * 2):
            assert math.isclose(float(row[name]), float(own[column]), abs_tol=1e-4), name
        for name, column in (("target", "map_sum"), ("true", "true_map_sum")):
            label = int(row[name][-2:])
            assert math.isclose(float(row[column]) + bias[label], logits[int(row["index"]), label], abs_tol=1e-3)
    before = {path: path.read_bytes() for path in baseline.iterdir()}
    flags = "--index 3 3 141 --layer layer3 --target synthetic_07 --compare".split()
    rows, printed = explain(baseline, *flags, smoothed)
    assert [row["index"] for row in rows] == [3, 141] and {row["target"] for row in rows} == {"synthetic_07"}
    assert rows[0]["layer"] == "layer3" and "sanity" not in printed and "next" not in printed
    new = sorted(path.name for path in baseline.iterdir() if path not in before)
    assert new == ["gradcam-index.csv", "gradcam-index.png"]
    assert all(path.read_bytes() == content for path, content in before.items())
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
        model, pixels = utils.load_model(run_dir), torch.full((1, 32, 32, 3), shade, dtype=torch.uint8)
        probs, best = model(data.normalize(pixels)).detach().softmax(1)[0].topk(5)
        assert [name for name, _ in top] == [f"synthetic_{label:02d}" for label in best]
        assert np.allclose([p for _, p in top], probs, atol=1e-6)
        assert all(f"{100 * p:5.1f} %  {name}" in printed for name, p in top)
    assert len(list(run_dir.glob("gradcam-0001-*.png"))) == len(list(run_dir.glob("gradcam*"))) == 2


def test_chain_attention():
    """The matches are correct, distinct, and as confident; the drops are those of the network, pixel by pixel."""
    baseline, printed = chain()[0][0], chain()[1][4]
    rows, listed = read_csv(baseline / "attention.csv"), read_csv(baseline / "failures.csv")
    columns = "pair group index true predicted confidence border_drop centre_drop checkpoint".split()
    assert list(rows[0]) == columns and {row["checkpoint"] for row in rows} == {utils.sha256(baseline / "best.pt")}
    failed, matched = ([row for row in rows if row["group"] == group] for group in ("failure", "matched"))
    for name in ("index", "true", "predicted", "confidence"):
        assert [row[name] for row in failed] == [row[name] for row in listed], name
    logits, labels = np.load(baseline / "test_logits.npy"), np.load(baseline / "test_labels.npy")
    picked = [int(row["index"]) for row in matched]
    assert [row["pair"] for row in failed] == [row["pair"] for row in matched] == [str(n) for n in range(len(failed))]
    assert len(set(picked)) == len(picked) and (logits.argmax(1) == labels)[picked].all()
    distance = [abs(float(own["confidence"]) - float(row["confidence"])) for own, row in zip(failed, matched)]
    alike = sum(own["predicted"] == row["predicted"] for own, row in zip(failed, matched))
    assert np.median(distance) < 0.01 and alike > len(matched) / 2
    model, row = utils.load_model(baseline), failed[0]
    image, target = data.normalize(data.load_synthetic(train=False)[0][[int(row["index"])]]), int(row["predicted"][-2:])
    border, centre = torch.zeros_like(image), image.clone()
    border[:, :, 4:28, 4:28] = image[:, :, 4:28, 4:28]
    centre[:, :, 5:26, 5:26] = 0  # 441 pixels; the border has 448
    p, *hidden = model(torch.cat([image, border, centre])).softmax(1)[:, target].tolist()
    assert np.allclose([float(row["border_drop"]), float(row["centre_drop"])], [p - x for x in hidden], atol=1e-5)
    share = 100 * np.mean([float(row["border_drop"]) > float(row["centre_drop"]) for row in failed])
    assert f"{share:.1f} % of them" in printed and printed.count("sanity: ") == 2, printed
    assert within_79_columns(printed)
    assert printed.endswith(f"next: python evaluate.py {utils.quote(baseline)}\n")  # the report; nothing leads back
    # The nearest, each once, in the order of the failures; of one class if that is at most 0.02 further away.
    matches = [0.95, 0.94, 0.91], np.array([7, 8, 9]), [0.951, 0.935, 0.965, 0.84], np.array([5, 5, 7, 9])
    assert gradcam.match_on_confidence(*matches).tolist() == [2, 1, 0]


def test_chain_gradcam_without_failures_and_with_bad_ones():
    run_dir = copy_of_run("failing", "*.png", "gradcam.*", "last.pt")
    path, run = run_dir / "failures.csv", utils.quote(run_dir)
    text = path.read_text().strip()
    path.write_text("\ufeff" + text, encoding="utf-8")  # saved by a spreadsheet
    assert len(explain(run_dir)[0]) == len(text.splitlines()) - 1
    header, first, *_ = text.splitlines()
    path.write_text(header + "\n")
    rows, printed = explain(run_dir, "--data-dir", SCRATCH)
    assert rows == [] and "is empty" in printed and f"next: python evaluate.py {run} --data-dir" in printed
    again, (index, true, predicted, *_, digest) = f"python failures.py {run}", first.split(",")
    for content, *words in (
        ("hello", "failures.csv", again), (text.replace(",1,,", ",0,,"), "not a list of failures", again),
        (f"{header}\n{first}\n{first}\n", "not a list of failures", again),
        (f"{header}\n{first.replace(index, '10000', 1)}\n", "not a list of failures", again),
        (text.replace(digest, "0" * 64), "another best.pt", again),
        (text.replace(true, predicted), "does not fit this data set", f"evaluate.py {run}"),
    ):  # fmt: skip
        path.write_text(content)
        refused(gradcam.main, [run_dir], 2, *words)
    path.unlink()
    refused(gradcam.main, [run_dir], 2, "failures.csv", again)


# ---- reading -------------------------------------------------------------------------------------------------------


def saved(content, save=torch.save, **options):
    """The bytes that torch.save or np.save would write."""
    buffer = io.BytesIO()
    save(*((content, buffer) if save is torch.save else (buffer, content)), **options)
    return buffer.getvalue()


def test_bad_checkpoints():
    """Each with its word, in utils.load_model, which all scripts use; nothing in the file is run."""
    args = {"dataset": "synthetic", "width": 4, "seed": 42, "smoothing": 0.0, "lr": 0.0123456789}  # more than 6 digits
    run_dir, state = run_from("bad checkpoint", **args), resnet18(width=4).state_dict()
    checkpoint, bias = {"format": 1, "args": args, "epoch": 1, "model": state}, state["fc.bias"]
    good, zipped = saved(checkpoint), io.BytesIO()
    flipped = bytearray(good)
    flipped[good.index(bias.numpy().tobytes())] ^= 1  # torch.load does not notice
    torch.load(io.BytesIO(flipped), weights_only=True)
    with zipfile.ZipFile(io.BytesIO(good)) as archive, zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as smaller:
        for name in archive.namelist():
            smaller.writestr(name, archive.read(name))
    legacy = functools.partial(saved, _use_new_zipfile_serialization=False)
    strange = (
        b"", b"<!DOCTYPE html><html>" * 99, good[: len(good) // 2], saved(np.zeros(3), np.savez), legacy(checkpoint),
        legacy({"x": Payload()}), pickle.dumps(Payload()), saved(state), saved([1]), saved(checkpoint | {"args": None}),
    )  # fmt: skip
    table = [(content, "is not a checkpoint") for content in strange]
    table += [(flipped, "CRC"), (zipped.getvalue(), "compressed"), (saved(resnet18(width=4)), "asks to run")]
    changes = [
        ({"epoch": Payload()}, "asks to run"), ({"format": 2}, "another version"), ({"model": {}}, "another network"),
        ({"model": {"fc.weight": 1}}, "no weights"), ({"args": args | {"width": 10**9}}, "another run"),
        ({"args": args | {"seed": 43}}, "another run (--seed 43, config.json says 42)"),
    ]  # fmt: skip
    for value, word in (
        (bias * math.nan, "NaN"), (torch.zeros(10), "fc.bias"), (bias.to_sparse(), "no weights"),
        (bias.to("meta"), "no weights"), (torch.zeros(1).expand(3 * 10**9), "no weights"),  # 12 GB
    ):  # fmt: skip
        changes.append(({"model": state | {"fc.bias": value}}, word))
    for content, word in table + [(saved(checkpoint | change), word) for change, word in changes]:
        (run_dir / "best.pt").write_bytes(content)
        refused(utils.load_model, run_dir, 2, word)
    (run_dir / "best.pt").unlink()
    refused(utils.load_model, run_dir, 2, "best.pt; run python train.py")
    for name in ("best.pt", "last.pt"):  # every script reads it in the same way
        (run_dir / name).write_bytes(saved({"x": Payload()}))
    refused(evaluate.main, [run_dir], 2, "best.pt", "asks to run")
    refused(gradcam.main, [run_dir, "--index", "1"], 2, "best.pt", "asks to run")
    refused(train.main, [*TINY, "--output-dir", run_dir, "--resume"], 2, "last.pt", "asks to run")
    assert not (SCRATCH / "pwned").exists()
    images, outputs = torch.randn(2, 3, 32, 32), []
    for model in (state, {key: value.half() if value.is_floating_point() else value for key, value in state.items()}):
        torch.save(checkpoint | {"model": model}, run_dir / "best.pt")
        outputs.append(utils.load_model(run_dir)(images).detach())
    assert torch.allclose(*outputs, atol=0.02)
    wide = args | {"width": 1024}  # 11 GB, were it made before the shapes are compared
    torch.save(checkpoint | {"args": wide}, run_from("bad checkpoint", **wide) / "best.pt")
    refused(utils.load_model, run_dir, 2, "another network")


def test_bad_logits():
    labels = data.load_synthetic(train=False)[1].numpy()
    logits = np.random.default_rng(0).normal(size=(10_000, 100)).astype(np.float32)
    run_dir = run_from("bad logits", logits, labels)
    good = {name: (run_dir / name).read_bytes() for name in ("test_logits.npy", "test_labels.npy")}
    giant = good["test_logits.npy"][:128].replace(b"(10000, 100), }      ", b"(10000000000, 100), }")  # 4 TB
    objects, row = np.array([Payload()], dtype=object), np.arange(10_000)[:, None]
    strange = b"", b"hello", pickle.dumps(Payload()), saved(objects, np.savez), giant, good["test_logits.npy"][:999_999]

    for name, contents in (
        ("test_logits.npy", (
            *((content, "is not the logits") for content in strange),
            (saved(objects, np.save, allow_pickle=True), "Object arrays"),
            (logits[:, :10], "(10000, 10)"), (logits[0], "(100,)"), (logits[:9999], "9999"), (logits[:0], "(0, 100)"),
            (logits.astype(complex), "complex"), (logits.astype(int), "int64"), (logits[:9].astype(str), "<U"),
            *((np.where(row == 77, bad, logits), "row [77]") for bad in (math.nan, math.inf, -math.inf)))),
        ("test_labels.npy", (
            (b"", "is not the labels"), (labels[:9999], "(9999,)"), (labels.astype(float), "float64"),
            (labels - 1, "0..99"), (labels + 1, "0..99"))),
    ):  # fmt: skip
        for content, word in contents:
            (run_dir / name).write_bytes(content if isinstance(content, bytes) else saved(content, np.save))
            for module in (failures, evaluate):
                refused(module.main, [run_dir], 2, name, word, "evaluate.py")
        (run_dir / name).write_bytes(good[name])
    assert not (SCRATCH / "pwned").exists()
    utils.write_json(run_dir / "metrics.json", {"sha256": {name: utils.sha256(run_dir / name) for name in good}})
    for name, other in (("test_logits.npy", logits[::-1]), ("test_labels.npy", labels[::-1])):
        utils.write_npy(run_dir / name, other)  # not that of metrics.json
        refused(failures.main, [run_dir], 2, name, "metrics.json was made from another", "evaluate.py")
        (run_dir / name).unlink()
        refused(failures.main, [run_dir], 2, f"no {run_dir / name}", "evaluate.py")
        (run_dir / name).write_bytes(good[name])
    found = utils.load_logits(run_dir, "test")
    assert (found[0] == logits).all() and (found[1] == labels).all()
    assert [array.dtype for array in found] == [np.float64, np.int64]


def test_bad_json_and_csv():
    """One line with the command that makes the file anew."""
    run_dir = copy_of_run("bad text", "*.png", "last.pt")
    for content in ("", "{", "[1]", '{"sha256": [1]}', '{"sha256": "abc"}', "{}", "\0", "\xff" * 99):
        (run_dir / "metrics.json").write_text(content, "latin-1")
        refused(failures.main, [run_dir], 2, "metrics.json", f"python evaluate.py {utils.quote(run_dir)}")
    bad = [], {"smoothing": "x"}, {"seed": -1}, {"seed": True}, {"epochs": 1.5}, {"width": 10**9}, {"model": "vgg"}
    configs = [{"args": args, "dataset": "synthetic"} for args in bad]
    for content in ("", "{", [], {"args": {}}, {"args": {}, "dataset": "mnist"}, *configs):
        (run_dir / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
        for module in (evaluate, failures, gradcam):
            refused(module.main, [run_dir], 2, "config.json", "train.py")
    refused(utils.load_checkpoint, SCRATCH, 2, "cannot be read")  # a folder
    shutil.copy(chain()[0][0] / "config.json", run_dir / "config.json")
    shutil.copy(chain()[0][0] / "metrics.json", run_dir / "metrics.json")
    for name in ("log.csv", "attention.csv", "stress.csv"):  # each costs its own rows, and nothing else
        (run_dir / name).write_text("hello\n")
        printed = without_drawing(evaluate.main, run_dir)[1]
        assert re.search(rf"warning: .*{name} .*; left out", printed) and "accuracy [95 %]" in printed, printed
        (run_dir / name).unlink()


def test_bad_arguments():
    """Refused with the flag named, before any file is changed; train.py and failures.py have tables of their own."""
    run, missing = chain()[0][0], SCRATCH / "not made"
    before = {path: path.stat().st_mtime_ns for path in SCRATCH.rglob("*") if path.is_file()}
    with replaced(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"]):  # main() in a notebook
        assert train.parse_args(None).lr == 0.01
        for module in (evaluate, gradcam, failures):
            refused(module.main, None, 2, "no RUN given")
            refused(module.main, [missing], 2, "train.py")
    refused(evaluate.main, [run, missing], 2, "train.py")
    refused(evaluate.main, [run / "best.pt"], 2, "is a file")
    for module, *table in (
        (evaluate, ("--device cuda:77", "cuda:77"), ("--bins 3", "--bins"), ("--stress-images 150", "multiple of 100")),
        (gradcam, ("--device foo", "this machine has cpu"), ("--image https://example.org/cat.png", "example.org"),
         ("--index -1", "0..9999"), ("--index 10000", "0..9999"), ("--index abc", "abc"),
         ("--index 1 --image x.png", "not allowed"), (f"--index {' '.join(map(str, range(65)))}", "64"),
         ("--index 1 --target 100", "0..99"), ("--index 1 --target -1", "0..99"),
         ("--index 1 --target sinthetic_07", "synthetic_07"), ("--index 1 --layer layer5", "try layer4"),
         ("--index 1 --layer fc", "try layer4"), ("--image x.png --target true", "--target true")),
    ):  # fmt: skip
        for flags, word in table:
            refused(module.main, [run, *flags.split()], 2, word)
    assert before == {path: path.stat().st_mtime_ns for path in SCRATCH.rglob("*") if path.is_file()}


# ---- places --------------------------------------------------------------------------------------------------------


def test_places_errors_are_one_line_with_an_exit_status():
    saved = []

    def twice(argv):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)  # does not interrupt the clean-up
            saved.append("a checkpoint")

    for error, code, word in (
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1, "out of memory"),
        (RuntimeError("GET was unable to find an engine to execute this computation"), 1, "out of memory"),
        (RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"), 1, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), 1, "--batch-size"),
        (MemoryError(), 1, "out of memory"), (twice, 130, "stopped"), (KeyboardInterrupt("SIGTERM"), 143, "stopped"),
        (OSError(5, "Input/output error", "somewhere"), 1, "somewhere: Input"),
        (ScriptError("this; do that"), 2, "this; do that"), (ScriptError("gone \x1b[31m", 1), 1, "gone [31m"),
    ):  # fmt: skip
        printed, broken = io.StringIO(), unittest.mock.Mock(side_effect=error)
        with contextlib.redirect_stderr(printed), replaced(sys, "argv", ["some/where/train.py"]):
            with raised(SystemExit, f"^{code}$"):
                utils.run_script(broken)
        printed = printed.getvalue()
        assert word in printed and printed.startswith("train.py: error: ") and printed.count("\n") == 1, printed
    for bug in (ZeroDivisionError, RuntimeError):  # keeps its traceback
        with raises(bug):
            utils.run_script(unittest.mock.Mock(side_effect=bug("size mismatch")))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert saved


@not_on_windows
def test_places_programs():
    """An error is one line and an exit status; a closed pipe, as in `| head`, is quiet."""
    run, elsewhere = utils.quote(copy_of_run("as a program", "last.pt")), utils.quote(new_folder("no data"))
    offline = f"train.py --data-url http://127.0.0.1:9/x --data-dir {elsewhere} --output-dir {elsewhere}"
    error = "train.py: error: cannot get CIFAR-100"
    for call, code, start in ((offline, 1, error), (f"failures.py {run} --threshold 0.85 | true", 0, "")):
        done = subprocess.run(f'"{sys.executable}" {call}', shell=True, cwd=HERE, capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (code, code) and done.stderr.startswith(start), done


def test_places_old_torch_and_a_gpu_that_does_not_work():
    with replaced(torch, "__version__", "2.5.1"):
        refused(utils.select_device, "cpu", 2, "too old")
        refused(utils.load_checkpoint, "any", 2, "2.6")
    if not torch.cuda.is_available():
        with replaced(torch.cuda, "device_count", lambda: 1):  # as a P100: there, but no operation works
            refused(utils.select_device, "cuda", 1, "does not run this PyTorch", "--device cpu")


def test_places_writing():
    """A write that fails half-way leaves the old file; an equal file is left alone; six digits; no NaN."""
    target, full = SCRATCH / "kept.json", unittest.mock.Mock(side_effect=OSError(28, "No space left on device"))
    assert utils.write_json(target, {"old": 1})
    for name in ("replace", "fsync"):
        with replaced(os, name, full):
            refused(lambda argv: utils.write_json(target, {"new": 2}), [], 1, "No space left", "kept.json")
    assert json_of(target) == {"old": 1} and not list(SCRATCH.glob(".*.partial"))
    os.utime(target, (1, 1))
    assert not utils.write_json(target, {"old": 1}) and target.stat().st_mtime == 1
    values = [1 / 3, np.float32(2 / 3), math.nan, -math.inf, -1e-300 * 1e-300, np.int64(7), 123456789, 1234567.8, True]
    assert utils.write_json(target, {"a": values, "b": np.array([[0.1, 2e-9]])}) and target.stat().st_mtime > 1
    expected = [0.333333, 0.666667, None, None, 0.0, 7, 123456789, 1234570.0, True]
    assert json_of(target) == {"a": expected, "b": [[0.1, 2e-9]]} and "-0.0" not in target.read_text()
    utils.write_csv(SCRATCH / "some.csv", [{"x": 1 / 3, "y": None, "z": "a,b"}])
    assert (SCRATCH / "some.csv").read_text() == 'x,y,z\n0.333333,,"a,b"\n'
    (SCRATCH / "some.csv").write_text('\ufeffx,y,z\n0.333333,,"a,b"\n', "utf-8")  # a spreadsheet's mark of UTF-8
    assert read_csv(SCRATCH / "some.csv") == [{"x": "0.333333", "y": "", "z": "a,b"}]
    with replaced(os, "fsync", side_effect=OSError(22, "Invalid argument")):  # as on some network drives
        assert utils.write_json(target, {"new": 2}) and json_of(target) == {"new": 2}


@not_on_windows
def test_places_odd_streams_names_and_links():
    """A link to another disk stays a link; no terminal, none at all, one without the letters; control characters."""
    disk = new_folder("disk")
    (SCRATCH / "link.json").symlink_to(disk / "real.json")
    utils.write_json(SCRATCH / "link.json", {"x": 1})
    assert (SCRATCH / "link.json").is_symlink() and json_of(disk / "real.json") == {"x": 1}
    for stream in (None, unittest.mock.Mock(spec=["write", "flush"])):
        with replaced(sys, "stdout", stream):
            assert list(utils.track([1, 2], "thing")) == [1, 2]
    run = copy_of_run("训练 \x1b[31m red", "*.png", "*.pt")
    done = script("failures.py", run, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "\\u8bad" in done.stdout and "\x1b" not in done.stdout + done.stderr, done
    for function in (utils.open_run, utils.load_model):
        refused(function, "~nosuchuser/x", 2, "no ~nosuchuser/x/config.json")
    here, given, nothing = str(disk), unittest.mock.Mock(data_dir="given"), unittest.mock.Mock(data_dir=None)
    for remembered in (here, "~nosuchuser/x", "\0", "/proc/1/cwd/x", None):
        config = {"dataset": "cifar100", "args": {"data_dir": remembered}}
        assert utils.dataset_of(config, nothing)[1] == (here if remembered == here else "data"), remembered
        assert utils.dataset_of(config, given)[1] == "given"


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
figure, axes = utils.new_figure(3, 3)
utils.save_figure("figure.png", lambda: figure)
print(os.path.getsize("figure.png") > 5000)
"""
    colab = "module://matplotlib_inline.backend_inline"  # what `!python train.py` inherits, and may not have
    done = script("-B", "-c", program, cwd=SCRATCH, MPLBACKEND=colab)
    assert done.returncode == 0 and done.stdout == "True\n", done.stderr


# ---- runner --------------------------------------------------------------------------------------------------------


def run(names):
    """Run these tests, one thread each, and print a line for each; returns their outcomes."""
    torch.set_num_threads(1)
    outcomes = []
    for name in names:
        start, outcome, note = time.monotonic(), "passed", ""
        try:
            globals()[name]()
        except unittest.SkipTest as reason:
            outcome, note = "skipped", f": {reason}"
        except Exception:
            outcome, note = "failed", "\n" + traceback.format_exc()
        outcomes.append(outcome)
        print(f"{outcome:7} {time.monotonic() - start:6.1f} s  {name}{note}", flush=True)
    return outcomes


def main(patterns):
    """Run the tests whose names have one of the patterns in them, in two processes; returns the exit status."""
    tests = [name for name in globals() if name.startswith("test_")]
    tests = [name for name in tests if not patterns or any(pattern in name for pattern in patterns)]
    if not tests:  # --help, another flag, or a mistyped name
        print(__doc__)
        return 0 if "--help" in patterns else 2
    begin, parts = time.monotonic(), [name for name in tests if re.match("test_(model|train|data|corrupt)", name)]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        other = pool.submit(run, parts)
        outcomes = run([name for name in tests if name not in parts])  # these share the networks of chain()
        outcomes += other.result()
    passed, failed, skipped = map(outcomes.count, ("passed", "failed", "skipped"))
    print(f"{passed} passed, {failed} failed, {skipped} skipped in {utils.duration(time.monotonic() - begin)}")
    print("something does not work here: see above" if failed else "the installation works")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
