"""Damage the files of a run 500 times: every script must give the result of the good file, or one line.

    python .ci/damage.py [SEED]      # ten minutes; a seed repeats a campaign

Never a traceback or a hang. Files with a checksum (checkpoints, arrays) must not give another result either;
in a text file a changed digit is another number.
"""

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
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


def attempt(module, argv):
    """What main() returns, as text, or "one line" if it refuses."""
    try:
        return repr(without_drawing(module.main, *argv)[0])
    except utils.ScriptError as error:
        assert "\n" not in str(error) and error.code == 2, error
        return "one line"


def main(folder, seed):
    run, picture = str(folder / "run"), str(folder / "run" / "picture.png")
    flags = [*TINY.split(), "--output-dir", run]
    score, resume, explain = (evaluate, [run]), (train, [*flags, "--resume"]), (gradcam, [run])
    for call in ((train, flags), score):
        assert attempt(*call) != "one line", call
    logits, labels = utils.load_logits(run, "test")
    wrong = np.exp(utils.log_softmax(logits)).max(1)[logits.argmax(1) != labels]
    find = (failures, [run, "--threshold", str(np.sort(wrong)[-12])])  # eleven of them
    for call in (find, explain):
        assert attempt(*call) != "one line", call
    table = (  # file, how often, who reads it, whether it has a checksum
        ("best.pt", 120, [(gradcam, [run, "--index", "1", "2"]), score], True),
        ("last.pt", 100, [resume], True),
        ("test_logits.npy", 40, [find, score], True),
        ("test_labels.npy", 40, [find, score], True),
        ("val_logits.npy", 20, [score], True),
        ("metrics.json", 40, [find, score], False),
        ("config.json", 40, [find, explain, score], False),
        ("failures.csv", 40, [explain], False),
        ("attention.csv", 30, [score], False),
        ("picture.png", 50, [(gradcam, [run, "--image", picture])], False),
    )
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(picture)
    rng, evaluate.RESAMPLES = np.random.default_rng(seed), 100
    for name, count, calls, has_checksum in table:
        start, outcomes, path = time.monotonic(), Counter(), folder / "run" / name
        good = {file: file.read_bytes() for file in path.parent.iterdir()}
        expected = [attempt(*call) for call in calls]
        for _ in range(count):
            content = damaged(good[path], rng)
            for call, right in zip(calls, expected):
                path.write_bytes(content)
                found = attempt(*call)
                outcome = "same result" if found == right else "another result"
                outcome = "one line" if found == "one line" else outcome
                outcomes[outcome] += 1
                assert not (has_checksum and outcome == "another result"), (path, call)
                for file, before in good.items():
                    if not file.exists() or file.read_bytes() != before:
                        file.write_bytes(before)
        print(f"{path.name}: {count} times, {dict(outcomes)}, {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else int(time.time())
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as holder:
        main(Path(holder), seed)
