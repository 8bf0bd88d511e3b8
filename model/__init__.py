"""The model and its weights: projector, loss, building, what trains, checkpoints, answering."""
