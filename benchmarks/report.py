"""Turns the JSON files in ``benchmarks/results`` into a table and pictures beside them.

    python benchmarks/report.py

Writes ``kernels.md`` and ``kernels.png`` (share of the GPU's measured ceilings), and ``engine.md``
with ``engine.png`` (milliseconds a token against context length) where the engine was measured.
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"


def about(result: dict) -> str:
    return f"{result['gpu']}, driver {result['driver']}, JAX {result['jax']}, {result['date']}."


def kernel_table(result: dict) -> str:
    """Every row, with the ceiling that it comes nearer to."""
    lines = [
        "Written by `benchmarks/report.py` from `kernels.json`; times are those of the kernels",
        f"themselves, of every launch of the op. {about(result)}",
        "",
        "| op | shape | us | TFLOP/s | MB | share of copy rate | share of matmul rate |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        tflops = f"{row['tflops']:.0f}" if "tflops" in row else ""
        matmul = row.get("share_of_matmul_rate")
        lines.append(
            f"| {row['op']} | {row['shape']} | {row['us']:.1f} | {tflops} "
            f"| {row['bytes'] / 1e6:.1f} | {row['share_of_copy_rate']:.0%} "
            f"| {'' if matmul is None else f'{matmul:.0%}'} |"
        )
    return "\n".join(lines) + "\n"


def kernel_plot(result: dict, path: Path) -> None:
    rows = result["rows"][::-1]
    shares = [max(row["share_of_copy_rate"], row.get("share_of_matmul_rate", 0)) for row in rows]
    peers = ("XLA", "cuDNN", "jax.nn")
    ours = [not any(peer in row["op"] for peer in peers) for row in rows]
    figure = Figure(figsize=(9, 0.24 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    axes.barh(
        [f"{row['op'].split('(')[0]}: {row['shape']}" for row in rows],
        shares,
        color=["tab:blue" if flag else "tab:gray" for flag in ours],
    )
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("share of the nearer ceiling: device copy, or XLA's largest matrix product")
    axes.set_title("blue: these kernels; gray: cuDNN and XLA")
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(y=0.01)
    figure.savefig(path, dpi=110)


def engine_table(decode: dict | None, prefill: dict | None) -> str:
    lines = ["Written by `benchmarks/report.py`: Llama-3-8B's geometry, random bf16 weights."]
    if decode is not None:
        lines += [
            "",
            f"Decode, milliseconds a step (fastest to slowest burst). {about(decode)}",
            "",
            "| attention | batch | context | ms |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {row['attention']} | {row['batch']} | {row['context']} "
            f"| {row['ms_per_step']:.2f} ({row['fastest']:.2f}-{row['slowest']:.2f}) |"
            for row in decode["rows"]
        ]
    if prefill is not None:
        lines += [
            "",
            f"Seconds to the first token (fastest to slowest). {about(prefill)}",
            "",
            "| attention | prompt tokens | chunk | s |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {row['attention']} | {row['tokens']} | {row['chunk']} "
            f"| {row['seconds']:.2f} ({row['fastest']:.2f}-{row['slowest']:.2f}) |"
            for row in prefill["rows"]
        ]
    return "\n".join(lines) + "\n"


def engine_plot(decode: dict, path: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    series = sorted({(row["attention"], row["batch"]) for row in decode["rows"]})
    for attention, batch in series:
        rows = [r for r in decode["rows"] if (r["attention"], r["batch"]) == (attention, batch)]
        axes.plot(
            [row["context"] for row in rows],
            [row["ms_per_step"] for row in rows],
            marker="o",
            label=f"{attention}, batch {batch}",
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("ms a step")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    def read(name: str) -> dict | None:
        path = RESULTS / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    kernels, decode, prefill = read("kernels"), read("decode"), read("prefill")
    if kernels is not None:
        (RESULTS / "kernels.md").write_text(kernel_table(kernels))
        kernel_plot(kernels, RESULTS / "kernels.png")
    if decode is not None or prefill is not None:
        (RESULTS / "engine.md").write_text(engine_table(decode, prefill))
    if decode is not None:
        engine_plot(decode, RESULTS / "engine.png")


if __name__ == "__main__":
    main()
