"""Files of any format and size are answered as evaluation would answer them."""

from __future__ import annotations

import csv
import io
import shutil
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from aggregation.serving import load_model
from orchestration.cli import main
from orchestration.commands import predict as command
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
    code = main(["predict", *map(str, words), "--csv", "-"])
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


def test_scores_that_only_rank_are_said_to(tmp_path, capsys):
    words = ["method=focal", "method.stages.train.objective.form=sigmoid", *WORDS]
    model = export(tmp_path / "m", load_config(words), "train", digits(0), image_shape=(8, 8, 1))
    [file] = written(tmp_path, 1)
    assert main(["predict", model, file]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("probability: a softmax of scores that only rank")


def test_a_file_that_cannot_be_read_costs_its_line_and_the_exit_code_where_asked(grey, tmp_path, capsys):
    (good,) = written(tmp_path, 1)
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"\xff\xd8\xff and no more")
    for words, code in (((), 0), (("--strict",), 1)):
        found, rows, said = answered(capsys, grey, good, bad, *words)
        assert found == code
        assert [row["file"] for row in rows] == [good]
        first, last = said.splitlines()
        assert "bad.jpg: not a whole image" in first
        assert last == "expertail: 1 of 2 files could not be read"
    code, rows, said = answered(capsys, grey, bad)
    assert (code, rows) == (1, [])
    assert said.endswith("none of 1 file could be read; needed images\n")


def test_csv_is_written_to_a_file_that_cannot_be_an_image(grey, tmp_path, capsys):
    first, second, _ = written(tmp_path)
    before = (tmp_path / first).read_bytes()
    assert main(["predict", str(grey), second, "--csv", first]) == 1
    assert (tmp_path / first).read_bytes() == before
    assert "needed a file whose name ends in .csv" in capsys.readouterr().err
    target = tmp_path / "said.csv"
    assert main(["predict", str(grey), first, second, "--top", "1", "--csv", str(target)]) == 0
    assert capsys.readouterr().out == f"{target}: answers for 2 files\n"
    rows = list(csv.DictReader(io.StringIO(target.read_text())))
    assert [row["file"] for row in rows] == [first, second]
    assert "class" in rows[0] and "class2" not in rows[0]


def test_answers_that_a_full_disk_lacks_are_no_success(grey, tmp_path, monkeypatch, capsys):
    (file,) = written(tmp_path, 1)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main(["predict", str(grey), file, "--csv", "-"]) == 1
    assert "standard output cannot be written (No space left on device)" in capsys.readouterr().err


def test_whole_pictures_are_never_more_than_the_threads_that_decode(grey, tmp_path, monkeypatch):
    """However many files there are: each picture is brought to the frame before the next one is decoded."""
    alive, most = set(), []

    def decoded(path):
        image = torch.zeros(3, 64, 64, dtype=torch.uint8)
        alive.add(path)
        weakref.finalize(image, alive.discard, path)
        most.append(len(alive))
        return image

    monkeypatch.setattr(command, "decode_file", decoded)
    monkeypatch.setattr(command, "usable_cpus", lambda: 3)
    frames = [frame for _, frame in command._framed(load_model(grey), map(str, range(200)))]
    assert len(frames) == 200
    assert max(most) <= 3


@pytest.mark.parametrize(("words", "message"), [
    (["{tmp}/none.png"], "nothing there; needed a file, or a folder of images"),
    ([""], "found an empty word; needed a file, or a folder of images"),
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


def test_a_run_that_is_named_alone_is_looked_for_beside(grey, tmp_path, monkeypatch, capsys):
    shutil.copytree(grey, tmp_path / "runs" / "birds" / "export" / "best")
    monkeypatch.chdir(tmp_path)
    (file,) = written(tmp_path, 1)
    assert main(["predict", "birds", file]) == 1
    assert "birds/export/best: no exported model there; did you mean runs/birds?" in capsys.readouterr().err


def test_images_of_other_sizes_and_colours_are_brought_to_the_network(grey):
    model = load_model(grey)
    images = [torch.full((3, height, width), 77, dtype=torch.uint8) for height, width in ((8, 8), (100, 30), (3, 5))]
    colour = torch.tensor([200, 30, 90], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    answers = model.ask(torch.stack([model.frame(image) for image in [*images, colour]]))
    assert answers.probabilities_BC.shape == (4, 10)
    luma = np.asarray(Image.new("RGB", (8, 8), (200, 30, 90)).convert("L"))
    again = model.ask(model.frame(torch.from_numpy(luma[None].copy()))[None])
    assert np.allclose(answers.probabilities_BC[-1], again.probabilities_BC[0], rtol=1e-4)


def test_the_folder_of_an_mlflow_model_is_one(grey, tmp_path, capsys):
    shutil.copytree(grey, tmp_path / "mlflow" / "data" / "best")
    (tmp_path / "mlflow" / "MLmodel").write_text("flavors: {}\n")
    (file,) = written(tmp_path, 1)
    assert answered(capsys, tmp_path / "mlflow", file)[:2] == answered(capsys, grey, file)[:2]


def test_a_model_of_no_store_names_the_variable(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("mlflow.is_tracking_uri_set", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert main(["predict", "models:/birds/1", *written(tmp_path, 1)]) == 1
    assert "models:/birds/1: of which store? set MLFLOW_TRACKING_URI" in capsys.readouterr().err
    assert not list(tmp_path.glob("mlflow*"))
