"""The names of detectors, for what only checks them: nothing slow is imported here."""

from difflib import get_close_matches

from ether_diffusion.wording import printable

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
