"""What a run has learnt, for use elsewhere: weights as one safetensors file, the network as ONNX, samples as a picture.

An exported landmark network gives maps, not points; the facts needed to read them (codec, landmarks, how pictures are
prepared) go into the file's metadata. Weights trained on patients' images can give some of them away: treat them so.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from ddpm_lmk.errors import ConfigError, DataError, LaunchError
from ddpm_lmk.inference.load import LoadedRun, open_run
from ddpm_lmk.inference.sample import draw_samples, to_png
from ddpm_lmk.models.coarse_to_fine import CoarseToFine
from ddpm_lmk.rundir.lock import check_writable
from ddpm_lmk.system import files
from ddpm_lmk.tasks import DenoiseTask, LandmarkTask

Format = Literal["safetensors", "onnx"]
ONNX_OPSET = 20
ONNX_LIMIT = 2**31  # bytes; the limit of a protobuf file


def sample_run(
    run: str | Path,
    *,
    count: int,
    file: str | Path,
    num_steps: int = 50,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> Path:
    """Draw `count` images from a pre-training run by DDIM into one PNG sheet; raises ConfigError for other runs."""
    if count < 1 or num_steps < 1:
        raise ConfigError(f"count={count}, steps={num_steps}: wanted at least 1 each")
    check_writable(Path(file).parent)
    loaded = open_run(run, kind="denoise", device=device)
    assert isinstance(loaded.task, DenoiseTask)
    images = draw_samples(loaded.cfg, loaded.task, loaded.model, loaded.parallel, count=count, num_steps=num_steps)
    to_png(images, Path(file))
    return Path(file)


def export_run(
    run: str | Path,
    *,
    format: Format = "safetensors",  # noqa: A002
    out: str | Path | None = None,
) -> list[Path]:
    """Write RUN/export/NAME.{safetensors,onnx}, or `out`; returns where.

    The two networks of a run with a second look are one safetensors file (`coarse.`, `fine.`), and two of ONNX: NAME
    for whole images, NAME-fine for crops.

    Raises:
        ConfigError: an unknown format.
        LaunchError: the packages that write ONNX are not installed.
    """
    if format not in ("safetensors", "onnx"):
        raise ConfigError(f"--format={format}: wanted safetensors, onnx or hub")
    if format == "onnx":
        _require_onnx()  # before weights of gigabytes are read
    loaded = open_run(run, device="cpu")
    path = loaded.path / "export" / f"{loaded.cfg.name}.{format}" if out is None else Path(out)
    check_writable(path.parent)
    facts = _facts(loaded)
    if format == "onnx" and not isinstance(loaded.task, DenoiseTask | LandmarkTask):
        raise ConfigError(
            f"{run} has learnt an encoder by {loaded.cfg.task.kind}, which gives no maps; use safetensors"
        )
    if format == "safetensors":
        tensors = {name: value.detach().contiguous() for name, value in loaded.model.state_dict().items()}
        contents = {path: safetensors.torch.save(tensors, metadata=facts)}
    elif isinstance(loaded.model, CoarseToFine):
        # Both before either is written: they belong together.
        contents = {
            place: to_onnx(loaded, getattr(loaded.model, part), facts | {"part": json.dumps(part)}, side)
            for part, place, side in (
                ("coarse", path, loaded.cfg.data.image_size),
                ("fine", path.with_name(f"{path.stem}-fine{path.suffix}"), _crop_size(loaded)),
            )
        }
    else:
        contents = {path: to_onnx(loaded, loaded.model, facts, loaded.cfg.data.image_size)}
    for place, content in contents.items():
        files.write_bytes(place, content)
    return list(contents)


def _crop_size(loaded: LoadedRun) -> int:
    assert isinstance(loaded.task, LandmarkTask)
    assert loaded.task.second_look is not None
    return loaded.task.second_look.size


def _facts(loaded: LoadedRun) -> dict[str, str]:
    """Metadata of an exported file; values are JSON texts, as both formats hold strings only."""
    facts: dict[str, Any] = {
        "name": loaded.cfg.name,
        "step": loaded.meta["step"],
        "image_size": loaded.cfg.data.image_size,
        "intensity": loaded.cfg.data.intensity,
        "model": loaded.cfg.model.model_dump(mode="json"),
        "task": loaded.task.export(),
    }
    if loaded.cfg.data.fine_size is not None:
        facts["fine_size"] = loaded.cfg.data.fine_size  # side of the square that crops are cut from
    try:
        facts["pixels"] = loaded.pixel_settings()
    except DataError:
        facts["pixels"] = None  # nothing is left that says it; whoever uses the file has to know
    return {key: json.dumps(value) for key, value in facts.items()}


class _Maps(nn.Module):
    """The network, conditioned on the timestep of the landmark task: images in, maps out."""

    def __init__(self, model: nn.Module, timestep: int | None) -> None:
        super().__init__()
        self.model, self.timestep = model, timestep

    def forward(self, images: Tensor) -> Tensor:
        if self.timestep is None:
            return self.model(images, None)
        return self.model(images, torch.full((images.shape[0],), self.timestep, dtype=torch.int64))


def to_onnx(loaded: LoadedRun, model: nn.Module, facts: dict[str, str], side: int) -> bytes:
    """A network of the run as an ONNX file with a free batch size: `images` (`timesteps` for denoising) to `maps`.

    Args:
        side: of the images, or crops, it takes.

    Raises:
        ConfigError: more weights than one file holds, or a mixture of datasets.
    """
    images = torch.zeros(2, 1, side, side)  # of one image the exporter would take the batch size for a constant
    batch = torch.export.Dim("batch", min=1)
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    if size >= ONNX_LIMIT:
        raise ConfigError(f"{loaded.path} has {size / 1e9:.1f} GB of weights, one ONNX file holds 2.1; use safetensors")
    arguments: tuple[Tensor, ...] = (images, torch.ones(2, dtype=torch.int64))
    names = ["images", "timesteps"]
    shapes: tuple[dict[int, Any], ...] = ({0: batch}, {0: batch})
    if isinstance(loaded.task, LandmarkTask):
        if loaded.task.spec.parts:
            raise ConfigError(f"{loaded.path} finds landmarks in several datasets, ONNX holds one; use safetensors")
        model = _Maps(model, loaded.task.cfg.timestep)
        arguments, names, shapes = (images,), ["images"], ({0: batch},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's advice to its own developers
        program = torch.onnx.export(
            model.eval(),
            arguments,
            input_names=names,
            output_names=["maps"],
            dynamic_shapes=shapes,
            opset_version=ONNX_OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(facts)
    # the program only writes files; the bytes then go where they belong at once, or not at all
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        program.save(path, external_data=False)
        return path.read_bytes()


def _require_onnx() -> None:
    """Raise LaunchError where a package that writes ONNX is missing."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise LaunchError(
            f"export to ONNX needs {' and '.join(missing)}, not installed here; run `pip install 'ddpm-lmk[onnx]'`"
        )
