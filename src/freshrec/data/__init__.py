"""Logs: reading, cutting, generating, batching."""
