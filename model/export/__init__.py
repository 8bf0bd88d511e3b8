"""Export a trained model: merge LoRA and write a folder that other tools open, with a proof that it is the same model.

`python -m model.export --checkpoint DIR --output DIR` is the command.
"""
