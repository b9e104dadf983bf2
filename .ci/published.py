#!/usr/bin/env python3
"""Do the published runs agree with themselves, and does README with them?

    python .ci/published.py
"""

import functools
import re
import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import evaluate  # noqa: E402
import utils  # noqa: E402
from test_smoke import HERE, SCRATCH, read_csv, replaced, without_drawing  # noqa: E402
from test_smoke import run as run_tests  # noqa: E402


@functools.cache
def published():
    """{name: Run} of results/, from a copy of this session's."""
    work = shutil.copytree(HERE / "results", SCRATCH / "results")
    folders = sorted(path.parent for path in work.glob("*/config.json"))
    return {path.name: evaluate.read_run(*utils.open_run(path), path.name) for path in folders}


def test_published_runs_agree_with_themselves():
    """The commands of results/README.md, without data, change no published file; failures are those of the logits."""
    work = next(iter(published().values())).folder.parent
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    commands = re.findall(r"^python evaluate.py (.*)$", (work / "README.md").read_text(), re.M)
    with replaced(evaluate, "HERE", SCRATCH), replaced(evaluate, "load_dataset", None):
        for command in commands:
            folders = [folder for pattern in command.split() for folder in sorted(SCRATCH.glob(pattern))]
            without_drawing(evaluate.main, *folders)
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
            known = re.findall(r"[-+]?\d+\.\d+", reports) + ["65.96", "65.88", "0.1"]
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
    full = {name: [runs[name], *(run for run in runs.values() if run.name.startswith(f"{name}-seed4"))]
            for name in ("baseline", "smoothing0.1")}  # fmt: skip
    counts = [np.mean([[(run.raw.failures & part).sum() for part in (True, data.DOUBTFUL)] for run in arm], 0)
              for arm in full.values()]  # fmt: skip
    words = "Of {:.0f} confident errors of a full-width network, {:.0f} have a label", "smoothing, {1:.0f} of {0:.0f}."
    assert all(text.format(*pair) in readme for text, pair in zip(words, counts)), counts
    shares = [100 - 100 * np.mean([run.trust["answers"] for run in arm]) for arm in full.values()]
    assert "must refuse {:.0f} % of the images; with smoothing, {:.0f} %".format(*shares) in readme


if __name__ == "__main__":
    outcomes = run_tests([test_published_runs_agree_with_themselves, test_published_numbers_in_readme])
    sys.exit("failed" in outcomes)
