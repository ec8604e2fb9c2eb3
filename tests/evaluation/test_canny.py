"""Edges of pictures whose edges are known, and agreements that one can count."""

import cv2
import pytest
import torch
from comfyui_gcfg.evaluation.metrics.canny import agreement, edges


def maps(*rows_of_images):
    """Edge maps drawn with '#'."""
    return torch.stack([torch.tensor([[mark == "#" for mark in row] for row in rows]) for rows in rows_of_images])


def test_the_edge_of_a_square_is_its_outline():
    image = torch.zeros(1, 3, 40, 40, dtype=torch.uint8)
    image[:, :, 10:30, 10:30] = 255
    found = edges(image)[0]
    ring = torch.zeros(40, 40, dtype=torch.bool)
    ring[8:32, 8:32] = True
    ring[12:28, 12:28] = False
    assert found.any(0)[10:30].all()  # every column and row of the square is met
    assert found.any(1)[10:30].all()
    assert not (found & ~ring).any()
    assert found.sum() < 100  # one pixel wide: the outline has 76


def test_each_image_has_opencvs_edges():
    images = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for low, high in ((100, 200), (300, 600)):
        found = edges(images, low, high)
        assert found.dtype == torch.bool
        for image, each in zip(images, found, strict=True):
            assert (each.numpy() == (cv2.Canny(image.permute(1, 2, 0).numpy(), low, high) > 0)).all()
    assert edges(images, 300, 600).sum() < edges(images, 100, 200).sum()


def test_a_colour_edge_of_equal_brightness_is_an_edge():
    image = torch.zeros(1, 3, 20, 20, dtype=torch.uint8)
    image[:, 0, :, :10] = 130
    image[:, 1, :, 10:] = 66  # as bright as the red in grey levels
    assert edges(image).any()


LEFT = ["#...", "#...", "#...", "#..."]
NEXT = [".#..", ".#..", ".#..", ".#.."]
FAR = ["...#", "...#", "...#", "...#"]
BOTH = ["#..#", "#..#", "#..#", "#..#"]
NONE = ["....", "....", "....", "...."]


@pytest.mark.parametrize(
    ("condition", "result", "expected"),
    [
        (LEFT, LEFT, (0, 1, 1, 1)),
        (LEFT, NEXT, (0.5, 1, 1, 1)),  # a pixel off: within the tolerance, though each pixel counts in mae
        (LEFT, FAR, (0.5, 0, 0, 0)),
        (LEFT, BOTH, (0.25, 0.5, 1, 2 / 3)),  # half of the result's edges are wrong
        (BOTH, LEFT, (0.25, 1, 0.5, 2 / 3)),  # half of the condition's are missing
        (LEFT, NONE, (0.25, 0, 0, 0)),
        (NONE, LEFT, (0.25, 0, 0, 0)),
        (NONE, NONE, (0, 1, 1, 1)),
    ],
)
def test_agreement_is_what_one_counts(condition, result, expected):
    assert tuple(agreement(maps(condition), maps(result)).values()) == pytest.approx(expected)
    assert list(agreement(maps(condition), maps(result))) == ["mae", "precision", "recall", "f1"]


def test_the_mean_is_over_images():
    both = agreement(maps(LEFT, LEFT, BOTH), maps(LEFT, BOTH, LEFT))
    assert both == pytest.approx({"mae": 0.5 / 3, "precision": 2.5 / 3, "recall": 2.5 / 3, "f1": (1 + 4 / 3) / 3})


def test_maps_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="expected equal ones"):
        agreement(maps(LEFT), maps(LEFT, LEFT))
