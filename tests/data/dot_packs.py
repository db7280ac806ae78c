"""Small packed sets for loader tests: a bright dot on every landmark, so that pixels say where points are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.images.resize import encode
from ddpm_lmk.data.shards.records import Encoding, SampleRecord, to_stored_matrix
from ddpm_lmk.data.shards.writer import ShardWriter
from ddpm_lmk.data.spec import DatasetSpec, PairSpacing, unlabelled

NATIVE = (300, 200)
DOTS = DatasetSpec(
    name="dots", landmark_names=("a", "b", "c"), unit="mm", sdr_thresholds=(2,), spacing=PairSpacing(i=0, j=2, mm=50)
)


def pack_dots(
    out: Path,
    counts: Mapping[str, int],
    *,
    size: int = 64,
    bits: int = 8,
    labels: bool = True,
    unlabelled_ids: tuple[str, ...] = (),
    seed: int = 0,
    encoding: Encoding = "raw",
    noise: float = 0.02,
    suffixes: Mapping[int, str] = {},
    per_shard: int = 4,
) -> Path:
    """Write a pack with `counts` images per split, `per_shard` raw images a shard.

    `suffixes`: words for `bad_decoders`, by the number in the name of the image.
    """
    rng = np.random.default_rng(seed)
    spec = DOTS if labels else unlabelled(out.name)
    common: dict[str, Any] = {"dataset": out.name, "spec": spec, "splits": tuple(counts), "bits": bits, "settings": {}}
    image_bytes = size * size * bits // 8
    with ShardWriter(
        out, **common, encoding=encoding, stored_size=size, aspect="squeeze", shard_bytes=per_shard * image_bytes
    ) as writer:
        for sample_id, split in sorted(
            (f"{split}-{i:03d}", split) for split, count in counts.items() for i in range(count)
        ):
            points = rng.uniform(0.25, 0.75, (3, 2)) * NATIVE
            has_label = labels and sample_id not in unlabelled_ids
            to_stored = to_stored_matrix(NATIVE, size, "squeeze")
            record = SampleRecord(
                sample_id, out.name, split, points if has_label else None, NATIVE, None, None, to_stored
            )
            image = _draw(points @ to_stored[:, :2].T + to_stored[:, 2], size, bits, rng, noise)
            word = suffixes.get(int(sample_id[-3:]), "")
            writer.add(record, encode(image, encoding, 90) + (f"END OF PICTURE{word}".encode() if word else b""))
    return out


def _draw(stored_points: np.ndarray, size: int, bits: int, rng: np.random.Generator, noise: float) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    image = rng.uniform(0, noise, (size, size))
    for px, py in stored_points:
        image += np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * (size / 32) ** 2))
    top = 2**bits - 1
    return np.round(np.clip(image / 1.5, 0, 1) * top).astype(np.uint8 if bits == 8 else np.uint16)


def run_config(
    path: Path | list[Path], *, task: str = "landmarks", seed: int = 0, **sections: dict[str, Any]
) -> RunConfig:
    """A run on packs; `sections` override fields of data, train and evaluate."""
    paths = [str(p) for p in (path if isinstance(path, list) else [path])]
    return RunConfig.model_validate(
        {
            "seed": seed,
            "task": {"kind": task},
            "data": {"path": paths, "image_size": 64, "workers": 0, **sections.get("data", {})},
            "train": {"group_size": 8, **sections.get("train", {})},
            "evaluate": {"split": "test", "batch": 4, **sections.get("evaluate", {})},
        }
    )


def corrupt(pack: Path, rows: list[int]) -> None:
    """Flip a byte of the image of each row, in the shard."""
    from ddpm_lmk.data.shards.manifest import Manifest

    manifest = Manifest.open(pack)
    for row in rows:
        entry = manifest.index[row]
        with (pack / manifest.shards[int(entry["shard"])]["name"]).open("r+b") as file:
            file.seek(int(entry["offset"]) + 500)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 0xFF]))
