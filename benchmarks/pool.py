"""Copies and leaks in a pool of real x-rays, with planted ones, and a short pre-training without them.

    python -m benchmarks.pool --data DIR --out benchmarks/results       # DIR holds nih_cxr14_1000, hannover_cxr, ...

Packs NIH, Hannover, MedNIST and ISBI, and a corpus of planted copies: films of the ISBI test set and of NIH, identical,
as JPEG of quality 90, at half size, and turned with an EXIF tag that turns them back; beside them the Shenzhen films,
which are in no other set. Every pair found is looked at a
second time by something the search does not use: the correlation of the packed pixels without their low frequencies.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from ddpm_lmk.config import DataConfig
from ddpm_lmk.data.duplicates.fingerprints import prints_of
from ddpm_lmk.data.duplicates.leakage import Finding, Leakage, Source, compare, exclusion
from ddpm_lmk.data.duplicates.search import MOST_DETAIL_BITS, RADIUS, near_pairs
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.system.files import write_json
from ddpm_lmk.system.machine import hardware, versions

SETS = {"nih_cxr14_1000": "table", "hannover_cxr": "table", "mednist64": "folder", "isbi2015_ceph": "table"}
PLANTED = ("identical", "jpeg_q90", "half_size", "exif_rotated")
SIDE = 128
CORRELATED = 0.9


def main() -> None:
    """Pack, plant, compare, pre-train, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("LMK_DATA", "shared/data"), help="real x-rays")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--per-kind", type=int, default=20, help="films planted per kind and set")
    args = parser.parse_args()
    missing = [name for name in (*SETS, "shenzhen_chest") if not (args.data / name).is_dir()]
    if missing:
        print(f"{args.data} has no {missing[0]}: nothing is measured; give the folder with --data")
        return
    with tempfile.TemporaryDirectory(prefix="pool-") as folder:
        packs = packed(args.data, Path(folder), args.per_kind)
        manifests = {name: Manifest.open(path) for name, path in packs.items()}
        real = [manifests[name] for name in SETS]
        result = {
            "settings": {"side_px": SIDE, "radius_bits": RADIUS, "of_bits": 64, "detail_bits": MOST_DETAIL_BITS},
            "films": {name: len(manifest) for name, manifest in manifests.items()},
            "looks_alike": looks_alike(real),
            "found": found_in([*real, manifests["planted"]]),
            "planted": planted_found([*real, manifests["planted"]]),
            "pre_training": pre_train([packs[name] for name in [*SETS, "planted"]], Path(folder) / "run"),
            "hardware": hardware(),
            "versions": versions("ddpm-lmk", "numpy", "opencv-python-headless", "pillow"),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    write_json(args.out / "pool_duplicates.json", result)
    print(json.dumps(result, indent=1))


def packed(data: Path, folder: Path, per_kind: int) -> dict[str, Path]:
    """The four sets and the planted corpus, packed."""
    packs = {}
    for name, kind in SETS.items():
        packs[name] = folder / name
        pack(data / name, packs[name], PackSettings(kind=kind, size=SIDE), workers=1)
    plant(data, folder / "raw", per_kind)
    packs["planted"] = folder / "planted"
    pack(folder / "raw", packs["planted"], PackSettings(kind="folder", name="planted", size=SIDE), workers=1)
    return packs


def plant(data: Path, folder: Path, per_kind: int) -> None:
    """Write copies of the first test films of ISBI, and of the first films of NIH, `per_kind` of each kind."""
    folder.mkdir()
    ceph = [f"isbi2015_ceph/images/{number:03d}.jpg" for number in range(151, 275)]
    chest = sorted(str(path.relative_to(data)) for path in (data / "nih_cxr14_1000" / "images").iterdir())
    for name, films in (("isbi", ceph), ("nih", chest)):
        for number, film in enumerate(films[: per_kind * len(PLANTED)]):
            kind = PLANTED[number % len(PLANTED)]
            image = Image.open(data / film).convert("L")
            save_copy(image, kind, data / film, folder / f"{name}-{number:03d}-{kind}")
    for path in sorted((data / "shenzhen_chest" / "images").iterdir()):
        (folder / f"{path.stem}-fresh{path.suffix}").write_bytes(path.read_bytes())


def save_copy(image: Image.Image, kind: str, original: Path, target: Path) -> None:
    """Write one planted copy."""
    if kind == "identical":
        target.with_suffix(original.suffix).write_bytes(original.read_bytes())
    elif kind == "jpeg_q90":
        image.save(target.with_suffix(".jpg"), quality=90)
    elif kind == "half_size":
        half = (image.width // 2, image.height // 2)
        image.resize(half, Image.Resampling.BILINEAR).save(target.with_suffix(".png"))
    else:
        exif = Image.Exif()
        exif[0x0112] = 6
        image.transpose(Image.Transpose.ROTATE_90).save(target.with_suffix(".png"), exif=exif)


def looks_alike(manifests: list[Manifest]) -> list[dict[str, Any]]:
    """Per set: pairs whose 64 bits are near, how many of them are copies, and how far apart the others' details are."""
    rows = []
    for manifest in manifests:
        prints = prints_of(manifest)
        low, detail = np.asarray(prints["low"]), np.asarray(prints["detail"])
        a, b = np.triu_indices(len(prints), 1)
        near = np.bitwise_count(low[a] ^ low[b]) <= RADIUS
        apart = np.bitwise_count(detail[a[near]] ^ detail[b[near]]).sum(-1)
        copies = apart[apart <= MOST_DETAIL_BITS]
        others = apart[apart > MOST_DETAIL_BITS]
        searched = {pair for x, y in near_pairs(low, detail) for pair in zip(x.tolist(), y.tolist(), strict=True)}
        row = {"dataset": manifest.dataset, "films": len(prints), "near_pairs": int(near.sum()), "copies": len(copies)}
        row |= {"copies_found_by_search": len(searched)}
        row |= {"most_detail_bits_of_a_copy": int(copies.max()) if len(copies) else None}
        rows.append(row | {"fewest_detail_bits_of_others": int(others.min()) if len(others) else None})
    return rows


def found_in(manifests: list[Manifest]) -> dict[str, Any]:
    """Leaks and copies between all sets, and which of them a second look does not confirm."""
    found = compared(manifests)
    pairs: Counter[str] = Counter()
    weakest, doubted = 1.0, 0
    leaking = {finding.film for finding in found.leaks}
    copies = [finding for finding in found.copies if finding.film not in leaking]
    for what, finding in [*(("leak", each) for each in found.leaks), *(("copy", each) for each in copies)]:
        names = [dataset_of(found, place) for place in (finding.film, finding.of)]
        pairs[f"{what}: {names[0]} repeats {names[1]} ({finding.kind})"] += 1
        if finding.kind != "same patient":
            correlation = second_look(found, finding)
            weakest, doubted = min(weakest, correlation), doubted + (correlation < CORRELATED)
    return {"pairs": dict(pairs), "weakest_correlation": round(weakest, 3), "not_confirmed": doubted}


def compared(manifests: list[Manifest]) -> Leakage:
    """All training films against each other and against the test films."""
    trained = [Source(each, tuple(s for s in each.splits if s == "train")) for each in manifests]
    protected = [Source(each, tuple(s for s in each.splits if s != "train")) for each in manifests]
    return compare(trained, [source for source in protected if source.splits])


def dataset_of(found: Leakage, place: tuple[int, int]) -> str:
    """Name of the set a film lies in."""
    return [*found.trained, *found.protected][place[0]].manifest.dataset


def second_look(found: Leakage, finding: Finding) -> float:
    """Correlation of two films at 32 px, low frequencies removed."""
    sides = []
    for source, row in (finding.film, finding.of):
        pixels = [*found.trained, *found.protected][source].manifest.decode(row).astype(np.float32)
        small = cv2.resize(pixels, (32, 32), interpolation=cv2.INTER_AREA)
        sides.append((small - cv2.GaussianBlur(small, (0, 0), 3)).ravel())
    return float(np.corrcoef(*sides)[0, 1])


def planted_found(manifests: list[Manifest]) -> dict[str, dict[str, int]]:
    """How many of the planted copies were packed, and how many of those were found, by kind."""
    found = compared(manifests)
    number = len(manifests) - 1
    films = {each.film[1] for each in [*found.leaks, *found.copies] if each.film[0] == number}
    counts = {kind: {"planted": 0, "found": 0} for kind in (*PLANTED, "fresh")}
    for row in range(len(manifests[-1])):
        kind = manifests[-1].read_record(row).id.split("-")[-1]
        counts[kind]["planted"] += 1
        counts[kind]["found"] += row in films
    return counts


def pre_train(packs: list[Path], out: Path) -> dict[str, Any]:
    """Twenty steps on the pool, through the command line, on one CPU process."""
    words = [
        f"data.path=[{','.join(map(str, packs))}]",
        "train.length=20 steps",
        "data.image_size=32",
        "evaluate.samples=0",
    ]
    smoke = Path(__file__).resolve().parent.parent / "configs" / "smoke" / "pretrain.yaml"
    command = [sys.executable, "-m", "ddpm_lmk.cli", "pretrain", str(smoke), *words, "--cpu", "1", "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    results = json.loads((out / "results.json").read_text())
    record = json.loads((out / "leakage.json").read_text())
    assert record == exclusion([Manifest.open(p) for p in packs], DataConfig(path=tuple(map(str, packs)))).record
    offered = sum(facts["images"] for facts in record["trained_on"])
    taken = {"offered_images": offered, "left_out_images": record["left_out"], "trained_images": results["num_images"]}
    return taken | {"steps": results["train"]["steps"], "leaks": record["leaks"], "copies": record["copies"]}


if __name__ == "__main__":
    main()
