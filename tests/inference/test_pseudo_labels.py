"""Which points become pseudo-labels, by numbers put in by hand, and what the codecs make of the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_lmk.data.loading.corpus import Corpus, unlabelled_corpora
from ddpm_lmk.errors import DataError
from ddpm_lmk.inference import pseudo_labels
from ddpm_lmk.inference.predictions import ImagePrediction
from ddpm_lmk.tasks.codecs import Frame, build_codec
from tests.data.dot_packs import DOTS, NATIVE, pack_dots, run_config

SIZE = 64


@pytest.fixture
def corpora(tmp_path: Path) -> list[Corpus]:
    """Four images of 300 x 200 without a label, beside a shot, squeezed to 64 pixels."""
    path = pack_dots(tmp_path / "dots", {"train": 5, "test": 1}, size=SIZE)
    data = {"shots": 1, "fine_size": 128, "propagate": {}}
    cfg = run_config(path, data={"shots": 1})
    task = {"kind": "landmarks", "refine": {}}
    fields = cfg.model_dump(mode="json")
    fields["data"] |= data | {"dedup": {"leakage": "keep", "duplicates": "keep"}}
    return unlabelled_corpora(type(cfg).model_validate(fields | {"task": task}))


def found(
    offsets: list[tuple[float, float]], *, failed: tuple[int, ...] = (), missed: tuple[int, ...] = ()
) -> ImagePrediction:
    """The second look at (100, 50), the first one off by some native pixels."""
    points = np.tile([100.0, 50.0], (3, 1))
    lost = np.array([index in failed for index in range(3)])
    coarse = ImagePrediction(points + offsets, np.ones(3), np.array([index in missed for index in range(3)]))
    return ImagePrediction(points, np.array([1.0, 2.0, 3.0]), lost, coarse=coarse)


def test_a_point_is_accepted_where_both_looks_agree_in_pixels_of_the_network(
    corpora: list[Corpus], tmp_path: Path
) -> None:
    names = [corpora[0].facts(row).id for row in corpora[0].rows.tolist()]
    limit = 0.02 * np.array(NATIVE)  # native px of 0.02 of the side, in x and in y
    predictions = {
        names[0]: found([(0.99 * limit[0], 0), (0, 0.99 * limit[1]), (0.8 * limit[0], 0.8 * limit[1])]),
        names[1]: found([(1.01 * limit[0], 0), (0, 1.01 * limit[1]), (0, 0)]),
        names[2]: found([(1, 0), (1, 0), (np.nan, 0)], failed=(0,), missed=(1,)),
        names[3]: found([(1, 1), (0, np.nan), (0.5, 0)]),
    }
    pseudo_labels.write(tmp_path, DOTS, predictions, corpora, agree=0.02)
    [points] = pseudo_labels.read(tmp_path, corpora)
    rows = corpora[0].rows.tolist()
    assert sorted(points) == [rows[0], rows[3]], "without an accepted point an image is left out"
    unknown = [np.nan, np.nan]
    np.testing.assert_array_equal(points[rows[0]], [[100, 50], [100, 50], unknown])
    np.testing.assert_array_equal(points[rows[3]], [[100, 50], unknown, [100, 50]])
    facts = pseudo_labels.facts(tmp_path, corpora, [points], None, left_out=2)
    assert (facts["offered"], facts["images"], facts["points"], facts["of"], facts["left_out"]) == (4, 2, 4, 12, 2)


def test_an_image_that_could_not_be_read_has_no_numbers_and_is_counted(corpora: list[Corpus], tmp_path: Path) -> None:
    rows = corpora[0].rows.tolist()
    names = [corpora[0].facts(row).id for row in rows]
    predictions = {name: found([(1, 0)] * 3) for name in names[1:]}
    pseudo_labels.write(tmp_path, DOTS, predictions, corpora, agree=0.02, unreadable={names[0]})
    lines = (tmp_path / "pseudo_labels.csv").read_text().splitlines()
    image = f"{corpora[0].manifest.fingerprint[:16]},{names[0]}"
    assert lines[1:4] == [f"{image},{index},{name},,,,,0" for index, name in enumerate(DOTS.landmark_names)]
    [points] = pseudo_labels.read(tmp_path, corpora)
    assert sorted(points) == rows[1:]
    facts = pseudo_labels.facts(tmp_path, corpora, [points], None, left_out=0)
    assert (facts["offered"], facts["unreadable"], facts["images"], facts["points"], facts["of"]) == (4, 1, 3, 9, 12)
    assert pseudo_labels.described(facts).endswith("in 3 of 4 images, 1 of which cannot be read")
    before = {key: value for key, value in facts.items() if key != "unreadable"}  # of a run begun without the count
    assert pseudo_labels.as_begun(facts, before, tmp_path) == before
    with pytest.raises(KeyError, match=names[1]):
        pseudo_labels.write(tmp_path, DOTS, {}, corpora, agree=0.02, unreadable={names[0]})


def test_labels_of_other_images_are_refused(corpora: list[Corpus], tmp_path: Path) -> None:
    predictions = {corpora[0].facts(row).id: found([(1, 0)] * 3) for row in corpora[0].rows.tolist()}
    pseudo_labels.write(tmp_path, DOTS, predictions, corpora, agree=0.02)
    path, text = tmp_path / "pseudo_labels.csv", (tmp_path / "pseudo_labels.csv").read_text()
    path.write_text(text.replace(corpora[0].manifest.fingerprint[:16], 16 * "0"))  # rows of the same numbers
    with pytest.raises(DataError, match=r"is of other images than data.propagate finds now \(8 differ\)"):
        pseudo_labels.read(tmp_path, corpora)
    path.write_text(text)
    corpora[0].keep(corpora[0].rows[:-1])
    with pytest.raises(DataError, match=r"is of other images than data.propagate finds now \(1 differ\)"):
        pseudo_labels.read(tmp_path, corpora)


@pytest.mark.parametrize("kind", ["spatial", "contour", "gaussian", "disc"])
def test_points_that_are_not_known_teach_nothing(kind: str) -> None:
    """Their maps have no gradient; the known ones that they would have alone."""
    from pydantic import TypeAdapter

    from ddpm_lmk.config import Codec

    codec = build_codec(TypeAdapter(Codec).validate_python({"kind": kind}))
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 4, SIZE, SIZE, generator=generator, requires_grad=True)
    points = torch.rand(2, 4, 2, generator=generator) * 40 + 10
    points[0, [0, 2]] = torch.nan
    points[1] = torch.nan
    frame = Frame(SIZE, torch.full((2, 2), float(SIZE)), torch.eye(2, 3).expand(2, 2, 3))
    loss = codec.loss(maps, points, frame)
    [gradient] = torch.autograd.grad(loss.sum(), maps)
    assert loss[1] == 0
    assert gradient[1].abs().max() == 0
    assert gradient.isfinite().all()
    if kind == "disc":  # a softmax over landmarks: other maps go down where a known landmark is, and only there
        discs = codec.masks(points, frame)[0].amax(0) > 0  # type: ignore[attr-defined]
        assert gradient[0, :, ~discs].abs().max() == 0
        return
    assert gradient[0, [0, 2]].abs().max() == 0
    alone = codec.loss(maps[:1, [1, 3]], points[:1, [1, 3]], Frame(SIZE, frame.native_size[:1], frame.to_native[:1]))
    assert loss[0].item() == pytest.approx(alone[0].item(), rel=1e-5)
