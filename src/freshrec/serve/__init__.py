"""Serving: from a state and users to ranked items."""
