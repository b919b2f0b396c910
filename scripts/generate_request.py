"""What `ether generate` was asked for: its arguments checked, before anything slow is loaded."""

import argparse
import logging
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ether_diffusion.adapters import Adapter, AdapterMetadata
    from ether_diffusion.control import Detector
    from ether_diffusion.pipelines.sampling import ControlUse, Sampling

logger = logging.getLogger(__name__)


def adapter_names(adapters: list[str]) -> list[str]:
    """Return a short distinct name for each adapter, from the last part of its path or hub id."""
    names: list[str] = []
    for adapter in adapters:
        plain = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(adapter).absolute().name).strip("_") or "adapter"
        numbered = (plain if n == 1 else f"{plain}_{n}" for n in range(1, len(adapters) + 1))
        names.append(next(name for name in numbered if name not in names))
    return names


def read_sampling(
    arguments: argparse.Namespace, names: list[str], known: "list[AdapterMetadata]"
) -> "Sampling":
    """Return what is to be drawn.

    Raises:
        ValueError: a flag is out of range, or does not fit the others.
    """
    from ether_diffusion.pipelines.sampling import Sampling

    triggers = [metadata.trigger for metadata in known if metadata.trigger]
    if not arguments.prompt and not triggers:
        raise ValueError("found no --prompt, and no adapter that names its trigger; give a prompt")
    width, height = read_size(arguments.size)
    return Sampling(
        prompts=tuple(arguments.prompt or triggers[:1]),
        negative_prompt=arguments.negative_prompt,
        seeds=_seeds(arguments),
        choices=_choices(arguments, names),
        steps=arguments.steps,
        # without one, the base's usual takes its place once the base is known
        guidance_scale=1.0 if arguments.guidance_scale is None else arguments.guidance_scale,
        width=width,
        height=height,
        batch_size=arguments.batch_size,
    )


def read_control_use(
    arguments: argparse.Namespace, names: list[str], chosen: "list[Adapter]"
) -> "tuple[ControlUse | None, tuple[str, ...]]":
    """Return the control image, and the name of the adapter that follows it.

    Raises:
        ValueError: no adapter or several follow one, or the image cannot be used.
    """
    from ether_diffusion.pipelines.sampling import ControlUse
    from ether_diffusion.training import decode_photo

    encoders = {
        name: adapter.encoder
        for name, adapter in zip(names, chosen, strict=True)
        if adapter.encoder is not None
    }
    following = tuple(encoders)
    if arguments.control_image is None:
        if arguments.control_strength is not None:
            raise ValueError(
                "--control_strength is a control image's, and there is none; give --control_image"
            )
        read_detector(arguments)
        for name in following:
            if not chosen[names.index(name)].parts:
                raise ValueError(f"{name} is a control encoder by itself; give --control_image")
            logger.warning("%s follows a control image, and there is none; give --control_image", name)
        return None, ()
    if len(following) != 1:
        found = ", ".join(following) or "none"
        raise ValueError(f"--control_image needs one --adapter that follows it; found {found}")
    detector, strength = read_detector(arguments), arguments.control_strength
    background = (0, 0, 0) if detector is None else (255, 255, 255)  # what a photo is trained over
    image, alpha = decode_photo(arguments.control_image, background=background, min_side=1)
    if detector is not None:
        if detector.needs_alpha and alpha is None:
            raise ValueError(
                f"{arguments.control_image} has no transparent parts to take a silhouette from; cut the "
                "subject out, or give a silhouette without --control_detector"
            )
        _warn_of_type(following[0], encoders[following[0]].config.control_type, detector.name)
        if alpha is not None:
            image.putalpha(alpha)
    return ControlUse(image, 1.0 if strength is None else strength), following


def read_detector(arguments: argparse.Namespace) -> "Detector | None":
    """Return what draws the control image from a photo; None where it is given as it is.

    Raises:
        ValueError: there is no such detector, or a flag about it stands alone.
    """
    from ether_diffusion.control import Detector

    if arguments.control_detector is None:
        if arguments.canny_thresholds is not None:
            raise ValueError("--canny_thresholds are canny's; give --control_detector canny")
        return None
    if arguments.control_image is None:
        raise ValueError("--control_detector looks at a photo, and there is none; give --control_image")
    if arguments.canny_thresholds is None:
        return Detector(arguments.control_detector)
    low, high = arguments.canny_thresholds
    if arguments.control_detector != "canny" or not 0 <= low <= high < math.inf:
        raise ValueError(
            f"--canny_thresholds {low:g} {high:g} is for --control_detector canny: two numbers from 0, the "
            "lower first"
        )
    return Detector("canny", low, high)


def detect_control(
    control: "ControlUse | None", detector: "Detector | None", *, width: int, height: int
) -> "ControlUse | None":
    """Return the use of what the detector draws from the photo, at the size (px) of the pictures.

    Raises:
        ValueError: the photo has other proportions, or the detector's model cannot be had.
    """
    if control is None or detector is None:
        return control
    photo = control.image
    alpha = photo.getchannel("A") if photo.mode == "RGBA" else None
    return replace(control, image=detector.draw_at(photo.convert("RGB"), alpha, width=width, height=height))


def _warn_of_type(name: str, trained: str | None, detector: str) -> None:
    from ether_diffusion.control.detector_names import control_type_of

    if trained not in (None, control_type_of(detector)):
        logger.warning("%s was trained to follow images of type %s, not %s", name, trained, detector)


def _choices(arguments: argparse.Namespace, names: list[str]) -> tuple[dict[str, float], ...]:
    """Return the columns of the grid, or the one choice without it; the base first where it is wanted."""
    strengths = arguments.strength or [1.0]
    if not names:
        if arguments.strength:
            raise ValueError("--strength is an adapter's, and there is none; give --adapter")
        return ({},)
    base_beside = arguments.grid if arguments.base_beside is None else arguments.base_beside
    base: tuple[dict[str, float], ...] = ({},) if base_beside else ()
    if arguments.grid:
        return base + tuple(dict.fromkeys(names, strength) for strength in dict.fromkeys(strengths))
    if len(strengths) not in (1, len(names)):
        raise ValueError(
            f"found {len(strengths)} strengths for {len(names)} adapters; give one for each or one for all, "
            "or --grid to draw every strength"
        )
    return (*base, dict(zip(names, strengths * (len(names) if len(strengths) == 1 else 1), strict=True)))


def _seeds(arguments: argparse.Namespace) -> tuple[int, ...]:
    seeds = tuple(dict.fromkeys(arguments.seed or [0]))
    if arguments.num_images < 1:
        raise ValueError(f"--num_images is from 1; found {arguments.num_images}")
    if len(seeds) > 1 and arguments.num_images > 1:
        raise ValueError("found several seeds and --num_images; give one seed, or leave --num_images out")
    if arguments.num_images > 1:
        return tuple(range(seeds[0], seeds[0] + arguments.num_images))
    return seeds


def read_size(text: str | None) -> tuple[int | None, int | None]:
    """Return width and height in px of "512" or "512x768"; None for both where nothing was said.

    Raises:
        ValueError: it is something else.
    """
    if text is None:
        return None, None
    found = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text)
    if found is None:
        raise ValueError(f"--size is a number of px, or two as in 512x768; found {text!r}")
    return int(found[1]), int(found[2] or found[1])


def check_output(arguments: argparse.Namespace, sampling: "Sampling") -> None:
    """Refuse an output that is there, cannot be written, or is one file for several pictures.

    Raises:
        FileExistsError, ValueError: as said.
    """
    output: Path = arguments.output
    num_pictures = len(sampling.prompts) * len(sampling.seeds) * len(sampling.choices)
    if os.path.lexists(output):
        raise FileExistsError(f"{output} is there already; name a new folder or file")
    if output.suffix.lower() == ".png" and (arguments.grid or num_pictures > 1):
        what = "a grid is a folder" if arguments.grid else f"these are {num_pictures} pictures"
        raise ValueError(f"--output {output} is one picture and {what}; name a new folder")
    there = next(parent for parent in output.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"nothing can be written into {there}; name another --output")


def base_name(arguments: argparse.Namespace, known: "list[AdapterMetadata]") -> str:
    """Return the base that was named, by the command or by its adapters.

    Raises:
        ValueError: none was, or only a name that does not say where it is.
    """
    if arguments.base is not None:
        return str(arguments.base)
    named = [metadata.base_model for metadata in known if metadata.base_model is not None]
    if not named:
        raise ValueError(f"{arguments.adapter[0]} does not say what its base is; give --base")
    if not Path(named[0]).exists() and named[0] != "tiny_world" and named[0].count("/") != 1:
        raise ValueError(f"{arguments.adapter[0]} was made for {named[0]!r}; say with --base where that is")
    return named[0]
