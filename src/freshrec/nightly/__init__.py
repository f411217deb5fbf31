"""The nightly job: update the live version with a delivery, and let the gate decide whether the result goes live."""
