"""Mutated input of every kind under a limit of 2 GiB: `make fuzz`, or `python -m tests.faults.fuzz [--count N]`.

Pictures and DICOM films go through the decoding processes of packing, tars through the reader of foreign tars, shards,
manifests and indexes through `Manifest` and `verify`. Each must be read as it was, or give one typed error; a picture
without a checksum of its own (JPEG has none, PNG for its pixels only, DICOM none) may also decode to another picture,
which is counted. Nothing may be lost, run code, write outside its folder, or hang. It stops at the first thing that is
not as it has to be; figures go to `benchmarks/results/fuzz.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import resource
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ddpm_lmk.data.images.sandbox import DEADLINE_S, MEMORY_BYTES, Isolation
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.data.shards.records import CorruptSampleError
from ddpm_lmk.data.shards.verify import verify
from ddpm_lmk.data.sources.tar import DamagedTarError, members
from ddpm_lmk.errors import LmkError
from ddpm_lmk.system.machine import hardware, versions
from tests.faults.fuzz_seeds import picture, seeds
from tests.faults.mutations import mutated

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "fuzz.json"
SHARES = {"png": 0.24, "jpeg": 0.24, "dicom": 0.24, "foreign tar": 0.08, "shard": 0.1, "manifest": 0.06, "index": 0.04}
SLOWEST_S = 20.0
_SEVERAL_LINES = "an error of several lines"
Outcomes = Counter[str]


def campaign(folder: Path, count: int, *, seed: int = 0, workers: int = 1) -> dict[str, Outcomes]:
    """Read `count` mutated inputs, working in `folder`; returns how many ended how, by kind."""
    guard = Guard(folder)
    numbers = {kind: max(4, round(share * count)) for kind, share in SHARES.items()}
    outcomes = {kind: films(seeds(kind), numbers[kind], folder, seed, workers) for kind in ("png", "jpeg", "dicom")}
    outcomes["foreign tar"] = foreign_tars(numbers["foreign tar"], folder, seed)
    packs = [packed(folder / f"pack-{encoding}-{bits}", encoding, bits) for encoding, bits in _PACKS]
    for kind in ("shard", "manifest", "index"):
        outcomes[kind] = Counter()
        for number in range(numbers[kind]):
            outcomes[kind][packs_read(packs[number % len(packs)], kind, random.Random(f"{seed}:{kind}:{number}"))] += 1
        assert outcomes[kind].total() == numbers[kind]
        assert _SEVERAL_LINES not in outcomes[kind]
    guard.check()
    return outcomes


class Guard:
    """Nothing outside of the folder is opened for writing by this process, and nothing unpickles or starts programs."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._is_on, self._seen = str(folder.resolve()), True, list[str]()
        sys.dont_write_bytecode = True
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._is_on:
            return
        if event.startswith(("pickle.", "os.system", "os.exec")):
            self._seen.append(event)
        is_writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if is_writing and isinstance(arguments[0], str):
            place = os.path.abspath(arguments[0])  # noqa: PTH100 - a hook must be quick
            if not place.startswith((self._folder, "/dev/")) and place != tempfile.gettempdir():  # for nameless files
                self._seen.append(f"open {place}")

    def check(self) -> None:
        """Fail if anything was seen."""
        self._is_on = False
        assert self._seen == []


_STORE = {
    "size": 32,
    "aspect": "squeeze",
    "filter": "area",
    "window": "voi",
    "bits": 8,
    "encoding": "raw",
    "quality": 95,
}
_OPTIONS = {"frame": None, "voi": True, "allow_burned_in": False, "only_dicom": False}


def films(originals: list[bytes], count: int, folder: Path, seed: int, workers: int) -> Outcomes:
    """Mutated pictures through decoding processes; one answer each, in time."""
    work = folder / "films"
    work.mkdir(exist_ok=True)
    before = sorted(path.name for path in folder.iterdir())
    outcomes: Outcomes = Counter()

    def job(name: str, data: bytes) -> dict[str, Any]:
        (work / name).write_bytes(data)
        return {"path": str(work / name), "options": _OPTIONS, "native_size": None, "store": _STORE}

    def jobs() -> Iterator[dict[str, Any]]:
        for number in range(count):
            rng = random.Random(f"{seed}:{len(originals)}:{number}")
            data = mutated(originals[number % len(originals)], rng.choice(originals), rng)
            yield job(f"{number % 256}", data)  # names come again long after their file was read

    with Isolation(workers) as isolation:
        wanted = [content for _, content in isolation.answers([job(f"o{n}", data) for n, data in enumerate(originals)])]
        began = time.monotonic()
        for number, (said, content) in enumerate(isolation.answers(jobs())):
            assert "io_error" not in said
            assert time.monotonic() - began < SLOWEST_S + 2 * DEADLINE_S
            began = time.monotonic()
            is_same = content == wanted[number % len(originals)]
            outcomes[said.get("code") or ("identical" if is_same else "another picture")] += 1
    assert outcomes.total() == count
    assert sorted(path.name for path in folder.iterdir()) == before
    return outcomes


def foreign_tars(count: int, folder: Path, seed: int) -> Outcomes:
    """All members are there, perhaps changed (contents and long names have no checksum), or the damage is told."""
    originals = []
    for format_ in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=format_) as tar:
            for number in range(3):
                content = picture(number, kind="PNG")
                info = tarfile.TarInfo("folder-x/" * 15 * (number == 1) + f"{number}.png")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        originals.append(buffer.getvalue())
    outcomes: Outcomes = Counter()
    for number in range(count):
        rng = random.Random(f"{seed}:tar:{number}")
        original = originals[number % 3]
        path = folder / "x.tar"
        path.write_bytes(original)
        wanted = _names(path)[0]
        path.write_bytes(mutated(original, rng.choice(originals), rng))
        found, told = _names(path)
        assert told or len(found) == len(wanted), "a member was lost without a word"
        outcomes[told or ("identical" if found == wanted else "another name or content")] += 1
    return outcomes


def _names(path: Path) -> tuple[list[tuple[str, bytes]], str]:
    """Names and contents of good members, and the kind of refusal, if any."""
    found, told = [], ""
    data = path.read_bytes()
    try:
        for member, fault in members(path):
            told = told or ("TAR_MEMBER" if fault else "")
            if fault is None:
                found.append((member.name, data[member.offset_data : member.offset_data + member.size]))
    except DamagedTarError:
        told = "DamagedTarError"
    return found, told


_PACKS = (("raw", 8), ("png", 16), ("jpeg", 8))


def packed(folder: Path, encoding: str, bits: int) -> tuple[Path, list[tuple[bytes, bytes]]]:
    """A small pack, and the pixels and record of each sample."""
    counts = {"train": 3, "test": 1}
    pack("hand", folder, PackSettings(kind="phantom", size=32, counts=counts, encoding=encoding, bits=bits), workers=1)  # type: ignore[arg-type]
    manifest = Manifest.open(folder)
    rows = [_row(manifest, row) for row in range(len(manifest))]
    manifest.close()
    return folder, rows


def _row(manifest: Manifest, row: int) -> tuple[bytes, bytes]:
    record = manifest.read_record(row)
    points = b"" if record.points is None else record.points.tobytes()
    return manifest.decode(row).tobytes(), repr((record.id, record.split, record.native_size)).encode() + points


_FILES = {"shard": "shard-000000.tar", "manifest": "manifest.json", "index": "index.npy"}
_PAYLOAD = b"cposix\nsystem\n(S'touch /tmp/ddpm-lmk-fuzz-ran'\ntR."


def packs_read(made: tuple[Path, list[tuple[bytes, bytes]]], kind: str, rng: random.Random) -> str:
    """Break one file of a pack, read everything, mend it."""
    folder, wanted = made
    path = folder / _FILES[kind]
    original = path.read_bytes()
    path.write_bytes(_broken(original, kind, rng))
    try:
        return _outcome(folder, wanted)
    finally:
        path.write_bytes(original)


def _broken(original: bytes, kind: str, rng: random.Random) -> bytes:
    if rng.random() < 0.1:  # of the same size, so that only contents tell
        begin = rng.randrange(max(1, len(original) - len(_PAYLOAD)))
        return original[:begin] + _PAYLOAD + original[begin + len(_PAYLOAD) :]
    if kind == "manifest" and rng.random() < 0.1:
        return rng.choice((b"[" * 200_000, b'{"a":' * 50_000, original.replace(b"1", b"1" * 5000), b"\xff" + original))
    return mutated(original, original, rng)


def _outcome(folder: Path, wanted: list[tuple[bytes, bytes]]) -> str:
    """How reading ends. Samples that are read must be those that were packed."""
    told: set[str] = set()
    try:
        manifest = Manifest.open(folder)
    except LmkError as error:
        is_one_line = len(str(error).splitlines()) == 1
        return type(error).__name__ if is_one_line else _SEVERAL_LINES
    for row, sample in enumerate(wanted):
        try:
            assert _row(manifest, row) == sample, "a changed sample was read"
        except CorruptSampleError as error:
            told.add(type(error).__name__)
    manifest.close()
    report = verify(folder)
    assert report.is_good is (folder_is_whole(folder)), "verify did not see the damage"
    return told.pop() if told else "identical" if report.is_good else "identical samples, verify tells"


def folder_is_whole(folder: Path) -> bool:
    """Is every file, byte for byte, as it was written? The manifest cannot hold its own digest; it has one spelling."""
    content = (folder / "manifest.json").read_bytes()
    header = json.loads(content)
    if content != json.dumps(header, indent=1).encode():
        return False
    files = {shard["name"]: shard["sha256"] for shard in header["shards"]} | {"index.npy": header["index_sha256"]}
    return all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for name, digest in files.items())


def main() -> None:
    """Run the campaign and write its figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="decoding processes")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = campaign(Path(folder), options.count, seed=options.seed, workers=options.workers)
    result = {
        "benchmark": "fuzz",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": options.seed,
        "limit_bytes": MEMORY_BYTES,
        "deadline_s": DEADLINE_S,
        "wall_s": round(time.monotonic() - began, 1),
        "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "peak_rss_of_decoding_bytes": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
        "inputs": sum(found.total() for found in outcomes.values()),
        "outcomes": {kind: dict(found.most_common()) for kind, found in outcomes.items()},
        "hardware": hardware(),
        "versions": versions("pillow", "pydicom", "pylibjpeg-openjpeg", "opencv-python-headless", "numpy"),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(f"{json.dumps(result['outcomes'], indent=1)}\n{options.out}\n")


if __name__ == "__main__":
    main()
