import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from aggregation.open_set import auroc, f_measure_of, open_set


def known(**members):
    """Five images of classes 0, 0, 1, 1, 2; each member says which are right, and how sure it is of them."""
    state = {"labels": np.array([0, 0, 1, 1, 2])}
    for name, (right, sure) in members.items():
        state |= {f"{name}/correct": np.array(right, dtype=bool), f"{name}/confidence": np.array(sure)}
    return state


def unknown(**members):
    state = {"labels": np.zeros(4, np.int64)}
    for name, sure in members.items():
        state |= {f"{name}/correct": np.zeros(4, dtype=bool), f"{name}/confidence": np.array(sure)}
    return state


def test_the_measures_by_hand():
    """Threshold 0.3. Known: four right, one of them at 0.2 and rejected: TP 3, FP 2 (one wrong, one rejected). Unknown:
    0.3 is not below, so two get a class: FN 2. P = 3/5, R = 3/5, F = 3/5. Of 20 pairs 14 have the known image above and
    two are equal (0.3 and 0.3, 0.5 and 0.5)."""
    a, b = ([1, 1, 0, 1, 1], [0.9, 0.2, 0.3, 0.5, 0.8]), [0.1, 0.2, 0.3, 0.5]
    found = open_set(known(ensemble=a, expert0=a), unknown(ensemble=b, expert0=b), [200, 50, 5], (1, 2), 0.3)
    assert (found["num_known"], found["num_unknown"], found["threshold"]) == (5, 4, 0.3)
    assert found["members"]["ensemble"] == found["members"]["expert0"]
    one = found["members"]["ensemble"]
    assert one["precision"] == one["recall"] == pytest.approx(one["f_measure"]) == 3 / 5
    assert one["rejected"] == {"known": 1 / 5, "unknown": 2 / 4}
    assert one["top1"]["all"] == 3 / 5
    assert (one["top1"]["many"], one["top1"]["medium"], one["top1"]["few"]) == (0.5, 0.5, 1.0)
    assert one["auroc"] == pytest.approx(roc_auc_score([1] * 5 + [0] * 4, a[1] + b))


@pytest.mark.parametrize(
    ("right", "taken", "expected"),
    [
        ([1, 1], [0, 0], (1.0, 1.0, 1.0)),
        ([0, 0], [0, 0], (0.0, 0.0, None)),
        ([0, 0], [1, 0], (0.0, 0.0, 0.0)),
        ([1, 0], [1, 1], (2 * 0.5 / 3 / (0.5 + 1 / 3), 0.5, 1 / 3)),
    ],
)
def test_the_f_measure_at_its_ends(right, taken, expected):
    found = f_measure_of(np.array(right, dtype=bool), np.array(taken, dtype=bool))
    assert found == pytest.approx(expected) if expected[2] is not None else found == expected


@pytest.mark.parametrize("seed", range(3))
def test_the_area_is_that_of_scikit_learn_also_with_ties(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 9, 40) / 9, rng.integers(0, 7, 25) / 9
    assert auroc(a, b) == pytest.approx(roc_auc_score([1] * 40 + [0] * 25, np.concatenate([a, b])))


def test_no_image_on_either_side_is_refused():
    empty = {name: value[:0] for name, value in unknown(e=[0.1] * 4).items()}
    with pytest.raises(ValueError, match="need known and unknown images, found 5 and 0"):
        open_set(known(e=([1] * 5, [0.5] * 5)), empty, [1, 1, 1], None)
