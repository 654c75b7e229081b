"""An MLflow model answers in any process, whatever else is imported there."""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from aggregation.serving import load_model
from orchestration.config.compose import load_config
from orchestration.tracking.mlflow_model import save_pyfunc
from tests.recipes import WORDS, digits, export

THEIRS = ("experts", "aggregation", "orchestration", "configs")
SERVE = """
import json, sys
import experts, aggregation, orchestration, configs
import mlflow
from mlflow.pyfunc.scoring_server import invocations
model = mlflow.pyfunc.load_model("model")
for request in json.load(open("requests.json")):
    print(invocations(json.dumps(request), "application/json", model, model.metadata.get_input_schema()).response)
assert all(module.ours for module in (experts, aggregation, orchestration, configs))
assert experts is sys.modules["experts"]
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of an MLflow model, and that of the ensemble in it."""
    from mlflow.models import Model

    folder = tmp_path_factory.mktemp("saved")
    export(folder / "export", load_config(["method=ride", *WORDS]), "train", digits(0), image_shape=(8, 8, 1))
    model = Model()
    save_pyfunc(folder, folder / "export", model)
    return folder, model


def test_no_import_of_its_code_leads_out_of_it(saved):
    folder, _ = saved
    [code] = (folder / "model" / "code").iterdir()
    taken = set()
    for path in code.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                taken |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                taken.add(str(node.module).split(".")[0])
    assert code.name in taken
    assert not taken & {"experts", "aggregation", "orchestration", "configs"}


def test_its_signature_names_the_fields_of_an_answer_and_its_metadata_the_classes(saved):
    folder, model = saved
    fields = {field["name"]: field for field in model.signature.outputs.to_dict()}
    assert [*fields] == ["class", "probability", "top", "experts", "disagreement"]
    assert [*fields["experts"]["properties"]] == ["expert0", "expert1", "expert2"]
    assert model.metadata["class_names"] == list(load_model(folder / "export").class_names)


@pytest.mark.slow
def test_it_serves_where_other_packages_have_the_names_of_ours(saved):
    """By the code of `mlflow models serve`, in a process that has imported packages of our names."""
    folder, _ = saved
    for name in THEIRS:
        (folder / "theirs" / name).mkdir(parents=True)
        (folder / "theirs" / name / "__init__.py").write_text("ours = True\n")
    pixels = digits(0).test.images[:2, 0].numpy()
    texts = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        texts.append(base64.b64encode(file.getvalue()).decode())
    requests = [
        {"inputs": texts, "params": {"top": 10}},
        {"instances": texts},
        {"inputs": {"image": texts}},
        {"dataframe_records": [{"image": text} for text in texts]},
        {"dataframe_split": {"columns": ["image"], "data": [[text] for text in texts]}},
        {"inputs": pixels.tolist()},
        {"inputs": texts[0]},
    ]
    (folder / "requests.json").write_text(json.dumps(requests))
    environment = os.environ | {"PYTHONPATH": str(folder / "theirs")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", SERVE], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, *others, one = [json.loads(line)["predictions"] for line in done.stdout.splitlines()]
    model = load_model(folder / "export")
    expected_BC = model.predict(pixels)
    for answer, expected_C in zip(first, expected_BC, strict=True):
        found = {said["class"]: said["probability"] for said in answer["top"]}
        np.testing.assert_allclose([found[name] for name in model.class_names], expected_C, rtol=1e-5)
        assert len(answer["experts"]) == 3
    for answers in others:
        for answer, same in zip(answers, first, strict=True):
            assert answer["class"] == same["class"]
            assert answer["probability"] == pytest.approx(same["probability"], rel=1e-5)
            assert len(answer["top"]) == 3
    assert [answer["class"] for answer in one] == [first[0]["class"]]
