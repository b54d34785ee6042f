"""Layout-free checkpoints: any layout writes rectangles of global tensors, any other layout reads them.

A checkpoint is a folder ``step-00000100`` with

- ``shard-00000.safetensors``, one for each rank that writes: the rectangles (layout.py, shard.py),
- ``index.json``: where each rectangle of each global tensor is (index.py),
- ``state.json``: whatever the trainer needs besides tensors,
- ``manifest.json``: size and digest of the files above, written last (manifest.py).

It is built under another name and appears by one atomic rename (folders.py), so a checkpoint is there as a whole or not at all.
Nothing in it is a pickle, and nothing that is not listed in the manifest is ever opened.
"""
