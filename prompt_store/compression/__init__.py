"""Compress a context into a soft prompt: `pipeline.Compression` does it, `baselines.evaluate_prompt` scores one.

From top to bottom: pipeline → (gold, forecast, learning) → pace → evaluation → training → frozen → data. Nothing is
imported here.
"""
