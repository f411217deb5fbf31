"""Logs: reading, splitting, generating, batching."""
