"""`expertail evaluate`: measure a saved run again."""

from __future__ import annotations

from typing import Any

import torch

from aggregation.open_set import PUBLISHED_THRESHOLD
from aggregation.tally import Tally
from orchestration.results.run_table import run_table
from orchestration.results.saved_run import SavedRun, open_run, same_threads, stages_to_measure
from orchestration.storage.location import local_run


def evaluate(
    run: str,
    weights: str | None,
    model: str | None,
    distribution: str | None,
    split: str,
    overrides: list[str],
    stage: str | None = None,
    unknown: str | None = None,
    threshold: float | None = None,
) -> str:
    """Measure a run again: on the split as it is, with other class distributions, or beside images of no known class.

    Args:
        run: the run folder or its URL.
        weights: how experts are weighted on other test distributions; "best" and "last" mean `model`.
        model: "best" or "last"; None for the default.
        distribution: names of test distributions; None for the split as it is, if `weights` is None as well.
        split: "test" or "val".
        overrides: `a.b=value`.
        stage: the final stage to measure; None for all.
        unknown: a folder or list of images of no known class, to measure the rejection of; None for none.
        threshold: highest probability below which an image is predicted to be unknown; None for the published 0.1.

    Returns:
        The text to print.

    Raises:
        ValueError: as `reevaluate`, `evaluate_distributions` and `evaluate_open_set`; two models are named; or options
            do not go together.
    """
    if weights in ("best", "last"):
        if model not in (None, weights):
            raise ValueError(
                f"--weights {weights} --model {model}: two models; --weights {weights} means --model {weights}"
            )
        weights, model = None, weights

    if unknown is not None and (weights is not None or distribution is not None):
        option = "--weights" if weights is not None else "--distribution"
        raise ValueError(f"--unknown {unknown} with {option}: measured apart; needed one of them; leave out the other")
    if unknown is None and threshold is not None:
        raise ValueError(f"--threshold {threshold:g}: only with --unknown, the images of no known class; add it")

    with local_run(run) as folder:
        if unknown is not None:
            from orchestration.results.open_set import evaluate_open_set  # loads Matplotlib

            limit = PUBLISHED_THRESHOLD if threshold is None else threshold
            return evaluate_open_set(folder, unknown, limit, model, split, overrides, stage)
        if weights is None and distribution is None:
            return reevaluate(folder, model, split, overrides, stage)
        # Matplotlib and the learning of weights are loaded only where they are needed.
        from orchestration.results.label_shift import evaluate_distributions

        return evaluate_distributions(
            folder, weights or "uniform", distribution or "uniform", model or "best", split, overrides, stage
        )


def reevaluate(run: str, which: str | None, split: str, overrides: list[str], stage: str | None = None) -> str:
    """Score the ensemble and its experts on a split, and save the result as evaluation/again-<which>-<split>.json.

    Where the recipe has several final stages, each result lies in evaluation/<stage>/.

    Args:
        run: the run folder.
        which: which of its models, "best" or "last"; None for both.
        split: "test" or "val".
        overrides: `a.b=value` for keys of MAY_DIFFER.
        stage: the final stage to measure; None for all.

    Returns:
        The table that training prints, for these evaluations alone, and the files they were saved in.

    Raises:
        ValueError: there is no such run or final stage, it has no model yet, a file is damaged, an override would
            change what is measured, or the data is not the run's.
    """
    shown: dict[str, dict[str, dict[str, Any]]] = {}
    saved_as = []
    saved: SavedRun | None = None
    for final in stages_to_measure(run, stage):
        for name in ("last", "best") if which is None else (which,):
            # The data is opened once, the models in turn.
            saved = open_run(run, name, split, overrides, final) if saved is None else saved.with_model(name, final)
            with same_threads(saved.config):
                evaluation = saved.origin() | _score(saved)
            shown.setdefault(final, {})[name] = _shown(evaluation)
            saved_as.append(saved.save(f"again-{name}-{split}", evaluation))
    assert saved is not None
    own = shown.pop("", {})  # of the run's only final stage
    return "\n".join([run_table(saved.config, saved.data, own, shown), "", *saved_as])


@torch.no_grad()
def _score(saved: SavedRun) -> dict[str, Any]:
    """Score as a worker does during training, so that an unchanged run gives its own numbers again."""
    tally = Tally(saved.model.aggregator, saved.model.description.expert_names)
    for images_B3HW, labels_B in saved.batches():
        tally.add(saved.outputs(images_B3HW), labels_B)
    return tally.result(saved.data["counts"], saved.cuts, saved.config.method.gives_probabilities(saved.final))


def _shown(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return the evaluation without the remark on selection where that would wrongly say the split was not used."""
    same = evaluation["selected_on"] == evaluation["split"] == "val"
    return {key: value for key, value in evaluation.items() if not (same and key == "selected_on")}
