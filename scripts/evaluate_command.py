"""The command `ether evaluate`: is the subject there, is the prompt followed, and what was harmed?"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ether_diffusion.scripts.chosen_adapters import metadata_of
from ether_diffusion.scripts.drawing import (
    find_device,
    hush_libraries,
    open_with_adapters,
    show_progress,
    warn_of_cuts,
)
from ether_diffusion.scripts.evaluate_control import (
    add_control_flags,
    check_control_arguments,
    measure_control,
)
from ether_diffusion.scripts.evaluate_request import (
    check_arguments,
    fill_defaults,
    is_tiny_world,
    read_plan,
    read_prompts,
    write_results,
)
from ether_diffusion.scripts.generate_request import adapter_names, base_name

if TYPE_CHECKING:
    import torch

    from ether_diffusion.adapters import AdapterMetadata
    from ether_diffusion.bases import Base
    from ether_diffusion.metrics.report import Report, Yardsticks
    from ether_diffusion.metrics.samples import SortedSamples
    from ether_diffusion.pipelines.sampling import Sampling
    from ether_diffusion.strict_json import Json

# The library is imported inside the command: `ether --help` must not wait for torch.


def add_evaluate_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add evaluate to the commands of `ether`."""
    parser = commands.add_parser(
        "evaluate", help="measure an adapter: likeness to the photos and the prompts, drift from the base"
    )
    what = parser.add_argument_group("what to measure")
    what.add_argument("adapter", nargs="?", help="folder or hub id of an adapter to draw with")
    what.add_argument("--photos", type=Path, help="folder of real photos of the subject")
    what.add_argument(
        "--prompts", nargs="+", help="file with a prompt a line, or prompts, that name the subject"
    )
    what.add_argument(
        "--other_prompts", nargs="+", help="the same without the subject, for drift (ten of everyday things)"
    )
    what.add_argument("--generated", type=Path, help="folder of pictures drawn before, instead of an adapter")
    what.add_argument(
        "--captions",
        type=Path,
        help='JSON Lines with their prompts, {"file_name": …, "text": …} (what PNGs of ours say themselves)',
    )
    with_what = parser.add_argument_group("measured with")
    with_what.add_argument(
        "--encoder",
        action="append",
        help="dino, dinov2, clip or tiny_world, a folder or a hub id; may be given several times "
        "(tiny_world for the embedded base, else dino, dinov2 and clip)",
    )
    with_what.add_argument(
        "--lpips_weights",
        type=Path,
        help="file with torchvision's weights of AlexNet (that in torch's cache, or no LPIPS)",
    )
    with_what.add_argument(
        "--identifier", help="a made-up word of the prompts, e.g. sks, that CLIP is not to compare with"
    )
    with_what.add_argument("--encoder_batch_size", type=int, default=16, help="pictures encoded at once (16)")
    add_control_flags(parser)
    _add_drawing(parser)
    result = parser.add_argument_group("result (new files; what is there is never overwritten)")
    result.add_argument("--json", type=Path, help="file for all numbers")
    result.add_argument("--plot", type=Path, help="PNG with the scores and their standard errors")
    result.add_argument(
        "--pictures",
        type=Path,
        help="folder for what is drawn: base/, adapter/, other_base/, other_adapter/",
    )
    parser.set_defaults(run=_evaluate)


def _add_drawing(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("how to draw")
    how.add_argument("--base", help="folder, hub id or tiny_world (the base that the adapter names)")
    how.add_argument("--seed", type=int, help="of the first picture of each prompt (0)")
    how.add_argument("--num_images", type=int, help="pictures per prompt, with seed, seed + 1, … (4)")
    how.add_argument("--size", help="width and height in px, as 512 or 512x768 (the base's own)")
    how.add_argument("--steps", type=int, help="denoising steps (30)")
    how.add_argument(
        "--guidance_scale", type=float, help="how closely to follow the prompt (the base's usual)"
    )
    how.add_argument("--scheduler", help="sampler, e.g. ddim, dpm++, euler (the base's own)")
    how.add_argument("--batch_size", type=int, help="pictures drawn at once (1)")
    how.add_argument("--device", help="cpu, cuda, … (the accelerator if there is one)")
    how.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="(float32 on the CPU, else float16)"
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    check_control_arguments(arguments)
    check_arguments(arguments)
    hush_libraries()
    from ether_diffusion.metrics.plots import check_plotting

    if arguments.plot is not None:
        check_plotting()
    if arguments.encoder_batch_size < 1:
        raise ValueError(f"--encoder_batch_size is from 1; found {arguments.encoder_batch_size}")
    if arguments.control_pairs is not None:
        report, pictures = measure_control(arguments)
    else:
        report, pictures = _measure(arguments)
    write_results(arguments, report, pictures)
    print(report.table())


def _measure(arguments: argparse.Namespace) -> "tuple[Report, dict[str, bytes]]":
    from ether_diffusion.benchmark.evaluation import read_photos

    photos = read_photos(arguments.photos)
    device = find_device(arguments.device)
    if arguments.generated is not None:
        return _measure_generated(arguments, photos, device), {}
    return _draw_and_measure(fill_defaults(arguments), photos, device)


def _measure_generated(
    arguments: argparse.Namespace, photos: "SortedSamples", device: "torch.device"
) -> "Report":
    from ether_diffusion.benchmark.evaluation import read_caption_file, read_generated
    from ether_diffusion.metrics.report import report_generated

    captions = None if arguments.captions is None else read_caption_file(arguments.captions)
    generated = read_generated(arguments.generated, captions)
    yardsticks = _load_yardsticks(arguments, ("dino", "dinov2", "clip"), device)
    settings: dict[str, Json] = {
        "photos": arguments.photos.name,
        "generated": arguments.generated.name,
        "num_photos": len(photos.usable),
        "num_pictures": len(generated.usable),
        "identifier": arguments.identifier,
    }
    return report_generated(photos, generated, yardsticks, settings)


def _draw_and_measure(
    arguments: argparse.Namespace, photos: "SortedSamples", device: "torch.device"
) -> "tuple[Report, dict[str, bytes]]":
    """Draw what is asked for and return its report, with the pictures as files where these are wanted."""
    from ether_diffusion.adapters import read_adapter
    from ether_diffusion.bases import open_base
    from ether_diffusion.benchmark.evaluation import draw_samples, picture_files
    from ether_diffusion.metrics.report import report_drawn
    from ether_diffusion.pipelines.opening import check_scheduler

    prompts = read_prompts(arguments.prompts, "--prompts")
    (name,) = adapter_names([arguments.adapter])
    chosen = read_adapter(arguments.adapter)
    if not chosen.parts:
        raise ValueError(f"{arguments.adapter} is a control encoder by itself; give --control_pairs")
    known = metadata_of([chosen])
    if arguments.scheduler is not None:
        check_scheduler(arguments.scheduler)
    base = open_base(_base_name(arguments, known))
    sampling = read_plan(arguments, prompts, base, name)
    defaults = ("tiny_world",) if is_tiny_world(base) else ("dino", "dinov2", "clip")
    yardsticks = _load_yardsticks(arguments, defaults, device)
    warn_of_cuts(base, sampling.prompts)
    pipeline = open_with_adapters(
        base,
        {name: chosen},
        device=device,
        dtype=arguments.dtype,
        scheduler=arguments.scheduler,
    )
    drawn = draw_samples(pipeline, sampling, len(prompts), on_progress=show_progress)
    settings = _settings(arguments, base, sampling, len(prompts), photos)
    files = {} if arguments.pictures is None else picture_files(drawn)
    return report_drawn(photos, drawn, yardsticks, settings), files


def _base_name(arguments: argparse.Namespace, known: "list[AdapterMetadata]") -> str:
    return base_name(argparse.Namespace(base=arguments.base, adapter=[arguments.adapter]), known)


def _load_yardsticks(
    arguments: argparse.Namespace, defaults: tuple[str, ...], device: "torch.device"
) -> "Yardsticks":
    """Load encoders and LPIPS; without the latter's weights it is left out unless they were named."""
    from ether_diffusion.metrics.encoders import load_encoder
    from ether_diffusion.metrics.lpips import load_lpips
    from ether_diffusion.metrics.report import Yardsticks

    encoders = [
        load_encoder(name, device=device, batch_size=arguments.encoder_batch_size)
        for name in arguments.encoder or defaults
    ]
    kinds = [encoder.kind for encoder in encoders]
    for encoder in encoders:
        if kinds.count(encoder.kind) > 1:
            raise ValueError(f"found several encoders of the kind {encoder.kind}; measure with one at a time")
    lpips, left_out = None, {}
    try:
        lpips = load_lpips(arguments.lpips_weights, device=device)
    except (OSError, ValueError) as problem:
        if arguments.lpips_weights is not None:
            raise
        left_out["lpips"] = str(problem)
    return Yardsticks(encoders, lpips, arguments.identifier, left_out)


def _settings(
    arguments: argparse.Namespace,
    base: "Base",
    sampling: "Sampling",
    num_prompts: int,
    photos: "SortedSamples",
) -> "dict[str, Json]":
    return {
        "adapter": Path(arguments.adapter).name,
        "base": Path(base.name).name if Path(base.name).is_absolute() else base.name,
        "photos": arguments.photos.name,
        "num_photos": len(photos.usable),
        "prompts": list(sampling.prompts[:num_prompts]),
        "other_prompts": list(sampling.prompts[num_prompts:]),
        "identifier": arguments.identifier,
        "seeds": list(sampling.seeds),
        "steps": sampling.steps,
        "guidance_scale": sampling.guidance_scale,
        "scheduler": arguments.scheduler,
        "width": sampling.width,
        "height": sampling.height,
        "batch_size": sampling.batch_size,
    }
