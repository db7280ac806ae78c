"""A small set whose ids are as awkward as ids may be, written without packing."""

import numpy as np

from ddpm_lmk.data.images.resize import encode
from ddpm_lmk.data.shards.records import SampleRecord, to_stored_matrix
from ddpm_lmk.data.shards.writer import ShardWriter
from ddpm_lmk.data.spec import DatasetSpec, FixedSpacing

SPEC = DatasetSpec(name="t", landmark_names=("a", "b"), unit="mm", spacing=FixedSpacing(mm_per_px=0.1))
IDS = ["001", "002.x", "a b/ü\n", "b\udcff", "c" * 300]


def record(sample_id, number, split="train"):
    points = np.array([[number + 0.25, 2.0], [10.0, number / 3]])
    native = (50 + number, 80)
    return SampleRecord(sample_id, "t", split, points, native, 0.1, f"p{number}", to_stored_matrix(native, 32, "pad"))


def picture(number, bits=8):
    dtype = np.uint8 if bits == 8 else np.uint16
    return np.random.default_rng(number).integers(0, np.iinfo(dtype).max, (32, 32), dtype, endpoint=True)


def write(out, *, encoding="raw", bits=8, shard_bytes=6000, ids=IDS, drawn=picture):
    names = {"dataset": "t", "spec": SPEC, "splits": ("train", "test1"), "settings": {"kind": "test"}}
    shape = {"encoding": encoding, "bits": bits, "stored_size": 32, "aspect": "pad", "shard_bytes": shard_bytes}
    with ShardWriter(out, **names, **shape) as writer:
        for number, sample_id in enumerate(ids):
            split = "test1" if number == 1 else "train"
            writer.add(record(sample_id, number, split), encode(drawn(number, bits), encoding, 95))
    return out
