"""Tables of the page about the GPU (docs/gpu.md), from all result files of a folder: an H200 beside the CPU here.

Cells of a GPU are empty until `gpu_queue.sh` has run on one. What a rate is compared with is the peak that was measured
in the same queue, and until then the one measured before on such a machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _tables import _bounds, machine, markdown
from torch import Tensor, nn

from ddpm_lmk.bench import Row, Stored, read_results
from ddpm_lmk.config import UNetConfig
from ddpm_lmk.config.load import load_yaml
from ddpm_lmk.models import build_model, model_cost
from ddpm_lmk.models.blocks import GroupNorm

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SIZE_PX, BATCH, PASSES, BF16_BYTES = 256, 32, 3, 2
PEAK, PUBLISHED_PEAK = 790e12, 989e12  # dense bf16: an 8192-wide product measured before on an H200; its data sheet
BANDWIDTH, PUBLISHED_BANDWIDTH = 4.3e12, 4.8e12  # bytes/s: a copy measured before, read and written; the data sheet
MLPERF_IMAGES_PER_S, MLPERF_FLOPS = 129, 312e12  # a GPU of 8 x H200, MLPerf Training 4.0, U-Net of Stable Diffusion 2
MLPERF_COLD_PCT = 44  # of the measured peak, in its first 45 s
WANTED_PAPER, WANTED_BASE_PCT, WANTED_WAIT_PCT = 40, 60, 2
NETWORKS = {"paper": "`paper`", "base": "`base`"}


class Found:
    """The newest result of each kind, of a GPU and of a CPU."""

    def __init__(self, folder: Path) -> None:
        self.results = [*read_results(folder)][::-1]

    def all(self, benchmark: str, device: str) -> Iterator[Stored]:
        """Newest first."""
        for result in self.results:
            if result.benchmark == benchmark and result.facts["hardware"]["device"] == device:
                yield result

    def step(self, name: str, device: str, *, compiled: bool = False, checkpointing: bool = False) -> Stored | None:
        """The newest training without a pause of a preset at the page's image side."""
        for result in self.all("step", device):
            if not _rows(result, "sustained training"):
                continue  # there was no time for it
            settings = result.facts["settings"]
            model, train = settings["model"], settings["train"]
            is_it = settings["name"] == name and settings["data"]["image_size"] == SIZE_PX
            if is_it and (model["checkpointing"] is True) == checkpointing and (train["compile"] is True) == compiled:
                return result
        return None

    def peak(self, device: str) -> float | None:
        """Operations per second of a large product in bf16, over all threads."""
        rows = [row for result in self.all("device", device) for row in _rows(result, "matrix product")]
        return max(
            (1e9 * _rate(row, "gflop_per_s") for row in rows if row.conditions["precision"] == "bf16"), default=None
        )

    def bandwidth(self, device: str) -> float | None:
        """Bytes per second of a copy, read and written."""
        rows = [row for result in self.all("device", device) for row in _rows(result, "copy")]
        return max((1e9 * _rate(row, "gbyte_per_s") for row in rows), default=None)

    def wait(self, loader: str, device: str = "cuda") -> float | None:
        """Percent of a run that waits for data, streamed with a loader."""
        for result in self.all("train", device):
            for row in _rows(result, "training"):
                if result.facts["settings"]["runtime"]["loader"] == loader:
                    return float(row.figures["data_wait_share_pct"])
        return None


def _rows(result: Stored | None, what: str) -> list[Row]:
    return [row for row in result.rows if row.what == what] if result else []


def _rate(row: Row, name: str) -> float:
    return median(row.samples[name])


def _sustained(result: Stored | None) -> dict[str, Any]:
    """Figures of training without a pause, and images per second of a processor; empty where there are none."""
    rows = _rows(result, "sustained training")
    return rows[0].figures | {"images_per_cpu_s": _rate(rows[0], "images_per_cpu_s")} if rows else {}


class Limit:
    """Images per second that a network cannot exceed on a device of this peak and bandwidth.

    Operations at the peak, and after them every convolution's input and output, read or written once a pass in bf16;
    norms and activations as if they were part of the convolutions.
    """

    def __init__(self, preset: str) -> None:
        config = UNetConfig.model_validate(load_yaml(CONFIGS / "model" / f"{preset}.yaml")["model"])
        cost = model_cost(config, SIZE_PX, 1)
        self.flops = PASSES * cost.flops_forward
        self.bytes = PASSES * BF16_BYTES * _moved(config)

    def ideal(self, peak: float) -> float:
        """By operations alone."""
        return peak / self.flops

    def fused(self, peak: float, bandwidth: float) -> float:
        """By operations and what has to be moved."""
        return 1 / (self.flops / peak + self.bytes / bandwidth)


@cache
def _limit(preset: str) -> Limit:
    return Limit(preset)


def _moved(config: UNetConfig) -> int:
    """Numbers in the inputs and outputs of all convolutions of a forward pass of one image."""
    numbers = 0

    def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal numbers
        numbers += inputs[0].numel() + output.numel()

    with torch.device("meta"):
        model, image, t = build_model(config, out_channels=1), torch.zeros(1, 1, SIZE_PX, SIZE_PX), torch.zeros(1)
    for module in model.modules():
        if isinstance(module, GroupNorm):
            module.forward = lambda x, *more, **named: x  # type: ignore[method-assign]
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        model.eval()(image, t.long())
    return numbers


def _text(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _share(images_per_s: float | None, limit: float | None) -> float | None:
    return None if images_per_s is None or not limit else 100 * images_per_s / limit


def _verdict(measured: float | None, reached: Callable[[float], bool]) -> str:
    return "not measured" if measured is None else "yes" if reached(measured) else "**no**"


def wanted_table(folder: Path) -> str:
    """What the GPU is wanted to do, and what it did."""
    found = Found(folder)
    peak, bandwidth = found.peak("cuda") or PEAK, found.bandwidth("cuda") or BANDWIDTH
    paper = _sustained(found.step("paper", "cuda")).get("steady_images_per_s")
    both = [_sustained(found.step("base", "cuda", compiled=compiled)) for compiled in (False, True)]
    base = max((each["steady_images_per_s"] for each in both if each), default=None)
    limits = {name: _limit(name) for name in NETWORKS}
    fused = _share(base, limits["base"].fused(peak, bandwidth))
    rows = [
        [f"`paper`, {SIZE_PX} px, bf16, {BATCH} images: images/s", f"{WANTED_PAPER}", _text(paper, 1)],
        ["the same, share of the peak, %", "50", _text(_share(paper, limits["paper"].ideal(peak)), 1)],
        ["`base`, eager or compiled, share of its fused limit, %", f"{WANTED_BASE_PCT}", _text(fused, 1)],
    ]
    reached = [
        _verdict(paper, lambda value: value >= WANTED_PAPER),
        _verdict(_share(paper, limits["paper"].ideal(peak)), lambda value: value > 50),
        _verdict(fused, lambda value: value >= WANTED_BASE_PCT),
    ]
    slowest = _worst_ratio(found)
    rows.append(["a step over that of each peer at matched operations, the worst", "below 1", slowest[0]])
    reached.append(slowest[1])
    for loader in ("torch", "dali"):
        wait = found.wait(loader)
        rows.append([f"`base` in a run, waiting for data ({loader}), %", f"below {WANTED_WAIT_PCT}", _text(wait, 2)])
        reached.append(_verdict(wait, lambda value: value < WANTED_WAIT_PCT))
    ran = next((found.all("step", "cuda")), None)
    head = f"{ran.machine}; {machine(ran.facts)}" if ran else "Nothing of this project has run on a GPU yet."
    table = markdown(["what", "wanted", "measured", "reached"], [[*row, mark] for row, mark in zip(rows, reached)])
    return f"{head}\n\n{table}"


def _worst_ratio(found: Found) -> tuple[str, str]:
    """The largest upper bound of our step over another's of the same operations, with its peer; and the verdict."""
    for result in found.all("peers", "cuda"):
        ratios = [r for r in result.facts["ratios"] if r["group"] == "matched" and r.get("of") == "a step"]
        if ratios:
            worst = max(ratios, key=lambda ratio: ratio["ratio_high"] or 0.0)
            is_ahead = all(ratio["ratio_high"] is not None and ratio["ratio_high"] < 1 for ratio in ratios)
            return f"{worst['second']}: {_bounds(worst)}", "yes" if is_ahead else "**no**"
    return "", "not measured"


def peaks_table(folder: Path) -> str:
    """What the device can do at most: measured by the queue, measured before, published; and the CPU here."""
    found, rows = Found(folder), []
    for name, rate, before, published in (
        ("matrix product, bf16, TFLOP/s", found.peak, PEAK, PUBLISHED_PEAK),
        ("copy, read and written, TB/s", found.bandwidth, BANDWIDTH, PUBLISHED_BANDWIDTH),
    ):
        cells = [rate("cuda"), before, published, rate("cpu")]
        rows.append([name, *(_text(cell and cell / 1e12, 3 if cell and cell < 1e12 else 1) for cell in cells)])
    heads = ["what", "H200, measured", "H200, measured before", "H200, data sheet", "this CPU, measured"]
    return markdown(heads, rows)


def rates_table(folder: Path) -> str:
    """Training without a pause: cold and steady rates against the roofline, MLPerf's U-Net, and the CPU here."""
    found = Found(folder)
    peak, bandwidth = found.peak("cuda") or PEAK, found.bandwidth("cuda") or BANDWIDTH
    rows = []
    for name, title in NETWORKS.items():
        limit = _limit(name)
        for words, options in _variants(name):
            gpu = _sustained(found.step(name, "cuda", **options))
            cold, steady = gpu.get("cold_images_per_s"), gpu.get("steady_images_per_s")
            here = _sustained(found.step(name, "cpu", **options)).get("images_per_cpu_s")
            ideal, fused = limit.ideal(peak), limit.fused(peak, bandwidth)
            bounds = f"{_text(ideal)} ({_text(fused)})"
            cells = [f"{limit.flops / 1e12:.2f}", bounds, _of(cold, ideal), _of(steady, ideal)]
            cells += [_text(_share(steady, fused), 1), _text(gpu.get("peak_memory_gib"), 1), _text(here, 3)]
            rows.append([f"{title}{words}", *cells])
    flops = MLPERF_FLOPS / MLPERF_IMAGES_PER_S
    ideal = PEAK / flops
    rates = [_of(MLPERF_COLD_PCT / 100 * ideal, ideal), _of(MLPERF_IMAGES_PER_S, ideal)]
    rows.append(["MLPerf's U-Net, published", f"{flops / 1e12:.2f}", _text(ideal), *rates, "", "", ""])
    heads = ["network", "TFLOP/image", "roofline (fused limit)", "cold (of the peak)", "steady (of the peak)"]
    return markdown([*heads, "% of the fused limit", "memory, GiB", "this CPU"], rows)


def _of(images_per_s: float | None, limit: float) -> str:
    """A rate and its share of a limit."""
    return "" if images_per_s is None else f"{images_per_s:,.1f} ({100 * images_per_s / limit:.1f} %)"


def _variants(name: str) -> list[tuple[str, dict[str, bool]]]:
    if name == "paper":
        return [("", {}), (", recomputing", {"checkpointing": True})]
    return [("", {}), (", compiled", {"compiled": True})]


def calls_table(folder: Path) -> str:
    """Every item of the queue: what it is expected to take on an H200, took there, and took here at toy size."""
    found = {device: _queue(folder / f"gpu_queue-{device}.json") for device in ("cuda", "cpu")}
    rows = []
    for row in (found["cpu"] or found["cuda"])["rows"]:
        same = {device: _item(facts, row["item"]) for device, facts in found.items()}
        cells = [_text(same[device].get("seconds"), 1) for device in ("cuda", "cpu")]
        outcome = same["cuda"].get("outcome", "")
        rows.append(
            [row["call"], row["item"], row["estimated_s"], cells[0], outcome, cells[1], same["cpu"].get("outcome", "")]
        )
    heads = ["call", "item", "estimated, s", "H200, s", "H200, outcome", "toy size on this CPU, s", "its outcome"]
    lines = [markdown(heads, rows)]
    for device, facts in found.items():
        if facts:
            calls = facts["calls"].items()
            told = "; ".join(
                f"call {call} {each['wall_s']:.0f} s, {len(each['brought'])} files home" for call, each in calls
            )
            lines.append(f"{'H200' if device == 'cuda' else 'Toy size'}: {told}. {machine(facts)}")
    return "\n\n".join(lines)


def _queue(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _item(facts: dict[str, Any], name: str) -> dict[str, Any]:
    return next((row for row in facts.get("rows", []) if row["item"] == name), {})
