"""The pictures of a benchmark side by side: a row a method, on equal prompts and seeds."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ether_diffusion.benchmark.carry_out import PICTURES
from ether_diffusion.benchmark.plan import BenchmarkRun, BenchmarkSettings
from ether_diffusion.benchmark.summary import LABELS
from ether_diffusion.contact_sheet import draw_contact_sheet

MAX_SUBJECTS = 8


def benchmark_sheet(runs: Sequence[BenchmarkRun], root: Path, settings: BenchmarkSettings) -> bytes:
    """Return a PNG of a picture by each method (rows) of each subject (columns, eight at most).

    Subject k is drawn from its prompt k, so that the prompts differ; a run without pictures is a gray field.
    """
    first = runs[0].seed
    subjects = list({run.subject.name: run.subject for run in runs}.values())[:MAX_SUBJECTS]
    methods = list(dict.fromkeys(run.method for run in runs))
    rows = []
    for method in methods:
        row = []
        for place, subject in enumerate(subjects):
            number = place % len(subject.prompts) * settings.num_images
            folder = BenchmarkRun(method, subject, first).folder(root) / PICTURES
            row.append(_opened(folder / f"{number:04d}.png"))
        rows.append(row)
    sheet = draw_contact_sheet(
        rows,
        row_labels=[LABELS.get(method, method) for method in methods],
        column_labels=[
            f"{subject.name}: {subject.prompts[place % len(subject.prompts)]}"
            for place, subject in enumerate(subjects)
        ],
    )
    file = io.BytesIO()
    sheet.save(file, format="png")
    return file.getvalue()


def _opened(path: Path) -> Image.Image:
    if not path.is_file():
        return Image.new("RGB", (64, 64), "gray")
    with Image.open(path) as image:
        return image.convert("RGB")
