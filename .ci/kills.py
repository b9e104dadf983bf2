#!/usr/bin/env python3
"""SIGKILL at random instants, each time followed by --resume: the same bits as an undisturbed run.

    python .ci/kills.py        # 20 kills, some three minutes on two cores; or another number of kills
"""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import utils  # noqa: E402
from test_smoke import same_run  # noqa: E402

FLAGS = (
    "--dataset synthetic --device cpu --width 8 --limit 1000 --batch-size 100 --val-size 100 --epochs 8 "
    "--patience 0 --lr 0.1 --mixup 0.4 --cutmix 1 --resume --output-dir"
).split()


def start(run_dir):
    return subprocess.Popen([sys.executable, HERE / "train.py", *FLAGS, run_dir], stdout=subprocess.DEVNULL)


def main(wanted=20):
    kills = rounds = 0
    with tempfile.TemporaryDirectory(prefix="kills ") as folder:
        begin, straight = time.monotonic(), Path(folder) / "undisturbed"
        assert start(straight).wait() == 0
        whole = time.monotonic() - begin
        while kills < wanted:
            rounds += 1
            run_dir, code, longest = Path(folder) / f"tormented {rounds}", None, whole
            while code is None:
                process = start(run_dir)
                try:
                    code = process.wait(random.uniform(0.3, 1) * longest)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    kills += 1
                    longest *= 1.05  # so that it also ends on a machine that becomes busy
                    for checkpoint in run_dir.glob("*.pt"):
                        utils.load_checkpoint(checkpoint)  # whole, the old one or the new one
            assert code == 0 and same_run(run_dir, straight), run_dir
    print(f"{kills} kills in {rounds} runs: the same bits as without")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
