"""How fast, and in how much memory, a manifest of ten million samples opens, and its order is drawn.

    python -m benchmarks.manifest --out benchmarks/results [--samples 10000000]

The index is generated, the shards are sparse files of the right size, so no pixels exist; what is opened is checked as
any pack is: digest of the index, presence and size of every shard. Each measurement is a process of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_lmk.data.shards.records import FORMAT, FORMAT_VERSION, INDEX_DTYPE, fingerprint_of
from ddpm_lmk.data.spec import unlabelled
from ddpm_lmk.system.files import write_json
from ddpm_lmk.system.machine import hardware, versions

PER_SHARD = 1000
IMAGE_BYTES, JSON_BYTES = 128 + 256 * 256, 200
SAMPLE_BYTES = 512 + -(-IMAGE_BYTES // 512) * 512 + 512 + 512

MEASURE = """
import json, sys, time
from pathlib import Path
import numpy as np
def lines(): return dict(l.split(":", 1) for l in Path("/proc/self/status").read_text().splitlines())
def mb(key): return int(lines()[key].split()[0]) * 1024 / 1e6
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.loading.order import SampleOrder
before = mb("VmRSS")
began, cpu = time.perf_counter(), time.process_time()
manifest = Manifest.open(sys.argv[1])
opened, cpu = time.perf_counter() - began, time.process_time() - cpu
rows = manifest.rows(["train"])
order = SampleOrder(0, [rows], None, 16)
ready = time.perf_counter() - began
highest = mb("VmHWM")
began = time.perf_counter()
for start in range(0, 100_000, 256):
    order.at(np.arange(start, start + 256))
drawn = time.perf_counter() - began
result = {"open_s": opened, "open_cpu_s": cpu, "ready_s": ready}
result |= {"imports_mb": before, "highest_mb": highest, "train_samples": len(rows)}
result |= {"draw_us_per_sample": drawn / 100_000 * 1e6, "after_draw_mb": mb("VmHWM"), "own_mb": mb("RssAnon")}
sys.stdout.write(json.dumps(result))
"""


def main() -> None:
    """Generate, measure in fresh processes, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="manifest-") as folder:
        generate(Path(folder), args.samples)
        size = (Path(folder) / "index.npy").stat().st_size
        runs = [measure(Path(folder)) for _ in range(args.repeats)]
    median = {key: round(float(np.median([run[key] for run in runs])), 3) for key in runs[0]}
    result = {
        "samples": args.samples,
        "shards": -(-args.samples // PER_SHARD),
        "index_mb": round(size / 1e6, 1),
        "repeats": args.repeats,
        **median,
        "hardware": hardware(),
        "versions": versions("ddpm-lmk", "numpy"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(args.out / f"manifest_{args.samples // 1_000_000}m.json", result)
    print(json.dumps(result, indent=1))


def generate(folder: Path, samples: int) -> None:
    """A pack of `samples` images of 256 px, 95 % of them for training, without their pixels."""
    index = np.zeros(samples, INDEX_DTYPE)
    number = np.arange(samples)
    index["shard"], place = number // PER_SHARD, number % PER_SHARD * SAMPLE_BYTES
    index["offset"], index["json_offset"] = place + 512, place + SAMPLE_BYTES - 512
    index["size"], index["json_size"], index["width"], index["height"] = IMAGE_BYTES, JSON_BYTES, 2048, 2500
    rng = np.random.default_rng(0)
    index["split"] = rng.random(samples) < 0.05
    for column in range(16):
        index["sha256"][:, column] = rng.integers(0, 256, samples, np.uint8)
    np.save(folder / "index.npy", index, allow_pickle=False)
    counts = np.bincount(index["shard"]).tolist()
    shards = []
    for shard, count in enumerate(counts):
        name, size = f"shard-{shard:06d}.tar", count * SAMPLE_BYTES + 10240
        with open(folder / name, "wb") as file:
            file.truncate(size)
        digest = hashlib.sha256(name.encode()).hexdigest()
        shards.append({"name": name, "size": size, "sha256": digest, "count": count})
    write_json(folder / "manifest.json", header(folder, samples, shards))


def header(folder: Path, samples: int, shards: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest of the generated pack."""
    with open(folder / "index.npy", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    content: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "dataset": "generated",
        "spec": unlabelled("generated").model_dump(mode="json"),
        "splits": ["train", "test"],
        "encoding": "raw",
        "bits": 8,
        "stored_size": 256,
        "aspect": "squeeze",
        "settings": {},
        "count": samples,
        "shards": shards,
        "index_sha256": digest,
    }
    return content | {"fingerprint": fingerprint_of(content)}


def measure(folder: Path) -> dict[str, float]:
    """Open the pack in a new process."""
    done = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
