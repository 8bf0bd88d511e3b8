"""From the QA file to batches."""
