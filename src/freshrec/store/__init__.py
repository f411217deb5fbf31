"""What lies on disk between two nights: every event that was ever delivered."""
