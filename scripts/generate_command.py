"""The command `ether generate`: pictures from a base with and without adapters, alone or as a grid."""

import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from PIL import Image

from ether_diffusion.adapters import Adapter, read_adapter
from ether_diffusion.adapters.methods import method_of
from ether_diffusion.bases import open_base
from ether_diffusion.control import Detector
from ether_diffusion.control.detectors import control_type_of
from ether_diffusion.durable_files import write_files, write_folder
from ether_diffusion.pipelines.opening import check_scheduler, find_device
from ether_diffusion.pipelines.sampling import (
    SHEET_NAME,
    ControlUse,
    Sampling,
    Start,
    draw_pictures,
    file_names,
    grid_files,
)
from ether_diffusion.prompts import Wildcards
from ether_diffusion.scripts import command_options as told
from ether_diffusion.scripts import drawing
from ether_diffusion.serving.engine import check_strengths
from ether_diffusion.training import decode_photo
from ether_diffusion.training.decoding import BLACK, WHITE

logger = logging.getLogger(__name__)

NOTHING_SHOWN = 3
"""The exit code where every picture was written and none shows anything."""


def generate(options: told.Generate) -> int:
    """Draw, write all or nothing, and print the path to look at."""
    drawing.hush_libraries()
    output, adapters = options.output, _read_adapters(options)
    sampling = _sampling(options, adapters)
    detector = _detector(options)
    control = _control(options, detector, adapters)
    drawing.check_new(output)
    is_one = output.suffix.lower() == ".png"
    if is_one and (options.grid or sampling.num_pictures > 1):
        what = "a grid is a folder" if options.grid else f"these are {sampling.num_pictures} pictures"
        raise ValueError(f"--output {output} is one picture and {what}; name a new folder")
    if options.scheduler is not None:
        check_scheduler(options.scheduler)
    given = dict(zip(options.adapter, adapters.values(), strict=True))
    base = open_base(drawing.find_base(options.base, given))
    if control is not None and detector is not None:
        photo = control.image
        height, width = sampling.size(base)
        alpha = photo.getchannel("A") if photo.mode == "RGBA" else None
        drawn = detector.draw_at(photo.convert("RGB"), alpha, width=width, height=height)
        control = replace(control, image=drawn)
    if options.guidance_scale is None:
        sampling = replace(sampling, guidance_scale=base.guidance_scale)
    drawing.warn_of_cuts(base, [*sampling.drawn_prompts(), *filter(None, [sampling.negative_prompt])])
    how: Any = {"device": find_device(options.device), "dtype": options.dtype}
    engine = drawing.open_engine(base, adapters, max_rows=sampling.batch_size, **how)
    pictures = draw_pictures(engine, sampling, control=control, on_progress=drawing.show_progress)
    output.parent.mkdir(parents=True, exist_ok=True)
    if is_one:
        write_files(output.parent, {output.name: pictures[0].png()})
    elif options.grid:
        write_folder(output, grid_files(sampling, pictures))
    else:
        write_folder(output, {name: p.png() for name, p in file_names(sampling, pictures).items()})
    print(output / SHEET_NAME if options.grid else output)
    if not all(picture.fault for picture in pictures):
        return 0
    print("ether generate: no picture shows anything; the reasons are above", file=sys.stderr)
    return NOTHING_SHOWN


def _read_adapters(options: told.Generate) -> dict[str, Adapter]:
    """Read the adapters before anything slow, so that a bad one costs no time; by short names."""
    if options.base is None and not options.adapter:
        raise ValueError("found neither --base nor --adapter; give the base to draw with")
    wants_control = True if options.control_image is not None else None  # else the Hub is not asked for it
    found = {given: read_adapter(given, with_encoder=wants_control) for given in options.adapter}
    titles = {given: method_of(one.config).title for given, one in found.items() if one.parts}
    if len(set(titles.values())) > 1 and "HRA" in titles.values():
        shown = ", ".join(f"{given} ({title})" for given, title in titles.items())
        raise ValueError(f"HRA reads the weights past adapters of other methods; found {shown}")
    names = drawing.adapter_names(options.adapter)
    return {name: found[given] for name, given in zip(names, options.adapter, strict=True)}


def _sampling(options: told.Generate, adapters: Mapping[str, Adapter]) -> Sampling:
    """Return what is to be drawn; a strength that a method does not have is refused."""
    triggers = [adapter.metadata.trigger for adapter in adapters.values() if adapter.metadata.trigger]
    if not options.prompt and not triggers:
        raise ValueError("found no --prompt, and no adapter that names its trigger; give a prompt")
    seeds, count = tuple(dict.fromkeys(options.seed or [0])), options.num_images
    if count < 1 or (len(seeds) > 1 and count > 1):
        raise ValueError(f"--num_images is from 1, and 1 where several seeds are given; found {count}")
    if count > 1:
        seeds = tuple(range(seeds[0], seeds[0] + count))
    sampling = Sampling(
        prompts=options.prompt or tuple(triggers[:1]),
        negative_prompt=options.negative_prompt,
        seeds=seeds,
        choices=_choices(options, list(adapters)),
        scheduler=options.scheduler,
        start=_start(options),
        wildcards=Wildcards(options.wildcards),
        **drawing.drawing(options, None),
    )
    for name, adapter in adapters.items():
        wanted = {choice.get(name, 1.0) for choice in sampling.choices}
        if not adapter.parts and wanted != {1.0}:
            raise ValueError(f"{name} is a control encoder by itself; use --control_strength, not --strength")
    check_strengths(adapters, sampling.choices)
    return sampling


def _start(options: told.Generate) -> Start | None:
    """Return the picture to begin with."""
    given = {"image_strength": options.image_strength, "mask": options.mask}
    if options.image is None:
        for name in (name for name, value in given.items() if value is not None):
            raise ValueError(f"--{name} is of a picture to begin with, and there is none; give --image")
        return None
    image, _ = decode_photo(options.image, min_side=1)
    mask = None if options.mask is None else decode_photo(options.mask, background=BLACK, min_side=1)[0]
    strength = 0.6 if options.image_strength is None else options.image_strength
    return Start(image, strength=strength, mask=mask, name=options.image.name)


def _choices(options: told.Generate, names: list[str]) -> tuple[dict[str, float], ...]:
    """Return the columns of the grid, or the one choice without it; the base first where it is wanted."""
    strengths = options.strength or (1.0,)
    if not names:
        if options.strength:
            raise ValueError("--strength is an adapter's, and there is none; give --adapter")
        return ({},)
    base_beside = options.grid if options.base_beside is None else options.base_beside
    base: tuple[dict[str, float], ...] = ({},) if base_beside else ()
    if options.grid:
        return base + tuple(dict.fromkeys(names, strength) for strength in dict.fromkeys(strengths))
    if len(strengths) not in (1, len(names)):
        found = f"found {len(strengths)} strengths for {len(names)} adapters"
        raise ValueError(f"{found}; give one for each or one for all, or --grid to draw every strength")
    return (*base, dict(zip(names, strengths * (len(names) if len(strengths) == 1 else 1), strict=True)))


def _detector(options: told.Generate) -> Detector | None:
    """Return what draws the control image from a photo; None where it is given as it is."""
    name, thresholds = options.control_detector, options.canny_thresholds
    if name is not None and options.control_image is None:
        raise ValueError("--control_detector looks at a photo, and there is none; give --control_image")
    if not thresholds:
        return None if name is None else Detector(name)
    if name != "canny" or len(thresholds) != 2 or not 0 <= thresholds[0] <= thresholds[1] < math.inf:
        shown = " ".join(f"{each:g}" for each in thresholds)
        needed = "give --control_detector canny, and two numbers from 0, the lower first"
        raise ValueError(f"--canny_thresholds {shown} are canny's; {needed}")
    return Detector("canny", *thresholds)


def _control(
    options: told.Generate, detector: Detector | None, adapters: Mapping[str, Adapter]
) -> ControlUse | None:
    """Return the control image, and the name of the one adapter that follows it."""
    path, strength = options.control_image, options.control_strength
    encoders = {name: one.encoder for name, one in adapters.items() if one.encoder is not None}
    if path is None:
        if strength is not None:
            raise ValueError("--control_strength is a control image's; give --control_image")
        for name in encoders:
            if not adapters[name].parts:
                raise ValueError(f"{name} is a control encoder by itself; give --control_image")
            logger.warning("%s follows a control image, and there is none; give --control_image", name)
        return None
    if len(encoders) != 1:
        found = ", ".join(encoders) or "none"
        raise ValueError(f"--control_image needs one --adapter that follows it; found {found}")
    ((name, encoder),) = encoders.items()
    background = BLACK if detector is None else WHITE  # what a photo is trained over
    image: Image.Image
    image, alpha = decode_photo(path, background=background, min_side=1)
    if detector is not None:
        if detector.needs_alpha and alpha is None:
            raise ValueError(
                f"{path} has no transparent parts to take a silhouette from; cut the subject out, or give a "
                "silhouette without --control_detector"
            )
        trained = encoder.config.control_type
        if trained not in (None, control_type_of(detector.name)):
            logger.warning("%s was trained to follow images of type %s, not %s", name, trained, detector.name)
        if alpha is not None:
            image.putalpha(alpha)
    return ControlUse(image, name, 1.0 if strength is None else strength)
