"""The seam of every transformer family says just what diffusers' own pipeline feeds and gets."""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from flow_pipelines import FLOW_PIPELINES, SIDE, UNBINNED, UNGUIDED, flow_pipeline
from loaded_runs import batches, gradients, load
from real_configs import FLOW_CONFIGS
from torch import Tensor, nn
from torch.testing import assert_close
from training_runs import config

from ether_diffusion.bases import Denoising, denoise, open_base
from ether_diffusion.bases.flow import FlowBase, FlowNoise
from ether_diffusion.bases.opening import FAMILIES
from ether_diffusion.training.config import AdapterConfig
from ether_diffusion.training.methods import attach_new, peft_config
from ether_diffusion.training.processes import make_accelerator
from ether_diffusion.training.setup import check_run, remember

pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # diffusers' own
    pytest.mark.filterwarnings("ignore:.*guidance_scale is passed as None:UserWarning"),
]
every_family = pytest.mark.parametrize("family", FLOW_PIPELINES)
Bases = Callable[[str], Path]

PROMPT, FLUX2 = "a sks cat", ("flux2", "flux2_dev")
GUIDED: dict[str, dict[str, Any]] = {
    "flux": {"guidance_scale": 3.0},
    "flux2": {"guidance_scale": 3.0},  # its negative prompt is empty
    "flux2_dev": {"guidance_scale": 3.0},
    "qwen_image": {"negative_prompt": "snow", "true_cfg_scale": 3.0},
    "sana": {"negative_prompt": "", "guidance_scale": 3.0, **UNBINNED},  # others would be enhanced here
}


def opened(folder: Path) -> FlowBase:
    base = open_base(folder)
    assert isinstance(base, FlowBase)
    return base


def stock(folder: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unpacked(pipe: Any, family: str, tokens: Tensor) -> Tensor:
    """Return what a pipeline's scheduler sees as latents (b, c, h, w), by the pipeline's own methods."""
    side = SIDE // pipe.vae_scale_factor
    if family in FLUX2:
        ids = pipe._prepare_latent_ids(torch.empty(1, 1, side // 2, side // 2))
        return pipe._unpatchify_latents(pipe._unpack_latents_with_ids(tokens, ids))
    if tokens.ndim == 3:
        latents: Tensor = pipe._unpack_latents(tokens, SIDE, SIDE, pipe.vae_scale_factor)
        return latents.squeeze(2) if latents.ndim == 5 else latents
    return tokens


@every_family
def test_what_is_predicted_is_what_the_pipeline_gets_and_steps_along(
    family: str, flow_base: Bases, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, pipe = opened(flow_base(family)), stock(flow_base(family))
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    step = pipe.scheduler.step

    def watched(velocity: Tensor, timestep: Tensor, latents: Tensor, **more: Any) -> Any:
        seen.append((velocity, timestep, latents))
        return step(velocity, timestep, latents, **more)

    monkeypatch.setattr(pipe.scheduler, "step", watched)
    arguments = UNGUIDED.get(family, {"guidance_scale": 1.0})
    pipe(prompt=PROMPT, height=SIDE, width=SIDE, num_inference_steps=3, output_type="latent", **arguments)
    with torch.no_grad():
        embeddings = base.load_text_encoders().encode([PROMPT])
        for velocity, timestep, latents in seen:
            noisy = unpacked(pipe, family, latents)
            found = base.predict(base.load_denoiser(), noisy, timestep[None], embeddings)
            # FLUX.2's pipelines hand on a transposed view, which matrices are multiplied with otherwise
            assert_close(found, unpacked(pipe, family, velocity), atol=1e-5 * (family in FLUX2), rtol=0)
    assert len(seen) == 3


@every_family
def test_pictures_are_the_pipelines(family: str, flow_base: Bases) -> None:
    base, pipe = opened(flow_base(family)), stock(flow_base(family))
    guided = GUIDED.get(family, {"negative_prompt": "snow", "guidance_scale": 3.0})
    denoiser = base.load_denoiser()
    with torch.no_grad():
        encode, how = base.load_text_encoders().encode, {"num_steps": 2, "guidance_scale": 3.0, "seed": 4}
        without = encode([guided.get("negative_prompt", "")]) if base.is_guided(denoiser, 3.0) else None
        size, texts = (SIDE, 2 * SIDE), (encode([PROMPT]), without)
        denoising = Denoising(base, denoiser, base.load_scheduler(), texts, size=size, **how)  # type: ignore[arg-type]
        latents = denoise(denoising, denoiser, lambda: None)
    (picture,) = base.decode_latents(base.load_vae(), latents)
    (expected,) = pipe(
        prompt=PROMPT,
        height=SIDE,
        width=2 * SIDE,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(4),
        **guided,
    ).images
    assert picture.size == expected.size == (2 * SIDE, SIDE)
    difference = np.abs(np.asarray(picture, np.int16) - np.asarray(expected, np.int16))
    assert difference.max() <= 1  # of 255, where a half is rounded
    assert np.asarray(picture).std() > 2


@every_family
def test_the_latents_of_a_picture_decode_as_the_autoencoder_would_have_it(
    family: str, flow_base: Bases
) -> None:
    base = opened(flow_base(family))
    vae, pixels = base.load_vae(), torch.rand(1, 3, SIDE, SIDE) * 2 - 1
    mean, std = base.encode_images(vae, pixels)
    latents = base.scale_latents(vae, mean)
    assert mean.shape == std.shape == latents.shape == (1, latents.shape[1], SIDE // 2, SIDE // 2)
    with torch.no_grad():
        plain = vae.decode(mean[:, :, None] if family == "qwen_image" else mean).sample.squeeze(2)
    (picture,) = base.decode_latents(vae, latents)
    expected = (plain[0].permute(1, 2, 0) * 127.5 + 127.5).clamp(0, 255).round()
    assert (torch.from_numpy(np.array(picture)).float() - expected).abs().max() <= 1
    if family in FLUX2:
        pipe = flow_pipeline(family)
        own = pipe._unpatchify_latents(pipe._encode_vae_image(pixels, torch.Generator()))
        assert_close(latents, own)
        assert not std.any()


@every_family
def test_a_prompt_means_the_same_alone_and_beside_a_longer_one(family: str, flow_base: Bases) -> None:
    base = opened(flow_base(family))
    prompts = [PROMPT, "a photo of a dog in the snow"]
    recall, denoiser = remember(base.load_text_encoders(), prompts), base.load_denoiser()
    channels, timesteps = base.settings["in_channels"] // base.packed**2, torch.tensor([900.0, 100.0])
    latents = torch.randn(2, channels, 16, 16)
    with torch.no_grad():
        together = base.predict(denoiser, latents, timesteps, recall(prompts))
        for row, prompt in enumerate(prompts):
            rows = slice(row, row + 1)
            alone = base.predict(denoiser, latents[rows], timesteps[rows], recall([prompt]))
            assert_close(together[rows], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shift", ["auto", "none", "2.5"])
@every_family
def test_along_its_velocities_noise_flows_to_the_picture(family: str, shift: str, flow_base: Bases) -> None:
    noise = opened(flow_base(family)).load_noise(timestep_shift=shift)
    picture, start, shape = torch.randn(1, 4, 16, 16), torch.randn(1, 4, 16, 16), (4, 16, 16)
    sigmas = noise.sigmas(shape)
    assert sigmas[0] == 1
    assert (sigmas.diff() < 0).all()
    z = start
    for here, there in zip(sigmas, [*sigmas[1:], torch.tensor(0.0)], strict=True):
        timesteps = here[None] * 1000
        assert_close(z, noise.add(picture, start, timesteps), atol=1e-4, rtol=0)
        z = z + (there - here) * noise.target(picture, start, timesteps)
    assert_close(z, picture, atol=1e-4, rtol=0)


def shift_of(noise: FlowNoise, side: int) -> float:
    """Return s where σ = s x / (1 + (s - 1) x) for x = 1/2: latents are half as large as pictures here."""
    middle = noise.sigmas((4, side // 8, side // 8))[500].item()
    return middle / (1 - middle)


def test_auto_shifts_as_the_base_was_trained_and_a_number_by_that(flow_base: Bases) -> None:
    bases = {name: opened(flow_base(name)) for name in FLOW_PIPELINES}
    for wanted, expected in (("none", 1.0), ("2.5", 2.5)):
        given = [shift_of(base.load_noise(timestep_shift=wanted), 512) for base in bases.values()]
        assert given == pytest.approx([expected] * len(bases))
    found = {name: base.load_noise() for name, base in bases.items()}
    static = {"sd3": 3.0, "z_image": 6.0, "chroma": 1.0, "sana": 3.0}
    for name, shift in static.items():
        assert [shift_of(found[name], side) for side in (512, 1024)] == pytest.approx([shift] * 2)
    for name in ("flux", *FLUX2):  # 1,024 and 4,096 tokens
        shifts = [shift_of(found[name], side) for side in (512, 1024)]
        assert shifts == pytest.approx([math.exp(0.63), math.exp(1.15)], rel=1e-4)
    sigmas, x = found["qwen_image"].sigmas((4, 128, 128)), torch.arange(1000, 0, -1) / 1000
    shift = math.exp(0.5 + 0.4 * (4096 - 256) / (8192 - 256))
    shifted = shift * x / (1 + (shift - 1) * x)
    assert sigmas[-1].item() == pytest.approx(0.02)
    assert_close(sigmas, 1 - (1 - shifted) * 0.98 / (1 - shifted[-1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode", "cosmap", "sigma_sqrt"])
def test_schemes_draw_and_weigh_as_diffusers_scripts_do(scheme: str, flow_base: Bases) -> None:
    base = opened(flow_base("sd3"))
    noise, scheduler = base.load_noise(scheme), FlowMatchEulerDiscreteScheduler(shift=3.0)
    generators = [torch.Generator().manual_seed(n) for n in range(2000)]
    drawn = torch.stack([noise.draw_timestep(each, (4, 16, 16)) for each in generators])
    assert torch.isin(drawn, scheduler.timesteps).all()
    places = torch.searchsorted(-scheduler.timesteps, -drawn).double() / 1000
    low = {"logit_normal": 0.338, "mode": 0.384}.get(scheme, 0.25)
    assert [places.quantile(share).item() for share in (0.25, 0.5)] == pytest.approx([low, 0.5], abs=0.03)
    sigmas = drawn / 1000
    weights = {"cosmap": 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2)), "sigma_sqrt": sigmas**-2}
    assert_close(noise.weights(drawn), weights.get(scheme, torch.ones_like(sigmas)))


@pytest.mark.parametrize("preset", ["attention", "attention_and_feedforward"])
@every_family
def test_every_adapted_projection_has_a_gradient(
    family: str, preset: str, flow_base: Bases, tmp_path: Path
) -> None:
    flags: Any = {"pretrained_model_name_or_path": str(flow_base(family)), "resolution": SIDE}
    flags |= {"target_modules": preset, "adapter": "ether"}
    if family == "sana" and preset != "attention":  # its feed-forward layers are convolutions
        with pytest.raises(ValueError, match="matches no module of the base; use attention, or"):
            load(config(tmp_path, **flags))
        return
    run = load(config(tmp_path, **flags))
    found = gradients(run, next(batches(run)))
    in_training = [name for name, each in run.unet.named_parameters() if each.requires_grad]
    assert [name for name in in_training if not found[f"unet.{name}"].any()] == []
    assert any(re.search(r"\.ff\.|mlp\.net|feed_forward", name) for name in found) == (preset != "attention")


COUNTS = {
    "sd3": (371_712, 1_486_848),
    "flux": (817_152, 3_268_608),
    "flux2": (430_080, 2_334_720),
    "flux2_dev": (1_867_776, 10_420_224),
    "z_image": (522_240, 2_088_960),
    "qwen_image": (1_468_416, 5_873_664),
    "chroma": (817_152, 3_268_608),
    "sana": (358_400, 1_433_600),
}
WITH_UNUSED = {"sd3": (373_248, 1_492_992), "qwen_image": (1_474_560, 5_898_240)}
"""With the projections of the last block that get no gradient: one of SD 3.5, two of Qwen-Image."""


@every_family
def test_real_transformers_have_so_many_parameters(family: str) -> None:
    kind: Any = next(each for each in FAMILIES if each.pipeline_class is type(flow_pipeline(family)))
    with torch.device("meta"):
        model = kind.classes["transformer"](**FLOW_CONFIGS[family])
    place: Any = {"name": "real", "folder": Path(), "vae_folder": Path(), "settings": model.config}
    numbers: Any = {"vae_scale_factor": 8, "native_size": 1024, "size_multiple": 16, "guidance_scale": 1.0}
    base = kind(**place, **numbers, is_inpainting=False, prediction_type="flow")
    linears = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}

    def count(pattern: str) -> tuple[int, int]:
        chosen = [each for name, each in linears.items() if re.fullmatch(pattern, name)]
        widths = [(each.in_features, each.out_features) for each in chosen]
        return sum(ins for ins, _ in widths), sum(2 * (ins + outs) for ins, outs in widths)

    assert count(base.targets["attention"]) == COUNTS[family]
    assert count(base.attention) == WITH_UNUSED.get(family, COUNTS[family])
    added = attach_new(model, peft_config(AdapterConfig(), "unet", base), seed=0, part="unet")
    assert sum(each.numel() for each in added) == COUNTS[family][1]


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "another transformer": ("model_index.json", {"transformer": ["", "X"]}, "transformer .* class X"),
    "another VAE": ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "vae .* AutoencoderTiny"),
    "no text encoder": ("model_index.json", {"text_encoder": [None, None]}, "text_encoder .* None"),
    "another noise": ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
    "another pipeline": ("model_index.json", {"_class_name": "WanPipeline"}, "WanPipeline; use .*FLUX.1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_parts_that_are_not_handled_are_refused_by_name(case: str, flow_base: Bases, tmp_path: Path) -> None:
    file, changes, message = WRONG[case]
    shutil.copytree(flow_base("flux"), tmp_path / "base")
    path = tmp_path / "base" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        load(config(tmp_path, resolution=SIDE))


def test_a_processor_without_torchvision_is_refused(
    flow_base: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(flow_base("flux2_dev"), tmp_path / "base")
    path = tmp_path / "base" / "model_index.json"
    index = json.loads(path.read_text()) | {"tokenizer": ["transformers", "PixtralProcessor"]}
    path.write_text(json.dumps(index))
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ValueError, match=r"PixtralProcessor, which needs torchvision.*pip install torch"):
        opened(tmp_path / "base")


def test_sd_3_may_lack_its_largest_text_encoder(tmp_path: Path) -> None:
    pipe = flow_pipeline("sd3")
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path, text_encoder_3=None, tokenizer_3=None)
    with torch.no_grad():
        found = opened(tmp_path).load_text_encoders().encode([PROMPT])
        expected, _, pooled, _ = pipe.encode_prompt(*[[PROMPT]] * 3, do_classifier_free_guidance=False)
    assert torch.equal(found.sequence, expected)
    assert found.pooled is not None
    assert torch.equal(found.pooled, pooled)


def test_cuts_are_said_of_the_tokenizer_that_reads_most(flow_base: Bases) -> None:
    limits = {name: opened(flow_base(name)).load_tokenizers()[0].model_max_length for name in ("sd3", "flux")}
    assert limits == {"sd3": 512, "flux": 512}


UNFITTING: dict[str, tuple[str, dict[str, Any], str]] = {
    "min-SNR": ("flux", {"snr_gamma": 5.0}, "snr_gamma .* flow matching"),
    "text encoder": ("sd3", {"train_text_encoder": True}, "train_text_encoder is for Stable Diffusion"),
    "negative": ("flux", {"validation_negative_prompt": "x"}, "negative_prompt has no effect .* Flux 1"),
    "compiled": ("sd3", {"torch_compile": True}, "torch_compile is not for a base of Stable Diffusion 3"),
    "eager": ("flux2", {"attention": "eager"}, "attention=eager .* use one of auto, sdpa"),
    "tokenizer": ("sana", {"tokenizer_name": "@photos"}, "leave tokenizer_name out"),
    "scheme": ("tiny_world", {"weighting_scheme": "mode"}, "weighting_scheme=mode is of flow matching"),
    "shift": ("tiny_world", {"timestep_shift": "3"}, "timestep_shift=3 is of flow matching"),
}


@pytest.mark.parametrize("case", UNFITTING)
def test_what_a_family_has_not_is_refused_by_name(case: str, flow_base: Bases, tmp_path: Path) -> None:
    family, flags, message = UNFITTING[case]
    base = family if family == "tiny_world" else str(flow_base(family))
    (tmp_path / "photos").mkdir()
    flags = {name: str(tmp_path / "photos") if value == "@photos" else value for name, value in flags.items()}
    run = config(tmp_path, pretrained_model_name_or_path=base, resolution=64, **flags)
    with pytest.raises(ValueError, match=message):
        check_run(run, make_accelerator(run.compute))
