"""Where a start's time goes, from the first import to the end of the first burst, by parts.

    python benchmarks/startup.py                                # the default model
    python benchmarks/startup.py --geometry 8b --rows 1 32      # a GPU: 8B, random weights
    python benchmarks/startup.py --geometry 8b --attention lserve --rows 1 32
    python benchmarks/startup.py --geometry 8b --attention lserve --rows 32 --warmup full
    python benchmarks/startup.py --geometry 8b-read --attention lserve --rows 32 --warmup full
    python benchmarks/startup.py --rows --runs 7 --beside ../other --label now --other-label before

Every start is a process of its own with an empty cache directory (cold), then with what that one
left there (second). JAX's monitoring events tell tracing, lowering and compiling apart; they
overlap with the steps in which they happen, and on several threads with each other. "weights" is
what reading them took, and "engine" what building it took beyond that: with a warm-up, programs are
compiled while weights are read. With ``8b-read`` that is a checkpoint of 16 GB, written once into
a temporary directory (``TMPDIR``), so that the file system's cache has it. "processor" is
what all threads of the process took, which other work on the machine disturbs least. The command
line's whole time for one token is measured from outside, with the processor seconds of the process;
``--beside`` another checkout of this repository in turn with it, since a machine's speed drifts.

Prints a table and writes ``results/startup_cpu.json`` (``startup_gpu.json``) and a Markdown file
beside it; ``--label`` adds rows to those that are there.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

HERE = Path(__file__).resolve().parent
PROMPT = "The capital of France is"
PARTS = {
    "imports": "imports",
    "weights": "weights",
    "engine": "engine",
    "first_token": "first token",
    "first_burst": "first burst",
    "total": "total",
    "processor": "processor",
}
COMMAND = ("wall", "user", "system", "processor")
MODELS = {"default": "SmolLM2", "8b": "8B, random", "8b-read": "8B, read"}
EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "compiling or loading",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    geometry: Literal["default", "8b", "8b-read"] = "default"
    """The default model from its file, or Llama-3-8B's shapes with random weights that are made, or
    read from a checkpoint."""
    attention: Literal["dense", "lserve"] = "dense"
    rows: tuple[int, ...] = (1, 32)
    """Slots, of which all decode in the first burst."""
    warmup: Literal["none", "auto", "full"] = "none"
    """What is compiled before the engine is ready: the column "engine" has its seconds."""
    runs: int = 5
    """Second starts of each kind; the table has their medians."""
    label: str = "now"
    """Names the build that is measured; rows of other labels stay in the file."""
    beside: Path | None = None
    """Another checkout, whose command line runs in turn with this one's."""
    other_label: str = "before"
    """Names the build there."""


class Spans:
    """Seconds of what JAX reports, by kind; what lies within another of its kind counts once."""

    def __init__(self) -> None:
        import jax.monitoring

        self._spans: dict[str, list[tuple[float, float]]] = {name: [] for name in EVENTS.values()}
        jax.monitoring.register_event_time_span_listener(self._listen)

    def _listen(self, event: str, start_time: float, end_time: float, **kwargs: Any) -> None:
        if event in EVENTS:
            self._spans[EVENTS[event]].append((start_time, end_time))

    def seconds(self) -> dict[str, float]:
        result = {}
        for kind, spans in self._spans.items():
            total, reached = 0.0, 0.0
            for start, end in sorted(spans):
                total += max(end - max(start, reached), 0.0)
                reached = max(reached, end)
            result[kind] = total
        return result


def options_default(args: Args, rows: int) -> dict[str, Any]:
    return {"attention": args.attention, "max_num_seqs": rows, "max_prefixes": 0}


def options_8b(args: Args, rows: int) -> dict[str, Any]:
    import llama_8b

    sparsity = llama_8b.LSERVE if args.attention == "lserve" else None
    options = llama_8b.options(sparsity, max_num_seqs=rows, max_prefixes=0, max_model_len=16384)
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}


def write_8b(directory: str) -> None:
    import llama_8b

    import convert

    convert.export_hf(directory, llama_8b.CONFIG, llama_8b.random_params())


def child(args: Args, rows: int, model: str, began: float) -> dict[str, float]:
    """One start in this process, which began at ``began`` (``time.monotonic``): its seconds."""
    parts: dict[str, float] = {}
    last = began

    def done(part: str) -> None:
        nonlocal last
        now = time.monotonic()
        parts[part], last = now - last, now

    import lserve_jax.generate  # noqa: F401  what the command line imports
    from lserve_jax import LLM, SamplingParams
    from lserve_jax.cli import keep_compiled

    done("imports")
    spans = Spans()
    how = {"compilation_cache": keep_compiled(True), "warmup": args.warmup}
    prompts: Any = [{"prompt_token_ids": list(range(1, 65))}] * rows
    if args.geometry == "8b":
        import jax
        import llama_8b

        params = jax.block_until_ready(llama_8b.random_params())
        done("weights")
        llm = LLM((llama_8b.CONFIG, params), **options_8b(args, rows) | how)
    else:
        import convert

        load, seconds = convert.load, []

        def timed(*given: Any, **named: Any) -> Any:
            start = time.monotonic()
            result = load(*given, **named)
            seconds.append(time.monotonic() - start)
            return result

        convert.load = timed
        if args.geometry == "default":
            options = options_default(args, rows)
            prompts = [PROMPT] * rows
        else:
            options = options_8b(args, rows)
        llm = LLM(model, **options | how)
        parts["weights"] = seconds[0]
        last += seconds[0]
    done("engine")
    sampling = SamplingParams(temperature=0, max_tokens=llm.engine.burst_steps + 1, ignore_eos=True)
    [first] = llm.generate(prompts[:1], sampling)
    parts["first_token"] = first.metrics.first_token_seconds
    last += parts["first_token"]
    if rows > 1:
        llm.generate(prompts, sampling)
    done("first_burst")
    parts["total"] = last - began
    parts["processor"] = time.process_time()
    return {**parts, **spans.seconds()}


def empty_cache(directory: str, geometry: str) -> Path:
    """A cache directory for starts that has nothing but the default model's file, if they read it.

    That lies in this user's own cache, where it is fetched to.
    """
    from convert.artefacts import SMOLLM2_135M_INSTRUCT, fetch

    cache = Path(directory)
    (cache / "lserve-jax").mkdir()
    if geometry == "default":
        file = fetch(SMOLLM2_135M_INSTRUCT)
        (cache / "lserve-jax" / file.name).symlink_to(file)
    return cache


def environment(cache: Path) -> dict[str, str]:
    """That of a start, whatever this process changed of its own."""
    kept = {k: v for k, v in os.environ.items() if k != "XLA_PYTHON_CLIENT_PREALLOCATE"}
    return {**kept, "XDG_CACHE_HOME": str(cache)}


def start(args: Args, rows: int, cache: Path, model: str) -> dict[str, float]:
    """One start in a process of its own."""
    given = json.dumps({**dataclasses.asdict(args), "rows": [rows], "beside": None})
    command = [sys.executable, __file__, "--child", given, model, str(time.monotonic())]
    done = subprocess.run(
        command,
        env=environment(cache),
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def command_line(cache: Path, checkout: Path) -> dict[str, float]:
    """``lserve_jax.generate`` for one token, from outside: seconds passed, and of the processor."""
    command = [sys.executable, "-m", "lserve_jax.generate", "--prompt", PROMPT, "--max-tokens", "1"]
    began = time.monotonic()
    process = subprocess.Popen(
        command, env=environment(cache), cwd=checkout, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, status
    wall = time.monotonic() - began
    processor = usage.ru_utime + usage.ru_stime
    return {
        "wall": wall,
        "user": usage.ru_utime,
        "system": usage.ru_stime,
        "processor": processor,
    }


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(row[name] for row in rows), 3) for name in rows[0]}


def measure(args: Args) -> list[dict[str, Any]]:
    measured: list[dict[str, Any]] = []
    about = {"geometry": args.geometry, "attention": args.attention, "warmup": args.warmup}

    def add(what: str, rows: int, which: str, seconds: dict[str, float], label: str) -> None:
        row = {"label": label, **about, "what": what, "rows": rows, "start": which}
        row["seconds"] = seconds
        measured.append(row)
        print(json.dumps(row), flush=True)

    with tempfile.TemporaryDirectory() as models:
        model = "smollm2-135m-instruct"
        if args.geometry == "8b-read":
            model = str(Path(models) / "8b")
            # In a process of its own, which leaves the device's memory to the others.
            subprocess.run([sys.executable, __file__, "--write", model], check=True)
        for rows in args.rows:
            with tempfile.TemporaryDirectory() as directory:
                cache = empty_cache(directory, args.geometry)
                add("parts", rows, "cold", medians([start(args, rows, cache, model)]), args.label)
                again = [start(args, rows, cache, model) for _ in range(args.runs)]
                add("parts", rows, "second", medians(again), args.label)
    if args.geometry == "default" and args.attention == "dense":
        checkouts = {args.label: HERE.parent}
        if args.beside is not None:
            checkouts[args.other_label] = args.beside
        with contextlib.ExitStack() as stack:
            caches = {
                label: empty_cache(
                    stack.enter_context(tempfile.TemporaryDirectory()), args.geometry
                )
                for label in checkouts
            }
            for which, runs in (("cold", 1), ("second", args.runs)):
                found: dict[str, list[dict[str, float]]] = {label: [] for label in checkouts}
                for _ in range(runs):
                    for label, checkout in checkouts.items():
                        found[label].append(command_line(caches[label], checkout))
                for label, seconds in found.items():
                    add("command", 1, which, medians(seconds), label)
    return measured


def markdown(result: dict[str, Any]) -> str:
    from machine import about

    lines = [
        "Seconds, written by `benchmarks/startup.py`; medians where there were several starts."
    ]
    kinds = [*PARTS, *EVENTS.values()]
    columns = [
        "build",
        "model",
        "attention",
        "warm-up",
        "rows",
        "start",
        *PARTS.values(),
        *EVENTS.values(),
    ]
    lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in result["rows"]:
        if row["what"] != "parts":
            continue
        cells = [
            row["label"],
            MODELS[row["geometry"]],
            row["attention"],
            row["warmup"],
            str(row["rows"]),
        ]
        cells.append(row["start"])
        cells += [f"{row['seconds'][kind]:.2f}" if kind in row["seconds"] else "" for kind in kinds]
        lines.append(f"| {' | '.join(cells)} |")
    commands = [row for row in result["rows"] if row["what"] == "command"]
    if commands:
        lines += ["", "The command line, one token, the whole process:", ""]
        lines += ["| build | start | wall | user | system | processor |", "|---" * 6 + "|"]
        for row in commands:
            cells = [f"{row['seconds'][kind]:.2f}" for kind in COMMAND]
            lines.append(f"| {row['label']} | {row['start']} | {' | '.join(cells)} |")
    lines += ["", "Machines:", ""]
    lines += [f"* {label}: {about(machine)}" for label, machine in result["machines"].items()]
    return "\n".join(lines) + "\n"


def main(args: Args) -> None:
    # This process looks at the device, and must leave its memory to the others.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import jax
    from machine import provenance

    where = "cpu" if jax.default_backend() == "cpu" else "gpu"
    output = HERE / "results" / f"startup_{where}.json"
    result: dict[str, Any] = {"machines": {}, "rows": []}
    if output.exists():
        result = json.loads(output.read_text())
    machine = provenance()
    new = measure(args)

    def kind(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(row[x] for x in ("label", "geometry", "attention", "warmup", "what"))

    kinds = {kind(row) for row in new}
    kept = [row for row in result["rows"] if kind(row) not in kinds]
    result = {
        "machines": {**result["machines"], **{row["label"]: machine for row in new}},
        "rows": kept + new,
    }
    output.write_text(json.dumps(result, indent=1) + "\n")
    output.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        given = json.loads(sys.argv[2])
        [rows] = given["rows"]
        print(json.dumps(child(Args(**given), rows, sys.argv[3], float(sys.argv[4]))))
    elif sys.argv[1:2] == ["--write"]:
        write_8b(sys.argv[2])
    else:
        import tyro

        main(tyro.cli(Args))
