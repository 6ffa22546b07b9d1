"""benchmarks/step.py leaves out one technique after another. Each is only a way to compute the same thing."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAM = """
import json
from argparse import Namespace
from functools import partial
import step
from tiny import tiny_config

step.cpu_flops = lambda **_: 1e9
step.distributed.shard = partial(step.distributed.shard, cpu_offload=True)  # under FSDP2, as on GPUs
arguments = Namespace(shape=("tiny", tiny_config()), budget=512, scale=0.05, pairs=3, steps=3)
arguments.compile = arguments.profile = False
world = step.distributed.start("cpu")
offs = [[], *([switch] for switch in step.SWITCHES)]
results = [step.measure(arguments, world, level, off) for level in ("none", "full") for off in offs]
step.distributed.stop()
print(step.table(results))
print(json.dumps(results))
"""


def test_a_step_without_any_of_its_techniques_has_the_same_losses():
    paths = os.pathsep.join(map(str, (ROOT / "benchmarks", ROOT / "tests", ROOT)))
    command, environment = [sys.executable, "-c", PROGRAM], os.environ | {"PYTHONPATH": paths}
    *table, last = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.splitlines()
    results = json.loads(last)
    assert len(results) == 14 and sum("--no-packing" in line for line in table) == 2
    for result in results:
        assert result["losses"] == pytest.approx(results[0]["losses"], abs=1e-5), result["variant"]
        assert min(result["pairs_per_second"], result["planned_gib"], result["longest"]) > 0
