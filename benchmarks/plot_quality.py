"""Pictures of what sparsity costs, of what heads are worth, and of drafts that are accepted.

    python benchmarks/plot_quality.py

Reads ``results/quality/shares/results.json``, ``results/exact_text.json`` and the head shares
shipped for both SmolLM2 models. Writes ``results/quality/shares/read.png`` (points from dense
attention against what was read, by length and setting), ``results/exact_text.png`` (acceptance,
tokens a verification and speed of exact mode against context) and
``results/head-shares-NAME.png`` for either model. Needs no GPU.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import convert
from lserve_jax.calibrate.pictures import plot_head_shares
from lserve_jax.eval.report import mean_interval

RESULTS = Path(__file__).parent / "results"
DRAFTS = {
    "exact": "sparse steps, bf16 weights",
    "exact_int8": "sparse steps, int8 weights",
    "exact_int4": "sparse steps, int4 weights",
    "ngram": "looked up in the prompt",
}
MODELS = ("SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct-32K")


def label(setting: dict[str, Any]) -> str:
    """A sparse setting of the study in words."""
    if setting["head_shares"] is None:
        return f"LServe's own: budget {setting['token_budget']}, half streaming by gates"
    if setting["token_budget"] is not None:
        return f"{setting['dense_heads']} dense heads, budget {setting['token_budget']}"
    if setting["streaming_fraction"] is not None:
        return f"1/8, {setting['streaming_fraction']:.0%} of the heads streaming"
    if setting["budget_share"] is not None:
        return f"1/{1 / setting['budget_share']:.0f} of the context"
    return "default: 1/8 of the context, a third streaming"


def read_plot(result: dict[str, Any], path: Path) -> None:
    """A panel a length; a point a setting: what it read, and its score less dense attention's."""
    rows = defaultdict(list)
    for row in result["answers"]:
        rows[row["setting"], row["length"]].append(row)
    lengths = result["study"]["lengths"]
    dense, *settings = result["settings"]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, len(lengths), sharey=True)
    for panel, length in zip(axes, lengths, strict=True):
        base = rows[dense, length]
        panel.axhline(0.0, color="black", linewidth=0.8)
        for i, name in enumerate(settings):
            mine = rows[name, length]
            pairs = zip(base, mine, strict=True)
            points, half = mean_interval([100 * (b["score"] - a["score"]) for a, b in pairs])
            read = [row["read"] for row in mine if row["read"] is not None]
            panel.errorbar(
                [100 * sum(read) / len(read)],
                [points],
                yerr=[half],
                fmt="os^vDP"[i % 6],
                color=f"C{i}",
                capsize=3,
                label=label(result["settings"][name]),
            )
        panel.set(title=f"{length} tokens", xlabel="read, %", xlim=(0, 42))
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("points from dense attention")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    where = f"{result['model']}, {result['device']}, {result['date']}"
    figure.suptitle(f"{where}; {len(base)} prompts a length, 95 % intervals", fontsize="medium")
    figure.savefig(path, dpi=110)


def acceptance_plot(result: dict[str, Any], path: Path) -> None:
    """Exact mode against context, a line for each way to draft."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in result["rows"]:
        rows[row["setting"]].append(row)
    kinds = [name for name in DRAFTS if name in rows]
    dense = {row["length"]: row["tokens_per_second"] for row in rows["dense"]}
    panels = {
        "share of drafts accepted": lambda row: row["acceptance"],
        "tokens a verification": lambda row: row["tokens_per_verification"],
        "tokens a second, of dense attention's": lambda row: (
            row["tokens_per_second"] / dense[row["length"]]
        ),
    }
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for panel, (title, value) in zip(axes, panels.items(), strict=True):
        for i, name in enumerate(kinds):
            lengths = [row["length"] for row in rows[name]]
            panel.plot(
                lengths, [value(row) for row in rows[name]], f"C{i}{'os^D'[i]}-", label=DRAFTS[name]
            )
        panel.set_xscale("log", base=2)
        panel.set_xticks(sorted(dense), labels=[f"{x / 1024:.0f}K" for x in sorted(dense)])
        panel.set(title=title, xlabel="context, tokens", ylim=(0, None))
        panel.grid(alpha=0.3)
    axes[0].set_ylim(0, 1)
    axes[2].axhline(1.0, color="black", linewidth=0.8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    where = f"{result['gpu']}, JAX {result['jax']}, {result['date']}"
    rows_of = rows["dense"][0]["rows"]
    figure.suptitle(f"SmolLM2-135M-Instruct-32K, {rows_of} rows; {where}", fontsize="medium")
    figure.savefig(path, dpi=110)


def main() -> None:
    study = RESULTS / "quality" / "shares"
    result = json.loads((study / "results.json").read_text(encoding="utf-8"))
    read_plot(result, study / "read.png")
    result = json.loads((RESULTS / "exact_text.json").read_text(encoding="utf-8"))
    acceptance_plot(result, RESULTS / "exact_text.png")
    for name in MODELS:
        sensitivity, shares = convert.load_head_shares(name)
        assert sensitivity is not None  # it is shipped
        plot_head_shares(sensitivity, shares, RESULTS / f"head-shares-{name}.png")


if __name__ == "__main__":
    main()
