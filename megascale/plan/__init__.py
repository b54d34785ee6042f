"""The planner: memory and time of a run on a cluster by arithmetic, and the search for the best layout. No torch.distributed."""
