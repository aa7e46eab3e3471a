"""Turns the JSON files in ``benchmarks/results`` into a table and pictures beside them.

    python benchmarks/report.py

Writes, for what was measured: ``kernels.md`` and ``kernels.png`` (share of the GPU's measured
ceilings); ``engine.md`` and ``engine.png`` (milliseconds a token against context length, seconds to
the first token); tables and pictures named like ``relay.json``, ``serving.json`` and
``throughput.json``, which their programs also write themselves.
"""

import json
from pathlib import Path
from statistics import median

from machine import about
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"


def kernel_table(result: dict) -> str:
    """Every row, with the ceiling that it comes nearer to."""
    lines = [
        "Written by `benchmarks/report.py` from `kernels.json`; times are those of the kernels",
        "themselves, of every launch of the op, but for what XLA does between the two selections",
        f"of a list longer than 8192. {about(result)}",
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


def break_even(gains: dict[int, float]) -> int | None:
    """The number of requests from which on relay wins, given its gain at some numbers.

    Fewer requests than that lose at least once; None if the largest number does.

    >>> break_even({1: 0.8, 4: 1.1, 8: 0.9, 16: 1.2, 32: 1.5})
    16
    """
    won = None
    for requests in sorted(gains, reverse=True):
        if gains[requests] <= 1:
            break
        won = requests
    return won


def relay_gains(rows: list[dict]) -> dict[int, dict[int, float]]:
    """By prefix and number of requests, how much faster relay is than sharing."""
    gains: dict[int, dict[int, float]] = {}
    for row in sorted(rows, key=lambda row: (row["prefix"], row["requests"])):
        if row.get("relay") is None or row.get("sharing") is None:
            continue  # cut short
        relay, sharing = row["relay"], row["sharing"]
        if isinstance(relay, dict):  # of the engine
            relay, sharing = relay["ms"], sharing["ms"]
        gains.setdefault(row["prefix"], {})[row["requests"]] = sharing / relay
    return gains


def relay_summary(gains: dict[int, dict[int, float]]) -> list[str]:
    """A line for each prefix: where relay begins to win, and where it loses."""
    lines = [""]
    for prefix, of_requests in gains.items():
        least = break_even(of_requests)
        wins = f"wins from {least} requests on" if least else "does not win with the most requests"
        lost = [f"{n} ({gain:.2f}x)" for n, gain in of_requests.items() if gain < 1]
        loses = f"loses at {', '.join(lost)}" if lost else "loses nowhere"
        lines.append(f"* prefix {prefix}: relay {wins}, {loses}.")
    return lines


def relay_table(result: dict) -> str:
    lines = [
        "Written by `benchmarks/relay.py`. Requests that begin with one prefix: relay reads it",
        "together, sharing reads the shared pages once a request, copies has pages a request (-:",
        f"no room). {result['private']} tokens of each request's own. {about(result)}",
    ]
    for name in sorted({row["attention"] for row in result["engine"]}):
        rows = [row for row in result["engine"] if row["attention"] == name]
        lines += [
            "",
            f"## Engine, {name}: Llama-3-8B's geometry, random bf16 weights",
            "",
            "Tokens a second of all requests together (milliseconds a step, fastest to slowest",
            'burst). "auto" is what `relay.py`\'s rule does.',
            "",
            "| prefix | requests | relay | sharing | copies | relay / sharing | auto |",
            "|---|---|---|---|---|---|---|",
        ]
        gains = relay_gains(rows)
        for row in sorted(rows, key=lambda row: (row["prefix"], row["requests"])):
            times = [_speed(row.get(way)) for way in ("relay", "sharing", "copies")]
            gain = gains.get(row["prefix"], {}).get(row["requests"])
            auto = f"{'relay' if row['auto'] else 'sharing'}: {row['why']}"
            lines.append(
                f"| {row['prefix']} | {row['requests']} | {' | '.join(times)} "
                f"| {'' if gain is None else f'{gain:.2f}x'} | {auto} |"
            )
        lines += relay_summary(gains)
    if result["operator"]:
        lines += [
            "",
            "## Operator: dense attention of one layer",
            "",
            "Microseconds of its kernels, without launches.",
            "",
            "| prefix | requests | relay | sharing | copies | relay / sharing |",
            "|---|---|---|---|---|---|",
        ]
        gains = relay_gains(result["operator"])
        for row in result["operator"]:
            times = [row[way] for way in ("relay", "sharing", "copies")]
            cells = " | ".join("-" if time is None else f"{time:.1f}" for time in times)
            gain = gains[row["prefix"]][row["requests"]]
            lines.append(f"| {row['prefix']} | {row['requests']} | {cells} | {gain:.2f}x |")
        lines += relay_summary(gains)
    return "\n".join(lines) + "\n"


def _speed(time: dict | None) -> str:
    if time is None:
        return "-"
    return (
        f"{time['tokens_per_second']:.0f} "
        f"({time['ms']:.2f}, {time['fastest']:.2f}-{time['slowest']:.2f})"
    )


def relay_plot(result: dict, path: Path) -> None:
    """How much faster relay is, against the number of requests."""
    names = sorted({row["attention"] for row in result["engine"]})
    panels = {
        f"engine, {name}": [row for row in result["engine"] if row["attention"] == name]
        for name in names
    }
    if result["operator"]:
        panels["one layer's attention, dense"] = result["operator"]
    figure = Figure(figsize=(4 * len(panels), 3.5), layout="constrained")
    for axes, (title, rows) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for prefix, gains in relay_gains(rows).items():
            axes.plot(list(gains), list(gains.values()), marker="o", label=f"prefix {prefix}")
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        counts = sorted({row["requests"] for row in rows})
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("requests")
        axes.set_ylabel("speed, relay / sharing")
        axes.set_title(title)
        axes.legend()
    figure.savefig(path, dpi=110)


def write_relay(result: dict, path: Path) -> None:
    """Writes table and pictures beside the JSON file at ``path``."""
    path.with_suffix(".md").write_text(relay_table(result))
    relay_plot(result, path.with_suffix(".png"))


def serving_table(result: dict) -> str:
    """Throughput of every run, then its latencies."""
    shapes = f"{result['num_prompts']} requests of {result['prefix_len']} + {result['suffix_len']}"
    kind = "random prompts"
    if result["workload"] == "prefix_repetition":
        held = "held" if result["share"] else "not shared"
        kind = f"prefix_repetition, {result['num_prefixes']} prefixes {held}"
    limits = ", ".join(result["goodput"]) or "none given"
    # Runs before 2026-11-28 stepped the engine in the benchmark's own process.
    server = f"over HTTP ({result['server']})" if "server" in result else "without HTTP"
    lines = [
        f"Written by `benchmarks/serving.py`, {server}: {result['model']}, {result['dtype']}, "
        f"{result['attention']}, {kind},",
        f"relay={result['relay']}, {shapes} prompt tokens, {result['output_len']} new ones, "
        f"{result['max_num_seqs']} at a time,",
        f"Poisson arrivals. {about(result)}",
        "",
        f"Goodput is under these limits (ms): {limits}. A rate of inf: all arrive at once.",
        "",
        "| rate /s | requests/s | output tok/s | total tok/s | goodput /s | from prefix "
        "| preemptions | compiled |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        goodput = "" if row["goodput"] is None else f"{row['goodput']:.2f}"
        lines.append(
            f"| {row['request_rate']} | {row['requests_per_second']:.2f} "
            f"| {row['output_tokens_per_second']:.1f} | {row['total_tokens_per_second']:.1f} "
            f"| {goodput} | {row['prefix_share']:.0%} | {row['preemptions']} "
            f"| {row['compilations']} |"
        )
    lines += [
        "",
        "Milliseconds:",
        "",
        "| rate /s | metric | mean | median | p90 | p99 |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        for metric in ("ttft", "tpot", "itl", "e2el"):
            if row[metric] is not None:
                cells = " | ".join(f"{value:.1f}" for value in row[metric].values())
                lines.append(f"| {row['request_rate']} | {metric.upper()} | {cells} |")
    if "offline" in result:
        lines += ["", *offline_lines(result["offline"], result["num_prompts"])]
    return "\n".join(lines) + "\n"


def offline_lines(offline: dict, prompts: int) -> list[str]:
    """The server beside ``LLM.generate``, pair by pair."""
    pairs = offline["pairs"]

    def of(side: str, what: str) -> list[float]:
        return [pair[side][what] for pair in pairs]

    rows = []
    for what, shown in (("tokens_per_second", "tokens/s"), ("cpu", "seconds of CPU")):
        server, alone = of("server", what), of("offline", what)
        ratios = [a / b for a, b in zip(server, alone, strict=True)]
        rows.append((f"server, {shown}", server, 1))
        rows.append((f"`LLM.generate`, {shown}", alone, 1))
        rows.append((f"server / `LLM.generate`, {shown}", ratios, 3))
    lines = [
        "The same prompts all at once through the server and by `LLM.generate`, in turns; "
        f"{len(pairs)} pairs,",
        f"{offline['same_answers']} of {prompts} answers are the same.",
        "",
        "| | median | lowest | highest |",
        "|---|---|---|---|",
    ]
    for name, values, digits in rows:
        cells = (f"{x:.{digits}f}" for x in (median(values), min(values), max(values)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def serving_plot(result: dict, path: Path) -> None:
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    rows = [row for row in result["rows"] if row["tpot"] is not None]
    for axes, metric in zip(figure.subplots(1, 2), ("ttft", "tpot"), strict=True):
        for name in ("median", "p90", "p99"):
            values = [row[metric][name] for row in rows]
            axes.plot([str(row["request_rate"]) for row in rows], values, marker="o", label=name)
        axes.set_xlabel("requests a second that arrive")
        axes.set_ylabel(f"{metric.upper()}, ms")
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.savefig(path, dpi=110)


def write_serving(result: dict, path: Path) -> None:
    """Writes a table and a picture beside the JSON file at ``path``."""
    path.with_suffix(".md").write_text(serving_table(result))
    serving_plot(result, path.with_suffix(".png"))


def throughput_table(result: dict) -> str:
    fewest, most = result["own_tokens"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    runs = len(result["rows"][0]["runs"])
    lines = [
        f"Written by `benchmarks/throughput.py`: {result['model']}, {result['dtype']}, "
        f"{result['num_prompts']} prompts of",
        f"{result['system_tokens']} common tokens and {fewest} to {most} own ones, "
        f"{result['new_tokens']} new tokens each, {result['batch_size']} at a",
        f"time; new tokens a second, median of {runs} runs. {about(result)}",
        f"{versions}.",
        "",
        "| | tokens/s | slowest | fastest | same answers as the first |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        speeds = row["runs"]
        cells = " | ".join(f"{speed:.1f}" for speed in (median(speeds), min(speeds), max(speeds)))
        same = f"{row['same_answers']} of {result['num_prompts']}"
        lines.append(f"| {row['system']} | {cells} | {same} |")
    return "\n".join(lines) + "\n"


def write_throughput(result: dict, path: Path) -> None:
    """Writes a table beside the JSON file at ``path``."""
    path.with_suffix(".md").write_text(throughput_table(result))


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
    writers = {
        "relay": write_relay,
        "serving": write_serving,
        "serving_cpu": write_serving,
        "throughput": write_throughput,
        "throughput_cpu": write_throughput,
        "throughput_short_cpu": write_throughput,
    }
    for name, write in writers.items():
        result = read(name)
        if result is not None:
            write(result, RESULTS / f"{name}.json")


if __name__ == "__main__":
    main()
