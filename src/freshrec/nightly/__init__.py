"""The night: a delivery becomes an update, and a gate decides whether it goes live."""
