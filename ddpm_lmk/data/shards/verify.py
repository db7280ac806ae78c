"""Packed shards: what to import for writing (`ShardWriter`), reading (`Manifest`) and the full check (`verify`)."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ddpm_lmk.data.duplicates.fingerprints import FILE_NAME as PRINTS
from ddpm_lmk.data.duplicates.fingerprints import check_fingerprints
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.records import EXTENSIONS, INDEX_DTYPE, CorruptSampleError, SampleRecord, to_stored_matrix
from ddpm_lmk.data.shards.remote import CacheSettings, is_remote
from ddpm_lmk.data.shards.signing import FILE_NAME as SIGNATURE
from ddpm_lmk.data.shards.writer import ShardWriter
from ddpm_lmk.data.sources.tar import DamagedTarError, TrailingBytesError, members
from ddpm_lmk.errors import CheckpointError, DataError

__all__ = [
    "INDEX_DTYPE",
    "CorruptSampleError",
    "Manifest",
    "SampleRecord",
    "ShardWriter",
    "VerifyReport",
    "to_stored_matrix",
    "verify",
]


@dataclass
class VerifyReport:
    """What a full check saw. `problems`: one line each; `foreign`: what has no business in a shard or beside it;
    `is_listed`: whether it could be seen what lies beside.
    """

    root: str | Path
    samples: int = 0
    shards: int = 0
    bytes: int = 0
    per_split: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    is_listed: bool = True

    @property
    def is_good(self) -> bool:
        """Nothing was found wrong."""
        return not (self.problems or self.foreign)

    def check(self) -> None:
        """Raise CheckpointError for foreign members, DataError for damage, with the first finding."""
        if self.foreign:
            raise CheckpointError(
                f"{self.root}: {len(self.foreign)} foreign members, first: {self.foreign[0]}; do not use it"
            )
        if self.problems:
            raise DataError(f"{self.root}: {len(self.problems)} problems, first: {self.problems[0]}; pack again")


def verify(path: str | Path, cache: CacheSettings | None = None) -> VerifyReport:
    """Read everything: every byte of every file, tar members, pixels, and every JSON against the index.

    A changed byte is found wherever it is. In the padding of a tar it harms no sample and training would not notice,
    but a shard that is not as it was packed has been through something: it counts, and is said to be harmless.

    Args:
        path: a folder or URL; of a URL everything is fetched anew, a shard at a time.
        cache: where there is room for a shard.

    Raises:
        DataError: the folder cannot even be opened: manifest or index changed, a shard missing, cut off or grown.
        StoppedError: a server does not answer.
    """
    with _opened(path, cache or CacheSettings()) as manifest:
        report = VerifyReport(path, samples=len(manifest), shards=len(manifest.shards))
        report.per_split = manifest.count_per_split()
        names = manifest.names()
        report.is_listed = names is not None
        report.foreign += sorted((names or set()) - _expected_files(manifest))
        report.problems += _beside(manifest)
        last_id = ""
        for number in range(len(manifest.shards)):
            last_id = _verify_shard(manifest, number, last_id, report)
        report.problems = [line.replace(str(manifest.root), str(path)) for line in report.problems]
    return report


@contextmanager
def _opened(path: str | Path, cache: CacheSettings) -> Iterator[Manifest]:
    """A URL gets a cache of its own, for the time of the check: older copies say nothing about what lies there now."""
    if not is_remote(path):
        manifest = Manifest.open(path)
        yield manifest
        manifest.close()
        return
    cache.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix=".verify-", dir=cache.root) as folder:
        manifest = Manifest.open(path, CacheSettings(Path(folder), limit_gib=_ANY_GIB))
        yield manifest
        manifest.close()


_ANY_GIB = 1e6  # a shard is dropped when it has been checked


def _verify_shard(manifest: Manifest, number: int, last_id: str, report: VerifyReport) -> str:
    """Add what is wrong with a shard; returns the id of its last sample."""
    shard = manifest.shards[number]
    report.bytes += shard["size"]
    before = len(report.problems) + len(report.foreign)
    _verify_members(manifest, number, report)
    for row in range(*manifest.starts[number : number + 2].tolist()):
        last_id = _verify_row(manifest, row, last_id, report)
    if _sha256(manifest.shard_path(number)) != shard["sha256"]:
        is_harmless = before == len(report.problems) + len(report.foreign)
        where = ", in a header or padding: every sample is as it was packed" if is_harmless else ""
        report.problems.append(f"{shard['name']}: sha256 differs from the manifest{where}")
    manifest.forget(number)
    return last_id


def _beside(manifest: Manifest) -> list[str]:
    """Problems of the files that are not shards; the index was checked when it was opened."""
    problems = []
    content = (manifest.root / "manifest.json").read_bytes()
    if content != json.dumps(json.loads(content), indent=1).encode("ascii"):
        problems.append("manifest.json: not the bytes that were written, though they mean the same")
    if manifest.refused_sha256 is not None and _sha256(manifest.beside("refused.jsonl")) != manifest.refused_sha256:
        problems.append("refused.jsonl: missing, or sha256 differs from the manifest")
    if (manifest.root / PRINTS).exists():
        try:
            check_fingerprints(manifest)
        except DataError as error:
            problems.append(str(error))
    return problems


def _sha256(path: Path | None) -> str | None:
    if path is None:
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify_row(manifest: Manifest, row: int, last_id: str, report: VerifyReport) -> str:
    """Add what is wrong with a row; returns its id, or the last one where it cannot be read."""
    try:
        record = _checked_row(manifest, row)
    except DataError as error:
        report.problems.append(str(error))
        return last_id
    if row and record.id <= last_id:
        report.problems.append(f"row {row}: ids are not ascending or come twice")
    return record.id


def _checked_row(manifest: Manifest, row: int) -> SampleRecord:
    manifest.decode(row)
    record = manifest.read_record(row)
    entry = manifest.index[row]
    if record.native_size != (entry["width"], entry["height"]) or record.split != manifest.splits[entry["split"]]:
        raise DataError(f"row {row}: JSON and index disagree on native size or split")
    if record.points is not None and record.points.shape != (manifest.spec.num_landmarks, 2):
        raise DataError(f"row {row}: {len(record.points)} points, {manifest.spec.num_landmarks} wanted")
    return record


def _verify_members(manifest: Manifest, number: int, report: VerifyReport) -> None:
    shard = manifest.shards[number]
    rows = manifest.index[manifest.starts[number] : manifest.starts[number + 1]]
    wanted = {int(offset): f".{EXTENSIONS[manifest.encoding]}" for offset in rows["offset"]}
    wanted |= {int(offset): ".json" for offset in rows["json_offset"]}
    try:
        for member, fault in members(manifest.shard_path(number)):
            suffix = wanted.pop(member.offset_data, None)
            if fault is not None or suffix is None or "/" in member.name or not member.name.endswith(suffix):
                why = "" if fault is None else f" ({fault})"
                report.foreign.append(f"{member.name!r} in {shard['name']}{why}")
    except TrailingBytesError:
        pass  # harms no sample; the digest of the shard tells
    except DamagedTarError as error:
        report.problems.append(f"{shard['name']}: {error}")
    if wanted:
        report.problems.append(f"{shard['name']}: {len(wanted)} members of the index are not in the tar")


def _expected_files(manifest: Manifest) -> set[str]:
    return {"manifest.json", "index.npy", "refused.jsonl", PRINTS, SIGNATURE} | {
        shard["name"] for shard in manifest.shards
    }
