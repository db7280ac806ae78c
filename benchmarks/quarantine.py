"""Damage some samples of a pack and train on it: all of them listed, none trained on, no healthy one listed.

    python benchmarks/quarantine.py [--out benchmarks/results] [--images 2000]

For each share of damaged samples a tiny network is trained for one epoch: by one process twice, then by two and four
real ranks (gloo), and each time once more with a kill: alone by SIGKILL at its third checkpoint and the same command
again, of several ranks one at its second, which the launcher replaces. All runs of a share have to agree bit for bit
(class exact): weights, average and `quarantine.jsonl`. Ids of what the loaders of all ranks hand out are compared with
those damaged besides. At last a budget that is too small: any number of ranks has to end with exit 3, at one step and
with one list. Writes `quarantine.json` into `--out`; exits 1 if anything is not as wanted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import dump_run
from ddpm_lmk.data import open_loader
from ddpm_lmk.data.duplicates.fingerprints import write_prints
from ddpm_lmk.data.images.resize import encode
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.records import SampleRecord, to_stored_matrix
from ddpm_lmk.data.shards.writer import ShardWriter
from ddpm_lmk.data.spec import unlabelled
from ddpm_lmk.system.machine import hardware, versions

CASES = ((0.0005, 1), (0.005, 1), (0.05, 1), (0.005, 2), (0.05, 2), (0.005, 4), (0.05, 4))  # share, processes
SIZE = 32
GROUP, MICRO_BATCH = 80, 20
KILLED_AT = {1: 3, 2: 2, 4: 2}  # saves, by processes: killed when the checkpoint is durable and nothing is dropped yet
ROOT = Path(__file__).resolve().parents[1]
SHARD_BYTES = 256 * 1536
BUDGET, TOO_SMALL = 0.1, 0.01


def main() -> None:
    """Measure every case and write the result file."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        packs = {share: _damaged_pack(Path(folder), share, options.images) for share in sorted(dict(CASES))}
        rows: list[dict[str, Any]] = []
        for share, processes in CASES:
            alone = next((row["digests"] for row in rows if row["damaged_pct"] == 100 * share), None)
            rows.append(measure(*packs[share], share, processes, alone))
        data, _ = packs[0.05]
        stopped = [_stopped(data, processes) for processes in sorted(KILLED_AT)]
    is_as_wanted = all(row["is_as_wanted"] for row in rows) and all(run == stopped[0] for run in stopped)
    result = {
        "benchmark": "quarantine",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "images": options.images,
        "killed_at_save_by_processes": KILLED_AT,
        "hardware": hardware(),
        "versions": versions("torch", "numpy"),
        "rows": rows,
        "too_small_a_budget_by_processes": dict(zip(sorted(KILLED_AT), stopped, strict=True)),
        "is_as_wanted": is_as_wanted and stopped[0]["exit_code"] == 3,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "quarantine.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(f"{path}\n")
    sys.exit(0 if result["is_as_wanted"] else 1)


def measure(
    data: Path, damaged: set[int], share: float, processes: int, alone: dict[str, str] | None
) -> dict[str, Any]:
    """One share of damaged samples and number of processes; `alone`: the digests of one process."""
    cfg = _config(data, BUDGET)
    trained_on, met = _stream(cfg, processes)
    whole, killed = (_train(cfg, data, name, processes) for name in ("whole", "killed"))
    listed = [entry["row"] for entry in whole["entries"]]
    row: dict[str, Any] = {
        "damaged_pct": 100 * share,
        "processes": processes,
        "damaged_samples": len(damaged),
        "listed_samples": len(listed),
        "damaged_and_not_listed": len(damaged - set(listed)),
        "healthy_and_listed": len(set(listed) - damaged),
        "listed_twice": len(listed) - len(set(listed)),
        "damaged_and_trained_on": len(damaged & trained_on),
        "met_by_the_loaders_alone": len(met),
        "killed_run_agrees": killed["kills"] > 0 and whole["digests"] == killed["digests"],
        "agrees_with_one_process": whole["digests"] == (alone or _train(cfg, data, "again", 1)["digests"]),
        "digests": whole["digests"],
    }
    row["is_as_wanted"] = set(listed) == damaged == met and not damaged & trained_on and not row["listed_twice"]
    row["is_as_wanted"] &= row["killed_run_agrees"] and row["agrees_with_one_process"]
    sys.stdout.write(f"{json.dumps(row)}\n")
    return row


def _damaged_pack(folder: Path, share: float, images: int) -> tuple[Path, set[int]]:
    data = folder / f"pack-{share}"
    _pack_noise(data, images)
    return data, _damage(data, share)


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


def _config(data: Path, budget: float) -> RunConfig:
    train = {"length": "1 epochs", "group_size": GROUP, "micro_batch": MICRO_BATCH, "exactness": "exact"}
    return RunConfig.model_validate(
        {
            "data": {
                "path": str(data),
                "image_size": SIZE,
                "residency": "stream",
                "workers": 1,
                "max_bad_fraction": budget,
            },
            "model": {"width": 8, "multipliers": [1, 2], "patch": 4, "heads": 2, "head_dim": 4},
            "task": {"kind": "denoise"},
            "train": train | {"checkpoint_every": 10},
        }
    )


def _stream(cfg: RunConfig, processes: int) -> tuple[set[int], set[int]]:
    """Rows that the loaders of all ranks hand out in an epoch, and those they met and could not read."""
    handed, met = set(), set()
    for rank in range(processes):
        loader = open_loader(cfg, stage="train", rank=rank, world=processes)
        for _, group in zip(range(loader.num_images // GROUP), loader.groups(0)):
            handed |= {int(name.split(":")[1]) for batch in group.micro_batches for name in batch.ids}
            met |= {bad.row for bad in group.bad}
        loader.close()
    return handed, met


def _train(cfg: RunConfig, data: Path, name: str, processes: int) -> dict[str, Any]:
    """Run, killed on the way if `name` says so; what was listed, and digests of all that has to agree."""
    out = data.with_name(f"{data.name}-{processes}-{name}")
    command = _command(cfg, out, processes)
    breaks = [{"call": "ddpm_lmk.rundir.retention.retain", "at": KILLED_AT[processes], "how": "kill"}]
    place = f"{ROOT / 'tests/faults/site'}:{ROOT}"  # see tests/faults/breaking.py
    kill = {"PYTHONPATH": place, "LMK_TEST_BREAKS": json.dumps(breaks)} if name == "killed" else {}
    code = subprocess.run(command, env=os.environ | kill, check=False).returncode
    kills = code == -signal.SIGKILL
    if kills:  # one process alone: nobody else starts it again
        code = subprocess.run(command, check=False).returncode
    assert code == 0, f"exit {code}"
    snapshot = max((out / "snapshots").iterdir())
    files = [out / "quarantine.jsonl", snapshot / "model.safetensors", snapshot / "ema.safetensors"]
    return {
        "entries": _lines(out / "quarantine.jsonl"),
        "kills": kills + sum(event["event"] == "ranks.lost" for event in _lines(out / "events.jsonl")),
        "digests": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files},
    }


def _stopped(data: Path, processes: int) -> dict[str, Any]:
    """How a run ends whose budget is too small."""
    out = data.with_name(f"{data.name}-{processes}-stopped")
    code = subprocess.run(_command(_config(data, TOO_SMALL), out, processes), check=False).returncode
    entries = _lines(out / "quarantine.jsonl")
    digest = hashlib.sha256((out / "quarantine.jsonl").read_bytes()).hexdigest()[:16]
    return {"exit_code": code, "step": entries[-1]["step"], "listed_samples": len(entries), "quarantine_sha256": digest}


def _command(cfg: RunConfig, out: Path, processes: int) -> list[str]:
    run_file = out.with_name(f"{out.name}.yaml")
    run_file.write_text(dump_run(cfg))
    return [
        *(sys.executable, "-m", "ddpm_lmk.cli", "pretrain", str(run_file)),
        *("--out", str(out), "--cpu", str(processes)),
    ]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the result file")
    parser.add_argument("--images", type=int, default=2000, help="images of the pack")
    return parser.parse_args()


if __name__ == "__main__":
    main()
