"""Scores agree with their definitions in numpy's float64 and in torchmetrics, in any order."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from encoder_models import save_alexnet, save_clip, save_dino
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _LPIPS, NetLinLayer, ScalingLayer
from torchmetrics.functional.pairwise import pairwise_cosine_similarity

from ether_diffusion.metrics.encoders import Encoder, load_encoder
from ether_diffusion.metrics.lpips import Lpips, distances_among, distances_to, load_lpips
from ether_diffusion.metrics.scores import (
    PhotoReference,
    Sample,
    Scores,
    estimate,
    frechet_distance,
    likeness_among,
    likeness_of_pairs,
    likeness_to,
    pixel_distance,
    relative_drift,
    score_drift,
    score_photos,
    score_samples,
)

Array = NDArray[np.float64]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> list[Encoder]:
    made = tmp_path_factory.mktemp("encoders")
    return [load_encoder(str(save(made / save.__name__))) for save in (save_dino, save_clip)]


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_alexnet(tmp_path_factory.mktemp("alexnet") / "alexnet.pth")


@pytest.fixture(scope="module")
def lpips(alexnet: Path) -> Lpips:
    return load_lpips(alexnet)


def pictures(count: int, *, seed: int = 0, side: int = 64) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def samples(count: int, *, seed: int = 0) -> list[Sample]:
    """Pictures of two prompts, on as many seeds."""
    return [
        Sample(f"{number}.png", image, ("a sks cat on a beach", "a sks cat, drawn")[number % 2], number // 2)
        for number, image in enumerate(pictures(count, seed=seed))
    ]


def unit(count: int, size: int = 6) -> Tensor:
    vectors = torch.randn(count, size, dtype=torch.float64)
    return vectors / vectors.norm(dim=1, keepdim=True)


def test_likeness_is_the_mean_cosine_to_all_to_the_others_or_of_pairs() -> None:
    photos, drawn, second = unit(5), unit(7), unit(5)
    expected = pairwise_cosine_similarity(drawn, photos)
    torch.testing.assert_close(likeness_to(photos, drawn), expected.mean(1))
    expected = pairwise_cosine_similarity(photos, second).diagonal()
    torch.testing.assert_close(likeness_of_pairs(photos, second), expected)
    pairs = [float(photos[i] @ photos[j]) for i in range(5) for j in range(5) if i != j]
    assert float(likeness_among(photos).mean()) == pytest.approx(np.mean(pairs), abs=1e-12)
    with pytest.raises(ValueError, match="at least two; found 1"):
        likeness_among(photos[:1])


def test_drift_is_in_units_of_the_distance_between_the_bases_prompts() -> None:
    generator = torch.Generator().manual_seed(0)
    base, drawn = (
        torch.nn.functional.normalize(torch.randn(6, 8, generator=generator, dtype=torch.float64), dim=1)
        for _ in range(2)
    )
    prompts = torch.tensor([0, 0, 1, 1, 2, 2])
    apart = [1 - base[a] @ base[b] for a in range(6) for b in range(6) if prompts[a] != prompts[b]]
    expected = torch.stack([1 - a @ b for a, b in zip(drawn, base, strict=True)]) / torch.stack(apart).mean()
    torch.testing.assert_close(relative_drift(drawn, base, prompts), expected)
    assert float(relative_drift(base, base, prompts).max()) == pytest.approx(0, abs=1e-12)
    others = base[[2, 3, 4, 5, 0, 1]]
    assert float(relative_drift(others, base, prompts).mean()) == pytest.approx(1, abs=0.3)


def test_the_standard_error_is_that_of_the_groups_means_in_any_order() -> None:
    values = np.random.default_rng(1).normal(size=(4, 6))
    numbers, groups = values.ravel().tolist(), [group for group in range(4) for _ in range(6)]
    found = estimate(numbers, groups)
    means = values.mean(axis=1)
    assert found.mean == pytest.approx(values.mean(), abs=1e-12)
    assert found.standard_error == pytest.approx(means.std(ddof=1) / 2, abs=1e-12)
    assert (found.num_values, found.num_groups) == (24, 4)
    assert estimate(numbers[:9][::-1], groups[:9][::-1]) == estimate(numbers[:9], groups[:9])
    assert estimate([0.1, 0.3], ["fox", "fox"]).standard_error is None
    with pytest.raises(ValueError, match="no values"):
        estimate([], [])


def reference_frechet(first: Array, second: Array) -> float:
    """The formula, with the trace of the root from the eigenvalues of a symmetric product."""
    covariances = [np.cov(each, rowvar=False) for each in (first, second)]
    values, vectors = np.linalg.eigh(covariances[0])
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ covariances[1] @ root)
    difference = first.mean(0) - second.mean(0)
    traces = np.trace(covariances[0]) + np.trace(covariances[1])
    return float(difference @ difference + traces - 2 * np.sqrt(product.clip(0)).sum())


def test_the_frechet_distance_is_its_formula_in_any_order_and_zero_of_equal_sets() -> None:
    first, second = torch.randn(40, 6).double(), 0.7 * torch.randn(30, 6).double() + 0.5
    expected = reference_frechet(first.numpy(), second.numpy())
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(first[torch.randperm(40)], second) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


class Slices(nn.Module):
    """AlexNet of torchvision's layers, in the five parts that torchmetrics cuts it into."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        convolutions = {0: (3, 64, 11, 4, 2), 3: (64, 192, 5, 1, 2), 6: (192, 384, 3, 1, 1)}
        convolutions |= {8: (384, 256, 3, 1, 1), 10: (256, 256, 3, 1, 1)}
        layers: list[nn.Module] = []
        for index in range(12):
            if index in convolutions:
                into, out, kernel, stride, padding = convolutions[index]
                layers.append(nn.Conv2d(into, out, kernel, stride, padding))
            else:
                layers.append(nn.MaxPool2d(3, 2) if index in (2, 5) else nn.ReLU())
        self.features = nn.Sequential(*layers)
        self.load_state_dict({key: value for key, value in weights.items() if key.startswith("features")})

    def forward(self, x: Tensor) -> list[Tensor]:
        ends, found = (1, 4, 7, 9, 11), []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in ends:
                found.append(x)
        return found


def torchmetrics_lpips(alexnet: Path) -> Any:
    """torchmetrics' LPIPS, put together without torchvision, which it would take AlexNet from."""
    network: Any = _LPIPS.__new__(_LPIPS)
    nn.Module.__init__(network)
    weights = torch.load(alexnet, weights_only=True)
    network.spatial, network.resize, network.L = False, None, 5
    network.scaling_layer, network.net = ScalingLayer(), Slices(weights)
    channels = (64, 192, 384, 256, 256)
    network.lins = nn.ModuleList(NetLinLayer(count, use_dropout=True) for count in channels)

    file = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/alex.pth"
    stored = torch.load(file, map_location="cpu", weights_only=True)
    network.load_state_dict({f"lins.{key[3:]}": value for key, value in stored.items()}, strict=False)
    return network.eval()


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def test_lpips_is_that_of_torchmetrics(lpips: Lpips, alexnet: Path) -> None:
    photos, drawn = pictures(3), pictures(2, seed=1)
    network = torchmetrics_lpips(alexnet)
    with torch.no_grad():
        expected = [[float(network(as_tensor(a), as_tensor(b))) for b in photos] for a in drawn]
    assert min(min(row) for row in expected) > 1e-3
    assert distances_to(lpips, photos, drawn) == pytest.approx(np.mean(expected, axis=1).tolist(), rel=1e-5)


def test_lpips_among_pictures_is_the_mean_over_their_pairs_and_zero_of_equal_ones(lpips: Lpips) -> None:
    drawn = pictures(3)
    pairs = [distances_to(lpips, [drawn[i]], [drawn[j]])[0] for i, j in ((0, 1), (0, 2), (1, 2))]
    among = distances_among(lpips, drawn)
    assert np.mean(among) == pytest.approx(np.mean(pairs), rel=1e-5)
    assert distances_among(lpips, drawn[::-1]) == pytest.approx(among[::-1], rel=1e-5)
    assert distances_to(lpips, drawn[:1], drawn[:1]) == [0.0]
    with pytest.raises(ValueError, match="at least two; found 1"):
        distances_among(lpips, drawn[:1])
    with pytest.raises(ValueError, match="at least 32 px; found 16x16"):
        distances_to(lpips, drawn[:1], pictures(1, side=16))


def test_lpips_takes_the_weights_of_alexnet_from_safetensors_too_and_says_where_they_are_to_be_had(
    lpips: Lpips, alexnet: Path, tmp_path: Path
) -> None:
    save_file(torch.load(alexnet, weights_only=True), tmp_path / "alexnet.safetensors")
    photos, drawn = pictures(2), pictures(1, seed=1)
    again = load_lpips(tmp_path / "alexnet.safetensors")
    assert distances_to(again, photos, drawn) == distances_to(lpips, photos, drawn)
    with pytest.raises(FileNotFoundError, match=r"fetch https://download\.pytorch\.org/.*alexnet"):
        load_lpips(tmp_path / "nothing.pth")


@pytest.mark.parametrize("name", ["noise.pth", "noise.safetensors", "other.pth", "shape.pth", "list.pth"])
def test_what_is_no_alexnet_is_refused(tmp_path: Path, alexnet: Path, name: str) -> None:
    file = tmp_path / name
    if name.startswith("noise"):
        file.write_bytes(b"no weights at all")
    else:
        weights = torch.load(alexnet, weights_only=True)
        weights["features.0.weight"] = torch.zeros(1)
        torch.save({"other": torch.zeros(1), "shape": weights, "list": [1]}.get(file.stem, {}), file)
    with pytest.raises(ValueError, match="holds no weights of AlexNet"):
        load_lpips(file)


def test_equal_pictures_score_one_and_differ_by_nothing(encoders: list[Encoder], lpips: Lpips) -> None:
    same = [Sample(f"{seed}.png", pictures(1)[0], "a cat", seed) for seed in range(3)]
    reference = PhotoReference.of(same, encoders)
    columns = score_samples(reference, same, encoders, lpips).columns
    assert columns["dino"].mean == pytest.approx(1, abs=1e-6)
    assert columns["clip_i"].mean == pytest.approx(1, abs=1e-6)
    assert columns["lpips_to_photos"].mean == pytest.approx(0, abs=1e-6)
    assert columns["lpips_among"].mean == pytest.approx(0, abs=1e-6)
    assert columns["diversity"].mean == pytest.approx(0, abs=1e-6)
    drift = score_drift(same, same, encoders)
    assert {name: found.mean for name, found in drift.items()} == pytest.approx(
        {"dino": 0, "clip": 0, "pixels": 0}, abs=1e-6
    )
    assert score_photos(reference, encoders, lpips).columns["dino"].mean == pytest.approx(1, abs=1e-6)


def test_scores_are_means_over_pictures_with_errors_over_seeds(encoders: list[Encoder], lpips: Lpips) -> None:
    photos, drawn = samples(3, seed=5), samples(8)
    reference = PhotoReference.of(photos, encoders)
    scores = score_samples(reference, drawn, encoders, lpips)
    dino, clip = encoders
    images = [each.image for each in drawn]
    cosines = (dino.embed_images(images) @ dino.embed_images([each.image for each in photos]).T).mean(1)
    assert scores.columns["dino"].mean == pytest.approx(float(cosines.mean()), abs=1e-6)
    by_seed = cosines.view(4, 2).mean(1).numpy()
    assert scores.columns["dino"].standard_error == pytest.approx(by_seed.std(ddof=1) / 2, abs=1e-6)
    texts = clip.embed_texts([each.prompt or "" for each in drawn])
    expected = (clip.embed_images(images) * texts).sum(1)
    assert scores.columns["clip_t"].mean == pytest.approx(float(expected.mean()), abs=1e-6)
    first = [number for number, each in enumerate(drawn) if each.prompt == drawn[0].prompt]
    row = scores.by_prompt[str(drawn[0].prompt)]
    assert row["clip_t"] == pytest.approx(float(expected[first].mean()), abs=1e-6)
    among = np.mean(distances_among(lpips, [images[number] for number in first]))
    assert row["lpips_among"] == pytest.approx(among, rel=1e-5)
    vectors = dino.embed_images([images[number] for number in first]).double().numpy()
    apart = [1 - a @ b for a, b in combinations(vectors, 2)]
    assert row["diversity"] == pytest.approx(np.mean(apart), abs=1e-6)


def test_scores_do_not_depend_on_the_order_of_pictures_and_photos(
    encoders: list[Encoder], lpips: Lpips
) -> None:
    photos, drawn = samples(3, seed=5), samples(8)

    def score(photos: list[Sample], drawn: list[Sample]) -> Scores:
        return score_samples(PhotoReference.of(photos, encoders), drawn, encoders, lpips)

    there, back = score(photos, drawn), score(photos[::-1], drawn[::-1])
    assert there.columns.keys() == back.columns.keys()
    for column, found in there.columns.items():
        assert back.columns[column].mean == pytest.approx(found.mean, abs=1e-6)
        assert back.columns[column].standard_error == pytest.approx(found.standard_error, abs=1e-6)


def test_prompts_are_compared_without_the_identifier_and_not_at_all_where_unknown(
    encoders: list[Encoder],
) -> None:
    drawn = samples(4)
    plain = [replace(each, prompt=str(each.prompt).replace("sks ", "")) for each in drawn]
    reference = PhotoReference.of(drawn, encoders)
    with_it = score_samples(reference, drawn, encoders, None, identifier="sks").columns["clip_t"]
    assert with_it == score_samples(reference, plain, encoders, None).columns["clip_t"]
    assert with_it != score_samples(reference, drawn, encoders, None).columns["clip_t"]
    unknown = score_samples(reference, [Sample(each.name, each.image) for each in drawn], encoders, None)
    assert set(unknown.columns) == {"dino", "clip_i"}
    assert unknown.columns["dino"].num_groups == 4


def test_a_frechet_distance_is_given_where_there_are_pictures_enough(encoders: list[Encoder]) -> None:
    dino, clip = encoders
    photos, drawn = samples(40, seed=5), samples(40)
    scores = score_samples(PhotoReference.of(photos, [dino]), drawn, [dino], None)
    vectors = [dino.embed_images([each.image for each in side]).numpy() for side in (photos, drawn)]
    assert scores.sets["fid_dino"] == pytest.approx(reference_frechet(*vectors), rel=1e-3, abs=1e-6)
    assert not score_samples(PhotoReference.of(photos[:5], [clip]), drawn, [clip], None).sets


def test_drift_is_one_minus_the_cosine_and_the_mean_difference_of_pixels(encoders: list[Encoder]) -> None:
    base, dino = samples(4), encoders[0]
    adapter = [replace(each, image=image) for each, image in zip(base, pictures(4, seed=9), strict=True)]
    found = score_drift(base, adapter, encoders)
    sides = [dino.embed_images([each.image for each in side]) for side in (base, adapter)]
    assert found["dino"].mean == pytest.approx(float((1 - (sides[0] * sides[1]).sum(1)).mean()), abs=1e-6)
    arrays = [np.stack([np.asarray(each.image) for each in side]).astype(float) for side in (base, adapter)]
    assert found["pixels"].mean == pytest.approx(np.abs(arrays[0] - arrays[1]).mean() / 255)
    black, white = (Image.new("RGB", (8, 8), colour) for colour in ("black", "white"))
    assert (pixel_distance(black, white), pixel_distance(white, white)) == (1, 0)
