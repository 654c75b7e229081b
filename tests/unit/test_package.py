"""What is shipped: every file that the program reads, one version, and a wheel that works away from the checkout."""

from __future__ import annotations

import ast
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import threading
import tomllib
import venv
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from orchestration import __version__
from orchestration.cli import main
from tests import runs

ROOT = Path(__file__).resolve().parents[2]
_LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "build", "dist", "__pycache__", "*.egg-info", ".*_cache")


def not_shipped(folder, names):
    """What `shutil.copytree` leaves out; runs/ lies at the top, a package of that name does not."""
    return _LEFT_OUT(folder, names) | ({"runs"} if Path(folder) == ROOT else set())


@pytest.fixture(scope="module")
def settings():
    """Of setuptools."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)


@pytest.mark.parametrize("package", ["configs", "deploy"])
def test_every_file_beside_our_code_is_package_data(settings, package):
    """A file that no pattern matches would be missing from the wheel alone, where no other test looks."""
    patterns = settings["tool"]["setuptools"]["package-data"][package]
    shipped = {path for pattern in patterns for path in glob.glob(pattern, root_dir=ROOT / package, recursive=True)}
    files = {
        str(path.relative_to(ROOT / package))
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert files, "there are such files"
    assert files <= shipped


@pytest.mark.parametrize("package", ["experts", "aggregation", "orchestration"])
def test_type_hints_are_there_for_others(settings, package):
    assert (ROOT / package / "py.typed").is_file()
    assert "py.typed" in settings["tool"]["setuptools"]["package-data"][package]


def test_the_version_is_in_one_place(settings, capsys):
    """setuptools reads it from the source without importing anything, so it must be a plain assignment."""
    assert settings["project"]["dynamic"] == ["version"]
    assert "version" not in settings["project"]
    assert settings["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "orchestration.__version__"}
    nodes = ast.parse((ROOT / "orchestration" / "__init__.py").read_text()).body
    [value] = [node.value for node in nodes if isinstance(node, ast.Assign) and node.targets[0].id == "__version__"]
    assert ast.literal_eval(value) == __version__
    places = [
        path
        for package in ("experts", "aggregation", "orchestration", "configs", "deploy")
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"^__version__ *=", path.read_text(), re.MULTILINE)
    ]
    assert places == [ROOT / "orchestration" / "__init__.py"]
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"expertail {__version__}\n"


def test_the_lower_bounds_fit_the_tested_set(settings):
    """Every dependency is pinned in constraints.txt, to a version that pyproject.toml allows."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pinned = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    extras = settings["project"]["optional-dependencies"].values()
    for text in [*settings["project"]["dependencies"], *(text for extra in extras for text in extra)]:
        wanted = Requirement(text)
        name = canonicalize_name(wanted.name)
        assert name in pinned, f"constraints.txt: {name} is missing"
        assert wanted.specifier.contains(pinned[name]), f"{text}, but constraints.txt has {pinned[name]}"


@pytest.fixture
def advisories():
    """A service that answers as OSV does, on this machine: by package and version, the release that mends it."""
    known: dict[str, str] = {}

    class Service(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            package = asked["package"]
            answer = {}
            if fixed := known.get(f"{package['name']}=={asked['version']}"):
                ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": fixed}]}]
                affected = [{"package": package, "ranges": ranges}]
                answer = {"vulns": [{"id": f"TEST-{package['name']}", "summary": "a test", "affected": affected}]}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield known, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.drill
def test_an_audit_tells_advisories_from_none_and_from_a_service_that_cannot_be_asked(advisories):
    """Exit codes 0, 1 and 3; a service that answers without knowing anything is not taken for a clean bill."""
    pytest.importorskip("pip_audit", reason="needs the package pip-audit; pip install pip-audit")
    known, url = advisories

    def audit(url: str) -> tuple[int, str]:
        environment = os.environ | {"PIP_AUDIT_OSV_URL": url}
        command = [sys.executable, str(ROOT / ".ci" / "audit.py"), "osv"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    code, said = audit(url)
    assert code == 3
    assert "osv: it answers, but knows no advisory of jinja2==2.4" in said
    known["jinja2==2.4"] = "2.7.2"
    code, said = audit(url)
    assert code == 0, said
    assert "packages of constraints.txt by osv: no advisories" in said
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("jinja2=="))
    known[pinned] = "3000"
    code, said = audit(url)
    assert code == 1
    assert f"{pinned.replace('==', ' ')}: TEST-jinja2, fixed in 3000\n" in said
    code, said = audit("http://127.0.0.1:9")
    assert code == 3
    assert "no advisory service could be asked from here" in said
    assert "Traceback" not in said


def build(source: Path, target: Path, *what: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", *what, "--outdir", str(target), str(source)],
        check=True,
        capture_output=True,
        text=True,
    )


def contents(wheel: Path) -> dict[str, str]:
    """sha256 of every file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with sdist and wheel, built from a copy of the checkout."""
    pytest.importorskip("build", reason="needs the package `build`; pip install build")
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "copy", ignore=not_shipped)
    build(folder / "copy", folder / "dist", "--sdist", "--wheel")
    return folder


@pytest.mark.drill
def test_sdist_and_checkout_build_the_same_wheel_with_everything_in_it(built):
    [sdist], [wheel] = (built / "dist").glob("*.tar.gz"), (built / "dist").glob("*.whl")
    assert wheel.name == f"expertail-{__version__}-py3-none-any.whl"
    with tarfile.open(sdist) as archive:
        archive.extractall(built / "unpacked", filter="data")
    [unpacked] = (built / "unpacked").iterdir()
    build(unpacked, built / "again", "--wheel")
    [again] = (built / "again").glob("*.whl")
    found = contents(wheel)
    assert found == contents(again)
    needed = {
        str(path.relative_to(ROOT))
        for package in ("experts", "aggregation", "orchestration", "configs", "deploy")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    } | {"expertail.py"}
    about = f"expertail-{__version__}.dist-info"
    assert found.keys() - needed == {
        f"{about}/{name}"
        for name in ("licenses/LICENSE", "METADATA", "WHEEL", "entry_points.txt", "top_level.txt", "RECORD")
    }
    assert needed <= found.keys()
    names = ["LICENSE", "README.md", "CONTRIBUTING.md", "constraints.txt", "Makefile", "docs/architecture.md"]
    for name in [*names, "docs/images/demo.png", "tests/conftest.py", "benchmarks/step.py"]:
        assert (unpacked / name).is_file(), f"the sdist lacks {name}"
    metadata = (unpacked / "PKG-INFO").read_text()
    assert "Description-Content-Type: text/markdown" in metadata
    assert (ROOT / "README.md").read_text().strip() in metadata


@pytest.mark.drill
@pytest.mark.xdist_group("ray")
def test_an_installed_wheel_trains_away_from_the_checkout(built, tmp_path):
    """A fresh environment that sees the libraries of this one, but not its checkout."""
    [wheel] = (built / "dist").glob("*.whl")
    venv.create(tmp_path / "fresh", with_pip=False)
    scripts = tmp_path / "fresh" / "bin"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "fresh")}))
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--quiet", str(wheel)], check=True, cwd=tmp_path)
    (tmp_path / "empty").mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS", "VIRTUAL_ENV")}

    def out(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import orchestration, experts, configs; print(orchestration.__file__, experts.__file__, configs.__file__)"
    assert all(Path(path).is_relative_to(site) for path in out(str(scripts / "python"), "-c", where).split())
    expertail = str(scripts / "expertail")
    assert out(expertail, "--version") == f"expertail {__version__}\n"
    assert "dataset=cifar100_lt  " in out(expertail, "train", "--list")
    table = out(expertail, "train", *runs.SMALL, "run.max_steps=2", f"run.dir={tmp_path / 'runs'}", "run.name=run")
    assert "405 training images of 10 classes" in table
    assert len(runs.losses(tmp_path / "runs" / "run")) == 2
