"""Compress a context into a soft prompt: `pipeline.Compression` runs it, `evaluate.evaluate_prompt` scores the result.

From top to bottom: pipeline → (self_study, evaluate, report, trainer) → (context, matching, student, objectives)
→ (teacher, pairs, initial) → decoder. Nothing is imported here.
"""
