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
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import evaluate  # noqa: E402
import failures  # noqa: E402
import gradcam  # noqa: E402
import train  # noqa: E402
import utils  # noqa: E402
from model import resnet18  # noqa: E402
from test_smoke import HERE, SCRATCH, TINY, Killed, chain, copy_of_run, json_of, new_folder, not_on_windows  # noqa: E402
from test_smoke import quietly, raised, raises, read_csv, refused, replaced, run, run_from, script, without_drawing  # noqa: E402
from utils import ScriptError  # noqa: E402


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
        ({"model": {"fc.weight": 1}}, "another network"), ({"model": [1]}, "another network"), ({"args": args | {"width": 10**9}}, "another run"),
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
