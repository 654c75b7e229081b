"""Second stages, mixings and auxiliaries that cannot work are refused by key, one message for each mistake."""

from __future__ import annotations

import pytest
import torch

from experts import registry
from orchestration.config.compose import load_config
from orchestration.config.words import available
from tests.second_stages import HOST, WITH_STEPS, WITHOUT_STEPS, second_stages


def problem(*words, host=HOST):
    """Return the one line with which these words are refused."""
    with pytest.raises(ValueError, match=r": 1 problem\n") as error:
        load_config([*host, *words])
    return str(error.value).splitlines()[1].strip()


def stage(keys, name="second"):
    return f"method.stages.{name}={{after: [train], start_from: {{stage: train}}, {keys}}}"


STEPS = (
    "epochs: 2, batch_size: 50, optimizer: {lr: 0.1}, lr_schedule: {name: cosine}, sampler: {name: class_balanced}, "
    "objective: {name: cross_entropy}"
)
COSINE_HOST = ["method=ride"]
SECOND = "method: stages.second"


def test_the_second_stages_of_these_tests_are_accepted():
    method = load_config([*HOST, *second_stages([*WITH_STEPS, *WITHOUT_STEPS])]).method
    assert method.finals == (*WITH_STEPS, *WITHOUT_STEPS)
    load_config([*COSINE_HOST, *second_stages(["crt", "lws", "disalign", "dr", "ncm"])])


def test_a_number_is_left_open_in_stages_without_steps_only():
    assert problem(stage(f"{STEPS}, head: {{name: tau_normalised, gamma: null}}")) == (
        f"{SECOND}.head.gamma = null: it is chosen on the validation split in a stage without steps; set a number, or "
        f"epochs=0"
    )
    steps = STEPS.replace("class_balanced", "instance_balanced")  # the rule is for heads that know the distribution
    said = problem(stage(f"{steps}, aggregator: {{name: logit_adjusted, tau: null}}"), host=["method=ce"])
    assert f"{SECOND}.aggregator.tau = null: it is chosen on the validation split in a stage without steps" in said


@pytest.mark.parametrize("key", ["batch_size", "optimizer", "lr_schedule", "sampler", "objective"])
def test_a_stage_with_steps_needs_each_of_five_keys(key):
    keys = ", ".join(part for part in STEPS.split(", ") if not part.startswith(f"{key}:"))
    assert problem(stage(keys)) == f"{SECOND}.{key}: not set; needed a value in a stage with steps (epochs = 2)"


def test_a_stage_that_is_misspelt_is_told_by_those_that_there_are():
    """A key of a stage that the recipe has not makes one with this key alone."""
    line = "a stage with steps (epochs = 2) that has none of batch_size, optimizer, lr_schedule, sampler, objective"
    assert problem(stage("epochs: 2")) == f"{SECOND}: {line}; needed all of them, or a stage of the recipe: train"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["method.stages.train.reinit=[heads]"],
            "method: stages.train.reinit = ['heads']: the stage begins with new weights anyway; set start_from, or "
            "remove it",
        ),
        (
            [stage(f"{STEPS}, reinit: [heads], freeze: [heads]")],
            f"{SECOND}.reinit = ['heads']: head 'linear' would stay at random weights, since freeze has heads; "
            f"change either",
        ),
        (
            [stage("epochs: 0, reinit: [heads]")],
            f"{SECOND}.reinit = ['heads']: head 'linear' would stay at random weights, since epochs = 0; change either",
        ),
        (
            [stage(f"{STEPS}, reinit: [calibration]")],
            f"{SECOND}.reinit = ['calibration']: the stage's experts have no calibration; remove it",
        ),
    ],
    ids=["without a source", "frozen", "without steps", "of a part that is not there"],
)
def test_a_reinit_that_makes_no_sense_is_refused(words, line):
    assert problem(*words) == line


@pytest.mark.parametrize(
    ("keys", "host", "line"),
    [
        (
            "epochs: 0, head: {name: tau_normalised}",
            COSINE_HOST,
            "head 'tau_normalised' continues 'linear' only, found 'cosine'; set another head.name, or leave the "
            "stage out",
        ),
        (
            f"{STEPS}, head: {{name: linear}}",
            COSINE_HOST,
            "head 'linear' continues 'tau_normalised' only, found 'cosine'; set reinit=[heads] for new weights, or "
            "another head.name, or leave the stage out",
        ),
        (
            f"{STEPS}, head: {{name: cosine}}",
            HOST,
            "head 'cosine' takes over no other head's weights, found 'linear'; set reinit=[heads] for new weights, or "
            "another head.name, or leave the stage out",
        ),
        (
            "epochs: 0, head: {name: ncm}",
            HOST,
            "head 'ncm' takes over no other head's weights, found 'linear'; set reinit=[heads] for new weights, or "
            "another head.name, or leave the stage out",
        ),
    ],
    ids=["tau-norm on cosine", "linear on cosine", "cosine on linear", "ncm"],
)
def test_a_head_that_does_not_continue_its_source_is_refused(keys, host, line):
    assert problem(stage(keys), host=host) == f"{SECOND}.head: {line}"


def test_a_head_that_is_fitted_is_not_trained_and_not_shared():
    assert problem(stage(f"{STEPS}, head: {{name: ncm}}, reinit: [heads]")) == (
        f"{SECOND}.head: head 'ncm' is fitted on the training images, not trained; set epochs=0"
    )
    assert problem(*second_stages(["ncm"]), "method.shared_head=true") == (
        "method: stages.ncm.head: head 'ncm' is fitted to one expert's features; set method.shared_head=false, or "
        "another head"
    )


def test_a_calibration_that_learns_alone_must_be_there():
    said = problem(stage(f"{STEPS}, freeze: [trunk, features, heads]"))
    assert said.startswith(f"{SECOND}.freeze = ['trunk', 'features', 'heads']: nothing is left to learn")


def test_a_stage_without_steps_needs_weights_from_somewhere():
    said = problem("method.stages.second={epochs: 0, after: []}")
    assert "method: stages.second.start_from: not set, and no stage comes before" in said
    assert "since a stage without steps does not train them; set start_from.run=" in said


@pytest.mark.parametrize("epochs", ["-1", "0.5"])
def test_epochs_are_whole_and_not_negative(epochs):
    assert problem(stage(f"epochs: {epochs}")).startswith(f"method.stages.second.epochs = {epochs}")


def test_new_heads_leave_the_calibration_of_the_old_ones_behind():
    """LWS, then class means and a tuned classifier from its weights: only the latter keeps the scales."""
    method = load_config(
        [*HOST, *second_stages(["lws"]), *second_stages(["ncm", "dr", "crt"], start_from="stage: lws")]
    ).method
    found = {name: method.calibration_in(name) for name in ("train", "lws", "ncm", "dr", "crt")}
    assert found["dr"] == found["lws"] is not None
    assert found["train"] is found["ncm"] is found["crt"] is None


@pytest.mark.parametrize(
    ("host", "why"),
    [
        ("lws", "with sampler.name = class_balanced the heads have seen another one"),
        ("disalign", "with objective.name = grw the experts learn: train, weighted"),
        ("ncm", "from scores that were trained, but head.name = ncm is fitted"),
        ("tau_norm", "head.name = tau_normalised has taken away what frequent classes gained"),
    ],
)
def test_a_prior_is_not_taken_from_scores_that_are_calibrated_or_fitted(host, why):
    assert why in problem(f"method={host}", "then=logit_adjusted", host=[])


def test_a_head_has_one_calibration():
    said = problem("method=lws", "then=disalign", host=[])
    assert "stages.disalign.calibration.name = disalign" in said and "'scales', which would be lost" in said
    load_config(["method=lws", "then=disalign", "method.stages.disalign.reinit=[calibration]"])


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_stage_is_not_called_as_the_runs_models(name):
    said = problem(stage("epochs: 0", name), host=["method=ce"])
    assert said.endswith(f"method.stages: '{name}' is no name of a stage, but of the run's models; choose another")


def test_a_head_of_another_flow_is_refused_with_what_the_stage_can_do():
    said = problem("method=bbn", "then=lws", host=[])
    assert said.startswith(
        "method: stages.lws.flow 'plain': head 'bilateral' is for flow 'bilateral'; give the stage new heads, "
        "reinit=[heads] and head.name = cosine or "
    )
    assert said.endswith(", or set flow.name=bilateral") and " ncm " not in said


def test_a_refused_rule_names_the_stage_that_trained_its_scores():
    said = problem("method=crt", "then=uno_ic", host=[])
    assert said.startswith("method: stages.uno_ic: its scores are trained in stage crt; aggregator 'uno_ic' subtracts")
    own = problem("method=tade", "method.aggregator.name=logit_adjusted", host=[])
    assert own.startswith("method: aggregator 'logit_adjusted' subtracts")


# Mixings

MIXED = ["dataset=digits_lt", "method=ce", "mix=cmo"]


@pytest.mark.parametrize("pace", ["demo", "digits_lt", "fashion_mnist_lt", "places_lt"])
def test_short_paces_leave_cmo_epochs_between_its_quiet_ones(pace):
    words = ["method=ride", "mix=cmo", f"pace={pace}", "dataset=digits_lt", "method.backbone_weights=null"]
    stage = load_config(words).method.stages["train"]
    assert stage.epochs > stage.mixing.quiet_first + stage.mixing.quiet_last


@pytest.mark.parametrize("where", [("epochs=7",), ("epochs=20", "mixing.quiet_first=12", "mixing.quiet_last=8")])
def test_cmo_with_no_epoch_between_its_quiet_ones_is_refused(where):
    train = "method.stages.train"
    schedule = [f"{train}.lr_schedule.name=cosine"]  # whose drops do not fall on each other
    said = problem(*schedule, *(f"{train}.{word}" for word in where), host=MIXED)
    for part in ("stages.train.mixing.quiet_first = ", "mixing.quiet_last = ", "found epochs = "):
        assert part in said
    epochs = int(said.split("or epochs = ")[1].split()[0])
    given = [word for word in where if not word.startswith("epochs")]
    load_config([*MIXED, *schedule, *(f"{train}.{word}" for word in (*given, f"epochs={epochs}"))])


def test_cmo_in_a_short_stage_of_a_pace_is_refused_by_the_stage():
    """The second stages of pace=digits_lt have 5 epochs."""
    said = problem("then=crt", "method.stages.crt.mixing.name=cmo", host=["dataset=digits_lt", "method=ce"])
    assert "stages.crt.mixing.quiet_first = 4, mixing.quiet_last = 3" in said and "found epochs = 5" in said


@pytest.mark.parametrize("mix", available("mix"))
@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["method=bbn", "mix={}"], ["stages.train.mixing.name = {}", "'bilateral' pairs batches", "leave out"]),
        (["method=ride", "then=h2t", "method.stages.h2t.mixing.name={}"], ["h2t.mixing.name = {}", "flow 'h2t'"]),
        (["method=ce", "then=ncm", "method.stages.ncm.mixing.name={}"], ["stages.ncm.mixing.name = {}", "no steps"]),
    ],
    ids=["paired", "paired second stage", "no steps"],
)  # fmt: skip
def test_a_stage_that_cannot_be_mixed_is_refused_by_key(mix, words, parts):
    epochs = ["method.stages.h2t.epochs=20"] if "then=h2t" in words else []
    said = problem(*(word.format(mix) for word in words), *epochs, host=["dataset=digits_lt"])
    assert all(part.format(mix) in said for part in parts), said


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("mixing.alpha=0", "mixing.alpha = 0"),
        ("mixing.alpha=1e308", "mixing.alpha = 1e+308: needed 1e+06 or less"),
        ("mixing.probability=1.5", "mixing.probability = 1.5"),
        ("mixing.quiet_first=-1", "mixing.quiet_first = -1"),
        ("mixing.sampler.name=rare", "mixing.sampler.name = rare"),
        ("mixing.kappa=2", "mixing 'cmo' has no key kappa; 'remix' has"),
    ],
)
def test_a_value_that_means_nothing_is_refused_by_key(word, part):
    assert part in problem(f"method.stages.train.{word}", host=MIXED)


@pytest.mark.parametrize("mix", available("mix"))
def test_an_alpha_that_no_draw_would_end_with_is_refused(mix):
    words = ["dataset=digits_lt", "method=ce", f"mix={mix}"]
    assert load_config([*words, "method.stages.train.mixing.alpha=1e6"])
    assert "mixing.alpha = 10000000.0: needed 1e+06 or less" in problem(
        "method.stages.train.mixing.alpha=1e7", host=words
    )


@pytest.mark.parametrize("mix", available("mix"))
def test_an_objective_that_knows_images_by_their_place_takes_no_mixed_ones(mix):
    words = ["dataset=digits_lt", "method=lfme", f"mix={mix}"]
    assert f"stages.student.mixing.name = {mix}: objective 'lfme' knows every image" in problem(host=words)
    stages = load_config([*words, "method.stages.student.mixing=null"]).method.stages
    assert {name for name, stage in stages.items() if stage.mixing is None} == {"student"}
    part = "method.stages.student.objective={name: sum, terms: {a: {name: lfme}}}"
    assert f"stages.student.mixing.name = {mix}: objective 'sum' knows every image" in problem(part, host=words)


def test_all_that_a_stage_without_steps_has_for_steps_is_in_one_message():
    at = "method.stages.ncm"
    words = [f"{at}.views=[simclr]", f"{at}.mixing.name=mixup", f"{at}.auxiliaries.t.name=triplet"]
    said = problem(*words, host=["dataset=digits_lt", "method=ce", "then=ncm"])
    assert "augment" not in said
    for found in ("ncm.views", "ncm.mixing.name = mixup", "ncm.auxiliaries = ['t']"):
        assert f"stages.{found}: the stage has no steps (epochs = 0)" in said


AT = "method.stages.train.auxiliaries"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=bbn", f"{AT}.t.name=triplet"], "flow 'bilateral' takes none; set flow.name=plain"),
        (["method=ce", f"{AT}.s.name=supcon"], "s: auxiliary 'supcon' compares 2 views of every image, and the stage"),
        (["method=ce", "mix=mixup", f"{AT}.t.name=triplet"], "mixed images have two each; set mixing=null"),
        (
            ["method=ce", f"{AT}.p.name=paco", f"{AT}.p.queue_size=64"],
            "p.queue_size = 64: .* needed at least batch_size = 128; set",
        ),
        (
            ["method=ce", "method.stages.train.objective.name=no_loss"],
            "objective.name = no_loss: nothing trains the experts",
        ),
        (
            ["method=ce", f"{AT}.m.name=moco", f"{AT}.m.queue_size=127"],
            "m.queue_size = 127: .* needed at least batch_size = 128; set",
        ),
        (
            ["method=ce", f"{AT}.r.name=rotation"],
            "r: auxiliary 'rotation' guesses what augmentation 'quarter_turn' has drawn .* found crop, rotation; set",
        ),
        (
            [
                "method=ssp_moco",
                "dataset.augment=[]",
                "method.stages.pretrain.augment=[]",
                "method.stages.pretrain.views=[none]",
            ],
            "pretrain.views: 2 of them change nothing at random",
        ),
        (["method=ce", f"{AT}.p.name=paco", f"{AT}.p.momentum=1"], "momentum.* less than 1"),
        (["method=ce", f"{AT}.m.name=moco", f"{AT}.m.momentum=1"], "m.momentum.* less than 1"),
        (["method=ce", f"{AT}.p.name=paco", f"{AT}.p.momentum=-0.1"], "momentum = -0.1: needed 0 or more"),
        (["method=ride", f"{AT}.g.name=rsg", f"{AT}.g.experts=[expert0]"], "makes images that all experts need alike"),
        (
            ["method=ce", f"{AT}.m.name=mbj", "method.shared_head=true"],
            "m: auxiliary 'mbj' trains an expert's own head",
        ),
        (["method=ce", f"{AT}.g.name=rsg", f"{AT}.h.name=rsg"], "2 of them make images; needed one"),
        (
            ["method=lade", f"{AT}.g.name=rsg"],
            "g: auxiliary 'rsg' makes images, and objective 'lade' needs the training images as they are",
        ),
        (
            ["method=dive", f"{AT}.g.name=rsg"],
            "g: auxiliary 'rsg' makes images, which teachers have not seen; remove teachers",
        ),
        (["method=ride", f"{AT}.t.name=triplet", f"{AT}.t.experts=[expert7]"], "t.experts: found expert7; needed some"),
        (["method=ce", f"{AT}.cross_entropy.name=triplet"], "auxiliaries.cross_entropy: needed a name .* no other's"),
        (["method=ce", f"{AT}.t.name=tripplet"], "tripplet"),
        (
            ["method=ce", f"{AT}.c.name=centroid_margin"],
            "auxiliaries.c: .* trains the memory of head 'meta_embedding', found head 'linear'; set head.name=",
        ),
        (
            ["method=ce", "method.attention.name=modulated", "backbone.split=branches"],
            "method.attention.name = modulated: found backbone.split = branches, .* needed another split",
        ),
        (["method=ce", "method.head.name=meta_embedding"], "no auxiliary trains the memory of head 'meta_embedding'"),
        (
            ["method=ce", f"{AT}.p.name=paco", f"{AT}.p.momentum=0.9", f"{AT}.q.name=paco"],
            "p.momentum = 0.9, q.momentum = 0.999; the network has one copy; set them equal",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_key(words, message):
    with pytest.raises(ValueError, match=message):
        load_config(["dataset=digits_lt", "method.stages.train.batch_size=128", *words])


def test_a_stage_without_steps_has_none():
    with pytest.raises(ValueError, match=r"stages.ncm.auxiliaries = \['t'\]: the stage has no steps"):
        load_config(["method=ncm", "dataset=digits_lt", "method.stages.ncm.auxiliaries.t.name=triplet"])


def test_means_of_classes_need_an_image_of_each():
    with pytest.raises(ValueError, match="1 of 4 classes have no training image: class 2; needed at least 1 of each"):
        registry.build("auxiliary", registry.piece("auxiliary", "dro_lt").Config(), 6, torch.tensor([4, 2, 0, 1]))
