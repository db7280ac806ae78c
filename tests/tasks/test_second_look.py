"""The second look: where training crops lie, what is read from crops, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.batch import Batch
from ddpm_lmk.data.loading.augment import compose, invert, resize_matrix
from ddpm_lmk.data.spec import SPECS, DatasetSpec
from ddpm_lmk.engine.starting_weights import put_weights
from ddpm_lmk.models import build_model, model_cost
from ddpm_lmk.models.coarse_to_fine import CoarseToFine
from ddpm_lmk.tasks import LandmarkTask, build_task
from ddpm_lmk.tasks.codecs.base import inside

SIZE, FINE = 32, 128
DOTS = SPECS["chest"].model_copy(update={"name": "dots", "landmark_names": ("a", "b", "c")})
TRUTH = torch.tensor([[[8.3, 9.6], [8.9, 9.1], [22.4, 20.7]], [[24.0, 6.5], [23.6, 7.1], [9.2, 25.3]]])


def config(**task: Any) -> RunConfig:
    """Crops of 16 network pixels at twice their resolution, off by 4 at most, turned and scaled."""
    refine = {"crop": 0.5, "jitter": 0.125, **task.pop("refine", {})}
    augment = {"probability": 1, "shift": 0.1, "rotate_deg": 10, "scale": 0.1}
    data = {"path": "none", "image_size": SIZE, "fine_size": FINE, "augment": augment}
    return RunConfig.model_validate({"data": data, "task": {"kind": "landmarks", "refine": refine, **task}})


def made(spec: DatasetSpec = DOTS, **task: Any) -> LandmarkTask:
    found = build_task(config(**task), spec)
    assert isinstance(found, LandmarkTask)
    return found


def dots(points: Tensor, size: int, sigma: float) -> Tensor:
    """`[B, 1, size, size]` with a bump of height 1 at each point `[B, N, 2]`."""
    grid = torch.arange(float(size))
    dx, dy = (grid - points[..., k : k + 1] for k in (0, 1))
    bumps = (-(dx.square().unsqueeze(-2) + dy.square().unsqueeze(-1)) / (2 * sigma**2)).exp()
    return bumps.amax(1, keepdim=True)


def make_batch(truth: Tensor = TRUTH, *, matrix: np.ndarray | None = None, shown: Tensor | None = None) -> Batch:
    """Pictures with a dot at every landmark; `matrix` moves the network's image as augmentation does."""
    count = len(truth)
    matrix = np.eye(2, 3) if matrix is None else matrix
    to_fine = torch.from_numpy(compose(resize_matrix(SIZE, FINE), invert(matrix))).float()
    points = truth.double() @ torch.from_numpy(matrix[:, :2]).T + torch.from_numpy(matrix[:, 2])
    fine = dots((truth + 0.5) * FINE / SIZE - 0.5, FINE, 2.0)
    return Batch(
        images=dots(points.float() if shown is None else shown, SIZE, 1.0),
        points=points.float(),
        to_native=torch.eye(2, 3).expand(count, 2, 3),
        native_size=torch.full((count, 2), float(SIZE)),
        mm_per_px=torch.full((count,), float("nan")),
        positions=torch.arange(count),
        weight=torch.ones(count),
        ids=tuple(map(str, range(count))),
        fine=(fine * 255).round().to(torch.uint8),
        to_fine=to_fine.expand(count, 2, 3),
    )


class Rigged(nn.Module):
    """Two looks that see bright dots; the coarse one tells landmarks apart, by looking only near where they are.

    `doubt`: standard deviation of the coarse distribution, network pixels; None: sure, and wrong where `near` is.
    """

    def __init__(self, near: Tensor, fine_maps: Any = None, landmarks: int = 3, doubt: float | None = None) -> None:
        super().__init__()
        self.near, self.fine_maps, self.landmarks, self.doubt = near, fine_maps, landmarks, doubt
        self.floor = 10.0
        self.seen: list[int] = []

    def forward(self, images: Any, condition: Any = None, crops: Any = None, crops_condition: Any = None) -> Any:
        coarse = fine = None
        if images is not None:
            here = dots(self.near.flatten(0, 1)[:, None], SIZE, self.doubt or 1.0)[:, 0].unflatten(
                0, self.near.shape[:2]
            )
            coarse = 20 * here - self.floor if self.doubt is None else here.clamp(min=1e-30).log()
        if crops is not None:
            self.seen.append(len(crops))
            fine = self.fine_maps(crops) if self.fine_maps else (20 * crops - 10).expand(-1, self.landmarks, -1, -1)
        return coarse, fine


MOVED = np.array([[0.95, -0.2, 3.0], [0.2, 0.95, -2.0]])


def test_training_crops_are_centred_near_one_of_the_labelled_landmarks_of_their_image() -> None:
    task = made(refine={"crops": 40})
    batch = make_batch(matrix=MOVED)
    assert batch.points is not None
    batch.points[1, 0] = torch.nan
    assert task.second_look is not None
    crops, points = task.second_look.training_crops(batch)
    assert crops.shape == (80, 1, SIZE, SIZE)
    middle, reach = (SIZE - 1) / 2, 1.02 * 0.125 / 0.5 * SIZE / 0.9 * (1 + np.sin(np.deg2rad(10)))
    off = (points - middle).abs().amax(-1).unflatten(0, (40, 2))  # [crops, images, landmarks]
    assert (off.nan_to_num(torch.inf).amin(-1) <= reach).all()
    assert off[:, 1, 0].isnan().all()
    chosen = off.nan_to_num(torch.inf).argmin(-1)
    assert set(chosen[:, 0].tolist()) >= {0, 2}  # the first two lie close together
    assert set(chosen[:, 1].tolist()) == {1, 2}
    assert off.nan_to_num(torch.inf).amin(-1).std() > 0.5  # they are off by different amounts
    # Pixels and points agree: a dot is brightest where its point is.
    inner = inside(points, SIZE)
    for crop, own, counts in zip(crops[:, 0], points, inner, strict=True):
        for x, y in own[counts & ((own - middle).abs().amax(-1) < middle - 3)].tolist():
            patch = crop[round(y) - 1 : round(y) + 2, round(x) - 1 : round(x) + 2]
            assert patch.max() > 0.7


def test_training_crops_follow_from_seed_and_position_and_differ_from_those_of_an_evaluation() -> None:
    look, batch = made().second_look, make_batch()
    assert look is not None
    (crops, points), (again, _) = look.training_crops(batch), look.training_crops(batch)
    assert torch.equal(crops, again)
    _, its_points = look.training_crops(batch, is_evaluation=True)
    assert not torch.allclose(points, its_points)
    spans = (its_points[:, 2] - its_points[:, 0]).norm(dim=-1).unflatten(0, (2, 2))
    wanted = (TRUTH[:, 2] - TRUTH[:, 0]).norm(dim=-1) * 2  # unturned and unscaled, at twice the resolution
    torch.testing.assert_close(spans, wanted.expand(2, 2), atol=1e-4, rtol=0)
    alone = Batch(
        **{**batch.__dict__, **{key: value[1:] for key, value in batch.__dict__.items() if value is not None}}
    )
    torch.testing.assert_close(look.training_crops(alone)[0], crops[1::2], atol=0, rtol=0)


@pytest.mark.parametrize("codec", ["spatial", "disc", "contour", "gaussian"])
def test_the_loss_counts_landmarks_inside_a_crop_and_those_alone(codec: str) -> None:
    look = made(codec={"kind": codec}).second_look
    assert look is not None
    maps = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    points = torch.tensor([[10.0, 12.0], [20.0, 8.0], [-9.0, 5.0]]).expand(4, 3, 2)
    far = torch.where(inside(points, SIZE)[..., None], points, torch.nan)
    loss = look.loss(maps, points)
    assert loss.shape == (2,)
    torch.testing.assert_close(loss, look.loss(maps, far))
    each = look.codec.loss(maps, far, look._frame(maps))
    torch.testing.assert_close(loss, (each[:2] + each[2:]) / 2)  # crops of the same image are two rows apart
    assert (look.loss(maps, torch.full_like(points, torch.nan)) == 0).all()


@pytest.mark.parametrize("codec", ["spatial", "contour", "gaussian"])
@pytest.mark.parametrize("at_once", [1, 2, 16])
def test_a_second_look_mends_what_the_first_one_found(codec: str, at_once: int) -> None:
    off = TRUTH + torch.tensor([1.3, -1.6])
    task, batch = made(codec={"kind": codec, "decode_radius_px": 3.0}), make_batch()
    assert task.second_look is not None
    task.second_look.crops_at_once = at_once
    model = Rigged(off, doubt=None if codec == "gaussian" else 2.0)
    found = task.predict(model, batch)
    assert found.coarse is not None
    torch.testing.assert_close(found.coarse.points, off, atol=0.5, rtol=0)
    # Dots a and b lie half a network pixel apart and look like one to this network: c is alone.
    torch.testing.assert_close(found.points[:, 2], TRUTH[:, 2], atol=0.2, rtol=0)
    torch.testing.assert_close(found.points[:, :2].mean(1), TRUTH[:, :2].mean(1), atol=0.3, rtol=0)
    assert not found.failed.any()
    assert found.spread_px.max() < 2
    assert model.seen == {1: [2, 2, 2], 2: [2, 2, 2], 16: [6]}[at_once]


def test_a_landmark_is_read_from_the_crops_of_its_neighbours_within_reach() -> None:
    def maps(crops: Tensor) -> Tensor:
        """Landmark a where its crop's middle is, but 4 crop pixels to the right in that of b."""
        moved = torch.zeros(len(crops), 3, SIZE, SIZE)
        for number, row in enumerate(moved):
            row[:, 15, 15 + (4 if number // 2 == 1 else 0)] = 60.0
        return moved

    near = torch.tensor([[[8.0, 9.0], [9.0, 9.0], [20.0, 20.0]]]).expand(2, 3, 2)
    task = made(codec={"kind": "spatial", "decode_radius_px": 1.0})
    found = task.predict(Rigged(near, maps, doubt=2.0), make_batch())
    # In crops of 16 network pixels a pixel is half of one: a's own crop says 8 - 0.25, b's says 9 - 0.25 + 2.
    own, other = 7.75, 10.75
    torch.testing.assert_close(found.points[:, 0, 0], torch.full((2,), (own + other) / 2), atol=0.02, rtol=0)
    assert found.spread_px[0, 0].item() == pytest.approx((other - own) / 2, abs=0.02)  # they disagree by so much
    torch.testing.assert_close(found.points[:, 2, 0], torch.full((2,), 19.75), atol=0.02, rtol=0)  # c has its own alone


def test_the_first_look_is_a_prior_of_the_second() -> None:
    """Between two places that look alike to a crop, the one where the first look expects the landmark wins."""

    def two_places(crops: Tensor) -> Tensor:
        maps = torch.zeros(len(crops), 3, SIZE, SIZE)
        maps[:, :, 2, 3], maps[:, :, 18, 13] = 33.0, 30.0  # the far one looks a little better
        return maps

    task, batch = made(codec={"kind": "spatial", "decode_radius_px": 1.0}), make_batch()
    found = task.predict(Rigged(TRUTH, two_places, doubt=1.5), batch)
    assert found.coarse is not None
    # (13, 18) in a crop of 32 pixels, half a network pixel each, around the coarse point. c has no neighbour's crop.
    near = found.coarse.points[:, 2] + (torch.tensor([13.0, 18.0]) - 15.5) / 2
    torch.testing.assert_close(found.points[:, 2], near, atol=0.02, rtol=0)
    sure = task.predict(Rigged(TRUTH, lambda crops: torch.zeros(len(crops), 3, SIZE, SIZE), doubt=1.5), batch)
    torch.testing.assert_close(sure.points, sure.coarse.points, atol=0.3, rtol=0)  # type: ignore[union-attr]
    assert sure.spread_px[0, 2].item() == pytest.approx(2**0.5 * 2**0.5 * 1.5, rel=0.1)  # the prior's own, per axis


def test_a_first_look_that_is_too_sure_of_itself_does_not_overrule_the_second() -> None:
    class Sure(Rigged):
        def forward(self, images: Any, condition: Any = None, crops: Any = None, crops_condition: Any = None) -> Any:
            coarse, fine = super().forward(images, condition, crops, crops_condition)
            return coarse if coarse is None else 1e4 * coarse, fine  # all of the probability on one pixel

    def right(crops: Tensor) -> Tensor:
        maps = torch.zeros(len(crops), 3, SIZE, SIZE)
        maps[:, :, 16, 17] = 60.0  # (17 - 15.5) / 2 network pixels to the right of the coarse point
        return maps

    task = made(codec={"kind": "spatial", "decode_radius_px": 1.0})
    found = task.predict(Sure(TRUTH, right), make_batch())
    assert found.coarse is not None
    assert found.coarse.spread_px[:, 2].max() < 0.01  # the others lie between pixels
    off = found.points[:, 2] - found.coarse.points[:, 2]
    torch.testing.assert_close(off, torch.tensor([0.75, 0.25]).expand(2, 2), atol=0.02, rtol=0)


def test_what_cannot_be_read_falls_back_and_a_failed_coarse_point_stays_failed() -> None:
    task = made(codec={"kind": "disc"})
    empty = Rigged(TRUTH, lambda crops: -torch.ones(len(crops), 3, SIZE, SIZE))  # no contour: the codec fails
    empty.floor = 0.0
    found = task.predict(empty, make_batch())
    assert found.coarse is not None
    assert torch.equal(found.points, found.coarse.points)
    assert not found.failed.any()

    class Blind(Rigged):
        def forward(self, images: Any, condition: Any = None, crops: Any = None, crops_condition: Any = None) -> Any:
            coarse, fine = super().forward(images, condition, crops, crops_condition)
            if coarse is not None:
                coarse[:, 0] = -1.0
            return coarse, fine

    blind = Blind(TRUTH)
    blind.floor = 0.0
    found = task.predict(blind, make_batch())
    assert found.coarse is not None
    assert found.failed.tolist() == [[True, False, False]] * 2
    assert torch.equal(found.points[:, 0], found.coarse.points[:, 0])
    assert found.points.isfinite().all()


def test_evaluation_adds_both_losses_and_measures_the_refined_points() -> None:
    task, batch = made(codec={"kind": "spatial", "decode_radius_px": 3.0}), make_batch()
    off = TRUTH + torch.tensor([1.5, -1.5])
    model = Rigged(off, doubt=2.0)
    sums = {key: value.item() for key, value in task.evaluate(model, batch).items()}
    refined = task.predict(model, batch)
    distance = (refined.points - TRUTH).norm(dim=-1).sum().item()
    assert sums["distance_px"] == pytest.approx(distance, rel=1e-4)
    assert sums["distance_px"] < 0.5 * (off - TRUTH).norm(dim=-1).sum()
    assert task.second_look is not None
    crops, points = task.second_look.training_crops(batch, is_evaluation=True)
    assert batch.points is not None
    fine = task.second_look.loss(model(None, None, crops)[1], points)
    plain = task._codec_loss(model(batch.images)[0], batch)
    assert sums["loss"] == pytest.approx((plain + fine).sum().item(), rel=1e-5)


def test_training_adds_the_mean_loss_of_the_crops_to_that_of_the_image() -> None:
    task, batch = made(), make_batch(matrix=MOVED)
    model = Rigged(TRUTH)
    assert task.second_look is not None
    crops, points = task.second_look.training_crops(batch)
    coarse, fine = model(batch.images, None, crops)
    wanted = task._codec_loss(coarse, batch) + task.second_look.loss(fine, points)
    torch.testing.assert_close(task.loss(model, batch), wanted)


NETWORK = {"width": 8, "multipliers": [1, 2], "heads": 2, "head_dim": 4}


@pytest.mark.parametrize(
    "model", [NETWORK, {"kind": "encoder_unet", "scale": 0.1, "blocks": [1, 1, 1, 1]}, {"kind": "gu2net", "width": 4}]
)
def test_both_parts_of_every_network_begin_alike_and_learn_by_themselves(model: dict[str, Any]) -> None:
    cfg = RunConfig.model_validate({**config().model_dump(mode="json"), "model": model})
    task = build_task(cfg, DOTS)
    torch.manual_seed(0)
    network = task.wrap(build_model(cfg.model, out_channels=3, full_size=task.full_size, domains=task.domains))
    assert isinstance(network, CoarseToFine)
    state = network.state_dict()
    half = len(state) // 2
    assert all(torch.equal(state[f"fine.{name.removeprefix('coarse.')}"], state[name]) for name in list(state)[:half])
    task.loss(network, make_batch()).sum().backward()
    grads = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in grads.values())
    first = next(name for name in grads if "final_conv" in name)
    assert not torch.equal(grads[first], grads[first.replace("coarse.", "fine.")])  # type: ignore[arg-type]
    cost, one = task.cost(cfg.model, SIZE), model_cost(cfg.model, SIZE, 3, full_size=task.full_size)
    assert (cost.params, cost.flops_train) == (2 * one.params, 3 * one.flops_train)  # an image and two crops


def test_starting_weights_of_one_network_fill_both_parts_and_those_of_two_each_its_own() -> None:
    cfg = RunConfig.model_validate({**config().model_dump(mode="json"), "model": NETWORK})
    task = build_task(cfg, DOTS)

    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return task.wrap(build_model(cfg.model, out_channels=3, full_size=task.full_size))

    torch.manual_seed(9)
    pretrained = build_model(cfg.model, out_channels=1).state_dict()
    model, fresh = network(0), network(0).state_dict()
    assert put_weights(cfg, task, model, pretrained, {"config": {}}) == "trunk"
    for name, value in model.state_dict().items():
        part, _, inner = name.partition(".")
        assert torch.equal(value, fresh[name] if inner.startswith("final_conv") else pretrained[inner]), (part, inner)

    parent = {name: torch.randn_like(value) for name, value in network(1).state_dict().items()}
    meta = {"config": {}, "out_channels": 3, "export": task.export()}
    assert put_weights(cfg, task, model, parent, meta) == "all"
    assert all(torch.equal(value, parent[name]) for name, value in model.state_dict().items())
    model = network(0)
    assert put_weights(cfg, task, model, parent, {**meta, "out_channels": 5}) == "trunk"
    state = model.state_dict()
    assert all(torch.equal(state[name], parent[name]) == ("final_conv" not in name) for name in state)

    plain = RunConfig.model_validate({"data": {"path": "none", "image_size": SIZE}, "task": {"kind": "landmarks"}})
    single = build_model(cfg.model, out_channels=3, full_size=False)
    one_look = build_task(plain.model_copy(update={"model": cfg.model}), DOTS)
    assert put_weights(plain, one_look, single, parent, meta) == "trunk"
    assert torch.equal(single.state_dict()["init_conv.weight"], parent["coarse.init_conv.weight"])
