"""Notus-7B-v1 from scratch: DPO of a Mistral-7B in pure PyTorch. `python -m notus` lists the commands."""

__version__ = "0.2.0"
