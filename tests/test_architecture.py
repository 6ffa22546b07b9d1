"""The shape of the repository: who may import whom, and that every file has its test and its line in the README."""

import ast
import re
from pathlib import Path

import pytest

from notus import config
from notus.losses import LOSSES

ROOT = Path(__file__).parent.parent
ORDER = [  # a file imports only from files above it
    *("files", "config", "chat", "tokenizer", "rows", "tokens", "packing", "attention", "logprobs", "dims", "model"),
    "losses",
    *("distributed", "lora", "weights", "base", "cost", "optim", "checkpoint", "trackers", "metrics"),
    *("run", "reference"),
]
LEAVES = [  # only train.py imports them
    *("report", "card", "plan", "generate", "answers", "endpoint", "outputs", "slices", "judge"),
    *("evaluate", "plot", "demo"),
    "explain",
]
EXCEPT = {  # of the leaves
    "report": {"card", "plan", "slices", "plot"}, "explain": {"demo"},
    "answers": {"generate"}, "endpoint": {"answers"}, "outputs": {"answers"}, "judge": {"answers", "slices"},
    "evaluate": {"generate", "answers", "endpoint", "outputs", "judge", "slices"},
}  # fmt: skip

SOURCES = {path.stem: path for path in sorted((ROOT / "notus").glob("*.py")) if not path.stem.startswith("__")}
SCRIPTS_IN_ORDER = ["train.py", "binarize.py", "audit.py"]
SCRIPTS = {path.stem: path for path in sorted(ROOT.glob("*.py"))}


def imports(path: Path) -> set[str]:
    """Dotted names of all that a file imports, wherever in it: `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def notus_imports(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("notus.")} & SOURCES.keys()


def test_every_file_has_a_place_in_the_order():
    assert SOURCES.keys() == {*ORDER, *LEAVES}


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_imports_only_from_files_above_it(name: str):
    above = ORDER[: ORDER.index(name)] if name in ORDER else ORDER
    assert notus_imports(SOURCES[name]) <= {*above, *EXCEPT.get(name, ())}


def test_settings_stop_at_train_and_run():
    """Everything else takes plain arguments, so that it can be called from Python."""
    readers = {name for name, path in SOURCES.items() if "config" in notus_imports(path)}
    assert readers == {"run", "plan", "reference"}  # the last two in their own `main`


def test_train_py_is_read_in_one_sitting():
    text = SCRIPTS["train"].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    names = [
        alias.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "notus"
        for alias in node.names
    ]
    assert len(names) <= 30, names


def test_the_loss_stands_beside_backward_and_step():
    tree = ast.parse(SCRIPTS["train"].read_text(encoding="utf-8"))
    (step,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train_step")
    called = {ast.unparse(node.func).rpartition(".")[2] for node in ast.walk(step) if isinstance(node, ast.Call)}
    assert {"pair_logps", "preference_loss", "backward", "clip_grad_norm_", "step"} <= called
    losses = ast.parse(SOURCES["losses"].read_text(encoding="utf-8"))
    first = next(node for node in losses.body if isinstance(node, ast.FunctionDef))
    assert first.name == "dpo" and "equation 7" in ast.get_docstring(first)  # nobody has to search for it


def test_a_loss_is_a_dozen_lines_over_six_numbers():
    tree = ast.parse(SOURCES["losses"].read_text(encoding="utf-8"))
    found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for name in LOSSES:
        function = found[name]
        body = [line for node in function.body[1:] for line in ast.unparse(node).splitlines()]
        assert len(body) + 1 <= 12 and "arXiv:" in ast.get_docstring(function) + ast.get_docstring(tree), name
        arguments = [argument.arg.lstrip("_") for argument in function.args.args]
        assert arguments[:4] == ["policy", "reference", "tokens", "beta"], name


def test_the_tests_test_this_checkout():
    assert Path(config.__file__).parent.parent == ROOT


def test_the_imports_are_seen():
    assert {"packing", "attention", "logprobs"} <= notus_imports(SOURCES["model"])
    assert {"distributed", "report"} <= notus_imports(SCRIPTS["train"])  # from notus import distributed, report


def test_binarize_stands_alone():
    assert not {name.split(".")[0] for name in imports(SCRIPTS["binarize"])} & {"notus", "torch"}


def test_audit_needs_notus_only_for_pairs():
    """Beyond binarize.py it imports notus.rows, in the function that reads pairs, so raw records need nothing of it."""
    path = SCRIPTS["audit"]
    assert not {name.split(".")[0] for name in imports(path)} & {"torch", "numpy"}
    assert notus_imports(path) == {"rows"}
    top = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
    assert not [node for node in top if node.module.startswith("notus")]


def test_peers_are_imported_by_tests_and_benchmarks_only():
    for path in (*SOURCES.values(), *SCRIPTS.values()):
        assert not {name.split(".")[0] for name in imports(path)} & {"transformers", "trl", "accelerate", "peft"}, path


def test_no_file_is_named_for_nothing_in_particular():
    assert not SOURCES.keys() & {"utils", "util", "common", "helpers", "misc"}


def test_every_file_has_its_test_and_every_test_its_file():
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert tests - {
        "architecture",
        "benchmarks",
        "compile",
        "families",
        "faults",
        "fuzz",
        "memory",
        "pretend_gpu",
        "project",
        "smollm2",
    } == {
        *SOURCES,
        *SCRIPTS,
    }


def test_readme_maps_every_file_and_no_other():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    mapped = re.findall(r"^\| `((?:notus/)?\w+\.py)` \|", readme, re.MULTILINE)
    files = {str(path.relative_to(ROOT)) for path in (*SOURCES.values(), *SCRIPTS.values())}
    assert set(mapped) == files
    assert mapped == [*SCRIPTS_IN_ORDER, *(f"notus/{name}.py" for name in (*ORDER, *LEAVES))]  # the order tested above


def test_readme_commands_name_what_exists():
    """Programs, files, settings and flags of every command in the README. That the quickstart runs is CI's to see."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    commands = [line.partition(" #")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    checked = 0
    for command in commands:
        for module in re.findall(r"-m notus\.(\w+)", command):
            assert module in SOURCES, command
        for path in re.findall(r"configs/[\w.-]+\.toml", command):
            assert (ROOT / path).is_file(), command
        for name in re.findall(r"(?<![\w.])(\w+\.\w+)=", command):
            assert name in config.SETTINGS, command
        program = next((p for p in (r"-m notus\.(\w+)", r"(audit|binarize|train)\.py") if re.search(p, command)), None)
        if program:
            name = re.search(program, command)[1]
            source = (SOURCES | SCRIPTS)[name].read_text() + SOURCES["generate"].read_text()
            source += SOURCES["config"].read_text() if name == "train" else ""
            for flag in re.findall(r" (--[\w-]+)", command.partition(re.search(program, command)[0])[2]):
                assert f'"{flag}"' in source, command
            checked += 1
    assert checked > 10
