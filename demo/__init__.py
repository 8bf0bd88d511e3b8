"""The demo's own tiny backbones and how they were made."""
