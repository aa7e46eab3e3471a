"""The figures of benchmarks/: metrics on timelines made by hand, break-even points, tables."""

import asyncio
import json
import math
import os
import time
from collections.abc import Iterator

import http_load
import httpx
import numpy as np
import pytest
import report
import retrieval
import serving
from http_load import Timeline
from served import Served, byte_tokenizer, serve, tiny_llm
from serving import Args
from tiny_checkpoints import LLAMA, random_tensors, write_hf

from lserve_jax import SamplingParams
from lserve_jax.serve.service import outputs

LIMITS = {"ttft": 0.5, "tpot": 0.055}


def timelines() -> list[Timeline]:
    """First tokens after 0.25, 0.75 and 0.5 s; 50, 25 and 0 ms a token after them."""
    return [
        Timeline(arrival=1.0, times=[1.25, 1.65, 2.05], tokens=17),
        Timeline(arrival=2.0, times=[2.75, 3.0], tokens=11),
        Timeline(arrival=3.0, times=[3.5], tokens=1),
    ]


def test_latencies_of_a_request():
    first, second, single = timelines()
    assert first.ttft == 0.25
    assert first.e2el == pytest.approx(1.05)
    assert first.tpot == pytest.approx(0.05)
    assert first.itl == pytest.approx([0.4, 0.4])
    assert second.tpot == pytest.approx(0.025)
    assert (single.tpot, single.itl, single.e2el) == (0.0, [], 0.5)


def test_summary_of_a_run():
    result = serving.summary(timelines(), 71, LIMITS)
    assert result["duration"] == 3.5  # from the beginning, not from the first arrival
    assert result["requests_per_second"] == pytest.approx(3 / 3.5)
    assert result["output_tokens_per_second"] == pytest.approx(29 / 3.5)
    assert result["total_tokens_per_second"] == pytest.approx(100 / 3.5)
    assert result["goodput"] == pytest.approx(2 / 3.5)  # the second's first token is late
    assert result["ttft"]["mean"] == pytest.approx(500)
    assert result["ttft"]["median"] == pytest.approx(500)
    assert result["ttft"]["p90"] == pytest.approx(700)  # 500 + 0.8 * 250: linear between the two
    assert result["tpot"]["mean"] == pytest.approx(37.5)  # a single token has none
    assert result["itl"]["median"] == pytest.approx(400)
    assert result["itl"]["p99"] == pytest.approx(400)


def test_goodput_needs_every_limit():
    def good(**limits: float) -> float:
        return serving.summary(timelines(), 0, limits)["goodput"] * 3.5

    assert good(ttft=0.5) == pytest.approx(2)
    assert good(tpot=0.03) == pytest.approx(2)  # a single token meets it
    assert good(ttft=0.5, tpot=0.03) == pytest.approx(1)
    assert good(ttft=0.5, tpot=0.06, e2el=0.6) == pytest.approx(1)
    assert serving.summary(timelines(), 0, {})["goodput"] is None


def test_limits_are_read_in_milliseconds():
    assert serving.parse_limits(["ttft:500", "tpot:55"]) == LIMITS
    assert serving.parse_limits([]) == {}
    for wrong in ("ttft", "ttft:fast", "speed:3", "tpot:0"):
        with pytest.raises(ValueError, match=wrong):
            serving.parse_limits([wrong])


def test_arrivals_come_at_the_rate():
    arrivals = serving.arrival_times(4.0, 4000, seed=0)
    assert (np.diff(arrivals) >= 0).all()
    # The mean gap of n exponential ones has a standard deviation of 1 / n**0.5 of itself: 1.6%.
    assert arrivals[-1] / 4000 == pytest.approx(0.25, rel=0.05)
    np.testing.assert_array_equal(arrivals, serving.arrival_times(4.0, 4000, seed=0))
    assert not serving.arrival_times(math.inf, 5, seed=0).any()


def test_prefix_repetition_shares_prefixes_evenly():
    args = Args(num_prompts=10, num_prefixes=3, prefix_len=8, suffix_len=4)
    prefixes, prompts = serving.make_prompts(args)
    assert prefixes.shape == (3, 8)
    assert {len(prompt) for prompt in prompts} == {12}
    users = [sum((prompt[:8] == prefix).all() for prompt in prompts) for prefix in prefixes]
    assert sorted(users) == [3, 3, 4]
    assert len({tuple(prompt[8:]) for prompt in prompts}) == 10


def test_random_prompts_have_no_prefix():
    args = Args(workload="random", num_prompts=10, prefix_len=8, suffix_len=4)
    prefixes, prompts = serving.make_prompts(args)
    assert len(prefixes) == 0
    assert len({tuple(prompt[:8]) for prompt in prompts}) == 10
    assert {len(prompt) for prompt in prompts} == {12}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve(tiny_llm(), api_keys=("sesame",)) as served:
        yield served


def test_streams_over_http_are_timed_from_when_they_were_to_come(served):
    args = Args(num_prompts=3, prefix_len=128, suffix_len=4, output_len=9, vocab_size=200)
    prefixes, prompts = serving.make_prompts(args)
    options = http_load.connection(served.url, "sesame")
    with httpx.Client(**options) as client, http_load.held_prefixes(client, prefixes):
        bodies = serving.completion_bodies(args, prompts)
        http_load.run_streams(options, bodies, [0.0, 0.0, 0.0], title="compiles")
        before = http_load.counters(client)
        lines = http_load.run_streams(options, bodies, [0.0, 0.0, 0.5], title="test")
        after = http_load.counters(client)
        assert len(client.get("/v1/prefixes").json()["data"]) == 2
    assert not httpx.get(f"{served.url}/v1/prefixes", headers=options["headers"]).json()["data"]
    # None is asked for before its time, and its chunks come one after the other.
    assert all(line.ttft > 0 and min([1, *line.itl]) >= 0 for line in lines)
    assert [line.tokens for line in lines] == [9, 9, 9]
    assert [line.cached_tokens for line in lines] == [128] * 3
    assert after["generation_tokens_total"] - before["generation_tokens_total"] == 27
    sampling = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]

    async def directly():
        async with await served.service.engine.submit([(p, sampling) for p in asked]) as stream:
            return await outputs(stream)

    assert [line.text for line in lines] == [o.outputs[0].text for o in asyncio.run(directly())]


def test_a_refused_request_ends_the_benchmark(served):
    options = http_load.connection(served.url, "sesame")
    with pytest.raises(RuntimeError, match=r"400.*max_tokens"):
        http_load.run_streams(options, [{"prompt": [1], "max_tokens": -1}], [0.0], title="test")
    with pytest.raises(RuntimeError, match="401"):
        http_load.run_streams(
            http_load.connection(served.url, None), [{"prompt": [1]}], [0.0], title="test"
        )


def test_a_server_that_does_not_start_is_told_with_what_it_said():
    with (
        pytest.raises(RuntimeError, match="--max-queue -1"),
        http_load.server(["--max-queue", "-1"]),
    ):
        pass


@pytest.mark.slow
def test_the_program_measures_a_server_of_its_own_and_llm_generate(tmp_path, capsys):
    tokenizer = byte_tokenizer()
    config = {**LLAMA, "vocab_size": tokenizer.vocab_size, "max_position_embeddings": 1024}
    model = write_hf(tmp_path / "tiny", config, random_tensors(config))
    tokenizer.save(model)
    serving.main(
        Args(
            model=str(model),
            num_prompts=4,
            prefix_len=64,
            suffix_len=4,
            output_len=8,
            vocab_size=200,
            max_num_seqs=2,
            request_rates=(20.0, math.inf),
            compare_offline=1,
            output=tmp_path / "serving.json",
        )
    )
    result = json.loads((tmp_path / "serving.json").read_text())
    assert [row["request_rate"] for row in result["rows"]] == [20.0, "inf"]
    assert all(row["prefix_share"] == pytest.approx(64 / 68) for row in result["rows"])
    assert result["offline"]["same_answers"] == 4
    assert result["offline"]["pairs"][0]["offline"]["tokens_per_second"] > 0
    assert "server / `LLM.generate`, tokens/s" in capsys.readouterr().out


def test_the_table_tells_how_the_server_stands_beside_llm_generate():
    def side(speed: float) -> dict[str, float]:
        return {"tokens_per_second": speed, "cpu": 1200 / speed}

    speeds = ((90.0, 100.0), (80.0, 100.0), (95.0, 95.0))
    pairs = [{"server": side(a), "offline": side(b)} for a, b in speeds]
    lines = report.offline_lines({"pairs": pairs, "same_answers": 7}, 8)
    assert "| server, tokens/s | 90.0 | 80.0 | 95.0 |" in lines
    assert "| `LLM.generate`, tokens/s | 100.0 | 95.0 | 100.0 |" in lines
    # Of the pairs' ratios, not of the medians.
    assert "| server / `LLM.generate`, tokens/s | 0.900 | 0.800 | 1.000 |" in lines
    assert "| server, seconds of CPU | 13.3 | 12.6 | 15.0 |" in lines
    assert "| server / `LLM.generate`, seconds of CPU | 1.111 | 1.000 | 1.250 |" in lines


def test_cpu_seconds_grow_with_work():
    before, own = http_load.cpu_seconds(os.getpid()), time.process_time()
    while time.process_time() < own + 0.2:
        pass
    used = http_load.cpu_seconds(os.getpid()) - before
    # A clock tick is 10 ms, at either end.
    assert used == pytest.approx(time.process_time() - own, abs=0.05)


def test_break_even():
    assert report.break_even({1: 0.5, 4: 1.2, 8: 1.5}) == 4
    assert report.break_even({8: 1.5, 1: 1.1, 4: 0.9}) == 8  # it must win from there on
    assert report.break_even({1: 2.0, 4: 3.0}) == 1
    assert report.break_even({1: 0.5, 4: 0.9}) is None
    assert report.break_even({}) is None


def engine_row(requests: int, relay: float, sharing: float) -> dict:
    def time(ms: float) -> dict:
        return {"ms": ms, "fastest": ms, "slowest": ms, "tokens_per_second": 1e3 * requests / ms}

    return {
        "attention": "dense",
        "prefix": 8192,
        "requests": requests,
        "auto": requests >= 4,
        "why": "test",
        "relay": time(relay),
        "sharing": time(sharing),
        "copies": None,
    }


def relay_result() -> dict:
    operator = [
        {"prefix": 8192, "requests": 1, "relay": 40.0, "sharing": 20.0, "copies": 21.0},
        {"prefix": 8192, "requests": 8, "relay": 50.0, "sharing": 100.0, "copies": None},
    ]
    cut_short = {**engine_row(128, 1.0, 1.0), "relay": None}
    return {
        **{"date": "today", "jax": "1", "gpu": "GPU", "driver": "2", "private": 256},
        "engine": [engine_row(8, 5.0, 10.0), engine_row(1, 5.0, 4.0), cut_short],
        "operator": operator,
    }


def test_relay_gains_are_of_both_levels_and_leave_out_what_was_not_measured():
    result = relay_result()
    assert report.relay_gains(result["engine"]) == {8192: {1: 0.8, 8: 2.0}}
    assert report.relay_gains(result["operator"]) == {8192: {1: 0.5, 8: 2.0}}


def test_relay_table_and_plot_tell_where_relay_wins_and_loses(tmp_path):
    report.write_relay(relay_result(), tmp_path / "relay.json")
    text = (tmp_path / "relay.md").read_text()
    assert "relay wins from 8 requests on, loses at 1 (0.80x)." in text
    assert "relay wins from 8 requests on, loses at 1 (0.50x)." in text
    assert "| 8192 | 8 | 1600 (5.00, 5.00-5.00) | 800 (10.00, 10.00-10.00) | - | 2.00x |" in text
    assert "| 8192 | 8 | 50.0 | 100.0 | - | 2.00x |" in text
    assert (tmp_path / "relay.png").stat().st_size > 1000


def test_serving_table_and_plot(tmp_path):
    row = serving.summary(timelines(), 71, LIMITS)
    row |= {"request_rate": "inf", "prefix_share": 0.5, "preemptions": 0, "compilations": 2}
    result = {
        **{"date": "today", "jax": "1", "cpu": "CPU", "load": "0.5", "dtype": "float32"},
        **{"model": "m", "attention": "dense", "workload": "prefix_repetition", "share": True},
        **{"num_prefixes": 2, "num_prompts": 3, "prefix_len": 8, "suffix_len": 4, "output_len": 4},
        **{"relay": "auto", "max_num_seqs": 2, "goodput": ("ttft:500",), "rows": [row]},
    }
    report.write_serving(result, tmp_path / "serving.json")
    text = (tmp_path / "serving.md").read_text()
    assert "| inf | 0.86 | 8.3 | 28.6 | 0.57 | 50% | 0 | 2 |" in text
    assert "| inf | ITL | 350.0 | 400.0 | 400.0 | 400.0 |" in text
    assert (tmp_path / "serving.png").stat().st_size > 1000


def test_throughput_table():
    result = {
        **{"date": "today", "jax": "1", "cpu": "CPU", "load": "0.5", "dtype": "float32"},
        **{"model": "m", "num_prompts": 4, "system_tokens": 8, "own_tokens": (1, 2)},
        **{"new_tokens": 3, "batch_size": 2, "versions": {"torch": "2"}},
        "rows": [{"system": "peer", "runs": [10.0, 40.0, 20.0], "same_answers": 3}],
    }
    assert "| peer | 20.0 | 10.0 | 40.0 | 3 of 4 |" in report.throughput_table(result)


def test_retrieval_scores_pages_as_its_committed_tables_did():
    dense, *sparse = retrieval.settings(retrieval.Args()).values()
    assert dense is None
    assert [setting.lower_bound_weight for setting in sparse] == [0.0, 0.0]
