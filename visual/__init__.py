"""Photo -> pixel_values -> patch features. Knows nothing of the config's file, of text or of language models."""
