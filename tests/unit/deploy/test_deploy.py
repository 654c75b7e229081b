"""The files of deploy/: what Ray, Compose and Kubernetes ask; tokens everywhere, nothing open, versions pinned."""

from __future__ import annotations

import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
CLUSTERS = sorted(path.name for path in DEPLOY.glob("cluster-*.yaml"))
SCRIPTS = ("slurm.sbatch", "mlflow-server.sh")


def read(name: str) -> dict:
    return yaml.safe_load((DEPLOY / name).read_text())


def pinned(package: str) -> str:
    return re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]  # type: ignore[index]


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_itself_takes_a_cluster_file(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(read(name)))


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_node_of_a_cluster_file_asks_for_the_token(name):
    config = read(name)
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    shells = " ".join([*config["setup_commands"], *config.get("docker", {}).get("run_options", [])])
    assert "RAY_AUTH_MODE=token" in shells and "RAY_JOB_STOP_WAIT_TIME_S=120" in shells
    head, worker = config["head_start_ray_commands"], config["worker_start_ray_commands"]
    assert head[0] == worker[0] == "ray stop"
    assert "--dashboard-host=127.0.0.1" in head[1] and "--autoscaling-config" in head[1]
    assert worker[1].startswith("ray start --address=$RAY_HEAD_IP:6379")


def test_on_aws_only_ssh_from_one_network_is_let_in():
    provider = read("cluster-aws.yaml")["provider"]
    (rule,) = provider["security_group"]["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"]) == (22, 22)
    assert [r["CidrIp"] for r in rule["IpRanges"]] == ["YOUR_NETWORK/32"]


def test_nothing_is_bound_to_all_addresses():
    """Only the server inside the container, whose port is published on 127.0.0.1."""
    files = [path for path in DEPLOY.iterdir() if path.is_file()]
    found = [(path.name, line) for path in files for line in path.read_text().splitlines() if "0.0.0.0" in line]
    assert files and not [hit for hit in found if hit[0] != "compose.yaml" or "container's own network" not in hit[1]]


def test_compose_publishes_on_loopback_and_has_no_default_password():
    config = read("compose.yaml")
    assert set(config) <= {"name", "services", "networks", "volumes", "secrets"}
    assert set(config["services"]) == {"db", "mlflow"}
    db, server = config["services"]["db"], config["services"]["mlflow"]
    assert "ports" not in db and db["networks"] == ["inside"] and config["networks"]["inside"]["internal"]
    assert server["ports"] == ["${PUBLISH:-127.0.0.1}:5000:5000"]
    assert server["depends_on"]["db"]["condition"] == "service_healthy"
    named = {name for service in config["services"].values() for name in service["secrets"]}
    assert named == set(config["secrets"])
    for name, secret in config["secrets"].items():
        assert re.fullmatch(rf"\$\{{EXPERTAIL_SECRETS:\?.+\}}/{name}", secret["file"])
    for service in config["services"].values():
        for mount in service.get("volumes", []):
            assert mount.split(":")[0] in config["volumes"]
        assert not [k for k in service["environment"] if "PASSWORD" in k and not k.endswith("_FILE")]
        assert ":latest" not in service["image"] and ":" in service["image"]
    assert server["image"].endswith(f":{pinned('mlflow')}")


def kubernetes() -> dict[str, dict]:
    return {part["kind"]: part for part in yaml.safe_load_all((DEPLOY / "kuberay-rayjob.yaml").read_text())}


def test_the_rayjob_has_what_kuberay_asks_for():
    parts = kubernetes()
    job, policy = parts["RayJob"], parts["NetworkPolicy"]
    assert job["apiVersion"] == "ray.io/v1" and policy["apiVersion"] == "networking.k8s.io/v1"
    spec = job["spec"]
    known = {
        "entrypoint", "submissionMode", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished",
        "submitterPodTemplate", "rayClusterSpec",
    }  # fmt: skip
    assert set(spec) == known
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
    assert " run.dir=/shared/" in spec["entrypoint"]
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == pinned("ray")
    assert set(cluster) == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    assert f"cluster.workers={workers['replicas']}" in spec["entrypoint"]
    groups = (cluster["headGroupSpec"], workers)
    assert all(isinstance(v, str) for group in groups for v in group["rayStartParams"].values())
    for template in (*(group["template"] for group in groups), spec["submitterPodTemplate"]):
        assert template["metadata"]["labels"].items() >= policy["spec"]["podSelector"]["matchLabels"].items()
        (container,) = template["spec"]["containers"]
        env = {entry["name"]: entry for entry in container["env"]}
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {
            "name": "expertail-ray-token",
            "key": "auth_token",
        }
        assert container["securityContext"]["runAsNonRoot"] and container["resources"]["limits"]["memory"]
        volumes = {volume["name"] for volume in template["spec"].get("volumes", [])}
        assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]


def instructions(path: Path) -> list[tuple[str, str]]:
    """Instruction and its words, continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", "\n".join(s for s in path.read_text().splitlines() if not s.startswith("#")))
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]  # type: ignore[misc]


def test_the_image_is_pinned_unprivileged_and_holds_no_secret():
    found = instructions(DEPLOY / "Dockerfile")
    assert {word for word, _ in found} <= {"FROM", "ENV", "RUN", "COPY", "USER", "EXPOSE", "CMD", "WORKDIR"}
    stages = [words.split(" AS ") for word, words in found if word == "FROM"]
    assert [name for _, name in stages] == ["base", "mlflow", "ray"]
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-bookworm", stages[0][0])
    assert [words for word, words in found if word == "USER"] == ["1000", "1000"]  # by number, as runAsNonRoot needs
    installs = [words for word, words in found if word == "RUN" and "pip install" in words]
    assert len(installs) == 2 and all("constraints.txt" in words for words in installs)
    assert re.search(r" boto3==\d", installs[1])  # is in no constraint
    environment = " ".join(words for word, words in found if word == "ENV")
    assert "RAY_AUTH_MODE=token" in environment and "RAY_AUTH_TOKEN" not in environment
    assert "/etc/profile.d/" in " ".join(words for word, words in found if word == "RUN")  # for login shells
    for word, words in found:
        if word == "COPY":
            assert (ROOT / words.split()[0]).exists()
    left_out = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs", "secrets"} <= set(left_out) and "constraints.txt" not in left_out


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_sound(name):
    shell = "bash" if name.endswith(".sbatch") else "sh"
    subprocess.run([shell, "-n", str(DEPLOY / name)], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck not found; apt-get install shellcheck")
    done = subprocess.run(["shellcheck", str(DEPLOY / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("broken", ["missing", "empty", "not for a URI"])
def test_the_mlflow_server_does_not_start_without_its_secrets(broken, tmp_path):
    for name in ("db_password", "admin_password", "flask_secret"):
        (tmp_path / name).write_text("0123abcd\n")
    if broken == "missing":
        (tmp_path / "admin_password").unlink()
    elif broken == "empty":
        (tmp_path / "flask_secret").write_text("")
    else:
        (tmp_path / "db_password").write_text("a@b/c")
    done = subprocess.run(
        ["sh", str(DEPLOY / "mlflow-server.sh")],
        env={"PATH": "/usr/bin:/bin", "SECRETS": str(tmp_path), "ALLOWED_HOSTS": "localhost"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "make it with: openssl rand -hex 32" in done.stderr


def test_versions_are_those_of_the_constraints():
    for path in DEPLOY.iterdir():
        text = path.read_text() if path.is_file() else ""
        for package in ("ray", "mlflow", "torch", "deepspeed"):
            assert set(re.findall(rf"\b{package}[=:]+(\d+\.\d+\.\d+)", text)) <= {pinned(package)}, path.name


def test_what_a_job_uploads_is_small_and_whole(tmp_path):
    """`ray job submit --working-dir .`, with Ray's own packer and what it leaves out by itself."""
    from ray._private import ray_constants
    from ray._private.runtime_env.packaging import create_package

    target = tmp_path / "package.zip"
    create_package(
        str(ROOT),
        target,
        include_gitignore=True,
        include_parent_dir=False,
        excludes=ray_constants.get_runtime_env_default_excludes(),
    )
    assert target.stat().st_size < 3 * 2**20
    with zipfile.ZipFile(target) as package:
        tops = {name.split("/")[0] for name in package.namelist()}
        names = set(package.namelist())
    assert not tops & {".git", ".venv", "runs", "tests", "benchmarks", "secrets", ".mypy_cache", ".ruff_cache"}
    for folder in ("experts", "aggregation", "orchestration"):
        for path in (ROOT / folder).rglob("*.py"):
            assert str(path.relative_to(ROOT)) in names
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "configs").rglob("*.yaml")} <= names


def test_every_file_is_in_the_table_of_the_readme():
    described = (DEPLOY / "README.md").read_text()
    kept = {"__init__.py", "README.md", "runbook.md"}
    for path in DEPLOY.iterdir():
        if path.is_file() and path.name not in kept | {"mlflow-server.sh"}:
            assert f"`{path.name}`" in described, path.name
