"""Pictures draw names as they are, and cost no more than themselves when they fail."""

from __future__ import annotations

import pytest
from PIL import Image

from orchestration.results import style


def figure(title, *labels):
    made = style.new_figure(3, 2)
    axes = made.add_subplot()
    style.set_figure_title(made, title)
    axes.bar(range(len(labels)), 1)
    axes.set_xticks(range(len(labels)), [style.shorten(label) for label in labels])
    return made


@pytest.mark.parametrize("name", ["price $_$ up", "$x^{$", "caf\udce9", "a\nb", "猫 and \u0e41", "x" * 300, "", "\0"])
def test_names_are_drawn_as_they_are(name, tmp_path):
    said = []
    assert style.draw_to(tmp_path / "a.png", lambda: figure(name, name, "$"), said.append, name)
    assert said == []
    Image.open(tmp_path / "a.png").verify()


def test_fonts_are_added_for_characters_that_the_usual_one_lacks(monkeypatch):
    from matplotlib import font_manager

    assert style.fonts_for("plain, é and ∑") == (["DejaVu Sans"], "")
    owned = "\u1d8d"  # STIX has it, and comes with Matplotlib
    families, missing = style.fonts_for(f"a{owned}\U00013000")
    assert families[0] == "DejaVu Sans"
    assert any(name.startswith("STIX") for name in families)
    assert owned not in missing
    own = [font for font in font_manager.fontManager.ttflist if "mpl-data" in font.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    assert style.fonts_for("猫") == (["DejaVu Sans"], "猫"), "Matplotlib brings a font that has a box for it"
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    assert style.fonts_for(f"a{owned}") == (["DejaVu Sans"], owned)


@pytest.mark.parametrize("name", ["x", "y"])
def test_an_axis_of_decades_has_no_formulas(name):
    with style.picture_style():
        made = style.new_figure(3, 2)
        axes = made.add_subplot()
        axes.plot([0.001, 20], [0.001, 20])
        axis = getattr(axes, f"{name}axis")
        style.draw_in_decades(axis)
        made.canvas.draw()
        shown = [label.get_text() for label in axis.get_ticklabels(which="both")]
    assert {"0.001", "0.1", "10"} <= set(shown)
    assert not any("$" in text or "^" in text for text in shown)


@pytest.mark.parametrize("where", ["draw", "save"])
def test_a_picture_that_fails_costs_itself_and_one_line(where, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("first line\nsecond line")

    if where == "save":
        monkeypatch.setattr(style, "save_figure", fail)
    said = []
    assert not style.draw_to(tmp_path / "a.png", fail if where == "draw" else lambda: figure(""), said.append)
    assert said == [f"{tmp_path.name}/a.png was not drawn: RuntimeError: first line"]
    assert list(tmp_path.iterdir()) == []
