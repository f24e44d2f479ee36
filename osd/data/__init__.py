"""Data generation: prompts in, scored semi-on-policy completions out; pages that show what came of it.

`settings` and `parse` say what a run is, `reader` and `requests` turn rows into prompts of both sides, `writer` keeps what
was sampled, `generate` and `comparison` are the two runs, `inspection` reads their files.
"""
