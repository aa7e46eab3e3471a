"""The program: its options, its log, and its end."""

import concurrent.futures
import json
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from served import program, write_served_model

from lserve_jax.serve.__main__ import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return write_served_model(tmp_path_factory.mktemp("served") / "tiny")


def test_it_serves_logs_and_finishes_what_runs_at_its_end(checkpoint):
    argv = ("--model", checkpoint, "--kv-dtype", "int4")
    with program(*argv, env={"LSERVE_API_KEY": "sesame"}) as (process, url):
        key = {"Authorization": "Bearer sesame"}
        models = httpx.get(f"{url}/v1/models", headers=key, timeout=None).json()["data"]
        assert [model["id"] for model in models] == ["tiny"]  # not where it lies
        assert httpx.get(f"{url}/v1/models", timeout=None).status_code == 401
        body = {"prompt": "A secret", "max_tokens": 200, "ignore_eos": True, "stream": True}
        with httpx.stream(
            "POST", f"{url}/v1/completions", json=body, headers=key, timeout=None
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert "data: [DONE]" in list(lines)
        with pytest.raises(httpx.ConnectError):
            for _ in range(1000):  # it stops listening at once; the signal may not be heard yet
                httpx.get(f"{url}/health", timeout=None)
        log = process.stderr.read()
        process.wait()
    assert process.returncode in (0, -signal.SIGTERM)
    records = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    last = next(record for record in records if record["path"] == "/v1/completions")
    assert (last["status"], last["completion_tokens"], last["cached_tokens"]) == (200, 200, 0)
    assert "sesame" not in log and "secret" not in log
    assert "Traceback" not in log


def cut_off(url: str, ended: Callable[[], None]) -> tuple[httpx.Response, list[str]]:
    """A whole and a streamed answer that are not through when ``ended`` has been called.

    They are long enough to last until then on a machine that does other work too.
    """
    body = {"prompt": "A secret", "max_tokens": 100_000, "ignore_eos": True}
    path = f"{url}/v1/completions"
    with (
        concurrent.futures.ThreadPoolExecutor() as pool,
        httpx.stream("POST", path, json={**body, "stream": True}, timeout=None) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        whole = pool.submit(httpx.post, path, json={**body, "n": 3, "best_of": 3}, timeout=None)
        while 'lserve:num_requests_running{model_name="tiny"} 4' not in metrics(url):
            time.sleep(0.05)
        ended()
        rest = list(lines)
        return whole.result(), rest


def metrics(url: str) -> str:
    return httpx.get(f"{url}/metrics", timeout=None).text


@pytest.mark.parametrize("how", ["late", "second signal"])
def test_answers_that_are_cut_end_with_an_error(tmp_path, how):
    checkpoint = write_served_model(tmp_path / "tiny", length=1 << 17)
    seconds = "0" if how == "late" else "3600"
    with program("--model", checkpoint, "--shutdown-seconds", seconds) as (process, url):

        def end() -> None:
            process.send_signal(signal.SIGINT)
            # 2 requests, and that for the metrics where it is not put away yet.
            while "shutting down: " not in (line := process.stderr.readline()):
                assert line, "the server ended without a word"
            if how == "second signal":
                process.send_signal(signal.SIGINT)

        whole, stream = cut_off(url, end)
        log = process.stderr.read()
        process.wait()
    error = whole.json()["error"]
    assert (whole.status_code, error["code"]) == (503, "shutting_down")
    assert stream[-3] == "event: error" and '"shutting_down"' in stream[-2]
    assert "Traceback" not in log
    records = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    ended = [(r["status"], r["error"]) for r in records if "completions" in r["path"]]
    assert sorted(ended) == [(200, "shutting_down"), (503, "shutting_down")]


@pytest.fixture
def own_log() -> Iterator[None]:
    """Puts back what the program does to the log of its process."""
    handlers = logging.root.handlers[:]
    yield
    logging.root.handlers[:] = handlers


@pytest.mark.usefixtures("own_log")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--port", "70000"), "--port 70000"),
        (("--max-queue", "-1"), "--max-queue -1"),
        (("--deadline", "0"), "--deadline 0"),
        (("--api-key", ""), "--api-key"),
        (("--api-key", " spaced"), "must not begin or end with a space"),
        (("--model", "no-such-directory/x"), "no-such-directory"),
        (("--token-budget", "64"), "--attention lserve"),
    ],
)
def test_wrong_options_end_with_one_sentence(options, said, capsys):
    assert main(options) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.usefixtures("own_log")
def test_a_port_that_is_taken_is_said(checkpoint, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(("--model", checkpoint, "--port", port)) == 2
    assert port in capsys.readouterr().err
