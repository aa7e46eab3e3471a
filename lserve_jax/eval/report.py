"""Results as JSON, Markdown and pictures.

Every summary is computed from the JSON's rows, so that tables can be made again from the file.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lserve_jax.analysis import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
_LEAST_PROMPTS = 40  # of a cell that can be called the worst: fewer, and chance decides


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a binomial share of ``n`` trials (Wilson's), within [0, 1].

    For scores between 0 and 1 it is too wide rather than too narrow: they vary less than a coin
    with the same mean. Raises ``ValueError`` without a trial.
    """
    if n < 1:
        raise ValueError(f"an interval needs at least one trial, got {n=}")
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval (normal; 0 for a single value)."""
    array = np.asarray(values, np.float64)
    if len(array) < 2:
        return float(array.mean()), 0.0
    return float(array.mean()), float(_Z * array.std(ddof=1) / math.sqrt(len(array)))


def write(directory: Path, result: Mapping[str, Any], *, plots: bool) -> None:
    """Writes ``results.json`` and ``results.md``; with ``plots`` the pictures too."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.json").write_text(_as_json(result), encoding="utf-8")
    (directory / "results.md").write_text(markdown(result), encoding="utf-8")
    if plots:
        for name, figure in figures(result).items():
            figure.savefig(directory / f"{name}.png", dpi=130)


def read(directory: Path) -> dict[str, Any] | None:
    """What ``write`` left in ``results.json``; None if there is no such file."""
    path = directory / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _as_json(result: Mapping[str, Any]) -> str:
    """One line a field, and one a row."""
    fields = []
    for name, value in result.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list) and value:
            rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in value)
            text = f"[\n{rows}\n]"
        fields.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(fields) + "\n}\n"


def _distinct(rows: Rows, *keys: str) -> list[tuple]:
    return list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))


def _where(rows: Rows, **values: Any) -> list[Mapping[str, Any]]:
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of a result."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    kept = "".join(
        f", {what} {result[name]}"
        for name, what in (("weights", "weights"), ("kv_dtype", "keys and values"))
        if result.get(name) is not None
    )
    lines = [
        f"{result['model']} ({result['dtype']}{kept}), {result['device']}, {result['date']}, seed "
        f"{result['seed']}, {versions}.",
        "",
        f"`{result['command']}`",
        "",
        *(f"* `{name}`: {heads['policy']}" for name, heads in result["heads"].items()),
    ]
    if result["answers"]:
        lines += _answer_tables(result["answers"])
    if result["predictions"]:
        lines += _prediction_tables(result["predictions"])
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in body)]


def _answer_tables(rows: Rows) -> list[str]:
    settings = [setting for (setting,) in _distinct(rows, "setting")]
    first = settings[0]
    body = []
    for source, task, length in _distinct(rows, "source", "task", "length"):
        cell = _where(rows, source=source, task=task, length=length)
        for setting in settings:
            mine = _where(cell, setting=setting)
            if not mine:  # a setting that has not run yet
                continue
            share = sum(_scores(mine)) / len(mine)
            low, high = wilson_interval(share, len(mine))
            interval = f"{100 * low:.1f} to {100 * high:.1f}"
            against = "" if setting == first else _signed(_points(cell, first, setting))
            body.append(
                (
                    *(source, task, str(length), f"`{setting}`", f"{100 * share:.1f}", interval),
                    *(str(len(mine)), against, _percent_read(mine)),
                )
            )
    head = ("text", "task", "tokens", "setting", "score, %", "95 %", "prompts")
    table = _table((*head, f"points from `{first}`", "read, %"), body)
    return ["", "## Answers", "", *table, *_summary(rows, settings), *_prefill_table(rows)]


def _densities(rows: Rows) -> list[float]:
    """What block-sparse prefill attended; rows of older results have none."""
    return [row["density"] for row in rows if row.get("density") is not None]


def _prefill_table(rows: Rows) -> list[str]:
    """Of settings that read prompts block-sparsely, what they attended."""
    body = []
    for setting, length in _distinct(rows, "setting", "length"):
        found = _densities(_where(rows, setting=setting, length=length))
        if found:
            span = f"{100 * min(found):.1f} to {100 * max(found):.1f}"
            mean = f"{100 * sum(found) / len(found):.1f}"
            body.append((f"`{setting}`", str(length), mean, span, str(len(found))))
    if not body:
        return []
    lines = ["", "## Prefill", "", "Of the blocks that retrieval heads would attend causally."]
    head = ("setting", "tokens", "attended, %", "least and most", "haystacks")
    return [*lines, "", *_table(head, body)]


def _summary(rows: Rows, settings: Sequence[str]) -> list[str]:
    """What every setting costs over all cells: of each text, and of all texts."""
    first, body = settings[0], []
    texts = {source: _where(rows, source=source) for (source,) in _distinct(rows, "source")}
    if len(texts) > 1:
        texts["all"] = list(rows)
    for source, of_text in texts.items():
        for setting in settings:
            mine = _where(of_text, setting=setting)
            if not mine:
                continue
            against = worst = ""
            if setting != first:
                against = _signed(_points(of_text, first, setting))
                worst = _worst_cell(of_text, first, setting)
            share = 100 * sum(_scores(mine)) / len(mine)
            cells = (f"`{setting}`", f"{share:.1f}", str(len(mine)), against)
            body.append((source, *cells, _percent_read(mine), worst))
    head = ("text", "setting", "score, %", "prompts", f"points from `{first}`", "read, %")
    lines = ["", "## Answers over all cells", ""]
    lines += ["A cell is a text, a task and a length. Every prompt counts the same.", ""]
    return [*lines, *_table((*head, f"worst cell of {_LEAST_PROMPTS} prompts or more"), body)]


def _worst_cell(rows: Rows, first: str, setting: str) -> str:
    """The cell that loses most from ``first``, of those with prompts enough to say so."""
    found = []
    for cell in _distinct(rows, "source", "task", "length"):
        inside = _where(rows, **dict(zip(("source", "task", "length"), cell, strict=True)))
        points = _points(inside, first, setting)
        if len(points) >= _LEAST_PROMPTS:
            found.append((sum(points) / len(points), cell, points))
    if not found:
        return ""
    _, cell, points = min(found)
    return f"{', '.join(map(str, cell))}: {_signed(points)}"


def _points(rows: Rows, first: str, setting: str) -> list[float]:
    """Prompt by prompt, how much better ``setting`` scores than ``first``."""
    base, mine = (_scores(_where(rows, setting=name)) for name in (first, setting))
    return [100 * (b - a) for a, b in zip(base, mine, strict=True)]


def _signed(points: Sequence[float]) -> str:
    mean, half = mean_interval(points)
    return f"{mean:+.1f} ± {half:.1f}"


def _percent_read(rows: Rows) -> str:
    """Mean share of dense attention's bytes, over the answers that took a decode step."""
    shares = [row["read"] for row in rows if row["read"] is not None]
    return f"{100 * sum(shares) / len(shares):.1f}" if shares else ""


def _scores(rows: Rows) -> list[float]:
    return [row["score"] for row in rows]


def _prediction_tables(rows: Rows) -> list[str]:
    """A row for each text, length and setting; then for all lengths, and for all texts."""
    groups: dict[tuple, Rows] = {
        (source, length): _where(rows, source=source, length=length)
        for source, length in _distinct(rows, "source", "length")
    }
    texts = [source for (source,) in _distinct(rows, "source")]
    if len(groups) > len(texts):
        groups |= {(source, "all"): _where(rows, source=source) for source in texts}
    if len(texts) > 1:
        groups["all", "all"] = list(rows)
    settings = [setting for (setting,) in _distinct(rows, "setting")]
    agreement = any(row["divergence"] is not None for row in rows)
    body = []
    for (source, length), group in groups.items():
        base = _flat(_where(group, setting=settings[0]), "logprobs")
        for setting in settings:
            mine = _where(group, setting=setting)
            if not mine:
                continue
            losses = [-x for x in _flat(mine, "logprobs")]
            mean = sum(losses) / len(losses)
            more, half = mean_interval([a + b for a, b in zip(base, losses, strict=True)])
            cells = [source, str(length), f"`{setting}`", f"{math.exp(mean):.3f}", f"{mean:.4f}"]
            cells.append("" if setting == settings[0] else f"{more:+.4f} ± {half:.4f}")
            if agreement:
                divergence, same = _flat(mine, "divergence"), _flat(mine, "same_token")
                share = sum(same) / len(same)
                low, high = wilson_interval(share, len(same))
                cells.append(f"{sum(divergence) / len(divergence):.5f}")
                cells.append(f"{100 * share:.1f} ({100 * low:.1f} to {100 * high:.1f})")
            body.append((*cells, str(len(losses))))
    head = ["text", "tokens", "setting", "perplexity", "nats a token", f"from `{settings[0]}`"]
    if agreement:
        head += [f"KL from `{settings[0]}`, nats", "same likeliest token, %"]
    return ["", "## Predictions", "", *_table((*head, "tokens scored"), body)]


def _flat(rows: Rows, key: str) -> list[Any]:
    return [value for row in rows for value in row[key]]


def figures(result: Mapping[str, Any]) -> dict[str, "Figure"]:
    """The pictures of a result's answers, by name.

    One a task that has depths, under the task's name: length by depth, one panel a setting.
    "budget": score against token budget, where settings differ in nothing else. "prefill": score
    against what block-sparse prefill attended.

    Raises ``ValueError`` if matplotlib (extra ``plot``) is not installed.
    """
    require_matplotlib()
    if not result["answers"]:
        return {}
    return _depth_figures(result) | _budget_figure(result) | _prefill_figure(result)


def _depth_figures(result: Mapping[str, Any]) -> dict[str, "Figure"]:
    from matplotlib.figure import Figure  # not at the top: an optional dependency

    found = {}
    rows = [row for row in result["answers"] if row["depth"] is not None]
    for (task,) in _distinct(rows, "task"):
        of_task = _where(rows, task=task)
        settings = [setting for (setting,) in _distinct(of_task, "setting")]
        lengths = [length for (length,) in _distinct(of_task, "length")]
        bands = 10 if task.startswith("niah") else len({row["depth"] for row in of_task})
        columns = min(len(settings), 4)
        lines = -(-len(settings) // columns)
        figure = Figure(figsize=(1 + 3 * columns, 0.6 + 2.8 * lines), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for axis in axes[len(settings) :]:
            axis.set_visible(False)
        image = None
        for axis, setting in zip(axes, settings, strict=False):
            grid = np.full((bands, len(lengths)), np.nan)
            for column, length in enumerate(lengths):
                of_length = _where(of_task, setting=setting, length=length)
                for band in range(bands):
                    inside = [r["score"] for r in of_length if int(r["depth"] * bands) == band]
                    if inside:
                        grid[band, column] = np.mean(inside)
            image = axis.imshow(grid, aspect="auto", vmin=0, vmax=1, cmap="RdYlGn")
            axis.set_xticks(range(len(lengths)), [str(n) for n in lengths], rotation=45)
            depths = [f"{100 * (band + 0.5) / bands:.0f}" for band in range(bands)]
            axis.set_yticks(range(bands), depths)
            axis.set_title(_wrapped(setting), fontsize="x-small")
        assert image is not None
        figure.colorbar(image, ax=axes.tolist(), label="score")
        figure.supxlabel("tokens")
        figure.supylabel("depth, %")
        figure.suptitle(f"{task}, {result['model']}")
        found[task] = figure
    return found


def _wrapped(setting: str, width: int = 34) -> str:
    lines = [""]
    for part in setting.replace(",", ",\n").split("\n"):
        if len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _budget_figure(result: Mapping[str, Any]) -> dict[str, "Figure"]:
    from matplotlib.figure import Figure

    families: dict[str, dict[int, str]] = {}
    for name, setting in result["settings"].items():
        if setting is not None:
            others = {key: x for key, x in setting.items() if key != "token_budget"}
            family = families.setdefault(json.dumps(others), {})
            family[setting["token_budget"]] = name
    rows = result["answers"]
    done = {setting for (setting,) in _distinct(rows, "setting")}
    curves = [dict(sorted(family.items())) for family in families.values() if len(family) > 1]
    curves = [curve for curve in curves if set(curve.values()) <= done]
    if not curves:
        return {}
    tasks = [task for (task,) in _distinct(rows, "task")]
    figure = Figure(figsize=(1 + 4 * len(tasks), 3.8), layout="constrained")
    dense = [name for name, setting in result["settings"].items() if setting is None]
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        of_task = _where(rows, task=task)
        for i, (length,) in enumerate(_distinct(of_task, "length")):
            of_length = _where(of_task, length=length)
            share = {name: np.mean(_scores(_where(of_length, setting=name))) for name in done}
            for number, curve in enumerate(curves):
                label = f"{length} tokens" if number == 0 else None
                shares = [share[name] for name in curve.values()]
                axis.plot(list(curve), shares, marker="o", color=f"C{i}", label=label)
            for name in done.intersection(dense):
                axis.axhline(share[name], color=f"C{i}", linestyle="--", linewidth=0.8)
        axis.set_xscale("log", base=2)
        budgets = sorted({budget for curve in curves for budget in curve})
        axis.set_xticks(budgets, [str(budget) for budget in budgets])
        axis.set(xlabel="token budget", ylabel="score", ylim=(-0.03, 1.03), title=task)
        axis.legend(fontsize="x-small")
    figure.suptitle(f"{result['model']}; dashed: dense")
    return {"budget": figure}


def _threshold(setting: str) -> str:
    """What a setting says of ``prefill_threshold`` or ``prefill_density``; nothing: ""."""
    entries = (entry.partition("=") for entry in setting.replace(":", ",").split(","))
    names = ("prefill_threshold", "prefill_density")
    return next((value for name, _, value in entries if name in names), "")


def _prefill_figure(result: Mapping[str, Any]) -> dict[str, "Figure"]:
    from matplotlib.figure import Figure

    rows = result["answers"]
    if not _densities(rows):
        return {}
    tasks = [task for (task,) in _distinct(rows, "task")]
    figure = Figure(figsize=(1 + 4 * len(tasks), 3.8), layout="constrained")
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for i, (length,) in enumerate(_distinct(_where(rows, task=task), "length")):
            points = []
            for (setting,) in _distinct(rows, "setting"):
                mine = _where(rows, task=task, length=length, setting=setting)
                density = np.mean(_densities(mine) or [1.0])
                points.append((density, np.mean(_scores(mine)), setting))
            for density, score, setting in points:
                axis.annotate(
                    _threshold(setting),
                    (density, score),
                    (-4, -14 if i else 7),  # of two lengths next to each other either is read
                    textcoords="offset points",
                    fontsize="x-small",
                )
            line = sorted(points)
            axis.plot(
                [point[0] for point in line],
                [point[1] for point in line],
                marker="o",
                color=f"C{i}",
                label=f"{length} tokens",
            )
        axis.set(xlabel="share of blocks attended", ylabel="score", xlim=(0, 1.03), title=task)
        axis.set_ylim(-0.03, 1.03)
        axis.legend(fontsize="x-small")
    figure.suptitle(f"{result['model']}; numbers: threshold; at 1 prompts are read causally")
    return {"prefill": figure}
