"""Text from the shell: ``python -m lserve_jax.generate --prompt "What is the capital of France?"``.

The text streams to stdout as it is made; progress bars, statistics and errors go to stderr. A
mistake of the caller's ends with one sentence and exit code 2.
"""

import json
import secrets
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro
from tyro.conf import DisallowNone, FlagCreatePairsOff, OmitArgPrefixes, UseAppendAction, arg

from convert.artefacts import cache_directory
from lserve_jax.config import SparsityConfig
from lserve_jax.llm import LLM, Prompt
from lserve_jax.outputs import CompletionOutput
from lserve_jax.sampling import SamplingParams
from lserve_jax.stats import CompileClock, summary


def _flag(metavar: str, otherwise: str) -> object:
    """How help shows a flag: what follows it, and what happens without it."""
    return arg(metavar=metavar, help_behavior_hint=f"(default: {otherwise})")


Switch = Annotated[FlagCreatePairsOff[bool], arg(help_behavior_hint="")]


# Help texts stay within two lines each: tyro breaks longer ones in odd places.
@dataclass(frozen=True, kw_only=True)
class GenerateArgs:
    """Generate text with a Llama-family model.

    Give the prompt with --prompt, --prompt-file or --prompt-token-ids. The first use of the
    default model downloads it (98 MB); later starts read it from the cache.
    """

    model: Annotated[str, _flag("MODEL", "smollm2-135m-instruct")] = "smollm2-135m-instruct"
    """smollm2-135m-instruct or smollm2-135m-instruct-32k (prompts of up to 32K tokens), a
    checkpoint directory, a .gguf file, or a Hugging Face id (owner/name)."""
    adapter: Annotated[str | None, _flag("DIR", "none")] = None
    """Directory of a PEFT LoRA adapter to merge into the weights."""

    prompt: Annotated[str | None, _flag("TEXT", "none")] = None
    """The prompt itself."""
    prompt_file: Annotated[str | None, _flag("FILE", "none")] = None
    """File that holds the prompt (UTF-8); - reads standard input."""
    prompt_token_ids: Annotated[tuple[int, ...] | None, _flag("ID ID ...", "none")] = None
    """The prompt as token ids, for a checkpoint that has no tokenizer."""
    chat: Annotated[bool | None, _flag("", "chat if the model has a template")] = None
    """Wrap the prompt in the model's chat template, or continue it as it is."""
    system: Annotated[str | None, _flag("TEXT", "the chat template's own")] = None
    """System message of the chat."""

    max_tokens: int = 256
    """Stop after so many new tokens."""
    temperature: float = 0.0
    """Randomness: 0 always takes the likeliest token, 1 samples from the model as it is."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together hold this share of the probability."""
    top_k: int = 0
    """Sample from so many likeliest tokens; 0 means all."""
    seed: Annotated[int | None, _flag("INT", "a new one each time")] = None
    """Same seed, same text."""
    stop: Annotated[UseAppendAction[tuple[str, ...]], _flag("TEXT", "none")] = ()
    """Stop before this text; may be given several times."""

    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        _flag("{float32,bfloat16}", "bfloat16 on a GPU, float32 on a CPU"),
    ] = None
    """Type of weights and arithmetic."""
    max_model_len: Annotated[int | None, _flag("INT", "what the model was trained for")] = None
    """Room for prompt and answer together, in tokens."""
    kv_cache_bytes: Annotated[int | None, _flag("INT", "2 GiB on a CPU, most of a GPU")] = None
    """Memory for the cached keys and values; long prompts need more."""
    kv_dtype: Literal["auto", "int8"] = "auto"
    """Storage of keys and values: as --dtype, or quantised to 8 bits a number."""
    attention: Literal["dense", "lserve"] = "dense"
    """dense reads the whole context at every token; lserve reads the parts that matter."""
    sparsity: OmitArgPrefixes[SparsityConfig] = field(default_factory=SparsityConfig)
    """Only with --attention lserve. Sizes are in tokens."""

    backend: Literal["auto", "mosaic", "reference"] = "auto"
    """mosaic: kernels for Hopper GPUs; reference: plain JAX; auto: the kernels where they run."""

    json: Switch = False
    """Print one JSON object (text, token_ids, finish_reason, timings) instead of the text."""
    stats: Switch = False
    """Print speed, compile time and memory to stderr at the end."""


def _read_prompt(args: GenerateArgs) -> Prompt:
    """The prompt, in the form that ``LLM.generate`` takes."""
    given = (args.prompt, args.prompt_file, args.prompt_token_ids)
    if sum(prompt is not None for prompt in given) != 1:
        raise ValueError("give exactly one of --prompt, --prompt-file and --prompt-token-ids")
    if args.prompt_token_ids is not None:
        return {"prompt_token_ids": args.prompt_token_ids}
    prompt = args.prompt
    if args.prompt_file == "-":
        prompt = sys.stdin.read()
    elif args.prompt_file is not None:
        try:
            prompt = Path(args.prompt_file).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ValueError(f"prompt file {args.prompt_file!r} does not exist") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"prompt file {args.prompt_file!r} is not UTF-8: {error}") from None
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
    )


def _load(args: GenerateArgs) -> LLM:
    sparsity_given = args.sparsity != SparsityConfig()
    if args.attention == "dense" and sparsity_given:
        raise ValueError("the options of lserve attention need --attention lserve")
    return LLM(
        args.model,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        kv_cache_bytes=args.kv_cache_bytes,
        max_num_seqs=1,
        attention=args.attention,
        sparsity=args.sparsity if args.attention == "lserve" else None,
        kv_dtype=args.kv_dtype,
        backend=args.backend,
        adapter=args.adapter,
        seed=secrets.randbits(31),  # of the request, unless --seed gives one
        progress=True,
    )


def _wants_chat(args: GenerateArgs, llm: LLM, prompt: Prompt) -> bool:
    has_template = llm.tokenizer is not None and llm.tokenizer.has_chat_template
    chat = has_template and isinstance(prompt, str) if args.chat is None else args.chat
    if chat and not isinstance(prompt, str):
        raise ValueError("--chat needs the prompt as text, got --prompt-token-ids")
    if args.system is not None and not chat:
        raise ValueError("--system needs a chat, but this prompt is continued as it is")
    return chat


def _run(args: GenerateArgs, llm: LLM, prompt: Prompt, params: SamplingParams) -> CompletionOutput:
    """Runs the request, streaming its text to stdout unless JSON is wanted."""

    def write(request: int, completion: int, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    on_text = None if args.json else write
    if _wants_chat(args, llm, prompt):
        assert isinstance(prompt, str)  # or _wants_chat would have refused
        system = [] if args.system is None else [{"role": "system", "content": args.system}]
        conversation = [*system, {"role": "user", "content": prompt}]
        return llm.chat(conversation, params, on_text=on_text)[0].outputs[0]
    return llm.generate(prompt, params, on_text=on_text)[0].outputs[0]


def _as_json(completion: CompletionOutput) -> str:
    metrics = asdict(completion.metrics)
    record = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": metrics["prompt_tokens"],
        "generated_tokens": metrics["generated_tokens"],
        "timings": {name: value for name, value in metrics.items() if name.endswith("_seconds")},
    }
    return json.dumps(record, ensure_ascii=False)


def _enable_compile_cache() -> None:
    """Keeps compiled code between starts, so that the second one is quick."""
    jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "jit"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _main(args: GenerateArgs) -> None:
    prompt, params = _read_prompt(args), _sampling_params(args)
    _enable_compile_cache()
    llm = _load(args)
    with CompileClock() as clock:
        completion = _run(args, llm, prompt, params)
    if args.json:
        print(_as_json(completion))
    elif llm.tokenizer is None:
        print(*completion.token_ids)
    else:
        print()  # the text is out already
    if args.stats:
        lines = summary(completion.metrics, llm.memory_plan(), clock, args.attention == "lserve")
        print(*lines, sep="\n", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (default: this process's); returns the exit code."""
    args = tyro.cli(
        GenerateArgs, args=argv, prog="python -m lserve_jax.generate", config=(DisallowNone,)
    )
    try:
        _main(args)
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # what shells report for Ctrl-C
    return 0


if __name__ == "__main__":
    sys.exit(main())
