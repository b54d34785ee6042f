"""What a run shows and records: the metrics, where they go, and the dashboard that displays them."""
