"""An autoscaled cluster that starts with a head of 0 CPUs, as in cluster.yaml; its workers are raylets on this computer."""

import json

import pytest
import yaml
from machines import ROOT, folder_of, free_ports
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider
from ray.util import get_node_ip_address

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def head(start_head, tmp_path_factory):
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    types = config["available_node_types"]
    head_resources = types[config["head_node_type"]]["resources"]
    (port,) = free_ports(1)
    fake = {
        "cluster_name": "fake",
        "max_workers": 2,
        "provider": {
            # Ray's own provider for such tests, by its class: the type "fake_multinode" needs a file that the wheel lacks.
            "type": "external",
            "module": f"{FakeMultiNodeProvider.__module__}.FakeMultiNodeProvider",
            "gcs_address": f"{get_node_ip_address()}:{port}",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
        },
        "available_node_types": {
            "ray.head.default": {"resources": head_resources, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        "head_node_type": "ray.head.default",
        "upscaling_speed": config["upscaling_speed"],
        "idle_timeout_minutes": 5,
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{key: [] for key in (f"{who}setup_commands" for who in ("", "head_", "worker_"))},
        **{key: [] for key in ("head_start_ray_commands", "worker_start_ray_commands", "initialization_commands")},
        **{key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
    }
    file = tmp_path_factory.mktemp("autoscaling") / "fake.yaml"
    file.write_text(json.dumps(fake))
    return start_head(
        f"--num-cpus={head_resources['CPU']}",
        f"--autoscaling-config={file}",
        port=port,
        AUTOSCALER_UPDATE_INTERVAL_S="1",
        RAY_FAKE_CLUSTER="1",
        RAY_enable_autoscaler_v2="1",
        RAY_CLOUD_INSTANCE_ID=FAKE_HEAD_NODE_ID,
        RAY_OVERRIDE_NODE_ID_FOR_TESTING=FAKE_HEAD_NODE_ID,
    )


def test_a_job_that_asks_for_two_hosts_makes_a_cluster_without_cpus_grow(head, tmp_path):
    before = head.machine.done("ray", "status", "--address", head.address)
    assert "CPU" not in before.partition("Usage")[2], before
    words = ["--workers", "8", "--byzantine", "2", "--block", "2", "--rounds", "10", "--seeds", "1", "--no-baselines"]
    words += ["--no-wandb", "--cluster.hosts", "2", "--cluster.start-timeout-s", "150", "--out", str(tmp_path)]
    # Not through `ray job submit`: the made-up nodes share one folder, in which each unpacks the working directory anew.
    output = head.machine.done("python", "-m", "jobs.byzantine", *words, RAY_ADDRESS=head.address)
    assert json.loads((folder_of(output) / "summary.json").read_text())["status"] == "finished"
    assert "/2.0 CPU" in head.machine.done("ray", "status", "--address", head.address)
