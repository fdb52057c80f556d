"""The app over HTTP: predictions, mixed batches, refusals, and a lost replica."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from served import KEY, LABELS, TEXTS, write_run

from raysys.runtime.sentences import UserError
from serve.adapters import AdaptersConfig, build
from serve.stack import Item, Stack

NAMES = ["consensus", *(f"peer-{i:03d}" for i in range(5))]


@pytest.fixture(scope="module")
def offline(run: Path) -> dict[tuple[str, str], list[float]]:
    """Probabilities of each text under each adapter, one at a time."""
    stack = Stack(str(run))
    return {(t, n): stack.probabilities([Item(t, None, stack.read(n))])[0] for t in TEXTS for n in NAMES}


def far(answer: dict[str, Any], row: list[float]) -> float:
    return max(abs(answer["probabilities"][label] - p) for label, p in zip(LABELS, row, strict=True))


def metric(client: httpx.Client, name: str) -> float:
    """A metric summed over its series."""
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith((name + "{", name + " ")))


def test_an_answer_names_the_label_its_probabilities_and_the_adapter(client: httpx.Client, offline: dict) -> None:
    answer = client.post("/classify", json={"text": TEXTS[0]}).json()
    assert set(answer) == {"label", "probabilities", "adapter"}
    assert list(answer["probabilities"]) == LABELS
    assert sum(answer["probabilities"].values()) == pytest.approx(1)
    assert answer["label"] == LABELS[int(np.argmax(offline[TEXTS[0], "consensus"]))]
    assert answer["adapter"] == "consensus"


def test_served_predictions_are_the_offline_ones_whoever_shares_the_batch(client: httpx.Client, offline: dict) -> None:
    asks = [(text, name) for _ in range(3) for text in TEXTS for name in NAMES]  # more adapters than are kept in memory
    with ThreadPoolExecutor(16) as threads:
        answers = list(
            threads.map(lambda ask: client.post("/classify", json={"text": ask[0], "adapter": ask[1]}), asks)
        )
    assert [one.status_code for one in answers] == [200] * len(asks)
    assert max(far(one.json(), offline[ask]) for ask, one in zip(asks, answers, strict=True)) < 1e-6
    assert metric(client, "raysys_batch_adapters_sum") > 1.3 * metric(client, "raysys_batch_adapters_count"), "mixed"
    assert metric(client, "raysys_adapters_loaded") <= 4


def test_a_batch_of_texts_under_different_adapters_is_answered_in_order(client: httpx.Client, offline: dict) -> None:
    asks = [(text, name) for name in NAMES for text in TEXTS]
    body = {"requests": [{"text": text, "adapter": name} for text, name in asks]}
    answers = client.post("/classify:batch", json=body).json()["answers"]
    assert [one["adapter"] for one in answers] == [name for _, name in asks]
    assert max(far(one, offline[ask]) for one, ask in zip(answers, asks, strict=True)) < 1e-6


def test_adapters_lists_what_is_there(client: httpx.Client) -> None:
    told = client.get("/adapters").json()
    assert told["labels"] == LABELS
    assert (told["pair"], told["model"]) == (False, "minilm")
    assert set(NAMES) <= set(told["adapters"])


@pytest.mark.parametrize(
    ("adapter", "status", "said"),
    [
        ("peer-00", 404, "this run has none of that name; did you mean peer-00"),
        ("../secrets", 404, "none of that name"),
        ("peer-cut", 500, "peer-cut: is no whole peft adapter"),
        ("peer-wide", 500, "expected the same layers, rank and alpha"),
    ],
)
def test_an_adapter_that_is_not_there_or_broken_is_told_and_the_app_lives(
    client: httpx.Client, adapter: str, status: int, said: str
) -> None:
    answer = client.post("/classify", json={"text": "hello", "adapter": adapter})
    assert (answer.status_code, said in answer.json()["error"]) == (status, True)
    mixed = {"requests": [{"text": "hello"}, {"text": "hello", "adapter": adapter}]}
    assert client.post("/classify:batch", json=mixed).status_code == status
    assert client.post("/classify", json={"text": "hello"}).status_code == 200


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "text: is missing"),
        ({"text": ""}, "text: got ''"),
        ({"text": 1}, "text: got 1"),
        ({"text": "a", "second": "b"}, "second: got a text; this classifier takes single texts"),
        ({"text": "a", "adaptor": "b"}, "adaptor: got 'b'"),
        ({"text": "\ud800"}, "text: got '\\ud800'"),
    ],
)
def test_a_bad_question_is_422(client: httpx.Client, body: dict, said: str) -> None:
    marked = {"Content-Type": "application/json"}
    answer = client.post("/classify", content=json.dumps(body), headers=marked)
    assert (answer.status_code, said in answer.json()["error"]) == (422, True)


def test_limits_hold_over_http(client: httpx.Client, app: str) -> None:
    assert client.post("/classify:batch", json={"requests": []}).status_code == 422
    many = client.post("/classify:batch", json={"requests": [{"text": "a"}] * 51})
    assert (many.status_code, "at most 50" in many.json()["error"]) == (422, True)
    assert client.post("/classify", json={"text": "x" * 17_000}).status_code == 413
    assert httpx.post(f"{app}/classify", json={"text": "a"}).status_code == 401
    assert httpx.get(f"{app}/adapters", headers={"Authorization": f"Bearer {KEY}x"}).status_code == 401
    assert httpx.get(f"{app}/healthz").json() == {"status": "ok"}
    assert "Swagger" in httpx.get(f"{app}/docs").text
    schema = httpx.get(f"{app}/openapi.json").json()
    assert {"/classify", "/classify:batch", "/adapters", "/healthz", "/metrics"} <= set(schema["paths"])
    assert schema["paths"]["/classify"]["post"]["security"]


def test_new_adapters_are_found_while_the_app_runs(client: httpx.Client, run: Path) -> None:
    assert client.post("/classify", json={"text": "a", "adapter": "late"}).status_code == 404
    (run / "adapters" / "late").symlink_to(run / "adapters" / "peer-001")
    assert client.post("/classify", json={"text": "a", "adapter": "late"}).status_code == 200


def test_a_killed_model_replica_is_replaced_and_nothing_but_that_is_lost(client: httpx.Client, offline: dict) -> None:
    import ray

    named = ray.util.list_named_actors(all_namespaces=True)
    victim = next(one for one in named if "#Model#" in one["name"])
    ray.kill(ray.get_actor(victim["name"], namespace=victim["namespace"]))
    seen, deadline = set(), time.monotonic() + 40
    while time.monotonic() < deadline:
        answer = client.post("/classify", json={"text": TEXTS[0]})
        seen.add(answer.status_code)
        if answer.status_code == 200:
            break
        assert answer.json()["error"]
        time.sleep(0.2)
    assert seen <= {200, 503, 504}
    assert far(answer.json(), offline[TEXTS[0], "consensus"]) < 1e-6
    assert client.get("/healthz").status_code == 200


def test_what_cannot_be_served_is_told_before_anything_starts(run: Path, tmp_path: Path) -> None:
    open_to_all = {"guard": {"auth": "none"}}
    for args, said in [
        ({"run": str(run), "max_batch": 0, **open_to_all}, "max_batch: got 0; expected a whole number of at least 1"),
        ({"run": str(run), "gard": {}}, "gard: is not a field; did you mean guard"),
        (open_to_all, "run: is missing"),
        ({"run": str(tmp_path / "none"), **open_to_all}, "there is no .*classifier.json"),
        ({"run": str(write_run(tmp_path / "bare", [])), **open_to_all}, "holds no adapters"),
    ]:
        with pytest.raises(UserError, match=said):
            build(args)


def test_the_program_says_in_one_sentence_what_is_wrong(run: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("RAYSYS_API_KEYS", None)
    command = [sys.executable, "-m", "serve.adapters", "--run", str(run)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == (
        "error: auth: got keys, but RAYSYS_API_KEYS holds none; give one (openssl rand -hex 24), or auth none to serve anyone\n"
    )


def test_the_deployment_file_is_valid_and_its_arguments_are_fields() -> None:
    from ray.serve.schema import ServeDeploySchema

    path = Path(__file__).parents[2] / "serve" / "config.yaml"
    app = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text())).applications[0]
    assert app.import_path == "serve.adapters:build"
    assert AdaptersConfig.of(app.args).guard.auth == "keys"
    assert {one.name for one in app.deployments} == {"Front", "Model"}
