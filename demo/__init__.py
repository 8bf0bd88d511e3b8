"""The demo: its world, its raw data, and its two tiny backbones with the code that trained them."""
