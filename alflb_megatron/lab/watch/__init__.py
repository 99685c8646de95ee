"""A run that goes on, in the terminal: `alflb watch`.

`follow` reads what was appended to the run's metrics.jsonl since the last time, `view` renders what is known as a frame
or a line, `watch` does both until the run ends; `command` has the flags.
"""
