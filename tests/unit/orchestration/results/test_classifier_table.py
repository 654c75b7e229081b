"""Losses by classifiers in the layout of the survey's Table 7."""

from __future__ import annotations

from orchestration.results.classifier_table import Entry, classifier_table, entry, loss_label

KEYS = ("many", "medium", "few", "all")


def top1(*values, by_index=None):
    """Make the accuracies of one classifier from percentages: many, medium, few, all."""
    more = dict.fromkeys((f"{group}_by_index" for group in KEYS[:3]), by_index)
    return {key: None if value is None else value / 100 for key, value in zip(KEYS, values, strict=True)} | more


def cells(lines, label):
    return next(line.removeprefix(label).split() for line in lines if line.startswith(label))


# The survey's own rows of softmax and balanced softmax for two of its classifiers.
SOFTMAX = {"joint": top1(66.9, 40.4, 12.6, 46.8), "crt": top1(65.0, 45.3, 25.5, 50.2)}
BALANCED = {"joint": top1(62.4, 47.7, 32.1, 51.2), "crt": top1(64.9, 46.1, 26.2, 50.6)}


def test_a_row_per_loss_has_the_numbers_of_every_classifier_as_the_survey_prints_them():
    lines = classifier_table([Entry("ce", 0, SOFTMAX), Entry("balanced_softmax", 0, BALANCED)])
    assert lines[1].split() == ["joint", "crt"]
    assert lines[2].split() == ["many", "medium", "few", "all"] * 2
    assert cells(lines, "ce ") == "66.9 40.4 12.6 46.8 65.0 45.3 25.5 50.2".split()
    assert cells(lines, "balanced_softmax ") == "62.4 47.7 32.1 51.2 64.9 46.1 26.2 50.6".split()
    assert len(lines) == 6, "one seed has no spread, and there are no groups by index"
    assert len({len(line) for line in lines[3:]}) == 1


def test_seeds_of_one_loss_become_mean_and_standard_deviation():
    """For 10, 20 and 30 % the mean is 20 and the standard deviation 10; a classifier of one seed has none."""
    one = [Entry("ce", seed, {"crt": top1(*[10 * (seed + 1)] * 4)}) for seed in range(3)]
    lines = classifier_table([one[0]._replace(top1=one[0].top1 | {"ncm": top1(5, 5, None, 5)}), *one[1:]])
    assert cells(lines, "ce ") == ["20.0"] * 4 + ["5.0", "5.0", "n/a", "5.0"]
    assert cells(lines, "  3 seeds") == ["±10.0"] * 4 + ["±n/a"] * 4
    assert "standard deviation over seeds" in lines[-1]


def test_a_missing_classifier_is_left_open_and_groups_by_index_have_a_table_of_their_own():
    entries = [Entry("ce", 0, {"crt": top1(1, 2, 3, 4, by_index=0.5)}), Entry("ldam", 0, {})]
    lines = classifier_table(entries, {"many": 3, "medium": 2, "few": 5, "many_by_index": 4})
    assert lines[0].endswith("by number of training images (many 3, medium 2, few 5 classes)")
    assert cells(lines, "ldam ") == ["n/a"] * 4
    second = lines[lines.index("") + 1 :]
    assert second[0].endswith("by index (many 4 classes)")
    assert cells(second, "ce ") == ["50.0", "50.0", "50.0", "4.0"]
    assert classifier_table([]) == []


def test_the_entry_of_a_run_is_named_by_its_loss():
    found = {"ncm": {"last": {"members": {"ensemble": {"top1": {"all": 0.5}}}}}, "crt": {}}
    assert entry("ldam+ncm+crt", 3, found) == Entry("ldam", 3, {"ncm": {"all": 0.5}})
    assert [loss_label(name, ["ncm"]) for name in ("ride+mixup+ncm", "ncm")] == ["ride+mixup", "ncm"]
