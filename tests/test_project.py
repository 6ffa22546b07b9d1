"""What stands beside the code: the list of commands, the documents, the citation, the Slurm script."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser, parse_args

import notus
from notus import config, demo
from notus.__main__ import commands
from notus.base import Frame, read_base
from notus.model import Mistral

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["CONTRIBUTING.md", "docs/design.md", "docs/dpo.md", "docs/judge.md", "docs/library.md", "train.slurm"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# --- python -m notus -----------------------------------------------------------------------------------------------


def test_every_command_is_listed_with_the_first_line_of_its_docstring():
    listed = commands()
    for path in (ROOT / "notus").glob("[!_]*.py"):
        runs = "\nif __name__ ==" in path.read_text(encoding="utf-8")
        assert (path.stem in listed) == runs, path
        if runs:
            assert listed[path.stem] == ast.get_docstring(ast.parse(read(f"notus/{path.name}"))).splitlines()[0]


def test_the_list_is_printed_without_importing_torch():
    command = [sys.executable, "-X", "importtime", "-m", "notus"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == len(commands()) + 2
    for name, line in commands().items():
        assert re.search(rf"^python -m notus\.{name} +{re.escape(line)}$", done.stdout, re.MULTILINE)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "ast" in imported
    assert not imported & {"torch", "numpy", "tokenizers"}


# --- documents -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_names_files_and_tests_that_exist(name: str):
    text = read(name)
    tests = {
        found
        for path in ROOT.glob("tests/test_*.py")
        for found in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert set(re.findall(r"(?<![/\w])(test_\w+)(?![\w.])", text)) - {"test_size"} <= tests  # a setting
    for path in re.findall(r"(?<![\w./])((?:notus|tests|docs|benchmarks|configs|\.ci)/[\w./-]*\w)", text):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / name).parent.joinpath(target).exists(), target


def test_the_example_of_the_library_page_runs(tmp_path: Path, monkeypatch, capsys):
    """In a notebook's namespace, with the demo's base in small and untrained."""
    (base := tmp_path / "runs" / "demo" / "base").mkdir(parents=True)
    demo.write_shell(base, demo.Settings(hidden_size=32, num_layers=1))
    model = Mistral(read_base(base, need_weights=False).dims)
    model.initialize(seed=0)
    save_file(dict(model.state_dict()), base / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.chdir(tmp_path)

    (code,) = re.findall(r"^```python\n(.*?)^```", read("docs/library.md"), re.MULTILINE | re.DOTALL)
    exec(code, {})
    counts, *steps, held_out = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"(\d+) pairs of \1 rows: \1 prompt/chosen/rejected strings", counts)
    losses = [float(line.rpartition(" ")[2]) for line in steps]
    assert len(losses) == 10 and losses[0] == 0.6931 and losses[-1] < 0.5
    right, pairs = map(int, re.findall(r"\d+", held_out))
    assert right == pairs == 40 - int(counts.split()[0])
    assert read_base(tmp_path / "runs" / "mine").frame == Frame()


def test_the_order_in_the_design_is_the_order_of_the_imports():
    words = re.search(r"to its left in this list:\n\n((?:    .+\n)+)", read("docs/design.md"))[1].split()
    leaves = re.findall(
        r"`(\w+)`",
        re.search(r"with the few exceptions that the\s+test\s+names: (.+?)\(", read("docs/design.md"), re.S)[1],
    )
    files = {path.stem: path for path in (ROOT / "notus").glob("[!_]*.py")}
    assert sorted([*words, *leaves]) == sorted(files)
    for place, word in enumerate(words):
        source = files[word].read_text(encoding="utf-8")
        imported = set(re.findall(r"^(?:from notus\.|from notus import |import notus\.)(\w+)", source, re.MULTILINE))
        assert imported & files.keys() <= set(words[:place]), word


def test_bfloat16_weights_would_not_move():
    """The figure of docs/design.md: 5e-7 is rounded away from 2.5e-4 on, but not everywhere below 1.2e-4."""
    weights = torch.logspace(-4, 1, 1000).bfloat16()
    moved = (weights - torch.tensor(5e-7).bfloat16() != weights) | (weights + torch.tensor(5e-7).bfloat16() != weights)
    assert not moved[weights >= 2.5e-4].any()
    assert moved[weights < 1.2e-4].any()


# --- citation ------------------------------------------------------------------------------------------------------


def test_the_citation_has_our_version_and_the_works_that_are_reimplemented():
    text = read("CITATION.cff")
    keys = re.compile(
        r"( {0,6}(- )?[a-z-]+:( .+)?)| {6}- \{given-names: [^,:]+, (name-particle: [^,:]+, )?family-names: [^,:]+\}"
    )
    for line in text.splitlines():  # as much of YAML as the file uses
        assert keys.fullmatch(line), line
    assert re.search(r"^version: (.+)$", text, re.MULTILINE)[1] == notus.__version__
    for work in ("2305.18290", "2310.16944", "2310.01377", "2310.06825", "github.com/argilla-io/notus"):
        assert work in text


# --- Slurm ---------------------------------------------------------------------------------------------------------


def test_the_slurm_script_is_bash_and_names_what_exists():
    subprocess.run(["bash", "-n", ROOT / "train.slurm"], check=True)
    text = read("train.slurm").replace("\\\n", " ")
    command = re.search(r"^srun \S+ torchrun (.*) &$", text, re.MULTILINE)[1].replace("$SLURM_NNODES", "2")
    known = "--shutdown-timeout" in get_args_parser().format_help()  # from torch 2.12 on
    command = command.replace("$patience", re.search(r'patience="(.*)"', text)[1] if known else "")
    arguments = parse_args(shlex.split(command))  # exits if torchrun does not know a flag
    assert arguments.training_script == "train.py"
    path, *overrides = arguments.training_script_args
    assert config.load(ROOT / path, overrides).distributed.replicate == 2


SRUN = """#!/bin/bash
mkdir -p runs/notus-7b-v1; status=runs/notus-7b-v1/status.json
trap 'echo "{{\\"state\\": \\"preempted\\", \\"step\\": 3}}" > $status; exit 1' USR1
echo $$ > srun.pid
{body}
"""


@pytest.mark.parametrize(
    "body, code, requeued",
    [
        ("kill -USR1 $PPID; for i in {1..100}; do sleep 0.05; done", 1, True),  # Slurm's warning
        ('echo \'{"state": "finished"}\' > $status', 0, False),
        ("exit 1", 1, False),  # at its start, behind an older preemption
    ],
)
def test_a_preempted_job_is_requeued_and_no_other(body: str, code: int, requeued: bool, tmp_path: Path):
    """train.slurm with stand-ins for Slurm's commands. What a job before it left says `preempted`."""
    stand_ins = {
        "srun": SRUN.format(body=body),
        "scontrol": '#!/bin/bash\n[ $1 = show ] && echo node1 || echo "$@" > requeued\n',
        "scancel": '#!/bin/bash\n[ "$*" = "--signal=USR1 7" ] && kill -USR1 $(cat srun.pid)\n',
    }
    (tmp_path / "bin").mkdir()
    for name, script in stand_ins.items():
        path = tmp_path / "bin" / name
        path.write_text(script)
        path.chmod(0o755)
    status = tmp_path / "runs" / "notus-7b-v1" / "status.json"
    status.parent.mkdir(parents=True)
    status.write_text('{"state": "preempted", "step": 2}\n')
    os.utime(status, (1e9, 1e9))
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[1-2]"}
    environment |= {"SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", ROOT / "train.slurm"], cwd=tmp_path, env=environment, timeout=60)
    assert done.returncode == code
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_a_wheel_has_what_the_demo_and_the_commands_after_it_need(tmp_path: Path):
    copied = tmp_path / "notus"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (copied / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copied / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=copied, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("notus_dpo-")
    with zipfile.ZipFile(wheel) as archive:
        names = {re.sub(r"^[^/]+\.data/data/share/notus/", "share:", name) for name in archive.namelist()}
    files = {str(path.relative_to(ROOT)) for folder in ("configs", "page") for path in (ROOT / folder).rglob("*.*")}
    shared = {name.removeprefix("share:") for name in names if name.startswith("share:")}
    assert shared == {*files, "page/tabulator/LICENSE", "train.py", "binarize.py", "audit.py"}
    assert {f"notus/{path.name}" for path in (ROOT / "notus").glob("*.py")} | {"notus/py.typed"} <= names
    top = {name.partition("/")[0] for name in names if not name.startswith("share:")}
    assert {name for name in top if not name.endswith(".dist-info")} == {"notus"}  # no `train` for others to import
