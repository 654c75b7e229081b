"""Files of any format and size are answered as evaluation would answer them."""

from __future__ import annotations

import csv
import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from aggregation.serving import load_model
from orchestration.cli import main
from orchestration.config.compose import load_config
from tests.recipes import WORDS, digits, export


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """An untrained ensemble of three experts for grey images of 8 x 8."""
    folder = tmp_path_factory.mktemp("model")
    export(folder / "m", load_config(["method=ride", *WORDS]), "train", digits(0), image_shape=(8, 8, 1))
    return folder / "m"


def written(folder, count=3):
    """Write test digits as files of several kinds; return pixels by path."""
    pixels = digits(0).test.images[:count, 0].numpy()
    found = {}
    for i, (image, kind) in enumerate(zip(pixels, ("png", "bmp", "PNG"), strict=False)):
        path = folder / f"digit {i}.{kind}"
        Image.fromarray(image).convert("RGB" if i == 1 else "L").save(path)
        found[str(path)] = image
    return found


def answered(capsys, *words):
    code = main(["predict", *map(str, words), "--csv"])
    printed, said = capsys.readouterr()
    return code, list(csv.DictReader(io.StringIO(printed))), said


def test_files_get_the_names_and_probabilities_of_their_pixels(grey, tmp_path, capsys):
    (tmp_path / "below").mkdir()
    files = written(tmp_path / "below")
    code, rows, said = answered(capsys, grey, tmp_path)
    assert (code, said) == (0, "")
    model = load_model(grey)
    expected_BC = model.predict(np.stack([files[row["file"]] for row in rows]))
    assert len(rows) == len(files)
    for row, expected_C in zip(rows, expected_BC, strict=True):
        order = np.argsort(-expected_C, kind="stable")
        assert [row[key] for key in ("class", "class2", "class3")] == [model.class_names[c] for c in order[:3]]
        assert float(row["probability"]) == pytest.approx(expected_C.max(), abs=1e-4)
        named = [row[name] for name in model.description.expert_names]
        pairs = [named[a] != named[b] for a, b in ((0, 1), (0, 2), (1, 2))]
        assert float(row["disagreement"]) == pytest.approx(np.mean(pairs), abs=0.005)


def test_a_file_that_cannot_be_read_costs_its_line_and_the_exit_code(grey, tmp_path, capsys):
    (good,) = written(tmp_path, 1)
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff and no more")
    code, rows, said = answered(capsys, grey, good, tmp_path / "bad.jpg")
    assert code == 1
    assert [row["file"] for row in rows] == [good]
    assert "bad.jpg: not a whole image" in said
    assert answered(capsys, grey, tmp_path / "bad.jpg")[2].endswith("none of 1 file could be read; needed images\n")


@pytest.mark.parametrize(("words", "message"), [
    (["{tmp}/none.png"], "nothing there; needed a file, or a folder of images"),
    (["{tmp}"], "no image below this folder"),
    (["{tmp}/a.png", "--top", "0"], "--top 0: needed at least 1"),
])  # fmt: skip
def test_what_cannot_be_answered_is_named(grey, words, message, tmp_path, capsys):
    assert main(["predict", str(grey), *(word.format(tmp=tmp_path) for word in words)]) == 1
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_model_names_what_it_has(grey, tmp_path, capsys):
    shutil.copytree(grey, tmp_path / "run" / "export" / "crt" / "best")
    (file,) = written(tmp_path, 1)
    assert main(["predict", str(tmp_path / "run"), file]) == 1
    assert "export/best: the run has export/crt/best" in capsys.readouterr().err
    assert main(["predict", str(tmp_path / "run"), file, "--stage", "crt"]) == 0


def test_images_of_other_sizes_and_colours_are_brought_to_the_network(grey):
    model = load_model(grey)
    images = [torch.full((3, height, width), 77, dtype=torch.uint8) for height, width in ((8, 8), (100, 30), (3, 5))]
    colour = torch.tensor([200, 30, 90], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    answers = model.ask([*images, colour])
    assert answers.probabilities_BC.shape == (4, 10)
    luma = np.asarray(Image.new("RGB", (8, 8), (200, 30, 90)).convert("L"))
    again = model.ask([torch.from_numpy(np.stack([luma] * 3))])
    assert np.allclose(answers.probabilities_BC[-1], again.probabilities_BC[0], rtol=1e-4)
