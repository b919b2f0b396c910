"""The denoising objective against diffusers' schedulers, float64 arithmetic and the papers' formulas."""

import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ether_diffusion.bases.stable_diffusion import DiscreteNoise
from ether_diffusion.training.objective import draw_noise, draw_timesteps, losses_of
from ether_diffusion.training.randomness import stream

SHAPE = torch.Size((3, 4, 8, 8))
NO_PRIOR = torch.zeros(3, dtype=torch.bool)


def noise_scheduler(prediction_type: str = "epsilon", *, zero_terminal: bool = False) -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_terminal,
    )


def test_a_rows_noise_depends_on_its_visit_and_not_on_its_batch() -> None:
    together = draw_noise(SHAPE, [5, 6, 7], NO_PRIOR, seed=0)
    alone = draw_noise(torch.Size((1, *SHAPE[1:])), [6], NO_PRIOR[:1], seed=0)
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(draw_noise(SHAPE, [5, 6, 7], NO_PRIOR, seed=1), together)


def test_noise_is_standard_normal() -> None:
    noise = draw_noise(torch.Size((64, 4, 16, 16)), range(64), torch.zeros(64, dtype=torch.bool), seed=0)
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01


def test_offset_noise_shifts_whole_channels() -> None:
    plain = draw_noise(SHAPE, [1, 2, 3], NO_PRIOR, seed=0)
    shift = draw_noise(SHAPE, [1, 2, 3], NO_PRIOR, seed=0, offset=0.5) - plain
    torch.testing.assert_close(shift, shift[:, :, :1, :1].expand_as(shift))
    assert shift.abs().min() > 0


def test_a_class_image_has_noise_of_its_own_and_a_frozen_prior_shares_its_pictures() -> None:
    shape, visits = torch.Size((4, 4, 8, 8)), [1, 2, 1, 2]
    for frozen, equal in ((False, False), (True, True)):
        is_frozen = torch.tensor([False, False, frozen, frozen])
        noise = draw_noise(shape, visits, is_frozen, seed=0)
        steps = draw_timesteps(DiscreteNoise(noise_scheduler()), visits, is_frozen, seed=0)
        assert torch.equal(noise[:2], noise[2:]) is equal
        assert torch.equal(steps[:2], steps[2:]) is equal


def test_timesteps_are_uniform_over_the_whole_range() -> None:
    ten = DiscreteNoise(DDPMScheduler(num_train_timesteps=10))
    steps = draw_timesteps(ten, range(4000), torch.zeros(4000, dtype=torch.bool), seed=0)
    counts = torch.bincount(steps, minlength=10).double()
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-squared, 9 degrees of freedom, p = 0.001


def test_the_target_of_epsilon_prediction_is_the_noise() -> None:
    noise = torch.randn(SHAPE)
    found = DiscreteNoise(noise_scheduler()).target(torch.randn(SHAPE), noise, torch.tensor([1, 500, 999]))
    assert found is noise


@pytest.mark.parametrize("zero_terminal", [False, True])
def test_a_perfect_velocity_leads_ddim_back_to_the_latents(zero_terminal: bool) -> None:
    scheduler = noise_scheduler("v_prediction", zero_terminal=zero_terminal)
    latents, noise, timesteps = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([1, 500, 999])
    noisy = scheduler.add_noise(latents, noise, timesteps)
    velocity = DiscreteNoise(scheduler).target(latents, noise, timesteps)
    ddim = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    ddim.set_timesteps(1000)
    for row, timestep in enumerate(timesteps):
        found = ddim.step(velocity[row], int(timestep), noisy[row]).pred_original_sample
        torch.testing.assert_close(found, latents[row], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_the_papers(prediction_type: str) -> None:
    scheduler = noise_scheduler(prediction_type)
    timesteps = torch.tensor([0, 100, 500, 999])
    alphas = scheduler.alphas_cumprod[timesteps].double()
    snr = alphas / (1 - alphas)
    expected = snr.clamp(max=5) / (snr if prediction_type == "epsilon" else snr + 1)
    torch.testing.assert_close(
        DiscreteNoise(scheduler).min_snr_weights(timesteps, 5.0).double(), expected, rtol=1e-4, atol=0
    )


def test_min_snr_weights_are_finite_where_no_signal_is_left() -> None:
    for prediction_type in ("epsilon", "v_prediction"):
        scheduler = noise_scheduler(prediction_type, zero_terminal=True)
        assert DiscreteNoise(scheduler).min_snr_weights(torch.tensor([999]), 5.0).isfinite().all()


def test_losses_are_each_rows_mean_squared_error() -> None:
    prediction, target = torch.randn(SHAPE), torch.randn(SHAPE)
    expected = [torch.nn.functional.mse_loss(p, t) for p, t in zip(prediction, target, strict=True)]
    torch.testing.assert_close(losses_of(prediction, target, None), torch.stack(expected))


def test_a_masked_loss_sees_what_the_mask_keeps_and_nothing_else() -> None:
    prediction, target = torch.randn(SHAPE), torch.randn(SHAPE)
    masks = torch.zeros(3, 1, 8, 8)
    masks[..., :2] = 1
    expected = (prediction - target)[..., :2].square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses_of(prediction, target, masks), expected)
    changed = prediction + 100 * (1 - masks)
    torch.testing.assert_close(losses_of(changed, target, masks), expected)


def test_an_empty_mask_gives_no_loss_and_no_nan() -> None:
    losses = losses_of(torch.randn(SHAPE), torch.randn(SHAPE), torch.zeros(3, 1, 8, 8))
    assert torch.equal(losses, torch.zeros(3))


# Streams of random numbers


def drawn(*arguments: int, purpose: str = "noise", seed: int = 0) -> torch.Tensor:
    return torch.randn(4, generator=stream(seed, purpose, *arguments))


def test_equal_names_give_equal_numbers_in_any_process_whatever_was_drawn_before() -> None:
    first = drawn(1, 2)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    drawn(7)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn(1, 2), first)
    code = (
        "import torch; from ether_diffusion.training.randomness import stream; "
        "print(torch.randn(4, generator=stream(0, 'noise', 1, 2)).tolist())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(first.tolist())


def test_seed_purpose_and_each_index_change_the_numbers() -> None:
    names = [drawn(1, 2), drawn(2, 1), drawn(12), drawn(1, 2, purpose="crop"), drawn(1, 2, seed=1)]
    names.append(drawn(1, 2, 0))
    assert len({tuple(numbers.tolist()) for numbers in names}) == len(names)
