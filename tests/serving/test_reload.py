"""New versions of the model while requests are answered: none is lost, and a damaged version is ignored."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.images import cut, photo
from tests.serving.running import Clients, Exported, Served
from tests.storage.emulator import BUCKET, Emulator, running
from tests.waiting import wait_until
from trainer.storage.path import StoragePath, storage_path
from trainer.storage.versions import MANIFEST, checksum_files, commit_version

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Emulator]:
    with running(tmp_path / "objects") as server:
        yield server


def add_version(models: StoragePath, exported: Exported, tmp_path: Path, damage: str = "") -> str:
    """Promote the export as the next version; `damage` is a file whose content is not that of the manifest."""
    source = tmp_path / "source"
    shutil.copytree(exported.folder / "export" / "saved_model" / "1", source)
    manifest = {"run": "any", "origin": None, "files": checksum_files(source)}
    (source / MANIFEST).write_text(json.dumps(manifest))
    if damage:
        (source / damage).write_bytes(cut((source / damage).read_bytes()))
    version = commit_version(models, source)
    shutil.rmtree(source)
    return version.name


def test_new_versions_are_served_without_losing_a_request(exported: Exported, bucket: Emulator, tmp_path: Path) -> None:
    models, predictions = storage_path(f"gs://{BUCKET}/models/any"), storage_path(f"gs://{BUCKET}/predictions")
    assert add_version(models, exported, tmp_path) == "1"
    arguments = (f"model={models}", "poll=0.2", f"cache_dir={tmp_path}/cache", f"log={predictions}", "log_seconds=0.5")
    with Served(*arguments) as served:
        served.ready()
        clients = Clients(served)
        assert add_version(models, exported, tmp_path, damage="variables/variables.index") == "2"
        served.wait_for("version 2 is not served: .*variables.index is corrupt")
        assert add_version(models, exported, tmp_path, damage="saved_model.pb") == "3"
        served.wait_for("version 3 is not served: .*saved_model.pb is corrupt")
        assert add_version(models, exported, tmp_path) == "4"
        served.wait_for("serving version 4 .* instead of version 1")
        bucket.stop()  # neither the poll nor the log fails a request
        served.wait_for("no check for newer versions")
        bucket.start()
        assert add_version(models, exported, tmp_path) == "5"
        served.wait_for("serving version 5 .* instead of version 4")
        wait_until(lambda: "5" in clients.versions, process=served.process)
        response = served.client.post(
            "/predict",
            files=[("file", ("a.jpg", photo(1))), ("file", ("b.jpg", photo(2)))],
            headers={"X-Request-Id": "mine"},
        )
        assert response.headers["x-request-id"] == "mine"
        assert served.client.get("/v1/models/kubetune").json()["model_version_status"][0]["version"] == "5"
        assert served.client.get("/v1/models/kubetune/versions/1").status_code == 404
        metrics = served.metrics()
        clients.stop()
        served.send()
        assert served.exit_code() == 0, served.output
    assert clients.codes.keys() == {200}, served.output
    assert list(dict.fromkeys(sorted(clients.versions))) == ["1", "4", "5"]
    assert metrics["kubetune_serving_failed_versions_total"] == 2
    assert any("kubetune_serving_info{" in key and "5" in key for key in metrics)
    staged = {path.parent.name for path in (tmp_path / "cache").rglob("saved_model.pb")}
    assert "5" in staged
    assert not {"1", "4"} & staged
    rows = [json.loads(line) for info in predictions.list() for line in info.path.read_text().splitlines()]
    assert len(rows) == sum(clients.codes.values()) + 2
    assert Counter(row["model_version"] for row in rows) == Counter([*clients.versions, "5", "5"])
    assert [row["name"] for row in rows if row["request"] == "mine"] == ["a.jpg", "b.jpg"]
    assert len({row["request"] for row in rows}) == len(rows) - 1
    assert "Traceback" not in served.output


def test_a_server_starts_with_the_newest_version_that_can_be_loaded(exported: Exported, tmp_path: Path) -> None:
    models = storage_path(tmp_path / "models")
    add_version(models, exported, tmp_path)
    add_version(models, exported, tmp_path)
    (models / "2" / MANIFEST).delete()
    (models / "2" / "saved_model.pb").write(b"\x0a\x05")  # no manifest, so that only loading it fails
    add_version(models, exported, tmp_path, damage="assets/labels.txt")
    with Served(f"model={models}", "poll=0") as served:
        served.ready()
        assert "version 3 is not served: " in served.output
        assert "trying version 1, as a newer one is not served: " in served.output
        response = served.client.post("/v1/models/kubetune/versions/1:predict", json={"instances": []})
        assert response.status_code == 400  # not 404: version 1 is served
