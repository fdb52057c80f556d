"""The retriever's app over HTTP: answers, changes, refusals, another version under load, a killed shard under load."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import searched
import yaml
from searched import Offline, Toy, corpus, load_toy, make_index
from served import KEY

from raysys.runtime.sentences import UserError
from raysys.systems.rabtriever.build import Builder
from raysys.systems.rabtriever.versions import Root, publish, shard_of
from serve.retriever import RetrieverConfig, build

QUERIES = ["river stone", "a lamp in winter", "copper", "zz", "letter garden silent morning bridge", "Violet?"]
PORT, SHARDS = 8721, 2
DOCUMENTS = corpus(400)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_index(tmp_path_factory.mktemp("searched") / "index", DOCUMENTS, shards=SHARDS)


@pytest.fixture(scope="module")
def url(ray_cluster: Any, index: Path) -> Iterator[str]:
    from ray import cloudpickle, serve

    cloudpickle.register_pickle_by_value(searched)
    os.environ["RAYSYS_API_KEYS"] = KEY
    guard = {"max_body_kib": 64, "timeout_s": 20, "max_waiting": 100}
    limits = {
        "max_k": 50,
        "max_rerank": 5,
        "max_texts": 30,
        "max_characters": 500,
        "reload_s": 0.5,
        "shard_timeout_s": 3,
    }
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    app = build({"run": "one", "index": str(index), "guard": guard, **limits}, load_toy)
    serve.run(app, name="retriever", route_prefix="/find")
    yield f"http://127.0.0.1:{PORT}/find"
    serve.shutdown()


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
        yield client


def search(client: httpx.Client, query: str, k: int, **more: Any) -> list[dict[str, Any]]:
    return client.post("/search", json={"query": query, "k": k, **more}).raise_for_status().json()["results"]


# The first tests need the index as it was made; those after test_documents_* leave documents of their own, far from all queries.


def test_answers_equal_those_computed_offline_whoever_shares_the_batch(client: httpx.Client) -> None:
    offline = Offline(DOCUMENTS)
    asks = [(query, k) for query in QUERIES for k in (1, 3, 10, 50)] * 3
    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(lambda ask: search(client, *ask), asks))
    assert all(offline.agrees(query, answer, k) for (query, k), answer in zip(asks, answers, strict=True))
    for query, k, answer in ((*ask, answer) for ask, answer in zip(asks, answers, strict=True)):
        longest = answers[asks.index((query, 50))]
        assert [one["id"] for one in answer] == [one["id"] for one in longest[:k]], "ties too, whatever k and batch"
    metrics = client.get("/metrics").text
    assert "raysys_encoder_batch_size_sum" in metrics
    assert metrics.count("raysys_shard_queries_total{") == SHARDS


def test_an_answer_says_score_probability_text_version_and_time(client: httpx.Client) -> None:
    told = client.post("/search", json={"query": "river", "k": 2}).json()
    assert set(told) == {"results", "version", "seconds"}
    assert told["version"] == "v1"
    assert 0 < told["seconds"] < 20
    for one in told["results"]:
        assert set(one) == {"id", "score", "probability", "text", "teacher", "prompt"}
        assert one["text"] == DOCUMENTS[one["id"]]
        assert 0 < one["probability"] < 1
        assert (one["teacher"], one["prompt"]) == (None, None)


def test_the_teacher_puts_what_was_found_in_its_own_order_and_the_prompt_is_shown(client: httpx.Client) -> None:
    plain, ranked = search(client, "copper lamp", 5), search(client, "copper lamp", 5, rerank=True, explain=True)
    assert sorted(one["id"] for one in plain) == sorted(one["id"] for one in ranked)
    teacher = Toy("one").rerank("copper lamp", [one["text"] for one in ranked]).tolist()
    assert [one["teacher"] for one in ranked] == teacher == sorted(teacher, reverse=True)
    assert ranked[0]["prompt"] == f"Document: {ranked[0]['text']}\nQuery: copper lamp\nFits?"


def test_several_queries_are_answered_in_order_or_not_at_all(client: httpx.Client) -> None:
    body = {"requests": [{"query": query, "k": 4} for query in QUERIES]}
    answers = client.post("/search:batch", json=body).json()["answers"]
    offline = Offline(DOCUMENTS)
    assert all(offline.agrees(query, one["results"], 4) for query, one in zip(QUERIES, answers, strict=True))
    body["requests"].append({"query": "\u200b no token"})
    assert client.post("/search:batch", json=body).status_code == 422


def hostile() -> list[tuple[str, str, bytes | None, str]]:
    """Requests that must be refused: method, path, body, a part of the sentence."""
    bad: list[tuple[str, str, Any, str]] = [("POST", "/search", {"query": "a", "k": k}, "k: got") for k in
           (0, -1, 51, 10**30, 1.5, "3", None, True, [], {}, float("inf"), float("nan"), -(2**63), "ten")]  # fmt: skip
    bad += [
        ("POST", "/search", {"query": q}, "query: ")
        for q in ("", " ", "\n\t", "\u00a0", None, 1, [], {}, "x" * 501, "\u200b")
    ]
    bad += [("POST", "/search", {"query": "a", "rerank": r}, "rerank: got") for r in (1, "yes", None, [])]
    bad += [("POST", "/search", {"query": "a", "k": 6, "rerank": True}, "at most 5 are allowed with rerank")]
    bad += [
        ("POST", "/search", one, "") for one in ([], "text", 3, None, {}, {"q": "a"}, {"query": "a", "K": 1}, [[]] * 50)
    ]
    bad += [
        ("POST", "/search:batch", {"requests": r}, "") for r in ([], None, {}, "a", [1], [{"query": "a"}] * 31, [{}])
    ]
    good = {"id": "x", "text": "y"}
    ids = ("", " ", "a ", "\n", "a\u0000b", "a\u202eb", ".", "..", "x" * 201, None, 1, ["x"], {"a": 1}, "\u2028")
    bad += [("POST", "/documents", {"documents": [{"id": id, "text": "y"}]}, "id") for id in ids]
    texts = ("", "  ", None, 1, "x" * 501, ["y"], "\u200b")
    bad += [("POST", "/documents", {"documents": [{"id": "x", "text": text}]}, "") for text in texts]
    bad += [
        ("POST", "/documents", {"documents": d}, "")
        for d in ([], None, good, [good, good], [good] * 31, [{**good, "z": 1}])
    ]
    made = [(method, path, json.dumps(body).encode(), said) for method, path, body, said in bad]
    raw = [
        b"", b"{", b"\xff\xfe", b'{"query": "\\ud800"}', b'{"query": "a"', b"null", b"NaN", b"[" * 20_000, b'{"query":' * 5000,
        b'{"query": "' + b"x" * 70_000 + b'"}', b"query=a", b'{"query": "a", "k": 1e999}',
        b'{"query": "a", "k": 1' + b"0" * 5000 + b"}",
    ]  # fmt: skip
    made += [("POST", "/search", one, "") for one in raw]
    paths = [("GET", "/search"), ("PUT", "/search"), ("POST", "/nowhere"), ("GET", "/documents/"), ("GET", "/documents/never"),
             ("GET", "/documents/..%2f..%2fCURRENT"), ("DELETE", "/documents/never"), ("DELETE", "/documents/%00"),
             ("GET", "/documents/" + "x" * 201), ("GET", "/documents/%ff%fe"), ("PATCH", "/index"), ("GET", "/index:reload"),
             ("DELETE", "/documents"), ("GET", "/%2e%2e/%2e%2e/etc/passwd"), ("POST", "/"), ("TRACE", "/search")]  # fmt: skip
    return made + [(method, path, None, "") for method, path in paths]


def test_a_hundred_hostile_requests_get_one_sentence_each_and_no_500(client: httpx.Client) -> None:
    asks = hostile()
    assert len(asks) >= 100
    before = client.get("/index").json()["documents"]
    for method, path, body, said in asks:
        answer = client.request(method, path, content=body, headers={"Content-Type": "application/json"})
        told = answer.json()["error"]
        assert 400 <= answer.status_code < 500, (method, path, body and body[:80], answer.status_code, told)
        assert said in told
        assert "\n" not in told
        assert len(told) < 400
    assert client.get("/index").json()["documents"] == before


def test_without_a_key_only_the_page_health_and_metrics_are_given(url: str) -> None:
    for path in ("/", "/healthz", "/metrics", "/docs", "/openapi.json"):
        assert httpx.get(url + path).status_code == 200, path
    for method, path in [("POST", "/search"), ("GET", "/index"), ("POST", "/documents"), ("DELETE", "/documents/d1"),
                         ("GET", "/documents/d1"), ("POST", "/index:reload"), ("POST", "/index:compact")]:  # fmt: skip
        assert httpx.request(method, url + path, json={"query": "a"}).status_code == 401
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    assert {
        "/search",
        "/search:batch",
        "/documents",
        "/documents/{id}",
        "/index",
        "/index:reload",
        "/index:compact",
    } <= set(paths)


def test_no_text_of_a_query_or_document_gets_into_a_log(client: httpx.Client) -> None:
    secret = "xylophone-quarantine"
    search(client, f"{secret} one", 3, rerank=True)
    client.post("/search", json={"query": f"{secret} \u200b", "k": 3})
    client.post("/search", json={"query": f"{secret}", "k": 3000})
    client.post("/documents", json={"documents": [{"id": "d1", "text": f"{secret} \u200b"}]})
    import ray

    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    found = [path for path in logs.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert any(logs.rglob("serve/*"))
    assert found == []


def test_documents_are_found_once_they_are_acknowledged_and_gone_once_deleted(client: httpx.Client) -> None:
    new = {f"new/{i} é": f"quartz {i} quartz" for i in range(8)}
    body = {"documents": [{"id": id, "text": text} for id, text in new.items()]}
    assert client.post("/documents", json=body).json() == {"documents": 8}
    assert client.get("/documents/new%2F3%20%C3%A9").json() == {"id": "new/3 é", "text": "quartz 3 quartz"}
    offline = Offline(DOCUMENTS | new)
    assert offline.agrees("quartz 3", search(client, "quartz 3", 20), 20)
    replaced = {"documents": [{"id": "new/3 é", "text": "quartz replaced"}]}
    assert client.post("/documents", json=replaced).status_code == 200
    assert Offline(DOCUMENTS | new | {"new/3 é": "quartz replaced"}).agrees("quartz", search(client, "quartz", 20), 20)
    told = client.get("/index").json()
    assert (told["documents"], told["changed"]) == (len(DOCUMENTS) + 8, 8)
    for id in new:
        assert client.delete(f"/documents/{id}").status_code == 200
        assert client.delete(f"/documents/{id}").status_code == 404
    assert client.get("/index").json()["documents"] == len(DOCUMENTS)
    assert Offline(DOCUMENTS).agrees("quartz 3", search(client, "quartz 3", 20), 20)


class Load(threading.Thread):
    """Searches and changes without pause; notes every status, every wrong answer, and what was acknowledged."""

    def __init__(self, url: str, number: int, writes: bool, offline: Offline) -> None:
        super().__init__(daemon=True)
        self.url, self.number, self.writes, self.offline = url, number, writes, offline
        self.seen: list[tuple[float, int]] = []
        self.wrong: list[Any] = []
        self.acknowledged: list[str] = []
        self.versions: set[str] = set()
        self.stop = threading.Event()

    def run(self) -> None:
        with httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
            draw = random.Random(self.number)
            while not self.stop.is_set():
                if self.writes:
                    id = f"w{self.number}-{len(self.seen)}"
                    # as far from every query as a document can be: no trigram in common
                    asked = {"documents": [{"id": id, "text": f"{9 * 10**9 + len(self.seen)}"}]}
                    answer = client.post("/documents", json=asked)
                    if answer.status_code == 200:
                        self.acknowledged.append(id)
                else:
                    query = draw.choice(QUERIES[:5])
                    answer = client.post("/search", json={"query": query, "k": 5})
                    if answer.status_code == 200:
                        told = answer.json()
                        self.versions.add(told["version"])
                        if not self.offline.agrees(query, told["results"], 5):
                            self.wrong.append((query, told))
                self.seen.append((time.monotonic(), answer.status_code))


def loaded(url: str, readers: int, writers: int, offline: Offline) -> list[Load]:
    loads = [Load(url, i, i >= readers, offline) for i in range(readers + writers)]
    for load in loads:
        load.start()
    return loads


def ended(loads: list[Load]) -> None:
    for load in loads:
        load.stop.set()
    for load in loads:
        load.join(60)
        assert not load.is_alive()


def test_another_version_is_gone_over_to_under_load_and_no_request_is_dropped(
    client: httpx.Client, url: str, index: Path
) -> None:
    loads = loaded(url, 3, 1, Offline(DOCUMENTS))
    time.sleep(0.5)
    make_index(index, DOCUMENTS, "v2", SHARDS)  # found by polling
    deadline = time.monotonic() + 20
    while client.get("/index").json()["version"] != "v2":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    publish(index, "v1")  # and back, at once
    assert client.post("/index:reload").json()["version"] == "v1"
    made = client.post("/index:compact")
    assert made.status_code == 202
    while client.get("/index").json()["version"] != made.json()["version"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.5)
    ended(loads)
    assert {status for load in loads for _, status in load.seen} == {200}
    assert [load.wrong for load in loads if load.wrong] == []
    assert {"v1", "v2", made.json()["version"]} == set.union(*(load.versions for load in loads))
    written = [id for load in loads for id in load.acknowledged]
    assert len(written) > 3
    assert [id for id in written if client.get(f"/documents/{id}").status_code != 200] == []
    for id in written:
        client.delete(f"/documents/{id}").raise_for_status()


def test_a_version_of_another_model_or_a_broken_one_is_refused_and_the_old_one_goes_on(
    client: httpx.Client, index: Path, tmp_path: Path
) -> None:
    before = client.get("/index").json()["version"]
    other = make_index(tmp_path / "other", DOCUMENTS, "foreign", SHARDS, run="two")
    shutil.copytree(other / "versions" / "foreign", index / "versions" / "foreign")
    shutil.copytree(index / "versions" / "v2", index / "versions" / "broken")
    vectors = index / "versions" / "broken" / "shard-000" / "vectors.npy"
    content = bytearray(vectors.read_bytes())
    content[-1] ^= 1
    vectors.write_bytes(content)
    try:
        for name, said in [("foreign", "holds vectors of the model toy-two"), ("broken", "is damaged"), ("../x", "version: got"),
                           ("none", "no finished one of that name")]:  # fmt: skip
            (index / "CURRENT").write_text(name + "\n")
            answer = client.post("/index:reload")
            assert (answer.status_code, said in answer.json()["error"]) == (409, True), answer.text
            assert Offline(DOCUMENTS).agrees("copper", search(client, "copper", 5), 5)
        deadline = time.monotonic() + 10
        while not client.get("/index").json()["problem"]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        publish(index, before)
    told = client.post("/index:reload").json()
    assert (told["version"], told["problem"]) == (before, None)


def test_a_killed_shard_loses_no_acknowledged_document_gives_no_wrong_answer_and_is_back_in_30_s(
    client: httpx.Client, url: str, ray_cluster: Any
) -> None:
    import ray

    loads = loaded(url, 3, 3, Offline(DOCUMENTS))
    time.sleep(1.5)
    named = ray.util.list_named_actors(all_namespaces=True)
    victim = next(one for one in named if "#Shard0#" in one["name"])
    actor = ray.get_actor(victim["name"], namespace=victim["namespace"])
    os.kill(ray.get(actor.__ray_call__.remote(lambda self: os.getpid())), signal.SIGKILL)
    killed = time.monotonic()
    time.sleep(12)
    deadline = killed + 30
    while time.monotonic() < deadline and any(status != 200 for load in loads for at, status in load.seen[-3:]):
        time.sleep(0.2)
    time.sleep(1)
    ended(loads)
    seen = [one for load in loads for one in load.seen]
    assert {status for _, status in seen} <= {200, 503, 504}
    away = max((at for at, status in seen if status != 200), default=killed) - killed
    print(f"away for {away:.1f} s: {sum(status != 200 for _, status in seen)} of {len(seen)} requests were refused")
    assert away < 30
    assert any(at > killed + 1 and status == 200 for at, status in seen)
    assert [load.wrong for load in loads if load.wrong] == []
    written = [id for load in loads for id in load.acknowledged]
    assert len(written) > 10
    assert {shard_of(id, SHARDS) for id in written} == {0, 1}
    assert [id for id in written if client.get(f"/documents/{id}").status_code != 200] == []
    assert client.get("/healthz").status_code == 200
    assert Offline(DOCUMENTS).agrees("copper", search(client, "copper", 5), 5)


def test_the_real_retriever_is_served_as_it_is_offline(url: str, tmp_path: Path) -> None:
    import numpy as np
    import torch
    from ray import serve

    from raysys.runtime.storage import Storage
    from raysys.systems.rabtriever.artifact import Retriever, fingerprint, save_student, save_teacher
    from raysys.systems.rabtriever.predictor import Predictor
    from raysys.systems.rabtriever.reader import make_backbone, make_reader
    from raysys.systems.rabtriever.setting import StudentSetting, TeacherSetting
    from raysys.systems.rabtriever.teacher import Reranker

    setting, student = TeacherSetting(width=16, layers=1), StudentSetting(hidden=8)
    reader = make_reader(setting)
    backbone = make_backbone(setting, reader, 3).eval().requires_grad_(False)
    torch.manual_seed(5)
    predictor = Predictor(backbone.width, student.combine, student.additive, student.layers, student.hidden)
    texts = [f"{text}, and the {text} again" for text in list(DOCUMENTS.values())[:40]]
    for part, states in (("query", Reranker(backbone).queries(reader.queries(QUERIES))),
                         ("document", Reranker(backbone).documents(reader.documents(texts)))):  # fmt: skip
        predictor.standardise(part, states)
    storage = Storage(tmp_path / "run")
    save_teacher(storage, setting, backbone, reader)
    save_student(storage, setting, student, predictor, fingerprint(setting, backbone, reader), "none", "none")
    retriever = Retriever.load(str(tmp_path / "run"))

    builder = Builder(tmp_path / "index", "v", retriever.width, retriever.fingerprint)
    builder.put(0, [f"d{i}" for i in range(30)], texts[:30], retriever.documents(texts[:30]))
    builder.finish()
    publish(tmp_path / "index", "v")
    args = {"run": str(tmp_path / "run"), "index": str(tmp_path / "index"), "guard": {"auth": "none"}}
    serve.run(build(args), name="real", route_prefix="/real")
    with httpx.Client(base_url=url.replace("/find", "/real"), timeout=60) as client:
        new = {"documents": [{"id": f"d{i}", "text": texts[i]} for i in range(30, 40)]}
        assert client.post("/documents", json=new).status_code == 200
        u, c = retriever.queries(QUERIES)
        scores = u @ retriever.documents(texts).T + c[:, None]
        for query, row in zip(QUERIES, scores, strict=True):
            results = search(client, query, 20, rerank=True, explain=True)
            assert np.allclose(
                sorted((one["score"] for one in results), reverse=True), np.sort(row)[::-1][:20], atol=1e-4
            )
            found = [int(one["id"][1:]) for one in results]
            assert [one["text"] for one in results] == [texts[i] for i in found]
            assert np.allclose([one["score"] for one in results], row[found], atol=1e-4)
            teacher = retriever.rerank(query, [texts[i] for i in found])
            assert np.allclose([one["teacher"] for one in results], teacher, atol=1e-4)
            assert results[0]["prompt"] == retriever.prompt(query, texts[found[0]])
        assert client.post("/search", json={"query": "\u200b"}).status_code in (200, 422)
    serve.delete("real")


# ---------------------------------------------------------------- how it starts


def test_what_cannot_be_served_is_told_before_anything_starts(index: Path, tmp_path: Path) -> None:
    def ask(**args: Any) -> None:
        build({"guard": {"auth": "none"}, **args}, load_toy)

    for args, said in [
        ({"run": "one"}, "index: is missing; .* build one with python -m jobs.rabtriever index"),
        ({"index": str(index)}, "run: is missing"),
        ({"run": "one", "index": str(tmp_path)}, "there is no index, build one with python -m jobs.rabtriever index"),
        (
            {"run": "two", "index": str(index)},
            "run: got two, whose vectors have the fingerprint toy-two; the index has toy-one",
        ),
        ({"run": "one", "index": str(index), "max_k": 0}, "max_k: got 0; expected a whole number of at least 1"),
        ({"run": "one", "index": str(index), "shards": 2}, "shards: is not a field"),
    ]:
        with pytest.raises(UserError, match=said):
            ask(**args)
    Builder(tmp_path / "unpublished", "v", 3, "toy-one")
    with pytest.raises(UserError, match="names no version to serve"):
        ask(run="one", index=str(tmp_path / "unpublished"))
    assert Root.open(index).shards == SHARDS


def test_the_program_says_in_one_sentence_what_is_wrong(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RAYSYS_API_KEYS": KEY}
    command = [sys.executable, "-m", "serve.retriever", "--run", str(tmp_path), "--index", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: index: got {tmp_path}; there is no index, build one with python -m jobs.rabtriever index\n"
    )


def test_the_deployment_file_has_the_app_and_its_arguments_are_fields() -> None:
    from ray.serve.schema import ServeDeploySchema

    path = Path(__file__).parents[2] / "serve" / "config.yaml"
    apps = {one.name: one for one in ServeDeploySchema.model_validate(yaml.safe_load(path.read_text())).applications}
    assert {"adapters", "retriever"} <= set(apps)
    app = apps["retriever"]
    assert (app.import_path, app.route_prefix) == ("serve.retriever:build", "/retriever")
    assert RetrieverConfig.of(app.args).guard.auth == "keys"
    assert {one.name for one in app.deployments} == {"Front", "Encoder"}
