"""Processor seconds from a packed pool to a detector: one look from pre-trained weights, two looks from random ones.

    for size in 128 192 512; do
      ddpm-lmk shards pack DATA/isbi2015_ceph --kind table --spec cephalometric --size $size --out shards/isbi$size
    done
    python benchmarks/time_to_accuracy.py --weights runs/pretrain-isbi     # about 8 minutes on a core; hold it to one

One look is the recipe as it was before the second (results/table2_small): 24,000 images of pre-training, then 200
steps, with 10 labels at 192 pixels, since 128 did not reach 2.5 mm. Its pre-training is timed over two short lengths in
turn with the others, and taken as long as it is at the rate between them. Two looks are the recipe as it is, 200 steps,
from random weights. Scoring is timed nowhere; the two looks are scored here, one look has its errors in table2_small.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ddpm_lmk.system import machine

RESULTS = Path(__file__).resolve().parent / "results"
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
IMAGES = 24_000
SHORT, LONG = 400, 2_400
ONE_LOOK = ("data.fine_size=null", "task.refine=null")
WIDE = ("data.path=shards/isbi192", "data.image_size=192", "task.codec.decode_radius_px=5", "optim.lr=1e-3")


def run(*words: str) -> float:
    """Run `ddpm-lmk` with these words; its processor seconds, those of the processes that it started included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "ddpm_lmk.cli", *words], check=True, stdin=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def before(start: str, labels: int) -> dict[str, Any]:
    """Error in mm of a row of one look over its seeds."""
    with (RESULTS / "table2_small" / "report.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if (row["start"], row["protocol"]) == (start, "original")]
    row = next(row for row in rows if row["labels_training"] == str(labels))
    return {"mre_mm": float(row["mre"]), "seeds": int(row["runs"])}


def main() -> None:
    """Time the parts one after the other, score what was not scored before, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="a finished pre-training: where one look starts")
    options = parser.parse_args()
    tune = ("finetune", str(CONFIGS / "finetune" / "isbi_cpu.yaml"), "evaluate.split=null", "train.precision=bf16")
    pool = ("pretrain", str(CONFIGS / "pretrain" / "isbi_cpu.yaml"), "data.fine_size=null", "task.zoom=null")
    started = (*tune, *ONE_LOOK, f"init.weights={options.weights}")
    with tempfile.TemporaryDirectory(prefix="ddpm-lmk-time-") as folder:

        def timed(name: str, *words: str) -> float:
            return run(*words, "--cpu", "1", "--out", f"{folder}/{name}")

        def pretrained(images: int) -> float:
            long = f"train.duration={images} images"
            return timed(f"pool{images}", *pool, "data.path=shards/isbi128", "train.precision=bf16", long)

        two = {10: timed("two-10", *tune, "data.shots=10")}
        short = pretrained(SHORT)
        one = {10: timed("one-10", *started, *WIDE, "data.shots=10")}
        two[50] = timed("two-50", *tune, "data.shots=50")
        one[50] = timed("one-50", *started, "data.path=shards/isbi128", "data.shots=50")
        pre = short + (pretrained(LONG) - short) / (LONG - SHORT) * (IMAGES - SHORT)
        rows = []
        for labels, wide in ((10, "ours-192"), (50, "ours")):
            looked = f"{folder}/two-{labels}"
            run("evaluate", looked, "--data", "shards/isbi512", "--split", "test1", "--out", f"{looked}/scores")
            scores = json.loads(Path(looked, "scores", "results.json").read_text())["protocols"]["original"]
            one_look = {"looks": 1, "pretraining_s": pre, "tuning_s": one[labels], **before(wide, labels)}
            two_looks = {"looks": 2, "pretraining_s": 0, "tuning_s": two[labels], "mre_mm": scores["mre"], "seeds": 1}
            rows += [{"labels": labels} | row for row in (one_look, two_looks)]
    result = {
        "rows": rows,
        "hardware": machine.hardware(),
        "versions": machine.versions("torch"),
        "code": machine.code_digest(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    (RESULTS / "table2_two_looks" / "time_to_accuracy.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
