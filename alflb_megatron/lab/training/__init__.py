"""One training job on real Megatron-Core: `alflb train`.

`command` has the flags. `job` holds every setting and the presets, `resolve` makes a checked plan of what was given,
and `launch` starts the ranks. On each of them `train` runs the plan: `build` makes configuration, model and, with
`optimizer`, optimizer and scheduler; `checkpoint` saves and loads all of them; `forward_backward` takes global batches
through Megatron-Core's schedule. What a step shows is gathered by `metrics`, written into the run's folder and shown by
`progress`; `certificates` and `replay/score_recorder.py` look at the router's scores if asked to.
"""
