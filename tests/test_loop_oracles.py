"""The loop against plain loops of diffusers and PEFT, and against the paper's matrices in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from base_kinds import inpainting_sd, open_pipeline, velocity_sd
from diffusers import DDPMScheduler
from loaded_runs import assert_same, batches, gradients, load, trained
from oracles import dense_weight, in_float64
from peft import LoraConfig, set_peft_model_state_dict
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import mse_loss
from training_runs import config, write_base, write_photos

from ether_diffusion.adapters import detach_adapter
from ether_diffusion.bases.stable_diffusion import DiscreteNoise
from ether_diffusion.reflections import Vectors
from ether_diffusion.strict_json import Json
from ether_diffusion.training.batches import Batch
from ether_diffusion.training.methods import adapter_tensors
from ether_diffusion.training.objective import draw_noise, draw_timesteps

NUM_STEPS = 4


def noised(base: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the noise and timesteps that a batch is given, and its noisy latents as diffusers makes them."""
    scheduler = DDPMScheduler.from_config(base.scheduler.config)
    noise = draw_noise(batch.latents.shape, batch.samples, batch.is_frozen_prior, seed=0)
    timesteps = draw_timesteps(DiscreteNoise(scheduler), batch.samples, batch.is_frozen_prior, seed=0)
    return noise, timesteps, scheduler.add_noise(batch.latents, noise, timesteps)


def tokens(pipe: Any, prompts: tuple[str, ...]) -> Any:
    return pipe.tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    )


@pytest.mark.parametrize("text", [False, True], ids=["unet", "unet and text encoder"])
def test_lora_learns_as_in_a_plain_loop_of_diffusers_and_peft(tmp_path: Path, text: bool) -> None:
    flags: dict[str, Json] = {
        "adapter": "lora",
        "lora_alpha": 8,
        "learning_rate": 0.01,
        "max_train_steps": NUM_STEPS,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lr_scheduler": "linear",
        "adam_weight_decay": 0.1,
        "max_grad_norm": 0.05,
        "train_text_encoder": text,
    }
    run = load(config(tmp_path, **flags))
    given = list(batches(run))
    pipe = open_pipeline(tmp_path / "base")
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    for model in models.values():
        model.requires_grad_(False).train()
    for part in run.trainer.parts:
        model = models[part.part]
        names = ["to_q", "to_k", "to_v", "to_out.0"]
        if part.part == "text_encoder":
            names = ["q_proj", "k_proj", "v_proj", "out_proj"]
        model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=names))
        set_peft_model_state_dict(model, adapter_tensors(part.model), "default")
    ours = [report.loss for report in run.trainer.steps(iter(given))]

    # from here on, nothing is ours but the noise
    learned = [p for model in models.values() for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=0.01, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / NUM_STEPS)
    plain = []
    for step in range(NUM_STEPS):
        total = 0.0
        for batch in given[2 * step : 2 * step + 2]:
            noise, timesteps, noisy = noised(pipe, batch)
            context = pipe.text_encoder(tokens(pipe, batch.prompts).input_ids).last_hidden_state
            loss = mse_loss(pipe.unet(noisy, timesteps, context).sample, noise) / 2
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(learned, 0.05)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        plain.append(total)

    assert ours == pytest.approx(plain, rel=1e-5)
    for part in run.trainer.parts:
        # Adam divides by the gradients' own size, so that rounding shows where they are near zero
        assert_same(trained(part.model), trained(models[part.part]), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("variant", ["ether", "ether_plus"])
@pytest.mark.parametrize("kind", ["epsilon", "velocity"])
def test_the_gradient_is_that_of_the_papers_matrices(tmp_path: Path, variant: str, kind: str) -> None:
    if kind == "velocity":
        velocity_sd().save_pretrained(tmp_path / "base")
    run = load(config(tmp_path, adapter=variant, train_batch_size=2))
    for parameter in run.trainer.parameters:
        parameter.data += 0.05 * torch.randn_like(parameter)  # ETHER+ starts where v = -u
    batch = next(batches(run))
    found = gradients(run, batch)

    pipe = open_pipeline(tmp_path / "base")
    unet = pipe.unet.double().requires_grad_(False)
    adapter = detach_adapter(run.unet, "default")
    weights: dict[str, Tensor] = {}
    vectors: dict[str, Tensor] = {}
    for name, sides in adapter.projections().items():
        own: list[Vectors | None] = []
        for label, side in zip(("input", "output"), sides, strict=True):
            if side is None:
                own.append(None)
                continue
            wide = in_float64(side)
            for letter, vector in wide._asdict().items():
                if vector is not None:
                    vectors[f"unet.{name}.ether_{label}_{letter}.default"] = vector.requires_grad_()
            own.append(wide)
        weights[f"{name}.weight"] = dense_weight(unet.get_parameter(f"{name}.weight"), *own)
    noise, timesteps, noisy = noised(pipe, batch)
    prompt = tokens(pipe, batch.prompts)
    mask = prompt.attention_mask if kind == "velocity" else None
    context = pipe.text_encoder(prompt.input_ids, attention_mask=mask).last_hidden_state.detach()
    inputs = (noisy.double(), timesteps, context.double())
    target = noise
    if kind == "velocity":
        scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        target = scheduler.get_velocity(batch.latents, noise, timesteps)
    prediction = functional_call(unet, weights, inputs).sample
    mse_loss(prediction, target.double()).backward()

    assert len(vectors) == 32 * (1 if variant == "ether" else 4)
    expected = {name: vector.grad.float() for name, vector in vectors.items() if vector.grad is not None}
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert_same(found, expected, rtol=1e-3, atol=1e-5 * largest)


def test_sdxl_is_told_sizes_and_pooled_prompts_as_in_diffusers(tmp_path: Path) -> None:
    write_base(tmp_path / "base", is_xl=True)
    write_photos(tmp_path / "photos", wide=2)  # 128 × 64 px: of 16 × 8, the middle begins at 4
    run = load(config(tmp_path, center_crop=True, train_batch_size=2))
    batch = next(batches(run))
    with torch.no_grad():
        found = run.trainer.denoising.losses(batch)  # ETHER+ starts as the base

    pipe = open_pipeline(tmp_path / "base")
    sizes = pipe._get_add_time_ids((64, 128), (0, 4), (8, 8), torch.float32, 32).repeat(2, 1)
    assert batch.size_ids is not None
    assert torch.equal(batch.size_ids.float(), sizes)
    context, _, pooled, _ = pipe.encode_prompt(
        list(batch.prompts), num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    noise, timesteps, noisy = noised(pipe, batch)

    def expected(sizes: Tensor) -> Tensor:
        conditions = {"text_embeds": pooled, "time_ids": sizes}
        with torch.no_grad():
            prediction = pipe.unet(noisy, timesteps, context, added_cond_kwargs=conditions).sample
        return (prediction - noise).square().mean(dim=(1, 2, 3))

    torch.testing.assert_close(found, expected(sizes), rtol=1e-5, atol=0)
    assert not torch.allclose(found, expected(sizes + 8), rtol=1e-5, atol=0)


def test_an_inpainting_unet_sees_hole_and_surroundings_as_in_diffusers(tmp_path: Path) -> None:
    inpainting_sd().save_pretrained(tmp_path / "base")
    run = load(config(tmp_path, train_batch_size=2))
    batch = next(batches(run))
    with torch.no_grad():
        found = run.trainer.denoising.losses(batch)
    pipe = open_pipeline(tmp_path / "base")
    noise, timesteps, noisy = noised(pipe, batch)
    assert batch.inpainting is not None
    hole, around = batch.inpainting.split((1, 4), dim=1)
    with torch.no_grad():
        context = pipe.text_encoder(tokens(pipe, batch.prompts).input_ids).last_hidden_state
        seen = torch.cat((noisy, hole, around), dim=1)  # the order of diffusers' pipeline
        expected = (pipe.unet(seen, timesteps, context).sample - noise).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("text", [False, True], ids=["unet", "unet and text encoder"])
def test_the_target_of_a_frozen_prior_is_what_the_base_predicts(tmp_path: Path, text: bool) -> None:
    flags: dict[str, Json] = {"prior_preservation": "frozen", "class_prompt": "a dog", "adapter": "ether"}
    run = load(config(tmp_path, prior_loss_weight=0.5, train_text_encoder=text, **flags))
    batch = next(batches(run))
    with torch.no_grad():
        found = run.trainer.denoising.losses(batch)
    assert batch.prompts[1:] == ("a dog",)

    pipe, adapted = open_pipeline(tmp_path / "base"), run.unet
    noise, timesteps, noisy = noised(pipe, batch)
    ids = tokens(pipe, batch.prompts).input_ids
    with torch.no_grad():
        own = pipe.unet(noisy, timesteps, pipe.text_encoder(ids).last_hidden_state).sample
        encode = run.trainer.parts[1].model if text else pipe.text_encoder
        prediction = adapted(noisy, timesteps, encode(ids).last_hidden_state).sample
    target = torch.cat((noise[:1], own[1:]))
    expected = (prediction - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_class_images_weigh_as_much_as_they_are_told_to(tmp_path: Path) -> None:
    write_photos(tmp_path / "classes", count=2, wide=2)
    flags: dict[str, Json] = {
        "prior_preservation": "class_images",
        "class_data_dir": str(tmp_path / "classes"),
        "class_prompt": "a dog",
        "num_class_images": 2,
        "train_batch_size": 2,
    }
    reports = []
    for weight in (0.25, 2.0):
        run = load(config(tmp_path, prior_loss_weight=weight, **flags))
        batch = next(batches(run))
        with torch.no_grad():
            losses = run.trainer.denoising.losses(batch)
        reports.append(run.trainer.train_step([batch]).loss)
        # diffusers: the mean over instances plus the weight times the mean over class images
        expected = losses[:2].mean() + weight * losses[2:].mean()
        assert reports[-1] == pytest.approx(expected.item(), rel=1e-5)
    assert reports[0] != reports[1]
