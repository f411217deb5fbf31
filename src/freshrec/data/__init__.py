"""Logs: read, validate, split and generate them, and cut them into batches."""
