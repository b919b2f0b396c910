"""What a benchmark is to do, by method, subject and seed; and `ether plan`: what to train with."""

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from ether_diffusion.bases.distilled import distilled_doubt
from ether_diffusion.durable_files import write_files
from ether_diffusion.metrics.scores import Estimate
from ether_diffusion.strict_json import Json, Within, checked, read_json
from ether_diffusion.tiny_world import EMBEDDED
from ether_diffusion.tiny_world.concepts import find_concept, load_concepts
from ether_diffusion.tiny_world.pictures import OBJECT
from ether_diffusion.tiny_world.subjects import IDENTIFIER, NUM_PHOTOS, unseen_prompts, validation_prompts
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
TINY_SUBJECTS = (
    *("fox", "owl", "taxi", "helicopter", "cupcake", "teapot", "guitar", "robot"),
    *("penguin", "pineapple", "teddy bear", "pumpkin"),
    *(concept.name for concept in load_concepts("benchmark")),
)
"""What a benchmark learns: of every kind, held out whole, fixed before any run. The first eight were those of
the benchmark in docs/results; the other held-out concepts are for choosing rates and methods."""
_PROMPT = re.compile(r"""^\s*['"](.+?)['"]\.format\(""", re.MULTILINE)
_ROW = re.compile(r"^\s*(\w[\w-]*),([\w -]+?)\s*$", re.MULTILINE)

METHODS: tuple[AdapterMethod, ...] = ("full", "lora", "oft", "hra", "delora", "ether", "ether_plus")
"""The rows of the table; full is DreamBooth, which trains every weight of the UNet. Others have options, as
"lora:rank=1"."""
BASE = "base"
"""The method of the runs that train nothing: what the base draws from the same prompts."""
REAL = "real"
"""The row of the photos themselves."""
LABELS = {
    REAL: "real images",
    BASE: "no adapter",
    "full": "DreamBooth (full)",
    "lora": "LoRA r=4",
    "oft": "OFT n=4",
    "hra": "HRA r=4",
    "delora": "DeLoRA r=4",
    "boft": "BOFT n=4",
    "ia3": "IA3",
    "ether": "ETHER",
    "ether_plus": "ETHER+",
}
PLAN_FILE = "plan.json"
SAID_BY_RUNS = frozenset(
    {"adapter", "seed", "output_dir", "pretrained_model_name_or_path", "instance_data_dir", "instance_prompt"}
    | {"dataset_name", "token", "class_data_dir", "class_prompt", "export_lora", "push_to_hub"}
    | {"resume_from_checkpoint"}
)
"""Options of train-dreambooth that neither a row nor all of them can have."""

TINY_TRAINING: Mapping[str, Json] = {
    "max_train_steps": 200,
    "train_batch_size": 4,
    "random_flip": True,
    "checkpointing_steps": 200,
}
"""The short form, for Tiny World: about a minute on one core of a CPU."""
TINY_LEARNING_RATES: Mapping[str, float] = {
    "full": 1e-4, "lora": 3e-3, "oft": 1e-3, "hra": 1e-2, "delora": 3e-3,
    "ia3": 3e-2, "ether": 3e-2, "ether_plus": 3e-3,
}  # fmt: skip
"""Of the greatest likeness in docs/results/rates.json, on subjects that the benchmark has not."""
PAPER_TRAINING: Mapping[str, Json] = {
    # ETHER, Bini et al. 2024, arXiv:2405.20271, 5.1.1 and C.1; 1200 is where its best runs were
    "num_blocks": 4,
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
    """A subject to learn, and what it is asked for; without a class its photos have captions of their own.

    Nothing is chosen by its prompts: training is validated on others.
    """

    name: str
    photos: Path
    prompts: tuple[str, ...]
    identifier: str
    class_name: str | None
    validation_prompts: tuple[str, ...] = ()

    @property
    def instance_prompt(self) -> str | None:
        """What every photo is learned as."""
        return None if self.class_name is None else f"a photo of {self.identifier} {self.class_name}"

    @property
    def class_prompt(self) -> str | None:
        """What its class images are drawn from."""
        return None if self.class_name is None else f"a photo of {self.class_name}"


def tiny_subjects(names: Sequence[str], folder: Path) -> list[Subject]:
    """Return subjects of Tiny World, whose photos are to be drawn into a folder."""
    return [
        Subject(
            name,
            folder / name.replace(" ", "_"),
            unseen_prompts(concept := find_concept(name)),
            IDENTIFIER,
            None,
            validation_prompts(concept),
        )
        for name in dict.fromkeys(names)
    ]


def read_dreambooth(folder: Path, names: Sequence[str] | None = None) -> list[Subject]:
    """Return the subjects of a folder laid out as the DreamBooth data set: those named, or all there are.

    All that is wrong with them is said at once, in a ValueError.
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
    objects, live = (_PROMPT.findall(part) for part in rest.partition("Live Subject Prompts")[::2])
    classes = {name: class_name for name, class_name in _ROW.findall(head) if name != "subject_name"}
    if not classes or not objects or not live:
        raise ValueError(f"{printable(file)} lacks classes or prompts; take the file of the data set")
    there = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    subjects, problems = [], []
    for prompt in (*objects, *live):
        if re.findall(r"\{(.*?)\}", prompt) != ["0", "1"]:
            problems.append(f"the prompt {printable(prompt)} does not hold {{0}} and {{1}}")
    for name in dict.fromkeys(there if names is None else names):
        if name not in there or name not in classes:
            lacks = f"class in {PROMPTS_FILE}" if name in there else f"folder in {printable(folder)}"
            problems.append(f"{printable(name)} has no {lacks}")
            continue
        try:
            find_photos(folder / name)
        except ValueError as reason:
            problems.append(str(reason))
        templates = live if classes[name] in LIVE_CLASSES else objects
        prompts = [each.replace("{0}", UNIQUE_TOKEN).replace("{1}", classes[name]) for each in templates]
        subjects.append(Subject(name, folder / name, tuple(prompts), UNIQUE_TOKEN, classes[name]))
    if problems or not subjects:
        raise ValueError("; ".join(problems) or f"{printable(folder)} holds no folders of subjects")
    return subjects


@checked()
class BenchmarkSettings:
    """How every run is trained, drawn and measured.

    `training` are options of train-dreambooth that all methods share. `lpips_weights` are AlexNet's; None
    takes those in torch's cache, and leaves LPIPS out without.
    """

    base: str
    training: Mapping[str, Any]
    num_images: Annotated[int, Within(1, 1024)] = 4
    inference_steps: Annotated[int, Within(1, 1000)] = 25
    batch_size: Annotated[int, Within(1, 1024)] = 4
    encoders: tuple[str, ...] = ("dino", "clip")
    lpips_weights: Path | None = None
    keep_adapters: bool = False

    def learning_rate(self, method: str) -> float:
        """Return the rate of a row: its own, that of all, the best on Tiny World, or the published one."""
        name, options = method_of(method)
        rate = options.get("learning_rate", self.training.get("learning_rate"))
        own = TINY_LEARNING_RATES if self.base in EMBEDDED else {}
        usual: dict[Any, float] = {**DEFAULT_LEARNING_RATES, **own}
        return rate if isinstance(rate, float | int) else usual[name]

    def to_json(self) -> dict[str, Json]:
        """Return what results depend on."""
        shown = [
            Path(each).name if Path(each).is_absolute() else each for each in (self.base, *self.encoders)
        ]
        return {
            "base": shown[0],
            "training": dict(self.training),
            "learning_rates": {method: self.learning_rate(method) for method in METHODS},
            "num_images": self.num_images,
            "num_inference_steps": self.inference_steps,
            "batch_size": self.batch_size,
            "encoders": list(shown[1:]),
        }

    def places(self, data: Path | None) -> dict[str, Json]:
        """Return where what results depend on lies on this machine: results themselves have no paths."""

        def place(given: str | Path | None) -> str | None:
            return None if given is None else str(Path(given).resolve() if Path(given).exists() else given)

        encoders: list[Json] = [place(each) for each in self.encoders]
        return {
            "data": place(data), "base": place(self.base), "encoders": encoders,
            "lpips_weights": place(self.lpips_weights),
        }  # fmt: skip


def method_of(row: str) -> tuple[str, dict[str, Json]]:
    """Return the method of a row and its own options: "lora:rank=1,dropout=0.1".

    A ValueError says that it is no method, or what is no option's value.
    """
    method, colon, text = row.partition(":")
    if method not in get_args(AdapterMethod):
        raise ValueError(
            f"{printable(method)} is no method; the methods are {listed(get_args(AdapterMethod), 10)}"
        )
    texts = re.split(r",(?=\w+=)", text) if colon else ()
    return method, options_of(texts, f"the method {printable(row)}")


def options_of(texts: Sequence[str], where: str) -> dict[str, Json]:
    """Return options of train-dreambooth from NAME=VALUE, a value being JSON (600, 0.5, true) or text."""
    options: dict[str, Json] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not name or not value:
            raise ValueError(f"{where} takes NAME=VALUE; found {printable(text)!r}")
        if name in SAID_BY_RUNS:
            raise ValueError(f"{where} cannot say {name}, which the benchmark itself says of each run")
        if name in options:
            raise ValueError(f"{where} says {printable(name)} twice; leave one of them out")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def label_of(row: str) -> str:
    """Return a row's name for people: "ETHER+", "LoRA r=1 at 0.003", "ETHER+ sides=output"."""
    if row in LABELS:
        return LABELS[row]
    method, options = method_of(row)
    names = {"rank": "r=", "num_blocks": "n=", "target_modules": "", "learning_rate": "at "}
    shown = [f"{names.get(name, f'{name}=')}{value}" for name, value in options.items()]
    name = LABELS[method].partition(" ")[0] if options.keys() & {"rank", "num_blocks"} else LABELS[method]
    return " ".join([name, *shown])


def labels_of(rows: Iterable[str]) -> dict[str, str]:
    """Return the names of rows; the learning rate is in those alone that no other option tells apart."""
    whole = {row: label_of(row) for row in rows}
    short = {row: re.sub(r" at \S+", "", label) for row, label in whole.items()}
    return {row: whole[row] if [*short.values()].count(label) > 1 else label for row, label in short.items()}


@dataclass(frozen=True)
class BenchmarkRun:
    """One adapter to train, draw with and measure; of the method "base" there is nothing to train."""

    method: str
    subject: Subject
    seed: int

    def folder(self, root: Path) -> Path:
        """Return where it lies."""
        return root / "runs" / folder_of(self.method) / f"{self.subject.name.replace(' ', '_')}_{self.seed}"


def folder_of(row: str) -> str:
    """Return the name of the folder of a row."""
    return re.sub("[^\\w.-]", "_", row)


def plan_benchmark(
    methods: Sequence[str], subjects: Sequence[Subject], seeds: Sequence[int]
) -> list[BenchmarkRun]:
    """Return all runs, subject by subject, so that what is done at any time compares all methods.

    Rows with one name or one folder, as "lora" and "lora:rank=4", are a ValueError.
    """
    for name_of in (label_of, folder_of):
        named = dict[str, str]()
        for row in methods:
            if (other := named.setdefault(name_of(row), row)) != row:
                alike = f"{printable(other)} and {printable(row)} would both be {name_of(row)}"
                raise ValueError(f"the methods {alike}; leave one of them out, or write it otherwise")
    return [
        BenchmarkRun(method, subject, seed)
        for seed in dict.fromkeys(seeds)
        for subject in subjects
        for method in (BASE, *dict.fromkeys(methods))
    ]


def keep_plan(root: Path, settings: BenchmarkSettings, data: Path | None, *, write: bool = True) -> None:
    """Write what a folder's runs have in common; one of other settings, or of other things, is refused."""
    there = next(each for each in (root, *root.parents) if each.exists())
    if not there.is_dir():
        raise ValueError(f"{printable(there)} is a file; give a folder as --output_dir")
    file, asked = root / PLAN_FILE, {**settings.to_json(), "places": settings.places(data)}
    if not root.exists():
        wrong, found = list[str](), ""
    elif file.is_file():
        stored = read_json(file.read_bytes(), dict[str, Any], printable(file))
        wrong = [name for name in sorted(asked) if stored.get(name) != asked[name]]
        found = f"a benchmark with other settings ({listed(wrong)})"
    else:
        wrong = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
        found = f"{listed(wrong)}, which belong to no benchmark"
    if wrong:
        raise ValueError(f"{printable(root)} holds {found}; give another --output_dir, or its own settings")
    if write:
        root.mkdir(parents=True, exist_ok=True)
        write_files(root, {PLAN_FILE: f"{json.dumps(asked, indent=1)}\n".encode()})


CURVES_FILE = Path(__file__).with_name("curves.json")
FALLBACK: AdapterMethod = "ether_plus"
PAPER_PHOTOS = (4, 6)
"""How many photos the subjects of the DreamBooth data set have."""

Curves = Mapping[str, Any]
"""What advice rests on, as `research/write_results.py` writes it: the benchmark, usable rates, and photos."""


@dataclass(frozen=True)
class Advice:
    """What to train with; `expected` and `basis` are sentences, `doubts` what was never measured.

    `label` names the method for people, with the options of its row.
    """

    method: str
    label: str
    learning_rate: float
    options: Mapping[str, Json]
    expected: tuple[str, ...]
    basis: tuple[str, ...]
    doubts: tuple[str, ...]

    def flags(self) -> list[str]:
        """Return the flags of train-dreambooth that it comes to."""
        values = {"adapter": self.method, "learning_rate": f"{self.learning_rate:g}", **self.options}
        shown = {n: "" if value is True else f" {shlex.quote(str(value))}" for n, value in values.items()}
        return [f"--{name}{text}" for name, text in shown.items() if values[name] is not False]


def read_curves(file: Path = CURVES_FILE) -> Curves:
    """Read what was measured when this package was made."""
    found: Curves = json.loads(file.read_text(encoding="utf-8"))
    return found


def advise(num_photos: int, base: str, curves: Curves) -> Advice:
    """Return what to do with so many photos on a base.

    On the base that was measured it is the adapter with the fewest parameters of those within 2 % of the
    best adapter's likeness; elsewhere it is the paper's.
    """
    if num_photos < 1:
        raise ValueError(f"a subject needs photos; found {num_photos}")
    if curves["benchmark"] is not None and base == curves["benchmark"]["base"]:
        return _measured_advice(num_photos, curves["benchmark"], curves)
    doubts = [f"nothing was measured here on {base}: no fidelity and no time can be promised"]
    distilled = distilled_doubt(base, Path(base) if Path(base).is_dir() else None)
    doubts += [] if distilled is None else [distilled]
    rate, training = TINY_LEARNING_RATES[FALLBACK], TINY_TRAINING
    basis = "the short form's setting and rate; its benchmark was not done for this package"
    if base not in EMBEDDED:
        rate, training = DEFAULT_LEARNING_RATES[FALLBACK], PAPER_TRAINING
        basis = "the setting of the ETHER paper (arXiv:2405.20271, 5.1.1, C.1), 1200 steps on SD 1.5"
        doubts.append("train-dreambooth --dry_run does one step here; multiply its time by the steps")
        doubts += _doubts_of_photos(num_photos, *PAPER_PHOTOS)
    return Advice(FALLBACK, LABELS[FALLBACK], rate, training, (), (basis,), tuple(doubts))


def _measured_advice(num_photos: int, found: Mapping[str, Any], curves: Curves) -> Advice:
    rows, best = found["methods"], found["best"]
    name = min((each for each in rows if not rows[each]["is_behind"]), key=lambda n: rows[n]["parameters"])
    row, (method, own), labels = rows[name], method_of(name), labels_of(rows)
    own.pop("learning_rate", None)
    training = {**found["training"], **own}
    likeness = {each: Estimate(**rows[each]["likeness"]) for each in (name, best)}
    basis = [
        f"{found['num_done']} of {found['num_runs']} runs of the benchmark, {found['num_subjects']} subjects "
        f"with {NUM_PHOTOS} photos each: likeness {likeness[name]}"
    ]
    if name != best:
        cost = f"{rows[best]['parameters']:,} parameters, which is less than 2 % more"
        basis.append(f"{labels[best]} had {likeness[best]} with {cost}")
        if row.get("drift") and rows[best].get("drift"):
            drifts = (f"{rows[each]['drift']['mean']:.3f}" for each in (name, best))
            basis.append("drift of pictures without the subject {}, and {}".format(*drifts))
    studied = curves["photos"] if curves["photos"] and curves["photos"]["method"] == name else {}
    enough = {int(number): steps for number, steps in studied.get("enough_steps", {}).items() if steps}
    expected = [f"likeness to the subject {likeness[name]} by {found['column']}"]
    if row["recognised"] is not None:
        expected.append(f"{row['recognised']['mean']:.0%} of the pictures recognised as the subject")
    if not enough:
        doubts = _doubts_of_photos(num_photos, NUM_PHOTOS, NUM_PHOTOS)
    else:  # the trainings with as many photos, or the next fewer
        number = max((each for each in enough if each <= num_photos), default=min(enough))
        training["max_train_steps"] = enough[number]
        score = Estimate(**studied["cells"][str(number)][str(enough[number])][OBJECT])
        photos = "one photo" if number == 1 else f"{number} photos"
        told = f"likeness {score}; the base alone {studied['base'][OBJECT]:.3f}"
        basis.append(f"the fewest steps within 2 % of the best, of trainings with {photos}: {told}")
        doubts = _doubts_of_photos(num_photos, min(enough), max(enough))
    expected.append(f"a file of {row['bytes'] / 1024:.0f} KiB, {row['parameters']:,} parameters")
    usable = (curves["usable_range"] or {}).get(name)
    if usable is not None:
        basis.append(f"rates from {usable['lowest']:g} to {usable['highest']:g} came within 5 % of its best")
    texts = (tuple(expected), tuple(basis), tuple(doubts))
    return Advice(method, labels[name], row["learning_rate"], training, *texts)


def _doubts_of_photos(num_photos: int, least: int, most: int) -> list[str]:
    if least <= num_photos <= most:
        return []
    measured = f"{least}" if least == most else f"{least} to {most}"
    less = "; expect less variety" if num_photos < least else ""
    return [f"{num_photos} photos: what this rests on had {measured}, and the steps are kept{less}"]
