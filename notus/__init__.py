"""notus: Notus-7B-v1 from scratch. DPO of a Mistral-7B in pure PyTorch, one file per idea; start at train.py."""

__version__ = "0.1.0"
