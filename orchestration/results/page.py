"""The report of a run as one page: report/index.html, with its pictures inside, made from the run folder alone.

It can be mailed, or opened where the run folder is not. No script, nothing is fetched, no password is in it.
"""

from __future__ import annotations

import base64
import datetime
import html
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experts.data.names import visible
from orchestration.config.secrets import redact
from orchestration.results.text import duration, plural
from orchestration.storage.files import read_json, write_atomic

PAGE = "index.html"
_FIRST = ("curves", "finals", "per_class", "confusion", "reliability", "mistakes", "class_counts")
"""Pictures that come first, in this order."""
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; max-width: 1100px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #e4e4e4 }
pre { font: 12.5px/1.4 ui-monospace, monospace; overflow-x: auto; background: #f7f7f7; padding: 1em }
img { max-width: 100%; height: auto; display: block; margin: 1em 0 }
table { border-collapse: collapse } td { padding: 0.15em 1.5em 0.15em 0; vertical-align: top }
td:first-child { color: #666666; white-space: nowrap } td { overflow-wrap: anywhere }
"""


def write_page(run_dir: Path) -> Path:
    """Write report/index.html from what the run folder holds.

    Raises:
        ValueError: a file of the run folder is damaged.
    """
    report = run_dir / "report"
    run, data = read_json(run_dir / "run.json"), read_json(run_dir / "data.json")
    table, config = _text(report / "table.txt"), redact(_text(run_dir / "config.yaml"))
    title = f"{run_dir.name}: {table.partition(chr(10))[0]}"
    body = [
        f"<h1>{_escape(title)}</h1>", _facts(_about(run)), "<h2>Results</h2>", f"<pre>{_escape(table)}</pre>",
        *_pictures(report), "<h2>Data</h2>", _facts(_of_data(data)), "<h2>What it cost</h2>", _facts(_cost(run)),
        "<h2>Config</h2>", f"<details><summary>config.yaml</summary><pre>{_escape(config)}</pre></details>",
    ]  # fmt: skip
    head = f'<meta charset="utf-8"><title>{_escape(title)}</title><style>{_STYLE}</style>'
    page = f'<!doctype html><html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"
    report.mkdir(exist_ok=True)
    write_atomic(report / PAGE, page)
    return report / PAGE


def _about(run: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    ended = run.get("ended")
    if isinstance(ended, float):
        ended = datetime.datetime.fromtimestamp(ended, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    mesh, host = run.get("mesh") or {}, run.get("host") or {}
    workers = mesh.get("slots", 0) * mesh.get("replicas", 0)
    yield "status", run.get("status")
    yield "command", redact(str(run.get("command", "")))
    yield "begun, ended", f"{run.get('created', '?')}, {ended or '?'}"
    yield "commit, config", f"{run.get('commit')}, {run.get('config_hash')}"
    recipe = run.get("recipe") or {}
    yield "recipe", ", ".join(f"{one['file']} {one['sha256'][:8]}" for one in recipe.values())
    yield "seed", run.get("seed")
    yield "resumes", run.get("resume")
    if workers:
        experts, replicas = plural(mesh.get("experts_per_worker", 1), "expert"), plural(mesh["replicas"], "replica")
        yield "workers", f"{workers} with {experts} each, {replicas}"
    yield "machine", ", ".join(str(host[key]) for key in ("name", "processor", "cpus", "memory_gib") if key in host)
    yield "versions", ", ".join(f"{name} {version}" for name, version in (run.get("versions") or {}).items())


def _of_data(data: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    counts = data.get("counts") or []
    yield "data set", data.get("dataset")
    if counts:
        largest, smallest = max(counts), min(counts)
        ratio = f", ratio {largest / smallest:.4g}" if smallest else ""
        yield "training images", f"{sum(counts):,} of {len(counts):,} classes, {largest:,} to {smallest:,}{ratio}"
        groups = (data.get("groups") or {}).get("by_count") or {}
        yield "classes by count", ", ".join(f"{name} {len(ids):,}" for name, ids in groups.items())
    yield "digest", data.get("digest")
    yield "left out", len(data.get("left_out") or []) or None
    for remark in data.get("remarks") or []:
        yield "", remark["text"]


def _cost(run: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, hours in (run.get("cost") or {}).items():
        if hours:
            yield name.replace("_", " "), f"{hours:g}"
    memory = [gib for key in ("peak_memory_gib", "gpu_peak_memory_gib") for gib in [run.get(key)] if gib]
    for key, found in zip(("memory of a worker, GiB", "of its GPU, GiB"), memory, strict=False):
        yield key, max(found)
    if start := (run.get("startup_s") or {}).get("total"):
        yield "to the first step", duration(start)
    yield "starts", run.get("starts")
    yield "failures, preemptions", f"{run.get('failures', 0)}, {run.get('preemptions', 0)}"
    yield "workers lost after training", len(run.get("losses_after_training") or []) or None


def _pictures(report: Path) -> Iterable[str]:
    """Yield every picture below a folder with its name, those of final stages after the run's own."""

    def place(path: Path) -> tuple[int, int, str]:
        depth = len(path.relative_to(report).parts)
        return depth, _FIRST.index(path.stem) if path.stem in _FIRST else len(_FIRST), str(path)

    for path in sorted(report.rglob("*.png"), key=place):
        name = _escape(str(path.relative_to(report).with_suffix("")).replace("_", " "))
        pixels = base64.b64encode(path.read_bytes()).decode()
        yield f'<h2>{name}</h2><img alt="{name}" src="data:image/png;base64,{pixels}">'


def _facts(rows: Iterable[tuple[str, Any]]) -> str:
    found = [(name, value) for name, value in rows if value not in (None, "")]
    cells = "".join(f"<tr><td>{_escape(name)}</td><td>{_escape(str(value))}</td></tr>" for name, value in found)
    return f"<table>{cells}</table>"


def _escape(text: str) -> str:
    return html.escape(visible(text, keep="\n"))


def _text(path: Path) -> str:
    return path.read_text(errors="backslashreplace") if path.is_file() else ""
