"""The published laws, one family a file. Each file says its formula, its source and what could not be checked."""
