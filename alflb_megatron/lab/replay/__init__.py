"""Rules over recorded router scores, so that one chooses a rule before paying for a cluster: `alflb replay`.

`score_recorder` writes the scores of a training into its run folder. `scores` opens a recording, a run folder
(`score_folder`) or a single file (`score_files`), as a `recording` that is read step by step. `replayed_rules` routes
each step under a rule's bias and moves it, beside the best that could have been in hindsight; `replay` walks all of
them through the recording, and `command` prints the table and has `plots` drawn. `sequence_floor` says how low any bias
could come that is set before a batch; a training asks it of its validation set, by the `gate_scores` of its routers.
"""
