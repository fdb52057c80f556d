"""The search page in a real browser: by keyboard alone, hostile documents, errors, small screens."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from serve import page

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SHOTS = os.environ.get("RAYSYS_SCREENSHOTS")
ATTACK = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
RESULTS = [
    {"id": "strategy/affirmation", "score": 2.197, "probability": 0.9, "teacher": None, "prompt": None,
     "text": "Affirm what the person has done well, and say that the feeling is understandable."},
    {"id": ATTACK, "score": 0.0, "probability": 0.5, "teacher": None, "prompt": None, "text": ATTACK},
    {"id": "long-" + "x" * 120, "score": -3.0, "probability": 0.047, "teacher": None, "prompt": None, "text": "word " * 120},
]  # fmt: skip


class Fake(BaseHTTPRequestHandler):
    """The page under a prefix, and an API that answers what the test wants."""

    status, said = 200, ""
    asked: list[dict[str, Any]] = []  # noqa: RUF012 (shared on purpose)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/find/index":
            self._send(200, json.dumps({"documents": 12345}).encode(), {"Content-Type": "application/json"})
        else:
            app = FastAPI()
            page.add(app, keys=True)
            made = TestClient(app).get("/")
            self._send(200, made.content, {k: v for k, v in made.headers.items() if k != "content-length"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Fake.asked.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
        rows = [r | ({"prompt": f"Document: {r['text']}"} if body["explain"] else {}) for r in RESULTS[: body["k"]]]
        rows = [r | {"teacher": 1.5} for r in rows] if body["rerank"] else rows
        told = {"results": rows, "version": "v7", "seconds": 0.0123} if Fake.status == 200 else {"error": Fake.said}
        self._send(Fake.status, json.dumps(told).encode(), {"Content-Type": "application/json"})

    def log_message(self, *args: Any) -> None:
        """Nothing: the test's output is for failures."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Fake)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/find"
    server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip("needs a Chromium on the PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser: Any, url: str) -> Iterator[Any]:
    Fake.status, Fake.said = 200, ""
    Fake.asked.clear()
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.problems = []
    tab.on("console", lambda m: tab.problems.append(m.text) if m.type == "error" else None)
    tab.on("pageerror", lambda wrong: tab.problems.append(str(wrong)))
    tab.on("request", lambda r: tab.problems.append(r.url) if not r.url.startswith((url, "data:")) else None)
    tab.goto(url)
    until(tab, "document.activeElement.id == 'query'")
    yield tab
    tab.close()


def until(tab: Any, expression: str) -> None:
    """Ask until an expression is true. Playwright's own waiting would evaluate it inside the page, whose policy forbids that."""
    deadline = time.monotonic() + 20
    while not tab.evaluate(expression):
        assert time.monotonic() < deadline, expression
        time.sleep(0.02)


def shot(tab: Any, name: str) -> None:
    if SHOTS:
        tab.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)


def focus(tab: Any) -> str:
    return tab.evaluate("document.activeElement.id || document.activeElement.tagName")


def test_a_search_needs_the_keyboard_only(tab: Any) -> None:
    assert focus(tab) == "query"
    tab.keyboard.type("passed over again")
    order = []
    for _ in range(4):
        tab.keyboard.press("Tab")
        order.append(focus(tab))
        ring = tab.evaluate("getComputedStyle(document.activeElement).outlineWidth")
        assert float(ring.removesuffix("px")) >= 2, f"{order[-1]} shows its focus"
    assert order == ["key", "k", "rerank", "go"]
    tab.keyboard.press("Shift+Tab")
    tab.keyboard.press("Space")
    assert tab.is_checked("#rerank")
    tab.focus("#key")
    tab.keyboard.type("a-secret-key")
    tab.focus("#query")
    tab.keyboard.press("Shift+Enter")
    tab.keyboard.type("and again")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("li:nth-child(3)")
    assert Fake.asked == [
        {"path": "/find/search", "key": "Bearer a-secret-key", "query": "passed over again\nand again", "k": 10, "rerank": True,
         "explain": True}
    ]  # fmt: skip
    assert tab.inner_text("#status") == "3 results in 12 ms, version v7."
    assert tab.get_attribute("#status", "aria-live") == "polite"
    until(tab, "document.getElementById('facts').textContent == '12,345 documents.'")
    tab.focus("li:nth-child(1) summary")
    tab.keyboard.press("Enter")
    assert tab.inner_text("li:nth-child(1) pre").startswith("Document: Affirm")
    assert "teacher 1.500" in tab.inner_text("li:nth-child(1) .numbers")
    shot(tab, "search-1280")
    kept = tab.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])")
    assert "a-secret-key" not in kept
    assert tab.problems == []


def test_what_documents_contain_is_shown_and_never_run(tab: Any) -> None:
    tab.keyboard.type("x")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("li:nth-child(3)")
    item = tab.locator("li:nth-child(2)")
    assert item.locator(".text").inner_text() == ATTACK
    assert item.locator(".id").inner_text() == ATTACK
    assert tab.locator("li img, li script").count() == 0
    assert tab.title() == "Retriever"
    tab.evaluate(
        "const s = document.createElement('script'); s.textContent = \"document.title='owned'\"; document.body.append(s)"
    )
    assert tab.title() == "Retriever", "the policy stops scripts that are not the page's own"


def test_errors_are_shown_as_the_sentence_of_the_api(tab: Any) -> None:
    tab.keyboard.type("x")
    Fake.status, Fake.said = 422, "k: got 60; at most 50 are allowed <b>"
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#status.bad")
    assert tab.inner_text("#status") == Fake.said
    assert tab.locator("li").count() == 0
    shot(tab, "search-error")
    tab.route("**/search", lambda route: route.abort())
    tab.keyboard.press("Enter")
    until(tab, "document.getElementById('status').textContent == 'The server cannot be reached.'")
    assert tab.is_enabled("#go")


def test_it_fits_a_screen_of_360_pixels_and_contrast_is_readable(browser: Any, url: str) -> None:
    Fake.status = 200
    tab = browser.new_page(viewport={"width": 360, "height": 740})
    tab.goto(url)
    until(tab, "document.activeElement.id == 'query'")
    tab.keyboard.type("passed over again")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("li:nth-child(3)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    shot(tab, "search-360")
    worst = tab.evaluate(
        """() => {
        const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
        const light = (c) => { const [r, g, b] = rgb(c).slice(0, 3).map(v => { v /= 255;
          return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const behind = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
          if ((rgb(c)[3] ?? 1) > 0) return c; } return "rgb(255, 255, 255)"; };
        const all = [...document.querySelectorAll("body *")].filter(e => e.offsetParent && e.textContent.trim() &&
          !["SCRIPT", "STYLE", "METER"].includes(e.tagName));
        return Math.min(...all.map(e => { const a = light(getComputedStyle(e).color), b = light(behind(e));
          return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); })); }"""
    )
    assert worst >= 4.5  # WCAG AA
    unnamed = tab.evaluate("[...document.querySelectorAll('input, textarea')].filter(e => !e.labels.length).length")
    assert unnamed == 0
    tab.close()


def test_the_policy_of_the_page_allows_its_own_script_and_nothing_from_elsewhere(url: str) -> None:
    answer = httpx.get(url)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert "src=" not in answer.text
    assert "innerHTML" not in answer.text


def test_without_keys_the_box_for_one_is_hidden() -> None:
    app = FastAPI()
    page.add(app, keys=False)
    assert '<div id="keybox" hidden>' in TestClient(app).get("/").text
