"""Data: ingestion into digested token files, blending, sample order and packing.

Preparing (`prepare`) turns documents into a corpus folder; reading (`open_data`) turns corpora into micro-batches.
Preparing never imports torch.
"""
