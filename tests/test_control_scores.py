"""Scores of control agree with their definitions elsewhere, and mean what they say on maps that are known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.classification import (
    BinaryF1Score,
    BinaryJaccardIndex,
    MulticlassAccuracy,
    MulticlassJaccardIndex,
)

from ether_diffusion.control.palette import palette_of
from ether_diffusion.metrics.control_scores import (
    IGNORED,
    ClassFinder,
    ControlPair,
    ControlYardsticks,
    canny_edges,
    check_classes,
    class_ious,
    classes_of,
    confusion,
    edge_overlap,
    landmark_distances,
    load_face_finder,
    mean_iou,
    pixel_accuracy,
    scaled_map,
    score_control,
    silhouette_of,
)
from ether_diffusion.metrics.encoders import load_encoder
from ether_diffusion.metrics.scores import estimate, pooled

COLOURS = palette_of({"sky": [0, 0, 255], "tree": [0, 255, 0], "house": [255, 0, 0]}, "the palette")
CLASSES = ("house", "sky", "tree")


def maps(seed: int, *, number: int = 6, num_classes: int = 5) -> torch.Tensor:
    return torch.randint(num_classes, (number, 16, 24), generator=torch.Generator().manual_seed(seed))


def colour_finder(*things: str) -> ClassFinder:
    """A segmenter of pictures that are their own maps, in the colours of COLOURS."""
    return ClassFinder(
        "colours",
        CLASSES,
        frozenset(things),
        lambda pictures: [classes_of(each, COLOURS, CLASSES) for each in pictures],
    )


def picture_of(classes: torch.Tensor) -> Image.Image:
    colours = np.array([(255, 0, 0), (0, 0, 255), (0, 255, 0)], dtype=np.uint8)
    return Image.fromarray(colours[classes.numpy()])


def pairs(number: int = 6) -> list[ControlPair]:
    pictures = [picture_of(each) for each in maps(3, number=number, num_classes=3)]
    return [ControlPair(f"{k}", each, each, "a house", k // 2) for k, each in enumerate(pictures)]


PALETTE = ControlYardsticks("palette", colour_finder("house"), COLOURS)


def test_mean_iou_and_accuracy_are_those_of_torchmetrics() -> None:
    expected, found = maps(0), maps(1)
    counts = confusion(expected, found, 5)
    assert mean_iou(counts) == pytest.approx(MulticlassJaccardIndex(5)(found, expected).item())
    accuracy = MulticlassAccuracy(5, average="micro")(found, expected)
    assert pixel_accuracy(counts) == pytest.approx(accuracy.item())
    torch.testing.assert_close(
        class_ious(counts).float(), MulticlassJaccardIndex(5, average="none")(found, expected)
    )


def test_ignored_pixels_count_for_nothing_as_in_torchmetrics_nor_do_classes_in_neither_map() -> None:
    expected, found = maps(0), maps(1)
    expected[:, :5] = IGNORED
    oracle = MulticlassJaccardIndex(5, ignore_index=IGNORED)(found, expected)
    assert mean_iou(confusion(expected, found, 5)) == pytest.approx(oracle.item())
    assert mean_iou(confusion(expected, found, 40)) == mean_iou(confusion(expected, found, 5))


def test_equal_maps_score_one_and_disjoint_ones_nothing() -> None:
    same = confusion(maps(0), maps(0), 5)
    assert (mean_iou(same), pixel_accuracy(same)) == (1.0, 1.0)
    zeros = torch.zeros(4, 4, dtype=torch.long)
    other = confusion(zeros, zeros + 1, 2)
    assert (mean_iou(other), pixel_accuracy(other)) == (0.0, 0.0)


def test_edge_iou_and_f1_are_those_of_torchmetrics_and_one_where_there_are_none() -> None:
    first, second = maps(0, number=1)[0] > 2, maps(1, number=1)[0] > 2
    iou, f1 = edge_overlap(first, second)
    assert iou == pytest.approx(BinaryJaccardIndex()(first.long(), second.long()).item())
    assert f1 == pytest.approx(BinaryF1Score()(first.long(), second.long()).item())
    nothing = torch.zeros(4, 4, dtype=torch.bool)
    assert edge_overlap(nothing, nothing) == (1.0, 1.0)
    assert edge_overlap(nothing, ~nothing) == (0.0, 0.0)


def test_the_error_of_a_mean_over_equal_groups_is_that_of_the_mean() -> None:
    counts = [confusion(a, b, 5) for a, b in zip(maps(0), maps(1), strict=True)]
    groups = [0, 0, 1, 1, 2, 2]
    found = pooled(counts, groups, pixel_accuracy)
    assert found == pytest.approx(estimate([pixel_accuracy(each) for each in counts], groups))


def test_a_map_is_scaled_to_a_size_as_pillow_does_by_the_nearest() -> None:
    small = maps(0, number=1)[0]
    for size in ((48, 32), (24, 16), (16, 32)):
        oracle = Image.fromarray(small.numpy().astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
        assert scaled_map(small, *size).tolist() == np.asarray(oracle).tolist()


def test_pictures_that_are_their_maps_score_one_at_any_size_and_sets_say_why_they_do_not() -> None:
    yardsticks = replace(PALETTE, encoders=[load_encoder("tiny_world")])
    found = score_control([pair.control for pair in pairs()], pairs(), yardsticks)
    columns = ("miou", "accuracy", "object_iou", "canny_iou", "canny_f1")
    assert {name: each.mean for name, each in found.columns.items()} == dict.fromkeys(columns, 1.0)
    assert not found.sets
    assert "6 photos and 6 pictures" in found.left_out["fid_tiny"]
    large = [pair.control.resize((96, 64), Image.Resampling.NEAREST) for pair in pairs()]
    assert score_control(large, pairs(), PALETTE).columns["miou"].mean == 1.0


def test_scores_do_not_depend_on_the_order_of_the_pictures() -> None:
    pictures = [picture_of(each) for each in maps(4, num_classes=3)]
    forward = score_control(pictures, pairs(), PALETTE)
    backward = score_control(pictures[::-1], pairs()[::-1], PALETTE)
    for name, each in forward.columns.items():
        assert backward.columns[name] == pytest.approx(each)


def test_the_object_counts_whatever_its_class() -> None:
    finder = colour_finder("house", "tree")
    wrong_kind = [picture_of(2 - maps(3, num_classes=3)[k]) for k in range(6)]  # houses for trees
    found = score_control(wrong_kind, pairs(), replace(PALETTE, finder=finder))
    assert found.columns["object_iou"].mean == 1.0
    assert found.columns["accuracy"].mean < 0.5


def test_a_silhouette_is_compared_with_the_things_of_a_picture() -> None:
    classes = maps(3, num_classes=3)
    white = [Image.fromarray(np.where(each.numpy() == 0, 255, 0).astype(np.uint8)) for each in classes]
    given = [replace(pair, control=image) for pair, image in zip(pairs(), white, strict=True)]
    yardsticks = replace(PALETTE, control_type="silhouette")
    found = score_control([picture_of(each) for each in classes], given, yardsticks)
    assert (found.columns["miou"].mean, found.columns["object_iou"].mean) == (1.0, 1.0)


def test_edges_are_compared_with_the_photos_or_with_the_control_image_of_edges() -> None:
    edges = [canny_edges(pair.photo).numpy() for pair in pairs()]
    drawn = [Image.fromarray(np.where(each, 255, 0).astype(np.uint8)) for each in edges]
    given = [replace(pair, control=image) for pair, image in zip(pairs(), drawn, strict=True)]
    of_control = ControlYardsticks("canny")
    assert score_control([pair.photo for pair in given], given, of_control).columns["canny_f1"].mean == 1.0
    black = [replace(pair, control=Image.new("L", (24, 16))) for pair in pairs()]
    assert score_control([pair.photo for pair in black], black, of_control).columns["canny_f1"].mean == 0.0


def test_colours_off_the_palette_are_named_with_the_picture_they_are_in() -> None:
    blended = pairs()[0].control.resize((48, 32), Image.Resampling.BILINEAR)
    wrong = [replace(pairs()[0], control=blended)]
    with pytest.raises(ValueError, match=r"the control image of 0 has \d+ colours off the palette"):
        score_control([wrong[0].photo], wrong, PALETTE)


def test_black_of_a_map_is_ignored_unless_it_is_a_class() -> None:
    black = Image.new("RGB", (2, 2))
    assert classes_of(black, COLOURS, CLASSES).tolist() == [[IGNORED] * 2] * 2
    assert classes_of(black, palette_of({"sky": [0, 0, 0]}, "night"), CLASSES).tolist() == [[1, 1]] * 2


def test_a_silhouette_is_white_whatever_its_mode() -> None:
    gray = Image.fromarray(np.array([[0, 127], [128, 255]], dtype=np.uint8))
    assert silhouette_of(gray).tolist() == silhouette_of(gray.convert("RGB")).tolist() == [[0, 0], [1, 1]]


def test_a_palette_of_classes_that_the_segmenter_does_not_find_is_refused() -> None:
    check_classes(COLOURS, CLASSES)
    with pytest.raises(ValueError, match=r"the palette has wall, which the segmenter does not know; .*house"):
        check_classes(palette_of({"wall": [1, 2, 3]}, "the palette"), CLASSES)


def box_faces(picture: Image.Image) -> list[torch.Tensor]:
    """A face of four landmarks at the corners of a picture's white box; none where it is black."""
    box = picture.convert("L").getbbox()
    if box is None:
        return []
    left, top, right, bottom = map(float, box)
    corners = torch.tensor([[left, top], [right, top], [left, bottom], [right, bottom]])
    return [corners.mean(0, keepdim=True).repeat(4, 1), corners]  # a smaller face, and this


def test_landmarks_are_as_far_apart_as_their_faces_in_px_of_the_picture() -> None:
    def box(left: int, top: int) -> Image.Image:
        picture = Image.new("L", (40, 40))
        picture.paste(255, (left, top, left + 10, top + 10))
        return picture

    black = Image.new("L", (40, 40))
    found = landmark_distances(box_faces, [box(5, 5), box(5, 5), black], [box(8, 9), black, box(5, 5)])
    assert found == [5.0, None, None]  # 3 px across and 4 px down


def test_without_its_package_landmarks_say_what_to_install() -> None:
    with pytest.raises(ValueError, match="pip install"):
        load_face_finder()
