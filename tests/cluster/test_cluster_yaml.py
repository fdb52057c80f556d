"""The cluster files are what Ray accepts, checked with Ray's own schema."""

import json
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml

from raysys.runtime.session import ClusterConfig

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


@pytest.mark.parametrize("name", ["cluster.yaml", "cluster.local.yaml"])
def test_cluster_file_fits_rays_schema(name):
    jsonschema.validate(yaml.safe_load((ROOT / name).read_text()), SCHEMA)


def test_the_gcp_variant_in_the_docs_fits_rays_schema():
    blocks = (ROOT / "docs" / "operations.md").read_text().split("```yaml")[1:]
    configs = [yaml.safe_load(b.split("```")[0]) for b in blocks]
    gcp = [c for c in configs if c.get("provider", {}).get("type") == "gcp"]
    assert gcp
    for config in gcp:
        jsonschema.validate(config, SCHEMA)


def test_images_and_constraints_name_the_same_ray():
    pinned = next(l for l in (ROOT / "constraints.txt").read_text().splitlines() if l.startswith("ray=="))
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    images = [config["docker"]["image"]] + [
        t["docker"]["worker_image"] for t in config["available_node_types"].values() if "docker" in t
    ]
    assert all(f":{pinned.removeprefix('ray==')}-" in image for image in images)


def test_file_mounts_exist_and_hold_all_that_the_set_up_installs():
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    mounted = {Path(target).name for target in config["file_mounts"]}
    assert all((ROOT / source).exists() for source in config["file_mounts"].values() if not source.startswith("~"))
    assert {"pyproject.toml", "constraints.txt", "raysys", "actors", "jobs", "serve", "README.md", "LICENSE"} <= mounted


@pytest.mark.parametrize("name", ["cluster.yaml", "cluster.local.yaml"])
def test_every_cluster_carries_the_token_over(name):
    mounts = yaml.safe_load((ROOT / name).read_text())["file_mounts"]
    assert [target for target, source in mounts.items() if source == "~/.ray/auth_token"]


def test_head_has_no_cpus_and_every_worker_type_is_on_spot_and_starts_with_none():
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"]["CPU"] == 0
    for worker in types.values():
        assert worker["min_workers"] == 0 < worker["max_workers"] <= config["max_workers"]
        assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"


def test_the_operations_page_names_every_cluster_option_with_its_default():
    page = (ROOT / "docs" / "operations.md").read_text()
    for field, info in ClusterConfig.model_fields.items():
        default = "none" if info.default is None else f"{info.default:g}" if field.endswith("_s") else str(info.default)
        assert f"| `--cluster.{field.replace('_', '-')}` | {default} |" in page
