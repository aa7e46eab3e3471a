"""GET /metrics: what requests add to it, and the dashboard that reads it."""

import contextlib
import itertools
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import MODEL, Served, serve, tiny_llm

DASHBOARD = Path(__file__).resolve().parents[2] / "docs" / "grafana" / "lserve.json"
CHAT = [{"role": "user", "content": "Hello, sea."}]
# vLLM's names, as its dashboards ask for them, and what kind each is.
VLLM = {
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "request_time_per_output_token_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "request_prefill_time_seconds": "histogram",
    "request_decode_time_seconds": "histogram",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "kv_cache_usage_perc": "gauge",
    "prefix_cache_queries": "counter",
    "prefix_cache_hits": "counter",
    "prompt_tokens": "counter",
    "generation_tokens": "counter",
    "num_preemptions": "counter",
    "request_success": "counter",
    "spec_decode_num_drafts": "counter",
    "spec_decode_num_draft_tokens": "counter",
    "spec_decode_num_accepted_tokens": "counter",
}


@pytest.fixture
def served() -> Iterator[Served]:
    with serve(tiny_llm(), max_queue=0) as served:
        yield served


def families(served: Served) -> dict:
    text = httpx.get(f"{served.url}/metrics", timeout=None).text
    return {family.name: family for family in text_string_to_metric_families(text)}


def samples(served: Served) -> dict[str, float]:
    """Values by name without the prefix; a reason, where there is one, behind a slash."""
    found = {}
    for family in families(served).values():
        for sample in family.samples:
            labels = dict(sample.labels)
            if family.name.startswith("lserve:"):
                assert labels.pop("model_name") == MODEL
            name = "/".join([sample.name.removeprefix("lserve:"), *labels.values()])
            found[name] = sample.value
    return found


def chat(client: openai.OpenAI, **more):
    """Of exactly ``max_tokens`` tokens."""
    return client.chat.completions.create(
        model=MODEL, messages=CHAT, extra_body={"ignore_eos": True}, **more
    )


@contextlib.contextmanager
def held_after(served: Served, steps: int) -> Iterator[None]:
    """In the block the engine waits when it has done so many steps."""
    text, gate, left = served.llm.text_engine, threading.Event(), itertools.count(steps, -1)
    step = text.step

    def held():
        if next(left) <= 0:
            gate.wait()
        return step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "step", held)
        try:
            yield
        finally:
            gate.set()


def test_names_are_those_of_vllm(served):
    found = families(served)
    assert {name: found[f"lserve:{name}"].type for name in VLLM} == VLLM


def test_buckets_are_those_of_vllm(served):
    found = samples(served)

    def bounds(name: str) -> list[str]:
        return [key.split("/")[1] for key in found if key.startswith(f"{name}_bucket/")]

    first = bounds("time_to_first_token_seconds")
    assert (len(first), first[0], first[-2]) == (23, "0.001", "2560.0")
    per_token = bounds("inter_token_latency_seconds")
    assert (len(per_token), per_token[0], per_token[-2]) == (20, "0.01", "80.0")
    whole = bounds("e2e_request_latency_seconds")
    assert (len(whole), whole[0], whole[-2]) == (22, "0.3", "7680.0")
    assert [float(bound) for bound in bounds("request_prompt_tokens")[:-1]] == [
        *(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_counted_once(served, client, stream):
    answer = chat(client, max_tokens=12, n=2, stream=stream)
    if stream:
        for _ in answer:
            pass
    found = samples(served)
    prompt = len(served.llm.chat_prompt(CHAT)["prompt_token_ids"])
    for name in VLLM:
        if VLLM[name] == "histogram" and name != "inter_token_latency_seconds":
            assert found[f"{name}_count"] == 2, name  # a completion each
    assert found["request_prompt_tokens_sum"] == 2 * prompt
    assert found["request_generation_tokens_sum"] == 24
    assert found["generation_tokens_total"] == 24
    assert found["prompt_tokens_total"] == 2 * prompt
    # 1 token of prefill, then bursts of 4, 4 and 3.
    assert found["inter_token_latency_seconds_count"] == 2 * 3
    assert found["request_success_total/length"] == 2
    assert found["request_success_total/stop"] == found["request_success_total/abort"] == 0
    ends = found["time_to_first_token_seconds_sum"] + found["request_decode_time_seconds_sum"]
    assert found["e2e_request_latency_seconds_sum"] == pytest.approx(ends)
    assert found["num_requests_running"] == found["num_requests_waiting"] == 0
    assert found["kv_cache_usage_perc"] == 0
    assert found["decode_steps_total"] == 22
    assert found["kv_read_bytes_total"] == found["dense_kv_read_bytes_total"] > 0
    assert found["compilations_total"] > 0


def test_a_request_whose_client_has_gone_is_an_abort(served, client):
    cancelled = threading.Event()
    cancel = served.llm.text_engine.cancel

    def seen(request_id: str) -> None:
        cancel(request_id)
        cancelled.set()

    served.llm.text_engine.cancel = seen
    with held_after(served, 3):
        stream = chat(client, max_tokens=900, stream=True)
        next(iter(stream))
        running = samples(served)  # while the engine's thread is busy
        assert running["num_requests_running"] == 1
        assert 0 < running["kv_cache_usage_perc"] < 1
        stream.close()
    cancelled.wait()
    found = samples(served)
    assert found["request_success_total/abort"] == 1
    assert found["request_success_total/length"] == found["request_prompt_tokens_count"] == 0
    assert found["num_requests_running"] == 0


def test_a_full_queue_is_counted(served, client):
    slots = served.llm.spec.max_num_seqs
    with held_after(served, 3):
        stream = chat(client, max_tokens=900, n=slots, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError):
            chat(client, max_tokens=1)
        stream.close()
    assert samples(served)["num_requests_refused_total"] == 1


def test_a_prefix_shows_in_hits_and_pages(served, client):
    prompt = served.llm.chat_prompt([{"role": "user", "content": "a" * 200}])["prompt_token_ids"]
    card = httpx.post(
        f"{served.url}/v1/prefixes", json={"prompt": prompt[:-80]}, timeout=None
    ).json()
    assert samples(served)["num_pages_pinned"] == card["pages"]
    client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "a" * 200}], max_tokens=1
    )
    found = samples(served)
    assert found["prefix_cache_hits_total"] == card["shared_tokens"]
    assert found["prefix_cache_queries_total"] == len(prompt)
    assert found["num_pages_free"] == found["num_pages"] - card["pages"]
    # What was computed behind the prefix is remembered.
    assert found["num_pages_cached"] == len(prompt) // served.llm.spec.page_size - card["pages"]
    page_bytes = served.llm.engine.units.page
    assert found["prefix_cache_device_bytes"] == found["num_pages_cached"] * page_bytes > 0
    assert found["prefix_cache_host_bytes"] == found["prefix_cache_evicted_pages_total"] == 0


def test_exact_mode_counts_its_drafts():
    llm = tiny_llm(attention="lserve", exact=True, draft="ngram")
    with serve(llm) as served, openai.OpenAI(base_url=f"{served.url}/v1", api_key="x") as client:
        chat(client, max_tokens=60)
        found = samples(served)
        assert found["spec_decode_num_drafts_total"] > 0
        drafted = found["spec_decode_num_draft_tokens_total"]
        assert 0 <= found["spec_decode_num_accepted_tokens_total"] <= drafted


def test_head_is_answered_without_a_body(served):
    answer = httpx.head(f"{served.url}/metrics", timeout=None)
    assert answer.status_code == 200
    assert answer.content == b""
    assert answer.headers["content-type"].startswith("text/plain")


def test_openmetrics_where_it_is_asked_for(served):
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    answer = httpx.get(f"{served.url}/metrics", headers=accept, timeout=None)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_two_apps_count_apart(client, served):
    chat(client, max_tokens=2)
    with serve(tiny_llm()) as other:
        assert samples(other)["generation_tokens_total"] == 0
    assert samples(served)["generation_tokens_total"] == 2


# The dashboard.


def test_the_dashboard_asks_for_metrics_that_exist(served, client):
    chat(client, max_tokens=2)
    exported = {name.split("/")[0] for name in samples(served)}
    dashboard = DASHBOARD.read_text()
    asked = set(re.findall(r"lserve:(\w+)", dashboard))
    assert len(asked) > 20
    assert asked <= exported, asked - exported


def test_the_dashboard_has_what_grafana_needs():
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["schemaVersion"] >= 36 and dashboard["title"] and dashboard["uid"]
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    used = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])
        }
        assert place["x"] + place["w"] <= 24 and not used & cells, panel["title"]
        used |= cells
        if panel["type"] == "row":
            continue
        assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        for target in panel["targets"]:
            names = set(re.findall(r"\$\{?(\w+)", target["expr"] + target["datasource"]["uid"]))
            assert names <= variables | {"__rate_interval"}
            for opening, closing in ("()", "{}", "[]"):
                assert target["expr"].count(opening) == target["expr"].count(closing)
