"""Best epoch, patience and phase weights."""

from trainer.config.phases import EarlyStopping
from trainer.training.early_stopping import (
    describe_phase_end,
    find_best_step,
    is_out_of_patience,
    summarize_phase,
    update_best,
)
from trainer.training.state import RunState


def run_epochs(scores: list[tuple[float, float]], rule: EarlyStopping) -> tuple[list[bool], RunState, list[bool]]:
    """Update with (val_accuracy, val_loss) per epoch; return `best` per epoch, the state, and `is_out_of_patience`."""
    state, best, over = RunState(), [], []
    for epoch, (accuracy, loss) in enumerate(scores, 1):
        state.step = epoch * 10
        best.append(update_best(state, {"epoch": epoch, "val_accuracy": accuracy, "val_loss": loss}, rule))
        over.append(is_out_of_patience(state, rule))
    return best, state, over


def test_accuracy_decides_and_ties_go_to_the_lower_loss() -> None:
    best, state, _ = run_epochs([(0.5, 1.0), (0.7, 0.9), (0.7, 0.8), (0.7, 0.85), (0.6, 0.1)], EarlyStopping())
    assert best == [True, True, True, False, False]
    assert state.best is not None
    assert (state.best["epoch"], state.best["step"]) == (3, 30)


def test_the_best_epoch_of_earlier_phases_stays_best_until_an_epoch_is_better() -> None:
    state, rule = RunState(carried=10), EarlyStopping()
    state.history = [{"step": 10, "val_accuracy": 0.9, "val_loss": 0.3}]
    assert find_best_step(state, rule) == 10
    for step, accuracy, loss, best in ((20, 0.8, 0.1, 10), (30, 0.9, 0.4, 10), (40, 0.9, 0.2, 40), (50, 0.7, 0.1, 40)):
        state.step = step
        state.history.append({"step": step, "epoch": step // 10, "val_accuracy": accuracy, "val_loss": loss})
        update_best(state, state.history[-1], rule)
        assert find_best_step(state, rule) == best
    assert find_best_step(RunState(), rule) is None
    assert find_best_step(state, EarlyStopping(metric="loss")) == 40  # loss 0.2 against 0.3


def test_the_metric_can_be_the_loss() -> None:
    best, state, _ = run_epochs([(0.5, 1.0), (0.9, 1.1), (0.4, 0.9)], EarlyStopping(metric="loss"))
    assert best == [True, False, True]
    assert state.best is not None
    assert state.best["epoch"] == 3


def test_patience_counts_epochs_without_a_better_metric() -> None:
    scores = [(0.5, 1.0), (0.6, 0.9), (0.6, 0.8), (0.55, 0.7), (0.9, 0.1)]
    _, _, over = run_epochs(scores, EarlyStopping(patience=2))
    assert over == [False, False, False, True, False]  # a tie with a lower loss is the best, but no improvement
    assert run_epochs(scores, EarlyStopping(patience=0))[2] == [False] * 5


def test_min_delta_is_the_least_improvement() -> None:
    best, _, _ = run_epochs([(0.50, 1.0), (0.505, 0.9), (0.52, 0.8)], EarlyStopping(min_delta=0.01))
    assert best == [True, False, True]


def test_scores_on_the_whole_split_replace_those_of_the_epoch_in_the_summary_of_a_phase() -> None:
    scores, whole = {"val_accuracy": 0.9, "val_loss": 0.3, "val_n": 10}, {"val_accuracy": 0.8, "val_n": 100}
    state = RunState(best={"step": 10, "epoch": 1, "value": 0.9, "val_loss": 0.3})
    state.history = [{"phase": "head", "epoch": 1, "step": 10, "seconds": 1.0, **scores}]
    summary, entry = summarize_phase(state, "head", 10)
    assert scores.items() <= summary.items()
    assert describe_phase_end("head", summary, entry, "the best weights", "epoch 1") == [
        "phase head: val_accuracy 0.9000; continuing from the best weights (epoch 1)"
    ]
    scored, entry = summarize_phase(state, "head", 10, whole)
    assert scored == summary | whole | {"epoch_val_accuracy": 0.9, "epoch_val_n": 10}
    lines = describe_phase_end("head", scored, entry, "the best weights", "epoch 1")
    assert lines[1:] == ["  on all 100 validation examples: val_accuracy 0.8000"]


def test_a_phase_that_ends_with_earlier_weights_is_compared_by_the_scores_of_epochs() -> None:
    state = RunState(best={"step": 20, "epoch": 2, "value": 0.7, "val_loss": 0.5})
    both = {"seconds": 1.0, "val_loss": 0.3, "val_n": 10}
    state.history = [
        {"phase": "head", "epoch": 1, "step": 10, "val_accuracy": 0.9, **both},
        {"phase": "rest", "epoch": 2, "step": 20, "val_accuracy": 0.7, **both},
    ]
    summary, entry = summarize_phase(state, "rest", 10, {"val_accuracy": 0.6, "val_n": 100})
    assert (summary["kept_from"], summary["own_val_accuracy"], summary["epoch_val_accuracy"]) == ("head", 0.7, 0.9)
    lines = describe_phase_end("rest", summary, entry, "the best weights", "epoch 1")
    assert lines[0].startswith(
        "phase rest: best val_accuracy 0.7000, not better than 0.9000 before it; continuing from"
    )
