"""k8s/job.yaml and k8s/multiworker.yaml equal their kustomizations, in a readable form."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts import manifests
from tests.k8s.rendered import OVERLAYS, get_only_object, list_pods, render_objects
from tests.waiting import PATIENCE

ROOT = Path(__file__).parents[2]
FILES = sorted(manifests.FOLDERS)


@pytest.mark.parametrize("file", FILES)
def test_the_file_is_fresh(file: str) -> None:
    text = (manifests.K8S / file).read_text()
    assert text == manifests.format_manifest(file), "run: make manifests"
    for document in yaml.compose_all(text):
        assert [key.value for key, _ in document.value][:3] == ["apiVersion", "kind", "metadata"]


def sorted_by_name(tree: Any) -> Any:
    """Sort named items, whose order has no meaning in these manifests."""
    if isinstance(tree, dict):
        return {key: sorted_by_name(value) for key, value in tree.items()}
    if isinstance(tree, list):
        items = [sorted_by_name(item) for item in tree]
        named = all(isinstance(item, dict) and "name" in item for item in items)
        return sorted(items, key=lambda item: item["name"]) if named else items
    return tree


@pytest.mark.parametrize("file", FILES)
def test_kubectl_reads_the_objects_of_the_kustomization(file: str) -> None:
    label = [
        manifests.find_kubectl(),
        "label",
        "--local",
        f"--filename={manifests.K8S / file}",
        "read=1",
        "--output=json",
    ]
    output = subprocess.run(label, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout
    trees = json.loads("[" + output.replace("\n}\n{", "\n},\n{") + "]")
    for tree in trees:
        assert tree["metadata"]["labels"].pop("read") == "1"
        if not tree["metadata"]["labels"]:
            del tree["metadata"]["labels"]
    assert sorted_by_name(trees) == sorted_by_name(render_objects(manifests.FOLDERS[file]))


@pytest.mark.parametrize("file", FILES)
def test_the_lines_to_edit_are_marked_and_no_others(file: str) -> None:
    lines = (manifests.K8S / file).read_text().splitlines()
    edits = [line.strip() for line in lines if re.search(r"# EDIT\b", line)]
    kinds = ["image: ", "- experiment=", "- output_dir=gs://BUCKET/"]
    kinds = ["completions: ", *kinds] if file == "multiworker.yaml" else kinds
    assert [next(kind for kind in kinds if edit.startswith(kind)) for edit in edits] == kinds


def test_every_placeholder_is_marked() -> None:
    placeholder = re.compile(r"\b(BUCKET|PROJECT|REPOSITORY|REGION|RUN|TAG)\b")
    for path in manifests.K8S.rglob("*.yaml"):
        for line in path.read_text().splitlines():
            if not line.lstrip().startswith("#") and placeholder.search(line.partition(" #")[0]):
                assert "# EDIT" in line, f"{path}: {line}"


@pytest.mark.parametrize("file", FILES)
def test_the_commands_of_the_header_name_existing_objects(file: str) -> None:
    text = (manifests.K8S / file).read_text()
    header = text.partition("---")[0]
    name = get_only_object(manifests.FOLDERS[file], "Job")["metadata"]["name"]
    for command in ("once", "start", "watch", "log", "pause", "stop", "again"):
        assert re.search(rf"^#   {command} ", header, re.M), command
    assert f"kubectl apply -f k8s/{file}" in header
    assert f"kubectl delete job {name} --cascade=foreground" in header  # or the next pod finds the folder in use
    assert set(re.findall(r"job-name=([\w-]+)", header)) == {name}
    assert (ROOT / "k8s" / manifests.FOLDERS[file]).is_dir()


def test_the_number_of_workers_is_written_once() -> None:
    """In an overlay in `workers.yaml`; in the file at two positions, completions (an anchor) and WORKER_COUNT."""
    for overlay in ("multiworker", "prepare"):
        (pods,) = list_pods(f"overlays/{overlay}")
        count = yaml.safe_load((manifests.K8S / "overlays" / overlay / "workers.yaml").read_text())["data"]["count"]
        job = pods.job or {}
        assert job["completions"] == job["parallelism"] == int(pods.environment()["WORKER_COUNT"]) == int(count)
        assert not render_objects(f"overlays/{overlay}", "ConfigMap")
    text = (manifests.K8S / "multiworker.yaml").read_text()
    assert "completions: &workers 2 #" in text
    assert "parallelism: *workers\n" in text


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of k8s/ that a test may change."""
    monkeypatch.setattr(manifests, "K8S", shutil.copytree(manifests.K8S, tmp_path / "k8s"))
    return tmp_path / "k8s"


def test_another_number_of_workers_is_set_everywhere(copied: Path) -> None:
    workers = copied / "overlays" / "multiworker" / "workers.yaml"
    workers.write_text(workers.read_text().replace('count: "2"', 'count: "16"'))
    for overlay in ("multiworker", "jobset"):
        (run,) = (tree for tree in manifests.render(f"overlays/{overlay}") if tree["kind"] in ("Job", "JobSet"))
        text = yaml.safe_dump(run)
        assert "completions: 16\n" in text
        assert "parallelism: 16\n" in text
        assert "name: WORKER_COUNT\n" in text
        assert re.search(r"value: '16'\n", text)
        assert "'2'" not in text


def test_optional_lines_can_be_uncommented(copied: Path) -> None:
    for file, pattern, replacement in [
        ("base/job.yaml", r"# (?=nodeSelector|activeDeadlineSeconds)", ""),
        ("shared/serviceaccount.yaml", "# annotations", "annotations"),
        ("overlays/multiworker/kustomization.yaml", "components:\n", "components:\n  - ../../components/spot\n"),
        *(
            ("overlays/multiworker/kustomization.yaml", "components:\n", f"components:\n  - ../../components/{name}\n")
            for name in ("no-consolidation", "priority", "disruption-budget")
        ),
    ]:
        text = (copied / file).read_text()
        (copied / file).write_text(re.sub(pattern, replacement, text))
    cron = next(tree for tree in manifests.render("overlays/nightly") if tree["kind"] == "CronJob")
    pod = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-l4"}
    (account,) = [tree for tree in manifests.render("shared") if tree["kind"] == "ServiceAccount"]
    assert account["metadata"]["annotations"].keys() == {"iam.gke.io/gcp-service-account"}
    by_kind = {tree["kind"]: tree for tree in manifests.render("overlays/multiworker")}
    assert by_kind.keys() == {"Job", "NetworkPolicy", "PodDisruptionBudget"}
    budget, job = by_kind["PodDisruptionBudget"], by_kind["Job"]
    assert (budget["kind"], budget["metadata"]["name"]) == ("PodDisruptionBudget", job["metadata"]["name"])
    spec = job["spec"]
    assert spec["template"]["spec"]["priorityClassName"] == "kubetune"
    assert "karpenter.sh/do-not-disrupt" in spec["template"]["metadata"]["annotations"]
    assert (spec["completions"], spec["activeDeadlineSeconds"]) == (2, 86400)
    selected = {"cloud.google.com/gke-accelerator", "cloud.google.com/gke-spot"}
    assert spec["template"]["spec"]["nodeSelector"].keys() == selected


def test_comments_and_order_are_those_of_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.setattr(manifests, "K8S", tmp_path)
    monkeypatch.setattr(manifests, "REPLACED_COMMENTS", {})
    (tmp_path / "base" / "kustomization.yaml").write_text(
        "resources: [one.yaml]\npatches: [{path: patch.yaml}]\nlabels: [{pairs: {team: a}}]\n"
    )
    (tmp_path / "base" / "one.yaml").write_text(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: one # its name\nspec:\n"
        "  # above\n  # both lines\n  volumes:\n    - name: z # last letter\n    - name: a\n"
        '  containers:\n    - name: c\n      image: "1.5" # "#"\n      args:\n        - x=1\n        # of y\n        - y=2\n'
    )
    (tmp_path / "base" / "patch.yaml").write_text(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: one\nspec:\n  hostname: h # new\n"
        '  containers:\n    - name: c\n      image: "yes" # changed\n      command: [a, b]\n'
    )
    body = manifests.format_manifest("job.yaml").partition("---\n")[2]
    assert body == (
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: one # its name\n  labels:\n    team: a\nspec:\n"
        "  # above\n  # both lines\n  volumes:\n    - name: z # last letter\n    - name: a\n"
        "  hostname: h # new\n"
        '  containers:\n    - name: c\n      image: "yes" # changed\n'
        "      args:\n        - x=1\n        # of y\n        - y=2\n      command: [a, b]\n"
    )


def test_a_missing_kubectl_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(SystemExit, match=r"manifests: kubectl is not installed; `make setup` installs it into \.venv"):
        manifests.main()


def test_a_broken_kustomization_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "K8S", tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "kustomization.yaml").write_text("resources: [gone.yaml]\n")
    with pytest.raises(SystemExit, match=r"manifests: k8s/base: .*gone\.yaml"):
        manifests.main()


def test_every_component_is_used() -> None:
    components = {folder.name for folder in (manifests.K8S / "components").iterdir()}
    used = {
        Path(name).name
        for folder in OVERLAYS
        for name in yaml.safe_load((manifests.K8S / folder / "kustomization.yaml").read_text()).get("components", [])
    }
    assert used == components
