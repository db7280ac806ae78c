"""Schedules and samplers against closed forms."""

import pytest
import torch

from ddpm_lmk.tasks.noise_schedule import NoiseSchedule, ddim_sample, ddpm_sample

TARGETS = ["eps", "x0", "v"]


def test_linear_schedule_has_the_papers_end_points():
    schedule = NoiseSchedule("linear")
    assert schedule.alpha_bar[0].item() == pytest.approx(0.9999)
    assert schedule.alpha_bar[499].item() == pytest.approx(0.006353, abs=1e-6)  # docs/method.md, section 2


def test_cosine_schedule_falls_from_one_to_nearly_zero():
    schedule = NoiseSchedule("cosine", num_timesteps=200)
    assert schedule.alpha_bar[0] > 0.999
    assert schedule.alpha_bar[-1] < 1e-3
    assert (schedule.alpha_bar.diff() < 0).all()


def test_q_sample_has_the_mean_and_variance_of_equation_2():
    schedule = NoiseSchedule("linear")
    x_0 = torch.full((1, 1, 256, 256), 0.7)
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    for t in (1, 100, 499):
        x_t = schedule.q_sample(x_0, torch.tensor([t]), eps)
        alpha_bar = schedule.alpha_bar[t].item()
        assert x_t.mean().item() == pytest.approx(0.7 * alpha_bar**0.5, abs=0.02)
        assert x_t.var().item() == pytest.approx(1 - alpha_bar, rel=0.03, abs=1e-4)


def test_iterating_single_steps_gives_the_one_jump_marginal():
    """Composing q(x_t | x_{t-1}) must reproduce alpha_bar: signal product, noise variance recursion."""
    schedule = NoiseSchedule("linear", num_timesteps=50)
    signal, variance = 1.0, 0.0
    for beta in schedule.betas.tolist():
        signal, variance = signal * (1 - beta) ** 0.5, variance * (1 - beta) + beta
    assert signal**2 == pytest.approx(schedule.alpha_bar[-1].item())
    assert variance == pytest.approx(1 - schedule.alpha_bar[-1].item())


@pytest.mark.parametrize("target", TARGETS)
def test_the_network_target_can_be_turned_back_into_image_and_noise(target):
    schedule = NoiseSchedule("cosine", num_timesteps=100)
    generator = torch.Generator().manual_seed(1)
    x_0, eps = torch.rand(3, 1, 8, 8, generator=generator), torch.randn(3, 1, 8, 8, generator=generator)
    t = torch.tensor([1, 40, 80])
    x_t = schedule.q_sample(x_0, t, eps)
    output = schedule.regression_target(x_0, t, eps, target)
    x_0_back, eps_back = schedule.x_0_and_eps(x_t, t, output, target)
    torch.testing.assert_close(x_0_back, x_0, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(eps_back, eps, atol=1e-3, rtol=1e-3)


def gaussian_denoiser(schedule, mean, std):
    """The exact E[eps | x_t] when images are Gaussian pixels N(mean, std^2)."""

    def model(x_t, t):
        signal, noise = schedule.signal_and_noise(t)
        return noise * (x_t - signal * mean) / (signal**2 * std**2 + noise**2)

    return model


def test_ancestral_sampling_with_the_exact_denoiser_draws_the_data_distribution():
    schedule = NoiseSchedule("linear")
    generator = torch.Generator().manual_seed(2)
    # The released schedule ends at alpha_bar = 0.006: start from the true marginal at T - 1.
    start = torch.randn(1, 1, 128, 128, generator=generator) * (1 - 0.006353 * (1 - 0.2**2)) ** 0.5 + 0.0797 * 0.5
    *_, image = ddpm_sample(gaussian_denoiser(schedule, 0.5, 0.2), schedule, start, generator=generator)
    assert image.mean().item() == pytest.approx(0.5, abs=0.02)
    assert image.std().item() == pytest.approx(0.2, abs=0.02)


def test_ddim_with_the_exact_denoiser_of_a_point_mass_returns_the_point():
    schedule = NoiseSchedule("linear")
    start = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    *_, image = ddim_sample(gaussian_denoiser(schedule, 0.3, 0.0), schedule, start, num_steps=10)
    torch.testing.assert_close(image, torch.full_like(image, 0.3), atol=1e-4, rtol=0)


def test_ddim_takes_exactly_the_steps_asked_for_and_refuses_nonsense():
    schedule = NoiseSchedule("linear", num_timesteps=20)
    start = torch.zeros(1, 1, 4, 4)
    assert len(list(ddim_sample(gaussian_denoiser(schedule, 0.5, 0.1), schedule, start, num_steps=7))) == 7
    with pytest.raises(ValueError, match="num_steps=20"):
        list(ddim_sample(gaussian_denoiser(schedule, 0.5, 0.1), schedule, start, num_steps=20))
