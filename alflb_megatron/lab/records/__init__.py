"""A run's folder: what is written in it, and how it is read back. No torch.

`run_folder` is what the training writes with: config.json once, a line of metrics.jsonl (`metrics_file`) a step,
summary.json (`summary`) at the end; `files` writes each whole or not at all, `versions` says what the run rested on.
The way back is `step_record` (one record, whatever is wrong with it) and `history` (a whole run in bounded memory),
which report and watch read.
"""
