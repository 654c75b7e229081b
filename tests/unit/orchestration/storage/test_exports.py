"""A source of weights is refused before the start where a stage would misread its scores."""

from __future__ import annotations

import json

import pytest

from aggregation.serving import TrainingData, describe
from orchestration.config.compose import load_config, to_yaml
from orchestration.storage.exports import check_sources


def saved(folder, *words):
    """Write a finished run of digits as far as its sources are checked, and return its folder."""
    config = load_config([*words, "dataset=digits_lt", f"run.name={folder.name}"])
    method = config.method
    data = TrainingData(
        dataset=config.dataset, class_names=[str(c) for c in range(10)], counts=[9] * 10, image_shape=None
    )
    description = describe(config.ensemble(method.final, 10), method.aggregator_in(method.final), data)
    (folder / "export" / "last").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "run.json").write_text(json.dumps({"status": "finished"}))
    (folder / "export" / "last" / "model.json").write_text(json.dumps(description.model_dump(mode="json")))
    return folder


def refused(*words):
    with pytest.raises(ValueError, match=r"start_from\.run = ") as error:
        check_sources(load_config(list(words)))
    return str(error.value)


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("balanced_softmax", "in its stage train: aggregator 'logit_adjusted' subtracts the training distribution, but "
                             "with objective.name = balanced_softmax the experts learn: uniform"),
        ("crt", "in its stage crt: aggregator 'logit_adjusted' subtracts the training distribution, but with "
                "sampler.name = class_balanced"),
        ("lws", "in its stage lws: aggregator 'logit_adjusted'"),
    ],
)  # fmt: skip
def test_a_prior_is_not_taken_from_a_saved_runs_scores_that_are_without_it(host, said, tmp_path):
    folder = saved(tmp_path / host, f"method={host}")
    assert said in refused("then=logit_adjusted", f"method.like={folder}")
    check_sources(load_config(["then=joint", f"method.like={folder}"]))


def test_a_prior_is_taken_from_a_saved_runs_plain_scores(tmp_path):
    folder = saved(tmp_path / "ce", "method=ce")
    check_sources(load_config(["then=[logit_adjusted,uno_ic,ncm]", f"method.like={folder}"]))


def test_a_saved_runs_calibration_is_not_left_out_in_silence(tmp_path):
    folder = saved(tmp_path / "lws", "method=lws")
    start = f"method.stages.dr={{start_from: {{run: {folder}}}, after: []}}"
    words = ["method=ce", "then=dr", "dataset=digits_lt", start]
    assert "its heads are calibrated by 'scales', which stage dr would leave out" in refused(*words)
    check_sources(load_config([*words, "method.stages.dr.calibration.name=scales"]))
    check_sources(load_config([*words, "method.stages.dr.reinit=[heads]"]))
