"""MoCo v3, SimCLR v2 and DINO against references written out in loops, and what they keep while training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ddpm_lmk.config import EncoderUNetConfig, RunConfig
from ddpm_lmk.data.spec import SPECS
from ddpm_lmk.models import build_model
from ddpm_lmk.tasks import EncoderTask, build_task
from ddpm_lmk.tasks.ssl.base import pooled, scheduled
from ddpm_lmk.tasks.ssl.dino import DinoNet, distillation
from ddpm_lmk.tasks.ssl.heads import follow, follower
from ddpm_lmk.tasks.ssl.mocov3 import info_nce
from ddpm_lmk.tasks.ssl.simclrv2 import nt_xent
from ddpm_lmk.tasks.task import OneRank
from tests.data.batches import unlabelled_batch as batch

KINDS: dict[str, dict[str, Any]] = {
    "mocov3": {"projector": [16, 8], "predictor": [16, 8]},
    "simclrv2": {"projector": [16, 16, 8]},
    "dino": {"head": [16, 8], "prototypes": 12, "views": [{"count": 2}, {"count": 2, "size": 32}]},
}
NETWORK = {"kind": "encoder_unet", "scale": 0.125, "blocks": [1, 1, 1, 1], "decoder": [8, 8, 8, 4, 4]}


def make(kind: str, **task: Any) -> tuple[EncoderTask[Any], nn.Module]:
    cfg = RunConfig.model_validate(
        {"data": {"path": "x", "image_size": 64}, "model": NETWORK, "task": {"kind": kind, **KINDS[kind], **task}}
    )
    made = build_task(cfg, SPECS["phantom-chest"])
    assert isinstance(made, EncoderTask)
    torch.manual_seed(0)
    return made, made.wrap(build_model(cfg.model, out_channels=1))


def units(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(2)), dim=-1)


def test_info_nce_is_what_its_definition_says() -> None:
    queries, keys, tau = units(2, 3, 5), units(2, 3, 5).flip(1), 0.3
    found = info_nce(queries, keys, torch.ones(3), OneRank(), temperature=tau)
    for i in range(3):
        wanted = 0.0
        for view in range(2):
            scores = [math.exp(float(queries[view, i] @ keys[1 - view, j]) / tau) for j in range(3)]
            wanted -= math.log(scores[i] / sum(scores))
        assert float(found[i]) == pytest.approx(wanted, rel=1e-5)


def test_nt_xent_is_what_its_definition_says() -> None:
    vectors, tau = units(2, 4, 5), 0.5
    found = nt_xent(vectors, torch.ones(4), OneRank(), temperature=tau)
    flat = [vectors[view, i] for view in range(2) for i in range(4)]
    for i in range(4):
        wanted = 0.0
        for me, other in ((i, i + 4), (i + 4, i)):
            scores = {k: math.exp(float(flat[me] @ flat[k]) / tau) for k in range(8) if k != me}
            wanted -= math.log(scores[other] / sum(scores.values())) / 2
        assert float(found[i]) == pytest.approx(wanted, rel=1e-5)


def test_distillation_is_what_its_definition_says() -> None:
    logits, teacher = torch.randn(4, 2, 6), torch.randn(2, 2, 6).softmax(-1)
    found = distillation(logits, teacher)
    for i in range(2):
        total, pairs = 0.0, 0
        for g in range(2):
            for v in range(4):
                if v != g:
                    exps = [math.exp(float(x)) for x in logits[v, i]]
                    total -= sum(float(t) * math.log(e / sum(exps)) for t, e in zip(teacher[g, i], exps, strict=True))
                    pairs += 1
        assert float(found[i]) == pytest.approx(total / pairs, rel=1e-5)


@pytest.mark.parametrize("loss", ["moco", "simclr"])
def test_padding_is_no_negative(loss: str) -> None:
    vectors, weight = units(2, 4, 5), torch.tensor([1.0, 1.0, 1.0, 0.0])

    def value(z: Tensor, w: Tensor) -> Tensor:
        if loss == "moco":
            return info_nce(z, z, w, OneRank(), temperature=0.2)
        return nt_xent(z, w, OneRank(), temperature=0.2)

    padded = value(vectors, weight)
    torch.testing.assert_close(padded[:3], value(vectors[:, :3], torch.ones(3)))
    assert (padded * weight).isfinite().all()


def test_dino_teaches_with_a_centred_and_sharpened_view_of_the_follower() -> None:
    task, model = make("dino", center_momentum=0.7)
    assert isinstance(model, DinoNet)
    model.train()
    data = batch(3, [1.0, 1.0, 0.0])
    with torch.no_grad():
        model.running_center.copy_(torch.linspace(-1, 1, 12))
        center = model.running_center.clone()
        views = task.views(data, "view")
        features = pooled(model.teacher["encoder"], torch.cat(views[:2]))
        raw = model.teacher["head"](features, torch.ones(())).unflatten(0, (2, 3))
        _, found = model(views, data.weight)
    torch.testing.assert_close(found, ((raw - center) / 0.04).softmax(-1))
    wanted = 0.7 * center + 0.3 * raw[:, :2].mean((0, 1))  # the image that does not count is left out
    torch.testing.assert_close(model.running_center, wanted)


def test_dino_s_last_layer_waits_and_its_schedules_move() -> None:
    task, model = make("dino", frozen=0.5, temperature_warmup=0.5, teacher_temperature=[0.04, 0.08])
    assert isinstance(model, DinoNet)
    task.prepare(OneRank(), total_steps=8)
    task.loss(model, batch(4)).mean().backward()
    assert model.head.last.grad is not None
    assert model.head.last.grad.eq(0).all()
    assert model.head.mlp[0].weight.grad.abs().sum() > 0  # type: ignore[union-attr]
    task.after_step(model, 2)
    assert float(model.teacher_temperature) == pytest.approx(0.06)
    task.after_step(model, 4)
    assert float(model.teacher_temperature) == pytest.approx(0.08)
    task.loss(model, batch(4)).mean().backward()
    assert model.head.last.grad.abs().sum() > 0


def test_a_norm_in_dino_s_head_follows_too() -> None:
    task, model = make("dino", head_norm=True, frozen=0)
    assert isinstance(model, DinoNet)
    assert "teacher.head.mlp.1.running_mean" in model.state_dict()
    task.loss(model.train(), batch(4)).sum().backward()
    assert model.head.mlp[1].weight.grad.abs().sum() > 0  # type: ignore[union-attr]


def test_prototypes_are_directions() -> None:
    _, model = make("dino")
    assert isinstance(model, DinoNet)
    x, on = torch.randn(2, model.encoder.channels[-1]), torch.ones(())  # type: ignore[union-attr]
    before = model.head(x, on)
    with torch.no_grad():
        model.head.last.mul_(3)
    torch.testing.assert_close(model.head(x, on), before)
    assert before.abs().max() <= 1


def test_followers_move_towards_the_leader_and_are_no_parameters() -> None:
    leader = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    copied = follower(leader)
    assert list(copied.parameters()) == []
    assert set(copied.state_dict()) == set(leader.state_dict())
    before = copied.state_dict()["0.weight"].clone()
    with torch.no_grad():
        leader[0].weight.add_(1)
        leader[1].running_mean.add_(1)
    follow(copied, leader, 0.9)
    torch.testing.assert_close(copied.state_dict()["0.weight"], before + 0.1)
    assert copied.state_dict()["1.running_mean"].eq(0).all()  # statistics are its own


def test_momentum_rises_to_one_by_a_cosine() -> None:
    assert scheduled(0.9, "cosine", step=0, total=10) == pytest.approx(0.9)
    assert scheduled(0.9, "cosine", step=5, total=10) == pytest.approx(0.95)
    assert scheduled(0.9, "cosine", step=10, total=10) == 1
    assert scheduled(0.9, "constant", step=5, total=10) == 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_and_followers_do_not(kind: str) -> None:
    task, model = make(kind, **({"frozen": 0} if kind == "dino" else {}))
    model.train()
    losses = task.loss(model, batch(4))
    assert losses.shape == (4,)
    losses.sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert not any(value.requires_grad for value in model.buffers())
    assert {name.split(".")[0] for name in model.state_dict()} >= {"encoder"}
    assert not any("decoder" in name or "final_conv" in name for name in model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_has_views_of_its_own_that_stay(kind: str) -> None:
    task, model = make(kind)
    model.eval()
    with torch.no_grad():
        first, again = (task.summarize({k: float(v) for k, v in task.evaluate(model, batch(4)).items()}) for _ in "12")
        trained_on = float(task.loss(model, batch(4)).mean())
    assert first == again
    assert first["score"] != pytest.approx(trained_on)


def test_mocov3_has_the_scale_of_the_method_or_of_the_released_code() -> None:
    task, model = make("mocov3", temperature=0.2)
    released, _ = make("mocov3", temperature=0.2, loss_scale="one")
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(task.loss(model, batch(3)), 0.4 * released.loss(model, batch(3)))


@pytest.mark.parametrize("kind", KINDS)
def test_cost_is_what_torch_counts(kind: str) -> None:
    """Without the drawing of views, the comparison, and DINO's prototypes, whose weights are no layer's."""
    task, model = make(kind)
    model.eval()
    views = task.views(batch(1), "view")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        task.compare(model, views, batch(1), OneRank())
    cost = task.cost(EncoderUNetConfig.model_validate(NETWORK), 64)
    assert cost.flops_forward == pytest.approx(counter.get_total_flops(), rel=1e-2)
    assert cost.params == sum(p.numel() for p in model.parameters())
