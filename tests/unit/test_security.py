"""Nothing that is read is run: no pickle, no callable by name, no path out of a folder, no value of the environment.

The first part reads our source; the others hand the program what an attacker would.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from aggregation.serving import load_model
from orchestration.cli import main
from orchestration.config.compose import from_yaml, load_config, to_yaml
from orchestration.config.problems import check
from orchestration.config.words import RECIPE_GROUPS
from orchestration.storage.checkpoint import FORMAT, Checkpoints, DamagedCheckpoint, read_tensors, verify
from orchestration.storage.location import run_path
from tests import runs

ROOT = Path(__file__).resolve().parents[2]
SCANNED = ("experts", "aggregation", "orchestration", "configs", "deploy", "benchmarks")
FORBIDDEN_MODULES = {
    "pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "runpy", "code",
    "hydra.utils", "ray.cloudpickle", "torch.package",
}  # fmt: skip
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.save", "torch.jit.load", "torch.hub.load",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "instantiate", "hydra.utils.instantiate",
    "hydra.utils.get_class", "hydra.utils.get_method", "read_pickle", "pd.read_pickle", "pandas.read_pickle",
    "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip
UNPICKLES = "experts/data/pickles.py"  # the one exception: CIFAR's published files, by names that it lists itself
READS_WEIGHTS = "orchestration/storage/pretrained.py"  # what `expertail import-weights` runs
IMPORTS_BY_NAME = {"experts/registry.py", "orchestration/cluster/early_ray.py"}  # modules of our own packages


def unsafe(source: str, name: str) -> list[str]:
    """What of a file could run something that it reads."""
    found = []
    tree = ast.parse(source)
    restricted = _restricted_unpicklers(tree) if name == UNPICKLES else []
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            excused = (UNPICKLES, "pickle", None)
            modules = [alias.name for alias in node.names if (name, alias.name, alias.asname) != excused]
        elif isinstance(node, ast.ImportFrom):
            modules = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        found += [f"{name}:{node.lineno} imports {module}" for module in modules if _covered(module)]
        if isinstance(node, ast.Call) and (problem := _unsafe_call(node, name)):
            found.append(f"{name}:{node.lineno} {problem}")
        if isinstance(node, ast.Attribute) and _dotted(node).startswith("pickle.") and node not in restricted:
            found.append(f"{name}:{node.lineno} uses {_dotted(node)}")
        if isinstance(node, ast.Constant) and node.value == "_target_":
            found.append(f"{name}:{node.lineno} names _target_")
    return found


def _restricted_unpicklers(tree: ast.Module) -> list[ast.expr]:
    """Where `pickle.Unpickler` is the base of a class with a `find_class` of its own, which never asks the base's."""
    return [
        base
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and "super" not in {_dotted(n) for n in ast.walk(node) if isinstance(n, ast.Name)}
        for base in node.bases
        if _dotted(base) == "pickle.Unpickler" and "find_class" in {getattr(each, "name", "") for each in node.body}
    ]


def _covered(module: str) -> bool:
    loads = {"torch.load", "torch.save", "torch.serialization", "os.system", "os.popen", "numpy.load", "yaml.load"}
    return module in FORBIDDEN_MODULES | loads or module.partition(".")[0] in FORBIDDEN_MODULES


def _unsafe_call(node: ast.Call, name: str) -> str | None:
    called = _dotted(node.func)
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    constant = {key: value.value for key, value in given.items() if isinstance(value, ast.Constant)}
    if called in FORBIDDEN_CALLS:
        return f"calls {called}"
    if called == "torch.load" and (name != READS_WEIGHTS or constant.get("weights_only") is not True):
        return "calls torch.load"
    if "allow_pickle" in given and constant.get("allow_pickle") is not False:
        return "allows pickles"
    if "shell" in given and constant.get("shell") is not False:
        return "starts a shell"
    if called.endswith("import_module") and name not in IMPORTS_BY_NAME:
        return "imports by name"
    return None


def _dotted(node: ast.expr) -> str:
    """Names and attributes as written, with a question mark for what is no name."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def source_files() -> list[Path]:
    return sorted(path for folder in SCANNED for path in (ROOT / folder).rglob("*.py"))


def test_our_source_runs_nothing_that_it_reads():
    files = source_files()
    assert len(files) > 100
    found = {str(path.relative_to(ROOT)): unsafe(path.read_text(), str(path.relative_to(ROOT))) for path in files}
    assert not {path: problems for path, problems in found.items() if problems}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import ray.cloudpickle as cp",
        "from ray import cloudpickle",
        "from torch import load",
        "from hydra.utils import instantiate",
        "from os import system",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "torch.load(path, weights_only=safe)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=given)",
        "yaml.load(text)",
        "eval(text)",
        "exec(text)",
        "compile(text, '', 'exec')",
        "__import__(name)",
        "importlib.import_module(name)",
        "os.system(command)",
        "subprocess.run(command, shell=True)",
        "subprocess.Popen(command, shell=wanted)",
        "hydra.utils.instantiate(config)",
        "tree['_target_']",
    ],
)
def test_the_scan_finds_dangerous_code(line):
    assert unsafe(line, "experts/x.py")


@pytest.mark.parametrize(
    "lines",
    [
        "import pickle as p",
        "from pickle import Unpickler",
        "import pickle\npickle.load(file)",
        "import pickle\npickle.Unpickler(file).load()",
        "import pickle\nload = pickle.loads",
        "import pickle\nclass Free(pickle.Unpickler):\n    pass",
        "import pickle\nclass U(pickle.Unpickler):\n def find_class(self, *a):\n  return super().find_class(*a)",
        "import pickle\nclass U(pickle.Unpickler):\n def find_class(self, *a):\n  pickle.Unpickler.find_class(self)",
    ],
)
def test_the_scan_finds_in_the_one_file_that_unpickles(lines):
    assert unsafe(lines, UNPICKLES)


@pytest.mark.parametrize(
    "line", ["re.compile(text)", "model.eval()", "build(x).eval()", "np.load(path, allow_pickle=False)"]
)
def test_the_scan_leaves_alone(line):
    assert not unsafe(line, "experts/x.py")


class Attack:
    """Pickled, this is a call that makes a file."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


@pytest.fixture
def victim(tmp_path):
    """A path that appears when an attack succeeds."""
    return tmp_path / "was-here"


def checkpoint(folder: Path, files: dict[str, bytes], state: dict | None = None) -> Path:
    """A checkpoint whose manifest is right about every file."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"state.json": json.dumps({"step": 4, "total_steps": 8, "best": None} | (state or {})).encode(), **files}
    entries = {}
    for name, data in files.items():
        entries[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if Path(name).name == name:
            (folder / name).write_bytes(data)
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": entries}))
    return folder


def zipped(path: Path) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Attack(path)))
    return path.read_bytes()


def test_an_attack_works_where_pickles_are_loaded(victim):
    pickle.loads(pickle.dumps(Attack(victim)))
    assert victim.is_dir()


@pytest.mark.parametrize("kind", ["pickle", "torch", "zip"])
def test_a_pickle_named_safetensors_is_refused_and_not_run(tmp_path, victim, kind):
    if kind == "torch":
        torch.save({"weight": Attack(victim)}, tmp_path / "file")
        data = (tmp_path / "file").read_bytes()
    else:
        data = pickle.dumps(Attack(victim)) if kind == "pickle" else zipped(tmp_path / "file")
    folder = checkpoint(tmp_path / "00-train-00000004", {"trunk.safetensors": data})
    verify(folder)
    with pytest.raises(DamagedCheckpoint, match=r"trunk.safetensors: not a file of tensors"):
        read_tensors(folder, "trunk")
    assert not victim.exists()


@pytest.mark.parametrize("absolute", [False, True])
def test_a_manifest_that_names_paths_is_refused_and_nothing_outside_is_touched(tmp_path, absolute):
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(b"mine")
    name = str(outside) if absolute else "../../../outside.safetensors"
    checkpoints = Checkpoints(tmp_path / "run", ["train"])
    folder = checkpoint(checkpoints.folder / "00-train-00000004", {name: b"mine"})
    with pytest.raises(DamagedCheckpoint, match=r"manifest.json: lists '.*outside.safetensors'; needed names of files"):
        verify(folder)
    with pytest.raises(DamagedCheckpoint, match="lists"):
        checkpoints.copy_weights(folder, "best-00-train-00000004")
    with pytest.raises(ValueError, match="no checkpoint of stage train is whole"):
        checkpoints.newest("train", lambda text: None)
    assert outside.read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside.safetensors", "run"]


@pytest.mark.parametrize("best", ["../../victim", "/victim", "..", "", 7, {}])
def test_a_state_that_names_another_folder_is_refused(tmp_path, best):
    """Weights of the best evaluation replace a folder of that name."""
    (tmp_path / "victim").mkdir()
    checkpoints = Checkpoints(tmp_path / "run", ["train"])
    folder = checkpoint(checkpoints.folder / "00-train-00000004", {}, {"best": {"step": 4, "checkpoint": best}})
    with pytest.raises(DamagedCheckpoint, match=r"state.json: names .* as the best weights"):
        verify(folder)
    with pytest.raises(ValueError, match="no checkpoint of stage train is whole"):
        checkpoints.newest("train", lambda text: None)
    assert (tmp_path / "victim").is_dir()


@pytest.mark.parametrize("state", [b"[]", b"null", b"{", b'{"best": {}}', b"\xff"])
def test_a_state_that_is_none_is_a_damaged_checkpoint(tmp_path, state):
    with pytest.raises(DamagedCheckpoint, match=r"state.json: not a readable state"):
        verify(checkpoint(tmp_path / "00-train-00000004", {"state.json": state}))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("wrapped", [False, True], ids=["in a state dict", "as the whole file"])
def test_foreign_weights_are_never_unpickled(tmp_path, victim, capsys, wrapped):
    torch.save(Attack(victim) if wrapped else {"conv1.weight": Attack(victim)}, tmp_path / "weights.pth")
    assert main(["import-weights", str(tmp_path / "weights.pth"), str(tmp_path / "weights.safetensors")]) == 1
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Attack(victim)))
    assert main(["import-weights", str(tmp_path / "plain.pth"), str(tmp_path / "weights.safetensors")]) == 1
    said = capsys.readouterr()
    assert said.err.count("objects are never unpickled") == 2
    assert "Traceback" not in said.err
    assert not victim.exists()
    assert not (tmp_path / "weights.safetensors").exists()


def test_an_exported_model_is_never_unpickled(tmp_path, victim):
    data = pickle.dumps(Attack(victim))
    (tmp_path / "model.safetensors").write_bytes(data)
    description = {"format": 2, "tensors_sha256": hashlib.sha256(data).hexdigest(), "backbone": {"name": "os.system"}}
    (tmp_path / "model.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"model.json"):
        load_model(tmp_path)
    assert not victim.exists()


@pytest.mark.parametrize(
    "word",
    [
        "method._target_=os.system",
        "dataset.augment._target_=os.system",
        "method.head.name=os.system",
        "method.stages.train.objective.name=builtins.eval",
        "backbone._target_=os.system",
        "backbone.name=torch.load",
        "hydra.run.dir=/tmp",
        "hydra.searchpath=[file:///tmp]",
    ],
)
def test_a_config_cannot_name_a_callable(word):
    with pytest.raises(ValueError, match=r"unknown|no such|needed"):
        load_config([word])


@pytest.mark.parametrize("choice", ["../../x", "/etc/passwd", "ride/../../x"])
@pytest.mark.parametrize("group", RECIPE_GROUPS)
def test_a_choice_is_no_path(group, choice):
    with pytest.raises(ValueError, match=f"no such {group}"):
        load_config([f"{group}={choice}"])


@pytest.mark.parametrize(
    "word",
    [
        "tracking.experiment=${oc.env:EXPERTAIL_SECRET}",
        "tracking.experiment='${oc.env:EXPERTAIL_SECRET}'",
        "run.name=a${oc.env:EXPERTAIL_SECRET}b",
        "method.experts=['${oc.env:EXPERTAIL_SECRET}',b,c]",
        "dataset.name=${oc.decode:${oc.env:EXPERTAIL_SECRET}}",
        "method.expected={top1: {all: 1}, remark: '${oc.env:EXPERTAIL_SECRET}'}",
    ],
)
def test_no_value_is_taken_from_the_environment(word, monkeypatch):
    monkeypatch.setenv("EXPERTAIL_SECRET", "hunter2")
    with pytest.raises(ValueError, match=r"needed a plain value") as raised:
        load_config([word])
    assert "hunter2" not in str(raised.value)


def test_a_stored_config_is_read_as_text(tmp_path, monkeypatch, victim):
    monkeypatch.setenv("EXPERTAIL_SECRET", "hunter2")
    stored = to_yaml(load_config([]))
    path = tmp_path / "config.yaml"
    path.write_text(stored.replace("experiment: expertail", "experiment: ${oc.env:EXPERTAIL_SECRET}"))
    assert from_yaml(path).tracking.experiment == "${oc.env:EXPERTAIL_SECRET}"
    assert "hunter2" not in to_yaml(from_yaml(path))
    call = f"!!python/object/apply:os.mkdir ['{victim}']"
    path.write_text(stored.replace("experiment: expertail", f"experiment: {call}"))
    with pytest.raises(ValueError, match=r"config.yaml: not YAML"):
        from_yaml(path)
    assert not victim.exists()


@pytest.fixture(scope="module")
def tree():
    """A whole config as plain data."""
    return load_config([]).model_dump(mode="json")


@pytest.mark.parametrize("name", ["../../x", "/abs", "a/b", "..", ".", ".hidden", "a\\b", "a\nb", "a\x00b", "x" * 201,
                                  "é" * 101])  # fmt: skip
def test_a_run_stays_below_its_run_dir(tree, name):
    with pytest.raises(ValueError, match=r"run.name = .*: needed the name of one folder"):
        check({**tree, "run": {"name": name}}, "stored")


@pytest.mark.parametrize("part", ["method", "dataset"])
def test_a_run_named_after_its_parts_does_too(tree, part):
    with pytest.raises(ValueError, match=r"made of method.name, dataset.name and seed"):
        check({**tree, part: tree[part] | {"name": "../x"}}, "stored")


def test_ordinary_names_are_kept(tree, tmp_path):
    for name in ("ride-digits_lt-s0", "über 9,5% = gut", "a.b+c@d", "x" * 200):
        config = check({**tree, "run": {"name": name, "dir": str(tmp_path)}}, "stored")
        assert run_path(config) == tmp_path / name


@pytest.mark.parametrize("name", ["../x", "/x", "a.b", ".."])
def test_names_of_experts_and_stages_are_no_paths(tree, name):
    with pytest.raises(ValueError, match="expert name"):
        check({**tree, "method": tree["method"] | {"experts": [name, "b", "c"]}}, "stored")
    stages = {name: tree["method"]["stages"]["train"]}
    with pytest.raises(ValueError, match=r"is no name of a stage"):
        check({**tree, "method": tree["method"] | {"stages": stages}}, "stored")


@pytest.mark.ray
@pytest.mark.drill
def test_a_run_refuses_a_planted_checkpoint_and_keeps_secrets_to_itself(warm, tmp_path, victim, capsys, monkeypatch):
    """One run, stopped; then its checkpoint's trunk is a pickle whose size and hash the manifest knows."""
    secrets = {"MLFLOW_TRACKING_PASSWORD": "hunter2-mlflow", "AWS_SECRET_ACCESS_KEY": "hunter2-aws"}
    for key, value in secrets.items():
        monkeypatch.setenv(key, value)
    folder = tmp_path / "runs" / "run"
    words = ["tracking.enabled=true", "tracking.final_wait_s=60", "run.max_steps=4"]
    assert runs.train(folder, *words) == 0
    said = capsys.readouterr()
    assert "hunter2" not in said.out + said.err
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert any(path.name == "mlflow.db" for path in files)
    assert not [path for path in files if b"hunter2" in path.read_bytes()]

    for planted in (folder / "checkpoints").glob("[0-9]*"):
        data = pickle.dumps(Attack(victim))
        (planted / "trunk.safetensors").write_bytes(data)
        manifest = json.loads((planted / "manifest.json").read_text())
        entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest["files"]["trunk.safetensors"] = entry
        (planted / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(folder / "export")
    assert runs.train(folder, "run.max_steps=6") == 1
    said = capsys.readouterr().err
    assert "trunk.safetensors: not a file of tensors" in said
    assert "Traceback" not in said
    assert not victim.exists()
