"""`ether benchmark`: methods side by side, by the protocol of the paper; `ether plan`: what to train with."""

import json
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from ether_diffusion.benchmark.advice import advise, read_curves
from ether_diffusion.benchmark.plan import (
    BASE,
    METHODS,
    PAPER_TRAINING,
    TINY_SUBJECTS,
    TINY_TRAINING,
    BenchmarkRun,
    BenchmarkSettings,
    Subject,
    check_settings,
    keep_plan,
    plan_benchmark,
    read_dreambooth,
    tiny_subjects,
)
from ether_diffusion.benchmark.results import LABELS, benchmark_sheet, shown, summarise
from ether_diffusion.benchmark.runs import do_all, find_result, training_config
from ether_diffusion.durable_files import write_files
from ether_diffusion.scripts import command_options as told
from ether_diffusion.scripts.drawing import hush_libraries
from ether_diffusion.strict_json import Json
from ether_diffusion.tiny_world import ALIAS
from ether_diffusion.tiny_world.concepts import find_concept
from ether_diffusion.tiny_world.subjects import write_photos
from ether_diffusion.training import find_photos
from ether_diffusion.training.config import AdapterMethod

BENCHMARK_FILE, SHEET_FILE = "benchmark.json", "sheet.png"


def benchmark(options: told.Benchmark) -> None:
    """Do what is left of a benchmark, or say what that is; then write and print the results."""
    methods, settings = cast(Sequence[AdapterMethod], options.methods) or METHODS, _settings(options)
    check_settings(methods, settings)
    if options.num_processes < 1:
        raise ValueError(f"--num_processes is from 1; found {options.num_processes}")
    root = options.output_dir.absolute()
    subjects = _subjects(options, root)
    runs = plan_benchmark(methods, subjects, options.seeds)
    for run in runs[: len(methods) + 1]:  # the settings of a method are those of all its runs
        if run.method != BASE:
            training_config(run, root, settings)
    if options.plan:
        done = sum(find_result(run, root) is not None for run in runs)
        print(_described(runs, settings, done))
        return
    hush_libraries()
    keep_plan(root, settings)
    if options.data is None:
        for subject in subjects:
            write_photos(find_concept(subject.name), subject.photos)
    form = "short, on Tiny World" if options.data is None else "paper"

    def write_results() -> None:
        text = json.dumps(summarise(runs, root, settings, form=form), indent=1, allow_nan=False)
        write_files(root, {BENCHMARK_FILE: f"{text}\n".encode()})

    def report(done: int, total: int) -> None:
        print(f"{done} of {total} runs", file=sys.stderr, flush=True)
        write_results()

    logger = logging.getLogger("ether_diffusion.training")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        do_all(runs, root, settings, num_processes=options.num_processes, on_progress=report)
    finally:
        logger.setLevel(level)
    write_results()
    write_files(root, {SHEET_FILE: benchmark_sheet(runs, root, settings)})
    print(shown(summarise(runs, root, settings, form=form)))
    print(f"written: {root / BENCHMARK_FILE}, {root / SHEET_FILE}")


def _settings(options: told.Benchmark) -> BenchmarkSettings:
    is_short, is_tiny = options.data is None, options.base == ALIAS
    if is_short and not is_tiny:
        raise ValueError(f"the short form is of tiny_world; give --data with photographs for {options.base}")
    rates: dict[str, float] = {}
    for name, text in _pairs(options.learning_rates, "--learning_rates"):
        try:
            rates[name] = float(text)
        except ValueError:
            raise ValueError(f"--learning_rates {name}={text} is no number") from None
    training: dict[str, Json] = dict(TINY_TRAINING if is_short else PAPER_TRAINING)
    for name, text in _pairs(options.train, "--train"):
        try:  # a value as JSON has it, e.g. 600, 0.5, true; anything else is text
            training[name] = json.loads(text)
        except ValueError:
            training[name] = text
    num_images, num_steps, batch_size = (2, 15, 16) if is_short else (4, 25, 4)
    return BenchmarkSettings(
        base=options.base,
        training=training,
        learning_rates=rates,
        num_images=num_images if options.num_images is None else options.num_images,
        num_inference_steps=num_steps if options.inference_steps is None else options.inference_steps,
        batch_size=batch_size if options.batch_size is None else options.batch_size,
        encoders=options.encoder or ((ALIAS,) if is_tiny else ("dino", "clip")),
        lpips_weights=options.lpips_weights,
        keep_adapters=options.keep_adapters,
    )


def _pairs(values: Sequence[str], flag: str) -> list[tuple[str, str]]:
    pairs = []
    for value in values:
        name, _, text = value.partition("=")
        if not name or not text:
            raise ValueError(f"{flag} takes NAME=VALUE; found {value}")
        pairs.append((name, text))
    return pairs


def _subjects(options: told.Benchmark, root: Path) -> list[Subject]:
    if options.data is not None:
        return read_dreambooth(options.data.absolute(), options.subjects or None)
    names = list(dict.fromkeys(options.subjects or TINY_SUBJECTS))
    return tiny_subjects(names, root / "photos")


def _described(runs: list[BenchmarkRun], settings: BenchmarkSettings, done: int) -> str:
    """Return what is to be done, a line a matter."""
    methods = [method for method in dict.fromkeys(run.method for run in runs) if method != BASE]
    subjects = {run.subject.name: run.subject for run in runs}
    seeds = dict.fromkeys(run.seed for run in runs)
    num_prompts = max(len(subject.prompts) for subject in subjects.values())
    num_pictures = sum(len(run.subject.prompts) for run in runs) * settings.num_images
    lines = [
        f"{len(runs)} runs, {done} of them done: ({len(methods)} methods and the base alone) × "
        f"{len(subjects)} subjects × {len(seeds)} seeds, on {settings.base}",
        f"{num_prompts} prompts × {settings.num_images} pictures of each: {num_pictures} pictures in all",
        "training: " + ", ".join(f"{name}={value}" for name, value in settings.training.items()),
    ]
    for method in methods:
        lines.append(f"{LABELS[method]}: learning rate {settings.learning_rate(method):g}")
    for subject in subjects.values():
        trained_as = subject.instance_prompt or "captions of its own"
        lines.append(f"{subject.name}: {trained_as}; {subject.prompts[0]}, …")
    return "\n".join(lines)


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
