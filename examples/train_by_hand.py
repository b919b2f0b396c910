"""Train an ETHER+ adapter by a loop of your own: `python examples/train_by_hand.py photos my-adapter`."""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image, ImageOps
from torch.nn.functional import mse_loss

from ether_diffusion import EtherConfig, prepared_adapters, save_ether
from ether_diffusion.tiny_world import tiny_world_path

SIZE = 128  # px; the embedded base's own, 512 for Stable Diffusion 1.5
PROMPT = "a sks animal"


def read_photos(folder: Path) -> torch.Tensor:
    """Return the photos of a folder, cropped square: (b, 3, SIZE, SIZE) in [-1, 1]."""
    pictures = [
        np.asarray(ImageOps.fit(ImageOps.exif_transpose(Image.open(path)).convert("RGB"), (SIZE, SIZE)))
        for path in sorted(folder.glob("*.png")) + sorted(folder.glob("*.jpg"))
    ]
    return torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1


def train(photos: Path, output: Path, steps: int = 100) -> None:
    """Train on a folder of photos, and save the adapter."""
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_world_path("tiny_world_2"))
    noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    pipe.unet.add_adapter(EtherConfig(variant="ether_plus"))
    trained = [p for p in pipe.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=6e-3, weight_decay=0.0)

    with torch.no_grad():
        latents = pipe.vae.encode(read_photos(photos)).latent_dist.mode() * pipe.vae.config.scaling_factor
        text, _ = pipe.encode_prompt(PROMPT, "cpu", len(latents), do_classifier_free_guidance=False)

    for step in range(steps):
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(latents),))
        noisy = noise_scheduler.add_noise(latents, noise, timesteps)
        target = noise_scheduler.get_velocity(latents, noise, timesteps)  # the noise for Stable Diffusion 1.5
        with prepared_adapters(pipe.unet):
            loss = mse_loss(pipe.unet(noisy, timesteps, text).sample, target)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    save_ether(pipe, output, trigger=PROMPT)


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]))
