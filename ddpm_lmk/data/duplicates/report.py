"""Did a model see its test films? What a run writes about it, and what a score is told.

Pre-training leaves protected films out and writes `leakage.json`. A score on a labelled set asks again, because the set
may not have been protected then: the films that were trained on are found anew from the run file and the packs, or,
where the packs are gone, what the run wrote is believed. A score whose films were seen is not shown unless that is
acknowledged, and says so then.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import load_stored
from ddpm_lmk.data.duplicates.leakage import Source, Uncompared, count_kinds, exclusion, seen, uncompared_patients
from ddpm_lmk.data.loading.corpus import Corpus
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.remote import CacheSettings
from ddpm_lmk.errors import DataError, LmkError
from ddpm_lmk.system import files
from ddpm_lmk.system.files import read_json

FILE_NAME = "leakage.json"


def write_record(cfg: RunConfig, folder: Path) -> dict[str, Any]:
    """Write `leakage.json` of a pre-training run: what is protected, what leaked or came twice, what is left out."""
    cache = CacheSettings.of(cfg)
    record = exclusion([Manifest.open(path, cache) for path in cfg.data.path], cfg.data, cache).record
    files.write_json(folder / FILE_NAME, record)
    return record


def read_record(folder: Path) -> dict[str, Any]:
    """What `write_record` wrote. DataError where it is gone or damaged."""
    record = read_json(folder / FILE_NAME)
    if record is None:
        raise DataError(f"{folder / FILE_NAME} cannot be read; the same run writes it when it is continued")
    return record


def summary(record: dict[str, Any]) -> dict[str, int]:
    """The counts of a record, for results.json and for one line."""
    return {
        "leaks": sum(record["leaks"].values()),
        "copies": sum(record["copies"].values()),
        "left_out": record["left_out"],
        "overlap": record["overlap"],
    }


def of_score(weights: str | None, tested: Corpus, learnt: Corpus | None) -> dict[str, Any]:
    """The block `leakage` of results.json, for the films of `tested` that are scored.

    Args:
        weights: what the model started from (`init.weights`); None: random.
        tested: the films that are scored.
        learnt: the labelled films it was fine-tuned on, where they are at hand.

    Returns:
        `pretraining`: {"status": "none", "clean", "overlap" or "unknown", ...} with, for an overlap, how many of the
        scored films were seen and how; `training`: the same about the labelled films, which published splits may share.
    """
    source = Source(tested.manifest, rows=np.asarray(tested.rows))
    training: dict[str, Any] = {"status": "unknown"}
    if learnt is not None:
        training = _verdict(source, [Source(learnt.manifest, rows=np.asarray(learnt.rows))])
    return {"pretraining": _of_pretraining(weights, source), "training": training}


def _verdict(tested: Source, trained: list[Source]) -> dict[str, Any]:
    findings = seen(tested, trained)
    kinds = {kind: count for kind, count in count_kinds(findings).items() if count}
    verdict = {"status": "overlap" if findings else "clean", "images": len(findings), "kinds": kinds}
    return verdict | _not_compared(map(str, uncompared_patients(trained, [tested])))


def _not_compared(reasons: Iterable[str]) -> dict[str, list[str]]:
    """A part of a verdict, where patients could not be compared."""
    listed = list(reasons)
    return {"patients_not_compared": listed} if listed else {}


def _of_pretraining(weights: str | None, tested: Source) -> dict[str, Any]:
    if weights is None:
        return {"status": "none"}
    folder = next((f for f in (Path(weights), *Path(weights).parents[:3]) if (f / FILE_NAME).is_file()), None)
    if folder is None:
        return {"status": "unknown", "reason": f"no {FILE_NAME} beside {weights}"}
    record = read_json(folder / FILE_NAME) or {}
    try:
        return _verdict(tested, _trained_on(folder, record))
    except LmkError as error:  # the packs are gone or others: what the run wrote is all there is
        return _as_recorded(record, tested, str(error))


def _as_recorded(record: dict[str, Any], tested: Source, reason: str) -> dict[str, Any]:
    if record.get("overlap"):
        return {"status": "overlap", "images": record["overlap"], "kinds": {}, "reason": f"as recorded; {reason}"}
    known = {name for each in record.get("protected", ()) for name in each["splits"] if _is(each, tested.manifest)}
    splits = {tested.manifest.splits[code] for code in np.unique(tested.manifest.index["split"][tested.rows()])}
    if splits <= known:
        pairs = [Uncompared(**pair) for pair in record.get("patients_not_compared", ())]
        missing = _not_compared(str(pair) for pair in pairs if pair.protected == tested.manifest.dataset)
        return {"status": "clean", "images": 0, "kinds": {}, "reason": f"as recorded; {reason}"} | missing
    return {"status": "unknown", "reason": reason}


def _is(facts: dict[str, Any], manifest: Manifest) -> bool:
    return facts.get("fingerprint") == manifest.fingerprint


@lru_cache(maxsize=8)
def _opened(path: str, fingerprint: str, cache: CacheSettings) -> Manifest:
    manifest = Manifest.open(path, cache)
    if manifest.fingerprint != fingerprint:
        raise DataError(f"{path} is not the pack that was trained on; restore it to have the overlap checked")
    return manifest


def _trained_on(folder: Path, record: dict[str, Any]) -> list[Source]:
    """What a pre-training run saw: its packs, less what it left out."""
    cfg = load_stored(folder)
    data, cache = cfg.data, CacheSettings.of(cfg)
    known = [(path, facts["fingerprint"]) for path, facts in zip(data.path, record["trained_on"], strict=True)]
    manifests = [_opened(path, fingerprint, cache) for path, fingerprint in known]
    left_out = exclusion(manifests, data, cache).rows
    return [
        Source(manifest, tuple(facts["splits"]), without=rows)
        for manifest, facts, rows in zip(manifests, record["trained_on"], left_out, strict=True)
    ]


def refuse_seen(results: Iterable[dict[str, Any]], *, acknowledged: bool) -> list[str]:
    """What has to be said about scores: one line for each kind of overlap found.

    Raises:
        DataError: pre-training saw films that are scored, and `acknowledged` is not set.
    """
    results = list(results)
    lines = []
    for stage, words in (("pretraining", "seen in pre-training"), ("training", "among the labelled training images")):
        found = [leak for each in results if (leak := _leak(each, stage)).get("status") == "overlap"]
        if not found:
            continue
        total = max(each["num_images"] for each in results)
        most = max(leak["images"] for leak in found)
        runs = f"{len(found)} of {len(results)} runs"
        lines.append(f"Leakage: up to {most} of the {total} scored images were {words} ({runs}).")
        if stage == "pretraining" and not acknowledged:
            raise DataError(
                f"{lines[-1]} The score is not shown: pre-train with data.protect and data.dedup.leakage=leave_out, "
                "or pass --acknowledge-leakage to have it shown with this remark"
            )
    reasons = {
        reason: None
        for each in results
        for stage in ("pretraining", "training")
        for reason in _leak(each, stage).get("patients_not_compared", ())
    }
    lines += [f"{reason[0].upper()}{reason[1:]}." for reason in reasons]
    unknown = [each for each in results if _leak(each, "pretraining").get("status") == "unknown"]
    if unknown:
        lines.append(f"Whether pre-training saw scored images is not known for {len(unknown)} of {len(results)} runs.")
    return lines


def _leak(results: dict[str, Any], stage: str) -> dict[str, Any]:
    return (results.get("leakage") or {}).get(stage) or {}
