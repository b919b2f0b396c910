"""`ether benchmark`: methods side by side, by the protocol of the paper; `ether plan`: what to train with."""

import json
import logging
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from ether_diffusion.bases import open_base
from ether_diffusion.benchmark import plan as planned
from ether_diffusion.benchmark.plan import BASE, BenchmarkRun, BenchmarkSettings, advise, read_curves
from ether_diffusion.benchmark.results import (
    BENCHMARK_FILE,
    benchmark_sheet,
    draw_front,
    merge,
    shown,
    summarise,
)
from ether_diffusion.benchmark.runs import do_all, find_result, training_config
from ether_diffusion.durable_files import write_files, write_folder
from ether_diffusion.options import declared
from ether_diffusion.scripts import command_options as told
from ether_diffusion.scripts.drawing import check_new, hush_libraries
from ether_diffusion.strict_json import Json
from ether_diffusion.tiny_world import ALIAS, EMBEDDED
from ether_diffusion.tiny_world.concepts import find_concept
from ether_diffusion.tiny_world.subjects import write_photos
from ether_diffusion.training import PhotoFolder, find_photos
from ether_diffusion.wording import listed

SHEET_FILE, FRONT_FILE = "sheet.png", "front.png"


def benchmark(options: told.Benchmark) -> None:
    """Do what is left of a benchmark, or say what that is; then write and print the results."""
    if options.merge:
        _merge(options)
        return
    methods, settings = options.methods or planned.METHODS, _settings(options)
    for row in (*methods, *settings.learning_rates):
        planned.method_of(row)
    unused = settings.learning_rates.keys() - methods
    if unused:
        raise ValueError(f"--learning_rates names {listed(sorted(unused))}, which is not compared")
    if options.num_processes < 1:
        raise ValueError(f"--num_processes is from 1; found {options.num_processes}")
    root = options.output_dir.absolute()
    if options.data is not None:
        subjects = planned.read_dreambooth(options.data.absolute(), options.subjects or None)
    else:
        subjects = planned.tiny_subjects(options.subjects or planned.TINY_SUBJECTS, root / "photos")
    runs = planned.plan_benchmark(methods, subjects, options.seeds)
    for run in runs[: len(methods) + 1]:  # the settings of a method are those of all its runs
        if run.method != BASE:
            training_config(run, root, settings)
    if options.plan:
        done = sum(find_result(run, root) is not None for run in runs)
        print(_described(runs, settings, done))
        return
    hush_libraries()
    planned.keep_plan(root, settings)
    if options.data is None:
        size = open_base(options.base).native_size
        for subject in subjects:
            write_photos(find_concept(subject.name), subject.photos, size=size)
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
    summary = summarise(runs, root, settings, form=form)
    pictures = {SHEET_FILE: benchmark_sheet(runs, root, settings), FRONT_FILE: draw_front(summary)}
    drawn = {name: data for name, data in pictures.items() if data is not None}
    write_files(root, drawn)
    print(shown(summary))
    print("written: " + ", ".join(str(root / name) for name in (BENCHMARK_FILE, *drawn)))


def _merge(options: told.Benchmark) -> None:
    """Put results of several machines together in a new folder, and print them."""
    known = declared(told.Benchmark)
    given = [name for name in known if getattr(options, name) not in (known[name].default, ())]
    unused = listed(f"--{name}" for name in given if name not in ("merge", "output_dir"))
    if unused:
        raise ValueError(f"{unused} would change nothing with --merge, which runs nothing; leave out")
    check_new(options.output_dir)
    summary = merge([Path(each) for each in options.merge])
    files = {BENCHMARK_FILE: f"{json.dumps(summary, indent=1, allow_nan=False)}\n".encode()}
    front = draw_front(summary)
    files |= {} if front is None else {FRONT_FILE: front}
    options.output_dir.absolute().parent.mkdir(parents=True, exist_ok=True)
    write_folder(options.output_dir, files)
    print(shown(summary))
    print("written: " + ", ".join(str(options.output_dir / name) for name in files))


def _settings(options: told.Benchmark) -> BenchmarkSettings:
    is_short, is_tiny = options.data is None, options.base in EMBEDDED
    if is_short and not is_tiny:
        short = f"the short form is of {listed(EMBEDDED)}"
        raise ValueError(f"{short}; give --data with photographs for {options.base}")
    training: dict[str, Json] = dict(planned.TINY_TRAINING if is_short else planned.PAPER_TRAINING)
    training |= planned.options_of(options.train, "--train")
    rates: dict[str, float] = {}
    for pair in options.learning_rates:
        row, _, text = pair.rpartition("=")
        if not row or not text:
            raise ValueError(f"--learning_rates takes METHOD=RATE; found {pair}")
        try:
            rates[row] = float(text)
        except ValueError:
            raise ValueError(f"--learning_rates {pair} is no number") from None
    usual = {"num_images": 2, "inference_steps": 15, "batch_size": 16} if is_short else {}
    told_counts = {name: getattr(options, name) for name in ("num_images", "inference_steps", "batch_size")}
    return BenchmarkSettings(
        options.base,
        training,
        rates,
        encoders=options.encoder or ((ALIAS,) if is_tiny else ("dino", "clip")),
        lpips_weights=options.lpips_weights,
        keep_adapters=options.keep_adapters,
        **{**usual, **{name: value for name, value in told_counts.items() if value is not None}},
    )


def _described(runs: list[BenchmarkRun], settings: BenchmarkSettings, done: int) -> str:
    """Return what is to be done, a line a matter."""
    methods = [method for method in dict.fromkeys(run.method for run in runs) if method != BASE]
    subjects = list({run.subject.name: run.subject for run in runs}.values())
    num_prompts = max(len(subject.prompts) for subject in subjects)
    num_pictures = sum(len(run.subject.prompts) for run in runs) * settings.num_images
    lines = [
        f"{len(runs)} runs, {done} of them done: ({len(methods)} methods and the base alone) × "
        f"{len(subjects)} subjects × {len({run.seed for run in runs})} seeds, on {settings.base}",
        f"{num_prompts} prompts × {settings.num_images} pictures of each: {num_pictures} pictures in all",
        "training: " + ", ".join(f"{name}={value}" for name, value in settings.training.items()),
    ]
    lines += [
        f"{planned.label_of(method)}: learning rate {settings.learning_rate(method):g}" for method in methods
    ]
    for each in subjects:
        lines.append(f"{each.name}: {each.instance_prompt or 'captions of its own'}; {each.prompts[0]}, …")
    return "\n".join(lines)


def plan(options: told.Plan) -> None:
    """Print what to train with, for how long, and what that rests on."""
    photos, base = options.photos, options.base
    is_number = photos.lstrip("-").isdecimal()
    found = PhotoFolder() if is_number else find_photos(Path(photos), without=())
    advice = advise(int(photos) if is_number else len(found.photos), base, read_curves())
    remarks = [*(f"not used: {refusal.sentence}" for refusal in found.refused), *found.warnings]
    if options.json_:
        print(json.dumps(asdict(advice) | {"photos": remarks}, indent=1))
        return
    # what only the user knows, in capitals where it was not said
    own = [
        f"--pretrained_model_name_or_path {shlex.quote(base)}",
        f"--instance_data_dir {'PHOTOS' if is_number else shlex.quote(photos)}",
        "--instance_prompt 'a photo of sks THING'",
        "--token sks",
    ]
    if advice.options.get("prior_preservation") == "class_images":
        own += ["--class_prompt 'a photo of THING'", "--class_data_dir CLASS_IMAGES"]
    print(f"{advice.label} at learning rate {advice.learning_rate:g}:")
    print("  train-dreambooth " + " ".join([*own, "--output_dir RUN", *advice.flags()]))
    told_of = {"expect": advice.expected, "because": advice.basis, "not known": advice.doubts}
    told_of |= {"photos": tuple(remarks)}
    print("\n".join(f"{title}: {sentence}" for title, each in told_of.items() for sentence in each))
    print("to stop sooner: add --eval_steps 50 --stop_when_good --eval_prompt with prompts of yours")
