"""Seeing: from image files to pixel values to patch features. Knows no text and no language model."""
