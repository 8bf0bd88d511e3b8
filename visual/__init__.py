"""From image files to pixel values to patch features. The config file, text and language models are not known here."""
