"""The command line of the TAD-LoRA job: what it refuses, what it writes, and what its artifacts are good for."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from jobs import tad_lora
from raysys.nn.body import pool
from raysys.nn.pretrained import find_model, load_base, read_base
from raysys.systems.tad_lora.presets import PRESETS
from serve.stack import Item, Stack

SMALL = ["--no-wandb", "--seeds", "2", "--rounds", "2", "--steps", "1", "--layers", "1", "--test", "20", "--batch", "2"]
GRAMMAR = "grammar(difficulty=0.3,train=120,test=40)"


def call(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jobs.tad_lora", *words])
    code = 0
    try:
        tad_lora.main()
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr()


REFUSED = {
    "unknown method": ["train", "--method", "fedavg"],
    "unknown method beside": ["train", "--beside", "fedavg"],
    "adf without an interval": ["train", "--method", "adf"],
    "unknown graph": ["train", "--topology", "rng"],
    "graph option": ["train", "--topology", "erdos_renyi(q=0.1)"],
    "probability": ["train", "--topology", "erdos_renyi(p=2)"],
    "weights that do not keep the mean": ["train", "--weights", "uniform"],
    "unknown weights": ["train", "--weights", "metropolis"],
    "flora without a complete graph": ["train", "--method", "flora", "--beside", "lora"],
    "fedex with absences": [
        "train",
        "--method",
        "fedex",
        "--topology",
        "complete",
        "--absence",
        "0.1",
        "--beside",
        "lora",
    ],
    "product mixing on directed graphs": ["train", "--method", "decaf", "--topology", "one_peer_exponential"],
    "rolora on directed graphs": [
        "train",
        "--method",
        "rolora",
        "--topology",
        "one_peer_exponential",
        "--beside",
        "lora",
    ],
    "a probe of directed graphs": [
        "train",
        "--interval-from",
        "probe",
        "--topology",
        "one_peer_exponential",
        "--beside",
        "lora",
    ],
    "centralised with peers": ["train", "--method", "centralised"],
    "unknown partition": ["train", "--partition", "sorted"],
    "no groups": ["train", "--partition", "natural"],
    "unknown data": ["train", "--data", "clinc"],
    "grammar option": ["train", "--data", "grammar(dificulty=1)"],
    "hub task": ["train", "--data", "glue/nothing"],
    "unknown model": ["train", "--model", "./nowhere"],
    "targets": ["train", "--targets", "qwery"],
    "layers": ["train", "--layers", "7"],
    "rank": ["train", "--rank", "0"],
    "zero step": ["train", "--lr", "0"],
    "absence of all": ["train", "--absence", "1"],
    "kept moments with absence": ["train", "--optimizer-state", "kept", "--absence", "0.5"],
    "peft regression": ["train", "--problem", "regression", "--backend", "peft"],
    "too many peers": ["train", "--peers", "5000"],
    "short probe": ["train", "--probe-rounds", "5"],
    "compare without tad": ["compare", "--methods", "lora", "ffa"],
    "compare of regression": ["compare", "--problem", "regression"],
    "a negative step size": ["compare", "--lrs", "0.1", "-1"],
    "graphs from sparse to dense": ["compare", "--topologies", "erdos_renyi(p=0.02)", "erdos_renyi(p=0.5)"],
    "peers that never meet": ["compare", "--topologies", "erdos_renyi(p=0)"],
    "compare on a GPU": ["compare", "--cluster.gpus-per-host", "1"],
    "fedex with weights of its own": [
        "train",
        "--method",
        "fedex",
        "--topology",
        "complete",
        "--weights",
        "lazy",
        "--beside",
        "lora",
    ],
    "peft with bfloat16": ["train", "--backend", "peft", "--precision", "bfloat16"],
    "peft with fedex": [
        "train",
        "--backend",
        "peft",
        "--method",
        "fedex",
        "--topology",
        "complete",
        "--beside",
        "lora",
    ],
    "centralised regression": ["train", "--problem", "regression", "--method", "centralised", "--peers", "1"],
    "too long": ["train", "--max-length", "1024"],
    "sweep that keeps the worst": ["sweep", "--problem", "regression", "--metric", "error"],
    "a probability twice": ["theory", "--p", "0.5", "0.5"],
    "a step size twice": ["compare", "--lrs", "0.1", "0.1"],
    "compare method": ["compare", "--methods", "tad", "fedavg"],
    "theory order": ["theory", "--p", "0.1", "0.5"],
    "theory intervals": ["theory", "--intervals", "1", "500"],
    "theory without T = 1": ["theory", "--intervals", "2", "3"],
    "sweep metric": ["sweep", "--metric", "acuracy"],
    "sweep field": ["sweep", "--space", "learning_rate=1,2"],
    "unknown preset": ["train", "--preset", "papers"],
    "unknown flag": ["train", "--learning-rate", "1"],
    "unknown command": ["trian"],
}


@pytest.mark.parametrize("words", REFUSED.values(), ids=REFUSED)
def test_a_mistake_is_one_sentence_with_code_two_and_leaves_nothing(words, tmp_path, monkeypatch, capsys):
    code, said = call([*words, *(["--out", str(tmp_path)] if words[0] != "trian" else [])], monkeypatch, capsys)
    assert code == 2, said
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["demo", "train", "compare", "theory", "sweep"])
def test_help_explains_every_command(command, monkeypatch, capsys):
    code, said = call([command, "--help"], monkeypatch, capsys)
    assert code == 0
    assert "--seeds" in said.out


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_configuration(name):
    assert tad_lora.TrainConfig.of(PRESETS[name]()).rounds >= 1


@pytest.fixture
def trained(tmp_path, monkeypatch, capsys):
    """A finished run of two methods in this process: its folder and summary."""
    options = ["--execution", "inprocess", "--beside", "ffa", "--peers", "4"]
    words = ["train", *SMALL, "--data", GRAMMAR, "--out", str(tmp_path), *options]
    code, said = call(words, monkeypatch, capsys)
    assert code == 0, said.err
    folder = Path(said.out.splitlines()[-1].removeprefix("run: "))
    return folder, json.loads((folder / "summary.json").read_text())


def test_training_writes_what_machines_and_people_read(trained):
    folder, summary = trained
    assert summary["system"] == "tad_lora"
    assert summary["status"] == "finished"
    assert {row["metric"] for row in summary["table"]} >= {
        "accuracy",
        "worst_accuracy",
        "consensus_accuracy",
        "relative_cross_term",
    }
    assert {row["method"] for row in summary["table"]} == {"tad", "ffa"}
    assert summary["claims"]
    assert all(set(claim) == {"claim", "source", "holds", "figure", "interval"} for claim in summary["claims"])
    assert all((folder / claim["figure"]).is_file() for claim in summary["claims"] if claim["figure"])
    assert (folder / "report.html").stat().st_size > 10_000
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"cross_term", "disagreement_a", "disagreement_b", "consensus", "rho"} <= set(rows[0])


def test_adapters_of_a_run_load_in_plain_peft_with_the_accuracy_that_was_measured(trained):
    folder, _ = trained
    about = json.loads((folder / "adapters" / "classifier.json").read_text())
    head = load_file(folder / "adapters" / "head.safetensors")["head"]
    assert len(about["labels"]) == len(head)
    result = next(
        entry["result"]
        for entry in map(json.loads, (folder / "results.jsonl").read_text().splitlines())
        if entry["stage"] == "tad/seed0"
    )
    task = tad_lora.Task(tad_lora.TrainConfig.load(folder / "config.yaml").arm("tad"), 0)
    test = task.texts[1]
    tokenizer = load_base().tokenizer
    for peer in (0, 3):
        model = PeftModel.from_pretrained(
            read_base("minilm").model, str(folder / "adapters" / f"peer-{peer:03d}")
        ).eval()
        made = tokenizer(
            list(test.first), padding=True, truncation=True, max_length=about["max_length"], return_tensors="pt"
        )
        with torch.no_grad():
            logits = pool(model(**made).last_hidden_state, made["attention_mask"], False) @ head.T
        accuracy = float((logits.argmax(1).numpy() == test.y).mean())
        assert accuracy == pytest.approx(result["peers"][peer])
        stack = Stack(str(folder))  # what serve.adapters answers with
        served = np.array(
            stack.probabilities([Item(text, None, stack.read(f"peer-{peer:03d}")) for text in test.first])
        )
        assert np.abs(served - logits.softmax(1).numpy()).max() < 1e-5
    names = sorted(path.name for path in (folder / "adapters").iterdir() if path.is_dir())
    assert names == ["consensus", *(f"peer-{i:03d}" for i in range(4))]
    peers = [load_file(folder / "adapters" / f"peer-{i:03d}" / "adapter_model.safetensors") for i in range(4)]
    mean = load_file(folder / "adapters" / "consensus" / "adapter_model.safetensors")
    for key, value in mean.items():
        assert np.abs(np.mean([p[key].numpy() for p in peers], 0) - value.numpy()).max() < 1e-7
    config = json.loads((folder / "adapters" / "consensus" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == find_model("minilm")


@pytest.mark.slow
def test_theory_compare_and_sweep_run_over_ray(ray_cluster, tmp_path, monkeypatch, capsys):
    words = f"theory --out {tmp_path} --no-wandb --seeds 4 --p 0.5 0.02 --rounds 60".split()
    code, said = call([*words, "--intervals", "1", "5", "15"], monkeypatch, capsys)
    assert code == 0, said.err
    summary = json.loads((Path(said.out.splitlines()[-1][5:]) / "summary.json").read_text())
    holds = {claim["claim"]: claim["holds"] for claim in summary["claims"]}
    assert holds["the cross term falls with T"]
    assert len(summary["figures"]) == 5
    small = [*SMALL, "--data", GRAMMAR, "--out", str(tmp_path), "--peers", "4", "--block", "4"]
    code, said = call(
        ["compare", *small, "--methods", "tad", "lora", "local", "--lrs", "0.001", "0.01"], monkeypatch, capsys
    )
    assert code == 0, said.err
    folder = Path(said.out.splitlines()[-1][5:])
    summary = json.loads((folder / "summary.json").read_text())
    assert {row["metric"] for row in summary["table"]} >= {"accuracy", "tad's gain in accuracy"}
    stages = [json.loads(line)["stage"] for line in (folder / "results.jsonl").read_text().splitlines()]
    assert sum(stage.startswith("tune/") for stage in stages) == 2 * (2 + 2 + 1)  # local is tuned once for all graphs
    words = ["sweep", *small, "--problem", "regression", "--optimizer", "sgd", "--metric", "error", "--mode", "min"]
    code, said = call([*words, "--space", "interval=1,2", "lr=0.005,0.01"], monkeypatch, capsys)
    assert code == 0, said.err
    summary = json.loads((Path(said.out.splitlines()[-1][5:]) / "summary.json").read_text())
    assert len(summary["table"]) == 4
