"""Every head and aggregator with a number that may be chosen on the validation split says so in the same way."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap

import pytest
import torch

import aggregation
import experts
from aggregation.aggregator import Outputs
from experts import registry
from experts.cases import cases_of
from experts.registry import build, piece
from experts.tunable import Tunable

registry.import_pieces(experts, aggregation)

TUNABLES = [
    (kind, name)
    for kind in ("head", "aggregator")
    for name in registry.registered_names(kind)
    if issubclass(piece(kind, name), Tunable)
]
every_tunable = pytest.mark.parametrize(("kind", "name"), TUNABLES)
SCORES = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def made(kind, name, **settings):
    config = piece(kind, name).Config(**settings)
    if kind == "head":
        return build("head", config, 5, 3, 0).double().eval()
    return build("aggregator", config, torch.tensor([50, 20, 7, 2, 1]), ("a", "b"))


def scores(tunable):
    with torch.no_grad():
        return tunable(SCORES[0]) if isinstance(tunable, torch.nn.Module) else tunable(Outputs(SCORES))


def test_the_tunables_of_the_recipes_are_registered():
    assert {("head", "tau_normalised"), ("aggregator", "logit_adjusted"), ("aggregator", "uno_ic")} <= set(TUNABLES)


def told_of(config, key):
    """Return the text under a key, in the class that has it."""
    owner = next(cls for cls in config.__mro__ if key in vars(cls).get("__annotations__", {}))
    [body] = [node.body for node in ast.parse(textwrap.dedent(inspect.getsource(owner))).body]
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and ast.unparse(field.target) == key and isinstance(text, ast.Expr):
            return ast.literal_eval(text.value)
    return ""


@every_tunable
def test_null_asks_for_a_choice_and_until_then_the_published_number_holds(kind, name):
    cls = piece(kind, name)
    key = cls.tuned_key
    assert made(kind, name, **{key: None}).value == cls.published
    assert made(kind, name, **{key: 0.25}).value == 0.25
    assert cls.origin
    assert f"{cls.published:g}" in told_of(cls.Config, key), "the published number is told where the key is"
    assert any(getattr(case.config, key) is None for case in cases_of(kind, name, *((("a",),) * (kind != "head"))))


@every_tunable
@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf"), "best"])
def test_a_strength_and_its_candidates_are_finite_numbers_from_zero(kind, name, bad):
    cls = piece(kind, name)
    with pytest.raises(ValueError, match=cls.tuned_key):
        cls.Config(**{cls.tuned_key: bad})
    for candidates in ((0.1, bad), ()):
        with pytest.raises(ValueError, match="candidates"):
            cls.Config(candidates=candidates)


@every_tunable
def test_candidates_ascend_and_have_the_published_number(kind, name):
    cls = piece(kind, name)
    default = made(kind, name).candidates()
    assert default == tuple(k / 10 for k in range(21))
    for given in ((0.55, 0.5, 0.55), (cls.published,), (0.0, 9.0)):
        found = made(kind, name, candidates=given).candidates()
        assert list(found) == sorted({*given, cls.published})


@every_tunable
def test_a_number_that_is_set_counts_as_one_from_the_config(kind, name):
    """Without new weights: heads are built from one key."""
    torch.manual_seed(0)
    chosen = made(kind, name, **{piece(kind, name).tuned_key: None})
    before = scores(chosen)
    for number in chosen.candidates():
        torch.manual_seed(0)
        wanted = scores(made(kind, name, **{chosen.tuned_key: number}))
        chosen.value = number
        assert torch.equal(scores(chosen), wanted)
        assert torch.equal(wanted, before) == (number == chosen.published)
