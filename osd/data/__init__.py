"""Data generation: prompts in, scored semi-on-policy completions out, with pages that describe the result.

`settings` and `parse` define a run, `reader` and `requests` turn rows into prompts of both sides, `writer` stores samples,
`generate` and `comparison` are the two runs, `inspection` reads their files.
"""
