"""The report of a study: report.md and its pictures, from results.json alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fusiontree.studying.statistics import LEVEL, mean_and_spread
from fusiontree.studying.summary import (
    ArmResult,
    SizeResult,
    accuracy_by_length,
    chance,
    found_rates,
    search_losses,
    shares_gpus,
    summarize,
    tasks_of,
)
from fusiontree.tracking.console import short

REPORT = "report.md"


def write_report(results: dict[str, Any], folder: Path, *, pictures: bool = True) -> Path:
    """Write report.md and, unless ``pictures`` is False, its pictures into ``folder``; return the report's path."""
    sizes = summarize(results)
    drawn: list[tuple[str, str]] = []
    if pictures and sizes:
        from fusiontree.studying.pictures import draw

        drawn = draw(results, sizes, folder)
    path = folder / REPORT
    path.write_text("\n".join(_lines(results, sizes, drawn)) + "\n", encoding="utf-8")
    return path


def _lines(results: dict[str, Any], sizes: list[SizeResult], drawn: list[tuple[str, str]]) -> Iterable[str]:
    study = results["study"]
    yield "# Study: " + (study["purpose"] or "arms compared")
    yield ""
    yield _setup(study)
    yield ""
    if notes := [f"- `{arm}`: {setup['note']}" for arm, setup in study["arms"].items() if setup["note"]]:
        yield from (*notes, "")
    if not sizes:
        yield from ("No run is finished: there is nothing to compare.", "")
    for size in sizes:
        yield from _size_lines(size, study["reference"])
    yield from _search_lines(results)
    yield from _unfinished(results)
    for name, title in drawn:
        yield from (f"## {title}", "", f"![{title}]({name})", "")


def _setup(study: dict[str, Any]) -> str:
    equal = "training FLOPs" if study["equal"] == "flops" else "training tokens"
    rates = ", ".join(f"{rate:g}" for rate in study["learning_rates"])
    text = f"All runs of a size spend the {equal} of `{study['reference']}`. "
    if len(study["learning_rates"]) > 1:
        text += f"Peak learning rate: of {rates}, the one with the lowest loss of each arm on the first size and seed. "
    else:
        text += f"Peak learning rate: {rates} on the first size. "
    text += (
        f"Larger sizes multiply it by (parameters of the first / of the size)^{study['rate_exponent']:g}. FLOPs are "
        f"those of matrix products, attention and scans, forward and backward, in rows of one document."
    )
    return text


def _size_lines(size: SizeResult, reference: str) -> Iterable[str]:
    yield from (f"## {size.size}", "")
    shared = shares_gpus(size)
    cells = []
    for arm in size.arms:
        run = arm.runs[0]
        cells.append(
            (
                f"`{arm.arm}`",
                short(run["parameters"]),
                f"{run['flops_per_token'] / 1e6:.4g}",
                short(run["tokens"]),
                f"{run['tokens'] * run['flops_per_token']:.3e}",
                f"{run['rate']:g}",
                "—" if shared else short(run["curve"]["tokens_per_s"] or 0),
                f"{arm.mean:.4f}",
                "" if math.isnan(arm.spread) else f"{arm.spread:.4f}",
                str(len(arm.runs)),
                _difference(arm, reference),
            )
        )
    head = ("arm", "parameters", "MFLOPs per token", "tokens", "FLOPs", "learning rate", "tokens/s", "final loss")
    yield from _table((*head, "std", "seeds", f"difference from `{reference}`"), cells)
    yield ""
    if shared:
        yield from ("Several runs were trained on one GPU at a time: their speeds are left out.", "")
    yield _noise_text(size, reference)
    yield ""
    if any(arm.fits for arm in size.arms):
        yield (
            "Fit of loss = a + b (FLOPs / FLOPs of the run)^-c to each run's losses after a fifth of its tokens; ± is "
            "the standard deviation between seeds. The learning rate falls during a run, so that the fit describes the "
            "curve and does not predict longer runs. Runs whose losses follow no such law are left out."
        )
        yield ""
        yield from _table(("arm", "a", "b", "c", "residual"), [_fit_cells(arm) for arm in size.arms if arm.fits])
        yield ""
    yield from _accuracy_lines(size)


def _difference(arm: ArmResult, reference: str) -> str:
    if arm.arm == reference:
        return "—"
    return "" if math.isnan(arm.difference) else f"{arm.difference:+.4f} {arm.verdict}"


def _noise_text(size: SizeResult, reference: str) -> str:
    if size.noise is None:
        return "No arm has two seeds: the noise between seeds is unknown, and no difference can be called one."
    tested = [arm for arm in size.arms if not math.isnan(arm.needed)]
    text = (
        f"Noise: the standard deviation between seeds, pooled over arms, is {size.noise.std:.4f} nats "
        f"({size.noise.degrees} degree{'s' if size.noise.degrees > 1 else ''} of freedom, runs minus arms). "
    )
    if not tested:
        lacks = f"`{reference}`" if reference not in [arm.arm for arm in size.arms] else "every other arm"
        return text + f"Nothing is tested: {lacks} has no finished run to compare with."
    text += f"Test: a two-sided t-test with this deviation and these degrees of freedom at {LEVEL:.0%}"
    if len(tested) > 1:
        text += f", divided by {len(tested)} comparisons (Bonferroni)"
    needed = sorted({f"{arm.needed:.4f}" for arm in tested})
    text += f"; a difference from `{reference}` exceeds the noise above {' or '.join(needed)} nats"
    return text + (", more for an arm of fewer seeds." if len(needed) > 1 else ".")


def _fit_cells(arm: ArmResult) -> tuple[str, ...]:
    def cell(values: Sequence[float]) -> str:
        mean, spread = mean_and_spread(values)
        return f"{mean:.3f}" + ("" if math.isnan(spread) else f" ± {spread:.3f}")

    columns = ([fit.a for fit in arm.fits], [fit.b for fit in arm.fits], [fit.c for fit in arm.fits])
    residual = max(fit.residual for fit in arm.fits)
    return (f"`{arm.arm}`", *(cell(values) for values in columns), f"{residual:.4f}")


def _accuracy_lines(size: SizeResult) -> Iterable[str]:
    by_arm = {arm.arm: accuracy_by_length(arm.runs) for arm in size.arms}
    for task, above in tasks_of(size).items():
        guessing = chance(size, task)
        if not above:
            yield f"Accuracy on {task}: no arm is above chance ({guessing:.1%}) at any length; it tells none apart."
            yield ""
            continue
        lengths = sorted({length for found in by_arm.values() for length in found.get(task, {})})
        cells = []
        for arm, found in by_arm.items():
            if task in found:
                values = [found[task].get(length) for length in lengths]
                cells.append((f"`{arm}`", *("" if value is None else _accuracy(value) for value in values)))
        yield f"Accuracy on {task} by row length, mean over depths and seeds; chance is {guessing:.1%}:"
        yield ""
        yield from _table(("arm", *(f"{length:,}" for length in lengths)), cells)
        yield ""


def _search_lines(results: dict[str, Any]) -> Iterable[str]:
    """Show the search for learning rates, and whose best rate is an end of it: a better one may lie outside."""
    losses, rates = search_losses(results), found_rates(results)
    if not losses:
        return
    tried = sorted({rate for found in losses.values() for rate in found})
    yield from (
        "## Learning rates tried",
        "",
        "Final losses of the first seed at the first size; the chosen one is bold.",
        "",
    )
    cells = []
    for arm, found in losses.items():
        texts = ["" if rate not in found else _loss_of_rate(found[rate], rate == rates[arm]) for rate in tried]
        cells.append((f"`{arm}`", *texts))
    yield from _table(("arm", *(f"{rate:g}" for rate in tried)), cells)
    yield ""
    for end, name in ((tried[0], "smallest"), (tried[-1], "largest")):
        if len(tried) > 1 and (arms := [f"`{arm}`" for arm in losses if rates[arm] == end]):
            yield f"The {name} rate is the best of {', '.join(arms)}: a better one may lie beyond it."
            yield ""


def _loss_of_rate(loss: float | None, chosen: bool) -> str:
    text = "diverged" if loss is None else f"{loss:.4f}"
    return f"**{text}**" if chosen else text


def _accuracy(value: tuple[float, float]) -> str:
    mean, spread = value
    return f"{mean:.1%}" + ("" if math.isnan(spread) else f" ± {spread:.1%}")


def _unfinished(results: dict[str, Any]) -> Iterable[str]:
    """Name the runs that are missing, so that nobody takes the tables for complete."""
    missing = [run for run in results["runs"] if run["state"] != "finished"]
    broken = [run for run in results["runs"] if run["state"] == "finished" and not _is_finite(run.get("final_loss"))]
    rates = found_rates(results)
    undecided = [
        run
        for run in results["runs"]
        if run["searched"] and run["state"] == "finished" and rates[run["arm"]] is None and run not in broken
    ]
    if not missing and not broken and not undecided:
        return
    yield from ("## Not in the tables", "")
    waiting: dict[str, list[str]] = {}
    for run in missing:
        if run["state"] == "waiting":
            waiting.setdefault(run["size"], []).append(run["arm"])
            continue
        reason = results["failed"].get(run["name"], "")
        yield f"- {run['name']}: {run['state']}{': ' + reason if reason else ''}"
    for size, arms in waiting.items():
        counts = [f"`{arm}` {arms.count(arm)}" for arm in dict.fromkeys(arms)]
        yield f"- runs of {size} that have not started, by arm: {', '.join(counts)}"
    for run in broken:
        yield f"- {run['name']}: its final loss is not finite"
    for run in undecided:
        yield f"- {run['name']}: its arm's search for a learning rate goes on"
    yield ""


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"
