"""One evaluation: tasks, settings and lengths in, rows of results out."""

import contextlib
import dataclasses
import hashlib
import json
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any, Literal, get_args

import jax
from tqdm import tqdm

import convert
from convert.tokenizers import load_tokenizer
from lserve_jax.analysis import require_matplotlib
from lserve_jax.engine.head_policy import HeadPolicy, head_policy
from lserve_jax.engine.options import resolve_dtype
from lserve_jax.engine.scoring import Score
from lserve_jax.eval import report
from lserve_jax.eval.answers import answer
from lserve_jax.eval.language import Prediction, Window, make_windows, predict
from lserve_jax.eval.model import Model, SharedOptions, fit_context, read_params
from lserve_jax.eval.needle import NeedleKind, needle_puzzle
from lserve_jax.eval.prompts import Case, encode_text, make_cases, read_text
from lserve_jax.eval.ruler import WITHOUT_TEXT, RulerTask, ruler_puzzle
from lserve_jax.eval.settings import Setting, parse_settings, resolve_sparsity
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.params import Params
from lserve_jax.tokenizer import Text, Tokenizer

# Fields of a study that decide its prompts and windows, but for the seed.
_MATERIAL = (
    *("tasks", "lengths", "texts", "needles", "ruler_tasks", "haystacks", "depths", "windows"),
    *("scored_tokens", "chat", "rope_extend"),
)

Task = Literal["needle", "ruler", "perplexity", "agreement"]

# Room for a sequence is rounded up to this: studies of nearly the same lengths share compiled code.
_ROOM = 1024


@dataclass(frozen=True, kw_only=True)
class Study:
    """What to evaluate. Raises ``ValueError`` where that can be seen without the model."""

    model: str  # what ``convert.resolve`` takes; the name of a model that ``run_study`` is given
    tasks: Sequence[Task]
    compare: Sequence[str]  # settings, the first of which is the reference of the others
    lengths: Sequence[int]  # tokens of a prompt, or of a window of text
    # Where haystacks and windows are taken from: names of texts, or files; or a name for each text,
    # which is a string or token ids.
    texts: Sequence[str] | Mapping[str, Text] = ("documentation",)
    needles: Sequence[NeedleKind] = get_args(NeedleKind)
    ruler_tasks: Sequence[RulerTask] = get_args(RulerTask)
    haystacks: int = 2  # a text, task and length
    depths: int = 8  # needles of a haystack of task needle, each asked for by itself
    windows: int = 4  # a text and length
    scored_tokens: int = 256  # of a window
    chat: bool | None = None  # None: through the chat template if there is one
    rope_extend: bool = False
    seed: int = 0
    output: Path | None = None  # a directory; None: nothing is written
    plot: bool = False  # write pictures too
    resume: bool = False  # keep what an earlier run of the same study left in ``output``
    command: str = ""  # for the record: how it was called
    options: SharedOptions = field(default_factory=SharedOptions)

    def __post_init__(self):
        for name in ("tasks", "lengths", "texts", "needles", "ruler_tasks"):
            given = getattr(self, name)
            if not given or len(set(given)) != len(given):
                raise ValueError(f"{name}={given} must name at least one, and none twice")
        for task in self.tasks:
            if task not in get_args(Task):
                raise ValueError(f"task {task!r} is unknown; known: {', '.join(get_args(Task))}")
        for name in ("haystacks", "windows", "scored_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if min(self.lengths) < 1:
            raise ValueError(f"lengths={self.lengths} must be positive")
        parse_settings(self.compare)
        if "agreement" in self.tasks and len(self.compare) < 2:
            raise ValueError("task agreement compares settings: give at least two")
        if self.resume and "agreement" in self.tasks:
            raise ValueError("task agreement cannot be resumed: distributions are not stored")
        for name in ("plot", "resume"):
            if getattr(self, name) and self.output is None:
                raise ValueError(f"{name}=True needs an output directory")
        if self.plot:
            require_matplotlib()


def run_study(
    study: Study,
    *,
    model: tuple[ModelConfig, Params, Tokenizer] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Runs every setting on the same prompts and windows; writes results after each.

    Returns what ``results.json`` holds. Its tables are ``"answers"``, a row a prompt and setting,
    and ``"predictions"``, a row a window and setting with lists over tokens:
    ``pandas.DataFrame(result["answers"])``. ``report.figures`` draws them.

    model: one that is loaded, in place of ``study.model``.

    Raises ``ValueError`` and ``NotImplementedError`` before anything is generated.
    """
    if model is None:
        source = convert.resolve(study.model, progress=progress)
        tokenizer = load_tokenizer(source.path, required=True)
        prepared = _prepare(study, convert.read_config(source), tokenizer)
        params = read_params(source, study.options, progress=progress)
    else:
        config, params, tokenizer = model
        prepared = _prepare(study, config, tokenizer)
    loaded = Model(config=prepared.config, params=params, tokenizer=tokenizer)
    cases, windows, result = prepared.cases, prepared.windows, prepared.result
    reference: list[Score] | None = None
    with _directory(study) as directory:
        for setting in prepared.settings:
            if setting.name in result["seconds"]:
                continue
            started = time.perf_counter()
            sparsity = resolve_sparsity(setting, directory / "patterns", study.seed)
            llm = loaded.engine(sparsity, prepared.room, study.options, **setting.options)
            number = len(cases) + len(windows)
            with tqdm(total=number, desc=setting.name, unit="prompt", disable=not progress) as bar:
                result["answers"] += answer(llm, setting.name, cases, progress=bar.update)
                if windows:
                    predictions, reference = predict(
                        llm,
                        windows,
                        reference,
                        agreement="agreement" in study.tasks,
                        progress=bar.update,
                    )
                    result["predictions"] += [
                        _prediction_row(setting, window, new)
                        for window, new in zip(windows, predictions, strict=True)
                    ]
            result["seconds"][setting.name] = round(time.perf_counter() - started, 1)
            del llm  # its cache makes room for the next one's
            if study.output is not None:
                report.write(study.output, result, plots=study.plot)
    return result


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """What a study runs, known before the weights are."""

    settings: list[Setting]
    cases: list[Case]
    windows: list[Window]
    config: ModelConfig  # stretched, if it had to be
    room: int  # tokens of a sequence
    result: dict[str, Any]  # without rows, or with those of an earlier run


def _prepare(study: Study, config: ModelConfig, tokenizer: Tokenizer) -> _Prepared:
    settings = parse_settings(study.compare)
    cases, windows = make_material(study, tokenizer)
    longest = max(
        *(len(case.token_ids) + case.max_tokens for case in cases),
        *(len(window.token_ids) for window in windows),
        0,
    )
    # Whatever does not fit the model is said now.
    policies = {setting.name: head_policy(config, setting.sparsity) for setting in settings}
    result = _head(study, settings, policies, _digest([*cases, *windows]))
    earlier = None if study.output is None else _earlier(study.output, result)
    if study.resume and earlier is not None:
        for name in ("seconds", "answers", "predictions"):
            result[name] = earlier[name]
    config = fit_context(config, longest, rope_extend=study.rope_extend)
    return _Prepared(
        settings=settings,
        cases=cases,
        windows=windows,
        config=config,
        room=min(-(-longest // _ROOM) * _ROOM, config.context_length),
        result=result,
    )


@contextlib.contextmanager
def _directory(study: Study) -> Iterator[Path]:
    """Where gates of controls are written: the output directory, or one that ends with the run."""
    if study.output is not None:
        yield study.output
        return
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def _prediction_row(setting: Setting, window: Window, new: Prediction) -> dict[str, Any]:
    return {
        "setting": setting.name,
        "source": window.source,
        "window": window.window,
        "length": window.length,
        "logprobs": new.logprobs.round(5).astype(float).tolist(),
        "divergence": None if new.divergence is None else new.divergence.round(7).tolist(),
        "same_token": None if new.same_token is None else new.same_token.tolist(),
    }


def make_material(study: Study, tokenizer: Tokenizer) -> tuple[list[Case], list[Window]]:
    """Every prompt and window of a study. The same seed gives the same ones.

    Raises ``ValueError`` for a text that is too short, a length that is too small for a task and a
    chat template that is missing.
    """
    chat = tokenizer.has_chat_template if study.chat is None else study.chat
    if chat and not tokenizer.has_chat_template:
        raise ValueError("--chat needs a chat template, the checkpoint has none")
    cases, windows = [], []
    for source in study.texts:
        least = max(study.lengths)
        if isinstance(study.texts, Mapping):
            text_ids = encode_text(tokenizer, source, study.texts[source], least)
        else:
            text_ids = read_text(tokenizer, source, least, seed=study.seed)
        cases += _make_prompts(study, tokenizer, source, text_ids, chat)
        if {"perplexity", "agreement"} & set(study.tasks):
            windows += make_windows(
                tokenizer,
                text_ids,
                source=source,
                lengths=study.lengths,
                windows=study.windows,
                scored=study.scored_tokens,
            )
    return cases, windows


def _make_prompts(
    study: Study, tokenizer: Tokenizer, source: str, text_ids: Sequence[int], chat: bool
) -> list[Case]:
    """The prompts of one text. The first one has those that hold no text too."""
    kinds: list[tuple[str, Any]] = []
    if "needle" in study.tasks:
        kinds += [("needle", kind) for kind in study.needles]
    if "ruler" in study.tasks:
        kinds += [("ruler", task) for task in study.ruler_tasks]
    if source != next(iter(study.texts)):
        kinds = [(family, kind) for family, kind in kinds if kind not in WITHOUT_TEXT]
    cases = []
    for family, kind in kinds:
        for length in study.lengths:
            for haystack in range(study.haystacks):
                # A stream of its own: so more haystacks, another task or text change no prompt.
                rng = random.Random(f"{study.seed} {kind} {length} {haystack}")
                if family == "needle":
                    puzzle = needle_puzzle(kind, tokenizer, text_ids, depths=study.depths, rng=rng)
                else:
                    puzzle = ruler_puzzle(kind, tokenizer, text_ids, rng=rng)
                cases += make_cases(
                    tokenizer,
                    puzzle,
                    source="none" if kind in WITHOUT_TEXT else source,
                    length=length,
                    haystack=haystack,
                    chat=chat,
                )
    return cases


def _head(
    study: Study, settings: Sequence[Setting], policies: Mapping[str, HeadPolicy], prompts: str
) -> dict[str, Any]:
    return {
        "model": study.model,
        "command": study.command,
        "date": date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "versions": {
            "python": python_version(),
            **{name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        },
        "dtype": str(resolve_dtype(study.options.dtype).dtype),
        "weights": _weights(study.options),
        # None as in results of before it was kept: as ``dtype``.
        "kv_dtype": None if study.options.kv_dtype == "auto" else study.options.kv_dtype,
        "seed": study.seed,
        "study": {name: getattr(study, name) for name in _MATERIAL} | {"texts": list(study.texts)},
        "prompts": prompts,
        "settings": {setting.name: _described(setting) for setting in settings},
        # Gates and head shares come from files, which may be calibrated anew under the same name.
        "heads": {
            name: {"policy": policy.source, "digest": _digest_text(repr(policy))}
            for name, policy in policies.items()
        },
        "seconds": {},
        "answers": [],
        "predictions": [],
    }


def _digest(material: Sequence[Case | Window]) -> str:
    """Of all tokens: texts come from files and from Python itself, and may change unseen."""
    return _digest_text(json.dumps([item.token_ids for item in material]))


def _digest_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _earlier(directory: Path, result: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier run of the same study left in ``directory``; None if there was none.

    Raises ``ValueError`` if it was another study: its results would be lost.
    """
    before = report.read(directory)
    if before is None:
        return None
    for name in (
        *("model", "device", "dtype", "weights", "kv_dtype", "seed", "study", "settings"),
        *("heads", "prompts"),
    ):
        # As JSON, where a tuple is a list.
        old, new = before.get(name), json.loads(json.dumps(result[name]))
        if old != new:
            raise ValueError(
                f"{directory} holds the results of another study: its {name} is {old}, now it is "
                f"{new}; give another output directory"
            )
    return before


def _weights(options: SharedOptions) -> str | None:
    """What became of the weights; None: they are floats, or as the checkpoint's own format says."""
    if options.weights == "int4":
        return f"int4 in groups of {options.weight_group}"
    return options.weights


def _described(setting: Setting) -> Mapping[str, Any] | None:
    described = {}
    if setting.sparsity is not None:
        described = {**dataclasses.asdict(setting.sparsity), "control": setting.control}
    elif setting.exact is None:
        return None
    if setting.prefill_dtype is not None:
        described["prefill_dtype"] = setting.prefill_dtype
    if setting.exact is not None:
        described["exact"] = setting.exact
    return described
