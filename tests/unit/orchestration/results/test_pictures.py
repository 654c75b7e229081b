import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from aggregation.diversity import Diversity
from aggregation.metrics import Scores, groups_by_count
from orchestration.results.class_axis import running_mean
from orchestration.results.finals_picture import draw_finals, draw_tried
from orchestration.results.fitted_table import Chosen
from orchestration.results.pictures import _has_steps, _steps_per_epoch, draw_report
from orchestration.runs.stopping import Stopped
from orchestration.storage.journal import Journal, Series, series

EVERYTHING = ["class_counts.png", "curves.png", "per_class.png"]


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def member(values):
    return {"top1": {"all": 0.5, "many": 0.6, "medium": None, "few": 0.1}, "nll": 1.0, "ece": 0.1, "per_class": values}


def run(folder, num_classes=10, epochs=3, stages=("train",), evaluated=("last", "best"), journal=True):
    """Make a small run folder; the last class has no test image."""
    counts = [max(1, int(500 * 100 ** (-c / (num_classes - 1)))) for c in range(num_classes)]
    groups = {name: ids.tolist() for name, ids in groups_by_count(counts).items()}
    write(folder / "data.json", {
        "dataset": "fake", "counts": counts,
        "class_names": [f"a rather long class name {c}" for c in range(num_classes)],
        "groups": {"by_count": groups, "by_index": None}, "image_shape": None,
    })  # fmt: skip
    for which in evaluated:
        values = [*np.linspace(0.9, 0.1, num_classes - 1).tolist(), None]
        write(folder / f"evaluation/{which}.json", {
            "split": "test", "selected_on": "test", "stage": stages[-1], "epoch": epochs, "step": 5 * epochs,
            "num_images": 100, "members": {"ensemble": member(values), "expert0": member(values)},
        })  # fmt: skip
    if journal:
        with Journal(folder) as lines:
            for stage in stages:
                for step in range(1, 5 * epochs + 1):
                    epoch = (step - 1) // 5 + 1
                    loss = math.nan if step == 7 else 3 / step
                    lines.append(stage, epoch, step, {"train/loss": loss})
                    if step % 5 == 0:
                        values = {"train/lr": 0.1**epoch, "train/ldam/expert0": loss, "train/total": loss}
                        values |= {"test/ensemble/all/top1": 0.5, "test/expert0/all/top1": 0.4}
                        values |= {"test/ensemble/few/top1": 0.1, "val/ensemble/all/top1": 0.3}
                        lines.append(stage, epoch, step, values)
    return folder


@pytest.fixture
def unrendered(monkeypatch):
    """Write empty files in place of pictures, for tests that ask which there are: rendering one takes 0.3 s."""
    monkeypatch.setattr("orchestration.results.style.save_figure", lambda figure, path: path.write_bytes(b""))


@pytest.mark.parametrize(("num_classes", "stages"), [(10, ("train",)), (2000, ("first", "second"))])
@pytest.mark.slow
def test_a_run_gets_every_picture(tmp_path, num_classes, stages):
    written = draw_report(run(tmp_path, num_classes, stages=stages))
    assert sorted(path.name for path in written) == EVERYTHING
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == EVERYTHING
    for name in EVERYTHING:
        with Image.open(tmp_path / "report" / name) as picture:
            assert picture.format == "PNG"
            pixels = np.asarray(picture.convert("L"))
        assert 300 < min(pixels.shape) < 2000
        assert pixels.std() > 5  # something is drawn


@pytest.mark.slow
def test_a_report_is_the_same_when_written_again(tmp_path):
    run(tmp_path)
    before = {path.name: path.read_bytes() for path in draw_report(tmp_path)}
    assert {path.name: path.read_bytes() for path in draw_report(tmp_path)} == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"evaluated": ()}, ["class_counts.png", "curves.png"]),
        ({"evaluated": (), "journal": False}, ["class_counts.png"]),
        ({"evaluated": ("last",), "epochs": 1}, EVERYTHING),
    ],
)
@pytest.mark.slow
def test_an_interrupted_run_gets_what_it_has(tmp_path, arguments, expected, unrendered):
    assert sorted(path.name for path in draw_report(run(tmp_path, **arguments))) == expected


def test_a_run_of_one_step_and_an_empty_folder(tmp_path):
    assert draw_report(tmp_path / "empty") == []
    with Journal(tmp_path / "young") as lines:
        lines.append("train", 1, 1, {"train/loss": 2.0})
    assert [path.name for path in draw_report(tmp_path / "young")] == ["curves.png"]


@pytest.mark.parametrize("broken", ["_curves", "_class_counts", "_per_class", "draw_diversity"])
def test_one_picture_that_fails_leaves_the_others(tmp_path, broken, monkeypatch, unrendered):
    whole = {path.name for path in draw_report(with_experts(run(tmp_path), ["expert0", "expert1"]))}

    def fail(*_):
        raise RuntimeError("out of ink")

    monkeypatch.setattr(f"orchestration.results.pictures.{broken}", fail)
    said = []
    written = {path.name for path in draw_report(tmp_path, said.append)}
    (line,) = said
    assert line.endswith("was not drawn: RuntimeError: out of ink")
    assert whole - written == {f"{broken.removeprefix('_').removeprefix('draw_')}.png"}


@pytest.mark.parametrize("where", ["pictures._curves", "pictures.open_last", "regions.from_yaml"])
def test_a_stop_is_no_fault_of_a_picture(tmp_path, where, monkeypatch, unrendered):
    """The guards around pictures, features and regions let it pass."""

    def stop(*_, **__):
        raise Stopped(15, "put in")

    with_finals(run(tmp_path))
    (tmp_path / "export").mkdir()
    monkeypatch.setattr(f"orchestration.results.{where}", stop)
    with pytest.raises(Stopped, match="put in"):
        draw_report(tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    (run(tmp_path) / "evaluation" / "last.json").write_text("{")
    with pytest.raises(ValueError, match=r"last\.json: not valid JSON"):
        draw_report(tmp_path)


def test_steps_per_epoch_come_from_complete_epochs():
    assert _steps_per_epoch([Series([1, 1, 2, 2, 3], [1, 10, 11, 20, 21], [0.0] * 5)]) == 10
    assert _steps_per_epoch([Series([1], [4], [0.0])]) == 4


def test_the_running_mean_is_centred_narrower_at_the_ends_and_skips_nan():
    np.testing.assert_allclose(running_mean(np.array([1.0, 2.0, 6.0]), 3), [1.5, 3.0, 4.0])
    np.testing.assert_allclose(running_mean(np.array([1.0, np.nan, 3.0]), 3), [1.0, 2.0, 3.0])
    assert np.isnan(running_mean(np.array([np.nan]), 1)).all()


def with_experts(folder, names, *, routed=False, evaluated=("last", "best")):
    """Make the evaluations of a small run as real experts would give them; the last class has no test image."""
    counts = json.loads((folder / "data.json").read_text())["counts"]
    draws = torch.Generator().manual_seed(0)
    labels = torch.randint(len(counts) - 1, (200,), generator=draws)
    logits = {name: torch.randn(200, len(counts), generator=draws) for name in names}
    used = {"experts_used": torch.randint(1, len(names) + 1, (200,), generator=draws)} if routed else None
    scores, diversity = Scores(), Diversity()
    scores.update({"ensemble": torch.stack(list(logits.values())).mean(dim=0), **logits}, labels, used)
    diversity.update(logits, labels)
    measured = scores.result(counts, None) | {"diversity": diversity.result(counts, None)}
    for which in evaluated:
        path = folder / f"evaluation/{which}.json"
        write(path, json.loads(path.read_text()) | measured)
    return folder


@pytest.mark.parametrize(
    ("num_experts", "arguments"),
    [(3, {"routed": True}), (8, {"evaluated": ("last",)}), (2, {"evaluated": ("best",)})],
)
@pytest.mark.slow
def test_how_different_the_experts_are_is_drawn(tmp_path, num_experts, arguments):
    names = [f"the expert number {k}" for k in range(num_experts)]
    written = draw_report(with_experts(run(tmp_path), names, **arguments))
    assert sorted(path.name for path in written) == sorted([*EVERYTHING, "diversity.png"])
    with Image.open(tmp_path / "report" / "diversity.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    rows = len(arguments.get("evaluated", ("last", "best")))
    assert pixels.shape[0] == pytest.approx(110 * (0.5 + 3.4 * rows), abs=1)
    assert pixels.shape[1] == pytest.approx(110 * 4.4 * (4 if arguments.get("routed") else 3), abs=1)
    assert pixels.std() > 20


@pytest.mark.slow
def test_a_single_expert_has_no_picture_of_differences(tmp_path, unrendered):
    assert sorted(path.name for path in draw_report(with_experts(run(tmp_path), ["alone"]))) == EVERYTHING


@pytest.mark.slow
def test_experts_that_never_disagree_and_groups_without_images_are_drawn(tmp_path):
    """Two classes of many images: medium and few are n/a, and every pair is at 0."""
    counts, labels, z = [500, 400], torch.tensor([0, 1, 1]), torch.eye(2)[[0, 1, 1]]
    diversity = Diversity()
    diversity.update({"a": z, "b": z}, labels)
    write(tmp_path / "data.json", {"dataset": "two", "counts": counts, "class_names": ["x", "y"]})
    write(tmp_path / "evaluation/last.json", {
        "split": "test", "members": {"ensemble": member([1.0, 1.0])}, "diversity": diversity.result(counts, None),
    })  # fmt: skip
    assert "diversity.png" in [path.name for path in draw_report(tmp_path)]


def with_finals(folder, stages=("ncm", "crt")):
    """Make the last stages of a small run final ones; the first has no steps and chose a number."""
    names = ", ".join(f"{stage}: {{}}" for stage in ("train", *stages))
    (folder / "config.yaml").write_text(f"method: {{name: ce, num_experts: 1, stages: {{{names}}}}}\nseed: 0\n")
    tried = [[k / 10, 0.3 - abs(k - 5) / 100] for k in range(21)]
    choice = {"key": "head.tau", "value": 0.5, "split": "val", "origin": "x", "published": 0.7, "tried": tried}
    for stage in stages:
        for which in ("last", "best"):
            found = json.loads((folder / f"evaluation/{which}.json").read_text()) | {"stage": stage}
            if stage == stages[0]:
                found |= {"epoch": 0, "step": 0, "selected_on": None, "fitted": {"choices": [choice]}}
            write(folder / f"evaluation/{stage}/{which}.json", found)
    with Journal(folder) as lines:
        lines.append(stages[0], 0, 0, {"test/ensemble/all/top1": 0.9})
        lines.append(stages[1], 1, 5, {"test/ensemble/all/top1": 0.8, "train/lr": 0.1})
    return folder


@pytest.mark.slow
def test_several_final_stages_are_compared_and_each_has_its_pictures(tmp_path):
    written = draw_report(with_finals(run(tmp_path)))
    names = {path.relative_to(tmp_path / "report").as_posix() for path in written}
    assert names == {*EVERYTHING, "finals.png", "tried.png", "ncm/per_class.png", "crt/per_class.png"}
    for name in ("finals.png", "tried.png"):
        with Image.open(tmp_path / "report" / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5


def test_a_stage_without_steps_takes_no_place_among_the_curves(tmp_path):
    metrics = series(with_finals(run(tmp_path)))
    assert list(metrics) == ["train", "ncm", "crt"]
    assert [stage for stage, own in metrics.items() if _has_steps(own)] == ["train", "crt"]


@pytest.mark.slow
def test_a_run_whose_stages_have_no_steps_has_no_curves(tmp_path, unrendered):
    folder = with_finals(run(tmp_path, journal=False))
    (folder / "metrics.jsonl").unlink()
    with Journal(folder) as lines:
        lines.append("ncm", 0, 0, {"test/ensemble/all/top1": 0.9})
    assert "curves.png" not in {path.name for path in draw_report(folder)}


def bars(finals, groups=None):
    """Return the heights of the bars of each stage, and the places of the diamonds, in the picture's first panel."""
    axes = draw_finals(finals, {"groups": {"by_count": groups}}, "title").axes[0]
    heights = {bar.get_label(): [patch.get_height() for patch in bar] for bar in axes.containers}
    return heights, [tuple(point) for points in axes.collections for point in points.get_offsets().tolist()]


def test_bars_are_the_last_models_and_diamonds_the_best_ones_that_differ():
    def found(**top1):
        return {"members": {"ensemble": {"top1": top1}}}

    one = found(all=0.5, many=0.75, medium=None, few=0.25)
    heights, diamonds = bars(
        {"ncm": {"last": one, "best": one}, "crt": {"last": one, "best": found(all=1.0, many=0.75)}}
    )
    assert heights.keys() == {"ncm", "crt"}
    for values in heights.values():
        np.testing.assert_array_equal(values, [50, 75, np.nan, 25])
    assert diamonds == [(pytest.approx(0.21), 100)]


def test_what_was_tried_is_drawn_in_ascending_order_with_choice_and_published_number():
    tried = ((1.0, 0.2), (0.0, 0.1), (0.5, 0.4))
    one = Chosen("tau", "head.gamma", 0.5, "val", "x", 0.7, tried)
    without = one._replace(split=None, tried=())
    (axes,) = draw_tried([without, one], "title").axes
    assert axes.lines[0].get_xydata().tolist() == [[0, pytest.approx(10)], [0.5, 40], [1, 20]]
    assert axes.collections[0].get_offsets().tolist() == [[0.5, 40]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["chosen: 0.5", "published: 0.7"]
