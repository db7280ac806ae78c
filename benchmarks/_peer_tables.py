"""Result files of `peers` as Markdown: what every network took, and ours against the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from _tables import machine, markdown

NAMES = {
    "ours": "ours",
    "ours, checkpointing": "ours, checkpointing",
    "released": "as released, without checkpointing",
    "released, checkpointing": "as released",
    "diffusers": "diffusers UNet2DModel",
    "lucidrains": "denoising-diffusion-pytorch",
    "monai": "MONAI DiffusionModelUNet",
}
WAYS = {"plain": "", "ours": ", our step", "released": ", its own step"}


def peers_table(source: Path) -> str:
    """Both tables of every group of a file, and its picture."""
    result = json.loads(source.read_text())
    settings = result["settings"]
    packages = ", ".join(f"{name} {version}" for name, version in settings["packages"].items() if name != "python")
    head = (
        f"{machine(result)}; {packages}; {settings['size']} px, {settings['precision']}, {settings['threads']} thread"
    )
    parts = [head]
    for group in settings["groups"]:
        rows = [row for row in result["rows"] if row["conditions"].get("group") == group]
        ratios = [ratio for ratio in result["ratios"] if ratio["group"] == group and "ratio" in ratio]
        parts += [markdown(HEADS, [_cells(row) for row in rows]), markdown(RATIO_HEADS, [_ratio(r) for r in ratios])]
    picture = source.with_suffix(".png")
    if picture.exists():
        parts.append(f"![time and memory of a step, by network](results/{picture.name})")
    return "\n\n".join(parts)


HEADS = (
    *("network", "layout", "channels", "parameters, M", "GFLOP/image", "step, ms", "processor, ms", "images/s"),
    *("memory, MiB", "µs/MFLOP of the function", "µs/MFLOP run"),
)
RATIO_HEADS = ("ours over", "of", "ratio", "95 %")


def _cells(row: dict[str, Any]) -> list[object]:
    conditions, figures, median = row["conditions"], row["figures"], row["median"]
    saves = ", saving" if conditions["saves"] else ""
    return [
        f"{NAMES[conditions['network']]}{WAYS[conditions['way']]}{saves}",
        conditions["layout"],
        "-".join(map(str, conditions["channels"])),
        f"{figures['params'] / 1e6:.2f}",
        f"{figures['forward_gflop_per_image_as_run']:.2f}",
        f"{1e3 * median['wall_s']:.0f}",
        f"{1e3 * median['cpu_s']:.0f}",
        f"{figures['images_per_s']:.1f}",
        f"{figures['peak_mib']:.0f}",
        f"{figures['busy_us_per_forward_mflop_of_the_function']:.1f}",
        f"{figures['busy_us_per_forward_mflop_as_run']:.1f}",
    ]


def _ratio(ratio: dict[str, Any]) -> list[object]:
    bounds = "" if ratio["ratio_low"] is None else f"{ratio['ratio_low']:.2f} to {ratio['ratio_high']:.2f}"
    said = ratio["reason"].split(" (")[0] if ratio["ratio"] is None else f"{ratio['ratio']:.2f}"
    return [ratio["second"], ratio["of"], said, bounds]
