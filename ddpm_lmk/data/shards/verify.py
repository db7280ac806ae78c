"""`shards verify`: reads every byte of a dataset and holds it against manifest and index."""

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
from ddpm_lmk.data.shards.manifest import SIGNATURE, TARS, Manifest
from ddpm_lmk.data.shards.records import EXTENSIONS, SampleRecord
from ddpm_lmk.data.shards.remote import CacheSettings, is_remote
from ddpm_lmk.data.sources.tar import DamagedTarError, TrailingBytesError, members
from ddpm_lmk.errors import CheckpointError, DataError

_ANY_GIB = 1e6  # a shard is dropped when it has been checked


@dataclass
class VerifyReport:
    """What a full check found. `problems`: one line each; `foreign`: what has no business in a shard or beside it;
    `is_listed`: whether the server lists its folder, so that foreign files could be looked for.
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
    with _opened(path, cache or CacheSettings()) as manifest:  # header, index and sizes are checked by opening
        report = VerifyReport(path, samples=len(manifest), shards=len(manifest.shards))
        report.per_split = manifest.count_per_split()
        names = manifest.files.names()
        report.is_listed = names is not None
        packed = {"manifest.json", "index.npy", "refused.jsonl", PRINTS, SIGNATURE, TARS}
        report.foreign += sorted((names or set()) - packed - {shard["name"] for shard in manifest.shards})
        report.problems += _problems_beside(manifest)
        last_id = ""
        for number in range(len(manifest.shards)):
            last_id = _verify_shard(manifest, number, last_id, report)
        # Of a URL the root is a folder of the cache that is gone by now.
        report.problems = [line.replace(str(manifest.root), str(path)) for line in report.problems]
    return report


@contextmanager
def _opened(path: str | Path, cache: CacheSettings) -> Iterator[Manifest]:
    """A URL gets a cache of its own, for the time of the check: older copies say nothing about what lies there now.

    So do remote tars of a dataset in place.
    """
    tars = Path(path) / TARS
    if not (is_remote(path) or (tars.is_file() and is_remote(tars.read_text(errors="surrogateescape")))):
        manifest = Manifest.open(path)
        yield manifest
        manifest.close()
        return
    cache.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix=".verify-", dir=cache.root) as folder:
        manifest = Manifest.open(path, CacheSettings(Path(folder), limit_gib=_ANY_GIB))
        yield manifest
        manifest.close()


def _problems_beside(manifest: Manifest) -> list[str]:
    """Problems of the files that are not shards; the index was checked when it was opened."""
    problems = []
    content = (manifest.root / "manifest.json").read_bytes()
    # The fingerprint covers what the JSON means; a blank that was added changes no meaning, but is a changed byte.
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


def _verify_shard(manifest: Manifest, number: int, last_id: str, report: VerifyReport) -> str:
    """Add what is wrong with a shard; returns the id of its last sample that can be read."""
    shard = manifest.shards[number]
    report.bytes += shard["size"]
    before = len(report.problems) + len(report.foreign)
    _verify_members(manifest, number, report)
    for row in range(*manifest.starts[number : number + 2].tolist()):
        try:
            record = _checked_record(manifest, row)
        except DataError as error:
            report.problems.append(str(error))
            continue
        if manifest.tars is manifest.files and row and record.id <= last_id:  # else in the order of the tars
            report.problems.append(f"row {row}: ids are not ascending or come twice")
        last_id = record.id
    is_harmless = before == len(report.problems) + len(report.foreign)
    where = ", in a header or padding: every sample is as it was packed" if is_harmless else ""
    files = [(manifest.files, shard)]
    if "tar" in shard:
        files.append((manifest.tars, shard["tar"]))
        report.bytes += shard["tar"]["size"]
    for place, known in files:
        if _sha256(place.path(number)) != known["sha256"]:
            report.problems.append(f"{known['name']}: sha256 differs from the manifest{where}")
        place.forget(number)  # a copy: the check of a terabyte needs room for one shard
    return last_id


def _checked_record(manifest: Manifest, row: int) -> SampleRecord:
    manifest.decode(row)  # the bytes may be as they were packed and still be no image
    record = manifest.read_record(row)
    entry = manifest.index[row]
    if record.native_size != (entry["width"], entry["height"]) or record.split != manifest.splits[entry["split"]]:
        raise DataError(f"row {row}: JSON and index disagree on native size or split")
    if record.points is not None and record.points.shape != (manifest.spec.num_landmarks, 2):
        raise DataError(f"row {row}: {len(record.points)} points, {manifest.spec.num_landmarks} wanted")
    return record


def _verify_members(manifest: Manifest, number: int, report: VerifyReport) -> None:
    """Every member of the tar is in the index, and every entry of the index is a member."""
    shard = manifest.shards[number]
    rows = manifest.index[manifest.starts[number] : manifest.starts[number + 1]]
    listed = {int(offset): ".json" for offset in rows["json_offset"]}
    if manifest.encoding != "in_place":
        listed |= {int(offset): f".{EXTENSIONS[manifest.encoding]}" for offset in rows["offset"]}
    try:
        for member, fault in members(manifest.files.path(number)):
            suffix = listed.pop(member.offset_data, None)
            if fault is not None or suffix is None or "/" in member.name or not member.name.endswith(suffix):
                why = "" if fault is None else f" ({fault})"
                report.foreign.append(f"{member.name!r} in {shard['name']}{why}")
    except TrailingBytesError:
        pass  # harms no sample; the digest of the shard tells
    except DamagedTarError as error:
        report.problems.append(f"{shard['name']}: {error}")
    if listed:
        report.problems.append(f"{shard['name']}: {len(listed)} members of the index are not in the tar")


def _sha256(path: Path | None) -> str | None:
    if path is None:
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
