"""The tables of a study. A maker takes a `Study`; scores come as HTML, CSV or Markdown, the others as `FactsTable`."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ddpm_lmk.config import DenoiseConfig, LandmarksConfig, RunConfig
from ddpm_lmk.config.load import diff_runs
from ddpm_lmk.data.duplicates.report import refuse_seen
from ddpm_lmk.errors import ConfigError
from ddpm_lmk.inference.scoring import Spread, mean_and_std
from ddpm_lmk.report import html
from ddpm_lmk.report.collect import PROTOCOLS, SCRATCH, Row, Run, RunFolder, Study, labels_text, short_pretraining
from ddpm_lmk.report.html import FactsTable, plain_spread, spread_text
from ddpm_lmk.report.style import SHAPE_COLOUR, method_name, swatch
from ddpm_lmk.rundir.lock import MAY_CHANGE
from ddpm_lmk.sweep.expand import recipe_key
from ddpm_lmk.system import files
from ddpm_lmk.system.files import read_json

# What a cell of a sweep is, rather than how it was trained.
OWN_KEYS = ("name", "seed", "data.shots", "data.path", "init.weights")


def verdict(study: Study) -> str:
    """What the table of scores says, in one sentence made from it."""
    pretrained = [start for start in study.starts if start != SCRATCH]
    if SCRATCH in study.starts and pretrained:
        pairs = [(study.errors(k, pretrained), study.errors(k, [SCRATCH])) for k in study.shots]
        won = [min(ours.values()) < scratch[SCRATCH] for ours, scratch in pairs if ours and scratch]
        if won:
            where = f"{sum(won)} of {len(won)} numbers of labels"
            return f"Pre-trained weights have the lower mean radial error at {where}."
    beaten = sum(min(study.errors(k).values()) < study.mean_shape(k, "original").mre[0] for k in study.shots)
    return f"The best starting weights beat the mean shape at {beaten} of {len(study.shots)} numbers of labels."


def warnings(study: Study) -> list[str]:
    """What has to be said before any number is: leakage, and rows whose runs were not trained alike."""
    # refused or acknowledged was decided before the report was begun
    return [*refuse_seen([run.results for run in study.runs], acknowledged=True), *unlike_runs(study)]


def unlike_runs(study: Study) -> list[str]:
    """A sentence per cell of the table whose runs were not trained alike: its mean is over different settings."""
    lines = []
    for start in study.starts:
        for labels in study.shots:
            runs = study.select(start, labels)
            written = [run for run in runs if run.home.cfg is not None]
            seeds: dict[str, list[str]] = {}
            for run in written[1:]:
                for key, there, here in _settings_apart(written[0], run):
                    seeds.setdefault(f"{key} {_shown(there)} and {_shown(here)}", []).append(str(run.seed))
            if seeds:
                settings = "; ".join(f"{text} (seed {', '.join(numbers)})" for text, numbers in seeds.items())
                lines.append(
                    f"Not one recipe: the {len(runs)} runs of “{study.title(start)}” with {labels_text(labels)} differ "
                    f"in {settings}; their mean and spread are of different things."
                )
    return lines


def _settings_apart(first: Run, other: Run) -> list[tuple[str, Any, Any]]:
    """Settings, and the packed data, in which the training of two runs differs: key, value, other value."""
    assert first.home.cfg is not None
    assert other.home.cfg is not None
    rows = [row for row in diff_runs(first.home.cfg, other.home.cfg) if row[0] not in (*MAY_CHANGE, *OWN_KEYS)]
    here, there = (run.home.facts.get("fingerprint") for run in (first, other))
    # runs of older versions have no fingerprint: nothing is said of what is not known
    return [*rows, ("packed data", here, there)] if None not in (here, there) and here != there else rows


def _shown(value: Any) -> str:
    return "null" if value is None else value if isinstance(value, str) else json.dumps(value)


def cards(study: Study) -> str:
    """The best MRE at each number of labels, against the next two and the mean shape."""
    shown = []
    for labels in study.shots:
        best = study.best_start(labels)
        score = study.score(best, labels, "original")
        assert score is not None
        # two are enough to see whether the best one is far ahead
        ranked = sorted((error, start) for start, error in study.errors(labels).items() if start != best)
        versus = [f"{escape(study.title(start))} {error:.2f}" for error, start in ranked[:2]]
        versus.append(f"mean shape {study.mean_shape(labels, 'original').mre[0]:.2f}")
        std = "" if score.mre[1] is None else f" ± {score.mre[1]:.2f}"
        shown.append(
            f'<div class="card"><div class="what">{labels_text(labels)}</div>'
            f'<div class="number">{score.mre[0]:.2f}<small>{std} {score.unit}</small></div>'
            f'<div class="versus">{method_name(study, best)}<br>{" · ".join(versus)}</div></div>'
        )
    return f'<div class="cards">{"".join(shown)}</div>'


def score_table(study: Study) -> str:
    """Every start at every number of labels, both protocols side by side; the best of ours is bold."""
    titles = [html.head(""), html.head("", span=2)]
    heads = [html.head(word) for word in ("starting weights", "validation<br>labels", "runs")]
    for name in PROTOCOLS:
        keys = study.thresholds(name)
        title = f"protocol {name} <small>{study.unit_name(name)}{', SDR in %' if keys else ''}</small>"
        titles.append(html.head(title, "first", span=1 + len(keys)))
        heads += [html.head("MRE", "first"), *(html.head(f"SDR {key}") for key in keys)]
    rows = study.rows()
    lines = []
    for labels in study.shots:
        lines.append(html.heading_row(labels_text(labels, "training"), len(heads)))
        here = [row for row in rows if row.training == labels]
        lines += [_score_row(row, [other for other in here if other.kind == "run"], study) for row in here]
    return html.table([html.row(titles, "protocols"), html.row(heads)], lines, "scores")


def _score_row(row: Row, ours: Sequence[Row], study: Study) -> str:
    """A line of the table; `ours` are the rows it competes with for bold numbers."""
    name = escape(study.title(row.method))
    if row.kind == "run":
        name = method_name(study, row.method)
    elif row.kind == "mean shape":
        name = swatch(SHAPE_COLOUR) + name
    runs = "–" if row.kind == "mean shape" else str(next(iter(row.scores.values())).mre[2])
    cells = [html.cell(name), html.cell(str(row.validation)), html.cell(runs)]

    def number(value: Spread | None, best: float, kind: str = "", digits: int = 2) -> str:
        if value is None:
            return html.cell("–", kind)
        is_best = row.kind == "run" and value[0] == best and len(ours) > 1
        return html.cell(spread_text(value, digits), f"{kind} best" if is_best else kind)

    for protocol in PROTOCOLS:
        score = row.scores.get(protocol)
        lowest = min(other.scores[protocol].mre[0] for other in ours)
        cells.append(number(score.mre if score else None, lowest, "first"))
        for key in study.thresholds(protocol):
            highest = max(other.scores[protocol].sdr[key][0] for other in ours)
            cells.append(number(score.sdr.get(key) if score else None, highest, digits=1))
    return html.row(cells, {"run": "", "mean shape": "shape", "paper": "published"}[row.kind])


def csv_rows(study: Study) -> list[dict[str, Any]]:
    """The table of scores in long form: one row per line of it and protocol."""
    rows = []
    for row in study.rows():
        for protocol, score in row.scores.items():
            facts: dict[str, Any] = {"dataset": study.dataset, "split": study.split, "protocol": protocol}
            facts |= {"kind": row.kind, "start": row.method, "labels_training": row.training}
            facts |= {"labels_validation": row.validation, "runs": score.mre[2], "unit": score.unit}
            facts |= {"mre": score.mre[0], "mre_std": score.mre[1]}
            for key, rate in score.sdr.items():
                facts |= {f"sdr_{key}": rate[0], f"sdr_{key}_std": rate[1]}
            rows.append(facts)
    return rows


def markdown_table(study: Study) -> str:
    """The table of scores as Markdown, below what has to be said first."""
    heads = ["labels", "validation labels", "start", "runs"]
    for name in PROTOCOLS:
        keys = study.thresholds(name)
        heads += [f"{name}: MRE {study.unit(name)}", *([f"{name}: SDR {'/'.join(keys)} %"] if keys else [])]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in study.rows():
        runs = "–" if row.kind == "mean shape" else str(next(iter(row.scores.values())).mre[2])
        cells = [str(row.training), str(row.validation), row.method, runs]
        for name in PROTOCOLS:
            keys, score = study.thresholds(name), row.scores.get(name)
            cells.append("–" if score is None else plain_spread(score.mre))
            rates = "–" if score is None else " / ".join(f"{score.sdr[key][0]:.1f}" for key in keys)
            cells += [rates] if keys else []
        lines.append("| " + " | ".join(cells) + " |")
    head = f"**{study.dataset}**, {study.num_images} images of split {study.split}\n\n"
    return head + "".join(f"{line}\n\n" for line in warnings(study)) + "\n".join(lines) + "\n"


def update_between_markers(file: str | Path, name: str, text: str) -> bool:
    """Put `text` between `<!-- NAME -->` and `<!-- /NAME -->` of a document; True if that changed it.

    Raises:
        ConfigError: the two markers are not there, each once.
    """
    path = Path(file)
    content = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(begin) > content.index(end):
        raise ConfigError(f"{path} needs the lines {begin} and {end}, each once and in this order")
    # the replacement is a function, since a table may hold backslashes
    pattern = re.compile(f"({re.escape(begin)}).*?({re.escape(end)})", re.DOTALL)
    changed = pattern.sub(lambda match: f"{match[1]}\n{text.strip()}\n{match[2]}", content)
    if changed != content:
        files.write_text(path, changed)
    return changed != content


def landmark_table(study: Study, start: str) -> str:
    """MRE of each landmark at each number of labels (mean over seeds), and its SDR at the largest."""
    results = {labels: [run.results for run in study.select(start, labels)] for labels in study.shots}
    results = {labels: each for labels, each in results.items() if each}  # a start may lack some numbers of labels
    most, keys = max(results), study.thresholds("original")

    def mean(labels: int, index: int, key: str | None = None) -> float:
        rows = [each["protocols"]["original"]["per_landmark"][index] for each in results[labels]]
        return sum(row["mre"] if key is None else row["sdr"][key] for row in rows) / len(rows)

    def rates(texts: Sequence[str], tag: str) -> list[str]:
        return [html.cell(text, "" if place else "first", tag=tag) for place, text in enumerate(texts)]

    names = [each["name"] for each in results[most][0]["protocols"]["original"]["per_landmark"]]
    errors = [[mean(labels, index) for labels in results] for index in range(len(names))]
    top = max(map(max, errors))  # the longest of the bars behind the numbers
    lines = []
    for index, name in enumerate(names):
        bars = [
            f'<td class="heat" style="--share:{100 * error / top:.0f}%">{error:.2f}</td>' for error in errors[index]
        ]
        shares = rates([f"{mean(most, index, key):.1f}" for key in keys], "td")
        lines.append(html.row([html.cell(f"{index + 1}. {escape(name.replace('_', ' '))}"), *bars, *shares]))
    above = [html.head(""), f'<th class="first" colspan="{len(results)}">MRE {study.unit("original")}</th>']
    above += [f'<th class="first" colspan="{len(keys)}">with {most} labels</th>'] if keys else []
    heads = [html.head(word) for word in ("landmark", *map(labels_text, results))]
    heads += rates([f"SDR {key} %" for key in keys], "th")
    return html.table([html.row(above, "protocols"), html.row(heads)], lines)


def radius_table(study: Study) -> FactsTable:
    """Does the radius of a point hold the true one as often as it should? Every row whose runs have learnt one."""
    rows = []
    for start in study.starts:
        for labels in study.shots:
            found = [run.results["radius"] for run in study.select(start, labels) if run.results.get("radius")]
            for wanted in sorted({each["coverage"] for each in found}):
                alike = [each for each in found if each["coverage"] == wanted]
                constant = [each["constant"] for each in alike if "constant" in each]
                rows.append(
                    [
                        *(study.title(start), str(labels), str(len(alike)), f"{100 * wanted:g} %"),
                        *(_within(alike), _mean_radius(alike, study), _worst_landmark(alike)),
                        *((_within(constant), _mean_radius(constant, study)) if constant else ("–", "–")),
                    ]
                )
    headings = ("method", "labels", "runs", "wanted", "within", "mean radius", "worst landmark", "within", "radius")
    return FactsTable(
        "Radius",
        headings,
        rows,
        (("", 4), ("radius of each point", 3), ("one radius for all", 2)),
        intro="Within: share of the true points that lie within the radius of their prediction, mean ± standard "
        "deviation over runs. The radius of a point is its spread times a factor that ddpm-lmk calibrate has learnt "
        "from errors on labelled images left out of training; one radius for all points, from the same errors, stands "
        "beside it. Worst landmark: the one whose points are within least often, mean over runs.",
    )


def _within(measured: Sequence[dict[str, Any]]) -> str:
    return f"{plain_spread(mean_and_std([each['within_pct'] for each in measured]))} %"


def _mean_radius(measured: Sequence[dict[str, Any]], study: Study) -> str:
    return f"{plain_spread(mean_and_std([each['mean'] for each in measured]))} {study.unit('original')}"


def _worst_landmark(measured: Sequence[dict[str, Any]]) -> str:
    """Its name, and the share of its true points within their radius."""
    shares: dict[str, list[float]] = {}
    for each in measured:
        for row in each["per_landmark"]:
            shares.setdefault(row["name"], []).append(row["within_pct"])
    share, name = min((statistics.mean(values), name) for name, values in shares.items())
    return f"{name.replace('_', ' ')}, {share:.0f} %"


def calibration_table(study: Study) -> FactsTable:
    """Do models know their errors? Numbers of every row that has expected errors (contour-hugging maps)."""
    rows = []
    for start in study.starts:
        for labels in study.shots:
            runs = [run for run in study.select(start, labels) if run.results.get("reliability")]
            if runs:
                facts = [*_reliability(runs), *_temperatures(runs)]
                rows.append([study.title(start), str(labels), str(len(runs)), *facts])
    headings = ("method", "labels", "runs", "expected error", "radial error", "mean gap", "rank correlation")
    return FactsTable(
        "Calibration",
        (*headings, "ECE, %", "−log p of the landmark's pixel", "temperatures"),
        rows,
        intro="Expected error: the mean distance of the map's pixels from the point that was read, weighted by their "
        "probability (expected radial error). Mean gap: distance of expected from real error over ten bins of equal "
        "count, 0 for a calibrated model. ECE: expected calibration error of the peak's probability, ten bins up to "
        "0.15 as in the contour-hugging paper (McCouat and Voiculescu, CVPR 2022); a point is right within the circle "
        "of the area of one pixel of the map. −log p: with temperature 1 → with the fitted ones, on the images they "
        "were fitted on.",
    )


def second_look_table(study: Study) -> FactsTable:
    """What the second look gives: the first one's points beside the refined ones, of every row that has one."""
    keys, rows = study.thresholds("original"), []
    for start in study.starts:
        for labels in study.shots:
            runs = [run for run in study.select(start, labels) if run.results.get("coarse")]
            if not runs:
                continue
            looks = [[run.results[look]["original"] for run in runs] for look in ("coarse", "protocols")]
            facts = [plain_spread(mean_and_std([each["mre"] for each in look])) for look in looks]
            for key in keys:
                facts += [plain_spread(mean_and_std([each["sdr"][key] for each in look])) for look in looks]
            rows.append([study.title(start), str(labels), str(len(runs)), *facts])
    heads = [
        f"{name}, {look} look"
        for name in (f"MRE {study.unit('original')}", *(f"SDR {key} %" for key in keys))
        for look in ("first", "second")
    ]
    return FactsTable(
        "Second look",
        ("method", "labels", "runs", *heads),
        rows,
        intro="Protocol original. The first look sees the whole image; the second one sees crops of finer pixels "
        "around its points, and gives those that are scored everywhere else on this page.",
    )


def _reliability(runs: Sequence[Run]) -> list[str]:
    """Means and deviations over runs of what they say in `reliability`."""
    facts = [run.results["reliability"] for run in runs]

    def bin_mean(each: dict[str, Any], key: str) -> float:
        total = sum(part["count"] for part in each["bins"])
        return sum(part["count"] * part[key] for part in each["bins"]) / total

    errors = [[bin_mean(each, key) for each in facts] for key in ("expected", "error")]
    errors.append([each["gap"] for each in facts])
    cells = [f"{plain_spread(mean_and_std(values))} {facts[0]['unit']}" for values in errors]
    for key in ("correlation", "ece_pct"):  # neither is there where nothing varies, or where maps have no peaks
        values = [each[key] for each in facts if each.get(key) is not None]
        cells.append(plain_spread(mean_and_std(values)) if values else "–")
    return cells


def _temperatures(runs: Sequence[Run]) -> list[str]:
    """What the fitted temperatures changed, and their range; dashes where there are none."""
    facts = [run.results["calibration"] for run in runs if run.results.get("calibration")]
    if not facts:
        return ["–", "none"]
    # -log p with temperature 1, and with the fitted ones
    before, after = (mean_and_std([each[f"surprise_{when}"] for each in facts])[0] for when in ("before", "after"))
    values = [t for run in runs for t in fitted_temperatures(run).values()]
    span = f"{min(values):.2f} to {max(values):.2f}" if values else "–"
    return [f"{before:.2f} → {after:.2f}", f"{span}; {facts[0]['learnt_on']}"]


def fitted_temperatures(run: Run) -> dict[str, float]:
    """By landmark, from the run's calibration.json; empty where there is none."""
    facts = read_json(run.home.path / "calibration.json") or {}
    return dict(zip(facts.get("landmarks") or (), facts.get("temperatures") or ()))


def recipes(study: Study, start: str) -> list[tuple[list[int], RunConfig]]:
    """The different run files of a start with their numbers of labels; empty where they are no longer there.

    A row may follow one recipe with few labels and another with many, and a reader has to see which.
    """
    by_key: dict[str, tuple[list[int], RunConfig]] = {}
    for labels in study.shots:
        for cfg in (run.home.cfg for run in study.select(start, labels)):
            if cfg is not None:
                used, _ = by_key.setdefault(recipe_key(cfg), ([], cfg))
                used += [labels] if labels not in used else []
    return list(by_key.values())


def recipes_table(study: Study) -> FactsTable:
    """How the runs of every row were trained, one line per recipe, and all settings in which those of a row differ."""
    rows, apart = [], []
    for start in study.starts:
        used = recipes(study, start)
        rows += [[study.title(start), _joined(labels), *_settings(cfg)] for labels, cfg in used]
        for labels, cfg in used[1:]:
            changes = [row for row in diff_runs(used[0][1], cfg) if row[0] not in OWN_KEYS]
            words = ", ".join(f"{key} {_shown(here)} instead of {_shown(there)}" for key, there, here in changes)
            apart.append(f"{study.title(start)} with {_joined(labels)} labels: {words}.")
    headings = ("method", "labels", "network", "steps × images", "learning rate", "target", "views")
    remark = " ".join(["Settings that differ within a row, against its first recipe.", *apart]) if apart else ""
    return FactsTable("Recipes", (*headings, "averaged weights", "validation"), rows, remark=remark)


def _settings(cfg: RunConfig) -> list[str]:
    """The settings that a reader looks for first."""
    assert isinstance(cfg.task, LandmarksConfig)
    train, optim, codec = cfg.train, cfg.optim, cfg.task.codec.model_dump()
    sigma = "" if codec.get("sigma_px") is None else f", σ {codec['sigma_px']:g} px of {cfg.data.image_size}"
    return [
        _network(cfg),
        f"{train.duration} × {train.global_batch_size}{_pool(cfg)}",
        f"{optim.lr:g}, {optim.schedule}" + (f"; {optim.freeze} frozen" if optim.freeze else ""),
        f"{codec['kind']}{sigma}",
        str(cfg.task.views),
        "none" if train.ema is None else f"decay {train.ema.decay:g}",
        "none" if cfg.data.validation_split is None else cfg.data.validation_split,
    ]


def _pool(cfg: RunConfig) -> str:
    propagate = cfg.data.propagate
    if propagate is None:
        return ""
    where = _joined(Path(path).name for path in cfg.data.unlabelled_path)
    times = "once" if propagate.rounds == 1 else f"{propagate.rounds} times"
    return f", {100 * propagate.share:g} % of them with pseudo-labels ({where}, made {times})"


def _network(cfg: RunConfig) -> str:
    words = [cfg.model.describe(cfg.data.image_size)]
    if isinstance(cfg.task, LandmarksConfig) and (refine := cfg.task.refine) is not None:
        size = refine.size or cfg.data.image_size
        words.append(f"and a second one for crops of {refine.crop:g} of the side at {size}²")
    if isinstance(cfg.task, DenoiseConfig) and (zoom := cfg.task.zoom) is not None:
        words.append(f"{100 * zoom.share:g} % of images zoomed in, to {zoom.smallest:g} of the side")
    return ", ".join(words)


def runs_table(study: Study) -> FactsTable:
    """What ran, from which weights, for how long, on what: a line per start, and below it its pre-training."""
    rows = []
    for start in study.starts:
        runs = study.select(start)
        origins = [run.results["start"] for run in runs]
        weights = ["random" if each["weights"] is None else f"{each['weights']} ({each['use']})" for each in origins]
        times = [run.train["wall_s"] for run in runs if run.train.get("wall_s") is not None]
        rows.append(
            [
                study.title(start),
                _joined(weights),
                str(len(runs)),
                _joined(sorted({run.seed for run in runs})),
                _range([run.train.get("steps") for run in runs]),
                _range([run.train.get("images") for run in runs]),
                f"{statistics.median(times):,.0f} s" if times else "–",
                _hardware(runs[0].home),
                _joined([_network(cfg) for _, cfg in recipes(study, start)]) or "–",
            ]
        )
        rows += [_parent_row(parent) for parent in study.parents(start)]
    headings = ("method", "weights from", "runs", "seeds", "steps", "images seen", "median time", "hardware", "network")
    said = [(start, short_pretraining(parent.results)) for start in study.starts for parent in study.parents(start)]
    short = [f"“{study.title(start)}”: {text}." for start, text in said if text is not None]
    return FactsTable("The runs", headings, rows, remark=" ".join(short))


def _parent_row(parent: RunFolder) -> list[str]:
    train = parent.train
    time = "–" if train.get("wall_s") is None else f"{train['wall_s']:,.0f} s"
    facts = [str(parent.results.get("seed", "–")), _range([train.get("steps")]), _range([train.get("images")]), time]
    network = "–" if parent.cfg is None else _network(parent.cfg)
    return ["↳ pre-training", str(parent.path), "1", *facts, _hardware(parent), network]


def _joined(words: Iterable[object]) -> str:
    """Each once, in their order."""
    return ", ".join(dict.fromkeys(map(str, words)))


def _range(values: Sequence[int | None]) -> str:
    known = sorted({value for value in values if value is not None})
    if not known:
        return "–"
    return f"{known[0]:,}" if len(known) == 1 else f"{known[0]:,} to {known[-1]:,}"


def _hardware(folder: RunFolder) -> str:
    facts = folder.facts.get("hardware") or {}
    if not facts:
        return "–"
    count, threads = facts.get("processes", 1), facts.get("threads", "?")
    names = _joined(folder.facts.get("devices") or [facts.get("device", "?")])
    return f"{names}, {count} process{'es' if count != 1 else ''}, {threads} thread{'s' if threads != 1 else ''}"


def compute_table(study: Study) -> FactsTable:
    """What the rows cost: pre-training once, fine-tuning per run, in operations and in hours of a device."""
    return FactsTable(
        "Compute",
        ("method", "images", "TFLOP", "hours", "images", "TFLOP", "hours", "hours", "of"),
        [_cost(study, start) for start in study.starts],
        (("", 1), ("pre-training, once", 3), ("fine-tuning, a run (median)", 3), ("all its runs", 2)),
        remark="TFLOP: operations of training as executed, 10¹²; scoring is left out. Rows that start from the same "
        "pre-training name it each, though it was run once. A run with pseudo-labels counts the runs that made them. "
        "Hours are those of the clock, times the devices or threads; a dash is what a run did not record. The paper "
        "gives neither.",
    )


def _cost(study: Study, start: str) -> list[str]:
    def known(values: Sequence[float | None]) -> list[float]:
        return [float(value) for value in values if value is not None]

    parents, runs = study.parents(start), study.select(start)
    totals = []
    for costs in zip(
        *[(each.train.get("images"), each.train.get("tflop"), _hours(each, each.train)) for each in parents]
    ):
        totals.append(_dash(sum(known(costs)) if None not in costs else None))  # one silent parent hides the sum
    # medians: a run that had to share the machine does not move them
    hours = known([_hours(run.home, run.train) for run in runs])
    each_run = [known([run.train.get(key) for run in runs]) for key in ("images", "tflop")]
    medians = [_dash(statistics.median(values) if values else None) for values in (*each_run, hours)]
    machines = [facts for run in runs if (facts := run.home.facts.get("hardware"))]
    units = _joined([f"one {'thread of ' if _is_cpu(facts) else ''}{facts['device']}" for facts in machines])
    total = _dash(sum(hours) if hours else None)
    return [study.title(start), *(totals or ["none", "–", "–"]), *medians, total, units or "–"]


def _hours(folder: RunFolder, train: dict[str, Any]) -> float | None:
    """Device hours of training: wall time times the GPUs, or times the processor threads, it had."""
    facts = folder.facts.get("hardware") or {}
    if train.get("wall_s") is None or not facts:
        return None
    # a GPU is one device whatever feeds it; of a CPU every thread is one
    threads = facts.get("threads", 1) if _is_cpu(facts) else 1
    return float(train["wall_s"]) * facts.get("processes", 1) * threads / 3600


def _is_cpu(facts: dict[str, Any]) -> bool:
    return facts.get("device") in ("x86_64", "aarch64", "arm64", "AMD64")


def _dash(value: float | None) -> str:
    """Three digits, or a dash for what is not known."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
