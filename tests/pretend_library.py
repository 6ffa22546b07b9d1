"""Compiles pretend_gpu.cpp and loads it. It must be imported before torch, which looks for a GPU once. Needs g++."""

import ctypes
import importlib.util
import subprocess
import tempfile
from pathlib import Path

source, torch_dir = Path(__file__).with_name("pretend_gpu.cpp"), Path(importlib.util.find_spec("torch").origin).parent
paths = f"-I{torch_dir / 'include'}", f"-L{torch_dir / 'lib'}", f"-Wl,-rpath,{torch_dir / 'lib'}"
with tempfile.TemporaryDirectory() as folder:
    library = f"{folder}/gpu.so"
    command = ["g++", "-std=c++20", "-shared", "-fPIC", str(source), "-o", library, *paths]
    subprocess.run([*command, "-lc10", "-ltorch_cpu"], check=True)
    loaded = ctypes.CDLL(library)

import torch  # noqa: E402, F401

loaded.guard()
