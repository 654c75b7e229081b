"""An exported file answers as the run's own model, for any number of images, and says what it needs to be used."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch

from aggregation.serving import load_model
from orchestration.cli import main
from orchestration.commands import export as command
from orchestration.config.compose import load_config
from tests import short_runs
from tests.recipes import WORDS, digits, export

pytestmark = pytest.mark.slow
WEIGHTED = "method.aggregator={name: weighted, weights: {softmax: 0.2, balanced: 0.5, inverse: 0.3}}"
FORMS = [
    pytest.param("torch"),
    pytest.param("onnx", marks=pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
        reason="needs the extra `export`",
    )),
]  # fmt: skip


def opened(path):
    """Return a function of prepared images, and the metadata, as another program has them."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path))
        names = [output.name for output in session.get_outputs()]
        about = session.get_modelmeta().custom_metadata_map
        return lambda images: dict(zip(names, session.run(None, {"images": images}), strict=True)), about
    inside = {command.METADATA: ""}
    module = torch.export.load(path, extra_files=inside).module()
    about = json.loads(inside[command.METADATA])
    return lambda images: dict(zip(command.OUTPUTS, map(np.asarray, module(torch.tensor(images))), strict=True)), about


@pytest.mark.filterwarnings("ignore:No complete tensor found")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("method", "words"), [("ride", ()), ("tade", (WEIGHTED,)), ("oltr", ())])
def test_the_file_answers_as_the_model_and_carries_what_it_needs(method, words, form, tmp_path, capsys):
    run = short_runs.train(tmp_path / "run", method, *words)
    target = tmp_path / f"model{command.ENDINGS[form]}"
    assert main(["export", str(run), str(target)]) == 0
    assert "on 32 test images its scores differ by at most" in capsys.readouterr().out
    answer, about = opened(target)
    model = load_model(run / "export" / "best")
    pixels = digits(0).test.images[:5].numpy()
    told = json.loads(about["preprocessing"])
    mean, std = (np.array(told[key], np.float32)[:, None, None] for key in ("mean", "std"))
    for count in (5, 1):
        images = (pixels[:count].astype(np.float32) / 255 - mean) / std
        found = answer(images)
        np.testing.assert_allclose(found["probabilities"], model.predict(pixels[:count, 0]), atol=1e-5)
        assert found["experts"].shape == (len(model.description.expert_names), count, 10)
    assert json.loads(about["class_names"]) == list(model.class_names)
    assert json.loads(about["expert_names"]) == list(model.description.expert_names)
    assert f"name: {method}" in about["recipe"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m"
    export(folder, load_config(["method=ce", *WORDS]), "train", digits(0))
    return folder


@pytest.mark.parametrize(("words", "message"), [
    (["model"], "in which form? needed --onnx, --torch, or a name that ends in .onnx or .pt2"),
    (["model.onnx", "--torch"], "the name says onnx, found --torch"),
    (["none/model.pt2"], "none is no folder"),
    (["", "--torch"], "an empty word: needed the name of a file"),
    (["taken.pt2"], "taken.pt2: is a folder; needed the name of a file"),
    (["model.onnx"], "onnx, onnxscript, onnxruntime not installed; needed: pip install onnx onnxscript onnxruntime"),
])  # fmt: skip
def test_what_cannot_be_written_is_named_before_anything_is_loaded(words, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "taken.pt2").mkdir()
    assert main(["export", "no-run", *words]) == 1
    assert message in capsys.readouterr().err


def test_a_model_that_has_no_such_form_is_named_and_nothing_is_left(exported, monkeypatch, tmp_path, capsys):
    def fail(*_, **__):
        raise RuntimeError("no kernel for this\nand pages more")

    monkeypatch.setattr("torch.export.export", fail)
    assert main(["export", str(exported), str(tmp_path / "m.pt2")]) == 1
    said = capsys.readouterr().err.splitlines()
    assert "no test images to check with, noise in their place" in said[0]
    assert "this model cannot be exported as torch.export: RuntimeError: no kernel for this; serve it" in said[1]
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_answers_otherwise_is_not_written(exported, monkeypatch, tmp_path, capsys):
    def zeros(images):
        return [np.zeros(shape) for shape in ((len(images), 10), (len(images), 10), (1, len(images), 10))]

    monkeypatch.setitem(command._WRITERS, "torch", lambda *_: zeros)
    assert main(["export", str(exported), str(tmp_path / "m.pt2")]) == 1
    assert "m.pt2: not written: its probabilities for 32 images differ by" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
