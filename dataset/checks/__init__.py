"""Check a QA file before training, and report what it contains."""
