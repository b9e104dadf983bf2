#!/usr/bin/env python3
"""What users met: damaged and hostile files, wrong arguments, full disks, odd streams and names. Each one line.

    python .ci/faults.py             # two minutes
    python .ci/faults.py logits      # tests with "logits" in their names
"""

import contextlib
import functools
import hashlib
import http.client
import io
import itertools
import json
import math
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
import threading
import time
import unittest.mock
import urllib.request
import urllib.response
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import evaluate  # noqa: E402
import failures  # noqa: E402
import gradcam  # noqa: E402
import train  # noqa: E402
import utils  # noqa: E402
from model import resnet18  # noqa: E402
from test_smoke import HERE, SCRATCH, TINY, Killed, chain, change_last, command, copy_of_run, explain  # noqa: E402
from test_smoke import fails_at, find, json_of, logits_of, new_folder, not_on_windows, quietly, raised  # noqa: E402
from test_smoke import raises, random_case, read_csv, refused, replaced, run, run_from, run_of, same_run  # noqa: E402
from test_smoke import script, trained, undisturbed, without_drawing, wrong_images  # noqa: E402
from utils import ScriptError  # noqa: E402


# ---- train -----------------------------------------------------------------------------------------------------------


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
    assert max(map(len, [line, *train.HEADER.splitlines()])) <= 79 and line.endswith("  125:36:52"), line
    assert line.split()[2:6] == ["4.605", "100.00", "12.346", "100.00"]
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


# ---- evaluate, failures, gradcam -------------------------------------------------------------------------------------


def test_corrupt_and_attack_refuse_other_images_and_arguments():
    images, labels = torch.arange(2 * 3072).byte().reshape(2, 32, 32, 3), torch.tensor([3, 4])
    array, attack = images.numpy(), functools.partial(data.attack, None)
    for given, expected in ((images, images), (array[::-1], images.flip(0)), (array[1], images[1:])):
        assert torch.equal(data.as_pixels(given), expected)
    calls = [(data.corrupt, images, *wrong) for wrong in (("snow", 1), ("fog", "3"), ("fog", 0), ("fog", 6))]
    calls += [(attack, images, labels, *wrong) for wrong in ((-1,), (math.nan,), (1, 0))]
    for x in (images / 255, array / 255, array.astype(int), images.char(), images.mT, images[None], images[0, 0], None):
        calls += [(data.corrupt, x, "fog", 1), (attack, x, labels, 1)]
    for function, *arguments in calls:
        with raises(ValueError, msg=arguments):
            function(*arguments)


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
    for words in ("empty run has no saved epoch", "other labels was scored on other images",
                  "its twin repeats the seed", "stopped after epoch 3 of 3 (continue it with --resume)"):  # fmt: skip
        assert words in printed, printed
    assert "mean of" not in printed
    assert {claim["recipe"] for claim in json_of(first / "verdict.json")["claims"]} == {"the first"}
    holder = shutil.copytree(first, SCRATCH / "several/one").parent
    shutil.copytree(first, holder / "two/one")
    refused(evaluate.main, [holder], 2, "holds some", "several/one")
    _, printed = without_drawing(evaluate.main, holder / "one", holder / "two/one")
    assert "several/one" in printed and "two/one" in printed  # names that tell them apart
    for name in ("last", "older"):
        shutil.copytree(chain()[0][0], SCRATCH / "with/runs" / name)
    os.utime(SCRATCH / "with/runs/older/best.pt", (1, 1))
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
    refused(failures.main, [chain()[0][0], "--compare", run_dir], 2, "best.pt has changed")
    refused(evaluate.main, [run_dir, "--device", "cpu"], 2, "belongs to another run", "config.json says")


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
        del run.attention, run.occlusions  # they are read once
        assert word in printed and "left out" in printed and "gradcam.py" in row["note"]
    rows.pop()  # and a pair for a mistake that is not above 0.90
    for group, i in zip(("failure", "matched"), np.flatnonzero(run.raw.sure_hits)[-2:]):
        rows.append(rows[-1] | {"pair": 9999, "group": group, "index": i, "border_drop": 0.5})
    utils.write_csv(run.folder / "attention.csv", rows)
    share = np.mean(np.arange(len(failed) - 1) % 3 == 0)
    row = evaluate.judge(claim, [run])
    assert math.isclose(row["figure"], 1 - share)
    assert row["note"] == f"{len(failed)} of {len(failed)} failures measured"
    more = evaluate.judge(claim, [run, run_of(logits, labels, seed=43, name="unmeasured")])
    assert more["figure"] == row["figure"] and more["note"] == f"{row['note']}; of 1 of the 2 runs"


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
    (run_dir / "confusion.png").write_text("of other scores")
    utils.write_json(run_dir / "metrics.json", metrics | {"accuracy": 0.5})
    with replaced(evaluate, "draw_confusion", side_effect=RuntimeError("Failed to process string with tex")):
        _, printed = quietly(evaluate.main, [run_dir])
    assert "warning: no confusion.png: Failed to process string with tex" in printed, printed
    assert "accuracy [95 %]" in printed and not (run_dir / "confusion.png").exists()


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
    """A refusal changes nothing. Without the images the list is written, and no older picture stays."""
    run, rolled = run_from("refusing/one"), run_from("refusing/rolled", labels=np.roll(wrong_images()[0], 1))
    readonly = replaced(os, "access", lambda path, mode: Path(path) != rolled)  # as in /kaggle/input
    for argv, word in (
        ([run, "--top", "0"], "--top 0"), ([run, "--threshold", "nan"], "nan"),
        ([run, "--compare", run], "different runs"), ([run, "--compare", rolled], "other images"),
        ([rolled], "cannot be written to"),
    ):  # fmt: skip
        with readonly:
            refused(failures.main, argv, 2, word)
    assert not (run / "failures.csv").exists()
    (run / "failures.png").write_text("older")
    with replaced(failures, "load_dataset", side_effect=ScriptError("no network", code=1)):
        refused(failures.main, [run], 1, "no network")
    assert len(read_csv(run / "failures.csv")) == 9 and not (run / "failures.png").exists()


def test_gradcam_reads_any_image():
    """Upright, on white, the central square, 16 bits scaled; all else is one line, and starts no other program."""
    files, exif = new_folder("images/folder.png").parent, Image.Exif()
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 60, 3), dtype=np.uint8))
    exact, exif[0x0112] = rgb.crop((14, 0, 46, 32)), 6
    scaled = np.arange(32 * 32).reshape(32, 32, 1).repeat(3, 2) // 4  # 0 to 255
    deep = Image.fromarray((1000 + 200 * scaled[..., 0]).astype(np.uint16))  # not clipped
    for name, image, options, expected in (
        ("square.png", rgb, {}, exact), ("deep.png", deep, {}, scaled),
        ("turned.png", exact, {"exif": exif}, exact.transpose(Image.Transpose.ROTATE_270)),
        ("broken.png", exact, {"exif": b"Exif\0\0junk junk"}, exact),
        ("clear.png", Image.new("RGBA", (32, 32), (255, 0, 0, 0)), {}, 255),
    ):  # fmt: skip
        image.save(files / name, **options)
        found = gradcam.read_image(files / name)
        assert found.shape == (32, 32, 3) and found.dtype == np.uint8 and (found == np.asarray(expected)).all(), name
    postscript, flipped = io.BytesIO(), bytearray((files / "square.png").read_bytes())
    rgb.save(postscript, "EPS")
    flipped[len(flipped) // 2] ^= 4  # in the pixels, where no EXIF block may be the excuse
    (files / "photo.png").write_bytes(postscript.getvalue())
    (files / "flipped.png").write_bytes(flipped)
    with replaced(subprocess, "check_call") as check_call, replaced(subprocess, "Popen") as popen:  # of Ghostscript
        for name in ("photo.png", "flipped.png", "folder.png", "missing.png"):
            refused(gradcam.read_image, files / name, 2, name, "--image")
    assert not check_call.called and not popen.called


def test_chain_gradcam_without_failures_and_with_bad_ones():
    run_dir = copy_of_run("failing", "*.png", "gradcam.*", "last.pt")
    path, again = run_dir / "failures.csv", f"python failures.py {utils.quote(run_dir)}"
    header, first, *_ = path.read_text().splitlines()
    path.write_text(header + "\n")
    rows, printed = explain(run_dir, "--data-dir", SCRATCH)
    assert rows == [] and "is empty" in printed
    assert not (run_dir / "attention.csv").exists()  # of failures that are no longer listed
    assert f"next: python evaluate.py {utils.quote(run_dir)} --data-dir {utils.quote(SCRATCH)}\n" in printed
    index, *_, digest = first.split(",")
    for row, word in (
        ("hello", "a list of failures"), (first.replace(index, "10000", 1), "a list of failures"),
        (first.replace(digest, "0" * 64), "another best.pt"),
    ):  # fmt: skip
        path.write_text(f"{header}\n{row}\n")
        refused(gradcam.main, [run_dir], 2, "failures.csv", word, again)
    path.unlink()
    refused(gradcam.main, [run_dir], 2, "failures.csv", again)


# ---- bad data and downloads --------------------------------------------------------------------------------


class Pickled(functools.partial):
    """Unpickled, it is called."""

    def __reduce__(self):
        return self.func, self.args


Payload = functools.partial(Pickled, open, str(SCRATCH / "pwned"), "w")  # makes a file, if somebody's code has run


def answer(content):
    """A response of urllib with these bytes; without a URL of its own, it is no redirection."""
    response = urllib.response.addinfourl(io.BytesIO(content), {}, None)
    response.length = len(content)
    return response


@contextlib.contextmanager
def small_archive():
    """The bytes of an archive of 20 training and 10 test images, which torchvision takes for the official one.

    In the `with` block every request of urllib is answered with it.
    """
    old, archive, sums = Pickled(warnings.warn, "dtype(): align should be a boolean"), io.BytesIO(), {}  # by Python 2
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, n in (("train", 20), ("test", 10), ("meta", 0)):
            images = {"data": np.zeros((n, 3072), np.uint8), "fine_labels": [*range(n)], "old": old}
            content = pickle.dumps(images if n else {"fine_label_names": []})
            member, sums[name] = tarfile.TarInfo(f"cifar-100-python/{name}"), hashlib.md5(content).hexdigest()
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    content, cifar100 = archive.getvalue(), torchvision.datasets.CIFAR100
    official = {f"{name}_list": [[name, sums[name]]] for name in ("train", "test")}
    official |= {"meta": cifar100.meta | {"md5": sums["meta"]}, "tgz_md5": hashlib.md5(content).hexdigest()}
    with unittest.mock.patch.multiple(cifar100, **official):
        with replaced(urllib.request, "urlopen", side_effect=lambda request: answer(content)):
            yield content


@not_on_windows
def test_data_are_found_up_to_two_levels_below():
    for place, found in (("", 1), ("cifar-100-python", 1), ("a", 1), ("a/b", 1), ("a/b/c", 0), (".hidden", 0)):
        top, folder = new_folder(f"below {place}"), new_folder(f"below {place}/{place}")
        (top / "0").symlink_to(top)
        for name in ("train", "test", "meta"):
            (folder / name).touch()
        assert data.find_cifar100(top) == (folder if found else None), place


def test_bad_data_folders():
    top, load = new_folder("bad data/below"), data.load_cifar100
    download, folder, archive = functools.partial(load, download=True), top / data.FOLDER, top / data.ARCHIVE
    for empty in (top, top / "nowhere", Path(__file__), "~nosuchuser/x"):
        refused(load, empty, 2, f"no CIFAR-100 in {empty}", "--data-dir", "python train.py")
    with small_archive() as content, warnings.catch_warnings():
        warnings.simplefilter("error")
        archive.write_bytes(content)
        refused(load, top, 2, f"no CIFAR-100 in {top}")  # only train.py may unpack it
        (_, labels), printed = quietly(load, data.find_cifar100(top).parent, False, True, "nonsense")
        assert labels.tolist() == list(range(10)) and not printed
        archive.unlink()
        assert str(folder) in quietly(load, top.parent)[1] and not quietly(load, top.parent)[1]  # said once
        for name in ("train", "test", "meta"):
            good = (folder / name).read_bytes()
            (folder / name).write_bytes(pickle.dumps(Payload()))
            for where in (top, folder):
                refused(download, where, 2, f"{folder} is not the official CIFAR-100", "altered", "--data-dir")
            (folder / name).unlink()
            refused(download, top, 2, f"{folder} is not the official CIFAR-100", "missing")
            (folder / name).write_bytes(good)
    assert not (SCRATCH / "pwned").exists()


def test_bad_downloads():
    """One line with the reason and the ways out, and nothing left behind."""
    folder, url, mirror = SCRATCH / "download", "http://somewhere/any.tgz", data.MIRROR_URL
    for url, answers, words in (
        (url, urllib.error.HTTPError(url, 503, "Service Unavailable", {}, None), ("503", f"--data-url {mirror}")),
        (url, [answer(b""), answer(b"<html>login</html>")], ("corrupted", "--data-dir", "--quick", "Internet")),
        (mirror, http.client.IncompleteRead(b"", 999), ("999 more", data.ARCHIVE_URL)), ("nonsense", None, ("type",)),
    ):  # fmt: skip
        with replaced(urllib.request, "urlopen", side_effect=answers) if answers else contextlib.nullcontext():
            refused(functools.partial(data.load_cifar100, folder, True, True), url, 1, url, *words)
    assert list(folder.iterdir()) == []


def test_download_works_also_after_an_interruption():
    folder, load, url = SCRATCH / "fetched", data.load_cifar100, "http://somewhere/any.tgz"
    with small_archive(), replaced(socket, "setdefaulttimeout") as timeout:
        with raises(Killed), replaced(os, "rename", side_effect=Killed):  # when all is unpacked
            quietly(load, folder, True, True, url)
        assert list(folder.iterdir()) == []
        (images, labels), printed = quietly(load, folder, False, True, url)
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):  # as if they were closed
            load(SCRATCH / "fetched again", True, True, url)
    assert images.shape == (10, 32, 32, 3) and labels.tolist() == list(range(10)) and labels.dtype == torch.int64
    assert sorted(path.name for path in folder.rglob("*")) == ["cifar-100-python", "meta", "test", "train"]
    assert url in printed and f"--data-url {data.MIRROR_URL}\n" in printed and "\r" not in printed
    assert timeout.mock_calls == [unittest.mock.call(20), unittest.mock.call(None)] * 3  # seconds


def test_downloads_at_once_do_no_harm():
    meet, rename = threading.Barrier(2), os.rename
    with small_archive(), replaced(os, "rename") as together, ThreadPoolExecutor() as pool:
        together.side_effect = lambda *paths: meet.wait(300) + 1 and rename(*paths)  # both have downloaded
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
            found = [pool.submit(data.load_cifar100, SCRATCH / "at once", True, True) for _ in range(2)]
            assert [len(one.result()[0]) for one in found] == [20, 20]


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
        ({"model": {"fc.weight": 1}}, "another network"), ({"model": [1]}, "another network"),
        ({"args": args | {"width": 10**9}}, "another run"),
        ({"args": args | {"seed": 43}}, "another run (--seed 43, config.json says 42)"),
    ]  # fmt: skip
    for value, word in (
        (bias * math.nan, "NaN"), (torch.zeros(10), "fc.bias"), (bias.to_sparse(), "another network"),
        (bias.to("meta"), "another network"), (torch.zeros(1).expand(3 * 10**9), "another network"),  # 12 GB
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
    here = os.getcwd()
    os.chdir(new_folder("without runs"))
    try:
        with replaced(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"]):  # main() in a notebook
            assert train.parse_args(None).lr == 0.01
            for module in (evaluate, gradcam, failures):
                refused(module.main, None, 2, "no RUN given")
                refused(module.main, [missing], 2, "train.py")
    finally:
        os.chdir(here)
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


def test_places_without_assert_nothing_is_tested():
    done = script("test_smoke.py", "wilson", PYTHONOPTIMIZE="1")
    assert done.returncode == 2 and "-O" in done.stdout


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
    utils.write_json(target, {"old": 1})
    for name in ("replace", "fsync"):
        with replaced(os, name, full):
            refused(lambda argv: utils.write_json(target, {"new": 2}), [], 1, "No space left", "kept.json")
    assert json_of(target) == {"old": 1} and not list(SCRATCH.glob(".*.partial"))
    os.utime(target, (1, 1))
    utils.write_json(target, {"old": 1})
    assert target.stat().st_mtime == 1
    values = [1 / 3, np.float32(2 / 3), math.nan, -math.inf, -1e-300 * 1e-300, np.int64(7), 123456789, 1234567.8, True]
    utils.write_json(target, {"a": values, "b": np.array([[0.1, 2e-9]])})
    expected = [0.333333, 0.666667, None, None, 0.0, 7, 123456789, 1234570.0, True]
    assert json_of(target) == {"a": expected, "b": [[0.1, 2e-9]]} and "-0.0" not in target.read_text()
    utils.write_csv(SCRATCH / "some.csv", [{"x": 1 / 3, "y": None, "z": "a,b"}])
    assert (SCRATCH / "some.csv").read_text() == 'x,y,z\n0.333333,,"a,b"\n'
    (SCRATCH / "some.csv").write_text('\ufeffx,y,z\n0.333333,,"a,b"\n', "utf-8")  # a spreadsheet's mark of UTF-8
    assert read_csv(SCRATCH / "some.csv") == [{"x": "0.333333", "y": "", "z": "a,b"}]
    with replaced(os, "fsync", side_effect=OSError(22, "Invalid argument")):  # as on some network drives
        utils.write_json(target, {"new": 2})
    assert json_of(target) == {"new": 2}


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


if __name__ == "__main__":
    tests = [test for name, test in globals().items() if name.startswith("test_")]
    chosen = [test for test in tests if not sys.argv[1:] or any(word in test.__name__ for word in sys.argv[1:])]
    sys.exit("failed" in run(chosen))
