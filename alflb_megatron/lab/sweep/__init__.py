"""Many training jobs, compared: `alflb reproduce` trains the runs of a plan, `alflb demo` three rules on a small model.

A plan walks from its YAML file (`plan_file`) into runs (`plan`), each a plan of `alflb train`; `execute` trains them
here, or hands them to Slurm or SkyPilot, and after a stop goes on from what the run folders hold (`run_state`);
`collect` makes results.csv of the finished ones, and `tables` and `figures` are made from results.csv alone. `flops`
says beforehand what it costs. `demo` trains in `processes` of its own and draws `comparison`.
"""
