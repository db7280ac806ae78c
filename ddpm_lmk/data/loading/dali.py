"""The DALI backend: the same samples, changes and coordinates as the torch loader, with pixels worked on by DALI.

Bytes are read and verified here, in our order, and handed to pipelines as external sources: DALI draws nothing, keeps
no position, and never meets bytes that changed. It decodes (JPEG on the GPU, PNG on the CPU, raw arrays not at all),
warps with our matrices and scales. What is left, the tone of a few images, is the torch code, because its noise is
keyed by position. Its decoders run in this process: a crash or hang is that of a rank, which the launcher replaces, and
the run ends with exit 76 where it comes back; the torch loader sets such a sample aside.

A set stored at another size than `data.image_size` is decoded and resized on the host, by the code of the torch loader:
DALI has no area filter. Its antialiased triangle is up to 50 grey levels away from it at edges, 0.4 on average, and
where both are linear, rounding to the stored type still makes them a level different
(benchmarks/results/dali_resize.json). Resizing 512 px costs 0.2 to 0.6 ms; packing at the right size costs nothing.

Without a GPU everything runs on the CPU, slower than the torch loader: that is for the parity suite.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddpm_lmk.data.loading.augment import Changes, Floats, invert
from ddpm_lmk.data.loading.corpus import Corpus
from ddpm_lmk.data.loading.pixels import Residency, needs_16_bits
from ddpm_lmk.data.loading.warp import Intensity, tone
from ddpm_lmk.data.shards.records import CorruptSampleError
from ddpm_lmk.data.shards.remote import with_retries
from ddpm_lmk.errors import DataError, LaunchError
from ddpm_lmk.system.accelerator import SideStream

log = logging.getLogger(__name__)

_FORMATS = {"png": "PNG", "jpeg": "JPEG"}


class Kind(NamedTuple):
    """What a pipeline is built for: samples that enter DALI alike."""

    encoding: str  # raw, png, jpeg
    bits: int


class DaliPixels:
    """Fetches verified bytes and turns them into network input; the counterpart of `StreamPixels`."""

    residency: Residency = "stream"

    def __init__(self, corpora: Sequence[Corpus], device: torch.device, *, workers: int, largest: int) -> None:
        """`largest`: most images of one call of `images`. Raises LaunchError where DALI is missing."""
        require_dali()
        self._corpora, self._device, self._threads, self._largest = corpora, device, max(1, workers), largest
        self._size, self._wide = corpora[0].image_size, needs_16_bits(corpora)
        self._kinds = [self._kind(corpus) for corpus in corpora]
        self._pipelines: dict[tuple[Kind, Intensity], Any] = {}
        self._stream = SideStream(device)

    def fetch(self, corpus: int, row: int) -> tuple[Kind, np.ndarray]:
        """What DALI is given: encoded bytes, or an array `[S, S, 1]`.

        Raises:
            CorruptSampleError: the bytes are not those packed, or no image of the stored size and type.
        """
        kind, used = self._kinds[corpus], self._corpora[corpus]
        if kind.encoding == "raw":
            return kind, used.decode(row)[0][:, :, None]
        data = with_retries(used.manifest.read_bytes, row)
        _check_header(data, kind, self._size)
        return kind, np.frombuffer(data, np.uint8)

    def images(
        self,
        fetched: Sequence[tuple[Kind, np.ndarray]],
        changes: Changes,
        *,
        seed: int,
        positions: np.ndarray,
        intensity: Intensity,
    ) -> Tensor:
        """Network input `[B, 1, S, S]` float32 in [0, 1], channels-last, on the device."""
        matrices = sampling_matrices(changes.matrix)
        with self._stream.work():  # waited for in the prefetching thread: who takes the batch need not
            images = torch.empty(len(fetched), self._size, self._size, 1, device=self._device).permute(0, 3, 1, 2)
            for kind in dict.fromkeys(kind for kind, _ in fetched):
                members = [i for i, (other, _) in enumerate(fetched) if other == kind]
                images[members] = self._run(kind, intensity, [fetched[i][1] for i in members], matrices[members])
            tone(images, changes, seed=seed, positions=positions)
        self._stream.give(images)
        return images

    def fine(self, fetched: Sequence[tuple[Kind, np.ndarray]]) -> None:
        """None: `check_dali` refuses runs that want finer copies."""

    def close(self) -> None:
        """Give back what the pipelines hold."""
        self._pipelines.clear()

    def _kind(self, corpus: Corpus) -> Kind:
        manifest = corpus.manifest
        if manifest.encoding == "in_place":  # images of any kind and size, which take all that packing does with them
            return Kind("raw", manifest.bits)
        if manifest.stored_size == self._size or manifest.encoding == "raw":
            return Kind(manifest.encoding, manifest.bits)
        log.warning(
            "%s is stored at %d px and used at %d: decoded and resized on the CPU; pack it at data.image_size for DALI",
            *(manifest.root, manifest.stored_size, self._size),
        )
        return Kind("raw", manifest.bits)

    def _run(self, kind: Kind, intensity: Intensity, samples: list[np.ndarray], matrices: np.ndarray) -> Tensor:
        pipeline = self._pipelines.get((kind, intensity))
        if pipeline is None:
            pipeline = self._pipelines[kind, intensity] = self._build(kind, intensity)
        pipeline.feed_input("image", samples)
        pipeline.feed_input("matrix", list(matrices))
        try:
            (made,) = pipeline.run()
        except RuntimeError as error:
            raise DataError(
                f"DALI cannot decode a {kind.bits}-bit {kind.encoding} image whose bytes are those packed "
                f"({str(error).splitlines()[0]}); use runtime.loader=torch, which sets such images aside"
            ) from error
        return self._to_torch(made.as_tensor())

    def _to_torch(self, made: Any) -> Tensor:
        """A copy `[B, 1, S, S]`: DALI writes its next batch into the same memory."""
        if self._stream.cuda is None:
            return torch.from_numpy(np.array(made)).permute(0, 3, 1, 2)
        from nvidia.dali.plugin.pytorch import feed_ndarray

        copy = torch.empty(tuple(made.shape()), device=self._device)
        feed_ndarray(made, copy, cuda_stream=self._stream.cuda)
        return copy.permute(0, 3, 1, 2)

    def _build(self, kind: Kind, intensity: Intensity) -> Any:
        from nvidia.dali import Pipeline, fn, types

        on_gpu = self._device.type == "cuda"
        dtype = types.UINT8 if kind.bits == 8 else types.UINT16
        pipeline = Pipeline(
            batch_size=self._largest,
            num_threads=self._threads,
            device_id=(self._device.index or 0) if on_gpu else None,
            prefetch_queue_depth=1,  # the loader's own thread runs ahead
            exec_pipelined=False,
            exec_async=False,
        )
        with pipeline:
            matrix = fn.external_source(name="matrix", dtype=types.FLOAT, ndim=2)
            if kind.encoding == "raw":
                image = fn.external_source(name="image", dtype=dtype, ndim=3, layout="HWC")
            else:
                encoded = fn.external_source(name="image", dtype=types.UINT8, ndim=1)
                place = "mixed" if on_gpu and kind.encoding == "jpeg" else "cpu"
                # Without dtype a 16-bit PNG silently comes out with 8 bits.
                image = fn.decoders.image(encoded, device=place, output_type=types.GRAY, dtype=dtype)
            if on_gpu and kind.encoding != "jpeg":
                image = image.gpu()
            image = fn.cast(image, dtype=types.FLOAT)
            if self._wide and kind.bits == 8:
                image = image * 257.0
            # Without a fill value the border is replicated.
            image = fn.warp_affine(image, matrix=matrix, size=(self._size, self._size), interp_type=types.INTERP_LINEAR)
            pipeline.set_outputs(_scaled(fn, image, intensity, top=65535.0 if self._wide else 255.0))
        pipeline.build()
        return pipeline


def require_dali() -> None:
    """Raise LaunchError unless DALI can be imported."""
    try:
        import nvidia.dali  # noqa: F401 - is it there?
    except ImportError as error:
        raise LaunchError(
            f"runtime.loader=dali, but DALI cannot be imported ({error}); run `pip install 'ddpm-lmk[dali]'`, "
            "or use runtime.loader=auto or torch"
        ) from None


def sampling_matrices(matrix: Floats) -> np.ndarray:
    """`[B, 2, 3]` float32 for DALI: from pixels of the result to where they come from, corners at integers.

    Ours act on pixel centres at integers, so 0.5 is added before and after.
    """
    back = invert(matrix)
    half = np.full(2, 0.5)
    offset = back[:, :, 2] + half - back[:, :, :2] @ half
    return np.concatenate([back[:, :, :2], offset[:, :, None]], axis=2).astype(np.float32)


def _scaled(fn: Any, image: Any, intensity: Intensity, *, top: float) -> Any:
    """To [0, 1] as `warp.develop` does."""
    if intensity == "full_range":
        return image / top
    low, high = (reduce(image, axes=(0, 1, 2), keep_dims=True) for reduce in (fn.reductions.min, fn.reductions.max))
    span = high - low
    return (image - low) / (span + (span == 0))


def _check_header(data: bytes, kind: Kind, size: int) -> None:
    """One image that DALI cannot decode would end its whole batch, so what the header says is looked at before."""
    wanted = {8: ("L",), 16: ("I;16", "I;16B", "I")}[kind.bits]
    try:
        with Image.open(io.BytesIO(data), formats=(_FORMATS[kind.encoding],)) as image:
            found = (image.size, image.mode)
    except Exception as error:  # a parser may leak anything (docs/faults.md, B27)
        raise CorruptSampleError(f"a {kind.encoding} image has no readable header ({type(error).__name__})") from error
    if found[0] != (size, size) or found[1] not in wanted:
        raise CorruptSampleError(f"a {kind.encoding} image is {found[0]} {found[1]}, {size} px {kind.bits} bit wanted")
