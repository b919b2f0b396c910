"""Should an adapter work less at some timesteps? W + s(t) (W' - W), in training and whenever it is asked.

T-LoRA (Soboleva et al. 2025, arXiv:2507.05964) trains less of a LoRA at noisy steps, where it overfits.
`python -m research.study_timesteps --seeds 0 1 --output_dir runs/timesteps` trains ETHER+ with s(t) of
several forms, about half a minute each on one CPU core, and writes timesteps.json. It is the study alone that
can do this: training has no such option, as no LoRA file could hold what came of it. None of the subjects is
the benchmark's.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from ether_diffusion import EtherConfig
from ether_diffusion.tiny_world.concepts import find_concept
from ether_diffusion.tiny_world.pictures import to_tensor
from ether_diffusion.tiny_world.subjects import photos_of
from ether_diffusion.tiny_world.world import draw
from ether_diffusion.tuner.linear import EtherLinear
from research import BASE
from research.base import load_base, side_of
from research.scene_loss import scene_scores
from research.study import (
    Scores,
    Training,
    cells_json,
    kept_scores,
    run_study,
    study_parser,
    summarise,
    write_study,
)

SUBJECTS = ("panda", "sailboat")
BATCH = 4
SCHEDULES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "1": torch.ones_like,
    "1 - t/2": lambda t: 1 - t / 2,
    "1 - t": lambda t: 1 - t,
    "1/2 + t/2": lambda t: (1 + t) / 2,
}
"""Strengths of rows by their timesteps, from 0 without noise to 1."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study. Return 0, or 2 for what the user can mend."""
    parser = study_parser(__doc__, SUBJECTS, draws=False)
    parser.add_argument("--steps", type=int, default=100, help="of the trainings (100)")
    parser.add_argument("--learning_rate", type=float, default=6e-3, help="of ETHER+ (0.006)")
    return run_study("study_timesteps", parser, _run, arguments)


def _run(parsed: argparse.Namespace) -> None:
    results = []
    for number, schedule in enumerate(SCHEDULES):
        for subject in parsed.subjects:
            for seed in parsed.seeds:
                asked = {"schedule": schedule, "steps": parsed.steps, "subject": subject, "seed": seed}
                asked |= {"base": BASE, "learning_rate": parsed.learning_rate}
                place = Path(f"{number}", f"{subject.replace(' ', '_')}_{seed}")
                training = Training(asked, ("schedule", "steps"), place, {})
                results.append((training, _learned(training, parsed.output_dir)))
    found = {
        "base": BASE,
        "subjects": list(parsed.subjects),
        "seeds": list(parsed.seeds),
        "learning_rate": parsed.learning_rate,
        "runs": [{**training.asked, "scores": dict(scores)} for training, scores in results],
        "schedules": cells_json(summarise(results)),
    }
    write_study(parsed.output_dir, "timesteps", found)


def _learned(training: Training, root: Path) -> Scores:
    """Train and measure, or read what came of it before."""
    asked: Mapping[str, Any] = training.asked

    def measure() -> Scores:
        pipeline = load_base()
        learn(pipeline, training)
        return scene_scores(pipeline, asked["subject"])

    return kept_scores(root / training.folder, training.asked, measure)


def learn(pipeline: StableDiffusionPipeline, training: Training) -> None:
    """Train ETHER+ on a subject's photos, in place, and leave it on the UNet with its schedule."""
    asked: Mapping[str, Any] = training.asked
    latents, embeddings = _photos(pipeline, asked["subject"])
    torch.manual_seed(asked["seed"])
    unet = pipeline.unet.requires_grad_(False)
    unet.add_adapter(EtherConfig(variant="ether_plus"))
    work_by_timestep(unet, SCHEDULES[asked["schedule"]])
    trained = [each for each in unet.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=asked["learning_rate"], weight_decay=0.0)
    noises = DDPMScheduler.from_config(pipeline.scheduler.config)
    for _ in range(asked["steps"]):
        chosen = torch.randint(len(latents), (BATCH,))
        timesteps = torch.randint(noises.config.num_train_timesteps, (BATCH,))
        noise = torch.randn_like(latents[chosen])
        noisy = noises.add_noise(latents[chosen], noise, timesteps)
        predicted = unet(noisy, timesteps, embeddings[chosen]).sample
        loss = F.mse_loss(predicted, noises.get_velocity(latents[chosen], noise, timesteps))
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def _photos(pipeline: StableDiffusionPipeline, subject: str) -> tuple[Tensor, Tensor]:
    """Return a subject's photos as scaled latents (n, 4, h, w), and its captions (n, tokens, width)."""
    photos = photos_of(find_concept(subject))
    pixels = to_tensor([draw(photo.scene, size=side_of(pipeline)) for photo in photos])
    latents = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
    captions = [photo.caption for photo in photos]
    tokens = pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return latents, pipeline.text_encoder(tokens.input_ids)[0]


def work_by_timestep(unet: nn.Module, schedule: Callable[[Tensor], Tensor]) -> None:
    """Let the adapters of a UNet work on each row of a batch as strongly as its timestep says."""
    strengths = torch.ones(1)

    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal strengths
        strengths = schedule(inputs[1].float() / 1000)

    def weaken(layer: EtherLinear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        alone = layer.base_layer(*inputs)
        changed: Tensor = alone + strengths.view(-1, *[1] * (output.dim() - 1)) * (output - alone)
        return changed

    unet.register_forward_pre_hook(look)
    for module in unet.modules():
        if isinstance(module, EtherLinear):
            module.register_forward_hook(weaken)


if __name__ == "__main__":
    sys.exit(main())
