"""A run that goes on, in the terminal: `alflb watch`.

`follow` reads what was appended to the run's metrics.jsonl since the last time, `view` turns what is known into a frame
or a line, `watch` does both until the run ends.
"""
