"""The table of losses: its runs are the recipes that it names, and its document is what was measured."""

from __future__ import annotations

import json

import pytest

from benchmarks import loss_steps, losses
from benchmarks.losses import BASELINE, DOCS, LOSSES, MIXING, REPRESENTATION, RESULTS, ROWS, TABLES, words_of
from orchestration.config.compose import load_config
from orchestration.config.words import available


def config_of(network, data="cifar", epochs=40):
    return load_config([*words_of(data, network, epochs), "dataset.num_classes=10"])


@pytest.mark.parametrize("network", LOSSES | REPRESENTATION)
def test_all_networks_have_one_schedule_and_the_stages_of_their_rows(network):
    config = config_of(network)
    epochs = {name: stage.epochs for name, stage in config.method.stages.items()}
    first = [epochs.pop(stage, 40) for stage in ("train", "teacher", "pretrain")]
    assert first == [40, 40, 120 if network == "ssp_longer" else 40] and set(epochs.values()) <= {0, 10}
    assert {stage.batch_size for stage in config.method.stages.values() if stage.epochs} == {128}
    finals = {row.final for _, rows in TABLES.values() for row in rows if row.network == network}
    assert finals == (set(config.method.finals) if len(config.method.finals) > 1 else {None})


def test_every_network_has_a_row_and_every_row_a_network():
    known = {row.network for _, rows in TABLES.values() for row in rows}
    assert known == LOSSES.keys() | MIXING.keys() | REPRESENTATION.keys()
    assert all(len({row.label for row in rows}) == len(rows) for _, rows in TABLES.values())


def test_recipes_from_parts_are_those_of_their_names():
    """GCL and MiSLAS are taken apart, so that their first stages have rows."""
    for network, method in (("gcl", "gcl"), ("mixup", "mislas")):
        parts = load_config([*words_of("fashion", network, 40)]).method
        whole = load_config([f"method={method}", *losses.SCHEDULE, *losses.FASHION]).method
        assert parts.head == whole.head
        assert all(parts.starts_from(name) == whole.starts_from(name) for name in whole.stages)
        for name, stage in whole.stages.items():  # beside `joint`, the second stage says what it follows
            same = {key: getattr(parts.stages[name], key) for key in ("after", "start_from")}
            assert parts.stages[name] == stage.model_copy(update=same)


def test_fewer_epochs_move_the_switches_with_them():
    stage = config_of("ldam_drw", epochs=20).method.stages["train"]
    assert (stage.epochs, stage.class_weights.after_epoch) == (20, 16)
    assert config_of("dive", epochs=20).method.stages["teacher"].epochs == 20


def entry(mean, spread):
    return {"mean": dict.fromkeys(losses.GROUPS, mean), "spread": dict.fromkeys(losses.GROUPS, spread)}


def test_a_gain_is_counted_in_deviations_of_both_rows():
    """Variances 9 and 1 in points: their mean is 5, its root 2.24; so 5 points are 2.24 deviations, and 4 are 1.79."""
    baseline = entry(0.30, 0.03)
    for mean, shown in ((0.35, "**+5.0** / **+5.0**"), (0.34, "+4.0 / +4.0"), (0.25, "**-5.0** / **-5.0**")):
        row = entry(mean, 0.01)
        row["gain"] = losses.gains(row, baseline)
        assert row["gain"]["few"]["deviations"] == pytest.approx((mean - 0.30) / 0.05**0.5 * 10)
        assert losses.beyond(row) == shown
    one_seed = entry(0.5, None)
    one_seed["gain"] = losses.gains(one_seed, baseline)
    assert losses.beyond(one_seed) == "+20.0 / +20.0"


def test_tables_go_between_their_marks_and_nowhere_else():
    text = "a\n<!-- losses: cifar -->\nold\n<!-- end -->\nb\n<!-- losses: fashion -->\nold\n<!-- end -->\nc\n"
    once = losses.filled_in(text, {"fashion": "| new |"})
    assert once == text[: text.rindex("old")] + "\n| new |\n\n<!-- end -->\nc\n"
    assert losses.filled_in(once, {"fashion": "| new |"}) == once
    with pytest.raises(ValueError, match="losses: digits"):
        losses.filled_in(text, {"digits": "| new |"})


def test_the_document_shows_what_was_measured():
    if not RESULTS.exists():
        pytest.skip("no results yet: python -m benchmarks.losses table")
    found = json.loads(RESULTS.read_text())["results"]
    tables = {data: "\n".join(losses.table(rows)) for data, rows in found.items()}
    assert losses.filled_in(DOCS.read_text(), tables) == DOCS.read_text()


def test_the_document_shows_the_steps_that_were_measured():
    if not loss_steps.RESULTS.exists():
        pytest.skip("no results yet: python -m benchmarks.loss_steps")
    rows = json.loads(loss_steps.RESULTS.read_text())["rows"]
    assert losses.filled_in(DOCS.read_text(), loss_steps.tables(rows)) == DOCS.read_text()


@pytest.mark.parametrize("network", [*LOSSES, *MIXING])
def test_cifar_as_files_has_the_mixing_that_was_published_for_it(network):
    """The folder of images is no data set with a name, so blocks for CIFAR in configs do not reach it."""
    stages = [config.method.stages for config in (config_of(network), load_config(named_cifar(network)))]
    assert {name: stage.mixing for name, stage in stages[0].items()} == {
        name: stage.mixing for name, stage in stages[1].items()
    }


def named_cifar(network):
    return [*(LOSSES | MIXING)[network], "dataset=cifar10_lt"]


def test_step_times_are_measured_for_every_loss_of_the_table():
    measured = loss_steps.ROWS.keys()
    if loss_steps.RESULTS.exists():
        assert json.loads(loss_steps.RESULTS.read_text())["rows"].keys() == measured
    for row in ROWS:
        if row.network in LOSSES and row != BASELINE:
            assert {row.network, row.final} & measured or row.final == "joint"
    assert {mix for mix in ("mixup", "remix", "cutmix", "cmo") if mix in available("mix")} <= measured
