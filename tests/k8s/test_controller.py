"""The rules of a Job, applied to pods that have ended."""

from typing import Any

import pytest

from tests.k8s.controller import Alive, Ended, action, to_start, verdict
from tests.k8s.rendered import JOBS, Pods, name_of

DISRUPTED = frozenset({"DisruptionTarget"})
CODES = {"containerName": "trainer", "operator": "In"}
RULES = {
    "rules": [
        {"action": "FailJob", "onExitCodes": {**CODES, "values": [2, 3]}},
        {"action": "Ignore", "onExitCodes": {**CODES, "values": [75]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
}
INDEXED = {"completionMode": "Indexed", "completions": 2, "parallelism": 2}
PER_INDEX = {**INDEXED, "backoffLimitPerIndex": 1, "maxFailedIndexes": 0, "podFailurePolicy": RULES}


def pod(index: int, code: int, conditions: frozenset[str] = frozenset(), container: str = "trainer") -> Ended:
    return Ended(f"default/kubetune-{index}", index, {container: code}, conditions)


@pytest.mark.parametrize(
    ("rule", "ended", "fits"),
    [
        ({"onExitCodes": {"operator": "In", "values": [3, 40]}}, pod(0, 40), True),
        ({"onExitCodes": {"operator": "In", "values": [3, 40]}}, pod(0, 4), False),
        ({"onExitCodes": {"operator": "NotIn", "values": [40]}}, pod(0, 4), True),
        ({"onExitCodes": {"operator": "NotIn", "values": [40]}}, pod(0, 40), False),
        ({"onExitCodes": {**CODES, "values": [40]}}, pod(0, 40), True),
        ({"onExitCodes": {**CODES, "values": [40]}}, pod(0, 40, container="other"), False),
        ({"onExitCodes": {"operator": "NotIn", "values": [40]}}, Ended("p", 0, {"a": 0, "b": 40}), False),
        ({"onExitCodes": {"operator": "In", "values": [40]}}, Ended("p", 0, {"a": 1, "b": 40}), True),
        ({"onPodConditions": [{"type": "DisruptionTarget"}]}, pod(0, 137, DISRUPTED), True),
        ({"onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}, pod(0, 137), False),
        ({"onPodConditions": [{"type": "Other"}, {"type": "DisruptionTarget"}]}, pod(0, 137, DISRUPTED), True),
    ],
)
@pytest.mark.parametrize("what", ["FailJob", "FailIndex", "Ignore"])
def test_a_rule_fits_a_pod(rule: dict[str, Any], ended: Ended, fits: bool, what: str) -> None:
    spec = {"podFailurePolicy": {"rules": [{"action": what, **rule}]}}
    assert action(spec, ended)[0] == (what if fits else "Count")


def test_the_first_rule_that_fits_decides() -> None:
    first = {"action": "Count", "onExitCodes": {"operator": "In", "values": [75]}}
    assert action({"podFailurePolicy": RULES}, pod(0, 75))[0] == "Ignore"
    assert action({"podFailurePolicy": {"rules": [first, *RULES["rules"]]}}, pod(0, 75))[0] == "Count"
    assert action({"podFailurePolicy": RULES}, pod(0, 2, DISRUPTED))[0] == "FailJob"
    assert action({}, pod(0, 2, DISRUPTED))[0] == "Count"


@pytest.mark.parametrize(
    ("spec", "ended", "reason"),
    [
        ({}, [], None),
        ({}, [pod(0, 0)], "CompletionsReached"),
        ({"completions": 2, "parallelism": 2}, [pod(0, 0)], None),
        ({"completions": 2, "parallelism": 2}, [pod(0, 0), pod(0, 0)], "CompletionsReached"),
        (INDEXED, [pod(0, 0), pod(0, 0)], None),
        (INDEXED, [pod(0, 0), pod(1, 0)], "CompletionsReached"),
        # Failures of all indices together.
        ({}, [pod(0, 1)] * 6, None),
        ({}, [pod(0, 1)] * 7, "BackoffLimitExceeded"),
        ({"backoffLimit": 0}, [pod(0, 1)], "BackoffLimitExceeded"),
        ({"backoffLimit": 1, **INDEXED}, [pod(0, 1), pod(1, 1)], "BackoffLimitExceeded"),
        ({"backoffLimit": 0, "podFailurePolicy": RULES}, [pod(0, 75)] * 99, None),
        ({"backoffLimit": 0, "podFailurePolicy": RULES}, [pod(0, 137, DISRUPTED)] * 99, None),
        ({"backoffLimit": 0, "podFailurePolicy": RULES}, [pod(0, 75), pod(0, 137)], "BackoffLimitExceeded"),
        ({"backoffLimit": 9, "podFailurePolicy": RULES}, [pod(0, 2)], "PodFailurePolicy"),
        ({"backoffLimit": 9, "podFailurePolicy": RULES}, [pod(0, 3)], "PodFailurePolicy"),
        # Failures of each index.
        (PER_INDEX, [pod(0, 1), pod(1, 1)], None),
        (PER_INDEX, [pod(0, 1), pod(1, 75), pod(0, 1)], "MaxFailedIndexesExceeded"),
        (PER_INDEX, [pod(0, 1), pod(0, 75), pod(0, 137, DISRUPTED)], None),
        (PER_INDEX, [pod(1, 2)], "PodFailurePolicy"),
        ({**PER_INDEX, "maxFailedIndexes": 1}, [pod(0, 1)] * 2, None),
        ({**PER_INDEX, "maxFailedIndexes": 1}, [*[pod(0, 1)] * 2, pod(1, 0)], "FailedIndexes"),
        ({**INDEXED, "backoffLimitPerIndex": 0, "backoffLimit": 0}, [pod(0, 1)], "BackoffLimitExceeded"),
        ({**INDEXED, "backoffLimitPerIndex": 9}, [pod(0, 1)] * 9, None),
    ],
)
def test_how_a_job_ends(spec: dict[str, Any], ended: list[Ended], reason: str | None) -> None:
    found = verdict(spec, ended)
    assert (found and found.reason) == reason
    assert (found and found.type) == (reason and ("Complete" if reason == "CompletionsReached" else "Failed"))


def test_an_index_fails_at_once_where_a_rule_says_so() -> None:
    rules = {"rules": [{"action": "FailIndex", "onExitCodes": {"operator": "In", "values": [42]}}]}
    spec = {**INDEXED, "backoffLimitPerIndex": 5, "podFailurePolicy": rules}
    assert verdict(spec, [pod(0, 42)]) is None
    assert to_start(spec, [pod(0, 42)], []) == [1]
    assert verdict({**spec, "maxFailedIndexes": 0}, [pod(0, 42)]) is not None


def test_the_message_names_container_code_and_rule() -> None:
    found = verdict(PER_INDEX, [pod(1, 2)])
    assert found is not None
    assert found.message == (
        "Container trainer for pod default/kubetune-1 failed with exit code 2 matching FailJob rule at index 0"
    )


@pytest.mark.parametrize(
    ("spec", "ended", "alive", "started"),
    [
        (INDEXED, [], [], [0, 1]),
        (INDEXED, [], [Alive(0)], [1]),
        (INDEXED, [pod(1, 0)], [], [0]),
        (INDEXED, [pod(1, 1)], [Alive(0)], [1]),
        ({**INDEXED, "parallelism": 1}, [], [], [0]),
        ({**INDEXED, "parallelism": 1}, [], [Alive(0)], []),
        ({"completions": 3, "parallelism": 2}, [], [], [0, 0]),
        ({"completions": 3, "parallelism": 2}, [pod(0, 0), pod(0, 0)], [], [0]),
        ({}, [pod(0, 1)], [], [0]),
        # A pod that was deleted and still ends.
        (INDEXED, [], [Alive(0), Alive(1, deleted=True)], [1]),
        ({**INDEXED, "podReplacementPolicy": "Failed"}, [], [Alive(0), Alive(1, deleted=True)], []),
        (PER_INDEX, [], [Alive(0), Alive(1, deleted=True)], []),
        (PER_INDEX, [pod(1, 75)], [Alive(0)], [1]),
        # Nothing is started in a Job that has ended, and no index that is given up.
        (PER_INDEX, [pod(1, 2)], [], []),
        ({**PER_INDEX, "maxFailedIndexes": 1}, [pod(1, 1)] * 2, [], [0]),
    ],
)
def test_what_is_started(spec: dict[str, Any], ended: list[Ended], alive: list[Alive], started: list[int]) -> None:
    assert to_start(spec, ended, alive) == started


@pytest.mark.parametrize("pods", JOBS, ids=name_of)
def test_every_job_of_ours_goes_on_after_preemptions_and_a_crash_and_ends_at_a_mistake(pods: Pods) -> None:
    assert pods.job is not None
    harmless = [pod(0, 75), pod(0, 137, DISRUPTED), pod(0, 143, DISRUPTED)]
    assert verdict(pods.job, [*harmless * 50, pod(0, 137)]) is None
    assert to_start(pods.job, harmless, []) == list(range(pods.count))
    for code in (2, 3):
        found = verdict(pods.job, [pod(0, code)])
        assert found is not None
        assert found.reason == "PodFailurePolicy"
    many = verdict(pods.job, [pod(0, 1)] * 4)
    assert many is not None
    assert many.type == "Failed"
