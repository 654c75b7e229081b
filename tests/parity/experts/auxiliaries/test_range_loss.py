"""Range loss against numbers from published code, run on a CPU, rounded to 6 decimals."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from experts.auxiliaries.auxiliary import Seen
from experts.auxiliaries.range_loss import RangeLoss, ranges, smallest_gap
from experts.progress import Progress
from orchestration.config.compose import load_config

f = torch.tensor([[0, 0], [3, 4], [1, 1], [6, 0], [6, 2], [9, 0], [0, 9]], dtype=torch.float64)
y = torch.tensor([0, 0, 0, 1, 1, 1, 2])


def close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_each_class_has_the_harmonic_mean_of_its_two_largest_distances():
    """5 and sqrt(13); sqrt(13) and 3; the third class has one image."""
    root = 13**0.5
    close(ranges(f, y, 4, 2), [2 / (1 / 5 + 1 / root), 2 / (1 / root + 1 / 3), 0.0, 0.0])


def test_the_gap_is_that_of_the_nearest_centres():
    close(smallest_gap(f, y), 5.754225)
    assert smallest_gap(f[:3], y[:3]) == torch.inf


@pytest.mark.parametrize(("margin", "images", "loss"), [(0.1, 6, 3.732408), (10, 6, 5.855295), (10, 7, 5.855295)])
def test_the_loss_is_the_published_one(margin, images, loss):
    """With a class of one image the published one is 1e-6 larger."""
    piece = RangeLoss(RangeLoss.Config(margin=margin), 2, torch.tensor([5, 4, 3])).double()
    close(piece.loss(Seen(f[None, :images], None, None, y[:images]), Progress(1, 2)), loss)


def test_the_order_of_images_does_not_count():
    order = torch.tensor([5, 2, 6, 0, 3, 1, 4])
    close(ranges(f[order], y[order], 3, 2), ranges(f, y, 3, 2).tolist())


def test_more_distances_than_a_class_or_a_batch_can_have_are_refused():
    with pytest.raises(
        ValueError, match="largest = 11 distances of a class are of 6 images, and no class has more than 5"
    ):
        RangeLoss(RangeLoss.Config(largest=11), 2, torch.tensor([5, 4, 3]))
    words = ["method=range", "dataset=digits_lt", "method.stages.train.batch_size=4"]
    with pytest.raises(ValueError, match="largest = 7: needs 5 images of a class in a batch, found batch_size = 4"):
        load_config([*words, "method.stages.train.auxiliaries.range.largest=7"])
    with pytest.raises(ValidationError):
        RangeLoss.Config(largest=0)
