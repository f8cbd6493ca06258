"""The page: what is served, and what it does in a real browser against a server that answers as ours does."""

import re
import shutil

import pytest

pytest.importorskip("prometheus_client", reason="pip install 'megalite[serve]'")
pytest.importorskip("fastapi", reason="pip install 'megalite[serve]'")

try:
    from playwright.sync_api import expect, sync_playwright
except ImportError:
    sync_playwright = None
from fastapi import FastAPI
from fastapi.testclient import TestClient
from serve_backend import ANSWER, KEY, Backend
from serve_fakes import FakeRouter, step
from waiting import PATIENCE

from megalite.serve.metrics import ServeMetrics
from megalite.serve.page import PAGE, content_security_policy, page_router


def test_what_is_served():
    now = 100.0
    metrics = ServeMetrics("models/demo", clock=lambda: now)
    metrics.replica_step(0, step(1))
    now += 2
    metrics.replica_step(0, step(2, output_tokens=40))
    app = FastAPI()
    app.include_router(page_router(metrics, FakeRouter()))
    client = TestClient(app)
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert page.text == PAGE.read_text(encoding="utf-8")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert not re.findall(r"(?:https?:)?//[a-z]", re.sub(r"(?m)// .*$", "", page.text)), "no external resource"

    stats = client.get("/stats").json()
    assert (stats["model"], stats["state"]) == ("models/demo", "ready")
    first, second = stats["replicas"]
    assert first == {
        "replica": 0,
        "state": "ready",
        "restarts": 0,
        "device": "cpu",
        "running": 3,
        "waiting": 2,
        "requests": 5,
        "outstanding_tokens": 12345,
        "kv_usage": pytest.approx(0.6),
        "tokens_per_second": pytest.approx(20.0),
        "prompt_tokens": 100,
        "cached_tokens": 25,
        "output_tokens": 0,
        "busy": {"compute": 0.75},
    }
    assert (second["state"], second["restarts"], second["device"], second["running"]) == ("lost", 2, "cpu", 0)


def test_the_policy_follows_the_page():
    one = content_security_policy("<style>a{}</style><script>f()</script>")
    other = content_security_policy("<style>a{}</style><script>g()</script>")
    assert one != other and one.count("sha256-") == 2


# ---- in a browser


@pytest.fixture(scope="module")
def browser():
    if sync_playwright is None:
        pytest.skip("no playwright: pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no browser is installed (Debian: apt-get install chromium)")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium)
        yield browser
        browser.close()


@pytest.fixture
def backend():
    return Backend()


@pytest.fixture
def page(browser, backend):
    """The page in a window of a phone's size; whatever the browser complains about fails the test."""
    page = browser.new_context(viewport={"width": 390, "height": 844}).new_page()
    page.set_default_timeout(1000 * PATIENCE)
    expect.set_options(timeout=1000 * PATIENCE)
    complaints = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    with backend.served() as url:
        assert page.goto(url).ok
        yield page
        page.context.close()
    assert [line for line in complaints if "status of 4" not in line] == []


def say(page, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def answered(page, count: int) -> list[str]:
    """The texts of so many answers, once all have ended."""
    expect(page.locator(".assistant footer")).to_have_count(count)
    return page.eval_on_selector_all(".assistant", "all => all.map(one => one.firstChild.data)")


def test_a_conversation(page, backend):
    page.click("summary")
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0.5")
    page.fill("#max-tokens", "20")
    expect(page.locator("#model")).to_have_text("models/demo")
    say(page, "Hello <i>you</i>")
    assert answered(page, 1) == [ANSWER]  # as text, not as HTML
    assert page.text_content(".user") == "Hello <i>you</i>"
    assert page.text_content(".assistant footer").startswith("stop · 17 tokens · first after ")
    say(page, "Again")
    assert answered(page, 2) == [ANSWER, ANSWER]
    system, question = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello <i>you</i>"}
    path, body = backend.asked[1]
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "models/demo",
        "messages": [
            system,
            question,
            {"role": "assistant", "content": ANSWER},
            {"role": "user", "content": "Again"},
        ],
        "temperature": 0.5,
        "max_tokens": 20,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    page.click("#reset")
    say(page, "Anew")
    assert answered(page, 1) == [ANSWER]
    assert backend.asked[2][1]["messages"] == [system, {"role": "user", "content": "Anew"}]


def test_an_answer_is_stopped(page, backend):
    backend.endless = True
    say(page, "Go on for ever")
    expect(page.locator(".assistant")).to_contain_text("...")
    page.click("#stop")
    assert answered(page, 1)[0].startswith(ANSWER + "...")
    assert page.text_content(".assistant footer").startswith("stopped")
    assert backend.left.wait(PATIENCE), "the server hears that nobody reads any more"
    backend.endless = False
    say(page, "Thanks")
    assert answered(page, 2)[1] == ANSWER
    assert [one["role"] for one in backend.asked[1][1]["messages"]] == ["user", "assistant", "user"]


def test_errors_are_shown_and_the_chat_goes_on(page, backend):
    backend.mishap = "halfway"
    say(page, "One")
    page.wait_for_selector(".error")
    assert page.text_content(".error") == "all replicas were lost"
    assert answered(page, 1) == [ANSWER]
    backend.mishap = "no template"
    say(page, "Two")
    page.wait_for_selector(".hint")
    assert page.input_value("#text") == "Two", "what was not answered can be sent again"
    page.press("#text", "Enter")
    assert answered(page, 2) == [ANSWER, ANSWER]
    path, body = backend.asked[-1]
    assert (path, body["prompt"]) == ("/v1/completions", "Two")


def test_a_key_is_asked_for_and_kept_for_the_session(page, backend):
    backend.needs_key = True
    page.reload()
    page.wait_for_selector("#ask-key[open]")
    page.fill("#key", KEY)
    page.press("#key", "Enter")
    expect(page.locator("#state")).to_have_text("ready")
    say(page, "Hello")
    assert answered(page, 1) == [ANSWER]
    page.reload()
    expect(page.locator("#state")).to_have_text("ready")
    assert page.evaluate("localStorage.length") == 0
    assert not page.is_visible("#ask-key")


def test_the_live_view(page):
    page.wait_for_selector(".replica")
    first, second = page.eval_on_selector_all(".replica", "all => all.map(one => one.innerText.replaceAll('\\n', ' '))")
    assert first.startswith("replica 0 ready running, waiting 3, 2 tokens a second ")
    assert "outstanding tokens 12,345" in first and "compute 75%" in first and "KV blocks in use 60%" in first
    assert second.startswith("replica 1 lost") and "restarts 2" in second
    assert "prompt tokens cached 25%" in page.inner_text("#totals").replace("\n", " ")
    wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0, "nothing sticks out on a phone"
