"""A control encoder adds to a UNet's first convolution what diffusers' own embedding gives, and leaves."""

from typing import Any, cast

import pytest
import torch
from control_encoders import (
    FACTOR,
    adding_unet,
    control_images,
    fresh_unet,
    predict,
    random_encoder,
    unet_inputs,
)
from diffusers import UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from torch import nn

from ether_diffusion import EtherConfig
from ether_diffusion.bases import open_base
from ether_diffusion.control import ControlConfig, ControlEncoder, controlled, new_encoder


def test_the_encoder_gives_what_diffusers_conditioning_embedding_gives() -> None:
    encoder = random_encoder(fresh_unet(), factor=8)
    theirs = ControlNetConditioningEmbedding(32, 3, (16, 32, 96, 256))
    theirs.load_state_dict(encoder.state_dict())
    images = control_images(side=32)
    assert torch.equal(encoder(images), theirs(images))


def test_the_encoder_has_the_papers_1_09_million_parameters_for_sd15_and_fits_tiny_world() -> None:
    assert sum(each.numel() for each in ControlEncoder(ControlConfig(320)).parameters()) == 1_086_480
    base = open_base("tiny_world")
    encoder = new_encoder(base.load_denoiser(), vae_scale_factor=base.vae_scale_factor)
    assert encoder(control_images(1, side=64)).shape == (1, 96, 16, 16)


@torch.no_grad()
def test_a_fresh_encoder_brings_a_shape_to_its_last_convolution_undimmed() -> None:
    encoder = new_encoder(fresh_unet(), vae_scale_factor=8)
    shape = torch.zeros(1, 3, 128, 128)
    shape[..., 32:96, 32:96] = 1
    seen: list[torch.Tensor] = []
    encoder.conv_out.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    encoder(shape)
    contrast = seen[0].std((2, 3)).mean()  # with torch's own initial weights it is 0.0006
    assert 0.03 < contrast < 1


def test_a_seed_decides_an_encoder_and_the_global_generator_is_left_alone() -> None:
    unet, before = fresh_unet(), torch.get_rng_state()
    one, same, other = (new_encoder(unet, vae_scale_factor=8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.conv_in.weight, same.conv_in.weight)
    assert not torch.equal(one.conv_in.weight, other.conv_in.weight)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("factor", [0, 3, 128])
def test_a_factor_that_is_no_power_of_two_is_refused(factor: int) -> None:
    with pytest.raises(ValueError, match=f"divides sides by {factor}; control needs a power of two"):
        new_encoder(fresh_unet(), vae_scale_factor=factor)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_control_is_a_forward_with_the_features_times_strength_added_after_conv_in(strength: float) -> None:
    unet, inputs, images = fresh_unet(), unet_inputs(), control_images()
    encoder = random_encoder(unet)
    by_hand = adding_unet(unet, encoder(images).detach() * strength)
    with torch.no_grad(), controlled(unet, encoder, images, strength=strength):
        assert torch.equal(predict(unet, inputs), predict(by_hand, inputs))


def test_the_unet_is_as_before_once_control_ends_also_with_an_error() -> None:
    unet, inputs = fresh_unet(), unet_inputs()
    encoder, images = random_encoder(unet), control_images()
    before = predict(unet, inputs)
    with controlled(unet, encoder, images):
        assert not torch.equal(predict(unet, inputs), before)
    assert torch.equal(predict(unet, inputs), before)
    with pytest.raises(ZeroDivisionError), controlled(unet, encoder, images):
        _ = 1 / 0
    assert torch.equal(predict(unet, inputs), before)
    assert not unet.conv_in._forward_hooks


def test_a_fresh_encoder_with_fresh_ether_plus_predicts_what_the_base_does_bit_for_bit() -> None:
    unet, inputs = fresh_unet(), unet_inputs()
    before = predict(unet, inputs)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj"]
    unet.add_adapter(EtherConfig(variant="ether_plus", target_modules=targets))
    encoder = new_encoder(unet, vae_scale_factor=FACTOR)
    with torch.no_grad(), controlled(unet, encoder, control_images()):
        assert torch.equal(predict(unet, inputs), before)


def test_strength_zero_is_the_base_bit_for_bit_for_all_or_for_one() -> None:
    unet, inputs, images = fresh_unet(), unet_inputs(), control_images()
    encoder, before = random_encoder(unet), predict(unet, inputs)
    with controlled(unet, encoder, images, strength=0.0):
        assert torch.equal(predict(unet, inputs), before)
    with torch.no_grad(), controlled(unet, encoder, images, strength=torch.tensor([0.0, 1.0])):
        mixed = predict(unet, inputs)
    assert torch.equal(mixed[0], before[0])
    assert not torch.equal(mixed[1], before[1])


def test_each_sample_follows_its_own_image_and_guidance_sees_them_twice() -> None:
    unet, images = fresh_unet(), control_images()
    inputs, encoder = unet_inputs(4), random_encoder(unet)
    by_hand = adding_unet(unet, encoder(torch.cat((images, images))).detach())
    with torch.no_grad(), controlled(unet, encoder, images):
        torch.testing.assert_close(predict(unet, inputs), predict(by_hand, inputs))


def test_two_controls_add_up() -> None:
    unet, inputs, images = fresh_unet(), unet_inputs(), control_images()
    one, other = random_encoder(unet, seed=1), random_encoder(unet, seed=2)
    by_hand = adding_unet(unet, (one(images) + other(images)).detach())
    with torch.no_grad(), controlled(unet, one, images), controlled(unet, other, images):
        torch.testing.assert_close(predict(unet, inputs), predict(by_hand, inputs))


def test_gradients_reach_the_encoder_also_where_activations_are_recomputed() -> None:
    gradients = []
    for checkpointing in (False, True):
        unet = fresh_unet().train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        encoder = random_encoder(unet)
        with controlled(unet, encoder, control_images()):
            predict(unet, unet_inputs()).square().mean().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None
        assert plain.abs().sum() > 0
        torch.testing.assert_close(recomputed, plain)
    fresh = new_encoder(unet, vae_scale_factor=FACTOR)  # which learns at its last convolution first
    with controlled(unet, fresh, control_images()):
        predict(unet, unet_inputs()).square().mean().backward()
    assert fresh.conv_out.weight.grad.abs().sum() > 0
    assert fresh.conv_in.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_control_keeps_the_dtype_of_a_half_precision_unet(dtype: torch.dtype) -> None:
    unet = fresh_unet()
    encoder = random_encoder(unet)
    half = unet.to(dtype)
    sample, timesteps, text = unet_inputs()
    with torch.no_grad(), controlled(half, encoder, control_images()):
        found = predict(half, (sample.to(dtype), timesteps, text.to(dtype)))
    assert found.dtype == dtype
    assert encoder.conv_in.weight.dtype == torch.float32


def test_control_works_under_autocast_and_keeps_its_parameters_in_float32() -> None:
    unet, images = fresh_unet(), control_images()
    encoder = random_encoder(unet)
    exact = _controlled(unet, encoder)
    with torch.autocast("cpu", torch.bfloat16), controlled(unet, encoder, images):
        found = predict(unet, unet_inputs())
        found.float().square().mean().backward()
    assert encoder.conv_in.weight.grad.dtype == torch.float32
    torch.testing.assert_close(found.float(), exact, atol=0.1, rtol=0.1)  # bfloat16 through a whole UNet


def test_compiled_blocks_follow_the_control() -> None:
    plain, unet = fresh_unet(), fresh_unet()
    for module in unet.down_blocks:
        module.compile(backend="eager")
    encoder = random_encoder(plain)
    with torch.no_grad():
        assert torch.equal(_controlled(unet, encoder), _controlled(plain, encoder))


def test_a_unet_that_is_compiled_whole_is_refused() -> None:
    encoder = random_encoder(fresh_unet())
    in_place = fresh_unet()
    in_place.compile(backend="eager")
    for unet in (cast(nn.Module, torch.compile(fresh_unet(), backend="eager")), in_place):
        with (
            pytest.raises(ValueError, match="compiled as a whole"),
            controlled(unet, encoder, control_images()),
        ):
            pass


MAPS = control_images()
REFUSED: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {
    "must be .n, 3, height, width.: a channel": (torch.zeros(2, 1, 16, 16), {}),
    "must be .n, 3, height, width.: no batch": (torch.zeros(3, 16, 16), {}),
    "must be .n, 3, height, width.: none": (torch.zeros(0, 3, 16, 16), {}),
    "15 × 16 px; sides must be multiples of 2 px": (torch.zeros(2, 3, 16, 15), {}),
    "use finite numbers: nan": (MAPS, {"strength": float("nan")}),
    "use finite numbers: inf": (MAPS, {"strength": float("inf")}),
    "use finite numbers: one": (MAPS, {"strength": torch.tensor([1.0, float("nan")])}),
    "found 3 strengths for 2 control images": (MAPS, {"strength": torch.ones(3)}),
    "do not fit 2 samples with latents of .8, 8.: batch": (control_images(3), {}),
    "do not fit 2 samples with latents of .8, 8.: size": (control_images(2, side=32), {}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_images_and_strengths_that_do_not_fit_are_refused(words: str) -> None:
    unet, (images, options) = fresh_unet(), REFUSED[words]
    with (
        pytest.raises(ValueError, match=words.partition(":")[0]),
        controlled(unet, random_encoder(unet), images, **options),
    ):
        predict(unet, unet_inputs())


def test_an_encoder_of_another_base_is_refused_with_both_widths() -> None:
    encoder = ControlEncoder(ControlConfig(320, (16, 32)))
    with pytest.raises(ValueError, match="gives 320 channels and the UNet's conv_in 32"):
        controlled(fresh_unet(), encoder, control_images()).__enter__()


def _controlled(unet: UNet2DConditionModel, encoder: ControlEncoder) -> torch.Tensor:
    with controlled(unet, encoder, control_images()):
        return predict(unet, unet_inputs())
