"""`ether benchmark`: methods side by side, by the protocol of the paper; `ether plan`: what to train with."""

import json
import logging
import re
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
from ether_diffusion.benchmark.runs import ADAPTER, MAX_SEED, Judges, do_all, find_result, training_config
from ether_diffusion.durable_files import write_files, write_folder
from ether_diffusion.options import declared
from ether_diffusion.pipelines.opening import default_device
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
    if options.num_processes < 1:
        raise ValueError(f"--num_processes is from 1; found {options.num_processes}")
    if not all(0 <= seed <= MAX_SEED for seed in options.seeds):
        raise ValueError(f"--seeds are from 0 to {MAX_SEED}; found {listed(options.seeds)}")
    root = options.output_dir.absolute()
    if options.data is not None:
        subjects = planned.read_dreambooth(options.data.absolute(), options.subjects or None)
    else:
        subjects = planned.tiny_subjects(options.subjects or planned.TINY_SUBJECTS, root / "photos")
    runs = planned.plan_benchmark(methods, subjects, options.seeds)
    for run in runs[: len(methods) + 1]:  # the settings of a method are those of all its runs
        if run.method != BASE:
            training_config(run, root, settings)
    planned.keep_plan(root, settings, options.data, write=False)
    if options.plan:
        done = sum(find_result(run, root) is not None for run in runs)
        print(_described(runs, settings, done))
        return
    hush_libraries()
    size, is_tiny = open_base(options.base).native_size, options.data is None
    judges = Judges.load(settings, is_tiny=is_tiny, device=default_device())
    planned.keep_plan(root, settings, options.data)
    gone = [run for run in runs if run.method != BASE and not (run.folder(root) / ADAPTER).exists()]
    if options.keep_adapters and (number := sum(find_result(run, root) is not None for run in gone)):
        told_of = f"the adapters of {number} runs that are done were not kept"
        print(f"{told_of}; take another --output_dir to train them again", file=sys.stderr)
    if is_tiny:
        for subject in subjects:
            write_photos(find_concept(subject.name), subject.photos, size=size)
    form = "short, on Tiny World" if is_tiny else "paper"

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
        do_all(runs, root, settings, judges, num_processes=options.num_processes, on_progress=report)
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
    told_of = shown(summary)
    options.output_dir.absolute().parent.mkdir(parents=True, exist_ok=True)
    write_folder(options.output_dir, files)
    print(told_of)
    print("written: " + ", ".join(str(options.output_dir / name) for name in files))


def _settings(options: told.Benchmark) -> BenchmarkSettings:
    is_short, is_tiny = options.data is None, options.base in EMBEDDED
    if is_short and not is_tiny:
        short = f"the short form is of {listed(EMBEDDED)}"
        raise ValueError(f"{short}; give --data with photographs for {options.base}")
    training: dict[str, Json] = dict(planned.TINY_TRAINING if is_short else planned.PAPER_TRAINING)
    training |= planned.options_of(options.train, "--train")
    usual = {"num_images": 2, "inference_steps": 15, "batch_size": 16} if is_short else {}
    told_counts = {name: getattr(options, name) for name in ("num_images", "inference_steps", "batch_size")}
    return BenchmarkSettings(
        options.base,
        training,
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
    is_number = re.fullmatch(r"-?\d{1,9}", photos) is not None
    if not photos or not base:
        raise ValueError("--photos is a folder or a number, and --base a folder or hub id; found nothing")
    if Path(base).is_dir() and not Path(base, "model_index.json").is_file():
        raise ValueError(f"{base} is not the folder of a base model: it has no model_index.json")
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
