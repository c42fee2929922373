import subprocess
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from ray.autoscaler._private.util import prepare_config, validate_config

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.mark.parametrize("script", sorted(RECIPES.glob("*.sh")), ids=lambda path: path.name)
def test_recipes__scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


def test_ray_cluster__is_what_the_launcher_takes() -> None:
    cluster = yaml.safe_load((RECIPES / "ray-cluster.yaml").read_text())
    whole = prepare_config(cluster)
    validate_config(whole)
    assert whole["available_node_types"]["gpu"]["max_workers"] == cluster["max_workers"]
