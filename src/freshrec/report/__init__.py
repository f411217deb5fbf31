"""From results to words and pages."""
