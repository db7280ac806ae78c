"""`shards index --out`: a WebDataset of others becomes a dataset whose images stay where they are.

Every tar is read once, as `shards pack` would read it: images that cannot be used are listed, the others decoded for
their size, fingerprint and the digest of their bytes. What is written is small: the record of every sample, in a shard
for each tar, the index with the place of each image in its tar, and `tars.txt` with the places of the tars. At every
access an image goes through the same decoders, grey window and resize as in packing, so its pixels are those that
packing it with the same settings stores.
"""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_lmk import __version__
from ddpm_lmk.data.duplicates.fingerprints import fingerprint_of
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.labels import Labels
from ddpm_lmk.data.shards.pack import (
    DECODERS,
    KEY_NOTE,
    PATIENTS_NOTE,
    FileNotes,
    PackSummary,
    Progress,
    completed,
    count,
    decode,
    keys_of,
)
from ddpm_lmk.data.shards.records import InTar
from ddpm_lmk.data.shards.remote import (
    CacheSettings,
    Origin,
    common_folder,
    is_remote,
    refuse_secrets,
    with_retries,
)
from ddpm_lmk.data.shards.writer import ShardWriter, refuse_existing
from ddpm_lmk.data.sources.base import RawDataset, RawSample, TarMember, check_split_name
from ddpm_lmk.data.sources.ids import KeyedIds
from ddpm_lmk.data.sources.webdataset import MOST_TARS, Roles, TarReader, expand_names
from ddpm_lmk.data.spec import unlabelled
from ddpm_lmk.errors import ConfigError, DataError
from ddpm_lmk.system.machine import granted_cores, versions

_ASKED = 16  # sizes of remote tars at a time
_AS = "as x-{000..012}.tar"
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass
class _Tar:
    """A tar to be read, and what came of it.

    Attributes:
        place: path or URL.
        called: how its samples are called: its path below the folder of all tars, without its suffix.
        size: bytes; None: a web server that does not tell.
        changed_ns: when it was changed; None: nobody tells.
        path: where it can be read, while it is.
        refused: lines for `refused.jsonl`.
    """

    place: str
    called: str
    size: int | None
    changed_ns: int | None = None
    path: Path | None = None
    refused: list[dict[str, str]] = field(default_factory=list)


def index_in_place(
    source: str,
    out: str | Path,
    settings: PackSettings,
    roles: Roles,
    *,
    id_key: str | Path | None = None,
    workers: int | None = None,
    cache: CacheSettings | None = None,
    progress: Progress | None = None,
) -> PackSummary:
    """Index the tars that `source` names (`find_tars`) into the new folder `out`.

    Args:
        settings: as for packing, of kind folder.
        id_key: file with the key that turns ids and patients into hashes, made when it is not there; null: they stay.
        workers: decoding processes; null: one per core this process may use.
        cache: where there is room for a few tars, if they are remote.
        progress: called with (MiB done, MiB in all).

    Raises:
        ConfigError: a setting that cannot be honoured, or no such tars. DataError: a damaged tar, nothing to index.
        RunConflictError, StoppedError: as `pack`; the same call resumes after the last tar that was finished.
    """
    started, out = time.perf_counter(), Path(out)
    if roles.split is not None and (settings.split is not None or settings.val_fraction):
        raise ConfigError("--split-from names the split of every sample; leave out --split and --val-fraction")
    check_split_name(settings.split or "train", "--split")
    refuse_existing(out)
    tars = find_tars(source)
    settings = settings.model_copy(update={"name": settings.name or _name_of(tars[0])})
    settings = settings.filled_for(source, has_key=id_key is not None)
    with keys_of(None if id_key is None else Path(id_key), out) as keys, _opening(tars, cache) as open_tar:
        settings = settings.model_copy(update={"key_id": keys.key_id if keys else None})
        indexing = _Indexing(tars, open_tar, settings, roles, keys, progress or (lambda done, total: None))
        summary = indexing.write(out, granted_cores() if workers is None else max(1, workers))
    if id_key is not None:
        summary.warnings.append(KEY_NOTE.format(id_key))
    summary.seconds = time.perf_counter() - started
    return summary


def find_tars(source: str) -> list[_Tar]:
    """The tars that a source means: a tar, a folder or bucket of them, names in braces, several with `::`.

    Raises:
        ConfigError: names that mean no tar, or one twice, or that no dataset can be made of.
        DataError, StoppedError: one is not there; a server does not answer.
    """
    places = [place for name in expand_names(source) for place in _below(name)]
    if len(set(places)) < len(places) or not 0 < len(places) <= MOST_TARS:
        twice = next((place for place in places if places.count(place) > 1), None)
        raise ConfigError(f"{source!r} means {f'{twice} twice' if twice else 'no tar'}; name each tar once")
    base = common_folder(places)
    names = [place.removeprefix(base) for place in places]
    called = [name.removesuffix(".tar") for name in names]
    if not is_remote(base):
        stats = [Path(place).stat() for place in places]
        return [_Tar(place, of, stat.st_size, stat.st_mtime_ns) for place, of, stat in zip(places, called, stats)]
    origin = Origin(base)
    with ThreadPoolExecutor(_ASKED) as pool:
        sizes = pool.map(lambda name: with_retries(origin.size, name), names)
    return [_Tar(place, of, size) for place, of, size in zip(places, called, sizes)]


def _below(name: str) -> list[str]:
    """The tars of a folder, or the one of this name."""
    if name.lower().endswith(_COMPRESSED):
        raise ConfigError(
            f"{name} is compressed, so that no image in it can be read without all before it; decompress it"
        )
    if is_remote(name):
        refuse_secrets(name)
        if name.endswith(".tar"):
            return [name]
        names = with_retries(Origin(name).names)
        if names is None:
            raise ConfigError(f"{name}: web servers do not list folders; name the tars, {_AS}")
        return [f"{name.rstrip('/')}/{file}" for file in sorted(names) if file.endswith(".tar")]
    path = Path(name).absolute()
    if (path / "manifest.json").is_file():
        raise ConfigError(f"{name} is a dataset of this tool already: give it to data.path as it is")
    if path.is_dir():
        return sorted(str(file) for file in path.iterdir() if file.suffix == ".tar" and not file.name.startswith("."))
    if not path.is_file():
        raise DataError(f"{name} is not there; wanted a tar, a folder of tars, or several tars, {_AS}")
    if "\n" in str(path):
        raise ConfigError(f"{name!r} has a line break in its name; rename it")
    return [str(path)]


def _name_of(tar: _Tar) -> str:
    """A name for the dataset: that of its first tar up to the number, or of the folder."""
    name = re.split("[0-9]", tar.called.rpartition("/")[2])[0].strip("-_.") or tar.place.split("/")[-2]
    return re.sub("[^A-Za-z0-9._-]+", "-", name)[:80].strip("-") or "webdataset"


@contextmanager
def _opening(tars: Sequence[_Tar], cache: CacheSettings | None) -> Iterator[Callable[[_Tar], Path]]:
    """Yields a function that says where a tar can be read: itself, or a copy of a remote one, which goes at the end."""
    base = common_folder([tar.place for tar in tars])
    if not is_remote(base):
        yield lambda tar: Path(tar.place)
        return
    origin, root, numbers = Origin(base), (cache or CacheSettings()).root, itertools.count()
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix=".index-", dir=root) as folder:

        def fetch(tar: _Tar, path: Path) -> None:
            origin.fetch(tar.place.removeprefix(base), path)
            length = path.stat().st_size
            if length != (tar.size or length):
                raise OSError(errno.EIO, f"{tar.place}: got {length} of {tar.size} bytes")

        def copy(tar: _Tar) -> Path:
            path = Path(folder) / f"{next(numbers)}.tar"
            with_retries(fetch, tar, path)
            return path

        yield copy


class _Indexing:
    """The tars of one call on their way into a dataset."""

    def __init__(
        self,
        tars: Sequence[_Tar],
        open_tar: Callable[[_Tar], Path],
        settings: PackSettings,
        roles: Roles,
        keys: KeyedIds | None,
        progress: Progress,
    ) -> None:
        self._tars, self._open, self._settings, self._roles, self._progress = tars, open_tar, settings, roles, progress
        self._reader = TarReader(roles, settings.split or "train", settings.val_fraction, settings.seed, keys)
        self._dataset = RawDataset(unlabelled(settings.name), (), keys=keys)
        self._labels, self._notes = Labels(self._dataset.spec, settings), FileNotes()
        self._numbers: dict[Path, int] = {}  # of the tars that are being read
        self._done = self._images = self._added = 0  # tars, images of them all, and of the present one
        self._nobodys = 0  # images of which nothing names the patient
        self._mib_done, self._mib = 0.0, sum(tar.size or 0 for tar in tars) / 2**20

    def write(self, out: Path, workers: int) -> PackSummary:
        settings, summary = self._settings, PackSummary(out.absolute())
        places = [(tar.place, tar.size, tar.changed_ns) for tar in self._tars]  # others: begun anew
        with ShardWriter(
            out,
            dataset=settings.name,
            spec=self._dataset.spec,
            splits=(),
            encoding="in_place",
            bits=settings.bits,
            stored_size=settings.size,
            aspect=settings.aspect,
            settings={**settings.model_dump(mode="json"), "roles": asdict(self._roles)},
            made_with={"ddpm-lmk": __version__, **versions(*DECODERS), "tars": places},
            state=self._state,
        ) as writer:
            if writer.resumed is not None:
                self._done, self._images = writer.resumed["tars"], writer.resumed["images"]
                self._notes = FileNotes(**writer.resumed["notes"])
                self._dataset.unkept_patients = writer.resumed["unkept_patients"]
                self._nobodys = writer.resumed["nobodys"]
                self._mib_done = sum(tar.size or 0 for tar in self._tars[: self._done]) / 2**20
                summary.resumed_at = self._images
            number = self._done
            for sample, fields, image in decode(self._samples(), settings, workers, digest=True):
                assert isinstance(sample.path, TarMember)
                if self._numbers[sample.path.tar] > number:
                    self._finish(writer, number)
                    number = self._numbers[sample.path.tar]
                self._take(writer, sample, fields, image)
                self._progress(int(self._mib_done + sample.path.offset / 2**20), int(self._mib))
            self._finish(writer, number)
            self._finish(writer, len(self._tars) - 1)
            self._progress(int(self._mib), int(self._mib))
            summary.warnings += self._notes.sentences() + self._without_patient()
            if self._dataset.unkept_patients:
                summary.warnings.append(PATIENTS_NOTE.format(self._dataset.unkept_patients))
            count(summary, writer)
        return summary

    def _state(self) -> dict[str, Any]:
        facts = {"notes": asdict(self._notes), "unkept_patients": self._dataset.unkept_patients}
        return {"tars": self._done, "images": self._images, "nobodys": self._nobodys, **facts}

    def _without_patient(self) -> list[str]:
        """A warning of images whose patient nobody names; DataError where that is all of them."""
        if self._roles.patient is None or not self._nobodys:
            return []
        if self._nobodys == self._images:
            raise DataError(
                f"--patient-from {self._roles.patient} names the patient of none of {self._images} images; see how the "
                "members spell it, and that it is text or a whole number, or leave it out"
            )
        return [f"--patient-from {self._roles.patient} names no patient of {self._nobodys} of {self._images} images"]

    def _samples(self) -> Iterator[RawSample]:
        """Those of every tar that is not done, which is opened when it is due: some answers ahead of the writer."""
        for number, tar in enumerate(self._tars[self._done :], self._done):
            tar.path = self._open(tar)
            self._numbers[tar.path] = number

            # Bound now. Lines wait with their tar: the writer may be at an earlier one, and stop there.
            def refuse(id_: str, code: str, reason: str, lines: list[dict[str, str]] = tar.refused) -> None:
                lines.append({"id": id_, "code": code, "reason": reason})

            yield from self._reader.samples(tar.path, tar.called, refuse)

    def _take(self, writer: ShardWriter, sample: RawSample, fields: dict[str, Any], image: bytes) -> None:
        if "refused" in fields:
            writer.refuse({"id": sample.id, "code": fields["code"], "reason": fields["refused"]})
            return
        if writer.holds(image):
            writer.refuse({"id": sample.id, "code": "DUPLICATE", "reason": "the same picture as an earlier one"})
            return
        self._notes.add(fields["facts"])
        sample = completed(self._dataset, sample, fields, self._settings)
        assert isinstance(sample.path, TarMember)
        record = replace(
            self._labels.record(sample, tuple(fields["native"]), fields["facts"]),
            in_tar=InTar(sample.path.offset, sample.path.size, fields["sha256"]),
        )
        pixels = np.load(io.BytesIO(image), allow_pickle=False)
        writer.add(record, image, fingerprint_of(pixels, record, self._settings.size, self._settings.aspect).tobytes())
        self._images += 1
        self._added += 1
        self._nobodys += record.group is None

    def _finish(self, writer: ShardWriter, last: int) -> None:
        """End the tars up to the `last`, the only one of them of which samples may have been added."""
        for number in range(self._done, last + 1):
            tar = self._tars[number]
            assert tar.path is not None, "samples of later tars were read"
            for line in tar.refused:
                writer.refuse(line)
            self._done = number + 1
            self._mib_done += (tar.size or 0) / 2**20
            if number == last and self._added:
                with open(tar.path, "rb") as file:
                    facts = {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": file.tell()}
                writer.finish_shard({"name": tar.place.rpartition("/")[2], "place": tar.place, **facts})
                self._added = 0
            if is_remote(tar.place):
                tar.path.unlink()
            del self._numbers[tar.path]
