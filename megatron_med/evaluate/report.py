"""``report.html``: what ``results.json`` and the samples say, as one page."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_med.evaluate import pictures
from megatron_med.evaluate.judged import judge
from megatron_med.evaluate.results import ORDER, REPORT, RESULTS, Sample, read_samples, samples_file
from megatron_med.files import naming, write_text
from megatron_med.page import document, figure, note, section, table

_EXAMPLES = 5
_SUBJECTS = 40


def write_report(folder: Path) -> Path:
    """Writes the page beside the results.

    Args:
        folder: with ``results.json`` and ``samples_TASK.jsonl``.

    Returns:
        The page.
    """
    content = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    path = folder / REPORT
    with naming(path):
        write_text(path, render(content, folder))
    return path


def render(content: Mapping[str, Any], folder: Path) -> str:
    """The whole page.

    Args:
        content: of ``results.json``.
        folder: where the samples are.
    """
    settings, tasks = content["settings"], content["tasks"]
    name = settings["checkpoint"]
    parts = [
        f"<h1>Evaluation report: {html.escape(Path(name).name)}</h1>",
        note(
            f"{name}; {settings['precision']}{', ' + settings['quantize'] if settings.get('quantize') else ''}; "
            f"{settings['shots'] or 'no'} examples in front; weights {settings['weights'][:12]}"
        ),
        section("Accuracy", _accuracies(tasks), *_gold(content.get("gold", {}))),
    ]
    for task in tasks:
        analysis = content.get("analysis", {}).get(task, {})
        path = samples_file(folder, task)
        samples = list(read_samples(path).values()) if path.is_file() else []
        contamination = content.get("contamination", {}).get(task)
        shown = [*_analysis(analysis), *_contamination(contamination, analysis), *_examples(samples)]
        if shown:
            parts.append(section(task, *shown))
    return document("Evaluation report", parts)


def _accuracies(tasks: Mapping[str, Any]) -> str:
    rows, values = [], []
    for task, metrics in tasks.items():
        for metric, found in metrics.items():
            if ORDER in metric:
                continue  # they have a table of their own
            low, high = found["interval"]
            if metric != "word_perplexity":
                values.append((f"{task}: {metric}", found["value"], low, high))
            rows.append(
                [f"{task}: {metric}", f"{found['value']:.4f}", f"{low:.4f} to {high:.4f}", found["count"]]
                + [found.get(name, 0) for name in ("unparsed", "too_long", "cut", "ties")]
                + [f"{found['spread']:.4f}" if "spread" in found else ""]
            )
    header = ["task: metric", "value", "95 % interval", "questions", "unparsed", "too long", "cut", "ties", "spread"]
    shown = table(header, rows)
    if values:
        shown += figure(pictures.accuracies(values), "Accuracy with its 95 % bootstrap interval")
    return shown


def _gold(gold: Mapping[str, Mapping[str, int]]) -> list[str]:
    if not gold:
        return []
    names = sorted({answer for counts in gold.values() for answer in counts})
    rows = [[task, *(counts.get(name, 0) for name in names)] for task, counts in gold.items()]
    return [note("How often each answer is the right one:"), table(["task", *names], rows)]


def _analysis(analysis: Mapping[str, Any]) -> list[str]:
    parts = []
    calibrated = {metric: told for metric, told in analysis.items() if "calibration" in told}
    if calibrated:
        parts.append("<h3>Calibration</h3>" + _calibration(calibrated))
        parts.append("<h3>Selective answering</h3>" + _selective(calibrated))
    by_subject = {metric: told["subjects"] for metric, told in analysis.items() if "subjects" in told}
    if by_subject:
        parts.append("<h3>By subject</h3>" + _subjects(by_subject))
    if analysis:
        parts.append("<h3>By length of the question</h3>" + _lengths(analysis))
    ordered = {metric: told["order"] for metric, told in analysis.items() if "order" in told}
    if ordered:
        parts.append("<h3>By order of the options</h3>" + _orders(ordered))
    return parts


def _calibration(analysis: Mapping[str, Any]) -> str:
    rows = []
    for metric, told in analysis.items():
        found = told["calibration"]
        pairs = ((found[name], found[f"{name}_interval"]) for name in ("ece", "brier"))
        rows.append([metric, *(cell for value, ends in pairs for cell in (f"{value:.4f}", _range(ends)))])
    bins = {metric: told["calibration"]["bins"] for metric, told in analysis.items()}
    return (
        table(["metric", "ECE", "95 % interval", "Brier score", "95 % interval"], rows)
        + note(
            "".join(
                f"{metric}: without {told['without']} questions that were too long. "
                for metric, told in analysis.items()
                if told.get("without")
            )
        )
        + note("ECE: mean distance of confidence and accuracy, 10 bins. Brier score: 0 is best, 2 is worst.")
        + figure(pictures.reliability(bins), "Reliability: on the line, an answer is right as often as it says")
    )


def _selective(analysis: Mapping[str, Any]) -> str:
    curves = {metric: told["selective"]["curve"] for metric, told in analysis.items()}
    shown = figure(pictures.risk_coverage(curves), "Wrong answers among those given, surest first")
    promised = {metric: told["selective"] for metric, told in analysis.items() if "abstain" in told["selective"]}
    if not promised:
        return shown + note("Too few questions to promise anything: 20 are needed in each half.")
    first = next(iter(promised.values()))
    rows = []
    for metric, told in promised.items():
        found, sets = told["abstain"], told["sets"]
        threshold, given = found["threshold"], found["accuracy_of_answered"]
        row = [metric, f"{told['area']:.4f}", "never answers" if threshold is None else f"{threshold:.4f}"]
        row += [_percent(found["answered"]), _percent(found["wrong"]), "" if given is None else f"{given:.4f}"]
        row += [_percent(sets["covered"]), f"{sets['mean_size']:.2f}", _percent(sets["single"])]
        rows.append(row)
    wrong, miss = first["abstain"]["wrong_share_at_most"], first["sets"]["miss_share_at_most"]
    header = ["metric", "area under the curve", "answers from", "answered", "answered wrongly", "accuracy of these"]
    header += ["sets hold the truth", "options in a set", "sets of one option"]
    return (
        shown
        + table(header, rows)
        + note(
            f"One half of the questions sets the thresholds ({first['abstain']['calibration']}), the other half is "
            f"shown ({first['abstain']['test']}). Promised, over draws of both: at most {100 * wrong:g} % of all "
            f"questions are answered wrongly (conformal risk control), and a set misses the truth for at most "
            f"{100 * miss:g} % (split conformal prediction). The promise holds for questions like these."
        )
    )


def _subjects(by_metric: Mapping[str, Mapping[str, Any]]) -> str:
    subjects = list(dict.fromkeys(subject for found in by_metric.values() for subject in found))
    rows = []
    for subject in subjects[:_SUBJECTS]:
        shares = [found.get(subject) for found in by_metric.values()]
        rows.append([subject, max(share["count"] for share in shares if share), *map(_share, shares)])
    rest = f"{len(subjects) - _SUBJECTS} smaller subjects stand in results.json." if len(subjects) > _SUBJECTS else ""
    return table(["subject", "questions", *by_metric], rows) + (note(rest) if rest else "")


def _lengths(analysis: Mapping[str, Any]) -> str:
    rows = [
        [metric, f"{part['words'][0]} to {part['words'][1]}", part["count"], _share(part)]
        for metric, told in analysis.items()
        for part in told["lengths"]
    ]
    return table(["metric", "words", "questions", "accuracy"], rows)


def _orders(by_metric: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [metric, told["orders"], *(f"{told[end]:.4f}" for end in ("lowest", "highest")), _percent(told["same_answer"])]
        for metric, told in by_metric.items()
    ]
    return table(["metric", "orders", "lowest accuracy", "highest", "same answer in all orders"], rows)


def _contamination(known: Mapping[str, Any] | None, analysis: Mapping[str, Any]) -> list[str]:
    if known is None:
        return []
    found, short = known["found"], known["too_short_to_be_sought"]
    text = (
        f"{len(found)} of {known['questions']} questions stand in {', '.join(known['files'])}; "
        f"{short} have fewer than 8 words and were not sought."
    )
    clean = {metric: told["clean"] for metric, told in analysis.items() if "clean" in told}
    rows = [[metric, found["count"], _share(found)] for metric, found in clean.items()]
    shown = table(["metric", "questions not found", "their accuracy"], rows)
    lines = [[name, where["place"], where["words"]] for name, where in list(found.items())[:_EXAMPLES]]
    if lines:
        shown += table(["question", "found in", "words"], lines)
    return ["<h3>Contamination</h3>" + f"<p>{html.escape(text)}</p>" + shown]


def _examples(samples: Sequence[Sample]) -> list[str]:
    """Answers that the model was surest of, and wrong."""
    metric = next((name for sample in samples for name in sample.get("predictions", {}) if ORDER not in name), None)
    if metric is None:
        return []
    answers = judge(samples, metric)
    wrong = [(one, sample) for one, sample in zip(answers, _having(samples, metric), strict=True) if not one.right]
    wrong.sort(key=lambda pair: -(pair[0].confidence if pair[0].probabilities else 0))
    if not wrong:
        return []
    shown = []
    for one, sample in wrong[:_EXAMPLES]:
        sure = f", {100 * one.confidence:.0f} % sure" if one.probabilities else ""
        written = "".join(f"\n--- written: {text}" for text in sample.get("outputs", [])[:2])
        title = html.escape(f"{one.id}: {one.prediction or 'nothing read'}{sure}; {one.gold} is right")
        text = html.escape(sample["prompt"] + written)
        shown.append(f"<details><summary>{title}</summary><pre>{text}</pre></details>")
    return [f"<h3>Wrong answers ({html.escape(metric)})</h3>" + "\n".join(shown)]


def _having(samples: Iterable[Sample], metric: str) -> list[Sample]:
    return [sample for sample in samples if metric in sample.get("predictions", {})]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _range(interval: Sequence[float]) -> str:
    return f"{interval[0]:.4f} to {interval[1]:.4f}"


def _share(found: Mapping[str, Any] | None) -> str:
    if not found or found["value"] is None:
        return ""
    return f"{found['value']:.4f} ({_range(found['interval'])})"
