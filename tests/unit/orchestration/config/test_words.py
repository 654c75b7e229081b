"""Words of a command line: choices, parts side by side, values, and what is refused."""

from __future__ import annotations

import pytest

from orchestration.config.words import NO_MIX, RECIPE_GROUPS, available, parse


def refused(*words):
    with pytest.raises(ValueError, match="problem") as error:
        parse(list(words))
    return str(error.value).splitlines()[1].strip()


def test_words_are_choices_parts_and_values():
    read = parse(["method=ride", "mix=mixup", "then=[h2t,ncm]", "seed=3"])
    assert read.choices == {"method": "ride", "mix": "mixup"} and read.then == ("h2t", "ncm")
    assert [(value.key_or_group, value.value()) for value in read.values] == [("seed", 3)]


@pytest.mark.parametrize("word", ["then=crt", "then=[crt]", "then='crt'"])
def test_one_part_needs_no_brackets(word):
    assert parse([word]).then == ("crt",)


@pytest.mark.parametrize("words", [["then=null"], ["then=[]"], ["then=crt", "then=null"]])
def test_no_part_can_be_chosen(words):
    assert parse(words) == ({}, (), [])


@pytest.mark.parametrize("words", [["mix=null"], ["mix=[]"], ["mix=mixup", "mix=null"]])
def test_no_mixing_is_a_choice(words):
    assert parse(words).choices == {"mix": NO_MIX}


def test_parts_without_brackets_are_for_a_sweep():
    assert refused("then=crt,lws") == (
        "then=crt,lws: several parts side by side are written in brackets, 'then=[crt,lws]'; without them, "
        "`expertail sweep` trains a run for each"
    )


def test_a_part_that_is_named_twice_is_refused():
    assert refused("then=crt", "then=lws") == (
        "then=lws: then= is set twice; needed once; both side by side are 'then=[crt,lws]'"
    )
    assert refused("then=[crt,lws,crt]") == "then=crt: named 2 times; needed each part once"


def test_an_unknown_part_is_told_its_neighbour():
    known = ", ".join(available("then"))
    assert refused("then=[crt,ncn]") == f"then=ncn: no such then, did you mean then=ncm; known: {known}"
    assert "did you mean mix=mixup" in refused("mix=mixupp")


def test_a_part_of_another_group_is_told_its_own():
    assert refused("mix=crt").startswith("mix=crt: no such mix, but there is method=crt and then=crt; known: ")
    assert refused("then=mixup").startswith("then=mixup: no such then, but there is mix=mixup; known: ")


@pytest.mark.parametrize(
    ("word", "instead"),
    [
        (
            "schedule=ride_h2t_cifar10_lt",
            "needed method=ride_h2t dataset=cifar10_lt, from which pace and protocol follow",
        ),
        ("schedule=ce_digits_lt", "for other data pace=digits_lt"),
        ("schedule=mine", "needed method=, dataset=,"),
    ],
)
def test_a_schedule_is_refused_with_what_replaces_it(word, instead):
    assert instead in refused(word) and "there are no schedules any more" in refused(word)


def test_every_group_has_choices():
    assert all(available(group) for group in RECIPE_GROUPS)


@pytest.mark.parametrize(
    ("words", "before"),
    [(["mix=[cmo,mixup]"], "mix=[cmo,mixup]"), (["mix=cmo", "mix=mixup"], "mix=mixup")],
    ids=["a list", "two words"],
)
def test_two_mixings_are_refused(words, before):
    said = refused("method=ce", *words)
    assert said == f"{before}: 2 mixings, cmo and mixup; needed one, as images are mixed once"


@pytest.mark.parametrize(
    "words", [["mix=cmo"], ["mix=[cmo]"], ["mix=cmo", "mix=cmo"], ["mix=mixup", "mix=null", "mix=cmo"]]
)
def test_one_mixing_may_be_said_in_other_ways(words):
    assert parse(words).choices == {"mix": "cmo"}
