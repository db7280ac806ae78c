"""Was a test image seen in training? The block `leakage` of results.json, and what is said beside a score.

Pre-training leaves protected images out and writes `leakage.json`. A score asks again, because its dataset may not have
been protected then: what was trained on is read again from the run file and the datasets, or, where those are gone,
taken from what the run wrote. A score whose images were seen is not shown unless that is acknowledged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import load_stored
from ddpm_lmk.data.duplicates.leakage import Source, Uncompared, count_kinds, exclusion, find_seen, uncompared_patients
from ddpm_lmk.data.loading.corpus import Corpus
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.remote import CacheSettings
from ddpm_lmk.errors import DataError, LmkError
from ddpm_lmk.system.files import read_json, write_json

FILE_NAME = "leakage.json"
STAGES = {
    "pretraining": "seen in pre-training",
    "training": "among the labelled training images",
    "pool": "among the images with pseudo-labels",
}


def write_record(cfg: RunConfig, folder: Path) -> dict[str, Any]:
    """Write `leakage.json` of a pre-training run: what is protected, what leaked or came twice, what is left out."""
    cache = CacheSettings.of(cfg)
    record = exclusion([Manifest.open(path, cache) for path in cfg.data.path], cfg.data, cache).record
    write_json(folder / FILE_NAME, record)
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


def of_score(
    weights: str | None, tested: Corpus, learnt: Corpus | None, pool: Sequence[Corpus] | None = ()
) -> dict[str, Any]:
    """The block `leakage` of results.json, for the images of `tested` that are scored.

    Args:
        weights: what the model started from (`init.weights`); None: random.
        tested: the images that are scored.
        learnt: the labelled images it was fine-tuned on, where they are at hand.
        pool: the images it was fine-tuned on with pseudo-labels, where they are at hand; empty: there are none.

    Returns:
        `pretraining`: {"status": "none", "clean", "overlap" or "unknown", ...} with, for an overlap, how many of the
        scored images were seen and how; `training`: the same about the labelled images, which published splits may
        share; `pool`: about those with pseudo-labels, where there are any.
    """
    source = Source(tested.manifest, rows=np.asarray(tested.rows))
    training: dict[str, Any] = {"status": "unknown"}
    if learnt is not None:
        training = verdict(source, [Source(learnt.manifest, rows=np.asarray(learnt.rows))])
    verdicts = {"pretraining": _of_pretraining(weights, source), "training": training}
    if pool is None:
        return {**verdicts, "pool": {"status": "unknown"}}
    sources = [Source(corpus.manifest, rows=np.asarray(corpus.rows)) for corpus in pool]
    return {**verdicts, "pool": verdict(source, sources)} if sources else verdicts


def verdict(tested: Source, trained: list[Source]) -> dict[str, Any]:
    """Whether images of `tested` were trained on, how many and how, and which patients could not be compared."""
    findings = find_seen(tested, trained)
    kinds = {kind: count for kind, count in count_kinds(findings).items() if count}
    status = {"status": "overlap" if findings else "clean", "images": len(findings), "kinds": kinds}
    return status | _not_compared(uncompared_patients(trained, [tested]))


def _not_compared(pairs: Iterable[Uncompared]) -> dict[str, list[str]]:
    listed = list(map(str, pairs))
    return {"patients_not_compared": listed} if listed else {}


def _of_pretraining(weights: str | None, tested: Source) -> dict[str, Any]:
    if weights is None:
        return {"status": "none"}
    # The weights may be a run directory, or a snapshot or file up to three levels inside it.
    folder = next((f for f in (Path(weights), *Path(weights).parents[:3]) if (f / FILE_NAME).is_file()), None)
    if folder is None:
        return {"status": "unknown", "reason": f"no {FILE_NAME} beside {weights}"}
    record = read_json(folder / FILE_NAME) or {}
    try:
        return verdict(tested, _trained_on(folder, record))
    except LmkError as error:  # the datasets are gone or others: what the run wrote is all there is
        return _as_recorded(record, tested, str(error))


def _trained_on(folder: Path, record: dict[str, Any]) -> list[Source]:
    """What a pre-training run saw: its datasets, less what it left out."""
    cfg = load_stored(folder)
    data, cache = cfg.data, CacheSettings.of(cfg)
    manifests = [Manifest.open(path, cache) for path in data.path]
    for manifest, facts in zip(manifests, record["trained_on"], strict=True):
        if manifest.fingerprint != facts["fingerprint"]:
            raise DataError(
                f"{manifest.root} is not the dataset that was trained on; restore it to have the overlap checked"
            )
    left_out = exclusion(manifests, data, cache).rows
    return [
        Source(manifest, tuple(facts["splits"]), without=rows)
        for manifest, facts, rows in zip(manifests, record["trained_on"], left_out, strict=True)
    ]


def _as_recorded(record: dict[str, Any], tested: Source, reason: str) -> dict[str, Any]:
    """The verdict of a run's own record: clean only where every split that is scored was protected then."""
    if record.get("overlap"):
        return {"status": "overlap", "images": record["overlap"], "kinds": {}, "reason": f"as recorded; {reason}"}
    manifest = tested.manifest
    same = [facts for facts in record.get("protected", ()) if facts.get("fingerprint") == manifest.fingerprint]
    protected = {name for facts in same for name in facts["splits"]}
    scored = {manifest.splits[code] for code in np.unique(manifest.index["split"][tested.rows])}
    if not scored <= protected:
        return {"status": "unknown", "reason": reason}
    pairs = [Uncompared(**pair) for pair in record.get("patients_not_compared", ())]
    missing = _not_compared(pair for pair in pairs if pair.protected == manifest.dataset)
    return {"status": "clean", "images": 0, "kinds": {}, "reason": f"as recorded; {reason}"} | missing


def refuse_seen(results: Iterable[dict[str, Any]], *, acknowledged: bool) -> list[str]:
    """What has to be said about scores: one line for each kind of overlap found.

    Raises:
        DataError: pre-training saw images that are scored, and `acknowledged` is not set.
    """
    results = list(results)
    lines = []
    for stage, words in STAGES.items():
        found = [leak for each in results if (leak := _leak(each, stage)).get("status") == "overlap"]
        if not found:
            continue
        total = max(each["num_images"] for each in results)
        most = max(leak["images"] for leak in found)
        runs = f"{len(found)} of {len(results)} runs"
        lines.append(f"Leakage: up to {most} of the {total} scored images were {words} ({runs}).")
        # Published splits share images (ISBI 2015 does), so labelled ones seen in training are only remarked on.
        if stage != "training" and not acknowledged:
            raise DataError(
                f"{lines[-1]} The score is not shown: train with data.protect and data.dedup.leakage=leave_out, "
                "or pass --acknowledge-leakage to have it shown with this remark"
            )
    reasons = {  # a dict keeps their order, and each once
        reason: None
        for each in results
        for stage in STAGES
        for reason in _leak(each, stage).get("patients_not_compared", ())
    }
    lines += [f"{reason[0].upper()}{reason[1:]}." for reason in reasons]
    unknown = [each for each in results if _leak(each, "pretraining").get("status") == "unknown"]
    if unknown:
        lines.append(f"Whether pre-training saw scored images is not known for {len(unknown)} of {len(results)} runs.")
    return lines


def _leak(results: dict[str, Any], stage: str) -> dict[str, Any]:
    return (results.get("leakage") or {}).get(stage) or {}
