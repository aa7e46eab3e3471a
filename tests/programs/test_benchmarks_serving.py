"""The figures of benchmarks/: metrics on timelines made by hand, break-even points, tables."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import report
import retrieval
import serving
from serving import Args, Timeline

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
    prefixes, prompts = serving.make_prompts(args, 1000)
    assert prefixes.shape == (3, 8)
    assert {len(prompt) for prompt in prompts} == {12}
    users = [sum((prompt[:8] == prefix).all() for prompt in prompts) for prefix in prefixes]
    assert sorted(users) == [3, 3, 4]
    assert len({tuple(prompt[8:]) for prompt in prompts}) == 10


def test_random_prompts_have_no_prefix():
    args = Args(workload="random", num_prompts=10, prefix_len=8, suffix_len=4)
    prefixes, prompts = serving.make_prompts(args, 1000)
    assert len(prefixes) == 0
    assert len({tuple(prompt[:8]) for prompt in prompts}) == 10
    assert {len(prompt) for prompt in prompts} == {12}


class SlowEngine:
    """Takes a second a step; hands out two tokens of the oldest request."""

    def __init__(self):
        self.now, self.left, self.added = 0.0, {}, {}

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def add_request(self, request_id, prompt, sampling, *, seed):
        self.left[request_id] = sampling.max_tokens
        self.added[request_id] = self.now

    def step(self):
        self.now += 1
        name = next(iter(self.left))
        self.left[name] -= 2
        done = self.left[name] == 0
        if done:
            del self.left[name]
        reason = "length" if done else None
        return [SimpleNamespace(request_id=name, token_ids=[0, 0], finish_reason=reason)]

    def sleep(self, seconds):
        self.now += seconds


def test_requests_are_added_when_their_time_has_come(monkeypatch):
    engine = SlowEngine()
    clock = SimpleNamespace(perf_counter=lambda: engine.now, sleep=engine.sleep)
    monkeypatch.setattr(serving, "time", clock)
    prompts = [np.zeros(3, np.int32)] * 3
    arrivals = np.array([0.5, 1.0, 9.0])
    lines = serving.serve(engine, prompts, arrivals, 4, title="test")
    # The second waits for the step that began before it; nobody runs from 4.5 to 9.
    assert engine.added == {"0": 0.5, "1": 1.5, "2": 9.0}
    assert [line.times for line in lines] == [[1.5, 2.5], [3.5, 4.5], [10.0, 11.0]]
    assert [line.tokens for line in lines] == [4, 4, 4]
    assert lines[1].ttft == 2.5  # from its own time, not from when it was added


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
