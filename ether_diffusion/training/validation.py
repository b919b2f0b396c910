"""Validation images: the same prompts and seeds each time, base and steps side by side on one sheet."""

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from ether_diffusion.bases import Denoising, denoise, fault_of
from ether_diffusion.contact_sheet import draw_contact_sheet
from ether_diffusion.control import control_batch, controlled
from ether_diffusion.durable_files import delete, write_files
from ether_diffusion.pipelines.metadata import png_bytes
from ether_diffusion.training.config import ControlConfig
from ether_diffusion.training.dataset import control_finisher, detector_of
from ether_diffusion.training.decoding import BLACK, WHITE, decode_photo
from ether_diffusion.training.loop import averaged
from ether_diffusion.training.methods import adapters_off
from ether_diffusion.training.processes import track_images
from ether_diffusion.training.result import FINAL, SAMPLES_FOLDER
from ether_diffusion.wording import printable

if TYPE_CHECKING:
    from ether_diffusion.training.setup import Run

logger = logging.getLogger(__name__)

SHEET, DRAWN, BASE_FOLDER, CONTROL_FOLDER = "contact_sheet.png", "drawn.json", "base", "control"
_STEP = re.compile(r"step-(\d+)")

Pictures = list[list[Image.Image]]
"""By prompt and seed."""


@torch.no_grad()
def draw(
    run: "Run",
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    num_steps: int,
    guidance_scale: float,
    negative_prompt: str = "",
    controls: Sequence[Tensor] = (),
    with_adapter: bool = True,
) -> Pictures:
    """Draw prompts with the models in training as they are; training goes on as if it had not.

    controls are a control image (1, 3, height, width) for each prompt, or none. Dropout is off, nothing is
    compiled, and the run's `check` may raise between two denoising steps.
    """
    rows, base, encoder = [], run.base, run.trainer.control
    models = [run.unet, *(part.model for part in run.trainer.parts if part.part != "unet")]
    how: Any = {"size": run.size, "num_steps": num_steps, "guidance_scale": guidance_scale}
    with ExitStack() as rest:
        rest.enter_context(run.accelerator.autocast())
        rest.enter_context(torch.compiler.set_stance("force_eager"))
        if not with_adapter:
            rest.enter_context(adapters_off(models))
        for model in models:
            rest.callback(model.train, model.training)
            model.eval()
        vae, scheduler = base.load_vae().to(run.unet.device), base.load_scheduler()
        is_guided = base.is_guided(run.unet, guidance_scale)
        for number, prompt in enumerate(prompts):
            with ExitStack() as stack:
                if controls and encoder is not None:
                    stack.enter_context(controlled(run.unet, encoder, controls[number]))
                texts = run.encode([prompt]), run.encode([negative_prompt]) if is_guided else None
                begun = [
                    Denoising(base, run.unet, deepcopy(scheduler), texts, seed=seed, **how) for seed in seeds
                ]
                latents = [denoise(each, run.unet, run.check) for each in begun]
            rows.append([image for each in latents for image in base.decode_latents(vae, each)])
            for seed, image in zip(seeds, rows[-1], strict=True):
                if (fault := fault_of(image)) is not None:
                    logger.warning('the picture of "%s" with seed %d %s', prompt, seed, fault)
    return rows


def validation_controls(config: ControlConfig | None, size: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return the control image (1, 3, height, width) of each validation prompt; none without control.

    A ValueError says that one cannot be read, or has other proportions than what is drawn.
    """
    if config is None:
        return ()
    (height, width), detector = size, detector_of(config)
    background = BLACK if detector is None else WHITE  # photos lie over white in training, too
    found = []
    for path in config.validation_image:
        picture, alpha = decode_photo(path, background=background, min_side=1)
        try:
            if detector is None:
                picture = control_finisher(config)(picture)
            else:
                picture = detector.draw_at(picture, alpha, width=width, height=height)
        except ValueError as reason:
            raise ValueError(f"validation_image {printable(path)}: {reason}") from None
        kind = config.control_type
        found.append(control_batch(picture, height=height, width=width, control_type=kind))
    return tuple(found)


class Validation:
    """The pictures of a run's prompts with seed, seed + 1, …, in its folder."""

    def __init__(self, run: "Run") -> None:
        self.run, self.root = run, run.config.output.output_dir / SAMPLES_FOLDER
        self.config, seed = run.config.validation, run.config.compute.seed
        self.prompts = self.config.validation_prompt
        self.seeds = range(seed, seed + self.config.num_validation_images)
        given = self.config.validation_guidance_scale
        self.guidance_scale = run.base.guidance_scale if given is None else given
        numbers = range(len(self.prompts))
        self.files = [f"prompt-{prompt:02d}_seed-{seed}.png" for prompt in numbers for seed in self.seeds]

    def draw(self, *, of_base: bool = False) -> Pictures:
        """Draw all prompts; of_base without adapter and control images."""
        return draw(
            self.run,
            self.prompts,
            seeds=self.seeds,
            num_steps=self.config.validation_num_inference_steps,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.config.validation_negative_prompt or "",
            controls=() if of_base else self.run.controls,
            with_adapter=not of_base,
        )

    def draw_step(self, step: int) -> None:
        """Draw what was learned after so many updates, unless that is there, and show it to the trackers."""
        name, controls = f"step-{step:06d}", self.run.controls
        if self._has(name):
            return
        if controls and not self._has(CONTROL_FOLDER):
            processor = VaeImageProcessor(do_normalize=False)
            images = [processor.postprocess(image, do_denormalize=[False])[0] for image in controls]
            self._save([[image] * len(self.seeds) for image in images], CONTROL_FOLDER)
        if not self._has(BASE_FOLDER):
            self._save(self.draw(of_base=True), BASE_FOLDER)
        with averaged(self.run.trainer):
            rows = self.draw()
        self._save(rows, name)
        self._write_sheet()
        track_images(self.run.accelerator, rows, step)

    def draw_final(self) -> list[tuple[str, str]]:
        """Draw with what is loaded; return prompts, and the pictures' paths in the run's folder."""
        if not self.prompts:
            return []
        self._save(self.draw(), FINAL)
        prompts = [prompt for prompt in self.prompts for _ in self.seeds]
        paths = [f"{SAMPLES_FOLDER}/{FINAL}/{file}" for file in self.files]
        return list(zip(prompts, paths, strict=True))

    def forget(self, step: int) -> None:
        """Delete the pictures of later steps, and all where they were drawn of other prompts or otherwise."""
        facts = self.root / DRAWN
        is_same = facts.is_file() and facts.read_bytes() == self._drawn()
        for path in sorted(self.root.iterdir()) if self.root.is_dir() else ():
            match = _STEP.fullmatch(path.name)
            is_later = match is not None and int(match[1]) > step
            if is_later or (not is_same and (match or path.name in (BASE_FOLDER, CONTROL_FOLDER))):
                logger.info("%s is of what is now trained or drawn otherwise; it is drawn again", path)
                delete(path)

    def _has(self, name: str) -> bool:
        return all((self.root / name / file).is_file() for file in self.files)

    def _save(self, rows: Pictures, name: str) -> None:
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        images = [png_bytes(image) for row in rows for image in row]
        write_files(self.root, {DRAWN: self._drawn()})
        write_files(folder, dict(zip(self.files, images, strict=True)))

    def _drawn(self) -> bytes:
        """Say what a picture depends on besides the adapter and its name."""
        facts = {
            "prompts": (*self.prompts, self.config.validation_negative_prompt or ""),
            "steps": self.config.validation_num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "size": self.run.size,
        }
        if self.run.controls:
            pixels = torch.cat(self.run.controls).contiguous().numpy().tobytes()
            facts["controls_sha256"] = hashlib.sha256(pixels).hexdigest()
        return json.dumps(facts, indent=1).encode()

    def _write_sheet(self) -> None:
        """Draw all there is: a row for each prompt and seed, a column for the base and each step."""
        steps = sorted(int(match[1]) for path in self.root.iterdir() if (match := _STEP.fullmatch(path.name)))
        columns = {CONTROL_FOLDER: "control", BASE_FOLDER: "base"}
        columns |= {f"step-{step:06d}": f"step {step}" for step in steps}
        columns = {name: label for name, label in columns.items() if self._has(name)}
        sheet = draw_contact_sheet(
            [[Image.open(self.root / name / file) for name in columns] for file in self.files],
            row_labels=[f"{prompt} · seed {seed}" for prompt in self.prompts for seed in self.seeds],
            column_labels=list(columns.values()),
        )
        write_files(self.root, {SHEET: png_bytes(sheet)})
