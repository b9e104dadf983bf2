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
import http.server
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import unittest.mock
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
os.environ["no_proxy"] = "127.0.0.1"  # the tests' servers are on this machine

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


def test_model_resnets_equal_torchvision():
    for name, parameters in (("resnet18", 11_220_132), ("resnet34", 21_328_292)):
        reference = getattr(torchvision.models, name)(num_classes=100)
        reference.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
        reference.maxpool = torch.nn.Identity()
        model = make_model(name)
        assert sum(p.numel() for p in model.parameters()) == parameters
        reference.load_state_dict(model.state_dict())
        images = torch.randn(4, 3, 32, 32)
        for training in (True, False):  # in training mode first, so that the running statistics change
            ours, theirs = model.train(training)(images), reference.train(training)(images)
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4), (name, (ours - theirs).abs().max())


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
    real = new_folder("real data/cifar-100-python").parent
    for given, name in (
        ("--seed 43 --width 16 --lr 0.1 --patience 0", "baseline-lr0.1-patience0-seed43-width16"),
        ("--smoothing 0.1 --epochs 12 --lr 0.1 --warmup-epochs 1.5", "smoothing0.1-epochs12-lr0.1"),
        ("--dataset synthetic --weight-decay 1e-3 --compile", "synthetic-baseline-weight-decay0.001-compile"),
        ("--device cpu --resume --val-size 10000", "baseline"), ("--cutmix 1 --mixup 0.2", "baseline-mixup0.2-cutmix1"),
        ("--model cct --lr 0.01", "baseline-lr0.01-modelcct"), ("--quick --dataset synthetic", "synthetic-quick"),
        ("--quick --smoothing 0.1 --lr 0.01", "quick-smoothing0.1-lr0.01"),
    ):  # fmt: skip
        assert train.parse_args([*given.split(), "--data-dir", real]).output_dir == str(Path("runs") / name), given
    modules = "data evaluate failures gradcam model train utils".split()
    assert not [name for name in modules if callable(vars(train).get(name))]  # `%run train.py` hides no module
    shown = script("train.py", "--help", COLUMNS="80").stdout
    assert max(map(len, shown.splitlines())) <= 79, shown
    for words in ("width 16, 10,000 images, 4 epochs, lr 0.1;", "AdamW: lr 1e-3, decay 0.05", "(default: 0.0005)"):
        assert words in " ".join(shown.split()), words


def test_train_takes_the_data_that_are_there():
    """--quick never downloads; a folder that was named is taken or refused, never left for another."""
    below, nowhere, empty = new_folder("below/some/cifar-100-python"), SCRATCH / "no such folder", new_folder("empty")
    for name in ("train", "test", "meta"):
        (below / name).touch()
    named = ["--data-dir", below.parent.parent]
    for given, dataset in (
        (["--quick"], "synthetic"), ([], "cifar100"), ([*named, "--quick"], "cifar100"), (named, "cifar100"),
        ([*named, "--dataset", "synthetic"], "synthetic"),
        (["--data-dir", nowhere, "--data-url", "http://127.0.0.1:9/x"], "cifar100"),
    ):  # fmt: skip
        with replaced(train, "find_cifar100", train.find_cifar100 if "--data-dir" in given else lambda folder: None):
            assert train.parse_args(given).dataset == dataset, given
    for folder, flags in itertools.product((nowhere, empty), (["--quick"], [], ["--quick", "--dataset", "cifar100"])):
        refused(train.main, [*flags, "--data-dir", folder], 2, "no CIFAR-100", str(folder), "--data-dir", "--quick")


def test_train_precision():
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    assert utils.select_precision("off", cpu)[0] is None
    refused(functools.partial(utils.select_precision, "fp16"), cpu, 2, "--amp fp16")
    refused(functools.partial(utils.select_precision, "bf16"), torch.device("mps"), 2, "--amp bf16")
    for name, capability, dtype in (
        ("Tesla T4", (7, 5), torch.float16), ("Tesla V100-SXM2-16GB", (7, 0), torch.float16),
        ("NVIDIA GeForce GTX 1660 Ti", (7, 5), None), ("NVIDIA T1000", (7, 5), None),  # as a T4 on paper, but NaN
        ("NVIDIA GeForce MX450", (7, 5), None), ("NVIDIA T500", (7, 5), None), ("NVIDIA GeForce MX550", (7, 5), None),
        ("Tesla P100-PCIE-16GB", (6, 0), None), ("NVIDIA A100", (8, 0), torch.bfloat16),
    ):  # fmt: skip
        known = replaced(torch.cuda, "get_device_capability", lambda device: capability)
        with known, replaced(utils, "device_name", lambda device: name):
            assert utils.select_precision("auto", gpu)[0] is dtype, name
            if capability == (7, 5):  # a T4 would emulate bfloat16
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
    assert all(0 <= lam <= 1 for alpha in (1e-9, 100) for lam, _ in data.mix_plan(1, 1, 99, alpha))


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


def same_run(run_dir, other=None):
    """Whether two runs have the same checkpoints and log, but for the clock and places."""
    other = other or undisturbed()
    readers = {"last.pt": utils.load_checkpoint, "best.pt": utils.load_checkpoint, "log.csv": read_csv}
    return all(bits_of(read(run_dir / name)) == bits_of(read(other / name)) for name, read in readers.items())


def fails_at(name, moment, error):
    """While this lasts, the error is raised just before or after a file of this name is moved into place."""
    replace = os.replace

    def fatal(source, target):
        if Path(target).name == name and moment == "before":
            raise error
        replace(source, target)
        if Path(target).name == name:
            raise error

    return replaced(os, "replace", fatal)


def interrupted_run(name, after="log.csv", words="stopped in epoch 2; last.pt holds epoch 1"):
    """A run that Ctrl-C stopped when this file had been written."""
    with fails_at(after, "after", KeyboardInterrupt):
        refused(train.main, command(name), 130, words)
    return SCRATCH / name


def change_last(run_dir, **changes):
    """Replace parts of its last.pt."""
    train.save_checkpoint(run_dir / "last.pt", utils.load_checkpoint(run_dir / "last.pt") | changes)


def make_older(run_dir):
    """Checkpoints as an earlier train.py left them, on a Mac: with places, not fused, momentum not channels_last."""
    shutil.copy(undisturbed() / "best.pt", run_dir)  # of the next epoch: it saved best.pt first, and was killed
    for file in ("last.pt", "best.pt"):
        content = utils.load_checkpoint(run_dir / file)
        for flag in utils.NEWER_FLAGS:
            del content["args"][flag]
        content["args"]["data_dir"] = "/home/somebody/data"
        if file == "last.pt":
            content["optimizer"]["param_groups"] = [{"fused": False, "lr": "x"}] * 3  # never read
            for state in content["optimizer"]["state"].values():
                state["momentum_buffer"] = state["momentum_buffer"].contiguous()
        train.save_checkpoint(run_dir / file, content)


def test_train_resume_is_the_same_run_bit_for_bit():
    """Killed where it hurts, before and after each file is moved into place, again and again; then continued."""
    last_before, last_after, best_after = ("last.pt", "before"), ("last.pt", "after"), ("best.pt", "after")
    for kills, flags, where in (
        ([last_before, last_after, last_before], "", "best.pt is missing"),  # the first last.pt alone
        ([best_after, ("log.csv", "before"), last_before], "", "after epoch 2"),
        ([last_after, last_before], "--model cct --mixup 0.4 --cutmix 1 --smoothing 0.1", "after epoch 1"),
    ):
        name, printed = f"killed {where} {flags}", io.StringIO()
        run_dir, again = SCRATCH / name, command(name, *flags.split(), "--resume")
        for file, moment in kills:
            with raises(Killed), fails_at(file, moment, Killed), contextlib.redirect_stdout(printed):
                train.main(again)
        for file in (".best.pt.123.partial", ".test_logits.npy.123.partial"):
            (run_dir / file).write_text("left behind by a kill while writing")
        if where == "after epoch 2":
            make_older(run_dir)
        done = script("train.py", *again)  # as after a real kill: nothing of the old process is left
        assert done.returncode == 0 and not done.stderr and where in printed.getvalue() + done.stdout, done
        assert same_run(run_dir, undisturbed(*flags.split())) and ("dominant" in done.stdout) == ("mixup" in flags)
        assert [path.name for path in run_dir.glob(".*.partial")] == [".test_logits.npy.123.partial"]  # not train.py's


def test_train_resume_refuses_what_is_not_its_own():
    """A last.pt or flags of another run, and values that a fused optimizer would read and write past their end."""
    run_dir = interrupted_run("mine")
    config, last, again = run_dir / "config.json", run_dir / "last.pt", command("mine", "--resume")
    good, before, checkpoint = last.read_bytes(), config.read_bytes(), utils.load_checkpoint(last)
    row, states = checkpoint["history"][0], checkpoint["optimizer"]["state"]
    momentum, scale = states[0]["momentum_buffer"], torch.amp.GradScaler("cpu").state_dict()
    tensors = torch.ones(1), momentum.double(), momentum.to_sparse(), momentum.to("meta"), "x", None
    for changes in (
        *({"optimizer": {"state": {**states, 0: {"momentum_buffer": tensor}}}} for tensor in tensors),
        *({"history": history} for history in ([], "x", [row, row], [row | {"val_acc": math.nan}], [{"epoch": 1}])),
        *({"scaler": scale | {"scale": value}} for value in (math.nan, 0.0, "x")), {"scaler": {"scale": 1.0}},
        {"optimizer": {"state": {}}}, {"optimizer": []}, {"setup": None}, {"finished": torch.ones(2)}, {"split": "x"},
    ):  # fmt: skip
        change_last(run_dir, **changes)
        with replaced(utils, "select_precision", lambda amp, device: (torch.float16, "for the GradScaler")):
            refused(train.main, again, 2, "last.pt to continue from")
        last.write_bytes(good)
    for change in ("--lr 0.2", "--seed 1", "--epochs 4", "--cutmix 1", "--amp off"):
        refused(train.main, [*again, *change.split()], 2, f"was started with {change.split()[0]}", change.split()[1])
    refused(train.main, command("mine"), 2, "--resume", "already holds a run")
    change_last(run_dir, split=1)
    refused(train.main, again, 2, "NumPy splits images")
    shutil.copy(run_dir / "best.pt", last)
    refused(train.main, again, 2, "weights only")
    last.unlink()
    refused(train.main, again, 2, "no last.pt")
    last.write_bytes(good)
    assert config.read_bytes() == before  # no refusal has changed anything
    shutil.copy(undisturbed("--smoothing", "0.1") / "best.pt", run_dir)  # last.pt's own epoch is the best so far
    change_last(run_dir, setup=checkpoint["setup"] | {"torch": "2.0", "numpy": "1"})
    _, printed = trained("mine", "--resume")
    assert printed.count("warning") == 1, printed
    for words in ("of another run", "written again", "after epoch 1", "torch was 2.0", "not be bit-identical"):
        assert words in printed, printed
    assert same_run(run_dir) and "already finished after epoch 3" in trained("mine", "--resume")[1]


def test_train_stops_early_tells_a_cpu_user_and_keeps_the_best():
    flags = "--epochs 999999 --patience 2 --lr 1e-9 --limit 44 --batch-size 4 --width 17".split()  # learns nothing
    run_dir, printed = trained("early", *flags)
    best, log = utils.load_checkpoint(run_dir / "best.pt"), read_csv(run_dir / "log.csv")
    accuracies = [float(row["val_acc"]) for row in log]
    assert best["epoch"] == len(accuracies) - 2 and f"in epoch {best['epoch']};" in printed
    assert best["val_acc"] == max(accuracies) == accuracies[best["epoch"] - 1]
    for hint in ("for a first look: python train.py --quick", "in 20 minutes a run: --width 16 --lr 0.1"):
        assert printed.count(hint) == 1, printed
    assert not set(best["args"]) & utils.PLACES  # a published checkpoint names nobody's folders
    assert train.best_of([{"epoch": 1, "val_acc": 0.5}, {"epoch": 2, "val_acc": 0.5}])["epoch"] == 1  # not better
    own = (run_dir / "best.pt").read_bytes()  # its weights are nowhere else, so a resume needs it
    for other in (undisturbed() / "best.pt", run_dir / "log.csv", None):
        (run_dir / "best.pt").write_bytes(other.read_bytes()) if other else (run_dir / "best.pt").unlink()
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
                lam, box = data.mix_plan(42, epoch + 1, 3, 0.5, 1.0)[i]
                before = batch.roll(1, 0)
                if box:
                    batch[:, :, box[0], box[1]] = before[:, :, box[0], box[1]]
                else:
                    batch = lam * batch + (1 - lam) * before
                targets = lam * targets + (1 - lam) * targets.roll(1, 0)
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
        assert abs(row["train_acc"] - hits / 300) < 0.011, mixing  # of the dominant label
        assert math.isclose(row["train_loss"], loss_sum / 3, rel_tol=1e-3)
        assert math.isclose(row["lr"], lr, rel_tol=1e-6)


def test_train_failures_are_one_line_and_save_nothing():
    """Divergence, at once or after the last loss; Ctrl-C; a full disk. The folder stays as good as empty."""
    argv = command("failed")
    refused(train.main, [*argv, "--lr", "1e30", "--momentum", "0.99"], 1, "diverged", "--lr")
    one_step = "--lr 1e30 --limit 100 --warmup-epochs 0".split()  # its weights blow up after its only loss
    refused(train.main, [*argv, *one_step], 1, "diverged", "--lr", "nothing was saved")
    refused(lambda loss: train.check_finite(loss, 2, 7), math.nan, 1, "--amp off", "step 7", "epoch 1")
    assert not list(interrupted_run("failed", "config.json", "stopped in epoch 1; nothing was saved").glob("*.pt"))
    with fails_at("last.pt", "before", PermissionError(13, "Permission denied")):
        refused(train.main, argv, 1, "last.pt", "Permission denied")


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
        run_dir, printed = trained("busy\x7f", "--resume")
    lines = printed.replace(str(run_dir)[:-1], "runs/smoothing0.1").splitlines()
    warnings = [text for text in lines if "warning: " in text]
    assert len(warnings) == 5 and max(len(text) for text in lines if text not in warnings) <= 79, printed
    assert "nothing to resume yet" in lines[0] and "SYNTHETIC" in lines[1] and "\x7f" not in printed, printed
    assert "wrote config.json, last.pt, best.pt to" in printed and precious.read_text() == "kept", printed
    config = json.loads((run_dir / "config.json").read_text())
    assert config["finished"] and Path(config["args"]["data_dir"]).is_absolute()


def test_train_curves_have_the_same_ranges_for_every_run():
    args = train.parse_args([*TINY, "--smoothing", "0.1", "--mixup", "1", "--epochs", "40"])
    for value in (0.1, 0.9):
        rows = [dict.fromkeys(train.COLUMNS, value) | {"epoch": epoch} for epoch in (1, 2)]
        loss, accuracy = train.draw_curves("a $run", args, rows).axes
        assert (loss.get_ylim(), accuracy.get_ylim(), loss.get_xlim()) == ((0, 4.7), (0, 100), (0.5, 40.5))
        labels = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in (loss, accuracy)]
        assert [names[0][21:] for names in labels] == ["smoothed", "dominant label"], labels


# ---- train: devices, processes -------------------------------------------------------------------------------------


@not_on_windows
def test_train_sigterm_and_a_second_process():
    """One line, what is kept, how to go on; 143. Meanwhile nobody else may train there. Ctrl-C: interrupted_run()."""
    run_dir, argv = SCRATCH / "terminated", command("terminated", "--epochs", "2000", "--patience", "0")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "train.py", *argv], cwd=HERE, **pipes)
    next(line for line in process.stdout if "1/2000" in line)  # the row of the first epoch
    refused(train.main, [*argv, "--resume"], 2, "another process is training")
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143 and stderr.count("\n") == 1, stderr
    assert "stopped in epoch" in stderr and "--resume" in stderr, stderr
    utils.load_checkpoint(run_dir / "last.pt")


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
    for flags in ("--nonsense", "--smooth 0.1", "--lr", "--amp fp16 --device cpu", f"--output-dir '{__file__}'"):
        refused(train.main, shlex.split(flags), 2, flags.split()[0])


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
        images, labels = data.load_cifar100("~/read only", train=False)
    parent.chmod(0o755)
    assert [path.name for path in parent.iterdir()] == ["cifar-100-python"]
    meta, test = (pickle.loads((source / name).read_bytes(), encoding="latin1") for name in ("meta", "test"))
    assert (images[7].permute(2, 0, 1).flatten().numpy() == test["data"][7]).all()
    assert labels.tolist() == test["fine_labels"]
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


# ---- corruptions: the operations of CIFAR-100-C again, in plain loops and other libraries -------------------


def plain_impulses(x, rng, share):
    hit, white = rng.random((2, *x.shape))
    return np.where(hit < share, white < 0.5, x)


def plain_defocus(x, rng, radius, sigma):
    """A disk, blurred by a Gaussian, moves over the image."""
    squares = np.arange(-1, 2) ** 2
    disk = plain_blur(np.where(squares[:, None] + squares <= radius**2, 1.0, 0.0), sigma, 1 / sigma, "constant")
    x = np.pad(x, [(1, 1), (1, 1), (0, 0)], mode="reflect")
    total = sum(disk[i, j] * x[i : i + 32, j : j + 32] for i, j in np.ndindex(3, 3))
    return total / disk.sum() + 1e-9  # even areas stay, also truncated


def plain_brightness(x, rng, more):
    pixels = [colorsys.rgb_to_hsv(*pixel) for pixel in x.reshape(-1, 3)]
    return np.reshape([colorsys.hsv_to_rgb(h, s, min(v + more, 1)) for h, s, v in pixels], x.shape)


def plain_jpeg(x, rng, quality):
    pixels = torch.from_numpy(x * 255).round().byte().permute(2, 0, 1)
    return decode_jpeg(encode_jpeg(pixels.contiguous(), quality)).permute(1, 2, 0).numpy() / 255


def plain_pixelate(x, rng, size):
    image, box = TF.to_pil_image((x * 255).round().astype(np.uint8)), TF.InterpolationMode.BOX
    return np.array(TF.resize(TF.resize(image, [size, size], box), [32, 32], box)) / 255


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
    x = image[0].numpy() / 255
    for name, plain, strengths in (
        ("gaussian_noise", lambda x, rng, sigma: x + rng.normal(0, sigma, x.shape), (0.04, 0.06, 0.08, 0.09, 0.1)),
        ("shot_noise", lambda x, rng, photons: rng.poisson(photons * x) / photons, (500, 250, 100, 75, 50)),
        ("impulse_noise", plain_impulses, (0.01, 0.02, 0.03, 0.05, 0.07)),
        ("contrast", lambda x, rng, share: (1 - share) * x.mean((0, 1)) + share * x, (0.75, 0.5, 0.4, 0.3, 0.15)),
        ("brightness", plain_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
        ("jpeg_compression", plain_jpeg, (80, 65, 58, 50, 40)),
        ("pixelate", plain_pixelate, (30, 28, 27, 24, 20)),
        ("defocus_blur", plain_defocus, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
        ("zoom_blur", plain_zoom, (1.06, 1.11, 1.16, 1.21, 1.26)),
        ("glass_blur", plain_glass, ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))),
        ("fog", plain_fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
        ("elastic_transform", plain_elastic, elastic),
    ):
        for severity, strength in enumerate(strengths, start=1):
            rng = np.random.default_rng([0, data.CORRUPTIONS.index(name), severity, 0])
            strength = strength if isinstance(strength, tuple) else (strength,)
            expected = np.clip(plain(x, rng, *strength), 0, 1) * 255
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
    for wrong in ((images, "snow", 1), (images, "fog", "3"), (images.float(), "fog", 1), (images.mT, "fog", 1)):
        with raises(ValueError):
            data.corrupt(*wrong)


# ---- bad data and downloads --------------------------------------------------------------------------------


class Payload:
    """Unpickled, it makes a file: the proof that somebody's code has run."""

    def __reduce__(self):
        return open, (str(SCRATCH / "pwned"), "w")


@contextlib.contextmanager
def serving(body, status=200, length=None):
    """(URL of a server on this machine, a mock that it calls once a request). length: what the header claims."""
    asked = unittest.mock.Mock()

    class Handler(http.server.BaseHTTPRequestHandler):
        log_message = asked  # the original prints a line

        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", str(length or len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):  # the client may hang up
                self.wfile.write(body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/cifar-100-python.tar.gz", asked
    server.shutdown()


@contextlib.contextmanager
def small_archive():
    """The bytes of an archive of 20 training and 10 test images, which data.py takes for the official one."""
    files, archive = {"meta": b"names"}, io.BytesIO()
    for name, n in (("train", 20), ("test", 10)):
        files[name] = pickle.dumps({"data": np.zeros((n, 3072), dtype=np.uint8), "fine_labels": list(range(n))})
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in (files | {"../../pwned": b""}).items():
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    content, sums = archive.getvalue(), {name: data.md5_of(part) for name, part in files.items()}
    official = {"FILES_MD5": sums, "ARCHIVE_SIZE": len(content), "ARCHIVE_MD5": data.md5_of(content)}
    with unittest.mock.patch.multiple(data, **official):
        yield content


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*") if not path.name.endswith(".lock"))


def test_bad_data_folders():
    folder = new_folder("bad data/cifar-100-python").parent
    refused(data.load_cifar100, folder, 2, "train (MD5 16019d7e3df5f24257cddd939b257f8d)", "--data-dir")
    for name in ("train", "test", "meta"):
        (folder / "cifar-100-python" / name).write_bytes(pickle.dumps(Payload()))
    refused(data.load_cifar100, folder, 2, "altered", "meta (MD5 7973b15100ade9c7d40fb424638fde48)")
    refused(data.load_cifar100, folder / "cifar-100-python", 2, "altered")
    (folder / "train").write_text("a stray file beside it")
    assert data.find_cifar100(folder) == (folder / "cifar-100-python").resolve()
    refused(data.load_cifar100, Path(__file__), 2, "is a file")
    assert not (SCRATCH / "pwned").exists()


def test_bad_downloads():
    folder = SCRATCH / "download"
    load = functools.partial(data.load_cifar100, folder, True)
    ways_out = "--data-dir", f"--data-url {data.MIRROR_URL}", f"MD5 {data.ARCHIVE_MD5}", "--quick", "Internet"
    for server, word in (
        (serving(b"", status=503), "503"),
        (serving(b"<html>login</html>"), "18 bytes"),
        (serving(b"cut short!", length=999), "10 bytes"),
        (serving(bytes(9_000_000)), "(1,0"),  # not read to its end
        (contextlib.nullcontext(("http://127.0.0.1:9/x", [])), "refused"),
        (contextlib.nullcontext(("nonsense", [])), "nonsense"),
    ):
        with server as (url, _), replaced(data, "ARCHIVE_SIZE", 1_000_000):
            refused(load, url, 1, url, word, *ways_out)
        assert files_in(folder) == []
    with replaced(data, "MIRROR_URL", "nonsense"):  # the mirror fails: the official server is named
        refused(load, "nonsense", 1, f"--data-url {data.ARCHIVE_URL}")


def test_download_works_also_after_an_interruption():
    folder, slow = SCRATCH / "fetched", io.StringIO()
    ticks = itertools.count(0, 30).__next__  # 30 s pass whenever somebody looks at the clock
    with small_archive() as content, serving(content) as (url, _), replaced(time, "monotonic", ticks):
        with raises(Killed), fails_at("cifar-100-python", "before", Killed), contextlib.redirect_stdout(slow):
            with replaced(data, "ARCHIVE_SIZE", 10**12):  # killed when all is unpacked
                data.load_cifar100(folder, True, url)
        assert files_in(folder) == [] and slow.getvalue().count(f"--data-url {data.MIRROR_URL}\n") == 1
        (images, labels), printed = quietly(data.load_cifar100, folder, False, url)
    assert images.shape == (10, 32, 32, 3) and labels.tolist() == list(range(10))
    assert files_in(folder) == ["cifar-100-python", "meta", "test", "train"]
    assert not list(SCRATCH.glob("**/pwned"))
    assert url in printed and "100% of 0 MB, 0.00 MB/s, 0 s left" in printed
    assert "--data-url" not in printed  # fast enough


@not_on_windows
def test_download_happens_once():
    """Two at a time, while somebody else holds the lock: the second finds what the first fetched."""
    folder, printed = new_folder("shared"), io.StringIO()
    with small_archive() as content, serving(content) as (url, asked), contextlib.redirect_stdout(printed):
        with ThreadPoolExecutor() as pool, open(folder / ".cifar-100-python.lock", "w") as file:
            assert utils.lock(file)
            found = [pool.submit(data.load_cifar100, folder, True, url) for _ in range(2)]
            deadline = time.monotonic() + 300
            while printed.getvalue().count("waiting") < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert printed.getvalue().count("waiting") == 2 and not (asked.called or any(one.done() for one in found))
    assert asked.call_count == 1 and [len(download.result()[0]) for download in found] == [20, 20]


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


def test_utils_wilson_interval_and_softmax():
    """An end p of the interval is 1.96 standard errors, its own sqrt(p (1 - p) / n), from the share."""
    for hits, n in ((3, 10), (0, 10), (10, 10), (59, 100), (1, 1)):
        for end in utils.wilson_interval(hits, n):
            assert math.isclose(abs(end - hits / n), 1.959964 * math.sqrt(end * (1 - end) / n), abs_tol=1e-7), (hits, n)
    ends = np.array([utils.wilson_interval(hits, n) for n in range(1, 200) for hits in (0, n)])
    assert 0 <= ends.min() and ends.max() <= 1  # not by rounding either: -0.0 % looks wrong
    logits = np.array([[0.0, math.log(3)], [1000.0, 1000.0], [-2000.0, 2000.0]])
    assert np.allclose(np.exp(utils.log_softmax(logits)), [[1 / 4, 3 / 4], [1 / 2, 1 / 2], [0, 1]])


def random_case(n=400, spread=3.0):
    """(logits (n, 100), labels) with about half of them right; rounded so that there are ties."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 100, n)
    logits = rng.normal(size=(n, 100)) + spread * (np.arange(100) == labels[:, None])
    return logits.round(1), labels


def run_of(logits, labels, seed=42, name="run", temperature=1.0, **args):
    config = {"args": {"seed": seed, **args}, "dataset": "synthetic"}
    return evaluate.Run(name, config, logits, labels, temperature, folder=Path("nowhere"))


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
    scores.confidence = scores.confidence.round(2)  # ties
    confidence, correct, wrong = scores.confidence, scores.correct, ~scores.correct
    ece = 0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)  # rounded: some lie on an edge of a bin
        if inside.any():
            ece += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert math.isclose(utils.calibration_error(confidence, correct), ece)
    assert utils.calibration_bins(np.array([0, 1e-9, 1 / 15, 0.0667, 1])).tolist() == [0, 0, 0, 1, 14]
    macro = utils.macro_scores(utils.confusion_matrix(labels, scores.pred, 100))
    pairs = [(a > b) + (a == b) / 2 for a in confidence[correct] for b in confidence[wrong]]
    risks = [wrong[confidence >= c].mean() for c in confidence]  # among the images at least as confident
    expected = dict(zip(("macro_precision", "macro_recall", "macro_f1"), macro)) | {
        "accuracy": correct.mean(), "nll": scores.nll.mean(), "aurc": np.mean(risks),
        "ece": ece, "auroc_failure": sum(pairs) / len(pairs),
        "errors_within_superclass": scores.same_superclass[wrong].mean(),
        "signed_gap": confidence.mean() - correct.mean(), "confident_errors": scores.failures.mean(),
        "mean_confidence": confidence.mean(), "top5_accuracy": scores.top5.mean(), "brier": scores.brier.mean(),
        "superclass_accuracy": scores.same_superclass.mean(),
    }  # fmt: skip
    found = evaluate.metrics(scores, labels, np.ones((1, len(labels))))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert math.isclose(found[name][0], value), name


def test_metrics_with_weights_are_those_of_repeated_images():
    logits, labels = random_case(1000)
    scores = evaluate.Scores(logits, labels)
    counts = evaluate.resample(labels)[:3]
    assert (counts.sum(1) == 1000).all() and len(set(map(bytes, counts))) == 3
    for row in counts:  # each class is drawn from its own images
        assert (np.bincount(labels, row, 100) == np.bincount(labels, minlength=100)).all()
    assert (evaluate.resample(labels)[:3] == counts).all()  # the same for all runs: paired
    weighted = evaluate.metrics(scores, labels, counts.astype(np.float32))
    for k, row in enumerate(counts):
        repeated = np.repeat(np.arange(1000), row)
        again = evaluate.Scores(logits[repeated], labels[repeated])
        for name, value in evaluate.metrics(again, labels[repeated], np.ones((1, 1000))).items():
            assert math.isclose(weighted[name][k], value[0], rel_tol=1e-4, abs_tol=1e-6), name


def test_metrics_closed_forms_against_simulation():
    rng = np.random.default_rng(0)
    confidence = rng.beta(4, 1, 5000)
    drawn = [utils.calibration_error(confidence, rng.random(5000) < confidence) for _ in range(300)]
    assert abs(evaluate.calibrated_ece(confidence) - np.mean(drawn)) < 3e-4
    labels, preds = rng.integers(0, 100, 3000), np.minimum(rng.poisson(30, 3000), 99)
    labels, preds = labels[labels != preds], preds[labels != preds]
    shares = []
    for _ in range(300):  # the wrong predictions permuted; one that is right by chance is no error
        dealt = rng.permutation(preds)
        wrong = dealt != labels
        shares.append((data.SUPERCLASS_OF[dealt] == data.SUPERCLASS_OF[labels])[wrong].mean())
    chance = evaluate.chance_within_superclass(utils.confusion_matrix(labels, preds, 100))
    assert abs(chance - np.mean(shares)) < 5 * np.std(shares) / math.sqrt(300) + 1e-4
    assert math.isnan(evaluate.chance_within_superclass(np.eye(100, dtype=int)))


def test_metrics_temperature():
    logits, labels = random_case(2000)
    nll_at = lambda z, t: -utils.log_softmax(z / t)[np.arange(2000), labels].mean()  # noqa: E731
    best = evaluate.fit_temperature(logits, labels)
    for factor in (1, 3, 0.2, 40):
        scaled = logits * factor
        t = evaluate.fit_temperature(scaled, labels)
        assert math.isclose(t, factor * best, rel_tol=1e-6)
        assert nll_at(scaled, t) < min(nll_at(scaled, 0.99 * t), nll_at(scaled, 1.01 * t))
    assert math.isclose(evaluate.fit_temperature(5.0 * np.eye(100), np.arange(100)), 0.01)  # no minimum: the bound
    run = run_of(logits, labels, temperature=2.0)
    assert math.isclose(run.values["nll_scaled"], nll_at(logits, 2.0)) and "accuracy_scaled" not in run.values


def test_metrics_extremes():
    """All right, all wrong, one image: no warning, and null where JSON would say NaN."""
    logits, labels = 20.0 * np.eye(100), np.arange(100)
    with np.errstate(all="raise", under="ignore"):
        perfect, hopeless = run_of(logits, labels).values, run_of(logits, (labels + 1) % 100).values
        single = run_of(logits[:1], labels[:1]).values
    assert perfect["accuracy"] == 1 == perfect["macro_f1"] and math.isnan(perfect["errors_within_superclass"])
    assert hopeless["accuracy"] == 0 == hopeless["macro_f1"] and hopeless["aurc"] == 1 == hopeless["confident_errors"]
    surest_is_wrong = evaluate.rank_by_confidence(np.array([0.9, 0.8]), np.array([True, False]), np.ones((1, 2)))
    assert np.allclose(surest_is_wrong, [[0.75], [0]])  # AURC, AUROC
    assert single["macro_recall"] == 0.01 and utils.rounded(perfect)["auroc_failure"] is None


def test_metrics_ensemble_by_hand():
    """The mean of the probabilities, which the mean of the logits is not."""
    labels, one, two = np.array([0, 1]), np.full((2, 100), -50.0), np.full((2, 100), -50.0)
    one[:, 0], two[:, 1] = 50, 10  # each sure of another class
    runs = [run_of(one, labels, temperature=40), run_of(two, labels, temperature=20)]
    together, extra = evaluate.ensemble(runs)
    assert np.allclose(np.exp(utils.log_softmax(together.logits))[:, :2], 0.5)
    scaled = np.mean([np.exp(utils.log_softmax(run.scaled_logits)) for run in runs], 0)
    assert np.allclose(np.exp(utils.log_softmax(together.scaled_logits)), scaled)
    assert (extra["disagreement"] == 1).all() and np.allclose(extra["mutual_information"], math.log(2))
    same, extra = evaluate.ensemble(runs[:1] * 3)
    assert (extra["disagreement"] == 0).all() and np.allclose(extra["mutual_information"], 0)
    assert same.values["accuracy"] == 0.5


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
        runs.append(run_of(logits, labels, seed, f"{better} {sharper} {seed}", temperature=2 * sharper))
    return runs


def recipes_of(baselines, changed):
    weights = evaluate.resample(baselines[0].labels)[:200]
    for run in baselines + changed:
        run.measure(weights)
    return evaluate.Recipes(baselines, changed, weights)


def verdict_of(recipes, **options):
    with replaced(evaluate, "RESAMPLES", len(recipes.weights)):
        rows, _ = quietly(functools.partial(evaluate.judge, recipes, **options))
    return {claim.text: (estimate, ends, word) for claim, estimate, ends, word in rows}


def test_verdict_is_right_on_simulated_runs():
    labels, rng = np.arange(1000) % 100, np.random.default_rng(0)
    null = verdict_of(recipes_of(simulated_runs(labels, (1, 2), rng), simulated_runs(labels, (1, 2), rng)))
    one_sided = [text for text in null if text not in ("errors stay inside superclasses", "small animals do worst")]
    assert sum(null[text][2] == "supported" for text in one_sided) <= 1, null
    base = simulated_runs(labels, (1, 2, 3), rng, kin=2.0, sharper=2.0)
    blunt = verdict_of(recipes_of(base, simulated_runs(labels, (1, 2, 3), rng, kin=2.0, sharper=1.4)))
    for text in ("earlier failures less confident", "over-confidence falls", "errors stay inside superclasses"):
        assert blunt[text][2] == "supported", (text, blunt[text])
    assert blunt["the same, temperature-scaled"][2] == "not decided"  # only the scale has changed
    worse = verdict_of(recipes_of(base, simulated_runs(labels, (1, 2, 3), rng, kin=2.0, sharper=2.0, better=-1.0)))
    assert worse["accuracy stays within 1 point"][2] == "contradicted" == worse["generalizes better (NLL, scaled)"][2]


def test_verdict_decides_by_the_interval():
    no, yes, never = "not decided", "supported", "contradicted"
    for ends, *words in (  # below 0, above 0, within a point of 0
        ((-2, -1), yes, never, never), ((1, 2), never, yes, never), ((0.011, 0.02), never, yes, never),
        ((-0.009, 0.009), no, no, yes), ((-0.011, 0.009), no, no, no), ((-0.02, 0.02), no, no, no),
    ):  # fmt: skip
        assert [evaluate.decide(ends, side) for side in ("below", "above", "within")] == words, ends
    for claim in evaluate.CLAIMS:  # what has to fall says so
        falls = any(word in claim.text for word in ("fewer", "less", "falls", "gap", "NLL", "worst", "the same"))
        assert claim.side == ("within" if "within" in claim.text else "below" if falls else "above"), claim.text


def test_verdict_intervals_cover_images_and_seeds():
    """The image noise is shrunk, not counted twice; Student's t with 2 degrees of freedom reaches over 4.303 errors."""
    draws = np.random.default_rng(0).normal(5, 1, 2000)
    for figure, of_images, error, degrees, half in ((0, draws, 0, 0, 1.96), (7, np.zeros(2000), 10, 2, 43.03)):
        low, high = np.quantile(evaluate.with_noise(figure, of_images, 0.0, error, degrees), [0.025, 0.975])
        assert abs((high - figure) / half - 1) < 0.08 and abs((figure - low) / half - 1) < 0.08, (low, high)
    for noise, error, expected in ((0.75, 3, 0.25 + 9), (0.75, 0, 1), (0.75, 0.5, 0.75 + 0.25)):  # of the variance
        found = evaluate.with_noise(0.0, draws, noise * draws.var(), error * draws.std(), 10**9)
        assert abs(found.var() / draws.var() / expected - 1) < 0.02, (noise, error)
    rows = np.random.default_rng(1).normal(size=(2, 2000))
    arm = evaluate.Arm(list(zip([0.1, 0.3], rows)))
    assert math.isclose(arm.image_noise, (rows - rows.mean(0)).var(1).sum() / 2)
    assert evaluate.Arm([(0.1, rows[0])]).image_noise == 0
    deviation, degrees = evaluate.spread([arm, evaluate.Arm(list(zip([1.0, 1.4], rows)))])
    assert degrees == 2 and math.isclose(deviation, math.sqrt((2 * 0.1**2 + 2 * 0.2**2) / 2))


def test_verdict_figures_by_hand():
    labels, rng = np.arange(1000) % 100, np.random.default_rng(0)
    base, other = simulated_runs(labels, (1, 2), rng, sharper=1.5), simulated_runs(labels, (1, 3), rng, sharper=1.0)
    rows = verdict_of(recipes_of(base, other))

    def on(run, picker):
        return run.raw.confidence[picker.raw.failures].mean()

    def means(of_run):  # of the baselines, and of the others
        return [np.mean([of_run(run) for run in arm]) for arm in (base, other)]

    # No run is asked about failures of its own seed: set 1 sees base 2 and other 3; set 2 sees base 1, other 1 and 3.
    first = on(other[1], base[0]) - on(base[1], base[0])
    second = (on(other[0], base[1]) + on(other[1], base[1])) / 2 - on(base[0], base[1])
    drops = [on(base[1], base[0]) - on(base[0], base[0]), on(base[0], base[1]) - on(base[1], base[1])]
    assert math.isclose(rows["earlier failures less confident"][0].control_value, np.mean(drops), rel_tol=1e-6)
    count = round(means(lambda run: (run.raw.confidence > 0.9).sum())[0])
    small, surest = np.isin(labels, data.SMALL_ANIMALS), lambda run: np.argsort(-run.raw.confidence)[:count]
    for text, (before, after) in (
        ("accuracy stays within 1 point", means(lambda run: run.raw.correct.mean())),
        ("calibration improves (gap)", np.abs(means(lambda run: run.values["signed_gap"]))),
        ("fewer errors at equal coverage", means(lambda run: (~run.raw.correct[surest(run)]).mean())),
        ("earlier failures less confident", (0, (first + second) / 2)),
        ("small animals do worst", [means(lambda run: run.raw.correct[part].mean())[0] for part in (~small, small)]),
    ):
        assert math.isclose(rows[text][0].figure, after - before, rel_tol=1e-6), text


def test_verdict_on_failures_of_equal_seeds_is_a_paired_t_test():
    """With seeds 1 and 2 in both recipes, one run of each is compared on either set: two differences, one degree."""
    labels, rng, caught = np.arange(1000) % 100, np.random.default_rng(0), []
    base, other = simulated_runs(labels, (1, 2), rng, sharper=1.5), simulated_runs(labels, (1, 2), rng, sharper=1.0)
    recipes, with_noise = recipes_of(base, other), evaluate.with_noise
    with replaced(evaluate, "with_noise", lambda *args: caught.append(args) or with_noise(*args)):
        evaluate.confidence_on_failures(recipes, "raw")
    (figure, _, image_noise, error, degrees) = caught[0]
    on, means = [], evaluate.weighted_mean  # the two differences, then in the resamples
    for picker, k in ((base[0], 1), (base[1], 0)):
        picked = picker.raw.failures
        difference = (other[k].raw.confidence - base[k].raw.confidence)[picked]
        on.append(np.array([difference.mean(), *means(difference, recipes.weights[:, picked])]))
    standard_error = np.std([values[0] for values in on], ddof=1) / math.sqrt(2)
    assert np.allclose([figure, error, degrees], [np.mean(on, 0)[0], standard_error, 1])
    assert math.isclose(image_noise, np.var((on[0] - on[1])[1:] / 2), rel_tol=1e-6)


def test_verdict_names_what_follows_by_construction():
    for before, after, expected in ((0, 0.1, True), (0.1, 0.2, True), (0, 0.01, False), (0.1, 0.1, False)):
        arms = [[run_of(*random_case(200), smoothing=a)] for a in (before, after)]
        control = evaluate.confident_errors_fall(recipes_of(*arms)).control
        assert ("highest target" in control) == expected, (before, after, control)


def test_verdict_needs_two_runs_of_each_recipe():
    labels, rng = np.arange(1000) % 100, np.random.default_rng(0)
    first, second = simulated_runs(labels, [1], rng, sharper=2.0), simulated_runs(labels, [1], rng, sharper=0.5)
    rows = verdict_of(recipes_of(first, second))
    assert {word for _, _, word in rows.values()} == {"not decided"} and rows["over-confidence falls"][1]
    assert "seed" in rows["over-confidence falls"][0].note
    assert rows["earlier failures less confident"][0].figure is None  # only one seed
    mild = simulated_runs(labels, [1, 2], rng, sharper=0.2)  # nothing is above 0.90
    both = first + mild[1:], simulated_runs(labels, [1, 2], rng, sharper=2.0)  # failures of seed 1 alone
    estimate, ends, word = verdict_of(recipes_of(*both))["earlier failures less confident"]
    assert ends and word == "not decided" and "two runs of each recipe" in estimate.note
    assert "50 are needed" in verdict_of(recipes_of(mild, second))["fewer errors at equal coverage"][0].note
    alone = verdict_of(recipes_of(mild, []))
    assert "accuracy stays within 1 point" not in alone and "errors stay inside superclasses" in alone
    assert "small animals do worst" not in verdict_of(recipes_of(mild, []), synthetic=True)


def test_verdict_peaks_are_those_of_the_other_runs():
    runs = [unittest.mock.Mock(folder=new_folder(f"curve {name}")) for name in "abc"]
    for run, curve in zip(runs, ([1, 5, 2, 3], [4, 1, 1, 2], [3, 1, 2, 1])):
        rows = [{"epoch": e, "val_acc": v / 10, "val_loss": -v / 10} for e, v in enumerate(curve, 1)]
        utils.write_csv(run.folder / "log.csv", rows)
    for column in ("val_acc", "val_loss"):
        estimate = evaluate.worse_after_peak(runs, column)
        # The others of a peak in epoch 1: 0.1 against 0.3. Those of b and c peak in 2: 0.1 against 0.2, and 0.1.
        assert math.isclose(estimate.figure, np.mean([-0.2, -0.1, 0.0])), estimate
        assert math.isclose(estimate.control_value, np.mean([1, 2, 2]))
    (runs[0].folder / "log.csv").unlink()
    (runs[1].folder / "log.csv").write_text("epoch,val_acc,val_loss\n")
    estimate, printed = quietly(evaluate.worse_after_peak, runs, "val_acc")
    assert estimate.figure is None and "left out" in printed


def test_verdict_reads_attention_of_this_checkpoint_only():
    logits, labels = random_case(1000, spread=9.0)
    run = run_of(3 * logits, (labels + (np.arange(1000) < 30)) % 100)  # 30 confident failures at least
    run.folder = run_from("attention")
    picked, rows = np.flatnonzero(run.raw.failures), []
    for pair, index in enumerate(picked):  # every failure loses more at the border, every third match does
        for group, border in (("failure", 0.5), ("matched", 0.5 if pair % 3 == 0 else 0.1)):
            row = {"pair": pair, "group": group, "index": index, "confidence": 0.95, "border_drop": border}
            rows.append(row | {"centre_drop": 0.3, "checkpoint": "checkpoint of attention"})
    recipes, matched = recipes_of([run], []), np.mean(np.arange(len(picked)) % 3 == 0)
    other = [row | {"checkpoint": "abd"} for row in rows]
    for content, word in ((other, "another best.pt"), (rows[:-2], "does not have all failures"), (rows, "")):
        utils.write_csv(run.folder / "attention.csv", content)
        estimate, printed = quietly(evaluate.attention_on_border, recipes)
        assert word in printed and (estimate.figure is None) == bool(word), printed
    assert math.isclose(estimate.figure, 1 - matched) and math.isclose(estimate.control_value, matched)
    assert "one baseline" in estimate.note


# ---- stress --------------------------------------------------------------------------------------------------------


def without_drawing(main, *argv):
    """(result, what is printed) of main(argv), with dummies as pictures."""
    with replaced(utils, "save_figure", lambda figure, path: Path(path).write_bytes(b"drawn")):
        return quietly(main, [str(arg) for arg in argv])


def within_79_columns(printed):
    """No line is longer, but for those with a path of this session."""
    return all(len(line) <= 79 for line in printed.splitlines() if str(SCRATCH) not in line)


def json_of(path):
    return json.loads(path.read_text())


def test_stress_attacks():
    """No change at eps 0; within the ball and 0..255; PGD at least as strong as FGSM; stronger with eps."""
    model = utils.load_model(chain()[0][0])
    images, labels = (part[:200] for part in data.load_synthetic(False))
    found = {}
    for steps, epsilon in itertools.product((1, 10), (0, 0.25, 2, 8)):
        attacked = evaluate.attack(model, images, labels, epsilon, steps, contextlib.nullcontext)
        assert abs((attacked - images.float()).abs().max() - epsilon) < 1e-4
        assert 0 <= attacked.min() and attacked.max() <= 255
        found[steps, epsilon] = (gradcam.probabilities(model, attacked).argmax(1) == labels).float().mean().item()
    clean = found[1, 0]
    assert clean == found[10, 0] > 0.3
    assert found[10, 8] < found[10, 2] < clean > found[1, 8] > found[10, 8] - 0.01, found


def test_chain_stress():
    runs = [copy_of_run("stressed", "*.png"), copy_of_run("stressed too", "*.png", number=1)]
    flags, listed = [*runs, "--stress", "--stress-images", "100", "--device", "cpu"], runs[1] / "stress.csv"
    effects = [unittest.mock.DEFAULT] * 3 + [KeyboardInterrupt] + [unittest.mock.DEFAULT] * (57 + 60)  # else itself
    with replaced(evaluate, "corrupt", wraps=evaluate.corrupt, side_effect=effects) as corrupt:
        with raises(KeyboardInterrupt):
            quietly(evaluate.main, flags)
        first = np.load(runs[0] / "stress_confidence.npy")
        assert np.isfinite(first[:4]).all() and np.isnan(first[4:]).all()  # clean and three corruptions
        _, printed = quietly(evaluate.main, flags)
    assert corrupt.call_count == 4 + 57 + 60  # what was complete is not measured again
    assert (np.load(runs[0] / "stress_confidence.npy")[:4] == first[:4]).all() and within_79_columns(printed)
    preds, labels = np.load(runs[1] / "stress_preds.npy"), np.load(runs[1] / "test_labels.npy")
    index = sorted(np.flatnonzero(labels == k)[0] for k in range(100))  # the first image of each class
    for row, pred in zip(read_csv(listed), preds):
        assert row["accuracy"] and abs(float(row["accuracy"]) - (pred == labels[index]).mean()) < 1e-5, row
    images, model, other = data.load_synthetic(False)[0][index], *map(utils.load_model, runs[::-1])
    dtype, _ = utils.select_precision("auto", torch.device("cpu"))
    autocast = functools.partial(torch.autocast, "cpu", dtype, enabled=dtype is not None)
    true = torch.from_numpy(labels[index])
    for condition, shown in (
        (("clean", "", 0), images), (("corruption", "fog", 3), data.corrupt(images, "fog", 3)),
        (("shift", "1 -1", 1), F.pad(images, (0, 0, 1, 1, 1, 1))[:, 2:, :-2]),
        (("fgsm", "", 2), evaluate.attack(model, images, true, 2, 1, autocast)),
        (("pgd", "", 1), evaluate.attack(model, images, true, 1, 10, autocast)),
        (("transfer", "", 8), evaluate.attack(other, images, true, 8, 10, autocast)),
    ):  # fmt: skip
        with autocast():
            found = utils.predict(model, [data.normalize(shown)]).argmax(1).numpy()
        assert (preds[evaluate.CONDITIONS.index(condition)] == found).mean() > 0.98, condition
    own = [row["accuracy"] for row in read_csv(runs[0] / "stress.csv") if row["kind"] == "transfer"]
    assert own == [""] * 4 and (runs[1] / "stress.png").exists()
    with replaced(evaluate, "StressTest", None):  # later calls show it from the files
        assert "stress, in %" in without_drawing(evaluate.main, *runs)[1]

    def claim_on(condition):
        claims = json_of(runs[1] / "verdict.json")["claims"]
        return next(claim for claim in claims if claim["claim"].startswith(f"more accurate under {condition}"))

    low, high = claim_on("corruption")["ci95"]
    assert high - low > 0.02  # also with one image of each class
    [transferred] = [row for row in read_csv(listed) if row["kind"] == "transfer" and row["strength"] == "1"]
    assert claim_on("PGD")["control_value"] == float(transferred["accuracy"])
    text, surrogate = listed.read_text(), utils.checkpoint_id(runs[0])
    listed.write_text(text.splitlines()[0] + "\n")  # cut short: left out, no traceback
    assert "left out" in without_drawing(evaluate.main, runs[1])[1]
    listed.write_text(text.replace(surrogate, "0" * 64))  # made against another network
    without_drawing(evaluate.main, *runs)
    assert claim_on("PGD")["figure"] is not None and claim_on("PGD")["control_value"] is None
    with replaced(evaluate, "corrupt", None):  # so only the transfer is measured again
        without_drawing(evaluate.main, *flags)
    assert surrogate in text and listed.read_text() == text
    listed.write_text(text.replace("CIFAR-100-C style", "CIFAR-100-C"))  # its rows are not those of the other run
    assert "it has other images than that of" in without_drawing(evaluate.main, *runs)[1]
    assert claim_on("corruption")["figure"] is None
    refused(evaluate.main, [runs[0], "--stress", "--stress-images", "200"], 2, "100 images", "--refresh")
    shutil.copy(chain()[0][1] / "best.pt", runs[0] / "best.pt")
    for module in (failures, gradcam):  # evaluate.py comes first, also for gradcam.py, whose list is outdated too
        refused(module.main, [runs[0]], 2, "best.pt has changed", "python evaluate.py")
    printed = without_drawing(evaluate.main, runs[0], "--device", "cpu")[1]
    assert "another best.pt" in printed and "logits of best.pt" in printed
    assert (np.load(runs[0] / "test_logits.npy") == np.load(chain()[0][1] / "test_logits.npy")).all()


def test_chain_stress_with_the_authors_images():
    run_dir, folder = copy_of_run("with CIFAR-100-C"), new_folder("cifar-c")
    labels = np.load(run_dir / "test_labels.npy")
    flags = "--stress --stress-images 100 --device cpu --cifar-c".split()
    for name, array, *words in (
        ("other", labels, "labels.npy", "zenodo"),
        ("labels", np.zeros(50_000, np.uint8), "other labels"),
        ("labels", np.tile(labels, 5), "gaussian_noise.npy"),
        ("gaussian_noise", np.zeros((5, 32, 32, 3), np.uint8), "gaussian_noise.npy"),
    ):
        np.save(folder / f"{name}.npy", array)
        refused(evaluate.main, [run_dir, *flags, folder], 2, *words)
    blocks = np.arange(50_000 * 4, dtype=np.uint32).view(np.uint8).reshape(50_000, 4, 4, 1)
    np.save(folder / "fog.npy", np.broadcast_to(blocks.repeat(8, 1).repeat(8, 2), (50_000, 32, 32, 3)))
    found = evaluate.read_cifar_c(folder, "fog", 2, np.array([3, 7]))
    assert (found[1, ::8, ::8, 0].numpy() == blocks[10_007, :, :, 0]).all()  # severity 2 starts at image 10,000


# ---- evaluate.py in the chain --------------------------------------------------------------------------------------


def test_chain_evaluate_writes_what_it_says():
    for run_dir in chain()[0]:
        metrics, rows = json_of(run_dir / "metrics.json"), read_csv(run_dir / "per_class.csv")
        logits, labels = np.load(run_dir / "test_logits.npy"), np.load(run_dir / "test_labels.npy")
        assert logits.shape == (10_000, 100) and logits.dtype == np.float32 and labels.dtype == np.int64
        assert (labels == data.load_synthetic(False)[1].numpy()).all()  # row i is test image i
        low, high = metrics["ci95"]["accuracy"]
        assert 0.05 < low < metrics["accuracy"] < high and "ece" not in metrics["ci95"]
        confusion, expected = np.load(run_dir / "confusion.npy"), np.zeros((100, 100))
        np.add.at(expected, (labels, logits.argmax(1)), 1)  # row true, column predicted
        assert (confusion == expected).all()
        val, best = evaluate.Scores(*utils.load_logits(run_dir, "val")), utils.load_checkpoint(run_dir / "best.pt")
        assert abs(val.correct.mean() - best["val_acc"]) < 0.01  # the validation images of its own split
        val_loss = float(read_csv(run_dir / "log.csv")[best["epoch"] - 1]["val_loss"])
        assert abs(val_loss - val.nll.mean()) < 0.05  # without smoothing
        of_classes = np.mean([float(row["accuracy"]) for row in rows])
        for accuracy in ((logits.argmax(1) == labels).mean(), np.trace(confusion) / confusion.sum(), of_classes):
            assert abs(accuracy - metrics["accuracy"]) < 1e-5 and len(rows) == 100
        temperature = evaluate.fit_temperature(*utils.load_logits(run_dir, "val"))  # not on the test images
        assert math.isclose(metrics["temperature"], temperature, rel_tol=1e-4)
        for name in ("confusion.png", "per_class.png", "reliability.png"):
            assert (run_dir / name).stat().st_size > 10_000
    claims = json_of(chain()[0][1] / "verdict.json")["claims"]
    assert set(claims[0]) == {"claim", "figure", "ci95", "word", "control", "control_value"}
    assert "SYNTHETIC" in chain()[1][2] and within_79_columns(chain()[1][2])
    assert "\r" not in "".join(chain()[1])  # no terminal: whole lines only


def test_chain_evaluate_passes_over_empty_folders_other_labels_and_the_same_seed_again():
    first, empty = copy_of_run("the first", "*.pt", "*.png"), new_folder("empty run")
    refused(evaluate.main, [empty], 2, "python train.py")
    twin, others = copy_of_run("its twin", "*.pt", "*.png"), copy_of_run("other labels", "*.pt", "*.png")
    utils.write_npy(others / "test_labels.npy", (np.load(others / "test_labels.npy") + 1) % 100)
    utils.write_json(others / "metrics.json", {"sha256": {}})
    _, printed = without_drawing(evaluate.main, first, empty, twin, others)
    assert "empty run has no saved epoch" in printed and "other labels was scored on other images" in printed
    assert "its twin repeats the seed" in printed and "mean of 2" not in printed
    assert json_of(first / "verdict.json")["baselines"] == ["the first"]


def test_readme_tables_are_what_evaluate_prints():
    """Every number of README's tables; and scoring the published runs again changes no published file."""
    readme, results = (HERE / "README.md").read_text(), HERE / "results"
    commands = re.findall(r"^python \.\./evaluate\.py (.*) --markdown$", readme, re.M)
    if not results.exists() or not commands:
        raise unittest.SkipTest("no published runs here")
    work = shutil.copytree(results, SCRATCH / "results")
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    shown = []
    for command in commands:
        runs = [run for pattern in command.split() for run in sorted(work.glob(pattern))]
        shown += [row for row in without_drawing(evaluate.main, *runs, "--markdown")[1].splitlines() if row]
    rows = re.findall(r"^\|(?! `| ?---| command | file ).*", readme, re.M)  # of the tables that evaluate.py prints
    claims = [claim.text for claim in evaluate.CLAIMS]
    for row in rows:
        assert any(row.startswith(line) for line in shown), row
    assert all(any(row.startswith(f"| {claim} |") for row in rows) for claim in claims) and len(rows) > 40
    assert {path: path.read_bytes() for path in before} == before


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


def run_from(path, logits=None, labels=None, **args):
    """An evaluated run by hand, without a best.pt; of wrong_images(), where nothing else is given."""
    true, *wrong = wrong_images()
    run_dir = new_folder(path)
    config = {"dataset": "synthetic", "args": {"smoothing": 0.0, "seed": 42} | args, "finished": True}
    utils.write_json(run_dir / "config.json", config)
    utils.write_npy(run_dir / "test_logits.npy", logits_of(*wrong) if logits is None else logits)
    utils.write_npy(run_dir / "test_labels.npy", true if labels is None else labels)
    utils.write_json(run_dir / "metrics.json", {"sha256": {"best.pt": f"checkpoint of {path}"}})
    return run_dir


find = functools.partial(without_drawing, failures.main)  # (rows, printed)
explain = functools.partial(without_drawing, gradcam.main, "--device", "cpu")  # the same


def test_chain_failures():
    (baseline, smoothed), printed = chain()
    rows = read_csv(baseline / "failures.csv")
    logits, labels = np.load(baseline / "test_logits.npy"), np.load(baseline / "test_labels.npy")
    probs, other = np.exp(utils.log_softmax(logits)), np.load(smoothed / "test_logits.npy").argmax(1)
    wrong = [i for i in range(10_000) if probs[i].argmax() != labels[i] and probs[i].max() > 0.85]
    assert [int(row["index"]) for row in rows] == sorted(wrong, key=lambda i: (-probs[i].max(), i)) and len(wrong) > 10
    own = "index true predicted confidence true_probability same_superclass representative"
    added = "outcome predicted confidence wrong_probability true_probability"
    assert list(rows[0]) == [*own.split(), *(f"smoothing0.1_{what}" for what in added.split()), "checkpoint"]
    for row in rows[:20]:
        i, pred = int(row["index"]), probs[int(row["index"])].argmax()
        assert row["true"] == f"synthetic_{labels[i]:02d}" and row["predicted"] == f"synthetic_{pred:02d}"
        assert row["true_probability"] == f"{probs[i, labels[i]]:.6g}" and row["confidence"] == f"{probs[i].max():.6g}"
        assert (row["smoothing0.1_outcome"] == "repaired") == (other[i] == labels[i])
        assert int(row["same_superclass"]) == (data.SUPERCLASS_OF[labels[i]] == data.SUPERCLASS_OF[pred])
        assert row["checkpoint"] == utils.sha256(baseline / "best.pt")
    assert sum(row["representative"] == "1" for row in rows) == 3 and rows[0]["representative"] == "1"
    what = "SYNTHETIC data test images that are wrong with confidence above 0.85 (wrong in all:"
    assert " ".join(printed[3].split()).startswith(f"baseline: {len(rows):,} {what}") and within_79_columns(printed[3])
    assert "any other run" in printed[3] and "next: python gradcam.py" in printed[3]  # no control: a word on it


def test_failures_representative_rule():
    labels, preds, same = np.arange(10), np.repeat([1, 2], 5), np.zeros(10, int)
    for failed, predicted, true, count, chosen in (
        (np.arange(10), preds, labels, 3, [0, 4, 9]),
        (np.arange(10), preds, labels, 1, [0]),
        (np.arange(10), same, same, 3, [0]),  # every failure of one pair: only one of them is shown
        (np.arange(0), preds, labels, 3, []),
    ):
        assert failures.representative(failed, predicted, true, count) == chosen


def test_failures_in_other_runs_by_hand():
    """What two controls and a changed run make of ten failures; every number of the output by hand."""
    labels, preds, confidence = wrong_images()
    first, controls = run_from("hand/first"), []
    for seed, repaired, elsewhere in ((43, [0, 1, 2], [3]), (44, [0, 1, 3], [])):
        there, now = preds.copy(), confidence.copy()
        there[repaired], there[elsewhere], now[:10] = labels[repaired], (labels[elsewhere] + 2) % 100, 0.5
        controls.append(run_from(f"hand/seed{seed}", logits_of(there, now), seed=seed))
    there, now = preds.copy(), np.minimum(confidence, 0.8)
    there[:5], there[10:15] = labels[:5], (labels[10:15] + 1) % 100  # five of the hundred are lost
    now[:10], now[10:15] = 0.4, 0.95  # most confident of all
    changed = run_from("hand/changed", logits_of(there, now), smoothing=0.1)
    copy = run_from("hand/copy")  # the same seed: no control
    rows, printed = find(first, "--threshold", "0.895", "--compare", controls[0], changed, controls[1], copy)
    for column, values in (
        ("index", list(range(10))),
        ("checkpoint", ["checkpoint of hand/first"] * 10),
        ("over_seeds", ["this seed only"] * 2 + ["some seeds", "this seed only"] + ["all seeds"] * 6),
        ("seed43_outcome", ["repaired"] * 3 + ["new wrong class"] + ["same wrong class"] * 6),
        ("changed_outcome", ["repaired"] * 5 + ["same wrong class"] * 5),
        ("changed_predicted", [f"synthetic_{k:02d}" for k in there[:10]]),
    ):
        assert [row[column] for row in rows] == values, column
    names = "confidence changed_confidence changed_true_probability changed_wrong_probability"
    assert np.allclose([rows[0][name] for name in names.split()], [0.99, 0.4, 0.4, 0.6 / 99])
    printed = " ".join(printed.split())
    for text in (
        "10 SYNTHETIC data test images",
        "seed43 (control) repaired: 3 of 10, 30.0 % [10.8, 60.3]",  # Wilson's interval of 3 in 10
        "mean confidence: 94.5 % -> 50.0 % confident failures of its own: 0,",
        "changed repaired: 5 of 10, 50.0 %",
        "newly wrong: 5 of 100 images that first gets right above the threshold, 5.0 % [2.2, 11.2]",
        "mean confidence: 94.5 % -> 40.0 %; in the control runs 94.5 % -> 50.0 %",
        "confident failures of its own: 5, 0 of them the same images",
        "smoothing 0.1 has no target above 0.901",
        "wrong among the 110 most confident images of each run: 10 -> 5",  # each by its own confidence
        "same mistake in all seeds: 6, some seeds: 1, this seed only: 3",
    ):
        assert text in printed, (text, printed)
    assert printed.count("no target above") == 1 and "copy (control)" not in printed
    assert "no target" not in find(first, "--threshold", "0.8", "--compare", changed)[1]  # far below the ceiling


def test_failures_nothing_to_show_is_no_error():
    run, other = run_from("sure/one"), run_from("sure/two words", seed=43)
    (run / "failures.png").write_text("of another threshold")
    rows, printed = find(run, "--threshold", "0.995", "--compare", other, "--data-dir", SCRATCH)
    assert rows == [] and "nothing to show" in printed and not (run / "failures.png").exists()
    assert (run / "failures.csv").read_text() == ",".join(failures.COLUMNS) + "\n"
    command = shlex.split(printed.split("next: python failures.py ")[1])
    given = [str(run), "--threshold", "0.995", "--compare", str(other), "--data-dir", str(SCRATCH)]
    assert command == [*given, "--threshold", "0.89"]
    rows, _ = find(*command)
    assert len(rows) == 10 and rows[0]["over_seeds"] == "all seeds"  # it works
    labels, preds, confidence = wrong_images()
    for mistakes, advice in ((4, "--threshold 0.95\n"), (0, "failures.csv to")):  # fewer than ten: all of them
        preds[mistakes:] = labels[mistakes:]
        rows, printed = find(run_from(f"sure/{mistakes}", logits_of(preds, confidence)), "--threshold", "0.995")
        assert rows == [] and advice in printed and ("next" in printed) == (mistakes > 0), printed


def test_failures_picture():
    labels, _, confidence = wrong_images()
    run, other = run_from("pictured/one"), run_from("pictured/two", logits_of(labels, confidence))
    with replaced(utils, "save_figure") as save:
        rows, printed = quietly(failures.main, [run, "--compare", other])
    assert "next" not in printed  # it has no best.pt, which gradcam.py needs
    (figure, path), images = save.call_args.args, data.load_synthetic(train=False)[0].numpy()
    title = figure.get_suptitle()
    assert path == run / "failures.png" and "one: SYNTHETIC data test images" in title and "two predicts" in title
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 9 and figure.axes.index(shown[3]) == 6  # the others begin on a new row
    for axes, row in zip(shown, sorted(rows, key=lambda row: -row["representative"])):
        assert (axes.images[0].get_array() == images[row["index"]]).all() and axes.title.get_fontsize() >= 9
        for word in (row["true"], row["predicted"], f"image {row['index']}", f"other: {row['two_predicted']}"):
            assert word in axes.get_title()


def test_failures_refuses():
    """Wrong flags change nothing. Without the images the list is written, and no older picture stays."""
    run, twin = run_from("refusing/one"), run_from("refusing/elsewhere/one")
    rolled = run_from("refusing/rolled", labels=np.roll(wrong_images()[0], 1))
    for flags, *words in (
        (["--top", "0"], "--top 0"), (["--top", "-1"], "--top -1"), (["--top", "25"], "--top 25"),
        (["--threshold", "1.5"], "--threshold 1.5"), (["--threshold", "nan"], "nan"), (["--device", "foo"], "foo"),
        (["--dataset", "cifar100"], "synthetic"), (["--control", run], "--control"), (["--compare", run], "different"),
        (["--compare", twin], "different names"), (["--compare", rolled], "rolled", "other images"),
        (["--compare", run / "nothing"], "config.json", "train.py"),
    ):  # fmt: skip
        refused(failures.main, [run, *flags], 2, *words)
    assert not (run / "failures.csv").exists()
    refused(failures.main, [rolled], 2, "test_labels.npy differs from the data set", "evaluate.py")
    (run / "failures.png").write_text("older")
    with replaced(failures, "load_dataset", side_effect=ScriptError("no network", code=1)):
        refused(failures.main, [run], 1, "failures.csv is written", "failures.png", "no network")
    assert len(read_csv(run / "failures.csv")) == 9 and not (run / "failures.png").exists()
    other = run_from("refusing/read-only")
    with replaced(os, "access", lambda path, mode: Path(path) != other):  # as in /kaggle/input
        assert find(run, "--compare", other)[0]  # only read
        refused(failures.main, [other, "--compare", run], 2, "cannot be written to")


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
    targets, features, rows = torch.tensor([0, 5, 5, 99, 42, 17]), {}, torch.arange(6)
    others = (targets + 50) % 100
    close = functools.partial(torch.allclose, rtol=1e-5, atol=1e-5)
    for name, layer in LAST_MAP.items():
        model, images = trained_like(name)
        maps, module = gradcam.grad_cam(model, images, targets, layer), getattr(model, layer)
        with torch.no_grad(), module.register_forward_hook(lambda module, inputs, output: features.update(out=output)):
            logits = model(images)
        assert maps.shape == (6, *features["out"].shape[2:]) and maps.dtype == torch.float32 and (maps < 0).any()
        cam = torch.einsum("nk,nkhw->nhw", model.fc.weight[targets], features["out"]) / maps[0].numel()
        assert torch.allclose(maps, cam, rtol=1e-5, atol=1e-6), name
        assert close(maps.sum((1, 2)) + model.fc.bias[targets], logits[rows, targets]), name
        margin = maps - gradcam.grad_cam(model, images, others, module)  # where one class's lead comes from
        lead = margin.sum((1, 2)) + model.fc.bias[targets] - model.fc.bias[others]
        assert close(lead, logits[rows, targets] - logits[rows, others]), name


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
    """Neither batch, mode nor a ReLU in place matters; nothing is left behind; what a wrong argument should be."""
    (model, images), targets = trained_like(), torch.arange(6)
    for layer in ("layer4", "layer3", "layer2.0", "conv1", "layer4.1.conv2"):
        together = gradcam.grad_cam(model, images, targets, layer)
        single = torch.cat([gradcam.grad_cam(model, images[n : n + 1], targets[n : n + 1], layer) for n in range(6)])
        assert torch.allclose(together, single, rtol=1e-3, atol=1e-6), layer
    maps = gradcam.grad_cam(model, images, targets)
    model.train().requires_grad_(False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(gradcam.grad_cam(model, images, targets), maps, atol=1e-6)
    conv, fc, found = torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.Linear(5, 100), []
    for in_place in (True, False):  # it changes what was hooked
        layers = conv, torch.nn.ReLU(in_place), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), fc
        found.append(gradcam.grad_cam(torch.nn.Sequential(*layers), images, targets, "0"))
    assert torch.equal(*found)
    pixels, stranger = torch.zeros(6, 32, 32, 3, dtype=torch.uint8), trained_like()[0].layer4
    for arguments, word in (
        ((images, targets, "layer5"), "no layer layer5; its parts are conv1"), ((images, targets, None), "no layer"),
        ((images, targets, stranger), "no layer"), ((images, targets, "fc"), "no map"),
        ((images, targets, ""), "no map"), ((pixels, targets), "data.normalize"),
        ((pixels.permute(0, 3, 1, 2), targets), "data.normalize"), ((images[0], targets), "data.normalize"),
        ((images.numpy(), targets), "data.normalize"), ((images * 128, targets), "data.normalize"),
        ((images, 3), "torch.tensor([3])"), ((images, targets[:5]), "targets"), ((images, targets.float()), "targets"),
        ((images, targets + 95), "outside 0..99"), ((images, targets - 1), "outside 0..99"),
    ):  # fmt: skip
        with raised(ValueError, re.escape(word)):
            gradcam.grad_cam(model, *arguments)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_gradcam_border_energy_spearman_and_matches_by_hand():
    maps = torch.zeros(5, 4, 4)
    maps[0], maps[1, 1, 1], maps[2, 0, 0], maps[3, 0, 1] = 1, 1, 1, 1
    maps[3, 2, 2] = -5  # negative cells do not count
    energy = gradcam.border_energy(maps)  # bilinear, each cell reaches over 16 pixels: a corner one loses 4 of 8 twice
    assert torch.allclose(energy[:4], torch.tensor([0.4375, 0, 0.75, 0.5]), atol=1e-6) and energy[4].isnan()
    rows = np.array([[1, 2, 3, 4], [1, 2, 2, 9], [5, 5, 5, 5]], float)
    others = np.array([[10, 30, 20, 40], [4, 3, 1, 2], [1, 2, 3, 4]], float)
    # ranks 1 2.5 2.5 4 and 4 3 1 2: covariance (-1.5 * 1.5 + 0 + 0 + 1.5 * -0.5) / sqrt(4.5 * 5)
    expected = [0.8, -3 / math.sqrt(4.5 * 5), math.nan]
    found = gradcam.spearman(torch.from_numpy(rows), torch.from_numpy(others))
    assert np.allclose(found, expected, equal_nan=True)
    # The nearest, each once, in the order of the failures; no more than there are; of one class if 0.02 allow it.
    for classes, candidates, candidate_classes, expected in (
        ([7, 7, 7], [0.5, 0.92, 0.949, 0.99], [7, 7, 7, 7], [2, 1, 3]),
        ([7, 7, 7], [0.5, 0.92, 0.949, 0.99], [8, 8, 8, 8], [2, 1, 3]),
        ([7, 7, 7], [0.93], [7], [0]),
        ([7, 8, 9], [0.951, 0.935, 0.965, 0.84], [5, 5, 7, 9], [2, 1, 0]),
    ):
        arrays = map(np.array, (classes, candidates, candidate_classes))
        assert gradcam.match_on_confidence([0.95, 0.94, 0.91], *arrays).tolist() == expected


def test_gradcam_occlusion_and_insertion_against_loops():
    """On a real network and image, pixel by pixel in the order of the map. The blur is torchvision's."""
    model, images = trained_like()
    images, classes = images[:2], torch.tensor([3, 5])
    maps = torch.rand(2, 32, 32, generator=torch.Generator().manual_seed(4))
    blank, start = torch.zeros_like(images), gradcam.blur(images)
    assert torch.allclose(start, TF.gaussian_blur(images, kernel_size=19, sigma=3.0), atol=1e-6)
    ends = [gradcam.probability(model, x, classes) for x in (images, blank, start)]
    assert np.allclose(ends[0], model(images).softmax(1)[[0, 1], classes].tolist(), atol=1e-6)
    border, centre = blank.clone(), images.clone()
    border[:, :, 4:28, 4:28] = images[:, :, 4:28, 4:28]
    centre[:, :, 5:26, 5:26] = 0  # 441 pixels; the border has 448
    drops = gradcam.occlusion_drops(model, images, classes, ends[0])
    for found, hidden in zip(drops, (border, centre)):
        assert torch.allclose(found, ends[0] - gradcam.probability(model, hidden, classes))
    areas = gradcam.insertion_minus_deletion(model, images, classes, maps, *ends[1:])
    for k in range(2):
        pixels = sorted(((maps[k, i, j].item(), i, j) for i in range(32) for j in range(32)), reverse=True)
        area = 0  # between the two curves, by trapezoids
        for canvas, source, sign in ((images[k].clone(), blank[k], -1), (start[k].clone(), images[k], 1)):
            curve = []
            for step in range(17):
                curve.append(gradcam.probability(model, canvas[None], classes[[k]]).item())
                for _, i, j in pixels[64 * step : 64 * step + 64]:
                    canvas[:, i, j] = source[:, i, j]
            area += sign * (sum(curve) - curve[0] / 2 - curve[16] / 2) / 16
        assert math.isclose(areas[k].item(), area, abs_tol=1e-6), (areas[k], area)


def test_gradcam_sanity_checks_tell_a_map_that_ignores_the_network_or_the_class():
    images = torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    classes, signs = torch.arange(8), torch.tensor([1, -1]).repeat(4)[:, None, None]
    for name, layer in gradcam.ATTENTION_LAYER.items():
        model, untrained = trained_like(name)[0], make_model(name, width=8).eval()
        check = lambda n=8: gradcam.sanity_checks(model, untrained, images[:n], classes[:n], layer)  # noqa: E731, B023
        sanity = check()
        assert list(sanity) == ["random_logit", "random_weights", "another_image"]
        assert all(0 < rho < gradcam.SANITY_LIMIT for rho in sanity.values()), (name, sanity)
        assert "The maps change when" in gradcam.sanity_in_words(sanity)
    assert math.isnan(check(1)["another_image"])  # a single map has no other
    pattern = lambda x: F.avg_pool2d(x.abs().mean(1), 4)  # noqa: E731
    noise = lambda x, seed: torch.rand(len(x), 8, 8, generator=torch.Generator().manual_seed(int(seed)))  # noqa: E731
    for maps, *expected in (  # of another class, of other weights
        (lambda net, x, y, layer: pattern(x), 1, 1),
        # the same pattern but for its sign: a mean of signed correlations would be 0
        (lambda net, x, y, layer: pattern(x) * (signs if net is model and torch.equal(y, classes) else 1), 1, 1),
        (lambda net, x, y, layer: noise(x, net is model), 1, None),
        (lambda net, x, y, layer: noise(x, y.sum()), None, 1),
        (lambda net, x, y, layer: torch.ones(len(x), 8, 8), math.nan, math.nan),
    ):
        with replaced(gradcam, "grad_cam", maps):
            sanity = check()
        for found, rho in zip(sanity.values(), expected):
            assert found < 0.3 if rho is None else np.isclose(found, rho, equal_nan=True)
        assert "support no claim" in gradcam.sanity_in_words(sanity)


def test_gradcam_attention_table_by_hand():
    same = dict.fromkeys(gradcam.FIGURES, 0.5) | {"border_energy": math.nan, "predicted": "wolf", "confidence": 0.95}
    same |= {"insertion_deletion_shuffled": 0.3, "insertion_deletion_other": 0.1}
    drops = np.tile([0.4, 0.9], 20)  # the border, always 0.5, matters more in half of the failures
    for others, words in (
        (np.tile([0.9, 0.4], 20), "gap between these two 15.0 15.0 +0.0 [-15.7, +15.7]"),  # 1.96 * 50.6 / sqrt(40)
        (np.full(40, 0.9), "images that lose more at the border 50.0 0.0 +50.0 ["),
        (drops - 0.2, "lost if the centre is hidden 65.0 45.0 +20.0 [+20.0, +20.0]"),
        (drops, "its cells shuffled 20.0 20.0 +0.0 [+0.0, +0.0] minus that of another image's map 40.0 40.0"),
        (drops[:20], "20 pairs, 20 of one predicted class, mean confidence gap 0.000"),
        (drops[:19], "19 pairs, 19 of one predicted class"), ([], "0 pairs, 0 of one predicted class"),
    ):  # fmt: skip
        centres = [("failure", drop) for drop in drops] + [("matched", drop) for drop in others]
        text = gradcam.attention_table([same | {"group": group, "centre_drop": drop} for group, drop in centres])
        few = len(others) < 20
        assert words in " ".join(text.split()) and within_79_columns(text), text
        assert ("Fewer than 20 pairs give no interval" in text) == few and ("[+" not in text) == few, text
    mean, low, high = gradcam.mean_interval(np.array([*range(25), math.nan], float))
    assert mean == 12 and math.isclose(high - mean, 1.96 * np.std(range(25), ddof=1) / 5) and low == 24 - high


def test_gradcam_reads_any_image():
    rng = np.random.default_rng(0)
    rgb, exif = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)), Image.Exif()
    exif[0x0112] = 6
    upright = Image.Exif()
    upright[0x0112] = 1
    exact = rgb.crop((14, 0, 46, 32))  # the central square of the first 32 rows
    wide = Image.fromarray(np.linspace(1000, 60_000, 32 * 32).astype(np.uint16).reshape(32, 32))
    still, read = exact.convert("P"), {}
    for name, image, options, words in (
        ("rgb.png", rgb, {}, "RGB 60x40;"), ("gray.png", rgb.convert("L"), {}, "L 60x40;"),
        ("palette.gif", rgb.convert("P"), {}, "P 60x40;"), ("cmyk.jpg", rgb.convert("CMYK"), {}, "CMYK 60x40;"),
        ("rotated.jpg", rgb, {"exif": exif}, "RGB 40x60, turned upright"),
        ("upright.jpg", rgb, {"exif": upright}, "RGB 60x40;"),
        ("rotated.tif", rgb, {"exif": exif}, "RGB 40x60, turned upright"),
        ("see-through.png", still, {"transparency": still.getpixel((0, 0))}, "P 32x32;"),
        ("clear.png", Image.new("RGBA", (32, 32), (255, 0, 0, 0)), {}, "RGBA 32x32;"),
        ("wide.png", wide, {}, "1000..60000"), ("dot.png", Image.new("RGB", (1, 1), (9, 9, 9)), {}, "RGB 1x1;"),
        ("frames.gif", rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}, "60x40, first of 2 frames;"),
        ("exact.png", rgb.crop((0, 0, 60, 32)), {}, "RGB 60x32;"),
    ):  # fmt: skip
        image.save(SCRATCH / name, **options)
        read[name], said = gradcam.read_image(SCRATCH / name)
        assert read[name].shape == (32, 32, 3) and read[name].dtype == np.uint8 and words in f"{said};", (name, said)
    assert (read["clear.png"] == 255).all() and (read["see-through.png"][0, 0] == 255).all()  # not the hidden colours
    assert np.array_equal(read["exact.png"], np.asarray(exact))
    values = read["wide.png"][..., 0]
    assert values[0, 0] == 0 and values[-1, -1] == 255 and 100 < values[16, 0] < 156  # not clipped to white


def test_gradcam_bad_images():
    files = new_folder("images/folder.png").parent
    Image.effect_noise((64, 64), 90).save(files / "good.png")
    Image.new("1", (10_000, 10_000)).save(files / "bomb.png")
    Image.new("F", (9, 9), math.nan).save(files / "nan.tif")
    good = (files / "good.png").read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 4
    damaged = {"text.png": b"hello", "empty.png": b"", "short.png": good[: len(good) // 2], "flipped.png": flipped,
               "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "paper.pdf": b"%PDF-1.4 ..."}  # fmt: skip
    for name, content in damaged.items():
        (files / name).write_bytes(content)
    for name in (*damaged, "bomb.png", "folder.png", "missing.png", "nan.tif"):
        refused(gradcam.read_image, files / name, 2, name, "--image")


def test_gradcam_pictures_show_what_they_say():
    """The maps on one scale for a row, and the signed difference, over the image; the texts name the classes."""
    model, images, names = trained_like()[0], data.load_synthetic(train=False)[0][:2], data.CLASS_NAMES
    preds = gradcam.probabilities(model, images).argmax(1)
    labels = torch.stack([(preds[0] + 1) % 100, preds[1]])
    figure = gradcam.picture(model, images, labels, captions=["first", "second"])
    grid = np.array(figure.axes).reshape(3, 4)
    a, b = (gradcam.grad_cam(model, data.normalize(images[:1]), y) for y in (preds[:1], labels[:1]))
    cams, lead = gradcam.upsample(torch.cat([a, b]).clamp(min=0)), gradcam.upsample(a - b)[0]
    for axis, expected in zip(grid[0, 1:], (*cams / cams.max().clamp(min=1e-12), lead / lead.abs().max())):
        under, over = axis.images
        assert np.allclose(over.get_array(), expected, atol=1e-5) and 0 < over.get_alpha() < 1
        assert np.allclose(under.get_array(), images[0].float().mean(-1))
    assert np.array_equal(grid[0, 0].images[0].get_array(), images[0]) and not grid[1, 2].images  # second: no mistake
    words = "first\ntrue: ", f"predicted: {names[preds[0]]}", f"true: {names[labels[0]]}", "rather than"
    assert all(word in axis.get_title() for axis, word in zip(grid[0], words))
    assert figure._repr_png_()[1:4] == b"PNG"  # a notebook shows it
    asked = gradcam.picture(model, images[:1], target=7, layer=model.layer3, title="a$b$")
    title = asked.get_suptitle()
    assert f"asked: {names[7]}" in asked.axes[1].get_title() and "Sequential, 8x8 cells" in title and r"a\$b\$" in title


def test_chain_gradcam():
    baseline = chain()[0][0]
    failed, explained = read_csv(baseline / "failures.csv"), read_csv(baseline / "gradcam.csv")
    assert [row["index"] for row in explained] == [row["index"] for row in failed]
    logits, bias = np.load(baseline / "test_logits.npy"), utils.load_model(baseline).fc.bias.detach()
    for row, own in zip(explained[:20], failed):  # the sum over the cells is the logit without its bias
        for name, column in (("confidence",) * 2, ("target_probability", "confidence"), ("true_probability",) * 2):
            assert math.isclose(float(row[name]), float(own[column]), abs_tol=1e-4), name
        for name, column in (("target", "map_sum"), ("true", "true_map_sum")):
            label = int(row[name][-2:])
            assert math.isclose(float(row[column]) + bias[label], logits[int(row["index"]), label], abs_tol=1e-3)
    run_dir = copy_of_run("explained", "last.pt", "attention.csv")
    rows, printed = explain(run_dir, "--index", 3, 3, 141, "--layer", "layer3", "--target", "synthetic_07")
    assert [row["index"] for row in rows] == [3, 141] and {row["target"] for row in rows} == {"synthetic_07"}
    assert rows[0]["layer"] == "layer3" and "attention" not in printed and not (run_dir / "attention.csv").exists()
    titles = []
    with replaced(utils, "save_figure", lambda figure, path: titles.append(figure.get_suptitle())):
        rows, _ = quietly(gradcam.main, [str(run_dir), "--device", "cpu", "--index", "3", "--target", "true"])
    assert all(word in titles[0] for word in ("ResNet-18", "SYNTHETIC", "explained", "layer4, 4x4 cells")), titles
    assert rows[0]["target"] == rows[0]["true"] and rows[0]["map_sum"] == rows[0]["true_map_sum"]
    assert (run_dir / "failures.csv").read_bytes() == (baseline / "failures.csv").read_bytes()


def test_chain_gradcam_predicts_a_picture_without_data_and_logits():
    run_dir = copy_of_run("published", "*.npy", "*.csv", "*.png", "last.pt", "metrics.json")
    image = SCRATCH / "gray.png"
    Image.new("L", (50, 40), 99).save(image)
    with replaced(gradcam, "load_dataset", None):  # any use of it would raise
        top, printed = explain(run_dir, "--image", image)
    model, pixels = utils.load_model(run_dir), torch.full((1, 32, 32, 3), 99, dtype=torch.uint8)
    probs, best = model(data.normalize(pixels)).detach().softmax(1)[0].topk(5)
    assert [name for name, _ in top] == [f"synthetic_{label:02d}" for label in best]
    assert np.allclose([p for _, p in top], probs, atol=1e-6)
    assert "L 50x40" in printed and all(f"{100 * p:5.1f} %  {name}" in printed for name, p in top)
    assert sorted(path.name for path in run_dir.glob("gradcam*")) == ["gradcam-gray.png"]
    for given in (image, pixels[0], pixels[0].numpy()):
        assert [name for name, _ in gradcam.predict_image(model, given)] == [data.CLASS_NAMES[label] for label in best]


def test_chain_attention():
    """The matches are correct, distinct, and as confident; the figures are those of the network, by hand."""
    baseline, printed = chain()[0][0], chain()[1][-1]
    rows, listed = read_csv(baseline / "attention.csv"), read_csv(baseline / "failures.csv")
    columns = "pair group index true predicted confidence".split() + gradcam.FIGURES + ["checkpoint"]
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
    # A network that has learnt: its maps rank the pixels better than shuffled ones, and than those of other images.
    values = {name: np.array([float(row[name]) for row in failed]) for name in gradcam.FIGURES}
    for control in ("shuffled", "other"):
        assert (values["insertion_deletion"] - values[f"insertion_deletion_{control}"]).mean() > 0.02
    share = 100 * (values["border_drop"] > values["centre_drop"]).mean()
    assert f"lose more at the border {share:9.1f}" in printed and "next: python evaluate.py" in printed
    assert "random weights 1.00" not in printed  # those of a network that has not learnt
    assert within_79_columns(printed)
    # the first failure, by itself
    model, index = utils.load_model(baseline), int(failed[0]["index"])
    image, target = data.load_synthetic(train=False)[0][[index]], torch.tensor(logits[[index]].argmax(1))
    alone = gradcam.attention_figures(model, image, target, "layer3")
    for name in ("border_drop", "centre_drop", "border_energy", "insertion_deletion"):
        assert math.isclose(alone[name][0], values[name][0], abs_tol=1e-5), name


def test_chain_attention_is_measured_once_and_can_be_interrupted():
    run_dir, table = copy_of_run("attended", "gradcam.*"), chain()[1][-1].split("mean, in percentage")[1]
    path, digest = run_dir / "attention.csv", utils.sha256(run_dir / "best.pt")
    good, failed = path.read_text(), [int(row["index"]) for row in read_csv(run_dir / "failures.csv")]
    for old, new in (
        (digest, "another"), ("\n0,failure,", "\n0,failure,1"), ("\n1,matched", "\n77777,matched"),
        ("border_drop", "no_drop"), ("\n0,failure,", "\nzero,failure,"), ("failure", "missing"),
        (good[-100:], ""), (good, ""),
    ):  # fmt: skip
        path.write_text(good.replace(old, new))
        assert gradcam.saved_attention(path, failed, digest) is None, f"{old} -> {new} was taken for up to date"
    path.write_text(good)
    assert gradcam.saved_attention(path, failed[:-1], digest) is None
    with replaced(gradcam, "occlusion_drops", side_effect=KeyboardInterrupt):
        printed = explain(run_dir)[1].split("as measured before")[1]
        assert printed.split("mean, in percentage")[1].splitlines()[:8] == table.splitlines()[:8]
        path.unlink()
        (run_dir / "gradcam.csv").unlink()
        with raises(KeyboardInterrupt):
            explain(run_dir)
    assert (run_dir / "gradcam.csv").exists() and (run_dir / "gradcam.png").exists() and not path.exists()


def test_chain_gradcam_without_failures_and_with_bad_ones():
    run_dir = copy_of_run("failing", "*.png", "gradcam.*", "last.pt")
    path, run = run_dir / "failures.csv", utils.quote(run_dir)
    text = path.read_text().strip()
    header, first, *_ = text.splitlines()
    path.write_text(header + "\n")
    rows, printed = explain(run_dir)
    assert rows == [] and "is empty" in printed
    assert not (run_dir / "gradcam.csv").exists() and (run_dir / "attention.csv").exists()
    command = printed.split("next: python gradcam.py ")[1]
    assert len(explain(*shlex.split(command))[0]) == 3  # it works
    again = f"python failures.py {run}"
    index, true, predicted, *_, digest = first.split(",")
    nobody = text.replace(",1,", ",0,").replace(",1,", ",0,")  # twice: two such columns may be neighbours
    for content, *words in (
        *((content, "failures.csv", again) for content in (
            "", "hello\n", "\0", f"{header}\n{first.replace(index, 'zero', 1)}\n", f"{header}\n{first}\n{first}\n",
            f"{header}\n{first.replace(index, '10000', 1)}\n", f"{header}\n1,2,3\n", text + ",one cell more\n",
            f"{header[:-1]}\n{first}\n", nobody)),
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
    save(content, buffer, **options) if save is torch.save else save(buffer, content, **options)
    return buffer.getvalue()


def test_bad_checkpoints():
    """Each with its word, in utils.load_model, which all scripts use; nothing in the file is run."""
    run_dir = run_from("bad checkpoint")
    state = resnet18(width=4).state_dict()
    args = {"dataset": "synthetic", "width": 4, "seed": 42, "val_size": 100}
    checkpoint = {"format": 1, "args": args, "epoch": 1, "model": state}
    good = saved(checkpoint)
    flipped = bytearray(good)
    flipped[good.index(state["fc.bias"].numpy().tobytes())] ^= 1  # torch.load does not notice
    torch.load(io.BytesIO(flipped), weights_only=True)
    legacy = functools.partial(saved, _use_new_zipfile_serialization=False)
    ten = state | {"fc.weight": torch.zeros(10, 32), "fc.bias": torch.zeros(10)}
    strange = (
        b"", b"hello\n" * 99, b"<!DOCTYPE html><html>" * 99, good[: len(good) // 2], saved(np.zeros(3), np.savez),
        legacy(checkpoint), legacy({"x": Payload()}), pickle.dumps(Payload()), saved(state), saved([1, 2]),
        saved({"args": args, "format": 1, "epoch": 1}), saved(checkpoint | {"args": None}),
    )  # fmt: skip
    changes = (
        ({"epoch": Payload()}, "asks to run"), ({"format": 2}, "another version"), ({"model": {}}, "another network"),
        ({"args": args | {"width": 10**9}}, "width"), ({"args": args | {"dataset": "mnist"}}, "data set"),
        ({"args": args | {"seed": -1}}, "bad seed"), ({"args": args | {"model": "vgg"}}, "vgg"),
        ({"model": {"fc.weight": 1}}, "no tensors"), ({"model": ten}, "fc.weight"),
        ({"model": state | {"conv1.weight": torch.zeros(4, 3, 7, 7)}}, "conv1.weight"),
        ({"model": state | {"fc.bias": state["fc.bias"] * math.nan}}, "NaN"),
    )  # fmt: skip
    table = [(content, "is not a checkpoint") for content in strange]
    table += [(bytes(flipped), "CRC"), (saved(resnet18(width=4)), "asks to run")]
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
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    prefixed = [{prefix + key: value for key, value in state.items()} for prefix in ("module.", "_orig_mod.")]
    for model in (state, half, *prefixed):  # and the good one, in other clothes
        torch.save(checkpoint | {"model": model}, run_dir / "best.pt")
        outputs.append(utils.load_model(run_dir)(images).detach())
    assert all(torch.allclose(output, outputs[0], atol=0.02) for output in outputs)


def test_bad_logits():
    labels = data.load_synthetic(train=False)[1].numpy()
    logits = np.random.default_rng(0).normal(size=(10_000, 100)).astype(np.float32)
    run_dir = run_from("bad logits", logits, labels)
    good = {name: (run_dir / name).read_bytes() for name in ("test_logits.npy", "test_labels.npy")}
    giant = good["test_logits.npy"][:128].replace(b"(10000, 100), }      ", b"(10000000000, 100), }")  # 4 TB
    objects, row = np.array([Payload()], dtype=object), np.arange(10_000)[:, None]

    for name, contents in (
        ("test_logits.npy", (
            (b"", "no .npy file"), (b"hello", "no .npy file"), (pickle.dumps(Payload()), "no .npy file"),
            (saved(objects, np.savez), "no .npy file"), (good["test_logits.npy"][:999_999], "is not the logits"),
            (giant, "is not the logits"), (saved(objects, np.save, allow_pickle=True), "Object arrays"),
            (logits[:, :10], "(10000, 10)"), (logits[0], "(100,)"), (logits[:9999], "9999"), (logits[:0], "(0, 100)"),
            (logits.astype(complex), "complex"), (logits.astype(int), "int64"), (logits[:9].astype(str), "<U"),
            *((np.where(row == 77, bad, logits), "row [77]") for bad in (math.nan, math.inf, -math.inf)))),
        ("test_labels.npy", (
            (b"", "no .npy file"), (labels[:9999], "(9999,)"), (labels.astype(float), "float64"),
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
    (run_dir / "metrics.json").unlink()
    utils.write_npy(run_dir / "test_logits.npy", np.exp(utils.log_softmax(logits)))  # allowed, but not in silence
    assert "looks like probabilities" in quietly(utils.load_logits, run_dir, "test")[1]


def test_bad_json_and_csv():
    """One line with the command that makes the file anew."""
    run_dir = copy_of_run("bad text", "*.png", "last.pt")
    for content in ("", "{", "[1]", '{"sha256": [1]}', '{"sha256": "abc"}', "{}", "\0", "\xff" * 99):
        (run_dir / "metrics.json").write_text(content, "latin-1")
        refused(failures.main, [run_dir], 2, "metrics.json", f"python evaluate.py {utils.quote(run_dir)}")
    lists, mnist = '{"args": [], "dataset": "synthetic"}', '{"args": {}, "dataset": "mnist"}'
    for content in ("", "{", "[]", '{"args": {}}', lists, mnist):
        (run_dir / "config.json").write_text(content)
        for module in (evaluate, failures, gradcam):
            refused(module.main, [run_dir], 2, "config.json", "train.py")
    refused(utils.load_checkpoint, SCRATCH, 2, "cannot be read")  # a folder
    run = unittest.mock.Mock(folder=run_dir)
    read_curve = functools.partial(evaluate.read_curve, column="val_acc")
    readers = {"log.csv": read_curve, "attention.csv": evaluate.read_attention, "stress.csv": evaluate.read_stress}
    for name, reader in readers.items():
        (run_dir / name).write_text("hello\n")
        refused(reader, run, 2, name, "run python")


def test_bad_arguments():
    """Refused with the flag named, before any file is changed; train.py and failures.py have tables of their own."""
    run, missing = chain()[0][0], SCRATCH / "not made"
    before = {path: path.stat().st_mtime_ns for path in SCRATCH.rglob("*") if path.is_file()}
    with replaced(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"]):  # main() in a notebook
        assert train.parse_args(None).lr == 0.01
        for module in (evaluate, gradcam, failures):
            refused(module.main, None, 2, "RUN", f"python {module.__name__}.py --help")
            refused(module.main, [missing], 2, "train.py")
    refused(evaluate.main, [run, missing], 2, "train.py")
    refused(evaluate.main, [run / "best.pt"], 2, "is a file")
    for module, *table in (
        (evaluate, ("--device cuda:77", "cuda:77"), ("--bins 3", "--bins"), ("--dataset cifar100", "synthetic"),
         ("--stress-images 150", "multiple of 100"), ("--cifar-c nowhere", "--cifar-c nowhere")),
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
    for error, code, word in (
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), 1, "--batch-size"),
        (MemoryError(), 1, "out of memory"), (KeyboardInterrupt(), 130, "stopped"),
        (KeyboardInterrupt("SIGTERM"), 143, "stopped"),
        (OSError(5, "Input/output error", "somewhere"), 1, "somewhere: Input"),
        (ScriptError("this; do that"), 2, "this; do that"), (ScriptError("gone", 1), 1, "gone"),
    ):  # fmt: skip
        printed, broken = io.StringIO(), unittest.mock.Mock(side_effect=error)
        with contextlib.redirect_stderr(printed), replaced(sys, "argv", ["some/where/train.py"]):
            with raised(SystemExit, f"^{code}$"):
                utils.run_script(broken)
        printed = printed.getvalue()
        assert word in printed and printed.startswith("train.py: error: ") and printed.count("\n") == 1, printed
    with raises(ZeroDivisionError):  # a bug keeps its traceback
        utils.run_script(lambda argv: 1 / 0)


@not_on_windows
def test_places_exit_codes():
    """Of the scripts as programs; and a closed pipe, as in `| head`, is quiet."""
    run, elsewhere = utils.quote(copy_of_run("as a program", "last.pt")), utils.quote(new_folder("no data"))
    offline = f"train.py --data-url http://127.0.0.1:9/x --data-dir {elsewhere} --output-dir {elsewhere}"
    calls = (
        ("train.py --lr -1", 2, "train.py: error: --lr -1.0"),
        (offline, 1, "train.py: error: cannot get CIFAR-100"),
        (f"failures.py {run} --threshold 0.85", 0, ""),
        (f"failures.py {run} --threshold 0.85 | true", 0, ""),
    )
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": HERE}
    programs = [subprocess.Popen(f'"{sys.executable}" {call}', shell=True, **streams) for call, *_ in calls]
    for program, (call, code, start) in zip(programs, calls):
        stdout, stderr = program.communicate(timeout=300)
        assert (program.returncode, stderr.count("\n")) == (code, int(code > 0)), (call, stderr)
        assert stderr.startswith(start), (call, stderr)


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
    if os.name != "nt":
        outcomes = [PermissionError, PermissionError, unittest.mock.DEFAULT]  # Excel has the file open
        with replaced(os, "replace", wraps=os.rename, side_effect=outcomes) as busy, replaced(os, "name", "nt"):
            utils.replace(str(target), str(target) + "2")
        assert busy.call_count == 3 and not target.exists()


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
utils.save_figure(figure, "figure.png")
print(os.path.getsize("figure.png") > 5000)
"""
    backend = {"MPLBACKEND": "module://matplotlib_inline.backend_inline_not_there"}  # as in `!python train.py`
    done = script("-B", "-c", program, cwd=SCRATCH, **backend)
    assert done.returncode == 0 and done.stdout == "True\n", done.stderr


def test_places_publish():
    """A published run: small, without places; scored from what is in it, again without best.pt and data."""
    run_dir, target = copy_of_run("to publish", "last.pt"), SCRATCH / "results/published"
    publish = runpy.run_path(str(HERE / ".ci/publish"))["main"]
    assert "MB" in without_drawing(publish, run_dir, target)[1] and os.access(HERE / ".ci/publish", os.X_OK)
    before, after = json_of(run_dir / "metrics.json"), json_of(target / "metrics.json")
    checkpoint = before["sha256"]["best.pt"]
    assert after["sha256"]["best.pt"] == checkpoint == utils.sha256(target / "best.pt")  # below 4 MB
    assert all(abs(after[name] - before[name]) < 0.002 for name in ("accuracy", "macro_f1", "ece", "nll"))
    dtypes = [np.load(target / name).dtype for name in ("test_logits.npy", "val_labels.npy")]
    assert dtypes == [np.float16, np.uint8]
    config, published = json_of(run_dir / "config.json"), json_of(target / "config.json")["args"]
    assert not set(published) & utils.PLACES and {"seed", "lr"} <= set(published)
    for name in ("log.csv", "failures.csv", "attention.csv", "curves.png", "gradcam.png"):
        assert (target / name).read_bytes() == (run_dir / name).read_bytes(), name
    refused(publish, [run_dir, run_dir], 2, "the run itself")
    refused(publish, [run_dir, chain()[0][1]], 2, "is a run of train.py")  # both were meant to be published
    utils.write_json(run_dir / "config.json", config | {"finished": False})
    refused(publish, [run_dir, target], 2, "not finished", "--resume")
    utils.write_json(run_dir / "config.json", config)
    (target / "confusion.png").unlink()
    with unittest.mock.patch.dict(publish.__globals__, SMALL=0), replaced(evaluate, "load_dataset", None):
        without_drawing(publish, run_dir, target)  # now best.pt is too large; any use of the images would raise
    assert not (target / "best.pt").exists() and (target / "confusion.png").exists()
    assert utils.checkpoint_id(target) == checkpoint and json_of(target / "metrics.json") == after


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
