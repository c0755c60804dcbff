"""The manifests at work: their pods as processes, until the Job is complete or has failed (`tests.k8s.cluster`).

What a user edits is edited in tests/k8s/overlays: the bucket, and a small run in the place of the experiment.
"""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.pictures import fill_folder
from tests.e2e.running import ROOT, assert_same_run, catches
from tests.hosts.network import needs_root
from tests.k8s.cluster import STORAGE, Cluster
from tests.k8s.controller import Verdict
from tests.k8s.rendered import here
from tests.storage.emulator import Emulator, environment
from trainer.errors import DONE, INTERRUPTED
from trainer.storage.path import storage_path

pytestmark = needs_root

COMPLETE = Verdict("Complete", "CompletionsReached", "Reached expected number of succeeded pods")
RUN = "gs://bucket/runs/kubetune"
KILLED = 128 + signal.SIGKILL


def codes(cluster: Cluster) -> list[tuple[int, int]]:
    """Index and exit code of every pod, in the order of their starts."""
    return [(pod.index, pod.exit_code) for pod in cluster.pods]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the Indexed Job leaves in the bucket when nothing happens to it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with Cluster(here("multiworker"), folder / "cluster") as cluster:
        assert cluster.finish() == COMPLETE, cluster.story()
        assert codes(cluster) == [(0, DONE), (1, DONE)]
        return cluster.fetched(RUN, folder / "run")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_workers_get_through_a_preemption_and_a_crash_with_the_same_bits(undisturbed: Path, tmp_path: Path) -> None:
    with Cluster(here("multiworker"), tmp_path / "cluster") as cluster:
        cluster.until(lambda: "step 12/" in cluster.said(0), "step 12")
        preempted = cluster.preempt(0)
        cluster.until(lambda: len(cluster.pods) == 4, "both workers to be replaced")
        assert preempted.exit_code == INTERRUPTED
        cluster.until(lambda: "step 24/" in cluster.said(0), "step 24")
        cluster.pod(1).container.send(signal.SIGKILL)
        assert cluster.finish() == COMPLETE, cluster.story()
        first, second = codes(cluster)[:2], codes(cluster)[2:4]
        assert first == [(0, INTERRUPTED), (1, INTERRUPTED)]
        assert second == [(index, {0: INTERRUPTED, 1: KILLED}[index]) for index, _ in second]
        assert sorted(codes(cluster)[4:]) == [(0, DONE), (1, DONE)]
        assert_same_run(undisturbed, cluster.fetched(RUN, tmp_path / "run"))


def test_a_wrong_argument_fails_the_job_at_once_and_says_why(tmp_path: Path) -> None:
    job = here("multiworker")
    job.container["args"].append("training.batchsize=12")
    with Cluster(job, tmp_path) as cluster:
        verdict = cluster.finish(60)
        assert verdict.reason == "PodFailurePolicy", cluster.story()
        assert len(cluster.pods) == 2
        wrong = cluster.ended[0]
        assert verdict.message == (
            f"Container trainer for pod default/{wrong.name} failed with exit code 2 matching FailJob rule at index 0"
        )
        assert wrong.container.message == (
            "exit code 2 (configuration or data is wrong): the configuration has 1 fault:\n"
            "  training.batchsize: there is no such key; did you mean batch_size?"
        )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_pod_is_preempted_and_its_successor_completes_the_job(tmp_path: Path) -> None:
    with Cluster(here("job"), tmp_path) as cluster:
        cluster.until(lambda: "step 12/" in cluster.said(), "step 12")
        cluster.preempt(0)
        assert cluster.finish() == COMPLETE, cluster.story()
        assert codes(cluster) == [(0, INTERRUPTED), (0, DONE)]
        first, second = (pod.container for pod in cluster.pods)
        assert first.message.startswith("exit code 75 (interrupted): SIGTERM at step ")
        assert f"; everything is saved. Start the same command again with output_dir={RUN} to go on" in first.message
        assert "weights: this run's checkpoint at step " in second.log
        assert second.message.startswith("exit code 0 (done): test accuracy 0.")
        assert second.message.endswith(f"{RUN}/report/index.html")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_pods_write_the_dataset_that_one_would_though_one_is_preempted(tmp_path: Path) -> None:
    photos = fill_folder(tmp_path / "photos", {"cat": 9, "dog": 7, "owl": 8})
    alone = [sys.executable, "-m", "trainer.prepare", "data=image_folder", f"data.root={photos}", "data.shards=6"]
    subprocess.run([*alone, f"output={tmp_path / 'alone'}"], cwd=ROOT, check=True, capture_output=True)
    job = here("prepare")
    job.container["args"].append("data.shards=6")
    with Cluster(job, tmp_path / "cluster") as cluster:
        cluster.network.inside(STORAGE, lambda: upload(photos, cluster.storage))
        cluster.until(lambda: len(cluster.alive) == 4, "all pods")
        third = cluster.pod(2).container
        cluster.until(lambda: third.pid is not None and catches(third.pid, signal.SIGTERM), "a pod that listens")
        cluster.preempt(2)
        assert cluster.finish() == COMPLETE, cluster.story()
        assert sorted(codes(cluster)) == [(0, DONE), (1, DONE), (2, DONE), (2, INTERRUPTED), (3, DONE)]
        messages = [pod.container.message for pod in cluster.pods if pod.exit_code == DONE]
        assert any("gs://bucket/prepared/photos holds 24 images of 3 classes" in message for message in messages)
        written = cluster.storage.folder / "bucket" / "prepared" / "photos"
        shards = {path.name: path.read_bytes() for path in (tmp_path / "alone").glob("*.tfrecord*")}
        assert shards
        assert {path.name: path.read_bytes() for path in written.glob("*.tfrecord*")} == shards
        assert (written / "dataset_info.json").exists()


def upload(folder: Path, storage: Emulator) -> None:
    """To gs://bucket/NAME."""
    with environment(storage.url):
        for file in folder.rglob("*.jpg"):
            (storage_path(f"gs://bucket/{folder.name}") / str(file.relative_to(folder))).upload(file)
