"""Text from the shell: ``python -m lserve_jax.generate --prompt "What is the capital of France?"``.

The text streams to stdout as it is made; progress bars, statistics and errors go to stderr. A
mistake of the caller's ends with one sentence and exit code 2. Many prompts go from a file to a
file: see ``batch.py``.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends it, no traceback

import hashlib
import json
import secrets
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import DisallowNone, UseAppendAction

from lserve_jax.batch import (
    PromptFormat,
    PromptsFile,
    ResultsFile,
    completion_record,
    run_batch,
)
from lserve_jax.cli import (
    Switch,
    exit_code,
    flag,
    flush_stdout,
    read_stdin,
    read_text,
)
from lserve_jax.engine.head_policy import head_policy
from lserve_jax.engine.relay import RelayMode
from lserve_jax.llm import LLM
from lserve_jax.model_args import ModelArgs
from lserve_jax.outputs import CompletionOutput
from lserve_jax.sampling_params import SamplingParams
from lserve_jax.stats import (
    CompileClock,
    batch_summary,
    end_summary,
    memory_summary,
    program_summary,
    request_summary,
)
from lserve_jax.text_engine import Prompt


# Help texts stay within two lines each: tyro breaks longer ones in odd places.
@dataclass(frozen=True, kw_only=True)
class GenerateArgs(ModelArgs):
    """Generate text with a Llama-family model.

    Give the prompt with --prompt, --prompt-file or --prompt-token-ids, or many with
    --prompts-file and --output. The first use of the default model downloads it (98 MB); later
    starts read it from the cache.
    """

    prompt: Annotated[str | None, flag("TEXT", "none")] = None
    """The prompt itself."""
    prompt_file: Annotated[str | None, flag("FILE", "none")] = None
    """File that holds the prompt (UTF-8); - reads standard input."""
    prompt_token_ids: Annotated[tuple[int, ...] | None, flag("ID ID ...", "none")] = None
    """The prompt as token ids, for a checkpoint that has no tokenizer."""
    prompts_file: Annotated[Path | None, flag("FILE", "none")] = None
    """Many prompts: a .txt file with one a line, or a .jsonl file with an object a line that has
    "prompt", "prompt_token_ids" or "messages", and can have "id", "max_tokens", "stop", ..."""
    output: Annotated[Path | None, flag("FILE", "none")] = None
    """Where the answers to --prompts-file go, as JSON Lines in the order in which they finish.
    The same command again continues an interrupted run."""
    shared_prefix_file: Annotated[Path | None, flag("FILE", "none")] = None
    """Text that all of --prompts-file begin with: the system message of a chat, otherwise put in
    front of the prompt."""
    skip_bad_lines: Switch = False
    """Run the other lines of --prompts-file where some cannot be run."""
    chat: Annotated[bool | None, flag("", "chat if the model has a template")] = None
    """Wrap the prompt in the model's chat template, or continue it as it is."""
    system: Annotated[str | None, flag("TEXT", "the chat template's own")] = None
    """System message of the chat."""

    max_tokens: int = 256
    """Stop after so many new tokens."""
    temperature: float = 0.0
    """Randomness: 0 always takes the likeliest token, 1 samples from the model as it is."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together hold this share of the probability."""
    top_k: int = 0
    """Sample from so many likeliest tokens; 0 means all."""
    seed: Annotated[int | None, flag("INT", "a new one each time")] = None
    """Same seed, same text."""
    stop: Annotated[UseAppendAction[tuple[str, ...]], flag("TEXT", "none")] = ()
    """Stop before this text; may be given several times."""
    stop_token_ids: Annotated[tuple[int, ...], flag("ID ID ...", "none")] = ()
    """Stop at these tokens too, beside the model's own end tokens, which --stats names."""
    skip_special_tokens: Annotated[bool, flag("", "skip")] = True
    """Leave special tokens, such as <|im_end|>, out of the text, or show them."""

    max_num_seqs: int = 8
    """So many of --prompts-file run at the same time."""
    relay: RelayMode = "auto"
    """Whether prompts of --prompts-file that begin alike read that together; auto: where it
    pays."""

    json: Switch = False
    """Print one JSON object (text, token_ids, finish_reason, timings) instead of the text."""
    stats: Switch = False
    """Print speed, compile time and memory to stderr at the end."""


# A single prompt's, and those that do not change what a prompt is answered. An output file goes
# with the others.
_NOT_OF_A_RUN = (
    *("prompt", "prompt_file", "prompt_token_ids", "json", "stats"),
    *("prompts_file", "output", "shared_prefix_file", "skip_bad_lines"),
    *("max_num_seqs", "kv_cache_bytes", "cache", "warmup"),
)
# Options that are younger than some output files, whose headers lack them.
_ABSENT_AS_DEFAULT = (
    *("stop_token_ids", "skip_special_tokens", "prefix_cache", "host_cache_bytes"),
    *("exact", "draft", "draft_weights", "max_draft_tokens", "weight_group"),
)


def _read_prompt(args: GenerateArgs) -> Prompt:
    """The prompt, in the form that ``LLM.generate`` takes."""
    if args.prompt_token_ids is not None:
        return {"prompt_token_ids": args.prompt_token_ids}
    prompt = args.prompt
    if args.prompt_file == "-":
        prompt = read_stdin()
    elif args.prompt_file is not None:
        prompt = read_text(Path(args.prompt_file), "prompt file")
    if not prompt:
        raise ValueError("the prompt is empty: generation needs at least one token")
    return prompt


def _sampling_params(args: GenerateArgs) -> SamplingParams:
    return SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        stop=args.stop,
        stop_token_ids=args.stop_token_ids,
        skip_special_tokens=args.skip_special_tokens,
    )


def _load(args: GenerateArgs) -> LLM:
    many = args.prompts_file is not None
    return args.load(
        max_num_seqs=args.max_num_seqs if many else 1,
        max_prefixes=1 if many else 0,
        relay=args.relay,
        seed=secrets.randbits(31),  # of the request, unless --seed gives one
    )


def _run(args: GenerateArgs, llm: LLM, prompt: Prompt, params: SamplingParams) -> CompletionOutput:
    """Runs the request, streaming its text to stdout unless JSON is wanted."""

    def write(request: int, completion: int, text: str) -> None:
        sys.stdout.write(text)
        flush_stdout()

    prompt = PromptFormat(chat=args.chat, system=args.system).apply(llm, prompt)
    on_text = None if args.json else write
    return llm.generate(prompt, params, on_text=on_text)[0].outputs[0]


def _check_options(args: GenerateArgs) -> None:
    sources = (args.prompt, args.prompt_file, args.prompt_token_ids, args.prompts_file)
    if sum(source is not None for source in sources) != 1:
        raise ValueError(
            "give exactly one of --prompt, --prompt-file, --prompt-token-ids and --prompts-file"
        )
    of_batches = {
        "--output": args.output is not None,
        "--shared-prefix-file": args.shared_prefix_file is not None,
        "--skip-bad-lines": args.skip_bad_lines,
        "--max-num-seqs": args.max_num_seqs != GenerateArgs.max_num_seqs,
        "--relay": args.relay != GenerateArgs.relay,
    }
    if args.prompts_file is None:
        given = [option for option in of_batches if of_batches[option]]
        if given:
            raise ValueError(f"{', '.join(given)} needs --prompts-file")
    elif args.output is None:
        raise ValueError("--prompts-file needs --output, the file that the answers go to")
    elif args.json:
        raise ValueError("--json is for a single prompt: the --output of many is JSON Lines")


def _run_settings(
    args: GenerateArgs, prompts: PromptsFile, shared_text: str | None
) -> dict[str, Any]:
    """What decides the answers to a prompts file."""
    settings = {name: x for name, x in asdict(args).items() if name not in _NOT_OF_A_RUN}
    if args.attention == "dense":
        del settings["sparsity"]
    for name in _ABSENT_AS_DEFAULT:
        if settings[name] == getattr(GenerateArgs, name):
            del settings[name]
    shared = None if shared_text is None else hashlib.sha256(shared_text.encode()).hexdigest()
    return {**settings, "prompts_sha256": prompts.sha256, "shared_prefix_sha256": shared}


def _main_batch(args: GenerateArgs, prompts_file: Path, output: Path) -> None:
    shared_text = None
    if args.shared_prefix_file is not None:
        shared_text = read_text(args.shared_prefix_file, "shared prefix file")
    prompt_format = PromptFormat(chat=args.chat, system=args.system, shared_text=shared_text)
    prompts = PromptsFile(prompts_file, _sampling_params(args), skip_bad_lines=args.skip_bad_lines)
    with ResultsFile(output, _run_settings(args, prompts, shared_text)) as results:
        if len(results.done) == prompts.num_lines:
            print(f"{output} has all {prompts.num_lines} answers already", file=sys.stderr)
            return
        llm = _load(args)
        with CompileClock() as clock:
            times = run_batch(llm, prompts, prompt_format, results)
    if args.stats:
        _print_stats(llm, batch_summary(llm.engine.metrics(), times, clock))


def _print_stats(llm: LLM, lines: list[str]) -> None:
    lines += program_summary(llm.engine.runner.programs.times)
    lines += [end_summary(llm.engine.eos_token_ids, llm.tokenizer)]
    if llm.spec.sparsity is not None:
        policy = head_policy(llm.config, llm.spec.sparsity)
        lines += [f"heads     {policy.source}: {policy.counts}"]
    lines += memory_summary(llm.memory_plan(), llm.spec)
    print(*lines, sep="\n", file=sys.stderr)


def _main(args: GenerateArgs) -> None:
    _check_options(args)
    if args.prompts_file is not None and args.output is not None:
        _main_batch(args, args.prompts_file, args.output)
        return
    prompt, params = _read_prompt(args), _sampling_params(args)
    llm = _load(args)
    with CompileClock() as clock:
        completion = _run(args, llm, prompt, params)
    if args.json:
        print(json.dumps(completion_record(completion), ensure_ascii=False))
    elif llm.tokenizer is None:
        print(*completion.token_ids)
    else:
        print()  # the text is out already
    if args.stats:
        _print_stats(llm, request_summary(completion.metrics, clock, args.attention == "lserve"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (default: this process's); returns the exit code."""

    def run() -> None:
        prog = "python -m lserve_jax.generate"
        _main(tyro.cli(GenerateArgs, args=argv, prog=prog, config=(DisallowNone,)))

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
