"""A batch is a pure function of the seed and its samples, however it is come by."""

import math
import multiprocessing
import os
import pickle
import signal
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import photo_files
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from photo_batches import (
    FACTOR,
    SIZE,
    CountingVae,
    assert_equal,
    base_like,
    double,
    encode,
    encode_without_noise,
    fill_with_photos,
    plan,
    ramp,
    rows,
    source,
    uncached,
)
from PIL import ImageFile
from torch import Tensor

from ether_diffusion.training.batches import BatchSource, Codec, Crop, order_photos
from ether_diffusion.training.config import DataConfig
from ether_diffusion.training.processes import InterruptedRunError, Interrupts, signals_held


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    fill_with_photos(tmp_path / "photos", [(90, 70), (70, 90), (100, 80), (64, 64), (80, 80)])
    return DataConfig(
        instance_data_dir=tmp_path / "photos", random_flip=True, caption_dropout=0.3, crops_per_photo=2
    )


def test_a_sample_is_the_same_in_every_split_into_batches(data: DataConfig) -> None:
    for config in (data, uncached(data)):
        whole = source(config).batch(range(8))
        assert whole.samples == tuple(range(8))
        for size in (1, 2, 4):
            other = source(config)
            for start in range(0, 8, size):
                part = other.batch(range(start, start + size))
                for place in range(size):
                    assert_equal(rows(part, place), rows(whole, start + place))


def test_workers_give_the_batches_that_the_main_process_gives(data: DataConfig) -> None:
    schedule = [[0, 1], [4, 5], [2, 3], [9, 8], [6, 7]]
    config = uncached(data)
    state = torch.get_rng_state()
    alone = list(source(config).batches(schedule))
    together = list(source(uncached(data, dataloader_num_workers=2)).batches(schedule))
    assert torch.equal(torch.get_rng_state(), state)
    assert [batch.samples for batch in together] == [tuple(visits) for visits in schedule]
    for batch, expected in zip(together, alone, strict=True):
        assert_equal(batch, expected)


@pytest.mark.skipif(os.name != "posix", reason="where signals reach a process group")
@pytest.mark.parametrize("num_before", [0, 1], ids=["starting", "at work"])
def test_workers_outlive_an_interrupt_that_main_attends_to(data: DataConfig, num_before: int) -> None:
    schedule = [[number] for number in range(12)]
    batches = source(uncached(data, dataloader_num_workers=2)).batches(schedule)
    found = list(islice(batches, num_before))
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGINT)
    found += list(batches)
    for batch, expected in zip(found, source(uncached(data)).batches(schedule), strict=True):
        assert_equal(batch, expected)


@pytest.mark.skipif(os.name != "posix", reason="where signals reach a process group")
def test_what_is_held_while_workers_start_comes_afterwards(data: DataConfig) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with Interrupts() as interrupts:
        with signals_held():
            signal.raise_signal(signal.SIGINT)
            interrupts.check()
        with pytest.raises(InterruptedRunError):
            interrupts.check()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


@pytest.mark.skipif(os.name != "posix", reason="where signals reach a process group")
def test_a_worker_that_is_starting_can_be_terminated(data: DataConfig) -> None:
    batches = source(uncached(data, dataloader_num_workers=2)).batches([[number] for number in range(12)])
    for worker in multiprocessing.active_children():
        worker.terminate()
    with pytest.raises(RuntimeError, match=r"exited unexpectedly|killed by signal"):
        list(batches)


def test_what_workers_run_can_be_sent_to_them(data: DataConfig) -> None:
    samples = plan(uncached(data))
    found, expected = pickle.loads(pickle.dumps(samples))[3], samples[3]
    assert not isinstance(found, str)
    assert not isinstance(expected, str)
    assert_equal(found[0], expected[0])


@pytest.mark.parametrize("is_cached", [True, False])
def test_latents_and_places_are_those_of_the_cut_and_mirrored_photo(tmp_path: Path, is_cached: bool) -> None:
    """Red counts columns and green rows, so that where a photo was cut can be read off it."""
    picture = ramp(88, 64)
    (tmp_path / "a.png").write_bytes(photo_files.encode(picture, "PNG"))
    config = DataConfig(instance_data_dir=tmp_path, instance_prompt="x", crops_per_photo=50, random_flip=True)
    config = config if is_cached else uncached(config)
    needs = base_like(has_size_ids=True)
    batch = source(config, vae=encode_without_noise, needs=needs).batch(range(64))
    assert batch.size_ids is not None
    assert batch.size_ids[:, [0, 1, 2, 4, 5]].unique(dim=0).tolist() == [[64, 88, 0, 64, 64]]
    lefts = batch.size_ids[:, 3].tolist()
    assert len(set(lefts)) > 10
    assert set(lefts) <= set(range(25))
    num_flipped = 0
    for latents, left in zip(batch.latents.double(), lefts, strict=True):
        is_flipped = bool(latents[0, 0, 0] > latents[0, 0, 1])
        num_flipped += is_flipped
        whole = picture[:, ::-1] if is_flipped else picture  # mirrored before it is cropped, as in diffusers
        cut = whole[:, left : left + SIZE].astype(np.float64) / 127.5 - 1
        areas = cut.reshape(SIZE // FACTOR, FACTOR, SIZE // FACTOR, FACTOR, 3).mean((1, 3))
        torch.testing.assert_close(
            latents[:3], 2 * torch.from_numpy(areas).permute(2, 0, 1), atol=1e-6, rtol=0
        )
    assert 16 < num_flipped < 48
    centred = (
        source(config.replace(center_crop=True, random_flip=False), needs=needs).batch(range(4)).size_ids
    )
    assert centred is not None
    assert centred.unique(dim=0).tolist() == [[64, 88, 0, 12, 64, 64]]


def test_every_place_of_a_random_crop_occurs_and_is_as_likely(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(photo_files.encode(photo_files.noise(67, 64), "PNG"))
    needs = base_like(has_size_ids=True)
    made = plan(DataConfig(instance_data_dir=tmp_path, instance_prompt="x"), needs=needs)
    crops = made.cut([Crop(False, 0, (SIZE, SIZE), number, False) for number in range(2000)])
    counts = Counter(crop.size_ids[0, 3].item() for crop in crops if crop.size_ids is not None)
    assert sorted(counts) == [0, 1, 2, 3]
    assert all(abs(count - 500) < 5 * math.sqrt(2000 * 0.25 * 0.75) for count in counts.values())


def test_cached_crops_are_encoded_once_one_by_one_as_far_as_the_run_needs_them(data: DataConfig) -> None:
    vae, few, seen = CountingVae(), CountingVae(), list[tuple[int, int]]()
    cached = BatchSource(
        plan(data), Codec(vae, double), num_samples=1000, on_progress=lambda *done: seen.append(done)
    )
    # 2 crops of four photos, one of the square ones, each also mirrored
    assert vae.num_images == 2 * (2 + 2 + 2 + 1 + 1)
    assert vae.shapes == {(1, 3, SIZE, SIZE)}
    assert seen == [(number, 16) for number in range(1, 17)]
    whole = cached.batch(range(100))
    assert vae.num_images == 16
    some = source(data, vae=few, num_samples=3).batch(range(3))
    assert few.num_images <= 3
    assert_equal(rows(some, 2), rows(whole, 2))
    assert not torch.equal(source(data, seed=1).batch(range(3)).latents, some.latents)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_photo_deleted_or_changed_in_mid_run_ends_it_in_one_sentence(
    data: DataConfig, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert data.instance_data_dir is not None
    photo, sources = data.instance_data_dir / "2.png", [source(data), source(uncached(data))]
    expected = [each.batch(range(5)) for each in sources]
    monkeypatch.setattr("ether_diffusion.training.photos.KEPT_BYTES", 0)
    built = source(uncached(data, dataloader_num_workers=num_workers))
    photo.unlink()
    with pytest.raises(ValueError, match=r"2\.png is gone.*; put it back and resume, or train with cache"):
        list(built.batches([[sample] for sample in range(5)]))
    photo.write_bytes(photo_files.photo(seed=77))
    with pytest.raises(ValueError, match=r"2\.png is not the file any more that was checked"):
        list(built.batches([[sample] for sample in range(5)]))
    for each, batch in zip(sources, expected, strict=True):  # its latents or pixels are remembered
        assert_equal(each.batch(range(5)), batch)


def test_latents_are_drawn_from_the_posterior_and_scaled(data: DataConfig) -> None:
    noisy = source(data).batch(range(64)).latents
    plain = source(data, vae=encode_without_noise).batch(range(64)).latents
    noise = (noisy - plain) / 2 / 0.1  # the stand-in's scale and standard deviation
    assert abs(noise.mean().item()) < 0.01
    assert abs(noise.std().item() - 1) < 0.01
    assert not torch.equal(noise[0], noise[1])


def test_about_the_asked_share_of_captions_is_dropped(data: DataConfig) -> None:
    built = source(data, num_samples=1)
    assert set(built.plan.prompts) == {"", *(f"photo {number}" for number in range(5))}
    prompts = [built.plan.sample(number)[0] for number in range(1000)]
    assert set(prompts) == set(built.plan.prompts)
    assert 0.25 < prompts.count("") / 1000 < 0.35


@pytest.mark.parametrize("is_cached", [True, False])
def test_a_photo_that_memory_has_no_room_for_is_decoded_again_to_the_same(
    data: DataConfig, is_cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data if is_cached else uncached(data)
    expected = source(data).batch(range(8))
    monkeypatch.setattr("ether_diffusion.training.photos.KEPT_BYTES", 2 * 4 * 80 * 70)
    built = source(data)
    assert 0 < sum(not each.kept for each in plan(data).photos) < 5
    assert_equal(built.batch(range(8)), expected)


def test_each_photo_is_decoded_once(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    load = ImageFile.ImageFile.load

    def counted(image: ImageFile.ImageFile) -> object:
        if image.fp is not None and image.tile:
            decoded.append(f"{image.size}")
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counted)
    cached = source(data)
    cached.batch(range(8))
    assert not any(each.kept for each in cached.plan.photos)
    source(uncached(data)).batch(range(8))
    assert len(decoded) == 2 * 5


def test_latents_that_are_not_finite_name_their_photo(data: DataConfig) -> None:
    def overflowing(images: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = encode(images)
        return mean * torch.inf, std

    for config in (data, uncached(data)):
        with pytest.raises(ValueError, match=r"turns \d\.png into latents that are not finite.*float32"):
            source(config, vae=overflowing).batch([0])


def test_an_inpainting_unet_is_shown_a_hole_and_what_is_around_it(data: DataConfig) -> None:
    needs = base_like(is_inpainting=True)
    for config in (data, uncached(data)):
        batch = source(config, vae=encode_without_noise, needs=needs).batch(range(20))
        assert batch.inpainting is not None
        assert batch.inpainting.shape == (20, 5, 16, 16)
        holes, masked = batch.inpainting[:, :1], batch.inpainting[:, 1:]
        assert set(holes.unique().tolist()) == {0.0, 1.0}
        # away from the edges of hole and photo the masked image is the image, or gray
        inside = -torch.nn.functional.max_pool2d(-holes, 3, 1)
        outside = torch.nn.functional.max_pool2d(holes, 3, 1)
        masked, latents = masked[..., 1:-1, 1:-1], batch.latents[..., 1:-1, 1:-1]
        assert torch.all(masked[(inside == 1).expand_as(masked)] == 0)
        kept = (outside == 0).expand_as(masked)
        assert torch.equal(masked[kept], latents[kept])
        assert 0.05 < holes.mean() < 0.5


# the order of samples

SOME = [(64, 64), (64, 96), (64, 64), (64, 96), (64, 96), (64, 64), (96, 64)]
PLANS = st.lists(st.tuples(st.sampled_from(SOME), st.integers(1, 3)), min_size=1, max_size=12)


@given(PLANS, st.integers(1, 5), st.integers(0, 2))
def test_an_epoch_uses_photos_as_often_as_they_are_repeated_and_a_step_one_bucket(
    planned: list[tuple[tuple[int, int], int]], batch: int, epoch: int
) -> None:
    buckets, repeats = [size for size, _ in planned], [count for _, count in planned]
    found = order_photos(buckets, repeats, batch, 1, epoch)
    counts = Counter(found)
    if len(set(buckets)) == 1:
        assert counts == dict(enumerate(repeats))
        return
    for start in range(0, len(found), batch):
        assert len({buckets[photo] for photo in found[start : start + batch]}) == 1
    for bucket in set(buckets):
        members = [photo for photo, other in enumerate(buckets) if other == bucket]
        size = sum(repeats[photo] for photo in members)
        fill = -size % batch  # what fills up the bucket's last chunk, as evenly as may be
        assert sum(counts[photo] for photo in members) == size + fill
        for photo in members:
            assert repeats[photo] <= counts[photo] <= repeats[photo] * (1 + -(-fill // size))


def test_a_sample_depends_on_nothing_that_was_asked_before(data: DataConfig) -> None:
    data, asked = data.replace(use_aspect_ratio_buckets=True, repeats=2), [70, 3, 120, 4, 71, 0, 3]
    planned = plan(data, effective_batch=3)
    assert all(planned.sample(number) == plan(data, effective_batch=3).sample(number) for number in asked)


@pytest.mark.parametrize("buckets", [[(64, 64)] * 20, [(64, 64), (64, 96)] * 10])
def test_epochs_and_seeds_differ_in_order(buckets: list[tuple[int, int]]) -> None:
    orders = [order_photos(buckets, [1] * 20, 2, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    orders.append(sorted(orders[0]))
    assert all(orders.count(each) == 1 for each in orders)


def test_without_buckets_the_order_does_not_depend_on_the_batch() -> None:
    one, four = (order_photos([(64, 64)] * 9, [1] * 9, batch, 3, 2) for batch in (1, 4))
    assert one == four
