"""Tasks: keyed randomness, losses against direct formulas, predictions through views."""

import math

import pytest
import torch
from torch import nn

from ddpm_lmk.config import (
    ContourCodecConfig,
    DenoiseConfig,
    DiscCodecConfig,
    LandmarksConfig,
    RunConfig,
    SpatialCodecConfig,
)
from ddpm_lmk.data.batch import Batch
from ddpm_lmk.data.spec import SPECS
from ddpm_lmk.tasks import DenoiseTask, LandmarkTask, build_task
from ddpm_lmk.tasks.test_time_views import view_matrices

SIZE = 32


def make_batch(count, *, points=None, start=0):
    generator = torch.Generator().manual_seed(start)
    return Batch(
        images=torch.rand(count, 1, SIZE, SIZE, generator=generator),
        points=points,
        to_native=torch.eye(2, 3).expand(count, 2, 3),
        native_size=torch.full((count, 2), float(SIZE)),
        mm_per_px=torch.full((count,), float("nan")),
        positions=torch.arange(start, start + count),
        weight=torch.ones(count),
        ids=tuple(str(i) for i in range(count)),
    )


class Half(nn.Module):
    """Predicts half of what it sees."""

    def forward(self, x, t):
        return 0.5 * x


class DotFinder(nn.Module):
    """Maps that follow the image: a sharp response where the picture is bright, one map per landmark."""

    def __init__(self, landmarks, timesteps=None):
        super().__init__()
        self.landmarks, self.seen = landmarks, timesteps

    def forward(self, x, t):
        if self.seen is not None:
            self.seen.append(t)
        return (x * 60).expand(-1, self.landmarks, -1, -1)


def test_denoise_loss_is_the_mean_squared_error_of_the_keyed_noise():
    task, batch = DenoiseTask(DenoiseConfig(), seed=3), make_batch(4)
    t, eps = task.timesteps(batch.positions), task.noise(batch.images, batch.positions)
    x_t = task.schedule.q_sample(batch.images, t, eps)
    torch.testing.assert_close(task.loss(Half(), batch), (0.5 * x_t - eps).square().mean((1, 2, 3)))


def test_noise_and_timesteps_of_a_position_do_not_depend_on_the_batch_around_it():
    task, whole = DenoiseTask(DenoiseConfig(), seed=3), make_batch(8)
    part = whole.positions[5:7]
    assert torch.equal(task.timesteps(whole.positions)[5:7], task.timesteps(part))
    assert torch.equal(task.noise(whole.images, whole.positions)[5:7], task.noise(whole.images[5:7], part))


def test_noise_differs_between_positions_and_seeds_and_is_standard_normal():
    images, positions = torch.zeros(64, 1, SIZE, SIZE), torch.arange(64)
    eps = DenoiseTask(DenoiseConfig(), seed=0).noise(images, positions)
    other = DenoiseTask(DenoiseConfig(), seed=1).noise(images, positions)
    assert not torch.equal(eps[0], eps[1])
    assert not torch.equal(eps, other)
    assert abs(eps.mean().item()) < 0.02
    assert eps.std().item() == pytest.approx(1.0, abs=0.02)


def test_timesteps_cover_the_released_range_1_to_499_evenly():
    task = DenoiseTask(DenoiseConfig(), seed=0)
    t = task.timesteps(torch.arange(50_000))
    assert (t.min().item(), t.max().item()) == (1, 499)
    assert t.float().mean().item() == pytest.approx(250, abs=2)


def test_evaluation_noise_is_not_the_training_noise_but_repeats():
    task, batch = DenoiseTask(DenoiseConfig(), seed=0), make_batch(4)
    first, again = task.evaluate(Half(), batch), task.evaluate(Half(), batch)
    assert first["loss"] == again["loss"]
    assert first["loss"] != task.loss(Half(), batch).sum()
    assert task.summarize({"loss": 6.0, "count": 4.0})["score"] == 1.5


def dots(points):
    """Images with a small bright blob at each point of `[B, 1, 2]`."""
    grid = torch.arange(float(SIZE))
    dx, dy = grid - points[..., :1], grid - points[..., 1:]
    return (-(dx.square().unsqueeze(-2) + dy.square().unsqueeze(-1)) / (2 * 1.5**2)).exp()


def landmark_batch(points):
    batch = make_batch(len(points), points=points)
    return Batch(**{**batch.__dict__, "images": dots(points)})


@pytest.mark.parametrize("views", [1, 6])
@pytest.mark.parametrize(
    "codec", [SpatialCodecConfig(), DiscCodecConfig(), ContourCodecConfig(decode_radius_px=6), ContourCodecConfig()]
)
def test_predictions_come_back_in_network_pixels_whatever_the_views(views, codec):
    points = torch.tensor([[[12.4, 18.7]], [[20.0, 9.2]]])
    spec = SPECS["chest"].model_copy(update={"landmark_names": ("dot",)})
    task = LandmarkTask(LandmarksConfig(codec=codec, views=views), spec)
    found = task.predict(DotFinder(1), landmark_batch(points))
    torch.testing.assert_close(found.points, points, atol=0.75 if codec == ContourCodecConfig() else 0.35, rtol=0)
    assert not found.failed.any()


def test_evaluate_sums_distances_over_labelled_landmarks_and_leaves_padding_out():
    points = torch.tensor([[[12.0, 18.0]], [[20.0, 9.0]], [[8.0, 8.0]]])
    batch = landmark_batch(points)
    moved = points + torch.tensor([3.0, 4.0])
    moved[1] = float("nan")
    batch = Batch(**{**batch.__dict__, "points": moved, "weight": torch.tensor([1.0, 1.0, 0.0])})
    spec = SPECS["chest"].model_copy(update={"landmark_names": ("dot",)})
    task = LandmarkTask(LandmarksConfig(), spec)
    sums = {key: value.item() for key, value in task.evaluate(DotFinder(1), batch).items()}
    assert (sums["count"], sums["landmarks"]) == (2.0, 1.0)
    assert sums["distance_px"] == pytest.approx(5.0, abs=0.2)
    assert task.summarize(sums)["mre_network_px"] == pytest.approx(5.0, abs=0.2)


def test_the_network_is_told_the_timestep_of_the_run_file_or_none():
    seen: list = []
    spec = SPECS["chest"]
    points = torch.full((2, 6, 2), 10.0)
    for timestep in (None, 7):
        LandmarkTask(LandmarksConfig(timestep=timestep), spec).loss(DotFinder(6, seen), landmark_batch(points[:, :1]))
    assert seen[0] is None
    assert seen[1].tolist() == [7, 7]


def test_view_matrices_start_with_the_identity_and_stay_small():
    matrices = view_matrices(8)
    assert torch.equal(matrices[0], torch.eye(2, 3))
    assert len({tuple(m.flatten().tolist()) for m in matrices}) == 8
    for matrix in matrices:
        assert (matrix[:, 2].abs() <= 0.04 + 1e-6).all()
        assert abs(math.log(torch.linalg.det(matrix[:, :2]).item())) <= 2 * 0.04 + 1e-6


def test_build_task_reads_the_kind_and_the_number_of_landmarks():
    base = {"data": {"path": "x"}, "task": {"kind": "landmarks"}}
    assert build_task(RunConfig.model_validate(base), SPECS["hand"]).out_channels == 37
    base["task"] = {"kind": "denoise"}
    assert isinstance(build_task(RunConfig.model_validate(base), SPECS["hand"]), DenoiseTask)


def test_positions_stay_in_host_memory_so_that_a_device_never_waits_for_them():
    moved = make_batch(3).to("meta")
    assert moved.images.device.type == "meta"
    assert moved.positions.tolist() == [0, 1, 2]
