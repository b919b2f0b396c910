"""The command `ether generate`: pictures from a base with and without adapters, alone or as a grid."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ether_diffusion.scripts.chosen_adapters import check_strengths, metadata_of, read_chosen
from ether_diffusion.scripts.drawing import (
    find_device,
    hush_libraries,
    open_with_adapters,
    show_progress,
    warn_of_cuts,
)
from ether_diffusion.scripts.generate_request import (
    adapter_names,
    base_name,
    check_output,
    detect_control,
    read_control_use,
    read_detector,
    read_sampling,
)

if TYPE_CHECKING:
    from ether_diffusion.pipelines.sampling import Picture, Sampling

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

    names = adapter_names(arguments.adapter)
    chosen = read_chosen(arguments)
    known = metadata_of(chosen)
    sampling = read_sampling(arguments, names, known)
    check_strengths(sampling, names, chosen)
    control, controls = read_control_use(arguments, names, chosen)
    check_output(arguments, sampling)
    if arguments.scheduler is not None:
        check_scheduler(arguments.scheduler)
    base = open_base(base_name(arguments, known))
    control = detect_control(
        control,
        read_detector(arguments),
        width=sampling.width or base.native_size,
        height=sampling.height or base.native_size,
    )
    if arguments.guidance_scale is None:
        sampling = replace(sampling, guidance_scale=base.guidance_scale)
    warn_of_cuts(base, [*sampling.prompts, *filter(None, [sampling.negative_prompt])])
    pipeline = open_with_adapters(
        base,
        dict(zip(names, chosen, strict=True)),
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
