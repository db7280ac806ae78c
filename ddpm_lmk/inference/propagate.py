"""What `data.propagate` adds to a run: images without labels, with what its teacher found in them (docs/method.md, 10).

The teacher is asked once, and its answers are read back from RUN/pseudo_labels.csv (`pseudo_labels`), so that a resumed
run learns from the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.loading.bad_samples import BadSample, Quarantine
from ddpm_lmk.data.loading.corpus import Corpus, pool_compared
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.rank_checks import kernels
from ddpm_lmk.engine.session import Session
from ddpm_lmk.inference import pseudo_labels
from ddpm_lmk.inference.evaluate import predict_split
from ddpm_lmk.inference.predictions import ImagePrediction
from ddpm_lmk.models.weights import load_all
from ddpm_lmk.rundir.checkpoint import load_weights
from ddpm_lmk.rundir.directory import RunDir
from ddpm_lmk.rundir.lock import PSEUDO_LABELS, TEACHER
from ddpm_lmk.system.console import print_status, progress
from ddpm_lmk.tasks import LandmarkTask, Task


@dataclass(frozen=True)
class Pool:
    """Images without labels that a run learns from.

    Attributes:
        corpora: those with pseudo-labels.
        facts: what run.json and results.json say of them.
    """

    corpora: Sequence[Corpus] = ()
    facts: Mapping[str, Any] | None = None


def pseudo_labelled(
    cfg: RunConfig,
    task: Task,
    unlabelled: Sequence[Corpus],
    run: RunDir,
    parallel: Parallel,
    session: Session,
    *,
    began: dict[str, Any] | None,
    taught_by: Mapping[str, Any] | None,
) -> Pool:
    """The images of the pool with what the teacher of the run found in them, which is asked once; on every rank.

    Args:
        began: facts of the pool that the run began with, where it is resumed.
        taught_by: results of the teacher; None where the run needs them no more.

    Raises:
        DataError: the labels, or the images, are not those that this run was started on; no point is accepted; too
            many images cannot be read.
    """
    propagate = cfg.data.propagate
    if propagate is None:
        return Pool()
    assert isinstance(task, LandmarkTask), "RunConfig wants it"
    if not parallel.on_main((run.path / PSEUDO_LABELS).is_file):
        found, bad = _predict_unlabelled(cfg, task, unlabelled, run, parallel, session)

        def write() -> None:
            quarantine = Quarantine(unlabelled, cfg.data.max_bad_fraction)
            entries = quarantine.merge(bad, step=0)
            quarantine.check()
            unreadable = {unlabelled[each.corpus].facts(each.row).id for each in bad}
            more: dict[str, Any] = {"agree": propagate.agree, "unreadable": unreadable}
            pseudo_labels.write(run.path, task.spec, found, unlabelled, **more)
            run.log.quarantine(entries)

        parallel.on_main(write)

    def read() -> tuple[list[pseudo_labels.Points], dict[str, Any]]:
        points = pseudo_labels.read(run.path, unlabelled)
        left_out = pool_compared(cfg).record["left_out"]
        facts = pseudo_labels.facts(run.path, unlabelled, points, taught_by, left_out=left_out)
        return points, pseudo_labels.as_begun(facts, began, run.path)

    # Read back where they were written just now, too: a resumed run has what the file holds.
    points, facts = parallel.on_main(read)
    for corpus, of_corpus in zip(unlabelled, points, strict=True):
        corpus.use(of_corpus)
    if parallel.is_main:
        print_status(f"{cfg.name}: {pseudo_labels.described(facts)}")
    return Pool([corpus for corpus in unlabelled if len(corpus.rows)], facts)


def _predict_unlabelled(
    cfg: RunConfig,
    task: LandmarkTask,
    unlabelled: Sequence[Corpus],
    run: RunDir,
    parallel: Parallel,
    session: Session,
) -> tuple[dict[str, ImagePrediction], list[BadSample]]:
    """What the teacher finds in every image without a label, and those that cannot be read, on every rank."""
    with parallel.together():
        weights, _ = load_weights(run.path / TEACHER, "auto")
        model = session.model(cfg, task, parallel.device)
        load_all(model, weights)
    show: AbstractContextManager[Callable[[int, int], None] | None] = nullcontext()
    if parallel.is_main:
        count = sum(len(corpus.rows) for corpus in unlabelled)
        print_status(f"{cfg.name}: finding pseudo-labels in {count:,} images")
        show = progress("pseudo-labels", lines=False)
    with kernels(cfg.train.exactness, parallel.device), show as shown:
        bad: list[BadSample] = []
        more: dict[str, Any] = {"cache": session.cache, "unreadable": bad, "show": shown}
        return predict_split(cfg, task, model, parallel, corpora=unlabelled, **more), bad
