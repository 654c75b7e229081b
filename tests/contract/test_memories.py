"""A head's memory begins at what the head was fitted to, and its auxiliary moves it from there.

That this is the same on every placement, after a resume and in a replay is checked with that of auxiliaries.
"""

from experts.ensemble import part_of
from tests.auxiliaries import heads_with_memory, take, trainer_of
from tests.contract.test_recipes import export


def memories(trainer):
    state = trainer.setup.model.state_dict()
    return {name: value.clone() for name, value in state.items() if part_of(name) == "memory"}


def test_memories_move_by_their_auxiliary_from_the_means_of_their_classes():
    """Within a few steps every centre stays near, and none stays."""
    trainer = trainer_of(heads_with_memory("engine.precision=float64"))
    drawn = memories(trainer)
    trainer.prepare()
    begun = memories(trainer)
    assert not any((begun[name] == value).any() for name, value in drawn.items())
    take(trainer, 6)
    assert len(begun) == 3
    for name, mean_CD in begun.items():
        assert mean_CD.norm(dim=1).min() > 0
        moved_C = (memories(trainer)[name] - mean_CD).norm(dim=1)
        assert moved_C.min() > 0 and (moved_C < 0.1 * mean_CD.norm(dim=1)).all()


def test_a_stage_that_goes_on_with_such_a_head_does_not_fit_it_again():
    method = heads_with_memory().method
    assert method.fits_head_first("train")
    later = method.stages["train"].model_copy(update={"head": None})
    assert not method.model_copy(update={"stages": {**method.stages, "later": later}}).fits_head_first("later")


def test_a_memory_that_a_saved_model_brings_is_not_fitted_again(tmp_path):
    first = trainer_of(heads_with_memory())
    first.prepare()
    take(first, 1)
    second = trainer_of(heads_with_memory())
    second.start_from_model(export(tmp_path, second.setup.config, "train", first.setup.dataset, first.setup.model))
    second.prepare()
    was, now = memories(first), memories(second)
    assert was.keys() == now.keys() and all((was[name] == now[name]).all() for name in was)
