"""The command `ether generate`: pictures from a base with and without adapters, alone or as a grid."""

import argparse
import logging
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ether_diffusion.scripts.drawing import (
    adapter_names,
    base_name,
    find_device,
    hush_libraries,
    metadata_of,
    open_with_adapters,
    read_size,
    show_progress,
    warn_of_cuts,
)

if TYPE_CHECKING:
    from ether_diffusion.adapters import Adapter
    from ether_diffusion.control import Detector
    from ether_diffusion.pipelines.sampling import ControlUse, Picture, Sampling

logger = logging.getLogger(__name__)

# The library is imported inside the command: `ether --help` must not wait for torch.

NOTHING_SHOWN = 3
"""The exit code where every picture was written and none shows anything."""


def add_generate_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add generate to the commands of `ether`."""
    parser = commands.add_parser("generate", help="draw pictures with an adapter, with their settings inside")
    what = parser.add_argument_group("what to draw")
    what.add_argument(
        "--prompt", action="append", help="may be given several times (the trigger that the adapter names)"
    )
    what.add_argument("--negative_prompt", help="what the pictures should not show")
    what.add_argument(
        "--seed", type=int, nargs="+", action="extend", help="of the first picture (0), or several seeds"
    )
    what.add_argument(
        "--num_images", type=int, default=1, help="pictures per prompt, with seed, seed + 1, … (1)"
    )
    what.add_argument("--size", help="width and height in px, as 512 or 512x768 (the base's own)")
    what.add_argument(
        "--control_image", type=Path, help="picture that says where, for an adapter with control"
    )
    what.add_argument(
        "--control_strength", type=float, help="of the control image: 1 as trained (default), 0 without"
    )
    what.add_argument(
        "--control_detector",
        metavar="NAME",
        help="draw what says where from the photo --control_image: canny, silhouette (of its alpha channel), "
        "palette (as it is), or a model of controlnet-aux, e.g. depth_midas",
    )
    what.add_argument(
        "--canny_thresholds",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="of canny, as in OpenCV (100 200)",
    )
    models = parser.add_argument_group("models")
    models.add_argument(
        "--adapter", action="append", default=[], help="folder or hub id; may be given several times"
    )
    models.add_argument(
        "--strength",
        type=float,
        nargs="+",
        action="extend",
        help="1 as trained (default), 0 the base; one per adapter or for all; with --grid, a column each",
    )
    models.add_argument("--base", help="folder, hub id or tiny_world (the base that the adapter names)")
    models.add_argument("--device", help="cpu, cuda, … (the accelerator if there is one)")
    models.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="(float32 on the CPU, else float16)"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--steps", type=int, default=30, help="denoising steps (30)")
    how.add_argument(
        "--guidance_scale", type=float, help="how closely to follow the prompt (the base's usual)"
    )
    how.add_argument("--scheduler", help="sampler, e.g. ddim, dpm++, euler (the base's own)")
    how.add_argument("--batch_size", type=int, default=1, help="pictures drawn at once (1)")
    result = parser.add_argument_group("result")
    result.add_argument(
        "--output",
        type=Path,
        required=True,
        help="new folder, or new .png file for a single picture; what is there is never overwritten",
    )
    result.add_argument(
        "--grid", action="store_true", help="also a labelled sheet: strengths across, prompts and seeds down"
    )
    result.add_argument(
        "--base_beside",
        action=argparse.BooleanOptionalAction,
        help="draw the base on the same seeds too (with --grid)",
    )
    parser.set_defaults(run=_generate)


def _generate(arguments: argparse.Namespace) -> int:
    hush_libraries()
    from ether_diffusion.bases import open_base
    from ether_diffusion.pipelines.opening import check_scheduler
    from ether_diffusion.pipelines.sampling import draw_pictures

    names, chosen = adapter_names(arguments.adapter), _read_adapters(arguments)
    adapters, known = dict(zip(names, chosen, strict=True)), metadata_of(chosen)
    triggers = [metadata.trigger for metadata in known if metadata.trigger]
    sampling = _read_sampling(arguments, names, triggers)
    _check_strengths(sampling, names, chosen)
    detector = _read_detector(arguments)
    control, controls = _read_control(arguments, detector, adapters)
    _check_output(arguments, sampling)
    if arguments.scheduler is not None:
        check_scheduler(arguments.scheduler)
    base = open_base(base_name(arguments, known))
    if control is not None and detector is not None:
        photo, sides = control.image, (sampling.width, sampling.height)
        width, height = (side or base.native_size for side in sides)
        alpha = photo.getchannel("A") if photo.mode == "RGBA" else None
        drawn = detector.draw_at(photo.convert("RGB"), alpha, width=width, height=height)
        control = replace(control, image=drawn)
    if arguments.guidance_scale is None:
        sampling = replace(sampling, guidance_scale=base.guidance_scale)
    warn_of_cuts(base, [*sampling.prompts, *filter(None, [sampling.negative_prompt])])
    pipeline = open_with_adapters(
        base,
        adapters,
        device=find_device(arguments.device),
        dtype=arguments.dtype,
        scheduler=arguments.scheduler,
        controls=controls,
    )
    pictures = draw_pictures(pipeline, sampling, control=control, on_progress=show_progress)
    print(_write(arguments, sampling, pictures))
    if all(picture.fault for picture in pictures):
        print("ether generate: no picture shows anything; the reasons are above", file=sys.stderr)
        return NOTHING_SHOWN
    return 0


def _read_adapters(arguments: argparse.Namespace) -> "list[Adapter]":
    """Read the adapters before anything slow, so that a bad one costs no time.

    Raises:
        FileNotFoundError, ValueError: one is not whole, or they are of methods that do not work together.
    """
    from ether_diffusion.adapters import read_adapter
    from ether_diffusion.adapters.methods import method_of

    if arguments.base is None and not arguments.adapter:
        raise ValueError("found neither --base nor --adapter; give the base to draw with")
    wants_control = True if arguments.control_image is not None else None  # else the Hub is not asked for it
    found = [read_adapter(adapter, with_encoder=wants_control) for adapter in arguments.adapter]
    titles = {
        adapter: method_of(one.config).title
        for adapter, one in zip(arguments.adapter, found, strict=True)
        if one.parts
    }
    if len(set(titles.values())) > 1:
        shown = ", ".join(f"{adapter} ({title})" for adapter, title in titles.items())
        raise ValueError(f"adapters of two methods do not work together; found {shown}")
    return found


def _read_sampling(arguments: argparse.Namespace, names: list[str], triggers: list[str]) -> "Sampling":
    """Return what is to be drawn.

    Raises:
        ValueError: a flag is out of range, or does not fit the others.
    """
    from ether_diffusion.pipelines.sampling import Sampling

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


def _check_strengths(sampling: "Sampling", names: list[str], adapters: "list[Adapter]") -> None:
    """Refuse strengths that a method does not have, before anything is loaded.

    Raises:
        ValueError: as said.
    """
    from ether_diffusion.adapters.methods import method_of

    for name, adapter in zip(names, adapters, strict=True):
        wanted = {choice.get(name, 1.0) for choice in sampling.choices}
        if not adapter.parts and wanted != {1.0}:
            raise ValueError(f"{name} is a control encoder by itself; use --control_strength, not --strength")
        if adapter.parts and not method_of(adapter.config).has_strengths and wanted - {0.0, 1.0}:
            raise ValueError(
                f"{name} is an adapter of {adapter.method}, which has no strengths; use 1 as trained or 0 "
                "the base"
            )


def _read_detector(arguments: argparse.Namespace) -> "Detector | None":
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


def _read_control(
    arguments: argparse.Namespace, detector: "Detector | None", adapters: "dict[str, Adapter]"
) -> "tuple[ControlUse | None, tuple[str, ...]]":
    """Return the control image, and the name of the adapter that follows it.

    Raises:
        ValueError: no adapter or several follow one, or the image cannot be used.
    """
    from ether_diffusion.control.detector_names import control_type_of
    from ether_diffusion.pipelines.sampling import ControlUse
    from ether_diffusion.training import decode_photo

    path, strength = arguments.control_image, arguments.control_strength
    encoders = {name: one.encoder for name, one in adapters.items() if one.encoder is not None}
    if path is None:
        if strength is not None:
            raise ValueError(
                "--control_strength is a control image's, and there is none; give --control_image"
            )
        for name in encoders:
            if not adapters[name].parts:
                raise ValueError(f"{name} is a control encoder by itself; give --control_image")
            logger.warning("%s follows a control image, and there is none; give --control_image", name)
        return None, ()
    if len(encoders) != 1:
        found = ", ".join(encoders) or "none"
        raise ValueError(f"--control_image needs one --adapter that follows it; found {found}")
    ((name, encoder),) = encoders.items()
    background = (0, 0, 0) if detector is None else (255, 255, 255)  # what a photo is trained over
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
    return ControlUse(image, 1.0 if strength is None else strength), (name,)


def _check_output(arguments: argparse.Namespace, sampling: "Sampling") -> None:
    """Refuse an output that is there, cannot be written, or is one file for several pictures.

    Raises:
        FileExistsError, ValueError: as said.
    """
    output: Path = arguments.output
    if os.path.lexists(output):
        raise FileExistsError(f"{output} is there already; name a new folder or file")
    if output.suffix.lower() == ".png" and (arguments.grid or sampling.num_pictures > 1):
        what = "a grid is a folder" if arguments.grid else f"these are {sampling.num_pictures} pictures"
        raise ValueError(f"--output {output} is one picture and {what}; name a new folder")
    there = next(parent for parent in output.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"nothing can be written into {there}; name another --output")


def _write(arguments: argparse.Namespace, sampling: "Sampling", pictures: "list[Picture]") -> Path:
    """Write what was drawn, all or nothing, and return the path to look at."""
    from ether_diffusion.durable_files import write_files, write_folder
    from ether_diffusion.pipelines.grid import SHEET_NAME, grid_files
    from ether_diffusion.pipelines.sampling import file_names

    output: Path = arguments.output
    output.parent.mkdir(parents=True, exist_ok=True)
    if arguments.grid:
        write_folder(output, grid_files(sampling, pictures))
        return output / SHEET_NAME
    if output.suffix.lower() == ".png":
        write_files(output.parent, {output.name: pictures[0].png()})
    else:
        write_folder(output, {name: p.png() for name, p in file_names(sampling, pictures).items()})
    return output
