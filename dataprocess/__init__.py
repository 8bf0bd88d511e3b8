"""Data preparation: raw annotations to the QA file."""
