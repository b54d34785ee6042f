"""Scaling laws: a registry of published ones, fits of our own runs, and comparisons of both.

Rooms inside: `families/` holds the published laws, one file each; `law.py` says what an entry is; `form.py` says what can be fitted;
`fit.py`, `uncertainty.py`, `holdout.py` and `identify.py` fit; `compare.py` and `routers.py` compare. Nothing here uses torch, except
`run_folders.py`, which asks the model accounting for the size of a run's model.

Symbols: N parameters (each law says which), D training tokens, C training FLOPs, P streams, E experts, G granularity, U unique tokens.
"""
