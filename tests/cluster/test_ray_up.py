"""`ray up`, `ray job submit`, `ray rsync-down`, `ray down`, for real: cluster.local.yaml against a throwaway sshd.

What differs from cluster.local.yaml is only what a user would fill in (address, user, key) and the ports, because other
Rays may run on this computer. The head asks for a token: the laptop makes one, `ray up` carries it over.
"""

import contextlib
import getpass
import json
import os
import shutil
import socket
import subprocess

import pytest
import yaml
from machines import ROOT, START_S, Machine, folder_of, free_ports, ports_of_a_node, wait_for

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
MISSING = [name for name in ("rsync", "nc", "ssh", "ssh-keygen") if shutil.which(name) is None] + ["sshd"] * (not SSHD)
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)} (openssh-server, rsync, netcat-openbsd)"),
]
JOB = ["--workers", "8", "--byzantine", "2", "--block", "4", "--rounds", "10", "--seeds", "1", "--no-baselines"]


@pytest.fixture(scope="module")
def laptop(make_machine):
    """Where the user sits: has the key to the other machine, and a token that it makes itself."""
    machine = make_machine()
    keygen(machine.root / "id_user")
    machine.done("ray", "get-auth-token", "--generate")
    return machine


@pytest.fixture(scope="module")
def remote(make_machine, laptop):
    """A machine that can be reached over ssh only, with this environment's Ray on its PATH. Yields it and sshd's port."""
    machine = make_machine()
    keygen(machine.root / "host_key")
    (port,) = free_ports(1)
    shutil.copy(laptop.root / "id_user.pub", machine.root / "authorized_keys")
    (machine.home / ".bashrc").write_text(f"export PATH={machine.environment['PATH']}\n")
    of_machine = (
        "HOME",
        "RAYSYS_TEST_MACHINE",
        "RAY_TMPDIR",
        "RAY_USAGE_STATS_ENABLED",
        "WANDB_MODE",
        "XDG_CACHE_HOME",
    )
    config = machine.root / "sshd_config"
    config.write_text(
        f"""
        ListenAddress 127.0.0.1
        Port {port}
        HostKey {machine.root / "host_key"}
        PidFile none
        AuthorizedKeysFile {machine.root / "authorized_keys"}
        PasswordAuthentication no
        KbdInteractiveAuthentication no
        UsePAM no
        StrictModes no
        PermitRootLogin prohibit-password
        SetEnv {" ".join(f"{name}={machine.environment[name]}" for name in of_machine)}
        """
    )
    if os.geteuid() == 0:  # what sshd started by root insists on; the package's service makes it at boot
        os.makedirs("/run/sshd", exist_ok=True)
    log = machine.root / "sshd.log"
    sshd = subprocess.Popen([SSHD, "-D", "-f", str(config), "-E", str(log)], env=machine.environment)
    try:
        wait_for(lambda: sshd.poll() is not None or answers(port), "sshd's first answer", 20)
        assert sshd.poll() is None, log.read_text()
        yield machine, port
    finally:
        sshd.terminate()
        sshd.wait(timeout=10)


@pytest.fixture(scope="module")
def cluster(laptop, remote):
    """A cluster of the remote machine, up: the file that describes it and the address of its job server."""
    machine, ssh_port = remote
    config = yaml.safe_load((ROOT / "cluster.local.yaml").read_text())
    port, dashboard = free_ports(2)
    config["cluster_name"] = machine.root.name
    config["auth"] = {
        "ssh_user": getpass.getuser(),
        "ssh_private_key": str(laptop.root / "id_user"),
        "ssh_proxy_command": f"nc 127.0.0.1 {ssh_port}",
    }
    config["head_start_ray_commands"] = [
        own_ports(command, port, dashboard) for command in config["head_start_ray_commands"]
    ]
    file = laptop.root / "cluster.yaml"
    file.write_text(yaml.safe_dump(config))
    try:
        laptop.done("ray", "up", "-y", "--no-config-cache", str(file), timeout=START_S)
        yield file, f"http://127.0.0.1:{dashboard}"
    finally:
        if machine.processes():
            with contextlib.suppress(subprocess.TimeoutExpired):
                laptop.run("ray", "down", "-y", str(file), timeout=START_S)


def own_ports(command: str, port: int, dashboard: int) -> str:
    """The head's start command on ports of its own, with two CPUs."""
    if "ray start" not in command:
        return command
    assert "--port=6379" in command
    assert "--dashboard-port=8265" in command
    moved = command.replace("--port=6379", f"--port={port}").replace(
        "--dashboard-port=8265", f"--dashboard-port={dashboard}"
    )
    return " ".join([moved, "--num-cpus=2", *ports_of_a_node()])


def keygen(file):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)], check=True, timeout=30)


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def submit(machine: Machine, address: str, *words: str, **variables: str):
    command = ["ray", "job", "submit", "--address", address, "--working-dir", "."]
    return machine.run(*command, "--", "python", "-m", "jobs.byzantine", *words, **variables)


def test_a_job_runs_on_a_cluster_of_ray_up_and_its_result_is_fetched(cluster, laptop, remote):
    file, address = cluster
    out = remote[0].home / "runs"
    job = submit(laptop, address, *JOB, "--out", str(out), RAY_AUTH_MODE="token")
    assert job.returncode == 0, job.stdout
    folder = folder_of(job.stdout)
    assert folder.parent == out
    laptop.done("ray", "rsync-down", str(file), str(folder) + "/", str(laptop.home / "fetched") + "/")
    summary = json.loads((laptop.home / "fetched" / "summary.json").read_text())
    assert (summary["status"], summary["system"], summary["seeds"]) == ("finished", "byzantine", [0])
    assert (laptop.home / "fetched" / "report.html").stat().st_size > 10_000


def test_who_has_no_token_is_refused(cluster, make_machine):
    stranger = make_machine()
    refused = submit(stranger, cluster[1], *JOB)
    assert refused.returncode != 0
    assert "oken" in refused.stdout  # "Authentication required: ... token"
    wrong = submit(stranger, cluster[1], *JOB, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 32)
    assert wrong.returncode != 0
    assert "run:" not in refused.stdout + wrong.stdout


def test_ray_down_leaves_no_process(cluster, laptop, remote):
    machine, _ = remote
    assert any("raylet" in process.name() for process in machine.processes())
    laptop.done("ray", "down", "-y", str(cluster[0]), timeout=START_S)
    # ssh keeps a connection for some seconds; it belongs to the laptop, its far end to the machine.
    wait_for(lambda: not machine.processes(), "the end of all processes", 30)
