"""Damage some samples of a pack and train on it: all of them listed, none trained on, no healthy one listed.

    python benchmarks/quarantine.py [--out benchmarks/results] [--images 2000]

For each share of damaged samples a tiny network is trained for one epoch: twice, and once killed (SIGKILL at its third
checkpoint) and continued. The runs have to agree bit for bit: weights, average and `quarantine.jsonl`. Ids of what a
loader hands out are compared with those damaged besides. Writes `quarantine.json` into `--out`; exits 1 if anything is
not as wanted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data import open_loader
from ddpm_lmk.data.prints import write_prints
from ddpm_lmk.data.shards import Manifest, SampleRecord, ShardWriter, to_stored_matrix
from ddpm_lmk.data.spec import unlabelled
from ddpm_lmk.data.stored import encode
from ddpm_lmk.machine import hardware, versions
from ddpm_lmk.runfile import dump_run

SHARES = (0.0005, 0.005, 0.05)
SIZE = 32
GROUP = 80
KILLED_AT = "save.recorded:3"
SHARD_BYTES = 256 * 1536


def main() -> None:
    """Measure every share and write the result file."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(Path(folder), share, options.images) for share in SHARES]
    result = {
        "benchmark": "quarantine",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "images": options.images,
        "killed_at_failpoint": KILLED_AT,
        "hardware": hardware(),
        "versions": versions("torch", "numpy"),
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "quarantine.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(f"{path}\n")
    sys.exit(0 if all(row["is_as_wanted"] for row in rows) else 1)


def measure(folder: Path, share: float, images: int) -> dict[str, Any]:
    """One share of damaged samples: three runs, and the loader by itself."""
    data = folder / f"pack-{share}"
    _pack_noise(data, images)
    damaged = _damage(data, share)
    cfg = _config(data)
    trained_on, met = _stream(cfg, steps=images // GROUP)
    runs = [_train(cfg, folder / f"run-{share}-{name}", kill=name == "killed") for name in ("a", "b", "killed")]
    listed = [entry["row"] for entry in runs[0]["entries"]]
    row: dict[str, Any] = {
        "damaged_pct": 100 * share,
        "damaged_samples": len(damaged),
        "listed_samples": len(listed),
        "damaged_and_not_listed": len(damaged - set(listed)),
        "healthy_and_listed": len(set(listed) - damaged),
        "listed_twice": len(listed) - len(set(listed)),
        "damaged_and_trained_on": len(damaged & trained_on),
        "met_by_the_loader_alone": len(met),
        "two_runs_agree": runs[0]["digests"] == runs[1]["digests"],
        "killed_run_agrees": runs[0]["digests"] == runs[2]["digests"],
        "digests": runs[0]["digests"],
    }
    row["is_as_wanted"] = set(listed) == damaged == met and not damaged & trained_on and not row["listed_twice"]
    row["is_as_wanted"] &= row["two_runs_agree"] and row["killed_run_agrees"]
    sys.stdout.write(f"{json.dumps(row)}\n")
    return row


def _pack_noise(out: Path, images: int) -> None:
    rng = np.random.default_rng(0)
    common: dict[str, Any] = {"dataset": "noise", "spec": unlabelled("noise"), "splits": ("train",), "settings": {}}
    with ShardWriter(
        out, **common, encoding="raw", bits=8, stored_size=SIZE, aspect="squeeze", shard_bytes=SHARD_BYTES
    ) as writer:
        matrix = to_stored_matrix((SIZE, SIZE), SIZE, "squeeze")
        for i in range(images):
            record = SampleRecord(f"{i:06d}", "noise", "train", None, (SIZE, SIZE), None, None, matrix)
            writer.add(record, encode(rng.integers(0, 256, (SIZE, SIZE)).astype(np.uint8), "raw", 90))
    write_prints(Manifest.open(out))


def _damage(data: Path, share: float) -> set[int]:
    """Flip one random bit in each of some samples; returns their rows."""
    rng, manifest = np.random.default_rng(1), Manifest.open(data)
    rows = rng.choice(len(manifest), round(share * len(manifest)), replace=False).tolist()
    for row in rows:
        entry = manifest.index[row]
        with open(data / manifest.shards[int(entry["shard"])]["name"], "r+b") as file:
            place = int(entry["offset"]) + int(rng.integers(int(entry["size"])))
            file.seek(place)
            byte = file.read(1)[0] ^ (1 << int(rng.integers(8)))
            file.seek(place)
            file.write(bytes([byte]))
    return set(rows)


def _config(data: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {
                "path": str(data),
                "image_size": SIZE,
                "residency": "stream",
                "workers": 1,
                "max_bad_fraction": 0.1,
            },
            "model": {"width": 8, "multipliers": [1, 2], "patch": 4, "heads": 2, "head_dim": 4},
            "task": {"kind": "denoise"},
            "train": {"length": "1 epochs", "group_size": GROUP, "checkpoint_every": 10},
        }
    )


def _stream(cfg: RunConfig, steps: int) -> tuple[set[int], set[int]]:
    """Rows that the loader hands out in an epoch, and those it met and could not read."""
    loader = open_loader(cfg, stage="train")
    handed, met = set(), set()
    for _, group in zip(range(steps), loader.groups(0)):
        handed |= {int(name.split(":")[1]) for batch in group.micro_batches for name in batch.ids}
        met |= {bad.row for bad in group.bad}
    loader.close()
    return handed, met


def _train(cfg: RunConfig, out: Path, *, kill: bool) -> dict[str, Any]:
    """Run, killed and run again if asked; what was listed, and digests of all that has to agree."""
    run_file = out.with_name(f"{out.name}.yaml")
    run_file.write_text(dump_run(cfg))
    command = [sys.executable, "-m", "ddpm_lmk.cli", "pretrain", str(run_file), "--out", str(out), "--cpu", "1"]
    if kill:
        stopped = subprocess.run(command, env=os.environ | {"LMK_FAILPOINT": KILLED_AT}, check=False)
        assert stopped.returncode == -9, f"exit {stopped.returncode}, wanted to be killed"
    subprocess.run(command, check=True)
    snapshot = max((out / "snapshots").iterdir())
    files = [out / "quarantine.jsonl", snapshot / "model.safetensors", snapshot / "ema.safetensors"]
    lines = (out / "quarantine.jsonl").read_text().splitlines()
    return {
        "entries": [json.loads(line) for line in lines],
        "digests": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files},
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the result file")
    parser.add_argument("--images", type=int, default=2000, help="images of the pack")
    return parser.parse_args()


if __name__ == "__main__":
    main()
