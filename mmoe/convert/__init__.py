"""Checkpoints to and from Hugging Face format; see docs/conversion.md."""

from mmoe.convert.compare import verify
from mmoe.convert.export import to_hf
from mmoe.convert.ingest import from_hf, read_hf

__all__ = ["from_hf", "read_hf", "to_hf", "verify"]
