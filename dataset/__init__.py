"""Reading: from a QA file to batches."""
