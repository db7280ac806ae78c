"""Trackers of other tools follow a run: TensorBoard, Weights & Biases, MLflow (`runtime.trackers`, docs/tracking.md).

The record of a run is its own log. A tracker is a copy of it: a thread reads `metrics.jsonl` as it grows and hands the
lines on, so training never waits for a tracker, and one that fails costs a warning. Each step is there once, also in a
run that was killed and resumed. TensorBoard's file is written anew from the log whenever a run is resumed; W&B and
MLflow are asked what they hold, or have noted it, and get what is behind that. Only rank 0 follows.

Nothing is sent unless the environment says so (WANDB_MODE=online, MLFLOW_TRACKING_URI). Of settings that name files
only the last part of a path is kept, of listed images only their number; host, user, command line and source code,
which these tools note by themselves, are not handed on. No x-ray is: the only picture is that of drawn samples.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from accelerate import tracking

from ddpm_lmk.config import RunConfig, yaml
from ddpm_lmk.config.load import flatten
from ddpm_lmk.rundir.directory import RunDir
from ddpm_lmk.rundir.log import METRICS, parse_line
from ddpm_lmk.system import files
from ddpm_lmk.system.heartbeat import beat
from ddpm_lmk.system.locks import locked

log = logging.getLogger(__name__)

PROJECT = "ddpm-lmk"  # where runs of no sweep are shown together
POLL_S = 1.0
# Waited for trackers at the end of a run, less than what counts as a stall of its other ranks, and of one that is
# stopped or fails.
LAST_S, LEAVING_S = 40.0, 5.0
TRAIN, VALIDATION = "train", "validation"
SAMPLES = "samples.png"


class Trackers:
    """The trackers of one run, from `start` to the end of the `with` block; none on ranks that do not write.

    Args:
        group: the sweep this run is part of.
    """

    def __init__(self, cfg: RunConfig, run: RunDir, *, group: str | None) -> None:
        self._followers = [
            Follower(TRACKERS[name](cfg, run.path, group), run)
            for name in dict.fromkeys(cfg.runtime.trackers)
            if run.writes
        ]

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, error: type[BaseException] | None, *unused: object) -> None:
        started = [follower for follower in self._followers if follower.ident is not None]
        for follower in started:
            follower.ended.set()
        give_up = time.monotonic() + (LAST_S if error is None else LEAVING_S)
        for follower in started:
            while follower.is_alive() and time.monotonic() < give_up:
                beat("write")
                follower.join(min(POLL_S, max(0.0, give_up - time.monotonic())))
            if follower.is_alive():
                follower.tell("is too slow to wait for")

    def start(self) -> None:
        """Begin to follow, once the log is rewound to where the run begins or is resumed."""
        for follower in self._followers:
            follower.start()

    def conclude(self, results: Mapping[str, Any]) -> None:
        """Hand on what the run has found, as its last line."""
        for follower in self._followers:
            follower.results = results


class Follower(threading.Thread):
    """Hands the lines of a run's log on to one tracker, from behind what that has already."""

    def __init__(self, tracker: Tracker, run: RunDir) -> None:
        super().__init__(name=f"tracker-{tracker.name}", daemon=True)  # one that hangs must not keep the process
        self.ended = threading.Event()
        self.results: Mapping[str, Any] | None = None
        self._tracker, self._run, self._read_to = tracker, run, 0

    def run(self) -> None:
        """Follow until the run has ended. An error of a tracker is no error of the run, whatever it is."""
        try:
            held = self._tracker.open()
            try:
                self._follow(held)
            finally:
                self._tracker.close(held)
        except Exception as error:
            self.tell(f"failed ({type(error).__name__}: {' '.join(str(error).split())[:300]})")

    def tell(self, what: str) -> None:
        """Warn that a tracker does not have all of the run."""
        name, record = self._tracker.name, self._run.path / METRICS
        self._run.event("tracker.failed", tracker=name, reason=what)
        missing = "a run that is resumed before its end hands on the rest"
        log.warning("tracker %s %s; %s has everything, and %s", name, what, record, missing)

    def _follow(self, held: dict[str, int]) -> None:
        is_last = False
        while not is_last:
            is_last = self.ended.wait(POLL_S)  # what was written before that is read once more
            for line in self._new_lines():
                phase, step, values = figures_of(line)
                if step > held.get(phase, -1):
                    self._tracker.log(values, step)
                    held[phase] = step
        if self.results is not None:
            self._tracker.conclude(results_of(self.results), self.results["train"]["steps"])
        self._tracker.is_whole = True

    def _new_lines(self) -> Iterator[dict[str, Any]]:
        path = self._run.path / METRICS
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._read_to)
            for text in file:
                if not text.endswith(b"\n"):  # the rest of it comes later
                    return
                self._read_to += len(text)
                if (line := parse_line(text.decode("utf-8", "replace"))) is not None:
                    yield line


class Tracker:
    """What follows a run, through Accelerate's class for it. All of it happens in one thread.

    Attributes:
        is_whole: does it hold the log to its end?
    """

    name: ClassVar[str]
    _image_options: ClassVar[dict[str, str]] = {}
    _tracker: tracking.GeneralTracker

    def __init__(self, cfg: RunConfig, folder: Path, group: str | None) -> None:
        self._cfg, self._folder, self._group = cfg, folder, group
        self.is_whole = False

    def open(self) -> dict[str, int]:
        """Begin, or continue; returns the last steps it holds, by kind of line."""
        raise NotImplementedError

    def log(self, values: dict[str, float], step: int) -> None:
        """Hand on one line."""
        self._tracker.log(values, step=step)

    def conclude(self, values: dict[str, float], step: int) -> None:
        """Hand on scores of the end, and the picture of samples where one was drawn."""
        if values:
            self.log(values, step)
        if (path := self._folder / SAMPLES).is_file():
            self._show_samples(path, step)

    def close(self, held: dict[str, int]) -> None:
        """End, with the steps that were handed on."""
        self._tracker.finish()

    def _show_samples(self, path: Path, step: int) -> None:
        import cv2

        sheet = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        if sheet is not None:
            self._tracker.log_images({"samples": sheet[None, :, :, None]}, step=step, **self._image_options)


class TensorBoard(Tracker):
    """An event file in RUN/tensorboard, written anew from the log whenever a run is resumed."""

    name = "tensorboard"
    _image_options = {"dataformats": "NHWC"}

    def open(self) -> dict[str, int]:
        """See `Tracker.open`: it holds nothing."""
        from torch.utils.tensorboard.summary import hparams

        for old in (self._folder / self.name).glob("events.out.tfevents.*"):
            old.unlink()
        # A TensorBoard that has read the old file is told to forget all of it.
        self._tracker = tracking.TensorBoardTracker(self.name, self._folder, purge_step=0)
        self._tracker.start()
        writer = self._tracker.writer
        settings = public_settings(self._cfg)
        writer.add_text("settings", "```yaml\n" + yaml.dump(settings) + "```", global_step=0)
        # Not `add_hparams`, which puts a folder named after the time beside the file. Those that are set, or the table
        # of a sweep would have 150 columns.
        own = flatten(self._cfg.model_dump(mode="json", exclude_defaults=True))
        chosen = {key: settings[key] for key in own if isinstance(settings.get(key), (str, bool, int, float))}
        shown = dict.fromkeys(("train/loss", "validation/score", *self._scores()), 0.0)
        for summary in hparams(chosen, shown):
            writer.file_writer.add_summary(summary)
        return {}

    def _scores(self) -> list[str]:
        """What a sweep's table shows of a run beside its losses."""
        split = self._cfg.evaluate.split if self._cfg.task.stage == "finetune" else None
        return [] if split is None else [f"{split}/original/mre"]


class WeightsAndBiases(Tracker):
    """Files in RUN/wandb for `wandb sync`; with WANDB_MODE=online, the server.

    Each session of a run has a file of its own, and `wandb sync` joins those of one id in the order of their times. A
    session that was killed is dropped, and what it had is written again by the next.
    """

    name = "wandb"

    def open(self) -> dict[str, int]:
        """See `Tracker.open`."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # of the tool's own crashes, to its makers
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self._notes: dict[str, Any] = {"id": uuid.uuid4().hex[:12], "sessions": [], "held": {}}
        self._notes |= files.read_json(self._folder / "wandb" / "run.json") or {}
        for session in (self._folder / "wandb").glob("offline-run-*"):
            if session.name not in self._notes["sessions"] and not list(session.glob("*.synced")):
                shutil.rmtree(session)
        settings = wandb.Settings(
            # It notes host, user, command line, packages, git state and what is printed, unless told not to.
            **dict.fromkeys(("x_disable_meta", "x_disable_machine_info", "x_disable_stats", "disable_git"), True),
            **dict.fromkeys(("disable_code", "disable_job_creation", "silent", "x_disable_viewer"), True),
            **dict.fromkeys(("save_code", "x_save_requirements"), False),
            host="",
            console="off",
            reinit="create_new",  # a worker of a sweep has the next run before the last is put away
        )
        (self._folder / "wandb").mkdir(mode=files.folder_mode(), exist_ok=True)
        self._tracker = tracking.WandBTracker(
            os.environ.get("WANDB_PROJECT", PROJECT),
            dir=str(self._folder),
            id=self._notes["id"],
            name=self._cfg.name,
            group=self._group,
            job_type=self._cfg.task.kind,
            config=public_settings(self._cfg),
            mode=mode,
            resume=None if mode == "offline" else "allow",
            settings=settings,
        )
        self._tracker.start()
        self._note()
        if mode == "offline":
            return dict(self._notes["held"])
        return dict.fromkeys((TRAIN, VALIDATION), self._tracker.run.starting_step - 1)

    def close(self, held: dict[str, int]) -> None:
        """See `Tracker.close`; a file that is whole is noted, and stays."""
        self._tracker.finish()
        if self.is_whole:
            self._notes["sessions"].append(Path(self._tracker.run.dir).parent.name)
            self._notes["held"] = held
            self._note()

    def _note(self) -> None:
        files.write_json(self._folder / "wandb" / "run.json", self._notes)


class MLflow(Tracker):
    """A run of the server or store at MLFLOW_TRACKING_URI, else of `mlflow.db` in the current folder."""

    name = "mlflow"

    def open(self) -> dict[str, int]:
        """See `Tracker.open`."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they tell of every table they make
        if not mlflow.is_tracking_uri_set():
            mlflow.set_tracking_uri(f"sqlite:///{Path('mlflow.db').absolute()}")
        # Of cells that begin at once one makes the tables: two would leave a database that nobody can open.
        with locked(Path(tempfile.gettempdir()) / f"ddpm-lmk-mlflow-{os.getuid()}.lock", waits=True):
            return self._begin()

    def _begin(self) -> dict[str, int]:
        """As `open`, of a store that has no tables yet, or has them."""
        import mlflow

        self._client = mlflow.MlflowClient()
        known = (files.read_json(self._folder / "mlflow.json") or {}).get("run_id")
        held = {} if known is None else self._held(known)
        self._tracker = tracking.MLflowTracker(
            self._group or PROJECT,
            run_id=known if held is not None else None,
            run_name=self._cfg.name,
            # In place of what it finds out: the user, and the command with its paths.
            tags={"mlflow.user": "", "mlflow.source.name": PROJECT, "task": self._cfg.task.kind},
        )
        try:
            self._tracker.start()
        except mlflow.MlflowException:  # a cell on another machine has made the experiment just now
            time.sleep(POLL_S)
            self._tracker.start()
        run_id = self._tracker.tracker.info.run_id
        files.write_json(self._folder / "mlflow.json", {"run_id": run_id})
        if not held:
            self._tracker.store_init_configuration(public_settings(self._cfg))
        return held or {}

    def _held(self, run_id: str) -> dict[str, int] | None:
        """The last steps of a run in the store; None where it is not there."""
        from mlflow.exceptions import MlflowException

        try:
            known = self._client.get_run(run_id).data.metrics
        except MlflowException:
            return None
        last = {key: max(one.step for one in self._client.get_metric_history(run_id, key)) for key in known}
        kinds = {
            kind: [step for key, step in last.items() if key.startswith(f"{kind}/")] for kind in (TRAIN, VALIDATION)
        }
        return {kind: max(steps) for kind, steps in kinds.items() if steps}

    def _show_samples(self, path: Path, step: int) -> None:
        self._tracker.log_artifact(str(path))


TRACKERS: dict[str, type[Tracker]] = {tracker.name: tracker for tracker in (TensorBoard, WeightsAndBiases, MLflow)}


def figures_of(line: Mapping[str, Any]) -> tuple[str, int, dict[str, float]]:
    """Phase, step and figures of a line of `metrics.jsonl`."""
    phase = VALIDATION if VALIDATION in line else TRAIN
    found = line[VALIDATION] if phase == VALIDATION else line
    kept = {key: value for key, value in found.items() if key not in ("step", "eta_s") and value is not None}
    return phase, line["step"], {f"{phase}/{key}": value for key, value in kept.items()}


def results_of(results: Mapping[str, Any]) -> dict[str, float]:
    """The scores of a landmark run, over all images and landmarks; of a mixture those of each of its datasets."""
    if "parts" in results:
        parts = [(part["dataset"], results_of(part)) for part in results["parts"]]
        return {f"{name}/{key}": value for name, found in parts for key, value in found.items()}
    scores: dict[str, float] = {}
    for protocol, found in results.get("protocols", {}).items():
        for key, value in flatten(found).items():
            if isinstance(value, (int, float)):
                scores[f"{results['split']}/{protocol}/{key}"] = value
    return scores


def public_settings(cfg: RunConfig) -> dict[str, Any]:
    """The settings by dotted key, without what could name a patient or a user: folders, and ids of listed images."""
    settings = flatten(cfg.model_dump(mode="json"))
    if (images := settings.get("data.images")) is not None:
        settings["data.images"] = f"{len(images)} listed"
    return {key: _without_folders(value) for key, value in settings.items()}


def _without_folders(value: Any) -> Any:
    """The last part of a path or of a URL, which may hold a key behind its `?` and a password before its `@`."""
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and re.search(r"[/\\]", value):
        return re.split(r"[/\\]", re.sub(r"[?#].*", "", value).rstrip("/\\"))[-1].rpartition("@")[2]
    return value
