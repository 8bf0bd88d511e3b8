"""Scores of answers, loss on held-out records, and the page of answers."""
