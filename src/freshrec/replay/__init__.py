"""Replay a log span by span: measure, absorb, update; then compare the ways of updating."""
