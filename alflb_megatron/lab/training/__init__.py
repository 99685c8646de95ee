"""One training job on real Megatron-Core: `alflb train`.

`command` has the flags; `job` resolves them and a preset into a plan and refuses what cannot work; `launch` starts the
ranks; `train` runs the plan on each of them: `build` makes Megatron-Core's objects, `checkpoint` saves and loads them,
and what a step shows goes through `step_record` into the run's folder. `score_recorder` and `certificates` look at the
router's scores if asked to.
"""
