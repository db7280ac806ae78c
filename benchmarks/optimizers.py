"""AdamW and Muon in the pre-training recipe for a CPU: loss on films left out, and the cost of a step.

    ddpm-lmk pretrain configs/pretrain/isbi_cpu.yaml data.path=shards/isbi512val optim.kind=muon optim.lr=2e-3 \\
        evaluate.samples=0 train.snapshot_every='4000 images' --cpu 1 --out runs/optimizers/muon-2e-3-24000
    python benchmarks/optimizers.py --runs runs/optimizers [--rounds N] [--out DIR]

`isbi512val` has films 001-130 as split train and 131-150 as split val. The loss of a snapshot, of its averaged weights,
is that of pre-training, crops included, over those 20 films in `DRAWS` draws of timestep, noise and crop, the same for
all. Landmark
errors after it are cells of a sweep that `parts.py --name variants` collects.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from _subject import CONFIGS, Subject, carried_out, option_parser, run_config

from ddpm_lmk.bench import alternate, compare_paired
from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import load_stored
from ddpm_lmk.data.loading.corpus import training_corpora
from ddpm_lmk.data.loading.loader import EvalLoader, Seat
from ddpm_lmk.engine.device_fit import choose_precision
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.session import Session
from ddpm_lmk.models.weights import load_all
from ddpm_lmk.rundir.checkpoint import load_weights
from ddpm_lmk.system.files import write_json
from ddpm_lmk.system.machine import code_digest, hardware, versions
from ddpm_lmk.tasks import build_task

DRAWS = 16
KINDS = ("adamw", "muon")


class Films:
    """The films left out, and the loss of snapshots on them."""

    def __init__(self, cfg: RunConfig) -> None:
        self.parallel = Parallel("cpu")
        seat = Seat(0, 1, self.parallel.device, "torch")
        of_val = cfg.model_copy(update={"data": cfg.data.model_copy(update={"splits": ("val",)})})
        loader = EvalLoader(cfg, training_corpora(of_val), seat, None)  # with finer pixels, which a validation has not
        self._task = build_task(cfg, loader.spec)
        self._batches = list(loader)
        loader.close()
        self._model = Session().model(cfg, self._task, self.parallel.device).eval()
        self._precision = choose_precision(cfg, "cpu").name

    @torch.no_grad()
    def losses(self, snapshot: Path) -> list[float]:
        """Mean loss of each film over the draws."""
        load_all(self._model, load_weights(snapshot, "ema")[0])
        sums = torch.zeros(sum(map(len, self._batches)), dtype=torch.float64)
        for draw in range(DRAWS):
            parts = []
            for batch in self._batches:
                drawn = replace(batch, positions=batch.positions + 1000 * draw)
                with self.parallel.autocast(self._precision):
                    parts.append(self._task.loss(self._model, drawn).double())
            sums += torch.cat(parts)
        return (sums / DRAWS).tolist()


def curves(folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each pre-training: its optimizer, rate and length, and the loss of each of its snapshots."""
    films: Films | None = None
    for path in sorted(folder.iterdir()):
        cfg = load_stored(path)
        films = films or Films(cfg)
        size, found = cfg.train.global_batch_size, {}
        for snapshot in sorted((path / "snapshots").iterdir()):
            found[int(snapshot.name.removeprefix("step-")) * size] = films.losses(snapshot)
        yield {
            "run": path.name,
            "kind": cfg.optim.kind,
            "lr": cfg.optim.lr,
            "images": max(found),
            "skipped": json.loads((path / "results.json").read_text())["train"]["skipped"],
            "losses": [{"images": images, "loss": fmean(of_films)} for images, of_films in found.items()],
            "loss_by_film": found[max(found)],
        }


def cost_of_steps(options: Any) -> dict[str, Any]:
    """Processor seconds of a training step with each optimizer, taking turns; the loader aside."""
    cfg = run_config(options)
    cases = {k: cfg.model_copy(update={"optim": cfg.optim.model_copy(update={"kind": k})}) for k in KINDS}
    steps = {kind: Subject(options, cfg=case).step for kind, case in cases.items()}
    found = alternate(steps, rounds=options.rounds, warm_up=3)
    ratio = compare_paired(found["muon"].busy_s, found["adamw"].busy_s)
    return {
        "step_cpu_s": {kind: median(timings.busy_s) for kind, timings in found.items()},
        "samples": {kind: timings.samples() for kind, timings in found.items()},
        "muon_over_adamw": ratio.facts(),
    }


def main() -> None:
    """Score every snapshot, time the step, and write the result file."""
    parser = option_parser(__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder of pre-trainings")
    parser.set_defaults(run=CONFIGS / "pretrain" / "isbi_cpu.yaml", rounds=41, out=Path("benchmarks/results"))
    options = parser.parse_args()
    result: dict[str, Any] = {
        "draws": DRAWS,
        "cost": cost_of_steps(options),
        "runs": list(curves(options.runs)),
        "hardware": hardware(),
        "versions": versions("ddpm-lmk", "torch"),
        "code": code_digest(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(options.out / "optimizers.json", result)
    for row in result["runs"]:
        print(row["run"], *(f"{point['images']}: {point['loss']:.5f}" for point in row["losses"]))
    print("step, Muon over AdamW:", result["cost"]["muon_over_adamw"])


if __name__ == "__main__":
    carried_out(main)
