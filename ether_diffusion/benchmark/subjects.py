"""The benchmark's subjects: a folder laid out as the DreamBooth data set, or Tiny World's held-out ones."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.tiny_world.concepts import find_concept
from ether_diffusion.tiny_world.subjects import IDENTIFIER, unseen_prompts, write_photos
from ether_diffusion.training import find_photos
from ether_diffusion.training.captions import decode_text
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
    """Return subjects of Tiny World, whose photos `write_tiny_photos` puts into a folder.

    Raises:
        ValueError: there is no such concept.
    """
    return [
        Subject(name, folder / name.replace(" ", "_"), unseen_prompts(find_concept(name)), IDENTIFIER, None)
        for name in names
    ]


def write_tiny_photos(subjects: Sequence[Subject]) -> None:
    """Draw the photos of Tiny World's subjects; equal bytes each time."""
    for subject in subjects:
        write_photos(find_concept(subject.name), subject.photos)


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
        classes, objects, live = _read_prompts(decode_text(file.read_bytes()))
    except UnusableFileError as reason:
        raise ValueError(f"{printable(file)} {reason}") from None
    if not classes or not objects or not live:
        raise ValueError(f"{printable(file)} lacks classes or prompts; take the file of the data set")
    there = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    wanted = list(dict.fromkeys(there if names is None else names))
    problems = [
        f"{printable(name)} has no folder in {printable(folder)}" for name in wanted if name not in there
    ]
    problems += [
        f"{printable(name)} has no class in {PROMPTS_FILE}"
        for name in wanted
        if name in there and name not in classes
    ]
    for name in wanted:
        if name in there:
            try:
                find_photos(folder / name)
            except ValueError as reason:
                problems.append(str(reason))
    if problems or not wanted:
        raise ValueError("; ".join(problems) or f"{printable(folder)} holds no folders of subjects")
    return [
        Subject(
            name,
            folder / name,
            tuple(
                each.format(UNIQUE_TOKEN, classes[name])
                for each in (live if classes[name] in LIVE_CLASSES else objects)
            ),
            UNIQUE_TOKEN,
            classes[name],
        )
        for name in wanted
    ]


def _read_prompts(text: str) -> tuple[dict[str, str], list[str], list[str]]:
    """Return classes by subject, and the templates of objects and of live subjects."""
    head, _, rest = text.partition("Object Prompts")
    objects, _, live = rest.partition("Live Subject Prompts")
    rows = [match for line in head.splitlines() if (match := _ROW.match(line.strip())) is not None]
    classes = {row[1]: row[2].strip() for row in rows if row[1] != "subject_name"}
    return classes, _templates(objects), _templates(live)


def _templates(text: str) -> list[str]:
    found = [match[1] for line in text.splitlines() if (match := _PROMPT.match(line)) is not None]
    foreign = [each for each in found if re.findall(r"\{(.*?)\}", each) != ["0", "1"]]
    if foreign:
        raise ValueError(
            f"the prompt {listed(foreign[:1])} does not hold {{0}} and {{1}}; mend {PROMPTS_FILE}"
        )
    return found
