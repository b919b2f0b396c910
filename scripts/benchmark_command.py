"""The command `ether benchmark`: methods side by side, by the subject-driven protocol of the ETHER paper."""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ether_diffusion.benchmark.plan import BenchmarkRun, BenchmarkSettings, Subject
    from ether_diffusion.strict_json import Json

# The library is imported inside the command: `ether --help` must not wait for torch.

BENCHMARK_FILE, SHEET_FILE = "benchmark.json", "sheet.png"


def add_benchmark_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add benchmark to the commands of `ether`."""
    parser = commands.add_parser(
        "benchmark",
        help="compare methods: each learns several subjects, and is measured as in the ETHER paper",
        description="Train every method on every subject, draw the protocol's prompts, and print the paper's "
        "table. Stopped or killed anywhere, the same command goes on; started several times with one "
        "--output_dir, as on several GPUs, they share the work.",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the runs and the results")
    what = parser.add_argument_group("what to compare")
    what.add_argument(
        "--data",
        type=Path,
        help="folder of the DreamBooth data set with its prompts_and_classes.txt: 25 prompts × 4 pictures, "
        "1200 steps (without it the short form, on subjects of the embedded base)",
    )
    what.add_argument("--base", default="tiny_world", help="folder or hub id (tiny_world)")
    what.add_argument("--methods", nargs="+", metavar="NAME", help="methods of train-dreambooth (seven)")
    what.add_argument("--subjects", nargs="+", metavar="NAME", help="(all of --data, or eight)")
    what.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="of training (0)")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--learning_rates",
        nargs="+",
        default=[],
        metavar="METHOD=RATE",
        help="where it is neither the published one nor, on Tiny World, the best there",
    )
    how.add_argument(
        "--train",
        nargs="+",
        default=[],
        metavar="OPTION=VALUE",
        help="options of train-dreambooth for all methods, e.g. max_train_steps=600",
    )
    how.add_argument("--num_images", type=int, help="pictures of each prompt (4, short 2)")
    how.add_argument("--inference_steps", type=int, help="of each picture (25, short 15)")
    how.add_argument("--batch_size", type=int, help="pictures drawn at once (4, short 16)")
    how.add_argument(
        "--encoder",
        action="append",
        help="dino, dinov2, clip, tiny_world, a folder or a hub id; repeatable",
    )
    how.add_argument("--lpips_weights", type=Path, help="file with torchvision's weights of AlexNet")
    how.add_argument("--num_processes", type=int, default=1, help="runs at once; one CPU thread each (1)")
    how.add_argument("--keep_adapters", action="store_true", help="keep what was trained, too")
    how.add_argument("--plan", action="store_true", help="say what would be done, and do nothing")
    parser.set_defaults(run=_benchmark)


def _benchmark(arguments: argparse.Namespace) -> None:
    from ether_diffusion.benchmark.plan import (
        BASE,
        METHODS,
        check_settings,
        keep_plan,
        plan_benchmark,
    )
    from ether_diffusion.benchmark.runs import find_result, training_config
    from ether_diffusion.scripts.drawing import hush_libraries
    from ether_diffusion.tiny_world.concepts import find_concept
    from ether_diffusion.tiny_world.subjects import write_photos

    methods, settings = arguments.methods or METHODS, _settings(arguments)
    check_settings(methods, settings)
    if arguments.num_processes < 1:
        raise ValueError(f"--num_processes is from 1; found {arguments.num_processes}")
    subjects = _subjects(arguments)
    root = arguments.output_dir.absolute()
    runs = plan_benchmark(methods, subjects, arguments.seeds)
    for run in runs[: len(methods) + 1]:  # the settings of a method are those of all its runs
        if run.method != BASE:
            training_config(run, root, settings)
    if arguments.plan:
        done = sum(find_result(run, root) is not None for run in runs)
        print(_described(runs, settings, done))
        return
    hush_libraries()
    keep_plan(root, settings)
    if arguments.data is None:
        for subject in subjects:
            write_photos(find_concept(subject.name), subject.photos)
    _do(arguments, runs, settings, root)


def _do(
    arguments: argparse.Namespace, runs: "list[BenchmarkRun]", settings: "BenchmarkSettings", root: Path
) -> None:
    """Do what is left, then write and print the results."""
    from ether_diffusion.benchmark.results import benchmark_sheet, shown, summarise
    from ether_diffusion.benchmark.runs import do_all
    from ether_diffusion.durable_files import write_files

    form = "short, on Tiny World" if arguments.data is None else "paper"

    def report(done: int, total: int) -> None:
        print(f"{done} of {total} runs", file=sys.stderr, flush=True)
        _write_results()

    def _write_results() -> None:
        text = json.dumps(summarise(runs, root, settings, form=form), indent=1, allow_nan=False)
        write_files(root, {BENCHMARK_FILE: f"{text}\n".encode()})

    with _quiet(logging.getLogger("ether_diffusion.training")):
        do_all(runs, root, settings, num_processes=arguments.num_processes, on_progress=report)
    _write_results()
    write_files(root, {SHEET_FILE: benchmark_sheet(runs, root, settings)})
    print(shown(summarise(runs, root, settings, form=form)))
    print(f"written: {root / BENCHMARK_FILE}, {root / SHEET_FILE}")


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Let a logger say errors only, inside."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _settings(arguments: argparse.Namespace) -> "BenchmarkSettings":
    from ether_diffusion.benchmark.plan import PAPER_TRAINING, TINY_TRAINING, BenchmarkSettings

    is_short = arguments.data is None
    if is_short and arguments.base != "tiny_world":
        raise ValueError(
            f"the short form is of tiny_world; give --data with photographs for {arguments.base}"
        )
    rates: dict[str, float] = {}
    for name, text in _pairs(arguments.learning_rates, "--learning_rates"):
        try:
            rates[name] = float(text)
        except ValueError:
            raise ValueError(f"--learning_rates {name}={text} is no number") from None
    training: dict[str, Json] = dict(TINY_TRAINING if is_short else PAPER_TRAINING)
    for name, text in _pairs(arguments.train, "--train"):
        training[name] = _value(text)
    encoders = arguments.encoder or (["tiny_world"] if arguments.base == "tiny_world" else ["dino", "clip"])
    short_or_paper = (2, 15, 16) if is_short else (4, 25, 4)
    given = (arguments.num_images, arguments.inference_steps, arguments.batch_size)
    counts = [own if each is None else each for own, each in zip(short_or_paper, given, strict=True)]
    return BenchmarkSettings(
        base=arguments.base,
        training=training,
        learning_rates=rates,
        num_images=counts[0],
        num_inference_steps=counts[1],
        batch_size=counts[2],
        encoders=tuple(encoders),
        lpips_weights=arguments.lpips_weights,
        keep_adapters=arguments.keep_adapters,
    )


def _pairs(values: list[str], flag: str) -> list[tuple[str, str]]:
    pairs = []
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name or not text:
            raise ValueError(f"{flag} takes NAME=VALUE; found {value}")
        pairs.append((name, text))
    return pairs


def _value(text: str) -> "Json":
    """Read a value as JSON does, e.g. 600, 0.5, true; anything else is text."""
    try:
        value: Json = json.loads(text)
    except ValueError:
        return text
    return value


def _subjects(arguments: argparse.Namespace) -> "list[Subject]":
    from ether_diffusion.benchmark.plan import TINY_SUBJECTS, read_dreambooth, tiny_subjects

    if arguments.data is not None:
        return read_dreambooth(arguments.data.absolute(), arguments.subjects)
    names = list(dict.fromkeys(arguments.subjects or TINY_SUBJECTS))
    return tiny_subjects(names, arguments.output_dir.absolute() / "photos")


def _described(runs: "list[BenchmarkRun]", settings: "BenchmarkSettings", done: int) -> str:
    """Return what is to be done, a line a matter."""
    from ether_diffusion.benchmark.plan import BASE
    from ether_diffusion.benchmark.results import LABELS

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
        lines.append(f"{LABELS[method]}: learning rate {settings.learning_rate(method):g}")  # type: ignore[arg-type]  # checked
    for subject in subjects.values():
        trained_as = subject.instance_prompt or "captions of its own"
        lines.append(f"{subject.name}: {trained_as}; {subject.prompts[0]}, …")
    return "\n".join(lines)
