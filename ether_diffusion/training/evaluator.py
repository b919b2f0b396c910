"""What scores the pictures of a run in between: few pictures, few encoders."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec

import torch
from PIL import Image
from torch import Tensor

from ether_diffusion.adapters.models import shareable_name
from ether_diffusion.bases import Base
from ether_diffusion.metrics.encoders import (
    Encoder,
    Views,
    check_encoder,
    load_encoder,
)
from ether_diffusion.metrics.likeness import likeness_of_pairs, likeness_to, relative_drift
from ether_diffusion.metrics.scores import OTHER_PROMPTS, other_tiny_prompts, without_identifier
from ether_diffusion.strict_json import Json
from ether_diffusion.tiny_world import ALIAS, WEIGHTS_FOLDER
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.curve import Curve, Measured, draw_curve
from ether_diffusion.training.dataset import TrainingData
from ether_diffusion.training.photos import Photo

Pictures = Sequence[Sequence[Image.Image]]
"""By prompt and seed."""
MAX_PHOTOS = 32
NUM_OTHER = 4
PLACES = ("in the snow", "on a beach", "on a red background", "in a forest")
"""Contexts like those of DreamBooth's own prompts, of which Tiny World draws each, too."""

logger = logging.getLogger(__name__)


def open_evaluator(config: DreamBoothConfig, base: Base, training: TrainingData) -> "SubjectEvaluator":
    """Return the evaluator of a run, checked but not loaded.

    Raises:
        FileNotFoundError: there is no such encoder.
        ValueError: no encoder was given for a base that has none of its own, or it is none that can be used.
    """
    is_tiny = base.folder.resolve() == WEIGHTS_FOLDER.resolve()
    encoders = config.evaluation.eval_encoder or ((ALIAS,) if is_tiny else ())
    if not encoders:
        raise ValueError(
            "eval_steps needs eval_encoder with this base: clip, or a folder or hub id of one, and before it "
            "dino or dinov2 for the likeness to the photos"
        )
    offline = config.base.local_files_only
    readers = [name for name in encoders if check_encoder(name, offline=offline) in ("clip", "tiny")]
    if not readers:
        raise ValueError(
            f"eval_encoder {', '.join(encoders)} reads no texts, which likeness to prompts needs; "
            "give a further eval_encoder, as clip"
        )
    if find_spec("matplotlib") is None:
        logger.warning("no curve is drawn: pip install 'ether-diffusion[evaluate]' for matplotlib")
    others = other_tiny_prompts() if is_tiny else OTHER_PROMPTS
    prompts = config.subject_prompts
    if not prompts:
        assert config.trigger is not None
        prompts = tuple(f"{config.trigger} {place}" for place in PLACES)
    return SubjectEvaluator(
        prompts,
        tuple(each for each in others if each not in prompts)[:: len(others) // NUM_OTHER][:NUM_OTHER],
        encoders[0],
        readers[0],
        config.data.token,
        training.photos[:: -(-len(training.photos) // MAX_PHOTOS)],  # spread over all
        offline,
    )


@dataclass(eq=False)
class SubjectEvaluator:
    """Compares pictures with a subject's photos, with their prompts, and with what the base draws."""

    prompts: tuple[str, ...]
    other_prompts: tuple[str, ...]
    viewer_name: str
    reader_name: str
    identifier: str | None
    photos: Sequence[Photo]
    offline: bool
    _encoders: dict[str, Encoder] = field(default_factory=dict)
    _seen: Tensor = field(default_factory=partial(torch.empty, 0))
    _texts: Tensor = field(default_factory=partial(torch.empty, 0))
    _device: torch.device = field(default_factory=partial(torch.device, "cpu"))

    def facts(self) -> dict[str, Json]:
        """Return what scores depend on besides the pictures."""
        return {
            "likeness_by": shareable_name(self.viewer_name),
            "prompts_by": shareable_name(self.reader_name),
            "identifier": self.identifier,
            "num_photos": len(self.photos),
        }

    def load(self, device: torch.device) -> None:
        """Load the encoders; embed the photos and the prompts.

        Raises:
            ValueError: an encoder is incomplete, or a photo is gone.
        """
        for name in dict.fromkeys((self.viewer_name, self.reader_name)):
            self._encoders[name] = load_encoder(name, offline=self.offline)
        self._device = device
        with self._at_work():
            photos = [each.decode().rgb for each in self.photos]
            self._seen = Views.of(self._encoders[self.viewer_name], photos).subjects
            texts = [without_identifier(prompt, self.identifier) for prompt in self.prompts]
            self._texts = self._encoders[self.reader_name].embed_texts(texts)

    def measure(self, subject: Pictures, other: Pictures, base_other: Pictures) -> Measured:
        """Score pictures, one a prompt and seed."""
        pictures = [picture for row in subject for picture in row]
        with self._at_work():
            seen = Views.of(self._encoders[self.viewer_name], pictures)
            read = seen.whole
            if self.reader_name != self.viewer_name:
                read = self._encoders[self.reader_name].embed_images(pictures)
            drawn, base = (
                self._encoders[self.viewer_name].embed_images([each for row in rows for each in row])
                for rows in (other, base_other)
            )
            drift = relative_drift(drawn, base, torch.arange(len(base)) // len(other[0]))
        texts = self._texts.repeat_interleave(len(subject[0]), dim=0)
        return Measured(
            tuple(likeness_to(self._seen, seen.subjects).tolist()),
            tuple(likeness_of_pairs(read, texts).tolist()),
            tuple(drift.tolist()),
        )

    def draw(self, curve: Curve) -> bytes | None:
        """Return a PNG of the curve; None without matplotlib."""
        return None if find_spec("matplotlib") is None else draw_curve(curve)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Have the encoders on the device inside; between evaluations its memory is the training's."""
        models = [each.model for each in self._encoders.values() if each.kind != "tiny"]
        for model in models:
            model.to(self._device)
        try:
            yield
        finally:
            for model in models:
                model.to("cpu")
