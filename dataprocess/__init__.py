"""From raw annotations to the QA file."""
