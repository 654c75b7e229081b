"""The page of a run holds all that its folder shows, needs nothing else, and gives no secret away."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

from PIL import Image

from orchestration.results.page import write_page


class Page(HTMLParser):
    """Every tag is closed, and nothing is fetched."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.text = [], 0, ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        for name, value in attrs:
            assert name not in ("href", "srcset")
            if name == "src":
                assert value.startswith("data:image/png;base64,")
                self.images += 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_run_is_one_page(tmp_path):
    run = tmp_path / "price <b>$_$"
    (run / "report" / "crt").mkdir(parents=True)
    for name in ("curves", "zebra", "crt/per_class"):
        Image.new("RGB", (4, 4)).save(run / "report" / f"{name}.png")
    (run / "report" / "table.txt").write_text("ride, 3 experts\nfew < 20 & many\n")
    (run / "config.yaml").write_text("tracking: {uri: 'http://me:s3cret@host'}\n")
    (run / "run.json").write_text(json.dumps({
        "status": "finished", "command": "expertail train tracking.uri=http://me:s3cret@host", "ended": 1795742672.8,
        "mesh": {"slots": 3, "replicas": 2, "experts_per_worker": 1}, "cost": {"gpu_hours": 1.5}, "failures": 2,
    }))  # fmt: skip
    (run / "data.json").write_text(
        json.dumps(
            {
                "dataset": "birds",
                "counts": [100, 7, 1],
                "left_out": ["a"],
                "remarks": [{"kind": "cut", "count": 3, "text": "3 images are cut"}],
            }
        )
    )
    text = write_page(run).read_text()
    page = Page(text)
    assert page.open == []
    assert page.images == 3
    for shown in (
        "few < 20 & many",
        "3 images are cut",
        "price <b>$_$: ride, 3 experts",
        "6 with 1 expert each, 2 replicas",
        "108 of 3 classes, 100 to 1, ratio 100",
    ):
        assert shown in page.text
    assert "s3cret" not in text
    assert re.findall(r"<h2>(curves|zebra|crt/per class)</h2>", text) == ["curves", "zebra", "crt/per class"]


def test_an_empty_folder_is_a_page_too(tmp_path):
    assert Page(write_page(tmp_path).read_text()).open == []
