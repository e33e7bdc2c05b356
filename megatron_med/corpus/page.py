"""The report as one HTML page: pictures are inside it, nothing is fetched from elsewhere."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megatron_med.corpus.manifest import STEPS
from megatron_med.corpus.report import TOP_WORDS, CorpusFacts, SourceFacts
from megatron_med.page import COLOURS, document, figure, note, section, table

_REMOVED_BY = {
    "raw records": "no text, not taken",
    "language": "other language",
    "personal data": "personal data",
    "contamination": "benchmark question",
    "duplicates": "duplicate",
    "near duplicates": "near duplicate",
}
"""Names of the steps for a reader."""


def render(facts: CorpusFacts) -> str:
    """The whole page."""
    sources = facts.sources
    read, kept = sum(s.read for s in sources.values()), sum(s.kept for s in sources.values())
    sections = [
        f"<h1>Corpus report: {html.escape(str(facts.root))}</h1>",
        f"<p class='note'>{kept:,} of {read:,} documents kept, {facts.shards:,} shards, all as the manifest says. "
        f"megatron_med {html.escape(facts.code)}</p>",
        section("Sources", _sources_table(sources), figure(_fate_picture(sources), "What became of each document")),
        section("Lengths", _lengths_table(sources), figure(_length_picture(sources), "Characters of a document")),
        section("Languages", _languages(sources)),
        section("Duplicates", _duplicates(facts)),
        section("Benchmark questions", _questions(facts)),
        section("Personal data", _personal_data(sources)),
        section("Licences", _licenses(sources)),
        section("Top words", figure(_words_picture(sources), f"The {TOP_WORDS} most frequent words of each source")),
        section("Removed text", _examples(facts)),
    ]
    return document("Corpus report", sections)


def _sources_table(sources: dict[str, SourceFacts]) -> str:
    rows = []
    for name, facts in sources.items():
        counts = [sum(facts.removed[step].values()) for step in STEPS]
        tokens = [facts.tokens.get(split, "") for split in ("train", "valid")]
        rows.append([name, facts.read, *counts, facts.documents["train"], facts.documents["valid"], *tokens])
    header = ["source", "read", *_REMOVED_BY.values(), "train", "valid", "train tokens", "valid tokens"]
    return table(header, rows)


def _lengths_table(sources: dict[str, SourceFacts]) -> str:
    shares = (0, 5, 50, 95, 100)
    rows = [
        [name, len(f.lengths), *(int(value) for value in np.percentile(f.lengths, shares))]
        for name, f in sources.items()
        if f.lengths
    ]
    return table(["source", "documents looked at", "shortest", "5 %", "median", "95 %", "longest"], rows)


def _languages(sources: dict[str, SourceFacts]) -> str:
    found = {name: facts.languages() for name, facts in sources.items()}
    names = sorted({language for counts in found.values() for language in counts} - {"kept"})
    rows = [[name, *(counts.get(language, 0) for language in ("kept", *names))] for name, counts in found.items()]
    shown = table(["source", "kept", *names], rows)
    if not names:
        return shown + note("No other language was found.")
    parts = {language: [counts.get(language, 0) for counts in found.values()] for language in names}
    return shown + figure(_bars(list(sources), parts, "documents"), "Documents removed, by language")


def _duplicates(facts: CorpusFacts) -> str:
    names = list(facts.sources)
    reasons = sorted({r for s in facts.sources.values() for step in STEPS[4:6] for r in s.removed[step]})
    if not reasons:
        return "<p>None were found.</p>"
    parts = {
        reason: [sum(s.removed[step][reason] for step in STEPS[4:6]) for s in facts.sources.values()]
        for reason in reasons
    }
    by_reason = [[name, *(parts[reason][number] for reason in reasons)] for number, name in enumerate(names)]
    kept_in = [[name, *(facts.duplicates[name, other] for other in names)] for name in names]
    shown = table(["removed from", *reasons], by_reason)
    shown += figure(_bars(names, parts, "documents"), "Duplicates removed, by reason")
    if not facts.has_work:
        return shown
    return shown + note("In which source the document is that stayed:") + table(["removed from", *names], kept_in)


def _questions(facts: CorpusFacts) -> str:
    if not facts.questions:
        return "<p>No benchmark was named in the recipe.</p>"
    rows = []
    for name, counts in facts.questions.items():
        hits = [s.removed["contamination"][f"contaminated: {name}"] for s in facts.sources.values()]
        rows.append([name, counts["questions"], counts["too_short_to_be_found"], *hits])
    return table(["benchmark", "questions", "too short to be sought", *facts.sources], rows)


def _personal_data(sources: dict[str, SourceFacts]) -> str:
    kinds = sorted({kind for facts in sources.values() for kind in facts.found})
    if not kinds:
        return "<p>None was found.</p>"
    rows = [
        [name, *(facts.found[kind] for kind in kinds), sum(facts.removed["personal data"].values())]
        for name, facts in sources.items()
    ]
    return table(["source", *kinds, "documents dropped for it"], rows)


def _licenses(sources: dict[str, SourceFacts]) -> str:
    return table(
        ["source", "licence", "documents"],
        [
            [name, licence, count]
            for name, facts in sources.items()
            for licence, count in facts.licenses.most_common(12)
        ],
    )


def _examples(facts: CorpusFacts) -> str:
    parts = []
    for item in facts.examples:
        why = _why(item.metadata)
        text = html.escape(item.text)
        words = item.metadata.get("contamination", {}).get("words")
        more = " ..." if item.length > len(item.text) else ""
        summary = f"<b>{html.escape(item.source)}</b>: {html.escape(item.reason)} <code>{html.escape(item.id)}</code>"
        note = f"<p>{html.escape(why)}{f' <mark>{html.escape(words)}</mark>' if words else ''}</p>" if why else ""
        parts.append(
            f"<details><summary>{summary}, {item.length:,} characters</summary>{note}<pre>{text}{more}</pre></details>"
        )
    gone = f"<p>{facts.root / 'work'} is not there any more, and the removed texts with it.</p>"
    return "\n".join(parts) or ("<p>Nothing was removed.</p>" if facts.has_work else gone)


def _why(metadata: dict[str, Any]) -> str:
    if "contamination" in metadata:
        found = metadata["contamination"]
        return f"Question {found['question']} of {found['benchmark']} has these words in a row:"
    if "duplicate_of" in metadata:
        return f"The document that stayed is in {metadata['duplicate_of']}."
    if "personal_data" in metadata:
        return "Found: " + ", ".join(f"{count} {kind}" for kind, count in metadata["personal_data"].items())
    return ""


def _fate_picture(sources: dict[str, SourceFacts]) -> Figure:
    """Shares of documents kept, and removed by each step."""
    parts = {"kept": [facts.kept for facts in sources.values()]}
    parts |= {_REMOVED_BY[step]: [f.removed[step].total() for f in sources.values()] for step in STEPS}
    total = [max(1, facts.read) for facts in sources.values()]
    shares = {name: [100 * n / of for n, of in zip(counts, total, strict=True)] for name, counts in parts.items()}
    return _bars(list(sources), shares, "% of the documents read")


def _bars(names: list[str], parts: dict[str, list[Any]], unit: str) -> Figure:
    """One bar a source, put together from named parts; those that are zero everywhere are left out."""
    picture = Figure(figsize=(9, 1.3 + 0.45 * len(names)), layout="constrained")
    axes = picture.subplots()
    left = np.zeros(len(names))
    shown = {name: np.array(values, dtype=float) for name, values in parts.items() if any(values)}
    for (name, width), colour in zip(shown.items(), COLOURS * len(shown), strict=False):
        axes.barh(names, width, left=left, color=colour, label=name)
        left += width
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=8)
    return picture


def _length_picture(sources: dict[str, SourceFacts]) -> Figure:
    picture = Figure(figsize=(9, 3.6), layout="constrained")
    axes = picture.subplots()
    longest = max((max(facts.lengths) for facts in sources.values() if facts.lengths), default=10)
    bins = np.geomspace(10, longest + 1, 60)
    for (name, facts), colour in zip(sources.items(), COLOURS * len(sources), strict=False):
        if facts.lengths:
            weights = np.full(len(facts.lengths), 100 / len(facts.lengths))
            axes.hist(
                facts.lengths,
                bins=bins.tolist(),
                weights=weights,
                histtype="step",
                label=name,
                color=colour,
                linewidth=1.6,
            )
    axes.set_xscale("log")
    axes.set_xlabel("characters")
    axes.set_ylabel("% of the source's documents")
    axes.legend(frameon=False)
    return picture


def _words_picture(sources: dict[str, SourceFacts]) -> Figure:
    columns = min(4, max(1, len(sources)))
    rows = -(-len(sources) // columns)
    picture = Figure(figsize=(2.9 * columns, 3.4 * rows), layout="constrained")
    grid = picture.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for axes, (name, facts), colour in zip(grid.flat, sources.items(), COLOURS * len(sources), strict=False):
        top = facts.words.most_common(TOP_WORDS)[::-1]
        axes.set_visible(True)
        axes.barh([word for word, _ in top], [count for _, count in top], color=colour)
        axes.set_title(name, fontsize=10)
        axes.tick_params(labelsize=8)
    return picture
