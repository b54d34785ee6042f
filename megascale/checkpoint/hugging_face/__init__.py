"""Models in Hugging Face's format, in and out.

- families.py: what each family calls its settings and tensors: tables;
- settings.py: config.json to a `Model` config and back, strictly: a key that is not understood is refused;
- tensors.py: which piece of which of our tensors each of theirs is;
- folder.py: an opened folder, every name, shape and dtype checked before a tensor is read;
- files.py: safetensors files, one tensor in memory at a time;
- import_folder.py, export_folder.py: the two directions;
- configuration_megascale.py, modeling_megascale.py: copied beside exported weights that no class of transformers can compute; never
  imported here.

transformers is not needed for any of it.
"""
