"""A stage that ends before its drops, re-weighting or warm-up says so; percentages never do."""

import pytest

from orchestration.config.compose import load_config
from orchestration.config.late import late_notes, never_reached
from orchestration.results.run_table import run_table
from orchestration.tracking.contents import tags

STEPS = "method.stages.train.lr_schedule="


def test_drops_reweighting_and_warm_up_beyond_the_end_are_listed():
    schedule = "{name:steps,warmup_epochs:9,milestones:[{after_epoch:12,factor:0.1}]}"
    words = ["method=ldam_drw", "dataset=digits_lt", f"{STEPS}{schedule}", "method.stages.train.epochs=8"]
    config = load_config([*words, "method.stages.train.class_weights.after_epoch=10"])
    assert never_reached(config.method.stages["train"]) == [
        "the end of the warm-up in epoch 9",
        "the learning rate's drop after epoch 12",
        "class_weights.after_epoch = 10",
    ]
    [note] = late_notes(config.method)
    assert note.startswith("stage train ends with epoch 8, before the end of the warm-up in epoch 9, the learning")
    assert note in run_table(config, {"counts": [2, 1]}, {}).splitlines()
    assert tags({"never_reached": [note]}, {}, {})["never_reached"] == note
    longer = load_config([*words[:-1], "method.stages.train.epochs=13"])
    assert list(late_notes(longer.method)) == []


@pytest.mark.parametrize("method", ["ldam_drw", "ride_distill", "lfme", "bbn", "crt", "paco"])
def test_own_images_reach_all_of_a_recipe_whatever_its_length(method):
    base = load_config([f"method={method}", "dataset=image_folder_lt"]).method
    words = [f"method.stages.{name}.epochs=12" for name, stage in base.stages.items() if stage.epochs]
    short = load_config([f"method={method}", "dataset=image_folder_lt", *words])
    assert list(late_notes(base)) == list(late_notes(short.method)) == []
