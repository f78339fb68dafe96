"""A run on one page: its figures, each client's accuracy, and what it was, in one HTML file."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from fedsim.data.class_groups import GROUPS, class_groups
from fedsim.metrics import spread
from fedsim.report.client_rows import client_rows
from fedsim.report.text import percent
from fedsim.run import frames
from fedsim.run.client_scores import ClientScores
from fedsim.run.directory import write_whole
from fedsim.run.saved import SavedRun

CAPTIONS = {
    "accuracy_over_rounds": "Accuracy after each tested round.",
    "client_accuracy": "The accuracy of every client, from the worst to the best.",
    "class_counts": "Who holds what: each client's labelled and unlabelled training examples.",
    "group_accuracy": "Accuracy on frequent (head), medium and rare (tail) classes.",
    "personal_gain": "What each client gains by its own model.",
    "pseudo_labels": "How many pseudo-labels are kept, and how many of them are right.",
    "class_norms": "How long each class's vector is in the heads.",
    "etf": "How far apart the fixed classifier's class vectors are.",
}
MOST_CLIENTS = MOST_ROUNDS = 1000
"""Of more clients the page lists the best and the worst, of more tested rounds the last."""
_LISTED_CLASSES = 12  # names of a group's classes in a caption
_WIDEST_BAR = 20.0  # rem
_WIDE = 1300  # pixels from which a figure has a line of the page to itself


class Picture(NamedTuple):
    """A figure on a page: its PNG file in base64, what it shows, and whether it needs the width."""

    content: str
    caption: str
    wide: bool

    @classmethod
    def read(cls, file: Path, caption: str) -> Picture:
        """Read a PNG file."""
        png = file.read_bytes()
        width = int.from_bytes(png[16:20])  # where the format has it
        return cls(b64encode(png).decode(), caption, width > _WIDE)


class Card(NamedTuple):
    """One of the numbers at the top of a page."""

    name: str
    value: str
    note: str


class Part(NamedTuple):
    """A part of a round, with its time and the width of its bar."""

    name: str
    seconds: str
    width: str


def write_page(run: SavedRun, pictures: Iterable[Path]) -> Path:
    """Write report.html into a run's folder: one file that needs nothing beside it.

    Parameters
    ----------
    run : SavedRun
        The run.
    pictures : iterable of Path
        PNG files, named as in `CAPTIONS`, in the order in which they are shown.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    DataError
        If clients.csv lacks a column, or has a client's view twice.
    EngineError
        If the page can't be written.
    """
    scores = run.client_scores
    classes = _class_table(run)
    page = render(
        "report.html.jinja",
        title=run.name,
        subtitle=_subtitle(run),
        unfinished=_unfinished(run),
        cards=_cards(run),
        pictures=[Picture.read(file, _caption(file.stem, classes)) for file in pictures],
        scores=scores,
        **(_client_table(scores, run) if scores else {}),
        class_rows=classes,
        **_round_table(run.rounds),
        parts=_parts(run.description["seconds_per_round"]),
        parts_caption=_parts_caption(run),
        facts=_facts(run),
        settings=(run.path / "experiment.toml").read_text(encoding="utf-8"),
    )
    path = run.path / "report.html"
    write_whole(path, page.encode())
    return path


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("fedsim.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: Any) -> str:
    """Fill a template of ``templates/``; whatever comes from a user's file is escaped."""
    return _templates().get_template(template).render(values)


def _subtitle(run: SavedRun) -> str:
    settings = run.settings
    client = settings["method"].get("client")
    own = f"client {client} and model " if client else ""
    return (
        f"{settings['method']['name']} with {own}{settings['model']['name']} on "
        f"{settings['data']['source']}, {run.num_clients:,} clients "
        f"({settings['clients']['partition']}), {len(run.rounds):,} rounds"
    )


def _unfinished(run: SavedRun) -> str:
    """Say so where a run has stopped early or still goes on."""
    if len(run.rounds) >= run.rounds_asked:
        return ""
    return (
        f"{len(run.rounds):,} of {run.rounds_asked:,} rounds had finished when this page was made."
    )


def _cards(run: SavedRun) -> list[Card]:
    """Return what the last evaluated round reached."""
    last = run.last_evaluated
    if last is None:
        return []
    cards = []
    for view, name in frames.overall_columns(run.rounds).items():
        if pd.isna(last[name]):
            continue
        note = "on the global test set"
        if view.startswith("personal"):
            note = "mean over the clients"
            if run.client_scores is not None:
                scores = run.client_scores.by_client
                shown = view if view in scores else run.client_scores.ranking_view
                # Of a method without personal models it is the generic one, on their own tests.
                if shown != view:
                    note = f"the {shown} model, mean over the clients"
                over = spread(scores[shown])
                note += f"; std {percent(over['std'])}, worst 10 %: {percent(over['worst10'])}"
        cards.append(Card(view, f"{percent(last[name])} %", note))
    view, by_group = frames.group_shares(last)
    groups = " / ".join(map(percent, by_group.values()))
    cards.append(Card("head / medium / tail", groups, f"{view}, by class frequency"))
    return cards


def _class_table(run: SavedRun) -> list[tuple[str, str, str, str]]:
    """Return each class's number, name, training examples and group; empty without names."""
    names = frames.names_of(run.names, "class")
    if not names:
        return []
    groups = class_groups(run.class_counts)
    return [
        (str(c), names.get(c, ""), f"{count:,}", GROUPS[groups[c]])
        for c, count in enumerate(run.class_counts.tolist())
    ]


def _caption(stem: str, classes: Sequence[tuple[str, str, str, str]]) -> str:
    """Return what a figure shows; of class groups also which classes these are, by name."""
    if stem != "group_accuracy":
        return CAPTIONS[stem]
    parts = [CAPTIONS[stem]]
    for group in GROUPS:
        members = [name or number for number, name, _, of in classes if of == group]
        more = len(members) - _LISTED_CLASSES
        listed = [*members[:_LISTED_CLASSES], *([f"{more} more"] if more > 0 else [])]
        if listed:
            parts.append(f"{group.capitalize()}: {', '.join(listed)}.")
    return " ".join(parts)


def _client_table(scores: ClientScores, run: SavedRun) -> dict[str, Any]:
    """Return the table of the clients: headings, rows, closing rows, and who isn't listed."""
    tested, num_clients = len(scores.by_client), run.num_clients
    names = frames.names_of(run.names, "client")
    written = client_rows(scores, MOST_CLIENTS, "{:,.1f}".format)
    notes = [f"{tested:,} of {num_clients:,} were tested."] if tested < num_clients else []
    notes += [f"{written.caption}."] if written.caption else []

    def called(number: str, name: str) -> list[str]:
        return [number, name] if names else [number]

    return {
        "client_names": bool(names),
        "client_heads": [*called("client", "name"), *written.heads],
        "client_rows": [
            [*called(str(client), names.get(client, "")), *cells]
            for part in written.parts
            for client, cells in part.items()
        ],
        "client_footer": [[*called(label, ""), *cells] for label, cells in written.closing.items()],
        "clients_caption": " ".join(notes),
    }


def _round_table(rounds: pd.DataFrame) -> dict[str, Any]:
    """Return the table of the evaluated rounds: headings, rows, and which aren't listed."""
    columns = frames.overall_columns(rounds)
    by_group = frames.group_columns(rounds)["generic"]
    columns |= {group: name for group, name in by_group.items() if name in rounds}
    done = frames.evaluated(rounds, columns.values())
    columns = {view: name for view, name in columns.items() if done[name].notna().any()}
    listed = done.tail(MOST_ROUNDS)
    return {
        "round_heads": ["round", *columns, "loss"],
        "round_rows": [
            [
                f"{int(row['round'])}",
                *(percent(row[name]) for name in columns.values()),
                f"{row['train_loss']:.4g}" if pd.notna(row["train_loss"]) else "–",
            ]
            for row in listed.to_dict("records")
        ],
        "rounds_caption": f"The last {len(listed):,} of {len(done):,}: see rounds.csv"
        if len(listed) < len(done)
        else "",
    }


def _parts(seconds: dict[str, float]) -> list[Part]:
    """Return the parts of a round, the longest first."""
    spent = {name: time for name, time in seconds.items() if name != "total"}
    longest = max(spent.values(), default=0.0)
    return [
        Part(name, _seconds(time), f"{_WIDEST_BAR * time / longest if longest else 0.0:.2f}")
        for name, time in sorted(spent.items(), key=lambda part: -part[1])
    ]


def _parts_caption(run: SavedRun) -> str:
    """Say so where run.json knows fewer rounds than have finished: of a killed or live run."""
    known = run.description.get("rounds_finished", len(run.rounds))
    return "" if known == len(run.rounds) else f"Of the first {known} rounds."


def _facts(run: SavedRun) -> Sequence[tuple[str, str]]:
    """Return what run.json and rounds.csv say, for people."""
    description, rounds = run.description, run.rounds
    hardware = description["hardware"]
    facts = {
        "started": description["started"],
        "finished": description.get("finished"),
        "time": f"{_seconds(description['seconds_setup'])} to start, "
        f"{_seconds(rounds['seconds'].mean())} a round",
        "traffic": f"{_bytes(rounds['bytes_down'].sum())} to the clients, "
        f"{_bytes(rounds['bytes_up'].sum())} back",
        "device": description["device"],
        "workers": description["workers"],
        "machine": f"{hardware['cores']} cores, {_bytes(hardware['memory_bytes'])} of memory, "
        f"{hardware['system']}",
        "versions": ", ".join(f"{name} {v}" for name, v in description["versions"].items()),
        "commit": description.get("commit"),
    }
    return [(name, str(value)) for name, value in facts.items() if value]


def _seconds(time: float) -> str:
    """Write a time.

    >>> _seconds(0.00042), _seconds(0.0314), _seconds(71.5)
    ('0.4 ms', '31.4 ms', '71.5 s')
    """
    return f"{1000 * time:.1f} ms" if time < 1 else f"{time:,.1f} s"


def _bytes(size: float) -> str:
    """Write a size.

    >>> _bytes(999), _bytes(1_234_567), _bytes(25_000_000_000)
    ('999 B', '1.2 MB', '25.0 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
