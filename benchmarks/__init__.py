"""What the project measures of itself, and of others beside it: run a module with `python -m` from the root."""
