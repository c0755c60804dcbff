"""Jobs of the manifests, run to completion or failure on the simulated cluster (`tests.k8s.cluster`).

tests/k8s/overlays makes the edits of a user: the bucket, and a small run instead of the experiment.
"""

import re
import signal
from pathlib import Path

import pytest

from tests.data.images import fill_folder
from tests.e2e.running import assert_same_run, catches, program, train
from tests.hosts.network import needs_root
from tests.k8s.cluster import STORAGE, Cluster
from tests.k8s.controller import JobCondition
from tests.k8s.rendered import local_job
from tests.storage.emulator import Emulator, environment
from trainer.errors import DONE, INTERRUPTED, WRONG_INPUT
from trainer.storage.path import storage_path

pytestmark = needs_root

COMPLETE = JobCondition("Complete", "CompletionsReached", "Reached expected number of succeeded pods")
RUN = "gs://bucket/runs/kubetune"
KILLED = 128 + signal.SIGKILL


def codes(cluster: Cluster) -> list[tuple[int, int]]:
    return [(pod.index, pod.exit_code) for pod in cluster.pods]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of the Indexed Job without disruptions."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with Cluster(local_job("multiworker"), folder / "cluster") as cluster:
        assert cluster.finish() == COMPLETE, cluster.describe()
        assert codes(cluster) == [(0, DONE), (1, DONE)]
        return cluster.download(RUN, folder / "run")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_workers_produce_the_same_bits_after_a_preemption_and_a_crash(undisturbed: Path, tmp_path: Path) -> None:
    with Cluster(local_job("multiworker"), tmp_path / "cluster") as cluster:
        cluster.wait_until(lambda: "step 12/" in cluster.log(0), "step 12")
        preempted = cluster.preempt(0)
        cluster.wait_until(lambda: len(cluster.pods) == 4, "both workers to be replaced")
        assert preempted.exit_code == INTERRUPTED
        cluster.wait_until(lambda: "step 24/" in cluster.log(0), "step 24")
        cluster.pod(1).container.send(signal.SIGKILL)
        assert cluster.finish() == COMPLETE, cluster.describe()
        first, second = codes(cluster)[:2], codes(cluster)[2:4]
        assert first == [(0, INTERRUPTED), (1, INTERRUPTED)]
        assert second == [(index, {0: INTERRUPTED, 1: KILLED}[index]) for index, _ in second]
        assert sorted(codes(cluster)[4:]) == [(0, DONE), (1, DONE)]
        assert_same_run(undisturbed, cluster.download(RUN, tmp_path / "run"))


def test_a_wrong_argument_fails_the_job_without_retries_and_is_the_termination_message(tmp_path: Path) -> None:
    job = local_job("multiworker")
    job.container["args"].append("training.batchsize=12")
    with Cluster(job, tmp_path) as cluster:
        condition = cluster.finish(60)
        assert condition.reason == "PodFailurePolicy", cluster.describe()
        assert len(cluster.pods) == 2
        failed = cluster.terminated[0]
        assert condition.message == (
            f"Container trainer for pod default/{failed.name} failed with exit code 2 matching FailJob rule at index 0"
        )
        assert failed.container.message.startswith("exit code 2 ")
        assert "training.batchsize" in failed.container.message
        assert "batch_size" in failed.container.message


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_pod_is_preempted_and_its_successor_completes_the_job(tmp_path: Path) -> None:
    with Cluster(local_job("job"), tmp_path) as cluster:
        cluster.wait_until(lambda: "step 12/" in cluster.log(), "step 12")
        cluster.preempt(0)
        assert cluster.finish() == COMPLETE, cluster.describe()
        assert codes(cluster) == [(0, INTERRUPTED), (0, DONE)]
        first, second = (pod.container for pod in cluster.pods)
        assert first.message.startswith("exit code 75 (interrupted): SIGTERM at step ")
        assert f"output_dir={RUN}" in first.message
        assert "weights: this run's checkpoint at step " in second.log
        assert second.message.startswith("exit code 0 (done): test accuracy 0.")
        assert second.message.endswith(f"{RUN}/report/index.html")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_pod_of_a_sweep_trains_one_run_and_the_sweep_lists_them(tmp_path: Path) -> None:
    """One is preempted and resumes; one diverges, which does not end the others."""
    job = local_job("sweep")
    with Cluster(job, tmp_path) as cluster:
        cluster.wait_until(lambda: "step 1/" in cluster.log(0), "the first step of the first run")
        cluster.preempt(0)
        condition = cluster.finish()
        assert condition.reason == "FailedIndexes", cluster.describe()
        assert sorted(codes(cluster)) == [(0, DONE), (0, INTERRUPTED), (1, WRONG_INPUT), (2, DONE)]
        folders = [f"gs://bucket/runs/kubetune-sweep/{index}" for index in range(3)]
        for pod in cluster.pods:
            assert folders[pod.index] in pod.container.log
        again = job.arguments()  # on any machine, without SWEEP_JOB
        again = [a for a in again if not a.startswith("runtime")]
        listed = cluster.network.inside(STORAGE, lambda: list_sweep(again, cluster.storage))
        assert listed.count("is finished already") == 2
        assert re.search(r"job   1  failed \(exit code 2\).*1e\+38", listed)
        assert re.search(r"best: job [02], val_accuracy", listed)


def list_sweep(arguments: list[str], storage: Emulator) -> str:
    with environment(storage.url):
        return train(*arguments, code=WRONG_INPUT).stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_pods_of_which_one_is_preempted_write_the_dataset_of_a_single_process(tmp_path: Path) -> None:
    photos = fill_folder(tmp_path / "photos", {"cat": 9, "dog": 7, "owl": 8})
    program("prepare", "data=image_folder", f"data.root={photos}", "data.shards=6", f"output={tmp_path / 'alone'}")
    job = local_job("prepare")
    job.container["args"].append("data.shards=6")
    with Cluster(job, tmp_path / "cluster") as cluster:
        cluster.network.inside(STORAGE, lambda: upload(photos, cluster.storage))
        cluster.wait_until(lambda: len(cluster.running) == 4, "all pods")
        third = cluster.pod(2).container
        cluster.wait_until(
            lambda: third.pid is not None and catches(third.pid, signal.SIGTERM), "a pod that handles SIGTERM"
        )
        cluster.preempt(2)
        assert cluster.finish() == COMPLETE, cluster.describe()
        assert sorted(codes(cluster)) == [(0, DONE), (1, DONE), (2, DONE), (2, INTERRUPTED), (3, DONE)]
        messages = [pod.container.message for pod in cluster.pods if pod.exit_code == DONE]
        assert any(re.search("gs://bucket/prepared/photos .*24 images of 3 classes", message) for message in messages)
        written = cluster.storage.folder / "bucket" / "prepared" / "photos"
        shards = {path.name: path.read_bytes() for path in (tmp_path / "alone").glob("*.tfrecord*")}
        assert shards
        assert {path.name: path.read_bytes() for path in written.glob("*.tfrecord*")} == shards
        assert (written / "dataset_info.json").exists()


def upload(folder: Path, storage: Emulator) -> None:
    with environment(storage.url):
        for file in folder.rglob("*.jpg"):
            (storage_path(f"gs://bucket/{folder.name}") / str(file.relative_to(folder))).upload(file)
