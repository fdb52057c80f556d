"""Keys, limits, deadlines and error sentences, on an app of three lines without Ray Serve."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel
from ray.exceptions import ActorUnavailableError

from raysys.runtime.sentences import UserError
from serve.guard import KEYS_VARIABLE, GuardConfig, guarded_app
from serve.meters import FrontMeters, Snapshot, exposition
from serve.questions import Text

KEY = "0123456789abcdef-é"
OK = {"Authorization": f"Bearer {KEY}".encode()}


class Say(BaseModel):
    word: Text


class Toy:
    """An app that says a word back, slowly if asked, or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **limits: Any) -> None:
        monkeypatch.setenv(KEYS_VARIABLE, f"some-other-key-0123, {KEY}")
        config = GuardConfig(**limits)
        self.meters, self.is_ready = FrontMeters(), True
        self.app = guarded_app("toy", "says", config, config.digests(), self.meters, self.ready, self.snapshots)

        @self.app.post("/say")
        async def say(said: Say) -> dict[str, str]:
            if said.word == "fail":
                raise KeyError("inside")
            if said.word == "lost":
                raise ActorUnavailableError("gone", None)
            await asyncio.sleep(float(said.word) if said.word.replace(".", "").isdigit() else 0)
            return {"said": said.word}

    async def ready(self) -> None:
        if not self.is_ready:
            raise TimeoutError

    async def snapshots(self) -> Mapping[str, Snapshot]:
        return {"one": self.meters.snapshot()}

    def ask(self, *asks: tuple[str, str, dict[str, Any]]) -> list[httpx.Response]:
        async def together() -> list[httpx.Response]:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://toy") as client:
                return await asyncio.gather(*(client.request(way, path, **more) for way, path, more in asks))

        return asyncio.run(together())

    def say(self, word: str, **more: Any) -> httpx.Response:
        return self.ask(("POST", "/say", {"json": {"word": word}, "headers": OK, **more}))[0]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    return Toy(monkeypatch, max_body_kib=1, timeout_s=0.3, max_waiting=2)


def test_without_a_key_nothing_is_answered_but_health_metrics_and_docs(toy: Toy) -> None:
    assert toy.say("hi").json() == {"said": "hi"}
    wrong = [None, {"Authorization": "Bearer nonsense"}, {"Authorization": OK["Authorization"][7:]},
             {"Authorization": b"Bearer " + OK["Authorization"][7:-1]}]  # fmt: skip
    for headers in wrong:
        answer = toy.say("hi", headers=headers)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.json()["error"].startswith("key: missing or unknown")
    for path in ("/healthz", "/metrics", "/docs", "/openapi.json"):
        assert toy.ask(("GET", path, {}))[0].status_code == 200
    assert toy.ask(("GET", "/nowhere", {}))[0].status_code == 401


def test_too_large_a_body_is_413_declared_or_not(toy: Toy) -> None:
    async def drip() -> Any:
        for _ in range(100):
            yield b"x" * 100

    for more in ({"content": b"x" * 1025}, {"content": drip()}):
        answer = toy.ask(("POST", "/say", {**more, "headers": OK}))[0]
        assert answer.status_code == 413
        assert "at most 1024" in answer.json()["error"]
    assert toy.say("x" * 1000).status_code == 200


def test_a_late_answer_is_504_and_too_many_waiting_are_503(toy: Toy) -> None:
    late = ("POST", "/say", {"json": {"word": "5"}, "headers": OK})
    answers = toy.ask(late, late, late)
    assert sorted(one.status_code for one in answers) == [503, 504, 504]
    busy = next(one for one in answers if one.status_code == 503)
    assert busy.headers["Retry-After"] == "1"
    assert busy.json() == {"error": "busy: 2 requests are waiting already; ask again later"}
    assert toy.say("hi").status_code == 200


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "body: is not valid JSON"),
        (b"[1]", "body: got [1]"),
        (b"{}", "word: is missing"),
        (b'{"word": 3}', "word: got 3; input should be a valid string"),
        (b'{"word": "\\ud800"}', "word: got '\\ud800'"),
        (b"\xff", "body: cannot be read; expected JSON in UTF-8"),
    ],
)
def test_bad_input_is_422_with_one_sentence(toy: Toy, body: bytes, said: str) -> None:
    answer = toy.ask(("POST", "/say", {"content": body, "headers": OK | {"Content-Type": "application/json"}}))[0]
    assert answer.status_code == 422
    assert said in answer.json()["error"]


def test_every_error_is_a_sentence_and_nothing_inside_is_told(toy: Toy) -> None:
    assert toy.say("fail").json() == {"error": "app: an unexpected error, which the log describes"}
    assert toy.say("fail").status_code == 500
    assert toy.say("lost").status_code == 503
    unmarked = toy.ask(("POST", "/say", {"content": b'{"word": "hi"}', "headers": OK}))[0]
    assert (unmarked.status_code, "Content-Type" in unmarked.json()["error"]) == (422, True)
    assert toy.ask(("GET", "/nowhere", {"headers": OK}))[0].json() == {"error": "GET /nowhere: not found"}
    assert toy.ask(("GET", "/say", {"headers": OK}))[0].status_code == 405


def test_health_is_503_until_the_model_is_ready(toy: Toy) -> None:
    toy.is_ready = False
    answer = toy.ask(("GET", "/healthz", {}))[0]
    assert (answer.status_code, answer.json()) == (503, {"error": "health: the model is not ready"})


def test_metrics_count_by_route_and_status_and_time_every_request(toy: Toy) -> None:
    toy.say("hi")
    toy.say("hi", headers={})
    toy.say("fail")
    toy.ask(("GET", "/one/of/many", {"headers": OK}))
    text = toy.ask(("GET", "/metrics", {}))[0].text
    for labels in ('route="/say",status="200"', 'route="/say",status="401"', 'route="/say",status="500"',
                   'route="other",status="404"'):  # fmt: skip
        assert f'raysys_requests_total{{replica="one",{labels}}} 1.0' in text
    assert 'raysys_request_seconds_count{replica="one",route="/say"} 3.0' in text
    assert "raysys_requests_waiting" in text
    assert "_created" not in text


def test_the_metrics_of_several_replicas_are_one_text() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    meters = [FrontMeters(), FrontMeters()]
    for i, one in enumerate(meters):
        for _ in range(i + 1):
            one.request("/a", 200, 0.1)
    text = exposition({f"r{i}": one.snapshot() for i, one in enumerate(meters)}).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {s.labels["replica"]: s.value for s in families["raysys_requests"].samples} == {"r0": 1.0, "r1": 2.0}
    assert text.count("# TYPE raysys_request_seconds histogram") == 1


def test_no_key_means_no_start_unless_that_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    with pytest.raises(UserError, match="auth: got keys, but RAYSYS_API_KEYS holds none"):
        GuardConfig().digests()
    assert GuardConfig(auth="none").digests() == ()
    file = tmp_path / "keys"
    file.write_text("# comment\n\n")
    with pytest.raises(UserError, match=r"keys_file .* holds none"):
        GuardConfig(keys_file=str(file)).digests()
    file.write_text(f"{KEY}\nshort\n")
    with pytest.raises(UserError, match=r"key 2 of .* has 5 characters; expected at least 16"):
        GuardConfig(keys_file=str(file)).digests()
    with pytest.raises(UserError, match="there is no such file"):
        GuardConfig(keys_file=str(tmp_path / "none")).digests()


def test_replicas_are_given_digests_not_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, KEY)
    assert all(len(one) == 64 and KEY not in one for one in GuardConfig().digests())
