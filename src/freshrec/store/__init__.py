"""Everything on disk: versions, the event log, clicks."""
