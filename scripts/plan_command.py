"""The command `ether plan`: which method, learning rate and number of steps, and why."""

import json
import shlex
from pathlib import Path

from ether_diffusion.benchmark.advice import advise, read_curves
from ether_diffusion.benchmark.results import LABELS
from ether_diffusion.scripts import command_options as told
from ether_diffusion.training import find_photos


def plan(options: told.Plan) -> None:
    """Print what to train with, for how long, and what that rests on."""
    photos, base = options.photos, options.base
    is_number = photos.lstrip("-").isdecimal()
    count = int(photos) if is_number else len(find_photos(Path(photos), without=()).photos)
    advice = advise(count, base, read_curves())
    if options.json_:
        print(json.dumps(advice.to_json(), indent=1))
        return
    # what only the user knows, in capitals where it was not said
    own = [
        f"--pretrained_model_name_or_path {shlex.quote(base)}",
        f"--instance_data_dir {'PHOTOS' if photos.isdecimal() else shlex.quote(photos)}",
        "--instance_prompt 'a photo of sks THING'",
        "--token sks",
    ]
    if advice.options.get("prior_preservation") == "class_images":
        own += ["--class_prompt 'a photo of THING'", "--class_data_dir CLASS_IMAGES"]
    print(f"{LABELS[advice.method]} at learning rate {advice.learning_rate:g}:")
    print("  train-dreambooth " + " ".join([*own, "--output_dir RUN", *advice.flags()]))
    for title, sentences in (
        ("expect", advice.expected),
        ("because", advice.basis),
        ("not known", advice.doubts),
    ):
        for sentence in sentences:
            print(f"{title}: {sentence}")
    print("to stop sooner: add --eval_steps 50 --stop_when_good --eval_prompt with prompts of yours")
