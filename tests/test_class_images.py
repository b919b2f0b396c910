"""Prior preservation: class images, drawn where they are missing, or the base's own prediction."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import photo_files
import pytest
import torch
import training_runs
from photo_batches import assert_equal, base_like, fill_with_photos, plan, rows, source, uncached
from PIL import Image

from ether_diffusion.strict_json import Json
from ether_diffusion.training.config import DataConfig, PriorConfig
from ether_diffusion.training.photos import PhotoFolder
from ether_diffusion.training.prior import generate_class_images, read_class_images
from ether_diffusion.training.run import train_dreambooth


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    fill_with_photos(tmp_path / "photos", [(90, 70), (70, 90), (80, 80)])
    fill_with_photos(tmp_path / "class", [(70, 70), (99, 66), (80, 70), (64, 100)], first_seed=50)
    return DataConfig(instance_data_dir=tmp_path / "photos", random_flip=True, caption_dropout=0.2)


@pytest.fixture
def class_images(tmp_path: Path) -> PriorConfig:
    return PriorConfig(
        prior_preservation="class_images",
        class_data_dir=tmp_path / "class",
        class_prompt="a dog",
        prior_loss_weight=0.5,
    )


def test_class_rows_follow_the_instance_rows_one_for_each(
    data: DataConfig, class_images: PriorConfig
) -> None:
    for config in (data, uncached(data)):
        batch = source(config, class_images).batch([3, 4, 5])
        alone = source(config).batch([3, 4, 5])
        for place in range(3):
            assert_equal(rows(batch, place), rows(alone, place))
        assert batch.samples == (3, 4, 5, 3, 4, 5)
        assert batch.prompts[3:] == ("a dog",) * 3
        assert batch.weights.tolist() == [1, 1, 1, 0.5, 0.5, 0.5]
        assert not batch.is_frozen_prior.any()
        assert batch.masks is None


def test_a_class_row_is_the_same_in_every_split_and_worker(
    data: DataConfig, class_images: PriorConfig
) -> None:
    whole = source(data, class_images).batch(range(4))
    for visit in range(4):
        assert_equal(rows(source(data, class_images).batch([visit]), 1), rows(whole, 4 + visit))
    config = uncached(data, dataloader_num_workers=2)
    (found,) = source(config, class_images).batches([range(4)])
    assert_equal(found, source(uncached(data), class_images).batch(range(4)))


def test_class_images_take_the_shape_of_the_step(data: DataConfig, class_images: PriorConfig) -> None:
    config = DataConfig(instance_data_dir=data.instance_data_dir, use_aspect_ratio_buckets=True)
    for each in (config, uncached(config)):
        built = source(each, class_images, effective_batch=2)
        shapes = {
            built.batch([2 * step, 2 * step + 1]).latents.shape for step in range(built.plan.num_samples // 2)
        }
        assert len(shapes) == 3
        assert all(shape[0] == 4 for shape in shapes)


def test_all_class_images_are_used_and_in_the_fingerprint(
    data: DataConfig, class_images: PriorConfig
) -> None:
    built, names = source(data, class_images), {f"{number}.png" for number in range(4)}
    assert set(built.batch(range(60)).names[60:]) == names
    assert set(built.plan.fingerprint) == set(plan(data).fingerprint) | {
        f"class image {name}" for name in names
    }


def test_masks_leave_the_prior_whole(data: DataConfig, class_images: PriorConfig, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    for number, size in enumerate([(90, 70), (70, 90), (80, 80)]):
        mask = Image.new("L", size)
        mask.paste(255, (20, 20, 50, 50))
        mask.save(tmp_path / "masks" / f"{number}.png")
    config = DataConfig(instance_data_dir=data.instance_data_dir, mask_data_dir=tmp_path / "masks")
    frozen = PriorConfig(prior_preservation="frozen", class_prompt="a dog")
    for prior in (class_images, frozen):
        masks = source(config, prior).batch(range(3)).masks
        assert masks is not None
        assert torch.all(masks[3:] == 1)
        assert torch.all(masks[:3].amin((1, 2, 3)) == 0)


def test_frozen_rows_are_the_same_latents_with_the_class_prompt(data: DataConfig) -> None:
    prior = PriorConfig(prior_preservation="frozen", class_prompt="a dog", prior_loss_weight=2)
    needs = base_like(has_size_ids=True, is_inpainting=True)
    for config in (data, uncached(data)):
        built = source(config, prior, needs=needs)
        batch = built.batch(range(4))
        assert batch.is_frozen_prior.tolist() == [False] * 4 + [True] * 4
        assert torch.equal(batch.latents[:4], batch.latents[4:])
        assert batch.inpainting is not None
        assert batch.size_ids is not None
        assert torch.equal(batch.inpainting[:4], batch.inpainting[4:])
        assert torch.equal(batch.size_ids[:4], batch.size_ids[4:])
        assert batch.samples[:4] == batch.samples[4:]
        assert batch.prompts[4:] == ("a dog",) * 4
        assert batch.weights.tolist() == [1] * 4 + [2] * 4
        assert "a dog" in built.plan.prompts
    with pytest.raises(ValueError, match="prior_preservation=frozen needs class_prompt"):
        source(data, prior.replace(class_prompt=None))


@dataclass
class Drawn:
    images: list[Image.Image]


@dataclass
class Painter:
    """A pipeline that draws noise of its generators; after `stops_after` calls it is interrupted."""

    stops_after: int = 1000
    sizes: list[int] = field(default_factory=list)
    prompts: set[str] = field(default_factory=set)

    def __call__(self, prompt: list[str], *, generator: list[torch.Generator]) -> Drawn:
        if len(self.sizes) == self.stops_after:
            raise KeyboardInterrupt
        self.sizes.append(len(prompt))
        self.prompts |= set(prompt)
        return Drawn([self._draw(each, len(prompt)) for each in generator])

    def _draw(self, generator: torch.Generator, batch: int) -> Image.Image:
        values = torch.randint(256, (64, 64, 3), generator=generator, dtype=torch.uint8)
        values[0, 0, 0] = batch  # rounding depends on the batch
        return Image.fromarray(values.numpy())


def generate(pipeline: Painter, folder: Path, count: int, batch: int = 4) -> int:
    prior = wanted(folder, count, batch)
    return generate_class_images(pipeline, prior, read_class_images(prior), seed=7)


def wanted(folder: Path, count: int, batch: int = 4) -> PriorConfig:
    return PriorConfig(
        prior_preservation="class_images",
        class_data_dir=folder,
        class_prompt="a dog",
        num_class_images=count,
        sample_batch_size=batch,
    )


def count_usable(folder: Path) -> int:
    return len(read_class_images(wanted(folder, 1)).photos)


def files(folders: Iterable[Path]) -> list[dict[str, bytes]]:
    return [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]


def test_missing_class_images_are_drawn_and_named(tmp_path: Path) -> None:
    painter = Painter()
    assert generate(painter, tmp_path / "class", 10) == 10
    assert painter.sizes == [4, 4, 2]
    assert painter.prompts == {"a dog"}
    names = sorted(path.name for path in (tmp_path / "class").iterdir())
    assert [int(name.split("-")[0]) for name in names] == list(range(10))
    for name in names:
        data = (tmp_path / "class" / name).read_bytes()
        assert name.split("-")[1] == f"{hashlib.sha1(data).hexdigest()}.png"
    assert count_usable(tmp_path / "class") == 10


def test_interrupted_drawing_ends_with_the_files_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    generate(Painter(), whole, 10)
    with pytest.raises(KeyboardInterrupt):
        generate(Painter(stops_after=1), resumed, 10)
    assert len(list(resumed.iterdir())) == 4
    sorted(resumed.iterdir())[1].unlink()  # as if interrupted between two files
    sorted(resumed.iterdir())[2].write_bytes(b"")  # not usable, so not counted
    assert generate(Painter(), resumed, 10) == 8
    assert files([resumed]) == files([whole])


def test_own_class_images_count_and_stay(tmp_path: Path) -> None:
    fill_with_photos(tmp_path / "class", [(70, 70)] * 3)
    (tmp_path / "class" / "broken.jpg").write_bytes(b"")
    before = photo_files.snapshot(tmp_path / "class")
    assert count_usable(tmp_path / "class") == 3
    assert generate(Painter(), tmp_path / "class", 5) == 2
    assert count_usable(tmp_path / "class") == 5
    after = photo_files.snapshot(tmp_path / "class")
    folder = str(tmp_path / "class")
    assert {name: after[name] for name in before if name != folder} == {
        name: before[name] for name in before if name != folder
    }
    painter = Painter()
    assert generate(painter, tmp_path / "class", 5) == 0
    assert painter.sizes == []


def test_a_black_class_image_is_refused(tmp_path: Path) -> None:
    def black(prompt: list[str], *, generator: list[torch.Generator]) -> Drawn:
        return Drawn([Image.new("RGB", (64, 64))] * len(prompt))

    with pytest.raises(ValueError, match=r"class image 0 .* is black"):
        generate_class_images(black, wanted(tmp_path / "class", 1), PhotoFolder(), seed=0)


def test_class_images_that_cannot_be_used_once_drawn_are_one_sentence(tmp_path: Path) -> None:
    training_runs.write_photos(tmp_path / "photos", seed=0)
    flags: dict[str, Json] = {
        "prior_preservation": "class_images",
        "class_data_dir": str(tmp_path / "class"),
        "class_prompt": "a cat",
        "num_class_images": 2,
    }
    with pytest.raises(ValueError, match=r"(?s)drew as class images cannot be used: .* has 8 × 8 px"):
        train_dreambooth(training_runs.config(tmp_path, instance_data_dir=str(tmp_path / "photos"), **flags))
