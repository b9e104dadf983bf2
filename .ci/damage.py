"""Damage the files of a run at random: every script must give the result of the good file, or one line.

    python .ci/damage.py [SECONDS] [SEED]      # 60 s; a seed repeats a campaign

Never a traceback, a crash or a hang. Files with a checksum (checkpoints, arrays) must not give another result
either; in a text file a changed digit is another number. Besides damaged bytes: tensors of the optimizer with
another shape or dtype, and values in config.json of another type. Each attempt is a process of its own, so that a
crash of the process is seen.
"""

import io
import json
import multiprocessing
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
import failures
import gradcam
import train
import utils
from test_smoke import without_drawing  # noqa: E402

TINY = "--dataset synthetic --device cpu --width 8 --limit 300 --batch-size 50 --val-size 100 --epochs 2"


def damaged(content, rng):
    """A copy, cut short or with a flipped bit, bytes overwritten, or a piece of itself in the wrong place."""
    copy, at, kind = bytearray(content), int(rng.integers(len(content))), rng.integers(5)
    if kind == 0:
        return bytes(copy[:at])
    if kind == 1:
        copy[at] ^= 1 << rng.integers(8)
    elif kind == 2:  # where the headers are
        near = int(rng.integers(min(400, len(content))))
        copy[rng.choice([near, -1 - near])] ^= 1 << rng.integers(8)
    elif kind == 3:
        piece = rng.bytes(int(rng.integers(1, 64)))
        copy[at : at + len(piece)] = piece
    else:
        start, length = int(rng.integers(len(content))), int(rng.integers(1, 4096))
        copy[at : at + length] = content[start : start + length]
    return bytes(copy)


def other_optimizer(content, rng):
    """A last.pt, whole but for one value of its optimizer's state."""
    checkpoint = torch.load(io.BytesIO(content), weights_only=True)
    state = checkpoint["optimizer"]["state"]
    values = state[rng.choice(list(state))]
    name = rng.choice(list(values))
    value = values[name]
    replacements = [value.flatten()[:1], value.double(), value[None], torch.zeros(1).expand(10**9), value.to_sparse(),
                    value.to("meta"), value.bool(), None, 3.0, "text", value.conj() + 0j]  # fmt: skip
    values[name] = replacements[rng.integers(len(replacements))]
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


def other_config(content, rng):
    """A config.json with one value of another type."""
    config = json.loads(content)
    place = config["args"] if rng.random() < 0.7 else config
    values = [None, "x", -1, 1e99, [], {}, True, "\x1b[31m", 10**30]
    place[rng.choice(list(place))] = values[rng.integers(len(values))]
    return json.dumps(config).encode()


def attempt(module, argv):
    """What main() returns, as text, or "one line" if it refuses; "crash" if the process ends otherwise."""
    ours, theirs = multiprocessing.get_context("fork").Pipe(False)
    process = multiprocessing.get_context("fork").Process(target=answer, args=(theirs, module, argv))
    process.start()
    theirs.close()
    try:
        found = ours.recv() if ours.poll(120) else "hang"
    except EOFError:  # it ended without an answer
        found = "crash"
    process.kill() if found == "hang" else process.join()
    return found if process.exitcode in (0, None) or found == "hang" else "crash"


def answer(pipe, module, argv):
    torch.set_num_threads(1)
    try:
        found = repr(without_drawing(module.main, *argv)[0])
        pipe.send(re.sub("[0-9a-f]{64}", "SHA-256", found))  # a file damaged between its members has another one
    except utils.ScriptError as error:
        pipe.send("one line" if "\n" not in str(error) and error.code == 2 else f"bad error {error}")


def main(folder, seconds, seed):
    torch.set_num_threads(1)  # a forked process must not find a pool of threads that is not there
    run, picture = str(folder / "run"), str(folder / "run" / "picture.png")
    flags = [*TINY.split(), "--output-dir", run]
    score, resume, explain = (evaluate, [run]), (train, [*flags, "--resume"]), (gradcam, [run])
    for module, argv in ((train, flags), score):
        without_drawing(module.main, *argv)
    logits, labels = utils.load_logits(run, "test")
    wrong = np.exp(utils.log_softmax(logits)).max(1)[logits.argmax(1) != labels]
    find = (failures, [run, "--threshold", str(np.sort(wrong)[-12])])  # eleven of them
    for module, argv in (find, explain):
        without_drawing(module.main, *argv)
    unfinished = utils.load_checkpoint(folder / "run/last.pt") | {"finished": False, "epoch": 1}
    unfinished["history"] = unfinished["history"][:1]  # so that a resume trains
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(picture)
    table = (  # file, how it is damaged, who reads it, whether it has a checksum
        ("best.pt", damaged, [(gradcam, [run, "--index", "1", "2"]), score], True),
        ("last.pt", damaged, [resume], True),
        ("last.pt", other_optimizer, [resume], False),
        ("test_logits.npy", damaged, [find, score], True),
        ("test_labels.npy", damaged, [find], True),
        ("val_logits.npy", damaged, [score], True),
        ("metrics.json", damaged, [find, score], False),
        ("config.json", damaged, [find, explain, score], False),
        ("config.json", other_config, [find, explain, score, resume], False),
        ("failures.csv", damaged, [explain, score], False),
        ("attention.csv", damaged, [score], False),
        ("log.csv", damaged, [score], False),
        ("picture.png", damaged, [(gradcam, [run, "--image", picture])], False),
    )
    for number, (name, damage, calls, has_checksum) in enumerate(table):
        rng = np.random.default_rng([seed, number])
        start, outcomes, path = time.monotonic(), Counter(), folder / "run" / name
        good = {file: file.read_bytes() for file in path.parent.iterdir() if file.is_file()}
        if damage is other_optimizer:
            torch.save(unfinished, path)
        content = path.read_bytes()
        expected = [attempt(*call) for call in calls]
        assert not {"one line", "hang", "crash"} & {*expected}, (name, expected)
        while time.monotonic() - start < seconds / len(table):
            hurt = damage(content, rng)
            for call, right in zip(calls, expected):
                path.write_bytes(hurt)
                found = attempt(*call)
                known = found in ("one line", "hang", "crash") or found.startswith("bad error")
                outcome = found if known else "same result" if found == right else "another result"
                outcomes[outcome] += 1
                bad = not known and has_checksum and outcome == "another result"
                if bad or (known and found != "one line"):
                    kept = Path(tempfile.gettempdir()) / f"damaged-{name}"
                    kept.write_bytes(hurt)
                    sys.exit(f"{name}: {outcome} of {call[0].__name__} {call[1]}; the file is {kept}")
                for file, before in good.items():
                    if not file.exists() or file.read_bytes() != before:
                        file.write_bytes(before)
        print(f"{name}, {damage.__name__}: {sum(outcomes.values())} times, {dict(outcomes)}", flush=True)


if __name__ == "__main__":
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else int(time.time())
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as holder:
        main(Path(holder), seconds, seed)
