"""GU2Net: the size of the original, domains that do not meet, and the product of probabilities."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ddpm_lmk.config import GU2NetConfig
from ddpm_lmk.errors import ConfigError
from ddpm_lmk.models.gu2net import GU2Net, SeparableBlock, logit_of_product

SMALL = GU2NetConfig(width=4)


def small(*domains: int) -> GU2Net:
    torch.manual_seed(0)
    return GU2Net(SMALL, domains=domains)


def test_it_has_the_parameters_and_operations_of_the_original() -> None:
    """docs/method.md, section 5: 4,381,052 parameters (2.12 M local, 2.26 M global) and 8.2 GMAC at 256 x 256."""
    with torch.device("meta"):
        net = GU2Net(GU2NetConfig(), domains=(6, 19, 37))
        image = torch.empty(1, 1, 256, 256)
    assert sum(parameter.numel() for parameter in net.parameters()) == 4_381_052
    local = sum(p.numel() for part in (net.local_net, net.final_conv["near"]) for p in part.parameters())
    assert round(local / 1e6, 2) == 2.12
    with FlopCounterMode(display=False) as counter:
        net(image, torch.tensor([1], device="cpu"))
    assert round(counter.get_total_flops() / 2e9, 1) == 8.2


def test_an_image_is_treated_as_if_its_domain_were_alone() -> None:
    net, images = small(2, 3).eval(), torch.rand(5, 1, 32, 32)
    domain = torch.tensor([0, 1, 1, 0, 1])
    maps = net(images, domain)
    assert maps.shape == (5, 5, 32, 32)
    for index, columns, others in ((0, slice(0, 2), slice(2, 5)), (1, slice(2, 5), slice(0, 2))):
        rows = (domain == index).nonzero().squeeze(1)
        alone = net(images[rows], torch.full((len(rows),), index))
        torch.testing.assert_close(maps[rows][:, columns], alone[:, columns])
        assert (maps[rows][:, others] == 0).all()


def test_a_domain_learns_the_shared_layers_and_leaves_those_of_others_alone() -> None:
    net = small(2, 3)
    net(torch.rand(4, 1, 32, 32), torch.zeros(4, dtype=torch.int64)).square().mean().backward()
    block = net.local_net.enter.first
    assert isinstance(block, SeparableBlock)
    assert block.pointwise.weight.grad is not None
    assert block.depthwise[0].weight.grad is not None
    assert block.depthwise[1].weight.grad is None
    assert net.final_conv["near"][1].weight.grad is None
    assert int(block.norm[0].num_batches_tracked) == 1
    assert int(block.norm[1].num_batches_tracked) == 0


def test_the_map_is_where_the_local_and_the_global_network_agree() -> None:
    """The published output is sigmoid(local) * sigmoid(global), with the global map repeated 4 x 4 times."""
    net, images = small(2).eval(), torch.rand(2, 1, 32, 32)
    seen = torch.stack([(image - image.mean()) / image.std(correction=0) for image in images])  # z-scores, as published
    near = net.final_conv["near"](net.local_net(seen, 0), 0)
    far = net.final_conv["far"](net.global_net(seen, near.sigmoid(), 0), 0)
    far = F.interpolate(far, size=(32, 32), mode="nearest")
    torch.testing.assert_close(net(images).sigmoid(), near.sigmoid() * far.sigmoid())


def test_the_logit_of_a_product_holds_for_any_size() -> None:
    a, b = torch.meshgrid(torch.linspace(-300, 30, 34), torch.linspace(-30, 30, 7), indexing="ij")
    a, b = a.double(), b.double()
    logit = logit_of_product(a, b)
    torch.testing.assert_close(logit.sigmoid(), a.sigmoid() * b.sigmoid())
    torch.testing.assert_close(F.logsigmoid(logit), F.logsigmoid(a) + F.logsigmoid(b))
    assert (
        logit_of_product(torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)).dtype
        == torch.float
    )


def test_small_maps_are_taken_and_given_back_as_the_original_interpolates_them() -> None:
    image = torch.arange(64.0).view(1, 1, 8, 8)
    assert torch.equal(image[..., ::4, ::4], F.interpolate(image, scale_factor=0.25))


def test_a_side_that_cannot_be_halved_four_times_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"multiple of 16 for model\.kind=gu2net"):
        small(2)(torch.rand(1, 1, 40, 40))
