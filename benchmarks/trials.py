"""Make a result file of trials of a recipe: what each changed, and what it scored on validation films.

    python benchmarks/trials.py LOG.jsonl FOLDER [--out benchmarks/results/isbi_recipe/trials.jsonl]

LOG has a line per trial (`name`, `shots`, `seed`, `size`, `mre` in mm, `sdr` in per cent by mm, `cpu` and `wall` in s);
FOLDER/NAME-kSHOTS-sSEED is its run directory, whose config.yaml says what it did. Lines whose run directory is gone are
left out, and of lines about the same run the last one counts. `collect.py` makes the table of the documents from it.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import load_run
from ddpm_lmk.system import files
from ddpm_lmk.system.files import read_json
from ddpm_lmk.system.machine import hardware, versions

OUT = Path(__file__).resolve().parent / "results" / "isbi_recipe" / "trials.jsonl"
ABSENT = object()
# What a trial is, rather than what it tries.
OWN_KEYS = ("name", "seed", "data.path", "data.shots", "init.weights", "evaluate.split", "evaluate.batch")


def main() -> None:
    """Read the log, write the result file, say how many lines there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.log.read_text(encoding="utf-8").splitlines() if line.strip()]
    trials = {trial["run"]: trial for trial in _trials(lines, options.folder)}
    head: dict[str, Any] = {"what": "trials of the recipe", "date": datetime.date.today().isoformat()}
    machine = hardware()  # of its load the trials, which ran before, say nothing
    head |= {
        "hardware": {key: machine[key] for key in ("cpu", "cores")},
        "versions": versions("ddpm-lmk", "torch", "numpy"),
    }
    files.write_text(options.out, "".join(json.dumps(line) + "\n" for line in [head, *trials.values()]))
    print(f"{options.out}: {len(trials)} trials of {len(lines)} lines")


def _trials(lines: list[dict[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    """One record per line whose run is still there; settings that all trials share are left to the recipe."""
    found = []
    for line in lines:
        run = f"{line['name']}-k{line['shots']}-s{line['seed']}"
        if (folder / run / "config.yaml").is_file():
            found.append((run, line, load_run(folder / run / "config.yaml")))
    settings = [flat(cfg) for _, _, cfg in found]
    keys = sorted({key for each in settings for key in each})
    varied = [key for key in keys if any(each.get(key, ABSENT) != settings[0].get(key, ABSENT) for each in settings)]
    for (run, line, cfg), values in zip(found, settings):
        yield {
            "run": run,
            "labels": line["shots"],
            "seed": line["seed"],
            "weights": learnt_from(cfg.init.weights),
            "mre_mm": round(line["mre"], 4),
            **{f"sdr_{key}mm_pct": round(rate, 2) for key, rate in line["sdr"].items()},
            "cpu_s": line["cpu"],
            "wall_s": line["wall"],
            "settings": {key: values[key] for key in varied if key in values},
        }


def flat(cfg: RunConfig) -> dict[str, Any]:
    """Settings by dotted key, but for those that only say what a run is."""

    def walk(section: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in section.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return {key: value for key, value in walk(cfg.model_dump(mode="json"), "") if key not in OWN_KEYS}


def learnt_from(weights: str | None) -> str:
    """What the starting weights learnt from, in words that need no folder."""
    if weights is None:
        return "random"
    path = Path(weights)
    for folder in (path, *path.parents[:2]):
        results = read_json(folder / "results.json") if (folder / "results.json").is_file() else None
        if results is not None:
            size = load_run(folder / "config.yaml").data.image_size
            return f"{results['kind']}, {results['train']['images']:,} images at {size} px"
    return "not recorded"


if __name__ == "__main__":
    main()
