"""megascale: a pretraining system that asks which axis to scale (streams, experts, blocks, data or compute)."""

__version__ = "0.1.0"
