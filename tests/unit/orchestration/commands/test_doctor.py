"""The doctor lists all its findings and never raises."""

from __future__ import annotations

import contextlib
import datetime
import http.server
import importlib.metadata
import ipaddress
import socket
import ssl
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from experts.data import loader_room
from orchestration.commands import doctor
from orchestration.commands.doctor import examine
from orchestration.config.compose import load_config
from orchestration.preflight.checks import run_check
from orchestration.preflight.tracking_checks import check_tracking
from orchestration.training.mesh import MeshShape

ASKED = "/api/2.0/mlflow/experiments/search?max_results=1"
ME = "Basic bWU6c2VjcmV0"


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """Give each test no cluster, no proxy, and a folder of its own."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)


def lines(text, what):
    """Return state and text of the findings of one check."""
    found = [line.split(maxsplit=2) for line in text.splitlines()]
    return [(f[0], f[2]) for f in found if len(f) == 3 and f[1] == what]


def tracking(uri):
    """Return state and text of the finding about a tracking store."""
    config = load_config([f"tracking.uri={uri}"])
    return [(f.state, f.text) for f in run_check("tracking", lambda: check_tracking(config, 3.0))]


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


class Quiet(http.server.BaseHTTPRequestHandler):
    """Keep the log of requests off the terminal."""

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(handler, context=None):
    """Run an HTTP server on this machine; yield its host:port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as place:
        if context is not None:
            place.socket = context.wrap_socket(place.socket, server_side=True)
        threading.Thread(target=place.serve_forever, args=(0.01,), daemon=True).start()
        yield f"127.0.0.1:{place.server_port}"
        place.shutdown()


@pytest.fixture
def server():
    """Run an HTTP server that answers one user as MLflow does; yield its host:port and the requests it received."""
    seen = []

    class Handler(Quiet):
        def do_GET(self):
            seen.append((self.path, self.headers.get("Authorization")))
            known = self.path == ASKED and self.headers.get("Authorization") == ME
            self.send_response(200 if known else 401)
            self.end_headers()
            self.wfile.write(b"{}")

    with serving(Handler) as place:
        yield place, seen


@pytest.fixture
def own_certificate(tmp_path):
    """Run an HTTPS server that answers everyone; yield its host:port and its self-signed certificate."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mlflow")])
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    certificate, both = tmp_path / "certificate.pem", tmp_path / "both.pem"
    certificate.write_bytes(signed.public_bytes(Encoding.PEM))
    both.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + certificate.read_bytes())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(both)

    class Handler(Quiet):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

    with serving(Handler, context) as place:
        yield place, certificate


def test_a_machine_that_can_train_on_digits_is_healthy():
    text, healthy = examine(["cluster.cpus_per_worker=0.1"])
    assert healthy, text
    assert text.splitlines()[-1].startswith("ready: 0 failures")
    assert "405 training images of 10 classes" in lines(text, "data")[0][1]
    assert "to be created" in lines(text, "tracking")[0][1]
    assert "torch" in lines(text, "libraries")[0][1]


def test_everything_that_is_wrong_is_in_one_list(tmp_path):
    (tmp_path / "file").write_text("x" * 40)
    text, healthy = examine([
        "dataset=cifar10_lt", "cluster.workers=3", "cluster.cpus_per_worker=10000", "run.dir=file",
        f"tracking.uri=sqlite:///{tmp_path}/file",
    ])  # fmt: skip
    assert not healthy
    assert "places for 0" in lines(text, "cluster")[0][1]
    assert "is a file" in lines(text, "run.dir")[0][1]
    assert "not a SQLite file" in lines(text, "tracking")[0][1]
    assert "dataset.root is not set" in lines(text, "data")[0][1]
    assert text.splitlines()[-1].startswith("not ready: 4 failures")


def test_a_config_that_does_not_compose_is_a_finding():
    text, healthy = examine(["metod=ride", "seed=x"])
    assert not healthy
    assert "did you mean method?" in text and "seed = x" in text


def test_experts_that_do_not_fit_the_workers_are_a_finding():
    text, healthy = examine(["cluster.workers=4"])
    assert not healthy
    assert lines(text, "cluster")[0][0] == "FAIL"


def test_missing_gpus_are_a_finding(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    text, healthy = examine(["cluster.workers=3", "cluster.gpus_per_worker=1", "cluster.cpus_per_worker=0.1"])
    assert not healthy
    assert lines(text, "gpus")[0][1].startswith("1 GPU on this machine, 3 needed; ")


def test_a_library_of_another_version_is_named(monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.59.0" if name == "ray" else real(name))
    text, healthy = examine([])
    assert not healthy
    state, words = lines(text, "libraries")[0]
    assert (state, words[:24]) == ("FAIL", "ray: found 2.59.0; neede")


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "_requirements", lambda: ["no-such-thing>=3"])
    text, healthy = examine([])
    assert not healthy
    assert "no-such-thing: not installed" in text


def test_a_cluster_that_does_not_answer_is_found_fast():
    address = f"127.0.0.1:{free_port()}"
    text, healthy = examine([f"cluster.address={address}"])
    assert not healthy
    assert f"cluster.address = {address}: nobody listens there" in lines(text, "cluster")[0][1]


def test_a_tracking_server_is_asked_with_its_credentials(server):
    place, seen = server
    text, healthy = examine([f"tracking.uri=http://me:secret@{place}", "cluster.cpus_per_worker=0.1"])
    assert healthy, text
    assert lines(text, "tracking") == [("ok", f"http://{place} answers")]
    assert seen == [(ASKED, ME)]
    assert "secret" not in text


def test_credentials_that_a_server_rejects_are_a_finding(server):
    place, _ = server
    state, words = lines(examine([f"tracking.uri=http://me:wrong@{place}"])[0], "tracking")[0]
    assert state == "FAIL" and "it denies access (401)" in words and "wrong@" not in words


def test_credentials_do_not_follow_a_redirect_to_another_server(server):
    place, seen = server

    class Moved(Quiet):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", f"http://{place}{self.path}")
            self.end_headers()

    with serving(Moved) as moved:
        ((state, text),) = tracking(f"http://me:secret@{moved}")
    assert state == "FAIL" and "it denies access (401)" in text
    assert seen == [(ASKED, None)]


def test_a_redirect_at_the_same_server_keeps_its_credentials():
    asked = []

    class Below(Quiet):
        def do_GET(self):
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(200 if self.path.startswith("/mlflow") else 302)
            self.send_header("Location", f"/mlflow{self.path}")
            self.end_headers()
            self.wfile.write(b"{}")

    with serving(Below) as place:
        assert tracking(f"http://me:secret@{place}") == [("ok", f"http://{place} answers")]
    assert asked == [(ASKED, ME), (f"/mlflow{ASKED}", ME)]


def test_a_server_with_its_own_certificate_is_asked_as_mlflow_would(own_certificate, monkeypatch):
    """Its certificate is for 127.0.0.1 and signed by itself."""
    place, certificate = own_certificate
    uri = f"https://{place}"
    ((state, text),) = tracking(uri)
    assert state == "FAIL" and "its certificate is not trusted (self-signed" in text
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate))
    assert tracking(uri) == [("ok", f"{uri} answers")]
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    assert "are both set" in tracking(uri)[0][1]
    monkeypatch.delenv("MLFLOW_TRACKING_SERVER_CERT_PATH")
    assert tracking(uri) == [("ok", f"{uri} answers")]


@pytest.mark.parametrize("key", ["MLFLOW_TRACKING_SERVER_CERT_PATH", "MLFLOW_TRACKING_CLIENT_CERT_PATH"])
@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_variable_that_names_no_certificate_is_a_finding(tmp_path, monkeypatch, key, content):
    if content is not None:
        (tmp_path / "x.pem").write_text(content)
    monkeypatch.setenv(key, str(tmp_path / "x.pem"))
    ((state, text),) = tracking("https://127.0.0.1:9")
    assert state == "FAIL" and text.startswith(f"{key} = {tmp_path}/x.pem: found no certificate there")


def test_a_server_without_users_that_others_reach_is_a_warning(monkeypatch):
    from orchestration.preflight import tracking_checks

    asked = []

    def answers(uri, patience_s, *, with_credentials=True):
        asked.append(with_credentials)

    monkeypatch.setattr(tracking_checks, "ask_server", answers)
    found = list(tracking_checks._server("http://me:pw@mlflow.example:5000", 1.0))
    assert [f.state for f in found] == ["ok", "warn", "warn"]
    assert "lets anyone read and write runs" in found[1].text and "in the clear" in found[2].text
    assert asked == [False, True]
    assert [f.state for f in tracking_checks._server("http://127.0.0.1:5000", 1.0)] == ["ok"]


def test_a_tracking_server_that_refuses_or_is_silent_is_a_finding(server):
    place, _ = server
    assert "it denies access (401)" in examine([f"tracking.uri=http://{place}"])[0]
    text, healthy = examine([f"tracking.uri=http://me:secret@127.0.0.1:{free_port()}"])
    assert not healthy and "no answer" in text and "secret" not in text


def test_an_unknown_kind_of_store_is_a_finding_and_no_store_is_none():
    assert lines(examine(["tracking.uri=ftp://x/y"])[0], "tracking")[0][0] == "FAIL"
    assert lines(examine(["tracking.enabled=false"])[0], "tracking")[0][0] == "ok"


def test_folders_and_lists_are_checked(tmp_path):
    image = tmp_path / "train" / "cat" / "1.png"
    image.parent.mkdir(parents=True)
    (tmp_path / "train" / "dog").mkdir()
    words = ["pace=cifar10_lt", f"dataset.root={tmp_path}"]
    assert "has no image" in lines(examine(["dataset=image_folder_lt", *words])[0], "data")[0][1]
    image.write_bytes(b"not looked at")
    assert "dog: class 'dog' has no image" in lines(examine(["dataset=image_folder_lt", *words])[0], "data")[0][1]
    (tmp_path / "train" / "dog" / "1.png").write_bytes(b"not looked at")
    held_out = [*words, "dataset.test_fraction=0.5"]
    (tmp_path / "train" / "dog" / "2.png").write_bytes(b"not looked at")
    assert "class 0 ('cat') has one image" in examine(["dataset=image_folder_lt", *held_out])[0]
    found = [text for _, text in lines(examine(["dataset=image_folder_lt", *held_out])[0], "data")]
    assert found[0] == "image_folder_lt: 2 training images of 2 classes, 1 to 1 per class; 1 test images"
    assert found[1].startswith("held out for the test: 1 images, 1 to 0 per class (dataset.test_fraction = 0.5)")
    (tmp_path / "train.txt").write_text("train/cat/1.png 0\ntrain/dog/1.png 1\n")
    (tmp_path / "test.txt").write_text("train/bird/1.png 0\n")
    assert "its first image is not at" in lines(examine(["dataset=image_list", *words])[0], "data")[0][1]


def test_a_set_to_be_downloaded_is_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr("experts.data.cifar._fetch", None)
    root = tmp_path / "none"
    text, healthy = examine(["dataset=cifar10_lt", "dataset.download=true", f"dataset.root={root}"])
    assert healthy, text
    assert lines(text, "data")[0][0] == "warn" and "will be downloaded" in text
    assert not root.exists()


def test_a_check_that_breaks_is_a_finding(monkeypatch):
    def broken(config):
        yield doctor.Finding("ok", "data", "so far so good")
        raise RuntimeError("http://me:secret@host broke")

    monkeypatch.setitem(doctor.CHECKS, "data", broken)
    text, healthy = examine([])
    assert not healthy
    assert lines(text, "data") == [("ok", "so far so good"), ("FAIL", "RuntimeError: http://host broke")]


@pytest.mark.parametrize(
    ("words", "images"),
    [([], [43]), (["mix=mixup"], [128]), (["mix=cmo"], [43]), (["method.stages.train.views=[simclr]"], [2 * 43])],
    ids=["plain", "mixed in the step", "a second stream", "two views"],
)
def test_images_that_wait_are_those_that_a_replica_decodes(words, images):
    """A batch of 128, shared by 3 replicas."""
    small = ["method.stages.train.batch_size=128", "run.evaluation_batch_size=1", "dataset.num_classes=10"]
    config = load_config(["method=ce", "dataset=image_folder_lt", "pace=cifar10_lt", *small, *words])
    assert doctor._decoded(config, MeshShape(1, 1, 3)) == images
    assert doctor._decoded(load_config(["run.evaluation_batch_size=500", *words]), MeshShape(1, 1, 1)) == []


def test_too_little_room_for_loaders_on_this_machine_is_a_failure(monkeypatch, tmp_path):
    config = load_config(["dataset=image_folder_lt", "pace=cifar10_lt", "dataset.loader_processes=2"])
    assert [finding.state for finding in doctor._loaders(config)] == ["ok"]
    room = loader_room.room_here()._replace(shared_memory=(2**20, 2**20))
    monkeypatch.setattr(loader_room, "room_here", lambda: room)
    (finding,) = doctor._loaders(config)
    assert finding.state == "FAIL" and "/dev/shm: 1.0 of 1.0 MiB are free" in finding.text
