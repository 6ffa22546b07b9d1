"""List the commands: `python -m notus`."""

import ast
from pathlib import Path

from notus.files import SHARED


def commands() -> dict[str, str]:
    """Name -> first line of its docstring. Files are parsed, not imported, since importing torch takes seconds."""
    here = Path(__file__).parent
    found = {}
    for path in sorted([*here.glob("[!_]*.py"), *here.glob("*/__main__.py")]):
        source = path.read_text(encoding="utf-8")
        if path.stem == "__main__" or '__name__ == "__main__"' in source:
            name = path.parent.name if path.stem == "__main__" else path.stem
            found[name] = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return found


if __name__ == "__main__":
    for name, line in commands().items():
        print(f"python -m notus.{name:10} {line}")
    print(f"\nEach has --help. Scripts in {SHARED}: train.py; binarize.py and audit.py for its data.")
