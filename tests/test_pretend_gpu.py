"""Whole training steps with every tensor on a GPU that is only pretended (pretend_gpu.py): what is on the wrong device
or of the wrong dtype fails here."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from notus.losses import METRICS

WAYS = [  # each level and each way at least once; with WAYS=all in the environment, the rest too
    ("none", "eager"), ("elementwise", "replicate+stay"), ("full", "offload"), ("half", "compiled+offload+lora"),
]  # fmt: skip
if os.environ.get("WAYS") == "all":
    WAYS += [("half", "lora"), ("full", "compiled+offload"), ("none", "compiled"), ("elementwise", "compiled")]


@pytest.fixture(scope="module")
def steps() -> dict[tuple[str, str], dict]:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    work = [word for way in WAYS for word in way]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # a real GPU
    script = Path(__file__).with_name("pretend_gpu.py")
    done = subprocess.run([sys.executable, str(script), *work], capture_output=True, text=True, env=hidden)
    assert done.returncode == 0, done.stderr
    return dict(zip(WAYS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize(("level", "way"), WAYS)
def test_a_step_keeps_to_its_devices_and_dtypes(level: str, way: str, steps: dict):
    step = steps[level, way]
    home = "cpu" if "offload" in way else "cuda:0"
    dtypes = ["torch.bfloat16", "torch.float32"] if "lora" in way else ["torch.float32"]  # frozen, trained
    assert step["weights"] == [f"{home} {dtype}" for dtype in dtypes]
    assert step["state"] == f"{home} torch.float32"
    assert step["logps"] == ["cuda:0", "torch.float32", [3, 2]]


@pytest.mark.parametrize(("level", "way"), WAYS)
def test_the_host_reads_the_sums_of_a_step_and_nothing_else(level: str, way: str, steps: dict):
    """The metrics, whether to stop, and the gradient's norm, in each of two steps."""
    assert len(steps[level, way]["waits"]) == 2 * (len(METRICS) + 2)


@pytest.mark.parametrize(("level", "way"), [way for way in WAYS if "compiled" in way[1]])
def test_a_compiled_layer_is_one_graph_with_its_attention(level: str, way: str, steps: dict):
    """As many as tests/test_compile.py says of two layers. With LoRA the first is a case of its own, but it is the only
    one before the last."""
    assert steps[level, way]["breaks"] == 0
    assert steps[level, way]["graphs"] == 4
