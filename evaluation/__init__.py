"""How good the answers are, and whether they come from the picture."""
