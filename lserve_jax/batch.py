"""Many prompts from a file to a file: ``--prompts-file`` and ``--output`` of ``generate.py``.

Both are JSON Lines (prompts also plain text, one a line). The output begins with a header and has a
record for each line of the prompts file, in the order in which they finish:

    {"lserve_jax": "0.1.0", "run": {"model": …, "prompts_sha256": …, "max_tokens": …, …}}
    {"index": 2, "id": "b", "text": …, "token_ids": …, "finish_reason": …, …}
    {"index": 1, "error": "the prompt is empty …"}

``index`` is the line's number, from 1. A run that was interrupted, at whatever byte, goes on where
its output ends; the header says which run an output belongs to.

The prompts file is read three times rather than held in memory: to check it before a model is
loaded, to check its prompts against the model and find what they share, and to run them.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from lserve_jax import __version__
from lserve_jax.llm import LLM, Message
from lserve_jax.outputs import CompletionOutput, RequestOutput
from lserve_jax.sampling_params import SamplingParams
from lserve_jax.stats import BatchTimes
from lserve_jax.text_engine import Prompt

PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")
SAMPLING_KEYS = (
    *("max_tokens", "temperature", "top_p", "top_k", "seed"),
    *("stop", "stop_token_ids", "skip_special_tokens"),
)


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """How what was given becomes what the model reads.

    chat: whether text goes through the chat template; None: if the model has one.
    system: system message of chats.
    shared_text: what all prompts begin with: the system message of a chat, otherwise text in front
        of the prompt's.
    """

    chat: bool | None
    system: str | None
    shared_text: str | None = None

    def __post_init__(self):
        if self.system is not None and self.shared_text is not None:
            raise ValueError("give one of --system and --shared-prefix-file: both begin the prompt")

    def apply(
        self, llm: LLM, prompt: Prompt | list[Message], tools: list[dict] | None = None
    ) -> Prompt:
        """The prompt of a text, of token ids (both returned as they are without chat) or of a chat.

        ``tools`` are what the template of a chat tells the model of.

        Raises ``ValueError`` where prompt, model and options contradict each other.
        """
        if isinstance(prompt, list):
            if self.chat is False:
                raise ValueError("messages are a chat, which --no-chat forbids")
            return self._chat(llm, prompt, tools)
        has_template = llm.tokenizer is not None and llm.tokenizer.has_chat_template
        is_text = isinstance(prompt, str)
        chat = has_template and is_text if self.chat is None else self.chat
        if chat:
            if not is_text:
                raise ValueError("--chat needs the prompt as text, got token ids")
            return self._chat(llm, [{"role": "user", "content": prompt}], tools)
        if self.system is not None:
            raise ValueError("--system needs a chat, but this prompt is continued as it is")
        if self.shared_text is None:
            return prompt
        if not is_text:
            raise ValueError("--shared-prefix-file needs the prompt as text, got token ids")
        return self.shared_text + prompt

    def _chat(self, llm: LLM, messages: list[Message], tools: list[dict] | None) -> Prompt:
        system = self.shared_text if self.system is None else self.system
        if system is None:
            return llm.chat_prompt(messages, tools=tools)
        if any(message.get("role") == "system" for message in messages):
            raise ValueError(
                "the messages have a system message of their own beside that of --system or "
                "--shared-prefix-file"
            )
        messages = [{"role": "system", "content": system}, *messages]
        return llm.chat_prompt(messages, tools=tools)


@dataclass(frozen=True, kw_only=True)
class PromptLine:
    """One line of a prompts file."""

    number: int  # from 1
    id: str | int | None  # the caller's own name for it
    prompt: Prompt | list[Message]
    tools: list[dict] | None = None  # of a chat
    sampling: SamplingParams


class PromptsFile:
    """A ``.txt`` file with a prompt a line, or a ``.jsonl`` file with an object a line; UTF-8.

    An object has one of ``prompt``, ``prompt_token_ids`` and ``messages`` (a chat, which may have
    ``tools``); optionally an ``id``, which is copied to the output; and any of ``SAMPLING_KEYS``,
    which go before ``sampling``.

    skip_bad_lines: collect lines that cannot be run in ``bad`` instead of raising.

    Raises ``ValueError`` if the file has another ending or no lines, and for the first bad line.
    """

    def __init__(self, path: Path, sampling: SamplingParams, *, skip_bad_lines: bool):
        if path.suffix not in (".txt", ".jsonl"):
            raise ValueError(f"prompts file {str(path)!r} must end in .txt or .jsonl")
        if not path.is_file():
            raise ValueError(f"prompts file {str(path)!r} does not exist")
        self.path, self.sampling, self.skip_bad_lines = path, sampling, skip_bad_lines
        self.bad: dict[int, str] = {}  # what is wrong with it, by line number
        digest, self.num_lines = hashlib.sha256(), 0
        for number, raw in self._raw_lines():
            digest.update(raw)
            self.num_lines = number
            try:
                self._parse(number, raw)
            except ValueError as error:
                self._refuse(number, error)
        self.sha256 = digest.hexdigest()
        if not self.num_lines:
            raise ValueError(f"prompts file {str(path)!r} is empty")

    def lines(self, *, without: Collection[int] = ()) -> Iterator[PromptLine]:
        """The lines that are not bad, one at a time."""
        for number, raw in self._raw_lines():
            if number not in self.bad and number not in without:
                yield self._parse(number, raw)

    def check(self, llm: LLM, prompt_format: PromptFormat, done: Collection[int]) -> None:
        """Finds the lines that ``llm`` cannot run."""
        for line in self.lines(without=done):
            try:
                prompt = prompt_format.apply(llm, line.prompt, line.tools)
                llm.check_request(prompt, line.sampling)
            except ValueError as error:
                self._refuse(line.number, error)

    def _raw_lines(self) -> Iterator[tuple[int, bytes]]:
        with self.path.open("rb") as file:
            yield from enumerate(file, start=1)

    def _refuse(self, number: int, error: ValueError) -> None:
        if not self.skip_bad_lines:
            raise ValueError(f"prompts file {str(self.path)!r}, line {number}: {error}") from None
        self.bad[number] = str(error)

    def _parse(self, number: int, raw: bytes) -> PromptLine:
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"it is not UTF-8: {error}") from None
        if not text.strip():
            raise ValueError("it is blank")
        if self.path.suffix == ".txt":
            return PromptLine(number=number, id=None, prompt=text, sampling=self.sampling)
        try:
            fields = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"it is not JSON: {error}") from None
        return self._line_of(number, fields)

    def _line_of(self, number: int, fields: object) -> PromptLine:
        if not isinstance(fields, dict):
            raise ValueError(f"it must be a JSON object, got {_brief(fields)}")
        unknown = fields.keys() - {"id", "tools", *PROMPT_KEYS, *SAMPLING_KEYS}
        if unknown:
            known = ", ".join(("id", "tools", *PROMPT_KEYS, *SAMPLING_KEYS))
            raise ValueError(f"unknown keys {sorted(unknown)}; known: {known}")
        given = [key for key in PROMPT_KEYS if key in fields]
        if len(given) != 1:
            raise ValueError(f"it needs exactly one of {', '.join(PROMPT_KEYS)}, got {given}")
        (key,) = given
        prompt, wanted = fields[key], str if key == "prompt" else list
        if not isinstance(prompt, wanted):
            kind = "a string" if wanted is str else "a list"
            raise ValueError(f"{key} must be {kind}, got {_brief(prompt)}")
        if key == "messages" and not all(isinstance(message, dict) for message in prompt):
            raise ValueError(f"messages must be a list of objects, got {_brief(prompt)}")
        if "tools" in fields and (key != "messages" or not isinstance(fields["tools"], list)):
            raise ValueError(
                f"tools must be a list of objects beside messages, got {_brief(fields['tools'])}"
            )
        name = fields.get("id")
        if not isinstance(name, str | int | None) or isinstance(name, bool):
            raise ValueError(f"id must be a string or an integer, got {_brief(name)}")
        overrides = {key: fields[key] for key in SAMPLING_KEYS if key in fields}
        stop = overrides.get("stop", "")
        if not isinstance(stop, str | list):
            raise ValueError(f"stop must be a string or a list of strings, got {_brief(stop)}")
        stop_ids = overrides.get("stop_token_ids", [])
        if not isinstance(stop_ids, list):
            raise ValueError(f"stop_token_ids must be a list, got {_brief(stop_ids)}")
        return PromptLine(
            number=number,
            id=name,
            prompt={key: prompt} if key == "prompt_token_ids" else prompt,
            tools=fields.get("tools"),
            sampling=dataclasses.replace(self.sampling, **overrides),
        )


class ResultsFile:
    """An output file: new, or begun by an earlier run with the same ``settings``.

    A context manager, since the file is locked while it is open. ``done`` holds the indices of the
    lines that it has; a line that was cut off in the middle is taken away.

    Raises ``ValueError`` for a file that is in use, not ours, or of another run, and for what is no
    regular file; it is left as is.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        if path.exists() and not path.is_file():  # a device may never end, a pipe never begin
            raise ValueError(
                f"output file {str(path)!r} must be new or a regular file: what it holds is read"
            )
        self.path = path
        header = {"lserve_jax": __version__, "run": settings}
        self._header = _json_line(header)
        self._settings = json.loads(self._header)["run"]  # with lists for tuples, as in a file
        self.done: set[int] = set()
        self._file = path.open("a+b")
        try:
            self._resume()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def append(self, index: int, record: Mapping[str, Any]) -> None:
        """Writes the record of a line, so that it survives this process."""
        header = b"" if self._file.tell() else self._header
        try:
            self._file.write(header + _json_line({"index": index, **record}))
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # closing tries to write the rest, once more
                self._file.close()
            raise OSError(f"output file {str(self.path)!r} cannot be written: {error}") from None
        self.done.add(index)

    def _resume(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"output file {str(self.path)!r} is in use by another run") from None
        self._file.seek(0)
        header = self._file.readline()
        if not header.endswith(b"\n") and self._header.startswith(header):
            self._file.truncate(0)  # new, or ended within the header
            self._file.seek(0)
            return
        self._check_settings(header)
        end = self._file.tell()
        for number, line in enumerate(self._file, start=2):
            if not line.endswith(b"\n"):
                break
            record = _loads(line)
            index = record.get("index") if isinstance(record, dict) else None
            if not isinstance(index, int) or index in self.done:
                raise ValueError(
                    f"output file {str(self.path)!r}, line {number}: not a result, or one that is "
                    f"there already (index {_brief(index)})"
                )
            self.done.add(index)
            end += len(line)
        self._file.truncate(end)
        self._file.seek(end)

    def _check_settings(self, header: bytes) -> None:
        found = _loads(header)
        theirs = found.get("run") if isinstance(found, dict) and "lserve_jax" in found else None
        if not isinstance(theirs, dict):
            raise ValueError(
                f"output file {str(self.path)!r} exists and is no output of this program"
            )
        ours = self._settings
        differences = [
            f"{name} is {_brief(theirs.get(name))} there and {_brief(ours.get(name))} here"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)
        ]
        if differences:
            raise ValueError(
                f"output file {str(self.path)!r} is of another run: {', '.join(differences)}"
            )


def run_batch(
    llm: LLM, prompts: PromptsFile, prompt_format: PromptFormat, results: ResultsFile
) -> BatchTimes:
    """Runs every line of ``prompts`` that ``results`` lacks, with a progress bar on stderr.

    What prompts begin with that others began with is computed once. Bad lines are reported, and
    recorded as errors; so are lines that fail while they run.

    Raises ``ValueError`` for a line that cannot be run, before any does, unless bad lines are
    skipped.
    """
    prompts.check(llm, prompt_format, results.done)
    drawn: dict[int, PromptLine] = {}  # lines in the engine, by position

    def requests() -> Iterator[tuple[Prompt, SamplingParams]]:
        for position, line in enumerate(prompts.lines(without=results.done)):
            drawn[position] = line
            yield prompt_format.apply(llm, line.prompt, line.tools), line.sampling

    for number, error in prompts.bad.items():
        if number not in results.done:
            print(f"line {number} is skipped: {error}", file=sys.stderr)
            results.append(number, {"error": error})
    times, tokens, start = BatchTimes(), 0, time.perf_counter()
    with tqdm(
        desc="generating", unit="prompt", total=prompts.num_lines, initial=len(results.done)
    ) as bar:
        for position, output in llm.stream(requests()):
            line = drawn.pop(position)
            if output.error is not None:
                tqdm.write(f"line {line.number} has failed: {output.error}", file=sys.stderr)
            results.append(line.number, _result(line, output))
            completion, metrics = output.outputs[0], output.metrics
            times.add(metrics)
            tokens += len(completion.token_ids)
            times.total = time.perf_counter() - start
            bar.set_postfix_str(f"{tokens / times.total:.1f} tokens/s", refresh=False)
            bar.update()
    return times


def completion_record(completion: CompletionOutput) -> dict[str, Any]:
    """A completion as one JSON object."""
    metrics = dataclasses.asdict(completion.metrics)
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": metrics["prompt_tokens"],
        "cached_tokens": metrics["prefix_tokens"],
        "generated_tokens": metrics["generated_tokens"],
        "timings": {name: value for name, value in metrics.items() if name.endswith("_seconds")},
    }


def _result(line: PromptLine, output: RequestOutput) -> dict[str, Any]:
    name = {} if line.id is None else {"id": line.id}
    if output.error is not None:
        return {**name, "error": output.error}
    return {**name, **completion_record(output.outputs[0])}


def _json_line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=False)
    return text.encode(errors="backslashreplace") + b"\n"  # half a surrogate pair: JSON's escape


def _loads(line: bytes) -> object:
    """The JSON value of a line; None if it is not JSON."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _brief(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
