"""What each part of the recipe gives on validation images: trials that differ in one thing, and the list of all.

`trials.jsonl` has a head, then a line per trial: what it changed (`settings`), what it began with, what it scored.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from _tables import machine, markdown

from ddpm_lmk.config import RunConfig
from ddpm_lmk.report.statistics import Difference, over_seeds
from ddpm_lmk.sweep import load_sweep

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "configs" / "sweep" / "table2.yaml"  # its small scale says what the recipe is, by number of labels
RECIPE = "ours"
MEASURED = {"train.precision": "bf16"}  # of the committed table and its trials; the recipe now says auto
ABSENT = object()
# What a trial is, rather than what it tries.
OWN_KEYS = ("name", "seed", "data.path", "data.shots", "init.weights", "evaluate.split", "evaluate.batch")
# Settings that only make sense together are one thing.
TOGETHER: dict[str, tuple[str, ...]] = {
    "average of the weights": ("train.ema",),
    "target: σ, read within (px)": ("task.codec.sigma_px", "task.codec.decode_radius_px"),
    "moves: shift, degrees, scale": ("data.augment.shift", "data.augment.rotate_deg", "data.augment.scale"),
    "length, decay of the average": ("train.duration", "train.ema.decay"),
}
PREFIXES = ("task.codec.", "task.", "data.augment.", "data.", "optim.", "train.")


@dataclass(frozen=True)
class Setting:
    """A way to train that was tried: what it changed of the recipe, and the weights it began with."""

    changes: tuple[tuple[str, Any], ...]
    weights: str


Groups = dict[Setting, dict[int, Mapping[str, Any]]]


def trials_table(source: Path) -> str:
    """What single changes did, and per number of labels the list of all trials, the lowest error first."""
    head, *trials = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    spreads = _seed_spreads(source.parents[1] / "table2_small" / "results.csv")
    pairs: list[list[str]] = []
    lists: list[str] = []
    weights = Counter(trial["weights"] for trial in trials).most_common(1)[0][0]
    for labels, settings in _recipes().items():
        recipe = {**settings, "weights": weights}
        groups = _groups([trial for trial in trials if trial["labels"] == labels], recipe)
        pairs += one_change(labels, groups, recipe, spreads.get(labels))
        if groups:
            lists.append(_at(labels, groups, spreads.get(labels)))
    told = ", ".join(f"{labels}: {spread:.2f} mm" for labels, spread in spreads.items())
    pairs.sort(key=_order)
    heads = ["what", "from", "to", "labels", "seeds", "MRE, mm", "difference", "both with, beside the recipe"]
    return "\n\n".join(
        [
            machine(head),
            f"Deviation of the recipe's own error over seeds, by number of labels, in the committed table: {told}.",
            markdown(heads, pairs),
            f"<details><summary>All {len(trials)} trials</summary>",
            *lists,
            "</details>",
        ]
    )


def one_change(labels: int, groups: Groups, recipe: Mapping[str, Any], spread: float | None) -> list[list[str]]:
    """Rows for pairs of settings that share seeds and differ in one thing only."""
    rows = []
    for (left, before), (right, after) in combinations(groups.items(), 2):
        parts = [knobs(each, recipe) for each in (left, right)]
        names = [name for name in {**parts[0], **parts[1]} if parts[0].get(name) != parts[1].get(name)]
        if len(names) != 1 or not set(before) & set(after):
            continue
        (name,) = names
        ends = sorted([(parts[0].get(name), before), (parts[1].get(name), after)], key=lambda end: _rank(end[0]))
        shared = sorted(set(before) & set(after))
        errors = [{seed: _by_seed(found)[seed] for seed in shared} for _, found in ends]
        means = " → ".join(f"{statistics.mean(each.values()):.2f}" for each in errors)
        others = "; ".join(f"{key.split(':')[0]} {text}" for key, text in parts[0].items() if key != name)
        told = _told(over_seeds(errors[1], errors[0]), spread)
        values = [text if text is not None else usual(name, recipe) for text, _ in ends]
        rows.append([name, *values, str(labels), _listed(shared), means, told, others or "nothing else"])
    return rows


def knobs(setting: Setting, recipe: Mapping[str, Any]) -> dict[str, str]:
    """Changes by what they are about: settings that only make sense together are one thing."""
    found: dict[str, list[str]] = {}
    for key, _ in setting.changes:
        name = next((name for name, keys in TOGETHER.items() if key in keys), _short(key))
        found.setdefault(name, []).append(key)
    changes = dict(setting.changes)
    texts = {name: _joined(name, keys, changes, recipe) for name, keys in found.items()}
    return texts if setting.weights == recipe["weights"] else {**texts, "weights": setting.weights}


def usual(name: str, recipe: Mapping[str, Any]) -> str:
    """The recipe's own value of a thing."""
    if name == "weights":
        return str(recipe["weights"])
    keys = TOGETHER.get(name) or tuple(key for key in recipe if _short(key) == name)
    return _joined(name, keys, {}, recipe) or "as the recipe"


def _joined(name: str, keys: Sequence[str], changes: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """The values of all settings of a thing, the recipe's where they are not changed."""
    known = {**recipe, **changes}
    return ", ".join(_shown(known[key]) for key in TOGETHER.get(name) or keys if key in known)


def _order(row: Sequence[str]) -> tuple[str, int, str, str]:
    """By what was changed, then by number of labels."""
    return row[0], int(row[3]), row[1], row[2]


def _rank(text: str | None) -> tuple[bool, float, str]:
    """The recipe's own value comes first, then by number."""
    number = re.match(r"[0-9.]+", text or "")
    return text is not None, float(number[0]) if number else 0.0, text or ""


def _groups(trials: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any]) -> Groups:
    """Trials of the same setting by seed."""
    groups: Groups = {}
    for trial in trials:
        changes = [(key, value) for key, value in trial["settings"].items() if recipe.get(key, ABSENT) != value]
        groups.setdefault(Setting(_hashable(changes), trial["weights"]), {})[trial["seed"]] = trial
    return groups


def _recipes() -> dict[int, dict[str, Any]]:
    """The settings of the committed recipe by number of labels."""
    cells = load_sweep(TABLE, scale="small").cells
    found = {cell.shots: flat(cell.cfg) | MEASURED for cell in cells if cell.start == RECIPE and cell.shots is not None}
    return dict(sorted(found.items()))


def flat(cfg: RunConfig) -> dict[str, Any]:
    """Settings by dotted key, but for those that only say what a run is."""

    def walk(section: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in section.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return {key: value for key, value in walk(cfg.model_dump(mode="json"), "") if key not in OWN_KEYS}


def _seed_spreads(results: Path) -> dict[int, float]:
    """Standard deviation over seeds of the recipe's error in the committed table, by number of labels."""
    errors: dict[int, list[float]] = {}
    with results.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["start"] == RECIPE:
                errors.setdefault(int(row["shots"]), []).append(float(row["original_mre"]))
    return {labels: statistics.stdev(values) for labels, values in errors.items() if len(values) > 1}


def _at(labels: int, groups: Groups, spread: float | None) -> str:
    """The list of one number of labels, the lowest error first."""
    same = {setting.weights: _by_seed(found) for setting, found in groups.items() if not setting.changes}
    best = max(same, key=lambda weights: len(same[weights]), default=None)
    reference = same[best] if best is not None else {}
    lines = sorted(groups.items(), key=lambda item: statistics.mean(_by_seed(item[1]).values()))
    heads = ["changed", "weights from", "seeds", "MRE, mm", "less the recipe", "SDR 2 mm, %", "processor, s a run"]
    rows = [_row(setting, found, reference, spread) for setting, found in lines]
    return f"**{labels} {'label' if labels == 1 else 'labels'}**\n\n{markdown(heads, rows)}"


def _row(
    setting: Setting, found: Mapping[int, Mapping[str, Any]], reference: Mapping[int, float], spread: float | None
) -> list[str]:
    errors = _by_seed(found)
    is_recipe = errors == reference
    difference = None if is_recipe else over_seeds(errors, reference)
    mean = f"{statistics.mean(errors.values()):.2f}" + (f" (n={len(errors)})" if len(errors) > 1 else "")
    sdr = f"{statistics.mean(each['sdr_2mm_pct'] for each in found.values()):.1f}"
    cpu = f"{statistics.median(each['cpu_s'] for each in found.values()):.0f}"
    changed = ", ".join(f"`{_short(key)}` {_shown(value)}" for key, value in setting.changes) or "nothing: the recipe"
    return [changed, setting.weights, _listed(errors), mean, "" if is_recipe else _told(difference, spread), sdr, cpu]


def _told(difference: Difference | None, spread: float | None) -> str:
    """A difference, with an interval over seeds, or with a mark where a single seed cannot support it."""
    if difference is None:
        return "no common seed"
    text = f"{difference.mean:+.2f}"
    if difference.low is not None:
        clear = "" if difference.is_clear else ", not clear"
        return f"{text} ({difference.low:+.2f} to {difference.high:+.2f}{clear})"
    return f"{text}, one seed" if spread is not None and abs(difference.mean) > spread else f"({text}), one seed: open"


def _by_seed(found: Mapping[int, Mapping[str, Any]]) -> dict[int, float]:
    return {seed: float(trial["mre_mm"]) for seed, trial in sorted(found.items())}


def _hashable(changes: Iterable[tuple[str, Any]]) -> tuple[tuple[str, Any], ...]:
    """Changes with lists as text; those of the network become one."""
    found = [(key, json.dumps(value) if isinstance(value, list) else value) for key, value in changes]
    network = dict(found).get("model.kind")
    return tuple(
        each for each in found if network is None or not each[0].startswith("model.") or each[0] == "model.kind"
    )


def _short(key: str) -> str:
    return next((key.removeprefix(prefix) for prefix in PREFIXES if key.startswith(prefix)), key)


def _shown(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
