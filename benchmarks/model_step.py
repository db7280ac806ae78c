"""Time of the network alone: forward, forward and backward, and a whole AdamW step, per preset, image side and batch.

    python benchmarks/model_step.py [--presets tiny base paper] [--sizes 128 256] [--batches 8] [--device auto]
                                    [--precision auto] [--threads N] [--repeats 7] [--compile] [--out DIR]

Images are random and already on the device: no loader, no logging (those are in `train_step`). Every timing is a median
with its spread. The share of the peak counts the operations our code executes, per busy second (a GPU's clock; on a CPU
the seconds its cores worked, so that other programs hardly matter), against the fastest matrix product or 3x3
convolution of this very device in the same run, never a data sheet. Writes one `model_step_PRESET_DEVICE.json` per
preset into `--out`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm_lmk.config import UNetConfig
from ddpm_lmk.machine import cpu_name
from ddpm_lmk.models import build_model, model_cost
from ddpm_lmk.runfile import load_yaml

PRESETS = Path(__file__).parents[1] / "configs" / "model"
PEAK_SIDE = {"cpu": 1024, "cuda": 8192}
WARM_UPS = 2


def main() -> None:
    """Time each preset and write its result file."""
    args = _options()
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    precision = ("bf16" if device.type == "cuda" else "fp32") if args.precision == "auto" else args.precision
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    for preset in args.presets:
        cfg = UNetConfig.model_validate(load_yaml(PRESETS / f"{preset}.yaml")["model"])
        peak = _peak_flops(device, precision, repeats=args.repeats)
        rows = [
            _time_model(cfg, size, batch, device=device, precision=precision, peak=peak, args=args)
            for size in args.sizes
            for batch in args.batches
        ]
        result = {"preset": preset, "model": cfg.model_dump(), "device": _hardware(device), "precision": precision}
        result |= {"threads": args.threads, "compile": args.compile, "versions": _versions(), "when": _now()}
        result |= {"peak_gflop_per_busy_s": peak, "rows": rows}
        path = args.out / f"model_step_{preset}_{device.type}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {path}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--presets", nargs="+", default=["tiny"], choices=sorted(p.stem for p in PRESETS.glob("*.yaml"))
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=[128])
    parser.add_argument("--batches", nargs="+", type=int, default=[8])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def _time_model(
    cfg: UNetConfig,
    size: int,
    batch: int,
    *,
    device: torch.device,
    precision: str,
    peak: dict[str, float],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """One row: the three timings of one preset at one side and batch."""
    torch.manual_seed(0)
    model = build_model(cfg, out_channels=1).to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs do not know it
    run = torch.compile(model) if args.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x = torch.rand(batch, 1, size, size, device=device).to(memory_format=torch.channels_last)
    t = torch.randint(1, 500, (batch,), device=device)

    def forward() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            return run(x, t)

    def backward() -> None:
        model.zero_grad(set_to_none=True)
        F.mse_loss(forward().float(), x).backward()

    def step() -> None:
        backward()
        optimizer.step()

    cost = model_cost(cfg, size, 1)
    flops = {"forward": cost.flops_executed, "forward_backward": cost.flops_train, "train_step": cost.flops_train}
    row: dict[str, Any] = {"image_size_px": size, "batch": batch, "params": cost.params}
    row |= {"forward_gflop_per_image": cost.flops_forward / 1e9, "executed_gflop_per_image": cost.flops_executed / 1e9}
    row["group_norm_keeps_channels_last"] = _keeps_channels_last(x)
    for name, call in (("forward", _without_grad(forward)), ("forward_backward", backward), ("train_step", step)):
        seconds, cpu_seconds = _measure(call, device, repeats=args.repeats)
        median = statistics.median(seconds)
        busy = statistics.median(seconds if device.type == "cuda" else cpu_seconds)
        rate = flops[name] * batch / busy / 1e9
        row[name] = {
            "median_ms": median * 1e3,
            "min_ms": min(seconds) * 1e3,
            "max_ms": max(seconds) * 1e3,
            "cpu_median_ms": statistics.median(cpu_seconds) * 1e3,
            "images_per_s": batch / median,
            "executed_gflop_per_busy_s": rate,
            "share_of_measured_peak_pct": 100 * rate / max(peak.values()),
        }
        print(f"{size} px, batch {batch}, {name}: {median * 1e3:.1f} ms, {batch / median:.2f} images/s")
    row["peak_memory_mib"] = _peak_memory_mib(device)
    return row


def _without_grad(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> None:
        with torch.no_grad():
            call()

    return run


def _measure(call: Callable[[], Any], device: torch.device, *, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds by the clock, and of CPU work, of each of `repeats` calls; on a GPU until its work is done."""
    seconds, cpu_seconds = [], []
    for repeat in range(WARM_UPS + repeats):
        _wait(device)
        started, cpu_started = time.perf_counter(), time.process_time()
        call()
        _wait(device)
        if repeat >= WARM_UPS:
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - cpu_started)
    return seconds, cpu_seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_flops(device: torch.device, precision: str, *, repeats: int) -> dict[str, float]:
    """GFLOP per busy second of a large matrix product and of a 3x3 convolution: the fastest of the repeats."""
    clock = 0 if device.type == "cuda" else 1
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    side = PEAK_SIDE[device.type]
    a = torch.randn(side, side, device=device, dtype=dtype)
    channels, area = side // 8, 64
    x = torch.randn(8, channels, area, area, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    w = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    matmul = min(_measure(lambda: a @ a, device, repeats=repeats)[clock])
    conv = min(_measure(lambda: F.conv2d(x, w, padding=1), device, repeats=repeats)[clock])
    conv_flops = 2 * 9 * channels**2 * 8 * area**2
    return {"matmul": 2 * side**3 / matmul / 1e9, "conv3x3": conv_flops / conv / 1e9}


def _keeps_channels_last(x: Tensor) -> bool:
    """Does this torch's own GroupNorm kernel keep NHWC here (else every norm costs two copies)?"""
    maps = x.expand(-1, 8, -1, -1).contiguous(memory_format=torch.channels_last)
    out = F.group_norm(maps, 4)
    return out.is_contiguous(memory_format=torch.channels_last)


def _peak_memory_mib(device: torch.device) -> float:
    """Device memory at its highest since the start; on a CPU the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _hardware(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        return {"type": "cuda", "name": torch.cuda.get_device_name(device)}
    return {"type": "cpu", "name": cpu_name(), "cores": os.cpu_count(), "load_1min_at_end": os.getloadavg()[0]}


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    main()
