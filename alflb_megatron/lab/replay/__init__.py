"""Rules over recorded router scores, so that one chooses a rule before paying for a cluster: `alflb replay`.

`scores` opens a recording, step by step; `replayed_rules` routes each step under a rule's bias and moves it, beside the
best that could have been in hindsight; `replay` walks all of them through the recording and prints the table.
"""
