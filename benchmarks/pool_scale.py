"""Comparing the images of a pool of millions: time and memory, on fingerprints drawn to look like those of real ones.

    python -m benchmarks.pool_scale --data DIR --out benchmarks/results [--films 100000 1000000 10000000]

The 64 bits are drawn from a model with the shares and correlations of those in nih_cxr14_1000, so that they crowd as
chests do. Into each pool copies are planted, with up to 4 of 64 and 24 of 256 bits changed; all of them have to be
found. Every size is a process of its own. Writes `pool_scale.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import NormalDist
from typing import Any

import cv2
import numpy as np

from ddpm_lmk.data.duplicates.fingerprints import FINGERPRINT_DTYPE, perceptual_hash
from ddpm_lmk.data.duplicates.search import MOST_DETAIL_BITS, RADIUS, find_originals
from ddpm_lmk.system.files import write_json
from ddpm_lmk.system.machine import hardware, versions

REAL, SIDE = "nih_cxr14_1000", 128
PLANTED = 1000
_AT_ONCE = 1 << 17


def main() -> None:
    """Learn the model, measure every size, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("LMK_DATA", "shared/data"), help="real x-rays")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--films", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--measure", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (args.data / REAL).is_dir():
        print(f"{args.data} has no {REAL}: nothing is measured; give the folder with --data")
        return
    real = real_looks(args.data / REAL / "images")
    if args.measure:
        print(json.dumps(measure(real, args.measure)))
        return
    words = [sys.executable, "-m", "benchmarks.pool_scale", "--data", str(args.data), "--measure"]
    rows = [
        json.loads(subprocess.run([*words, str(films)], check=True, stdout=subprocess.PIPE).stdout)
        for films in args.films
    ]
    result = {
        "rows": rows,
        "hardware": hardware(),
        "versions": versions("ddpm-lmk", "numpy"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(args.out / "pool_scale.json", result)
    print(json.dumps(result, indent=1))


def real_looks(folder: Path) -> np.ndarray:
    """The 64 bits of every film, as packed at 128 px."""
    films = (cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) for path in sorted(folder.iterdir()))
    return np.array(
        [perceptual_hash(cv2.resize(film, (SIDE, SIDE), interpolation=cv2.INTER_AREA))[0] for film in films]
    )


def model_of(low: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds and mixing matrix of a Gaussian that is cut into bits like these."""
    bits = _bits(low).astype(np.float64)
    correlation = np.sin(np.pi / 2 * np.corrcoef(bits.T))  # of the Gaussian behind two bits, where they are even
    values, vectors = np.linalg.eigh(correlation)
    mixing = vectors * np.sqrt(np.clip(values, 1e-3, None))
    mixing /= np.sqrt((mixing**2).sum(1, keepdims=True))
    shares = np.clip(bits.mean(0), 0.01, 0.99)
    return np.array([NormalDist().inv_cdf(1 - share) for share in shares]), mixing


def draw(model: tuple[np.ndarray, np.ndarray], count: int, *, seed: int) -> np.ndarray:
    """Looks of films that do not exist, `[count]` of 64 bits."""
    rng, (thresholds, mixing) = np.random.default_rng(seed), model
    low = np.empty(count, "<u8")
    for begin in range(0, count, _AT_ONCE):
        size = min(_AT_ONCE, count - begin)
        waves = rng.standard_normal((size, 64), np.float32) @ mixing.T.astype(np.float32)
        low[begin : begin + size] = np.packbits(waves > thresholds, axis=1, bitorder="little").view("<u8")[:, 0]
    return low


def measure(real: np.ndarray, films: int) -> dict[str, Any]:
    """One pool: draw it, plant copies, find them."""
    rng, prints = np.random.default_rng(0), np.zeros(films, FINGERPRINT_DTYPE)
    prints["low"] = draw(model_of(real), films, seed=0)
    for name in ("pixels", "detail"):
        prints[name] = rng.integers(1, 1 << 63, prints[name].shape, np.uint64)
    places = rng.choice(films, 2 * PLANTED, replace=False).reshape(2, PLANTED)
    originals, copies = np.sort(places, axis=0)
    prints["low"][copies] = prints["low"][originals] ^ _flips(rng, 1, RADIUS)[:, 0]
    prints["detail"][copies] = prints["detail"][originals] ^ _flips(rng, 4, MOST_DETAIL_BITS)
    wall, cpu = time.perf_counter(), time.process_time()
    first, _ = find_originals(prints)
    row: dict[str, Any] = {"films": films, "wall_s": round(time.perf_counter() - wall, 1)}
    row["cpu_s"] = round(time.process_time() - cpu, 1)
    row["highest_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)
    found = int((first[copies] == originals).sum())
    return row | {"planted": PLANTED, "found": found, "others_found": int((first != np.arange(films)).sum()) - found}


def _flips(rng: np.random.Generator, words: int, most: int) -> np.ndarray:
    """`[PLANTED, words]` masks with up to `most` bits set."""
    order = rng.random((PLANTED, 64 * words)).argsort(1)
    return np.packbits(order < rng.integers(0, most + 1, (PLANTED, 1)), axis=1, bitorder="little").view("<u8")


def _bits(low: np.ndarray) -> np.ndarray:
    return (low[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)


if __name__ == "__main__":
    main()
