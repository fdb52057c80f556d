"""Jobs on a head that was started by `ray start`: submitted, refused, stopped, resumed, and attached to by address."""

import json

import numpy as np
import pytest
from machines import ROOT, folder_of, wait_for
from ray.job_submission import JobStatus, JobSubmissionClient
from safetensors.numpy import load_file

from raysys.runtime.session import SINGLE_THREADED

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
SMALL = ["--workers", "8", "--byzantine", "2", "--block", "2", "--seeds", "1", "--no-baselines", "--no-wandb"]
ATTACH = """
import os, ray
from raysys.runtime.session import SINGLE_THREADED, Session
with Session() as session:
    assert not session.embedded, "a second Ray was started"
    print(dict(ray.get(ray.remote(lambda: {name: os.environ.get(name) for name in SINGLE_THREADED}).remote())))
    print("CPUs", ray.cluster_resources()["CPU"])
assert ray.is_initialized(), "the session ended a Ray that it did not start"
"""


@pytest.fixture(scope="module")
def head(start_head):
    return start_head("--num-cpus=2", OMP_NUM_THREADS="3", RAY_JOB_STOP_WAIT_TIME_S="60")


@pytest.fixture
def client(head):
    return JobSubmissionClient(head.jobs)


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def model_of(folder):
    (file,) = folder.glob("stages/**/model.safetensors")
    return load_file(file)["model"]


def test_a_submitted_job_leaves_the_bits_of_an_embedded_one(head, make_machine, tmp_path):
    words = [*SMALL, "--rounds", "12", "--out"]
    submitted = folder_of(head.submit(*words, str(tmp_path / "submitted"), job="small"))
    summary = summary_of(submitted)
    assert (summary["status"], summary["system"]) == ("finished", "byzantine")
    alone = make_machine()
    output = alone.done("python", "-m", "jobs.byzantine", *words, str(tmp_path / "embedded"), "--cluster.hosts", "1")
    assert np.array_equal(model_of(submitted), model_of(folder_of(output)))
    assert not alone.processes(), "the embedded Ray outlived its session"


def test_the_working_directory_travels_without_environments_caches_and_history(head):
    (package,) = head.machine.root.glob("ray/session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    assert (package / "jobs" / "byzantine.py").exists()
    assert not [name for name in (".venv", ".venv-peers", ".git", "runs", ".hypothesis") if (package / name).exists()]
    assert sum(file.stat().st_size for file in package.rglob("*") if file.is_file()) < 20e6


def test_a_refused_configuration_fails_the_job_with_one_sentence(head, client, tmp_path):
    head.submit("--workers", "8", "--byzantine", "4", "--out", str(tmp_path / "runs"), job="refused")
    info = client.get_job_info("refused")
    assert (info.status, info.driver_exit_code) == (JobStatus.FAILED, 2)
    logs = client.get_job_logs("refused")
    assert logs.count("error: ") == 1
    assert "Traceback" not in logs
    assert "4" in logs.split("error: ")[1]
    assert not (tmp_path / "runs").exists()


def test_a_stopped_job_ends_cleanly_and_is_resumed(head, client, tmp_path):
    slow = ["--rounds", "800", "--cluster.snapshot-every", "1"]
    head.submit(*SMALL, *slow, "--out", str(tmp_path), job="long", wait=False)
    wait_for(lambda: list(tmp_path.glob("*/stages/**/manifest.json")), "the first barrier", 120)
    head.machine.done("ray", "job", "stop", "--address", head.jobs, "long")
    wait_for(lambda: client.get_job_status("long").is_terminal(), "the end of the job", 90)
    assert client.get_job_status("long") == JobStatus.STOPPED
    (folder,) = tmp_path.glob("byzantine-train-*")
    assert summary_of(folder)["status"] == "interrupted"
    assert "Traceback" not in client.get_job_logs("long")
    assert folder_of(client.get_job_logs("long")) == folder

    resumed = head.submit("--resume", str(folder), "--cluster.snapshot-every", "500", job="resumed")
    assert folder_of(resumed) == folder
    summary = summary_of(folder)
    assert (summary["status"], summary["resumed"]) == ("finished", 1)


def test_a_session_attaches_to_ray_address_and_its_processes_get_one_thread_each(head):
    output = head.machine.done("python", "-c", ATTACH, RAY_ADDRESS=head.address, PYTHONPATH=str(ROOT))
    assert str(SINGLE_THREADED) in output
    assert "CPUs 2.0" in output


def test_an_address_that_nobody_answers_is_refused_with_one_sentence(make_machine, tmp_path):
    ended = make_machine().run(
        "python", "-m", "jobs.byzantine", "--cluster.address", "127.0.0.1:9", "--out", str(tmp_path / "runs")
    )
    assert ended.returncode == 2
    assert "error: address: " in ended.stdout
    assert "127.0.0.1:9" in ended.stdout
    assert "Traceback" not in ended.stdout
    assert not (tmp_path / "runs").exists()
