"""Landmarks of new x-rays: files in; a table, a JSON file and a picture with the points each, out.

Pictures are prepared exactly as the run's training data was packed, and decoded in another process, so that no bad file
stops the others. Points are pixels of the file as it is seen (after its EXIF rotation). Millimetres are written where a
DICOM file states its spacing, or where the caller knows it: none is guessed.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ddpm_lmk.config import DataConfig
from ddpm_lmk.data.batch import Batch
from ddpm_lmk.data.drawing import draw_overlay, encode_png, to_uint8
from ddpm_lmk.data.images.image import DecodedImage, ReadOptions, RefusedImageError
from ddpm_lmk.data.images.resize import as_packed, to_network_size
from ddpm_lmk.data.images.sandbox import decoders
from ddpm_lmk.data.loading.augment import compose, invert, no_changes, resize_matrix
from ddpm_lmk.data.loading.warp import develop
from ddpm_lmk.data.shards.records import to_stored_matrix
from ddpm_lmk.data.sources.walk import images_below, unique_ids
from ddpm_lmk.errors import ConfigError, DataError
from ddpm_lmk.inference.formats import open_writers
from ddpm_lmk.inference.load import LoadedRun, open_run
from ddpm_lmk.inference.predictions import ImagePrediction, PredictedFile, to_native
from ddpm_lmk.rundir.lock import check_writable
from ddpm_lmk.system import files as atomic
from ddpm_lmk.system.accelerator import to_device
from ddpm_lmk.system.sandbox import Answer
from ddpm_lmk.tasks import LandmarkTask

COLUMNS = (
    *("file", "landmark_index", "landmark_name", "x", "y", "x_mm", "y_mm", "spread_px", "spread_mm"),
    *("radius_px", "radius_mm", "failed"),
)
SMALLEST_OVERLAY, LARGEST_OVERLAY = 768, 2048  # longer side, pixels; in between an overlay has the size of its file


@dataclass
class PredictSummary:
    """What came of the files: pictures with points, and files that could not be read, with the reason."""

    out: Path
    predicted: int = 0
    errors: dict[str, str] = field(default_factory=dict)
    coverage: float | None = None  # probability with which a radius holds its true point; None: there are no radii
    passed_over: Counter[str] = field(default_factory=Counter)  # files of folders that are no images, by suffix

    def check(self, *, strict: bool) -> None:
        """Raise DataError if no file could be read; with `strict`, if any could not."""
        if self.errors and (strict or not self.predicted):
            name, reason = next(iter(self.errors.items()))
            total = self.predicted + len(self.errors)
            raise DataError(f"{len(self.errors)} of {total} images could not be read, first {name}: {reason}")


@dataclass(frozen=True)
class Picture:
    """An image, decoded and prepared for the network."""

    name: str
    grey: np.ndarray  # [H, W] uint8, for the overlay
    network: np.ndarray  # [S, S] uint8 or uint16
    fine: np.ndarray | None  # [F, F] of the same square, where the run looks twice
    to_native: np.ndarray  # [2, 3] network px -> file px
    mm_per_px: float | None  # as the file states it
    spacing: str | None  # from which of its tags, or why it is unknown

    @property
    def size(self) -> tuple[int, int]:
        return self.grey.shape[1], self.grey.shape[0]


def predict_images(
    run: str | Path,
    files: Sequence[str | Path],
    out: str | Path,
    *,
    mm_per_px: float | None = None,
    dataset: str | None = None,
    frame: int | None = None,
    formats: Sequence[str] = (),
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> PredictSummary:
    """Find the landmarks in image files; writes OUT/predictions.{csv,json} and OUT/overlays/NAME.png.

    Args:
        run: run directory or snapshot of a landmark run.
        files: PNG, JPEG, BMP, TIFF or DICOM files, and folders, of which all such files are taken.
        mm_per_px: spacing of the pixels of these files, where it is known; goes before what DICOM files state.
        dataset: whose landmarks are wanted, of a run that has learnt those of several.
        frame: which frame of files with several, from 0; None: such files fail.
        formats: what else is written, in OUT/FORMAT (`inference.formats`).

    Raises:
        ConfigError: no files, an unknown format, or the run has learnt something else.
        DataError: no image in a folder, or how the run prepared its pictures cannot be found out.
        RunConflictError: OUT/FORMAT is there already.
    """
    if not files:
        raise ConfigError("no image files given; name at least one")
    if mm_per_px is not None and not (np.isfinite(mm_per_px) and mm_per_px > 0):
        raise ConfigError(f"--mm-per-px={mm_per_px}: wanted a positive number of millimetres")
    out = Path(out)
    check_writable(out)
    writers = open_writers(formats, out)
    paths, passed_over = list_images(files)  # an empty folder is refused before the weights are read
    ids = dict(zip(map(str, paths), unique_ids(list(paths.values())), strict=True))
    loaded = open_run(run, kind="landmarks", device=device).for_dataset(dataset)
    learnt = loaded.radius
    summary = PredictSummary(out, passed_over=passed_over)
    images: list[dict[str, Any]] = []
    for name, picture, prediction in predict_files(loaded, [str(path) for path in paths], frame):
        if isinstance(picture, RefusedImageError):
            summary.errors[name] = str(picture)
            images.append({"file": name, "error": str(picture)})
            continue
        assert prediction is not None
        overlay = _overlay_name(images, name)
        radius_px = None if learnt is None else prediction.radius_px(learnt["factor"])
        # millimetres are only as good as their spacing, so its source stands beside it
        spacing = picture.spacing if mm_per_px is None else "--mm-per-px"
        predicted = PredictedFile(
            path=Path(name),
            id=ids[name],
            grey=picture.grey,
            landmark_names=loaded.spec.landmark_names,
            prediction=prediction,
            radius_px=radius_px,
            coverage=None if learnt is None else learnt["coverage"],
            mm_per_px=mm_per_px or picture.mm_per_px,
            spacing=spacing,
            frame=frame,
            weights=loaded.weights_sha256,
        )
        try:
            for writer in writers:
                writer.add(predicted)
        except RefusedImageError as error:
            summary.errors[name] = str(error)
            images.append({"file": name, "error": str(error)})
            continue
        summary.predicted += 1
        images.append(_facts(predicted) | {"overlay": f"overlays/{overlay}"})
        numbers = [str(index) for index in range(len(prediction.points))]
        side = min(max(*picture.size, SMALLEST_OVERLAY), LARGEST_OVERLAY)
        circles = prediction.spread_px if radius_px is None else np.nan_to_num(radius_px)
        drawn = draw_overlay(picture.grey, prediction.points, circles_px=circles, names=numbers, side=side)
        atomic.write_bytes(out / "overlays" / overlay, encode_png(drawn))
    for writer in writers:
        writer.finish()
    facts = {"run": str(loaded.path), "step": loaded.meta["step"], "dataset": loaded.spec.name, "mm_per_px": mm_per_px}
    summary.coverage = None if learnt is None else learnt["coverage"]
    atomic.write_json(out / "predictions.json", {**facts, "radius_coverage": summary.coverage, "images": images})
    atomic.write_text(out / "predictions.csv", _to_csv(images))
    return summary


def list_images(places: Sequence[str | Path]) -> tuple[dict[Path, str], Counter[str]]:
    """The files of `places` in order, folders replaced by the images below them, and what else is there by suffix.

    Each with its path below the folder, or its name. DICOM files are known by their first bytes, whatever their names.
    Raises DataError where a folder holds no image.
    """
    files: dict[Path, str] = {}
    others: Counter[str] = Counter()
    for place in map(Path, places):
        if not place.is_dir():
            files.setdefault(place, place.name)
            continue
        below, further = images_below(place)
        for name in below:
            files.setdefault(place / name, name)
        others += further
    return files, others


Predicted = tuple[str, "Picture | RefusedImageError", "ImagePrediction | None"]


def predict_files(loaded: LoadedRun, names: Sequence[str], frame: int | None) -> Iterator[Predicted]:
    """Every file in order, decoded in another process: prepared and with its points, or the reason of a refusal."""
    voi = loaded.pixel_settings()["window"] == "voi"
    # a patient's own picture is wanted, whatever is written in it; nothing of it but points is kept
    options = asdict(ReadOptions(frame=frame, voi=voi, allow_burned_in=True))
    with decoders(1) as processes:
        answers = processes.answers({"path": name, "options": options} for name in names)
        yield from predict_decoded(loaded, zip(names, map(_image, answers), strict=True))


def predict_decoded(
    loaded: LoadedRun, images: Iterable[tuple[str, DecodedImage | RefusedImageError]]
) -> Iterator[Predicted]:
    """As `predict_files`, of images by name that somebody else has decoded; computed in batches."""
    settings, waiting = loaded.pixel_settings(), iter(images)
    while part := list(islice(waiting, loaded.cfg.evaluate.batch)):
        pictures = [_prepare(name, image, settings, loaded.cfg.data) for name, image in part]
        predictions = iter(_predict_batch(loaded, [each for each in pictures if isinstance(each, Picture)]))
        for (name, _), picture in zip(part, pictures, strict=True):
            yield name, picture, next(predictions) if isinstance(picture, Picture) else None


def _image(answer: Answer) -> DecodedImage | RefusedImageError:
    """What a decoding process read, or why it did not."""
    facts, content = answer
    if "io_error" in facts:
        return RefusedImageError("UNREADABLE", facts["io_error"])
    if "refused" in facts:
        return RefusedImageError(facts["code"], facts["refused"])
    pixels = np.frombuffer(content, np.dtype(facts["dtype"])).reshape(facts["shape"])
    full_range = None if facts["full_range"] is None else tuple(facts["full_range"])
    return DecodedImage(pixels, facts["facts"], full_range, facts["is_windowed"], facts["mm_per_px"])


def _prepare(
    name: str, image: DecodedImage | RefusedImageError, settings: dict[str, Any], data: DataConfig
) -> Picture | RefusedImageError:
    """Resize an image as packing and loading do; a refusal stays one, or becomes one here."""
    if isinstance(image, RefusedImageError):
        return image
    pixels = image.pixels
    native = (pixels.shape[1], pixels.shape[0])
    # twice, as a packed image is: once to the stored square, once from there to the network's
    try:
        stored = as_packed(image, native, settings)
    except RefusedImageError as error:
        return error
    network = to_network_size(stored, data.image_size)
    fine = None if data.fine_size is None else to_network_size(stored, data.fine_size)
    to_stored = to_stored_matrix(native, settings["size"], settings["aspect"])
    to_native = invert(compose(resize_matrix(settings["size"], data.image_size), to_stored))
    return Picture(name, to_uint8(pixels), network, fine, to_native, image.mm_per_px, image.facts.get("spacing"))


@torch.inference_mode()
def _predict_batch(loaded: LoadedRun, pictures: list[Picture]) -> list[ImagePrediction]:
    """Points of prepared pictures, as an evaluation of packed ones would compute them."""
    if not pictures:
        return []
    assert isinstance(loaded.task, LandmarkTask)
    device = loaded.parallel.device
    raw = to_device(_as_tensor([picture.network for picture in pictures]), device)
    finer: dict[str, torch.Tensor] = {}
    if (fine_size := loaded.cfg.data.fine_size) is not None:
        finer["fine"] = _as_tensor([picture.fine for picture in pictures if picture.fine is not None])[:, None]
        to_fine = torch.from_numpy(resize_matrix(loaded.cfg.data.image_size, fine_size)).float()
        finer["to_fine"] = to_fine.repeat(len(pictures), 1, 1)
    positions = np.arange(len(pictures))
    images = develop(
        raw, no_changes(len(pictures)), seed=loaded.cfg.seed, positions=positions, intensity=loaded.cfg.data.intensity
    )
    batch = Batch(
        images=images,
        points=None,
        to_native=torch.from_numpy(np.stack([picture.to_native for picture in pictures])).float(),
        native_size=torch.tensor([picture.size for picture in pictures], dtype=torch.float32),
        mm_per_px=torch.full((len(pictures),), float("nan")),
        positions=torch.from_numpy(positions),
        weight=torch.ones(len(pictures)),
        ids=tuple(picture.name for picture in pictures),
        **finer,
    ).to(device)
    with loaded.parallel.autocast(loaded.cfg.train.precision):
        return to_native(loaded.task.predict(loaded.model, batch), batch)


def _as_tensor(pixels: list[np.ndarray]) -> torch.Tensor:
    stacked = np.stack(pixels)
    # torch computes little with uint16: its bits travel as int16, as the loader's do
    return torch.from_numpy(stacked if stacked.dtype == np.uint8 else stacked.view(np.int16))


def _facts(predicted: PredictedFile) -> dict[str, Any]:
    """One image of predictions.json."""
    prediction, radius_px, mm_per_px = predicted.prediction, predicted.radius_px, predicted.mm_per_px
    points = []
    for index, name in enumerate(predicted.landmark_names):
        x, y = (round(float(value), 3) for value in prediction.points[index])
        spread = round(float(prediction.spread_px[index]), 3)
        radius = None if radius_px is None or np.isnan(radius_px[index]) else round(float(radius_px[index]), 3)
        point = {"name": name, "x": x, "y": y, "spread_px": spread, "radius_px": radius}
        point["failed"] = bool(prediction.failed[index])
        if mm_per_px is not None:
            millimetres = {"x_mm": x, "y_mm": y, "spread_mm": spread, "radius_mm": radius}
            point |= {key: None if value is None else round(value * mm_per_px, 4) for key, value in millimetres.items()}
        points.append(point)
    width, height = predicted.size
    facts = {"file": str(predicted.path), "width": width, "height": height}
    return facts | {"mm_per_px": mm_per_px, "spacing": predicted.spacing, "points": points}


def _to_csv(images: list[dict[str, Any]]) -> str:
    """One row per landmark; a file that failed has one row with its error."""
    text = io.StringIO()
    writer = csv.DictWriter(text, (*COLUMNS, "error"), lineterminator="\n")
    writer.writeheader()
    for image in images:
        if "error" in image:
            writer.writerow({"file": image["file"], "error": image["error"]})
        for index, point in enumerate(image.get("points", ())):
            row = {"file": image["file"], "landmark_index": index, "landmark_name": point["name"], **point}
            del row["name"]
            writer.writerow(row | {"failed": int(point["failed"])})
    return text.getvalue()


def _overlay_name(images: list[dict[str, Any]], name: str) -> str:
    """A file name for an overlay; a number is added where two files have the same name."""
    taken = {image.get("overlay", "").removeprefix("overlays/") for image in images}
    stem = Path(name).stem
    candidates = (f"{stem}.png" if count == 0 else f"{stem}-{count}.png" for count in range(len(images) + 1))
    return next(candidate for candidate in candidates if candidate not in taken)
