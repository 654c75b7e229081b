"""Pictures in every form get the answers that evaluation gives their files."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from aggregation.pyfunc import _load_pyfunc
from experts.data.images import FileImages
from experts.data.pools import FilePool
from experts.eval_batches import EvalBatches
from orchestration.cli import main
from orchestration.config.compose import load_config
from tests.recipes import digits, export

SIZES = ((40, 40), (200, 90), (31, 64), (7, 9), (32, 32))
ENDINGS = (".png", ".jpg", ".webp", ".bmp", ".tif")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained ensemble of three experts for colour images of any size."""
    data = ["dataset=image_folder_lt", "dataset.root=/none", "dataset.image_size=32"]
    place = tmp_path_factory.mktemp("model") / "m"
    export(place, load_config(["method=ride", "backbone=resnet8", *data]), "train", digits(0), image_shape=None)
    return place


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place, draws = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i, ((height, width), ending) in enumerate(zip(SIZES, ENDINGS, strict=True)):
        coarse = draws.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(place / f"{i}{ending}")
    return sorted(place.iterdir())


def test_files_bytes_base64_and_pixels_get_the_probabilities_of_evaluation(folder, files, tmp_path):
    served = _load_pyfunc(str(folder))
    model = served.model
    paths = np.array([str(file).encode() for file in files])
    store = FileImages(FilePool("/", paths, np.zeros(len(files), np.int64)), 32)
    ((images, _),) = EvalBatches(store, model._dataset, 64)
    with torch.no_grad():
        outputs = model.outputs(images)
        expected_BC = model.aggregator(outputs).softmax(1).numpy()
        experts_EBC = outputs.logits_EBC.softmax(2).numpy()

    blobs = [file.read_bytes() for file in files]
    texts = [base64.b64encode(blob).decode() for blob in blobs]
    given = {
        "bytes": blobs,
        "base64": texts,
        "of URLs": [base64.urlsafe_b64encode(blob).decode().rstrip("=") for blob in blobs],
        "data URLs": [f"data:image/png;base64,{text}" for text in texts],
        "an array of texts": np.array(texts),
        "a table": pd.DataFrame({"image": blobs, "name": "x"}),
        "a mapping": {"image": np.array(texts)},
        "a series": pd.Series(texts),
        "pixels": [np.asarray(Image.open(io.BytesIO(blob)).convert("RGB")) for blob in blobs],
        "lists of pixels": [np.asarray(Image.open(io.BytesIO(blob)).convert("RGB")).tolist() for blob in blobs],
    }
    names = model.class_names
    for form, pictures in given.items():
        answers = served.predict(pictures, params={"top": 10})
        for b, answer in enumerate(answers):
            found = {one["class"]: one["probability"] for one in answer["top"]}
            np.testing.assert_array_equal([found[name] for name in names], expected_BC[b], err_msg=form)
            assert answer["class"] == names[expected_BC[b].argmax()]
            for e, one in enumerate(answer["experts"].values()):
                assert one == {"class": names[experts_EBC[e, b].argmax()], "probability": experts_EBC[e, b].max()}
        assert len(json.loads(json.dumps(answers))) == len(files)

    assert main(["predict", str(folder), str(files[0].parent), "--csv", str(tmp_path / "a.csv")]) == 0
    table = pd.read_csv(tmp_path / "a.csv", dtype={"class": str})
    assert table["class"].tolist() == [names[c] for c in expected_BC.argmax(1)]
    np.testing.assert_allclose(table["probability"], expected_BC.max(1), atol=5.1e-5)


def test_one_picture_is_a_batch_of_one(folder, files):
    served = _load_pyfunc(str(folder))
    blob = files[0].read_bytes()
    array = np.asarray(Image.open(files[0]).convert("RGB"))
    expected = served.predict([blob])
    for one in (blob, bytearray(blob), base64.b64encode(blob).decode(), np.array(base64.b64encode(blob).decode()),
                array, array[None], torch.from_numpy(array.copy()), array.astype(int).tolist(),
                np.concatenate([array, array[..., :1]], axis=2), base64.b64encode(blob)):  # fmt: skip
        assert served.predict(one) == expected
    grey = array[..., 0]
    assert served.predict(np.stack([grey, grey // 2], axis=2)) == served.predict(grey), "grey and transparency"
    assert served.predict([]) == []


@pytest.mark.parametrize(("given", "message"), [
    (np.zeros((3, 40, 60), np.uint8), "one picture with its channels first, or three grey ones"),
    ([np.zeros((3, 40, 60), np.uint8)], "image 0 of a list: .*channels first"),
    ("/etc/hostname.jpg", "is no base64; .* paths are not read"),
    ([b"GIF89a and no more"], "image 0: not a whole image .*; needed the bytes of an image file"),
    (pd.DataFrame({"a": [1], "b": [2]}), "found columns a, b; needed one, 'image'"),
    (pd.DataFrame({"image": [1.5]}), "found type float64"),
    ([None], "image 0: found NoneType"),
    (3, "found int"),
    (np.zeros((2, 8, 8)), "found type float64"),
    ([np.zeros((2, 8, 8, 3), np.uint8)], "2 pictures; needed one"),
])  # fmt: skip
def test_what_is_no_picture_is_refused_by_its_place(folder, given, message):
    with pytest.raises(ValueError, match=message):
        _load_pyfunc(str(folder)).predict(given)


@pytest.mark.parametrize("top", [0, -1, 2.5, True, None, [1], "x", float("inf")])
def test_what_is_no_number_of_classes_is_refused(folder, files, top):
    with pytest.raises(ValueError, match=r"top = .*; needed a whole number, at least 1"):
        _load_pyfunc(str(folder)).predict(files[0].read_bytes(), {"top": top})
