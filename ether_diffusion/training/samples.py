"""Validation images: the same prompts and seeds each time, base and steps side by side on one sheet."""

import hashlib
import io
import json
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from ether_diffusion.bases import Base, PromptEmbeddings, decode_latents, fault_of
from ether_diffusion.contact_sheet import draw_contact_sheet
from ether_diffusion.control import ControlEncoder, controlled
from ether_diffusion.durable_files import delete, write_files
from ether_diffusion.training.config import ValidationConfig

logger = logging.getLogger(__name__)

FOLDER, SHEET, BASE_FOLDER, DRAWN = "samples", "contact_sheet.png", "base", "drawn.json"
CONTROL_FOLDER = "control"
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Sampler:
    """What is drawn for validation: each prompt with seed, seed + 1, …; size is (height, width) in px.

    With control, each prompt has a control image (1, 3, height, width), which encoder encodes.
    """

    base: Base
    config: ValidationConfig
    folder: Path
    seed: int
    size: tuple[int, int]
    encoder: ControlEncoder | None = None
    controls: tuple[Tensor, ...] = ()

    @property
    def prompts(self) -> tuple[str, ...]:
        """Every prompt that is embedded for it, the negative one last."""
        return (*self.config.validation_prompt, self.config.validation_negative_prompt or "")

    @torch.no_grad()
    def draw(
        self,
        unet: UNet2DConditionModel,
        encode: Callable[[Sequence[str]], PromptEmbeddings],
        *,
        check: Callable[[], None] = lambda: None,
        with_control: bool = True,
    ) -> list[list[Image.Image]]:
        """Return the images of each prompt, one a seed; check may raise between two denoising steps."""
        pipeline = self._pipeline(unet)
        was_training = unet.training
        unet.eval()
        try:
            rows = []
            for number, prompt in enumerate(self.config.validation_prompt):
                with self._controlled(unet, number) if with_control else nullcontext():
                    latents = [
                        self._latents(pipeline, encode([prompt, self.prompts[-1]]), self.seed + index, check)
                        for index in range(self.config.num_validation_images)
                    ]
                rows.append([image for each in latents for image in decode_latents(pipeline.vae, each)])
                self._say_faults(prompt, rows[-1])
            return rows
        finally:
            unet.train(was_training)

    def _say_faults(self, prompt: str, images: Sequence[Image.Image]) -> None:
        for index, fault in enumerate(map(fault_of, images)):
            if fault is not None:
                logger.warning('the picture of "%s" with seed %d %s', prompt, self.seed + index, fault)

    def _controlled(self, unet: UNet2DConditionModel, prompt: int) -> AbstractContextManager[None]:
        if self.encoder is None:
            return nullcontext()
        return controlled(unet, self.encoder, self.controls[prompt])

    def control_rows(self) -> list[list[Image.Image]]:
        """Return the control image of each prompt, once for each of its images."""
        processor = VaeImageProcessor(do_normalize=False)
        found = [
            processor.postprocess(image, output_type="pil", do_denormalize=[False]) for image in self.controls
        ]
        return [[*images] * self.config.num_validation_images for images in found]

    def _latents(
        self, pipeline: DiffusionPipeline, embeddings: PromptEmbeddings, seed: int, check: Callable[[], None]
    ) -> torch.Tensor:
        def interruptible(_: object, step: int, timestep: object, values: dict[str, Any]) -> dict[str, Any]:
            check()
            return values

        unet = pipeline.unet
        embedded = embeddings.to(unet.device, unet.dtype)
        arguments: dict[str, Any] = {
            "prompt_embeds": embedded.sequence[:1],
            "negative_prompt_embeds": embedded.sequence[1:],
        }
        if embedded.pooled is not None:
            arguments["pooled_prompt_embeds"] = embedded.pooled[:1]
            arguments["negative_pooled_prompt_embeds"] = embedded.pooled[1:]
        height, width = self.size
        latents: torch.Tensor = pipeline(
            **arguments,
            height=height,
            width=width,
            num_inference_steps=self.config.validation_num_inference_steps,
            guidance_scale=self.guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            callback_on_step_end=interruptible,
        ).images
        return latents

    @property
    def guidance_scale(self) -> float:
        """The guidance given, or the base's own."""
        given = self.config.validation_guidance_scale
        return self.base.guidance_scale if given is None else given

    def _pipeline(self, unet: UNet2DConditionModel) -> DiffusionPipeline:
        """Return the base's pipeline around the UNet in training, without what embeddings replace."""
        absent: dict[str, None] = {"text_encoder": None, "tokenizer": None}
        if self.base.family == "sdxl":
            absent |= {"text_encoder_2": None, "tokenizer_2": None}
        else:
            absent |= {"safety_checker": None, "feature_extractor": None}
        vae = self.base.load_vae().to(unet.device)
        pipeline: DiffusionPipeline = self.base.load_pipeline(unet=unet, vae=vae, **absent)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def save(self, rows: Sequence[Sequence[Image.Image]], name: str) -> list[Path]:
        """Write images into a folder of this name beside those of other steps; return their paths."""
        folder = self.folder / FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        files = {
            _file_name(prompt, self.seed + index): _png(image)
            for prompt, row in enumerate(rows)
            for index, image in enumerate(row)
        }
        write_files(self.folder / FOLDER, {DRAWN: self._drawn()})
        write_files(folder, files)
        return [folder / file for file in files]

    def has(self, name: str) -> bool:
        """Say whether all images of that name are there."""
        folder = self.folder / FOLDER / name
        return all((folder / file).is_file() for file in self._files())

    def forget(self, step: int) -> None:
        """Delete the images of later steps, and all where they were drawn of other prompts or otherwise."""
        root = self.folder / FOLDER
        if not root.is_dir():
            return
        is_same = (root / DRAWN).is_file() and (root / DRAWN).read_bytes() == self._drawn()
        for path in sorted(root.iterdir()):
            match = _STEP.fullmatch(path.name)
            if (match and int(match[1]) > step) or (
                not is_same and (match or path.name in (BASE_FOLDER, CONTROL_FOLDER))
            ):
                logger.info("%s is of what is now trained or drawn otherwise; it is drawn again", path)
                delete(path)

    def _drawn(self) -> bytes:
        """Say what a picture depends on besides the adapter and its name."""
        config = self.config
        facts = {
            "prompts": self.prompts,
            "steps": config.validation_num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "size": self.size,
        }
        if self.controls:
            pixels = torch.cat(self.controls).contiguous().numpy().tobytes()
            facts["controls_sha256"] = hashlib.sha256(pixels).hexdigest()
        return json.dumps(facts, indent=1).encode()

    def write_sheet(self) -> Path:
        """Draw all there is: a row for each prompt and seed, a column for the base and each step."""
        root = self.folder / FOLDER
        found = [(match, path) for path in root.iterdir() if (match := _STEP.fullmatch(path.name))]
        steps = sorted((int(match[1]), path) for match, path in found)
        columns = [("control", root / CONTROL_FOLDER), ("base", root / BASE_FOLDER)]
        columns += [(f"step {step}", path) for step, path in steps]
        columns = [(label, path) for label, path in columns if self.has(path.name)]
        rows = [[_opened(path / file) for _, path in columns] for file in self._files()]
        labels = [
            f"{prompt} · seed {self.seed + index}"
            for prompt in self.config.validation_prompt
            for index in range(self.config.num_validation_images)
        ]
        sheet = draw_contact_sheet(rows, row_labels=labels, column_labels=[label for label, _ in columns])
        write_files(root, {SHEET: _png(sheet)})
        return root / SHEET

    def _files(self) -> list[str]:
        config = self.config
        return [
            _file_name(prompt, self.seed + index)
            for prompt in range(len(config.validation_prompt))
            for index in range(config.num_validation_images)
        ]


def step_name(step: int) -> str:
    """Return the folder name of the images drawn after so many updates."""
    return f"step-{step:06d}"


def _file_name(prompt: int, seed: int) -> str:
    return f"prompt-{prompt:02d}_seed-{seed}.png"


def _png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
