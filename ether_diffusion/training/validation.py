"""Validation images: the same prompts and seeds each time, base and steps side by side on one sheet."""

import hashlib
import io
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from ether_diffusion.bases import fault_of
from ether_diffusion.contact_sheet import draw_contact_sheet
from ether_diffusion.control import controlled
from ether_diffusion.durable_files import delete, write_files
from ether_diffusion.training.config import control_of
from ether_diffusion.training.control import validation_controls
from ether_diffusion.training.loop import averaged
from ether_diffusion.training.methods import adapters_off
from ether_diffusion.training.result import FINAL, SAMPLES_FOLDER
from ether_diffusion.training.setup import LoadedRun

logger = logging.getLogger(__name__)

SHEET, DRAWN, BASE_FOLDER, CONTROL_FOLDER = "contact_sheet.png", "drawn.json", "base", "control"
_STEP = re.compile(r"step-(\d+)")

Pictures = list[list[Image.Image]]
"""By prompt and seed."""


@torch.no_grad()
def draw(
    run: LoadedRun,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    num_steps: int,
    guidance_scale: float,
    negative_prompt: str = "",
    controls: Sequence[Tensor] = (),
    with_adapter: bool = True,
    check: Callable[[], None] = lambda: None,
) -> Pictures:
    """Draw prompts with the models in training as they are; training goes on as if it had not.

    controls are a control image (1, 3, height, width) for each prompt, or none; check may raise between two
    denoising steps.
    """
    rows = []
    with _at_rest(run, with_adapter=with_adapter):
        pipeline = run.base.pipeline_around(run.unet)
        for number, prompt in enumerate(prompts):
            with ExitStack() as stack:
                if controls:
                    assert run.trainer.control is not None
                    stack.enter_context(controlled(run.unet, run.trainer.control.encoder, controls[number]))
                latents = [
                    run.base.draw_latents(
                        pipeline,
                        run.encode([prompt, negative_prompt]),
                        size=run.checked.size,
                        num_steps=num_steps,
                        guidance_scale=guidance_scale,
                        seed=seed,
                        check=check,
                    )
                    for seed in seeds
                ]
            rows.append([image for each in latents for image in run.base.decode_latents(pipeline.vae, each)])
            for seed, image in zip(seeds, rows[-1], strict=True):
                fault = fault_of(image)
                if fault is not None:
                    logger.warning('the picture of "%s" with seed %d %s', prompt, seed, fault)
    return rows


@contextmanager
def _at_rest(run: LoadedRun, *, with_adapter: bool) -> Iterator[None]:
    """Switch dropout off inside, and all adapters where they are not wanted; compile nothing."""
    models = [run.unet, *(part.model for part in run.trainer.parts if part.part != "unet")]
    before = [model.training for model in models]
    with ExitStack() as stack:
        stack.enter_context(run.checked.accelerator.autocast())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if not with_adapter:
            stack.enter_context(adapters_off(models))
        try:
            for model in models:
                model.eval()
            yield
        finally:
            for model, was_training in zip(models, before, strict=True):
                model.train(was_training)


class Validation:
    """The pictures of a run's prompts with seed, seed + 1, …, in its folder."""

    def __init__(self, run: LoadedRun, folder: Path, check: Callable[[], None] = lambda: None) -> None:
        self.run, self.root, self.check = run, folder / SAMPLES_FOLDER, check
        self.config, seed = run.config.validation, run.config.compute.seed
        self.prompts = self.config.validation_prompt
        self.seeds = range(seed, seed + self.config.num_validation_images)
        self.controls = validation_controls(control_of(run.config), run.checked.size)
        given = self.config.validation_guidance_scale
        self.guidance_scale = run.base.guidance_scale if given is None else given
        self.files = [
            f"prompt-{prompt:02d}_seed-{seed}.png"
            for prompt in range(len(self.prompts))
            for seed in self.seeds
        ]

    def draw(self, *, of_base: bool = False) -> Pictures:
        """Draw all prompts; of_base without adapter and control images."""
        return draw(
            self.run,
            self.prompts,
            seeds=self.seeds,
            num_steps=self.config.validation_num_inference_steps,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.config.validation_negative_prompt or "",
            controls=() if of_base else self.controls,
            with_adapter=not of_base,
            check=self.check,
        )

    def draw_step(self, step: int) -> Pictures | None:
        """Draw what was learned after so many updates, unless that is there; return what was drawn."""
        name = f"step-{step:06d}"
        if self.has(name):
            return None
        if self.controls and not self.has(CONTROL_FOLDER):
            self.save(self._control_rows(), CONTROL_FOLDER)
        if not self.has(BASE_FOLDER):
            self.save(self.draw(of_base=True), BASE_FOLDER)
        with averaged(self.run.trainer):
            rows = self.draw()
        self.save(rows, name)
        self._write_sheet()
        return rows

    def draw_final(self) -> list[tuple[str, str]]:
        """Draw with what is loaded; return prompts, and the pictures' paths in the run's folder."""
        if not self.prompts:
            return []
        self.save(self.draw(), FINAL)
        prompts = [prompt for prompt in self.prompts for _ in self.seeds]
        paths = [f"{SAMPLES_FOLDER}/{FINAL}/{file}" for file in self.files]
        return list(zip(prompts, paths, strict=True))

    def save(self, rows: Pictures, name: str) -> None:
        """Write pictures into a folder of this name beside those of other steps."""
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        images = [image for row in rows for image in row]
        write_files(self.root, {DRAWN: self._drawn()})
        write_files(folder, {file: _png(image) for file, image in zip(self.files, images, strict=True)})

    def has(self, name: str) -> bool:
        """Say whether all pictures of that name are there."""
        return all((self.root / name / file).is_file() for file in self.files)

    def forget(self, step: int) -> None:
        """Delete the pictures of later steps, and all where they were drawn of other prompts or otherwise."""
        if not self.root.is_dir():
            return
        is_same = (self.root / DRAWN).is_file() and (self.root / DRAWN).read_bytes() == self._drawn()
        for path in sorted(self.root.iterdir()):
            match = _STEP.fullmatch(path.name)
            is_later = match is not None and int(match[1]) > step
            if is_later or (not is_same and (match or path.name in (BASE_FOLDER, CONTROL_FOLDER))):
                logger.info("%s is of what is now trained or drawn otherwise; it is drawn again", path)
                delete(path)

    def _drawn(self) -> bytes:
        """Say what a picture depends on besides the adapter and its name."""
        facts = {
            "prompts": (*self.prompts, self.config.validation_negative_prompt or ""),
            "steps": self.config.validation_num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "size": self.run.checked.size,
        }
        if self.controls:
            pixels = torch.cat(self.controls).contiguous().numpy().tobytes()
            facts["controls_sha256"] = hashlib.sha256(pixels).hexdigest()
        return json.dumps(facts, indent=1).encode()

    def _control_rows(self) -> Pictures:
        processor = VaeImageProcessor(do_normalize=False)
        found = [
            processor.postprocess(image, output_type="pil", do_denormalize=[False]) for image in self.controls
        ]
        return [[*images] * len(self.seeds) for images in found]

    def _write_sheet(self) -> None:
        """Draw all there is: a row for each prompt and seed, a column for the base and each step."""
        matches = [match for path in self.root.iterdir() if (match := _STEP.fullmatch(path.name))]
        steps = sorted((int(match[1]), match[0]) for match in matches)
        columns = [(CONTROL_FOLDER, "control"), (BASE_FOLDER, "base")]
        columns += [(name, f"step {step}") for step, name in steps]
        columns = [(name, label) for name, label in columns if self.has(name)]
        sheet = draw_contact_sheet(
            [[_opened(self.root / name / file) for name, _ in columns] for file in self.files],
            row_labels=[f"{prompt} · seed {seed}" for prompt in self.prompts for seed in self.seeds],
            column_labels=[label for _, label in columns],
        )
        write_files(self.root, {SHEET: _png(sheet)})


def _png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
