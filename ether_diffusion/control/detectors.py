"""Detectors: from a photo to the control image that says where things are in it, by name.

The options of training check the names, so nothing slow is imported before something is drawn.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ether_diffusion.wording import printable

if TYPE_CHECKING:
    from PIL.Image import Image

OWN_DETECTORS = ("canny", "silhouette", "palette")
"""What needs no model: edges; the shape that the alpha channel shows; segmentation colours as they are."""
MODEL_DETECTORS = (
    *("depth_leres", "depth_leres++", "depth_midas", "depth_zoe"),
    *("lineart_anime", "lineart_coarse", "lineart_realistic", "mediapipe_face", "mlsd", "normal_bae"),
    *("openpose", "openpose_face", "openpose_faceonly", "openpose_full", "openpose_hand"),
    *("scribble_hed", "scribble_hedsafe", "scribble_pidinet", "scribble_pidsafe"),
    *("softedge_hed", "softedge_hedsafe", "softedge_pidinet", "softedge_pidsafe"),
)
"""Those of controlnet-aux, under its names, that give the same for the same photo."""
CANNY_THRESHOLDS = (100.0, 200.0)
"""Of ControlNet's models and of the measurements in OFT's and ETHER's papers."""


def detector_problem(name: str) -> str | None:
    """Say what is wrong with a detector's name; None where there is one of this name."""
    known = (*OWN_DETECTORS, *MODEL_DETECTORS)
    if name in known:
        return None
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
    return f"there is no detector {printable(name)!r}; {hint}"


def control_type_of(detector: str) -> str:
    """Return what a detector's images show, in the letters of a control type."""
    return detector.replace("++", "_boost")


@dataclass(frozen=True)
class Detector:
    """A detector by its name, with canny's thresholds; a ValueError if it or what it needs is not here."""

    name: str
    low_threshold: float = CANNY_THRESHOLDS[0]
    high_threshold: float = CANNY_THRESHOLDS[1]

    def __post_init__(self) -> None:
        problem = detector_problem(self.name)
        if problem is None and self.is_model and find_spec("controlnet_aux") is None:
            problem = self._lacking
        if problem:
            raise ValueError(problem)

    @property
    def is_model(self) -> bool:
        """Whether a network looks at the photo."""
        return self.name in MODEL_DETECTORS

    @property
    def needs_alpha(self) -> bool:
        """Whether it can do nothing with a photo that is opaque everywhere."""
        return self.name == "silhouette"

    def draw(self, photo: "Image", alpha: "Image | None") -> "Image":
        """Return the control image (mode RGB) of a photo of the same size and mode.

        `alpha` is its alpha channel (mode L), None where it is opaque, which a silhouette cannot be taken of.
        """
        if self.name == "palette":
            return photo
        if self.name == "canny":
            from ether_diffusion.control.images import draw_edges

            return draw_edges(photo, self.low_threshold, self.high_threshold)
        if self.name == "silhouette":
            if alpha is None:
                raise ValueError("it has no transparent parts to take a silhouette from; cut the subject out")
            # the object covers at least half of a pixel that is inside
            return alpha.point([0] * 128 + [255] * 128).convert("RGB")
        from PIL.Image import Resampling

        found: Image = self._model(photo)
        return found.convert("RGB").resize(photo.size, Resampling.BILINEAR)

    def draw_at(self, photo: "Image", alpha: "Image | None", *, width: int, height: int) -> "Image":
        """Return the control image of a photo at the size (px) of the picture that is to follow it.

        The photo, of the same proportions, is brought to it first: lines are as thin as in training.
        """
        from PIL.Image import Resampling

        from ether_diffusion.control.images import check_shape

        check_shape(photo, width=width, height=height)
        resampling = Resampling.NEAREST if self.name == "palette" else Resampling.LANCZOS
        resized = photo.resize((width, height), resampling)
        return self.draw(resized, None if alpha is None else alpha.resize((width, height), resampling))

    @property
    def _lacking(self) -> str:
        return f"the detector {self.name} needs controlnet-aux; pip install 'ether-diffusion[controlnet-aux]'"

    @cached_property
    def _model(self) -> Any:
        try:
            return import_module("controlnet_aux.processor").Processor(self.name)
        except ImportError as error:
            raise ValueError(f"{self._lacking} ({printable(error)})") from None
        except OSError as error:
            raise ValueError(
                f"the model of the detector {self.name} cannot be had ({printable(error, 300)}); connect "
                "to the hub once, or draw control images beforehand and give conditioning_data_dir"
            ) from None
