"""Everything that drives a training run: opening it, its steps, resuming, stages, logs. The loop itself is in train.py."""
