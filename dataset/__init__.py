"""From a QA file to batches."""
