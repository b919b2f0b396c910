"""The command `ether plan`: which method, learning rate and number of steps, and why."""

import argparse
import json
import shlex
from pathlib import Path

# The library is imported inside the command: `ether --help` must not wait for torch.


def add_plan_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add plan to the commands of `ether`."""
    parser = commands.add_parser(
        "plan", help="say what to train with and for how long, and what that rests on"
    )
    parser.add_argument("--photos", required=True, help="folder of the subject's photos, or their number")
    parser.add_argument("--base", default="tiny_world", help="folder or hub id (tiny_world)")
    parser.add_argument("--json", action="store_true", help="print an object for programs")
    parser.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> None:
    from ether_diffusion.benchmark.advice import advise, read_curves
    from ether_diffusion.benchmark.results import LABELS

    advice = advise(_count(arguments.photos), arguments.base, read_curves())
    if arguments.json:
        print(json.dumps(advice.to_json(), indent=1))
        return
    with_class = advice.options.get("prior_preservation") == "class_images"
    print(f"{LABELS[advice.method]} at learning rate {advice.learning_rate:g}:")
    print("  train-dreambooth " + " ".join([*_own_flags(arguments, with_class=with_class), *advice.flags()]))
    for title, sentences in (
        ("expect", advice.expected),
        ("because", advice.basis),
        ("not known", advice.doubts),
    ):
        for sentence in sentences:
            print(f"{title}: {sentence}")
    print("to stop sooner: add --eval_steps 50 --stop_when_good --eval_prompt with prompts of yours")


def _own_flags(arguments: argparse.Namespace, *, with_class: bool) -> list[str]:
    """Return the flags that only the user knows, in capitals where they were not said."""
    photos = "PHOTOS" if arguments.photos.isdecimal() else shlex.quote(arguments.photos)
    return [
        f"--pretrained_model_name_or_path {shlex.quote(arguments.base)}",
        f"--instance_data_dir {photos}",
        "--instance_prompt 'a photo of sks THING'",
        "--token sks",
        *(["--class_prompt 'a photo of THING'", "--class_data_dir CLASS_IMAGES"] if with_class else []),
        "--output_dir RUN",
    ]


def _count(photos: str) -> int:
    """Return how many photos there are.

    Raises:
        FileNotFoundError, ValueError: this is neither a number nor a folder of photos.
    """
    from ether_diffusion.training import find_photos

    if photos.lstrip("-").isdecimal():
        return int(photos)
    return len(find_photos(Path(photos), without=()).photos)
