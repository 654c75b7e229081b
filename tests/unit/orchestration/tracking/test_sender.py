"""Messages to MLflow, by a client that records them."""

from __future__ import annotations

from types import SimpleNamespace

from orchestration.tracking.process import Target
from orchestration.tracking.sender import MlflowSender


class FakeClient:
    """The model registry of one run."""

    def __init__(self):
        self.versions = []

    def create_registered_model(self, name):
        pass

    def search_model_versions(self, search):
        return self.versions

    def create_model_version(self, name, source, *, tags, **_):
        self.versions.append(SimpleNamespace(name=name, version=str(len(self.versions) + 1), tags=dict(tags)))
        return self.versions[-1]

    def set_model_version_tag(self, name, version, key, value):
        self.versions[int(version) - 1].tags[key] = value

    def delete_model_version_tag(self, name, version, key):
        del self.versions[int(version) - 1].tags[key]


def test_only_the_newest_models_of_a_run_are_called_last_and_best(tmp_path):
    """The best model is the last one of a cut run, then an earlier one. What the cut run sent is neither any more."""

    def export(which, weights):
        (folder := tmp_path / "export" / which).mkdir(parents=True, exist_ok=True)
        (folder / "model.json").write_text("{}")
        (folder / "model.safetensors").write_text(weights)

    def sent():
        sender.send_models()
        return [version.tags.get("model") for version in sender._client.versions]

    (tmp_path / "config.yaml").write_text("method: {name: ce}")
    sender = MlflowSender(tmp_path, Target("http://h", "expertail", "run"))
    sender._client, sender._send_model = FakeClient(), lambda which, folder, digest: digest
    export("last", "step 2")
    export("best", "step 2")
    assert sent() == ["last, best"]
    export("last", "step 4")
    export("best", "step 3")
    for _ in range(2):  # nothing changes the second time
        assert sent() == [None, "last", "best"]
    name = sender._client.versions[0].name
    assert sender.state.values["models"] == {"last": f"models:/{name}/2", "best": f"models:/{name}/3"}
