"""The parts put together: projector, the whole model, what of it trains, checkpoints."""
