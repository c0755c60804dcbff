"""The sections on the run itself: headline, phases, data, speed, exports, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.evaluation.markup import (
    NONE,
    bar,
    card,
    duration,
    facts,
    fold,
    number,
    percent,
    plural,
    short,
    span,
    table,
    text,
)

_BARS = 60  # classes that are shown with bars at once
PLACES = {
    "train": ("training", "--s0"),
    "wait": ("waiting for data", "--s1"),
    "features": ("features of frozen layers", "--s6"),
    "compile": ("compiling", "--s3"),
    "start": ("starting", "--faint"),
    "checkpoint": ("checkpoints", "--s5"),
    "evaluation": ("evaluation", "--s2"),
    "finish": ("export and report", "--soft"),
    "lost": ("lost with a process", "--s4"),
    "down": ("no process there", "--rule"),
}


def _interval(interval: Sequence[float] | None, shares: bool = False) -> str:
    if interval is None:
        return ""
    return f"95 %: {span(interval) if shares else f'{interval[0]:.3f}–{interval[1]:.3f}'}"


def headline(test: Mapping[str, Any], phases: Mapping[str, Mapping[str, Any]]) -> str:
    """Scores with their intervals, and below each what it was after every phase, on the validation split."""
    n, split = test["n"], test["split"]

    def before(key: str, shares: bool, digits: int) -> str:
        known = {name: phase for name, phase in phases.items() if phase.get(key) is not None}
        if not known:
            return ""
        lines = []
        for name, phase in known.items():
            value = percent(phase[key], digits) if shares else number(float(phase[key]))
            of = phase.get("val_interval") if key == "val_accuracy" else None
            kept = f" (kept the weights of {text(phase['kept_from'])})" if "kept_from" in phase else ""
            lines.append(f"{text(name)}: {value}{f' ({span(of)})' if of and not kept else ''}{kept}")
        return f'<small class="before">validation after {"; ".join(lines)}</small>'

    found = f"95 % interval {span(test['interval'])}; {test['correct']:,} of {n:,} {text(split)} examples"
    found += before("val_accuracy", True, 2)
    cards = [card(f"{text(split)} accuracy", percent(test["accuracy"], 2), found, lead=True)]
    if "top_5" in test:
        of_five = _interval(test["top_5_interval"], True)
        cards.append(card("top-5 accuracy", percent(test["top_5"]), of_five + before("val_top_5", True, 1)))
    cards += [
        card(
            "macro F1",
            number(test["macro_f1"]),
            f"mean over classes<br>{_interval(test.get('macro_f1_interval'))}" + before("val_macro_f1", False, 3),
        ),
        card(
            "loss",
            number(test["loss"]),
            f"cross entropy, nats<br>{_interval(test.get('loss_interval'))}" + before("val_loss", False, 3),
        ),
        card(
            "calibration error",
            number(test["calibration_error"]),
            f"mean confidence {percent(test['mean_confidence'])}, right {percent(test['accuracy'])}",
        ),
        card("most frequent class", percent(test["majority"]), "accuracy of always answering it"),
    ]
    note = f'<p class="note">{text(test["note"])}</p>' if "note" in test else ""
    return f'<section class="cards" id="scores">{"".join(cards)}</section>\n{note}'


def phase_table(phases: Mapping[str, Mapping[str, Any]]) -> str:
    def score(phase: Mapping[str, Any]) -> str:
        """Of the best epoch of the phase itself, whose weights are handed on unless those it began with are better."""
        if "kept_from" in phase:
            kept = f"kept the weights of {text(phase['kept_from'])}"
            return f"{percent(phase['own_val_accuracy'], 2)}<br><small>{kept}</small>"
        interval = f" <small>({span(phase['val_interval'])})</small>" if phase.get("val_interval") else ""
        return percent(phase["val_accuracy"], 2) + interval

    head = ("phase", "epochs", "best epoch", "validation accuracy", "validation loss", "trainable parameters", "time")
    rows = [
        (
            text(name),
            number(phase["epochs"], 1),
            number(phase.get("best_epoch")),
            score(phase),
            NONE if "kept_from" in phase else number(phase.get("val_loss")),
            number(phase.get("trainable_parameters")),
            duration(phase["seconds"]),
        )
        for name, phase in phases.items()
    ]
    return table(head, rows) if rows else ""


def data_part(data: Mapping[str, Any]) -> str:
    """What the run was given: splits, classes and how unequal they are, what could not be read."""
    parts = []
    counts = data.get("counts", {})
    if "name" in data:
        whole = ", ".join(f"{count:,} {text(split)}" for split, count in counts.items())
        parts.append(f"<p><strong>{text(data['name'])}</strong>: {whole or 'no counts given'}.</p>")
    by_class, names = data.get("class_counts"), data.get("class_names")
    if by_class and names:
        parts.append(_balance(by_class, names))
    for note in data.get("notes", []):
        parts.append(f'<p class="note">{text(note)}</p>')
    missing = [*data.get("skipped", []), *data.get("undecodable", [])]
    if missing:
        lines = "\n".join(f"<li>{text(line)}</li>" for line in missing[:1000])
        lines += f"<li>and {len(missing) - 1000:,} more</li>" if len(missing) > 1000 else ""
        lost = plural(len(missing), "example")
        parts.append(f'<p class="note">Could not be read and counted for nothing: {lost}.</p>')
        parts.append(fold("Skipped files", f'<ul class="files">{lines}</ul>'))
    if by_class and names:
        parts.append(_class_counts(by_class, names))
    if "fingerprint" in data:
        parts.append(f'<p><small>fingerprint <code class="long">{text(data["fingerprint"])}</code></small></p>')
    return "\n".join(parts)


def _balance(by_class: Mapping[str, Sequence[int]], names: Sequence[str]) -> str:
    """How unequal the classes of the first split (that of training) are."""
    split, counts = next(iter(by_class.items()))
    high, low = max(counts), min(counts)
    most, least = names[counts.index(high)], names[counts.index(low)]
    if high == low:
        return f"<p>{plural(len(names), 'class', 'classes')}, {high:,} {text(split)} examples each: balanced.</p>"
    words = f"{plural(len(names), 'class', 'classes')}; the largest, {short(most)}, has {high:,} {text(split)} examples"
    if low:
        return f"<p>{words}, {high / low:.3g} times as many as the smallest, {short(least)} ({low:,}).</p>"
    empty = sum(not count for count in counts)
    return f"<p>{words}; {plural(empty, 'class has', 'classes have')} none, {short(least)} among them.</p>"


def _class_counts(by_class: Mapping[str, Sequence[int]], names: Sequence[str]) -> str:
    splits = list(by_class)
    most = max(max(by_class[splits[0]]), 1)
    rows = [
        (
            short(name, 40),
            f"{by_class[splits[0]][i]:,}{bar(by_class[splits[0]][i] / most)}",
            *(f"{by_class[s][i]:,}" for s in splits[1:]),
        )
        for i, name in enumerate(names)
    ]
    found = table(("class", *map(text, splits)), rows)
    if len(rows) > _BARS:
        found = found.replace('class="wide"', 'class="wide tall"', 1)
    return fold("Examples of each class", found)


def speed_part(timing: Mapping[str, Any]) -> str:
    """Images a second, goodput, and where the time went."""
    cards = []
    if "images_per_second" in timing:
        cards.append(
            card("speed", f"{timing['images_per_second']:,.0f}", f"images a second; {timing.get('images', 0):,} in all")
        )
    if "goodput" in timing:
        words = "share of the time since the first start in which steps were taken that count"
        cards.append(card("goodput", percent(timing["goodput"]), words))
    seconds = {place: spent for place, spent in timing.get("seconds", {}).items() if spent >= 0.05}
    total = sum(seconds.values())
    if total:
        starts, workers = timing.get("starts", 1), timing.get("workers", 1)
        cards.append(card("time", duration(total), f"{plural(starts, 'start')}, {plural(workers, 'worker')}"))
    parts = [f'<div class="cards">{"".join(cards)}</div>'] if cards else []
    if total:
        named = [(*PLACES.get(place, (place, "--soft")), spent) for place, spent in seconds.items()]
        strips = "".join(
            f'<i style="width:{100 * spent / total:.2f}%;background:var({colour})" title="{text(name)}: '
            f'{duration(spent)}"></i>'
            for name, colour, spent in named
        )
        keys = "".join(
            f'<span><i class="key" style="background:var({colour})"></i>{text(name)} {duration(spent)}</span>'
            for name, colour, spent in named
        )
        parts.append(f'<div class="stack">{strips}</div><p class="legend">{keys}</p>')
    return "".join(parts)


def export_part(exports: Mapping[str, Mapping[str, Any]]) -> str:
    """One row a format: what `exporting.formats.export_formats` measured of it."""
    if not exports:
        return ""
    rows = [
        (
            f"{text(kind)}<br><small>{_fate(row)}</small>",
            f"{row['bytes'] / 1e6:,.2f}",
            percent(row["accuracy"], 2),
            f"{row['lost']:,}",
            f"{row['gained']:,}",
            NONE if row["largest_difference"] is None else f"{row['largest_difference']:.1g}",
            f"{row['timing']['milliseconds_per_image']:,.2f}",
        )
        for kind, row in exports.items()
    ]
    head = ("format", "MB", "accuracy", "lost", "gained", "largest difference", "ms an image")
    some = next(iter(exports.values()))
    words = (
        f"<p><small>Each file was loaded back and sent {plural(some['examples'], 'example')}, of which the trainer has "
        f"{percent(some['trainer_accuracy'], 2)} right. Lost and gained: examples that only the trainer, only the file "
        "gets right. The difference is of any probability; times are of single images on the CPU that exported."
        "</small></p>"
    )
    return table(head, rows) + words


def _fate(row: Mapping[str, Any]) -> str:
    return "not kept: it lost too much accuracy" if row["refused"] else text(row["path"])


def how_part(report: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The command, and all that a run like this one needs."""
    timing = dict(report["timing"])
    command = timing.pop("command", None)
    parts = [f"<pre><code>{text(command)}</code></pre>"] if command else []
    folds = [("Configuration", config), ("Versions", report["versions"]), ("Timing", timing)]
    parts += [fold(name, facts(tree)) for name, tree in folds if tree]
    return "\n".join(parts)
