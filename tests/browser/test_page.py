"""The page in Chromium, on a server in this process and on the program: ``tests/browser/run``.

The model's vocabulary is mostly HTML that would run a script, so that every answer tries to.
"""

import base64
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from lserve_cases import sizes
from served import Served, byte_tokenizer, program, serve, tiny_llm, write_served_model
from tiny_llm import write_pattern

from lserve_jax import SparsityConfig
from lserve_jax.tokenizer import Tokenizer

pytest.importorskip("selenium", reason="tests/browser/run installs it")

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

Driver = webdriver.Chrome
QUESTION = 'The sea <b onclick="x()">is</b> grey & "wide". ' * 6
TRAP = "<img src=x onerror=\"document.title='trapped'\">"


def trapping_tokenizer() -> Tokenizer:
    """Three of four tokens that a random model may write are HTML with a script."""
    tokenizer = byte_tokenizer()
    tokenizer.backend.add_tokens([f"{TRAP}{i} " for i in range(800)])
    return tokenizer


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    gates = write_pattern(tmp_path_factory.mktemp("p") / "p", [[0.1, 0.9], [0.9, 0.8]])
    sparsity = SparsityConfig(
        pattern=gates, streaming_fraction=0.25, **sizes(16, 16, 64, 4, (16, 32, 32, 64))
    )
    llm = tiny_llm(trapping_tokenizer(), layers=2, attention="lserve", sparsity=sparsity)
    with serve(llm) as served:
        yield served


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    options = webdriver.ChromeOptions()
    options.add_argument("--headless=new")
    options.add_argument("--no-sandbox")  # as root Chromium starts without it only
    options.add_argument("--disable-dev-shm-usage")
    options.add_argument("--window-size=1300,1000")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver: Driver, served: Served) -> Iterator[Driver]:
    """The page, opened anew; at the end nothing is wrong in its console, and nothing was fetched
    from elsewhere."""
    driver.get("about:blank")  # nothing more comes of the page before
    requested(driver)
    driver.get(served.url)
    yield driver
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert {url for url in requested(driver) if not url.startswith(served.url)} == set()


def requested(driver: Driver) -> list[str]:
    """The addresses that were asked for since the last call."""
    entries = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [
        entry["params"]["request"]["url"]
        for entry in entries
        if entry["method"] == "Network.requestWillBeSent"
    ]


def wait(driver: Driver, condition: Any) -> Any:
    """What ``condition`` returns, once that is true."""
    return WebDriverWait(driver, 120, poll_frequency=0.05).until(lambda _: condition())


def find(driver: Driver, selector: str) -> WebElement:
    return driver.find_element(By.CSS_SELECTOR, selector)


def find_all(driver: Driver, selector: str) -> list[WebElement]:
    return driver.find_elements(By.CSS_SELECTOR, selector)


def ask(driver: Driver, question: str = QUESTION, tokens: int = 24) -> None:
    field = find(driver, "#max-tokens")
    field.clear()
    field.send_keys(str(tokens))
    find(driver, "#question").send_keys(question, Keys.ENTER)


def asked(driver: Driver, **more: Any) -> list[WebElement]:
    """The tokens of an answer."""
    ask(driver, **more)
    return wait(driver, lambda: find_all(driver, ".token"))


def newest(served: Served) -> str:
    return next(reversed(served.service.reads._entries))


def reads_of(served: Served, path: str) -> dict[str, Any]:
    return httpx.get(f"{served.url}/v1/reads/{path}").json()


def is_read(told: dict[str, Any], row: int, page: int) -> bool:
    heads = len(told["read"][0])
    bits = base64.b64decode(told["read"][row // heads][row % heads])
    return bool(bits[page // 8] >> page % 8 & 1)


def test_text_streams_and_its_speed_is_told(page: Driver, served: Served, monkeypatch: Any) -> None:
    """The engine stops behind the first words until the page has shown them."""
    text, shown = served.service.engine.text, threading.Event()
    step = text.step

    def gated() -> list:
        deltas = step()
        if any(delta.finish_reason for delta in deltas):
            assert shown.wait(120)
        return deltas

    monkeypatch.setattr(text, "step", gated)
    ask(page)
    answer = wait(page, lambda: find_all(page, "#messages .body")[1:])[0]
    wait(page, lambda: answer.text)
    assert not find_all(page, ".token")  # it is not through
    assert find(page, "#stop").is_enabled() and not find(page, "#send").is_enabled()
    assert re.match(r"\d+\.\d\d s to the first token", find(page, "#speed").text)
    part = answer.get_property("textContent")
    shown.set()
    tokens = wait(page, lambda: find_all(page, ".token"))
    assert len(tokens) == 24
    made = reads_of(served, newest(served))["answer_tokens"]
    made = "".join(text for text in made if not text.startswith("<|im_"))  # left out of answers
    assert 0 < len(part) < len(made) and made.startswith(part)
    wait(page, lambda: "cut" in find(page, "#speed").text)
    said = r"[\d.]+ s to the first token [\d.]+ tokens/s \d+ tokens in 24 out cut at"
    assert re.match(said, find(page, "#speed").text)
    assert find(page, "#model").text == "tiny · up to 1,024 tokens"


def test_queue_and_pages_are_shown(page: Driver, served: Served, monkeypatch: Any) -> None:
    wait(page, lambda: find(page, "#running").text == "0")
    assert (find(page, "#waiting").text, find(page, "#pages").text) == ("0", "0.0 %")
    text, seen = served.service.engine.text, threading.Event()
    step = text.step

    def slow() -> list:
        seen.wait(0.2)  # so that it still runs when the page asks next
        return step()

    monkeypatch.setattr(text, "step", slow)
    ask(page, tokens=400)
    wait(page, lambda: find(page, "#running").text == "1")
    assert float(find(page, "#pages").text.removesuffix(" %")) > 0
    find(page, "#stop").click()
    seen.set()
    wait(page, lambda: find(page, "#running").text == "0")


def test_html_of_models_and_users_is_text(page: Driver, served: Served) -> None:
    tokens = asked(page)
    question, answer = find_all(page, "#messages .body")
    assert question.get_property("textContent") == QUESTION
    context = reads_of(served, newest(served))
    assert "".join(context["answer_tokens"]).count(TRAP) > 5
    assert answer.get_property("textContent") == "".join(
        text or "·" for text in context["answer_tokens"]
    )
    tokens[-1].click()
    wait(page, lambda: find(page, "#map").is_displayed())
    find(page, "#cells").send_keys(Keys.END)
    assert TRAP in find(page, "#page-text").get_property("textContent")
    assert not find_all(page, "main img") and not find_all(page, "main b")
    assert page.title == "lserve-jax"


def test_the_map_of_a_token_is_what_the_server_says(page: Driver, served: Served) -> None:
    """Every cell's colour and words; the text behind a page; shares of layers."""
    tokens = asked(page)
    completion_id = newest(served)
    context = reads_of(served, completion_id)
    for token in (0, 7, 23):
        tokens[token].click()
        told = reads_of(served, f"{completion_id}/{token}")
        percent = f" read {100 * told['share']:.1f} % of the context"
        wait(page, lambda percent=percent: percent in find(page, "#summary").text)
        size = f"of {told['context_tokens']} tokens, {told['num_pages']} pages of 16."
        assert size in find(page, "#summary").text
        assert tokens[token].get_attribute("aria-selected") == "true"
        cells = find(page, "#cells")
        width = int(cells.get_property("width")) / told["num_pages"]
        middles = [(row, 44 + 3 + 7 * row + 2 * (row // 2 + 1)) for row in range(4)]
        places = [
            (row, number, int((number + 0.5) * width), y)
            for row, y in middles
            for number in range(told["num_pages"])
        ]
        colours = page.execute_script(
            "const paint = arguments[0].getContext('2d');"
            "const colour = (x, y) => paint.getImageData(x, y, 1, 1).data.join();"
            "return arguments[1].map(([row, page, x, y]) => colour(x, y));",
            cells,
            places,
        )
        kinds = [kind for layer in context["head_kinds"] for kind in layer]
        by_meaning: dict[str, set[str]] = {}
        for (row, number, *_), colour in zip(places, colours, strict=True):
            meaning = kinds[row] if is_read(told, row, number) else "unread"
            by_meaning.setdefault(meaning, set()).add(colour)
        assert set(by_meaning) == {"ranked", "streaming", "unread"}
        assert [len(colour) for colour in by_meaning.values()] == [1, 1, 1]
        assert len(set.union(*by_meaning.values())) == 3
        if find(page, "#by-layer").get_attribute("open") is None:
            find(page, "#by-layer summary").click()
        shares = [row.text.split()[1] for row in find_all(page, "#shares tr")]
        assert shares == [f"{100 * share:.1f}" for share in told["layer_share"]]
    cells = find(page, "#cells")
    left, top = cells.size["width"] / 2, cells.size["height"] / 2  # offsets are from the middle
    for row, number, x, y in places[:: len(places) // 9]:
        ActionChains(page).move_to_element_with_offset(cells, x - left, y - top).perform()
        said = find(page, "#cell").text
        assert f"Layer {row // 2}, KV head {row % 2}, " in said
        assert f"Page {number}, tokens {16 * number} to " in said
        assert (": read. " if is_read(told, row, number) else ": not read. ") in said
        chosen = sum(is_read(told, r, number) for r in range(4) if kinds[r] == "ranked")
        assert said.endswith(f" {chosen} of the 3 heads that select read it.")
        shown = find(page, "#page-text").get_property("textContent")
        whole = context["pages"][number]["text"]
        assert shown == whole if number < told["num_pages"] - 1 else whole.startswith(shown)
        passage = find(page, "#passage").get_property("textContent")
        everything = "".join(p["text"] for p in context["pages"])
        assert passage in everything and len(passage) > len(shown)


def test_the_text_of_the_newest_page_ends_where_the_context_does(page: Driver, served: Served):
    tokens = asked(page)
    completion_id = newest(served)
    context = reads_of(served, completion_id)
    tokens[9].click()
    told = reads_of(served, f"{completion_id}/9")
    wait(page, lambda: f"of {told['context_tokens']} tok" in find(page, "#summary").text)
    find(page, "#cells").send_keys(Keys.END)
    assert f"to {told['context_tokens'] - 1}: read." in find(page, "#cell").text
    until = "".join(p["text"] for p in context["pages"]).removesuffix(
        "".join(context["answer_tokens"][9:])
    )
    shown = find(page, "#page-text").get_property("textContent")
    assert shown and until.endswith(shown)


def test_everything_can_be_done_with_the_keyboard(page: Driver, served: Served) -> None:
    tokens = asked(page)
    while page.switch_to.active_element != tokens[0]:  # backwards from the question
        ActionChains(page).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
    for key, token in (
        (Keys.ENTER, 0),
        (Keys.ARROW_RIGHT, 1),
        (Keys.END, 23),
        (Keys.ARROW_LEFT, 22),
    ):
        page.switch_to.active_element.send_keys(key)
        assert page.switch_to.active_element == tokens[token]
        wait(page, lambda token=token: tokens[token].get_attribute("aria-selected") == "true")
    assert len(find_all(page, ".token[tabindex='0']")) == 1
    told = reads_of(served, f"{newest(served)}/22")
    wait(page, lambda: f"of {told['context_tokens']} tok" in find(page, "#summary").text)
    cells = find(page, "#cells")
    while page.switch_to.active_element != cells:
        ActionChains(page).send_keys(Keys.TAB).perform()
    for key, said in (
        (Keys.HOME, "Page 0, "),
        (Keys.ARROW_RIGHT, "Page 1, tokens 16 to 31"),
        (Keys.ARROW_DOWN, "KV head 1, which selects its pages"),
        (Keys.PAGE_DOWN, "Layer 1, KV head 1, "),
        (Keys.ARROW_DOWN, "Layer 1, KV head 1, "),  # there is no row below
        (Keys.END, f"Page {told['num_pages'] - 1}, "),
    ):
        cells.send_keys(key)
        assert said in find(page, "#cell").text
    fields = find_all(page, "input, textarea, button, canvas[tabindex], pre")
    for element in filter(WebElement.is_displayed, fields):
        assert element.accessible_name, element.get_attribute("id")


def test_stop_ends_the_request_and_a_new_chat_begins_empty(page: Driver, served: Served) -> None:
    ask(page, tokens=900, question="Go on.")
    wait(page, lambda: find_all(page, "#messages .body")[1:])
    wait(page, lambda: find_all(page, "#messages .body")[1].text)
    find(page, "#stop").click()
    wait(page, lambda: find(page, "#send").is_enabled())
    assert not find(page, "#error").is_displayed()
    wait(page, lambda: not served.llm.engine.has_unfinished_requests)
    find(page, "#clear").click()
    assert find_all(page, "#messages li") == []


def test_errors_are_shown(driver: Driver, served: Served) -> None:
    driver.get(served.url)
    ask(driver, question="x" * 1100)
    wait(driver, lambda: find(driver, "#error").is_displayed())
    assert "max_model_len=1024" in find(driver, "#error").text
    assert find(driver, "#send").is_enabled()
    driver.get_log("browser")  # the 400 is in the console


def test_a_file_goes_with_the_question(page: Driver, tmp_path: Path, served: Served) -> None:
    """Its text is folded away in the chat, before the question in the prompt, and no markup."""
    file = tmp_path / "<i>notes.txt"
    file.write_text("Grüße 🙂 <img src=x> " * 9, "utf-8")
    for attached in (True, False, True):
        find(page, "#file").send_keys(str(file))
        wait(page, lambda: find(page, "#attached").is_displayed())
        assert find(page, "#attached-name").text == "<i>notes.txt"
        if not attached:
            find(page, "#detach").click()
        tokens = len(find_all(page, ".token"))
        ask(page, question="What is it?", tokens=3)
        wait(page, lambda tokens=tokens: len(find_all(page, ".token")) > tokens)
        assert not find(page, "#attached").is_displayed()
    users = find_all(page, ".user")
    assert [len(user.find_elements(By.TAG_NAME, "details")) for user in users] == [1, 0, 1]
    folded, *others = find_all(page, "#messages details")
    assert len(others) == 1
    assert folded.text == "<i>notes.txt, 189 characters"
    folded.find_element(By.TAG_NAME, "summary").click()
    assert file.read_text("utf-8").strip() in folded.text
    context = "".join(p["text"] for p in reads_of(served, newest(served))["pages"])
    assert context.count(file.read_text("utf-8") + "\n\nWhat is it?") == 2
    assert context.count("What is it?") == 3
    assert not find_all(page, "main img, main i")


def test_a_question_that_failed_is_not_asked_again(page: Driver, served: Served) -> None:
    ask(page, question="x" * 1100)
    wait(page, lambda: find(page, "#error").is_displayed())
    page.get_log("browser")  # the 400 is in the console
    asked(page, question="Hello", tokens=3)
    assert not find(page, "#error").is_displayed()
    context = reads_of(served, newest(served))
    assert "x" * 1100 not in "".join(page["text"] for page in context["pages"])


def test_the_program_with_a_key(driver: Driver, tmp_path: Path) -> None:
    """The whole way: the page needs no key, what it asks for does, and all comes from there."""
    gates = write_pattern(tmp_path / "p", [[0.1, 0.9], [0.9, 0.8]])
    options = {"attention": "lserve", "pattern": gates, "streaming_fraction": 0.25}
    options |= sizes(16, 16, 64, 4, (16, 32, 32, 64))
    arguments = [
        part
        for name, value in options.items()
        if value is not None
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    model = write_served_model(tmp_path / "tiny")
    with program("--model", model, *arguments, env={"LSERVE_API_KEY": "sesame"}) as (_, url):
        driver.get("about:blank")
        requested(driver)
        driver.get(url)
        wait(driver, lambda: find(driver, "#key-form").is_displayed())
        find(driver, "#key").send_keys("sesame", Keys.ENTER)
        wait(driver, lambda: find(driver, "#model").text)
        assert not find(driver, "#key-form").is_displayed()
        assert driver.execute_script("return localStorage.length + sessionStorage.length") == 0
        tokens = asked(driver, tokens=5)
        tokens[3].click()
        wait(driver, lambda: find(driver, "#map").is_displayed())
        addresses = requested(driver)
        assert {address for address in addresses if not address.startswith(url)} == set()
        path = next(address for address in addresses if address.endswith("/3"))
        assert re.fullmatch(rf"{url}/v1/reads/chatcmpl-\w+/3", path)
        for key, status in ((None, 401), ("Bearer simsim", 401), ("Bearer sesame", 200)):
            headers = {} if key is None else {"Authorization": key}
            for address in (path, path.removesuffix("/3")):
                assert httpx.get(address, headers=headers).status_code == status
        told = httpx.get(path, headers={"Authorization": "Bearer sesame"}).json()
        assert f" {100 * told['share']:.1f} % of the context" in find(driver, "#summary").text
        assert [len(layer) for layer in told["read"]] == [2, 2]
        driver.get("about:blank")
    driver.get_log("browser")  # the 401 is in the console


@pytest.mark.parametrize(
    ("attempt", "directive"),
    [
        ("fetch('http://127.0.0.2:9/').catch(() => {})", "connect-src"),
        ("document.body.append(Object.assign(new Image(), {src: '//127.0.0.2:9/x'}))", "img-src"),
        ("add('script', {textContent: 'document.title = 1'})", "script-src-elem"),
        ("add('style', {textContent: 'body {color: red}'})", "style-src-elem"),
        ("add('div', {innerHTML: '<p onclick=\"x()\">'})", "script-src-attr"),
        ("add('form', {action: '//127.0.0.2:9/', method: 'post'}).submit()", "form-action"),
    ],
)
def test_what_an_injected_script_might_load_is_refused(
    driver: Driver, served: Served, attempt: str, directive: str
) -> None:
    driver.get(served.url)
    refused = driver.execute_async_script(
        "const done = arguments[0];"
        "const add = (tag, what) => {"
        "  const element = Object.assign(document.createElement(tag), what);"
        "  document.body.append(element);"
        "  return element;"
        "};"
        "document.addEventListener('securitypolicyviolation', (e) => done(e.effectiveDirective));"
        f"{attempt};"
    )
    assert refused == directive
    assert driver.title == "lserve-jax"
    driver.get_log("browser")


def test_a_phone_and_the_dark(page: Driver) -> None:
    tokens = asked(page)
    tokens[-1].click()
    wait(page, lambda: find(page, "#map").is_displayed())
    light = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    try:
        metrics = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        dark = [{"name": "prefers-color-scheme", "value": "dark"}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": dark})
        assert page.execute_script("return document.documentElement.scrollWidth") <= 360
        assert (
            page.execute_script("return getComputedStyle(document.body).backgroundColor") != light
        )
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
