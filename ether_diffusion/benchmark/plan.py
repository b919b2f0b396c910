"""What a benchmark is to do: its subjects and settings, and one run for each method, subject and seed."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from ether_diffusion.durable_files import write_files
from ether_diffusion.strict_json import Json, read_json
from ether_diffusion.tiny_world import ALIAS
from ether_diffusion.tiny_world.concepts import find_concept
from ether_diffusion.tiny_world.subjects import IDENTIFIER, unseen_prompts
from ether_diffusion.training import find_photos
from ether_diffusion.training.captions import decode_text
from ether_diffusion.training.config import DEFAULT_LEARNING_RATES, AdapterMethod
from ether_diffusion.training.plain_files import UnusableFileError
from ether_diffusion.wording import listed, printable

PROMPTS_FILE = "prompts_and_classes.txt"
UNIQUE_TOKEN = "qwe"
"""The identifier in the code behind the published tables."""
LIVE_CLASSES = frozenset({"cat", "dog"})
"""The data set's classes of live subjects, which have prompts of their own."""
TINY_SUBJECTS = ("fox", "owl", "taxi", "helicopter", "cupcake", "teapot", "guitar", "robot")
"""Two animals, two vehicles, a food, two objects and a character: held out whole, fixed before any run."""

_PROMPT = re.compile(r"""^\s*['"](.+?)['"]\.format\(""")
_ROW = re.compile(r"^(\w[\w-]*),([\w -]+)$")

METHODS: tuple[AdapterMethod, ...] = ("full", "lora", "oft", "hra", "delora", "ether", "ether_plus")
"""The rows of the table; full is DreamBooth, which trains every weight of the UNet."""
BASE = "base"
"""The method of the runs that train nothing: what the base draws from the same prompts."""
PLAN_FILE = "plan.json"

TINY_TRAINING: Mapping[str, Json] = {
    "max_train_steps": 100,
    "train_batch_size": 4,
    "random_flip": True,
    "checkpointing_steps": 100,
}
"""The short form, for Tiny World: about twenty-five seconds on one core of a CPU."""
TINY_LEARNING_RATES: Mapping[str, float] = {
    "full": 1e-4,
    "lora": 3e-3,
    "oft": 1e-3,
    "hra": 1e-1,
    "delora": 1e-3,
    "ether": 3e-2,
    "ether_plus": 3e-3,
}
"""The best of docs/results/learning_rates.json for Tiny World, on subjects that the benchmark has not."""
PAPER_TRAINING: Mapping[str, Json] = {
    # ETHER, Bini et al. 2024, arXiv:2405.20271, 5.1.1 and C.1; 1200 is where its best runs were
    "max_train_steps": 1200,
    "train_batch_size": 1,
    "prior_preservation": "class_images",
    "num_class_images": 200,
    "prior_loss_weight": 1.0,
    "checkpointing_steps": 200,
}
"""The paper's form; every method at the rate that was published for it, and the last step is scored."""


@dataclass(frozen=True)
class Subject:
    """A subject to learn, and what it is asked for.

    class_name is None where each photo has a caption of its own, beside it.
    """

    name: str
    photos: Path
    prompts: tuple[str, ...]
    identifier: str
    class_name: str | None

    @property
    def instance_prompt(self) -> str | None:
        """What every photo is learned as."""
        return None if self.class_name is None else f"a photo of {self.identifier} {self.class_name}"

    @property
    def class_prompt(self) -> str | None:
        """What its class images are drawn from."""
        return None if self.class_name is None else f"a photo of {self.class_name}"


def tiny_subjects(names: Sequence[str], folder: Path) -> list[Subject]:
    """Return subjects of Tiny World, whose photos are to be drawn into a folder.

    Raises:
        ValueError: there is no such concept.
    """
    return [
        Subject(name, folder / name.replace(" ", "_"), unseen_prompts(find_concept(name)), IDENTIFIER, None)
        for name in names
    ]


def read_dreambooth(folder: Path, names: Sequence[str] | None = None) -> list[Subject]:
    """Return the subjects of a folder laid out as the DreamBooth data set: those named, or all there are.

    Raises:
        FileNotFoundError: there is no such folder, or no file of prompts in it.
        ValueError: the file has no prompts, or a subject lacks its class or its photos; all are listed.
    """
    file = folder / PROMPTS_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no {printable(file)}; give the folder of the DreamBooth data set, with a folder of "
            "photos for each subject beside that file"
        )
    try:
        text = decode_text(file.read_bytes())
    except UnusableFileError as reason:
        raise ValueError(f"{printable(file)} {reason}") from None
    head, _, rest = text.partition("Object Prompts")
    objects, live = (_templates(part) for part in rest.partition("Live Subject Prompts")[::2])
    rows = [match for line in head.splitlines() if (match := _ROW.match(line.strip())) is not None]
    classes = {row[1]: row[2].strip() for row in rows if row[1] != "subject_name"}
    if not classes or not objects or not live:
        raise ValueError(f"{printable(file)} lacks classes or prompts; take the file of the data set")
    there = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    subjects, problems = [], []
    for name in dict.fromkeys(there if names is None else names):
        shown = printable(name)
        if name not in there:
            problems.append(f"{shown} has no folder in {printable(folder)}")
            continue
        if name not in classes:
            problems.append(f"{shown} has no class in {PROMPTS_FILE}")
        try:
            find_photos(folder / name)
        except ValueError as reason:
            problems.append(str(reason))
        class_name = classes.get(name, "")
        templates = live if class_name in LIVE_CLASSES else objects
        prompts = tuple(each.format(UNIQUE_TOKEN, class_name) for each in templates)
        subjects.append(Subject(name, folder / name, prompts, UNIQUE_TOKEN, class_name))
    if problems or not subjects:
        raise ValueError("; ".join(problems) or f"{printable(folder)} holds no folders of subjects")
    return subjects


def _templates(text: str) -> list[str]:
    found = [match[1] for line in text.splitlines() if (match := _PROMPT.match(line)) is not None]
    for each in found:
        if re.findall(r"\{(.*?)\}", each) != ["0", "1"]:
            raise ValueError(
                f"the prompt {printable(each)} does not hold {{0}} and {{1}}; mend {PROMPTS_FILE}"
            )
    return found


@dataclass(frozen=True)
class BenchmarkSettings:
    """How every run is trained, drawn and measured.

    Attributes:
        base: folder, hub id or tiny_world.
        training: options of train-dreambooth that all methods share.
        learning_rates: by method, where it is neither the published one nor, on Tiny World, the best there.
        num_images: pictures of each prompt.
        encoders: what likeness is measured with, by name, folder or hub id.
        lpips_weights: AlexNet's; None takes those in torch's cache, and leaves LPIPS out without.
    """

    base: str
    training: Mapping[str, Json]
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    num_images: int = 4
    num_inference_steps: int = 25
    batch_size: int = 4
    encoders: tuple[str, ...] = ("dino", "clip")
    lpips_weights: Path | None = None
    keep_adapters: bool = False

    def learning_rate(self, method: str) -> float:
        """Return the rate that a method is trained at."""
        published: Mapping[Any, float] = DEFAULT_LEARNING_RATES
        own = TINY_LEARNING_RATES if self.base == ALIAS else {}
        return self.learning_rates.get(method) or own.get(method) or published[method]

    def to_json(self) -> dict[str, Json]:
        """Return what results depend on."""
        return {
            "base": _shown_source(self.base),
            "training": dict(self.training),
            "learning_rates": {method: self.learning_rate(method) for method in METHODS},
            "num_images": self.num_images,
            "num_inference_steps": self.num_inference_steps,
            "batch_size": self.batch_size,
            "encoders": [_shown_source(name) for name in self.encoders],
        }


def _shown_source(name: str) -> str:
    return Path(name).name if Path(name).is_absolute() else name


@dataclass(frozen=True)
class BenchmarkRun:
    """One adapter to train, draw with and measure; of the method "base" there is nothing to train."""

    method: str
    subject: Subject
    seed: int

    def folder(self, root: Path) -> Path:
        """Return where it lies."""
        return root / "runs" / self.method / f"{self.subject.name.replace(' ', '_')}_{self.seed}"


def plan_benchmark(
    methods: Sequence[str], subjects: Sequence[Subject], seeds: Sequence[int]
) -> list[BenchmarkRun]:
    """Return all runs, subject by subject, so that what is done at any time compares all methods."""
    return [
        BenchmarkRun(method, subject, seed)
        for seed in dict.fromkeys(seeds)
        for subject in subjects
        for method in (BASE, *dict.fromkeys(methods))
    ]


def check_settings(methods: Sequence[str], settings: BenchmarkSettings) -> None:
    """Refuse what cannot be used, all at once.

    Raises:
        ValueError: as said.
    """
    known = get_args(AdapterMethod)
    problems = [f"{printable(name)} is no method" for name in methods if name not in known]
    for name, rate in settings.learning_rates.items():
        if name not in methods:
            problems.append(f"--learning_rates names {printable(name)}, which is not compared")
        if not 0 < rate < float("inf"):
            problems.append(f"the learning rate of {printable(name)} is to be above 0; found {rate:g}")
    counts = {
        "num_images": settings.num_images,
        "inference_steps": settings.num_inference_steps,
        "batch_size": settings.batch_size,
    }
    problems += [f"--{name} is from 1; found {count}" for name, count in counts.items() if count < 1]
    if problems:
        raise ValueError(f"{'; '.join(problems)}; the methods are {listed(known, len(known))}")


def keep_plan(root: Path, settings: BenchmarkSettings) -> None:
    """Write what this folder's runs have in common, or compare with what is there.

    Raises:
        ValueError: the folder holds a benchmark of other settings, or something else.
    """
    root.mkdir(parents=True, exist_ok=True)
    file, asked = root / PLAN_FILE, settings.to_json()
    if file.is_file():
        stored = read_json(file.read_bytes(), dict[str, Any], printable(file))
        changed = sorted(name for name in asked if stored.get(name) != asked[name])
        if changed:
            raise ValueError(
                f"{printable(root)} holds a benchmark with other settings ({listed(changed)}); give another "
                "--output_dir, or the settings of its plan.json"
            )
        return
    others = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
    if others:
        raise ValueError(
            f"{printable(root)} holds {listed(others)}, which belong to no benchmark; give another "
            "--output_dir"
        )
    write_files(root, {PLAN_FILE: f"{json.dumps(asked, indent=1)}\n".encode()})
